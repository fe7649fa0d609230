"""The four-stage skeleton of every backbone here, with the whole timm backbone interface, written once."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from inspect import signature
from typing import Any

import torch
from timm.layers import ClassifierHead, LayerNorm2d, calculate_drop_path_rates, register_notrace_function
from timm.models import build_model_with_cfg, reparameterize_model, resolve_pretrained_cfg
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..layers import ConvDownsample, ConvFeedForward, ConvStem
from ..layers.region_routing import RegionRouting
from ..ops.backends import requested_backend, use_backend
from ..ops.regions import Grid, as_grid
from .checkpoints import checkpoint_filter_fn, missing_weights, read_checkpoint, to_our_names
from .stages import Block, Stage, build_blocks

BIAS_IMAGE_SIZE = 224  # bias tables hold one entry for each displacement at this input size, and are interpolated at others


@register_notrace_function
def check_images(x: Tensor, in_chans: int) -> None:
    """Raise a ValueError unless `x` is a batch of images (B, in_chans, H, W) of at least 32x32 pixels."""
    if x.ndim != 4 or x.shape[1] != in_chans:
        raise ValueError(f"expected images (B, {in_chans}, H, W), got shape {tuple(x.shape)}")
    if x.shape[2] < 32 or x.shape[3] < 32:
        raise ValueError(f"expected images of at least 32x32 pixels, got {x.shape[2]}x{x.shape[3]}")


class PyramidStage(nn.Module):
    """Downsampling, then blocks on a channels-last map. (B, C, H, W) -> (B, C', H', W')."""

    def __init__(self, downsample: nn.Module, blocks: list) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x).permute(0, 2, 3, 1)
        x = self._checkpointed(x) if self.grad_checkpointing else self.blocks(x)
        return x.permute(0, 3, 1, 2)

    def _checkpointed(self, x: Tensor) -> Tensor:
        # The backward pass computes the blocks again, in another thread or after a `use_backend` block has ended: on the same backend.
        contexts: dict[str, Any] = {} if torch.compiler.is_compiling() else {"context_fn": partial(_again_on, requested_backend().backend)}
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False, **contexts)
        return x


def _again_on(backend: str) -> tuple[AbstractContextManager, AbstractContextManager]:
    return nullcontext(), use_backend(backend)


