"""The forward of training: one pass of the DiT over one chunk of each of some videos. A chunk attends the chart, its
own frames and the global tokens of its video. `causalrope_sp.vin.parallel_sampler` computes the same for all chunks,
from a cache. The DiT runs compiled and in bfloat16, as in the training of toybox.

Shapes: B videos, F latent frames of a video, c frames of a chunk, S tokens a frame, C channels, X latent width and
height, L text tokens, W text width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from toybox_training.dit import forward
from toybox_training.latents import mean_on_objects

from causalrope_kernels import Keys, attention
from causalrope_sp.grid import LatentGrid, Shard
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.models.rope import RotaryTables
from causalrope_sp.toybox.chart import chart
from causalrope_sp.vin.chunks import AssignedChunks, cut
from causalrope_sp.vin.network import VideoInterfaceNetwork, positions
from causalrope_sp.vin.vin_config import ParallelChunksConfig


class Pair(nn.Module):
    """The two networks that are trained together."""

    def __init__(self, dit: CausalDiT, vin: VideoInterfaceNetwork) -> None:
        super().__init__()
        self.dit, self.vin = dit, vin


@dataclass(frozen=True)
class VideoBatch:
    """Videos, (B, F, C, X, X), masks of their objects, (B, F, X, X), text embeddings, (B, L, W), and noise levels from
    0 to 1, (B,): of the chunk, and of the keyframes that the VIN reads, the same in a sampler. All are on the device of
    the forward."""

    clean: Tensor
    objects: Tensor
    embeds: Tensor
    levels_B: Tensor
    read_levels_B: Tensor


@dataclass(frozen=True)
class Errors:
    """The mean squared errors of a chunk's velocity, each (B,), over its frames and over the objects in them, 0 without
    objects; and the global tokens, (B, G, D), or None."""

    everywhere: Tensor
    on_objects: Tensor
    z: Tensor | None


class ParallelChunksForcing:
    """The loss ‖v([X_i, Z], t) - v_i‖² over the frames of a chunk i, where v is the predicted velocity, ε - x0.

    The published loss is the sum over all chunks of a video (Video Interface Networks, arXiv 2503.17539). Here it is
    that of one chunk, drawn anew in every step, so that a step trains on as many videos as chunks, since global tokens
    are computed once a video. A long video thus weighs no more than a short one.

    Args:
        grid: the latent frame in tokens.
        config: how a video is cut into chunks.
        pair: the networks; only their sizes are read.
        device: where the forward runs.
    """

    def __init__(self, grid: LatentGrid, config: ParallelChunksConfig, pair: Pair, device: torch.device) -> None:
        self.grid, self.config, self.device = grid, config, device
        dit = pair.dit.config
        self._shard = Shard(grid)
        self._rope = RotaryTables(dit.head_dim, dit.theta, self._shard, device, torch.float32)

    def errors(
        self, pair: Pair, batch: VideoBatch, chunk: int, generator: torch.Generator, *, use_z: bool = True
    ) -> Errors:
        """Returns the errors of chunk number `chunk`; the generator, on the device, draws the noise."""
        clean = batch.clean
        noise = torch.randn(clean.shape, generator=generator, device=self.device)
        part = cut(clean.shape[1], self.config)[chunk]
        frames = slice(part.start, part.stop)
        z = self.read(pair.vin, clean, noise, batch.embeds, batch.read_levels_B) if use_z else None
        found = None if z is None else pair.vin.keys_of_layers(z)
        noisy = noised(clean[:, frames], noise[:, frames], batch.levels_B)
        velocity = self.velocity(pair, noisy, batch.embeds, batch.levels_B, part.start, found)
        error = (velocity - (noise - clean)[:, frames]).square().mean(2)
        on_objects = mean_on_objects(error.flatten(1), batch.objects[:, frames].flatten(1))
        return Errors(error.flatten(1).mean(1), on_objects, z)

    def velocity(
        self,
        pair: Pair,
        noisy: Tensor,
        embeds: Tensor,
        levels_B: Tensor,
        start: int,
        found: Sequence[Keys] | None,
    ) -> Tensor:
        """Returns the velocity of the frames of one chunk, which begins at frame `start` of the video, its context
        first, (B, c, C, X, X); `found` are the keys and values of the global tokens."""
        frames = noisy.shape[1]
        still = chart(1, *noisy.shape[2:]).to(noisy).expand(len(noisy), -1, -1, -1, -1)
        tokens = self.grid.patchify(torch.cat([still, noisy], 1))
        timesteps = torch.cat([levels_B.new_zeros(len(noisy), 1), 1000 * levels_B.unsqueeze(1).expand(-1, frames)], 1)
        indices = [0, *range(start + 1, start + frames + 1)]  # the chart is the frame before the video
        mask = _mask(self.grid.tokens, tokens.shape[1], 0 if found is None else found[0].k.shape[1], self.device)
        rotation = self._rope.rotation(indices).of_queries
        velocity = forward(pair.dit, tokens, timesteps, embeds, rotation, mask, frames, found)
        return self.grid.unpatchify(velocity)

    def chunk(self, frames: int, generator: torch.Generator) -> int:
        """Draws the number of a chunk of a video of so many latent frames."""
        return int(torch.randint(len(cut(frames, self.config)), (), generator=generator))

    def read(
        self, vin: VideoInterfaceNetwork, clean: Tensor, noise: Tensor, embeds: Tensor, levels_B: Tensor
    ) -> Tensor:
        """Computes the global tokens of videos at their noise levels, (B, G, D), in bfloat16."""
        keyframes = self.keyframes(clean.shape[1])
        at = [index - 1 for index in keyframes]
        noisy = noised(clean[:, at], noise[:, at], levels_B)
        with in_bfloat16(self.device):
            text = vin.text(embeds)
            embedded = self.position_embeddings(vin, text, keyframes)
            state = vin.ask(text, 1000 * levels_B, "torch")
            keys = vin.keyframes(self.grid.patchify(noisy), embedded, state)
            return vin.process(attention(vin.queries(state), keys, "torch"), state, "torch").float()

    def position_embeddings(self, vin: VideoInterfaceNetwork, text_BLD: Tensor, indices: Sequence[int]) -> Tensor:
        """Computes the embeddings of the tokens' positions at these global time indices, (B, len(indices)·S, D)."""
        positions_KS3 = positions(torch.tensor(list(indices)), *self._shard.rows_and_columns())
        return vin.position_embeddings(positions_KS3.to(self.device), text_BLD, "torch")

    def keyframes(self, frames: int) -> Sequence[int]:
        """The global time indices of the keyframes of a video of so many latent frames."""
        return AssignedChunks(cut(frames, self.config, start=1), self.config).keyframes


def noised(clean: Tensor, noise: Tensor, levels_B: Tensor) -> Tensor:
    """Videos at their noise levels, (B, F, C, X, X)."""
    return torch.lerp(clean, noise, levels_B.view(-1, 1, 1, 1, 1))


def in_bfloat16(device: torch.device) -> AbstractContextManager[None]:
    """Products in bfloat16, which many machines compute faster."""
    return torch.autocast(device.type, torch.bfloat16)


@cache
def _mask(tokens: int, frames: int, further: int, device: torch.device) -> Tensor:
    """The first frame, the chart, sees itself alone; see `forward`."""
    hidden = torch.zeros(frames * tokens, frames * tokens + further, device=device)
    hidden[:tokens, tokens:] = -1e30
    return hidden
