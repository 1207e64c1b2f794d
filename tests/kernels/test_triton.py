"""Every Triton kernel under Triton's interpreter: as right as its torch reference, and nothing left unwritten.

The rule (DESIGN §6): against float64, a kernel errs at most twice what its torch reference errs in that dtype.
Sizes are odd on purpose: uneven shards that begin and end inside a row, frames past 1024, heads of 20, 64 and 128.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from causalrope_kernels import (
    Affine,
    ByFrame,
    Keys,
    Modulation,
    Norm,
    Partial,
    Pieces,
    Projection,
    RotateOnRead,
    Slots,
    add_norm,
    add_norm_kernel,
    attention_kernel,
    attention_parts,
    backend,
    merge,
    norm_rope_store,
    reference,
    rms_norm,
    rms_norm_kernel,
    split_tokens,
)
from causalrope_sp import DiTConfig, LatentGrid, SamplerConfig, StreamConfig, sample_chunks
from causalrope_sp.diffusion.noise import seeded_noise
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.grid import Shard
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.models.rope import RotaryTables

DEVICE = torch.device(os.environ.get("CAUSALROPE_TEST_DEVICE", "cpu"))  # on "cuda" compiled, and not interpreted
EPS = 1e-6
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])


ROWS = pytest.mark.parametrize("rows", [1, 4], ids=["row by row", "4 rows a program"])


@pytest.fixture(autouse=True, scope="module")
def _bfloat16_as_on_a_gpu() -> Iterator[None]:
    """Triton 3.9's interpreter rounds float32 to bfloat16 by cutting, and multiplies matrices of bfloat16 as if they
    were of integers; here both are torch's."""
    handle, builder = interpreter.TensorHandle, interpreter.InterpreterBuilder
    cast, dot = builder.cast_impl, builder.create_dot

    def with_halo(x: Any) -> np.ndarray:
        return torch.from_numpy(np.ascontiguousarray(x.data).view(np.int16)).view(torch.bfloat16).float().numpy()

    def cast_impl(self: Any, source: Any, dtype: Any) -> Any:
        kinds = source.dtype.scalar, dtype.scalar
        if kinds == (tl.bfloat16, tl.float32):
            return handle(with_halo(source), tl.float32)
        if kinds == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.int16)
            return handle(rounded.numpy().view(np.uint16), tl.bfloat16)
        return cast(self, source, dtype)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (handle(with_halo(x), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "INTERPRETER_HAS_BFLOAT16", True)
        patch.setattr(builder, "cast_impl", cast_impl)
        patch.setattr(builder, "create_fp_to_fp", lambda self, x, dtype, rounding: cast_impl(self, x, dtype))
        patch.setattr(builder, "create_dot", create_dot)
        yield


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator, device="cpu").to(DEVICE)


def no_worse(ours: Tensor, rough: Tensor, truth: Tensor) -> None:
    """Ours errs at most twice what `rough` does, all numbers together, and at any one at most four times what `rough`
    does anywhere; where that is nothing, a few of float32's roundings are left to it."""
    assert ours.shape == rough.shape == truth.shape
    assert ours.dtype == rough.dtype
    same = ours.double() == truth  # infinities, too
    errors = [(x.double() - truth).masked_fill(same, 0.0) for x in (ours, rough)]
    size = truth.masked_fill(truth.isinf(), 0.0)
    for measure, times in ((Tensor.norm, 2), (lambda x: x.abs().max(), 4)):
        error, allowed, scale = (measure(x).item() for x in (*errors, size))
        bound = max(times * allowed, 8 * torch.finfo(torch.float32).eps * scale)
        assert error <= bound, f"off by {error:.2e}, the reference by {allowed:.2e}"


def as_dtype(x: Any, dtype: torch.dtype) -> Any:
    """Every tensor of floating-point numbers within, in that dtype."""
    if isinstance(x, Tensor):
        return x.to(dtype) if x.is_floating_point() else x
    if isinstance(x, tuple | list):
        return type(x)(as_dtype(item, dtype) for item in x)
    if isinstance(x, ByFrame | Modulation | Affine | Keys | RotateOnRead):
        return type(x)(**{name: as_dtype(value, dtype) for name, value in vars(x).items()})
    return x


def compare(operation: Callable[..., Any], *arguments: Any, dtype: torch.dtype) -> None:
    """`operation` by Triton and by torch in `dtype`, against torch in float64 on the same rounded numbers."""
    given = as_dtype(arguments, dtype)
    truth = operation(*as_dtype(given, torch.float64), backend="torch")
    ours, rough = (operation(*given, backend=name) for name in ("triton", "torch"))
    for mine, other, exact in zip(*(x if isinstance(x, tuple) else (x,) for x in (ours, rough, truth)), strict=True):
        no_worse(mine, other, exact)


