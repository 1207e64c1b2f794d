"""Linear layers whose weights and activations are fp8 (W8A8): every row of the activations is quantized as it comes.

The numbers are e4m3. A row of the activations has one float32 scale, its largest magnitude divided by 448, and an
output channel has the scale of its weights. On a GPU `torch._scaled_mm` multiplies the numbers;
elsewhere the same numbers are multiplied in float32.

Shapes: T rows, K input channels, N output channels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional

from causalrope_kernels import inference
from causalrope_kernels.attention_choice import Measured, median_milliseconds
from causalrope_kernels.backend import Backend, needs_gradient, use_triton
from causalrope_kernels.launch import on

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # the largest e4m3 number
LEAST = 2.0**-100  # rows without a larger number have a scale for this one: its inverse is finite in float32
MOST_ERROR = 0.01  # of a product, relative to its norm: bfloat16 costs 0.002
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LinearShape:
    """The sizes that the fastest way to compute a layer depends on.

    Args:
        device: where the tensors live.
        dtype: of activations and bias.
        rows: T.
        inputs: K.
        outputs: N.
        gelu: whether GELU follows.
    """

    device: torch.device
    dtype: torch.dtype
    rows: int
    inputs: int
    outputs: int
    gelu: bool


def fp8_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns why fp8 products do not run on a device in a dtype, or None. On a CPU they are emulated in any dtype."""
    if device.type == "cpu":
        return None
    major, minor = _capability(device)
    if (major, minor) < (8, 9):
        return f"a GPU of compute capability 8.9 or above, not {major}.{minor}"
    if dtype != torch.bfloat16:
        return f"dtype bfloat16 on a GPU, not {str(dtype).removeprefix('torch.')}"
    return None


def _multiplies_fp8(device: torch.device) -> bool:
    """Whether `torch._scaled_mm` is a candidate: it runs on a CPU as well, but not faster than what emulates it."""
    return device.type == "cuda"


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def quantize_rows(x: Tensor, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """Quantizes every row of activations to e4m3, in float32.

    Args:
        x: (…, K).
        backend: "auto", "triton" or "torch".

    Returns:
        The numbers, (T, K), and the scales of the rows in float32, (T, 1).

    Raises:
        ValueError: a gradient is required, which rounding has none of, or the backend cannot run.
    """
    if needs_gradient(x):
        raise ValueError("x: expected activations that need no gradient, because fp8 rounds them")
    x_TK = x.reshape(-1, x.shape[-1])
    if use_triton(backend, x):
        from causalrope_kernels import quantize_kernel as kernel

        return kernel.quantize_rows(x_TK, E4M3, LARGEST, LEAST)
    wide_TK = x_TK.float()
    largest = wide_TK.abs().amax(1, keepdim=True).clamp_(min=LEAST)
    # tensors alone: a number over a tensor, and on CUDA a tensor over a number, would be rounded twice
    limit = torch.full_like(largest, LARGEST)
    return (wide_TK * (limit / largest)).to(E4M3), largest / limit


def emulated(x: Tensor, numbers_NK: Tensor, scale_N: Tensor, bias: Tensor, gelu: bool) -> Tensor:
    """Computes the layer by a product in float32, or in float64 if that is the dtype of the bias; see
    `settled_fp8_linear`."""
    wide = torch.promote_types(bias.dtype, torch.float32)
    numbers_TK, scale_T1 = quantize_rows(x)
    y_TN = functional.linear(numbers_TK.to(wide), numbers_NK.to(wide)) * scale_T1 * scale_N
    return _finish(x, y_TN.add_(bias).to(bias.dtype), gelu)


def scaled(x: Tensor, numbers_NK: Tensor, scale_N: Tensor, bias: Tensor, gelu: bool) -> Tensor:
    """Computes the layer by `torch._scaled_mm`; see `settled_fp8_linear`."""
    numbers_TK, scale_T1 = quantize_rows(x)
    y_TN = torch._scaled_mm(
        numbers_TK, numbers_NK.t(), scale_T1, scale_N.unsqueeze(0), bias, out_dtype=bias.dtype, use_fast_accum=True
    )
    return _finish(x, y_TN, gelu)


def dequantized(x: Tensor, numbers_NK: Tensor, scale_N: Tensor, bias: Tensor, gelu: bool) -> Tensor:
    """Computes the layer with its dequantized weight on activations as they are."""
    weight = numbers_NK.to(bias.dtype).mul_(scale_N.to(bias.dtype).unsqueeze(1))
    return (inference.linear_gelu if gelu else inference.linear)(x, weight, bias)


def _finish(x: Tensor, y_TN: Tensor, gelu: bool) -> Tensor:
    """The output in the shape of the activations, (…, N), in place after GELU."""
    y = y_TN.view(*x.shape[:-1], -1)
    return torch.ops.aten.gelu_(y, approximate="tanh") if gelu else y


WAYS = {"fp8": scaled, "dequantized": dequantized}


def settled_fp8_linear(
    numbers_NK: Tensor, scale_N: Tensor, bias: Tensor, gelu: bool = False
) -> Callable[[Tensor], Tensor]:
    """Returns the function that computes a linear layer of fp8 weights on fp8 activations, in the dtype of the bias.

    On a GPU it measures at the first call with so many rows whether dequantizing the weight is faster, and then does
    that, which rounds no activations; see the log.

    Args:
        numbers_NK: the weight's e4m3 numbers, which are not copied.
        scale_N: its float32 scales.
        bias: (N,).
        gelu: whether GELU, in its tanh form, follows.
    """
    weights = numbers_NK, scale_N, bias, gelu
    dtype, device, (outputs, inputs) = bias.dtype, bias.device, numbers_NK.shape
    if not _multiplies_fp8(device):
        return lambda x: emulated(x, *weights)
    chosen: dict[int, Callable[..., Tensor]] = {}

    def compute(x: Tensor) -> Tensor:
        x = x if x.dtype == dtype else x.to(dtype)
        rows = x.numel() // inputs
        way = chosen.get(rows)
        if way is None:
            with on(device):
                measured = measure(LinearShape(device, dtype, rows, inputs, outputs, gelu)) if rows else None
            way = chosen[rows] = WAYS[measured.chosen] if measured else dequantized
        return way(x, *weights)

    return compute


@cache
def measure(shape: LinearShape) -> Measured:
    """Times the ways to compute a layer on random numbers of this shape, chooses the fastest that is right, and logs
    the result beside the time with weights that were never quantized."""
    generator = torch.Generator(shape.device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=shape.device)
    x, bias = draw(shape.rows, shape.inputs).to(shape.dtype), draw(shape.outputs).to(shape.dtype)
    numbers = draw(shape.outputs, shape.inputs).to(E4M3)
    scale = torch.full((shape.outputs,), 2.0**-6, device=shape.device)
    few = x[:64]
    expected = emulated(few, numbers, scale, bias, shape.gelu).double()
    times: dict[str, float] = {}
    refused: dict[str, str] = {}
    for name, way in WAYS.items():
        run = partial(way, x, numbers, scale, bias, shape.gelu)
        try:
            error = ((run()[: len(few)].double() - expected).norm() / expected.norm()).item()
            if name == "fp8" and not error <= MOST_ERROR:
                refused[name] = f"its output is off by {error:.1e} (bound {MOST_ERROR})"
            else:
                times[name] = median_milliseconds(run)
        except Exception as reason:  # torch refuses a GPU, a driver or a size by several kinds
            refused[name] = str(reason).splitlines()[0] if str(reason) else type(reason).__name__
    chosen = min(times, key=times.__getitem__, default="dequantized")
    weight, product = numbers.to(shape.dtype), inference.linear_gelu if shape.gelu else inference.linear
    plain = median_milliseconds(partial(product, x, weight, bias))
    timings = ", ".join(f"{name} {ms:.3g} ms" for name, ms in times.items())
    _log.info("linear layer from %d to %d, %d rows, %s: %s; with weights in %s %.3g ms", shape.inputs, shape.outputs,
              shape.rows, chosen, timings, str(shape.dtype).removeprefix("torch."), plain)  # fmt: skip
    for name, why in refused.items():
        _log.info("linear layer: %s is left out: %s", name, why)
    return Measured(chosen, times, refused)
