"""Passes of a DiT with alternating blocks on one rank or several (dynamic sequence parallelism, arXiv 2403.10266).

Between blocks a rank holds all tokens of some frames of a chunk; the numbers of frames of two ranks differ by at most
one, and a rank may hold none. Two all-to-alls a layer switch to some tokens of all frames and back.

Shapes: B batch, F frames of a chunk, f those of this rank, S tokens of a frame, E numbers in a token, D model width,
N = B·s entries of this rank's s tokens, Q frames of the pass, H heads, d head width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from causalrope_kernels import PassOperations
from causalrope_sp.devices import send
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.distributed.axis_switch import AxisSwitch
from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import Chunk, LatentGrid, shares
from causalrope_sp.models.modulation import PassModulation
from causalrope_sp.reuse.output_store import OutputOf, OutputStore, computed
from causalrope_sp.reuse.policy import ReusePlan, ReusePolicy
from causalrope_sp.spatiotemporal.model import SpatioTemporalDiT, SpatioTemporalPass, TextKeys


class SpatioTemporalStream(ABC):
    """Runs a model with a text and a grid.

    Args:
        model: the model.
        text: the text's keys and values.
        grid: the size of a frame in tokens.
        position_SD: the embedding of each token's position.
        parallel: the ranks, each of which holds some frames of a chunk between attentions; None is one process.
        timesteps: the timesteps of a chunk's passes; `reuse` needs them.
        reuse: the outputs that a pass takes from an earlier pass of its chunk; None computes every output.

    Attributes:
        outputs: the outputs that are kept for reuse; None without `reuse`.

    Raises:
        ConfigError: there are more ranks than tokens in a frame, or `reuse` comes without `timesteps` or has a rule
            that can never apply.
    """

    def __init__(
        self,
        model: SpatioTemporalDiT,
        text: TextKeys,
        grid: LatentGrid,
        position_SD: Tensor,
        *,
        parallel: SequenceParallel | None = None,
        timesteps: tuple[float, ...] = (),
        reuse: ReusePolicy | None = None,
    ) -> None:
        if reuse is not None and not timesteps:
            raise ConfigError("reuse needs the timesteps of a chunk's passes, got none: give them as `timesteps`")
        self._model, self._parallel = model, parallel or SequenceParallel.single(device=model.device)
        self._ranks, self._rank = self._parallel.mesh.sp, self._parallel.sp_rank
        self._communicator = self._parallel.sp_communicator() if self._ranks > 1 else None
        self._tokens = [shard.tokens for shard in self._parallel.shard(grid).all]
        self._text = text
        self._position_SD = send(position_SD, model.device, model.dtype)
        self._operations = PassOperations.unchecked(model.head.weight, self._parallel.attention)
        self._settled = model.settled(self._operations)
        self.outputs: OutputStore | None = None
        if reuse is not None:
            layers = len(model.spatial)
            reuse.check(timesteps, layers)
            self.outputs = OutputStore(ReusePlan(reuse, timesteps, layers, model.kinds))

    def mine(self, tokens_BFSE: Tensor) -> Tensor:
        """Returns this rank's frames, (B, f, S, E), of a chunk's tokens."""
        return tokens_BFSE.split(shares(tokens_BFSE.shape[1], self._ranks), 1)[self._rank]

    def gather(self, tokens_BfSE: Tensor, chunk: Chunk) -> Tensor:
        """Gathers all frames of a chunk on every rank. Every rank must call.

        Args:
            tokens_BfSE: this rank's frames.
            chunk: the chunk.

        Returns:
            The chunk's frames, (B, F, S, E).
        """
        if self._communicator is None:
            return tokens_BfSE
        frames = shares(chunk.frames, self._ranks)
        return self._communicator.gather_tokens(tokens_BfSE.transpose(1, 2), frames).transpose(1, 2)

    def denoise(self, chunk: Chunk, tokens_BfSE: Tensor, timestep: float) -> Tensor:
        """Runs one denoise pass. Every rank must call.

        Args:
            chunk: the chunk.
            tokens_BfSE: this rank's frames of the chunk.
            timestep: the timestep of its frames.

        Returns:
            The prediction for this rank's frames, (B, f, S, predicted numbers), in the dtype of the tokens.

        Raises:
            ConfigError: the chunk has more passes than there are `timesteps`.
        """
        output: OutputOf = computed
        if self.outputs is not None:
            output = self.outputs.next_pass(chunk, tokens_BfSE.shape[1] * tokens_BfSE.shape[2])
        return self.forward(chunk, tokens_BfSE, timestep, output)

    def forward(self, chunk: Chunk, tokens_BfSE: Tensor, timestep: float, output: OutputOf) -> Tensor:
        """Runs one pass over this rank's frames of a chunk."""
        frames = shares(chunk.frames, self._ranks)
        first = chunk.start + sum(frames[: self._rank])
        own = range(first, first + frames[self._rank])
        switch = AxisSwitch(self._communicator, frames, self._tokens)
        time_FD = self.frame_times(chunk, own)
        step = SpatioTemporalPass(
            modulation=self.modulation(own, timestep),
            position_SD=self._position_SD,
            time_FD=None if time_FD is None else send(time_FD, self._model.device, self._model.dtype),
            text=self._text,
            to_tokens=switch.to_tokens,
            to_frames=switch.to_frames,
            attend=lambda layer, q, k, v: self.attend(chunk, layer, q, k, v),
            operations=self._operations,
            settled=self._settled,
            output=output,
            timestep=timestep,
            denoised_tokens=len(own) * sum(self._tokens),
        )
        return self._model(tokens_BfSE.to(self._model.dtype), step).to(tokens_BfSE.dtype)

    @abstractmethod
    def modulation(self, own: range, timestep: float) -> PassModulation:
        """Returns what the model takes from the timesteps of this rank's frames."""

    @abstractmethod
    def attend(self, chunk: Chunk, layer: int, q_NQHD: Tensor, k_NQHD: Tensor, v_NQHD: Tensor) -> Tensor:
        """Returns what the frames of a chunk attend across frames, (N, Q, H, d)."""

    def frame_times(self, chunk: Chunk, own: range) -> Tensor | None:
        """Returns the embedding of this rank's frames by their time, (f, D), to be added to their tokens, or None."""
        return None
