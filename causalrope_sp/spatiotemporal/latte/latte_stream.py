"""Latte's passes: over whole videos as published, or chunk by chunk with a cache across frames.

Shapes: B batch, F frames of a chunk, f those of this rank, S tokens of a frame, E numbers in a token, N = B·s entries
of this rank's s tokens, Q frames of the pass, H heads, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from causalrope_kernels import Keys, Slots
from causalrope_sp.cache.kv_cache import KVCache
from causalrope_sp.cache.window import SlidingWindow
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import Chunk, LatentGrid
from causalrope_sp.models.modulation import PassModulation
from causalrope_sp.reuse.output_store import OutputOf, computed
from causalrope_sp.reuse.policy import ReusePolicy
from causalrope_sp.spatiotemporal.latte.latte_config import LatteConfig
from causalrope_sp.spatiotemporal.latte.latte_dit import LatteDiT
from causalrope_sp.spatiotemporal.positions import spatial_positions, waves
from causalrope_sp.spatiotemporal.stream import SpatioTemporalStream

LEARNED_AT = 64  # latent pixels per side; a model of a larger sample_size has its positions divided by the ratio


class LatteStream(SpatioTemporalStream):
    """Runs a Latte model with a text and a grid, on one rank or several.

    Args:
        model: the model.
        embeds_BLE: text embeddings, (B, L, caption_channels), without padding.
        grid: the size of a frame in tokens.
        parallel: the ranks; None is one process.
        window: latent frames that attention across frames looks back over, for a model that was trained so: the chunk's
            own and committed ones. None attends to all frames of a chunk and to no others, as published.
        timesteps: the timesteps of a chunk's passes; `reuse` needs them.
        reuse: the outputs that a pass takes from an earlier pass of its chunk; None computes every output.

    Attributes:
        cache: the K/V cache across frames; None without `window`.

    Raises:
        ConfigError: the grid's patch is not the model's, or as `SpatioTemporalStream` raises it.
    """

    def __init__(
        self,
        model: LatteDiT,
        embeds_BLE: Tensor,
        grid: LatentGrid,
        *,
        parallel: SequenceParallel | None = None,
        window: SlidingWindow | None = None,
        timesteps: tuple[float, ...] = (),
        reuse: ReusePolicy | None = None,
    ) -> None:
        config, patch = model.config, model.config.patch_size
        if grid.patch != (patch, patch):
            raise ConfigError(f"the grid's patch is {grid.patch}, the model's {(patch, patch)}")
        text = model.encode_text(embeds_BLE)
        positions = frame_positions(grid, config)
        super().__init__(model, text, grid, positions, parallel=parallel, timesteps=timesteps, reuse=reuse)
        self._latte = model
        self.cache: KVCache | None = None
        if window is not None:
            entries = len(embeds_BLE) * self._tokens[self._rank]  # every token is an entry with a ring of its own
            heads, width = config.num_attention_heads, config.attention_head_dim
            self.cache = KVCache(
                config.num_layers, entries, window, 1, heads, width, dtype=model.dtype, device=model.device
            )

    def commit(self, chunk: Chunk, tokens_BfSE: Tensor) -> None:
        """Runs the context pass: writes the clean keys and values of a chunk, which later chunks attend to.

        Args:
            chunk: the chunk.
            tokens_BfSE: this rank's clean frames of the chunk.

        Raises:
            ConfigError: the stream has no window, or as `denoise` raises it.
        """
        if self.cache is None:
            raise ConfigError("commit needs a window: a stream without one keeps nothing to look back on")
        self.forward(chunk, tokens_BfSE, 0.0, computed)
        self.cache.commit()

    def forward(self, chunk: Chunk, tokens_BfSE: Tensor, timestep: float, output: OutputOf) -> Tensor:
        """Runs one pass over this rank's frames of a chunk, which is opened in the cache."""
        if self.cache is not None and self.cache.open_chunk != chunk:
            self.cache.open(chunk)
        return super().forward(chunk, tokens_BfSE, timestep, output)

    def modulation(self, own: range, timestep: float) -> PassModulation:
        """Returns what the model takes from the timestep, which is that of all frames."""
        return self._latte.modulation(torch.tensor([timestep], dtype=torch.float32, device=self._latte.device))

    def attend(self, chunk: Chunk, layer: int, q_NQHD: Tensor, k_NQHD: Tensor, v_NQHD: Tensor) -> Tensor:
        """Returns what the frames of a chunk attend: the chunk, and with a cache the frames that it holds."""
        if self.cache is None:
            return self._operations.attention(q_NQHD, Keys(k_NQHD, v_NQHD))
        view = self.cache.layer(layer)
        for (slots,), new in zip(view.kv_slots(chunk), (k_NQHD, v_NQHD), strict=True):
            _write(slots, new)
        (keys,) = view.keys(chunk)
        return self._operations.attention(q_NQHD, keys)

    def frame_times(self, chunk: Chunk, own: range) -> Tensor | None:
        """Returns the embedding of each frame's time; the published model adds none to a single image."""
        if self.cache is None and chunk.frames == 1:
            return None
        return frame_times(own, self._latte.config.dim)


def frame_positions(grid: LatentGrid, config: LatteConfig) -> Tensor:
    """Embeds the position of every token of a frame, (S, D). The published model holds it in float32."""
    scale, base = max(config.sample_size // LEARNED_AT, 1), config.sample_size // config.patch_size
    y, x = (torch.arange(n, dtype=torch.float32) / (n / base) / scale for n in (grid.rows, grid.columns))
    return spatial_positions(y, x, config.dim).float()


def frame_times(own: range, width: int) -> Tensor:
    """Embeds frames by their global time index, (F, width). The published model holds it in float32."""
    return waves(torch.arange(own.start, own.stop), width).float()


def _write(slots: Slots, x_NQHD: Tensor) -> None:
    """Writes a chunk's keys or values into its slots; a slot holds one token."""
    assert slots.slots_F is not None, "a cache is a ring"
    slots.x.index_copy_(1, slots.slots_F, x_NQHD.unsqueeze(2))
