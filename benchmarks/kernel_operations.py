"""The operations that benchmarks/kernel_suite.py judges and times, each with the shapes of one rank of a Wan 2.1
stream.

Shapes: T tokens of the chunk on a rank, Q queries, L keys, H heads, h heads on a rank, d head width, D = H·d, P ranks,
N parts, M width of the feed-forward, e bytes of a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from causalrope_kernels import (
    Affine,
    Keys,
    Modulation,
    Norm,
    Partial,
    Pieces,
    Projection,
    Slots,
    Source,
    add_norm,
    attention,
    attention_parts,
    linear_gelu,
    merge,
    norm_rope_store,
    reference,
    rms_norm,
    split_tokens,
)
from causalrope_kernels.backend import Backend
from causalrope_sp.attention.base import lse_elements
from causalrope_sp.cache.window import SlidingWindow
from causalrope_sp.config import PRESETS, DiTConfig
from causalrope_sp.distributed.layout import parse_strategy
from causalrope_sp.grid import Chunk, LatentGrid, Shard
from causalrope_sp.models.rope import RotaryTables

GRID, FRAMES, WINDOW = LatentGrid(30, 52), 3, SlidingWindow(21)
FIRST = 30  # the chunk's first frame: the ring has wrapped, and the chunk's slots lie inside it


@dataclass(frozen=True)
class Setting:
    """One rank's shard of one chunk, of a stream whose window is full."""

    model: str
    config: DiTConfig
    shard: Shard
    frames: int
    window: SlidingWindow
    first: int

    @property
    def ranks(self) -> int:
        return self.shard.ranks

    @property
    def tokens(self) -> int:
        """T, the tokens of the chunk on this rank."""
        return self.frames * self.shard.tokens

    @property
    def chunk(self) -> Chunk:
        return Chunk(self.first // self.frames, self.first, self.frames)

    @property
    def split(self) -> list[int]:
        """The heads of each rank under ulysses, where an all-to-all turns shards of tokens into shards of heads."""
        return parse_strategy("ulysses", self.ranks).heads(self.config.num_heads)


@dataclass(frozen=True)
class Draw:
    """Draws random numbers, the same ones every time: rounded to `dtype` and held in `held`, which is no less
    precise."""

    device: torch.device
    dtype: torch.dtype
    held: torch.dtype
    generator: torch.Generator

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype, held: torch.dtype | None = None) -> Draw:
        return cls(device, dtype, held or dtype, torch.Generator(device).manual_seed(0))

    @property
    def wide(self) -> torch.dtype:
        """The dtype of angles and of log-sum-exps."""
        return torch.float64 if self.held == torch.float64 else torch.float32

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (scale * self._normal(shape)).to(self.dtype).to(self.held)

    def precise(self, *shape: int) -> Tensor:
        return self._normal(shape).to(self.wide)

    def unwritten(self, *shape: int) -> Tensor:
        return torch.full(shape, math.nan, dtype=self.held, device=self.device)

    def _normal(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)


@dataclass(frozen=True)
class Operation:
    """One call at one shape, and the bytes that it must move or the FLOP that it must compute.

    Args:
        name: of the operation, for the tables.
        formula: of the bytes that must cross memory or, if `matrix`, of the FLOP.
        amount: the value of the formula.
        build: draws the inputs of one call.
        run: the call, by backend; "torch" is the reference.
        matrix: whether its floor is set by FLOP instead of bytes.
        backend: the backend that is timed.
        judged: the call that the gate compares, if it returns more than `run`.
        per_pass: how often one pass makes the call, on a single rank.
        attends: whether it is attention, which several libraries offer.
        note: a remark on its shape.
    """

    name: str
    formula: str
    amount: int
    build: Callable[[Draw], Any]
    run: Callable[[Any, Any], Any]
    matrix: bool = False
    backend: Backend = "triton"
    judged: Callable[[Any, Any], Any] | None = None
    per_pass: int = 0
    attends: bool = False
    note: str = ""


def operations(s: Setting, itemsize: int = 2) -> Iterator[Operation]:
    """Yields the operations of a pass in this setting, those of all strategies included."""
    yield from _norms(s, itemsize)
    yield from _placements(s, itemsize)
    yield from _merges(s, itemsize)
    yield _linear_gelu(s)
    yield from _attentions(s)


