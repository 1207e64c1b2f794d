"""Stages 3 and 4: what teacher and student learn from at each step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from causalrope_sp.grid import Chunk
from causalrope_sp.model import CausalDiT
from causalrope_sp.sampler import sample_chunks
from causalrope_sp.toybox.chart import chart

from .dit import CHUNK, CONFIG, SAMPLER, STREAM, TIMES, Batch, TeacherForcing
from .latents import Latents
from .training import Training

TEACHER_SEED, STUDENT_SEED = 20_000_000, 50_000_000
FIRST_BATCH = 24  # videos a step of which the first chunk is learned, and
LATER_BATCH = 4  # of which later chunks are
POOL = 160  # self-made videos that a student learns from at a time; made anew when a run is resumed


def train_teacher(path: Path, data: Latents, forcing: TeacherForcing, steps: int, lr: float) -> CausalDiT:
    """Flow matching on first chunks and on later ones, in equal parts of work."""
    torch.manual_seed(0)
    model = CausalDiT(CONFIG)
    nn.init.zeros_(model.head.linear.weight)
    nn.init.zeros_(model.head.linear.bias)
    training = _training(model.to(forcing.device), path, lr, average=0.997)
    while training.step < steps:
        generator = torch.Generator().manual_seed(TEACHER_SEED + training.step)
        first = _teacher_batch(data, [0], FIRST_BATCH, generator)
        later = _teacher_batch(data, [1, 2, 3, 4], LATER_BATCH, generator)
        _step(training, forcing, {"first": first, "later": later}, generator, steps, warm_up=100, plateau=0.4)
    training.save()
    return training.ema


def train_student(
    path: Path, teacher: CausalDiT, data: Latents, long: Latents, forcing: TeacherForcing, steps: int, lr: float
) -> CausalDiT:
    """The sampler's own four times, on histories that the student made itself."""
    torch.manual_seed(0)
    training = _training(teacher.requires_grad_(True), path, lr, average=0.995)
    pool: list[tuple[int, Tensor]] = []
    while training.step < steps:
        generator = torch.Generator().manual_seed(STUDENT_SEED + training.step)
        if training.step % 12 == 0 or not pool:
            pool = (pool + _roll_out(training.ema, long, forcing, 20, generator))[-POOL:]
        if training.step % 2 == 0:
            first = _at_student_times(_teacher_batch(data, [0], FIRST_BATCH, generator, drop=0.0), generator)
        else:
            first = _own_history_batch(pool, long, [1, 1, 2, 3], generator)
        if training.step % 3 == 0:
            later = _own_history_batch(pool, long, [1, 1, 2, 3], generator)
        else:
            later = _own_history_batch(pool, long, [3, 3, 4, 4], generator)
        batches = {"first": first, "later": later}
        _step(training, forcing, batches, generator, steps, warm_up=50, plateau=0.3, own_guess=training.step % 2 == 0)
    training.save()
    return training.ema


def _training(model: nn.Module, path: Path, lr: float, average: float) -> Training:
    def matrix(name: str, parameter: nn.Parameter) -> bool:
        return parameter.ndim == 2 and name.startswith("blocks") and "modulation" not in name

    return Training(model, path, lr, matrix, average)


def _step(
    training: Training,
    forcing: TeacherForcing,
    batches: dict[str, Batch],
    generator: torch.Generator,
    steps: int,
    *,
    warm_up: int,
    plateau: float,
    own_guess: bool = False,
) -> None:
    losses, report = [], {}
    for name, batch in batches.items():
        errors = forcing.errors(training.model, batch, generator, own_guess=own_guess)
        at_start = errors.detach()[batch.times_BN > 0.9]
        report |= {f"{name}_loss": errors.mean().item(), f"{name}_from_noise": at_start.mean().item()}
        losses.append(errors.mean())
    progress = training.step / steps
    fall = 1 if progress < plateau else max(0.02, (1 - progress) / (1 - plateau))
    training.update(sum(losses) / len(losses), min(1, (training.step + 1) / warm_up) * fall, report)


def _chunks(latents: Tensor, numbers: Sequence[int]) -> Tensor:
    return torch.cat([latents[:, number * CHUNK : (number + 1) * CHUNK] for number in numbers], 1)


def _teacher_batch(
    data: Latents, numbers: list[int], size: int, generator: torch.Generator, drop: float = 0.1
) -> Batch:
    """Scenes at mostly any time, with some of the student's times and, for first chunks, much pure noise among them."""
    pick = torch.randint(len(data.latents), (size,), generator=generator)
    clean, embeds = data.latents[pick].float(), data.embeds[pick].clone()
    embeds[torch.rand(size, generator=generator) < drop] = 0
    history = clean[:, : max(numbers) * CHUNK]
    amount = torch.rand(size, 1, 1, 1, 1, generator=generator) * 0.2
    amount = amount * (torch.rand(size, 1, 1, 1, 1, generator=generator) < 0.7)
    history = (1 - amount) * history + amount * torch.randn(history.shape, generator=generator)
    times = torch.rand(size, len(numbers), generator=generator)
    chosen = torch.rand(times.shape, generator=generator)
    times = torch.where(chosen < 0.4, TIMES[torch.randint(len(TIMES), times.shape, generator=generator)], times)
    if numbers == [0]:
        times = torch.where(chosen > 0.7, 1.0, times)
    return Batch(history, _chunks(clean, numbers), numbers, times, embeds)


def _at_student_times(batch: Batch, generator: torch.Generator) -> Batch:
    batch.times_BN = TIMES[torch.randint(len(TIMES), batch.times_BN.shape, generator=generator)]
    return batch


def _own_history_batch(
    pool: list[tuple[int, Tensor]], long: Latents, numbers: list[int], generator: torch.Generator
) -> Batch:
    """What follows in truth on histories from the pool: from the stream's start, or from anywhere later, where a chunk
    has its whole window behind it (numbers from 3 on)."""
    chosen = [pool[int(torch.randint(len(pool), (), generator=generator))] for _ in range(LATER_BATCH)]
    pick, own = torch.tensor([number for number, _ in chosen]), torch.stack([video for _, video in chosen])
    offset = 0
    if min(numbers) >= 3:
        offset = int(torch.randint(1, own.shape[1] // CHUNK - 4, (), generator=generator)) * CHUNK
    truth = long.latents[pick].float()[:, offset:]
    times = TIMES[torch.randint(len(TIMES), (LATER_BATCH, len(numbers)), generator=generator)]
    history = own[:, offset : offset + max(numbers) * CHUNK]
    return Batch(history, _chunks(truth, numbers), numbers, times, long.embeds[pick], opening=not offset)


def _roll_out(
    model: CausalDiT, long: Latents, forcing: TeacherForcing, count: int, generator: torch.Generator
) -> list[tuple[int, Tensor]]:
    """Videos that the model makes of scenes of `long`: (the scene's number, its latents)."""
    pick = torch.randint(len(long.latents), (count,), generator=generator)

    def noise(chunk: Chunk, _: int) -> Tensor:
        return torch.randn(count, chunk.frames, *long.latents.shape[2:], generator=generator)

    with torch.autocast(forcing.device.type, torch.bfloat16):
        chunks = sample_chunks(
            model,
            long.embeds[pick],
            noise,
            forcing.grid,
            long.latents.shape[1],
            stream=STREAM,
            sampler=SAMPLER,
            initial_latents=chart(count, *long.latents.shape[2:]),
        )
        made = torch.cat([chunk.latents for chunk in chunks], 1).float().cpu().clone()
    return list(zip(pick.tolist(), made, strict=True))
