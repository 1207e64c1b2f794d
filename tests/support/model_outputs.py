"""The outputs that a DiT computes in its attentions and feed-forwards, noted while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from causalrope_sp.models.block import ForwardPass
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.reuse.output_store import Compute, Gate
from causalrope_sp.reuse.policy import Kind


def note_outputs(model: CausalDiT, note: Callable[[int, Kind, Tensor], object]) -> None:
    """Lets `note` see a copy of every output that is computed, with the layer and the kind; not those reused."""

    def begin(_: CausalDiT, arguments: tuple[Tensor, ForwardPass]) -> tuple[Tensor, ForwardPass]:
        tokens, step = arguments

        def output(layer: int, kind: Kind, compute: Compute, gate: Gate) -> tuple[Tensor, Gate]:
            def noted() -> Tensor:
                computed = compute()
                note(layer, kind, computed.clone())
                return computed

            return step.output(layer, kind, noted, gate)

        return tokens, replace(step, output=output)

    model.register_forward_pre_hook(begin)
