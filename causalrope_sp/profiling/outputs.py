"""How much the outputs of a chunk's passes differ, measured on a model as it runs, and the ranges that this allows.

The differences are those of a run that reuses nothing, before the gate and by themselves: what they become in the
picture, and how they add up where several kinds are reused, is for a run with reuse to show.

Shapes: B batch, T tokens of a pass on this rank, D model width.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.errors import ConfigError
from causalrope_sp.models.causal_dit import Block, CausalDiT, ForwardPass
from causalrope_sp.reuse.policy import CAUSAL_KINDS, Broadcast, Kind, ReusePolicy

Key = tuple[Kind, int, int, int]  # kind, layer, step, and how many steps before it; 0: the output itself


@dataclass(frozen=True)
class Profile:
    """Of a model of so many layers whose chunks had passes at `timesteps`: sums of squares of outputs and of their
    differences, up to `reach` steps apart."""

    timesteps: tuple[float, ...]
    layers: int
    reach: int
    squares: Mapping[Key, float]

    def difference(self, kind: Kind, step: int, before: int = 1) -> float:
        """Of the outputs of pass `step` and of the one so many steps before: relative, the mean over layers."""
        return self._differences[kind, step, before]

    def curve(self, kind: Kind) -> list[float]:
        """The differences of neighbouring passes, from the second pass on."""
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
    """What `recording` notes. Of every chunk it keeps the last outputs, `reach` of each attention and feed-forward."""

    def __init__(self, reach: int) -> None:
        if reach < 1:
            raise ConfigError(f"differences are measured at least 1 step apart, not {reach}")
        self.reach = reach
        self._timesteps: list[float] = []
        self._squares: dict[Key, Tensor] = {}
        # by the text that is attended: with guidance, two streams take turns
        self._steps: dict[int, tuple[int, float]] = {}
        self._last_BTD: dict[tuple[int, Kind, int], deque[Tensor]] = defaultdict(partial(deque, maxlen=reach))
        self._now: tuple[int, int, float] | None = None  # stream, step, share of the tokens that are denoised

    def forget_streams(self) -> None:
        """Another video begins: lets go of the outputs of those before."""
        self._steps.clear()
        self._last_BTD.clear()

    def begin(self, step: ForwardPass) -> None:
        stream, timestep = id(step.text), float(step.timesteps_F.flatten()[-1])
        if timestep == 0:  # a context pass by itself
            self._now = None
            return
        number, before = self._steps.get(stream, (-1, -math.inf))
        number = number + 1 if timestep < before else 0
        self._steps[stream] = number, timestep
        if number == len(self._timesteps):
            self._timesteps.append(timestep)
        self._now = stream, number, step.predicted_frames / step.timesteps_F.shape[-1]

    def note(self, kind: Kind, layer: int, output_BTD: Tensor) -> None:
        if self._now is None:
            return
        stream, step, share = self._now
        output = output_BTD[:, -round(output_BTD.shape[1] * share) :]
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

    def profile(self, layers: int, parallel: SequenceParallel) -> Profile:
        """Of all ranks; every one must ask.

        Raises:
            ConfigError: a model with fewer than two steps a chunk has nothing to compare.
        """
        if len(self._timesteps) < 2:
            raise ConfigError("chunks of a single step have nothing to reuse")
        mine = {json.dumps(key): float(squares) for key, squares in self._squares.items()}
        everyone = [mine]
        if parallel.mesh.sp > 1:
            said = parallel.sp_communicator().everyone({"squares": json.dumps(mine)})
            everyone = [json.loads(fields["squares"]) for fields in said]
        total: dict[Key, float] = defaultdict(float)
        for sums in everyone:
            for key, squares in sums.items():
                kind, layer, step, before = json.loads(key)
                total[kind, layer, step, before] += squares
        return Profile(tuple(self._timesteps), layers, self.reach, dict(total))


@contextlib.contextmanager
def recording(model: CausalDiT, reach: int) -> Iterator[Recorder]:
    """Notes the outputs of every pass that the model makes inside this context."""
    recorder = Recorder(reach)

    def begin(_: nn.Module, given: tuple[Any, ...]) -> None:
        recorder.begin(given[1])

    def note(kind: Kind, layer: int, _: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
        recorder.note(kind, layer, output)

    with contextlib.ExitStack() as hooks:
        hooks.callback(model.register_forward_pre_hook(begin).remove)
        for layer, block in enumerate(model.blocks):
            assert isinstance(block, Block)
            modules: dict[Kind, nn.Module] = {"self": block.self_attn, "cross": block.cross_attn, "mlp": block.ffn}
            for kind, module in modules.items():
                hooks.callback(module.register_forward_hook(partial(note, kind, layer)).remove)
        yield recorder


def errors(profile: Profile, rule: Broadcast) -> list[float]:
    """The differences of what a rule for all layers reuses from what would have been computed; `inf` where none was
    measured."""
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
    """Raises ConfigError unless it is above 0 and finite."""
    if not 0 < bound < math.inf:
        raise ConfigError(f"the bound must be above 0 and finite, not {bound:g}")


def propose(profile: Profile, bound: float, kinds: tuple[Kind, ...] = CAUSAL_KINDS) -> ReusePolicy:
    """For each kind the range, and the steps it holds in, that reuse most often with no difference above `bound`; of
    several the one whose differences sum to least. A kind that allows none has no rule.

    Raises:
        ConfigError: a bound that is not above 0.
    """
    check_bound(bound)
    steps, rules = len(profile.timesteps), []
    for kind in kinds:
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
