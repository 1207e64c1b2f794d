"""Which outputs a denoise pass takes over from an earlier pass of its chunk. Pure arithmetic.

Nothing but the number of the pass, the timesteps of the chunk's passes, the layer and the kind decide, so every rank
decides alike and all of it is known before a chunk begins. The first pass of a chunk is always computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Literal, Self, get_args

from causalrope_sp.checks import check_whole
from causalrope_sp.errors import ConfigError

# "self" is attention within a frame, or over all of a window; a block of attention across frames has an MLP of its own
Kind = Literal["self", "cross", "mlp", "temporal", "temporal-mlp"]
KINDS: tuple[Kind, ...] = get_args(Kind)  # in the order in which a layer makes them
CAUSAL_KINDS: tuple[Kind, ...] = ("self", "cross", "mlp")  # those of `CausalDiT`; a factorised DiT has all of them
Layers = tuple[int, ...] | None  # None: every layer
LARGEST = 1e6  # a timestep; models have them up to 1000


@dataclass(frozen=True)
class Broadcast:
    """Compute once, reuse `every` - 1 times: PAB's rule for attention.

    Pass `step` of a chunk, counted from 0, reuses if step % every != 0, its timestep is strictly between the two
    `timesteps`, and it is one of `steps`, [first, stop); None does not restrict.

    Raises:
        ConfigError: an unknown kind, `every` below 1, bounds that hold nothing.
    """

    kind: Kind
    every: int
    timesteps: tuple[float, float] | None = None
    steps: tuple[int, int] | None = None
    layers: Layers = None

    def __post_init__(self) -> None:
        _check_kind_and_layers(self.kind, self.layers)
        check_whole("every", self.every)
        for name, bounds, right in (
            ("timesteps", self.timesteps, _number),
            ("steps", self.steps, lambda value: _whole(value, 0)),
        ):
            if bounds is not None and not (len(bounds) == 2 and all(map(right, bounds)) and bounds[0] < bounds[1]):
                raise ConfigError(f"{name} must be two bounds, the lower one first, not {bounds!r}")

    def reuses(self, step: int, timesteps: Sequence[float]) -> bool:
        within = self.timesteps is None or self.timesteps[0] < timesteps[step] < self.timesteps[1]
        among = self.steps is None or self.steps[0] <= step < self.steps[1]
        return step % self.every != 0 and within and among


@dataclass(frozen=True)
class After:
    """Compute at some timesteps, reuse in the `steps` passes that follow: PAB's rule for the feed-forward.

    A timestep stands for the first pass at or below it, so that a rule fits schedules that do not hold it.

    Raises:
        ConfigError: an unknown kind, no timestep, `steps` below 1.
    """

    kind: Kind
    timesteps: tuple[float, ...]
    steps: int
    layers: Layers = None

    def __post_init__(self) -> None:
        _check_kind_and_layers(self.kind, self.layers)
        if not self.timesteps or not all(map(_number, self.timesteps)):
            raise ConfigError(f"after must be one or more timesteps, not {self.timesteps!r}")
        check_whole("steps after a timestep", self.steps)

    def reuses(self, step: int, timesteps: Sequence[float]) -> bool:
        computed = {
            next((n for n, t in enumerate(timesteps) if t <= wanted), len(timesteps))
            for wanted in self.timesteps
            if timesteps[0] >= wanted
        }
        return step not in computed and any(at < step <= at + self.steps for at in computed)


Rule = Broadcast | After


@dataclass(frozen=True)
class ReusePolicy:
    """At most one rule for a kind; a kind without one is always computed.

    Raises:
        ConfigError: two rules for a kind.
    """

    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        for kind, count in Counter(rule.kind for rule in self.rules).items():
            if count > 1:
                raise ConfigError(f"a policy has one rule for {kind}, not {count}")

    def reuses(self, step: int, timesteps: Sequence[float], layer: int, kind: Kind) -> bool:
        """Whether pass `step` of a chunk whose passes are at `timesteps` takes this output from the last that computed
        it; if not, it computes it."""
        layers = self.layers_that_reuse(step, timesteps, kind)
        return layers is None or layer in layers

    def layers_that_reuse(self, step: int, timesteps: Sequence[float], kind: Kind) -> Collection[int] | None:
        """The layers in which it does; None: in all."""
        rule = next((rule for rule in self.rules if rule.kind == kind), None)
        if rule is None or step == 0 or not rule.reuses(step, timesteps):
            return ()
        return None if rule.layers is None else frozenset(rule.layers)


@dataclass(frozen=True)
class ReusePlan:
    """A policy over the passes of one chunk, at `timesteps`, of a model of so many layers that has these `kinds`."""

    policy: ReusePolicy
    timesteps: tuple[float, ...]
    layers: int
    kinds: tuple[Kind, ...]

    @classmethod
    def of_causal(cls, policy: ReusePolicy, timesteps: tuple[float, ...], layers: int) -> Self:
        """That of a `CausalDiT`."""
        return cls(policy, timesteps, layers, CAUSAL_KINDS)

    def reuses(self, step: int, layer: int, kind: Kind) -> bool:
        return (step, layer, kind) in self._reused

    def keeps(self, step: int, layer: int, kind: Kind) -> bool:
        """Whether a later pass takes over what this one computes."""
        return not self.reuses(step, layer, kind) and self.reuses(step + 1, layer, kind)

    def computed(self, step: int, kind: Kind) -> int:
        """In how many layers a pass computes it."""
        return self.layers - self._counts[step, kind]

    @property
    def stored(self) -> int:
        """How many outputs are kept at the most at once; each is as large as the chunk's residual, and let go with the
        last pass that takes it over."""
        kept = most = 0
        for step, layer, kind in product(range(len(self.timesteps)), range(self.layers), self.kinds):
            if self.reuses(step, layer, kind):
                kept -= not self.reuses(step + 1, layer, kind)
            else:
                kept += self.keeps(step, layer, kind)
            most = max(most, kept)
        return most

    @cached_property
    def _counts(self) -> Mapping[tuple[int, Kind], int]:
        """In how many layers a pass reuses it."""
        return Counter((step, kind) for step, _, kind in self._reused)

    @cached_property
    def _reused(self) -> Collection[tuple[int, int, Kind]]:
        found = set()
        for step, kind in product(range(len(self.timesteps)), self.kinds):
            layers = self.policy.layers_that_reuse(step, self.timesteps, kind)
            found |= {(step, layer, kind) for layer in range(self.layers) if layers is None or layer in layers}
        return frozenset(found)


def _check_kind_and_layers(kind: object, layers: Layers) -> None:
    if kind not in KINDS:
        raise ConfigError(f"unknown kind {kind!r}; there are: {', '.join(KINDS)}")
    if layers is not None and not all(_whole(layer, 0) for layer in layers):
        raise ConfigError(f"layers must be numbers of layers, not {layers!r}")


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST
