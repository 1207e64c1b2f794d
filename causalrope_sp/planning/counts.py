"""What every strategy sends, stores and computes, counted from sizes alone.

Counts (elements, bytes, FLOPs, weights, cache) are exact and tested against `CommStats` and torch's FLOP counter.

In every function `layout` is the strategy on the ranks of the `sp` axis, `work` the stream, `rank` a rank of that axis,
and `branch` 0 for the conditional and 1 for the unconditional branch of guidance.
Shapes: B batch, F frames of a pass, s tokens of a frame on a rank, S of a whole frame, H heads, d head width, D = H·d.
"""

from __future__ import annotations

from collections import Counter
from functools import cache

from causalrope_kernels.quantized_heads import SCALE_DTYPE
from causalrope_sp.attention.base import lse_elements
from causalrope_sp.attention.quantized_pieces import kv_elements
from causalrope_sp.distributed.layout import GATHER_KV, SHARD_KV, Layout, token_spans
from causalrope_sp.grid import LatentGrid, Shard
from causalrope_sp.heads.near_rows import pairs
from causalrope_sp.planning.workload import Workload


def received(layout: Layout, work: Workload, rank: int, frames: int, layer: int = 0) -> dict[str, int]:
    """Returns the elements that a rank receives in one layer of a pass over `frames` frames, by `CommStats` kind.

    They are numbers of `work.itemsize` bytes, those in which keys and values of 8 bits travel too.
    """
    if layout.ranks == 1:
        return {}
    row, column, tokens, rows = coordinates(layout, work, rank)
    split = work.head_rings(layout.ulysses).placements[layer].sizes
    heads, width, times = split[column], work.config.head_dim, work.batch * frames
    elements = {}
    if layout.ulysses > 1:
        others = [each for number, each in enumerate(tokens) if number != rank and layout.coordinates(number)[0] == row]
        elements["qkv"] = times * sum(others) * heads * width
        elements["qkv"] += sum(_kv_elements(work, times * each * heads) for each in others)
        elements["output"] = times * tokens[rank] * (sum(split) - heads) * width
    widest, sharing = max(rows), layout.sharing - 1
    if layout.inner == GATHER_KV:
        elements["kv"] = sharing * _kv_elements(work, times * widest * heads)
    if layout.inner == SHARD_KV:
        elements["q"] = times * sharing * widest * heads * width
        elements["partial"] = times * sharing * rows[row] * heads * (width + lse_elements(work.itemsize))
    return elements


def _kv_elements(work: Workload, vectors: int) -> int:
    """The elements that so many keys and as many values take in a collective, which carries what the cache stores."""
    width = work.config.head_dim
    return 2 * vectors * width if work.cache == "model" else kv_elements(vectors, width, work.itemsize)


def received_in_pass(layout: Layout, work: Workload, rank: int, frames: int) -> dict[str, int]:
    """Returns the elements that a rank receives in all layers of a pass, by `CommStats` kind."""
    layers = work.config.num_layers
    if work.head_rings(layout.ulysses).one:
        return {kind: layers * count for kind, count in received(layout, work, rank, frames).items()}
    return dict(sum((Counter(received(layout, work, rank, frames, n)) for n in range(layers)), Counter[str]()))


def received_latents(work: Workload, ranks: int) -> int:
    """Returns the elements that a rank receives when a chunk's latents are gathered; they are float32 or float64."""
    widest = max(tokens_of_ranks(work.grid, ranks))
    return (ranks - 1) * work.batch * work.chunk_frames * widest * work.config.token_dim


def received_means(work: Workload, ranks: int) -> int:
    """Returns the elements that a rank receives in a steady chunk to choose similar frames, in float32 or float64: the
    sums of the chunk's queries and of the keys of the one before it."""
    if work.similar is None:
        return 0
    return (ranks - 1) * work.batch * work.choosing * 2 * work.chunk_frames * work.config.head_dim


def received_guidance(work: Workload, ranks: int) -> int:
    """Returns the elements that a rank receives from the other branch after a pass, in the dtype of the latents."""
    return work.batch * work.chunk_frames * max(tokens_of_ranks(work.grid, ranks)) * work.config.token_dim


def cache_bytes(layout: Layout, work: Workload, rank: int) -> int:
    """Returns the bytes of one branch's KV cache: its rings, and the undo buffer of an open chunk. One that is stored
    in 8 bits has the offsets of the keys of all heads too, in float32 or wider."""
    cached = work.head_rings(layout.ulysses).cached(layout.coordinates(rank)[1], from_model=False)
    offsets = 0 if work.cache == "model" else work.batch * work.config.num_layers * work.config.dim
    return cached.slots(work.chunk_frames) * slot_bytes(layout, work, rank) + offsets * max(4, work.itemsize)


def frame_bytes(layout: Layout, work: Workload, rank: int) -> int:
    """Returns the bytes that a latent frame takes in one branch's KV cache, of all heads that attend anything."""
    cached = work.head_rings(layout.ulysses).cached(layout.coordinates(rank)[1], from_model=False)
    return cached.attending * slot_bytes(layout, work, rank)


