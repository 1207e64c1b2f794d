"""The published defaults of PAB for each model.

Source: the public code of the paper (arXiv 2408.12588), with its timestep window, its spatial, temporal and cross
ranges, and its rule for the MLP. A model whose attention is over space and time at once, such as Wan, has the spatial
range for it.
"""

from __future__ import annotations

from dataclasses import replace

from causalrope_sp.reuse.policy import After, Broadcast, ReusePolicy, Rule, Stored


def pyramid(
    spatial: int,
    temporal: int | None,
    cross: int | None,
    timesteps: tuple[float, float],
    mlp: After | None = None,
    stored: Stored = "ungated",
) -> ReusePolicy:
    """Makes a policy of PAB's settings.

    Args:
        spatial: the range of spatial attention: it is computed once in so many passes.
        temporal: the range of temporal attention; None computes it in every pass.
        cross: the range of cross-attention, also of that in temporal blocks; None computes it in every pass.
        timesteps: the two bounds of the timesteps whose passes reuse attention.
        mlp: the rule of the feed-forward, also of that in temporal blocks; None computes it in every pass.
        stored: where an output is stored; see `ReusePolicy`.

    Returns:
        The policy.
    """
    rules: list[Rule] = [Broadcast("self", spatial, timesteps)]
    rules += [Broadcast("temporal", temporal, timesteps)] if temporal else []
    rules += [Broadcast("cross", cross, timesteps)] if cross else []
    rules += [Broadcast("temporal-cross", cross, timesteps)] if cross and temporal else []
    rules += [mlp] if mlp else []
    rules += [replace(mlp, kind="temporal-mlp")] if mlp and temporal else []
    return ReusePolicy(tuple(rules), stored)


_FIRST_5, _FIRST_7 = tuple(range(5)), tuple(range(7))

PRESETS = {
    "open-sora": pyramid(2, 4, 6, (450, 930), After("mlp", (864, 788, 676), 2, _FIRST_5), "gated"),
    "open-sora-plan-1.1": pyramid(2, 4, 6, (100, 850), After("mlp", tuple(range(738, 425, -24)), 2, _FIRST_7), "gated"),
    "open-sora-plan-1.2": pyramid(2, None, 6, (100, 850), stored="gated"),
    "latte": pyramid(2, 3, 6, (100, 800), After("mlp", (720, 640, 560, 480, 400), 2, _FIRST_5), "gated"),
    "cogvideox": pyramid(2, None, None, (100, 850)),
    "vchitect": pyramid(2, 4, 6, (100, 800)),
}
