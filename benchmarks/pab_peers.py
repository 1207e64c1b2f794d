"""Pyramid Attention Broadcast on a Latte of random weights: ours on 1 and 2 ranks, diffusers' and cache-dit's, in turn.

    python benchmarks/pab_peers.py            # three runs of each, of which the least counts
    python benchmarks/pab_peers.py --runs 1

Gate: ours is diffusers' model to 1e-4 without and with PAB (stored before the gate, as diffusers stores it), or nothing
is reported. Times are CPU seconds of one thread, of the busier rank where there are two. FLOPs of ours are those of the
cost model, which tests hold to torch's counter; of diffusers' what torch counts. PSNR is of the latents against the
same model without reuse. diffusers' hooks have one cache for all calls, so that with guidance in two calls a step the
unconditional one takes the conditional one's outputs: the last table shows what is left of the negative prompt.
cache-dit, where it is installed, skips pairs of blocks by how much the first pair's output moved; it gets the model
with each layer as one block.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
from pab_sides import (
    GRID,
    NEGATIVE,
    PAB,
    PROMPT,
    START,
    STEPS,
    TEXT,
    VIDEO,
    diffusers_predict,
    make_model,
    refreshed,
    sampled,
    with_cache_dit,
    with_pyramid,
)
from printed import finish, print_table, stop
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.planning.machines import CPU
from causalrope_sp.reuse import ReusePolicy
from causalrope_sp.spatiotemporal.cost import VideoWork, video_cost
from causalrope_sp.spatiotemporal.latte import LatteDiT, LatteStream, load_latte

CLOSE = 1e-4


def ours(model: LatteDiT, reuse: ReusePolicy | None, parallel: SequenceParallel, negative: bool = False) -> Tensor:
    """Our video: each rank steps its own frames, with a stream for each branch of guidance."""
    texts = (PROMPT, NEGATIVE) if negative else (PROMPT,)
    made = [LatteStream(model, text, GRID, parallel=parallel, timesteps=STEPS, reuse=reuse) for text in texts]
    streams = {id(text): stream for text, stream in zip(texts, made, strict=True)}

    def predict(x_BFCHW: Tensor, t: float, text: Tensor) -> Tensor:
        found = streams[id(text)].denoise(VIDEO, GRID.patchify(x_BFCHW), t)
        return GRID.unpatchify(found)

    own = GRID.unpatchify(made[0].mine(GRID.patchify(START)))
    video = sampled(predict, NEGATIVE if negative else None, start=own)
    return GRID.unpatchify(made[0].gather(GRID.patchify(video), VIDEO))


def on_ranks(group: dist.ProcessGroup | None, device: str, folder: Path, reuse: ReusePolicy | None) -> Any:
    """The video, the busier rank's CPU seconds, the wall's, and the bytes that this rank received."""
    torch.set_num_threads(1)
    parallel, model = SequenceParallel(group), load_latte(folder)
    if group is not None:
        dist.barrier(group)
    spent, wall = time.process_time(), time.perf_counter()
    video = ours(model, reuse, parallel)
    seconds = torch.tensor([time.process_time() - spent, time.perf_counter() - wall])
    if group is not None:
        dist.all_reduce(seconds, dist.ReduceOp.MAX, group)
    moved = parallel.comm_stats.take().by_kind()
    return video, *seconds.tolist(), moved["switch"].bytes if "switch" in moved else 0


def timed(make: Callable[[], Tensor]) -> tuple[Tensor, float, float, int]:
    """As `on_ranks`, for one process."""
    spent, wall = time.process_time(), time.perf_counter()
    video = make()
    return video, time.process_time() - spent, time.perf_counter() - wall, 0


def psnr(found: Tensor, expected: Tensor) -> float:
    """In dB, with the range of the expected latents as the peak."""
    error = float((found - expected).square().mean())
    return math.inf if error == 0 else 20 * math.log10(float(expected.max() - expected.min())) - 10 * math.log10(error)


def relative(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference over that of the expected."""
    return float((found - expected).norm() / expected.norm())


