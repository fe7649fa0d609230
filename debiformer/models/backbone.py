"""Any hierarchical timm model as a backbone for dense tasks: four maps, at strides 4, 8, 16 and 32."""

from typing import Any, Self, cast

import timm
from torch import Tensor, nn

from ..nearest import did_you_mean
from .checkpoints import backbone_inside, differences, list_problems, load_published, read_checkpoint
from .pyramid import Pyramid
from .weights import load_weights

STRIDES = [4, 8, 16, 32]


class Backbone(nn.Module):
    """Images (B, 3, H, W) to maps (B, C_i, H / 4, W / 4) and so on to H / 32, the finest first.

    Args:
        name: A hierarchical timm model.
        pretrained: True takes the weights that timm knows for the model, a path those of that file: a published checkpoint of ours or of
            timm's, or one of a dense run here. What such a file holds for a task is left out.
        freeze_norms: Keep batch norms as they are: neither their statistics nor their weights are trained.
        options: Further arguments of the model's constructor.

    Attributes:
        channels: Of the four maps.

    Raises:
        FileNotFoundError: If there is no weights file at that path.
        ValueError: If timm has no such model, it has no such maps, or the weights do not fit it.
    """

    def __init__(self, name: str, pretrained: bool | str = False, freeze_norms: bool = False, **options: Any) -> None:
        super().__init__()
        if not timm.is_model(name):
            raise ValueError(f"backbone={name!r} is unknown to timm: {did_you_mean(name, timm.list_models())}")
        features: Any = dict(features_only=True, feature_cls="getter", out_indices=(-4, -3, -2, -1))
        try:
            self.maps = cast(Any, timm.create_model(name, pretrained=pretrained is True, **features, **options))
        except (RuntimeError, TypeError) as error:  # no weights, arguments that the constructor does not have, no maps to get
            raise ValueError(f"backbone={name!r} with pretrained={pretrained!r} and {options}: {error}") from error
        if isinstance(pretrained, str) and isinstance(self.maps.model, Pyramid):
            load_published(pretrained, self.maps)
        elif isinstance(pretrained, str) and (inside := backbone_inside(read_checkpoint(pretrained))):
            problems = differences(inside, self.maps.model.state_dict())
            if any(problems.values()):
                raise ValueError(f"the backbone in pretrained={pretrained!r} does not fit {name}.{list_problems(problems)}")
            self.maps.model.load_state_dict(inside)
        elif isinstance(pretrained, str):
            whole = timm.create_model(name, **options)
            load_weights(whole, pretrained)
            of_whole = whole.state_dict()
            self.maps.model.load_state_dict({key: of_whole[key] for key in self.maps.model.state_dict()})
        strides = self.maps.feature_info.reduction()
        if strides != STRIDES:
            raise ValueError(f"backbone={name!r} gives maps at strides {strides}, not {STRIDES}: take a hierarchical model")
        self.channels: list[int] = self.maps.feature_info.channels()
        self.frozen = [module for module in self.modules() if freeze_norms and isinstance(module, nn.BatchNorm2d)]
        for module in self.frozen:
            module.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.maps(images)

    def train(self, mode: bool = True) -> Self:
        """Training or evaluation mode; frozen norms stay in the second."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that the model's authors train without weight decay."""
        return {f"maps.model.{name}" for name in getattr(self.maps.model, "no_weight_decay", set)()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute blocks again in the backward pass rather than keep what they need."""
        self.maps.model.set_grad_checkpointing(enable)
