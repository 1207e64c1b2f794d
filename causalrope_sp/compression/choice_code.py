"""The choices of a chunk as one whole number: for every frame and step how many atoms, which, and with which signs.

The number of a combination is its rank in the combinatorial number system, so that nothing is lost but what rounding
the chunk's number up to bytes costs. No probability table is needed, since all combinations are equally likely.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from causalrope_sp.compression.codebook import Choice
from causalrope_sp.errors import InputError


def ladder(most: int) -> tuple[int, ...]:
    """Returns the numbers of atoms that a choice may have: 0, 1, 2, 4, ... `most`, a power of two, or 0 alone."""
    return (0, *(1 << power for power in range(most.bit_length())))


def choice_bits(count: int, size: int, rungs: int) -> float:
    """Returns the bits of a choice of `count` of `size` atoms, on a ladder of so many rungs."""
    return math.log2(rungs) + math.log2(math.comb(size, count)) + count


def pack(choices: Sequence[Choice], size: int, most: int) -> bytes:
    """Packs the choices of a chunk.

    Args:
        choices: in order of frame, then of step.
        size: K, the atoms of the codebook.
        most: the top of the ladder.
    """
    counts, value = ladder(most), 0
    for choice in reversed(choices):
        for negative in reversed(choice.signs):
            value = value << 1 | negative
        value = value * math.comb(size, len(choice.atoms)) + _rank(choice.atoms)
    for choice in reversed(choices):
        value = value * len(counts) + counts.index(len(choice.atoms))
    return value.to_bytes(-(-value.bit_length() // 8), "little")


def unpack(data: bytes, number: int, size: int, most: int) -> list[Choice]:
    """Returns the choices that `pack` has packed.

    Args:
        data: the packed number.
        number: how many choices there are.
        size: K, the atoms of the codebook.
        most: the top of the ladder.

    Raises:
        InputError: the bytes are not so many choices.
    """
    counts, value = ladder(most), int.from_bytes(data, "little")
    lengths = []
    for _ in range(number):
        value, rung = divmod(value, len(counts))
        lengths.append(counts[rung])
    choices = []
    for length in lengths:
        value, rank = divmod(value, math.comb(size, length))
        signs = tuple(bool(value >> bit & 1) for bit in range(length))
        value >>= length
        choices.append(Choice(_combination(rank, length, size), signs))
    if value:
        raise InputError(f"a packet of {len(data)} bytes holds more than the choices of {number} frames and steps")
    return choices


def _rank(atoms: Sequence[int]) -> int:
    """The number of a combination of rising whole numbers."""
    return sum(math.comb(atom, place) for place, atom in enumerate(atoms, 1))


def _combination(rank: int, length: int, size: int) -> tuple[int, ...]:
    """The combination of so many of `size` whole numbers that has this number."""
    atoms, top = [], size
    for place in range(length, 0, -1):
        low, high = place - 1, top - 1  # the largest atom whose combinations are not more than the rank
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if math.comb(middle, place) <= rank else (low, middle - 1)
        atoms.append(low)
        rank, top = rank - math.comb(low, place), low
    return tuple(reversed(atoms))
