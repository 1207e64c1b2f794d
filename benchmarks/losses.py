"""What lossy options of loading and of calls cost toybox, against the same prompts and seeds without them.

    python benchmarks/losses.py                       # every option
    python benchmarks/losses.py --only fp8,fp8-dynamic --models toybox,toybox-flow
    python benchmarks/losses.py --only heads=heads.json   # windows of heads, of a file that profile-heads wrote
    python benchmarks/losses.py --only heads=heads.json+similar_frames=4   # both

Keys are those that self-attention reads, as a share of those of the windows, over all passes, layers and heads.

Gate: an option at which nothing is lost gives the frames of no option, bit for bit, or nothing is reported. PSNR and
SSIM are against float32 without options; adherence is toybox's judge, from the frames alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any
from unittest.mock import patch

import click
import numpy as np
import torch
from pictures import psnr, ssim
from printed import finish, print_table, stop
from reuse import draw_scenes
from torch import Tensor
from videos import video_of

from causalrope_kernels import PassOperations, Source
from causalrope_sp import CausalVideoPipeline, Chunk
from causalrope_sp.attention.base import Strategy
from causalrope_sp.cache.kv_cache import KVCache
from causalrope_sp.cache.layer_cache import LayerCache
from causalrope_sp.toybox.judge import judge, summarize

JUDGED = ("color", "shape", "motion")


@dataclass(frozen=True)
class Lossy:
    """Options that change the video.

    Args:
        loading: options of `from_pretrained`.
        call: options of a call.
    """

    loading: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)


LOSSY = {
    "bfloat16": Lossy({"dtype": "bfloat16"}),
    "fp8": Lossy({"weights": "fp8"}),
    "fp8-dynamic": Lossy({"weights": "fp8-dynamic"}),
    **{f"similar_frames={similar}": Lossy({"similar_frames": similar}) for similar in (2, 4, 6, 0.3)},
}
HEADS = "heads="
LOSSLESS = {"full": Lossy({"weights": "full"}), "all frames": Lossy({"similar_frames": 100})}


def lossy(name: str) -> Lossy:
    """The options of a name of `LOSSY`, or of heads=FILE, or of several that + joins; "none" has none."""
    first, joined, last = name.rpartition("+")
    if joined:
        return Lossy(lossy(first).loading | lossy(last).loading)
    if name.startswith(HEADS):
        return Lossy({"heads": name.removeprefix(HEADS)})
    if name != "none" and name not in LOSSY:
        stop(f"--only: expected {', '.join(LOSSY)} or {HEADS}FILE, got {name}")
    return LOSSY.get(name, Lossy())


@contextmanager
def counted_keys() -> Iterator[list[int]]:
    """Counts pairs of a query and a key, and those of them that are left out by a choice of frames."""
    counts, plain = [0, 0], Strategy.attend

    def attend(
        self: Strategy, source: Source, cache: LayerCache, chunks: Sequence[Chunk], operations: PassOperations
    ) -> Tensor:
        output = plain(self, source, cache, chunks, operations)
        assert isinstance(cache._cache, KVCache)
        for chunk in chunks:
            keys = cache.keys(chunk)
            heads = sum(group.k.shape[2] for group in keys)
            held = len(cache._cache.window.held(chunk.stop)) * self.stored_tokens
            of_heads = [own for group in keys for own in group.by_rows]
            read = sum(own.k.shape[2] * sum(stop - first for first, stop in own.rows) for own in of_heads)
            counts[0] += chunk.frames * heads * held
            counts[1] += chunk.frames * read
        return output

    with patch.object(Strategy, "attend", attend):
        yield counts


def videos(model: str, lossy: Lossy, prompts: list[str], frames: int) -> list[np.ndarray]:
    pipe = CausalVideoPipeline.from_pretrained(model, device="cpu", **lossy.loading)
    return [video_of(pipe, prompt, num_frames=frames, seed=seed, **lossy.call) for seed, prompt in enumerate(prompts)]


def measure(model: str, names: list[str], prompts: int, frames: int) -> list[dict[str, Any]]:
    scenes = draw_scenes(prompts)
    words = [scene.prompt() for scene in scenes]
    plain = videos(model, Lossy(), words, frames)
    for name, lossless in LOSSLESS.items():
        if not np.array_equal(videos(model, lossless, words[:1], frames)[0], plain[0]):
            stop(f"{name} does not give the frames of no option: nothing is reported")
    rows = []
    for name in ("none", *names):
        with counted_keys() as keys:
            made = videos(model, lossy(name), words, frames)
        pairs = list(zip(made, plain, strict=True))
        verdicts = summarize([v for video, scene in zip(made, scenes, strict=True) for v in judge(video, scene)])
        row: dict[str, Any] = {"model": model, "option": name, **{kind: verdicts[kind] for kind in JUDGED}}
        row["keys"] = keys[1] / keys[0]
        if name != "none":
            close = [psnr(*pair) for pair in pairs]
            row |= {"psnr_db": fmean(close), "worst_psnr_db": min(close), "ssim": fmean(ssim(*pair) for pair in pairs)}
        rows.append(row)
    return rows


def cells(row: dict[str, Any]) -> list[object]:
    forms = {"psnr_db": ".1f", "worst_psnr_db": ".1f", "ssim": ".4f"}
    distance = [format(row[name], form) if name in row else None for name, form in forms.items()]
    return [row["model"], row["option"], f"{row['keys']:.0%}", *distance, *(f"{row[kind]:.0%}" for kind in JUDGED)]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--models", default="toybox", show_default=True, help="Embedded models to run.")
@click.option("--only", default=",".join(LOSSY), show_default=True, help="The options to measure; heads=FILE too.")
@click.option("--prompts", default=8, show_default=True, type=click.IntRange(1))
@click.option("--frames", default=81, show_default=True, type=click.IntRange(1), help="Pixel frames of each video.")
def main(models: str, only: str, prompts: int, frames: int) -> None:
    """Measures what lossy options cost; a table, then one line of JSON."""
    torch.set_num_threads(1)
    rows = [row for model in models.split(",") for row in measure(model, only.split(","), prompts, frames)]
    print_table(("model", "option", "keys", "PSNR dB", "worst", "SSIM", "colour", "shape", "motion"), map(cells, rows))
    finish("losses", prompts=prompts, frames=frames, rows=rows)


if __name__ == "__main__":
    main()
