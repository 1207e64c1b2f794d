"""Streams of a small model on any number of ranks, and all that is asked of one number of them at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from causalrope_kernels import PassOperations
from causalrope_sp import Chunk, ConfigError, DiTConfig, LatentGrid, SamplerConfig, StreamConfig
from causalrope_sp.cache.window import SlidingWindow
from causalrope_sp.diffusion.noise import seeded_noise
from causalrope_sp.distributed import SequenceParallel, communicator, strategies
from causalrope_sp.heads import HeadPolicy
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.planning.workload import Workload
from causalrope_sp.sampling.pass_inputs import Part
from causalrope_sp.sampling.stream import CausalStream
from causalrope_sp.sampling.stream_options import Source
from tests.support.streams import run_chunks, strategy_of

CONFIG = DiTConfig(dim=36, ffn_dim=48, num_heads=6, num_layers=2, text_dim=8, text_len=3, freq_dim=16, in_channels=2)
WAYS_TO_TALK = (
    "all_to_all",
    "all_gather",
    "all_gather_into_tensor",
    "all_reduce",
    "broadcast",
    "gather",
    "scatter",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "all_gather_object",
    "gather_object",
    "broadcast_object_list",
    "send",
    "recv",
    "isend",
    "irecv",
    "batch_isend_irecv",
    "barrier",
)
WHOLE = StreamConfig()
HEADS = HeadPolicy(((None, 3, 4, None, 3, 3), (3, None, 3, 0, 4, 3)))  # of the 2 layers of 6 heads
NEAR = replace(HEADS, rows=((1, None, 2, 3, None, 1), (2, 1, None, 1, None, 3)))  # and bands of rows
WORK = Workload(CONFIG, LatentGrid(1, 7), window=6, chunk_frames=2, steps=2, itemsize=8)


def make_model(dtype: torch.dtype = torch.float64, **sizes: int) -> CausalDiT:
    torch.manual_seed(0)
    changed: dict[str, Any] = {**sizes}
    model = CausalDiT(replace(CONFIG, **changed)).double().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(1.5)  # large enough that a token attended too much or too little shows
    return model.to(dtype)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Job:
    """One video; the grids are chosen so that no rank count divides all of them."""

    rows: int
    columns: int
    frames: int
    stream: StreamConfig = WHOLE
    batch: int = 1
    known: int = 0
    redrawn_from: int | None = None
    dtype: torch.dtype = torch.float64
    fuse: bool = True

    @property
    def grid(self) -> LatentGrid:
        return LatentGrid(self.rows, self.columns)

    @property
    def frame(self) -> tuple[int, int, int]:
        return CONFIG.in_channels, self.grid.latent_height, self.grid.latent_width

    def drawing(self, chunk: Chunk) -> Tensor:
        return random(self.batch, self.known + self.frames, *self.frame)[:, chunk.start : chunk.stop]

    def run(self, parallel: SequenceParallel, **sizes: int) -> Tensor:
        chunks = run_chunks(
            make_model(self.dtype, **sizes),
            random(self.batch, CONFIG.text_len, CONFIG.text_dim),
            seeded_noise(0, (self.batch, *self.frame)),
            self.grid,
            self.frames,
            stream=self.stream,
            sampler=SamplerConfig((1000, 500)),
            parallel=parallel,
            initial_latents=random(self.batch, self.known, *self.frame) if self.known else None,
            source=None if self.redrawn_from is None else Source(self.drawing, self.redrawn_from),
            fuse_context_pass=self.fuse,
        )
        return torch.cat([chunk.latents for chunk in chunks], 1)


JOBS = {
    "window and sink, batch 2": Job(1, 7, 11, StreamConfig(5, 1, 2), batch=2),
    "everything": Job(5, 2, 7),
    "context passes alone": Job(2, 4, 7, StreamConfig(4, 1, 3), fuse=False),
    "lone first frame": Job(1, 5, 8, StreamConfig(4, 0, 3, independent_first_frame=True)),
    "initial frames": Job(1, 4, 4, StreamConfig(4, 2, 2), batch=2, known=5),
    "redrawn after an initial frame": Job(2, 4, 6, StreamConfig(4, 1, 2), known=1, redrawn_from=1),
    "relative places": Job(1, 7, 9, StreamConfig(5, 1, 2, rope="relative"), batch=2),
    "int8, similar frames": Job(1, 7, 11, StreamConfig(7, 1, 2, similar_frames=1, cache="int8"), batch=2),
    "fp8, relative": Job(2, 4, 7, StreamConfig(4, 1, 2, rope="relative", cache="fp8"), known=1),
    "one head attends": Job(1, 7, 5, StreamConfig(4, 1, 2, heads=HeadPolicy(((None, 0, 0, 0, 0, 0), (None,) * 6)))),
    "heads and similar frames in int8": Job(
        1, 7, 11, StreamConfig(7, 1, 2, heads=HEADS, similar_frames=1, cache="int8"), batch=2
    ),
    "heads in relative places": Job(4, 2, 9, StreamConfig(6, 1, 2, rope="relative", heads=NEAR, cache="int8")),
    "heads that see alike": Job(1, 7, 9, StreamConfig(7, 1, 2, heads=HeadPolicy(((4,) * 6,) * 2))),
    "heads in a window of the whole video": Job(1, 7, 6, StreamConfig(None, 1, 2, heads=HEADS), fuse=False),
    "hardly any tokens": Job(3, 1, 5, StreamConfig(3, 0, 1)),
    "float32": Job(1, 7, 6, StreamConfig(5, 1, 2), dtype=torch.float32),
    "bfloat16": Job(1, 7, 6, StreamConfig(5, 1, 2), dtype=torch.bfloat16),
}


def runs(ranks: int, strategy: str, name: str) -> bool:
    """Whether a job runs with a strategy on so many ranks. On 5 and 6 of them each takes every other strategy, but for
    those in narrow numbers, which take all."""
    job = JOBS[name]
    turn = list(JOBS).index(name) + strategies(ranks, CONFIG.num_heads).index(strategy)
    return ranks <= job.grid.tokens and (ranks < 5 or job.dtype != torch.float64 or turn % 2 == 0)


def single(job: Job) -> Tensor:
    return job.run(SequenceParallel.single(device="cpu"))


def relative(result: Tensor, expected: Tensor) -> float:
    return ((result.double() - expected.double()).norm() / expected.double().norm()).item()


@contextmanager
def watched_collectives() -> Iterator[list[tuple[str, int]]]:
    """Every collective of this process: its name and the numbers that it brings from other ranks."""
    noted: list[tuple[str, int]] = []

    def watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*args: Any, **options: Any) -> Any:
            arrived = 0
            if name == "all_to_all_single":
                arrived = sum(args[2]) - args[2][args[4].rank()]
            elif name == "all_gather_single":
                arrived = args[0].numel() - args[1].numel()
            noted.append((name, arrived))
            return call(*args, **options)

        return noting

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(communicator, "all_gather_single", watched("all_gather_single", communicator.all_gather_single))
        for name in (*WAYS_TO_TALK, "all_to_all_single"):
            patch.setattr(dist, name, watched(name, getattr(dist, name)))
        yield noted


def count_collectives(group: dist.ProcessGroup, device: str, strategy: str) -> dict[str, dict[str, Any]]:
    """The collectives of each kind of pass, seen from outside and by `CommStats`: (calls, elements, bytes)."""
    grid = WORK.grid
    passes: dict[str, dict[str, Any]] = {}
    parallel = SequenceParallel(group, strategy, device)
    shard = parallel.shard(grid)
    embeds = random(1, CONFIG.text_len, CONFIG.text_dim)
    x = random(1, 2, grid.tokens, CONFIG.token_dim)[:, :, shard.start : shard.stop]
    stream = CausalStream(make_model(), embeds, grid, SlidingWindow(6), shard, strategy_of(parallel, WORK))
    for n in range(3):  # a window three times the chunk, full
        stream.commit(Part(Chunk(n, 2 * n, 2), x, 0.0))
    first, second = Chunk(3, 6, 2), Chunk(4, 8, 2)
    runs = {
        "denoise": lambda: stream.denoise(first, x, 1000.0),
        "fused": lambda: stream.denoise(second, x, 1000.0, Part(first, x, 0.0)),
        "context": lambda: stream.commit(Part(second, x, 0.0)),
        "latents": lambda: parallel.gather_tokens(x, grid),
    }
    with watched_collectives() as noted:
        for name, run in runs.items():
            noted.clear()
            parallel.comm_stats.take()
            run()
            comm_stats = parallel.comm_stats.take()
            by_kind = {kind: (e.calls, e.elements, e.bytes) for kind, e in comm_stats.by_kind().items()}
            layers = {layer for _, layer in comm_stats.entries}
            passes[name] = {"seen": list(noted), "comm_stats": by_kind, "layers": layers}
    passes["cache"] = {"bytes": stream.cache.bytes}
    stream.cancel()
    allocated = []
    for n in range(5, 8):  # each fused pass after the first finds every buffer there
        stream.denoise(Chunk(n, 2 * n, 2), x, 1000.0, Part(Chunk(n - 1, 2 * n - 2, 2), x, 0.0) if n > 5 else None)
        allocated.append(
            {use: room.data_ptr() for e in parallel.communicators.values() for use, room in e.buffers.items()}
        )
    passes["buffers"] = {"allocated": allocated}
    return passes


def received_in_8_bits(group: dist.ProcessGroup, device: str, strategy: str) -> dict[str, Any]:
    """What a pass of a stream in bfloat16 receives, and the bytes of its cache in int8."""
    parallel = SequenceParallel(group, strategy, device)
    shard, embeds = parallel.shard(WORK.grid), random(1, CONFIG.text_len, CONFIG.text_dim).bfloat16()
    x = random(1, 2, WORK.grid.tokens, CONFIG.token_dim)[:, :, shard.start : shard.stop]
    model, own = make_model(torch.bfloat16), strategy_of(parallel, WORK)
    stream = CausalStream(model, embeds, WORK.grid, SlidingWindow(6), shard, own, quantized=torch.int8)
    for n in range(3):  # the window is full
        stream.commit(Part(Chunk(n, 2 * n, 2), x, 0.0))
    parallel.comm_stats.take()
    stream.denoise(Chunk(3, 6, 2), x, 1000.0)
    by_kind = {kind: (e.elements, e.bytes) for kind, e in parallel.comm_stats.take().by_kind().items()}
    return {"received": by_kind, "cache": stream.cache.bytes}


def variants(group: dist.ProcessGroup, device: str, strategy: str) -> list[Tensor]:
    """The same video without overlap, and by head groups, where that changes the way it is made."""
    job = JOBS["window and sink, batch 2"]
    cases: list[dict[str, Any]] = [{"overlap": False}]
    if strategy == "ulysses":
        cases += [{"head_groups": groups} for groups in range(2, CONFIG.num_heads // group.size() + 1)]
    return [job.run(SequenceParallel(group, strategy, device, **case)) for case in cases]


def order_of_events(group: dist.ProcessGroup, device: str, strategy: str) -> list[str]:
    """What one layer of a pass in mid-stream does, in order: sends, waits, attends."""
    events: list[str] = []

    def noting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **options: Any) -> Any:
            events.append(name)
            return call(*args, **options)

        return noted

    groups = 2 if strategy == "ulysses" and group.size() <= CONFIG.num_heads // 2 else 1
    parallel = SequenceParallel(group, strategy, device, head_groups=groups)
    shard, model = parallel.shard(WORK.grid), make_model(num_layers=1)
    stream = CausalStream(
        model,
        random(1, 3, 8),
        WORK.grid,
        SlidingWindow(6),
        shard,
        strategy_of(parallel, replace(WORK, config=model.config)),
    )
    x = random(1, 2, WORK.grid.tokens, CONFIG.token_dim)[:, :, shard.start : shard.stop]
    stream.commit(Part(Chunk(0, 0, 2), x, 0.0))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_to_all", "all_gather"):
            patch.setattr(communicator.Communicator, name, noting("send", getattr(communicator.Communicator, name)))
        patch.setattr(communicator.AsyncHandle, "wait", noting("wait", communicator.AsyncHandle.wait))
        operations = PassOperations.unchecked(x)
        attend, parts = noting("attend", operations.attention), noting("attend", operations.attention_parts)
        noted = replace(operations, attention=attend, attention_parts=parts)
        patch.setattr(stream, "_unchecked", noted)
        patch.setattr(stream, "_operations", lambda _: noted)
        patch.setattr(stream, "_settled", model.settled(operations))  # these attend the text, which is not noted
        stream.denoise(Chunk(1, 2, 2), x, 1000.0)
    return events


def cancelled_in_head_groups(group: dist.ProcessGroup, device: str) -> Tensor:
    """A stream in which a fused chunk is cancelled, in a ring smaller than two chunks, and what is denoised after."""
    parallel = SequenceParallel(group, "ulysses", device, head_groups=2)
    shard = parallel.shard(WORK.grid)
    x = random(4, 1, 2, WORK.grid.tokens, CONFIG.token_dim)[..., shard.start : shard.stop, :]
    embeds = random(1, CONFIG.text_len, CONFIG.text_dim)
    stream = CausalStream(make_model(), embeds, WORK.grid, SlidingWindow(3), shard, strategy_of(parallel, WORK))
    first, second = (Part(Chunk(n, 2 * n, 2), x[n], 0.0) for n in range(2))
    stream.commit(first)
    stream.denoise(Chunk(1, 2, 2), x[1], 1000.0)
    stream.denoise(Chunk(2, 4, 2), x[2], 1000.0, second)
    stream.denoise(Chunk(2, 4, 2), x[3], 500.0)
    stream.cancel()
    return parallel.gather_tokens(stream.denoise(Chunk(2, 4, 1), x[3][:, :1], 1000.0), WORK.grid)


def disagreement(group: dist.ProcessGroup, device: str) -> str:
    parallel = SequenceParallel(group, "gather-kv", device)
    parallel.everyone.agree({"seed": 1, "prompt": "the same"})
    try:
        parallel.everyone.agree({"seed": 1, "prompt": "a" if parallel.rank < parallel.size - 1 else "b"})
    except ConfigError as error:
        return str(error)
    return "nothing"


def refusals(group: dist.ProcessGroup, device: str) -> dict[str, str]:
    """What the sampler says on this rank where the ranks do not fit; nobody may wait for anybody."""
    said = {}
    ranks = group.size()
    for case, strategy, heads, grid in (
        ("more ranks than heads", "ulysses", ranks - 1, LatentGrid(2, 3)),
        ("more ranks than tokens", "gather-kv", 6, LatentGrid(1, ranks - 1)),
        ("a product of other ranks", "ulysses7xshard-kv3", 6, LatentGrid(2, 3)),
    ):
        model = make_model(dim=12 * heads, num_heads=heads)
        embeds = random(1, CONFIG.text_len, CONFIG.text_dim)
        noise = seeded_noise(0, (1, CONFIG.in_channels, grid.latent_height, grid.latent_width))
        try:
            parallel = SequenceParallel(group, strategy, device)
            next(run_chunks(model, embeds, noise, grid, 3, parallel=parallel))
        except ConfigError as error:
            said[case] = str(error)
    return said


def exercise(group: dist.ProcessGroup, device: str) -> list[dict[Any, Any]]:
    """Everything that needs this many ranks, from every rank: starting processes is what costs."""
    torch.set_deterministic_debug_mode("error")  # with the next line: what is never written reads as NaN
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    mine: dict[Any, Any] = {"refusals": refusals(group, device), "disagreement": disagreement(group, device)}
    for strategy in strategies(group.size(), CONFIG.num_heads):
        for name, job in JOBS.items():
            if runs(group.size(), strategy, name):
                mine[strategy, name] = job.run(SequenceParallel(group, strategy, device))
        mine[strategy, "variants"] = variants(group, device, strategy)
        mine[strategy, "events"] = order_of_events(group, device, strategy)
        mine[strategy, "collectives"] = count_collectives(group, device, strategy)
        mine[strategy, "in 8 bits"] = received_in_8_bits(group, device, strategy)
    if group.size() <= CONFIG.num_heads // 2:
        mine["cancelled"] = cancelled_in_head_groups(group, device)
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, mine)
    return everyone
