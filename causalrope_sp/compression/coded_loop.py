"""The sampling loops of both ends: the encoder's chooses a chunk's noise so that the model draws the video, the
decoder's samples with that noise.

Shapes: F latent frames of a chunk, C channels, H×W latent size, K atoms, s tokens of a frame on this rank, E numbers in
a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from causalrope_sp.compression.choice_code import choice_bits, ladder
from causalrope_sp.compression.codebook import Choice, Codebook, chosen
from causalrope_sp.compression.residual import LARGEST
from causalrope_sp.diffusion.schedule import add_noise, model_timesteps, predict_x0, sigmas
from causalrope_sp.distributed.comm_stats import LAYERLESS
from causalrope_sp.grid import Chunk
from causalrope_sp.sampling.chunk_loop import ChunkLoop
from causalrope_sp.sampling.guidance import Step

RATES, BISECTIONS = (1e-9, 1e6), 60  # between which a budget's rate is found, and how often the range is halved
Choices = list[list[Choice]]
"""The choices of a chunk, frame by frame and within a frame step by step from the second step on."""


@dataclass(frozen=True)
class CodedChunk:
    """What is sent of a chunk.

    Args:
        choices: the atoms of its noise.
        levels: whole numbers that, times the residual's step, are added to its latents, int64 (F, C, H, W); None
            without a residual.
    """

    choices: Choices
    levels: Tensor | None = None


class CodedLoop(ChunkLoop):
    """A stream whose noise is made of atoms.

    Args:
        codebook: the atoms.
        residual: the step of the residual's quantization, in numbers of the latents; 0 for no residual.
        arguments: those of `ChunkLoop`.
    """

    def __init__(self, codebook: Codebook, residual: float, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.codebook, self.residual = codebook, residual

    @property
    def coded_steps(self) -> int:
        """The steps of a chunk before which fresh noise is drawn."""
        return len(self.levels) - 1

    @property
    def levels(self) -> list[float]:
        """The noise levels of the steps."""
        return sigmas(self.options.sampler)

    def velocity(self, chunk: Chunk, x_BFSE: Tensor, step: int) -> Tensor:
        """Returns the velocity of a chunk's tokens at a step, (1, F, s, E)."""
        of = Step(model_timesteps(self.options.sampler)[step], guided=False)
        return self.branches.velocity(chunk, x_BFSE, of)

    def drawn_noise(self, chunk: Chunk, step: int, choices: Sequence[Choice]) -> Tensor:
        """Returns the noise of a chunk at a step, float64 (1, F, C, H, W), from one choice a frame."""
        frames = range(chunk.start, chunk.stop)
        drawn = [self.codebook.noise(frame, step, choice) for frame, choice in zip(frames, choices, strict=True)]
        return torch.stack(drawn).unsqueeze(0)

    def add_residual(self, tokens_BFSE: Tensor, levels: Tensor | None) -> Tensor:
        """Adds a residual, int64 (F, C, H, W), to the tokens of a chunk on this rank."""
        if levels is None:
            return tokens_BFSE
        return tokens_BFSE + self.context.tokens(self.residual * levels.double().unsqueeze(0))

    def errors(self, tokens_NFSE: Tensor, target_1FSE: Tensor) -> Tensor:
        """Returns the mean square error of each frame of N estimates, float64 (N, F), the same on all ranks."""
        own = (tokens_NFSE - target_1FSE).double().square().sum((2, 3))
        return self._summed("errors", own) / (target_1FSE.shape[-1] * self.context.grid.tokens)

    def _summed(self, kind: str, x: Tensor) -> Tensor:
        """The sum over the ranks of the `sp` axis in order of rank, so that it is the same on all, on the CPU."""
        if self.parallel.mesh.sp == 1:
            return x.cpu()
        communicator = self.parallel.sp_communicator()
        parts = communicator.all_gather(kind, LAYERLESS, [tuple(x.shape)] * self.parallel.mesh.sp, x).wait()
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        return total.cpu()


class DecodingLoop(CodedLoop):
    """Samples with the noise that an encoder chose.

    Attributes:
        receive: returns what was sent of a chunk; None if it was lost, whose noise then says nothing.
        lost: whether the newest chunk was.
    """

    receive: Receive
    lost = False
    _columns: list[list[Choice]]

    def denoise(self, chunk: Chunk, control_BFSE: Tensor | None = None) -> Tensor:
        """Denoises a chunk; see `ChunkLoop.denoise`."""
        received = self.receive(self, chunk)
        self.lost = received is None
        sent = received or CodedChunk([[Choice()] * self.coded_steps for _ in range(chunk.frames)])
        self._columns = [[Choice()] * chunk.frames, *map(list, zip(*sent.choices, strict=True))]
        return self.add_residual(super().denoise(chunk, control_BFSE), sent.levels)

    def _draw(self, chunk: Chunk, step: int) -> Tensor:
        return self.context.tokens(self.drawn_noise(chunk, step, self._columns[step]))


Receive = Callable[[DecodingLoop, Chunk], CodedChunk | None]


