"""Device memory of UMT5: the bytes of its weights, from a file's headers or from the sizes of Wan's encoder."""

from __future__ import annotations

from math import prod

from causalrope_sp.text.source import TextSource
from causalrope_sp.text.umt5_checkpoint import T5Checkpoint


def text_bytes(source: TextSource) -> int:
    """Counts the bytes of an encoder's weights, from its headers.

    Args:
        source: the encoder's files.

    Returns:
        Bytes; 0 if there are no weights.

    Raises:
        CheckpointError: the weights or the tokenizer are faulty, or the tokenizer is missing.
    """
    if not source.is_here():
        return 0
    checkpoint = T5Checkpoint.open(source.find()[0])
    stored = checkpoint.files.tensors
    return sum(
        checkpoint.dtype_of(parameter, checkpoint.dtype).itemsize * prod(stored[name].shape)
        for parameter, name in checkpoint.names.items()
    )


def umt5_parameters(
    vocabulary: int, width: int, attention: int, gated: int, heads: int, layers: int, buckets: int
) -> int:
    """Counts the numbers in a UMT5 encoder.

    Args:
        vocabulary: tokens of the vocabulary.
        width: the model's width.
        attention: the width of all heads together.
        gated: the width of the feed-forward.
        heads: heads of a layer.
        layers: how many layers there are.
        buckets: buckets of relative positions.
    """
    block = 4 * width * attention + heads * buckets + 3 * width * gated + 2 * width
    return vocabulary * width + layers * block + width


def umt5_xxl_bytes() -> int:
    """Counts the bytes of google/umt5-xxl's encoder in bfloat16, as Wan publishes it."""
    return 2 * umt5_parameters(256_384, 4096, 64 * 64, 10_240, 64, 24, 32)
