"""The frames that chunks overwrite in a ring of slots, kept so that the chunks can be taken back.

Shapes: B batch, F evicted frames, S tokens of a frame, H heads of a layer, d head width, K slots.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from causalrope_sp.grid import Chunk


@dataclass
class UndoBuffer:
    """The frames that one chunk overwrites.

    Args:
        chunk: the chunk.
        frames: their global time indices; none for a chunk that cannot be taken back.
        slots: their slots.
        memory: the bytes that their keys and values lie in.
        saved_2BF: what the parts of the ring's storage hold of them, by layer: keys and values, (2, B, F, S, H, d), and
            where they are quantized their scales, (2, B, F, S, H).
        layers: the layers that were saved so far.
        shared: whether a fork of the cache refers to the buffer too.
    """

    chunk: Chunk
    frames: list[int]
    slots: list[int]
    memory: Tensor
    saved_2BF: list[list[Tensor]]
    layers: set[int] = field(default_factory=set)
    shared: bool = False

    def save(self, parts_2BK: Sequence[Tensor], layer: int) -> None:
        """Copies the frames of a layer from their slots."""
        for saved_2BF, part_2BK in zip(self.saved_2BF[layer], parts_2BK, strict=True):
            for n, slot in enumerate(self.slots):
                saved_2BF[:, :, n] = part_2BK[:, :, slot]
        self.layers.add(layer)

    def restore(self, storage_2BK: Sequence[Sequence[Tensor]]) -> None:
        """Copies the saved frames of every layer back to their slots."""
        for layer in sorted(self.layers) if self.slots else ():
            for saved_2BF, part_2BK in zip(self.saved_2BF[layer], storage_2BK[layer], strict=True):
                for n, slot in enumerate(self.slots):
                    part_2BK[:, :, slot] = saved_2BF[:, :, n]


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
        yield from (*self._free, *(buffer.memory for buffer in self._buffers))

    def buffer(
        self, chunk: Chunk, frames: list[int], slots: list[int], storage_2BK: Sequence[Sequence[Tensor]]
    ) -> UndoBuffer:
        """Returns an empty buffer for the frames that a chunk overwrites, in memory of an old one if there is some."""
        sizes = [part[:, :, 0].nbytes * len(frames) for parts in storage_2BK for part in parts]
        memory = self._free.pop() if self._free else storage_2BK[0][0].new_empty(0, dtype=torch.uint8)
        if memory.numel() < sum(sizes):
            memory = memory.new_empty(sum(sizes))
        pieces = iter(memory[: sum(sizes)].split(sizes))
        saved = [
            [next(pieces).view(part.dtype).view(*part.shape[:2], len(frames), *part.shape[3:]) for part in parts]
            for parts in storage_2BK
        ]
        return UndoBuffer(chunk, frames, slots, memory, saved)

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
            self._free.append(buffer.memory)

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
