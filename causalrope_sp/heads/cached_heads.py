"""The heads that one rank caches: in which rings, how many of each layer, and what their queries see of a frame."""

from __future__ import annotations

from dataclasses import dataclass
from operator import mul

from causalrope_kernels import Bands
from causalrope_sp.heads.placement import HeadPlacement
from causalrope_sp.heads.policy import SKIP


@dataclass(frozen=True)
class CachedHeads:
    """The heads that one rank caches.

    Args:
        frames: the latent frames that the heads of each ring see, in the order of `HeadRings`; `SKIP` for those that
            attend nothing.
        heads: how many heads of each ring the rank has, by layer and ring.
        sink: the sink of windows that are smaller than the stream's.
        scratch: the slots of the ring of heads that attend nothing, whose keys and values nobody reads; all layers
            share it.
        source_order: the placement of every layer, if `norm_rope_store` writes keys and values straight from the
            model's order of heads; empty if they come in the order of the rings.
        bands: what queries see of every frame, as a list over ranks with an entry for each ring, which is None if heads
            of that ring see whole frames. Where a rank attends the queries of all ranks that share the tokens, the list
            has an item for each of these ranks; otherwise it has one item, for the rank's own queries. Empty if every
            head sees whole frames.
    """

    frames: tuple[int, ...]
    heads: tuple[tuple[int, ...], ...]
    sink: int = 0
    scratch: int = 0
    source_order: tuple[HeadPlacement, ...] = ()
    bands: tuple[tuple[Bands | None, ...], ...] = ()

    def slots(self, chunk_frames: int) -> int:
        """Returns the slots of single heads in all layers, with those of an undo buffer of a chunk."""
        attended = sum(sum(map(mul, counts, self.frames)) for counts in self.heads)
        return attended + self.attending * chunk_frames + self.scratch * max(0, *self._skipped)

    @property
    def attending(self) -> int:
        """How many heads of all layers attend anything."""
        return sum(map(sum, self.heads)) - sum(self._skipped)

    @property
    def _skipped(self) -> list[int]:
        """How many heads of each layer attend nothing."""
        if self.frames[-1] != SKIP:
            return [0] * len(self.heads)
        return [counts[-1] for counts in self.heads]
