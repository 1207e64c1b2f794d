"""The command line. Exit status: 0 done, 1 a check failed (or a fault of this program), 2 wrong input, 130 interrupted.

Under torchrun every rank runs the same command; rank 0 alone speaks, shows progress and writes the video.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from causalrope_sp.config import check_given
from causalrope_sp.errors import CausalRopeError, ConfigError, RankLostError
from causalrope_sp.process import Background, CommandLine, rank, run, say_choices, shares_rank_0_disk
from causalrope_sp.version import __version__
from causalrope_sp.video import VideoWriter, check_output

if TYPE_CHECKING:
    from rich.progress import Progress

    from causalrope_sp.verify import Check


EXISTING = click.Path(exists=True, path_type=Path)
EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.group(
    cls=CommandLine,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
@click.version_option(__version__, prog_name="causalrope-sp")
def cli() -> None:
    """Causal video diffusion, streamed, on one process or many.

    To use several: torchrun --standalone --nproc-per-node 2 -m causalrope_sp generate ...
    """


@cli.command()
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
@click.option(
    "--strategy", default="auto", show_default=True, help="auto, ulysses, gather-kv, shard-kv, ulysses2xgather-kv4, ..."
)
@click.option("--image", type=EXISTING_FILE, help="A picture that is the first frame.")
@click.option("--video", type=EXISTING_FILE, help="A video, to continue or to redraw.")
@click.option("--continue", "keep_on", is_flag=True, help="Make what comes after --video.")
@click.option("--strength", type=float, help="Redraw --video by this share of the steps: small changes little, 1 all.")
@click.option("--codec", type=click.Choice(["wan", "taehv"]), help="Which kind of codec (default: the model's).")
@click.option("--codec-weights", type=EXISTING, help="Its file or folder, in place of the model's.")
@click.option("--out", default="video.mp4", show_default=True, help="FILE.mp4, .gif, .webp, or FOLDER/ for PNGs.")
@click.option("--overlap/--no-overlap", default=True, help="Compute while other ranks' numbers are on their way.")
@click.option("--head-groups", default=1, show_default=True, help="ulysses: send one group's output during the next's.")
@click.option("--attention", default="auto", show_default=True, help="auto measures; or one library's name.")
@click.option("--timeout", default=600.0, show_default=True, help="Seconds for a stuck rank (a silent one has 20).")
@click.option("--json", "as_json", is_flag=True, help="No progress bar, and one line of JSON at the end.")
def generate(
    prompt: str | None,
    model: str,
    text_embeds: str | None,
    frames: int,
    seed: int,
    window: int | None,
    sink: int | None,
    rope: Literal["absolute", "relative"] | None,
    steps: str | None,
    strategy: str,
    image: Path | None,
    video: Path | None,
    keep_on: bool,
    strength: float | None,
    codec: str | None,
    codec_weights: Path | None,
    out: str,
    overlap: bool,
    head_groups: int,
    attention: str,
    timeout: float,
    as_json: bool,
) -> None:
    """Makes a video from PROMPT, written while it is generated.

    --image and --video are scaled to cover the model's size and cropped around the centre; a video is taken at the
    model's frame rate. With --strength the result is no longer than --video.
    """
    if frames < 1:
        raise ConfigError(f"frames must be at least 1, not {frames}")
    check_given(image is not None, video is not None, keep_on, strength)
    timesteps = _parse_steps(steps)
    _check_text(model, prompt, text_embeds)
    if shares_rank_0_disk():
        check_output(out)
    if not as_json:
        say_choices()

    def generated() -> Iterator[Any]:
        from causalrope_sp.parallel import SequenceParallel
        from causalrope_sp.pipeline import CausalVideoPipeline

        parallel = SequenceParallel.from_env(
            strategy,
            timeout_s=timeout,
            silence_s=min(20.0, timeout),
            on_loss=lambda said: made.fail(RankLostError(said)),
            overlap=overlap,
            head_groups=head_groups,
            attention=attention,
        )
        pipe = CausalVideoPipeline.from_pretrained(
            model,
            parallel=parallel,
            window=window,
            sink=sink,
            rope=rope,
            steps=timesteps,
            keep_text="free",
            codec=codec,
            codec_weights=codec_weights,
        )
        yield pipe
        yield from pipe.stream(
            prompt, frames=frames, seed=seed, embeds=text_embeds, image=image, video=video, strength=strength
        )
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


@cli.command()
@click.argument("prompt")
@click.option("--model", help="Whose text encoder: a model's name, its folder or its file (default: toybox).")
@click.option("--text", metavar="PATH", help="UMT5 itself: a diffusers folder, Wan's folder or its .pth.")
@click.option("--tokenizer", metavar="DIR", help="The tokenizer's folder, if it is not beside the weights.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="toybox: its places.")
@click.option("--out", default="prompt.safetensors", show_default=True, help="The file to write.")
@click.option("--json", "as_json", is_flag=True, help="One line of JSON.")
def encode(
    prompt: str, model: str | None, text: str | None, tokenizer: str | None, seed: int, out: str, as_json: bool
) -> None:
    """Writes the text embeddings of PROMPT, for generate --text-embeds on a machine without the encoder."""
    from causalrope_sp.encoding import encode_to_file

    if rank() != 0:
        return
    started = time.perf_counter()
    saved = encode_to_file(prompt, model, text, tokenizer, seed, out)
    took = time.perf_counter() - started
    if as_json:
        shape, dtype = list(saved.embeds.shape), str(saved.embeds.dtype).removeprefix("torch.")
        fields = {"prompt": saved.prompt, "encoder": saved.encoder, "length": saved.length, "shape": shape}
        click.echo(json.dumps({**fields, "dtype": dtype, "seconds": round(took, 4), "out": out}))
    else:
        click.echo(f"{out}: {saved.length} tokens of {saved.embeds.shape[-1]} numbers in {took:.1f} s")


@cli.command()
@click.argument("path")
@click.option("--part", help="Which model in the file: generator, generator_ema, ... (default: the averaged one).")
@click.option("--preset", help="How it runs: self-forcing, causvid, longlive-1.3b, ... (default: guessed).")
@click.option("--window", type=int, help="Latent frames that attention looks back over, in place of the preset's.")
@click.option("--sink", type=int, help="Latent frames of the very start that never leave the window.")
@click.option("--chunk-frames", type=int, help="Latent frames denoised together.")
@click.option("--steps", help="How many evenly spaced denoising steps (4), or which (1000,750,500,250).")
@click.option("--shift", type=float, help="Of the timesteps towards noise.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def inspect(path: str, part: str | None, preset: str | None, steps: str | None, as_json: bool, **run: Any) -> int:
    """Says what the checkpoint at PATH is, why, what it lacks, and how it would run.

    Exit status 1 if it could not be loaded as it is.
    """
    from causalrope_sp import inspection
    from causalrope_sp.schedule import timesteps

    parsed = _parse_steps(steps)
    changes = {name: value for name, value in run.items() if value is not None}
    changes |= {} if parsed is None else {"steps": timesteps(parsed)}
    report = inspection.inspect(path, part, preset, changes)
    if rank() == 0:
        click.echo(json.dumps(inspection.fields(report)) if as_json else inspection.text(report))
    return 1 if report.problem else 0


@cli.command()
@click.argument(
    "folder", metavar="[DIR]", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path)
)
@click.option("--ranks", default="1,2,3", show_default=True, help="How many processes to run each case on.")
@click.option("--strategy", default="all", show_default=True, help="all, or one strategy's name.")
@click.option("--dtype", type=click.Choice(["float64", "float32", "bfloat16"]), default="float64", show_default=True)
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option("--json", "as_json", is_flag=True, help="A list of objects: case, ranks, strategy, error, ok.")
def verify(folder: Path | None, ranks: str, strategy: str, dtype: str, device: str, as_json: bool) -> int:
    """Checks the numbers on this machine: the reference cases in DIR, or else small random models.

    Starts the processes itself. Exit status 1 if a check fails.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("verify starts its own processes: run it without torchrun")
    counts = _parse_ranks(ranks)
    import torch

    from causalrope_sp.verify import run_verification

    checks = run_verification(folder, counts, strategy, getattr(torch, dtype), device)
    if as_json:
        click.echo(json.dumps([_check_fields(check) for check in checks]))
    else:
        _print_table(checks)
    return 1 if any(check.ok is False for check in checks) else 0


