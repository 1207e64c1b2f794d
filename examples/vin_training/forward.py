"""The forward of training: one pass of the DiT over one chunk of each of some videos. A chunk attends the chart, its
own frames and the global tokens of its video. `causalrope_sp.vin.parallel_sampler` computes the same for all chunks,
from a cache. The DiT runs compiled and in bfloat16, as in the training of toybox.

Shapes: B videos, F latent frames of a video, c frames of a chunk, S tokens a frame, C channels, X latent width and
height, L text tokens, W text width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from toybox_training.dit import forward

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
class Batch:
    """Videos, (B, F, C, X, X), masks of their objects, (B, F, X, X), text embeddings, (B, L, W), and noise levels from
    0 to 1, (B,)."""

    clean: Tensor
    objects: Tensor
    embeds: Tensor
    times_B: Tensor


class TogetherForcing:
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
        self, pair: Pair, batch: Batch, chunk: int, generator: torch.Generator, *, use_z: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Returns the mean squared errors of the velocity of chunk number `chunk`, each (B,): over its frames, and over
        the objects in them, 0 if there are none."""
        noise = torch.randn(batch.clean.shape, generator=generator)
        level = batch.times_B.view(-1, 1, 1, 1, 1)
        noisy = (1 - level) * batch.clean + level * noise
        part = cut(noisy.shape[1], self.config)[chunk]
        frames = slice(part.start, part.stop)
        velocity = self.velocity(pair, noisy, batch.embeds, batch.times_B, chunk, use_z)
        error = (velocity - (noise - batch.clean)[:, frames].to(self.device)).square().mean(2)
        mask = batch.objects[:, frames].to(self.device)
        on_objects = (error * mask).flatten(1).sum(1) / mask.flatten(1).sum(1).clamp(min=1)
        return error.flatten(1).mean(1), on_objects

    def velocity(
        self, pair: Pair, noisy: Tensor, embeds: Tensor, times_B: Tensor, chunk: int, use_z: bool = True
    ) -> Tensor:
        """Returns the velocity of the frames of one chunk, its context first, (B, c, C, X, X)."""
        noisy, embeds, times_B = noisy.to(self.device), embeds.to(self.device), 1000 * times_B.to(self.device)
        part = cut(noisy.shape[1], self.config)[chunk]
        still = chart(len(noisy), *noisy.shape[2:]).to(noisy)
        tokens = self.grid.patchify(torch.cat([still, noisy[:, part.start : part.stop]], 1))
        timesteps = torch.cat([times_B.new_zeros(len(noisy), 1), times_B.unsqueeze(1).expand(-1, part.frames)], 1)
        times = [0, *range(part.start + 1, part.stop + 1)]  # the chart is the frame before the video
        found = self._globals(pair.vin, noisy, embeds, times_B) if use_z else None
        mask = _mask(self.grid.tokens, tokens.shape[1], 0 if found is None else found[0].k.shape[1]).to(self.device)
        rotation = self._rope.rotation(times).of_queries
        velocity = forward(pair.dit, tokens, timesteps, embeds, rotation, mask, part.frames, found)
        return self.grid.unpatchify(velocity)

    def chunk(self, frames: int, generator: torch.Generator) -> int:
        """Draws the number of a chunk of a video of so many latent frames."""
        return int(torch.randint(len(cut(frames, self.config)), (), generator=generator))

    def _globals(self, vin: VideoInterfaceNetwork, noisy: Tensor, embeds: Tensor, timesteps_B: Tensor) -> list[Keys]:
        video = AssignedChunks(cut(noisy.shape[1], self.config, start=1), self.config)
        tokens = self.grid.patchify(noisy[:, video.offsets(video.keyframes)])
        times = torch.tensor(list(video.keyframes), device=self.device)
        positions_KS3 = positions(times, *(x.to(self.device) for x in self._shard.rows_and_columns()))
        time = vin.time(timesteps_B)
        read = attention(vin.queries(time), vin.keyframes(tokens, positions_KS3, time), "torch")
        return vin.globals(read, embeds, time, "torch")


@cache
def _mask(tokens: int, frames: int, further: int) -> Tensor:
    """The first frame, the chart, sees itself alone; see `forward`."""
    hidden = torch.zeros(frames * tokens, frames * tokens + further)
    hidden[:tokens, tokens:] = -1e30
    return hidden
