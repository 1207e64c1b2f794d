"""`causalrope-sp generate`: generates a video from options and writes it while it is generated."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from causalrope_sp.cli.generate_options import CALL, LOADING, RANKS, with_options
from causalrope_sp.cli.model_options import check_uncontrolled
from causalrope_sp.cli.options import parse_steps
from causalrope_sp.cli.preview import StepReporter, check_parallel_chunks
from causalrope_sp.cli.runtime import Background, Terminated, rank, ranks, set_up_logging, shares_rank_0_disk
from causalrope_sp.cli.threads import log_threads
from causalrope_sp.cli.whole_video import check_whole_video, whole_video_items
from causalrope_sp.errors import CausalRopeError, ConfigError, RankLostError, escaped_line
from causalrope_sp.io.video_writer import VideoWriter, check_alone, check_output
from causalrope_sp.pipeline.offload import Offload
from causalrope_sp.reuse import find_policy
from causalrope_sp.siblings import Siblings
from causalrope_sp.spatiotemporal.kinds import kind_of

if TYPE_CHECKING:
    from rich.progress import Progress

    from causalrope_sp.pipeline.pipeline import CausalVideoPipeline
    from causalrope_sp.pipeline.timings import Timings


@click.command()
@click.argument("prompt", required=False)
@with_options
def generate(
    prompt: str | None,
    text_embeds: str | None,
    model: str,
    out: str,
    timeout: float,
    as_json: bool,
    verbose: bool,
    log_file: str | None,
    **options: Any,
) -> None:
    """Makes a video from PROMPT, written while it is generated.

    --image and --video are scaled to cover the frame and cropped around the centre; a video is taken at the model's
    frame rate. With --strength the result is no longer than --video.
    """
    options["num_inference_steps"] = parse_steps(options.pop("steps"))
    whole_video = kind_of(model)
    if whole_video is not None:
        check_whole_video(whole_video, options)
    _check(model, prompt, text_embeds, out, options)
    if shares_rank_0_disk():
        check_output(out)
    if rank() == 0:
        check_alone(out)
    set_up_logging(verbose, log_file, silent=as_json)
    log_threads()
    parallel_chunks = options["parallel_chunks"] is not None

    def generated() -> Iterator[Any]:
        from causalrope_sp.devices import check_device
        from causalrope_sp.distributed import SequenceParallel
        from causalrope_sp.pipeline.load_options import LoadOptions
        from causalrope_sp.pipeline.pipeline import CausalVideoPipeline

        loading = None if whole_video else LoadOptions(**{name: options[name] for name in LOADING})
        parallel = SequenceParallel.from_env(
            device=None if options["device"] is None else check_device(options["device"]),
            timeout_s=timeout,
            silence_s=min(20.0, timeout),
            on_loss=lambda reason: background.fail(RankLostError(reason)),
            siblings=siblings,
            **{name: options[name] for name in RANKS},
        )
        if whole_video is not None:
            yield from whole_video_items(model, prompt, options, parallel)
        else:
            pipe = CausalVideoPipeline.from_pretrained(model, loading, parallel=parallel)
            _check_control(model, pipe, options["image"])
            yield pipe
            report = StepReporter(out, pipe.fps, as_json) if parallel_chunks else None
            call = {name: options[name] for name in CALL}
            yield from pipe.stream(prompt, prompt_embeds=text_embeds, callback_on_step_end=report, **call)
        parallel.close()

    siblings, background = Siblings(), Background(generated)
    with name_lost_rank(siblings):
        summary = _write_video(iter(background), out, options["num_frames"], silent=as_json)
    if rank() == 0:
        _print_summary(summary, out, as_json)


def _check(model: str, prompt: str | None, text_embeds: str | None, out: str, options: dict[str, Any]) -> None:
    """Raises ConfigError for wrong options before anything slow is imported, and completes the options."""
    from causalrope_sp.checks import check_whole

    if options["num_frames"] is not None:
        check_whole("--frames", options["num_frames"])
    given = click.get_current_context().get_parameter_source("num_frames") is not click.core.ParameterSource.DEFAULT
    if options.pop("endless"):
        if given:
            raise ConfigError("give either --frames or --endless, not both")
        options["num_frames"] = None
    _check_conditioning(options)
    parallel_chunks = options["parallel_chunks"] is not None
    others = {name: options[name] for name in ("reuse", "image", "video", "guidance_parallel", "decode_ranks")}
    check_parallel_chunks(parallel_chunks, out, options["chunk"], options["preview_every"], **others)
    options["chunk"] = options["chunk"] or (ranks() if parallel_chunks else 1)
    options["cfg"] = 2 if options["guidance_parallel"] else 1
    if options["reuse"] is not None:
        options["reuse"] = find_policy(options["reuse"])
    Offload.of(options["offload"])
    _check_text(model, prompt, text_embeds, options["negative_prompt"])
    if options["negative_prompt"] is not None and options["negative_prompt_embeds"] is not None:
        raise ConfigError("give either --negative-prompt or --negative-embeds, not both")


def _check_conditioning(options: dict[str, Any]) -> None:
    """Raises ConfigError for a wrong combination of --image, --video, --continue and --strength."""
    image, video = options["image"] is not None, options["video"] is not None
    keep_on, strength = options["keep_on"], options["strength"]
    if image and video:
        raise ConfigError("give either --image or --video, not both")
    if not video and (keep_on or strength is not None):
        raise ConfigError(f"{'--continue' if keep_on else '--strength'} needs a --video")
    if video and keep_on == (strength is not None):
        raise ConfigError("a video is either continued (--continue) or redrawn (--strength): say which one")
    if strength is not None and not 0 < strength <= 1:
        raise ConfigError(f"--strength must be above 0 and at most 1, not {strength}")


def _check_text(model: str, prompt: str | None, embeds: str | None, negative: str | None) -> None:
    """Checks the prompt and its embeddings. The grammar of toybox is checked before anything is loaded."""
    from causalrope_sp.toybox import EMBEDDED
    from causalrope_sp.toybox.prompts import parse_prompt

    if prompt is None and embeds is None:
        raise click.UsageError("Missing argument 'PROMPT', or --text-embeds.", click.get_current_context())
    if prompt is not None and embeds is not None:
        raise ConfigError("give either a prompt or --text-embeds, not both")
    for text in (prompt, negative):
        if text is not None and model in EMBEDDED:
            parse_prompt(text)


def _check_control(model: str, pipe: CausalVideoPipeline, image: str | None) -> None:
    """Raises ConfigError if the model takes a control, unless it is an image-to-video model that gets its image."""
    from causalrope_sp.pipeline.image_control import takes_image

    if not takes_image(pipe.model.config, pipe.codec):
        check_uncontrolled(model, pipe)
    elif image is None:
        raise ConfigError(f"--image: expected a picture, as {model} is an image-to-video model, got none")


def _write_video(items: Iterator[Any], out: str, frames: int | None, silent: bool) -> dict[str, Any]:
    """Takes the pipeline and then its chunks from `items`, writes the chunks on rank 0, and returns --json's fields."""
    from causalrope_sp.distributed.comm_stats import CommStats
    from causalrope_sp.pipeline.timings import quantiles

    pipe = next(items)
    size = pipe.height, pipe.width
    if shares_rank_0_disk():
        check_output(out, *size)
    started, first_frame_s, moved = time.perf_counter(), 0.0, CommStats()
    timings: list[Timings] = []
    with contextlib.ExitStack() as stack:
        video, progress = None, None
        if rank() == 0:
            video = VideoWriter(out, *size, pipe.fps)
            stack.enter_context(_report_kept_frames(video, frames))
            stack.enter_context(video)
            progress = stack.enter_context(_progress(silent))
            task = progress.add_task("generating", total=frames, fps=0.0)
        try:
            for chunk in items:
                first_frame_s = first_frame_s or time.perf_counter() - started
                timings.append(chunk.timings)
                moved.include(chunk.comm_stats)
                if video is None or progress is None:
                    continue
                video.write(chunk.frames)
                progress.update(task, completed=video.frames, fps=video.frames / (time.perf_counter() - started))
            if video is not None and progress is not None:
                progress.update(task, total=video.frames)  # a redrawn video may be shorter
        except Exception as error:
            pipe.parallel.fail(error)
            if video is not None and not isinstance(error, CausalRopeError):
                video.close()  # a lost rank or a fault of this program: the frames so far are valid
            raise
        seconds = time.perf_counter() - started
    written = video.frames if video is not None else 0
    return {
        "frames": written,
        "height": size[0],
        "width": size[1],
        "fps_generated": round(written / seconds, 3),
        "first_frame_s": round(first_frame_s, 4),
        "seconds": round(seconds, 4),
        "ranks": pipe.parallel.size,
        "strategy": pipe.strategy,
        "out": out,
        "chunks": [round(1000 * each.total, 2) for each in timings],
        "timings": quantiles(timings),
        "communication": moved.as_json(),
        "stored_bytes": moved.stored_bytes,
        "head_imbalance": round(moved.head_imbalance, 4),
    }


