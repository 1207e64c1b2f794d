"""What `causalrope-sp profile-reuse` says: the curve by kind, as a table, as JSON, as a plot, and the ranges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from causalrope_sp.errors import ConfigError, OutputError
from causalrope_sp.profiling.outputs import Profile, errors
from causalrope_sp.reuse.policy import CAUSAL_KINDS, Broadcast, Kind, ReusePlan, ReusePolicy

NAMES: dict[Kind, str] = {"self": "self-attention", "cross": "cross-attention", "mlp": "feed-forward"}
BAR = 24  # characters of the longest bar


def fields(profile: Profile, policy: ReusePolicy, bound: float) -> dict[str, Any]:
    """As JSON holds it."""
    return {
        "timesteps": [round(t, 4) for t in profile.timesteps],
        "difference": {kind: [round(d, 6) for d in profile.curve(kind)] for kind in CAUSAL_KINDS},
        "bound": bound,
        "ranges": [describe(profile, rule) for rule in policy.rules if isinstance(rule, Broadcast)],
        "reused": {kind: round(share, 4) for kind, share in shares(profile, policy).items()},
    }


def describe(profile: Profile, rule: Broadcast) -> dict[str, Any]:
    return {
        "kind": rule.kind,
        "every": rule.every,
        "steps": rule.steps,
        "largest_difference": round(max(errors(profile, rule)), 6),
    }


def shares(profile: Profile, policy: ReusePolicy) -> dict[Kind, float]:
    """Of all outputs of a kind in a chunk, how many are reused."""
    plan, steps = ReusePlan(policy, profile.timesteps, profile.layers, CAUSAL_KINDS), len(profile.timesteps)
    computed = {kind: sum(plan.computed(step, kind) for step in range(steps)) for kind in CAUSAL_KINDS}
    return {kind: 1 - count / (profile.layers * steps) for kind, count in computed.items()}


def text(profile: Profile, policy: ReusePolicy, bound: float) -> str:
    """The curve as a table with bars of self-attention's, and the ranges."""
    curves = {kind: profile.curve(kind) for kind in CAUSAL_KINDS}
    longest = max(max(curves["self"]), 1e-30)
    lines = ["step  timestep  " + "  ".join(f"{NAMES[kind]:>15}" for kind in curves)]
    for step, timestep in enumerate(profile.timesteps[1:], 1):
        values = "  ".join(f"{curve[step - 1]:15.4f}" for curve in curves.values())
        bar = "▪" * round(BAR * curves["self"][step - 1] / longest)
        lines.append(f"{step:4}  {timestep:8.1f}  {values}  {bar}".rstrip())
    lines.append("(relative difference from the output of the step before, mean over layers; bars: self-attention)")
    lines.append(f"Ranges that keep every single difference under {bound:g}:")
    found = [describe(profile, rule) for rule in policy.rules if isinstance(rule, Broadcast)]
    for rule in found:
        where = "steps {} to {}".format(rule["steps"][0], rule["steps"][1] - 1)
        share = shares(profile, policy)[rule["kind"]]
        lines.append(
            f"  {NAMES[rule['kind']]}: compute once in {rule['every']}, {where}: {share:.0%} reused, largest "
            f"difference {rule['largest_difference']:.4f}"
        )
    return "\n".join(lines if found else [*lines, "  none"])


def check_files(out: Path | None, drawing: Path | None) -> None:
    """Raises OutputError if the policy or the plot cannot go there; before a model is even loaded."""
    for path, verb in ((out, "write"), (drawing, "draw")):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise OutputError(f"cannot {verb} {path}: {'it is a folder' if path.is_dir() else 'no such folder'}")
    if drawing is not None and drawing.suffix not in (".png", ".svg", ".pdf"):
        raise OutputError(f"cannot draw {drawing}: it must be a .png, .svg or .pdf file")


def plot(profile: Profile, path: Path) -> None:
    """The curve over the steps.

    Raises:
        ConfigError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("--plot needs matplotlib, which is not installed: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 3.4), constrained_layout=True)
    for kind in CAUSAL_KINDS:
        axis.plot(range(1, len(profile.timesteps)), profile.curve(kind), marker="o", markersize=3, label=NAMES[kind])
    axis.set(xlabel="denoising step", ylabel="relative difference\nfrom the step before", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise OutputError(f"cannot draw {path}: {error.strerror or error}") from error
