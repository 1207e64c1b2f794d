"""The forward of a step of parallel chunks: the read into global tokens, then one forward of the DiT over all chunks of
this rank.

Shapes: B batch, F latent frames, s tokens of a frame on this rank, E numbers in a token, L text tokens, W text width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from causalrope_kernels import PassOperations, Projection, attention_parts
from causalrope_sp.attention.base import Strategy
from causalrope_sp.devices import send
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.grid import Chunk, LatentGrid
from causalrope_sp.models.block import ForwardPass
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.models.rope import RotaryTables
from causalrope_sp.vin.chunk_cache import INITIAL, ChunkCache, in_pass
from causalrope_sp.vin.chunk_exchange import ChunkExchange
from causalrope_sp.vin.chunks import AssignedChunks
from causalrope_sp.vin.network import VideoInterfaceNetwork, positions


class ParallelChunksForward:
    """A DiT and its VIN, bound to a prompt, to the chunks of this rank and to the communication with other ranks.

    Args:
        model: the DiT.
        vin: its Video Interface Network; None denoises every chunk without global tokens.
        embeds_BLW: text embeddings, zeros after the text's end.
        grid: the latent frame in tokens.
        assigned: the chunks that this rank denoises.
        initial_frames: latent frames before the video, which every chunk attends.
        strategy: how the ranks of the `sp` axis share the tokens of a frame.
        parallel: the ranks and their mesh.
    """

    def __init__(
        self,
        model: CausalDiT,
        vin: VideoInterfaceNetwork | None,
        embeds_BLW: Tensor,
        grid: LatentGrid,
        assigned: AssignedChunks,
        initial_frames: int,
        strategy: Strategy,
        parallel: SequenceParallel,
    ) -> None:
        config = model.config
        self._model, self._vin, self._assigned, self._strategy = model, vin, assigned, strategy
        self._initial_frames = initial_frames
        self._text = model.encode_text(embeds_BLW)
        compute = torch.float64 if model.dtype == torch.float64 else torch.float32
        shard = parallel.shard(grid)
        self._rope = RotaryTables(config.head_dim, config.theta, shard, model.device, compute)
        self._across = ChunkExchange(parallel, assigned, grid)
        self._keyframes = assigned.offsets(assigned.keyframes)
        if vin is not None:
            keyframes = torch.tensor(list(assigned.keyframes), dtype=torch.long)
            where_KS3 = send(positions(keyframes, *shard.rows_and_columns()), model.device)
            self._read_text = vin.text(send(embeds_BLW, model.device))
            self._positions = vin.position_embeddings(where_KS3, self._read_text, strategy.backend)
        self._cache = ChunkCache(
            config.num_layers,
            len(embeds_BLW),
            strategy,
            0 if vin is None else vin.config.global_tokens,
            initial_frames,
            max((chunk.frames for chunk in assigned.chunks), default=1),
            config.head_dim,
            dtype=model.dtype,
            device=model.device,
        )

    def commit(self, initial_BFSE: Tensor) -> None:
        """Writes the keys and values of the initial frames, once a video; they attend one another and nothing else."""
        self._pass([Chunk(INITIAL, 0, self._initial_frames)], initial_BFSE, range(self._initial_frames), 0.0)

    def velocities(self, held_BFSE: Tensor, timestep: float, attend_globals: bool = True) -> list[Tensor]:
        """Predicts the velocity of the frames of every chunk of this rank.

        Args:
            held_BFSE: the noisy tokens of the frames that this rank holds.
            timestep: the noise level, in [0, 1000].
            attend_globals: read global tokens anew and let the chunks attend them; False is the unconditional forward,
                which does neither. Without a VIN there are none.

        Returns:
            The velocities, chunk by chunk, each (B, F, s, E); none for a rank without chunks.
        """
        self._cache.attends_globals = attend_globals
        if self._vin is not None and attend_globals:
            self._read(held_BFSE, timestep)
        chunks = self._assigned.chunks
        if not chunks:
            return []
        times = [frame for chunk in chunks for frame in range(chunk.start, chunk.stop)]
        tokens = held_BFSE[:, self._assigned.offsets(times)]
        velocity = self._pass(in_pass(chunks), tokens, times, timestep).to(held_BFSE.dtype)
        return list(velocity.split([chunk.frames for chunk in chunks], 1))

    @property
    def has_global_tokens(self) -> bool:
        """Whether there is a VIN, whose global tokens the chunks attend."""
        return self._vin is not None

    @property
    def assigned(self) -> AssignedChunks:
        """The chunks that this rank denoises."""
        return self._assigned

    @property
    def across(self) -> ChunkExchange:
        """The collectives with the other ranks of the video."""
        return self._across

    def _read(self, held_BFSE: Tensor, timestep: float) -> None:
        assert self._vin is not None, "only a forward with a VIN reads"
        vin, backend = self._vin, self._strategy.backend
        timesteps_B = torch.full((len(held_BFSE),), timestep, dtype=torch.float32, device=held_BFSE.device)
        state = vin.ask(self._read_text, timesteps_B, backend)
        keys = vin.keyframes(held_BFSE[:, self._keyframes], self._positions, state)
        read = self._across.merge_read(attention_parts(vin.queries(state), keys, backend))
        self._cache.write_globals(vin.keys_of_layers(vin.process(read, state, backend)))

    def _pass(self, chunks: Sequence[Chunk], tokens_BFSE: Tensor, times: Sequence[int], timestep: float) -> Tensor:
        def attend(layer: int, projection: Projection) -> Tensor:
            return self._strategy.attend(projection, self._cache.layer(layer), chunks, operations).flatten(1, 2)

        frames = len(times)
        operations = PassOperations.checked(self._strategy.backend, in_place=not torch.is_grad_enabled())
        step = ForwardPass(
            timesteps_F=torch.full((frames,), timestep, dtype=torch.float32, device=tokens_BFSE.device),
            predicted_frames=frames,
            rotation=self._rope.rotation(times),
            text=self._text,
            attend=attend,
            operations=operations,
        )
        return self._model(tokens_BFSE.flatten(1, 2).to(self._model.dtype), step).view(tokens_BFSE.shape)