def _print_summary(summary: dict[str, Any], out: str, as_json: bool) -> None:
    """Prints the summary, on stderr if the video goes to stdout."""
    to_stderr = out == "-"
    if as_json:
        click.echo(json.dumps(summary), err=to_stderr)
        return
    size, took = f"{summary['width']}×{summary['height']}", f"{summary['seconds']:.1f} s"
    rate, first = f"{summary['fps_generated']:.1f} a second", f"the first after {summary['first_frame_s']:.2f} s"
    text = f"{out}: {summary['frames']} frames of {size} in {took} ({rate}, {first})"
    click.echo(escaped_line(text), err=to_stderr)


@contextlib.contextmanager
def name_lost_rank(siblings: Siblings) -> Iterator[None]:
    """Names the rank for which a launcher ends all others with SIGTERM. After Ctrl-C every rank ends by itself, in any
    order, and none is lost."""
    try:
        yield
    except Terminated:
        lost = siblings.lost()
        if (why := lost[1] if lost is not None else siblings.failed()) is not None:
            raise RankLostError(why) from None
        raise


@contextlib.contextmanager
def _report_kept_frames(video: VideoWriter, frames: int | None) -> Iterator[None]:
    """Prints how many frames the file has if the body is interrupted or fails."""
    of = "" if frames is None else f"of {frames} "
    try:
        yield
    except CausalRopeError as error:
        partial = video.partial
        if partial is not None and video.frames and partial not in str(error):
            click.echo(escaped_line(f"stopped: {video.frames} {of}frames are in {partial}"), err=True)
        raise
    except (KeyboardInterrupt, Exception):
        kept = f"{video.frames} {of}frames are in {video.path}" if video.frames else "no frame was made yet"
        click.echo(escaped_line(f"stopped: {kept}"), err=True)
        raise


def _progress(silent: bool) -> Progress:
    """A progress bar on stderr, which only a terminal shows."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("frames, {task.fields[fps]:.1f} fps,"),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
        console=console,
        disable=silent or not console.is_terminal,
    )