class EncodingLoop(CodedLoop):
    """Chooses noise step by step: for every frame the number of atoms, on a ladder, whose next estimate of the clean
    latents costs least in error and rate together. Each rung is tried by a pass.

    Attributes:
        target: returns the latents of a chunk of the video, (1, F, C, H, W), and how many of its frames are the
            video's; what comes behind its end costs no bits.
        most: the top of the ladder.
        rate: λ, how much mean square error of the latents a bit a number is worth.
        budget: returns the bits of the chunk whose latents were returned last; each step gets an equal share of what is
            left, at whatever rate that takes. None keeps to `rate`.
        sent: the newest chunk as it is sent.
    """

    target: Callable[[Chunk], tuple[Tensor, int]]
    most: int
    rate: float
    budget: Callable[[], float] | None = None
    sent: CodedChunk

    def denoise(self, chunk: Chunk, control_BFSE: Tensor | None = None) -> Tensor:
        """Encodes a chunk and returns its tokens as the decoder has them, (1, F, s, E)."""
        self._check_model()
        self._renew_window(chunk)
        latents, wanted = self.target(chunk)
        target, levels = self.context.tokens(latents), self.levels
        frames: Choices = [[] for _ in range(chunk.frames)]
        left = None if self.budget is None else self.budget()
        x = self.context.tokens(self.drawn_noise(chunk, 0, [Choice()] * chunk.frames))
        x0 = self._clean(chunk, x, 0)
        for step in range(1, len(levels)):
            share = None if left is None else left / (len(levels) - step)
            x0, choices = self._choose(chunk, step, x0, target, wanted, share)
            left = None if left is None else left - sum(self._bits(len(choice.atoms)) for choice in choices)
            for own, choice in zip(frames, choices, strict=True):
                own.append(choice)
        levels_FCHW = None
        if self.residual:
            whole = self.context.grid.unpatchify(self.parallel.gather_tokens(target - x0, self.context.grid))
            levels_FCHW = (whole[0].double() / self.residual).round().clamp(-LARGEST, LARGEST).long().cpu()
            levels_FCHW[wanted:] = 0
            x0 = self.add_residual(x0, levels_FCHW)
        self.sent = CodedChunk(frames, levels_FCHW)
        if self.unread is not None:
            self.unread.read()
        return x0

    def _choose(
        self, chunk: Chunk, step: int, x0: Tensor, target: Tensor, wanted: int, budget: float | None
    ) -> tuple[Tensor, list[Choice]]:
        """The clean latents that the pass of a step predicts, and the choices before it."""
        rungs = ladder(self.most)
        by_frame = [chosen(products_K, rungs) for products_K in self._products(chunk, step, target - x0)]
        tried = []
        for rung in range(len(rungs)):
            x = self._noised(chunk, step, x0, [found[rung] for found in by_frame])
            tried.append((x, self._clean(chunk, x, step)))
        errors_RF = self.errors(torch.cat([clean for _, clean in tried]), target)
        best = self._rungs(errors_RF[:, :wanted], budget) + [0] * (chunk.frames - wanted)
        choices = [found[rung] for found, rung in zip(by_frame, best, strict=True)]
        if len(set(best)) == 1:
            return tried[best[0]][1], choices
        x = torch.cat([tried[rung][0][:, n : n + 1] for n, rung in enumerate(best)], 1)
        return self._clean(chunk, x, step), choices

    def _rungs(self, errors_RF: Tensor, budget: float | None) -> list[int]:
        """The rung of each frame that costs least, at the rate or at the least rate that keeps to a budget."""
        numbers = float(math.prod(self.codebook.shape))
        bits_R = torch.tensor([self._bits(count) for count in ladder(self.most)], dtype=torch.float64)

        def best(rate: float) -> Tensor:
            return (errors_RF + rate * bits_R[:, None] / numbers).argmin(0)

        if budget is None:
            return list(best(self.rate).tolist())
        low, high = RATES
        for _ in range(BISECTIONS):
            middle = math.sqrt(low * high)
            low, high = (low, middle) if float(bits_R[best(middle)].sum()) <= budget else (middle, high)
        return list(best(high).tolist())

    def _bits(self, count: int) -> float:
        return choice_bits(count, self.codebook.size, len(ladder(self.most)))

    def _noised(self, chunk: Chunk, step: int, x0: Tensor, choices: Sequence[Choice]) -> Tensor:
        return add_noise(x0, self.context.tokens(self.drawn_noise(chunk, step, choices)), self.levels[step])

    def _clean(self, chunk: Chunk, x: Tensor, step: int) -> Tensor:
        return predict_x0(x, self.velocity(chunk, x, step), self.levels[step])

    def _products(self, chunk: Chunk, step: int, direction_1FSE: Tensor) -> Tensor:
        """The inner products of each frame's direction with all atoms, float64 (F, K), the same on all ranks."""
        grid, shard, rows = self.context.grid, self.context.shard, []
        for frame, direction_SE in zip(range(chunk.start, chunk.stop), direction_1FSE[0], strict=True):
            parts = []
            for atoms_KCHW in self.codebook.blocks(frame, step):
                own_KN = grid.patchify(atoms_KCHW.unsqueeze(1))[:, 0, shard.start : shard.stop].flatten(1)
                parts.append(own_KN.to(direction_SE) @ direction_SE.flatten())
            rows.append(torch.cat(parts))
        return self._summed("atoms", torch.stack(rows).double())
