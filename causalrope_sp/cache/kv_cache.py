"""The KV cache: preallocated rings of frame slots, one per layer and head group, shared by all passes of a stream.

The cache owns the cursor, and its rings the storage; a layer of the model sees a `LayerCache`. Every denoise pass
writes the open chunk's keys and values into the slots that the chunk will own; the context pass writes the clean ones,
and the chunk is committed. The first write of an open chunk copies the frames that it overwrites to an undo buffer,
once per chunk and not once per pass, so that `cancel` restores the stream as it was after the last commit. The buffers
of committed chunks can be kept too, so that `rewind` goes further back. A fork shares the storage until one of both
writes.

Shapes: B batch, K slots, S tokens of a frame, H heads, D head width; S and H are what this rank stores.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from causalrope_kernels import Keys, RotateOnRead
from causalrope_sp.cache.head_ring import HeadRing
from causalrope_sp.cache.key_offsets import KeyOffsets
from causalrope_sp.cache.layer_cache import LayerCache
from causalrope_sp.cache.read_plans import Choose, Ranges, ReadPlans, SlotPair
from causalrope_sp.cache.storage import CacheStorage
from causalrope_sp.cache.window import SlidingWindow
from causalrope_sp.devices import storage_bytes
from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import Chunk
from causalrope_sp.heads.cached_heads import CachedHeads
from causalrope_sp.heads.policy import SKIP


class KVCache:
    """Rings of frame slots, with keys and values of `tokens`×`heads`×`head_dim` numbers in a slot.

    Args:
        layers: the layers of the model.
        batch: B.
        window: the sliding window of the stream; a ring has one slot per frame.
        tokens: the tokens of a frame that this rank stores.
        heads: the heads that this rank stores.
        head_dim: the head width.
        dtype: the dtype in which keys and values are computed.
        device: where they live.
        quantized: the dtype of 8 bits that they are stored in, int8 or float8_e4m3fn; None stores them in `dtype`.
        history: how many committed chunks can be taken back.
        rotate_on_read: makes the rotation of the keys on read from the position of every slot's frame within the window
            (the `relative` policy); None if keys are stored rotated.
        cached: the rings that the heads of every layer are in, `heads` or fewer of them in all; None for one ring.
        all_heads: the heads of the model, of whose keys something is taken off before they are quantized, and sent;
            None for `heads`.

    Attributes:
        committed: the number of latent frames whose clean keys and values are stored, which is the global time index at
            which the next chunk starts.
        open_chunk: the chunk that denoise passes write, or None.
        offsets: what is taken off quantized keys.
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
        quantized: torch.dtype | None = None,
        history: int = 0,
        rotate_on_read: Callable[[Sequence[int]], RotateOnRead] | None = None,
        cached: CachedHeads | None = None,
        all_heads: int | None = None,
    ) -> None:
        self._window = window
        self.committed = 0
        self.open_chunk: Chunk | None = None
        self._sharers = [1]  # how many caches share the storage
        self.storages = 1
        self._restarted = 0  # the next frame at the last restart
        cached = cached or CachedHeads((window.frames,), ((heads,),) * layers)
        sizes = batch, tokens, head_dim
        self._storage = CacheStorage(cached, sizes, dtype, quantized, device, all_heads or heads)
        self._rings = [
            HeadRing(storage, slots, cached.sink, window, history, frames != SKIP)
            for storage, slots, frames in zip(self._storage.by_ring(), self._storage.slots, cached.frames, strict=True)
        ]
        self._reading = rotate_on_read, cached.source_order, cached.bands
        self._choose: Choose | None = None
        self._still = 0 if rotate_on_read is None else 2 * rotate_on_read([0] * window.frames).table.shape[2]
        self._make_layers(frozenset(range(0 if quantized else layers)))
        self._make_plans()

    def _make_layers(self, set_already: frozenset[int]) -> None:
        own = weakref.proxy(self)  # no cycle: a cache that nobody needs goes at once, not when Python looks for cycles
        storage = self._storage
        offsets = [None] * storage.layers if storage.offsets_LBND is None else storage.offsets_LBND.unbind()
        self._layers = [LayerCache(own, n, storage.quantized, offset) for n, offset in enumerate(offsets)]
        self.offsets = KeyOffsets(storage.offsets_LBND, self._layers, self._still, set_already)

    def _take(self, storage: CacheStorage) -> None:
        """Takes another storage of the same sizes. Views are made once, since each costs the host as much as a
        launch."""
        self._storage = storage
        for ring, own in zip(self._rings, storage.by_ring(), strict=True):
            ring.set_storage(own)
        self._make_plans()

    def _make_plans(self) -> None:
        self._plans = ReadPlans(self._rings, self._window, *self._reading, self._choose)

    @property
    def window(self) -> SlidingWindow:
        """The sliding window of the stream."""
        return self._window

    @window.setter
    def window(self, window: SlidingWindow) -> None:
        self._window = window
        for ring in self._rings:
            ring.set_window(window)

    @property
    def rings(self) -> Sequence[HeadRing]:
        """The rings of all head groups. In every layer the heads of a ring follow those of the ring before."""
        return self._rings

    @property
    def bytes(self) -> int:
        """The bytes that the cache holds on the device, undo buffers included."""
        return storage_bytes(self.tensors())

    def tensors(self) -> Iterator[Tensor]:
        """Yields what the cache holds on the device: its storage, and undo buffers."""
        yield from self._storage.tensors()
        for ring in self._rings:
            yield from ring.undo_tensors()

    def choose_frames(self, choose: Choose) -> None:
        """Lets heads that see the whole window attend only some of the frames that it holds.

        Args:
            choose: chooses them for each of these heads of this rank, in the order of its cache; it is asked at the
                first use of a chunk after it was opened, or plans were restarted.
        """
        self._choose = choose
        self._make_plans()

    def restart_plans(self) -> None:
        """Forgets what the passes over chunks write and read, since other frames were chosen."""
        self._plans.restart(self._window)

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
        slots = [ring.window.slots(chunk) for ring in self._rings]  # refuses the chunk before anything changes
        for ring, own in zip(self._rings, slots, strict=True):
            ring.open(chunk, own)
        self.open_chunk = chunk
        self._plans.restart(self._window)

    def commit(self) -> None:
        """Commits the open chunk.

        Its clean keys and values are written already, or will be by the first forward of the next chunk.

        Raises:
            ConfigError: no chunk is open.
        """
        if self.open_chunk is None:
            raise ConfigError("no chunk is open to commit")
        self.committed, self.open_chunk = self.open_chunk.stop, None
        for ring in self._rings:
            ring.commit()

    def cancel(self) -> None:
        """Cancels the open chunk, if there is one, and restores the frames that it overwrote."""
        for ring in self._rings:
            ring.cancel()
        self.open_chunk = None
        self._forget_offsets()

    def restore_evicted(self) -> None:
        """Writes the frames that the open chunk overwrote back to their slots, from the undo buffer."""
        for ring in self._rings:
            ring.restore_evicted()

    def reopen(self, chunk: Chunk) -> None:
        """Makes the chunk that was committed last the open one again, after all later ones were cancelled.

        Its context pass must run again. Whether it can then be cancelled depends on the history.
        """
        assert self.open_chunk is None, "only one chunk is open"
        assert self.committed == chunk.stop, "only the chunk that was committed last can be opened again"
        for ring in self._rings:
            ring.reopen(chunk)
        self.committed, self.open_chunk = chunk.start, chunk
        self._plans.restart(self._window)

    def can_rewind(self, chunk: Chunk) -> bool:
        """Returns whether `rewind` can make a chunk the open one again, with all as it was."""
        return chunk.start >= self._restarted and self._rings[0].can_rewind(chunk)

    def forget_history(self) -> None:
        """Lets no committed chunk be taken back any more, between two chunks; what is written stays."""
        for ring in self._rings:
            ring.forget_history()
        self._restarted = self.committed

    def rewind(self, chunk: Chunk, window: SlidingWindow) -> None:
        """Takes chunks back until a committed one is the open one again, whose context pass must run again.

        Args:
            chunk: that chunk; `can_rewind` returns True for it.
            window: the window at that time.
        """
        self._own()
        self.cancel()
        for ring in self._rings:
            ring.rewind(chunk, window)
        self.open_chunk, self.committed, self._window = chunk, chunk.start, window
        self._plans.restart(window)

    def restart(self, window: SlidingWindow, committed: int) -> None:
        """Forgets all frames that a window does not hold, to write others from a frame on. No chunk can be taken back.

        Args:
            window: the new window, of the same size; what it holds before `committed` is there.
            committed: the global time index at which the next chunk starts.
        """
        for ring in self._rings:
            ring.restart(window, committed)
        self.open_chunk, self._window, self.committed, self._restarted = None, window, committed, committed
        self._plans.restart(window)
        self._forget_offsets()

    def _forget_offsets(self) -> None:
        """Lets the first keys of a stream that stands at its beginning again say what is taken off."""
        if not self.committed:
            self.offsets.forget()

    def fork(self) -> KVCache:
        """Returns a cache that goes on from here by itself. Both share the storage until one of them writes."""
        fork = copy.copy(self)
        fork._rings = [ring.fork() for ring in self._rings]
        fork._take(self._storage.shared())
        fork._make_layers(self.offsets.set_already)
        self._sharers[0] += 1
        return fork

    def _own(self) -> None:
        """Copies the storage if a fork shares it, before it is written."""
        sharers = self._sharers
        if sharers[0] > 1:
            self._take(self._storage.copy())
            self.storages += 1
            self._sharers = [1]
            sharers[0] -= 1  # only now may another thread write what was copied

    def release(self) -> None:
        """Tells the caches that share the storage that this one will neither read nor write it any more."""
        self._sharers[0] -= 1

    def layer(self, index: int) -> LayerCache:
        """Returns the view of one layer."""
        return self._layers[index]

    def kv_slots(self, layer: int, chunk: Chunk) -> SlotPair:
        """Returns the slots of a layer that a chunk's keys and values are written to; see `LayerCache.kv_slots`."""
        if layer == 0:
            self._own()
            self.note_written(chunk)
        if chunk == self.open_chunk:
            for ring in self._rings:
                if ring.undo is not None and layer not in ring.undo.layers:  # asked here to save a call
                    ring.save_evicted(layer)
        return self._plans.slots(layer, chunk)

    def note_written(self, chunk: Chunk) -> None:
        """Notes that a chunk's keys and values lie in its slots."""
        for ring in self._rings:
            ring.note_written(chunk)

    def evicts(self, chunk: Chunk) -> bool:
        """Returns whether the open chunk overwrites frames of another chunk."""
        if self.open_chunk is None or chunk == self.open_chunk:
            return False
        return any(ring.evicts(chunk) for ring in self._rings)

    def begin_graph(self, chunks: Sequence[Chunk], since: int) -> list[Tensor]:
        """Prepares a pass that a captured graph may run, whose forward then does nothing on the host for the cache.

        Args:
            chunks: the chunks of the pass; the last one is open.
            since: the global time index that attention splits the frames at (see `keys`); 0 for no split.

        Returns:
            For every chunk its slots, and for every ring the bounds of the rows that it attends (of the frames before
            `since`, then of the others) and, in the `relative` policy, the angles of its slots, as tensors on the
            device.
        """
        self._own()
        for ring in self._rings:
            ring.save_all_evicted()
        for chunk in chunks:
            self.note_written(chunk)
        return [tensor for chunk in chunks for tensor in self._plans.tensors(chunk, since)]

    def reading(self, chunks: Sequence[Chunk], since: int, tensors: Sequence[Tensor]) -> AbstractContextManager[None]:
        """Lets a forward read tensors of the form that `begin_graph` returns in place of the chunks' own."""
        return self._plans.reading(chunks, since, tensors)

    def are_chosen(self, chunk: Chunk) -> bool:
        """Returns whether a chunk attends frames that were chosen for it; see `choose_frames`."""
        return self._plans.are_chosen(chunk)

    def attended_rows(self, chunk: Chunk, since: int, *, counted: bool) -> tuple[Ranges | int, ...]:
        """Returns the rows that a chunk's queries attend; see `ReadPlans.attended_rows`."""
        return self._plans.attended_rows(chunk, since, counted)

    def keys(self, layer: int, chunk: Chunk, since: int, old: bool, reader: int = 0) -> Sequence[Keys]:
        """Returns the keys and values of a layer that a chunk's queries attend, by head group; see `ReadPlans.keys`."""
        return self._plans.keys(layer, chunk, since, old, reader)

    def check_integrity(self) -> None:
        """Checks that cursor, slots and storage agree, and that every committed number is finite.

        Raises:
            AssertionError: they do not.
        """
        for ring in self._rings:
            ring.check_integrity(self.committed, self.open_chunk)
        if self.open_chunk is not None:
            assert self.open_chunk.start == self.committed, "the open chunk is not the next one"
