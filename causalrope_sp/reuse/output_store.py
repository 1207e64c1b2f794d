"""What a stream keeps of a chunk's earlier passes: outputs of attentions and feed-forwards, this rank's shard alone.

An output is kept as its module leaves it, after the out-projection and before the gate, so that the gate of the pass
that reuses it applies. Nothing is kept that no later pass takes over.

Shapes: B batch, T tokens of a pass on this rank, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import Chunk
from causalrope_sp.reuse.policy import Kind, ReusePlan

Compute = Callable[[], Tensor]
OutputOf = Callable[[int, Kind, Compute], Tensor]


def computed(layer: int, kind: Kind, compute: Compute) -> Tensor:
    """The output of a pass that takes nothing over."""
    return compute()


class OutputStore:
    """The outputs of one stream, `kept_BTD` by layer and kind. A new chunk begins with none."""

    def __init__(self, plan: ReusePlan) -> None:
        self._plan = plan
        self._chunk: Chunk | None = None
        self._passes = 0
        self.kept_BTD: dict[tuple[int, Kind], Tensor] = {}
        self.bytes = self.most_bytes = 0  # now, and at once in any chunk so far

    def next_pass(self, chunk: Chunk, tokens: int) -> OutputOf:
        """What the next denoise pass of `chunk` asks for its outputs. Its last `tokens` are the chunk's; tokens before
        them are of a context pass in the same forward, of which nothing is kept.

        Raises:
            ConfigError: more passes than the plan has.
        """
        if chunk != self._chunk:
            self.clear()
            self._chunk = chunk
        step = self._passes
        if step >= len(self._plan.timesteps):
            raise ConfigError(f"chunk {chunk.index} has more passes than the {step} that reuse was planned for")
        self._passes += 1
        return partial(self._output, step, tokens)

    def clear(self) -> None:
        """Forgets the chunk and all that is kept."""
        self.kept_BTD.clear()
        self._chunk, self._passes, self.bytes = None, 0, 0

    def _output(self, step: int, tokens: int, layer: int, kind: Kind, compute: Compute) -> Tensor:
        if self._plan.reuses(step, layer, kind):
            kept = self.kept_BTD[layer, kind]
            if not self._plan.reuses(step + 1, layer, kind):
                del self.kept_BTD[layer, kind]
                self.bytes -= kept.nbytes
            return kept
        output = compute()
        if self._plan.keeps(step, layer, kind):
            whole = output.shape[1] == tokens
            kept = self.kept_BTD[layer, kind] = output if whole else output[:, -tokens:].clone()
            self.bytes += kept.nbytes
            self.most_bytes = max(self.most_bytes, self.bytes)
        return output