def by_frame(*carrier: int, seed: int) -> ByFrame:
    """As a block has it: one of six vectors, side by side."""
    *frames, width = carrier
    return ByFrame.unbind(random(*frames, 6, width, seed=seed), random(6, width, seed=seed + 1))[2]


@DTYPES
@pytest.mark.parametrize(
    ("batch", "frames", "tokens", "width"), [(2, 3, 7, 60), (1, 1, 1, 128), (1, 2, 17, 384), (2, 2, 3, 1536)]
)
@ROWS
def test_add_norm(
    batch: int, frames: int, tokens: int, width: int, dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(add_norm_kernel, "rows_of", lambda count, block: rows)
    x, y = random(2, batch, frames * tokens, width)
    carrier = (batch, frames, width) if batch > 1 else (frames, width)
    gate, shift, scale = (by_frame(*carrier, seed=seed) for seed in (1, 3, 5))
    modulation, affine = Modulation(shift, scale, EPS), Affine(*random(2, width, seed=7), EPS)
    cases: list[tuple[Tensor | None, ByFrame | None, Norm]] = [
        (None, None, modulation),
        (y, gate, modulation),
        (y, None, modulation),
        (y, gate, affine),
        (y, None, affine),
    ]
    for branch, by, norm in cases:
        compare(add_norm, x, branch, by, norm, dtype=dtype)


def test_add_norm_of_the_last_frames_of_a_batch() -> None:
    """As the head has it: views whose batch entries lie apart, and numbers far from zero, where a mean matters."""
    x, y = 30 + random(2, 2, 3 * 5, 60)
    gate, shift, scale = (by_frame(2, 3, 60, seed=seed).frames(slice(1, None)) for seed in (1, 3, 5))
    for dtype in (torch.float32, torch.bfloat16):
        compare(add_norm, x[:, 5:], y[:, 5:], gate, Modulation(shift, scale, EPS), dtype=dtype)
    total, normed = add_norm(
        x.float()[:, 5:], None, None, as_dtype(Affine(*random(2, 60), EPS), torch.float32), "triton"
    )
    assert torch.equal(total, x.float()[:, 5:])
    assert normed.is_contiguous()


@DTYPES
@pytest.mark.parametrize(("tokens", "width"), [(1, 60), (13, 128), (5, 1536)])
@ROWS
def test_rms_norm(tokens: int, width: int, dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rms_norm_kernel, "rows_of", lambda count, block: rows)
    packed, weight = random(2, tokens, 2 * width), random(width, seed=1)
    compare(lambda x, w, backend: rms_norm(x[..., :width], w, EPS, backend), packed, weight, dtype=dtype)
    compare(lambda x, w, backend: rms_norm(x[..., width:], w, EPS, backend), 1e-4 * packed, weight, dtype=dtype)


GRID = LatentGrid(4, 5)
SLOTS = torch.tensor([5, 0, 3], device=DEVICE)
Written = list[Tensor]


def a_projection(heads: int, width: int, rank: int, dtype: torch.dtype, *, relative: bool = False) -> Projection:
    """Of three frames from 1030 on, of the uneven shards of 20 tokens on three ranks, which cut rows."""
    shard = Shard(GRID, rank, 3)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    tables = RotaryTables(width, 10_000, shard, DEVICE, compute)
    rotation = tables.rotation([1030, 1031, 1032], [0, 0, 0] if relative else None)
    qkv = random(2, 3, shard.tokens, 3 * heads * width, seed=rank).to(dtype)
    return Projection(qkv, *(random(heads * width, seed=seed).to(dtype) for seed in (8, 9)), rotation, heads, EPS)


def written(
    source: Projection | Pieces, split: Sequence[int], name: str, frames: slice, kinds: str = "qkv"
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
    norm_rope_store(source, **{kind: kv_slots[kind] for kind in kinds}, backend=name)
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


@pytest.mark.parametrize("shape", [(0, 3, 2), (1, 0, 2), (1, 3, 0)])
def test_nothing_to_attend_with_is_nothing(shape: tuple[int, int, int]) -> None:
    batch, _, heads = shape
    q, k = random(*shape, 20).half(), random(batch, 7, heads, 20).half()
    ((output, lse),) = attention_parts(q, Keys(k, k), "triton")
    assert (output.shape, lse.shape) == (q.shape, shape)


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


def whole(q: Tensor, keys: Keys, backend: str) -> Partial:
    return merge(attention_parts(q, keys, backend), backend="torch")


@DTYPES
@pytest.mark.parametrize(
    ("queries", "keys", "width"), [(1, 1, 20), (7, 31, 20), (65, 130, 64), (130, 70, 128), (3, 200, 6), (9, 40, 160)]
)
def test_attention(queries: int, keys: int, width: int, dtype: torch.dtype) -> None:
    q, (k, v) = random(2, queries, 3, width), random(2, 2, keys, 3, width, seed=1)
    compare(whole, q, Keys(k, v), dtype=dtype)
    compare(whole, q, Keys(k, v).heads(slice(0, 3)), dtype=dtype)


@DTYPES
def test_attention_over_stretches_of_a_ring(dtype: torch.dtype) -> None:
    q, (k, v) = random(2, 11, 3, 20), random(2, 2, 150, 3, 20, seed=1)
    compare(whole, q[:, :, 1:], Keys(k, v, ((3, 90), (95, 95), (100, 149))).heads(slice(1, 3)), dtype=dtype)
    bounds = torch.tensor([[0, 7], [20, 21]], dtype=torch.int32, device=DEVICE)
    compare(whole, q, Keys(k, v, ((0, 7), (20, 21)), bounds), dtype=dtype)


@DTYPES
@pytest.mark.parametrize("width", [20, 64, 128])
def test_keys_are_turned_on_read(width: int, dtype: torch.dtype) -> None:
    slots, tokens = 6, 13
    q, (k, v) = random(2, 9, 2, width), random(2, 2, slots * tokens, 2, width, seed=1)
    tables = RotaryTables(width, 10_000, Shard(GRID), DEVICE, torch.float64)
    rotate_on_read = tables.rotate_on_read([3, 0, 1, 2, 5, 4], tokens)
    ranges = ((0, 2 * tokens), (3 * tokens, 5 * tokens))
    compare(
        whole,
        q,
        Keys(k, v, ranges, torch.tensor(ranges, dtype=torch.int32, device=DEVICE), rotate_on_read),
        dtype=dtype,
    )


@pytest.mark.parametrize("count", [2, 3, 8])
def test_shares_of_the_keys_add_up(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every stretch, and of slots; some get none."""
    monkeypatch.setattr(attention_kernel, "shares", lambda *shape: count)
    q, (k, v) = random(2, 5, 2, 20), random(2, 2, 300, 2, 20, seed=1)
    assert len(attention_parts(q.float(), as_dtype(Keys(k, v), torch.float32), "triton")) == count
    for dtype in (torch.float32, torch.bfloat16):
        compare(whole, q, Keys(k, v, ((0, 150), (160, 165))), dtype=dtype)
    rotate_on_read = RotaryTables(20, 10_000, Shard(GRID), DEVICE, torch.float64).rotate_on_read(range(6), 50)
    compare(whole, q, Keys(k, v, ((50, 250),), rotate_on_read=rotate_on_read), dtype=torch.bfloat16)


def test_few_queries_get_shares_that_fill_a_gpu() -> None:
    cpu = torch.device("cpu")
    assert attention_kernel.shares(37 * 12, 32_760, cpu) == 2  # 3.4 waves become 6.7
    assert attention_kernel.shares(5 * 12, 32_760, cpu) == 2
    assert attention_kernel.shares(12, 32_760, cpu) == 8
    assert attention_kernel.shares(12, 512, cpu) == 1
    assert attention_kernel.shares(132, 32_760, cpu) == 1


@pytest.mark.parametrize("count", [1, 3])
def test_bounds_are_read_on_the_device(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same launch with other numbers in the same tensor: what a captured graph does from chunk to chunk."""
    monkeypatch.setattr(attention_kernel, "shares", lambda *shape: count)
    q, (k, v) = random(1, 5, 2, 20).float(), random(2, 1, 60, 2, 20, seed=1).float()
    bounds = torch.tensor([[0, 60]], dtype=torch.int32, device=DEVICE)
    keys = Keys(k, v, ((0, 60),), bounds)
    for first, stop in ((0, 20), (0, 40), (30, 60), (7, 7)):
        bounds.copy_(torch.tensor([[first, stop]]))
        output, lse = whole(q, keys, "triton")
        expected, expected_lse = whole(q, Keys(k, v, ((first, stop),)), "torch")
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-6)


def test_large_scores_do_not_overflow() -> None:
    q, (k, v) = 200 * random(1, 3, 1, 20), 200 * random(2, 1, 90, 1, 20, seed=1)
    compare(whole, q, Keys(k, v), dtype=torch.float32)


def some_parts(count: int, width: int, heads: int = 3) -> list[Partial]:
    parts = [(random(2, 7, heads, width, seed=n), 5 * random(2, 7, heads, seed=n + 100)) for n in range(count)]
    for n in range(1, count):
        parts[n][1][:, n % 7] = -math.inf
    return parts


@DTYPES
@pytest.mark.parametrize(("count", "width"), [(2, 20), (3, 128), (9, 64), (40, 6)])
def test_merge(count: int, width: int, dtype: torch.dtype) -> None:
    """Log-sum-exps are float32 in half precision too."""
    parts = some_parts(count, width)
    for output, lse in parts:
        output.masked_fill_((lse == -math.inf).unsqueeze(-1), 0.0)
    given = [(output.to(dtype), lse.float()) for output, lse in parts]
    truth = reference.merge([(output.double(), lse.double()) for output, lse in given])
    for ours, rough, exact in zip(merge(given, "triton"), merge(given, "torch"), truth, strict=True):
        no_worse(ours, rough, exact)


@pytest.mark.parametrize("together", [True, False])
def test_parts_are_merged_as_they_arrived(together: bool) -> None:
    """Log-sum-exps behind all outputs, or each behind its own; an output without keys may hold anything."""
    if together:
        wire = torch.full((3, 2 * 7 * 3 * (20 + 2)), math.nan, dtype=torch.bfloat16, device=DEVICE)
        opened = [piece.split([2 * 7 * 3 * 20, 2 * 7 * 3 * 2]) for piece in wire]
        arrived = [(o.view(2, 7, 3, 20), weights.view(torch.float32).view(2, 7, 3)) for o, weights in opened]
    else:
        rows = torch.full((3, 2, 7, 3, 20 + 2), math.nan, dtype=torch.bfloat16, device=DEVICE)
        arrived = [(piece[..., :20], piece[..., 20:].view(torch.float32).squeeze(-1)) for piece in rows]
    for (place_of_output, place_of_lse), (output, lse) in zip(arrived, some_parts(3, 20), strict=True):
        place_of_output.copy_(output.masked_fill((lse == -math.inf).unsqueeze(-1), math.nan))
        place_of_lse.copy_(lse)
    output, lse = merge(arrived, "triton")
    cleared = [(o.masked_fill((weight == -math.inf).unsqueeze(-1), 0.0), weight) for o, weight in arrived]
    expected, expected_lse = reference.merge(cleared)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(lse, expected_lse)


def test_merging_nothing_gives_zeros_and_minus_infinity() -> None:
    nothing = (torch.full((1, 3, 2, 20), math.nan, device=DEVICE), torch.full((1, 3, 2), -math.inf, device=DEVICE))
    output, lse = merge([nothing, nothing], "triton")
    assert not output.any()
    assert (lse == -math.inf).all()


def make_model(dtype: torch.dtype = torch.float32) -> CausalDiT:
    config = DiTConfig(
        dim=60, ffn_dim=40, num_heads=3, num_layers=2, text_dim=8, text_len=5, freq_dim=16, in_channels=2
    )
    torch.manual_seed(0)
    return CausalDiT(config).to(dtype)


def a_video(parallel: SequenceParallel, dtype: torch.dtype, stream: StreamConfig) -> Tensor:
    """Four chunks of two frames; the last ones evict."""
    grid, model = LatentGrid(2, 3), make_model(dtype)
    chunks = sample_chunks(
        model,
        random(1, 5, 8).to(dtype),
        seeded_noise(0, (1, 2, 4, 6)),
        grid,
        8,
        stream=stream,
        sampler=SamplerConfig(steps=(1000, 500)),
        parallel=parallel,
    )
    return torch.cat([chunk.latents for chunk in chunks], 1)


def by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "runs_triton", lambda device: True)


def video_by_triton(group: Any, device: str, strategy: str, stream: StreamConfig) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        by_triton(patch)
        for name in ("add_norm", "rms_norm", "attention", "attention_lse", "merge"):
            patch.setattr(reference, name, None)  # a call of it would raise
        return a_video(SequenceParallel(group, strategy, device), torch.float32, stream)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="its ranks are processes of this one machine's CPU")
@pytest.mark.parametrize(
    ("strategy", "rope"), [("ulysses", "absolute"), ("gather-kv", "relative"), ("shard-kv", "absolute")]
)
def test_a_stream_by_triton_on_two_ranks_is_that_by_torch_on_one(
    pool: RankPool, strategy: str, rope: Literal["absolute", "relative"]
) -> None:
    stream = StreamConfig(window=5, sink=1, chunk_frames=2, rope=rope)
    expected = a_video(SequenceParallel.single(device="cpu"), torch.float64, stream)
    found = pool.run(video_by_triton, 2, strategy, stream)
    assert (found.double() - expected).norm() <= 1e-5 * expected.norm()
