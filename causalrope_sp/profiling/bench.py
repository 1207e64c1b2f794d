"""Measures a model on this machine for `causalrope-sp bench`: what its parts take, and the least that they could.

The floor of a part is its FLOPs, as planning counts them, divided by the rate at which this device multiplies large
matrices in the same dtype. Every rank makes the same calls; the times of rank 0 are reported.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from causalrope_sp.codec.wan_vae import wan_vae_of
from causalrope_sp.diffusion.schedule import guided_steps
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.grid import Chunk, Shard
from causalrope_sp.pipeline.conditioning import NOTHING
from causalrope_sp.pipeline.decoding import frames_of
from causalrope_sp.pipeline.load_options import LoadOptions
from causalrope_sp.pipeline.loading import load_parts
from causalrope_sp.pipeline.output import FrameRange
from causalrope_sp.pipeline.pipeline import CausalVideoPipeline
from causalrope_sp.pipeline.warm_up import no_text, sample_without_text
from causalrope_sp.planning.counts import attention_flops, chunk_flops, cross_flops
from causalrope_sp.planning.decode_cost import VaeSize
from causalrope_sp.planning.workload import Workload

SIDES = {"cpu": 1024, "cuda": 8192}  # of the matrices that the matrix rate is measured with
PRODUCTS = 15


@dataclass(frozen=True)
class Row:
    """One measurement.

    Args:
        name: what was measured.
        value: the time or rate.
        unit: of `value` and `floor`.
        floor: the least time that the arithmetic takes; None where there is none.
    """

    name: str
    value: float
    unit: str
    floor: float | None = None


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measures the FLOP/s of a large matrix product: the fastest of a few, because a busy machine slows some of them,
    and a floor must not be above what is measured."""
    side, seconds = SIDES[device.type], []
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    for _ in range(1 + PRODUCTS):
        started = _now(device)
        torch.mm(a, b)
        seconds.append(_now(device) - started)
    return 2 * side**3 / min(seconds[1:])


def load(model: str, options: LoadOptions, parallel: SequenceParallel) -> tuple[CausalVideoPipeline, Row]:
    """Loads a model without warming it up.

    Args:
        model: as `CausalVideoPipeline.from_pretrained` takes it; it generates streams.
        options: how it is loaded.
        parallel: the ranks.

    Returns:
        The pipeline, and the time that loading took.
    """
    started = _now(parallel.device)
    pipe = CausalVideoPipeline(load_parts(model, options, parallel), parallel)
    return pipe, Row("load", _now(parallel.device) - started, "s")


def measure(
    pipe: CausalVideoPipeline, prompt: str | None, frames: int, runs: int, rates: dict[torch.dtype, float]
) -> list[Row]:
    """Measures a pipeline that has not run yet.

    Args:
        pipe: the pipeline.
        prompt: the text of the videos; None takes embeddings of zeros and encodes no text.
        frames: pixel frames of a video.
        runs: how many warm videos are made, and how often the rest is repeated.
        rates: the FLOP/s of matrix products in the dtypes of the transformer and the codec.

    Returns:
        The rows; where there are several times, their median.
    """
    started = _now(pipe.device)
    if pipe.device.type == "cuda":  # as `from_pretrained` does
        pipe.warm_up()
    warmed_up = _now(pipe.device)
    cold = warmed_up - started + _video_times(pipe, prompt, frames)[0]
    firsts, wholes = zip(*(_video_times(pipe, prompt, frames) for _ in range(runs)), strict=True)
    denoised = [_steady_chunks(pipe, _chunk_times(pipe, frames)) for _ in range(runs)]
    steps = [_steady_chunks(pipe, _step_cpu_times(pipe, frames)) for _ in range(runs)]
    least = max(_denoise_flops(pipe, chunk) for chunk, _ in denoised[0]) / rates[pipe.model.dtype]
    decode_flops = _decode_flops(pipe)
    decode_floor = None if decode_flops is None else 1e3 * decode_flops / rates[pipe.codec.dtype]
    fps = frames / median(wholes)
    return [
        Row("first frames, cold", cold, "s"),
        Row("first frames, warm", median(firsts), "s"),
        Row("denoise a chunk", 1e3 * median(t for run in denoised for _, t in run), "ms", 1e3 * least),
        Row("decode a chunk", 1e3 * median(_decode_times(pipe, runs)), "ms", decode_floor),
        Row("CPU time of a step", 1e3 * median(t for run in steps for _, t in run), "ms"),
        Row("whole video", fps, "fps"),
        Row("realtime factor", fps / pipe.fps, "×"),
    ]


