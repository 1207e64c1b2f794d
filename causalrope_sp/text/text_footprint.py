"""What UMT5 takes of a device: the bytes of its weights, from headers or from the sizes of the one that Wan uses."""

from __future__ import annotations

from math import prod

from causalrope_sp.text.source import TextSource
from causalrope_sp.text.umt5_checkpoint import T5Checkpoint


def text_bytes(source: TextSource) -> int:
    """Of the encoder at a place; 0 where there is none. Raises CheckpointError if it is there and wrong."""
    if not source.is_here():
        return 0
    checkpoint = T5Checkpoint.open(source.find()[0])
    stored = checkpoint.files.tensors
    return checkpoint.dtype.itemsize * sum(prod(stored[name].shape) for name in checkpoint.names.values())


def umt5_parameters(
    vocabulary: int, width: int, attention: int, gated: int, heads: int, layers: int, buckets: int
) -> int:
    """The numbers in an encoder whose heads are `attention` wide together."""
    block = 4 * width * attention + heads * buckets + 3 * width * gated + 2 * width
    return vocabulary * width + layers * block + width


def umt5_xxl_bytes() -> int:
    """Of google/umt5-xxl's encoder in bfloat16, as Wan publishes it."""
    return 2 * umt5_parameters(256_384, 4096, 64 * 64, 10_240, 64, 24, 32)
