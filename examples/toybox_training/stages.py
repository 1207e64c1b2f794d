"""The DiT: what it learns from at each step.

One network is taught all noise levels, half of the time at pure noise, where most is decided. It then samples in four
re-noised steps (toybox) or by Euler in sixteen (toybox-flow).
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from causalrope_sp.grid import Chunk
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.sampling.sampler import sample_chunks
from causalrope_sp.toybox.chart import chart
from causalrope_sp.toybox.toybox_text import leave_open

from .dit import CHUNK, RING, SAMPLER, STREAM, TIMES, Batch, TeacherForcing
from .latents import PERIOD, Changes, Latents
from .training import Training, processes, rank

SEED = 60_000_000
FIRST_BATCH = 12  # videos a step of which the first chunk is learned
PLATEAU = 0.2  # the share of the steps before the learning rate falls
POOL = 160  # self-made videos that the DiT learns from at a time; made anew when a run is resumed
NEW, EVERY = 8, 60  # as many are made new after as many steps
STRAYED = 0.6  # the mean square error, on objects, from which on a self-made history teaches nothing
FRAMES = 33  # latent frames of a scene that the DiT learns from: those after the encoded 21 repeat them
LATE = 2  # periods by which a video that the DiT made is longer than its scene
MEASURED_EVERY = 250  # steps
LONGEST = 24  # periods by which a scene is made older than it is, so that a stream can go on for minutes
DROPPED = 0.1  # how often the text is left out, for guidance


class DiTTraining:
    """Teaches a DiT the chunks of `scenes`, and from `changes` those after a new text.

    `weights_C` says how much an error of each latent channel counts, 1 on average. Every `MEASURED_EVERY` steps the log
    has the errors of the averaged model on `held_out`, which is never learned from, and on as many scenes that are. If
    the latter fall and the former do not, more steps do not help: more scenes do.
    """

    def __init__(
        self, forcing: TeacherForcing, scenes: Latents, held_out: Latents, changes: Changes, weights_C: Tensor
    ) -> None:
        self._forcing, self._scenes, self._held_out, self._changes = forcing, scenes, held_out, changes
        self._weights_C = weights_C.to(forcing.device)
        self._pool: list[tuple[int, Tensor]] = []

    def train(self, path: Path, model: CausalDiT, steps: int, lr: float) -> CausalDiT:
        """Trains to the step `steps`, resuming from `path`; returns the averaged model. What it was before the learning
        rate fell is kept beside, to go on from with more steps."""
        training = Training(model.requires_grad_(True).to(self._forcing.device), path, lr, _matrix, average=0.998)
        while training.step < steps:
            generator = torch.Generator().manual_seed(SEED + processes() * training.step + rank())
            if training.step % EVERY == 0 or not self._pool:
                self._pool = (self._pool + self._roll_out(training.ema, generator))[-POOL:]
            if training.step == int(PLATEAU * steps):
                training.save(path.with_stem(f"{path.stem}-plateau"))
            self._step(training, steps, generator)
        training.save()
        return training.ema

    def _step(self, training: Training[CausalDiT], steps: int, generator: torch.Generator) -> None:
        own_guess = training.step % 2 == 0
        first = _batch(self._scenes, FIRST_BATCH, [], [0], generator)
        kind, later = self._later(training.step % 8, generator)
        losses, report = list[Tensor](), dict[str, float]()
        for name, batch in (("first", first), (kind, later)):
            errors, on_objects = self._errors(training.model, batch, generator, own_guess)
            at_start = batch.times_BN > 0.99
            report |= {f"{name}_from_noise": on_objects.detach()[at_start].mean().item()}
            losses += [errors.mean(), on_objects.mean()]
        if (training.step + 1) % MEASURED_EVERY == 0:
            report |= self._measured(training.ema)
        progress = training.step / steps
        fall = 1 if progress < PLATEAU else max(0.02, (1 - progress) / (1 - PLATEAU))
        training.update(torch.stack(losses).mean(), min(1, (training.step + 1) / 100) * fall, report)

    def _later(self, turn: int, generator: torch.Generator) -> tuple[str, Batch]:
        """The chunks right after the start, whole windows, any time of a long stream, on the truth's history or on one
        that the DiT made; and what follows on a picture."""
        whole = [CHUNK] * 4
        if turn in (1, 2) and torch.rand((), generator=generator) < 0.5:
            return "changed", self._after_a_change(8, generator)
        if turn == 0:
            return "second", _batch(self._scenes, 10, [CHUNK], [0, 1], generator)
        if turn in (1, 4):
            batch = _batch(self._scenes, 5, whole, [1, 2, 3, 4], generator)
            if turn == 4:  # as after a picture
                batch.embeds[:] = leave_open(batch.embeds, places=True)
            return "later", batch
        if turn in (3, 5):
            return "image", self._on_a_picture(10, generator)
        offset, start = (0, 1) if turn == 6 else self._somewhere(generator)
        if turn == 7:
            return "later", _batch(self._scenes, 7, whole, [3, 4], generator, offset, start)
        return "own", self._on_its_own(7, whole, [1, 2] if turn == 6 else [3, 4], generator, offset, start)

    def _errors(
        self, model: CausalDiT, batch: Batch, generator: torch.Generator, own_guess: bool
    ) -> tuple[Tensor, Tensor]:
        """The squared error of the velocity that leads to the target, (B, N), over the picture and over its objects.

        The second keeps a small object from costing next to nothing. With `own_guess` half of the states are noise on
        what the model itself makes of pure noise, as its sampler meets them, and half of the histories hold it too.
        There the error is taken of the clean latent, since no velocity at little noise can undo a wrong guess.
        """
        noise = torch.randn(batch.target.shape, generator=generator)
        source, weight_BN = batch.target, batch.weights_BN.expand_as(batch.times_BN)
        if own_guess:
            guess = self._guess(model, batch, generator)
            half = torch.rand(batch.times_BN.shape, generator=generator) < 0.5
            source = torch.where(_by_frame(half), guess, source)
            weight_BN = torch.where(half, batch.times_BN**2, 1) * weight_BN
            batch = _with_history(batch, guess, generator)
        level = _by_frame(batch.times_BN)
        noisy = (1 - level) * source + level * noise
        velocity = self._forcing.velocity(model, batch, noisy)
        error = (velocity - ((noisy - batch.target) / level).to(velocity.device)).square()
        error = (error * self._weights_C[:, None, None]).mean(2)
        error, objects = (x.unflatten(1, (-1, CHUNK)).flatten(2) for x in (error, batch.objects.to(error.device)))
        weight_BN = weight_BN.to(error.device)
        on_objects = (error * objects).sum(2) / objects.sum(2).clamp(min=1)
        return error.mean(2) * weight_BN, on_objects * weight_BN

    def _measured(self, model: CausalDiT) -> dict[str, float]:
        """The errors of the first and of later chunks of held-out scenes, and of as many that are learned from."""
        count, found = len(self._held_out.latents), dict[str, float]()
        for name, scenes in (("held_out", self._held_out), ("learned", self._scenes)):
            first, *later = self._errors_of_scenes(model, scenes, min(count, len(scenes.latents)))
            found |= {f"{name}_first": first, f"{name}_later": sum(later) / len(later)}
        return found

    @torch.no_grad()
    def _errors_of_scenes(self, model: CausalDiT, scenes: Latents, count: int) -> list[float]:
        """The mean square errors on objects of five chunks of the first scenes, at pure noise, after the truth."""
        pick, sizes, numbers = torch.arange(count), [CHUNK] * 4, [0, 1, 2, 3, 4]
        clean, objects = scenes.frames(pick, 0, CHUNK * len(numbers))
        at_start, embeds = torch.ones(count, len(numbers)), scenes.embeds[pick]
        batch = Batch(clean[:, :-CHUNK], sizes, clean, objects, numbers, at_start, embeds, pick)
        guess = self._guess(model, batch, torch.Generator().manual_seed(SEED))
        error = ((guess - clean).square() * self._weights_C.cpu()[:, None, None]).mean(2) * objects
        parts = zip(error.split(CHUNK, 1), objects.split(CHUNK, 1), strict=True)
        return [(e.sum() / o.sum()).item() for e, o in parts]

    @torch.no_grad()
    def _guess(self, model: CausalDiT, batch: Batch, generator: torch.Generator) -> Tensor:
        noise = torch.randn(batch.target.shape, generator=generator)
        at_start = replace(batch, times_BN=torch.ones_like(batch.times_BN))
        return noise - self._forcing.velocity(model, at_start, noise).cpu()

    def _somewhere(self, generator: torch.Generator) -> tuple[int, int]:
        """A frame of a scene that has a ring and a chunk from it on, and a global time index for it: its own, or that
        of the same moment some periods later."""
        last = FRAMES // CHUNK - RING // CHUNK
        offset = CHUNK * int(torch.randint(1, last, (), generator=generator))
        return offset, 1 + offset + PERIOD * int(torch.randint(LONGEST, (), generator=generator))

    def _on_a_picture(self, size: int, generator: torch.Generator) -> Batch:
        """What follows on a first frame, which in most of the videos alone tells the places."""
        batch = _batch(self._scenes, size, [1, CHUNK], [1, 2], generator)
        for n in range(size):
            if torch.rand((), generator=generator) < 0.75:
                batch.embeds[n] = leave_open(batch.embeds[n], places=True)
        return batch

    def _after_a_change(self, size: int, generator: torch.Generator) -> Batch:
        """What follows on chunks of the same places under another text: all chunks, or all but the newest ones."""
        found = self._changes
        past = int(torch.randint(1, 5, (), generator=generator))
        pick = torch.randint(len(found.before), (size,), generator=generator)
        offset = CHUNK * int(torch.randint(5 - past, (), generator=generator))
        periods = int(torch.randint(LONGEST, (), generator=generator)) * int(torch.randint(2, (), generator=generator))
        after = found.after[pick, offset:].float()
        history = found.before[pick, offset : offset + CHUNK * past].float()
        newer = int(torch.randint(past, (), generator=generator))  # chunks that follow the new text already
        if newer and torch.rand((), generator=generator) < 0.6:
            history[:, -CHUNK * newer :] = after[:, CHUNK * (past - newer) : CHUNK * past]
        next_chunk = slice(CHUNK * past, CHUNK * (past + 1))
        objects = found.objects[pick, offset:][:, next_chunk]
        amount = torch.rand(size, 1, 1, 1, 1, generator=generator) * 0.15
        amount = amount * (torch.rand(size, 1, 1, 1, 1, generator=generator) < 0.5)
        history = (1 - amount) * history + amount * torch.randn(history.shape, generator=generator)
        times, embeds = _times(size, 1, generator), found.embeds[pick].clone()
        start = 1 + offset + PERIOD * periods
        return Batch(history, [CHUNK] * past, after[:, next_chunk], objects, [past], times, embeds, pick, start)

    def _on_its_own(
        self, size: int, sizes: list[int], numbers: list[int], generator: torch.Generator, offset: int, start: int
    ) -> Batch:
        """What follows in truth on histories from the pool. It weighs less, down to nothing, the further the chunk
        before has left the truth: what cannot be found from its history would only teach to draw nothing clearly."""
        chosen = [self._pool[int(torch.randint(len(self._pool), (), generator=generator))] for _ in range(size)]
        pick = torch.tensor([number for number, _ in chosen])
        batch = _batch(self._scenes, size, sizes[: max(numbers)], numbers, generator, offset, start, pick)
        seen = slice(offset, offset + batch.history.shape[1])
        late = PERIOD * int(torch.randint(LATE + 1, (), generator=generator)) if offset else 0
        seen_late = slice(seen.start + late, seen.stop + late)  # the truth repeats itself
        own = torch.stack([video for _, video in chosen])[:, seen_late]
        truth, objects = self._scenes.frames(pick, seen.start, seen.stop)
        error = (own - truth).square().mean(2)
        before = [number - 1 for number in numbers]
        error, objects = (_chunks(x, sizes, before).unflatten(1, (-1, CHUNK)).flatten(2) for x in (error, objects))
        strayed = (error * objects).sum(2) / objects.sum(2).clamp(min=1)
        return replace(batch, history=own, weights_BN=(1 - strayed / STRAYED).clamp(min=0))

    def _roll_out(self, model: CausalDiT, generator: torch.Generator) -> list[tuple[int, Tensor]]:
        """Videos that the model makes of scenes: (the scene's number, its latents)."""
        pick = self._scenes.draw(NEW, generator)
        shape = self._scenes.latents.shape[2:]

        def noise(chunk: Chunk, _: int) -> Tensor:
            return torch.randn(NEW, chunk.frames, *shape, generator=generator)

        rounded = copy.deepcopy(model).to(torch.bfloat16).requires_grad_(False)  # as the weights are shipped
        text, opening = self._scenes.embeds[pick].to(torch.bfloat16), chart(NEW, *shape)
        with torch.inference_mode():
            chunks = sample_chunks(
                rounded,
                text,
                noise,
                self._forcing.grid,
                FRAMES + LATE * PERIOD,
                stream=STREAM,
                sampler=SAMPLER,
                initial_latents=opening,
            )
            made = torch.cat([chunk.latents for chunk in chunks], 1)
        return list(zip(pick.tolist(), made.float().cpu().clone(), strict=True))


def _matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon takes a parameter."""
    return parameter.ndim == 2 and name.startswith("blocks") and "modulation" not in name


def _batch(
    data: Latents,
    size: int,
    sizes: list[int],
    numbers: list[int],
    generator: torch.Generator,
    offset: int = 0,
    start: int = 1,
    pick: Tensor | None = None,
) -> Batch:
    """Scenes from frame `offset` on, at any time, half of them with a noisy history."""
    pick = data.draw(size, generator) if pick is None else pick
    past = sum(sizes)
    clean, objects = data.frames(pick, offset, offset + past + CHUNK)
    embeds = data.embeds[pick]
    target, objects = (_chunks(x, [*sizes, CHUNK], numbers) for x in (clean, objects))
    dropped = torch.rand(size, generator=generator) < DROPPED
    embeds[dropped], objects[dropped] = 0, True
    amount = torch.rand(size, 1, 1, 1, 1, generator=generator) * 0.15
    amount = amount * (torch.rand(size, 1, 1, 1, 1, generator=generator) < 0.5)
    history = (1 - amount) * clean[:, :past] + amount * torch.randn(clean[:, :past].shape, generator=generator)
    return Batch(history, sizes, target, objects, numbers, _times(size, len(numbers), generator), embeds, pick, start)


def _times(size: int, chunks: int, generator: torch.Generator) -> Tensor:
    """Noise levels: pure noise, those that the four-step sampler meets, and any."""
    chosen = torch.rand(size, chunks, generator=generator)
    later = TIMES[torch.randint(1, len(TIMES), chosen.shape, generator=generator)]
    times = torch.rand(chosen.shape, generator=generator).clamp(min=0.02)
    return torch.where(chosen < 0.45, 1.0, torch.where(chosen < 0.75, later, times))


def _chunks(latents: Tensor, sizes: list[int], numbers: list[int]) -> Tensor:
    starts = [sum(sizes[:number]) for number in numbers]
    return torch.cat([latents[:, start : start + CHUNK] for start in starts], 1)


def _with_history(batch: Batch, guess: Tensor, generator: torch.Generator) -> Batch:
    """The batch with guessed chunks in place of the history's, where both exist, in half of the videos."""
    half = (torch.rand(len(guess), generator=generator) < 0.5)[:, None, None, None, None]
    history = batch.history.clone()
    for n, number in enumerate(batch.numbers):
        if number < len(batch.sizes):
            at = sum(batch.sizes[:number])
            seen = slice(at, at + CHUNK)
            history[:, seen] = torch.where(half, guess[:, n * CHUNK : (n + 1) * CHUNK], history[:, seen])
    return replace(batch, history=history)


def _by_frame(x_BN: Tensor) -> Tensor:
    return x_BN.repeat_interleave(CHUNK, 1)[:, :, None, None, None]