@cli.command()
@click.option("--model", default="wan2.1-1.3b", show_default=True, help="wan2.1-1.3b, wan2.1-14b, toybox or a PATH.")
@click.option("--height", type=int, help="Pixels (default: the model's).")
@click.option("--width", type=int, help="Pixels.")
@click.option("--window", type=int, help="Latent frames that attention looks back over.")
@click.option("--sink", type=int, help="Latent frames of the very start that stay.")
@click.option("--chunk-frames", type=int, help="Latent frames denoised together.")
@click.option("--steps", type=int, help="Denoise passes a chunk.")
@click.option("--ranks", default=8, show_default=True, type=click.IntRange(1, 4096))
@click.option("--gpu", default="h100", show_default=True, help="Of each rank: h200, h100, a800, a100, l40s, ...")
@click.option("--link", default="nvlink", show_default=True, help="Between ranks: nvlink, pcie, infiniband, ...")
@click.option("--measured", type=click.Path(path_type=Path), help="A JSON file of rates that were measured.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draws fps and memory over 1 to 64 ranks into this file.")
@click.option("--json", "as_json", is_flag=True, help="A list, one object a strategy.")
def plan(
    model: str,
    height: int | None,
    width: int | None,
    window: int | None,
    sink: int | None,
    chunk_frames: int | None,
    steps: int | None,
    ranks: int,
    gpu: str,
    link: str,
    measured: Path | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Predicts, for every strategy, memory, bytes and time of a stream on RANKS ranks; nothing is run."""
    from causalrope_sp import planning
    from causalrope_sp.parallel import cost

    work = planning.describe_workload(model, height, width, window, sink, chunk_frames, steps)
    on = planning.describe_machine(gpu, link, measured)
    costs = cost.plan(work, ranks, on)
    if plot is not None:
        planning.plot_plan(work, on, plot)
    if as_json:
        click.echo(json.dumps([planning.fields(c) for c in costs]))
    else:
        planning.print_plan(work, costs, on)


def _write_video(items: Iterator[Any], out: str, frames: int, silent: bool) -> dict[str, Any]:
    """Takes the pipeline, then its chunks, as they come; writes them on rank 0; returns what --json prints."""
    from causalrope_sp.parallel.ledger import Ledger

    pipe = next(items)
    if shares_rank_0_disk():
        check_output(out, pipe.height, pipe.width)
    started, first_frame_s, chunk_ms, moved = time.perf_counter(), 0.0, list[float](), Ledger()
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
                moved.include(chunk.ledger)
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
        "strategy": pipe.parallel.in_use(pipe.model.config),
        "out": out,
        "chunks": chunk_ms,
        "communication": moved.as_json(),
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


def _check_text(model: str, prompt: str | None, embeds: str | None) -> None:
    """The toybox models know a closed list of words, which can be checked before anything is loaded."""
    from causalrope_sp.toybox import EMBEDDED
    from causalrope_sp.toybox.prompts import parse_prompt

    if prompt is None and embeds is None:
        raise click.UsageError("Missing argument 'PROMPT', or --text-embeds.", click.get_current_context())
    if prompt is not None and embeds is not None:
        raise ConfigError("give either a prompt or --text-embeds, not both")
    if prompt is not None and model in EMBEDDED:
        parse_prompt(prompt)


def _parse_steps(text: str | None) -> int | tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(word) for word in text.split(",")) if "," in text else int(text)
    except ValueError:
        raise ConfigError(f"--steps takes a count or a list like 1000,750,500,250, not {text!r}") from None


def _parse_ranks(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError(f"--ranks takes numbers of processes like 1,2,3, not {text!r}") from None


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


def _check_fields(check: Check) -> dict[str, Any]:
    error = check.error if check.error is not None and math.isfinite(check.error) else None  # JSON has no NaN
    return {"case": check.case, "ranks": check.ranks, "strategy": check.strategy, "error": error, "ok": check.ok}


def _print_table(checks: list[Check]) -> None:
    from rich.console import Console
    from rich.table import Table

    verdicts = {True: "[green]ok[/]", False: "[bold red]FAILED[/]", None: "[yellow]skipped[/]"}
    table = Table("case", "ranks", "strategy", "relative error", "verdict", "")
    for check in checks:
        error = "" if check.error is None else f"{check.error:.2e}"
        table.add_row(check.case, str(check.ranks), check.strategy, error, verdicts[check.ok], check.note)
    console = Console()
    console.print(table)
    console.print(f"{sum(check.ok is True for check in checks)} of {len(checks)} checks passed", highlight=False)


def main() -> None:
    """The entry point."""
    run(cli)