def counted(make: Callable[[], Tensor]) -> float:
    """TFLOP by torch's counter, with attention by the kernels that it counts."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        make()
    return counter.get_total_flops() / 1e12


def planned(folder: Path, reuse: ReusePolicy | None, ranks: int) -> float:
    """TFLOP of the busier rank by the cost model."""
    work = VideoWork(load_latte(folder), VIDEO.frames, GRID.tokens, TEXT, 1, STEPS, 4, reuse)
    return video_cost(work, ranks, 1, CPU).flops / 1e12


@click.command()
@click.option("--runs", default=3, show_default=True, type=click.IntRange(1), help="Run each side so often.")
def main(runs: int) -> None:
    """Compares videos by all sides, and prints tables and one line of JSON."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as name, RankPool() as pool:
        folder = Path(name)
        make_model().save_pretrained(folder)
        plain = diffusers_predict(make_model(), [0.0])
        sides: dict[str, Callable[[], Any]] = {
            "diffusers": lambda: timed(lambda: sampled(plain)),
            "ours": lambda: on_ranks(None, "cpu", folder, None),
            "diffusers, PAB": lambda: timed(partial(sampled, with_pyramid(make_model()))),
            "ours, PAB": lambda: on_ranks(None, "cpu", folder, PAB),
            "ours, 2 ranks": lambda: pool.run(on_ranks, 2, folder, None),
            "ours, 2 ranks, PAB": lambda: pool.run(on_ranks, 2, folder, PAB),
        }
        flops = {
            "diffusers": len(STEPS) * counted(lambda: sampled(plain, steps=STEPS[:1])),
            "diffusers, PAB": counted(lambda: sampled(with_pyramid(make_model()))),
            "ours": planned(folder, None, 1),
            "ours, PAB": planned(folder, PAB, 1),
            "ours, 2 ranks": planned(folder, None, 2),
            "ours, 2 ranks, PAB": planned(folder, PAB, 2),
        }
        if find_spec("cache_dit") is not None:
            cached_model = make_model()
            cached = with_cache_dit(cached_model)
            sides["cache-dit"] = lambda: timed(lambda: sampled(cached))
        found: dict[str, list[Any]] = {side: [] for side in sides}
        for _ in range(runs):
            for side, run in sides.items():
                found[side].append(run())
                if side == "cache-dit":
                    refreshed(cached_model)
        fields = report(found, flops)
        print_guidance(folder)
        finish("pab_peers", **fields)


def report(found: dict[str, list[Any]], flops: dict[str, float]) -> dict[str, Any]:
    """Checks the gate, prints the tables, and returns the fields of the line of JSON."""
    videos = {side: runs[0][0] for side, runs in found.items()}
    for side in videos:
        peer = "diffusers, PAB" if "PAB" in side else "diffusers"
        if side.startswith("ours") and (off := relative(videos[side], videos[peer])) > CLOSE:
            stop(f"{side} differs from {peer} by {off:.1e}")
    spent = {side: min(run[1] for run in runs) for side, runs in found.items()}
    rows, fields = [], {}
    for side, runs in found.items():
        reference = videos["ours" if side.startswith("ours") else "diffusers"]
        quality = psnr(videos[side], reference)
        fields[side] = {
            "tflop": round(flops[side], 4) if side in flops else None,
            "mb_received": round(runs[0][3] / 1e6, 2),
            "cpu_s": round(spent[side], 3),
            "wall_s": round(min(run[2] for run in runs), 3),
            "against_diffusers": round(spent["diffusers"] / spent[side], 3),
            "psnr_db": None if math.isinf(quality) else round(quality, 1),
        }
        rows.append([side, *fields[side].values()])
    print_table(["side", "TFLOP", "MB received", "CPU s", "wall s", "× diffusers", "PSNR, dB"], rows)
    saved_flops = 1 - flops["ours, PAB"] / flops["ours"]
    saved_time = 1 - spent["ours, PAB"] / spent["ours"]
    ratios = {
        "ours_over_diffusers": spent["diffusers"] / spent["ours"],
        "time_saved_over_flops_saved": saved_time / saved_flops,
        "speed_of_2_ranks": spent["ours"] / spent["ours, 2 ranks"],
    }
    print_table(["ratio", "found"], [[name, f"{value:.3f}"] for name, value in ratios.items()])
    return {"sides": fields, **{name: round(value, 3) for name, value in ratios.items()}}


def print_guidance(folder: Path) -> None:
    """Prints how far guidance moves the video, where each branch is a call of its own."""
    plain, single, rows = diffusers_predict(make_model(), [0.0]), SequenceParallel.single(device="cpu"), []
    unguided = sampled(plain)
    for name, guided in (
        ("diffusers", sampled(plain, NEGATIVE)),
        ("diffusers, PAB", sampled(with_pyramid(make_model()), NEGATIVE)),
        ("ours, PAB", ours(load_latte(folder), PAB, single, negative=True)),
    ):
        rows.append([name, f"{relative(guided, unguided):.4f}"])
    print_table(["side", "guided against not guided, relative"], rows)


if __name__ == "__main__":
    main()
