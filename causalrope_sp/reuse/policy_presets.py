"""The published defaults of PAB, model by model.

Source: the paper's public code (arXiv 2408.12588): timestep window, spatial / temporal / cross range, MLP.
A model whose attention is over space and time at once, Wan's, takes the spatial range for it.
"""

from __future__ import annotations

from dataclasses import replace

from causalrope_sp.reuse.policy import After, Broadcast, ReusePolicy, Rule


def pyramid(
    spatial: int, temporal: int | None, cross: int | None, timesteps: tuple[float, float], mlp: After | None = None
) -> ReusePolicy:
    """The ranges of a pyramid over one timestep window; None always computes."""
    rules: list[Rule] = [Broadcast("self", spatial, timesteps)]
    rules += [Broadcast("temporal", temporal, timesteps)] if temporal else []
    rules += [Broadcast("cross", cross, timesteps)] if cross else []
    rules += [mlp] if mlp else []
    rules += [replace(mlp, kind="temporal-mlp")] if mlp and temporal else []
    return ReusePolicy(tuple(rules))


_FIRST_5, _FIRST_7 = tuple(range(5)), tuple(range(7))

PRESETS = {
    "open-sora": pyramid(2, 4, 6, (450, 930), After("mlp", (864, 788, 676), 2, _FIRST_5)),
    "open-sora-plan-1.1": pyramid(2, 4, 6, (100, 850), After("mlp", tuple(range(738, 425, -24)), 2, _FIRST_7)),
    "open-sora-plan-1.2": pyramid(2, None, 6, (100, 850)),
    "latte": pyramid(2, 3, 6, (100, 800), After("mlp", (720, 640, 560, 480, 400), 2, _FIRST_5)),
    "cogvideox": pyramid(2, None, None, (100, 850)),
    "vchitect": pyramid(2, 4, 6, (100, 800)),
}
