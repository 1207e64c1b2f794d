"""The KV cache: one preallocated ring of frame slots per layer, shared by all passes of a stream.

The cache owns storage and cursor; a layer of the model sees a `LayerCache`. Every denoise pass writes the open chunk's
keys and values into the slots that the chunk will own; the context pass writes the clean ones, and the chunk is
committed. The first write of an open chunk copies the frames that it overwrites to an undo buffer, once per chunk and
not once per pass, so that `cancel` restores the stream as it was after the last commit. The buffers of committed chunks
can be kept too, so that `rewind` goes further back. A fork shares the storage until one of both writes.

Shapes: L layers, B batch, F frames of a chunk, S tokens of a frame, H heads, D head width, K slots; S and H are what
this rank stores.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from causalrope_kernels import Keys, RotateOnRead, Slots
from causalrope_sp.cache.layer_cache import LayerCache
from causalrope_sp.cache.read_plans import Ranges, ReadPlans
from causalrope_sp.cache.undo import UndoBuffer, UndoHistory
from causalrope_sp.cache.window import SlidingWindow
from causalrope_sp.devices import storage_bytes
from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import Chunk


class KVCache:
    """One ring of frame slots per layer, with keys and values of `tokens`×`heads`×`head_dim` numbers in a slot.

    Args:
        layers: the layers of the model.
        batch: B.
        window: the sliding window; it has one slot per frame.
        tokens: the tokens of a frame that this rank stores.
        heads: the heads that this rank stores.
        head_dim: the head width.
        dtype: the dtype of keys and values.
        device: where they live.
        history: how many committed chunks can be taken back.
        rotate_on_read: makes the rotation of the keys on read from the position of every slot's frame within the window
            (the `relative` policy); None if keys are stored rotated.

    Attributes:
        window: the sliding window.
        committed: the number of latent frames whose clean keys and values are stored, which is the global time index at
            which the next chunk starts.
        open_chunk: the chunk that denoise passes write, or None.
        storages: how many storages it has had; a captured graph has the addresses of one.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        window: SlidingWindow,
        tokens: int,
        heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        history: int = 0,
        rotate_on_read: Callable[[Sequence[int]], RotateOnRead] | None = None,
    ) -> None:
        self.window = window
        self._rotate_on_read = rotate_on_read
        self.committed = 0
        self.open_chunk: Chunk | None = None
        self._undo: UndoBuffer | None = None  # of the open chunk
        self._history = UndoHistory(history and history + 1)  # the chunk before the open one may be open again
        self._written: dict[int, int] = {}  # slot -> frame, as the first layer writes them
        self._sharers = [1]  # how many caches share the storage
        self.storages = 0
        self._restarted = 0  # the next frame at the last restart
        shape = (layers, 2, batch, window.frames, tokens, heads, head_dim)
        self._bind(torch.empty(shape, dtype=dtype, device=device))

    def _bind(self, storage_L2BKSHD: Tensor) -> None:
        """Takes a storage. Views are made once, since each costs the host as much as a launch."""
        self.storage_L2BKSHD = storage_L2BKSHD
        self.storages += 1
        own = weakref.proxy(self)  # no cycle: a cache that nobody needs goes at once, not when Python looks for cycles
        self._layers = [LayerCache(own, index) for index in range(len(storage_L2BKSHD))]
        self._plans = ReadPlans(storage_L2BKSHD, self.window, self._rotate_on_read)

    @property
    def bytes(self) -> int:
        """The bytes that the cache holds on the device, undo buffers included."""
        return storage_bytes(self.tensors())

    def tensors(self) -> Iterator[Tensor]:
        """Yields what the cache holds on the device: its storage, and undo buffers."""
        yield self.storage_L2BKSHD
        yield from self._history.tensors()
        if self._undo is not None:
            yield self._undo.storage_L2BFSHD

    def open(self, chunk: Chunk) -> None:
        """Opens a chunk, so that denoise passes write it.

        Args:
            chunk: the chunk after the last committed one.

        Raises:
            ConfigError: another chunk is open, the chunk does not start at `committed`, or the window cannot hold it.
        """
        if self.open_chunk is not None:
            raise ConfigError(f"chunk {self.open_chunk.index} is still open; commit or cancel it first")
        if chunk.start != self.committed:
            raise ConfigError(f"the cache stands at latent frame {self.committed}, the chunk starts at {chunk.start}")
        slots = [slot for slot in self.window.slots(chunk) if slot in self._written]
        frames = [self._written[slot] for slot in slots]  # of the window, or of a sink whose shot is over
        self._undo = self._history.buffer(chunk, frames, slots, self.storage_L2BKSHD)
        self.open_chunk = chunk
        self._plans.restart(self.window)

    def commit(self) -> None:
        """Commits the open chunk.

        Its clean keys and values are written already, or will be by the first forward of the next chunk.

        Raises:
            ConfigError: no chunk is open.
        """
        if self.open_chunk is None:
            raise ConfigError("no chunk is open to commit")
        self.committed, self.open_chunk = self.open_chunk.stop, None
        if self._undo is not None:
            self._history.push(self._undo)
        self._undo = None

    def cancel(self) -> None:
        """Cancels the open chunk, if there is one, and restores the frames that it overwrote."""
        if self._undo is not None:
            self._take_back(self._undo)
            self._history.free(self._undo)
        self.open_chunk = self._undo = None

    def restore_evicted(self) -> None:
        """Writes the frames that the open chunk overwrote back to their slots, from the undo buffer."""
        assert self._undo is not None, "only an open chunk overwrites frames"
        self._undo.restore(self.storage_L2BKSHD)

    def _take_back(self, undo: UndoBuffer) -> None:
        undo.restore(self.storage_L2BKSHD)
        if undo.layers:
            self._written |= dict(zip(undo.slots, undo.frames, strict=True))

    def reopen(self, chunk: Chunk) -> None:
        """Makes the chunk that was committed last the open one again, after all later ones were cancelled.

        Its context pass must run again. Whether it can then be cancelled depends on the history.
        """
        assert self.open_chunk is None, "only one chunk is open"
        assert self.committed == chunk.stop, "only the chunk that was committed last can be opened again"
        undo = self._history.pop()
        nothing = self.storage_L2BKSHD[:, :, :, :0].clone()  # not a view: the memory of a buffer is used again
        self._undo = undo or UndoBuffer(chunk, [], [], nothing, set(range(len(self._layers))))
        self.committed, self.open_chunk = chunk.start, chunk
        self._plans.restart(self.window)

    def can_rewind(self, chunk: Chunk) -> bool:
        """Returns whether `rewind` can make a chunk the open one again, with all as it was."""
        return chunk.start >= self._restarted and self._history.holds(chunk)

    def forget_history(self) -> None:
        """Lets no committed chunk be taken back any more, between two chunks; what is written stays."""
        self._history.clear()
        self._restarted = self.committed

    def rewind(self, chunk: Chunk, window: SlidingWindow) -> None:
        """Takes chunks back until a committed one is the open one again, whose context pass must run again.

        Args:
            chunk: that chunk; `can_rewind` returns True for it.
            window: the window at that time.
        """
        self._own()
        self.cancel()
        while (undo := self._history.pop()) is not None and undo.chunk != chunk:
            self._take_back(undo)
        assert undo is not None, "the history must reach the chunk"
        self._undo, self.open_chunk, self.committed, self.window = undo, chunk, chunk.start, window
        self._plans.restart(self.window)

    def restart(self, window: SlidingWindow, committed: int) -> None:
        """Forgets all frames that a window does not hold, to write others from a frame on. No chunk can be taken back.

        Args:
            window: the new window, of the same size; what it holds before `committed` is there.
            committed: the global time index at which the next chunk starts.
        """
        self._undo, self.open_chunk = None, None
        self._history.clear()
        self.window, self.committed, self._restarted = window, committed, committed
        self._plans.restart(window)
        self._written = window.held(committed)

    def resume(self, window: SlidingWindow, committed: int, pending: Chunk | None) -> None:
        """Stands where another cache stood, whose frames are going to be put into their slots.

        Args:
            window: its window, of the same size.
            committed: the global time index at which the next chunk starts.
            pending: the chunk right before it, whose context pass must run; None if it is written.
        """
        self.restart(window, committed)
        if pending is not None:
            self.reopen(pending)

    def fork(self) -> KVCache:
        """Returns a cache that goes on from here by itself. Both share the storage until one of them writes."""
        fork = copy.copy(self)
        if self._undo is not None:
            self._undo.shared = True
        fork._history, fork._written = self._history.fork(), dict(self._written)
        fork._bind(self.storage_L2BKSHD)
        self._sharers[0] += 1
        return fork

    def _own(self) -> None:
        """Copies the storage if a fork shares it, before it is written."""
        sharers = self._sharers
        if sharers[0] > 1:
            self._bind(self.storage_L2BKSHD.clone())
            self._sharers = [1]
            sharers[0] -= 1  # only now may another thread write what was copied

    def release(self) -> None:
        """Tells the caches that share the storage that this one will neither read nor write it any more."""
        self._sharers[0] -= 1

    def layer(self, index: int) -> LayerCache:
        """Returns the view of one layer."""
        return self._layers[index]

    def kv_slots(self, layer: int, chunk: Chunk) -> tuple[Slots, Slots]:
        """Returns the slots of a layer that a chunk's keys and values are written to; see `LayerCache.kv_slots`."""
        if layer == 0:
            self._own()
            self.note_written(chunk)
        if self._undo is not None and chunk == self.open_chunk and layer not in self._undo.layers:
            self._undo.save(self.storage_L2BKSHD, range(layer, layer + 1))
        return self._plans.slots(layer, chunk)

    def note_written(self, chunk: Chunk) -> None:
        """Notes that a chunk's keys and values lie in its slots."""
        self._written |= {self.window.slot(frame): frame for frame in range(chunk.start, chunk.stop)}

    def evicts(self, chunk: Chunk) -> bool:
        """Returns whether the open chunk overwrites frames of another chunk."""
        if self.open_chunk is None or chunk == self.open_chunk:
            return False
        return self._undo is not None and any(frame >= chunk.start for frame in self._undo.frames)

    def begin_graph(self, chunks: Sequence[Chunk], since: int) -> list[Tensor]:
        """Prepares a pass that a captured graph may run, whose forward then does nothing on the host for the cache.

        Args:
            chunks: the chunks of the pass; the last one is open.
            since: the global time index that attention splits the frames at (see `keys`); 0 for no split.

        Returns:
            For every chunk its slots, the bounds of the rows that it attends (of the frames before `since`, then of the
            others) and, in the `relative` policy, the angles of its slots, as tensors on the device.
        """
        self._own()
        if self._undo is not None and len(self._undo.layers) < len(self._layers):
            self._undo.save(self.storage_L2BKSHD, range(len(self._layers)))
        tensors = []
        for chunk in chunks:
            self.note_written(chunk)
            tensors += self._plans.tensors(chunk, since)
        return tensors

    def reading(self, chunks: Sequence[Chunk], since: int, tensors: Sequence[Tensor]) -> AbstractContextManager[None]:
        """Lets a forward read tensors of the form that `begin_graph` returns in place of the chunks' own."""
        return self._plans.reading(chunks, since, tensors)

    def attended_rows(self, chunk: Chunk, since: int) -> tuple[Ranges, ...]:
        """Returns the rows of the ring that a chunk's queries attend: before `since`, then since then; 0 for all."""
        return self._plans.attended_rows(chunk, since)

    def keys(self, layer: int, chunk: Chunk, since: int, old: bool) -> Keys:
        """Returns the keys and values of a layer that a chunk's queries attend; see `ReadPlans.keys`."""
        return self._plans.keys(layer, chunk, since, old)

    def check_integrity(self) -> None:
        """Checks that cursor, slots and storage agree, and that every committed number is finite.

        Raises:
            AssertionError: they do not.
        """
        held = self.window.held(self.committed)
        opened = range(0) if self.open_chunk is None else range(self.open_chunk.start, self.open_chunk.stop)
        for slot, frame in held.items():
            assert self._written.get(slot) in (frame, *opened), f"slot {slot} does not hold frame {frame}"
        if self.open_chunk is None:
            assert self._undo is None, "the undo buffer outlives its chunk"
            assert self.storage_L2BKSHD[:, :, :, list(held)].isfinite().all(), "a committed slot was never written"
        else:
            assert self.open_chunk.start == self.committed, "the open chunk is not the next one"
