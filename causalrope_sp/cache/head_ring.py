"""The frame slots of the heads that see equally many frames: storage layer by layer, and undo buffers.

Shapes: B batch, K slots, S tokens of a frame, H heads of a layer, d head width; S and H are what this rank stores.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from causalrope_sp.cache.layer_storage import LayerStorage
from causalrope_sp.cache.undo import UndoBuffer, UndoHistory
from causalrope_sp.cache.window import SlidingWindow
from causalrope_sp.grid import Chunk


class HeadRing:
    """One ring of frame slots per layer, of the heads that look back over the same frames.

    A layer may have no such heads; its storage is then empty.

    Args:
        storage: keys and values of every layer.
        frames: the frames that these heads see, which is K; at most those of `window`.
        sink: their sink, if they see fewer than `window`.
        window: the window of the stream.
        history: how many committed chunks can be taken back.
        attended: whether queries attend what is stored. If not, nothing is kept: the slots are a scratch that all
            layers and forks share.

    Attributes:
        storage: keys and values of every layer.
        window: the sliding window of these heads.
        attended: whether queries attend what is stored.
        undo: the frames that the open chunk overwrites; None if no chunk is open.
    """

    def __init__(
        self,
        storage: list[LayerStorage],
        frames: int,
        sink: int,
        window: SlidingWindow,
        history: int,
        attended: bool,
    ) -> None:
        self.set_storage(storage)
        self.attended = attended
        self._frames, self._sink = frames, sink
        self.undo: UndoBuffer | None = None
        self._history = UndoHistory(history and history + 1)  # the chunk before the open one may be open again
        self._written: dict[int, int] = {}  # slot -> frame, as the first layer writes them
        self.set_window(window)

    def heads(self, layer: int) -> int:
        """Returns how many heads of a layer the ring has."""
        return self.storage[layer].numbers_2BKSHD.shape[4]

    def set_storage(self, storage: list[LayerStorage]) -> None:
        """Takes a storage of the same sizes."""
        self.storage = storage
        self._parts_2BK = [layer.parts_2BK for layer in storage]

    def undo_tensors(self) -> Iterator[Tensor]:
        """Yields the memory of the undo buffers."""
        yield from self._history.tensors()
        if self.undo is not None:
            yield self.undo.memory

    def set_window(self, full: SlidingWindow) -> None:
        """Takes another window of the stream, of the same size."""
        self.window = full.narrowed(self._frames, self._sink)

    def open(self, chunk: Chunk, slots: Sequence[int]) -> None:
        """Opens a chunk that will own these slots."""
        slots = [slot for slot in slots if slot in self._written]
        frames = [self._written[slot] for slot in slots]  # of the window, or of a sink whose shot is over
        self.undo = self._history.buffer(chunk, frames, slots, self._parts_2BK)

    def commit(self) -> None:
        """Keeps the undo buffer of the open chunk, which is committed."""
        if self.undo is not None:
            self._history.push(self.undo)
        self.undo = None

    def cancel(self) -> None:
        """Restores the frames that the open chunk overwrote, if one is open."""
        if self.undo is not None:
            self._take_back(self.undo)
            self._history.free(self.undo)
        self.undo = None

    def restore_evicted(self) -> None:
        """Writes the frames that the open chunk overwrote back to their slots, from the undo buffer."""
        assert self.undo is not None, "only an open chunk overwrites frames"
        self.undo.restore(self._parts_2BK)

    def _take_back(self, undo: UndoBuffer) -> None:
        undo.restore(self._parts_2BK)
        if undo.layers:
            self._written |= dict(zip(undo.slots, undo.frames, strict=True))

    def reopen(self, chunk: Chunk) -> None:
        """Makes the chunk that was committed last the open one again."""
        undo = self._history.pop()
        nothing = self.storage[0].numbers_2BKSHD.new_empty(0, dtype=torch.uint8)
        layers = set(range(len(self.storage)))
        self.undo = undo or UndoBuffer(chunk, [], [], nothing, [], layers)

    def can_rewind(self, chunk: Chunk) -> bool:
        """Returns whether the undo buffer of a committed chunk is kept."""
        return self._history.holds(chunk)

    def forget_history(self) -> None:
        """Lets no committed chunk be taken back any more."""
        self._history.clear()

    def rewind(self, chunk: Chunk, window: SlidingWindow) -> None:
        """Takes committed chunks back until one is the open one again; `window` is the stream's at that time."""
        while (undo := self._history.pop()) is not None and undo.chunk != chunk:
            self._take_back(undo)
        assert undo is not None, "the history must reach the chunk"
        self.undo = undo
        self.set_window(window)

    def restart(self, window: SlidingWindow, committed: int) -> None:
        """Forgets all frames that a window of the stream does not hold before the frame `committed`."""
        self.undo = None
        self._history.clear()
        self.set_window(window)
        self._written = self.window.held(committed) if self.attended else {}

    def fork(self) -> HeadRing:
        """Returns a ring that goes on from here by itself, on the same storage."""
        fork = copy.copy(self)
        if self.undo is not None:
            self.undo.shared = True
        fork._history, fork._written = self._history.fork(), dict(self._written)
        return fork

    def save_evicted(self, layer: int) -> None:
        """Copies the frames of a layer that the open chunk will overwrite to the undo buffer, once a chunk."""
        if self.undo is not None and layer not in self.undo.layers:
            self.undo.save(self._parts_2BK[layer], layer)

    def save_all_evicted(self) -> None:
        """Does what `save_evicted` does, for all layers."""
        if self.undo is not None and len(self.undo.layers) < len(self.storage):
            for layer in range(len(self.storage)):
                self.save_evicted(layer)

    def places(self, frames: Sequence[int], stop: int) -> list[tuple[int, int]]:
        """Returns where some frames are that passes behind the frame `stop` read: their numbers in the list, and slots.

        Args:
            frames: global time indices.
            stop: the global time index at which the next chunk starts.
        """
        slots = {frame: slot for slot, frame in self.window.held(stop).items()} if self.attended else {}
        return [(number, slots[frame]) for number, frame in enumerate(frames) if frame in slots]

    def note_written(self, chunk: Chunk) -> None:
        """Notes that a chunk's keys and values lie in its slots."""
        if self.attended:
            self._written |= {self.window.slot(frame): frame for frame in range(chunk.start, chunk.stop)}

    def evicts(self, chunk: Chunk) -> bool:
        """Returns whether the open chunk overwrites frames of a chunk before it."""
        return self.undo is not None and any(frame >= chunk.start for frame in self.undo.frames)

    def check_integrity(self, committed: int, open_chunk: Chunk | None) -> None:
        """Checks that slots and storage agree with the cursor, and that every committed number is finite.

        Args:
            committed: the frames that are committed.
            open_chunk: the open chunk.

        Raises:
            AssertionError: they do not.
        """
        held = self.window.held(committed) if self.attended else {}
        opened = range(0) if open_chunk is None else range(open_chunk.start, open_chunk.stop)
        for slot, frame in held.items():
            assert self._written.get(slot) in (frame, *opened), f"slot {slot} does not hold frame {frame}"
        if open_chunk is None:
            assert self.undo is None, "the undo buffer outlives its chunk"
            for parts_2BK in self._parts_2BK:
                assert parts_2BK[-1][:, :, list(held)].isfinite().all(), "a committed slot was never written"
