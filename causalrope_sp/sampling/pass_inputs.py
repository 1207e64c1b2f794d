"""What a pass reads besides the cache and the text: its tokens, their timesteps, and their rotation.

Shapes: B batch, F frames of a chunk, s tokens of a frame that this rank owns, T = F·s of all chunks of a pass,
E numbers in a token.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from causalrope_kernels import RotateOnRead, Rotation
from causalrope_sp.cache.window import SlidingWindow
from causalrope_sp.devices import send
from causalrope_sp.grid import Chunk, Shard
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.models.modulation import PassModulation
from causalrope_sp.models.rope import RotaryTables

MOST_TIMES = 8  # of a stream that are kept: all of a few-step model's

Time = tuple[Tensor, PassModulation]  # the timesteps of a pass on the device, and what the model computes of them


@dataclass(frozen=True)
class Part:
    """One chunk in a forward.

    Args:
        chunk: its number, start and length.
        tokens_BFSE: its tokens on this rank.
        timestep: their noise level, in [0, 1000]; 0 for a context pass.
        control_BFSE: the control of these tokens, for a model that takes one.
    """

    chunk: Chunk
    tokens_BFSE: Tensor
    timestep: float
    control_BFSE: Tensor | None = None

    def cut(self, start: int, frames: int) -> Part:
        """Returns so many frames of this part, from the global time index `start` on."""
        first = start - self.chunk.start
        tokens, control = (
            None if x is None else x[:, first : first + frames] for x in (self.tokens_BFSE, self.control_BFSE)
        )
        assert tokens is not None, "a part has tokens"
        return Part(Chunk(self.chunk.index, start, frames), tokens, self.timestep, control)


class PassInputs:
    """Makes the inputs of a stream's passes.

    Args:
        model: the DiT.
        shard: the tokens of a frame that this rank owns.
        relative: rotate by a frame's position within the window instead of its global time index.
        given: the frames whose global time index is below this number are clean in every pass, at timestep 0.
    """

    def __init__(self, model: CausalDiT, shard: Shard, *, relative: bool, given: int) -> None:
        config = model.config
        self._model, self._relative, self._given = model, relative, given
        compute = torch.float64 if model.dtype == torch.float64 else torch.float32
        self._rope = RotaryTables(config.head_dim, config.theta, shard, model.device, compute)
        self._rotation: tuple[tuple[Chunk, ...], Rotation] | None = None
        self._times: dict[tuple[float, ...], Time] = {}

    def fork(self) -> PassInputs:
        """Returns what makes the inputs of a stream that goes on from here by itself."""
        fork = copy.copy(self)
        fork._rotation = None
        return fork

    def forget_rotation(self) -> None:
        """Forgets the rotation of the last pass, since the window may differ in the next one."""
        self._rotation = None

    def forget_times(self) -> None:
        """Forgets what the model computed of timesteps, since its weights have changed."""
        self._times.clear()

    def rotate_on_read(self, tokens: int) -> Callable[[Sequence[int]], RotateOnRead] | None:
        """Returns what makes the rotation of cached keys of so many tokens a frame; None if they are stored rotated."""
        return partial(self._rope.rotate_on_read, tokens=tokens) if self._relative else None

    def tokens(self, parts: Sequence[Part]) -> Tensor:
        """Returns what the patch embedding reads, (B, T, E)."""
        return torch.cat([self._embedded(part) for part in parts], 1).flatten(1, 2).to(self._model.dtype)

    def _embedded(self, part: Part) -> Tensor:
        """What the patch embedding reads of a part: its tokens, with the control behind the latents' channels."""
        if part.control_BFSE is None:
            return part.tokens_BFSE
        pixels = math.prod(self._model.config.patch_size)
        both = [x.unflatten(-1, (pixels, -1)) for x in (part.tokens_BFSE, part.control_BFSE)]
        return torch.cat(both, -1).flatten(-2)

    def time(self, parts: Sequence[Part]) -> Time:
        """Returns the timesteps of a pass, one of each chunk if all have the same length and nothing in them is given,
        with their modulation.

        A sampler has few of them, so they are kept.
        """
        timesteps = tuple(part.timestep for part in parts)
        if any(p.chunk.frames != parts[0].chunk.frames or p.chunk.start < self._given for p in parts):
            frames = [(part, frame) for part in parts for frame in range(part.chunk.start, part.chunk.stop)]
            timesteps = tuple(0.0 if frame < self._given else part.timestep for part, frame in frames)
        found = self._times.get(timesteps)
        if found is None:
            # in float32, as Self-Forcing's schedule holds them: at 833.33 the difference shows as 1e-6 in the latents
            timesteps_F = send(torch.tensor(timesteps, dtype=torch.float32), self._model.device)
            found = timesteps_F, self._model.modulation(timesteps_F)
            if len(self._times) < MOST_TIMES and not torch.is_grad_enabled():
                self._times[timesteps] = found
        return found

    def rotation(self, chunks: tuple[Chunk, ...], window: SlidingWindow) -> Rotation:
        """Returns the rotation of the tokens of a pass, kept until the chunks change."""
        if self._rotation is None or self._rotation[0] != chunks:
            if self._relative:  # keys are rotated in time on read
                by_chunk = [(window.positions(chunk), window.slots(chunk)) for chunk in chunks]
                positions = [by_slot[slot] for by_slot, slots in by_chunk for slot in slots]
                rotation = self._rope.rotation(positions, [0] * len(positions))
            else:
                rotation = self._rope.rotation([f for chunk in chunks for f in range(chunk.start, chunk.stop)])
            self._rotation = chunks, rotation
        return self._rotation[1]