def _norms(s: Setting, itemsize: int) -> Iterator[Operation]:
    layers, numbers = s.config.num_layers, s.tokens * s.config.dim * itemsize
    # the first block has no residual to add yet; the head adds that of the last block
    yield Operation("modulate", "2·T·D·e", 2 * numbers, partial(_norm_inputs, s), _add_norm, per_pass=1)
    forms = {
        "gate, modulate": partial(_norm_inputs, s, added=True, gated=True),
        "add, modulate": partial(_norm_inputs, s, added=True),
        "gate, affine": partial(_norm_inputs, s, added=True, gated=True, affine=True),
    }
    for name, build in forms.items():
        yield Operation(name, "4·T·D·e", 4 * numbers, build, _add_norm, per_pass=layers)

    def rows_and_weight(draw: Draw) -> tuple[Tensor, Tensor]:
        return draw(1, s.tokens, s.config.dim), draw(s.config.dim)

    def run(inputs: tuple[Tensor, Tensor], backend: Backend) -> Tensor:
        return rms_norm(*inputs, s.config.eps, backend=backend)

    yield Operation("rms norm", "2·T·D·e", 2 * numbers, rows_and_weight, run, per_pass=layers)


NormInputs = tuple[Tensor, Tensor | None, Tensor | None, Norm]


def _norm_inputs(
    s: Setting, draw: Draw, *, added: bool = False, gated: bool = False, affine: bool = False
) -> NormInputs:
    dim, eps = s.config.dim, s.config.eps
    gate, shift, factor, *_ = draw(s.frames, 6, dim).float().unbind(1)  # as a block has them
    norm = Affine(draw(dim), draw(dim), eps) if affine else Modulation(shift, factor, eps)
    x_BTD = draw(1, s.tokens, dim)
    return x_BTD, draw(1, s.tokens, dim) if added else None, gate if gated else None, norm


def _add_norm(inputs: NormInputs, backend: Backend) -> tuple[Tensor, Tensor]:
    return add_norm(*inputs, backend=backend)


@dataclass(frozen=True)
class Write:
    """q, k, v and the slots that they are written to."""

    source: Source
    q: list[Slots]
    k: list[Slots]
    v: list[Slots]


def _write(inputs: Write, backend: Backend) -> tuple[Tensor, ...]:
    q, k, v = inputs.q, inputs.k, inputs.v
    norm_rope_store(inputs.source, q=q, k=k, v=v, backend=backend)
    return tuple(slots.x for slots in (*q, *k, *v))


def _placements(s: Setting, itemsize: int) -> Iterator[Operation]:
    heads, width, own_heads = s.config.num_heads, s.config.head_dim, s.split[0]
    moved = 6 * s.tokens * s.config.dim * itemsize

    def to_ring(draw: Draw) -> Write:
        return Write(_projection(s, draw), *_q_and_ring(s, draw, s.shard.tokens, heads))

    def to_others(draw: Draw) -> Write:
        return Write(_projection(s, draw), *_send_buffer(s, draw))

    def received(kinds: int, heads: int, draw: Draw) -> Write:
        sizes = [kinds * s.frames * shard.tokens * heads * width for shard in s.shard.all]
        flat = draw(sum(sizes)).split(sizes)
        pieces = Pieces([piece.view(kinds, 1, s.frames, -1, heads, width) for piece in flat])
        q, k, v = _q_and_ring(s, draw, s.shard.grid.tokens, heads)
        return Write(pieces, q if kinds == 3 else [], k, v)

    yield Operation("q, k, v to q and ring", "6·T·D·e", moved, to_ring, _write, per_pass=s.config.num_layers)
    if s.ranks > 1:
        yield Operation("q, k, v to send buffer", "6·T·D·e", moved, to_others, _write)
        all_tokens, note = s.frames * s.shard.grid.tokens * width * itemsize, f"{own_heads} of {heads} heads"
        build, amount = partial(received, 3, own_heads), own_heads * all_tokens
        yield Operation("pieces to q and ring", "6·Q·h·d·e", 6 * amount, build, _write, note=note)
        yield Operation("pieces to ring", "4·Q·D·e", 4 * heads * all_tokens, partial(received, 2, heads), _write)
        yield Operation("tokens to pieces", "2·Q·h·d·e", 2 * amount, partial(_back, s), _split, note=note)


