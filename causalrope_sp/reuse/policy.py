"""Rules that decide which outputs a denoise pass reuses from an earlier pass of its chunk. Pure arithmetic.

The decision depends on the number of the pass, the timesteps of the chunk's passes, the layer and the kind of output,
so it is the same on every rank and known before a chunk begins. The first pass of a chunk computes every output.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Literal, Self, get_args

from causalrope_sp.checks import check_choice, check_whole
from causalrope_sp.errors import ConfigError

# "self" is attention within a frame, or over the whole window; temporal blocks have modules of their own
Kind = Literal["self", "cross", "mlp", "temporal", "temporal-cross", "temporal-mlp"]
KINDS: tuple[Kind, ...] = get_args(Kind)  # in the order in which a layer computes them
CAUSAL_KINDS: tuple[Kind, ...] = ("self", "cross", "mlp")  # those of `CausalDiT`
Stored = Literal["ungated", "gated"]
Layers = tuple[int, ...] | None  # None: every layer
LARGEST = 1e6  # bound of a timestep; those of models go up to 1000


@dataclass(frozen=True)
class Broadcast:
    """Computes an output once and reuses it `every` - 1 times: PAB's rule for attention.

    Pass number `step` of a chunk, counted from 0, reuses if step % every != 0 and both bounds below allow it.

    Attributes:
        kind: the kind of output.
        every: passes from one computation to the next.
        timesteps: two bounds, low and high, between which the whole part of the pass's timestep lies, both excluded;
            None: no bound.
        steps: the first number of a pass that may reuse, and the first after it that may not; None: no bound.
        layers: the layers that reuse; None: all layers.

    Raises:
        ConfigError: `kind` is unknown, `every` is below 1, or bounds have nothing between them.
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
        """Returns whether pass number `step` reuses, in a chunk whose passes are at `timesteps`."""
        among = self.steps is None or self.steps[0] <= step < self.steps[1]
        return step % self.every != 0 and self._within(timesteps[step]) and among

    def obstacle(self, timesteps: Sequence[float]) -> str | None:
        """Returns what no pass of a chunk at `timesteps` has that the rule asks for, or None."""
        if not any(map(self._within, timesteps)):
            return f"a timestep between {self.timesteps[0]:g} and {self.timesteps[1]:g}" if self.timesteps else None
        if self.steps is not None and self.steps[0] >= len(timesteps):
            return f"the number {self.steps[0]}, counted from 0"
        return None

    def _within(self, timestep: float) -> bool:
        return self.timesteps is None or self.timesteps[0] < int(timestep) < self.timesteps[1]


@dataclass(frozen=True)
class After:
    """Computes an output at some timesteps and reuses it in the passes that follow: PAB's rule for the feed-forward.

    A timestep means the first pass whose timestep's whole part is at or below it, so that a rule also fits schedules
    without this timestep.

    Attributes:
        kind: the kind of output.
        timesteps: the timesteps that compute.
        steps: how many passes after each of them reuse.
        layers: the layers that reuse; None: all layers.

    Raises:
        ConfigError: `kind` is unknown, there is no timestep, or `steps` is below 1.
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
        """Returns whether pass number `step` reuses, in a chunk whose passes are at `timesteps`."""
        computed = {
            next(n for n, t in enumerate(timesteps) if int(t) <= wanted) for wanted in self._occurring(timesteps)
        }
        return step not in computed and any(at < step <= at + self.steps for at in computed)

    def obstacle(self, timesteps: Sequence[float]) -> str | None:
        """Returns what no pass of a chunk at `timesteps` has that the rule asks for, or None."""
        if self._occurring(timesteps):
            return None
        return f"one of the timesteps {', '.join(f'{t:g}' for t in self.timesteps)}"

    def _occurring(self, timesteps: Sequence[float]) -> list[float]:
        """Returns the rule's timesteps from the first to the last pass."""
        return [wanted for wanted in self.timesteps if int(timesteps[-1]) <= wanted <= timesteps[0]]


Rule = Broadcast | After


