"""Files of prompt embeddings, with which a machine without the text encoder can run.

A file is safetensors. It holds `prompt_embeds`, (1, L, E), with zeros after the prompt's last token, and in its
metadata the prompt, the encoder and the length in tokens.

Shapes: L = text_len tokens, E the encoder's width.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from causalrope_sp.errors import CheckpointError, ConfigError, OutputError
from causalrope_sp.io.saved_tensors import save_tensors
from causalrope_sp.weights.tensor_files import DTYPES, WeightFiles

_NAME = "prompt_embeds"


@dataclass(frozen=True)
class PromptEmbeds:
    """The embeddings of one prompt and their origin.

    Attributes:
        embeds: (1, L, E), zeros from token `length` on.
        prompt: the prompt; "" if the file does not say.
        encoder: a description of the encoder; "" if the file does not say.
        length: tokens of the prompt.
    """

    embeds: Tensor
    prompt: str
    encoder: str
    length: int


def save_embeds(path: str | PathLike[str], embeds_1LE: Tensor, prompt: str, encoder: str) -> PromptEmbeds:
    """Writes the embeddings of a prompt to a file.

    Args:
        path: the file.
        embeds_1LE: the embeddings, (1, L, E), in float64, float32, float16 or bfloat16.
        prompt: the prompt.
        encoder: a description of the encoder, such as `UMT5TextEncoder.name`.

    Returns:
        What `load_embeds` reads from the file.

    Raises:
        ConfigError: the embeddings have another shape or dtype, or hold numbers that are not finite.
        OutputError: the file cannot be written.
    """
    wrong = _wrong(embeds_1LE)
    if wrong:
        raise ConfigError(f"text embeddings {wrong}")
    embeds = embeds_1LE.detach().cpu().contiguous()
    saved = PromptEmbeds(embeds, prompt, encoder, length_of(embeds))
    described = prompt.encode(errors="replace").decode()  # half a surrogate pair cannot be written
    try:
        save_tensors({_NAME: embeds}, path, {"prompt": described, "encoder": encoder, "length": str(saved.length)})
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write {path}: {str(error).splitlines()[0]}") from error
    return saved


def load_embeds(path: str | PathLike[str]) -> PromptEmbeds:
    """Reads a file of `save_embeds`.

    Args:
        path: the file.

    Returns:
        The embeddings on the CPU, and their origin.

    Raises:
        CheckpointError: the file cannot be read, is no file of embeddings, or contradicts itself.
    """
    files = WeightFiles(Path(path))
    length = files.metadata.get("length", "")
    if set(files.tensors) != {_NAME} or not re.fullmatch("[0-9]{1,7}", length):
        raise CheckpointError(f"{path}: not a file of text embeddings (one tensor {_NAME}, and its length)")
    stored = files.tensors[_NAME]
    if stored.dtype not in DTYPES.values():
        raise CheckpointError(f"{path}: {_NAME} is stored as {stored.dtype}, not as float64, 32, 16 or bfloat16")
    embeds = files.read(_NAME).clone()
    wrong = _wrong(embeds)
    if wrong:
        raise CheckpointError(f"{path}: {_NAME} {wrong}")
    if length_of(embeds) != int(length):
        raise CheckpointError(f"{path}: says that its text ends after {length} tokens, and holds {length_of(embeds)}")
    return PromptEmbeds(embeds, files.metadata.get("prompt", ""), files.metadata.get("encoder", ""), int(length))


def length_of(embeds_1LE: Tensor) -> int:
    """Counts tokens, (1, L, E), up to the last one that is not all zeros."""
    (filled,) = embeds_1LE[0].any(-1).nonzero(as_tuple=True)
    return int(filled[-1]) + 1 if len(filled) else 0


def _wrong(embeds: Tensor) -> str | None:
    """Returns what is wrong with embeddings, as the rest of a sentence; None if nothing is."""
    if embeds.ndim != 3 or len(embeds) != 1 or embeds.numel() == 0:
        return f"have shape {tuple(embeds.shape)}, expected (1, tokens, width)"
    if embeds.dtype not in DTYPES.values():
        return f"are {str(embeds.dtype).removeprefix('torch.')}, expected float64, 32, 16 or bfloat16"
    if not torch.isfinite(embeds).all():
        return "have numbers that are not finite"
    return None
