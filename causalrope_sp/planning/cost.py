"""The cost model: communication, FLOPs, memory and time of every strategy, from sizes alone.

Counts are exact (see `counts`). The memory of activations is an estimate. Times are predictions: counts divided by
rates, with an alpha-beta model of the link. Rates come from data sheets or are guesses unless they were measured.

In every function `layout` is the strategy on the ranks of the `sp` axis, `work` the stream, `rank` a rank of that axis,
and `branch` 0 for the conditional and 1 for the unconditional branch of guidance.
Shapes: B batch, F frames of a pass, s tokens of a frame on a rank, S of a whole frame, H heads, d head width, D = H·d.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from causalrope_sp.distributed.layout import Layout, parse_strategy, strategies
from causalrope_sp.planning.counts import (
    attention_flops,
    cache_bytes,
    chunk_flops,
    coordinates,
    cross_flops,
    frame_bytes,
    head_imbalance,
    received,
    received_guidance,
    received_in_pass,
    received_latents,
    received_means,
    stored_bytes,
    tokens_of_ranks,
)
from causalrope_sp.planning.machines import Machine
from causalrope_sp.planning.memory import NO_AUXILIARY, AuxiliaryMemory
from causalrope_sp.planning.session_memory import SessionMemory, latents_bytes, text_bytes, undo_frames
from causalrope_sp.planning.workload import Workload
from causalrope_sp.reuse.policy import Kind

Seconds = tuple[float, float, float]  # computing, communicating, and the part of the latter that is exposed
Attended = tuple[int, int]  # how many frames there are, and how many of them heads attend that see the whole window
ELEMENTWISE_PASSES = 30  # about how often a block of the unfused model reads or writes its D numbers a token


@dataclass(frozen=True)
class Plan:
    """The cost of one strategy. Every number is that of the rank with the most of it; times are predictions.

    A chunk is one of the steady state: its window is full, and its first pass is fused with the context pass of the
    chunk before. With `cfg` 2, each half of the ranks runs one branch of guidance, and counts are of the conditional
    branch. `stored_bytes` are the outputs that passes reuse, `exposed_ms` is the part of `communication_ms` during
    which nothing is computed, `first_frame_ms` excludes loading, text and decoding. `efficiency` is one rank's time for
    a chunk divided by `ranks` times that of all ranks, `imbalance` the slowest rank's computing divided by the mean,
    `head_imbalance` is ρ, the same of self-attention where ranks have heads or tokens that see different numbers of
    keys.
    `session` is what one of the `sessions` keeps between two chunks, `decoding_bytes` what is kept in addition while a
    chunk is decoded. `fits` says whether the memory suffices, `chosen` whether "auto" uses this strategy.
    """

    strategy: str
    ranks: int
    cfg: int
    collectives_per_pass: int
    bytes_per_pass: int
    collectives_per_chunk: int
    bytes_per_chunk: int
    flops_per_chunk: int
    weights_bytes: int
    cache_bytes: int
    stored_bytes: int
    activation_bytes: int
    session: SessionMemory
    compute_ms: float
    communication_ms: float
    exposed_ms: float
    chunk_ms: float
    first_frame_ms: float
    fps: float
    efficiency: float
    imbalance: float
    fits: bool
    chosen: bool = False
    auxiliary: AuxiliaryMemory = NO_AUXILIARY
    sessions: int = 1
    decoding_bytes: int = 0
    head_imbalance: float = 1.0

    @property
    def bytes_by_time(self) -> dict[str, int]:
        """The bytes of a rank's memory while it encodes an image and text, denoises and decodes."""
        others = (self.sessions - 1) * self.session.bytes
        session, activations, decoding = self.session.bytes, self.activation_bytes, self.decoding_bytes
        return self.auxiliary.by_time(self.weights_bytes, session, activations, decoding, others)

    @property
    def name(self) -> str:
        """The strategy with the size of the `cfg` axis, such as 2×ulysses."""
        return self.strategy if self.cfg == 1 else f"{self.cfg}×{self.strategy}"

    @property
    def memory_bytes(self) -> int:
        """The peak of a rank's memory, in bytes."""
        return max(self.bytes_by_time.values())


