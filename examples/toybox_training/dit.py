"""The DiT's forward in training: one block-causal sequence of clean history and noisy chunks.

Shapes: B videos, N noisy chunks, S tokens a frame, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from causalrope_kernels import Projection, project
from causalrope_kernels.reference import attention
from causalrope_sp.config import DiTConfig, SamplerConfig, StreamConfig
from causalrope_sp.grid import LatentGrid, Shard
from causalrope_sp.models.block import ForwardPass
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.models.rope import RotaryTables
from causalrope_sp.toybox.chart import chart
from causalrope_sp.toybox.toybox_text import TEXT_DIM, TEXT_LEN

CONFIG = DiTConfig(dim=192, ffn_dim=768, num_heads=6, num_layers=6, text_dim=TEXT_DIM, text_len=TEXT_LEN, freq_dim=64)
CHUNK = 3
STREAM = StreamConfig(window=13, sink=1, chunk_frames=CHUNK)  # the chart stays, and four chunks go round
RING = 12
SAMPLER = SamplerConfig(steps=(1000, 750, 500, 250), shift=1.0)
TIMES = torch.tensor(SAMPLER.steps) / 1000


def new_model() -> CausalDiT:
    """The untrained DiT: it predicts zeros."""
    torch.manual_seed(0)
    model = CausalDiT(CONFIG)
    nn.init.zeros_(model.head.linear.weight)
    nn.init.zeros_(model.head.linear.bias)
    return model


@dataclass
class Batch:
    """What one step learns from.

    Clean history (B, F, C, X, X), the chart left out, whose first frame has the global time index `start`, and the
    chunks to predict, (B, N·CHUNK, C, X, X), chunk n at place `numbers[n]` counted from the history's first frame.
    `objects` (B, N·CHUNK, X, X) is true where the target holds more than background; `weights_BN`
    is how much each chunk counts.
    """

    history: Tensor
    target: Tensor
    objects: Tensor
    numbers: Sequence[int]
    times_BN: Tensor
    embeds: Tensor
    start: int = 1
    weights_BN: Tensor | None = None


class TeacherForcing:
    """The forward of training: clean history and noisy chunks in one sequence, each seeing what it will in a stream."""

    def __init__(self, grid: LatentGrid, device: torch.device) -> None:
        self.grid, self.device = grid, device
        self._rope = RotaryTables(CONFIG.head_dim, CONFIG.theta, Shard(grid), device, torch.float32)

    def errors(
        self, model: nn.Module, batch: Batch, generator: torch.Generator, *, own_guess: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The squared error of the velocity that leads to the target, (B, N), over the picture and over its objects.

        The second keeps a small object from costing next to nothing. From fresh noise on the target or, with
        `own_guess`, half of the time on what the model itself makes of pure noise, as its sampler meets it. There the
        error is taken of the clean latent, since no velocity at little noise can undo a wrong guess.
        """
        noise = torch.randn(batch.target.shape, generator=generator)
        source, weight_BN = batch.target, torch.ones_like(batch.times_BN)
        if own_guess:
            half = torch.rand(batch.times_BN.shape, generator=generator) < 0.5
            source = torch.where(_by_frame(half), self._guess(model, batch, generator), source)
            weight_BN = torch.where(half, batch.times_BN**2, weight_BN)
        level = _by_frame(batch.times_BN)
        noisy = (1 - level) * source + level * noise
        velocity = self._velocity(model, batch, noisy)
        error = (velocity - ((noisy - batch.target) / level).to(self.device)).square().mean(2)
        error, objects = (x.unflatten(1, (-1, CHUNK)).flatten(2) for x in (error, batch.objects.to(self.device)))
        if batch.weights_BN is not None:
            weight_BN = weight_BN * batch.weights_BN
        weight_BN = weight_BN.to(self.device)
        on_objects = (error * objects).sum(2) / objects.sum(2).clamp(min=1)
        return error.mean(2) * weight_BN, on_objects * weight_BN

    @torch.no_grad()
    def _guess(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        noise = torch.randn(batch.target.shape, generator=generator)
        at_start = replace(batch, times_BN=torch.ones_like(batch.times_BN))
        return noise - self._velocity(model, at_start, noise).cpu()

    def _velocity(self, model: nn.Module, batch: Batch, noisy: Tensor) -> Tensor:
        history = torch.cat([chart(len(batch.history), *batch.history.shape[2:]), batch.history], 1)
        past = history.shape[1]
        starts = [1 + CHUNK * number for number in batch.numbers]
        tokens = torch.cat([self.grid.patchify(x.to(self.device)) for x in (history, noisy)], 1)
        still = batch.times_BN.new_zeros(len(history), past)
        timesteps = torch.cat([still, 1000 * batch.times_BN.repeat_interleave(CHUNK, 1)], 1)

        def attend(_: int, projection: Projection) -> Tensor:
            return self._attend(*project(projection), past, starts)

        frames = [*range(1, past), *(start + f for start in starts for f in range(CHUNK))]
        with torch.autocast(self.device.type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            # the backward of the fused kernels is three times slower on a CPU for sequences as short as these
            step = ForwardPass(
                timesteps_F=timesteps.to(self.device),
                predicted_frames=noisy.shape[1],
                rotation=self._rope.rotation([0, *(batch.start - 1 + frame for frame in frames)]),
                text=model.encode_text(batch.embeds),  # under autocast too: keys have the dtype of queries
                attend=attend,
            )
            velocity = model(tokens.flatten(1, 2), step)
        return self.grid.unpatchify(velocity.float().unflatten(1, (noisy.shape[1], -1)))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, past: int, starts: list[int]) -> Tensor:
        tokens = self.grid.tokens

        def attend(begin: int, stop: int, seen: list[tuple[int, int]]) -> Tensor:
            keys, values = (torch.cat([x[:, a * tokens : b * tokens] for a, b in seen], 1) for x in (k, v))
            return attention(q[:, begin * tokens : stop * tokens], keys, values)

        outputs = [attend(0, 1, [(0, 1)])]
        for begin in range(1, past, CHUNK):
            stop = begin + CHUNK
            outputs.append(attend(begin, stop, [(0, 1), (max(1, stop - RING), stop)]))
        for n, begin in enumerate(starts):
            own = past + n * CHUNK
            before = (max(1, begin + CHUNK - RING), begin)
            outputs.append(attend(own, own + CHUNK, [(0, 1), before, (own, own + CHUNK)]))
        return torch.cat(outputs, 1)


def _by_frame(x_BN: Tensor) -> Tensor:
    return x_BN.repeat_interleave(CHUNK, 1)[:, :, None, None, None]