class Pyramid(nn.Module):
    """A hierarchical backbone and its classifier. Images (B, in_chans, H, W) of any size from 32x32 up -> logits (B, num_classes).

    Args:
        stages: What each stage is made of; a preset of `debiformer.py`, `biformer.py` or `swin_layout.py`.
        in_chans: Image channels.
        num_classes: Classes; 0 for no classifier.
        global_pool: Pooling before the classifier, as timm names it; "" for none.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last blocks; it rises linearly from 0, from one repetition of mixers to the next.
        region_grid: Rows and columns of regions, or one number for both. Published: 7 for classification, 8 for segmentation, 8 to 32 for
            detection. No parameter depends on it; `set_region_grid` changes it later.
        feature_norms: Normalise the maps that `forward_intermediates(norm=True)` and `features_only` give out, as the published backbones
            of dense tasks do; the next stage still gets the map itself. With `num_classes=0` the final norm is left out, as there.

    Raises:
        ValueError: If an argument is out of range, or the grid has fewer regions than a preset's top-k.
    """

    stem_layer: Callable[..., nn.Module] = ConvStem
    downsample_layer: Callable[..., nn.Module] = ConvDownsample
    feed_forward: Callable[[int, float], nn.Module] = ConvFeedForward
    position = True
    rate_per_block = False  # of stochastic depth; else the mixers of one repetition share theirs, as released
    feature_norm_eps = 1e-5

    def __init__(
        self,
        stages: tuple[Stage, ...],
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        region_grid: int | Grid = 7,
        feature_norms: bool = False,
    ) -> None:
        super().__init__()
        if in_chans < 1 or num_classes < 0 or not 0 <= drop_path_rate < 1 or not 0 <= drop_rate < 1:
            given = f"in_chans={in_chans}, num_classes={num_classes}, drop_rate={drop_rate}, drop_path_rate={drop_path_rate}"
            raise ValueError(f"channels must be positive, classes not negative, and rates from 0 to below 1; got {given}")
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.num_features = self.head_hidden_size = stages[-1].dim
        self.region_grid = as_grid(region_grid)
        self.feature_info: list[dict[str, Any]] = [
            dict(num_chs=s.dim, reduction=4 << i, module=f"stages.{i}") for i, s in enumerate(stages)
        ]

        make = type(self)
        self.stem = make.stem_layer(in_chans, stages[0].dim)
        steps = [s.depth * (len(s.mixers) if make.rate_per_block else 1) for s in stages]
        rates: Any = calculate_drop_path_rates(drop_path_rate, steps, stagewise=True)
        self.stages = nn.Sequential()
        for i, stage in enumerate(stages):
            downsample = make.downsample_layer(stages[i - 1].dim, stage.dim) if i else nn.Identity()
            bias_grid = BIAS_IMAGE_SIZE // self.feature_info[i]["reduction"]
            of_blocks = rates[i] if make.rate_per_block else [rate for rate in rates[i] for _ in stage.mixers]
            blocks = build_blocks(stage, make.feed_forward, make.position, self.region_grid, bias_grid, of_blocks)
            self.stages.append(PyramidStage(downsample, blocks))
        dense = feature_norms and num_classes == 0
        self.norm = nn.Identity() if dense else nn.BatchNorm2d(self.num_features)
        self.feature_norms = nn.ModuleList(LayerNorm2d(s.dim, eps=self.feature_norm_eps) for s in stages) if feature_norms else None
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate)

    def set_region_grid(self, region_grid: int | Grid) -> None:
        """Route between another grid of regions from now on.

        Raises:
            ValueError: If the grid has fewer regions than a layer's top-k, or no layer has regions; the model is left as it was.
        """
        grid = as_grid(region_grid)
        layers = [m for m in self.stages.modules() if isinstance(m, RegionRouting)]
        if not layers:
            raise ValueError(f"region_grid={grid} for a model that has no regions")
        if (most := max(layer.topk for layer in layers)) > grid[0] * grid[1]:
            raise ValueError(f"region_grid={grid} has {grid[0] * grid[1]} regions, fewer than the topk={most} of a layer")
        for layer in layers:
            layer.set_region_grid(grid)
        self.region_grid = grid

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that decay would harm: the bias tables and the norms."""
        norms = (nn.LayerNorm, nn.BatchNorm2d)
        of_norms = {f"{path}.{name}" for path, m in self.named_modules() if isinstance(m, norms) for name, _ in m.named_parameters()}
        return of_norms | {name for name, _ in self.named_parameters() if name.endswith("bias_table")}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Parameter groups from input to output, for layer-wise learning rates."""
        blocks = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^(?:norm|feature_norms)", (99999,))]
        return dict(stem=r"^stem", blocks=r"^stages\.(\d+)" if coarse else blocks)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory: keep only the borders of blocks for the backward pass."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    @torch.jit.ignore
    def fuse_for_inference(self) -> "Pyramid":
        """Fold the batch norms of stem and downsampling into their convolutions, in place and exactly; returns the model.

        Names of parameters change with it: load weights before, and keep the checkpoint as it was.

        Raises:
            RuntimeError: In training mode, where the norms depend on the batch.
        """
        reparameterize_model(self, inplace=True)
        return self

    @torch.jit.ignore
    def compile_blocks(self, **options: Any) -> "Pyramid":
        """Compile every block rather than the whole, in place; returns the model.

        The blocks of a stage share their graphs, so that a deep model compiles in the time of a few blocks.

        Args:
            options: As `torch.compile` takes them. Where they are not given, `fullgraph` is True and `dynamic` is False: every size of map,
                and of batch, has graphs of its own, up to `recompile_limit=256` of them, beyond which PyTorch raises an error. For more
                sizes than about thirty, `dynamic=True` compiles longer and serves them all.
        """
        defaults: dict[str, Any] = {"fullgraph": True, "dynamic": False}
        if "recompile_limit" in signature(torch.compile).parameters:  # PyTorch's default of 8 is for one model, not for every kind of block
            defaults["recompile_limit"] = 256
        for block in self.stages.modules():
            if isinstance(block, Block):
                block.compile(**(defaults | options))
        return self

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier for `num_classes` (0 for none), and another pooling where one is given.

        Raises:
            ValueError: If the model has no final norm to classify after, as a dense backbone; build it with `num_classes` instead.
        """
        if num_classes and self.feature_norms is not None and isinstance(self.norm, nn.Identity):
            raise ValueError(f"no classifier of {num_classes} classes for a dense backbone without a final norm: build it with num_classes")
        self.num_classes = num_classes
        self.head.reset(num_classes, pool_type=global_pool)

    def embed(self, x: Tensor) -> Tensor:
        """Check images (B, in_chans, H, W) and take them through the stem."""
        check_images(x, self.in_chans)
        # The only change of layout: from here on every map lies in memory channels-last.
        return self.stem(x.contiguous(memory_format=torch.channels_last))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps after the stages, and the final map.

        Args:
            x: Images (B, in_chans, H, W).
            indices: Stages to take: the last n, these (in rising order), or all where it is None.
            norm: Normalise the maps: each by its feature norm, or the last by the final norm where there are no feature norms.
            stop_early: Leave out the stages after the last one taken.
            output_fmt: "NCHW".
            intermediates_only: Return the maps alone.

        Returns:
            The final map, normalised as in `forward_features` (with `stop_early`, the last map computed), and the maps (B, C, H, W) of the
            stages taken; or these alone.

        Raises:
            ValueError: If the images or `output_fmt` are not as above.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r} is not 'NCHW'")
        take, last = feature_take_indices(len(self.stages), indices)
        x = self.embed(x)
        maps = []
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if i in take:
                maps.append(self._normed(x, i) if norm else x)
        if intermediates_only:
            return maps
        return (self.norm(x) if i == len(self.stages) - 1 else x), maps

    def _normed(self, x: Tensor, stage: int) -> Tensor:
        if self.feature_norms is not None:
            return self.feature_norms[stage](x)
        return self.norm(x) if stage == len(self.stages) - 1 else x

    def prune_intermediate_layers(self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True) -> list[int]:
        """Drop what the maps of these stages do not need; returns the stages as non-negative indices."""
        take, last = feature_take_indices(len(self.stages), indices)
        shortened = last < len(self.stages) - 1
        if shortened or prune_norm or (prune_head and self.feature_norms is not None):
            self.norm = nn.Identity()  # sized for the last stage, and not for maps with norms of their own
        if prune_norm:
            self.feature_norms = None
        self.stages = self.stages[: last + 1]
        if self.feature_norms is not None:
            self.feature_norms = self.feature_norms[: last + 1]
        if shortened:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> the final map (B, C, H / 32, W / 32), sizes rounded up."""
        return self.norm(self.stages(self.embed(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The final map -> logits (B, num_classes), or the pooled features (B, C) before them."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def pretrained_cfg(**overrides: Any) -> dict[str, Any]:
    """What timm records of a preset: input, normalisation, and where its parts are."""
    return dict(
        url="",
        num_classes=1000,
        input_size=(3, 224, 224),
        min_input_size=(3, 32, 32),
        pool_size=(7, 7),
        crop_pct=0.875,
        interpolation="bicubic",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        first_conv="stem.0",
        classifier="head.fc",
    ) | dict(overrides)


def create(model_class: type[Pyramid], name: str, stages: tuple[Stage, ...], pretrained: bool, **kwargs: Any) -> nn.Module:
    """Build a preset the timm way. With `pretrained` its weights come from the configured Hub id, URL or file, and from nowhere else.

    Raises:
        RuntimeError: If `pretrained` and no weights are configured; the message says which published file is meant.
    """
    overlay = kwargs.pop("pretrained_cfg_overlay", None)
    cfg: Any = resolve_pretrained_cfg(name, pretrained_cfg=kwargs.pop("pretrained_cfg", None), pretrained_cfg_overlay=overlay)
    if pretrained and not (cfg.has_weights or cfg.state_dict):
        raise RuntimeError(missing_weights(name))
    if pretrained and cfg.file and cfg.source != "local-dir":  # published files hold more than tensors, which timm's own reader refuses
        cfg.state_dict = to_our_names(read_checkpoint(cfg.file))
        if "head.fc.weight" in cfg.state_dict:  # timm drops a classifier that is not of this width
            cfg.num_classes = len(cfg.state_dict["head.fc.weight"])
    if kwargs.get("features_only"):
        kwargs.setdefault("num_classes", 0)  # so that dense checkpoints fit before timm prunes the model
    model = build_model_with_cfg(
        model_class,
        name,
        pretrained,
        pretrained_cfg=cfg,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls="getter", norm=bool(kwargs.get("feature_norms"))),
        stages=stages,
        **kwargs,
    )
    model.pretrained_cfg.pop("state_dict", None)  # type: ignore[union-attr, operator]  # the weights are in the model
    return model
