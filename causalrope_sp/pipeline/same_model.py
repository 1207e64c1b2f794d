"""What all ranks of a pipeline have in common: one model, and one text encoder."""

from __future__ import annotations

import torch

from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.pipeline.loading import Parts
from causalrope_sp.pipeline.model_config import TEXT_ENCODERS
from causalrope_sp.text import TextSource
from causalrope_sp.text.shared_encoder import SharedUMT5
from causalrope_sp.toybox.toybox_text import ToyboxText
from causalrope_sp.version import __version__
from causalrope_sp.weights.digest import digest


def open_text(parts: Parts, parallel: SequenceParallel) -> ToyboxText | SharedUMT5:
    """Opens the text encoder of a model.

    Args:
        parts: the loaded parts.
        parallel: the ranks.

    Raises:
        CheckpointError: its files are found and faulty.
    """
    text, model = parts.config.text, parts.model
    if isinstance(text, TextSource):
        return SharedUMT5(text, parallel, model.config, model.dtype, parts.offload.text)
    return TEXT_ENCODERS[text]()


def agree_on_model(parts: Parts, parallel: SequenceParallel, text_encoder: str) -> None:
    """Checks that all ranks have the same model. Every rank must call it.

    Args:
        parts: the loaded parts.
        parallel: the ranks.
        text_encoder: the name of its class.

    Raises:
        ConfigError: they have not.
    """
    config, model, chunks = parts.config, parts.model, parts.parallel_chunks
    parallel.everyone.agree(
        {
            "version": __version__,
            "torch": torch.__version__,
            "configuration": (model.config, config.height, config.width, config.stream, config.sampler),
            "text encoder": text_encoder,
            "decode": parts.options.decode,
            "parallel chunks": chunks and chunks.chunks,
        }
    )
    if not parallel.decodes and parallel.denoisers.size > 1:
        networks = tuple(map(digest, parts.models)), chunks and digest(chunks.vin)
        parallel.denoisers.agree({"dtype": model.dtype, "weights": (config.weights, *networks)})
