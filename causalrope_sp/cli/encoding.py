"""The `encode` command: a prompt to a file of its embeddings, for machines without the encoder."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from causalrope_sp.errors import ConfigError, OutputError
from causalrope_sp.pipeline.model_config import TEXT_ENCODERS, ModelConfig, find_model_config
from causalrope_sp.text import PromptEmbeds, TextSource, UMT5TextEncoder, save_embeds
from causalrope_sp.text.umt5 import TEXT_LEN
from causalrope_sp.weights import inspect_checkpoint


def encode_to_file(
    prompt: str, model: str | None, text: str | None, tokenizer: str | None, seed: int, out: str
) -> PromptEmbeds:
    """Encodes with the text encoder of a model (toybox if none is named) or with UMT5 at `text`, and writes the file.

    Raises:
        CausalRopeError: names that do not go together, an encoder or a file that does not work.
    """
    if model is not None and text is not None:
        raise ConfigError("give either --model or --text, not both")
    if tokenizer is not None and text is None:
        raise ConfigError("--tokenizer goes with --text")
    folder = Path(out).absolute().parent
    if Path(out).is_dir():
        raise OutputError(f"cannot write {out}: it is a folder")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"cannot write {out}: {folder} is not there, or not to be written into")
    text_len = TEXT_LEN
    if text is not None:
        source: str | TextSource = TextSource.of(text, tokenizer)
    else:
        model_config = ModelConfig.load(find_model_config(model or "toybox"))
        source = model_config.text
        if isinstance(source, TextSource):
            text_len = inspect_checkpoint(model_config.transformer).config.text_len
    if not isinstance(source, TextSource):
        return save_embeds(out, TEXT_ENCODERS[source]().encode(prompt, seed), prompt, source)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = UMT5TextEncoder.from_pretrained(source, device=device, text_len=text_len, keep="free")
    return save_embeds(out, encoder.encode(prompt), prompt, encoder.name)
