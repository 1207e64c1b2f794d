"""Measures how much the outputs of a chunk's passes differ while a model runs, and proposes ranges of reuse from that.

The differences are those of a run without reuse, before the gate, each taken alone. Their effect on the picture, and
their sum when several kinds of outputs are reused, must be measured on a run with reuse.

Shapes: B batch, T tokens of a pass on this rank, D model width.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.errors import ConfigError
from causalrope_sp.models.block import ForwardPass
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.reuse.output_store import Compute, Gate
from causalrope_sp.reuse.policy import CAUSAL_KINDS, Broadcast, Kind, ReusePolicy
from causalrope_sp.spatiotemporal.model import SpatioTemporalDiT, SpatioTemporalPass

Pass = TypeVar("Pass", ForwardPass, SpatioTemporalPass)
Key = tuple[Kind, int, int, int]  # kind, layer, step, steps back to the other output; 0: the output itself


@dataclass(frozen=True)
class Profile:
    """The measured differences of a model's outputs.

    Args:
        timesteps: of the passes of a chunk, in order.
        layers: of the model.
        reach: the largest distance of two compared passes, in steps.
        squares: sums of squares of outputs and of their differences.
        kinds: the kinds of outputs that a layer has.
    """

    timesteps: tuple[float, ...]
    layers: int
    reach: int
    squares: Mapping[Key, float]
    kinds: tuple[Kind, ...] = CAUSAL_KINDS

    def difference(self, kind: Kind, step: int, before: int = 1) -> float:
        """Returns the relative difference of the outputs of pass `step` and of the pass so many steps before it, as the
        mean over layers."""
        return self._differences[kind, step, before]

    def curve(self, kind: Kind) -> list[float]:
        """Returns the relative differences of neighbouring passes, from the second pass on."""
        return [self.difference(kind, step) for step in range(1, len(self.timesteps))]

    @cached_property
    def _differences(self) -> Mapping[tuple[Kind, int, int], float]:
        found: dict[tuple[Kind, int, int], float] = defaultdict(float)
        for (kind, layer, step, before), squares in self.squares.items():
            if before:
                ratio = squares / max(self.squares[kind, layer, step, 0], 1e-30)
                found[kind, step, before] += math.sqrt(ratio) / self.layers
        return dict(found)


class Recorder:
    """Accumulates the differences of a model's outputs. It keeps the last `reach` outputs of each attention and
    feed-forward of the current chunk.

    Args:
        reach: the largest distance of two compared passes, in steps.

    Raises:
        ConfigError: `reach` is below 1.
    """

    def __init__(self, reach: int) -> None:
        if reach < 1:
            raise ConfigError(f"differences are measured at least 1 step apart, not {reach}")
        self.reach = reach
        self._timesteps: list[float] = []
        self._squares: dict[Key, Tensor] = {}
        # keyed by the text that is attended, since with guidance the passes of two streams alternate
        self._steps: dict[int, tuple[int, float]] = {}
        self._last_BTD: dict[tuple[int, Kind, int], deque[Tensor]] = defaultdict(partial(deque, maxlen=reach))
        self._current: tuple[int, int, int] | None = None  # stream, step, tokens that are denoised

    def forget_streams(self) -> None:
        """Drops the outputs of earlier videos, before another video begins."""
        self._steps.clear()
        self._last_BTD.clear()

    def begin(self, step: ForwardPass | SpatioTemporalPass) -> None:
        """Registers the pass that the model begins."""
        stream, timestep = id(step.text), step.timestep
        if timestep is None:  # a context pass in a forward of its own
            self._current = None
            return
        number, before = self._steps.get(stream, (-1, -math.inf))
        number = number + 1 if timestep < before else 0
        self._steps[stream] = number, timestep
        if number == len(self._timesteps):
            self._timesteps.append(timestep)
        self._current = stream, number, step.denoised_tokens

    def note(self, kind: Kind, layer: int, output_BTD: Tensor) -> None:
        """Compares an output of the current pass with those of earlier passes."""
        if self._current is None:
            return
        stream, step, tokens = self._current
        output = output_BTD[:, -tokens:]
        last = self._last_BTD[stream, kind, layer]
        if step == 0:
            last.clear()
        self._add((kind, layer, step, 0), output)
        for before, earlier in enumerate(reversed(last), 1):
            self._add((kind, layer, step, before), output - earlier)
        last.append(output.clone())

    def _add(self, key: Key, x: Tensor) -> None:
        squares = x.float().square().sum(dtype=torch.float64)
        self._squares[key] = self._squares[key] + squares if key in self._squares else squares

    def profile(self, layers: int, parallel: SequenceParallel, kinds: tuple[Kind, ...] = CAUSAL_KINDS) -> Profile:
        """Sums the measurements of all ranks; it must be called on every rank.

        Args:
            layers: of the model.
            parallel: the ranks and their mesh.
            kinds: the kinds of outputs that a layer has.

        Raises:
            ConfigError: chunks have fewer than two steps, so that there is nothing to compare.
        """
        if len(self._timesteps) < 2:
            raise ConfigError("chunks of a single step have nothing to reuse")
        local = {json.dumps(key): float(squares) for key, squares in self._squares.items()}
        by_rank = [local]
        if parallel.mesh.sp > 1:
            gathered = parallel.sp_communicator().everyone({"squares": json.dumps(local)})
            by_rank = [json.loads(fields["squares"]) for fields in gathered]
        total: dict[Key, float] = defaultdict(float)
        for sums in by_rank:
            for key, squares in sums.items():
                kind, layer, step, before = json.loads(key)
                total[kind, layer, step, before] += squares
        return Profile(tuple(self._timesteps), layers, self.reach, dict(total), kinds)


@contextlib.contextmanager
def recording(model: CausalDiT | SpatioTemporalDiT, reach: int) -> Iterator[Recorder]:
    """Records the outputs of every pass of the model inside this context.

    Args:
        model: the DiT, which gets a hook until the context ends.
        reach: the largest distance of two compared passes, in steps.

    Yields:
        The recorder.
    """
    recorder = Recorder(reach)

    def begin(_: nn.Module, args: tuple[Tensor, Pass]) -> tuple[Tensor, Pass]:
        tokens, step = args
        recorder.begin(step)

        def output(layer: int, kind: Kind, compute: Compute, gate: Gate) -> tuple[Tensor, Gate]:
            found = step.output(layer, kind, compute, gate)
            recorder.note(kind, layer, found[0])
            return found

        return tokens, replace(step, output=output)

    hook = model.register_forward_pre_hook(begin)
    try:
        yield recorder
    finally:
        hook.remove()


def errors(profile: Profile, rule: Broadcast) -> list[float]:
    """Returns the relative difference of each output that a rule for all layers reuses from the output that would have
    been computed; `inf` if that difference was not measured."""
    policy, found, computed = ReusePolicy((rule,)), [], 0
    for step in range(len(profile.timesteps)):
        if not policy.reuses(step, profile.timesteps, 0, rule.kind):
            computed = step
        elif step - computed > profile.reach:
            found.append(math.inf)
        else:
            found.append(profile.difference(rule.kind, step, step - computed))
    return found


def check_bound(bound: float) -> None:
    """Raises ConfigError unless the bound is above 0 and finite."""
    if not 0 < bound < math.inf:
        raise ConfigError(f"the bound must be above 0 and finite, not {bound:g}")


def propose(profile: Profile, bound: float, kinds: tuple[Kind, ...] | None = None) -> ReusePolicy:
    """Proposes for each kind of output the rule that reuses most outputs with no difference above a bound; of several
    the one with the smallest sum of differences. A kind that allows no reuse gets no rule.

    Args:
        profile: the measured differences.
        bound: the largest relative difference that is allowed.
        kinds: the kinds of outputs to propose rules for; None is all kinds of the profile.

    Raises:
        ConfigError: `bound` is not above 0 and finite.
    """
    check_bound(bound)
    steps, rules = len(profile.timesteps), []
    for kind in profile.kinds if kinds is None else kinds:
        best: tuple[int, float] = 0, 0.0
        chosen: Broadcast | None = None
        for every in range(2, profile.reach + 2):
            for first in range(steps):
                for stop in range(first + 1, steps + 1):
                    rule = Broadcast(kind, every, steps=(first, stop))
                    found = errors(profile, rule)
                    if found and max(found) <= bound and (len(found), -sum(found)) > best:
                        best, chosen = (len(found), -sum(found)), rule
        if chosen is not None:
            rules.append(chosen)
    return ReusePolicy(tuple(rules))
