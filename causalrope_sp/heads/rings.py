"""Where the heads of each layer are attended: on which ranks of `ulysses`, and in which ring of the KV cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import mul

from causalrope_kernels import Bands
from causalrope_sp.grid import shares
from causalrope_sp.heads.cached_heads import CachedHeads
from causalrope_sp.heads.near_rows import row_pairs, sees_all
from causalrope_sp.heads.placement import HeadPlacement
from causalrope_sp.heads.policy import SKIP, HeadPolicy, Rows


@dataclass(frozen=True)
class HeadRings:
    """The rings of frame slots that the heads of a stream are cached in, and the placement of each layer.

    A ring has the heads that see equally many frames and the same rows of them; a layer may have none of them. Rings
    are in order of what their heads see, most first. Heads that see the whole window, if there are any, are therefore
    those of the first ring, among whose frames some may be chosen (see `ReadPlans`).

    Args:
        frames: the latent frames that the heads of each ring see; `SKIP` for those that attend nothing.
        placements: the placement of every layer.
        heads: how many heads of each ring a column has, by layer, column and ring.
        window: the window of the stream.
        sink: the sink of windows that are smaller than the stream's.
        scratch: the slots of the ring of heads that attend nothing; see `CachedHeads`.
        rows: the rows of a band of the heads of each ring (see `HeadPolicy`), or None for whole frames.
    """

    frames: tuple[int, ...]
    placements: tuple[HeadPlacement, ...]
    heads: tuple[tuple[tuple[int, ...], ...], ...]
    window: int
    sink: int = 0
    scratch: int = 0
    rows: tuple[Rows, ...] = (None,)

    @classmethod
    def of(
        cls,
        policy: HeadPolicy | None,
        layers: int,
        heads: int,
        columns: int,
        window: int,
        sink: int = 0,
        chunk_frames: int = 1,
        similar: int | None = None,
        frame_rows: int | None = None,
    ) -> HeadRings:
        """Places the heads of a model.

        Args:
            policy: what every head sees; None for the whole window.
            layers: the layers of the model.
            heads: its attention heads.
            columns: how many ranks share the heads.
            window: the window of the stream, in latent frames.
            sink: the latent frames of its sink.
            chunk_frames: those of a chunk.
            similar: how many frames heads that see the whole window attend after a chunk's first pass; None for all.
            frame_rows: the rows of tokens of a frame, which a policy of rows needs.

        Returns:
            Their rings. If every head sees the whole window, there is one, and the heads keep the model's order.
            Otherwise each head goes to the column with the fewest keys so far, those with most keys first (the rule of
            the longest processing time). Keys are those that it attends after a chunk's first pass.

        Raises:
            ConfigError: the policy is of another size.
        """
        if policy is not None:
            policy.check_model(layers, heads)
        seen = [] if policy is None else _seen(policy, window, frame_rows)
        if all(each == (window, None) for layer in seen for each in layer):
            numbers, sizes = iter(range(heads)), shares(heads, columns)
            placement = HeadPlacement(tuple(tuple(islice(numbers, size)) for size in sizes))
            return cls((window,), (placement,) * layers, (tuple((size,) for size in sizes),) * layers, window)
        work = {each: each[0] * row_pairs(frame_rows or 1, each[1]) for layer in seen for each in layer}
        rings = sorted(work, key=lambda each: (-work[each], -each[0]))
        number = {each: place for place, each in enumerate(rings)}
        ring_of = [[number[each] for each in layer] for layer in seen]
        attended = {} if similar is None else {window: similar}
        costs = [attended.get(frames, frames) * row_pairs(frame_rows or 1, rows) for frames, rows in rings]
        placements = tuple(HeadPlacement(_by_longest_time(layer, costs, columns)) for layer in ring_of)
        counts = tuple(
            tuple(tuple(map([layer[head] for head in column].count, range(len(rings)))) for column in at.columns)
            for at, layer in zip(placements, ring_of, strict=True)
        )
        frames, rows = zip(*rings, strict=True)
        return cls(frames, placements, counts, window, sink, min(window, sink + chunk_frames), rows)

    def attended(self, column: int, most: int, chosen: int | None = None, pairs: Sequence[float] = ()) -> float:
        """Returns over how many latent frames the queries of a column attend, summed over all layers and heads; with
        `pairs`, how many pairs of a query and a key this is for a frame of queries.

        Args:
            column: the column.
            most: how many frames there are.
            chosen: how many of them heads that see the whole window attend; None for all.
            pairs: by ring, the pairs of a query and a key that a head of it has with each frame of keys, for a frame of
                queries; empty to count each frame as 1.
        """
        return sum(self._of_layer(layer, most, chosen, pairs)[column] for layer in range(len(self.heads)))

    def waited_for(self, most: int, chosen: int | None = None, pairs: Sequence[float] = ()) -> float:
        """Returns what `attended` returns, frames or pairs of a query and a key, of the column that in each layer has
        most of them: the others wait for it."""
        return sum(max(self._of_layer(layer, most, chosen, pairs)) for layer in range(len(self.heads)))

    def _of_layer(self, layer: int, most: int, chosen: int | None, pairs: Sequence[float]) -> list[float]:
        of_whole = most if chosen is None else chosen
        frames: list[float] = [of_whole if each == self.window else min(each, most) for each in self.frames]
        frames = list(map(mul, frames, pairs)) if pairs else frames
        return [sum(map(mul, counts, frames)) for counts in self.heads[layer]]

    @property
    def one(self) -> bool:
        """Whether all heads see the whole window, and keep the model's order."""
        whole = self.frames == (self.window,) and self.rows == (None,)
        return whole and all(placement.in_order for placement in self.placements)

    def cached(self, column: int, *, from_model: bool, bands: tuple[tuple[Bands | None, ...], ...] = ()) -> CachedHeads:
        """Returns the heads that the ranks of a column cache.

        Args:
            column: the column.
            from_model: whether their keys and values are written straight from the model's order of heads.
            bands: see `CachedHeads`.
        """
        heads = tuple(by_column[column] for by_column in self.heads)
        order = self.placements if from_model else ()
        return CachedHeads(self.frames, heads, self.sink, self.scratch, order, bands)

    def imbalance(self, forwards: Mapping[tuple[int, ...], int], shares: Sequence[Sequence[float]] = ((),)) -> float:
        """Returns ρ, by which factor the slowest ranks of the layers take longer than their mean in self-attention.
        Ranks wait for each other in every layer of a forward.

        Args:
            forwards: how many frames heads that see the whole window attend in a forward, for each of its chunks, and
                the number of such forwards.
            shares: for the ranks of every row, which have the same tokens, which share of the pairs of a query and a
                key the heads of each ring see; empty for all.
        """
        waited = every = 0.0
        for chunks, times in forwards.items():
            for layer in range(len(self.heads)):
                loads = list[float]()
                for row in shares:
                    of_chunks = [self._of_layer(layer, self.window, chosen, row) for chosen in chunks]
                    loads += [sum(of_column) for of_column in zip(*of_chunks, strict=True)]
                waited += times * max(loads)
                every += times * sum(loads)
        return waited * len(self.heads[0]) * len(shares) / every if every else 1.0


