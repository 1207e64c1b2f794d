"""What the tests of Triton kernels share: random numbers, and the rule by which a kernel is right."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from causalrope_kernels import Affine, Keys, Modulation, RotateOnRead
from causalrope_sp import LatentGrid

DEVICE = torch.device(os.environ.get("CAUSALROPE_TEST_DEVICE", "cpu"))  # on "cuda" compiled, and not interpreted
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator, device="cpu").to(DEVICE)


def no_worse(ours: Tensor, rough: Tensor, truth: Tensor) -> None:
    """Ours errs at most twice what `rough` does, all numbers together, and at any one at most four times what `rough`
    does anywhere; where that is nothing, a few of float32's roundings are left to it."""
    assert ours.shape == rough.shape == truth.shape
    assert ours.dtype == rough.dtype
    same = ours.double() == truth  # infinities, too
    errors = [(x.double() - truth).masked_fill(same, 0.0) for x in (ours, rough)]
    size = truth.masked_fill(truth.isinf(), 0.0)
    for measure, times in ((Tensor.norm, 2), (lambda x: x.abs().max(), 4)):
        error, allowed, scale = (measure(x).item() for x in (*errors, size))
        bound = max(times * allowed, 8 * torch.finfo(torch.float32).eps * scale)
        assert error <= bound, f"off by {error:.2e}, the reference by {allowed:.2e}"


def as_dtype(x: Any, dtype: torch.dtype) -> Any:
    """Every tensor of floating-point numbers within, in that dtype."""
    if isinstance(x, Tensor):
        return x.to(dtype) if x.is_floating_point() else x
    if isinstance(x, tuple | list):
        return type(x)(as_dtype(item, dtype) for item in x)
    if isinstance(x, Modulation | Affine | Keys | RotateOnRead):
        return type(x)(**{name: as_dtype(value, dtype) for name, value in vars(x).items()})
    return x


def compare(operation: Callable[..., Any], *arguments: Any, dtype: torch.dtype) -> None:
    """`operation` by Triton and by torch in `dtype`, against torch in float64 on the same rounded numbers."""
    given = as_dtype(arguments, dtype)
    truth = operation(*as_dtype(given, torch.float64), backend="torch")
    ours, rough = (operation(*given, backend=name) for name in ("triton", "torch"))
    for mine, other, exact in zip(*(x if isinstance(x, tuple) else (x,) for x in (ours, rough, truth)), strict=True):
        no_worse(mine, other, exact)


GRID = LatentGrid(4, 5)
