"""The ledger: what every collective moved, and how long this rank stood waiting for it.

Elements and bytes are those that one rank *receives* from the others, padding for the wire included.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

KEPT_EVENTS = 4096
CROSSING = 1 << 20  # more collectives than a pass makes
LAYERLESS = -1  # the layer of what belongs to none, such as a chunk's latents or the text


@dataclass
class Entry:
    """The sum over some collectives. `waited_s` is the exposed time: spent waiting, with nothing to compute."""

    calls: int = 0
    elements: int = 0
    bytes: int = 0
    waited_s: float = 0.0

    def __iadd__(self, other: Entry) -> Entry:
        self.calls += other.calls
        self.elements += other.elements
        self.bytes += other.bytes
        self.waited_s += other.waited_s
        return self


class CommStats:
    """Entries by kind and layer, noted from any thread.

    Kinds are "qkv", "output", "kv", "q" and "partial" of attention, "guidance", "weights", "text" and "latents", and of
    decoding "halo" and "mid" (the decoder's own attention), "pixels", and "to decode", what decode ranks are sent.

    `entries` are by (kind, layer). `stored_bytes` are the outputs that denoise passes kept for one another (`reuse`),
    the most at once.
    """

    def __init__(self) -> None:
        self.entries: dict[tuple[str, int], Entry] = defaultdict(Entry)
        self._waits: list[tuple[str, int, torch.cuda.Event, torch.cuda.Event]] = []
        self._begun = self.stored_bytes = 0
        self._lock = threading.Lock()
        self._starting: deque[tuple[str, torch.cuda.Event]] = deque()

    def begin(self, kind: str, layer: int, elements: int, like: Tensor) -> None:
        """Notes a collective that is about to begin and will bring `elements` numbers like those of `like`."""
        self.add(kind, layer, Entry(1, elements, elements * like.element_size()))
        if like.is_cuda:
            event = torch.cuda.Event()
            event.record()
            self._starting.append((kind, event))
        else:
            self._count(kind)

    @property
    def begun(self) -> int:
        """How far this rank has come, ever, in collectives; on CUDA, how far the device has come. Two lanes, which make
        different numbers of them in a step, are even again where they cross."""
        while self._starting and self._starting[0][1].query():
            self._count(self._starting.popleft()[0])
        return self._begun

    def _count(self, kind: str) -> None:
        with self._lock:
            self._begun = (self._begun // CROSSING + 1) * CROSSING if kind == "guidance" else self._begun + 1

    def add(self, kind: str, layer: int, entry: Entry) -> None:
        with self._lock:
            self.entries[kind, layer] += entry

    def add_wait(self, kind: str, layer: int, began: torch.cuda.Event, ended: torch.cuda.Event) -> None:
        """A wait of a CUDA stream, between two events; read when it is over, so that the host never waits."""
        with self._lock:
            self._waits.append((kind, layer, began, ended))
        if len(self._waits) > KEPT_EVENTS:  # nobody takes this ledger: keep no more than those that may not be over yet
            self._read_waits()

    def keep(self, stored_bytes: int) -> None:
        """Notes that so much was stored at once."""
        self.stored_bytes = max(self.stored_bytes, stored_bytes)

    def include(self, other: CommStats) -> None:
        self.keep(other.stored_bytes)
        for (kind, layer), entry in other.entries.items():
            self.add(kind, layer, entry)

    def by_kind(self) -> dict[str, Entry]:
        return self._sum(0)

    def by_layer(self) -> dict[int, Entry]:
        return self._sum(1)

    def total(self) -> Entry:
        total = Entry()
        for entry in self.entries.values():
            total += entry
        return total

    def take(self) -> CommStats:
        """What was noted since the last call, as a ledger of its own; this one begins anew.

        On CUDA a wait that is not over yet is left to the next taking.
        """
        self._read_waits()
        taken = CommStats()
        with self._lock:
            taken.entries, self.entries = self.entries, taken.entries
            taken.stored_bytes, self.stored_bytes = self.stored_bytes, 0
        return taken

    def _read_waits(self) -> None:
        with self._lock:
            waits, self._waits = self._waits, []
        for kind, layer, began, ended in waits:
            if ended.query():
                self.add(kind, layer, Entry(waited_s=began.elapsed_time(ended) / 1000))
            else:
                with self._lock:
                    self._waits.append((kind, layer, began, ended))

    def as_json(self) -> dict[str, dict[str, Any]]:
        """By kind, as JSON holds it."""
        return {kind: asdict(entry) for kind, entry in sorted(self.by_kind().items())}

    def _sum(self, axis: int) -> dict[Any, Entry]:
        sums: dict[Any, Entry] = defaultdict(Entry)
        for key, entry in self.entries.items():
            sums[key[axis]] += entry
        return dict(sums)
