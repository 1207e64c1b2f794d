"""The parts of the format, without a model: choices, the codebook, header and packets, and what damage does to them."""

from __future__ import annotations

import contextlib
import hashlib
import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from causalrope_sp import ConfigError
from causalrope_sp.compression import Header, codebook, split
from causalrope_sp.compression.bitstream import pack_chunk, read_packet
from causalrope_sp.compression.choice_code import choice_bits, ladder, pack, unpack
from causalrope_sp.compression.codebook import Choice, Codebook, chosen
from causalrope_sp.compression.residual import LARGEST, pack_residual, unpack_residual
from causalrope_sp.errors import InputError

HEADER = Header("a red circle bounces", "0123abcd", 64, 48, 16.0, seed=7, settings={"window": 13})


@st.composite
def coded(draw: st.DrawFn) -> tuple[list[Choice], int, int]:
    size = 1 << draw(st.integers(1, 12))
    most = draw(st.sampled_from([rung for rung in (0, 1, 2, 4, 16, 64) if rung <= size]))
    choices = []
    for _ in range(draw(st.integers(0, 9))):
        count = draw(st.sampled_from(ladder(most)))
        atoms = sorted(draw(st.sets(st.integers(0, size - 1), min_size=count, max_size=count)))
        choices.append(Choice(tuple(atoms), tuple(draw(st.lists(st.booleans(), min_size=count, max_size=count)))))
    return choices, size, most


@given(coded())
@settings(deadline=None)
def test_choices_are_packed_into_the_bytes_that_their_bits_need(drawn: tuple[list[Choice], int, int]) -> None:
    choices, size, most = drawn
    data = pack(choices, size, most)
    assert unpack(data, len(choices), size, most) == choices
    bits = sum(choice_bits(len(choice.atoms), size, len(ladder(most))) for choice in choices)
    assert 8 * len(data) <= math.ceil(bits + 1e-6) + 7
    with pytest.raises(InputError, match="holds more than the choices"):
        unpack(data + bytes(1000) + b"\1", len(choices), size, most)


def test_the_codebook_is_the_same_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hash is of whole numbers that any machine must find; blocks do not depend on how many fit into memory."""
    atoms = Codebook(5, 0, 64, (4, 6, 8))
    whole = torch.cat(list(atoms.blocks(3, 1)))
    assert hashlib.blake2b(whole.numpy().tobytes(), digest_size=8).hexdigest() == "ba582c0bd9489cbe"
    assert whole.shape == (64, 4, 6, 8)
    assert abs(float(whole.double().mean())) < 0.05
    assert float(whole.double().var()) == pytest.approx(4, rel=0.03)
    monkeypatch.setattr(codebook, "MOST_NUMBERS", 5 * 192)
    noise = atoms.noise(3, 1, Choice((4, 5, 63), (False, True, False)))
    assert noise.square().mean() == pytest.approx(1)
    assert sum(len(block) for block in atoms.blocks(3, 1)) == 64
    plain = Codebook(5, 0, 64, (4, 64, 64)).noise(3, 1, Choice())
    assert float(plain.mean()) == pytest.approx(0, abs=0.02)
    assert float(plain.var()) == pytest.approx(1, rel=0.02)


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox 4x64 of ten rounds as its paper defines it (Salmon et al., SC 2011)."""
    for _ in range(10):
        products = [0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2]]
        (high_0, low_0), (high_1, low_1) = (divmod(product, 1 << 64) for product in products)
        counter = [high_1 ^ counter[1] ^ key[0], low_1, high_0 ^ counter[3] ^ key[1], low_0]
        key = [(key[0] + 0x9E3779B97F4A7C15) % (1 << 64), (key[1] + 0xBB67AE8584CAA73B) % (1 << 64)]
    return counter


def test_atoms_are_counted_bits_of_philox() -> None:
    seed, segment, frame, step, atom = 5, 9, 3, 1, 2
    atoms = next(Codebook(seed, segment, 4, (1, 4, 8)).blocks(frame, step))  # 32 numbers: two draws an atom
    draws = [philox([2 * atom + 1 + n, 0, 0, segment], [seed, frame << 16 | step]) for n in range(2)]
    pieces = [word >> 16 * place & 0xFFFF for draw in draws for word in draw for place in range(4)]
    assert atoms[atom].flatten().tolist() == [piece.bit_count() - 8 for piece in pieces]


def test_every_frame_step_segment_and_seed_has_atoms_of_its_own() -> None:
    keys = [(0, 0, 1, 1), (0, 0, 1, 2), (0, 0, 2, 1), (0, 3, 1, 1), (1, 0, 1, 1)]
    books = [next(Codebook(seed, segment, 4, (2, 8, 8)).blocks(f, s)) for seed, segment, f, s in keys]
    assert all(not torch.equal(a, b) for n, a in enumerate(books) for b in books[:n])


def test_chosen_atoms_are_those_with_the_largest_products() -> None:
    none, two = chosen(torch.tensor([0.5, -3.0, 1.0, 2.0], dtype=torch.float64), [0, 2])
    assert none == Choice()
    assert two == Choice((1, 3), (True, False))


