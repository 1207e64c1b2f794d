"""The autoregressive sampling loop as a generator of chunks of latents."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from causalrope_sp.diffusion.noise import Noise
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import LatentGrid
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.sampling.chunk import LatentChunk
from causalrope_sp.sampling.chunk_loop import ChunkLoop
from causalrope_sp.sampling.stream_options import StreamOptions


def sample_chunks(
    model: CausalDiT,
    embeds: Tensor,
    noise: Noise,
    grid: LatentGrid,
    frames: int | None,
    *,
    parallel: SequenceParallel | None = None,
    **options: Any,
) -> Generator[LatentChunk]:
    """Generates a video chunk by chunk (Self-Forcing, arXiv 2506.08009), on one rank or many.

    Every rank must take the chunks of all its streams in the same order.

    Args:
        model: the DiT; its dtype is the dtype of the forward. The sampler's own state is float32 or wider.
        embeds: text embeddings, (B, text_len, text_dim), zeros after the text's end.
        noise: starting and fresh noise by (chunk, step); see `seeded_noise`.
        grid: the latent frame in tokens.
        frames: latent frames to generate; None generates without end and needs a window.
        parallel: the ranks; one process if None. With 2 ranks on the mesh's `cfg` axis the conditional and the
            unconditional forward run at once.
        options: fields of `StreamOptions`, such as `stream`, `sampler` and `initial_latents`.

    Yields:
        LatentChunk: before the chunk's context pass; the last chunk has no context pass.

    Raises:
        ConfigError: `frames` is below 1, an endless video has no window, a shape does not fit the model or the grid,
            the strategy cannot use the ranks, `source` starts at a step that the sampler does not have, guidance lacks
            `negative_embeds` or applies to no step, a mesh axis has no use, ranks make different calls, or embeddings
            or latents are not finite. Of a chunk's latents that is known once the next chunk has been denoised, and
            of the last chunk's when the generator ends.
        RankLostError: another rank has ended, failed, or left the stream.
    """
    parallel = parallel or SequenceParallel.single()
    if parallel.mesh.decode:
        raise ConfigError("decode_ranks of the mesh must be 0 for latents alone: decode ranks serve a pipeline")
    turns = parallel.open_stream()
    chunks, made = sample_within_turns(model, embeds, noise, grid, frames, parallel=parallel, **options), 0
    with turns.taken(), closing(chunks):
        while frames is None or made < max(1, frames):  # wrong `frames` are for the loop to refuse
            with turns.chunk():
                output = next(chunks)
            made += output.chunk.frames
            yield output
        output.check_finite()


@torch.inference_mode()
def sample_within_turns(
    model: CausalDiT,
    embeds: Tensor,
    noise: Noise,
    grid: LatentGrid,
    frames: int | None,
    *,
    parallel: SequenceParallel,
    **options: Any,
) -> Generator[LatentChunk]:
    """Generates the chunks of `sample_chunks`, whose arguments it takes, for a caller that takes each within a turn."""
    loop = ChunkLoop(model, embeds, noise, grid, frames, parallel, StreamOptions(**options))
    while loop.next_chunk is not None:
        yield loop.step()
