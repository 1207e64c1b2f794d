"""`warm_up`: a short stream that is discarded, so that the first real one starts without delay."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from typing import TYPE_CHECKING

import torch

from causalrope_sp.config import SamplerConfig
from causalrope_sp.diffusion.noise import seeded_noise
from causalrope_sp.distributed.stream_turns import StreamTurns
from causalrope_sp.pipeline.decoding import frames_of, run_decode_worker
from causalrope_sp.pipeline.generation_options import GenerationOptions
from causalrope_sp.sampling.chunk import LatentChunk
from causalrope_sp.sampling.sampler import sample_within_turns
from causalrope_sp.sampling.stream_options import Control, OnStep

if TYPE_CHECKING:
    from causalrope_sp.pipeline.pipeline import CausalVideoPipeline


def warm_up(pipe: CausalVideoPipeline) -> None:
    """Compiles kernels, measures attention libraries and connects ranks. Every rank must call it.

    It runs a stream with one denoise pass a chunk until the window has been full for a chunk, or for a model with
    parallel chunks a short video. The frames are discarded.

    Args:
        pipe: the pipeline.
    """
    parallel, grid = pipe.parallel, pipe.settings().grid
    if (chunks := pipe.parts.parallel_chunks) is not None:  # one chunk for every rank of the mesh axis
        latent_frames = chunks.chunks.filled_by(parallel.mesh.chunk)
        frames = 1 + pipe.codec.temporal_stride * (latent_frames - 1)
        deque(pipe.stream(options=GenerationOptions(prompt_embeds=no_text(pipe), num_frames=frames)), 0)
    else:
        with parallel.turn("warms up"):
            turns = parallel.open_stream()
            if parallel.decodes:
                deque(run_decode_worker(pipe.codec, parallel, grid, turns), 0)
            else:
                _warm_up_stream(pipe, turns)
    parallel.comm_stats.take()


def sample_without_text(
    pipe: CausalVideoPipeline, frames: int, sampler: SamplerConfig, on_step: OnStep | None = None
) -> Generator[LatentChunk]:
    """Samples a stream of the pipeline's own size for a text of zeros, without decoding it, for a caller that
    takes its turn.

    Args:
        pipe: the pipeline, which generates streams; this rank denoises.
        frames: latent frames to generate.
        sampler: steps and guidance.
        on_step: see `StreamOptions`.

    Returns:
        The chunks, as `sample_chunks` yields them.
    """
    config, grid, text = pipe.model.config, pipe.settings().grid, no_text(pipe)
    latent_height, latent_width = grid.latent_height, grid.latent_width
    return sample_within_turns(
        pipe.model,
        text,
        seeded_noise(0, (1, config.in_channels, latent_height, latent_width)),
        grid,
        frames,
        stream=pipe.config.stream,
        sampler=sampler,
        parallel=pipe.parallel,
        initial_latents=pipe.text.opening(config.in_channels, latent_height, latent_width),
        control=_no_control(config.control_channels) if config.control_channels else None,
        low_noise=pipe.parts.low_noise,
        image_embeds=torch.zeros(1, 1, config.image_dim) if config.image_dim else None,
        negative_embeds=text,
        layout=pipe.parts.layout,
        graphs=pipe.parts.options.graphs,
        on_step=on_step,
    )


def no_text(pipe: CausalVideoPipeline) -> torch.Tensor:
    """Returns text embeddings of zeros, (1, text_len, text_dim)."""
    return torch.zeros(1, pipe.model.config.text_len, pipe.model.config.text_dim)


def _no_control(channels: int) -> Control:
    return lambda chunk: torch.zeros(1, chunk.frames, channels, 1, 1)


def _warm_up_stream(pipe: CausalVideoPipeline, turns: StreamTurns) -> None:
    stream = pipe.config.stream
    steps: tuple[float, ...] = (1000,) if pipe.parts.low_noise is None else (1000, 1)  # one of each model
    sampler = SamplerConfig(steps=steps, guidance_scale=pipe.config.sampler.guidance_scale)
    chunks = sample_without_text(pipe, (stream.window or 0) + 2 * stream.chunk_frames, sampler)
    frames = frames_of(pipe.codec, pipe.parallel, pipe.settings().grid, pipe.parts.options.decode, turns)
    for number, part in enumerate(chunks):
        if number < 2:  # the first chunk has fewer pixel frames than the others
            frames.decode(part.latents, 0, pipe.codec.temporal_stride * part.chunk.frames)
    frames.close()