def _back(s: Setting, draw: Draw) -> tuple[Tensor, list[Tensor]]:
    """Draws the attention output of this rank's heads, and the pieces in which it is sent back to the tokens' ranks."""
    heads, width = s.split[0], s.config.head_dim
    sizes = [s.frames * shard.tokens * heads * width for shard in s.shard.all]
    pieces = [flat.view(1, s.frames, -1, heads, width) for flat in draw.unwritten(sum(sizes)).split(sizes)]
    return draw(1, s.frames, s.shard.grid.tokens, heads, width), pieces


def _split(inputs: tuple[Tensor, list[Tensor]], backend: Backend) -> tuple[Tensor, ...]:
    split_tokens(*inputs, backend=backend)
    return tuple(inputs[1])


def _projection(s: Setting, draw: Draw) -> Projection:
    c = s.config
    rotation = _tables(s, draw).rotation(list(range(s.first, s.first + s.frames)))
    rotation = replace(rotation, **{name: getattr(rotation, name).to(draw.wide) for name in ("time", "row", "column")})
    qkv_BFSN = draw(1, s.frames, s.shard.tokens, 3 * c.dim)
    return Projection(qkv_BFSN, draw(c.dim), draw(c.dim), rotation, c.num_heads, c.eps)


def _tables(s: Setting, draw: Draw) -> RotaryTables:
    return RotaryTables(s.config.head_dim, s.config.theta, s.shard, draw.device, torch.float32)


def _q_and_ring(s: Setting, draw: Draw, tokens: int, heads: int) -> tuple[list[Slots], list[Slots], list[Slots]]:
    """Makes a tensor for q, and the chunk's slots in the rings of k and v."""
    slots_F = torch.tensor(s.window.slots(s.chunk), device=draw.device)
    frame = tokens, heads, s.config.head_dim
    k, v = (Slots(draw.unwritten(1, s.window.frames, *frame), slots_F) for _ in range(2))
    return [Slots(draw.unwritten(1, s.frames, *frame))], [k], [v]


def _send_buffer(s: Setting, draw: Draw) -> list[list[Slots]]:
    """Makes the buffer of an all-to-all as `Communicator.buffer` does: one piece for each rank, contiguous, with q, k,
    v of its heads."""
    sizes = [3 * s.frames * s.shard.tokens * heads * s.config.head_dim for heads in s.split]
    flat = draw.unwritten(sum(sizes)).split(sizes)
    pieces = [
        part.view(3, 1, s.frames, s.shard.tokens, h, s.config.head_dim) for part, h in zip(flat, s.split, strict=True)
    ]
    return [[Slots(piece[kind]) for piece in pieces] for kind in range(3)]


def _merges(s: Setting, itemsize: int) -> Iterator[Operation]:
    part = s.tokens * s.config.num_heads * (s.config.head_dim * itemsize + 4)  # the log-sum-exp is float32

    def merged(parts: list[Partial], backend: Backend) -> Partial:
        return merge(parts, backend=backend)

    formula = "(N+1)·T·H·(d·e + 4)"
    yield Operation("merge of 2", formula, 3 * part, partial(_parts, s), merged)
    if s.ranks > 1:
        build, amount = partial(_parts_from_ranks, s), (s.ranks + 1) * part
        yield Operation(f"merge of {s.ranks} as they arrive", formula, amount, build, merged)


def _parts(s: Setting, draw: Draw, count: int = 2) -> list[Partial]:
    outputs_NBTHD = draw(count, 1, s.tokens, s.config.num_heads, s.config.head_dim)
    lse_NBTH = draw.precise(*outputs_NBTHD.shape[:-1])
    lse_NBTH[0, :, 0] = -math.inf  # a part without keys
    return list(zip(outputs_NBTHD, lse_NBTH, strict=True))


def _parts_from_ranks(s: Setting, draw: Draw) -> list[Partial]:
    """Draws partial outputs as shard-kv receives them: the log-sum-exps lie in the bytes behind a rank's outputs."""
    found = []
    for output, lse in _parts(s, draw, s.ranks):
        piece = torch.cat([output.flatten(), lse.flatten().view(output.dtype)])
        outputs, lses = piece.split([output.numel(), lse_elements(output.element_size()) * lse.numel()])
        found.append((outputs.view(output.shape), lses.view(lse.dtype).view(lse.shape)))
    return found


