"""`causalrope-sp compress` and `decompress`: a video as the bits that a causal model needs to draw it again."""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from causalrope_sp.cli.generate import generate
from causalrope_sp.cli.numbers import FLOAT, SEED, IntRange
from causalrope_sp.cli.options import parse_steps
from causalrope_sp.cli.runtime import rank, set_up_logging
from causalrope_sp.errors import ConfigError, InputError, escaped_line
from causalrope_sp.io.output_files import check_replaceable
from causalrope_sp.io.video_writer import VideoWriter, check_alone, check_output
from causalrope_sp.io.whole_files import whole_file

if TYPE_CHECKING:
    from causalrope_sp.pipeline.pipeline import CausalVideoPipeline

OF_THE_MODEL = ("loras", "base", "preset", "revision", "codec", "codec_weights", "offload", "preflight")
OF_THE_STREAM = ("height", "width", "window", "sink", "chunk_frames", "num_inference_steps", "shift", "rope")
RANKS = ("strategy", "attention")
_MODEL_OPTIONS = {*OF_THE_MODEL, *RANKS, "model", "device", "dtype", "timeout"}
LARGEST_FILE = 1 << 32  # bytes of a compressed video


def _options(names: set[str]) -> list[click.Parameter]:
    return [option for option in generate.params if option.name in names]


@click.command(params=_options({*_MODEL_OPTIONS, *OF_THE_STREAM, "steps"}))
@click.argument("video", type=click.Path(exists=True, dir_okay=False))
@click.argument("out", type=click.Path(dir_okay=False))
@click.option(
    "--prompt",
    required=True,
    help="Tell the model what the video shows; the text is sent too. auto finds it, for scenes of toybox.",
)
@click.option(
    "--rate",
    type=FLOAT,
    show_default="0.03",
    help="Weigh bits against error by this much: smaller values give more bits and less error.",
)
@click.option(
    "--bpp", type=FLOAT, help="Keep to this many bits a pixel, in place of --rate; header and residual are not counted."
)
@click.option(
    "--bits",
    "most",
    type=IntRange(0),
    default=32,
    show_default=True,
    help="Add up at most this many atoms a latent frame and step, a power of two.",
)
@click.option(
    "--atoms", type=IntRange(2), default=1024, show_default=True, help="Choose from this many atoms, a power of two."
)
@click.option(
    "--refresh",
    type=IntRange(0),
    default=0,
    show_default=True,
    help="Forget what was before every so many chunks, so that a loss ends there; 0 never does.",
)
@click.option(
    "--residual",
    type=FLOAT,
    default=0.0,
    show_default=True,
    help="Send the latents' residual too, in steps of this size; 0 does not.",
)
@click.option("--exact", is_flag=True, help="Compute in float64 on the CPU, here and in decompress.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Draw the atoms from this seed.")
@click.option(
    "--text-seed", type=SEED, default=0, show_default=True, help="Draw what a toybox prompt leaves open from this seed."
)
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON. The default is a line of text.")
def compress(video: str, out: str, prompt: str, as_json: bool, **options: Any) -> None:
    """Compresses VIDEO to OUT with a causal video model as the prior.

    VIDEO is scaled to cover the model's frame, cropped around the centre, and taken at the model's frame rate.
    """
    from causalrope_sp.compression.coding import EncodingOptions

    chosen = EncodingOptions(**{each.name: options.pop(each.name) for each in fields(EncodingOptions)})
    options["num_inference_steps"] = parse_steps(options.pop("steps"))
    check_replaceable(out)
    if out == "-" or (Path(out).exists() and os.path.samefile(video, out)):
        raise ConfigError(f"OUT must be a file other than VIDEO, not {out}")
    pipe = _load(chosen.exact, {name: options.pop(name) for name in OF_THE_STREAM}, **options)
    from causalrope_sp.compression.auto_prompt import find_prompt
    from causalrope_sp.compression.coding import encode

    prompt = find_prompt(pipe, video) if prompt == "auto" else prompt
    started, packets = time.perf_counter(), 0
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(whole_file(out)) if rank() == 0 else None
        sent = 0
        for packet in encode(pipe, video, prompt, chosen):
            packets, sent = packets + 1, sent + len(packet)
            if file is not None:
                file.write(packet)
    pipe.parallel.close()
    said = {"bytes": sent, "chunks": packets - 1, "seconds": round(time.perf_counter() - started, 3), "out": out}
    _print(said | {"prompt": prompt}, f"{out}: {sent} bytes, {packets - 1} chunks, {prompt!r}", as_json)


