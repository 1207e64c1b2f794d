"""The DiT: what it learns from at each step.

One network is taught all noise levels, half of the time at pure noise, where most is decided. It then samples in four
re-noised steps (toybox) or by Euler in sixteen (toybox-flow).

All that is large, scenes too, is where the DiT is, so that on a GPU a step hardly waits for the host.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from causalrope_sp.devices import send
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.toybox.toybox_text import leave_open

from .batches import Draws, batch_of, by_frame, chunks_of, noise_levels, with_noise
from .dit import CHUNK, RING, Batch, TeacherForcing
from .latents import PERIOD, Changes, Latents, mean_on_objects
from .made import sample
from .training import Training, processes, rank, rate_at, shares_of_time

SEED = 60_000_000
FIRST_BATCH = 12  # videos a step of which the first chunk is learned
PLATEAU = 0.2  # the share of the minutes before the learning rate falls
POOL = 160  # self-made videos that the DiT learns from at a time; made anew when a run is resumed
NEW, EVERY = 32, 240  # as many are made new after as many steps
STRAYED = 0.6  # the mean square error, on objects, from which on a self-made history teaches nothing
FRAMES = 33  # latent frames of a scene that the DiT learns from: those after the encoded 21 repeat them
LATE = 2  # periods by which a video that the DiT made is longer than its scene
MEASURED_EVERY = 250  # steps
LONGEST = 24  # periods by which a scene is made older than it is, so that a stream can go on for minutes


class DiTTraining:
    """Teaches a DiT the chunks of `scenes`, and from `changes` those after a new text.

    `weights_C` says how much an error of each latent channel counts, 1 on average. A step learns from `batch` times as
    many videos as it does on a CPU, 12 of which the first chunk is learned and 5 to 10 of which later ones are. Every
    `MEASURED_EVERY` steps the log has the errors of the averaged model on `held_out`, which is never learned from, and
    on as many scenes that are. If the latter fall and the former do not, more steps do not help: more scenes do.
    """

    def __init__(
        self,
        forcing: TeacherForcing,
        scenes: Latents,
        held_out: Latents,
        changes: Changes,
        weights_C: Tensor,
        batch: int = 1,
    ) -> None:
        self._forcing, self._scenes, self._held_out, self._changes = forcing, scenes, held_out, changes
        self._weights_C, self._multiple = weights_C.to(forcing.device), batch
        self._pool: list[Tensor] = []  # the numbers of scenes, and the videos that the DiT made of them

    def train(self, path: Path, model: CausalDiT, minutes: float, lr: float, codec: int) -> CausalDiT:
        """Trains for so many minutes, which are counted anew when it resumes from `path`; returns the averaged model.
        What it was before the learning rate fell is kept beside, to go on from. `codec` is the fingerprint of the
        encoder."""
        device, falls = self._forcing.device, False
        training = Training(model.requires_grad_(True).to(device), path, lr, _matrix, average=0.998, codec=codec)
        for share in shares_of_time(minutes, device):
            draws = Draws.seeded(SEED + processes() * training.step + rank(), device)
            if training.step % EVERY == 0 or not self._pool:
                made = self._roll_out(training.ema, draws)
                pools = zip(self._pool or [x[:0] for x in made], made, strict=True)
                self._pool = [torch.cat(pool)[-POOL * self._multiple :] for pool in pools]
            if share >= PLATEAU and not falls:
                training.save(path.with_stem(f"{path.stem}-plateau"))
                falls = True
            self._step(training, share, draws)
        if minutes and not falls:  # the last step took longer than was left
            training.save(path.with_stem(f"{path.stem}-plateau"))
        training.save()
        return training.ema

    def _step(self, training: Training[CausalDiT], share: float, draws: Draws) -> None:
        own_guess = training.step % 2 == 0
        first = batch_of(self._scenes, FIRST_BATCH * self._multiple, [], [0], draws)
        kind, later = self._later(training.step % 8, draws)
        losses, from_noise = list[Tensor](), list[Tensor]()
        for batch in (first, later):
            errors, on_objects = self._errors(training.model, batch, draws, own_guess)
            at_start = batch.levels_BN > 0.99
            from_noise.append((on_objects.detach() * at_start).sum() / at_start.sum())
            losses += [errors.mean(), on_objects.mean()]
        names = ("first_from_noise", f"{kind}_from_noise")
        report = dict(zip(names, torch.stack(from_noise).tolist(), strict=True))
        if (training.step + 1) % MEASURED_EVERY == 0:
            report |= self._measured(training.ema)
        training.update(torch.stack(losses).mean(), rate_at(training.step, share, PLATEAU), report)

    def _later(self, turn: int, draws: Draws) -> tuple[str, Batch]:
        """The chunks right after the start, whole windows, any time of a long stream, on the truth's history or on one
        that the DiT made; and what follows on a picture."""
        whole, multiple = [CHUNK] * 4, self._multiple
        if turn in (1, 2) and draws.happens(0.5):
            return "changed", self._after_a_change(8 * multiple, draws)
        if turn == 0:
            return "second", batch_of(self._scenes, 10 * multiple, [CHUNK], [0, 1], draws)
        if turn in (1, 4):
            batch = batch_of(self._scenes, 5 * multiple, whole, [1, 2, 3, 4], draws)
            if turn == 4:  # as after a picture
                batch.embeds = leave_open(batch.embeds, starts=True)
            return "later", batch
        if turn in (3, 5):
            return "image", self._on_a_picture(10 * multiple, draws)
        offset, start = (0, 1) if turn == 6 else self._somewhere(draws)
        if turn == 7:
            return "later", batch_of(self._scenes, 7 * multiple, whole, [3, 4], draws, offset, start)
        return "own", self._on_its_own(7 * multiple, whole, [1, 2] if turn == 6 else [3, 4], draws, offset, start)

    def _errors(self, model: CausalDiT, batch: Batch, draws: Draws, own_guess: bool) -> tuple[Tensor, Tensor]:
        """The squared error of the velocity that leads to the target, (B, N), over the picture and over its objects.

        The second keeps a small object from costing next to nothing. With `own_guess` half of the states are noise on
        what the model itself makes of pure noise, as its sampler meets them, and half of the histories hold it too.
        There the error is taken of the clean latent, since no velocity at little noise can undo a wrong guess.
        """
        noise = draws.normal(batch.target.shape)
        source, weight_BN = batch.target, batch.weights_BN
        if own_guess:
            guess = self._guess(model, batch, draws.normal(batch.target.shape))
            half = draws.which(0.5, *batch.levels_BN.shape)
            source = torch.where(by_frame(half), guess, source)
            weight_BN = torch.where(half, batch.levels_BN**2, 1) * weight_BN
            batch = _with_history(batch, guess, draws)
        level = by_frame(batch.levels_BN)
        noisy = (1 - level) * source + level * noise
        velocity = self._forcing.velocity(model, batch, noisy)
        error = (velocity - (noisy - batch.target) / level).square()
        error = (error * self._weights_C[:, None, None]).mean(2)
        error, objects = (x.unflatten(1, (-1, CHUNK)).flatten(2) for x in (error, batch.objects))
        return error.mean(2) * weight_BN, mean_on_objects(error, objects) * weight_BN

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
        at_start, embeds = clean.new_ones(count, len(numbers)), scenes.embeds[pick]
        batch = Batch(clean[:, :-CHUNK], sizes, clean, objects, numbers, at_start, embeds)
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(SEED))  # the same on every device
        guess = self._guess(model, batch, noise.to(clean.device))
        error = ((guess - clean).square() * self._weights_C[:, None, None]).mean(2)
        parts = zip(error.split(CHUNK, 1), objects.split(CHUNK, 1), strict=True)
        return torch.stack([mean_on_objects(e.flatten(), o.flatten()) for e, o in parts]).tolist()

    @torch.no_grad()
    def _guess(self, model: CausalDiT, batch: Batch, noise: Tensor) -> Tensor:
        at_start = replace(batch, levels_BN=torch.ones_like(batch.levels_BN))
        return noise - self._forcing.velocity(model, at_start, noise)

    def _somewhere(self, draws: Draws) -> tuple[int, int]:
        """A frame of a scene that has a ring and a chunk from it on, and a global time index for it: its own, or that
        of the same moment some periods later."""
        offset = CHUNK * (1 + draws.below(FRAMES // CHUNK - RING // CHUNK - 1))
        return offset, 1 + offset + PERIOD * draws.below(LONGEST)

    def _on_a_picture(self, size: int, draws: Draws) -> Batch:
        """What follows on a first frame, which in most of the videos alone tells where objects start."""
        batch = batch_of(self._scenes, size, [1, CHUNK], [1, 2], draws)
        alone = draws.which(0.75, size, 1, 1)
        batch.embeds = torch.where(alone, leave_open(batch.embeds, starts=True), batch.embeds)
        return batch

    def _after_a_change(self, size: int, draws: Draws) -> Batch:
        """What follows on chunks with the same starts under another text: all chunks, or all but the newest ones."""
        found = self._changes
        past = 1 + draws.below(4)
        pick = send(torch.randint(len(found.before), (size,), generator=draws.choices), self._forcing.device)
        offset = CHUNK * draws.below(5 - past)
        periods = draws.below(LONGEST) * draws.below(2)
        after = found.after[pick, offset:].float()
        history = found.before[pick, offset : offset + CHUNK * past].float()
        newer = draws.below(past)  # chunks that follow the new text already
        if newer and draws.happens(0.6):
            history[:, -CHUNK * newer :] = after[:, CHUNK * (past - newer) : CHUNK * past]
        next_chunk = slice(CHUNK * past, CHUNK * (past + 1))
        objects = found.objects[pick, offset:][:, next_chunk]
        history, levels = with_noise(history, draws), noise_levels(size, 1, draws)
        start = 1 + offset + PERIOD * periods
        return Batch(history, [CHUNK] * past, after[:, next_chunk], objects, [past], levels, found.embeds[pick], start)

    def _on_its_own(
        self, size: int, sizes: list[int], numbers: list[int], draws: Draws, offset: int, start: int
    ) -> Batch:
        """What follows in truth on histories from the pool. It weighs less, down to nothing, the further the chunk
        before has left the truth: what cannot be found from its history would only teach to draw nothing clearly."""
        scenes, videos = self._pool
        chosen = send(torch.randint(len(scenes), (size,), generator=draws.choices), videos.device)
        pick = scenes[chosen]
        batch = batch_of(self._scenes, size, sizes[: max(numbers)], numbers, draws, offset, start, pick)
        seen = slice(offset, offset + batch.history.shape[1])
        late = PERIOD * draws.below(LATE + 1) if offset else 0
        own = videos[chosen, seen.start + late : seen.stop + late]  # the truth repeats itself
        truth, objects = self._scenes.frames(pick, seen.start, seen.stop)
        error = (own - truth).square().mean(2)
        before = [number - 1 for number in numbers]
        error, objects = (chunks_of(x, sizes, before).unflatten(1, (-1, CHUNK)).flatten(2) for x in (error, objects))
        strayed = mean_on_objects(error, objects)
        return replace(batch, history=own, weights_BN=(1 - strayed / STRAYED).clamp(min=0))

    def _roll_out(self, model: CausalDiT, draws: Draws) -> tuple[Tensor, Tensor]:
        """Videos that the model makes of scenes: the scenes' numbers and the latents."""
        count = NEW * self._multiple
        pick = send(self._scenes.draw(count, draws.choices), self._forcing.device)
        rounded = copy.deepcopy(model).to(torch.bfloat16).requires_grad_(False)  # as the weights are shipped
        with torch.inference_mode():
            made = sample(rounded, self._scenes.embeds[pick], draws.normal, self._forcing.grid, FRAMES + LATE * PERIOD)
        return pick, made.float().clone()


def _matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon takes a parameter."""
    return parameter.ndim == 2 and name.startswith("blocks") and "modulation" not in name


def _with_history(batch: Batch, guess: Tensor, draws: Draws) -> Batch:
    """The batch with guessed chunks in place of the history's, where both exist, in half of the videos."""
    half = draws.which(0.5, len(guess), 1, 1, 1, 1)
    history = batch.history.clone()
    for n, number in enumerate(batch.numbers):
        if number < len(batch.sizes):
            at = sum(batch.sizes[:number])
            seen = slice(at, at + CHUNK)
            history[:, seen] = torch.where(half, guess[:, n * CHUNK : (n + 1) * CHUNK], history[:, seen])
    return replace(batch, history=history)
