"""The KV cache: one preallocated ring of frame slots per layer, shared by all passes of a stream.

The cache owns storage and cursor, a layer of the model sees a `LayerCache`. A denoise pass writes the open chunk's
keys and values into the slots that the chunk will own, again and again; the context pass writes the clean ones and
the chunk is committed. The first write of an open chunk puts aside the frames that it takes over, once a chunk and not
once a pass, so that `cancel` leaves the stream as it was after the last commit.

Shapes: B batch, F frames, S tokens a frame, H heads, d head width, K = slots; S and H are what this rank stores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import Chunk
from causalrope_sp.window import SlidingWindow


class KVCache:
    """Storage for `layers` rings of `window.frames` slots of `tokens`×`heads`×`head_dim` keys and values.

    `committed` is the number of latent frames whose clean keys and values are in: the global time index at which
    the next chunk starts.
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
    ) -> None:
        self.window = window
        self.committed = 0
        self.open_chunk: Chunk | None = None
        shape = (layers, 2, batch, window.frames, tokens, heads, head_dim)
        self.storage_L2BKSHD = torch.empty(shape, dtype=dtype, device=device)
        self._aside_L2BFSHD = self.storage_L2BKSHD[:, :, :, :0]  # frames put aside; grows to the largest chunk
        self._put_aside: set[tuple[int, int | None]] = set()  # the layers, and their first heads, that have
        self._written: dict[int, int] = {}  # slot -> frame, as the first layer writes them

    @property
    def bytes(self) -> int:
        """All that the cache holds on the device, what is put aside included."""
        aside = self._aside_L2BFSHD
        return self.storage_L2BKSHD.nbytes + aside.numel() * aside.element_size()

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
        if evicted > self._aside_L2BFSHD.shape[3]:
            layers, _, batch, _, *rest = self.storage_L2BKSHD.shape
            self._aside_L2BFSHD = self.storage_L2BKSHD.new_empty(layers, 2, batch, evicted, *rest)
        self.open_chunk = chunk

    def commit(self) -> None:
        """The open chunk's clean keys and values are written, or will be by the forward that opens the next chunk.

        Raises:
            ConfigError: no chunk is open.
        """
        if self.open_chunk is None:
            raise ConfigError("no chunk is open to commit")
        self.committed, self.open_chunk = self.open_chunk.stop, None
        self._put_aside.clear()

    def cancel(self) -> None:
        """Forgets the open chunk; frames that it overwrote are as they were after the last commit."""
        if self.open_chunk is not None:
            evicted = self.window.evicted(self.open_chunk)
            for layer in {layer for layer, _ in self._put_aside}:
                for n, frame in enumerate(evicted):
                    self.storage_L2BKSHD[layer, :, :, self.window.slot(frame)] = self._aside_L2BFSHD[layer, :, :, n]
            if self._put_aside:
                self._written |= {self.window.slot(frame): frame for frame in evicted}
            self.open_chunk = None
            self._put_aside.clear()

    def layer(self, index: int) -> LayerCache:
        return LayerCache(self, index)

    def write(self, layer: int, chunk: Chunk, k_BFSHD: Tensor, v_BFSHD: Tensor, tokens: slice, heads: slice) -> None:
        ring_2BKSHD = self.storage_L2BKSHD[layer]
        if chunk == self.open_chunk and (layer, heads.start) not in self._put_aside:
            for n, frame in enumerate(self.window.evicted(chunk)):
                self._aside_L2BFSHD[layer, :, :, n, :, heads] = ring_2BKSHD[:, :, self.window.slot(frame), :, heads]
            self._put_aside.add((layer, heads.start))
        if layer == 0:
            self._written |= {self.window.slot(frame): frame for frame in range(chunk.start, chunk.stop)}
        for frame, slot, length in self.window.runs(chunk):
            ring_2BKSHD[0, :, slot : slot + length, tokens, heads] = k_BFSHD[:, frame : frame + length]
            ring_2BKSHD[1, :, slot : slot + length, tokens, heads] = v_BFSHD[:, frame : frame + length]

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
            assert not self._put_aside, "frames put aside outlive their chunk"
            assert self.storage_L2BKSHD[:, :, :, : len(held)].isfinite().all(), "a committed slot was never written"
        else:
            assert self.open_chunk.start == self.committed, "the open chunk is not the next one"


class LayerCache:
    """The view of layer `index`: write a chunk's keys and values, read what its queries attend."""

    def __init__(self, cache: KVCache, index: int) -> None:
        self._cache, self.index, self.window = cache, index, cache.window

    def write(
        self,
        chunk: Chunk,
        k_BFSHD: Tensor,
        v_BFSHD: Tensor,
        *,
        tokens: slice = slice(None),
        heads: slice = slice(None),
    ) -> None:
        """Puts the chunk's keys and values, or some tokens and heads of them, into the slots that the chunk owns."""
        self._cache.write(self.index, chunk, k_BFSHD, v_BFSHD, tokens, heads)

    def read(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """k and v, each (B, L, H, d), of all that the chunk's queries attend, itself included."""
        return self.slots(0, self.window.readable(chunk))

    def slots(self, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """k and v, each (B, L, H, d), in the slots [first, stop)."""
        k, v = self._cache.storage_L2BKSHD[self.index][:, :, first:stop].flatten(2, 3)
        return k, v
