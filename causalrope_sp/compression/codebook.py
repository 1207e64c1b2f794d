"""The codebook: atoms that an encoder adds up to a chunk's noise, and the noise of a frame without any.

All numbers are whole and made from counted bits of Philox, whose output is fixed, so that every machine has the same
codebook to the last bit. An atom's number is the count of ones in 16 bits less 8, that of plain noise a quarter of the
count in 64 bits less 32; sums of atoms are scaled to variance 1, which plain noise has.

Shapes: K atoms, N numbers of a latent frame, F latent frames, C channels, H×W latent size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MOST_NUMBERS = 1 << 24  # of atoms that are in memory at a time


@dataclass(frozen=True)
class Choice:
    """The atoms of one latent frame at one step.

    Args:
        atoms: their numbers, rising.
        signs: for each whether it is subtracted.
    """

    atoms: tuple[int, ...] = ()
    signs: tuple[bool, ...] = ()


class Codebook:
    """The atoms of every latent frame and step of a video.

    Args:
        seed: of the video.
        segment: the number of the chunk at which its segment begins.
        size: K, a power of two.
        shape: (C, H, W) of a latent frame.
    """

    def __init__(self, seed: int, segment: int, size: int, shape: tuple[int, int, int]) -> None:
        self.seed, self.segment, self.size, self.shape = seed, segment, size, shape
        self._numbers = math.prod(shape)

    def blocks(self, frame: int, step: int) -> Iterator[Tensor]:
        """Yields the atoms of a latent frame at a step in order, block by block, int8 (K of the block, C, H, W)."""
        count = max(1, MOST_NUMBERS // self._numbers)
        for first in range(0, self.size, count):
            yield self._atoms(frame, step, first, min(count, self.size - first))

    def noise(self, frame: int, step: int, choice: Choice) -> Tensor:
        """Returns the noise of a latent frame at a step, float64 (C, H, W), with the mean square 1 if it has atoms.

        Args:
            frame: the global time index of the frame.
            step: the number of the step that the noise is added before.
            choice: the atoms that are added up; none gives noise without information.
        """
        if not choice.atoms:
            counts = np.bitwise_count(self._words(frame, step, 0, 1, self._numbers)).astype(np.int8) - 32
            return torch.from_numpy(counts / 4).view(self.shape)
        total = torch.zeros(self.shape, dtype=torch.int64)
        for atom, negative in zip(choice.atoms, choice.signs, strict=True):
            total += self._atoms(frame, step, atom, 1)[0].long() * (-1 if negative else 1)
        power = int(total.square().sum())
        return total.double() * math.sqrt(self._numbers / power) if power else total.double()

    def _atoms(self, frame: int, step: int, first: int, count: int) -> Tensor:
        words_of_one = 4 * self._draws_of_one
        words = self._words(frame, step, first * self._draws_of_one, 0, count * words_of_one).astype("<u8", copy=False)
        counts = np.bitwise_count(words.view("<u2")).astype(np.int8) - 8
        return torch.from_numpy(counts).view(count, 4 * words_of_one)[:, : self._numbers].reshape(count, *self.shape)

    @property
    def _draws_of_one(self) -> int:
        """Philox' draws, of four words each, that an atom takes."""
        return -(-self._numbers // 16)

    def _words(self, frame: int, step: int, first: int, kind: int, count: int) -> np.ndarray:
        """Words of Philox from a draw on, for a key that no other frame, step or segment has."""
        bits = np.random.Philox(key=[self.seed, frame << 16 | step], counter=[first, kind, 0, self.segment])
        return np.asarray(bits.random_raw(count))


def chosen(products_K: Tensor, most: Sequence[int]) -> list[Choice]:
    """Returns the atoms that point along a direction, for each number of atoms wanted.

    Args:
        products_K: the inner products of all atoms with the direction, float64.
        most: how many atoms each choice has.
    """
    order = products_K.abs().argsort(descending=True, stable=True)[: max(most, default=0)].tolist()
    negative = (products_K < 0).tolist()
    found = []
    for count in most:
        atoms = sorted(order[:count])
        found.append(Choice(tuple(atoms), tuple(negative[atom] for atom in atoms)))
    return found
