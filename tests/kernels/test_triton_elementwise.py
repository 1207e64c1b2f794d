"""Triton's norms, projections and copies under its interpreter: as right as torch, nothing left unwritten.

The rule (DESIGN §6): against float64, a kernel errs at most twice what its torch reference errs in that dtype.
Sizes are odd on purpose: uneven shards that begin and end inside a row, frames past 1024, heads of 20, 64 and 128.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from causalrope_kernels import (
    Affine,
    Modulation,
    Norm,
    Pieces,
    Projection,
    Slots,
    add_norm,
    add_norm_kernel,
    norm_rope_store,
    rms_norm,
    rms_norm_kernel,
    split_tokens,
)
from causalrope_kernels.backend import Backend
from causalrope_kernels.launch import Kernel
from causalrope_sp.grid import Shard
from causalrope_sp.models.rope import RotaryTables
from tests.support.triton_cases import DEVICE, DTYPES, GRID, as_dtype, compare, no_worse, random

pytestmark = pytest.mark.usefixtures("bfloat16_as_on_a_gpu")

EPS = 1e-6
ROWS = pytest.mark.parametrize("rows", [1, 4], ids=["row by row", "4 rows a program"])


def by_frame(*carrier: int, seed: int) -> Tensor:
    """As a block has it: one of six vectors, side by side."""
    *frames, width = carrier
    return random(*frames, 6, width, seed=seed).unbind(-2)[2]


def an_affine(width: int, seed: int) -> Affine:
    weight, bias = random(2, width, seed=seed)
    return Affine(weight, bias, EPS)


def of_rows(kernel: ModuleType, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a kernel's programs compute so many rows each."""
    monkeypatch.setattr(kernel, "rows_of", lambda count, block: rows)
    monkeypatch.setattr(kernel, "_blocks", kernel._blocks.__wrapped__)  # without the cache


