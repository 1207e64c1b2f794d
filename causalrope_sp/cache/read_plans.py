"""What the passes over chunks write and read of a KV cache: slots, ranges and views, made once and used by all layers.

A view or a number on the device costs the host as much as a launch, so each is made at its first use and kept until the
window moves. A captured graph reads the same numbers from tensors of its own.

Shapes: L layers, B batch, K slots, S tokens of a frame, H heads, d head width, F frames of a chunk, N ranges, R rings.
Where frames are chosen for each head, bounds have an axis more: (G, N, 2), for G heads of all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from causalrope_kernels import Bands, Keys, RotateOnRead, Slots
from causalrope_sp.cache.head_ring import HeadRing
from causalrope_sp.cache.layer_storage import LayerViews
from causalrope_sp.cache.window import SlidingWindow
from causalrope_sp.devices import send
from causalrope_sp.grid import Chunk
from causalrope_sp.heads.placement import HeadPlacement

Ranges = tuple[tuple[int, int], ...]
Bounds = tuple[tuple[Ranges, ...], Tensor]  # on the host, of every head layer by layer or once for all; on the device
SlotPair = tuple[Sequence[Slots], Sequence[Slots]]  # of keys and of values
Side = tuple[int, int, bool]  # a ring, and `since` and `old` of `ReadPlans.keys`
Chosen = Sequence[Sequence[Collection[int]]]  # frames, by layer and head
Choose = Callable[[Chunk], Chosen | None]
"""Returns the frames that a chunk attends of those that the stream's window holds, by layer and head, of the heads that
see all of it; None for all frames."""


@dataclass(frozen=True)
class _ChunkPlan:
    """A chunk's slots and what its queries attend.

    Args:
        slots_RF: the slot of each of its frames, by ring, on the device.
        first: by ring, the first of the slots, if they follow each other and are known on the host.
        rotate_on_read: by ring, the rotation of the keys on read, or None.
        chosen: the frames that heads of the whole window attend; None for all that it holds.
        ranges: the rows that are attended.
        slots: the slots of keys and values, by layer.
        keys: what is attended, by layer, `since`, `old` and reader.
    """

    slots_RF: Tensor
    first: list[int | None]
    rotate_on_read: list[RotateOnRead | None]
    chosen: Chosen | None = None
    ranges: dict[Side, Bounds] = field(default_factory=dict)
    slots: dict[int, SlotPair] = field(default_factory=dict)
    keys: dict[tuple[int, int, bool, int], list[Keys]] = field(default_factory=dict)

    @cached_property
    def by_ring(self) -> tuple[Tensor, ...]:
        """The slots of each ring."""
        return self.slots_RF.unbind()


class ReadPlans:
    """The plans of the chunks of a pass.

    Args:
        rings: the rings of the cache, with their storage.
        window: the window of the stream.
        rotate_on_read: makes the rotation of the keys on read from the position of every slot's frame within the
            window; None if keys are stored rotated.
        source_order: see `CachedHeads`.
        bands: see `CachedHeads`.
        choose: chooses among the frames that the window holds, for the heads of the first ring, which see all of it
            (see `HeadRings`); None attends all.
    """

    def __init__(
        self,
        rings: Sequence[HeadRing],
        window: SlidingWindow,
        rotate_on_read: Callable[[Sequence[int]], RotateOnRead] | None,
        source_order: Sequence[HeadPlacement],
        bands: Sequence[Sequence[Bands | None]],
        choose: Choose | None,
    ) -> None:
        self._rings, self._window, self._source_order = rings, window, source_order
        self._rotate_on_read, self._choose, self._bands = rotate_on_read, choose, bands
        first = rings[0].storage[0].numbers_2BKSHD
        self._device, self._tokens = first.device, first.shape[3]
        layers = range(len(rings[0].storage))
        self._of_layer = [[n for n, ring in enumerate(rings) if ring.heads(layer)] for layer in layers]
        self._choosing = list(accumulate(map(rings[0].heads, layers), initial=0))  # heads in the layers before
        self._views = [[LayerViews.of(layer) for layer in ring.storage] for ring in rings]
        self._plans: dict[int, _ChunkPlan] = {}  # by the number of the chunk

    def restart(self, window: SlidingWindow) -> None:
        """Forgets all plans, to make others for a window."""
        self._window = window
        self._plans.clear()

    def slots(self, layer: int, chunk: Chunk) -> SlotPair:
        """Returns the slots of a layer that a chunk's keys and values are written to, in the order of the source."""
        plan = self._plan(chunk)
        found = plan.slots.get(layer)
        if found is None:
            pairs = [self._ring_slots(plan, ring, layer, chunk.frames) for ring in self._of_layer[layer]]
            found = [k for k, _ in pairs], [v for _, v in pairs]
            if self._source_order:
                by_head = self._source_order[layer].by_head
                found = by_head(found[0]), by_head(found[1])
            plan.slots[layer] = found
        return found

    def _ring_slots(self, plan: _ChunkPlan, ring: int, layer: int, frames: int) -> tuple[Slots, Slots]:
        first, slots_F, views = plan.first[ring], plan.by_ring[ring], self._views[ring][layer]
        rows = None if first is None else slice(first, first + frames)
        k, v = (
            Slots(x, slots_F, None if rows is None else x[:, rows], scales)
            for x, scales in zip(views.rings, views.scales, strict=True)
        )
        return k, v

    def keys(self, layer: int, chunk: Chunk, since: int, old: bool, reader: int = 0) -> list[Keys]:
        """Returns the keys and values of a layer that a chunk's queries attend, ring by ring.

        Args:
            layer: the layer.
            chunk: the chunk of the queries; its keys and values are written.
            since: a global time index that splits the frames in two; 0 for no split.
            old: whether to return the frames before `since`, or the others.
            reader: whose queries they are; see `CachedHeads.bands`.
        """
        plan = self._plan(chunk)
        key = layer, since, old, reader if self._bands else 0
        found = plan.keys.get(key)
        if found is None:
            bands = self._bands[reader] if self._bands else (None,) * len(self._rings)
            rings = self._of_layer[layer]
            found = [self._ring_keys(plan, layer, chunk, (ring, since, old), bands[ring]) for ring in rings]
            plan.keys[key] = found
        return found

    def _ring_keys(self, plan: _ChunkPlan, layer: int, chunk: Chunk, side: Side, bands: Bands | None) -> Keys:
        (rows, bounds), views = self._ranges(plan, chunk, side), self._views[side[0]][layer]
        rotate_on_read = plan.rotate_on_read[side[0]]
        whole = Keys(*views.rows, rows[0], bounds, rotate_on_read, *views.scale_rows, bands=bands)
        if self._chosen(plan, side[0]) is None:
            return whole
        of_heads = slice(*self._choosing[layer : layer + 2])
        return replace(whole, ranges=None, bounds_N2=bounds[of_heads], head_ranges=rows[of_heads])

    def tensors(self, chunk: Chunk, since: int) -> list[Tensor]:
        """Returns the numbers of a chunk's passes on the device.

        Returns:
            Its slots; and for every ring the bounds of the rows that it attends (of the frames before `since`, then of
            the others) and, in the `relative` policy, the angles of its slots.
        """
        plan, numbers = self._plan(chunk), list[Tensor]()
        for ring, rotate in enumerate(plan.rotate_on_read):
            numbers += [bounds_N2 for _, bounds_N2 in self._sides(plan, ring, chunk, since).values()]
            numbers += [] if rotate is None else [rotate.table]
        return [plan.slots_RF, *numbers]

    @contextmanager
    def reading(self, chunks: Sequence[Chunk], since: int, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Lets a forward read tensors of the form that `tensors` returns, chunk by chunk, in place of the own ones."""
        own, given = dict(self._plans), iter(tensors)
        for chunk in chunks:
            plan, slots_RF = own[chunk.index], next(given)
            made = _ChunkPlan(slots_RF, [None] * len(self._rings), [], plan.chosen)
            for ring, rotate in enumerate(plan.rotate_on_read):
                for side, (rows, _) in self._sides(plan, ring, chunk, since).items():
                    made.ranges[side] = rows, next(given)
                made.rotate_on_read.append(None if rotate is None else replace(rotate, table=next(given)))
            self._plans[chunk.index] = made
        try:
            yield
        finally:
            self._plans = own

    def attended_rows(self, chunk: Chunk, since: int, counted: bool) -> tuple[Ranges | int, ...]:
        """Returns the rows of each ring that a chunk's queries attend: before `since`, then since then; 0 for all.

        Where frames are chosen for each head, or with `counted`, the number of ranges stands in place of the rows.
        """
        plan, found = self._plan(chunk), list[Ranges | int]()
        for ring in range(len(self._rings)):
            numbers = counted or self._chosen(plan, ring) is not None
            for rows, _ in self._sides(plan, ring, chunk, since).values():
                found += map(len, rows) if numbers else rows
        return tuple(found)

    def are_chosen(self, chunk: Chunk) -> bool:
        """Returns whether a chunk attends frames that were chosen for it."""
        return self._plan(chunk).chosen is not None

    def _chosen(self, plan: _ChunkPlan, ring: int) -> Chosen | None:
        """The frames that were chosen for the heads of a ring; None for all that it holds."""
        return plan.chosen if ring == 0 else None

    def _sides(self, plan: _ChunkPlan, ring: int, chunk: Chunk, since: int) -> dict[Side, Bounds]:
        """The ranges of a ring that attention reads, on the host and on the device, as the plan has them."""
        sides = [(ring, since, True), (ring, since, False)] if since else [(ring, 0, False)]
        return {side: self._ranges(plan, chunk, side) for side in sides}

    def _plan(self, chunk: Chunk) -> _ChunkPlan:
        """What all layers and passes share for a chunk, made at its first use."""
        plan = self._plans.get(chunk.index)
        if plan is None:
            slots = [ring.window.slots(chunk) for ring in self._rings]
            first = [each[0] if each == list(range(each[0], each[0] + len(each))) else None for each in slots]
            rotate: list[RotateOnRead | None] = [None] * len(slots)
            if self._rotate_on_read is not None:
                rotate = [self._rotate_on_read(ring.window.positions(chunk, self._window)) for ring in self._rings]
            chosen = None if self._choose is None else self._choose(chunk)
            plan = _ChunkPlan(send(torch.tensor(slots), self._device), first, rotate, chosen)
            self._plans[chunk.index] = plan
        return plan

    def _ranges(self, plan: _ChunkPlan, chunk: Chunk, side: Side) -> Bounds:
        """The rows of a ring that a chunk's queries attend, and the same on the device; see `keys`."""
        found = plan.ranges.get(side)
        if found is None:
            # a captured graph has a fixed number of ranges: two if there is a split, or as many as choices can have
            least = 2 if side[1] else 0
            chosen = self._chosen(plan, side[0])
            if chosen is None:
                rows: tuple[Ranges, ...] = (self._rows_of(chunk, side, None, least),)
                shape: tuple[int, ...] = (-1, 2)
            else:
                least = max(least, (self._window.frames + 1) // 2)
                rows = tuple(self._rows_of(chunk, side, frames, least) for of_layer in chosen for frames in of_layer)
                shape = len(rows), least, 2
            bounds = send(torch.tensor(rows, dtype=torch.int32).view(shape), self._device)
            found = plan.ranges[side] = rows, bounds
        return found

    def _rows_of(self, chunk: Chunk, side: Side, frames: Collection[int] | None, least: int) -> Ranges:
        """The rows that hold some of the frames, or all, as so many ranges or more; the last ones may be empty."""
        ring, since, old = side
        slots = [(0, 0)]  # of heads that attend nothing
        if self._rings[ring].attended:
            slots = self._rings[ring].window.ranges(chunk, since, frames)[not old]
        slots += [(0, 0)] * (least - len(slots))
        return tuple((first * self._tokens, stop * self._tokens) for first, stop in slots)
