"""What the tests of the fused kernels share: where they run, what they are held against, and how."""

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the interpreter's
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-3}


def in_all_dtypes(cases: Iterable[str]) -> pytest.MarkDecorator:
    """Every case in float32 and bfloat16, the first in float16."""
    first, *others = cases
    pairs = [(first, dtype) for dtype in TOLERANCE] + [(case, dtype) for case in others for dtype in (torch.float32, torch.bfloat16)]
    return pytest.mark.parametrize(("case", "dtype"), pairs, ids=lambda x: str(x).removeprefix("torch."))


def with_gradients(function: Callable[..., Tensor], inputs: Iterable[Tensor], cotangent: Tensor | None = None) -> tuple[Tensor, ...]:
    """Output and gradients, for a cotangent that is random where none is given."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    out.backward(cotangent_of(out) if cotangent is None else cotangent)
    return out.detach(), *(x.grad for x in inputs)


def cotangent_of(out: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)


def assert_close_to_reference(fused: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    """Relative L2 error of output and gradients, against float64 on the same rounded inputs."""
    found = with_gradients(fused, inputs)
    expected = with_gradients(reference, [x.double() for x in inputs], cotangent_of(found[0]).double())
    assert [x.dtype for x in found[1:]] == [x.dtype for x in inputs]
    errors = [relative_error(a, b) for a, b in zip(found, expected, strict=True)]
    assert max(errors) < TOLERANCE[inputs[0].dtype], errors


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm().clamp_min(1e-12)).item()