@dataclass(frozen=True)
class ReusePolicy:
    """A set of rules, at most one for a kind of output. A kind without a rule is always computed.

    Attributes:
        rules: the rules.
        stored: where an output is stored: "ungated", so that the gate of the pass that reuses it applies, or "gated",
            with the gate of the pass that computed it.

    Raises:
        ConfigError: a kind has two rules, or `stored` is neither.
    """

    rules: tuple[Rule, ...] = ()
    stored: Stored = "ungated"

    def __post_init__(self) -> None:
        check_choice("stored", self.stored, get_args(Stored))
        for kind, count in Counter(rule.kind for rule in self.rules).items():
            if count > 1:
                raise ConfigError(f"a policy has one rule for {kind}, not {count}")

    def check(self, timesteps: Sequence[float], layers: int) -> None:
        """Checks that every rule can apply.

        Args:
            timesteps: the timesteps of a chunk's passes.
            layers: how many layers the model has.

        Raises:
            ConfigError: no pass has what a rule asks for, or the model has none of a rule's layers.
        """
        for rule in self.rules:
            if (obstacle := rule.obstacle(timesteps)) is not None:
                passes = f"the {len(timesteps)} passes are at {timesteps[0]:g} to {timesteps[-1]:g}"
                raise ConfigError(f"reuse: the rule for {rule.kind} expects a pass with {obstacle}, but {passes}")
            if rule.layers is not None and not any(layer < layers for layer in rule.layers):
                named = ", ".join(map(str, rule.layers))
                raise ConfigError(
                    f"reuse: the rule for {rule.kind} expects layers {named}, the model has 0 to {layers - 1}"
                )

    def reuses(self, step: int, timesteps: Sequence[float], layer: int, kind: Kind) -> bool:
        """Returns whether a pass reuses an output of the last pass that computed it.

        Args:
            step: the number of the pass in its chunk, counted from 0.
            timesteps: the timesteps of the chunk's passes.
            layer: the layer's number.
            kind: the kind of output.
        """
        layers = self.layers_that_reuse(step, timesteps, kind)
        return layers is None or layer in layers

    def layers_that_reuse(self, step: int, timesteps: Sequence[float], kind: Kind) -> Collection[int] | None:
        """Returns the layers in which a pass reuses a kind of output; None: all layers. See `reuses`."""
        rule = next((rule for rule in self.rules if rule.kind == kind), None)
        if rule is None or step == 0 or not rule.reuses(step, timesteps):
            return ()
        return None if rule.layers is None else frozenset(rule.layers)


@dataclass(frozen=True)
class ReusePlan:
    """A policy applied to a model and to the passes of one chunk.

    Attributes:
        policy: the rules.
        timesteps: the timesteps of the chunk's passes.
        layers: how many layers the model has.
        kinds: the kinds of output that a layer has.
    """

    policy: ReusePolicy
    timesteps: tuple[float, ...]
    layers: int
    kinds: tuple[Kind, ...]

    @classmethod
    def of_causal(cls, policy: ReusePolicy, timesteps: tuple[float, ...], layers: int) -> Self:
        """Makes the plan of a `CausalDiT` with `layers` layers."""
        return cls(policy, timesteps, layers, CAUSAL_KINDS)

    def reuses(self, step: int, layer: int, kind: Kind) -> bool:
        """Returns whether a pass reuses this output."""
        return (step, layer, kind) in self._reused

    def keeps(self, step: int, layer: int, kind: Kind) -> bool:
        """Returns whether a pass computes this output and a later pass reuses it."""
        return not self.reuses(step, layer, kind) and self.reuses(step + 1, layer, kind)

    def computed(self, step: int, kind: Kind) -> int:
        """Returns in how many layers a pass computes this kind of output."""
        return self.layers - self._counts[step, kind]

    @property
    def stored(self) -> int:
        """The largest number of outputs that are kept at once.

        Each is as large as the chunk's residual stream, and is freed by the last pass that reuses it.
        """
        kept = most = 0
        for step, layer, kind in product(range(len(self.timesteps)), range(self.layers), self.kinds):
            if self.reuses(step, layer, kind):
                kept -= not self.reuses(step + 1, layer, kind)
            else:
                kept += self.keeps(step, layer, kind)
            most = max(most, kept)
        return most

    @property
    def kept(self) -> int:
        """How many outputs are kept in a chunk, at once or one after the other."""
        return sum(
            any(self.keeps(step, layer, kind) for step in range(len(self.timesteps)))
            for layer, kind in product(range(self.layers), self.kinds)
        )

    @cached_property
    def patterns(self) -> Sequence[int]:
        """A number for each pass, which is that of the first pass that reuses and keeps the same outputs."""
        outputs = list(product(range(self.layers), self.kinds))
        found = [
            [(self.reuses(step, *output), self.keeps(step, *output)) for output in outputs]
            for step in range(len(self.timesteps))
        ]
        return [found.index(pattern) for pattern in found]

    @cached_property
    def _counts(self) -> Mapping[tuple[int, Kind], int]:
        """In how many layers each pass reuses each kind."""
        return Counter((step, kind) for step, _, kind in self._reused)

    @cached_property
    def _reused(self) -> Collection[tuple[int, int, Kind]]:
        """Every pass, layer and kind whose output is reused."""
        found = set()
        for step, kind in product(range(len(self.timesteps)), self.kinds):
            layers = self.policy.layers_that_reuse(step, self.timesteps, kind)
            found |= {(step, layer, kind) for layer in range(self.layers) if layers is None or layer in layers}
        return frozenset(found)


def _check_kind_and_layers(kind: object, layers: Layers) -> None:
    """Raises ConfigError for an unknown kind, or layers that are no layer numbers."""
    if kind not in KINDS:
        raise ConfigError(f"unknown kind {kind!r}; there are: {', '.join(KINDS)}")
    if layers is not None and not all(_whole(layer, 0) for layer in layers):
        raise ConfigError(f"layers must be layer numbers of at least 0, not {layers!r}")


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST
