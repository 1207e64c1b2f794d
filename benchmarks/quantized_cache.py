"""The KV cache in 8 bits: what its rounding costs the videos of toybox, and what it saves.

    python benchmarks/quantized_cache.py                 # 8 prompts
    python benchmarks/quantized_cache.py --rope relative

Gate: over the prompts the mean PSNR of the decoded frames, against the same prompts and seeds with keys and values in
the model's own dtype, is at least 45 dB in int8 and 38 dB in fp8, and a cache takes at most 0.53 of bfloat16's bytes at
head widths 64 and 128, by formula and as it is allocated.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean
from typing import Any

import click
import torch
from pictures import psnr, ssim
from printed import finish, print_table, stop
from reuse import draw_scenes
from videos import video_of

from causalrope_sp import CausalVideoPipeline, LatentGrid
from causalrope_sp.cache.kv_cache import KVCache
from causalrope_sp.cache.layer_storage import STORED_DTYPES
from causalrope_sp.cache.window import SlidingWindow
from causalrope_sp.config import PRESETS, CacheDtype
from causalrope_sp.distributed.layout import parse_strategy
from causalrope_sp.planning.counts import cache_bytes
from causalrope_sp.planning.workload import Workload
from causalrope_sp.toybox.judge import judge, summarize

LEAST_DB: dict[CacheDtype, float] = {"int8": 45.0, "fp8": 38.0}
MOST_BYTES = 0.53  # of bfloat16's


def share_by_formula(kind: CacheDtype, width: int) -> float:
    """The bytes of the cache of Wan 2.1 1.3B at 480×832, window 21, over those of bfloat16."""
    config = replace(PRESETS["wan2.1-1.3b"], num_heads=PRESETS["wan2.1-1.3b"].dim // width)
    work = Workload(config, LatentGrid(30, 52), window=21, chunk_frames=3, steps=4)
    alone = parse_strategy("single", 1)
    return cache_bytes(alone, replace(work, cache=kind), 0) / cache_bytes(alone, work, 0)


def share_allocated(kind: str, width: int) -> float:
    """The same of a small cache that is allocated."""
    plain, small = (
        KVCache(1, 1, SlidingWindow(4), 100, 2, width, dtype=torch.bfloat16, quantized=dtype).bytes
        for dtype in (None, STORED_DTYPES[kind])
    )
    return small / plain


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--prompts", default=8, show_default=True, help="Generate this many videos of each kind.")
@click.option("--frames", default=81, show_default=True, help="Pixel frames of a video.")
@click.option("--rope", type=click.Choice(["absolute", "relative"]), default="absolute", show_default=True)
def main(prompts: int, frames: int, rope: str) -> None:
    """Measures the loss and the bytes of both kinds of 8 bits."""
    scenes, videos, judged = draw_scenes(prompts), {}, {}
    for kind in ("model", *LEAST_DB):
        pipe = CausalVideoPipeline.from_pretrained("toybox", device="cpu", cache=kind, rope=rope)
        made = [video_of(pipe, scene.prompt(), num_frames=frames, seed=seed) for seed, scene in enumerate(scenes)]
        videos[kind] = made
        judged[kind] = summarize([v for video, scene in zip(made, scenes, strict=True) for v in judge(video, scene)])
    rows, failed = list[dict[str, Any]](), []
    for kind, least in LEAST_DB.items():
        pairs = list(zip(videos[kind], videos["model"], strict=True))
        close = [psnr(*pair) for pair in pairs]
        shares = {width: (share_by_formula(kind, width), share_allocated(kind, width)) for width in (64, 128)}
        rows.append(
            {
                "cache": kind,
                "psnr_db": round(fmean(close), 1),
                "worst_psnr_db": round(min(close), 1),
                "ssim": round(fmean(ssim(*pair) for pair in pairs), 4),
                "bytes": {width: [round(share, 4) for share in both] for width, both in shares.items()},
                "judged": judged[kind],
                "judged_without": judged["model"],
            }
        )
        if fmean(close) < least:
            failed.append(f"{kind}: {fmean(close):.1f} dB, expected {least}")
        failed += [f"{kind}, d {width}: {both}" for width, both in shares.items() if max(both) > MOST_BYTES]
    if failed:
        stop("; ".join(failed))
    columns = ("cache", "PSNR, dB", "worst", "SSIM", "bytes at d 64", "d 128", "colour", "shape", "motion")
    print_table(
        columns,
        (
            [
                *(row[name] for name in ("cache", "psnr_db", "worst_psnr_db", "ssim")),
                *(f"{max(row['bytes'][width]):.3f}" for width in (64, 128)),
                *(f"{row['judged'][kind]:.0%}" for kind in ("color", "shape", "motion")),
            ]
            for row in rows
        ),
    )
    finish("quantized_cache", rows=rows, prompts=prompts, frames=frames, rope=rope)


if __name__ == "__main__":
    main()
