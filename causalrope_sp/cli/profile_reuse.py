"""`causalrope-sp profile-reuse`: measures how much attention outputs change between denoising steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from causalrope_sp.cli.model_options import check_uncontrolled
from causalrope_sp.cli.numbers import FLOAT, IntRange
from causalrope_sp.cli.options import parse_steps
from causalrope_sp.cli.profile_options import AS_JSON, PLOT, PROMPTS, SEEDS, check_causal
from causalrope_sp.cli.runtime import rank
from causalrope_sp.cli.whole_video import check_whole_video
from causalrope_sp.spatiotemporal.kinds import kind_of


@click.command("profile-reuse")
@PROMPTS
@click.option("--model", default="toybox-flow", show_default=True, help="Measure this model: a name or a folder.")
@click.option("--frames", type=IntRange(1), default=33, show_default=True, help="Generate this many frames a video.")
@SEEDS
@click.option(
    "--steps",
    help="Use this many evenly spaced steps (16), or these timesteps (1000,750,...). The default is the model's.",
)
@click.option(
    "--bound",
    type=FLOAT,
    default=0.1,
    show_default=True,
    help="Allow a reused output to differ by at most this relative difference.",
)
@click.option(
    "--max-range",
    type=IntRange(2, 64),
    default=6,
    show_default=True,
    help="Propose to compute an output at least once in this many steps.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Write the proposed ranges to this file as a policy for --reuse. The default is no file.",
)
@PLOT
@AS_JSON
def profile_reuse(
    prompts: tuple[str, ...],
    model: str,
    frames: int,
    seed: int,
    steps: str | None,
    bound: float,
    max_range: int,
    out: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Generates a video of each of PROMPTS and measures how much attention outputs change between denoising steps.

    For each kind of output it proposes how often to compute it, so that no reused output differs by more than --bound.
    """
    from causalrope_sp.distributed import SequenceParallel
    from causalrope_sp.io.report_files import check_files
    from causalrope_sp.pipeline.pipeline import CausalVideoPipeline
    from causalrope_sp.profiling import profile_report as report
    from causalrope_sp.profiling.outputs import check_bound, propose, recording
    from causalrope_sp.reuse import write_policy
    from causalrope_sp.reuse.policy import CAUSAL_KINDS
    from causalrope_sp.spatiotemporal.opening import open_video_pipeline
    from causalrope_sp.spatiotemporal.video_pipeline import VideoOptions

    check_bound(bound)
    check_files(out, plot)
    whole_video = kind_of(model)
    options = {"frames": frames}
    if whole_video is not None:
        check_whole_video(whole_video, options, "frames")
    else:
        check_causal(model)
    parallel = SequenceParallel.from_env()
    if whole_video is not None:
        video_options = VideoOptions(num_inference_steps=parse_steps(steps))  # type: ignore[arg-type]  # refuses lists
        pipe: Any = open_video_pipeline(model, video_options, parallel)
        layers, kinds = len(pipe.model.spatial), pipe.model.kinds
    else:
        pipe = CausalVideoPipeline.from_pretrained(model, parallel=parallel, num_inference_steps=parse_steps(steps))
        check_uncontrolled(model, pipe)
        layers, kinds = pipe.model.config.num_layers, CAUSAL_KINDS
    with recording(pipe.model, max_range - 1) as recorder:
        for number, prompt in enumerate(prompts):
            recorder.forget_streams()
            for _ in pipe.stream(prompt, num_frames=options["frames"], seed=seed + number):
                pass
    profile = recorder.profile(layers, parallel, kinds)
    policy = propose(profile, bound)
    parallel.close()
    if rank() != 0:
        return
    if out is not None:
        write_policy(policy, out, model=model, bound=bound, timesteps=profile.timesteps)
    if plot is not None:
        report.plot(profile, plot)
    found = profile, policy, bound
    click.echo(json.dumps(report.fields(*found)) if as_json else report.text(*found))
