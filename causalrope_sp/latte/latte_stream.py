"""Latte's forwards on one rank or many: whole videos as published, or chunk by chunk with a cache across frames.

Shapes: B batch, F frames of a chunk, f those of this rank, S tokens of a frame, E numbers in a token, N = B·s entries
of this rank's tokens, Q frames of the pass, H heads, d head width.
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
from causalrope_sp.latte.positions import places, times
from causalrope_sp.reuse.output_store import OutputOf, OutputStore, computed
from causalrope_sp.reuse.policy import KINDS, ReusePlan, ReusePolicy

LEARNED_AT = 64  # latent pixels a side from which the published positions are scaled


class LatteStream:
    """A model bound to a text, a grid and the ranks that share its passes.

    Args:
        embeds_BLE: text embeddings, (B, L, caption_channels), without padding.
        parallel: the ranks; one process if None. Between attentions each holds some frames of a chunk.
        window: None attends all frames of a chunk and no others, as published; or, for a model trained so, how far
            back attention across frames looks: a chunk's frames attend one another and what was committed.
        timesteps, reuse: of a chunk's passes, and which outputs they take over from one another.

    Raises:
        ConfigError: more ranks than tokens in a frame, a patch that is not the model's, reuse without timesteps.
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
            raise ConfigError("reuse is planned for the timesteps of a chunk's passes: give them")
        self._model, self._parallel = model, parallel or SequenceParallel.single(device=model.device)
        self._ranks, self._place = self._parallel.mesh.sp, self._parallel.sp_rank
        self._communicator = self._parallel.sp_communicator() if self._ranks > 1 else None
        self._tokens = [shard.tokens for shard in self._parallel.shard(grid).all]
        self._text = model.encode_text(embeds_BLE)
        scale = max(config.sample_size // LEARNED_AT, 1)
        table = places(grid.rows, grid.columns, config.dim, config.sample_size // patch, scale)
        self._place_SD = send(table, model.device, model.dtype)
        self.outputs: OutputStore | None = None
        if reuse is not None:
            self.outputs = OutputStore(ReusePlan(reuse, timesteps, config.num_layers, KINDS))
        self.cache: KVCache | None = None
        if window is not None:
            entries = len(embeds_BLE) * self._tokens[self._place]  # every token is an entry with a ring of its own
            heads, width = config.num_attention_heads, config.attention_head_dim
            self.cache = KVCache(
                config.num_layers, entries, window, 1, heads, width, dtype=model.dtype, device=model.device
            )

    def mine(self, tokens_BFSE: Tensor) -> Tensor:
        """This rank's frames of a chunk's tokens."""
        return tokens_BFSE.split(self._frames(tokens_BFSE.shape[1]), 1)[self._place]

    def gather(self, tokens_BfSE: Tensor, chunk: Chunk) -> Tensor:
        """All frames of the chunk, on every rank, from each rank's own."""
        if self._communicator is None:
            return tokens_BfSE
        return self._communicator.gather_tokens(tokens_BfSE.transpose(1, 2), self._frames(chunk.frames)).transpose(1, 2)

    def denoise(self, chunk: Chunk, tokens_BfSE: Tensor, timestep: float) -> Tensor:
        """What the model predicts at `timestep` of this rank's frames of the chunk, (B, f, S, patch·out_channels).

        Raises:
            ConfigError: more ranks than frames in the chunk, or a chunk that does not follow what was committed.
        """
        output = computed if self.outputs is None else self.outputs.next_pass(chunk, tokens_BfSE.shape[1])
        return self._forward(chunk, tokens_BfSE, timestep, output)

    def commit(self, chunk: Chunk, tokens_BfSE: Tensor) -> None:
        """The context pass: writes the clean keys and values of a chunk, which later ones look back on.

        Raises:
            ConfigError: a stream without a window keeps none.
        """
        if self.cache is None:
            raise ConfigError("a stream without a window keeps nothing to look back on")
        self._forward(chunk, tokens_BfSE, 0.0, computed)
        self.cache.commit()

    def _frames(self, count: int) -> list[int]:
        return split_evenly(count, self._ranks, "frames of a chunk")

    def _forward(self, chunk: Chunk, tokens_BfSE: Tensor, timestep: float, output: OutputOf) -> Tensor:
        model, cache, backend = self._model, self.cache, self._parallel.attention
        frames = self._frames(chunk.frames)
        if cache is not None and cache.open_chunk != chunk:
            cache.open(chunk)
        first = chunk.start + sum(frames[: self._place])
        numbers = range(first, first + frames[self._place])
        picture = cache is None and chunk.frames == 1  # to which the published model adds no time
        switch = AxisSwitch(self._communicator, frames, self._tokens)

        def attend(layer: int, q_NQHD: Tensor, k_NQHD: Tensor, v_NQHD: Tensor) -> Tensor:
            if cache is None:
                return attention(q_NQHD, Keys(k_NQHD, v_NQHD), backend)
            view = cache.layer(layer)
            for room, new in zip(view.kv_slots(chunk), (k_NQHD, v_NQHD), strict=True):
                _write(room, new)
            return attention(q_NQHD, view.keys(chunk), backend)

        step = LattePass(
            timesteps_F=torch.full((len(numbers),), timestep, dtype=torch.float32, device=model.device),
            place_SD=self._place_SD,
            time_FD=None if picture else send(times(numbers, model.config.dim), model.device, model.dtype),
            text=self._text,
            to_tokens=switch.to_tokens,
            to_frames=switch.to_frames,
            attend=attend,
            attention=backend,
            output=output,
        )
        predicted = model(tokens_BfSE.to(model.dtype), step)
        return predicted.to(tokens_BfSE.dtype)


def _write(room: Slots, x_NQHD: Tensor) -> None:
    """A chunk's keys or values into the slots that it owns; a slot holds one token."""
    assert room.slots_F is not None, "a cache is a ring"
    room.x.index_copy_(1, room.slots_F, x_NQHD.unsqueeze(2))
