"""The keys and values of a session: gathered whole from all ranks, layer by layer, and read by each rank in its part.

Shapes: B batch, K saved frames, S tokens of a frame, N heads of the model, s and n those of one rank, D head width.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor

from causalrope_sp.attention.build import stored_part
from causalrope_sp.checks import shown
from causalrope_sp.errors import CheckpointError, ConfigError
from causalrope_sp.sampling.chunk_loop import ChunkLoop
from causalrope_sp.sampling.guidance import GuidanceBranch
from causalrope_sp.sampling.steered_loop import SteeredLoop
from causalrope_sp.sessions import SavedBranch, SavedCache
from causalrope_sp.sessions.saved_parts import BRANCHES
from causalrope_sp.sessions.session_metadata import branch_of

Part = tuple[slice, int]  # tokens of a frame, and the number of a column of heads
Columns = tuple[tuple[int, ...], ...]  # the heads of each column
KIND = "saved keys and values"  # of the collective, for `CommStats`


def describe_cache(loop: ChunkLoop) -> SavedCache:
    """Describes the cache of a stream between two chunks. All ranks that denoise must call it.

    Args:
        loop: the stream.
    """
    config = loop.model.config
    local = [(name, loop.branches.branch(number)) for number, name in enumerate(BRANCHES)]
    found = {name: _describe(loop, name, branch) for name, branch in local if branch is not None}
    if loop.parallel.mesh.cfg > 1:  # each half of that axis has one branch
        ranks = loop.parallel.communicator_among(loop.parallel.mesh.denoising)
        assert ranks is not None, "the axis has two ranks"
        mine = json.dumps([asdict(branch) for branch in found.values()])
        for fields in ranks.everyone({"branches": mine}):
            found |= {each["name"]: branch_of(each) for each in json.loads(fields["branches"])}
    branches = tuple(found[name] for name in BRANCHES if name in found)
    grid, batch = loop.context.grid, loop.context.batch
    sizes = config.num_layers, batch, grid.tokens, config.num_heads, config.head_dim
    dtype = loop.model.dtype if loop.options.stream.cache == "model" else torch.int8
    cache = SavedCache(branches, *sizes, dtype, _kinds(loop))
    return cache if dtype != torch.int8 else replace(cache, offsets=_offsets(loop, cache))


def _describe(loop: ChunkLoop, name: str, branch: GuidanceBranch) -> SavedBranch:
    cache, pending, stop = branch.stream.cache, branch.pending, loop.position[1]
    bounds = None if pending is None else (pending.chunk.start, pending.chunk.stop)
    frames, window, seen = tuple(sorted(branch.held(stop))), cache.window, tuple[tuple[int, ...], ...]()
    if not _whole(loop):
        seen = tuple(tuple(number for number, _ in ring.places(frames, stop)) for ring in cache.rings)
    return SavedBranch(name, frames, window.oldest, window.kept_shot, bounds, seen)


def _kinds(loop: ChunkLoop) -> tuple[tuple[int, ...], ...]:
    """The number of the ring of each head, by layer and head of the model; nothing where all see the whole window."""
    rings, kinds = loop.rings, list[tuple[int, ...]]()
    if _whole(loop):
        return ()
    for placement, by_column in zip(rings.placements, rings.heads, strict=True):
        own = [ring for counts in by_column for ring, count in enumerate(counts) for _ in range(count)]
        of_head = dict(zip(placement.order, own, strict=True))
        kinds.append(tuple(of_head[head] for head in range(len(own))))
    return tuple(kinds)


def _whole(loop: ChunkLoop) -> bool:
    """Whether all heads see all frames of the window."""
    return set(loop.rings.frames) == {loop.rings.window}


def _offsets(loop: ChunkLoop, cache: SavedCache) -> dict[str, Tensor]:
    """What was taken off the keys of each branch, (layers, B, N, D), where it is set; nothing on other ranks than 0."""
    ranks, found = loop.parallel.communicator_among(loop.parallel.mesh.denoising), {}
    for number, described in enumerate(cache.branches):
        branch, parts = loop.branches.branch(BRANCHES.index(described.name)), _parts(loop, number)
        holder = next(rank for rank, part in enumerate(parts) if part is not None)  # all that have the branch are alike
        own = None if branch is None else branch.stream.cache.offsets.read()
        if ranks is not None:
            wide = torch.float64 if loop.model.dtype == torch.float64 else torch.float32
            nothing = torch.empty(0, dtype=wide, device=loop.model.device)
            shape = cache.layers, cache.batch, cache.heads, cache.head_dim
            shapes = [shape if rank == holder else (0,) for rank in range(len(parts))]
            sent = nothing if own is None or loop.parallel.rank != holder else own
            own = ranks.gather_to_first(KIND, shapes, sent)[holder]
        assert own is not None, "a rank has the branch"
        if own.numel() and own.isfinite().all():
            found[described.name] = own.to("cpu", copy=True)
    return found


def gather_layers(loop: ChunkLoop, cache: SavedCache) -> Iterator[Tensor]:
    """Gathers keys and values. All ranks that denoise must take all of them.

    Args:
        loop: the stream.
        cache: what `describe_cache` returned.

    Yields:
        On rank 0 those of each layer of each branch, (2, B, K, S, N, D), in host memory; nothing on the others.
    """
    parallel, placements = loop.parallel, loop.rings.placements
    ranks = parallel.communicator_among(parallel.mesh.denoising)
    for number, described in enumerate(cache.branches):
        branch = loop.branches.branch(BRANCHES.index(described.name))
        parts = _parts(loop, number)
        for layer in range(cache.layers):
            own = _own_part(loop, branch, layer) if branch is not None else None
            columns = placements[layer].columns
            if ranks is None:
                assert own is not None, "one rank has all branches"
                yield _joined(cache, described, columns, parts, [own])
                continue
            shapes = [_shape(cache, described, columns, part) for part in parts]
            nothing = torch.empty(0, dtype=cache.dtype, device=loop.model.device)
            sent = nothing if own is None or parts[parallel.rank] is None else own
            received = ranks.gather_to_first(KIND, shapes, sent)
            if parallel.rank == 0:
                yield _joined(cache, described, columns, parts, received)
    if ranks is not None:
        ranks.forget_buffers(KIND)


def _parts(loop: ChunkLoop, branch: int) -> list[Part | None]:
    """The tokens and the column of a branch that each rank sends; None for one that has none of it, or the same as
    another.

    With the mesh's axis `cfg` each half has one branch.
    """
    parallel, parts = loop.parallel, list[Part | None]()
    for rank in parallel.mesh.denoising:
        cfg, _, sp = parallel.mesh.coordinates(rank)
        part = stored_part(loop.layout, loop.context.grid, sp)
        has_it = parallel.mesh.cfg == 1 or cfg == branch
        parts.append(part if has_it and part not in parts else None)
    return parts


def _own_part(loop: ChunkLoop, branch: GuidanceBranch, layer: int) -> Tensor:
    """This rank's keys and values of the saved frames of a layer, (2, B, K, s, n, D); zeros for the frames that a head
    does not see."""
    stop = loop.position[1]
    frames = sorted(branch.held(stop))
    of_heads = []
    for ring in branch.stream.cache.rings:
        places = ring.places(frames, stop)
        held = ring.storage[layer].read([slot for _, slot in places])
        if len(places) == len(frames):
            of_heads.append(held)
            continue
        part = held.new_zeros(*held.shape[:2], len(frames), *held.shape[3:])
        part[:, :, [number for number, _ in places]] = held
        of_heads.append(part)
    return of_heads[0] if len(of_heads) == 1 else torch.cat(of_heads, 4)


def _shape(cache: SavedCache, branch: SavedBranch, columns: Columns, part: Part | None) -> tuple[int, ...]:
    if part is None:
        return (0,)
    tokens, column = part
    return 2, cache.batch, len(branch.frames), tokens.stop - tokens.start, len(columns[column]), cache.width


def _joined(
    cache: SavedCache, branch: SavedBranch, columns: Columns, parts: list[Part | None], received: list[Tensor]
) -> Tensor:
    whole = torch.empty(cache.layer_shape(branch), dtype=cache.dtype)
    for part, piece in zip(parts, received, strict=True):
        if part is not None:
            whole[:, :, :, part[0], list(columns[part[1]])] = piece.cpu()
    return whole


def restore_cache(loop: SteeredLoop, cache: SavedCache) -> None:
    """Gives this rank's branches of a resumed stream what they held; reads nothing but this rank's tokens and heads.

    Args:
        loop: the stream, of the same size.
        cache: the saved keys and values.

    Raises:
        CheckpointError: they cannot be read, or are not finite.
        ConfigError: they are not those of the frames in the stream's window.
    """
    tokens, column = stored_part(loop.layout, loop.context.grid, loop.parallel.sp_rank)
    heads = [placement.columns[column] for placement in loop.rings.placements]
    for saved in cache.branches:
        branch = loop.branches.branch(BRANCHES.index(saved.name))
        if branch is None:
            continue
        loop.resume(branch, saved.oldest, saved.kept_shot, saved.pending)
        held = _describe(loop, saved.name, branch)
        if held.frames != saved.frames:
            raise ConfigError(
                f"the saved cache holds the frames {list(saved.frames)}, but its window those of {list(held.frames)}"
            )
        kinds = _kinds(loop)
        if cache.kinds != kinds or saved.seen != held.seen:
            raise ConfigError(
                f"the saved cache holds the frames {shown(saved.seen)} for heads of the kinds {shown(cache.kinds)}, "
                f"but the stream's windows of heads those of {shown(held.seen)} for {shown(kinds)}"
            )
        for layer in range(cache.layers):
            _restore_layer(loop, branch, saved, cache, layer, tokens, heads[layer])
            if saved.name in cache.offsets:
                branch.stream.cache.offsets.set(layer, cache.offsets[saved.name][layer])


def _restore_layer(
    loop: SteeredLoop,
    branch: GuidanceBranch,
    saved: SavedBranch,
    cache: SavedCache,
    layer: int,
    tokens: slice,
    heads: Sequence[int],
) -> None:
    """Gives a branch what it held of a layer: so many tokens of these heads, which are in the order of their rings."""
    least, most, first = min(heads), max(heads), 0
    whole = cache.layer(saved.name, layer, tokens, slice(least, most + 1))
    for ring in branch.stream.cache.rings:
        places, own = ring.places(saved.frames, loop.position[1]), heads[first : first + ring.heads(layer)]
        part = whole[:, :, [number for number, _ in places]][..., [head - least for head in own], :]
        if not ring.storage[layer].write([slot for _, slot in places], part):
            raise CheckpointError(
                f"the saved keys and values of layer {layer}, {saved.name}, hold NaN, infinity, or scales that no "
                "number has: expected scales above 0"
            )
        first += len(own)
