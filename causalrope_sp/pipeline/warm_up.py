"""`warm_up`: a short stream that is discarded, so that the first real one starts without delay."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import torch

from causalrope_sp.config import SamplerConfig
from causalrope_sp.diffusion.noise import seeded_noise
from causalrope_sp.distributed.stream_turns import StreamTurns
from causalrope_sp.pipeline.decoding import frames_of, run_decode_worker
from causalrope_sp.pipeline.generation_options import GenerationOptions
from causalrope_sp.sampling.sampler import sample_within_turns

if TYPE_CHECKING:
    from causalrope_sp.pipeline.pipeline import CausalVideoPipeline


def warm_up(pipe: CausalVideoPipeline) -> None:
    """Compiles kernels, measures attention libraries and connects ranks. Every rank must call it.

    It runs a stream with one denoise pass a chunk until the window has been full for a chunk, or for a model with
    parallel chunks a short video. The frames are discarded.

    Args:
        pipe: the pipeline.
    """
    parallel, grid, text = pipe.parallel, pipe.settings().grid, _no_text(pipe)
    if (chunks := pipe.parts.parallel_chunks) is not None:  # one chunk for every rank of the mesh axis
        latent_frames = chunks.chunks.filled_by(parallel.mesh.chunk)
        frames = 1 + pipe.codec.temporal_stride * (latent_frames - 1)
        deque(pipe.stream(options=GenerationOptions(prompt_embeds=text, num_frames=frames)), 0)
    else:
        with parallel.turn("warms up"):
            turns = parallel.open_stream()
            if parallel.decodes:
                deque(run_decode_worker(pipe.codec, parallel, grid, turns), 0)
            else:
                _warm_up_stream(pipe, text, turns)
    parallel.comm_stats.take()


def _warm_up_stream(pipe: CausalVideoPipeline, text: torch.Tensor, turns: StreamTurns) -> None:
    config, stream, grid = pipe.model.config, pipe.config.stream, pipe.settings().grid
    latent_height, latent_width = grid.latent_height, grid.latent_width
    chunks = sample_within_turns(
        pipe.model,
        text,
        seeded_noise(0, (1, config.in_channels, latent_height, latent_width)),
        grid,
        (stream.window or 0) + 2 * stream.chunk_frames,
        stream=stream,
        sampler=SamplerConfig(steps=(1000,), guidance_scale=pipe.config.sampler.guidance_scale),
        parallel=pipe.parallel,
        initial_latents=pipe.text.opening(config.in_channels, latent_height, latent_width),
        negative_embeds=text,
        layout=pipe.parts.layout,
    )
    frames = frames_of(pipe.codec, pipe.parallel, grid, pipe.parts.options.decode, turns)
    for number, part in enumerate(chunks):
        if number < 2:  # the first chunk has fewer pixel frames than the others
            frames.decode(part.latents, 0, pipe.codec.temporal_stride * part.chunk.frames)
    frames.close()


def _no_text(pipe: CausalVideoPipeline) -> torch.Tensor:
    """Text embeddings of zeros, (1, text_len, text_dim)."""
    return torch.zeros(1, pipe.model.config.text_len, pipe.model.config.text_dim)
