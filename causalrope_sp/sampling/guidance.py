"""Classifier-free guidance of a stream: the conditional and, at guided steps, the unconditional forward, each with a
cache of its own.

Both run one after the other on the same ranks, or at once on the two halves of the mesh's `cfg` axis, which all-gather
their velocities after every pass. A chunk's context pass shares a forward with the next pass of the same stream.

Shapes: B batch, F frames of a chunk, s tokens of a frame that this rank owns, E numbers in a token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from causalrope_sp.cache.window import SlidingWindow
from causalrope_sp.config import SamplerConfig
from causalrope_sp.diffusion.schedule import guide, guided_steps, model_timesteps
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import Chunk
from causalrope_sp.sampling.pass_inputs import Part
from causalrope_sp.sampling.stream import CausalStream

CONDITIONAL, UNCONDITIONAL = range(2)  # also the ranks on the mesh's `cfg` axis


class Step(NamedTuple):
    """A denoising step of a chunk.

    Args:
        timestep: what the model is called with.
        guided: whether it is guided.
        model: the number of the model that makes it.
    """

    timestep: float
    guided: bool
    model: int = 0


class GuidanceBranch:
    """The stream of one prompt, and the finished chunk whose context pass has not run yet.

    Attributes:
        stream: the stream.
    """

    def __init__(self, stream: CausalStream) -> None:
        self.stream = stream
        self._finished: Part | None = None
        self._pending = False  # whether the context pass of the finished chunk has yet to run
        self._shared = False  # whether it began in a forward of the next chunk

    def denoise(self, chunk: Chunk, x_BFSE: Tensor, timestep: float, control_BFSE: Tensor | None) -> Tensor:
        """Returns the velocity of a chunk's tokens, (B, F, s, E); runs the pending context pass in the same forward."""
        self._shared |= self._pending
        context = self._finished if self._pending else None
        velocity = self.stream.denoise(chunk, x_BFSE, timestep, context, control_BFSE)
        self._pending = False
        return velocity

    def commit(self) -> None:
        """Runs the pending context pass, if there is one, in a forward of its own."""
        if self._pending:
            assert self._finished is not None, "a pending context pass is of a finished chunk"
            self.stream.commit(self._finished)
            self._pending = False

    def finish(self, part: Part | None) -> None:
        """Takes a chunk's clean tokens for its context pass; None where no chunk is before the next one."""
        self._finished, self._pending, self._shared = part, part is not None, False

    def cancel(self) -> None:
        """Discards the chunk that is denoised. The context pass of the one before runs again, if it ran with the
        discarded chunk's first pass, so that the result is the same bit for bit."""
        again = self._finished if self._pending or self._shared else None
        self.stream.cancel(None if again is None else again.chunk)
        self._pending, self._shared = again is not None, False

    @property
    def pending(self) -> Part | None:
        """The finished chunk, or part of one, whose context pass has yet to run; None if there is none."""
        return self._finished if self._pending else None

    def held(self, stop: int) -> dict[int, int]:
        """Returns the slots of the frames that were written and that later passes read, by frame, between two chunks.

        Args:
            stop: the global time index at which the next chunk starts.
        """
        written = stop if self.pending is None else self.pending.chunk.start
        return {frame: slot for slot, frame in self.stream.cache.window.held(stop).items() if frame < written}

    def resume(self, window: SlidingWindow, committed: int, pending: Part | None) -> None:
        """Stands where another branch stood, between two chunks, whose frames are going to be put into their slots."""
        self.stream.cache.restart(window, committed)
        if pending is not None:
            self.stream.cache.reopen(pending.chunk)
        self.finish(pending)

    def recompute(self, parts: Sequence[Part], window: SlidingWindow, committed: int, *, anew: bool = False) -> None:
        """Computes the cache anew from clean tokens; the context pass of the part right before the next chunk stays
        pending.

        Args:
            parts: the chunks, in order of time; they need not be adjacent.
            window: the window, which holds nothing that is not in `parts` or kept before them.
            committed: the global time index of the next chunk.
            anew: whether nothing is kept before them, so that what is taken off quantized keys is set anew too.
        """
        self.stream.restart(window, committed)
        if anew:
            self.stream.cache.offsets.forget()
        cache, newest = self.stream.cache, None
        for part in parts:
            cache.committed = part.chunk.start
            if part.chunk.stop == committed:
                newest = part
            else:
                self.stream.commit(part)
        if newest is None:
            cache.committed = committed
        self.finish(newest)

    def rewind(self, part: Part, window: SlidingWindow) -> None:
        """Takes chunks back until the context pass of `part` is pending; its chunk must be in the cache's history."""
        self.stream.rewind(part.chunk, window)
        self.finish(part)

    def fork(self) -> GuidanceBranch:
        """Returns a branch that goes on from here by itself."""
        fork = GuidanceBranch(self.stream.fork())
        fork._finished, fork._pending, fork._shared = self._finished, self._pending, self._shared
        return fork

    @property
    def stored_bytes(self) -> int:
        """The largest number of bytes that reused outputs occupied at once."""
        return self.stream.stored_bytes


