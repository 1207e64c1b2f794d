"""Triton's interpreter as a GPU computes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from causalrope_kernels import backend


@pytest.fixture(scope="module")
def bfloat16_as_on_a_gpu() -> Iterator[None]:
    """Triton 3.9's interpreter rounds float32 to bfloat16 and to e4m3 by cutting, and multiplies matrices of bfloat16
    as if they were of integers; here all are torch's."""
    handle, builder = interpreter.TensorHandle, interpreter.InterpreterBuilder
    cast, dot = builder.cast_impl, builder.create_dot

    def with_halo(x: Any) -> np.ndarray:
        return torch.from_numpy(np.ascontiguousarray(x.data).view(np.int16)).view(torch.bfloat16).float().numpy()

    def cast_impl(self: Any, source: Any, dtype: Any) -> Any:
        kinds = source.dtype.scalar, dtype.scalar
        if kinds == (tl.bfloat16, tl.float32):
            return handle(with_halo(source), tl.float32)
        if kinds == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.int16)
            return handle(rounded.numpy().view(np.uint16), tl.bfloat16)
        if kinds == (tl.float32, tl.float8e4nv):
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.float8_e4m3fn)
            return handle(rounded.view(torch.uint8).numpy(), tl.float8e4nv)
        return cast(self, source, dtype)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (handle(with_halo(x), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "INTERPRETER_HAS_BFLOAT16", True)
        patch.setattr(builder, "cast_impl", cast_impl)
        patch.setattr(builder, "create_fp_to_fp", lambda self, x, dtype, rounding: cast_impl(self, x, dtype))
        patch.setattr(builder, "create_dot", create_dot)
        yield