def _linear_gelu(s: Setting) -> Operation:
    dim, ffn_dim = s.config.dim, s.config.ffn_dim

    def build(draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
        return draw(1, s.tokens, dim), draw(ffn_dim, dim, scale=dim**-0.5), draw(ffn_dim)

    def run(inputs: tuple[Tensor, Tensor, Tensor], backend: Backend) -> Tensor:
        return reference.linear_gelu(*inputs) if backend == "torch" else linear_gelu(*inputs)

    amount = 2 * s.tokens * dim * ffn_dim
    return Operation("linear, gelu", "2·T·D·M", amount, build, run, matrix=True, per_pass=s.config.num_layers)


Attention = tuple[Tensor, Keys]


def _attentions(s: Setting) -> Iterator[Operation]:
    c, layers = s.config, s.config.num_layers
    queries, heads, note = _attended(s)
    tokens, slots = s.shard.grid.tokens, s.window.frames
    old, _ = s.window.ranges(s.chunk, s.chunk.start)
    make = partial(
        Operation, run=_attend, judged=_attend_with_lse, matrix=True, backend="auto", attends=True, note=note
    )

    def ranges(slot_ranges: Sequence[tuple[int, int]], rotated: bool, draw: Draw) -> Attention:
        rows = tuple((first * tokens, stop * tokens) for first, stop in slot_ranges)
        q = draw(1, queries, heads, c.head_dim)
        k, v = draw(2, 1, slots * tokens, heads, c.head_dim)
        rotate_on_read = _tables(s, draw).rotate_on_read(s.window.positions(s.chunk), tokens) if rotated else None
        if rotate_on_read is not None:
            rotate_on_read = replace(rotate_on_read, table=rotate_on_read.table.to(draw.wide))
        return q, Keys(k, v, rows, torch.tensor(rows, dtype=torch.int32, device=draw.device), rotate_on_read)

    def text(draw: Draw) -> Attention:
        k, v = draw(1, c.text_len, c.dim), draw(1, c.text_len, 2 * c.dim)[..., c.dim :]
        heads_of = partial(Tensor.unflatten, dim=-1, sizes=(c.num_heads, c.head_dim))
        return draw(1, s.tokens, c.num_heads, c.head_dim), Keys(heads_of(k), heads_of(v))

    flop, whole = 4 * queries * tokens * heads * c.head_dim, [(0, slots)]
    read = sum(stop - first for first, stop in old)
    build = partial(ranges, whole, False)
    yield make("attention, full ring", "4·Q·L·h·d", slots * flop, build, per_pass=layers)
    yield make(f"attention, {len(old)} ranges", "4·Q·L·h·d", read * flop, partial(ranges, old, False))
    yield make("attention, keys rotated on read", "4·Q·L·h·d", slots * flop, partial(ranges, whole, True))
    flop = 4 * s.tokens * c.text_len * c.dim
    yield make("cross-attention", "4·T·L·D", flop, text, per_pass=layers, note=f"{c.text_len} keys of text")


def _attended(s: Setting) -> tuple[int, int, str]:
    """Returns the queries and heads of one rank's self-attention, and a note on the strategy; it attends all keys."""
    whole, heads = s.frames * s.shard.grid.tokens, s.config.num_heads
    if s.ranks == 1:
        return whole, heads, ""
    if heads % s.ranks == 0:
        return whole, heads // s.ranks, f"ulysses: {heads // s.ranks} of {heads} heads"
    return s.tokens, heads, f"gather-kv: {s.tokens} of {whole} queries"


def _attend(inputs: Attention, backend: str) -> Tensor:
    return attention(*inputs, backend=backend)


def _attend_with_lse(inputs: Attention, backend: str) -> Partial:
    return merge(attention_parts(*inputs, backend=backend), backend="torch" if backend == "torch" else "auto")


def settings(models: Sequence[str], ranks: Sequence[int]) -> list[Setting]:
    return [
        Setting(name, PRESETS[name], Shard(GRID, 0, count), FRAMES, WINDOW, FIRST) for name in models for count in ranks
    ]