class GuidanceBranches:
    """Computes a chunk's velocity from the conditional and, at guided steps, the unconditional stream.

    Attributes:
        branches: the branches that run on this rank; with two models those of the second one follow the first's.

    Args:
        open_stream: makes a stream from a prompt's embeddings, `CONDITIONAL` or `UNCONDITIONAL`, and the number of the
            model; it is called only for the streams that run on this rank.
        conditional: embeddings of the prompt, (B, text_len, text_dim).
        negative: embeddings of the negative prompt, of the same shape; ignored if no step is guided.
        sampler: steps and guidance.
        parallel: the ranks and their mesh.
        models: how many models share the steps.

    Raises:
        ConfigError: a step is guided, but `negative` is missing or of another shape.
    """

    def __init__(
        self,
        open_stream: Callable[[Tensor, int, int], CausalStream],
        conditional: Tensor,
        negative: Tensor | None,
        sampler: SamplerConfig,
        parallel: SequenceParallel,
        models: int = 1,
    ) -> None:
        self._scale, self._parallel = sampler.guidance_scale, parallel
        prompts = [conditional]
        if any(guided_steps(sampler)):
            if negative is None:
                raise ConfigError(f"a guidance scale of {self._scale:g} needs the embeddings of a negative prompt")
            if negative.shape != conditional.shape:
                raise ConfigError(
                    f"negative embeddings have shape {tuple(negative.shape)}, the prompt's {tuple(conditional.shape)}"
                )
            prompts.append(negative)
        local = range(len(prompts)) if parallel.mesh.cfg == 1 else [parallel.cfg_rank]
        self._local = tuple(local)
        self.branches = [
            GuidanceBranch(open_stream(prompts[branch], branch, model)) for model in range(models) for branch in local
        ]

    def velocity(self, chunk: Chunk, x_BFSE: Tensor, step: Step, control_BFSE: Tensor | None = None) -> Tensor:
        """Returns the velocity of the chunk's tokens at a step, (B, F, s, E).

        Args:
            chunk: the open chunk.
            x_BFSE: its noisy tokens on this rank.
            step: the step.
            control_BFSE: the control of the chunk, of both branches; None for a model that takes none.
        """
        first = step.model * len(self._local)
        own = self.branches[first : first + len(self._local)]
        if self._parallel.mesh.cfg > 1:
            velocities = self._from_both_ranks(own[0], chunk, x_BFSE, step, control_BFSE)
        else:
            branches = own[: 1 + step.guided]
            velocities = [branch.denoise(chunk, x_BFSE, step.timestep, control_BFSE) for branch in branches]
        return (
            guide(velocities[CONDITIONAL], velocities[UNCONDITIONAL], self._scale)
            if step.guided
            else velocities[CONDITIONAL]
        )

    def _from_both_ranks(
        self, branch: GuidanceBranch, chunk: Chunk, x_BFSE: Tensor, step: Step, control_BFSE: Tensor | None
    ) -> list[Tensor]:
        """Gathers the velocities of both halves of the `cfg` axis. At a step that is not guided the unconditional half
        runs its pending context pass instead, and what it sends is not used."""
        if step.guided or self._parallel.cfg_rank == CONDITIONAL:
            velocity = branch.denoise(chunk, x_BFSE, step.timestep, control_BFSE)
        else:
            branch.commit()
            velocity = x_BFSE
        return self._parallel.all_gather_cfg("guidance", velocity)

    @property
    def stored_bytes(self) -> int:
        """The largest numbers of bytes that reused outputs occupied at once, summed over this rank's streams."""
        return sum(branch.stored_bytes for branch in self.branches)

    def commit(self) -> None:
        """Runs the pending context pass of each stream in a forward of its own."""
        for branch in self.branches:
            branch.commit()

    def finish(self, part: Part) -> None:
        """Takes a chunk's clean tokens; their context pass runs with the next pass of each stream."""
        for branch in self.branches:
            branch.finish(part)

    def of(self, which: int) -> list[GuidanceBranch]:
        """Returns the branch `CONDITIONAL` or `UNCONDITIONAL` of every model; none if this rank does not compute it."""
        return self.branches[self._local.index(which) :: len(self._local)] if which in self._local else []

    def branch(self, which: int) -> GuidanceBranch | None:
        """Returns a branch of the one model, or of the first of two; None if this rank does not compute it."""
        return next(iter(self.of(which)), None)

    def close(self) -> None:
        """Tells forks that these branches make no more passes."""
        for branch in self.branches:
            branch.stream.close()

    def fork(self) -> GuidanceBranches:
        """Returns branches that go on from here by themselves."""
        fork = copy.copy(self)
        fork.branches = [branch.fork() for branch in self.branches]
        return fork


def check_guidance(sampler: SamplerConfig, cfg: int) -> None:
    """Checks that the guidance of a sampler and the size of the mesh's `cfg` axis fit.

    Args:
        sampler: steps and guidance.
        cfg: ranks on the `cfg` axis.

    Raises:
        ConfigError: the guidance scale is not 1 but no step is guided, or the `cfg` axis has more ranks than there are
            forwards.
    """
    guided = any(guided_steps(sampler))
    if sampler.guidance_scale != 1 and not guided:
        low, high = sampler.guidance_interval
        steps = ", ".join(f"{t:g}" for t in model_timesteps(sampler))
        raise ConfigError(f"no step is within the guidance interval {low:g} to {high:g}; they are at {steps}")
    if cfg > 2 or (cfg == 2 and not guided):
        expected = "1 or 2" if guided else "1 without guidance (a guidance scale of 1)"
        raise ConfigError(f"cfg of the mesh must be {expected}, not {cfg}")
