"""The embeddings of a prompt as a file, so that a machine without the encoder can run.

Shapes: L = text_len tokens, E numbers each; the file is safetensors and holds `prompt_embeds` (1, L, E), zeros after
the prompt's length, and in its metadata the prompt, the encoder and the length.
"""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from causalrope_sp.errors import CheckpointError, ConfigError, OutputError
from causalrope_sp.weights.tensor_files import DTYPES, WeightFiles

_NAME = "prompt_embeds"


@dataclass(frozen=True)
class PromptEmbeds:
    """The embeddings of one prompt, (1, L, E), zeros from `length` on, and what made them."""

    embeds: Tensor
    prompt: str
    encoder: str
    length: int


def save_embeds(path: str | PathLike[str], embeds_1LE: Tensor, prompt: str, encoder: str) -> PromptEmbeds:
    """Writes the embeddings of a prompt and returns what `load_embeds` will.

    Raises:
        ConfigError: not the embeddings of one prompt: another shape, dtype, or numbers that are not finite.
        OutputError: the file cannot be written.
    """
    wrong = _wrong(embeds_1LE)
    if wrong:
        raise ConfigError(f"text embeddings {wrong}")
    embeds = embeds_1LE.detach().cpu().contiguous()
    saved = PromptEmbeds(embeds, prompt, encoder, length_of(embeds))
    described = prompt.encode(errors="replace").decode()  # half a surrogate pair cannot be written
    try:
        save_file({_NAME: embeds}, path, {"prompt": described, "encoder": encoder, "length": str(saved.length)})
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write {path}: {str(error).splitlines()[0]}") from error
    return saved


def load_embeds(path: str | PathLike[str]) -> PromptEmbeds:
    """The embeddings in a file of `save_embeds`.

    Raises:
        CheckpointError: not readable, not such a file, or embeddings that cannot be what it says.
    """
    files = WeightFiles(Path(path))
    length = files.metadata.get("length", "")
    if set(files.tensors) != {_NAME} or not length.isdecimal():
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
    """Tokens up to the last that is not all zeros."""
    (filled,) = embeds_1LE[0].any(-1).nonzero(as_tuple=True)
    return int(filled[-1]) + 1 if len(filled) else 0


def _wrong(embeds: Tensor) -> str | None:
    if embeds.ndim != 3 or len(embeds) != 1 or embeds.numel() == 0:
        return f"have shape {tuple(embeds.shape)}, expected (1, tokens, width)"
    if embeds.dtype not in DTYPES.values():
        return f"are {str(embeds.dtype).removeprefix('torch.')}, expected float64, 32, 16 or bfloat16"
    if not torch.isfinite(embeds).all():
        return "have numbers that are not finite"
    return None
