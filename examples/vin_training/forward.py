"""The forward of training: all chunks of some videos in one pass of the DiT, each attending the chart, its own frames,
with those of its context held fixed, and the global tokens. `causalrope_sp.vin.sampler` computes the same from a cache.

Shapes: B videos, F latent frames of a video, N chunks, c frames of a chunk, S tokens a frame, E numbers in a token,
C channels, X latent width = height, L text tokens, W text width, G global tokens, H heads, d head width, T = N·c·S.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from causalrope_kernels import Keys, Projection, attention, project
from causalrope_kernels.reference import attention as attend_whole
from causalrope_sp.grid import LatentGrid, Shard
from causalrope_sp.model import CausalDiT, ForwardPass
from causalrope_sp.rope import RotaryTables
from causalrope_sp.toybox.chart import chart
from causalrope_sp.vin.chunks import LaneChunks, cut
from causalrope_sp.vin.config import TogetherConfig
from causalrope_sp.vin.network import VideoInterfaceNetwork, places


class Pair(nn.Module):
    """The two networks that are trained together."""

    def __init__(self, dit: CausalDiT, vin: VideoInterfaceNetwork) -> None:
        super().__init__()
        self.dit, self.vin = dit, vin


@dataclass(frozen=True)
class Batch:
    """Videos (B, F, C, X, X), where their objects are, (B, F, X, X), text (B, L, W), and noise levels, (B,)."""

    clean: Tensor
    objects: Tensor
    embeds: Tensor
    times_B: Tensor


class TogetherForcing:
    """Σ_i ‖v([X_i, Z], t) - v_i‖² over the frames that each chunk owns, v the velocity (ε - x0) that the DiT predicts.

    The chunk before's frames at its start are seen at the same noise level, take no loss, and pass no gradient on.
    """

    def __init__(
        self, grid: LatentGrid, config: TogetherConfig, pair: Pair, device: torch.device, autocast: bool = True
    ) -> None:
        self.grid, self.config, self.device, self._autocast = grid, config, device, autocast
        dit = pair.dit.config
        self._shard = Shard(grid)
        self._rope = RotaryTables(dit.head_dim, dit.theta, self._shard, device, torch.float32)

    def errors(
        self, pair: Pair, batch: Batch, generator: torch.Generator, *, use_z: bool = True
    ) -> tuple[Tensor, Tensor]:
        """The squared error of the velocity, (B,), over the picture and over its objects, whatever their size."""
        noise = torch.randn(batch.clean.shape, generator=generator)
        level = batch.times_B.view(-1, 1, 1, 1, 1)
        noisy = (1 - level) * batch.clean + level * noise
        own = self._own(batch.clean.shape[1])
        velocity = self.velocity(pair, noisy, batch.embeds, batch.times_B, use_z)
        error = (velocity - self._spread((noise - batch.clean).to(self.device))).square().mean(2)[:, own]
        seen = self._spread(batch.objects.to(self.device))[:, own]
        on_objects = (error * seen).flatten(1).sum(1) / seen.flatten(1).sum(1).clamp(min=1)
        return error.flatten(1).mean(1), on_objects

    def velocity(self, pair: Pair, noisy: Tensor, embeds: Tensor, times_B: Tensor, use_z: bool = True) -> Tensor:
        """Of the frames of all chunks, chunk after chunk, (B, N·c, C, X, X)."""
        batch, frames = noisy.shape[:2]
        chunks = cut(frames, self.config, start=1)
        assert all(chunk.frames == self.config.chunk_frames for chunk in chunks), "lengths that chunks fill"
        noisy, embeds, times_B = noisy.to(self.device), embeds.to(self.device), 1000 * times_B.to(self.device)
        spread = self._spread(noisy)
        still = chart(batch, *noisy.shape[2:]).to(noisy)
        tokens = self.grid.patchify(torch.cat([still, spread], 1))
        timesteps = torch.cat([times_B.new_zeros(batch, 1), times_B.unsqueeze(1).expand(-1, spread.shape[1])], 1)
        times = [frame for chunk in chunks for frame in range(chunk.start, chunk.stop)]
        with torch.autocast(self.device.type, torch.bfloat16, self._autocast), sdpa_kernel(SDPBackend.MATH):
            found = self._globals(pair.vin, noisy, embeds, times_B) if use_z else None

            def attend(layer: int, projection: Projection) -> Tensor:
                return self._attend(*project(projection), len(chunks), None if found is None else found[layer])

            step = ForwardPass(
                timesteps, spread.shape[1], self._rope.rotation([0, *times]), pair.dit.encode_text(embeds), attend
            )
            velocity = pair.dit(tokens.flatten(1, 2), step)
        return self.grid.unpatchify(velocity.float().unflatten(1, (spread.shape[1], -1)))

    def _globals(self, vin: VideoInterfaceNetwork, noisy: Tensor, embeds: Tensor, timesteps_B: Tensor) -> list[Keys]:
        video = LaneChunks(cut(noisy.shape[1], self.config, start=1), self.config)
        tokens = self.grid.patchify(noisy[:, video.places(video.keyframes)])
        times = torch.tensor(list(video.keyframes), device=self.device)
        where = places(times, *(x.to(self.device) for x in self._shard.rows_and_columns()))
        time = vin.time(timesteps_B)
        read = attention(vin.queries(time), vin.keyframes(tokens, where, time), "torch")
        return vin.globals(read, embeds, time, "torch")

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, chunks: int, found: Keys | None) -> Tensor:
        tokens = self.grid.tokens
        (chart_q, own_q), (chart_k, own_k), (chart_v, own_v) = (
            (x[:, :tokens], x[:, tokens:].unflatten(1, (chunks, -1))) for x in (q, k, v)
        )
        context = torch.zeros(own_k.shape[1:3], dtype=torch.bool, device=own_k.device)
        context[1:, : self.config.overlap * tokens] = True
        context = context[..., None, None]

        def keys(still: Tensor, own: Tensor, global_: Tensor | None) -> Tensor:
            own = torch.where(context, own.detach(), own)
            shared = [x.unsqueeze(1).expand(-1, chunks, -1, -1, -1) for x in (still, global_) if x is not None]
            return torch.cat([*(x.to(own.dtype) for x in shared), own], 2).flatten(0, 1)

        whole_k = keys(chart_k, own_k, None if found is None else found.k)
        whole_v = keys(chart_v, own_v, None if found is None else found.v)
        output = attend_whole(own_q.flatten(0, 1), whole_k, whole_v).unflatten(0, (-1, chunks)).flatten(1, 2)
        return torch.cat([attend_whole(chart_q, chart_k, chart_v), output], 1)

    def _spread(self, video: Tensor) -> Tensor:
        """The frames of all chunks, chunk after chunk: what two chunks share is there twice."""
        chunks = cut(video.shape[1], self.config)
        return torch.cat([video[:, chunk.start : chunk.stop] for chunk in chunks], 1)

    def _own(self, frames: int) -> Tensor:
        """Which of those frames a chunk owns."""
        chunks = cut(frames, self.config)
        flags = [n == 0 or f >= self.config.overlap for n, chunk in enumerate(chunks) for f in range(chunk.frames)]
        return torch.tensor(flags, device=self.device)
