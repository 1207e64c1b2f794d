"""Stage 5, the student on its own: what its sampler meets, it learns to bring back to the truth.

The student rolls out videos by its own sampler, four times a chunk, from its own history. Of every chunk the four noisy
states that the model was given are kept. It then learns the truth from those states (DAgger, arXiv 1011.0686; in
video Self-Forcing, arXiv 2506.08009), with its own history before them, the truth's, or something between the two.
Since a prompt's embeddings say where everything starts, the truth is known and no critic is needed.

Shapes: B videos, K noisy states a chunk, F latent frames, C channels, X latent width = height.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from causalrope_sp.grid import Chunk, LatentGrid, Shard
from causalrope_sp.models.causal_dit import CausalDiT, ForwardPass
from causalrope_sp.models.rope import RotaryTables
from causalrope_sp.sampling.sampler import sample_chunks
from causalrope_sp.toybox.chart import chart

from . import packed
from .dit import CHUNK, CONFIG, SAMPLER, STREAM, TIMES
from .latents import Latents
from .stages import LONGEST, PERIOD, STRAYED, _generator, _going_on, _training

SEED = 65_000_000
FRAMES = 63  # latent frames of a rolled-out video
ROLLED, POOL = 12, 72  # videos rolled out at a time, and kept
EVERY = 40  # steps between two times
FIRST, FIRST_ROLLED, FIRST_POOL, FIRST_EVERY = 12, 64, 256, 10  # the same for first chunks alone
LATER = 5  # videos a step of which four later chunks are learned
START, STEADY = (1, 2, 3, 4), (3, 4, 5, 6)  # places of the chunks that are learned, from a stream's start or later on
STATE_SHARES = torch.tensor([0.35, 0.15, 0.2, 0.3])  # how often each of the sampler's passes is learned
STATE_WEIGHTS = TIMES**-0.5  # of the error of the clean latent at each
AS_MET = 0.75  # how often a state is one that the sampler met, and otherwise the truth with noise
AVERAGE = 0.998


@dataclass(frozen=True)
class Rolled:
    """A video that the student made of scene `number`: its latents (F, C, X, X) and the states (K, F, C, X, X)."""

    number: int
    latents: Tensor
    states: Tensor


@dataclass(frozen=True)
class Lesson:
    """What one forward learns from: clean history (B, F', C, X, X), the truth and where objects are in it, (B, F, ...),
    the states that the sampler met, (B, K, F, C, X, X), and the places of the chunks to learn among these F frames.

    `starts` are the frames of the stream at which the videos begin, (B,); `weights_BN` is how much each chunk counts.
    """

    history: Tensor
    truth: Tensor
    objects: Tensor
    states: Tensor
    numbers: tuple[int, ...]
    embeds: Tensor
    starts: Tensor
    weights_BN: Tensor


class OnPolicy:
    """Rolls out videos and learns from them, on a CPU. Errors of latents count by `channel_weights`, (C,)."""

    def __init__(self, openings: Latents, long: Latents, grid: LatentGrid, channel_weights: Tensor) -> None:
        self.openings, self.long, self.grid = openings, long, grid
        self.weights_C11 = channel_weights.view(-1, 1, 1)
        self._rope = RotaryTables(CONFIG.head_dim, CONFIG.theta, Shard(grid), torch.device("cpu"), torch.float32)

    def roll_out(
        self, model: CausalDiT, data: Latents, count: int, frames: int, generator: torch.Generator
    ) -> list[Rolled]:
        """As the sampler makes them in inference, in bfloat16, the noisy states kept."""
        pick, size = data.draw(count, generator), data.latents.shape[2:]
        states: list[Tensor] = []

        def keep(_: torch.nn.Module, arguments: tuple[Tensor, ForwardPass]) -> None:
            tokens, step = arguments
            if float(step.timesteps_F[-1]):
                last = tokens[:, -CHUNK * self.grid.tokens :].unflatten(1, (CHUNK, -1))
                states.append(self.grid.unpatchify(last.float()).half())

        def noise(chunk: Chunk, _: int) -> Tensor:
            return torch.randn(count, chunk.frames, *size, generator=generator)

        half = copy.deepcopy(model).to(torch.bfloat16).eval()
        half.register_forward_pre_hook(keep)
        chunks = sample_chunks(
            half,
            data.embeds[pick].to(torch.bfloat16),
            noise,
            self.grid,
            frames,
            stream=STREAM,
            sampler=SAMPLER,
            initial_latents=chart(count, *size),
        )
        made = torch.cat([chunk.latents.half().clone() for chunk in chunks], 1)
        of_chunks = torch.stack(states).unflatten(0, (-1, len(TIMES)))  # chunk, K, B, CHUNK, ...
        whole = of_chunks.permute(2, 1, 0, 3, 4, 5, 6).flatten(2, 3)
        return [Rolled(n, a, s) for n, a, s in zip(pick.tolist(), made, whole, strict=True)]

    def first(self, model: CausalDiT, pool: list[Rolled], generator: torch.Generator) -> dict[str, Tensor]:
        """The errors of first chunks."""
        chosen = [pool[int(i)] for i in torch.randint(len(pool), (FIRST,), generator=generator)]
        pick = torch.tensor([one.number for one in chosen])
        truth, objects = self.openings.latents[pick, :CHUNK].float(), self.openings.objects[pick, :CHUNK]
        states = torch.stack([one.states[:, :CHUNK] for one in chosen]).float()
        starts, weights = torch.zeros(1, dtype=torch.long), torch.ones(FIRST, 1)
        embeds = self.openings.embeds[pick]
        lesson = Lesson(truth[:, :0], truth, objects, states, (0,), embeds, starts, weights)
        return self._errors(model, lesson, generator)

    def later(
        self, model: CausalDiT, pool: list[Rolled], steady: bool, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The errors of four later chunks, at a stream's start or later, where the whole window is behind them."""
        chosen = [pool[int(i)] for i in torch.randint(len(pool), (LATER,), generator=generator)]
        pick = torch.tensor([one.number for one in chosen])
        numbers = STEADY if steady else START
        frames = CHUNK * (max(numbers) + 1)
        starts = torch.zeros(LATER, dtype=torch.long)
        if steady:
            starts = CHUNK * torch.randint(1, (FRAMES - frames) // CHUNK + 1, (LATER,), generator=generator)
        rows = [slice(int(a), int(a) + frames) for a in starts]
        own = torch.stack([one.latents[r] for one, r in zip(chosen, rows, strict=True)]).float()
        states = torch.stack([one.states[:, r] for one, r in zip(chosen, rows, strict=True)]).float()
        truth, objects = (
            torch.stack([x[r] for x, r in zip(_going_on(data[pick], FRAMES), rows, strict=True)])
            for data in (self.long.latents, self.long.objects)
        )
        truth = truth.float()
        # the student's own history, the truth's, or something between them
        kind = torch.rand(LATER, generator=generator)
        share = torch.where(kind < 0.4, 1.0, torch.where(kind < 0.6, 0.0, torch.rand(LATER, generator=generator)))
        history = truth.lerp(own, share.view(-1, 1, 1, 1, 1))
        amount = 0.15 * torch.rand(LATER, 1, 1, 1, 1, generator=generator)
        amount = amount * (torch.rand(LATER, 1, 1, 1, 1, generator=generator) < 0.3)
        history = (1 - amount) * history + amount * torch.randn(history.shape, generator=generator)
        error = ((history - truth).square().mean(2) * objects).unflatten(1, (-1, CHUNK)).flatten(2).sum(2)
        strayed = error / objects.unflatten(1, (-1, CHUNK)).flatten(2).sum(2).clamp(min=1)
        weights = (1 - strayed[:, [n - 1 for n in numbers]] / STRAYED).clamp(min=0)
        if steady:
            starts = starts + PERIOD * torch.randint(LONGEST, (LATER,), generator=generator)
        past, embeds = history[:, : frames - CHUNK], self.long.embeds[pick]
        lesson = Lesson(past, truth, objects, states, numbers, embeds, starts, weights)
        return self._errors(model, lesson, generator)

    def _errors(self, model: CausalDiT, lesson: Lesson, generator: torch.Generator) -> dict[str, Tensor]:
        """The loss, and for the log the error on objects at the sampler's first pass and at its last."""
        count, n = lesson.weights_BN.shape
        which = torch.multinomial(STATE_SHARES, count * n, replacement=True, generator=generator).view(count, n)
        by_frame = which.repeat_interleave(CHUNK, 1)
        level = TIMES[by_frame][:, :, None, None, None]
        at = [f for number in lesson.numbers for f in range(CHUNK * number, CHUNK * (number + 1))]
        target, seen = lesson.truth[:, at], lesson.objects[:, at]
        own = lesson.states[torch.arange(count)[:, None], by_frame, torch.tensor(at)]
        from_truth = (1 - level) * target + level * torch.randn(target.shape, generator=generator)
        as_met = (torch.rand(count, n, generator=generator) < AS_MET).repeat_interleave(CHUNK, 1)
        noisy = torch.where(as_met[:, :, None, None, None] & (level < 1), own, from_truth)
        clean = noisy - level * self._velocity(model, lesson, noisy, level[:, :, 0, 0, 0], at)
        error = ((clean - target).square() * self.weights_C11).mean(2).unflatten(1, (-1, CHUNK)).flatten(2)
        seen = seen.unflatten(1, (-1, CHUNK)).flatten(2)
        on_objects = (error * seen).sum(2) / seen.sum(2).clamp(min=1)
        scale = STATE_WEIGHTS[which] * lesson.weights_BN
        report = {"loss": ((error.mean(2) + on_objects) * scale).mean(), "share": (scale > 0).float().mean()}
        for name, state in (("noise", 0), ("last", len(TIMES) - 1)):
            report[name] = on_objects.detach()[(which == state) & (scale > 0)].mean()
        return report

    def _velocity(self, model: CausalDiT, lesson: Lesson, noisy: Tensor, levels_BF: Tensor, at: list[int]) -> Tensor:
        history = torch.cat([chart(len(noisy), *noisy.shape[2:]), lesson.history], 1)
        past = history.shape[1]
        tokens = self.grid.patchify(torch.cat([history, noisy], 1))
        times = torch.cat([torch.zeros(len(noisy), past), 1000 * levels_BF], 1)
        moments = [*range(1, past), *(1 + frame for frame in at)]
        rotations = [self._rope.rotation([0, *(m + start for m in moments)]) for start in lesson.starts.tolist()]
        cos, sin = torch.stack([torch.stack(rotation.of_queries) for rotation in rotations], 1).unsqueeze(3)
        visible = packed.mask(past, lesson.numbers, self.grid.tokens)
        velocity = packed.velocity(model, tokens, times, lesson.embeds, (cos, sin), visible, noisy.shape[1])
        return self.grid.unpatchify(velocity)


def train_on_policy(
    path: Path,
    model: CausalDiT,
    openings: Latents,
    long: Latents,
    grid: LatentGrid,
    channel_weights: Tensor,
    minutes: float,
    lr: float,
) -> CausalDiT:
    """For so many minutes, counted anew where a run goes on; the rate falls to nothing over the last two thirds."""
    training, policy = _training(model, path, lr, AVERAGE), OnPolicy(openings, long, grid, channel_weights)
    pool: list[Rolled] = []
    first_pool: list[Rolled] = []
    begun = time.monotonic()
    while (progress := (time.monotonic() - begun) / (60 * minutes)) < 1:
        generator = _generator(SEED, training)
        while not pool or training.step % EVERY == 0 or len(pool) < POOL // 2:
            pool = (pool + policy.roll_out(training.ema, long, ROLLED, FRAMES, generator))[-POOL:]
            if len(pool) >= POOL // 2:
                break
        if training.step % FIRST_EVERY == 0 or not first_pool:
            rolled = policy.roll_out(training.ema, openings, FIRST_ROLLED, CHUNK, generator)
            first_pool = (first_pool + rolled)[-FIRST_POOL:]
        first = policy.first(training.model, first_pool, generator)
        later = policy.later(training.model, pool, training.step % 2 == 1, generator)
        report = {
            f"{part}_{n}": float(v.detach())
            for part, found in (("first", first), ("later", later))
            for n, v in found.items()
        }
        fall = min(1, max(0.02, (1 - progress) / 0.67))
        training.update(first["loss"] + later["loss"], min(1, (training.step + 1) / 50) * fall, report)
    training.save()
    return training.ema
