"""The codec: a small Wan VAE, as an autoencoder with a fixed latent noise.

Clips grow from 5 frames, where most is learned, to 17, 33 and 65: a codec that has only seen short clips drifts in
colour when it streams long ones.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch
from torch import Tensor, nn
from torch.nn import functional

from causalrope_sp import CheckpointError
from causalrope_sp.codec import load_codec
from causalrope_sp.codec.wan_vae import WanCodec, WanDecoderStream, WanEncoderStream
from causalrope_sp.codec.wan_vae_config import WanVaeConfig
from causalrope_sp.codec.wan_vae_model import WanVae
from causalrope_sp.toybox.prompts import BACKGROUNDS, SHAPES, SIZES, SceneSpec
from causalrope_sp.toybox.scenes import START_VARIABLES, random_scene, render

from .kept import fingerprint
from .latents import SIZE
from .training import Training, processes, rank, rate_at, shares_of_time

LATENT_CHANNELS = 16
SHAPE = {
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "base_dim": 16,
    "dim_mult": [1, 2, 4],
    "temperal_downsample": [True, True],
    "num_res_blocks": 1,
    "z_dim": LATENT_CHANNELS,
    "scale_factor_spatial": 8,
}
SEED, STATISTICS_SEED, DECODER_SEED = 10_000_000, 20_000_000, 30_000_000
SIZE_SHARES = torch.tensor([0.5, 0.3, 0.2])  # how often the decoder's own training draws each size,
SHAPE_SHARES = torch.tensor([0.2, 0.4, 0.4])  # and each shape: small corners are what it lost
NEAR = 2  # pixels around an object that count as its outline
DECODER_STRAYED = 0.4  # the error of a latent frame, on objects, from which on it teaches the decoder nothing
LATENT_NOISE = 0.1  # keeps the latents from carrying what a DiT could never predict
CHANNEL_NOISE = 0.3  # what a DiT's latents are off by, about, where it is asked which channels matter
CODEC_RATE = 2e-3  # the highest learning rate of the whole codec
PLATEAU = 0.3  # the share of the decoder's minutes before its learning rate falls
LATENT_PENALTY = 1e-4  # on their square, so that they do not grow out of the noise


def new_codec(mean: list[float] | None = None, std: list[float] | None = None) -> WanVae:
    """The untrained codec; its latents are normalised by `mean` and `std` a channel, or not at all."""
    statistics = {
        "latents_mean": mean or [0.0] * LATENT_CHANNELS,
        "latents_std": std or [1.0] * LATENT_CHANNELS,
    }
    return WanVae(WanVaeConfig.from_json(SHAPE | statistics))


def wan_codec(folder: Path, device: torch.device) -> WanVae:
    """Loads the codec of a folder of weights, in float32; refuses a folder that has none."""
    try:
        wan = load_codec(folder / "codec", "wan", device)
    except CheckpointError as error:
        raise click.UsageError(str(error)) from error
    assert isinstance(wan, WanCodec)
    return wan.vae.float()


def train_codec(path: Path, steps: int, stop: int, device: torch.device) -> WanVae:
    """Trains for `stop` of `steps` steps, resuming from `path`; returns the averaged codec."""
    torch.manual_seed(0)
    training = Training(new_codec().to(device), path, CODEC_RATE, _matrix, average=0.995)
    while training.step < stop:
        progress = training.step / steps
        generator = torch.Generator().manual_seed(SEED + processes() * training.step + rank())
        count, frames = _clips(progress, training.step)
        scenes = [random_scene(generator) for _ in range(count)]
        starts = torch.rand(count, START_VARIABLES, generator=generator)
        pixels = render(scenes, starts, torch.arange(frames), SIZE).transpose(1, 2).to(device) * 2 - 1
        with torch.autocast(device.type, torch.bfloat16):
            latents = WanEncoderStream(training.model).encode(pixels)
            noise = torch.randn(latents.shape, generator=generator).to(device)
            back = WanDecoderStream(training.model).decode(latents + LATENT_NOISE * noise)
        difference = back.float() - pixels
        mse = difference.square().mean()
        loss = mse + 0.05 * difference.abs().mean() + LATENT_PENALTY * latents.float().square().mean()
        warm = min(1, (training.step + 1) / 100)
        fall = 1 if progress < 0.3 else max(0.02, 0.5 + 0.5 * math.cos(math.pi * (progress - 0.3) / 0.7))
        training.update(loss, warm * fall, {"psnr_db": -10 * math.log10(mse.item() / 4)})
    training.save()
    return training.ema


@dataclass(frozen=True)
class GeneratedVideos:
    """Videos that a DiT made: latents (N, F, C, X, X) float16, the scenes and starts they should show, and how far each
    latent frame is from the truth, (N, F): the mean square error of normalised latents where objects are."""

    latents: Tensor
    scenes: Sequence[SceneSpec]
    starts_N6: Tensor
    strayed_NF: Tensor


def tune_decoder(path: Path, codec: WanVae, minutes: float, lr: float, made: GeneratedVideos | None = None) -> WanVae:
    """Trains the decoder alone for so many minutes, so that latents stay what every DiT has learned; goes on from
    `path`, its minutes counted anew. Returns the averaged codec, with 0 minutes as `path` has it, if there is one.

    It learns rendered scenes from their latents and, in half of the steps if there are any, from latents that a DiT
    made of them, which are less sharp. The loss is the absolute error. Where an outline may lie on either side of a
    pixel, its best guess is one of the two colours; that of the squared error is their mix, a third colour. Half of the
    loss is taken over objects and their outlines alone, where shapes are told apart: over the whole picture the corners
    of a small square are a thousandth of the error.
    """
    codec.requires_grad_(False)
    for module in (codec.decoder, codec.post_quant_conv):
        module.requires_grad_(True)
    training = Training(codec, path, lr, _matrix, average=0.99, codec=fingerprint(*codec.encoder.parameters()))
    channels_last(training.model)
    for share in shares_of_time(minutes, next(codec.parameters()).device):
        generator = torch.Generator().manual_seed(DECODER_SEED + processes() * training.step + rank())
        if made is None or training.step % 2:
            name, (error, on_objects) = "truth", _from_truth(training.model, training.step, generator)
        else:
            name, (error, on_objects) = "made", _from_made(training.model, generator, made)
        report = {f"{name}_error": error.item(), f"{name}_objects_error": on_objects.item()}
        training.update(error + on_objects, rate_at(training.step, share, PLATEAU), report)
    if minutes:
        training.save()
    return training.ema


@torch.no_grad()
def channel_weights(codec: WanVae, latents: Tensor) -> Tensor:
    """How much noise on each channel of normalised latents (N, F, C, X, X) changes the picture, (C,), 1 on average."""
    generator = torch.Generator().manual_seed(STATISTICS_SEED)
    latents = latents.to(next(codec.parameters()).device)
    noise = CHANNEL_NOISE * torch.randn(latents.shape, generator=generator).to(latents)
    clean, changes = WanDecoderStream(codec).decode(latents), []
    for channel in range(latents.shape[2]):
        only = torch.zeros_like(noise)
        only[:, :, channel] = noise[:, :, channel]
        changes.append((WanDecoderStream(codec).decode(latents + only) - clean).square().mean())
    changes_C = torch.stack(changes)
    return (changes_C / changes_C.mean()).cpu()


def _from_truth(codec: WanVae, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    device = next(codec.parameters()).device
    count, frames = (1, 65) if step % 8 == 7 else (4, 17)
    scenes = [_hard_scene(generator) for _ in range(count)]
    starts = torch.rand(count, START_VARIABLES, generator=generator)
    pixels = render(scenes, starts, torch.arange(frames), SIZE).transpose(1, 2).to(device) * 2 - 1
    with torch.autocast(device.type, torch.bfloat16):
        with torch.no_grad():
            latents = WanEncoderStream(codec).encode(pixels).float()
        amount = LATENT_NOISE * 2 * torch.rand(count, 1, 1, 1, 1, generator=generator)
        noise = amount * torch.randn(latents.shape, generator=generator)
        back = WanDecoderStream(codec).decode(latents + noise.to(device))
    error, on_objects = _errors(back.float(), pixels, scenes)
    return error.mean(), on_objects.mean()


def _from_made(codec: WanVae, generator: torch.Generator, made: GeneratedVideos) -> tuple[Tensor, Tensor]:
    """Five latent frames of four videos, from a chunk's start on. Frames that have left the truth count less, down to
    nothing: their objects stand elsewhere, and their mean with the truth's is a blur."""
    device = next(codec.parameters()).device
    pick = torch.randint(len(made.latents), (4,), generator=generator)
    start = 3 * int(torch.randint((made.latents.shape[1] - 5) // 3 + 1, (), generator=generator))
    latents, stream = made.latents[pick, : start + 5].float().to(device), WanDecoderStream(codec)
    times = torch.arange(max(0, 4 * start - 3), 4 * start + 17)
    scenes = [made.scenes[int(n)] for n in pick]
    pixels = render(scenes, made.starts_N6[pick], times, SIZE).transpose(1, 2).to(device) * 2 - 1
    with torch.autocast(device.type, torch.bfloat16):
        if start:
            with torch.no_grad():
                stream.decode(latents[:, :start])
        back = stream.decode(latents[:, start:])
    error, on_objects = _errors(back.float(), pixels, scenes)
    weights = (1 - made.strayed_NF[pick, start : start + 5] / DECODER_STRAYED).clamp(min=0).repeat_interleave(4, 1)
    weights = weights[:, -error.shape[1] :].to(device)
    return (error * weights).mean(), (on_objects * weights).mean()


def _errors(back: Tensor, pixels: Tensor, scenes: Sequence[SceneSpec]) -> tuple[Tensor, Tensor]:
    """The absolute error of videos (B, T, 3, X, X) in [-1, 1], frame by frame, over the picture, and over objects and
    their outlines."""
    behind = torch.tensor([BACKGROUNDS[scene.background] for scene in scenes], device=pixels.device) / 127.5 - 1
    shown = ((pixels - behind[:, None, :, None, None]).abs().amax(2) > 0.02).float()
    near = functional.max_pool2d(shown, 2 * NEAR + 1, 1, NEAR)
    error = (back - pixels).abs().mean(2)
    return error.mean((2, 3)), (error * near).sum((2, 3)) / near.sum((2, 3)).clamp(min=1)


def save_decoder(codec: WanVae, folder: Path) -> None:
    """Writes a codec whose decoder was tuned, in bfloat16; its latents and their normalisation are what they were."""
    if rank() == 0:
        copy.deepcopy(codec).to(torch.bfloat16).save_pretrained(folder)


def _hard_scene(generator: torch.Generator) -> SceneSpec:
    """A scene of the grammar in which small objects, squares and triangles are drawn more often."""
    scene = random_scene(generator)
    size, shape = (
        torch.multinomial(shares, len(scene.objects), replacement=True, generator=generator)
        for shares in (SIZE_SHARES, SHAPE_SHARES)
    )
    objects = [replace(o, size=SIZES[a], shape=SHAPES[b]) for o, a, b in zip(scene.objects, size, shape, strict=True)]
    return replace(scene, objects=tuple(objects))


def _matrix(_: str, parameter: nn.Parameter) -> bool:
    """Whether Muon takes a parameter."""
    return parameter.ndim >= 4 and parameter.shape[0] > 3


def channels_last(module: nn.Module) -> None:
    """Puts convolutions into the layout that a CPU multiplies fastest: a decode takes 0.4 of the time."""
    for m in module.modules():
        if isinstance(m, nn.Conv3d):
            m.weight.data = m.weight.data.contiguous(memory_format=torch.channels_last_3d)
        elif isinstance(m, nn.Conv2d):
            m.weight.data = m.weight.data.contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def save_codec(codec: WanVae, folder: Path) -> None:
    """Writes the codec in bfloat16, its latents normalised by their mean and deviation a channel over 256 scenes."""
    generator = torch.Generator().manual_seed(STATISTICS_SEED)
    parts = []
    for _ in range(16):
        scenes = [random_scene(generator) for _ in range(16)]
        starts = torch.rand(16, START_VARIABLES, generator=generator)
        pixels = render(scenes, starts, torch.arange(33), SIZE).transpose(1, 2) * 2 - 1
        parts.append(WanEncoderStream(codec).encode(pixels.to(next(codec.parameters()).device)).cpu())
    by_channel = torch.cat(parts).transpose(0, 2).flatten(1)
    mean, std = ([round(v, 5) for v in of(1).tolist()] for of in (by_channel.mean, by_channel.std))
    normalised = new_codec(mean, std)
    normalised.load_state_dict(codec.state_dict())
    normalised.to(torch.bfloat16).save_pretrained(folder)


def _clips(progress: float, step: int) -> tuple[int, int]:
    """How many clips of how many frames a batch holds."""
    if progress < 0.3:
        return 12, 5
    if progress < 0.65 or (progress < 0.9 and step % 2):
        return 4, 17
    return (2, 33) if progress < 0.9 else (1, 65)
