"""`causalrope-sp encode`: writes a prompt's embeddings into a file, for machines without the text encoder."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from causalrope_sp.cli.numbers import SEED
from causalrope_sp.cli.options import complete_model
from causalrope_sp.cli.runtime import rank
from causalrope_sp.errors import ConfigError, OutputError, escaped_line
from causalrope_sp.io.output_files import check_replaceable

if TYPE_CHECKING:
    from causalrope_sp.text import PromptEmbeds


@click.command()
@click.argument("prompt")
@click.option(
    "--model",
    shell_complete=complete_model,
    help="Use the text encoder of this model: a name, a folder or org/name on the Hub. The default is toybox.",
)
@click.option(
    "--text", metavar="PATH", help="Load UMT5 from this diffusers folder, Wan folder or .pth. The default is --model's."
)
@click.option(
    "--tokenizer", metavar="DIR", help="Load the tokenizer from this folder. The default is the folder of --text."
)
@click.option(
    "--seed", type=SEED, default=0, show_default=True, help="Draw what a toybox prompt leaves open from this seed."
)
@click.option("--out", default="prompt.safetensors", show_default=True, help="Write the embeddings to this file.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON. The default is a line of text.")
def encode(
    prompt: str, model: str | None, text: str | None, tokenizer: str | None, seed: int, out: str, as_json: bool
) -> None:
    """Writes the text embeddings of PROMPT, for generate's --text-embeds or --negative-embeds."""
    if rank() != 0:
        return
    started = time.perf_counter()
    saved = encode_to_file(prompt, model, text, tokenizer, seed, out)
    took = time.perf_counter() - started
    if as_json:
        shape, dtype = list(saved.embeds.shape), str(saved.embeds.dtype).removeprefix("torch.")
        fields = {"prompt": saved.prompt, "encoder": saved.encoder, "length": saved.length, "shape": shape}
        click.echo(json.dumps({**fields, "dtype": dtype, "seconds": round(took, 4), "out": out}))
    else:
        click.echo(escaped_line(f"{out}: {saved.length} tokens of {saved.embeds.shape[-1]} numbers in {took:.1f} s"))


def encode_to_file(
    prompt: str, model: str | None, text: str | None, tokenizer: str | None, seed: int, out: str
) -> PromptEmbeds:
    """Encodes a prompt and writes its embeddings.

    Args:
        prompt: the text.
        model: the model whose text encoder is used; toybox if `model` and `text` are None.
        text: the folder or file of UMT5; None takes that of the model.
        tokenizer: the folder of the tokenizer; None takes the one in the folder of `text`.
        seed: the seed from which toybox draws what the prompt leaves open.
        out: the file to write.

    Returns:
        The embeddings that were written.

    Raises:
        ConfigError: `model` and `text` are both set, or `tokenizer` is set without `text`.
        OutputError: the file cannot be written.
        CausalRopeError: the text encoder cannot be loaded, or does not know the prompt.
    """
    if model is not None and text is not None:
        raise ConfigError("give either --model or --text, not both")
    if tokenizer is not None and text is None:
        raise ConfigError("--tokenizer goes with --text")
    _check_file(out)
    import torch

    from causalrope_sp.pipeline.load_options import LoadOptions
    from causalrope_sp.pipeline.model_config import TEXT_ENCODERS
    from causalrope_sp.pipeline.model_source import find_model
    from causalrope_sp.text import TextSource, UMT5TextEncoder, save_embeds
    from causalrope_sp.text.umt5 import TEXT_LEN
    from causalrope_sp.weights import inspect_checkpoint

    text_len = TEXT_LEN
    if text is not None:
        source: str | TextSource = TextSource.of(text, tokenizer)
    else:
        config = find_model(model or "toybox", LoadOptions())
        source = config.text
        if isinstance(source, TextSource):
            text_len = inspect_checkpoint(config.transformer).config.text_len
    if not isinstance(source, TextSource):
        return save_embeds(out, TEXT_ENCODERS[source]().encode(prompt, seed), prompt, source)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = UMT5TextEncoder.from_pretrained(source, device=device, text_len=text_len, keep="free")
    return save_embeds(out, encoder.encode(prompt), prompt, encoder.name)


def _check_file(out: str) -> None:
    """Raises OutputError, before anything slow is imported, if the file cannot be written."""
    folder = Path(out).absolute().parent
    check_replaceable(out)
    if not os.access(folder, os.W_OK):
        raise OutputError(f"cannot write {out}: {folder} is not there, or not to be written into")