@DTYPES
@pytest.mark.parametrize(
    ("batch", "frames", "tokens", "width"), [(2, 3, 7, 60), (1, 1, 1, 128), (1, 2, 17, 384), (2, 2, 3, 1536)]
)
@ROWS
def test_add_norm(
    batch: int, frames: int, tokens: int, width: int, dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_rows(add_norm_kernel, rows, monkeypatch)
    x, y = random(2, batch, frames * tokens, width)
    carrier = (batch, frames, width) if batch > 1 else (frames, width)
    gate, shift, factor = (by_frame(*carrier, seed=seed) for seed in (1, 3, 5))
    modulation, affine = Modulation(shift, factor, EPS), an_affine(width, seed=7)
    cases: list[tuple[Tensor | None, Tensor | None, Norm]] = [
        (None, None, modulation),
        (y, gate, modulation),
        (y, None, modulation),
        (y, gate, affine),
        (y, None, affine),
    ]
    for branch, by, norm in cases:
        compare(add_norm, x, branch, by, norm, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_add_norm_with_wide_vectors(dtype: torch.dtype) -> None:
    """As a pass has them: vectors of frames, and in a mixed checkpoint weights, in float32 for tokens of 16 bits."""
    x, y = as_dtype(tuple(random(2, 1, 6, 60)), dtype)
    gate, shift, factor = (by_frame(3, 60, seed=seed).float() for seed in (1, 3, 5))
    norms: tuple[Norm, ...] = (Modulation(shift, factor, EPS), as_dtype(an_affine(60, seed=7), torch.float32))
    for norm in norms:
        x_64, y_64, gate_64, norm_64 = as_dtype((x, y, gate, norm), torch.float64)
        truth = add_norm(x_64, y_64, gate_64, norm_64, backend="torch")
        ours, rough = add_norm(x, y, gate, norm, backend="triton"), add_norm(x, y, gate, norm, backend="torch")
        for mine, other, exact in zip(ours, rough, truth, strict=True):
            assert mine.dtype == dtype
            no_worse(mine, other, exact)


def test_add_norm_of_the_last_frames_of_a_batch() -> None:
    """As the head has it: views whose batch entries lie apart, and numbers far from zero, where a mean matters."""
    x, y = 30 + random(2, 2, 3 * 5, 60)
    gate, shift, factor = (by_frame(2, 3, 60, seed=seed)[:, 1:] for seed in (1, 3, 5))
    for dtype in (torch.float32, torch.bfloat16):
        compare(add_norm, x[:, 5:], y[:, 5:], gate, Modulation(shift, factor, EPS), dtype=dtype)
    total, normed = add_norm(
        x.float()[:, 5:], None, None, as_dtype(an_affine(60, seed=0), torch.float32), backend="triton"
    )
    assert torch.equal(total, x.float()[:, 5:])
    assert normed.is_contiguous()


@DTYPES
@pytest.mark.parametrize(("tokens", "width"), [(1, 60), (13, 128), (5, 1536)])
@ROWS
def test_rms_norm(tokens: int, width: int, dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    of_rows(rms_norm_kernel, rows, monkeypatch)
    packed, weight = random(2, tokens, 2 * width), random(width, seed=1)
    compare(lambda x, w, backend: rms_norm(x[..., :width], w, EPS, backend=backend), packed, weight, dtype=dtype)
    compare(lambda x, w, backend: rms_norm(x[..., width:], w, EPS, backend=backend), 1e-4 * packed, weight, dtype=dtype)


SLOTS = torch.tensor([5, 0, 3], device=DEVICE)


def a_projection(heads: int, width: int, rank: int, dtype: torch.dtype, *, relative: bool = False) -> Projection:
    """Of three frames from 1030 on, of the uneven shards of 20 tokens on three ranks, which cut rows."""
    shard = Shard(GRID, rank, 3)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    tables = RotaryTables(width, 10_000, shard, DEVICE, compute)
    rotation = tables.rotation([1030, 1031, 1032], [0, 0, 0] if relative else None)
    qkv = random(2, 3, shard.tokens, 3 * heads * width, seed=rank).to(dtype)
    q_weight, k_weight = (random(heads * width, seed=seed).to(dtype) for seed in (8, 9))
    return Projection(qkv, q_weight, k_weight, rotation, heads, EPS)


def written(
    source: Projection | Pieces, split: Sequence[int], name: Backend, frames: slice, kinds: str = "qkv"
) -> dict[str, Tensor]:
    """q goes to a send buffer of pieces by heads, k to a ring by slots, v to a part of a wider buffer; all that was NaN
    before and must still be is checked here."""
    source = source.part(frames)
    batch, count, tokens, heads, width = source.shape
    like = source.like
    sizes = [batch * count * tokens * some * width for some in split]
    buffer = like.new_full((sum(sizes),), math.nan)
    ring = like.new_full((batch, 7, tokens, heads, width), math.nan)
    wide = like.new_full((batch, count + 1, tokens + 2, heads, width), math.nan)
    pieces = [flat.view(batch, count, tokens, -1, width) for flat in buffer.split(sizes)]
    kv_slots = {
        "q": [Slots(piece) for piece in pieces],
        "k": [Slots(ring, SLOTS[:count])],
        "v": [Slots(wide[:, 1:, 1:-1])],
    }
    chosen: dict[str, Any] = {kind: kv_slots[kind] for kind in kinds}
    norm_rope_store(source, **chosen, backend=name)
    assert ring[:, [1, 2, 4, 6]].isnan().all()
    assert wide[:, 0].isnan().all()
    assert wide[:, :, [0, -1]].isnan().all()
    found = {"q": torch.cat(pieces, 3), "k": ring[:, SLOTS[:count]], "v": wide[:, 1:, 1:-1]}
    for kind, x in found.items():
        assert x.isnan().any().item() == (kind not in kinds)
    return {kind: found[kind] for kind in kinds}


@DTYPES
@pytest.mark.parametrize(
    ("heads", "width", "split"), [(3, 20, (2, 1)), (5, 64, (2, 2, 1)), (2, 128, (2,)), (3, 6, (1, 1, 1))]
)
def test_projection(heads: int, width: int, split: Sequence[int], dtype: torch.dtype) -> None:
    for rank in range(3):
        exact, given = (a_projection(heads, width, rank, kind) for kind in (torch.float64, dtype))
        rounded = Projection(
            given.qkv_BFSN.double(), given.q_weight.double(), given.k_weight.double(), exact.rotation, heads, EPS
        )
        frames, kinds = ((slice(0, 3), "qkv"), (slice(1, 3), "kv"), (slice(0, 1), "q"))[rank]
        truth = written(rounded, split, "torch", frames, kinds)
        ours, rough = (written(given, split, name, frames, kinds) for name in ("triton", "torch"))
        for kind in kinds:
            no_worse(ours[kind], rough[kind], truth[kind])


def test_a_launch_is_found_again_only_for_the_types_that_it_was_compiled_for() -> None:
    """Times of either width, tables of float64 or float32, and parts of times and slots that lie at any alignment."""
    given = a_projection(3, 20, 1, torch.float32)
    batch, frames, tokens, heads, width = given.shape
    rotation, counted = given.rotation, torch.arange(2 * frames + 1, device=DEVICE)
    tables = {name: getattr(rotation, name) for name in ("time", "row", "column")}
    cases = [
        rotation,
        replace(rotation, query_times_F=rotation.query_times_F.int()),
        replace(rotation, key_times_F=rotation.key_times_F.int()),
        *(replace(rotation, **{name: table.double()}) for name, table in tables.items()),
        *(replace(rotation, query_times_F=counted[n:][:frames], key_times_F=counted[:frames]) for n in (0, 1)),
    ]
    for case in cases:
        for first in (0, 1):
            written_by: dict[str, Tensor] = {}
            for name in ("triton", "torch"):
                rings = given.like.new_zeros(2, batch, 2 * frames + 1, tokens, heads, width)
                q, k = (Slots(ring, counted[first:][:frames]) for ring in rings)
                norm_rope_store(replace(given, rotation=case), q=[q], k=[k], backend=name)
                written_by[name] = rings
            torch.testing.assert_close(written_by["triton"], written_by["torch"])


class Interpreted:
    """What `Kernel` needs of a kernel that the interpreter runs, here of one that does nothing."""

    arg_names = ("x", "table", "times")
    kwargs: ClassVar[dict[str, Any]] = {"do_not_specialize_on_alignment": ["times"]}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: None


def test_the_interpreter_names_an_argument_that_a_binary_would_misread() -> None:
    x, table, times = torch.zeros(8), torch.zeros(8), torch.zeros(8, dtype=torch.int64)
    again = Kernel(Interpreted()).prepared((1,), (x, table, times), (), ())
    again(x, table, times[1:])
    for name, wrong in (("times", (x, table, times.int())), ("x", (x[1:], table, times)), ("table", (x, None, times))):
        with pytest.raises(AssertionError, match=f"^{name}: a binary for"):
            again(*wrong)


def in_rings(source: Projection | Pieces, name: Backend, counts: Sequence[int]) -> list[Tensor]:
    """Keys in rings of several lengths, each with slots of its own: heads 0 and 2 in the second ring, 1 in the first,
    the others in the third. A layer may have no heads in the first one."""
    batch, _, tokens, _, width = source.shape
    shapes = [(batch, 4 + n, tokens, h, width) for n, h in enumerate(counts)]
    memory = source.like.new_full((sum(map(math.prod, shapes)),), math.nan)
    rings = [x.view(shape) for x, shape in zip(memory.split([*map(math.prod, shapes)]), shapes)]
    slots_RF = torch.tensor([[1, 3, 0], [4, 0, 2], [5, 1, 4]], device=DEVICE)
    first, second, third = (Slots(ring, slots) for ring, slots in zip(rings, slots_RF))
    one = [replace(second, x=second.x[:, :, :, head : head + 1]) for head in range(2)]
    outputs = [one[0], first, one[1], third] if counts[0] else [one[0], one[1], third]
    norm_rope_store(source, k=outputs, backend=name)
    return [ring[:, slots] for ring, slots in zip(rings, slots_RF)]


@DTYPES
@pytest.mark.parametrize("counts", [(1, 2, 2), (0, 2, 3)], ids=["three rings", "none of the first"])
def test_heads_are_written_to_the_slots_of_their_rings(counts: Sequence[int], dtype: torch.dtype) -> None:
    given = a_projection(sum(counts), 20, 1, dtype)
    exact, weights = a_projection(5, 20, 1, torch.float64), (given.q_weight.double(), given.k_weight.double())
    rounded = Projection(given.qkv_BFSN.double(), *weights, exact.rotation, 5, EPS)
    cases: list[tuple[Projection, Backend]] = [(given, "triton"), (given, "torch"), (rounded, "torch")]
    for ours, rough, truth in zip(*(in_rings(source, name, counts) for source, name in cases)):
        assert not ours.isnan().any()
        if ours.numel():
            no_worse(ours, rough, truth)
    arrived = Pieces([random(3, 2, 3, 7, sum(counts), 20).to(dtype)])
    for ours, plain in zip(in_rings(arrived, "triton", counts), in_rings(arrived, "torch", counts)):
        assert torch.equal(ours, plain)


def test_slots_of_several_rings_are_rows_of_one_tensor() -> None:
    like = a_projection(2, 20, 1, torch.float32)
    rings = like.like.new_zeros(2, 2, 4, like.shape[2], 1, 20)
    apart = [Slots(ring, torch.tensor([0, 1, n], device=DEVICE)) for n, ring in enumerate(rings, 2)]
    with pytest.raises(ValueError, match="expected rows of one tensor"):
        norm_rope_store(like, k=apart, backend="triton")


def test_the_relative_policy_leaves_keys_unturned_in_time() -> None:
    ours, rough = (
        written(a_projection(3, 20, 1, torch.float32, relative=True), (3,), name, slice(0, 3))
        for name in ("triton", "torch")
    )
    torch.testing.assert_close(ours["k"], rough["k"])
    projection = a_projection(3, 20, 1, torch.float32)
    at_zero = RotaryTables(20, 10_000, Shard(GRID, 1, 3), DEVICE, torch.float32).rotation([0, 0, 0])
    still = Projection(projection.qkv_BFSN, projection.q_weight, projection.k_weight, at_zero, 3, EPS)
    torch.testing.assert_close(ours["k"], written(still, (3,), "torch", slice(0, 3))["k"])
    torch.testing.assert_close(ours["q"], written(projection, (3,), "torch", slice(0, 3))["q"])


@pytest.mark.parametrize("kinds", [2, 3])
@pytest.mark.parametrize("padded", [False, True], ids=["all-to-all", "all-gather"])
def test_pieces(kinds: int, padded: bool) -> None:
    """As they arrive: of uneven tokens, side by side or each at the front of a block of the largest size."""
    heads, width, tokens = 3, 20, (7, 7, 6)
    sizes = [kinds * 2 * 3 * count * heads * width for count in tokens]
    places = [max(sizes)] * 3 if padded else sizes
    flat = random(sum(places)).bfloat16()
    arrived = [
        place[:size].view(kinds, 2, 3, count, heads, width)
        for place, size, count in zip(flat.split(places), sizes, tokens)
    ]
    for frames in (slice(0, 3), slice(1, 3)):
        names = "qkv"[3 - kinds :]
        ours, plain = (written(Pieces(arrived), (3,), name, frames, names) for name in ("triton", "torch"))
        for kind in names:
            assert torch.equal(ours[kind], plain[kind])


def test_a_rank_may_bring_no_tokens() -> None:
    whole = random(3, 1, 2, 5, 3, 20).half()
    arrived = [whole[:, :, :, :0], whole[:, :, :, :3].contiguous(), whole[:, :, :, :0], whole[:, :, :, 3:].contiguous()]
    flat = torch.cat([piece.flatten() for piece in arrived])
    sizes = [piece.numel() for piece in arrived]
    pieces = Pieces([part.view(piece.shape) for part, piece in zip(flat.split(sizes), arrived, strict=True)])
    found = written(pieces, (3,), "triton", slice(0, 2))
    for kind, x in zip("qkv", whole, strict=True):
        assert torch.equal(found[kind], x)


@pytest.mark.parametrize("batch", [1, 2])
def test_tokens_are_split_into_pieces(batch: int) -> None:
    x = random(batch, 3, 20, 4, 20)[:, :, :, 1:].bfloat16()
    for name in ("triton", "torch"):
        counts = (7, 7, 6)
        sizes = [batch * 3 * count * 3 * 20 for count in counts]
        buffer = x.new_full((sum(sizes),), math.nan)
        pieces = [flat.view(batch, 3, -1, 3, 20) for flat in buffer.split(sizes)]
        split_tokens(x, pieces, name)
        assert torch.equal(torch.cat(pieces, 2), x)