def _now(device: torch.device) -> float:
    """The clock in seconds, once the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _video_times(pipe: CausalVideoPipeline, prompt: str | None, frames: int) -> tuple[float, float]:
    """The seconds to the first frames of a video, and to its last."""
    call: dict[str, Any] = {"num_frames": frames, "prompt_embeds": no_text(pipe) if prompt is None else None}
    if any(guided_steps(pipe.config.sampler)):
        call["negative_prompt_embeds"] = no_text(pipe)
    started = _now(pipe.device)
    done = [_now(pipe.device) - started for _ in pipe.stream(prompt, **call)]
    return done[0], done[-1]


def _latent_frames(pipe: CausalVideoPipeline, frames: int) -> int:
    """The latent frames that a video of so many pixel frames is generated from."""
    grid = pipe.settings().grid
    opening = pipe.text.opening(pipe.model.config.in_channels, grid.latent_height, grid.latent_width)
    prefix = 0 if opening is None else opening.shape[1]
    latent_frames = FrameRange(frames, pipe.codec.temporal_stride, prefix, NOTHING).latent_frames(pipe.config.stream)
    assert latent_frames is not None, "a video of so many frames has an end"
    return latent_frames


def _chunk_times(pipe: CausalVideoPipeline, frames: int) -> list[tuple[Chunk, float]]:
    """The chunks of a video that is not decoded, and the seconds that each took."""
    times, started = [], _now(pipe.device)
    with pipe.parallel.turn("times chunks"):
        for part in sample_without_text(pipe, _latent_frames(pipe, frames), pipe.config.sampler):
            done = _now(pipe.device)
            times.append((part.chunk, done - started))
            started = done
    return times


def _step_cpu_times(pipe: CausalVideoPipeline, frames: int) -> list[tuple[Chunk, float]]:
    """The CPU seconds of this process that the last step of each chunk takes.

    The device is idle when a step begins and is not waited for, so on CUDA this is what launching the step takes. The
    last step is not fused with a context pass, unless it is the only one.
    """
    times, started, last = list[tuple[Chunk, float]](), time.process_time(), len(pipe.config.sampler.steps) - 1

    def on_step(chunk: Chunk, step: int, _: float) -> None:
        nonlocal started
        spent = time.process_time() - started
        if step == last:
            times.append((chunk, spent))
        _now(pipe.device)
        started = time.process_time()

    with pipe.parallel.turn("times steps"):
        for _ in sample_without_text(pipe, _latent_frames(pipe, frames), pipe.config.sampler, on_step):
            pass
    return times


def _steady_chunks(pipe: CausalVideoPipeline, times: list[tuple[Chunk, float]]) -> list[tuple[Chunk, float]]:
    """The chunks before which the window was full, or else the last one."""
    window = pipe.config.stream.window
    return [(c, t) for c, t in times if window is not None and c.start >= window] or times[-1:]


def _decode_times(pipe: CausalVideoPipeline, runs: int) -> list[float]:
    """The seconds that chunks after the first take from latents to pixel frames in the memory of rank 0."""
    grid, frames = pipe.settings().grid, pipe.config.stream.chunk_frames
    shape = 1, frames, pipe.codec.channels, grid.latent_height, grid.latent_width
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(pipe.device)
    times = []
    with pipe.parallel.turn("times decoding"):
        turns = pipe.parallel.open_stream()
        decoder = frames_of(pipe.codec, pipe.parallel, grid, pipe.parts.options.decode, turns)
        for _ in range(2 + runs):  # the first chunk has fewer pixel frames, and the second is the first of its shape
            started = _now(pipe.device)
            decoder.decode(latents, 0, pipe.codec.temporal_stride * frames)
            times.append(_now(pipe.device) - started)
        decoder.close()
    return times[2:]


def _denoise_flops(pipe: CausalVideoPipeline, chunk: Chunk) -> int:
    """The FLOPs of a chunk on the rank with the most of them. Its first pass includes the context pass of the chunk
    before, which may be shorter and may see fewer frames than planning counts in the steady state."""
    grid, stream, layout = pipe.settings().grid, pipe.config.stream, pipe.parts.layout
    window = min(stream.window or chunk.stop, chunk.stop)
    work = Workload.of(pipe.model.config, grid, stream, pipe.config.sampler, window)
    work = replace(work, chunk_frames=chunk.frames)

    def context(rank: int, frames: int, keys: int) -> int:
        tokens = frames * Shard(grid, rank, layout.ranks).tokens
        linear = (work.linear_flops - work.left_out_flops) * tokens
        attention = attention_flops(layout, work, rank, frames, keys, min(keys, work.seen))
        return linear + cross_flops(work, tokens) + attention

    def branch_flops(rank: int, branch: int) -> int:
        before = context(rank, min(stream.chunk_frames, chunk.start), min(window, chunk.start))
        return chunk_flops(layout, work, rank, branch) - context(rank, chunk.frames, window) + before

    branches = range(len(work.passes))
    return max(sum(branch_flops(rank, branch) for branch in branches) for rank in range(layout.ranks))


def _decode_flops(pipe: CausalVideoPipeline) -> int | None:
    """The FLOPs of decoding a chunk, convolutions counted as direct ones; None for a codec other than a Wan VAE."""
    vae, grid = wan_vae_of(pipe.codec), pipe.settings().grid
    if vae is None:
        return None
    return pipe.config.stream.chunk_frames * VaeSize.of(vae.config).decode_flops(grid.latent_height, grid.latent_width)