def _seen(policy: HeadPolicy, window: int, frame_rows: int | None) -> list[list[tuple[int, Rows]]]:
    """The frames and the rows of a band of every head, by layer; None for rows that are whole frames."""
    if policy.rows and frame_rows is None:
        raise ValueError("frame_rows: expected the rows of tokens of a frame, as the policy has rows, got None")
    rows = [
        [None if w == SKIP or sees_all(frame_rows or 1, n) else n for w, n in zip(windows, layer, strict=True)]
        for windows, layer in zip(policy.windows, policy.rows_of_heads, strict=True)
    ]
    return [list(zip(*both, strict=True)) for both in zip(policy.frames(window), rows, strict=True)]


def _by_longest_time(rings: Sequence[int], costs: Sequence[int], columns: int) -> tuple[tuple[int, ...], ...]:
    """Gives every head to a column, by the ring of each head and what a head of each ring attends, `costs`. A column's
    heads are sorted by ring, then by number."""
    loads: list[tuple[int, int]] = [(0, 0)] * columns  # costs, heads
    placed: list[list[int]] = [[] for _ in range(columns)]
    for head in sorted(range(len(rings)), key=lambda head: -costs[rings[head]]):
        least = min(range(columns), key=loads.__getitem__)
        loads[least] = loads[least][0] + costs[rings[head]], loads[least][1] + 1
        placed[least].append(head)
    return tuple(tuple(sorted(column, key=lambda head: (rings[head], head))) for column in placed)
