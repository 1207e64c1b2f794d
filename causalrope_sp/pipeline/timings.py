"""Where the time of a chunk goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import ceil

QUANTILES = {"p50": 0.5, "p95": 0.95, "max": 1.0}


@dataclass(frozen=True)
class Timings:
    """Where the time of a chunk went, in seconds.

    Args:
        denoise: the passes of the transformer. On CUDA they may end while the chunk is decoded, and a chunk that was
            made ahead is denoised while the one before is decoded.
        decode: the decoder, and the way of the frames to the host.
        wait: the time until all ranks had come to make the chunk.
        total: from the call for the chunk to its frames.
    """

    denoise: float
    decode: float
    wait: float
    total: float


def quantiles(timings: Sequence[Timings]) -> dict[str, dict[str, float]]:
    """Returns quantiles of each part of the time, in milliseconds: values that such a share does not exceed.

    Args:
        timings: of chunks, at least one.
    """
    found = {}
    for name in (field.name for field in fields(Timings)):
        values = sorted(1000 * getattr(each, name) for each in timings)
        found[name] = {label: round(values[ceil(share * len(values)) - 1], 3) for label, share in QUANTILES.items()}
    return found
