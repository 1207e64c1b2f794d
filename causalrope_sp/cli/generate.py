"""`causalrope-sp generate`: options to a stream, and the stream to a file."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from causalrope_sp.cli.options import parse_steps
from causalrope_sp.cli.preview import Watching, check_parallel_chunks
from causalrope_sp.cli.runtime import Background, rank, ranks, say_choices, shares_rank_0_disk
from causalrope_sp.config import Solver, check_conditioning, check_negative
from causalrope_sp.errors import CausalRopeError, ConfigError, RankLostError
from causalrope_sp.io.video_writer import VideoWriter, check_output
from causalrope_sp.pipeline.offload import Offload
from causalrope_sp.reuse import find_policy

if TYPE_CHECKING:
    from rich.progress import Progress

EXISTING = click.Path(exists=True, path_type=Path)
EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
# which options go where: to the ranks, to the model, to the stream
RANKS = ("strategy", "cfg", "chunk", "decode_ranks", "overlap", "head_groups", "attention")
MODEL = (
    *("window", "sink", "rope", "solver", "shift", "guidance", "guidance_interval"),
    *("weights", "offload", "codec", "codec_weights", "decode", "preflight", "parallel_chunks"),
)
STREAM = ("frames", "seed", "negative_prompt", "negative_embeds", "image", "video", "strength", "reuse")


@click.command()
@click.argument("prompt", required=False)
@click.option("--model", default="toybox", show_default=True, help="A model's name, its folder or its file.")
@click.option("--text-embeds", metavar="FILE", help="In place of PROMPT: its embeddings, written by encode.")
@click.option("--frames", type=int, default=81, show_default=True, help="Pixel frames.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
@click.option("--window", type=int, help="Latent frames that attention looks back over, the current chunk included.")
@click.option("--sink", type=int, help="Latent frames of the very start that never leave the window.")
@click.option(
    "--rope",
    type=click.Choice(["absolute", "relative"]),
    help="Where a frame stands in time: at its number since the stream began, or at its place in the window.",
)
@click.option("--steps", help="How many evenly spaced denoising steps (4), or which (1000,750,500,250).")
@click.option("--solver", type=click.Choice(get_args(Solver)), help="What leads from step to step.")
@click.option("--shift", type=float, help="Of the timesteps towards noise.")
@click.option("--guidance", type=float, help="The scale that leads away from a negative prompt; 1 is none.")
@click.option("--guidance-interval", type=(float, float), help="Guide at timesteps within these two (0 1000) alone.")
@click.option("--negative-prompt", help="What guidance leads away from (default: no text).")
@click.option("--negative-embeds", metavar="FILE", help="In its place: its embeddings, written by encode.")
@click.option("--guidance-parallel", is_flag=True, help="One half of the ranks for each of guidance's two branches.")
@click.option(
    "--strategy", default="auto", show_default=True, help="auto, ulysses, gather-kv, shard-kv, ulysses2xgather-kv4, ..."
)
@click.option(
    "--parallel-chunks", type=click.Choice(["vin"]), help="Make all chunks at once, by the model's interface network."
)
@click.option(
    "--chunk-parallel",
    "chunk",
    type=int,
    help="With it, how many groups of ranks share the chunks (default: all ranks).",
)
@click.option("--preview-every", type=int, help="With it, write what the video looks to become every so many steps.")
@click.option("--image", type=EXISTING_FILE, help="A picture that is the first frame.")
@click.option("--video", type=EXISTING_FILE, help="A video, to continue or to redraw.")
@click.option("--continue", "keep_on", is_flag=True, help="Make what comes after --video.")
@click.option("--strength", type=float, help="Redraw --video by this share of the steps: small changes little, 1 all.")
@click.option("--reuse", help="Attention reused between steps: pab:PRESET, such as pab:latte, or a FILE.")
@click.option("--codec", type=click.Choice(["wan", "taehv"]), help="Which kind of codec (default: the model's).")
@click.option("--codec-weights", type=EXISTING, help="Its file or folder, in place of the model's.")
@click.option(
    "--decode",
    type=click.Choice(["inline", "overlap", "together"]),
    default="inline",
    show_default=True,
    help="Rank 0 before the next chunk is made, or while it is; or all ranks together.",
)
@click.option(
    "--decode-ranks",
    "decode_ranks",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Of the ranks, how many only decode, while the others make the next chunk.",
)
@click.option("--weights", type=click.Choice(["full", "fp8"]), help="fp8: the blocks' matrices in 8 bits.")
@click.option(
    "--offload",
    multiple=True,
    default=["text"],
    show_default=True,
    metavar="text|codec|none",
    help="What is on the device only while it is used.",
)
@click.option("--preflight/--no-preflight", default=True, help="Refuse at once what is predicted not to fit.")
@click.option("--out", default="video.mp4", show_default=True, help="FILE.mp4, .gif, .webp, or FOLDER/ for PNGs.")
@click.option("--overlap/--no-overlap", default=True, help="Compute while other ranks' numbers are on their way.")
@click.option("--head-groups", default=1, show_default=True, help="ulysses: send one group's output during the next's.")
@click.option("--attention", default="auto", show_default=True, help="auto measures; or one library's name.")
@click.option("--timeout", default=600.0, show_default=True, help="Seconds for a stuck rank (a silent one has 20).")
@click.option("--json", "as_json", is_flag=True, help="No progress bar, and one line of JSON at the end.")
def generate(
    prompt: str | None, text_embeds: str | None, model: str, out: str, timeout: float, as_json: bool, **options: Any
) -> None:
    """Makes a video from PROMPT, written while it is generated.

    --image and --video are scaled to cover the model's size and cropped around the centre; a video is taken at the
    model's frame rate. With --strength the result is no longer than --video.
    """
    frames, picture, video = (options[name] for name in ("frames", "image", "video"))
    if frames < 1:
        raise ConfigError(f"frames must be at least 1, not {frames}")
    check_conditioning(picture is not None, video is not None, options["keep_on"], options["strength"])
    steps = parse_steps(options["steps"])
    together = options["parallel_chunks"] is not None
    others = {name: options[name] for name in ("reuse", "image", "video", "guidance_parallel")}
    others["decode_ranks"] = options["decode_ranks"]
    check_parallel_chunks(together, out, options["chunk"], options["preview_every"], **others)
    options["chunk"] = options["chunk"] or (ranks() if together else 1)
    options["cfg"] = 2 if options["guidance_parallel"] else 1
    if options["reuse"] is not None:
        options["reuse"] = find_policy(options["reuse"])
    Offload.of(options["offload"])  # wrong words are said before anything is imported
    negative = options["negative_prompt"]
    _check_text(model, prompt, text_embeds, negative)
    check_negative(negative is not None, options["negative_embeds"] is not None, guided=True)  # known with the recipe
    if shares_rank_0_disk():
        check_output(out)
    if not as_json:
        say_choices()

    def generated() -> Iterator[Any]:
        from causalrope_sp.distributed import SequenceParallel
        from causalrope_sp.pipeline.parallel_chunks import Watch
        from causalrope_sp.pipeline.pipeline import CausalVideoPipeline

        parallel = SequenceParallel.from_env(
            timeout_s=timeout,
            silence_s=min(20.0, timeout),
            on_loss=lambda said: made.fail(RankLostError(said)),
            **{name: options[name] for name in RANKS},
        )
        pipe = CausalVideoPipeline.from_pretrained(
            model, parallel=parallel, steps=steps, **{name: options[name] for name in MODEL}
        )
        yield pipe
        watch = Watch(Watching(out, pipe.fps, as_json), options["preview_every"]) if together else None
        yield from pipe.stream(prompt, embeds=text_embeds, watch=watch, **{name: options[name] for name in STREAM})
        parallel.close()

    made = Background(generated)
    summary = _write_video(iter(made), out, frames, silent=as_json)
    if rank() != 0:
        return
    if as_json:
        click.echo(json.dumps(summary))
    else:
        size, took = f"{summary['width']}×{summary['height']}", f"{summary['seconds']:.1f} s"
        rate, first = f"{summary['fps_generated']:.1f} a second", f"the first after {summary['first_frame_s']:.2f} s"
        click.echo(f"{out}: {summary['frames']} frames of {size} in {took} ({rate}, {first})")


def _write_video(items: Iterator[Any], out: str, frames: int, silent: bool) -> dict[str, Any]:
    """Takes the pipeline, then its chunks, as they come; writes them on rank 0; returns what --json prints."""
    from causalrope_sp.distributed.comm_stats import CommStats

    pipe = next(items)
    if shares_rank_0_disk():
        check_output(out, pipe.height, pipe.width)
    started, first_frame_s, chunk_ms, moved = time.perf_counter(), 0.0, list[float](), CommStats()
    with contextlib.ExitStack() as stack:
        video, progress = None, None
        if rank() == 0:
            video = VideoWriter(out, pipe.height, pipe.width, pipe.fps)
            stack.enter_context(_saying_what_was_kept(video, frames))
            stack.enter_context(video)
            progress = stack.enter_context(_progress(silent))
            task = progress.add_task("generating", total=frames, fps=0.0)
        try:
            for chunk in items:
                first_frame_s = first_frame_s or time.perf_counter() - started
                chunk_ms.append(round(1000 * chunk.seconds, 2))
                moved.include(chunk.comm_stats)
                if video is None or progress is None:
                    continue
                video.write(chunk.frames)
                progress.update(task, completed=video.frames, fps=video.frames / (time.perf_counter() - started))
            if video is not None and progress is not None:
                progress.update(task, total=video.frames)  # a video that is redrawn may be shorter
        except Exception as error:
            if video is not None and not isinstance(error, CausalRopeError):
                video.close()  # another rank is lost, or this program is at fault: the frames so far are still good
            raise
        seconds = time.perf_counter() - started
    done = video.frames if video is not None else 0
    return {
        "frames": done,
        "height": pipe.height,
        "width": pipe.width,
        "fps_generated": round(done / seconds, 3),
        "first_frame_s": round(first_frame_s, 4),
        "seconds": round(seconds, 4),
        "ranks": pipe.parallel.size,
        "strategy": pipe.strategy,
        "out": out,
        "chunks": chunk_ms,
        "communication": moved.as_json(),
        "stored_bytes": moved.stored_bytes,
    }


@contextlib.contextmanager
def _saying_what_was_kept(video: VideoWriter, frames: int) -> Iterator[None]:
    try:
        yield
    except CausalRopeError:
        raise
    except (KeyboardInterrupt, Exception):
        kept = f"{video.frames} of {frames} frames are in {video.path}" if video.frames else "no frame was made yet"
        click.echo(f"stopped: {kept}", err=True)
        raise


def _check_text(model: str, prompt: str | None, embeds: str | None, negative: str | None) -> None:
    """The toybox models know a closed list of words, which can be checked before anything is loaded."""
    from causalrope_sp.toybox import EMBEDDED
    from causalrope_sp.toybox.prompts import parse_prompt

    if prompt is None and embeds is None:
        raise click.UsageError("Missing argument 'PROMPT', or --text-embeds.", click.get_current_context())
    if prompt is not None and embeds is not None:
        raise ConfigError("give either a prompt or --text-embeds, not both")
    for text in (prompt, negative):
        if text is not None and model in EMBEDDED:
            parse_prompt(text)


def _progress(silent: bool) -> Progress:
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
