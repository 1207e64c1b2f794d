"""The DiT's forward in training: one block-causal sequence of clean history and noisy chunks.

Shapes: B videos, N noisy chunks, S tokens a frame, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from causalrope_kernels import attention
from causalrope_sp.config import DiTConfig, SamplerConfig, StreamConfig
from causalrope_sp.grid import LatentGrid, Shard
from causalrope_sp.model import ForwardPass
from causalrope_sp.rope import RotaryTables
from causalrope_sp.toybox.chart import chart
from causalrope_sp.toybox.text import TEXT_DIM, TEXT_LEN

CONFIG = DiTConfig(dim=192, ffn_dim=768, num_heads=6, num_layers=6, text_dim=TEXT_DIM, text_len=TEXT_LEN, freq_dim=64)
CHUNK = 3
STREAM = StreamConfig(window=12, sink=0, chunk_frames=CHUNK)
SAMPLER = SamplerConfig(steps=(1000, 750, 500, 250), shift=1.0)
TIMES = torch.tensor(SAMPLER.steps) / 1000


@dataclass
class Batch:
    """What one step learns from.

    Clean history (B, F, C, X, X), after the chart if the stream's opening is in sight, and the chunks to predict,
    (B, N·CHUNK, C, X, X), chunk n at place `numbers[n]` counted from the history's first frame.
    """

    history: Tensor
    target: Tensor
    numbers: Sequence[int]
    times_BN: Tensor
    embeds: Tensor
    opening: bool = True  # False: the stream's start, and so its chart, is out of sight


class TeacherForcing:
    """The forward of training: clean history and noisy chunks in one sequence, each seeing what it will in a stream."""

    def __init__(self, grid: LatentGrid, device: torch.device) -> None:
        self.grid, self.device = grid, device
        self._rope = RotaryTables(CONFIG.head_dim, CONFIG.theta, Shard(grid), device, torch.float32)

    def errors(self, model: nn.Module, batch: Batch, generator: torch.Generator, *, own_guess: bool = False) -> Tensor:
        """The squared error of the velocity that leads to the target, (B, N), from fresh noise on the target or, with
        `own_guess`, half of the time on what the model itself makes of pure noise, as its sampler meets it. There the
        error is taken of the clean latent, since no velocity at little noise can undo a wrong guess."""
        noise = torch.randn(batch.target.shape, generator=generator)
        source, weight_BN = batch.target, torch.ones_like(batch.times_BN)
        if own_guess:
            half = torch.rand(batch.times_BN.shape, generator=generator) < 0.5
            source = torch.where(_by_frame(half), self._guess(model, batch, generator), source)
            weight_BN = torch.where(half, batch.times_BN**2, weight_BN)
        level = _by_frame(batch.times_BN)
        noisy = (1 - level) * source + level * noise
        velocity = self._velocity(model, batch, noisy)
        error = (velocity - ((noisy - batch.target) / level).to(self.device)).square().mean((2, 3, 4))
        return error.unflatten(1, (len(batch.numbers), CHUNK)).mean(2) * weight_BN.to(self.device)

    @torch.no_grad()
    def _guess(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor:
        noise = torch.randn(batch.target.shape, generator=generator)
        at_start = replace(batch, times_BN=torch.ones_like(batch.times_BN))
        return noise - self._velocity(model, at_start, noise).cpu()

    def _velocity(self, model: nn.Module, batch: Batch, noisy: Tensor) -> Tensor:
        history = batch.history
        if batch.opening:
            history = torch.cat([chart(len(history), *history.shape[2:]), history], 1)
        past, opening = history.shape[1], int(batch.opening)
        starts = [opening + CHUNK * number for number in batch.numbers]
        tokens = torch.cat([self.grid.patchify(x.to(self.device)) for x in (history, noisy)], 1)
        still = batch.times_BN.new_zeros(len(history), past)
        timesteps = torch.cat([still, 1000 * batch.times_BN.repeat_interleave(CHUNK, 1)], 1)

        def attend(_: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self._attend(q, k, v, past, opening, starts)

        step = ForwardPass(
            timesteps_F=timesteps.to(self.device),
            predicted_frames=noisy.shape[1],
            rotation=self._rope.rotation([*range(past), *(start + f for start in starts for f in range(CHUNK))]),
            text=model.encode_text(batch.embeds),
            attend=attend,
        )
        with torch.autocast(self.device.type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            # the backward of the fused kernels is three times slower on a CPU for sequences as short as these
            velocity = model(tokens.flatten(1, 2), step)
        return self.grid.unpatchify(velocity.float().unflatten(1, (noisy.shape[1], -1)))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, past: int, opening: int, starts: list[int]) -> Tensor:
        tokens = self.grid.tokens

        def frames(x: Tensor, first: int, stop: int) -> Tensor:
            return x[:, first * tokens : stop * tokens]

        clean = ([0] if opening else []) + list(range(opening, past, CHUNK))
        outputs = []
        for start, stop in zip(clean, [*clean[1:], past], strict=True):
            seen = max(0, stop - STREAM.window)
            outputs.append(attention(frames(q, start, stop), frames(k, seen, stop), frames(v, seen, stop)))
        for n, start in enumerate(starts):
            own = past + n * CHUNK
            seen = max(0, start + CHUNK - STREAM.window)
            keys, values = (torch.cat([frames(x, seen, start), frames(x, own, own + CHUNK)], 1) for x in (k, v))
            outputs.append(attention(frames(q, own, own + CHUNK), keys, values))
        return torch.cat(outputs, 1)


def _by_frame(x_BN: Tensor) -> Tensor:
    return x_BN.repeat_interleave(CHUNK, 1)[:, :, None, None, None]