@click.command(params=_options(_MODEL_OPTIONS))
@click.argument("compressed", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON. The default is a line of text.")
def decompress(compressed: Path, out: str, as_json: bool, **options: Any) -> None:
    """Decompresses COMPRESSED, which `compress` has made, to the video OUT."""
    from causalrope_sp.compression.bitstream import Header, split

    if compressed.stat().st_size > LARGEST_FILE:
        raise InputError(
            f"{compressed} has {compressed.stat().st_size} bytes, and a compressed video has at most {LARGEST_FILE}"
        )
    data = compressed.read_bytes()
    header, _ = Header.read(data)
    picture = header.height, header.width
    check_output(out, *picture)
    if rank() == 0:
        check_alone(out)
    as_encoded = {"height": header.height, "width": header.width, "weights": header.weights}
    pipe = _load(header.exact, as_encoded, **options)
    from causalrope_sp.compression.coding import decode

    started, frames, chunks, failure = time.perf_counter(), 0, 0, None
    lost: list[int] = []
    with contextlib.ExitStack() as stack:
        video = stack.enter_context(VideoWriter(out, *picture, header.fps)) if rank() == 0 else None
        try:
            for chunk in decode(pipe, split(data)):
                chunks, lost = chunks + 1, lost + [chunk.index] * chunk.lost
                if video is not None and chunk.frames is not None:
                    video.write(chunk.frames)
                    frames += len(chunk.frames)
        except InputError as error:  # what came before is kept
            if not chunks:
                raise
            failure = error
    pipe.parallel.close()
    said = {"frames": frames, "lost": lost, "seconds": round(time.perf_counter() - started, 3), "out": out}
    named = f"; lost or damaged: chunk {', '.join(map(str, lost))}" if lost else ""
    _print(said, f"{out}: {frames} frames in {said['seconds']} s{named}", as_json)
    if failure is not None:
        raise failure


def _load(
    exact: bool,
    stream: dict[str, Any],
    *,
    model: str,
    device: str | None,
    dtype: str | None,
    timeout: float,
    **options: Any,
) -> CausalVideoPipeline:
    """Loads the model."""
    for name, value, only in (("--device", device, "cpu"), ("--dtype", dtype, "float64")):
        if exact and value not in (None, only):
            raise ConfigError(f"--exact computes in float64 on the cpu: {name} must be {only}, not {value}")
    set_up_logging()
    from causalrope_sp.devices import check_device
    from causalrope_sp.distributed import SequenceParallel
    from causalrope_sp.pipeline.load_options import LoadOptions
    from causalrope_sp.pipeline.pipeline import CausalVideoPipeline

    device, dtype = ("cpu", "float64") if exact else (device, dtype)
    parallel = SequenceParallel.from_env(
        device=None if device is None else check_device(device),
        timeout_s=timeout,
        silence_s=min(20.0, timeout),
        **{name: options.pop(name) for name in RANKS},
    )
    return CausalVideoPipeline.from_pretrained(model, LoadOptions(dtype=dtype, **stream, **options), parallel=parallel)


def _print(said: dict[str, Any], text: str, as_json: bool) -> None:
    if rank() == 0:
        click.echo(json.dumps(said) if as_json else escaped_line(text))
