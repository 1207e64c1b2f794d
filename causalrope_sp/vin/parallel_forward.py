"""One step's forward: the read into global tokens, then all chunks of a assigned in one forward of the DiT.

Shapes: B batch, F latent frames, s tokens of a frame on this rank, E numbers in a token, L text tokens, W text width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from causalrope_kernels import Projection, attention_parts
from causalrope_sp.attention.base import Strategy
from causalrope_sp.devices import send
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.grid import Chunk, LatentGrid
from causalrope_sp.models.causal_dit import CausalDiT, ForwardPass
from causalrope_sp.models.rope import RotaryTables
from causalrope_sp.vin.chunk_cache import GIVEN, ChunkCache, in_pass
from causalrope_sp.vin.chunk_exchange import ChunkExchange
from causalrope_sp.vin.chunks import AssignedChunks
from causalrope_sp.vin.network import VideoInterfaceNetwork, places


class ParallelChunksForward:
    """A DiT and its VIN bound to a prompt, a assigned's chunks and the ways across ranks.

    Args:
        vin: None denoises every chunk without global tokens.
        embeds_BLW: text embeddings, zeros after the text's end.
        given: how many frames stand before the video, in sight of every chunk.
        strategy: how the ranks of a assigned share the tokens of a frame.
    """

    def __init__(
        self,
        model: CausalDiT,
        vin: VideoInterfaceNetwork | None,
        embeds_BLW: Tensor,
        grid: LatentGrid,
        assigned: AssignedChunks,
        given: int,
        strategy: Strategy,
        parallel: SequenceParallel,
    ) -> None:
        config = model.config
        self._model, self._vin, self._assigned, self._given, self._strategy = model, vin, assigned, given, strategy
        self._embeds = send(embeds_BLW, model.device)
        self._text = model.encode_text(embeds_BLW)
        compute = torch.float64 if model.dtype == torch.float64 else torch.float32
        shard = parallel.shard(grid)
        self._rope = RotaryTables(config.head_dim, config.theta, shard, model.device, compute)
        self._across = ChunkExchange(parallel, assigned, grid)
        self._keyframes = assigned.places(assigned.keyframes)
        where = places(torch.tensor(list(assigned.keyframes), dtype=torch.long), *shard.rows_and_columns())
        self._where = send(where, model.device)
        self._cache = ChunkCache(
            config.num_layers,
            len(embeds_BLW),
            strategy,
            0 if vin is None else vin.config.global_tokens,
            given,
            max((chunk.frames for chunk in assigned.mine), default=1),
            config.head_dim,
            dtype=model.dtype,
            device=model.device,
        )

    def commit(self, given_BFSE: Tensor) -> None:
        """Writes the given frames' keys and values, once a video: they see one another and nothing else."""
        self._pass([Chunk(GIVEN, 0, self._given)], given_BFSE, range(self._given), 0.0)

    def velocities(self, held_BFSE: Tensor, timestep: float) -> list[Tensor]:
        """The velocity of every chunk's frames, chunk by chunk, (B, F, s, E), from the frames that this rank holds."""
        if self._vin is not None:
            self._read(held_BFSE, timestep)
        if not self._assigned.mine:
            return []
        times = [frame for chunk in self._assigned.mine for frame in range(chunk.start, chunk.stop)]
        tokens = held_BFSE[:, self._assigned.places(times)]
        velocity = self._pass(in_pass(self._assigned.mine), tokens, times, timestep).to(held_BFSE.dtype)
        return list(velocity.split([chunk.frames for chunk in self._assigned.mine], 1))

    @property
    def across(self) -> ChunkExchange:
        return self._across

    def _read(self, held_BFSE: Tensor, timestep: float) -> None:
        assert self._vin is not None, "asked for"
        vin, backend = self._vin, self._strategy.backend
        time = vin.time(torch.full((len(held_BFSE),), timestep, dtype=torch.float32, device=held_BFSE.device))
        keys = vin.keyframes(held_BFSE[:, self._keyframes], self._where, time)
        read = self._across.merge_read(attention_parts(vin.queries(time), keys, backend))
        self._cache.write_globals(vin.globals(read, self._embeds, time, backend))

    def _pass(self, chunks: Sequence[Chunk], tokens_BFSE: Tensor, times: Sequence[int], timestep: float) -> Tensor:
        def attend(layer: int, projection: Projection) -> Tensor:
            return self._strategy.attend(projection, self._cache.layer(layer), chunks).flatten(1, 2)

        frames = len(times)
        step = ForwardPass(
            timesteps_F=torch.full((frames,), timestep, dtype=torch.float32, device=tokens_BFSE.device),
            predicted_frames=frames,
            rotation=self._rope.rotation(times),
            text=self._text,
            attend=attend,
            attention=self._strategy.backend,
        )
        return self._model(tokens_BFSE.flatten(1, 2).to(self._model.dtype), step).view(tokens_BFSE.shape)