def slot_bytes(layout: Layout, work: Workload, rank: int) -> int:
    """Returns the bytes of a frame's keys and values of one head, of the tokens that a rank caches, and of their scales
    of 8 bits."""
    row, _, _, rows = coordinates(layout, work, rank)
    tokens = sum(rows) if layout.inner == GATHER_KV else rows[row]
    width = work.config.head_dim
    head = width * work.itemsize if work.cache == "model" else width + SCALE_DTYPE.itemsize
    return 2 * work.batch * tokens * head


def stored_bytes(layout: Layout, work: Workload, rank: int, branch: int = 0, stays: bool = False) -> int:
    """Returns the bytes of the outputs that a rank stores for later passes of a chunk: its own shard of each. With
    `stays`, the memory of an output is its own, as graphs need it, and not freed after the last reuse."""
    reuse = work.reuse[branch] if work.reuse else None
    outputs = 0 if reuse is None else reuse.kept if stays else reuse.stored
    tokens = tokens_of_ranks(work.grid, layout.ranks)[rank]
    return outputs * work.batch * work.chunk_frames * tokens * work.config.dim * work.itemsize


def attention_flops(
    layout: Layout,
    work: Workload,
    rank: int,
    frames: int,
    keys: int,
    chosen: int | None = None,
    *,
    waiting: bool = False,
) -> int:
    """Returns the FLOPs of self-attention in all layers of a pass: `frames` of queries on `keys` frames of keys, or on
    those that a head sees of them; heads that see the whole window attend `chosen` of them, or all. With `waiting`, a
    layer's are those of the ranks with most of them, for which the others wait."""
    rings, spans = work.head_rings(layout.ulysses), token_spans(layout, work.grid, rank)
    of_frames = [pairs(work.grid, near, *spans) for near in rings.rows]
    _, column = layout.coordinates(rank)
    most = keys, chosen, of_frames
    seen = rings.waited_for(*most) if waiting else rings.attended(column, *most)
    return int(4 * work.batch * work.config.head_dim * frames * seen)


def head_imbalance(layout: Layout, work: Workload) -> float:
    """Returns ρ of a steady chunk, by which factor the ranks whose heads see most take longer than the mean; see
    `HeadRings.imbalance`. The first forward is fused with the context pass of the chunk before."""
    rings, shares = work.head_rings(layout.ulysses), []
    for rank in range(0, layout.ranks, layout.ulysses):
        spans = token_spans(layout, work.grid, rank)
        every = pairs(work.grid, None, *spans)
        shares.append([pairs(work.grid, near, *spans) / every for near in rings.rows])
    first, later = (work.window, work.seen), (work.seen,)
    return rings.imbalance({first: 1, later: work.steps - 1}, shares)


def cross_flops(work: Workload, tokens: int) -> int:
    """Returns the FLOPs of cross-attention in all layers for so many tokens."""
    return 4 * work.config.num_layers * tokens * work.config.text_len * work.config.dim


def chunk_flops(layout: Layout, work: Workload, rank: int, branch: int = 0) -> int:
    """Returns the FLOPs of a rank in a steady chunk, whose first pass is fused with the chunk before's context pass."""
    layers = work.config.num_layers
    tokens = work.batch * work.chunk_frames * tokens_of_ranks(work.grid, layout.ranks)[rank]
    total = -work.models * work.left_out_flops * tokens
    for step in range(work.passes[branch]):
        chunks, computed = 2 if step == 0 else 1, work.computed(step, branch)
        attention = attention_flops(layout, work, rank, work.chunk_frames, work.window, work.seen)
        if step == 0:
            attention += attention_flops(layout, work, rank, work.chunk_frames, work.window)
        total += work.linear_flops_of(computed) * chunks * tokens
        total += computed["self"] * attention // layers
        total += computed["cross"] * cross_flops(work, chunks * tokens) // layers
    if work.recomputed is not None:  # the chunk before attends what is left for the next one
        chunk, left = work.chunk_frames, work.window - work.chunk_frames
        total -= attention_flops(layout, work, rank, chunk, work.window)
        total += attention_flops(layout, work, rank, chunk, left)
    for frames, keys in work.more_context:
        again = tokens // work.chunk_frames * frames
        total += work.linear_flops * again + cross_flops(work, again)
        total += attention_flops(layout, work, rank, frames, keys)
    return total


def coordinates(layout: Layout, work: Workload, rank: int) -> tuple[int, int, list[int], list[int]]:
    """Returns a rank's row and column, every rank's tokens of a frame, and every row's."""
    tokens = tokens_of_ranks(work.grid, layout.ranks)
    return *layout.coordinates(rank), tokens, [sum(row) for row in layout.rows(tokens)]


@cache
def tokens_of_ranks(grid: LatentGrid, ranks: int) -> list[int]:
    """Returns the tokens of a frame that each rank owns."""
    return [shard.tokens for shard in Shard(grid, 0, ranks).all]
