"""`causalrope-sp profile-heads`: measures where attention heads look, and writes how many frames each is to see."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import click
from click.core import ParameterSource

from causalrope_sp.cli.model_options import check_uncontrolled
from causalrope_sp.cli.numbers import FLOAT, IntRange
from causalrope_sp.cli.profile_options import AS_JSON, PLOT, PROMPTS, SEEDS, check_causal
from causalrope_sp.cli.runtime import rank
from causalrope_sp.errors import ConfigError
from causalrope_sp.spatiotemporal.kinds import NAMES, kind_of

RULES = {"share": "mass", "weight": "search", "budget": "search"}  # the rule that an option belongs to


@click.command("profile-heads")
@PROMPTS
@click.option("--model", default="toybox", show_default=True, help="Measure this model: a name or a folder.")
@click.option("--frames", type=IntRange(1), default=81, show_default=True, help="Generate this many frames a video.")
@SEEDS
@click.option(
    "--rule",
    type=click.Choice(["mass", "search"]),
    default="mass",
    show_default=True,
    help="Choose heads by attention mass alone, or search with the error of the model's velocity.",
)
@click.option(
    "--share",
    type=FLOAT,
    default=0.8,
    show_default=True,
    help="With mass, shorten the window of a head whose newest frames have at least this share of the mass.",
)
@click.option(
    "--newest",
    type=IntRange(0, 4096),
    default=1,
    show_default=True,
    help="Let a head with a short window see the sink, this many frames before its chunk, and the chunk.",
)
@click.option(
    "--weight",
    type=FLOAT,
    default=0.5,
    show_default=True,
    help="With search, weigh the share of keys that heads see by this factor against the error.",
)
@click.option(
    "--budget",
    type=FLOAT,
    default=0.75,
    show_default=True,
    help="With search, end when heads see this share of the window's keys.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Write the windows to this file for --heads. The default is no file."
)
@PLOT
@AS_JSON
def profile_heads(
    prompts: tuple[str, ...],
    model: str,
    frames: int,
    seed: int,
    rule: str,
    share: float,
    newest: int,
    weight: float,
    budget: float,
    out: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Generates a video of each of PROMPTS and measures at which of the window's frames heads look in its last chunk.

    It proposes heads that need not see all of the window. Layer 0 keeps its whole window. Ranks share the work by
    gather-kv, whatever strategy the policy is used with.
    """
    from causalrope_sp.checks import check_number
    from causalrope_sp.distributed import SequenceParallel
    from causalrope_sp.heads import write_heads
    from causalrope_sp.io.report_files import check_files
    from causalrope_sp.pipeline.pipeline import CausalVideoPipeline
    from causalrope_sp.profiling import heads_report as report
    from causalrope_sp.profiling.heads import by_mass, static_window
    from causalrope_sp.profiling.heads import profile_heads as measure

    share = check_number("--share", share, least=0, most=1)
    weight, budget = check_number("--weight", weight, least=0), check_number("--budget", budget, least=0, most=1)
    for name, its_rule in RULES.items():
        given = click.get_current_context().get_parameter_source(name) is not ParameterSource.DEFAULT
        if given and rule != its_rule:
            raise ConfigError(f"--{name}: expected with --rule {its_rule} alone, got --rule {rule}")
    check_files(out, plot)
    if (kind := kind_of(model)) is not None:
        raise ConfigError(f"{NAMES[kind]} makes its video at once: it has no window")
    check_causal(model, "whose heads are not profiled")
    parallel = SequenceParallel.from_env("gather-kv")
    pipe = CausalVideoPipeline.from_pretrained(model, parallel=parallel)
    stream = replace(pipe.config.stream, similar_frames=None)  # all frames are measured
    pipe.config = replace(pipe.config, stream=stream)
    check_uncontrolled(model, pipe)
    static = static_window(pipe.config.stream, newest)
    search = (weight, budget) if rule == "search" else None
    shares, searched = measure(pipe, prompts, frames, seed, newest, search)
    policy = by_mass(shares, share, static) if searched is None else searched.policy
    parallel.close()
    if rank() != 0:
        return
    options = {"share": share} if searched is None else {"weight": weight, "budget": budget}
    notes = {"model": model, "rule": rule, **options}
    if out is not None:
        write_heads(policy, out, **notes)
    if plot is not None:
        report.plot(shares, policy, searched, plot)
    found = report.fields(shares, policy, searched, pipe.config.stream.window)
    click.echo(json.dumps(notes | found) if as_json else report.text(found))
