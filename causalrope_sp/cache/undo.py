"""The frames that chunks overwrite in a cache, kept so that the chunks can be taken back.

Shapes: L layers, B batch, F evicted frames, S tokens of a frame, H heads, d head width, K slots.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

from torch import Tensor

from causalrope_sp.grid import Chunk


@dataclass
class UndoBuffer:
    """The frames that one chunk overwrites.

    Args:
        chunk: the chunk.
        frames: their global time indices; none for a chunk that cannot be taken back.
        slots: their slots.
        storage_L2BFSHD: their keys and values.
        layers: the layers that were saved so far.
        shared: whether a fork of the cache refers to the buffer too.
    """

    chunk: Chunk
    frames: list[int]
    slots: list[int]
    storage_L2BFSHD: Tensor
    layers: set[int] = field(default_factory=set)
    shared: bool = False

    def save(self, ring_L2BKSHD: Tensor, layers: range) -> None:
        """Copies the frames of some layers from their slots."""
        of = slice(layers.start, layers.stop)
        for n, slot in enumerate(self.slots):
            self.storage_L2BFSHD[of, :, :, n] = ring_L2BKSHD[of, :, :, slot]
        self.layers.update(layers)

    def restore(self, ring_L2BKSHD: Tensor) -> None:
        """Copies the saved frames back to their slots."""
        every = len(self.layers) == len(ring_L2BKSHD)
        for n, slot in enumerate(self.slots):
            for of in [slice(None)] if every else sorted(self.layers):
                ring_L2BKSHD[of, :, :, slot] = self.storage_L2BFSHD[of, :, :, n]


class UndoHistory:
    """The undo buffers of the last committed chunks, and memory for new ones.

    Args:
        length: how many chunks can be taken back.
    """

    def __init__(self, length: int) -> None:
        self._buffers: deque[UndoBuffer] = deque(maxlen=length)
        self._free: list[Tensor] = []

    def tensors(self) -> Iterator[Tensor]:
        """Yields the memory of all buffers, free ones included."""
        yield from (*self._free, *(buffer.storage_L2BFSHD for buffer in self._buffers))

    def buffer(self, chunk: Chunk, frames: list[int], slots: list[int], ring_L2BKSHD: Tensor) -> UndoBuffer:
        """Returns an empty buffer for the frames that a chunk overwrites, in memory of an old one if there is some."""
        layers, _, batch, _, *rest = ring_L2BKSHD.shape
        shape = layers, 2, batch, len(frames), *rest
        flat = self._free.pop() if self._free else ring_L2BKSHD.new_empty(0)
        if flat.numel() < prod(shape):
            flat = ring_L2BKSHD.new_empty(prod(shape))
        return UndoBuffer(chunk, frames, slots, flat[: prod(shape)].view(shape))

    def push(self, buffer: UndoBuffer) -> None:
        """Keeps the buffer of a chunk that is committed, and lets the oldest one go."""
        if self._buffers.maxlen == 0:
            self.free(buffer)
            return
        if len(self._buffers) == self._buffers.maxlen:
            self.free(self._buffers[0])
        self._buffers.append(buffer)

    def pop(self) -> UndoBuffer | None:
        """Takes the newest buffer out; returns None if there is none."""
        return self._buffers.pop() if self._buffers else None

    def free(self, buffer: UndoBuffer) -> None:
        """Keeps the memory of a buffer for a new one, if no fork refers to it."""
        if not buffer.shared and not self._free:
            x = buffer.storage_L2BFSHD
            self._free.append(x.new_empty(0).set_(x.untyped_storage()))

    def holds(self, chunk: Chunk) -> bool:
        """Returns whether the buffer of a chunk is kept."""
        return any(buffer.chunk == chunk for buffer in self._buffers)

    def clear(self) -> None:
        """Lets all buffers go."""
        self._buffers.clear()

    def fork(self) -> UndoHistory:
        """Returns a history of the same buffers, which are not used for new ones any more."""
        for buffer in self._buffers:
            buffer.shared = True
        fork = UndoHistory(self._buffers.maxlen or 0)
        fork._buffers.extend(self._buffers)
        return fork
