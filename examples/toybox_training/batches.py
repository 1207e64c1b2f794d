"""What a step draws at random, and the batches of scenes it learns from. See `dit.Batch` for their shapes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from causalrope_sp.devices import send

from .dit import CHUNK, LEVELS, Batch
from .latents import Latents

DROPPED = 0.1  # how often the text is left out, for guidance


@dataclass(frozen=True)
class Draws:
    """Random numbers: of `choices`, on the CPU, what the host decides, and of `values` what stays on the device."""

    choices: torch.Generator
    values: torch.Generator

    @classmethod
    def seeded(cls, seed: int, device: torch.device) -> Draws:
        choices = torch.Generator().manual_seed(seed)
        other = int(torch.randint(2**62, (), generator=choices))
        return cls(choices, torch.Generator(device).manual_seed(other))

    def below(self, stop: int) -> int:
        return int(torch.randint(stop, (), generator=self.choices))

    def happens(self, chance: float) -> bool:
        return bool(torch.rand((), generator=self.choices) < chance)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.values, device=self.values.device)

    def which(self, chance: float, *shape: int) -> Tensor:
        return self.uniform(*shape) < chance

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.values, device=self.values.device)


def batch_of(
    data: Latents,
    size: int,
    sizes: list[int],
    numbers: list[int],
    draws: Draws,
    offset: int = 0,
    start: int = 1,
    pick: Tensor | None = None,
) -> Batch:
    """Scenes from frame `offset` on, at any time, half of them with a noisy history."""
    pick = send(data.draw(size, draws.choices), data.latents.device) if pick is None else pick
    past = sum(sizes)
    clean, objects = data.frames(pick, offset, offset + past + CHUNK)
    target, objects = (chunks_of(x, [*sizes, CHUNK], numbers) for x in (clean, objects))
    dropped = draws.which(DROPPED, size, 1, 1)
    embeds, objects = data.embeds[pick].masked_fill(dropped, 0), objects | dropped.unsqueeze(3)
    history = with_noise(clean[:, :past], draws)
    return Batch(history, sizes, target, objects, numbers, noise_levels(size, len(numbers), draws), embeds, start)


def with_noise(history: Tensor, draws: Draws) -> Tensor:
    """The history, with some noise in half of the videos."""
    one_each = (len(history), 1, 1, 1, 1)
    amount = draws.uniform(*one_each) * 0.15 * draws.which(0.5, *one_each)
    return (1 - amount) * history + amount * draws.normal(history.shape)


def noise_levels(size: int, chunks: int, draws: Draws) -> Tensor:
    """Noise levels: pure noise, those that the four-step sampler meets, and any."""
    chosen, device = draws.uniform(size, chunks), draws.values.device
    later = torch.randint(1, len(LEVELS), chosen.shape, generator=draws.values, device=device)
    any_level = draws.uniform(size, chunks).clamp(min=0.02)
    return torch.where(chosen < 0.45, 1.0, torch.where(chosen < 0.75, send(LEVELS, device)[later], any_level))


def chunks_of(latents: Tensor, sizes: list[int], numbers: list[int]) -> Tensor:
    """The chunks to predict, (B, N·CHUNK, ...): chunk n begins where the first `numbers[n]` chunks of the history, of
    `sizes` frames each, end."""
    starts = [sum(sizes[:number]) for number in numbers]
    return torch.cat([latents[:, start : start + CHUNK] for start in starts], 1)


def by_frame(x_BN: Tensor) -> Tensor:
    return x_BN.repeat_interleave(CHUNK, 1)[:, :, None, None, None]