@pytest.mark.parametrize("scale", [0.0, 0.3, 20.0, 1e6])
def test_a_residual_is_coded_without_loss(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    levels = (scale * torch.randn(3, 4, 5, 6, generator=generator)).round().long().clamp(-LARGEST, LARGEST)
    assert torch.equal(unpack_residual(pack_residual(levels), (3, 4, 5, 6)), levels)


def test_a_residual_of_zeros_takes_next_to_nothing() -> None:
    assert len(pack_residual(torch.zeros(3, 16, 8, 8, dtype=torch.int64))) <= 16 + 8


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_any_bytes_are_a_residual_or_refused(data: bytes) -> None:
    with contextlib.suppress(InputError):
        assert unpack_residual(data, (1, 4, 2, 3)).shape == (1, 4, 2, 3)


@given(
    st.text(max_size=300),
    st.integers(1, 1 << 14),
    st.floats(0.1, 1000, allow_nan=False),
    st.integers(0, (1 << 63) - 1),
    st.integers(1, 20),
    st.booleans(),
)
@settings(deadline=None)
def test_a_header_comes_back(prompt: str, height: int, fps: float, seed: int, power: int, exact: bool) -> None:
    prompt = prompt.encode(errors="replace").decode()
    header = Header(prompt, "0123abcd", height, 64, fps, seed, atoms=1 << power, most=1, exact=exact)
    data = header.pack()
    assert data[3] == 1
    assert Header.read(data + b"more") == (header, len(data))


DEFAULTS: dict[str, Any] = {"prompt": "", "model": "0123abcd", "height": 64, "width": 64, "fps": 16.0}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"atoms": 1000}, "atoms must be a power of two, not 1000"),
        ({"atoms": 1 << 21}, "atoms must be"),
        ({"most": 2048}, "most must be"),
        ({"height": 0}, "height must be"),
        ({"fps": math.nan}, "fps must be a number"),
        ({"fps": 1e308}, "fps must be a number"),
        ({"fps": 10**400}, "fps must be a number"),
        ({"residual": 1e-6}, "residual must be 0 or at least"),
        ({"atoms": 1 << 20, "most": 1 << 19}, "most must be"),
        ({"seed": -1}, "seed must be"),
        ({"model": "x"}, "8 digits"),
        ({"weights": "int4"}, "weights must be one of full, fp8, fp8-dynamic, not 'int4'"),
    ],
)
def test_wrong_headers_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Header(**DEFAULTS | change)


def test_wrong_beginnings_are_named() -> None:
    data = HEADER.pack()
    for wrong, said in (
        (b"", "does not begin with CVC"),
        (b"RIFF" + data, "does not begin with CVC"),
        (data[:3] + b"\2" + data[4:], "has version 2, and this library reads version 1"),
        (data[:20], "damaged or cut off"),
        (data[:10] + bytes([data[10] ^ 1]) + data[11:], "damaged or cut off"),
    ):
        with pytest.raises(InputError, match=said):
            Header.read(wrong)


def video_of(chunks: int) -> tuple[list[bytes], bytes]:
    """Packets of random contents."""
    draw = random.Random(0)
    contents = [draw.randbytes(draw.randint(0, 300)) for _ in range(chunks)]
    packets = [pack_chunk(n, c, 7 if n == chunks - 1 else None) for n, c in enumerate(contents)]
    return packets, HEADER.pack() + b"".join(packets)


def test_a_file_is_cut_into_its_packets() -> None:
    packets, data = video_of(300)
    assert list(split(data)) == [HEADER.pack(), *packets]
    last = read_packet(packets[-1], 0, 299)
    assert last is not None
    assert (last.number, last.frames) == (299, 7)


def test_ten_thousand_flipped_bits_lose_one_packet_each_and_add_none() -> None:
    packets, data = video_of(40)
    start, known = len(HEADER.pack()), set(packets)
    draw = random.Random(1)
    for _ in range(10_000):
        at, bit = draw.randrange(start, len(data)), draw.randrange(8)
        damaged = data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
        found = list(split(damaged))[1:]
        assert set(found) <= known
        assert len(found) == 39


def test_large_packets_after_a_damaged_one_are_found() -> None:
    packets = [pack_chunk(n, bytes(range(256)) * 400, 7 if n == 3 else None) for n in range(4)]
    data = HEADER.pack() + b"".join(packets)
    at = len(HEADER.pack()) + len(packets[0]) + 1000
    found = list(split(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]))
    assert found[1:] == [packets[0], *packets[2:]]


def test_a_text_that_no_decoder_would_read_is_refused() -> None:
    with pytest.raises(ConfigError, match="a header holds 32768 bytes at most"):
        Header("red " * 10_000, "0123abcd", 64, 64, 16.0).pack()


@pytest.mark.parametrize("lost", [slice(0, 1), slice(3, 20), slice(39, 40)])
def test_packets_after_a_gap_have_their_numbers(lost: slice) -> None:
    packets, _ = video_of(40)
    del packets[lost]
    numbers, least = [], 0
    for piece in list(split(HEADER.pack() + b"".join(packets)))[1:]:
        packet = read_packet(piece, 0, least)
        assert packet is not None
        numbers.append(packet.number)
        least = packet.number + 1
    assert numbers == [n for n in range(40) if n not in range(40)[lost]]


def test_a_cut_anywhere_leaves_the_packets_before_it() -> None:
    packets, data = video_of(12)
    starts = [len(HEADER.pack()) + sum(map(len, packets[:n])) for n in range(13)]
    for end in range(starts[0], len(data)):
        assert list(split(data[:end]))[1:] == packets[: sum(start <= end for start in starts) - 1]
