"""What the read of a VIN can tell of the colours that a text leaves open, with a network that is a candidate for
toybox-vin: it asks the text before it reads.

    python benchmarks/vin_reading.py --out runs/reading --minutes 50
    python benchmarks/vin_reading.py --out runs/reading --minutes 0     # measures what is there

toybox-vin's own read stays at chance for such colours (LOG, "what toybox and toybox-vin lacked was scenes"), so that
far chunks do not agree on them. Here learned tokens attend the text once, before they read; keys hold positions, as
waves of learned frequencies over time, rows and columns together (learnable Fourier features, Li et al., arXiv
2106.02795, section 3), which attend the text in two layers: what the text says of a place. These are computed once a
video. The first three tokens then name the colours of both objects and of the background. The network is trained alone,
at little noise first; no DiT takes part. Scenes are encoded first, 0.1 s of a core each.

It prints the share of the open colours of objects that are named in scenes which were never learned from, by noise
level (chance: 17 %), then JSON. benchmarks/vin_ladder.py says what an ideal observer finds.

Shapes: B videos, K keyframes, S tokens a frame, E numbers in a token, G global tokens, D width, L text tokens, W text
width, T any tokens.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click
import torch
from printed import finish, print_table
from torch import Tensor, nn
from torch.nn import functional

from causalrope_kernels import attention, linear_gelu, rms_norm
from causalrope_sp.codec import load_codec
from causalrope_sp.codec.wan_vae import WanCodec
from causalrope_sp.config import DiTConfig
from causalrope_sp.grid import LatentGrid, Shard
from causalrope_sp.models.causal_dit import sinusoid
from causalrope_sp.toybox import WEIGHTS
from causalrope_sp.toybox.prompts import BACKGROUNDS, COLORS
from causalrope_sp.toybox.toybox_text import BACKGROUND_INDICES, COLOR_INDICES, leave_open
from causalrope_sp.vin import VINConfig
from causalrope_sp.vin.network import Attention, Block, positions

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from toybox_training.batches import Draws
from toybox_training.dit import CONFIG as DIT
from toybox_training.latents import SCENE_SEED, Latents, encode_scenes, held_out_scenes
from toybox_training.training import Training

VIN = VINConfig(global_tokens=32, dim=192, heads=6, layers=1)
PLACE_LAYERS = 2
EVERY = 2  # one keyframe in so many latent frames
LENGTHS = (17, 33, 65, 129)  # latent frames
OBJECTS = 2
OPEN = 0.8  # the share of videos whose text names no colours
AT_FIRST, RISES = 0.4, 0.4  # the highest noise level at first, and the share of the time in which it rises to 1
HIGH = 0.75  # half of the levels are above, once it has risen
FALLS = 0.5  # the share of the time after which the learning rate falls
LEVELS = (0.5, 0.8, 0.9, 0.95, 0.97)
MEASURED_FRAMES = 65  # latent frames: 256 of pixels
SEED = 71_000_000
GRID = LatentGrid.from_pixels(64, 64, 8)


class AskingReader(nn.Module):
    """Computes the global tokens of noisy videos, (B, G, D), and names colours by the first three."""

    def __init__(self, config: VINConfig, dit: DiTConfig) -> None:
        super().__init__()
        self.config, self.dit = config, dit
        dim, eps = config.dim, dit.eps
        self.z_init = nn.Parameter(torch.randn(config.global_tokens, dim) / dim**0.5)
        self.embed_token = nn.Linear(dit.token_dim, dim, bias=False)
        self.frequencies = nn.Parameter(torch.randn(3, dim // 2))  # radians a frame, a row and a column
        self.embed_place, self.embed_text, self.embed_time = (_mlp(n, dim) for n in (dim, dit.text_dim, dit.freq_dim))
        self.asking = Block(config, eps)
        self.text_at_places = nn.ModuleList(Block(config, eps) for _ in range(PLACE_LAYERS))
        self.norm_tokens, self.norm_z, self.norm_out = (nn.LayerNorm(dim, eps) for _ in range(3))
        self.read = Attention(config, eps, dit.token_dim)
        self.norm_read = nn.RMSNorm(dim, eps)
        self.blocks = nn.ModuleList(Block(config, eps) for _ in range(config.layers))
        self.colors = nn.Linear(dim, len(COLORS))
        self.backgrounds = nn.Linear(dim, len(BACKGROUNDS))

    def forward(self, tokens_BKSE: Tensor, positions_KS3: Tensor, embeds_BLW: Tensor, times_B: Tensor) -> Tensor:
        noise_level = self.embed_time(sinusoid(1000 * times_B, self.dit.freq_dim).float()).unsqueeze(1)
        text = self.embed_text(embeds_BLW)
        x = self.asking(torch.cat([self.z_init + noise_level, text], 1), "torch")
        z, told = x.split([self.config.global_tokens, text.shape[1]], 1)
        tokens = tokens_BKSE.flatten(1, 2)
        keys = self.norm_tokens(self.embed_token(tokens) + self.places(positions_KS3, text) + noise_level)
        read = attention(self.read.queries(self.norm_z(z)), self.read.keys(keys, tokens), "torch").flatten(2)
        z = z + self.read.out(rms_norm(read, self.norm_read.weight, self.dit.eps))
        x = torch.cat([z, told], 1)
        for block in self.blocks:
            x = block(x, "torch")
        return self.norm_out(x[:, : self.config.global_tokens])

    def places(self, positions_KS3: Tensor, text_BLD: Tensor) -> Tensor:
        """What the text says of every position, (B, K·S, D)."""
        angles = positions_KS3.flatten(0, 1).double() @ self.frequencies.double()
        places = self.embed_place(torch.cat([angles.cos(), angles.sin()], -1).float()).expand(len(text_BLD), -1, -1)
        for block in self.text_at_places:
            assert isinstance(block, Block)
            keys = block.attention.keys(text_BLD, text_BLD)  # a cross-attention by the parts of a self-attention
            found = attention(block.attention.queries(block.norm_1(places)), keys, "torch")
            places = places + block.attention.out(found.flatten(2))
            places = places + block.down(linear_gelu(block.norm_2(places), block.up.weight, block.up.bias))
        return places

    def loss(self, z_BGD: Tensor, whole_BLW: Tensor) -> Tensor:
        """The mean cross-entropy of the objects' colours, plus that of backgrounds; the texts leave nothing open."""
        background, objects, there = _told(whole_BLW)
        errors = functional.cross_entropy(self.colors(z_BGD[:, :OBJECTS]).transpose(1, 2), objects, reduction="none")
        return (errors * there).sum() / there.sum() + functional.cross_entropy(
            self.backgrounds(z_BGD[:, OBJECTS]), background
        )

    def right(self, z_BGD: Tensor, whole_BLW: Tensor) -> float:
        """The share of objects whose colour is named."""
        _, objects, there = _told(whole_BLW)
        named = self.colors(z_BGD[:, :OBJECTS]).argmax(-1) == objects
        return ((named & there).sum() / there.sum()).item()


