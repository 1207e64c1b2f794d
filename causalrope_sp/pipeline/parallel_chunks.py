"""A pipeline's part in chunks made together: the network of its recipe, and the way from steps to chunks to decode."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from causalrope_sp.codec import Codec
from causalrope_sp.codec.pixels import to_uint8
from causalrope_sp.config import DiTConfig
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import Chunk, LatentGrid
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.pipeline.preflight import free_bytes
from causalrope_sp.sampling.chunk import LatentChunk
from causalrope_sp.vin.chunks import AssignedChunks, cut
from causalrope_sp.vin.network import VideoInterfaceNetwork
from causalrope_sp.vin.parallel_sampler import StepOutput, sample_parallel_chunks
from causalrope_sp.vin.vin_config import ParallelChunksConfig, check_preview
from causalrope_sp.vin.vin_weights import load_vin


@dataclass(frozen=True)
class PreviewFrame:
    """Step `step` of `steps` is done. `frames`, uint8 (T, H, W, 3) on rank 0, are a preview where one was asked for."""

    step: int
    steps: int
    frames: np.ndarray | None


@dataclass(frozen=True)
class Watch:
    """Who is called after every step, and every how many steps with a preview; None for no previews.

    Where `call` raises on some of the ranks only, the others wait for them at the next step.

    Raises:
        ConfigError: `preview_every` is no whole number of at least 1, or `call` none.
    """

    call: Callable[[PreviewFrame], None]
    preview_every: int | None = None

    def __post_init__(self) -> None:
        check_preview(self.preview_every)
        if not callable(self.call):
            raise ConfigError(f"what watches must be callable, unlike {self.call!r}")


@dataclass(frozen=True)
class ParallelChunks:
    """A network and how the videos that it was trained on are cut."""

    vin: VideoInterfaceNetwork
    chunks: ParallelChunksConfig

    @classmethod
    def load(cls, weights: Path, dit: DiTConfig, dtype: torch.dtype, device: torch.device) -> ParallelChunks:
        """Raises CheckpointError: not readable, or for another DiT."""
        return cls(*load_vin(weights, dit, dtype=dtype, device=device))

    def check_memory_for(self, model: CausalDiT, grid: LatentGrid, frames: int, parallel: SequenceParallel) -> None:
        """Raises ConfigError for so many latent frames as this rank surely has no memory for: all chunks of a lane are
        denoised at once. Counted are latents and what one feed-forward makes of them, from below."""
        config, free = model.config, free_bytes(parallel.device)
        held = -(-frames // parallel.mesh.chunk)
        tokens = held * -(-grid.tokens // parallel.mesh.sp)
        latents = 2 * 4 * frames * config.in_channels * grid.latent_height * grid.latent_width
        needs = latents + tokens * (config.ffn_dim + 4 * config.dim) * model.dtype.itemsize
        if free is not None and needs > free:
            raise ConfigError(
                f"{frames} latent frames made at once need at least {needs / 1e9:.3g} GB on {parallel.device}, "
                f"{free / 1e9:.3g} GB are free: make fewer frames, or share them out over more ranks"
            )

    def sample(
        self, model: CausalDiT, *args: Any, codec: Codec, watch: Watch | None, shown: int, **options: Any
    ) -> Generator[LatentChunk]:
        """`sample_parallel_chunks`, with its arguments, and after its last step the chunks' own frames, chunk by chunk.
        Previews show so many pixel frames."""
        every = None if watch is None else watch.preview_every
        for output in sample_parallel_chunks(
            model, self.vin, *args, chunks=self.chunks, preview_every=every, **options
        ):
            if watch is not None:
                watch.call(_preview(output, codec, shown, options["parallel"].rank))
            if output.last:
                assert output.latents is not None, "the last step has the video"
                given, latents = options["initial_latents"], output.latents
                first = 0 if given is None else given.shape[1]
                cuts = cut(latents.shape[1], self.chunks, first)
                for n in range(len(cuts)):
                    own = AssignedChunks(cuts, self.chunks, n, len(cuts)).owned
                    yield LatentChunk(Chunk(n, own.start, len(own)), latents[:, own.start - first : own.stop - first])


def _preview(output: StepOutput, codec: Codec, shown: int, rank: int) -> PreviewFrame:
    """Previews alone are decoded: the video itself is decoded as it is handed out."""
    if output.latents is None or output.last or rank:
        return PreviewFrame(output.step, output.steps, None)
    pixels = to_uint8(codec.decoder().decode(output.latents.to(codec.dtype)))[0]
    return PreviewFrame(output.step, output.steps, pixels[:shown].movedim(1, -1).cpu().numpy())


def check_asked(asked: str | None, weights: Path | None, changes: Collection[str]) -> None:
    """Refuses what chunks made in parallel cannot be.

    Raises:
        ConfigError: an unknown way to make them; one asked for where the recipe names no VIN, or not asked for where it
            does; something said of a stream, such as its window.
    """
    if asked not in (None, "vin"):
        raise ConfigError(f"parallel_chunks must be vin, not {asked!r}")
    if asked and weights is None:
        raise ConfigError("this model has no VIN weights to make its chunks in parallel with; toybox-vin has")
    if weights is not None and not asked:
        raise ConfigError(
            'this model makes its chunks in parallel alone: say --parallel-chunks vin (parallel_chunks="vin")'
        )
    if asked and changes:
        raise ConfigError(f"chunks made in parallel are no stream: they have no {', '.join(changes)} to set")


def check_start(together: bool, given: bool, reuse: bool, watched: bool) -> None:
    """Raises ConfigError if chunks made together shall start from a picture or a video, or reuse outputs, or others be
    watched."""
    if watched and not together:
        raise ConfigError("steps are watched, and previewed, only where chunks are made in parallel")
    if reuse and together:
        raise ConfigError("chunks made in parallel compute every output: there is no reuse")
    if given and together:
        raise ConfigError("chunks made in parallel start from noise alone, not from an image or a video")
