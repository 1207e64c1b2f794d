"""Open-Sora's passes over a whole video.

Shapes: B batch, S tokens of a frame, L text tokens, E their width, F frames, D model width, N = B·s entries of this
rank's s tokens, Q frames of the video, H heads, d head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from causalrope_kernels import Keys
from causalrope_kernels.reference import rotate
from causalrope_sp.devices import send
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import Chunk, LatentGrid
from causalrope_sp.models.modulation import PassModulation
from causalrope_sp.models.rope import frequencies
from causalrope_sp.reuse.policy import ReusePolicy
from causalrope_sp.spatiotemporal.open_sora.open_sora_config import OpenSoraConfig
from causalrope_sp.spatiotemporal.open_sora.open_sora_dit import OpenSoraDiT
from causalrope_sp.spatiotemporal.positions import PERIOD, spatial_positions
from causalrope_sp.spatiotemporal.stream import SpatioTemporalStream

STRIDE = 8  # pixels a latent pixel


class OpenSoraStream(SpatioTemporalStream):
    """Runs an Open-Sora model with a text and a grid, on one rank or several.

    Args:
        model: the model.
        texts_LE: the embeddings of each batch entry's text, without padding; see `packed`.
        grid: the size of a frame in tokens.
        fps: the frame rate of the video, in frames a second.
        given: how many of the first frames are given: they have timestep 0 in every pass.
        parallel: the ranks; None is one process.
        timesteps: the timesteps of the passes; `reuse` needs them.
        reuse: the outputs that a pass takes from an earlier pass; None computes every output.

    Raises:
        ConfigError: the grid's patch is not the model's, or as `SpatioTemporalStream` raises it.
    """

    def __init__(
        self,
        model: OpenSoraDiT,
        texts_LE: Sequence[Tensor],
        grid: LatentGrid,
        *,
        fps: float,
        given: int = 0,
        parallel: SequenceParallel | None = None,
        timesteps: tuple[float, ...] = (),
        reuse: ReusePolicy | None = None,
    ) -> None:
        patch = model.config.patch_size
        if grid.patch != (patch, patch):
            raise ConfigError(f"the grid's patch is {grid.patch}, the model's {(patch, patch)}")
        text, positions = model.encode_text(texts_LE), frame_positions(grid, model.config)
        super().__init__(model, text, grid, positions, parallel=parallel, timesteps=timesteps, reuse=reuse)
        self._open_sora, self._fps, self._given = model, fps, given
        self._angles: tuple[Chunk, Tensor, Tensor] | None = None

    def modulation(self, own: range, timestep: float) -> PassModulation:
        """Returns what the model takes from the timesteps of this rank's frames: 0 for those given."""
        times = [0.0 if frame < self._given else timestep for frame in own]
        if len(set(times)) <= 1:
            times = times[:1] or [timestep]
        timesteps_F = torch.tensor(times, dtype=torch.float64, device=self._open_sora.device)
        return self._open_sora.modulation(timesteps_F, self._fps)

    def attend(self, chunk: Chunk, layer: int, q_NQHD: Tensor, k_NQHD: Tensor, v_NQHD: Tensor) -> Tensor:
        """Returns what the frames attend, with queries and keys rotated by the time of their frame."""
        if self._angles is None or self._angles[0] != chunk:
            self._angles = (chunk, *self._rotation(chunk))
        _, cos, sin = self._angles
        return self._operations.attention(rotate(q_NQHD, cos, sin), Keys(rotate(k_NQHD, cos, sin), v_NQHD.contiguous()))

    def _rotation(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Returns cosines and sines of the angles of every frame, (Q, d/2)."""
        rates = frequencies(self._open_sora.config.head_dim // 2, PERIOD)
        angles = torch.outer(torch.arange(chunk.start, chunk.stop, dtype=torch.float64), rates)
        dtype = torch.promote_types(self._open_sora.dtype, torch.float32)
        cos, sin = (send(table, self._open_sora.device, dtype) for table in (angles.cos(), angles.sin()))
        return cos, sin


def frame_positions(grid: LatentGrid, config: OpenSoraConfig) -> Tensor:
    """Embeds the position of every token of a frame, (S, D): as if the frame were a square of as many tokens, in units
    of the frame's size in pixels over the learned one."""
    side = round(math.sqrt(grid.tokens))
    pixels = math.sqrt(STRIDE * grid.latent_height * STRIDE * grid.latent_width)
    scale = pixels / config.input_sq_size
    y, x = (torch.arange(n, dtype=torch.float64) / scale * side / n for n in (grid.rows, grid.columns))
    return spatial_positions(y, x, config.hidden_size)


def packed(embeds_BLE: Tensor, mask_BL: Tensor) -> list[Tensor]:
    """Takes the text tokens that count out of padded embeddings.

    Args:
        embeds_BLE: the embeddings.
        mask_BL: 1 for a token that counts, 0 for padding.

    Returns:
        The embeddings of each batch entry's text, (L, E).

    Raises:
        ConfigError: the mask is not of the embeddings' tokens, holds other numbers, or leaves a text without tokens.
    """
    if mask_BL.shape != embeds_BLE.shape[:2]:
        found, expected = tuple(mask_BL.shape), tuple(embeds_BLE.shape[:2])
        raise ConfigError(f"mask: expected the shape {expected} of the text's tokens, got {found}")
    mask = mask_BL.bool()
    if not torch.equal(mask.to(mask_BL.dtype), mask_BL):
        raise ConfigError("mask: expected 0 and 1, got other numbers")
    for entry, counted in enumerate(mask):
        if not counted.any():
            raise ConfigError(f"mask: expected at least one token of every text, got none of text {entry}")
    return [embeds[counted] for embeds, counted in zip(embeds_BLE, mask, strict=True)]
