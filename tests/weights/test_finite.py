"""NaN and infinity are found wherever they are, and large finite numbers are not taken for them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from causalrope_sp.weights.finite import BLOCK, all_finite, copy_finite

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
COUNT = 2 * BLOCK + 7  # three blocks, the last one short


def numbers(dtype: torch.dtype) -> Tensor:
    return torch.randn(COUNT, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, BLOCK - 1, BLOCK, COUNT - 1])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_one_wrong_number_is_found(wrong: float, place: int, dtype: torch.dtype) -> None:
    x = numbers(dtype)
    assert all_finite(x)
    x[place] = wrong
    assert not all_finite(x)
    to = torch.zeros_like(x)
    assert not copy_finite(to, x)
    torch.testing.assert_close(to, x, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_do_not_cancel(dtype: torch.dtype) -> None:
    x = numbers(dtype)
    x[[3, BLOCK + 3]] = torch.tensor([torch.inf, -torch.inf], dtype=dtype)
    assert not all_finite(x)
    assert not copy_finite(torch.zeros_like(x), x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_that_overflows_is_looked_at_again(dtype: torch.dtype) -> None:
    x = torch.full((COUNT,), torch.finfo(dtype).max, dtype=dtype)
    assert x.sum().isinf()
    assert all_finite(x)
    assert copy_finite(torch.zeros_like(x), x)


def test_what_counts_is_the_dtype_that_is_written() -> None:
    x = torch.tensor([[1.0, 1e30], [0.0, -2.0]], dtype=torch.float64)
    assert copy_finite(torch.zeros(2, 2, dtype=torch.bfloat16), x)
    assert not copy_finite(torch.zeros(2, 2, dtype=torch.float16), x)
    assert copy_finite(torch.zeros(0), torch.zeros(0))
