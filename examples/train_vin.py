"""Trains toybox-vin, a Video Interface Network and its DiT, end to end on rendered scenes.

    python examples/train_vin.py --out runs/vin
    torchrun --standalone --nproc-per-node 2 examples/train_vin.py --out runs/vin

The DiT starts from toybox and the VIN from random weights, or, with --init, both from a folder's toybox-vin, the DiT
halfway between its own weights and toybox's. In some videos the text does not name colours, in some it does not say
where objects start, so that chunks that do not attend each other must agree on them through the global tokens. A step
trains on one chunk of each of many videos of 64 to 512 pixel frames, the same chunk in all.

Scenes are encoded first, in half an hour of a core for 24576 of them, 1.1 GB, and kept in --out, with the log vin.jsonl
and a checkpoint from which the next call with the same --out goes on: it counts its minutes anew, and its learning rate
rises again before it falls. Training takes hours on a CPU. At the end the folder weights in --out is a model that
`generate` opens. The shipped weights were made in several such calls: benchmarks/LOG.md, "toybox-vin".
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import click
import torch
from torch import nn
from toybox_training.batches import Draws
from toybox_training.kept import check_count
from toybox_training.latents import HELD_OUT, SCENE_SEED, Latents, encode_scenes, held_out_scenes
from toybox_training.training import Training, agreed, device_of, finite, join_processes, processes, rank
from vin_training.forward import Batch, Pair, TogetherForcing

from causalrope_sp.codec import load_codec
from causalrope_sp.codec.wan_vae import WanCodec
from causalrope_sp.grid import LatentGrid
from causalrope_sp.toybox import WEIGHTS
from causalrope_sp.toybox.toybox_text import leave_open
from causalrope_sp.vin import ParallelChunksConfig, VideoInterfaceNetwork, VINConfig, load_vin, save_vin
from causalrope_sp.weights import load_model, save_model

SEED = 70_000_000
CONFIG = VINConfig(global_tokens=32, dim=192, heads=6, layers=4)
CHUNKS = ParallelChunksConfig(chunk_frames=9, overlap=1, keyframe_every=2)
LENGTHS = {17: 0.25, 33: 0.25, 65: 0.3, 129: 0.2}  # latent frames, of 64 to 512 pixel frames, and their shares
COLORS_OPEN, PLACES_OPEN = 0.25, 0.1  # the shares of videos whose text does not name colours, or start positions
NO_GLOBALS = 0.1  # the share of steps without global tokens
SAVED_EVERY, MEASURED_EVERY = 50, 250  # steps
MEASURED_FRAMES = 33  # latent frames
HIGH_NOISE = 0.75  # half of the noise levels are above: there it is decided where objects are and whether chunks agree
SHIFT = 8.0  # half of the others are shifted towards noise too


def new_pair(dit: Path) -> Pair:
    """Makes the networks to train from a DiT. The global tokens' values start at zero, so that at first they only
    dilute attention."""
    torch.manual_seed(0)
    model = load_model(dit, dtype=torch.float32)
    pair = Pair(model, VideoInterfaceNetwork(CONFIG, model.config))
    for linear in pair.vin.hand_over:
        assert isinstance(linear, nn.Linear)
        nn.init.zeros_(linear.weight[pair.dit.config.dim :])
        nn.init.zeros_(linear.bias)
    return pair.train().requires_grad_(True)


def old_pair(folder: Path, dit: Path) -> Pair:
    """Makes the networks to train from trained ones, the DiT halfway between theirs and another."""
    model, other = (load_model(path, dtype=torch.float32) for path in (folder / "toybox-vin-dit.safetensors", dit))
    vin, _ = load_vin(folder / "toybox-vin.safetensors", model.config)
    with torch.no_grad():
        for own, weight in zip(model.parameters(), other.parameters(), strict=True):
            own.lerp_(weight, 0.5)
    return Pair(model, vin.float()).train().requires_grad_(True)


def draw(scenes: Latents, videos: int, generator: torch.Generator) -> Batch:
    """Draws videos of one length, each with its own noise level. The generator is on the CPU."""
    lengths = list(LENGTHS)
    frames = lengths[int(torch.multinomial(torch.tensor(list(LENGTHS.values())), 1, generator=generator))]
    pick = scenes.draw(videos, generator)
    clean, objects = scenes.frames(pick, 0, frames)
    embeds = scenes.embeds[pick.to(clean.device)]
    for share, what in ((COLORS_OPEN, {"colors": True}), (PLACES_OPEN, {"places": True})):
        left_open = (torch.rand(videos, generator=generator) < share).to(clean.device)
        embeds = torch.where(left_open.view(-1, 1, 1), leave_open(embeds, **what), embeds)
    times = torch.rand(videos, generator=generator)
    shifted = torch.rand(videos, generator=generator) < 0.5
    times = torch.where(shifted, SHIFT * times / (1 + (SHIFT - 1) * times), times)
    high = torch.rand(videos, generator=generator) < 0.5
    times = torch.where(high, HIGH_NOISE + (1 - HIGH_NOISE) * torch.rand(videos, generator=generator), times)
    return Batch(clean, objects, embeds, times.to(clean.device))


def train(
    out: Path,
    pair: Pair,
    scenes: Latents,
    held_out: Latents,
    forcing: TogetherForcing,
    videos: int,
    minutes: float,
    lr: float,
) -> Pair:
    """Trains on so many videos a step for so many minutes, counted from zero when a run resumes; the learning rate is
    constant for a third of them, then falls. Half of the loss is over the frame, half over the objects alone."""

    def matrix(name: str, parameter: nn.Parameter) -> bool:
        return parameter.ndim == 2 and (".blocks." in name or "hand_over" in name) and "modulation" not in name

    training = Training(pair, out / "vin.pt", lr, matrix, average=0.997)
    started = time.monotonic()
    while (elapsed := agreed((time.monotonic() - started) / (60 * minutes), forcing.device)) < 1:
        draws = Draws.seeded(SEED + processes() * training.step + rank(), forcing.device)
        batch = draw(scenes, videos, draws.choices)
        chunk = forcing.chunk(batch.clean.shape[1], draws.choices)
        use_z = not draws.happens(NO_GLOBALS)
        errors, on_objects = forcing.errors(training.model, batch, chunk, draws.values, use_z=use_z)
        name = f"{batch.clean.shape[1]}_frames" if use_z else "without_globals"
        report = {f"{name}_loss": errors.mean().item(), f"{name}_objects": on_objects.mean().item()}
        rate = min(1, (training.step + 1) / 100) * min(1, max(0.02, 1.5 * (1 - elapsed)))
        loss = (errors.mean() + on_objects.mean()) / 2
        if not use_z:  # the optimiser needs a gradient of every parameter
            loss = loss + 0 * sum(parameter.sum() for parameter in training.model.vin.parameters())
        if (training.step + 1) % MEASURED_EVERY == 0:
            report |= measured(forcing, training.ema, held_out, "held_out")
            report |= measured(forcing, training.ema, scenes, "learned")
        training.update(loss, rate, report)
        if training.step % SAVED_EVERY == 0:
            training.save()
    training.save()
    return training.ema


@torch.no_grad()
def measured(forcing: TogetherForcing, pair: Pair, scenes: Latents, name: str) -> dict[str, float]:
    """The mean square errors on objects of some scenes nearly at pure noise: of the first and the second chunk with
    whole texts, and of the second with texts that leave colours open."""
    pick = torch.arange(min(HELD_OUT, len(scenes.latents)))
    clean, objects = scenes.frames(pick, 0, MEASURED_FRAMES)
    whole, noise_level = scenes.embeds[pick.to(clean.device)], torch.full((len(pick),), 0.98, device=clean.device)
    errors = {}
    for what, chunk, embeds in (("first", 0, whole), ("second", 1, whole), ("open", 1, leave_open(whole, colors=True))):
        batch, noise = Batch(clean, objects, embeds, noise_level), torch.Generator(forcing.device).manual_seed(SEED)
        errors[f"{name}_{what}"] = forcing.errors(pair, batch, chunk, noise)[1].mean().item()
    return errors


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--out",
    type=click.Path(path_type=Path),
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
    "--init",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A folder with toybox-vin-dit.safetensors and toybox-vin.safetensors to start from, such as the shipped one. "
    "The DiT is averaged with that of --toybox, half and half.",
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
    help="How long this run trains, compilation included.",
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
    out: Path, toybox: Path, init: Path | None, device: str, videos: int, count: int, minutes: float, rate: float
) -> None:
    """Trains toybox-vin: a Video Interface Network and its DiT. It goes on from what --out holds; see the file."""
    on, size = device_of(device), 64
    join_processes(on)
    check_count("--scenes", count)
    weights = out / "weights"
    weights.mkdir(parents=True, exist_ok=True)
    dit = toybox / "toybox.safetensors"
    pair = (new_pair(dit) if init is None else old_pair(init, dit)).to(on)
    wan = load_codec(toybox / "codec", "wan", on)
    assert isinstance(wan, WanCodec)
    codec = wan.vae.float()
    scenes = encode_scenes(codec, out / "scenes", count, size, SCENE_SEED).to(on)
    held_out = held_out_scenes(codec, out / "held_out", size).to(on)
    forcing = TogetherForcing(LatentGrid.from_pixels(size, size, codec.config.scale_factor_spatial), CHUNKS, pair, on)
    trained = train(out, pair, scenes, held_out, forcing, videos, minutes, rate).to(torch.bfloat16)
    if rank():
        return
    save_model(trained.dit, weights / "toybox-vin-dit.safetensors")
    save_vin(trained.vin, CHUNKS, weights / "toybox-vin.safetensors")
    shutil.copytree(toybox / "codec", weights / "codec", dirs_exist_ok=True)
    shutil.copy(WEIGHTS / "toybox-vin.json", weights / "pipeline.json")
    print(f'causalrope-sp generate "a red circle bounces" --model {weights} --parallel-chunks vin --out a.mp4')


if __name__ == "__main__":
    main()
