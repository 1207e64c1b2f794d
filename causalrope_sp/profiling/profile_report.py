"""The report of `causalrope-sp profile-reuse`: the differences by kind of output and the ranges of reuse that they
allow, as a table, as JSON and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from causalrope_sp.io.report_files import import_pyplot, save_plot
from causalrope_sp.profiling.outputs import Profile, errors
from causalrope_sp.reuse.policy import Broadcast, Kind, ReusePlan, ReusePolicy

NAMES: dict[Kind, str] = {
    "self": "self-attention",
    "cross": "cross-attention",
    "mlp": "feed-forward",
    "temporal": "temporal",
    "temporal-cross": "temporal cross",
    "temporal-mlp": "temporal f.-f.",
}
BAR = 24  # characters of the longest bar


def fields(profile: Profile, policy: ReusePolicy, bound: float) -> dict[str, Any]:
    """Returns the report as the fields of a JSON object.

    Args:
        profile: the measured differences.
        policy: what was proposed from them.
        bound: the largest relative difference that was allowed.
    """
    return {
        "timesteps": [round(t, 4) for t in profile.timesteps],
        "difference": {kind: [round(d, 6) for d in profile.curve(kind)] for kind in profile.kinds},
        "bound": bound,
        "ranges": [describe(profile, rule) for rule in policy.rules if isinstance(rule, Broadcast)],
        "reused": {kind: round(share, 4) for kind, share in shares(profile, policy).items()},
    }


def describe(profile: Profile, rule: Broadcast) -> dict[str, Any]:
    """Returns a rule as the fields of a JSON object, with the largest relative difference that it causes."""
    return {
        "kind": rule.kind,
        "every": rule.every,
        "steps": rule.steps,
        "largest_difference": round(max(errors(profile, rule)), 6),
    }


def shares(profile: Profile, policy: ReusePolicy) -> dict[Kind, float]:
    """Returns the share of a chunk's outputs that is reused, by kind."""
    plan, steps = ReusePlan(policy, profile.timesteps, profile.layers, profile.kinds), len(profile.timesteps)
    computed = {kind: sum(plan.computed(step, kind) for step in range(steps)) for kind in profile.kinds}
    return {kind: 1 - count / (profile.layers * steps) for kind, count in computed.items()}


def text(profile: Profile, policy: ReusePolicy, bound: float) -> str:
    """Formats the report: a table of the differences with bars for self-attention, then the ranges; see `fields`."""
    curves = {kind: profile.curve(kind) for kind in profile.kinds}
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
        steps = "steps {} to {}".format(rule["steps"][0], rule["steps"][1] - 1)
        share = shares(profile, policy)[rule["kind"]]
        lines.append(
            f"  {NAMES[rule['kind']]}: compute once in {rule['every']}, {steps}: {share:.0%} reused, largest "
            f"difference {rule['largest_difference']:.4f}"
        )
    return "\n".join(lines if found else [*lines, "  none"])


def plot(profile: Profile, path: Path) -> None:
    """Plots the relative differences over the denoising steps, one line for each kind of output.

    Args:
        profile: the measured differences.
        path: the .png, .svg or .pdf file to write.

    Raises:
        ConfigError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    pyplot = import_pyplot()
    figure, axis = pyplot.subplots(figsize=(6, 3.4), constrained_layout=True)
    for kind in profile.kinds:
        axis.plot(range(1, len(profile.timesteps)), profile.curve(kind), marker="o", markersize=3, label=NAMES[kind])
    axis.set(xlabel="denoising step", ylabel="relative difference\nfrom the step before", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    save_plot(figure, path)
