"""The branches of a stream: one prompt, or under guidance two, each with a cache of its own.

The two run one after the other on the same ranks, or at once on two lanes of ranks that trade velocities after every
pass. A chunk's context pass rides with each branch's own next pass, whenever that is.

Shapes: B batch, F frames of a chunk, s tokens of a frame that this rank owns, E numbers in a token.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from causalrope_sp.config import SamplerConfig
from causalrope_sp.diffusion.schedule import guide, guided_steps, model_timesteps
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import Chunk
from causalrope_sp.sampling.stream import CausalStream, Part

CONDITIONAL, UNCONDITIONAL = range(2)  # the lanes of guidance parallelism


class GuidanceBranch:
    """One prompt's stream, and the finished chunk whose clean keys and values are not in its cache yet."""

    def __init__(self, stream: CausalStream) -> None:
        self._stream = stream
        self._finished: Part | None = None

    def denoise(self, chunk: Chunk, x_BFSE: Tensor, timestep: float) -> Tensor:
        velocity = self._stream.denoise(chunk, x_BFSE, timestep, self._finished)
        self._finished = None
        return velocity

    def commit(self) -> None:
        """The context pass that is due, alone."""
        if self._finished is not None:
            self._stream.commit(self._finished)
            self._finished = None

    def finish(self, part: Part) -> None:
        self._finished = part

    @property
    def stored_bytes(self) -> int:
        return self._stream.stored_bytes


class GuidanceBranches:
    """What a chunk's velocity is made of.

    Args:
        open_stream: makes the stream of a prompt's embeddings, and is told which branch it is; it is asked only for
            branches that run on this rank.
        negative: embeddings of the negative prompt; they are of no use where no step is guided.

    Raises:
        ConfigError: guided steps without a negative prompt, or with one of another shape.
    """

    def __init__(
        self,
        open_stream: Callable[[Tensor, int], CausalStream],
        conditional: Tensor,
        negative: Tensor | None,
        sampler: SamplerConfig,
        parallel: SequenceParallel,
    ) -> None:
        self._scale, self._guided = sampler.guidance_scale, guided_steps(sampler)
        self._timesteps, self._parallel = model_timesteps(sampler), parallel
        prompts = [conditional]
        if any(self._guided):
            if negative is None:
                raise ConfigError(f"a guidance scale of {self._scale:g} needs the embeddings of a negative prompt")
            if negative.shape != conditional.shape:
                raise ConfigError(
                    f"negative embeddings have shape {tuple(negative.shape)}, the prompt's {tuple(conditional.shape)}"
                )
            prompts.append(negative)
        mine = range(len(prompts)) if parallel.mesh.cfg == 1 else [parallel.cfg_rank]
        self._branches = [GuidanceBranch(open_stream(prompts[branch], branch)) for branch in mine]

    def velocity(self, chunk: Chunk, x_BFSE: Tensor, step: int) -> Tensor:
        """The velocity of the chunk's tokens at a step, guided if the step is, (B, F, s, E)."""
        guided, timestep = self._guided[step], self._timesteps[step]
        if self._parallel.mesh.cfg > 1:
            velocities = self._from_both_ranks(chunk, x_BFSE, timestep, guided)
        else:
            velocities = [branch.denoise(chunk, x_BFSE, timestep) for branch in self._branches[: 1 + guided]]
        return (
            guide(velocities[CONDITIONAL], velocities[UNCONDITIONAL], self._scale)
            if guided
            else velocities[CONDITIONAL]
        )

    def _from_both_ranks(self, chunk: Chunk, x_BFSE: Tensor, timestep: float, guided: bool) -> list[Tensor]:
        """Both lanes' velocities. The negative lane has none at a step that is not guided: it makes up for its context
        pass meanwhile, and what it sends is not used."""
        (branch,) = self._branches
        if guided or self._parallel.cfg_rank == CONDITIONAL:
            mine = branch.denoise(chunk, x_BFSE, timestep)
        else:
            branch.commit()
            mine = x_BFSE
        return self._parallel.all_gather_cfg("guidance", mine)

    @property
    def stored_bytes(self) -> int:
        """The most that this rank's branches kept at once, each, of outputs that passes reuse."""
        return sum(branch.stored_bytes for branch in self._branches)

    def commit(self) -> None:
        """The context passes that are due, alone."""
        for branch in self._branches:
            branch.commit()

    def finish(self, part: Part) -> None:
        """Takes a chunk's clean tokens; its context pass rides with each branch's next pass."""
        for branch in self._branches:
            branch.finish(part)


def check_guidance(sampler: SamplerConfig, cfg: int) -> None:
    """
    Raises:
        ConfigError: guidance at no step, or lanes for which there are no branches.
    """
    guided = any(guided_steps(sampler))
    if sampler.guidance_scale != 1 and not guided:
        low, high = sampler.guidance_interval
        steps = ", ".join(f"{t:g}" for t in model_timesteps(sampler))
        raise ConfigError(f"no step is within the guidance interval {low:g} to {high:g}; they are at {steps}")
    if cfg > 2 or (cfg == 2 and not guided):
        what = "guidance has two" if guided else "without guidance, a scale other than 1, there is one"
        raise ConfigError(f"cfg {cfg} of the mesh needs as many branches: {what}")
