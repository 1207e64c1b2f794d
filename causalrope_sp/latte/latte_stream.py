"""Latte's passes on one rank or several: over whole videos as published, or chunk by chunk with a cache across frames.

Shapes: B batch, F frames of a chunk, f those of this rank, S tokens of a frame, E numbers in a token, N = B·s entries
of this rank's s tokens, Q frames of the pass, H heads, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from causalrope_kernels import Keys, Slots, attention
from causalrope_sp.cache.kv_cache import KVCache
from causalrope_sp.cache.window import SlidingWindow
from causalrope_sp.devices import send
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.distributed.axis_switch import AxisSwitch, split_evenly
from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import Chunk, LatentGrid
from causalrope_sp.latte.latte_dit import LatteDiT, LattePass
from causalrope_sp.latte.positions import spatial_positions, times
from causalrope_sp.reuse.output_store import OutputOf, OutputStore, computed
from causalrope_sp.reuse.policy import KINDS, ReusePlan, ReusePolicy

LEARNED_AT = 64  # latent pixels per side; a model of a larger sample_size has its positions divided by the ratio


class LatteStream:
    """Runs a Latte model with a text and a grid, on one rank or several.

    Args:
        model: the model.
        embeds_BLE: text embeddings, (B, L, caption_channels), without padding.
        grid: the size of a frame in tokens.
        parallel: the ranks, each of which holds some frames of a chunk between attentions; None is one process.
        window: latent frames that attention across frames looks back over, for a model that was trained so: the chunk's
            own and committed ones. None attends to all frames of a chunk and to no others, as published.
        timesteps: the timesteps of a chunk's passes; `reuse` needs them.
        reuse: the outputs that a pass takes from an earlier pass of its chunk; None computes every output.

    Attributes:
        outputs: the outputs that are kept for reuse; None without `reuse`.
        cache: the K/V cache across frames; None without `window`.

    Raises:
        ConfigError: there are more ranks than tokens in a frame, the grid's patch is not the model's, or `reuse` comes
            without `timesteps`.
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
        if reuse is not None and not timesteps:
            raise ConfigError("reuse needs the timesteps of a chunk's passes, got none: give them as `timesteps`")
        self._model, self._parallel = model, parallel or SequenceParallel.single(device=model.device)
        self._ranks, self._rank = self._parallel.mesh.sp, self._parallel.sp_rank
        self._communicator = self._parallel.sp_communicator() if self._ranks > 1 else None
        self._tokens = [shard.tokens for shard in self._parallel.shard(grid).all]
        self._text = model.encode_text(embeds_BLE)
        scale = max(config.sample_size // LEARNED_AT, 1)
        table = spatial_positions(grid.rows, grid.columns, config.dim, config.sample_size // patch, scale)
        self._position_SD = send(table, model.device, model.dtype)
        self.outputs: OutputStore | None = None
        if reuse is not None:
            self.outputs = OutputStore(ReusePlan(reuse, timesteps, config.num_layers, KINDS))
        self.cache: KVCache | None = None
        if window is not None:
            entries = len(embeds_BLE) * self._tokens[self._rank]  # every token is an entry with a ring of its own
            heads, width = config.num_attention_heads, config.attention_head_dim
            self.cache = KVCache(
                config.num_layers, entries, window, 1, heads, width, dtype=model.dtype, device=model.device
            )

    def mine(self, tokens_BFSE: Tensor) -> Tensor:
        """Returns this rank's frames, (B, f, S, E), of a chunk's tokens.

        Raises:
            ConfigError: there are more ranks than frames in the chunk.
        """
        return tokens_BFSE.split(self._frames(tokens_BFSE.shape[1]), 1)[self._rank]

    def gather(self, tokens_BfSE: Tensor, chunk: Chunk) -> Tensor:
        """Gathers all frames of a chunk on every rank. Every rank must call.

        Args:
            tokens_BfSE: this rank's frames.
            chunk: the chunk.

        Returns:
            The chunk's frames, (B, F, S, E).

        Raises:
            ConfigError: there are more ranks than frames in the chunk.
        """
        if self._communicator is None:
            return tokens_BfSE
        return self._communicator.gather_tokens(tokens_BfSE.transpose(1, 2), self._frames(chunk.frames)).transpose(1, 2)

    def denoise(self, chunk: Chunk, tokens_BfSE: Tensor, timestep: float) -> Tensor:
        """Runs one denoise pass. Every rank must call.

        Args:
            chunk: the chunk.
            tokens_BfSE: this rank's frames of the chunk.
            timestep: the timestep of all its frames.

        Returns:
            The prediction for this rank's frames, (B, f, S, patch²·out_channels), in the dtype of the tokens.

        Raises:
            ConfigError: there are more ranks than frames in the chunk, the chunk does not follow the committed ones, or
                it has more passes than there are `timesteps`.
        """
        output = computed if self.outputs is None else self.outputs.next_pass(chunk, tokens_BfSE.shape[1])
        return self._forward(chunk, tokens_BfSE, timestep, output)

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
        self._forward(chunk, tokens_BfSE, 0.0, computed)
        self.cache.commit()

    def _frames(self, count: int) -> list[int]:
        """Returns how many of a chunk's frames each rank holds."""
        return split_evenly(count, self._ranks, "frames of a chunk")

    def _forward(self, chunk: Chunk, tokens_BfSE: Tensor, timestep: float, output: OutputOf) -> Tensor:
        """Runs one pass over this rank's frames of a chunk."""
        model, cache, backend = self._model, self.cache, self._parallel.attention
        frames = self._frames(chunk.frames)
        if cache is not None and cache.open_chunk != chunk:
            cache.open(chunk)
        first = chunk.start + sum(frames[: self._rank])
        numbers = range(first, first + frames[self._rank])
        still = cache is None and chunk.frames == 1  # the published model adds no time to a single image
        switch = AxisSwitch(self._communicator, frames, self._tokens)

        def attend(layer: int, q_NQHD: Tensor, k_NQHD: Tensor, v_NQHD: Tensor) -> Tensor:
            if cache is None:
                return attention(q_NQHD, Keys(k_NQHD, v_NQHD), backend)
            view = cache.layer(layer)
            for slots, new in zip(view.kv_slots(chunk), (k_NQHD, v_NQHD), strict=True):
                _write(slots, new)
            return attention(q_NQHD, view.keys(chunk), backend)

        step = LattePass(
            timesteps_F=torch.full((len(numbers),), timestep, dtype=torch.float32, device=model.device),
            position_SD=self._position_SD,
            time_FD=None if still else send(times(numbers, model.config.dim), model.device, model.dtype),
            text=self._text,
            to_tokens=switch.to_tokens,
            to_frames=switch.to_frames,
            attend=attend,
            attention=backend,
            output=output,
        )
        predicted = model(tokens_BfSE.to(model.dtype), step)
        return predicted.to(tokens_BfSE.dtype)


def _write(slots: Slots, x_NQHD: Tensor) -> None:
    """Writes a chunk's keys or values into its slots; a slot holds one token."""
    assert slots.slots_F is not None, "a cache is a ring"
    slots.x.index_copy_(1, slots.slots_F, x_NQHD.unsqueeze(2))
