"""Trains toybox-vin, a Video Interface Network and its DiT, end to end on rendered scenes.

    python examples/train_vin.py --out runs/vin
    torchrun --standalone --nproc-per-node 2 examples/train_vin.py --out runs/vin

The DiT starts from toybox, or from --dit, and the VIN from random weights. First the VIN alone learns to read: where
objects are, from the text, then which colours they have where the text does not name them; see `vin_training.reading`.
Then both learn together. In some videos the text does not name colours, in some it does not say where objects start,
so that chunks that do not attend each other must agree on them through the global tokens. In some of the former the VIN
at first reads a less noisy video than the DiT denoises, so that the DiT learns what global tokens tell. A step trains
on one chunk of each of many videos of 64 to 512 pixel frames, the same chunk in all.

Scenes are encoded first, in half an hour of a core for 24576 of them, 1.2 GB, and kept in --out, with the logs and a
checkpoint of each stage from which the next call with the same --out goes on: it counts its minutes anew, and its
learning rate rises again before it falls. Training takes hours on a CPU. At the end the folder weights in --out is a
model that `generate` opens. The shipped weights were made by drafts of this recipe, in several stretches:
benchmarks/LOG.md, "toybox-vin reads where objects are, then their colours".
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import click
import torch
from torch import Tensor, nn
from toybox_training.batches import Draws
from toybox_training.codec import wan_codec
from toybox_training.dit import CONFIG as CONFIG_OF_DIT
from toybox_training.kept import check_count, fingerprint
from toybox_training.latents import HELD_OUT, SCENE_SEED, SIZE, Latents, encode_scenes, held_out_scenes
from toybox_training.training import Training, check_codec, device_of, finite, join_processes, make_folder, rank
from vin_training.forward import Pair, ParallelChunksForcing, VideoBatch
from vin_training.loop import Report, learn
from vin_training.reading import (
    OF_POSITIONS,
    POSITIONS_SHARE,
    Options,
    Probes,
    Reader,
    by_muon,
    color_accuracy,
    learn_colors,
    learn_positions,
)

from causalrope_sp import CheckpointError
from causalrope_sp.grid import LatentGrid
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.toybox import WEIGHTS
from causalrope_sp.toybox.toybox_text import leave_open
from causalrope_sp.vin import ParallelChunksConfig, VideoInterfaceNetwork, VINConfig, save_vin
from causalrope_sp.weights import load_model, save_model

SEED = 70_000_000
CONFIG = VINConfig(global_tokens=32, dim=192, heads=6, layers=1, position_layers=2)
CHUNKS = ParallelChunksConfig(chunk_frames=9, overlap=1, keyframe_every=2)
LENGTHS = {17: 0.2, 33: 0.35, 65: 0.3, 129: 0.15}  # latent frames, of 64 to 512 pixel frames, and their shares
COLORS_OPEN, STARTS_OPEN = 0.45, 0.1  # the shares of videos whose text does not name colours, or start positions
OPEN_NOISE = (0.88, 0.99)  # half of the videos with open colours have a noise level between: there a colour is decided
AHEAD = 0.6  # the share of videos with open colours of which the VIN reads a less noisy one,
AHEAD_UNTIL = 0.4  # in this share of the time
COLORS = 0.2  # how much the loss of colours counts
NO_GLOBALS = 0.1  # the share of steps without global tokens, from which the DiT learns its unconditional velocity
MEASURED_FRAMES, MEASURED_AT = 33, 0.97  # latent frames, and the noise level
HIGH_NOISE = 0.75  # half of the noise levels are above: there it is decided where objects are and whether chunks agree
SHIFT = 8.0  # half of the others are shifted towards noise too


class ReadingPair(Pair):
    """A pair, and the probes that tell what its VIN has read."""

    def __init__(self, dit: CausalDiT, vin: VideoInterfaceNetwork) -> None:
        super().__init__(dit, vin)
        self.probes = Probes(vin.config.dim, math.prod(dit.config.patch_size))

    @property
    def reader(self) -> Reader:
        return Reader(self.vin, self.probes)


def new_pair(dit: Path) -> ReadingPair:
    """Makes the networks to train from a DiT. The global tokens' values start at zero, so that at first they only
    dilute attention."""
    torch.manual_seed(0)
    model = load_model(dit, dtype=torch.float32)
    pair = ReadingPair(model, VideoInterfaceNetwork(CONFIG, model.config))
    for linear in pair.vin.hand_over:
        assert isinstance(linear, nn.Linear)
        nn.init.zeros_(linear.weight[pair.dit.config.dim :])
        nn.init.zeros_(linear.bias)
    return pair.train().requires_grad_(True)


def draw(scenes: Latents, options: Options, ahead: float, draws: Draws) -> tuple[VideoBatch, Tensor, Tensor]:
    """Draws videos of one length, each with its own noise level; of those with open colours a share of `ahead` is read
    with less noise. Returns them, their texts with nothing open, (B, L, W), and whether colours are open, (B,)."""
    videos, pick = options.videos, scenes.draw(options.videos, draws.choices)
    clean, objects = scenes.frames(pick, 0, options.draw_length(draws))

    def uniform(low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * draws.uniform(videos)

    levels = uniform()
    levels = torch.where(draws.which(0.5, videos), SHIFT * levels / (1 + (SHIFT - 1) * levels), levels)
    levels = torch.where(draws.which(0.5, videos), uniform(HIGH_NOISE), levels)
    colors, starts = draws.which(COLORS_OPEN, videos), draws.which(STARTS_OPEN, videos)
    levels = torch.where(colors & draws.which(0.5, videos), uniform(*OPEN_NOISE), levels)
    read_levels = torch.where(colors & draws.which(ahead, videos), levels * uniform(), levels)
    embeds = whole = scenes.embeds[pick.to(clean.device)]
    for which, opened in ((colors, {"colors": True}), (starts, {"starts": True})):
        embeds = torch.where(which.view(-1, 1, 1), leave_open(embeds, **opened), embeds)
    return VideoBatch(clean, objects, embeds, levels, read_levels), whole, colors


def train(
    pair: ReadingPair,
    scenes: Latents,
    held_out: Latents,
    forcing: ParallelChunksForcing,
    options: Options,
    minutes: float,
) -> ReadingPair:
    """Trains both networks for so many minutes; what embeds positions and texts stays as it is."""

    def loss(model: ReadingPair, draws: Draws, share: float) -> tuple[Tensor, Report]:
        batch, whole, is_open = draw(scenes, options, AHEAD if share < AHEAD_UNTIL else 0, draws)
        chunk, use_z = forcing.chunk(batch.clean.shape[1], draws.choices), not draws.happens(NO_GLOBALS)
        found = forcing.errors(model, batch, chunk, draws.values, use_z=use_z)
        loss, report = (found.everywhere.mean() + found.on_objects.mean()) / 2, Report()
        kind = "objects" if use_z else "objects_without_globals"
        for name, which in ((f"{kind}_open", is_open), (kind, ~is_open)):
            report[name] = found.on_objects[which].mean().item()
        if found.z is not None:
            colors = model.probes.color_loss(found.z, whole)
            loss, report["colors"] = loss + COLORS * colors, colors.item()
        return loss, report

    def measure(model: ReadingPair) -> Report:
        report = color_accuracy(forcing, held_out, model.reader)
        for name, of in (("held_out", held_out), ("learned", scenes)):
            report |= measured(forcing, model, of, name)
        return report

    for name, parameter in pair.named_parameters():
        parameter.requires_grad_(not name.startswith(OF_POSITIONS))
    training = Training(pair, options.out / "vin.pt", options.rate, by_muon, average=0.997, codec=options.codec)
    return learn(training, minutes, SEED, forcing.device, loss, measure)


@torch.no_grad()
def measured(forcing: ParallelChunksForcing, pair: Pair, scenes: Latents, name: str) -> dict[str, float]:
    """The mean square errors on objects of some scenes nearly at pure noise: of the first and the second chunk with
    whole texts, and of the second with texts that leave colours open."""
    pick = torch.arange(min(HELD_OUT, len(scenes.latents)))
    clean, objects = scenes.frames(pick, 0, MEASURED_FRAMES)
    whole = scenes.embeds[pick.to(clean.device)]
    noise_level = torch.full((len(pick),), MEASURED_AT, device=clean.device)
    errors = {}
    for what, chunk, embeds in (("first", 0, whole), ("second", 1, whole), ("open", 1, leave_open(whole, colors=True))):
        batch = VideoBatch(clean, objects, embeds, noise_level, noise_level)
        noise = torch.Generator(forcing.device).manual_seed(SEED)
        errors[f"{name}_{what}"] = forcing.errors(pair, batch, chunk, noise).on_objects.mean().item()
    return errors


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False, writable=True),
    default=Path("runs/vin"),
    show_default=True,
    help="The folder of everything that is made.",
)
@click.option(
    "--toybox",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=WEIGHTS,
    help="The folder with the codec and toybox.safetensors, such as runs/toybox/weights.  [default: the shipped one]",
)
@click.option(
    "--dit",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The DiT to start from, such as toybox-vin-dit.safetensors of an earlier training.  [default: toybox's]",
)
@click.option(
    "--device",
    default="cuda" if torch.cuda.is_available() else "cpu",
    show_default=True,
    help="The device: cpu, or cuda where there is a GPU.",
)
@click.option(
    "--videos",
    default=32,
    type=click.IntRange(1),
    show_default=True,
    help="The number of videos a step, of one chunk each.",
)
@click.option(
    "--scenes", "count", default=24576, show_default=True, help="The scenes to render and encode, 0.1 s of a core each."
)
@click.option(
    "--minutes",
    default=240.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    callback=finite,
    help="How long both train in this run, compilation included; a step that has begun is finished.",
)
@click.option(
    "--reading-minutes",
    default=60.0,
    show_default=True,
    type=click.FloatRange(0),
    callback=finite,
    help="How long the VIN first learns to read, alone; a stage that another has followed in --out is over.",
)
@click.option(
    "--rate",
    default=1e-3,
    type=click.FloatRange(0, min_open=True),
    callback=finite,
    show_default=True,
    help="The highest learning rate of this run.",
)
def main(
    out: Path,
    toybox: Path,
    dit: Path | None,
    device: str,
    videos: int,
    count: int,
    minutes: float,
    reading_minutes: float,
    rate: float,
) -> None:
    """Trains toybox-vin: a Video Interface Network and its DiT. It goes on from what --out holds; see the file."""
    on = device_of(device)
    join_processes(on)
    check_count("--scenes", count)
    if not (reading_minutes or (out / "vin.pt").exists() or (out / "colors.pt").exists()):
        raise click.UsageError(f"--reading-minutes: expected more than 0: {out} has no VIN that can read")
    if dit and (out / "vin.pt").exists():
        raise click.UsageError(f"--dit: the DiT of {out} has been trained already, and would not be this one")
    try:
        pair = new_pair(dit or toybox / "toybox.safetensors").to(on)
    except CheckpointError as error:
        raise click.UsageError(str(error)) from error
    if pair.dit.config != CONFIG_OF_DIT:
        raise click.UsageError(f"{dit or toybox / 'toybox.safetensors'} has not the sizes of toybox's DiT")
    weights = out / "weights"
    if toybox.resolve() == weights.resolve():
        raise click.UsageError(f"--out: {out} is the folder of toybox's own training: give another one")
    codec = wan_codec(toybox, on)
    encoder = fingerprint(*codec.encoder.parameters())
    check_codec((out / f"{stage}.pt" for stage in ("positions", "colors", "vin")), encoder)
    make_folder(weights)
    scenes = encode_scenes(codec, out / "scenes", count, SCENE_SEED).to(on)
    held_out = held_out_scenes(codec, out / "held_out").to(on)
    grid = LatentGrid.from_pixels(SIZE, SIZE, codec.config.scale_factor_spatial)
    forcing = ParallelChunksForcing(grid, CHUNKS, pair, on)
    options = Options(out, LENGTHS, videos, rate, encoder)
    if (out / "vin.pt").exists():
        print(f"the VIN of {out} has learned to read already: --reading-minutes is not used", flush=True)
    else:
        if not (out / "colors.pt").exists():
            of_positions = POSITIONS_SHARE * reading_minutes
            learn_positions(pair.reader, scenes, held_out, forcing, options, of_positions)
            reading_minutes -= of_positions
        learn_colors(pair.reader, scenes, held_out, forcing, options, reading_minutes)
    trained = train(pair, scenes, held_out, forcing, options, minutes).to(torch.bfloat16)
    if rank():
        return
    save_model(trained.dit, weights / "toybox-vin-dit.safetensors")
    save_vin(trained.vin, CHUNKS, weights / "toybox-vin.safetensors")
    shutil.copytree(toybox / "codec", weights / "codec", dirs_exist_ok=True)
    shutil.copy(WEIGHTS / "toybox-vin.json", weights / "pipeline.json")
    print(f'causalrope-sp generate "a red circle bounces" --model {weights} --parallel-chunks vin --out a.mp4')


if __name__ == "__main__":
    main()
