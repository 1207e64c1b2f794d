"""Storage of the outputs of attentions and feed-forwards that later passes of a chunk reuse, for this rank's shard.

An output is kept after the output projection, and by the policy before the gate, so that the gate of the pass that
reuses it applies, or after it. An output that no later pass reuses is not kept.

Shapes: B batch, F frames, T tokens of a pass on this rank, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial

from torch import Tensor

from causalrope_kernels.reference import by_frame
from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import Chunk
from causalrope_sp.reuse.policy import Kind, ReusePlan

Compute = Callable[[], Tensor]
Gate = Tensor | None  # the factor of an output by frame, (…, F, D), or None for 1
OutputOf = Callable[[int, Kind, Compute, Gate], tuple[Tensor, Gate]]


def computed(layer: int, kind: Kind, compute: Compute, gate: Gate) -> tuple[Tensor, Gate]:
    """Computes an output: the `OutputOf` of a pass that reuses nothing.

    Args:
        layer: the layer's number.
        kind: the kind of output.
        compute: computes the output.
        gate: the gate of the output in this pass.

    Returns:
        The output, and the gate that the caller applies to it.
    """
    return compute(), gate


def gated(output_BTD: Tensor, gate: Tensor) -> Tensor:
    """Returns an output times its gate, in the wider dtype of the two."""
    return (by_frame(output_BTD, gate) * gate.unsqueeze(-2)).flatten(1, 2)


class OutputStore:
    """The outputs of one stream, `kept_BTD` by layer and kind. A new chunk begins with none.

    Args:
        plan: which outputs are reused.
        stays: whether outputs are copied to memory that stays where it is, and is not freed, so that captured graphs
            may write and read it.
    """

    def __init__(self, plan: ReusePlan, stays: bool = False) -> None:
        self.plan, self._stays = plan, stays
        self._chunk: Chunk | None = None
        self._passes = self._most_tokens = 0
        self.kept_BTD: dict[tuple[int, Kind], Tensor] = {}
        self.bytes = self.most_bytes = 0  # held now, and the most held at any time

    def next_pass(self, chunk: Chunk, tokens: int) -> OutputOf:
        """Begins the next denoise pass of a chunk; a new chunk forgets the outputs of the one before.

        Args:
            chunk: the chunk.
            tokens: how many of the pass's tokens are the chunk's. They are the last ones; those before them belong to a
                context pass in the same forward, whose outputs are not kept.

        Returns:
            A function that the pass calls for each output.

        Raises:
            ConfigError: the chunk has more passes than the plan.
        """
        if chunk != self._chunk:
            self.clear()
            self._chunk = chunk
        step = self._passes
        if step >= len(self.plan.timesteps):
            raise ConfigError(f"chunk {chunk.index} has more passes than the {step} that reuse was planned for")
        self._passes += 1
        self._most_tokens = max(self._most_tokens, tokens)
        return partial(self._output, step, tokens)

    @property
    def pattern(self) -> Hashable:
        """What the pass that was begun last reuses and keeps, and how large the memory is; equal where a captured graph
        of one such pass serves another."""
        return self.plan.patterns[self._passes - 1], self._most_tokens

    def clear(self) -> None:
        """Forgets the chunk and frees all outputs, unless their memory stays."""
        self._chunk, self._passes = None, 0
        if not self._stays:
            self.kept_BTD.clear()
            self.bytes = 0

    def _output(
        self, step: int, tokens: int, layer: int, kind: Kind, compute: Compute, gate: Gate
    ) -> tuple[Tensor, Gate]:
        """Returns a kept output, and frees it after its last reuse; or computes it, and keeps it if it is reused. The
        gate that is still to be applied comes with it."""
        is_gated = self.plan.policy.stored == "gated" and gate is not None
        if self.plan.reuses(step, layer, kind):
            kept = self.kept_BTD[layer, kind]
            if not self._stays and not self.plan.reuses(step + 1, layer, kind):
                del self.kept_BTD[layer, kind]
                self.bytes -= kept.nbytes
            return kept[:, :tokens] if self._stays else kept, None if is_gated else gate
        output = compute()
        if self.plan.keeps(step, layer, kind):
            stored = output if gate is None or not is_gated else gated(output, gate).to(output.dtype)
            own = stored[:, -tokens:]
            if self._stays:
                self._memory(layer, kind, output)[:, :tokens] = own
            else:
                self._keep(layer, kind, stored if stored.shape[1] == tokens else own.clone())
        return output, gate

    def _memory(self, layer: int, kind: Kind, like: Tensor) -> Tensor:
        """The memory of an output, which is large enough for the largest chunk so far."""
        kept = self.kept_BTD.get((layer, kind))
        if kept is None or kept.shape[1] < self._most_tokens:
            self.bytes -= 0 if kept is None else kept.nbytes
            kept = self._keep(layer, kind, like.new_empty(len(like), self._most_tokens, like.shape[2]))
        return kept

    def _keep(self, layer: int, kind: Kind, output: Tensor) -> Tensor:
        self.kept_BTD[layer, kind] = output
        self.bytes += output.nbytes
        self.most_bytes = max(self.most_bytes, self.bytes)
        return output
