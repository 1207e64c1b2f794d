"""The residual layer: what a chunk's latents lack after the last step, in whole numbers, entropy-coded.

The numbers of each latent channel are coded with a Laplace distribution around 0, whose scale is sent. `constriction`
(Bamler, arXiv 2201.01741) does the range coding.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from causalrope_sp.errors import ConfigError, InputError

LARGEST = 1 << 14  # of a residual's numbers; an encoder cuts larger ones off
_STEPS = 4  # of a scale's logarithm to the base 2
_LEAST = 1 / 16  # scale
_SCALES = 80  # of them: up to 2^20 times the least


def pack_residual(levels_FCHW: Tensor) -> bytes:
    """Packs the residual of a chunk, whose numbers are within ±`LARGEST`; see `unpack_residual`.

    Raises:
        ConfigError: constriction is not installed.
    """
    levels = levels_FCHW.numpy().astype(np.int32)
    coder, scales = _constriction().stream.queue.RangeEncoder(), bytearray()
    for channel in np.moveaxis(levels, 1, 0):
        numbers = np.ascontiguousarray(channel).ravel()
        scale = round(_STEPS * math.log2(max(float(np.abs(numbers).mean()), _LEAST) / _LEAST))
        scales.append(min(scale, _SCALES - 1))
        coder.encode(numbers, _laplace(scales[-1]))
    return bytes(scales) + coder.get_compressed().astype("<u4").tobytes()


def unpack_residual(data: bytes, shape_FCHW: tuple[int, int, int, int]) -> Tensor:
    """Returns the residual of a chunk, int64 (F, C, H, W).

    Raises:
        ConfigError: constriction is not installed.
        InputError: the bytes are no residual of this shape.
    """
    frames, channels, *size = shape_FCHW
    scales, words = data[:channels], data[channels:]
    if len(scales) < channels or max(scales, default=0) >= _SCALES or len(words) % 4:
        raise InputError(f"a residual of {len(data)} bytes does not fit {channels} channels")
    coder = _constriction().stream.queue.RangeDecoder(np.frombuffer(words, "<u4").astype(np.uint32))
    count = frames * math.prod(size)
    try:
        rows = [coder.decode(_laplace(scale), count) for scale in scales]
    except AssertionError as reason:  # constriction's word for data that no encoder makes
        raise InputError(f"a residual of {len(data)} bytes cannot be decoded: {reason}") from None
    return torch.from_numpy(np.stack(rows).astype(np.int64)).view(channels, frames, *size).movedim(0, 1)


def _laplace(scale: int) -> Any:
    models = _constriction().stream.model
    return models.QuantizedLaplace(-LARGEST, LARGEST, 0.0, _LEAST * 2 ** (scale / _STEPS))


def check_constriction() -> None:
    """Raises ConfigError if constriction is not installed."""
    _constriction()


def _constriction() -> Any:
    try:
        import constriction
    except ImportError:
        raise ConfigError("a residual needs constriction: pip install 'causalrope-sp[compression]'") from None
    return constriction
