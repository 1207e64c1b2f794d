"""Stages 3 and 4: what teacher and student learn from at each step."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from causalrope_sp.grid import Chunk
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.sampling.sampler import sample_chunks
from causalrope_sp.toybox.chart import chart

from .dit import CHUNK, RING, SAMPLER, STREAM, TIMES, Batch, TeacherForcing
from .latents import Latents
from .training import Training, processes, rank

TEACHER_SEED, STUDENT_SEED = 50_000_000, 60_000_000
FIRST_BATCH = 16  # videos a step of which the first chunk is learned, and
LATER_BATCH = 5  # of which later chunks are
POOL = 160  # self-made videos that a student learns from at a time; made anew when a run is resumed
POOL_FRAMES = 63  # their length in latent frames
STRAYED = 0.6  # the mean square error, on objects, from which on a self-made history teaches nothing
STUDENT_SHARES = torch.tensor([0.4, 0.25, 0.2, 0.15])  # how often the student meets each of its times, from noise on
PERIOD = 16  # latent frames after which every motion repeats itself
LONGEST = 24  # periods by which a scene is made older than it is, so that a stream can go on for minutes


@dataclass(frozen=True)
class Scenes:
    """What is learned from: `openings` for the first chunk alone, `clips` of five chunks, and `long` ones of eleven."""

    openings: Latents
    clips: Latents
    long: Latents


def train_teacher(
    path: Path, model: CausalDiT, scenes: Scenes, forcing: TeacherForcing, steps: int, lr: float
) -> CausalDiT:
    """Flow matching on first chunks and on later ones, in equal parts of work."""
    training = _training(model.to(forcing.device), path, lr, average=0.997)
    while training.step < steps:
        generator = _generator(TEACHER_SEED, training)
        first = _teacher_batch(scenes.openings, FIRST_BATCH, [0], generator)
        if training.step % 3:
            later = _teacher_batch(scenes.clips, LATER_BATCH, [1, 2, 3, 4], generator)
        else:
            offset, start = _somewhere(scenes.long.latents.shape[1], generator)
            later = _teacher_batch(scenes.long, LATER_BATCH, [3, 4], generator, offset=offset, start=start)
        _step(training, forcing, {"first": first, "later": later}, generator, steps, warm_up=100, plateau=0.3)
    training.save()
    return training.ema


def train_student(
    path: Path, model: CausalDiT, scenes: Scenes, forcing: TeacherForcing, steps: int, lr: float
) -> CausalDiT:
    """The sampler's own four times, on the truth's history and, in every third step, on one that the student made."""
    training = _training(model.to(forcing.device), path, lr, average=0.995)
    pool: list[tuple[int, Tensor]] = []
    while training.step < steps:
        generator = _generator(STUDENT_SEED, training)
        if training.step % 30 == 0 or not pool:
            pool = (pool + _roll_out(training.ema, scenes.long, forcing, 12, generator))[-POOL:]
        first = _teacher_batch(scenes.openings, FIRST_BATCH, [0], generator, drop=0.0)
        if training.step % 3 == 0:
            later = _own_history_batch(pool, scenes.long, [1, 2] if training.step % 2 else [3, 4], generator)
        elif training.step % 3 == 1:
            later = _teacher_batch(scenes.clips, LATER_BATCH, [1, 2, 3, 4], generator, drop=0.0)
        else:
            offset, start = _somewhere(scenes.long.latents.shape[1], generator)
            later = _teacher_batch(scenes.long, LATER_BATCH, [3, 4], generator, offset=offset, start=start, drop=0.0)
        first, later = _at_student_times(first, generator), _at_student_times(later, generator)
        batches = {"first": first, "later": later}
        _step(training, forcing, batches, generator, steps, warm_up=50, plateau=0.3, own_guess=training.step % 2 == 0)
    training.save()
    return training.ema


def _generator(seed: int, training: Training) -> torch.Generator:
    return torch.Generator().manual_seed(seed + processes() * training.step + rank())


def _training(model: nn.Module, path: Path, lr: float, average: float) -> Training:
    def matrix(name: str, parameter: nn.Parameter) -> bool:
        return parameter.ndim == 2 and name.startswith("blocks") and "modulation" not in name

    return Training(model.requires_grad_(True), path, lr, matrix, average)


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
        errors, on_objects = forcing.errors(training.model, batch, generator, own_guess=own_guess)
        at_start = batch.times_BN > 0.9
        report |= {f"{name}_loss": errors.mean().item(), f"{name}_from_noise": errors.detach()[at_start].mean().item()}
        losses += [errors.mean(), on_objects.mean()]
    progress = training.step / steps
    fall = 1 if progress < plateau else max(0.02, (1 - progress) / (1 - plateau))
    training.update(sum(losses) / len(losses), min(1, (training.step + 1) / warm_up) * fall, report)


def _chunks(latents: Tensor, numbers: Sequence[int]) -> Tensor:
    return torch.cat([latents[:, number * CHUNK : (number + 1) * CHUNK] for number in numbers], 1)


def _going_on(x: Tensor, frames: int) -> Tensor:
    """Videos (N, F, ...) for `frames` frames, past their end by what they showed a period before."""
    have = x.shape[1]
    return x[:, [f if f < have else have - PERIOD + (f - have) % PERIOD for f in range(frames)]]


def _somewhere(frames: int, generator: torch.Generator) -> tuple[int, int]:
    """A frame of videos this long that has a ring and a chunk from it on, and a global time index for it: its own, or
    that of the same moment some periods later."""
    last = frames // CHUNK - RING // CHUNK
    offset = CHUNK * int(torch.randint(1, last, (), generator=generator))
    return offset, 1 + offset + PERIOD * int(torch.randint(LONGEST, (), generator=generator))


def _teacher_batch(
    data: Latents,
    size: int,
    numbers: list[int],
    generator: torch.Generator,
    *,
    offset: int = 0,
    start: int = 1,
    drop: float = 0.1,
) -> Batch:
    """Scenes from frame `offset` on, at any time, with some of the student's times among them and much pure noise,
    which is where most is decided."""
    pick = data.draw(size, generator)
    seen = slice(offset, offset + (max(numbers) + 1) * CHUNK)
    clean, objects, embeds = data.latents[pick, seen].float(), data.objects[pick, seen].clone(), data.embeds[pick]
    dropped = torch.rand(size, generator=generator) < drop
    embeds[dropped], objects[dropped] = 0, True
    history = clean[:, : max(numbers) * CHUNK]
    amount = torch.rand(size, 1, 1, 1, 1, generator=generator) * 0.15
    amount = amount * (torch.rand(size, 1, 1, 1, 1, generator=generator) < 0.5)
    history = (1 - amount) * history + amount * torch.randn(history.shape, generator=generator)
    times = torch.rand(size, len(numbers), generator=generator)
    chosen = torch.rand(times.shape, generator=generator)
    times = torch.where(chosen < 0.3, TIMES[torch.randint(len(TIMES), times.shape, generator=generator)], times)
    times = torch.where(chosen > 0.6, 1.0, times)
    return Batch(history, _chunks(clean, numbers), _chunks(objects, numbers), numbers, times, embeds, start)


def _at_student_times(batch: Batch, generator: torch.Generator) -> Batch:
    drawn = torch.multinomial(STUDENT_SHARES, batch.times_BN.numel(), replacement=True, generator=generator)
    return replace(batch, times_BN=TIMES[drawn].view(batch.times_BN.shape))


def _own_history_batch(
    pool: list[tuple[int, Tensor]], long: Latents, numbers: list[int], generator: torch.Generator
) -> Batch:
    """What follows in truth on histories from the pool: from the stream's start, or from anywhere later, where a chunk
    has its whole window behind it (numbers from 3 on). It weighs less, down to nothing, the further the chunk before
    has left the truth: what cannot be found from its history would only teach the student to draw nothing clearly."""
    chosen = [pool[int(torch.randint(len(pool), (), generator=generator))] for _ in range(LATER_BATCH)]
    pick, own = torch.tensor([number for number, _ in chosen]), torch.stack([video for _, video in chosen])
    offset, start = _somewhere(POOL_FRAMES, generator) if min(numbers) >= 3 else (0, 1)
    truth, objects = (_going_on(x[pick], POOL_FRAMES)[:, offset:] for x in (long.latents, long.objects))
    own, truth = own[:, offset:], truth.float()
    before = [number - 1 for number in numbers]
    error, seen = _chunks((own - truth).square().mean(2), before), _chunks(objects, before)
    error, seen = (x.unflatten(1, (-1, CHUNK)).flatten(2) for x in (error, seen))
    strayed = (error * seen).sum(2) / seen.sum(2).clamp(min=1)
    return Batch(
        own[:, : max(numbers) * CHUNK],
        _chunks(truth, numbers),
        _chunks(objects, numbers),
        numbers,
        torch.ones(LATER_BATCH, len(numbers)),
        long.embeds[pick],
        start,
        weights_BN=(1 - strayed / STRAYED).clamp(min=0),
    )


def _roll_out(
    model: CausalDiT, long: Latents, forcing: TeacherForcing, count: int, generator: torch.Generator
) -> list[tuple[int, Tensor]]:
    """Videos that the model makes of scenes of `long`: (the scene's number, its latents)."""
    pick = long.draw(count, generator)

    def noise(chunk: Chunk, _: int) -> Tensor:
        return torch.randn(count, chunk.frames, *long.latents.shape[2:], generator=generator)

    rounded = copy.deepcopy(model).to(torch.bfloat16).requires_grad_(False)  # as the weights are shipped
    chunks = sample_chunks(
        rounded,
        long.embeds[pick].to(torch.bfloat16),
        noise,
        forcing.grid,
        POOL_FRAMES,
        stream=STREAM,
        sampler=SAMPLER,
        initial_latents=chart(count, *long.latents.shape[2:]),
    )
    made = torch.cat([chunk.latents for chunk in chunks], 1).float().cpu().clone()
    return list(zip(pick.tolist(), made, strict=True))
