"""The KV cache: one preallocated ring of frame slots per layer, shared by all passes of a stream.

The cache owns storage and cursor, a layer of the model sees a `LayerCache`. A denoise pass writes the open chunk's
keys and values into the slots that the chunk will own, again and again; the context pass writes the clean ones and
the chunk is committed. The first write of an open chunk puts aside the frames that it takes over, once a chunk and not
once a pass, so that `cancel` leaves the stream as it was after the last commit.

Shapes: B batch, F frames, S tokens a frame, H heads, d head width, K = slots; S and H are what this rank stores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from causalrope_kernels import Keys, RotateOnRead, Slots
from causalrope_sp.cache.window import SlidingWindow
from causalrope_sp.devices import send
from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import Chunk


class KVCache:
    """Storage for `layers` rings of `window.frames` slots of `tokens`×`heads`×`head_dim` keys and values.

    `committed` is the number of latent frames whose clean keys and values are in: the global time index at which
    the next chunk starts. With `turn` keys are stored unturned in time, and turned on read by the places that it is
    given, slot by slot: those of the frames within the window (`relative` policy).
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
        rotate_on_read: Callable[[Sequence[int]], RotateOnRead] | None = None,
    ) -> None:
        self.window = window
        self._rotate_on_read = rotate_on_read
        self.committed = 0
        self.open_chunk: Chunk | None = None
        shape = (layers, 2, batch, window.frames, tokens, heads, head_dim)
        self.storage_L2BKSHD = torch.empty(shape, dtype=dtype, device=device)
        self._undo_L2BFSHD = self.storage_L2BKSHD[:, :, :, :0]  # frames put aside; grows to the largest chunk
        self._undo_layers: set[int] = set()  # the layers that have
        self._written: dict[int, int] = {}  # slot -> frame, as the first layer writes them
        self._slots: dict[Chunk, torch.Tensor] = {}  # what all layers share, and the device need be told once a chunk
        self._rotations_on_read: dict[Chunk, RotateOnRead | None] = {}
        self._ranges_by_chunk: dict[tuple[Chunk, int, bool], tuple[tuple[tuple[int, int], ...], torch.Tensor]] = {}

    @property
    def bytes(self) -> int:
        """All that the cache holds on the device, what is put aside included."""
        undo = self._undo_L2BFSHD
        return self.storage_L2BKSHD.nbytes + undo.numel() * undo.element_size()

    def open(self, chunk: Chunk) -> None:
        """Makes `chunk` the one that denoise passes write.

        Raises:
            ConfigError: another chunk is open, the chunk does not start where the stream stands, or it does not fit.
        """
        if self.open_chunk is not None:
            raise ConfigError(f"chunk {self.open_chunk.index} is still open; commit or cancel it first")
        if chunk.start != self.committed:
            raise ConfigError(f"the cache stands at latent frame {self.committed}, the chunk starts at {chunk.start}")
        self.window.slots(chunk)
        evicted = len(self.window.evicted(chunk))
        if evicted > self._undo_L2BFSHD.shape[3]:
            layers, _, batch, _, *rest = self.storage_L2BKSHD.shape
            self._undo_L2BFSHD = self.storage_L2BKSHD.new_empty(layers, 2, batch, evicted, *rest)
        self.open_chunk = chunk
        for memory in (self._slots, self._rotations_on_read, self._ranges_by_chunk):
            memory.clear()

    def commit(self) -> None:
        """The open chunk's clean keys and values are written, or will be by the forward that opens the next chunk.

        Raises:
            ConfigError: no chunk is open.
        """
        if self.open_chunk is None:
            raise ConfigError("no chunk is open to commit")
        self.committed, self.open_chunk = self.open_chunk.stop, None
        self._undo_layers.clear()

    def cancel(self) -> None:
        """Forgets the open chunk; frames that it overwrote are as they were after the last commit."""
        if self.open_chunk is not None:
            evicted = self.window.evicted(self.open_chunk)
            for layer in self._undo_layers:
                for n, frame in enumerate(evicted):
                    self.storage_L2BKSHD[layer, :, :, self.window.slot(frame)] = self._undo_L2BFSHD[layer, :, :, n]
            if self._undo_layers:
                self._written |= {self.window.slot(frame): frame for frame in evicted}
            self.open_chunk = None
            self._undo_layers.clear()

    def layer(self, index: int) -> LayerCache:
        return LayerCache(self, index)

    def kv_slots(self, layer: int, chunk: Chunk) -> tuple[Slots, Slots]:
        ring_2BKSHD = self.storage_L2BKSHD[layer]
        if chunk == self.open_chunk and layer not in self._undo_layers:
            for n, frame in enumerate(self.window.evicted(chunk)):
                self._undo_L2BFSHD[layer, :, :, n] = ring_2BKSHD[:, :, self.window.slot(frame)]
            self._undo_layers.add(layer)
        if layer == 0:
            self._written |= {self.window.slot(frame): frame for frame in range(chunk.start, chunk.stop)}
        if chunk not in self._slots:
            self._slots[chunk] = send(torch.tensor(self.window.slots(chunk)), ring_2BKSHD.device)
        k, v = (Slots(ring, self._slots[chunk]) for ring in ring_2BKSHD)
        return k, v

    def keys(self, layer: int, chunk: Chunk, since: int, old: bool) -> Keys:
        ring_2BKSHD = self.storage_L2BKSHD[layer]
        tokens, device = ring_2BKSHD.shape[3], ring_2BKSHD.device
        key = chunk, since, old
        if key not in self._ranges_by_chunk:
            slots = self.window.ranges(chunk, since)[not old]
            if since:  # always two, the second at times empty: so many does a captured graph have
                assert len(slots) <= 2, "what goes round lies in one stretch or two"
                slots += [(0, 0)] * (2 - len(slots))
            rows = tuple((first * tokens, stop * tokens) for first, stop in slots)
            self._ranges_by_chunk[key] = rows, send(torch.tensor(rows, dtype=torch.int32).view(-1, 2), device)
        if chunk not in self._rotations_on_read:
            self._rotations_on_read[chunk] = (
                None if self._rotate_on_read is None else self._rotate_on_read(self.window.places(chunk))
            )
        k, v = ring_2BKSHD.flatten(2, 3)
        return Keys(k, v, *self._ranges_by_chunk[key], self._rotations_on_read[chunk])

    def check_integrity(self) -> None:
        """Raises AssertionError unless cursor, slots and storage agree and every committed number is finite."""
        held = self.window.held(self.committed)
        pinned = range(min(self.window.sink, self.committed))
        ring = range(max(len(pinned), self.committed - self.window.frames + self.window.sink), self.committed)
        assert sorted(held) == [*pinned, *ring], "the slots do not hold the sink and the newest frames"
        opened = range(0) if self.open_chunk is None else range(self.open_chunk.start, self.open_chunk.stop)
        for slot, frame in enumerate(held):
            assert self._written.get(slot) in (frame, *opened), f"slot {slot} does not hold frame {frame}"
        if self.open_chunk is None:
            assert not self._undo_layers, "frames put aside outlive their chunk"
            assert self.storage_L2BKSHD[:, :, :, : len(held)].isfinite().all(), "a committed slot was never written"
        else:
            assert self.open_chunk.start == self.committed, "the open chunk is not the next one"


class LayerCache:
    """The view of layer `index`: where a chunk's keys and values go, and what its queries attend."""

    def __init__(self, cache: KVCache, index: int) -> None:
        self._cache, self.index, self.window = cache, index, cache.window

    def kv_slots(self, chunk: Chunk) -> tuple[Slots, Slots]:
        """Where the keys and the values of the chunk go: the slots that it owns. Whoever asks, writes them."""
        return self._cache.kv_slots(self.index, chunk)

    def keys(self, chunk: Chunk) -> Keys:
        """All that the chunk's queries attend, itself included."""
        return self._cache.keys(self.index, chunk, since=0, old=False)

    def keys_before(self, chunk: Chunk, since: int) -> Keys:
        """Of all that, what belongs to frames before the global time index `since`,"""
        return self._cache.keys(self.index, chunk, since, old=True)

    def keys_since(self, chunk: Chunk, since: int) -> Keys:
        """and what does not."""
        return self._cache.keys(self.index, chunk, since, old=False)
