"""What lossy options cost toybox, against the same prompts and seeds without them.

    python benchmarks/losses.py                       # every option
    python benchmarks/losses.py --only fp8,fp8-dynamic --models toybox,toybox-flow
    python benchmarks/losses.py --only heads=heads.json+cache=int8   # windows of heads, of a file, and 8 bits together
    python benchmarks/losses.py --only cache=int8,cache=fp8 --rope relative

Keys are those that self-attention reads, as a share of those of the windows, over all passes, layers and heads.

Gate: an option at which nothing is lost gives the frames of no option, bit for bit, or nothing is reported. PSNR and
SSIM are against float32 without options; adherence is toybox's judge, from the frames alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
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

from causalrope_kernels import Keys, PassOperations, Source
from causalrope_sp import CausalVideoPipeline, Chunk
from causalrope_sp.attention.base import Strategy
from causalrope_sp.cache.kv_cache import KVCache
from causalrope_sp.cache.layer_cache import LayerCache
from causalrope_sp.heads import HeadPolicy
from causalrope_sp.toybox.judge import judge, summarize

JUDGED = ("color", "shape", "motion")
COLUMNS = ("keys", "PSNR dB", "worst", "SSIM", "colour", "shape", "motion")
NAMED = {
    "bfloat16": {"dtype": "bfloat16"},
    "fp8": {"weights": "fp8"},
    "fp8-dynamic": {"weights": "fp8-dynamic"},
}
ALL = (*NAMED, "cache=int8", "cache=fp8", *(f"similar_frames={similar}" for similar in (2, 4, 6, 0.3)))
VALUES = {"heads": str, "cache": str, "similar_frames": float}


def options_of(name: str) -> dict[str, Any]:
    """Returns the options of loading that a name stands for: those of `NAMED` and of `VALUES`, joined by "+"."""
    found: dict[str, Any] = {}
    for part in name.split("+"):
        option, _, value = part.partition("=")
        if part in NAMED:
            found |= NAMED[part]
        elif option in VALUES:
            found[option] = VALUES[option](value)
        else:
            stop(f"--only: expected {', '.join(NAMED)} or {', '.join(f'{each}=…' for each in VALUES)}, got {part}")
    return found


def share(keys: Keys) -> float:
    """Which share of the pairs of a query and a token of a slot queries see."""
    bands = keys.bands
    if bands is None:
        return 1.0
    pairs = sum((b - a) * (d - c) for (a, b), (c, d) in zip(bands.queries, bands.keys, strict=True))
    return pairs / (bands.frame_queries * bands.slot_tokens)


@contextmanager
def counted_keys() -> Iterator[list[float]]:
    """Counts pairs of a query and a key of the window, and those of them that are attended."""
    counts, plain = [0.0, 0.0], Strategy.attend

    def attend(
        self: Strategy, source: Source, cache: LayerCache, chunks: Sequence[Chunk], operations: PassOperations
    ) -> Tensor:
        output = plain(self, source, cache, chunks, operations)
        assert isinstance(cache._cache, KVCache)
        for chunk in chunks:
            held = len(cache._cache.window.held(chunk.stop)) * self.stored_tokens
            of_heads = [own for group in cache.keys(chunk) for own in group.by_rows]
            read = sum(own.k.shape[2] * share(own) * sum(stop - first for first, stop in own.rows) for own in of_heads)
            counts[0] += chunk.frames * self.heads * held
            counts[1] += chunk.frames * read
        return output

    with patch.object(Strategy, "attend", attend):
        yield counts


class Comparison:
    """Videos of the same prompts and seeds, compared with those that are made without options.

    Args:
        model: the name of an embedded model.
        prompts: how many videos.
        frames: pixel frames of a video.
        options: options of loading that all videos have.
    """

    def __init__(self, model: str, prompts: int, frames: int, **options: Any) -> None:
        self.model, self._frames, self._options = model, frames, options
        self._scenes = draw_scenes(prompts)
        self._prompts = [scene.prompt() for scene in self._scenes]
        self.plain = self.pipe()
        self._made = self._videos(self.plain)
        self._gate()

    def pipe(self, **options: Any) -> CausalVideoPipeline:
        """Loads the model with some options."""
        return CausalVideoPipeline.from_pretrained(self.model, device="cpu", **self._options, **options)

    def _videos(self, pipe: CausalVideoPipeline, most: int | None = None) -> list[np.ndarray]:
        prompts = self._prompts[:most]
        return [video_of(pipe, prompt, num_frames=self._frames, seed=seed) for seed, prompt in enumerate(prompts)]

    def _gate(self) -> None:
        config = self.plain.model.config
        whole = HeadPolicy(((None,) * config.num_heads,) * config.num_layers)
        for options in ({"weights": "full"}, {"similar_frames": 100}, {"heads": whole}):
            if not np.array_equal(self._videos(self.pipe(**options), 1)[0], self._made[0]):
                stop(f"{next(iter(options))} that leaves nothing out changes the frames: nothing is reported")

    def alike_db(self, attention: AbstractContextManager[Any], pipe: CausalVideoPipeline) -> float:
        """Returns the PSNR of the first video, made by some attention without options, to that of a pipeline."""
        with attention:
            (made,) = self._videos(self.plain, 1)
        return psnr(made, self._videos(pipe, 1)[0])

    def row(
        self, name: str, pipe: CausalVideoPipeline, attention: AbstractContextManager[list[int]] | None = None
    ) -> dict[str, Any]:
        """Makes the videos and compares them.

        Args:
            name: what the row is called.
            pipe: the model with some options; `plain` for none.
            attention: makes videos attend in another way, and counts keys; None counts those of the options.
        """
        same = pipe is self.plain and attention is None
        with attention or counted_keys() as keys:
            made = self._videos(pipe)
        judged = [v for video, scene in zip(made, self._scenes, strict=True) for v in judge(video, scene)]
        verdicts, pairs = summarize(judged), list(zip(made, self._made, strict=True))
        row: dict[str, Any] = {"model": self.model, "option": name, **{kind: verdicts[kind] for kind in JUDGED}}
        row["keys"] = keys[1] / keys[0]
        if not same:
            close = [psnr(*pair) for pair in pairs]
            row |= {"psnr_db": fmean(close), "worst_psnr_db": min(close), "ssim": fmean(ssim(*pair) for pair in pairs)}
        return row


def cells(row: dict[str, Any]) -> list[object]:
    """The cells of `COLUMNS`."""
    forms = {"psnr_db": ".1f", "worst_psnr_db": ".1f", "ssim": ".4f"}
    distance = [format(row[name], form) if name in row else None for name, form in forms.items()]
    return [f"{row['keys']:.0%}", *distance, *(f"{row[kind]:.0%}" for kind in JUDGED)]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--models", default="toybox", show_default=True, help="Embedded models to run.")
@click.option("--only", default=",".join(ALL), show_default=True, help="The options to measure; + joins some of them.")
@click.option("--prompts", default=8, show_default=True, type=click.IntRange(1))
@click.option("--frames", default=81, show_default=True, type=click.IntRange(1), help="Pixel frames of each video.")
@click.option("--rope", type=click.Choice(["absolute", "relative"]), default="absolute", show_default=True)
def main(models: str, only: str, prompts: int, frames: int, rope: str) -> None:
    """Measures what lossy options cost; a table, then one line of JSON."""
    torch.set_num_threads(1)
    compared = [Comparison(model, prompts, frames, rope=rope) for model in models.split(",")]
    named = {name: options_of(name) for name in only.split(",")}
    rows = []
    for each in compared:
        rows.append(each.row("none", each.plain))
        rows += [each.row(name, each.pipe(**options)) for name, options in named.items()]
    print_table(("model", "option", *COLUMNS), ([row["model"], row["option"], *cells(row)] for row in rows))
    finish("losses", prompts=prompts, frames=frames, rope=rope, rows=rows)


if __name__ == "__main__":
    main()
