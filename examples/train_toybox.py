"""Trains toybox from rendered scenes alone: codec, decoder, DiT, and the decoder once more.

    python examples/train_toybox.py --out runs/toybox
    torchrun --standalone --nproc-per-node 2 examples/train_toybox.py --out runs/toybox

Every stage keeps its checkpoint and its log (codec.jsonl, decoder.jsonl, dit.jsonl) in --out, and a further call with
the same --out goes on from them. The stages that are counted in minutes count them anew. To train the DiT for longer
after it has ended, copy dit-plateau.pt, from before its learning rate fell, over dit.pt. Encoded scenes are kept there
too: 24576 of them take half an hour of a core and 1.2 GB, 8192 changes ten minutes and 0.5 GB.

At the end the folder weights in --out is a model that `generate` opens, and curves.png has the curves of the logs
(`pip install '.[dev]'` brings matplotlib). It all takes hours on two CPU cores. One DiT samples in four steps (toybox)
or in sixteen (toybox-flow). The decoder is trained twice after the rest of the codec, which changes no latent: on
rendered scenes, and on what the DiT makes of them. The shipped weights were made in many such calls, whose settings
benchmarks/LOG.md has.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import click
import matplotlib
import torch
from matplotlib import pyplot
from toybox_training.codec import channel_weights, save_codec, save_decoder, train_codec, tune_decoder, wan_codec
from toybox_training.dit import CONFIG, SAMPLER, TeacherForcing, new_model
from toybox_training.kept import check_count, fingerprint
from toybox_training.latents import SCENE_SEED, SIZE, encode_changes, encode_scenes, held_out_scenes
from toybox_training.made import make_videos
from toybox_training.stages import DiTTraining
from toybox_training.training import (
    check_codec,
    device_of,
    finite,
    join_processes,
    make_folder,
    rank,
    wait_for_all,
)

from causalrope_sp import CheckpointError
from causalrope_sp.codec.wan_vae_model import WanVae
from causalrope_sp.config import SamplerConfig
from causalrope_sp.grid import LatentGrid
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.toybox import WEIGHTS
from causalrope_sp.weights import load_model, save_model

CHANGE_SEED = 77_000_000
MADE, MADE_BY_FLOW = 160, 64  # the videos that the decoder learns from, in four steps and in sixteen
matplotlib.use("Agg")

MEASURED = {"codec": "PSNR, dB", "decoder": "mean absolute error", "dit": "mean square error of the velocity"}
FLOW_SAMPLER = SamplerConfig(steps=tuple(62.5 * n for n in range(16, 0, -1)), shift=1.0, solver="euler")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False, writable=True),
    default=Path("runs/toybox"),
    show_default=True,
    help="The folder of everything that is made.",
)
@click.option(
    "--init",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A folder of weights, such as the shipped one: its codec is taken, and its DiT is where this one starts. Give "
    "it again at every further call with the same --out.",
)
@click.option(
    "--device",
    default="cuda" if torch.cuda.is_available() else "cpu",
    show_default=True,
    help="The device: cpu, or cuda where there is a GPU.",
)
@click.option(
    "--codec-steps",
    default=3600,
    show_default=True,
    type=click.IntRange(1),
    help="The steps of the codec's schedule; without --init.",
)
@click.option(
    "--codec-stop",
    default=1500,
    show_default=True,
    type=click.IntRange(1),
    help="The step at which the codec's training ends; without --init.",
)
@click.option(
    "--dit-minutes",
    default=90.0,
    type=click.FloatRange(0),
    callback=finite,
    show_default=True,
    help="How long the DiT trains; 0 for not at all. The first steps compile, on a CPU for up to a minute each; a step "
    "that has begun is ended.",
)
@click.option(
    "--batch",
    default=1,
    type=click.IntRange(1),
    show_default=True,
    help="How many times as many videos a step learns from: 1 suits a CPU (12 first chunks, and later ones of 5 to 10 "
    "videos), more a GPU.",
)
@click.option(
    "--decoder-minutes",
    default=20.0,
    type=click.FloatRange(0),
    callback=finite,
    show_default=True,
    help="How long the decoder trains on scenes; 0 for not at all.",
)
@click.option(
    "--made-minutes",
    default=36.0,
    type=click.FloatRange(0),
    callback=finite,
    show_default=True,
    help="How long the decoder trains on the DiT's videos; 0 for not at all.",
)
@click.option("--scenes", "count", default=24576, show_default=True, help="The number of scenes to render and encode.")
@click.option(
    "--changes", default=8192, show_default=True, help="The number of scenes in which the text changes on the way."
)
def main(
    out: Path,
    init: Path | None,
    device: str,
    codec_steps: int,
    codec_stop: int,
    dit_minutes: float,
    batch: int,
    decoder_minutes: float,
    made_minutes: float,
    count: int,
    changes: int,
) -> None:
    """Trains toybox: codec, DiT, and the decoder once more. It goes on from what --out holds; see the file."""
    on = device_of(device)
    join_processes(on)
    check_count("--scenes", count)
    check_count("--changes", changes)
    if init is None and codec_stop > codec_steps:
        raise click.UsageError(f"--codec-stop: expected at most --codec-steps, {codec_steps}, not {codec_stop}")
    if (out / "dit.pt").exists() and (init is None) != (out / "codec.pt").exists():
        began = "the folder that it began with" if init is None else "none, as it began"
        raise click.UsageError(
            f"--init: the DiT of {out} was trained on another codec: expected {began}, or give another --out"
        )
    model, rate = first_dit(init)
    make_folder(out)
    weights = out / "weights"
    codec = first_codec(out, init, codec_steps, codec_stop, on)
    codec = tune_decoder(out / "decoder.pt", codec, decoder_minutes, 1.5e-3)
    save_decoder(codec, weights / "codec")
    scenes = encode_scenes(codec, out / "scenes", count, SCENE_SEED)
    held_out = held_out_scenes(codec, out / "held_out")

    grid = LatentGrid.from_pixels(SIZE, SIZE, codec.config.scale_factor_spatial)
    weights_C = channel_weights(codec, held_out.latents[:8, :6].float())
    changed = encode_changes(codec, out / "changes", changes, CHANGE_SEED)
    data = scenes.to(on), held_out.to(on), changed.to(on)
    training = DiTTraining(TeacherForcing(grid, on), *data, weights_C, batch)
    encoder = fingerprint(*codec.encoder.parameters())
    dit = training.train(out / "dit.pt", model, dit_minutes, rate, encoder)
    if rank() == 0:
        save_model(copy.deepcopy(dit).to(torch.bfloat16), weights / "toybox.safetensors")
    if made_minutes:
        made = make_videos(out / "made.pt", [(dit, SAMPLER, MADE), (dit, FLOW_SAMPLER, MADE_BY_FLOW)], scenes, grid)
        save_decoder(tune_decoder(out / "decoder.pt", codec, made_minutes, 1.2e-3, made), weights / "codec")
    if rank() == 0:
        shutil.copy(WEIGHTS / "toybox.json", weights / "pipeline.json")
        plot(out)
        print(f'causalrope-sp generate "a red circle bounces" --model {weights} --out a.mp4')


def first_dit(init: Path | None) -> tuple[CausalDiT, float]:
    """Returns the DiT that a training starts from, and its highest learning rate: a lower one for a trained DiT, which
    a high one would undo."""
    if init is None:
        return new_model(), 3e-3
    try:
        model = load_model(init / "toybox.safetensors", dtype=torch.float32)
    except CheckpointError as error:
        raise click.UsageError(f"--init: {error}") from error
    if model.config != CONFIG:
        raise click.UsageError(f"--init: {init / 'toybox.safetensors'} has not the sizes of toybox's DiT")
    return model, 1.2e-3


def first_codec(out: Path, init: Path | None, steps: int, stop: int, device: torch.device) -> WanVae:
    """Takes the codec of `init`, or trains one, writes it to the folder weights and reads it there. A codec that a
    decoder or a DiT in `out` has learned from is not trained on; another one is refused."""
    weights, learned = out / "weights", [path for path in (out / "decoder.pt", out / "dit.pt") if path.exists()]
    if init is not None:
        codec = wan_codec(init, device)
        check_codec(learned, fingerprint(*codec.encoder.parameters()))
        return codec
    if learned:
        print(f"the codec of {out} stays as it is, since {learned[0].name} was trained on it", flush=True)
    trained = train_codec(out / "codec.pt", steps, 0 if learned else stop, device).eval()
    if rank() == 0:
        save_codec(trained, weights / "codec")
    wait_for_all()
    codec = wan_codec(weights, device)
    wait_for_all()  # before the decoder is written anew
    return codec


def plot(out: Path) -> None:
    """The curves of the stages that were run here, side by side, from their logs."""
    stages = [stage for stage in ("codec", "decoder", "dit") if (out / f"{stage}.jsonl").exists()]
    if not stages:
        return
    figure, axes = pyplot.subplots(
        1, len(stages), figsize=(4 * len(stages), 3.2), constrained_layout=True, squeeze=False
    )
    for axis, stage in zip(axes[0], stages, strict=True):
        lines = [json.loads(line) for line in (out / f"{stage}.jsonl").read_text().splitlines()]
        for name in sorted({name for line in lines for name in line} - {"step", "seconds", "loss"}):
            seen = [line for line in lines if name in line]
            axis.plot(
                [line["step"] for line in seen], [line[name] for line in seen], label=name.replace("_", " "), marker="."
            )
        axis.set(title=stage, xlabel="training step", ylabel=MEASURED[stage])
        axis.legend(fontsize=7)
    figure.savefig(out / "curves.png", dpi=110)


if __name__ == "__main__":
    main()
