"""Chunks made in parallel by a Video Interface Network: from the steps of their sampler to chunks to decode."""

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
from causalrope_sp.vin.vin_config import ParallelChunksConfig
from causalrope_sp.vin.vin_weights import load_vin

OnStep = Callable[[StepOutput, "PreviewFrame | None"], object]


@dataclass(frozen=True)
class PreviewFrame:
    """What the video looks to become after step `step` of `steps`: uint8 (T, H, W, 3) on rank 0, None on the others."""

    step: int
    steps: int
    frames: np.ndarray | None


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
        """Refuses so many latent frames as this rank surely has no memory for: all chunks of a rank are denoised at
        once. Latents and what one feed-forward makes of them are counted, a lower bound.

        Raises:
            ConfigError: it will not fit.
        """
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
        self,
        model: CausalDiT,
        *args: Any,
        codec: Codec,
        on_step: OnStep | None,
        preview_every: int | None,
        shown: int,
        **options: Any,
    ) -> Generator[LatentChunk]:
        """`sample_parallel_chunks`, with its arguments, and after its last step the chunks' own frames, chunk by chunk.

        Args:
            on_step: called after each step.
            preview_every: how many steps there are between two previews, None for no preview.
            shown: pixel frames of a preview.
        """
        rank, initial = options["parallel"].rank, options["initial_latents"]
        made = sample_parallel_chunks(
            model, self.vin, *args, chunks=self.chunks, preview_every=preview_every, **options
        )
        for output in made:
            if on_step is not None:
                on_step(output, _preview(output, codec, shown, rank))
            if output.last:
                assert output.latents is not None, "the last step has the video"
                yield from self._own_frames(output.latents, 0 if initial is None else initial.shape[1])

    def _own_frames(self, latents: torch.Tensor, first: int) -> Generator[LatentChunk]:
        cuts = cut(latents.shape[1], self.chunks, first)
        for n in range(len(cuts)):
            own = AssignedChunks(cuts, self.chunks, n, len(cuts)).owned
            yield LatentChunk(Chunk(n, own.start, len(own)), latents[:, own.start - first : own.stop - first])


def _preview(output: StepOutput, codec: Codec, shown: int, rank: int) -> PreviewFrame | None:
    """Previews alone are decoded here: the video itself is decoded chunk by chunk afterwards."""
    if output.latents is None or output.last:
        return None
    if rank:
        return PreviewFrame(output.step, output.steps, None)
    pixels = to_uint8(codec.decoder().decode(output.latents.to(codec.dtype)))[0]
    return PreviewFrame(output.step, output.steps, pixels[:shown].movedim(1, -1).cpu().numpy())


def check_requested(requested: str | None, weights: Path | None, changes: Collection[str]) -> None:
    """Refuses what chunks made in parallel cannot be.

    Args:
        requested: "vin" or None.
        weights: the network of the model, if it has one.
        changes: what was said of a stream, such as its window.

    Raises:
        ConfigError: parallel chunks of a model without a network, or none of a model that has nothing else; something
            said of a stream.
    """
    if requested and weights is None:
        raise ConfigError("this model has no VIN weights to make its chunks in parallel with; toybox-vin has")
    if weights is not None and not requested:
        raise ConfigError(
            'this model makes its chunks in parallel alone: say --parallel-chunks vin (parallel_chunks="vin")'
        )
    if requested and changes:
        raise ConfigError(f"chunks made in parallel are no stream: they have no {', '.join(changes)} to set")


def check_call(parallel_chunks: bool, conditioned: bool, reuse: bool, previews: bool) -> None:
    """Raises ConfigError if chunks made in parallel shall start from a picture or a video, or reuse outputs, or if a
    stream shall have previews."""
    if previews and not parallel_chunks:
        raise ConfigError("steps are previewed (preview_every) only where chunks are made in parallel")
    if reuse and parallel_chunks:
        raise ConfigError("chunks made in parallel compute every output: there is no reuse")
    if conditioned and parallel_chunks:
        raise ConfigError("chunks made in parallel start from noise alone, not from an image or a video")
