"""Parts of a whole-video model's folder: its text encoder by transformers, its picture VAE by diffusers.

Shapes: L text tokens, E the text encoder's width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from causalrope_sp.errors import CheckpointError, first_line
from causalrope_sp.io.json_files import read_object

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

T = TypeVar("T")


def read_config(folder: Path) -> dict[str, object]:
    """Returns the config.json of a folder's transformer.

    Raises:
        CheckpointError: it cannot be read.
    """
    return load_part(folder / "transformer", lambda path: read_object(path / "config.json"))


def load_part(folder: Path, load: Callable[[Path], T]) -> T:
    """Loads a part of a model by another library.

    Args:
        folder: the folder of the part.
        load: loads it.

    Returns:
        The part.

    Raises:
        CheckpointError: the folder is missing, or the library cannot read it.
    """
    if not folder.is_dir():
        raise CheckpointError(f"no {folder.name} at {folder}: no such folder")
    dtype = torch.get_default_dtype()
    try:
        return load(folder)
    except Exception as error:  # the libraries raise whatever their code meets
        torch.set_default_dtype(dtype)  # transformers leaves that of a model it could not build
        raise CheckpointError(f"cannot read {folder}: {first_line(error)}") from error


def encode_texts(
    folder: Path, texts: list[str], text_len: int, width: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Encodes texts with the T5 encoder of a folder, which is freed afterwards.

    Args:
        folder: holds text_encoder/ and tokenizer/.
        texts: the texts.
        text_len: tokens that each is cut or padded to.
        width: the width of the embeddings that the transformer takes.
        dtype: the dtype that it computes in.
        device: where it computes.

    Returns:
        The embeddings, (texts, L, E), and which tokens count, (texts, L), 1 or 0.

    Raises:
        CheckpointError: the encoder cannot be read, or is of another width.
    """
    from transformers import AutoTokenizer, T5EncoderModel

    def load(path: Path) -> T5EncoderModel:
        with _without_progress():
            return T5EncoderModel.from_pretrained(path, dtype=dtype, local_files_only=True).eval().to(device)

    tokenizer = load_part(folder / "tokenizer", lambda path: AutoTokenizer.from_pretrained(path, local_files_only=True))
    encoder = load_part(folder / "text_encoder", load)
    found = encoder.config.d_model
    if found != width:
        raise CheckpointError(f"{folder}: its text encoder is {found} wide, its transformer takes {width}")
    tokens = tokenizer(
        texts, max_length=text_len, padding="max_length", truncation=True, add_special_tokens=True, return_tensors="pt"
    )
    mask = tokens.attention_mask.to(device)
    with torch.no_grad():
        return encoder(tokens.input_ids.to(device), attention_mask=mask)[0], mask


@contextlib.contextmanager
def _without_progress() -> Iterator[None]:
    """Keeps transformers from drawing a progress bar."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_picture_vae(folder: Path, dtype: torch.dtype, device: torch.device) -> AutoencoderKL:
    """Loads diffusers' `AutoencoderKL` of a folder.

    Raises:
        CheckpointError: it cannot be read.
    """
    from diffusers import AutoencoderKL

    return load_part(
        folder, lambda path: AutoencoderKL.from_pretrained(path, torch_dtype=dtype, local_files_only=True).to(device)
    )