def plan(
    work: Workload,
    ranks: int,
    on: Machine,
    *,
    cfg_sizes: Sequence[int] = (1,),
    auxiliary: AuxiliaryMemory = NO_AUXILIARY,
    sessions: int = 1,
) -> list[Plan]:
    """Predicts the cost of every strategy on `ranks` ranks of the machine `on`, for each size of the `cfg` axis.

    `auxiliary` is memory besides the DiT's, `sessions` how many streams are open. The plan that is `chosen` has the
    fastest chunk of those that fit, and the least memory of equally fast ones. The result is the same on every rank.
    """
    one_rank, costs = _cost(parse_strategy("ulysses", 1), 1, work, on, auxiliary, sessions), []
    for cfg in cfg_sizes:
        names = strategies(ranks // cfg, work.config.num_heads)[: 1 if ranks == cfg else None]
        costs += [_cost(parse_strategy(name, ranks // cfg), cfg, work, on, auxiliary, sessions) for name in names]
    costs = [replace(c, efficiency=one_rank.chunk_ms / (ranks * c.chunk_ms)) for c in costs]
    best = min(range(len(costs)), key=lambda n: (not costs[n].fits, round(costs[n].chunk_ms, 3), costs[n].memory_bytes))
    return [replace(c, chosen=n == best) for n, c in enumerate(costs)]


def _cost(layout: Layout, cfg: int, work: Workload, on: Machine, auxiliary: AuxiliaryMemory, sessions: int) -> Plan:
    """The plan of one strategy with a `cfg` axis of this size; its `efficiency` is not known yet."""
    passes = work.passes if cfg == 1 else work.passes[:1]  # of each branch that runs on a rank
    every, branches, layers = range(layout.ranks), len(passes), work.config.num_layers
    chunk, window = work.chunk_frames, work.window
    # collectives outside the layers: a chunk's latents once, and velocities across the `cfg` axis after every pass
    latents, velocities = received_latents(work, layout.ranks), received_guidance(work, layout.ranks) if cfg > 1 else 0
    crossings = work.steps if cfg > 1 else 0
    means = branches * received_means(work, layout.ranks)
    rest = (layout.ranks > 1) + crossings + branches * (means > 0)
    rest_bytes = 4 * (latents + crossings * velocities + means)
    gather = rest * on.latency + rest_bytes / on.link
    compute, communication, exposed = _steady_times(layout, work, on, passes)
    seconds = compute + exposed + gather
    opening = _times(layout, work, on, passes, chunk, chunk, chunk)
    first = opening[0] + opening[2] + gather
    full = window, window
    alone = [_pass_times(layout, work, on, rank, chunk, full, work.computed(0), waits=False)[0] for rank in every]
    bytes_pass = max(sum(received_in_pass(layout, work, r, chunk).values()) for r in every) * work.itemsize
    calls_layer = len(received(layout, work, 0, chunk))
    attended = branches * layers + sum(computed["self"] for computed in _later(work, passes))  # layers, of all passes
    renewed = [frames for frames, _ in work.more_context]
    renewed_bytes = branches * bytes_pass * sum(renewed) // chunk
    cache = work.models * branches * max(cache_bytes(layout, work, r) for r in every)
    frame = max(frame_bytes(layout, work, r) for r in every)
    stored = max(sum(stored_bytes(layout, work, r, b, auxiliary.graphs) for b in range(branches)) for r in every)
    activations = max(_activation_bytes(layout, work, r) for r in every)
    session = SessionMemory(
        cache=cache,
        history=work.models * branches * frame * undo_frames(work),
        text=work.models * text_bytes(work, branches),
        latents=latents_bytes(work, max(tokens_of_ranks(work.grid, layout.ranks))),
        decoder=auxiliary.codec_state * (1 + work.history),
        outputs=stored,
        graphs=activations if auxiliary.graphs else 0,
    )
    made = Plan(
        strategy=layout.name,
        ranks=cfg * layout.ranks,
        cfg=cfg,
        collectives_per_pass=calls_layer * layers,
        bytes_per_pass=bytes_pass,
        collectives_per_chunk=calls_layer * (attended + branches * layers * (len(renewed) - work.models + 1)) + rest,
        bytes_per_chunk=bytes_pass * (attended + branches * layers) // layers + renewed_bytes + rest_bytes,
        flops_per_chunk=max(sum(chunk_flops(layout, work, r, branch) for branch in range(branches)) for r in every),
        weights_bytes=work.all_weights_bytes,
        cache_bytes=cache,
        stored_bytes=stored,
        activation_bytes=activations,
        compute_ms=1e3 * compute,
        communication_ms=1e3 * (communication + gather),
        exposed_ms=1e3 * (exposed + gather),
        chunk_ms=1e3 * seconds,
        first_frame_ms=1e3 * first,
        fps=work.temporal_stride * chunk / seconds,
        efficiency=1.0,
        imbalance=max(alone) * layout.ranks / sum(alone),
        head_imbalance=head_imbalance(layout, work),
        fits=True,
        auxiliary=auxiliary,
        session=session,
        sessions=sessions,
        decoding_bytes=auxiliary.codec_state if work.history or work.kept_chunks else 0,
    )
    return replace(made, fits=made.memory_bytes <= on.memory)


def _later(work: Workload, passes: Sequence[int]) -> list[dict[Kind, int]]:
    """In how many layers each kind of module runs, of all passes of a chunk but the first of each branch."""
    return [work.computed(step, branch) for branch, steps in enumerate(passes) for step in range(1, steps)]


def _steady_times(layout: Layout, work: Workload, on: Machine, passes: Sequence[int]) -> list[float]:
    """The seconds of a steady chunk's passes, with those that compute the window anew."""
    times = [_times(layout, work, on, passes, 2 * work.chunk_frames, work.window, work.seen)]
    for frames, keys in work.more_context:
        again = _slowest(layout, work, on, frames, (keys, keys), work.computed(0))
        times.append([len(passes) * seconds for seconds in again])
    return [sum(each) for each in zip(*times, strict=True)]


def _times(
    layout: Layout, work: Workload, on: Machine, passes: Sequence[int], first_frames: int, keys: int, seen: int
) -> list[float]:
    """The seconds of a chunk's passes: the first is over so many frames that attend `keys` frames, the later ones are
    over the chunk. Heads that see the whole window attend `seen` frames in these."""
    chunk = work.chunk_frames
    alike = Counter(tuple(computed.items()) for computed in _later(work, passes))
    mean = keys if first_frames == chunk else -(-(keys + seen) // 2)  # its own chunk's queries attend all
    first = _slowest(layout, work, on, first_frames, (keys, mean), work.computed(0))
    times = [[len(passes) * seconds for seconds in first]]
    for computed, count in alike.items():
        times.append([count * seconds for seconds in _slowest(layout, work, on, chunk, (keys, seen), dict(computed))])
    return [sum(each) for each in zip(*times, strict=True)]


def _slowest(
    layout: Layout, work: Workload, on: Machine, frames: int, keys: Attended, computed: dict[Kind, int]
) -> Seconds:
    """The seconds of a pass on the rank that takes longest."""
    times = [_pass_times(layout, work, on, rank, frames, keys, computed) for rank in range(layout.ranks)]
    return max(times, key=lambda each: each[0] + each[2])


def _pass_times(
    layout: Layout,
    work: Workload,
    on: Machine,
    rank: int,
    frames: int,
    keys: Attended,
    computed: dict[Kind, int],
    waits: bool = True,
) -> Seconds:
    """The seconds of a pass on one rank, those in which it waits for other ranks' heads included unless `waits` is
    False; `computed` says in how many layers each kind of module runs."""
    tokens = work.batch * frames * coordinates(layout, work, rank)[2][rank]
    share = {kind: count / work.config.num_layers for kind, count in computed.items()}
    attention = share["self"] * attention_flops(layout, work, rank, frames, *keys, waiting=waits) / on.attention
    moved = ELEMENTWISE_PASSES * work.config.dim * work.config.num_layers * tokens * work.itemsize
    flops = work.linear_flops_of(computed)
    skipped = (work.linear_flops - flops) // 2  # weights: each is two FLOPs a token
    weights = work.weights_bytes - skipped * (1 if work.fp8 else work.itemsize)
    products = max(flops * tokens / on.matmul, weights / on.bandwidth)
    if work.fp8:  # dequantized in memory: the 8 bits are read, the matrix is written, scaled, and read by its product
        products += (1 + 3 * work.itemsize) * (work.matrices - skipped) / on.bandwidth
    if work.fp8_activations:  # read, written in 8 bits, and read by the products; a GPU takes the faster of both ways
        moved_inputs = (work.itemsize + 2) * work.linear_inputs * flops / work.linear_flops * tokens
        faster = max(flops * tokens / (on.fp8 * on.matmul), weights / on.bandwidth)
        products = min(products, faster + moved_inputs / on.bandwidth)
    compute = products + share["cross"] * cross_flops(work, tokens) / on.attention + attention + moved / on.bandwidth
    by_kind = {
        kind: computed["self"] * on.latency + share["self"] * elements * work.itemsize / on.link
        for kind, elements in received_in_pass(layout, work, rank, frames).items()
    }
    hidden = 0.0
    if "kv" in by_kind:  # hidden behind attention to cached keys
        hidden = min(by_kind["kv"], attention * max(0, keys[1] - frames) / max(keys[1], 1))
    if "q" in by_kind:  # hidden behind attention with this rank's own queries of the first chunk
        hidden = min(by_kind["q"], attention / layout.sharing * work.chunk_frames / frames)
    communication = sum(by_kind.values())
    return compute, communication, communication - hidden


def _activation_bytes(layout: Layout, work: Workload, rank: int) -> int:
    """An estimate of the peak bytes of a fused pass' activations: the residual with either a feed-forward's hidden
    numbers, or with q, k, v and what a strategy sends and receives."""
    c, frames = work.config, 2 * work.chunk_frames
    tokens = work.batch * frames * tokens_of_ranks(work.grid, layout.ranks)[rank]
    layers = range(work.config.num_layers) if not work.head_rings(layout.ulysses).one else (0,)
    wire = max(sum(received(layout, work, rank, frames, n).values()) for n in layers)
    extra = c.dim * max(3 * c.dim, c.ffn_dim) * work.itemsize if work.fp8 else 0  # a dequantized matrix
    extra += c.ffn_dim * tokens if work.fp8_activations else 0
    return extra + work.itemsize * (2 * c.dim * tokens + max(2 * c.ffn_dim * tokens, 8 * c.dim * tokens + 2 * wire))
