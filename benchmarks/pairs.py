"""A model and its twin: the same weights, and the same output."""

from typing import Any

import timm
import torch
from torch import Tensor, nn
from twin import Twin

import debiformer  # noqa: F401  registers the presets
from debiformer.models.pyramid import Pyramid

TOLERANCE = 1e-5


def pair(name: str, device: str = "cpu", **kwargs: Any) -> tuple[Pyramid, Twin]:
    """A preset with seeded weights in evaluation mode, and the plain form that shares its parameters."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).to(device).eval()
    return model, Twin(model)


def images(batch: int, height: int = 224, width: int | None = None, device: str = "cpu") -> Tensor:
    """Random images, the same every time."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, height, width or height, generator=generator).to(device)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Relative L2 distance."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@torch.no_grad()
def check_equal(models: dict[str, nn.Module], x: Tensor) -> float:
    """The largest relative distance between the first model's output and the others'; a RuntimeError if it is above the tolerance."""
    (first, expected), *others = [(name, model(x)) for name, model in models.items()]
    errors = {name: relative_error(out, expected) for name, out in others}
    if max(errors.values()) > TOLERANCE:
        raise RuntimeError(f"outputs differ from those of {first}, relative L2 {errors}: there is nothing to compare the speed of")
    return max(errors.values())
