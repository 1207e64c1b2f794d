"""Parallel chunks: videos whose chunks a Video Interface Network (VIN) lets the ranks sample at the same time.

Source: Video Interface Networks, arXiv 2503.17539.
"""

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
from causalrope_sp.pipeline.free_memory import free_bytes
from causalrope_sp.sampling.chunk import LatentChunk
from causalrope_sp.sampling.finite_chunks import FiniteCheck
from causalrope_sp.vin.chunks import AssignedChunks, cut
from causalrope_sp.vin.network import VideoInterfaceNetwork
from causalrope_sp.vin.parallel_sampler import StepOutput, sample_parallel_chunks
from causalrope_sp.vin.vin_config import ParallelChunksConfig
from causalrope_sp.vin.vin_weights import load_vin

OnStep = Callable[[StepOutput, "PreviewFrame | None"], object]


@dataclass(frozen=True)
class PreviewFrame:
    """A preview of the video after a denoising step, decoded from the prediction of the clean latents.

    Args:
        step: the number of the step, from 1 on.
        steps: how many steps there are.
        frames: uint8 (T, H, W, 3) on rank 0; None on the others.
    """

    step: int
    steps: int
    frames: np.ndarray | None


@dataclass(frozen=True)
class ParallelChunks:
    """A Video Interface Network, and the settings of its parallel chunks.

    Args:
        vin: the network.
        chunks: how a video is cut into parallel chunks, and how these are fused and guided.
    """

    vin: VideoInterfaceNetwork
    chunks: ParallelChunksConfig

    @classmethod
    def load(cls, weights: Path, dit: DiTConfig, dtype: torch.dtype, device: torch.device) -> ParallelChunks:
        """Loads a network.

        Args:
            weights: its file.
            dit: the configuration of the DiT that it belongs to.
            dtype: the dtype of its weights.
            device: where it runs.

        Raises:
            CheckpointError: the file cannot be read, or belongs to another DiT.
        """
        return cls(*load_vin(weights, dit, dtype=dtype, device=device))

    def check_memory_for(self, model: CausalDiT, grid: LatentGrid, frames: int, parallel: SequenceParallel) -> None:
        """Checks that this rank has enough memory for a lower bound: all latents, the position embeddings of keyframes,
        and the activations of one feed-forward layer over all chunks of the rank, which are denoised at the same time.

        Args:
            model: the transformer.
            grid: the latent's size.
            frames: latent frames of the video.
            parallel: the ranks.

        Raises:
            ConfigError: the lower bound exceeds the free memory.
        """
        config, free = model.config, free_bytes(parallel.device)
        rank_frames = -(-frames // parallel.mesh.chunk)
        tokens = rank_frames * -(-grid.tokens // parallel.mesh.sp)
        latents = 2 * 4 * frames * config.in_channels * grid.latent_height * grid.latent_width
        per_token = config.ffn_dim + 4 * config.dim + self.vin.config.dim // self.chunks.keyframe_every
        needs = latents + tokens * per_token * model.dtype.itemsize
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
        """Samples all chunks of a video in parallel.

        Args:
            model: the transformer.
            args: further positional arguments of `sample_parallel_chunks`.
            codec: the VAE, which decodes previews.
            on_step: a function that is called after each step with the step and its preview, or None.
            preview_every: the number of steps between two previews; None makes no previews.
            shown: pixel frames of a preview.
            options: keyword arguments of `sample_parallel_chunks`.

        Yields:
            After the last step, one chunk after the other, without the frames that it shares with the chunk before.
        """
        rank, initial = options["parallel"].rank, options["initial_latents"]
        outputs = sample_parallel_chunks(
            model, self.vin, *args, chunks=self.chunks, preview_every=preview_every, **options
        )
        for output in outputs:
            if on_step is not None:
                on_step(output, _preview(output, codec, shown, rank))
            if output.last:
                assert output.latents is not None, "the last step has the video"
                yield from self._own_frames(output.latents, 0 if initial is None else initial.shape[1], model.dtype)

    def _own_frames(self, latents: torch.Tensor, first: int, dtype: torch.dtype) -> Generator[LatentChunk]:
        cuts = cut(latents.shape[1], self.chunks, first)
        for n in range(len(cuts)):
            own = AssignedChunks(cuts, self.chunks, n, len(cuts)).owned
            frames = latents[:, own.start - first : own.stop - first]
            chunk = LatentChunk(Chunk(n, own.start, len(own)), frames, FiniteCheck(n, frames, dtype))
            chunk.check_finite()  # all chunks are there
            yield chunk


def _preview(output: StepOutput, codec: Codec, shown: int, rank: int) -> PreviewFrame | None:
    """The decoded preview of a step; None for a step without one and for the last step, whose latents are the video."""
    if output.latents is None or output.last:
        return None
    if rank:
        return PreviewFrame(output.step, output.steps, None)
    pixels = to_uint8(codec.decoder().decode(output.latents.to(codec.dtype)))[0]
    return PreviewFrame(output.step, output.steps, pixels[:shown].movedim(1, -1).cpu().numpy())


def check_requested(requested: str | None, weights: Path | None, changes: Collection[str]) -> None:
    """Checks that a model and its options agree on parallel chunks.

    Args:
        requested: "vin" or None.
        weights: the file of the model's network; None without one.
        changes: names of the options that only a stream has, such as its window.

    Raises:
        ConfigError: parallel chunks are requested of a model without a network, or with an option that only a stream
            has, or a model that only makes parallel chunks is asked for a stream.
    """
    if requested and weights is None:
        raise ConfigError("this model has no VIN weights to make its chunks in parallel with; toybox-vin has")
    if weights is not None and not requested:
        raise ConfigError(
            'this model makes its chunks in parallel alone: say --parallel-chunks vin (parallel_chunks="vin")'
        )
    if requested and changes:
        what = f"chunks made in parallel are no stream: they have no {', '.join(changes)} to set"
        of_file = "; guidance by global tokens is set in the VIN's file" if "guidance" in changes else ""
        raise ConfigError(what + of_file)


def check_call(parallel_chunks: bool, conditioned: bool, reuse: bool, previews: bool) -> None:
    """Checks that a call and the kind of its model agree.

    Args:
        parallel_chunks: whether chunks are sampled in parallel.
        conditioned: whether the call has an image or a video.
        reuse: whether attention outputs are reused.
        previews: whether steps are previewed.

    Raises:
        ConfigError: the call asks for what its kind of model does not support.
    """
    if previews and not parallel_chunks:
        raise ConfigError("steps are previewed (preview_every) only where chunks are made in parallel")
    if reuse and parallel_chunks:
        raise ConfigError("chunks made in parallel compute every output: there is no reuse")
    if conditioned and parallel_chunks:
        raise ConfigError("chunks made in parallel start from noise alone, not from an image or a video")
