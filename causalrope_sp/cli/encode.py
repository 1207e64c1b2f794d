"""`causalrope-sp encode`."""

from __future__ import annotations

import json
import time

import click

from causalrope_sp.cli.runtime import rank


@click.command()
@click.argument("prompt")
@click.option("--model", help="Whose text encoder: a model's name, its folder or its file (default: toybox).")
@click.option("--text", metavar="PATH", help="UMT5 itself: a diffusers folder, Wan's folder or its .pth.")
@click.option("--tokenizer", metavar="DIR", help="The tokenizer's folder, if it is not beside the weights.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="toybox: its places.")
@click.option("--out", default="prompt.safetensors", show_default=True, help="The file to write.")
@click.option("--json", "as_json", is_flag=True, help="One line of JSON.")
def encode(
    prompt: str, model: str | None, text: str | None, tokenizer: str | None, seed: int, out: str, as_json: bool
) -> None:
    """Writes the text embeddings of PROMPT, for generate's --text-embeds or --negative-embeds."""
    from causalrope_sp.cli.encoding import encode_to_file

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
        click.echo(f"{out}: {saved.length} tokens of {saved.embeds.shape[-1]} numbers in {took:.1f} s")
