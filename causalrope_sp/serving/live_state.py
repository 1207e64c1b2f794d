"""What a live session is beside the pipeline's session: what its viewer has still to play, and whether it waits."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from causalrope_sp.pipeline.output import VideoChunk


@dataclass
class Delivery:
    """A chunk on its way to the viewer.

    Args:
        sequence: its number among all deliveries of the session, from 0 on.
        chunk: the chunk.
        dropped: whether it was taken back before it was played.
    """

    sequence: int
    chunk: VideoChunk
    dropped: bool = False


@dataclass
class LiveState:
    """What a live session is beside the pipeline's session.

    Args:
        opening: the arguments of `SessionTable.run` that opened it.
        sequence: the number of the next delivery.
        paused: whether its viewer has paused it.
        unplayed: the chunks that its viewer has not played yet.
        control: the control that holds; None for that of the model's start, zero.
    """

    opening: dict[str, Any]
    sequence: int = 0
    paused: bool = False
    unplayed: deque[Delivery] = field(default_factory=deque)
    control: list[float] | None = None

    @property
    def ahead(self) -> int:
        """Pixel frames that are made and not yet played."""
        return sum(len(delivery.chunk.frames) for delivery in self.unplayed if delivery.chunk.frames is not None)

    def add(self, chunk: VideoChunk) -> Delivery:
        """Puts a chunk on its way and returns its delivery."""
        delivery = Delivery(self.sequence, chunk)
        self.sequence += 1
        self.unplayed.append(delivery)
        return delivery

    def played(self, sequence: int) -> None:
        """Notes that the viewer has played all deliveries up to this one."""
        while self.unplayed and self.unplayed[0].sequence <= sequence:
            self.unplayed.popleft()

    def take_back(self, chunk: int) -> int:
        """Drops what is not played of a chunk and those after it, and returns how many chunks that are."""
        for delivery in self.unplayed:
            delivery.dropped = delivery.chunk.index >= chunk
        dropped = sum(delivery.dropped for delivery in self.unplayed)
        self.unplayed = deque(delivery for delivery in self.unplayed if not delivery.dropped)
        return dropped
