"""What the passes over a chunk write and read of a KV cache: slots, ranges and views, made once and used by all layers.

A view or a number on the device costs the host as much as a launch, so each is made at its first use and kept until the
window moves. A captured graph reads the same numbers from tensors of its own.

Shapes: L layers, B batch, K slots, S tokens of a frame, H heads, d head width, F frames of a chunk, N ranges. Where
frames are chosen for each head, bounds have two axes more: (L, H, N, 2).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from causalrope_kernels import Keys, RotateOnRead, Slots
from causalrope_sp.cache.layer_storage import LayerStorage
from causalrope_sp.cache.window import SlidingWindow
from causalrope_sp.devices import send
from causalrope_sp.grid import Chunk

Ranges = tuple[tuple[int, int], ...]
Choose = Callable[[Chunk], Sequence[Sequence[Collection[int]]] | None]
"""Returns the frames that a chunk attends of those that the stream's window holds, by layer and head; None for all."""


@dataclass(frozen=True)
class _ChunkPlan:
    """A chunk's slots and what its queries attend.

    Args:
        slots_F: the slot of each of its frames, on the device.
        first: the first of the slots, if they follow each other and are known on the host.
        rotate_on_read: the rotation of the keys on read, or None.
        chosen: the frames that are attended, by layer and head; None for all that the window holds.
        ranges: the rows that are attended, by `since` and `old` of `ReadPlans.keys`, on the host (for every head of
            every layer, or once for all) and on the device.
        slots: the slots of keys and values, by layer.
        keys: what is attended, by layer, `since` and `old`.
    """

    slots_F: Tensor
    first: int | None
    rotate_on_read: RotateOnRead | None
    chosen: Sequence[Sequence[Collection[int]]] | None = None
    ranges: dict[tuple[int, bool], tuple[tuple[Ranges, ...], Tensor]] = field(default_factory=dict)
    slots: dict[int, tuple[Slots, Slots]] = field(default_factory=dict)
    keys: dict[tuple[int, int, bool], tuple[Keys, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class _LayerViews:
    """The views of a layer's storage.

    Args:
        rings: keys and values in slots, each (B, K, S, H, d).
        rows: the same as rows, each (B, K·S, H, d).
        scales: their scales, each (B, K, S, H), or None.
        scale_rows: the same as rows, each (B, K·S, H), or None.
        offset: what is taken off the keys, (B, H, d), or None.
    """

    rings: tuple[Tensor, Tensor]
    rows: tuple[Tensor, Tensor]
    scales: tuple[Tensor | None, Tensor | None]
    scale_rows: tuple[Tensor | None, Tensor | None]
    offset: Tensor | None

    @classmethod
    def of(cls, layer: LayerStorage) -> _LayerViews:
        k, v = layer.numbers_2BKSHD
        rows = k.flatten(1, 2), v.flatten(1, 2)
        if layer.scales_2BKSH is None:
            return cls((k, v), rows, (None, None), (None, None), None)
        k_scales, v_scales = layer.scales_2BKSH
        scale_rows = k_scales.flatten(1, 2), v_scales.flatten(1, 2)
        return cls((k, v), rows, (k_scales, v_scales), scale_rows, layer.offset_BHD)


class ReadPlans:
    """The plans of the chunks of a pass in the rings of some heads.

    Args:
        storage: keys and values of every layer.
        rotate_on_read: makes the rotation of the keys on read from the position of every slot's frame within the
            window; None if keys are stored rotated.
        choose: chooses among the frames that the window holds; None attends all.
    """

    _window: SlidingWindow
    _full: SlidingWindow

    def __init__(
        self,
        storage: Sequence[LayerStorage],
        rotate_on_read: Callable[[Sequence[int]], RotateOnRead] | None,
        choose: Choose | None = None,
    ) -> None:
        self._rotate_on_read, self._choose = rotate_on_read, choose
        first = storage[0].numbers_2BKSHD
        self._device, self._tokens = first.device, first.shape[3]
        self._layers = [_LayerViews.of(layer) for layer in storage]
        self._plans: dict[int, _ChunkPlan] = {}  # by the number of the chunk

    def restart(self, window: SlidingWindow, full: SlidingWindow) -> None:
        """Forgets all plans, to make others for a window of these heads within that of the stream."""
        self._window, self._full = window, full
        self._plans.clear()

    def slots(self, layer: int, chunk: Chunk) -> tuple[Slots, Slots]:
        """Returns the slots of a layer that a chunk's keys and values are written to."""
        plan = self._plan(chunk)
        found = plan.slots.get(layer)
        if found is None:
            first, views = plan.first, self._layers[layer]
            rows = None if first is None else slice(first, first + chunk.frames)
            k, v = (
                Slots(ring, plan.slots_F, None if rows is None else ring[:, rows], scales, offset)
                for ring, scales, offset in zip(views.rings, views.scales, (views.offset, None), strict=True)
            )
            found = plan.slots[layer] = k, v
        return found

    def keys(self, layer: int, chunk: Chunk, since: int, old: bool) -> tuple[Keys, ...]:
        """Returns the keys and values of a layer that a chunk's queries attend: of all heads, or one by one.

        Args:
            layer: the layer.
            chunk: the chunk of the queries; its keys and values are written.
            since: a global time index that splits the frames in two; 0 for no split.
            old: whether to return the frames before `since`, or the others.
        """
        plan = self._plan(chunk)
        found = plan.keys.get((layer, since, old))
        if found is None:
            rows, bounds = self._ranges(plan, chunk, since, old)
            views = self._layers[layer]
            whole = Keys(*views.rows, rows[0], bounds, plan.rotate_on_read, *views.scale_rows)
            if plan.chosen is None:
                found = (whole,)
            else:
                heads = whole.k.shape[2]
                own = zip(range(heads), rows[layer * heads :], bounds[layer], strict=False)
                found = tuple(
                    replace(whole.heads(slice(head, head + 1)), ranges=read, bounds_N2=on_device)
                    for head, read, on_device in own
                )
            plan.keys[layer, since, old] = found
        return found

    def tensors(self, chunk: Chunk, since: int) -> list[Tensor]:
        """Returns the numbers of a chunk's passes on the device.

        Returns:
            Its slots, the bounds of the rows that it attends (of the frames before `since`, then of the others) and, in
            the `relative` policy, the angles of its slots.
        """
        plan = self._plan(chunk)
        bounds = [bounds_N2 for _, bounds_N2 in self._sides(chunk, since).values()]
        angles = [] if plan.rotate_on_read is None else [plan.rotate_on_read.table]
        return [plan.slots_F, *bounds, *angles]

    @contextmanager
    def reading(self, chunks: Sequence[Chunk], since: int, given: Iterator[Tensor]) -> Iterator[None]:
        """Lets a forward read tensors of the form that `tensors` returns, chunk by chunk, in place of the own ones."""
        own = dict(self._plans)
        for chunk in chunks:
            plan, slots_F = own[chunk.index], next(given)
            ranges = {side: (rows, next(given)) for side, (rows, _) in self._sides(chunk, since).items()}
            rotate = None if plan.rotate_on_read is None else replace(plan.rotate_on_read, table=next(given))
            self._plans[chunk.index] = _ChunkPlan(slots_F, None, rotate, plan.chosen, ranges)
        try:
            yield
        finally:
            self._plans = own

    def attended_rows(self, chunk: Chunk, since: int) -> tuple[Ranges, ...]:
        """Returns the rows of the ring that a chunk's queries attend: before `since`, then since then; 0 for all."""
        return tuple(ranges for rows, _ in self._sides(chunk, since).values() for ranges in rows)

    def are_chosen(self, chunk: Chunk) -> bool:
        """Returns whether a chunk attends frames that were chosen for it."""
        return self._plan(chunk).chosen is not None

    def _sides(self, chunk: Chunk, since: int) -> dict[tuple[int, bool], tuple[tuple[Ranges, ...], Tensor]]:
        """The ranges of a chunk that attention reads, on the host and on the device, as its plan has them."""
        plan = self._plan(chunk)
        sides = [(since, True), (since, False)] if since else [(0, False)]
        return {side: self._ranges(plan, chunk, *side) for side in sides}

    def _plan(self, chunk: Chunk) -> _ChunkPlan:
        """What all layers and passes share for a chunk, made at its first use."""
        plan = self._plans.get(chunk.index)
        if plan is None:
            slots = self._window.slots(chunk)
            first = slots[0] if slots == list(range(slots[0], slots[0] + len(slots))) else None
            rotate = None
            if self._rotate_on_read is not None:
                rotate = self._rotate_on_read(self._window.positions(chunk, self._full))
            chosen = None if self._choose is None else self._choose(chunk)
            plan = _ChunkPlan(send(torch.tensor(slots), self._device), first, rotate, chosen)
            self._plans[chunk.index] = plan
        return plan

    def _ranges(self, plan: _ChunkPlan, chunk: Chunk, since: int, old: bool) -> tuple[tuple[Ranges, ...], Tensor]:
        """The rows of the ring that a chunk's queries attend, and the same on the device; see `keys`."""
        found = plan.ranges.get((since, old))
        if found is None:
            # a captured graph has a fixed number of ranges: two if there is a split, or as many as choices can have
            least = 2 if since else 0
            if plan.chosen is None:
                rows: tuple[Ranges, ...] = (self._rows_of(chunk, since, old, None, least),)
                shape: tuple[int, ...] = (-1, 2)
            else:
                least = max(least, (self._window.frames + 1) // 2)
                rows = tuple(
                    self._rows_of(chunk, since, old, frames, least) for of_layer in plan.chosen for frames in of_layer
                )
                shape = len(plan.chosen), -1, least, 2
            bounds = send(torch.tensor(rows, dtype=torch.int32).view(shape), self._device)
            found = plan.ranges[since, old] = rows, bounds
        return found

    def _rows_of(self, chunk: Chunk, since: int, old: bool, frames: Collection[int] | None, least: int) -> Ranges:
        """The rows that hold some of the frames, or all, as so many ranges or more; the last ones may be empty."""
        slots = self._window.ranges(chunk, since, frames)[not old]
        slots += [(0, 0)] * (least - len(slots))
        return tuple((first * self._tokens, stop * self._tokens) for first, stop in slots)