def _mlp(inputs: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, dim), nn.SiLU(), nn.Linear(dim, dim))


def _told(whole_BLW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The numbers of the background's colour, (B,), and the objects', (B, 2), and which objects there are, (B, 2)."""
    objects = whole_BLW[:, 1:, COLOR_INDICES]
    return whole_BLW[:, 0, BACKGROUND_INDICES].argmax(-1), objects.argmax(-1), objects.sum(-1) > 0


def read(
    reader: AskingReader, scenes: Latents, pick: Tensor, frames: int, times_B: Tensor, is_open_B: Tensor, draws: Draws
) -> tuple[Tensor, Tensor]:
    """The global tokens of noised scenes, and their whole texts."""
    clean, _ = scenes.frames(pick, 0, frames)
    keyframes = list(range(0, frames, EVERY))
    level = times_B.to(clean.device)
    shape = clean[:, keyframes].shape
    noisy = torch.lerp(clean[:, keyframes], draws.normal(tuple(shape)), level.view(-1, 1, 1, 1, 1))
    whole = scenes.embeds[pick.to(clean.device)]
    embeds = torch.where(is_open_B.to(clean.device).view(-1, 1, 1), leave_open(whole, colors=True), whole)
    where = positions(torch.tensor([1 + frame for frame in keyframes]), *Shard(GRID).rows_and_columns())
    return reader(GRID.patchify(noisy), where.to(clean.device), embeds, level), whole


def train(out: Path, reader: AskingReader, scenes: Latents, videos: int, minutes: float, lr: float) -> AskingReader:
    """Trains for so many minutes, counted from zero when a run goes on; returns the averaged network."""

    def matrix(name: str, parameter: nn.Parameter) -> bool:
        return parameter.ndim == 2 and any(part in name for part in ("blocks.", "asking.", "text_at_places."))

    training, started = Training(reader, out / "reading.pt", lr, matrix, average=0.997), time.monotonic()
    while minutes and (elapsed := (time.monotonic() - started) / (60 * minutes)) < 1:
        draws = Draws.seeded(SEED + training.step, scenes.latents.device)
        levels = draws.uniform(videos) * min(1, AT_FIRST + (1 - AT_FIRST) * elapsed / RISES)
        high = draws.which(0.5 if elapsed > RISES else 0, videos)
        levels = torch.where(high, HIGH + (1 - HIGH) * draws.uniform(videos), levels)
        pick, frames = scenes.draw(videos, draws.choices), LENGTHS[draws.below(len(LENGTHS))]
        z, whole = read(training.model, scenes, pick, frames, levels, draws.which(OPEN, videos), draws)
        loss, report = training.model.loss(z, whole), {"right": training.model.right(z, whole)}
        rate = min(1, (training.step + 1) / 100) * min(1, max(0.02, (1 - elapsed) / (1 - FALLS)))
        training.update(loss, rate, report)
    training.save()
    return training.ema


@torch.no_grad()
def measured(reader: AskingReader, held_out: Latents) -> dict[float, float]:
    """The share of open colours that are named, by noise level."""
    pick, found = torch.arange(len(held_out.latents)), {}
    for level in LEVELS:
        draws, everything = Draws.seeded(SEED, held_out.latents.device), torch.ones(len(pick), dtype=torch.bool)
        z, whole = read(reader, held_out, pick, MEASURED_FRAMES, torch.full((len(pick),), level), everything, draws)
        found[level] = reader.right(z, whole)
    return found


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("runs/reading"),
    show_default=True,
    help="The folder of scenes, log and checkpoint.",
)
@click.option(
    "--scenes", "count", default=7168, show_default=True, type=click.IntRange(16), help="The scenes to learn from."
)
@click.option("--minutes", default=50.0, show_default=True, type=click.FloatRange(0), help="How long it trains.")
@click.option("--videos", default=24, show_default=True, type=click.IntRange(1), help="The videos of a step.")
@click.option("--rate", default=2e-3, show_default=True, help="The highest learning rate.")
def main(out: Path, count: int, minutes: float, videos: int, rate: float) -> None:
    out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wan = load_codec(WEIGHTS / "codec", "wan", device)
    assert isinstance(wan, WanCodec)
    scenes = encode_scenes(wan.vae, out / "scenes", count, 64, SCENE_SEED).to(device)
    held_out = held_out_scenes(wan.vae, out / "held_out", 64).to(device)
    torch.manual_seed(0)
    reader = train(out, AskingReader(VIN, DIT).to(device), scenes, videos, minutes, rate)
    found = measured(reader, held_out)
    print_table(("noise level", "open colours named"), [(level, f"{share:.0%}") for level, share in found.items()])
    finish("vin_reading", scenes=count, minutes=minutes, videos=videos, named=found)


if __name__ == "__main__":
    main()
