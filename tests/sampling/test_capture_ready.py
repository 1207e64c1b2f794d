"""What can be known of CUDA graphs without a GPU: later passes of a kind ask for the same launches on the same memory,
allocate nothing that outlives them, copy nothing from the host, and ask the device nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store  # type: ignore[attr-defined]
from torch.testing._internal.distributed import fake_pg  # noqa: F401  # it registers the backend

from causalrope_sp import CausalDiT, SequenceParallel
from causalrope_sp.attention.base import Strategy
from causalrope_sp.attention.build import build_strategy
from causalrope_sp.cache.window import SlidingWindow
from causalrope_sp.distributed.communicator import Communicator
from causalrope_sp.distributed.layout import parse_strategy
from causalrope_sp.grid import Chunk, LatentGrid, Shard
from causalrope_sp.heads import HeadPolicy
from causalrope_sp.heads.near_rows import bands_of
from causalrope_sp.heads.rings import HeadRings
from causalrope_sp.reuse.policy import ReusePlan, ReusePolicy
from causalrope_sp.sampling.pass_inputs import Part
from causalrope_sp.sampling.similar_frames import SimilarFrames
from causalrope_sp.sampling.stream import CausalStream
from causalrope_sp.weights.fp8 import quantize_blocks
from tests.support.launch_recorder import RecordedPasses, as_on_a_gpu
from tests.support.reuse_cases import CONFIG, MIXED, SHARED, make_model, random

FRAMES, CHUNKS = 2, 8
GRID = LatentGrid(7, 1)  # seven tokens are even nowhere
HEADS = HeadPolicy(((None, 5, 5, None, 5, 5), (5, None, 5, 0, 5, None)))
NEAR = replace(HEADS, rows=((1, None, 1, None, None, 1), (1, 1, 1, None, 1, 1)))
TIMESTEPS = (1000.0, 900.0, 800.0, 700.0, 600.0, 500.0)


@dataclass(frozen=True)
class Case:
    """A stream, and how many kinds of passes were recorded at least twice."""

    kinds: int
    strategy: str = "alone"
    ranks: int = 1
    attention: str = "auto"
    window: int = 6
    sink: int = 0
    relative: bool = False
    fp8: bool = False
    reuse: ReusePolicy | None = None
    head_groups: int = 1
    guided: bool = False
    fused: bool = True
    similar: int | None = None
    heads: HeadPolicy | None = None
    dtype: torch.dtype = torch.bfloat16


CASES = {
    "rows on the host": Case(3),
    "rows on the device": Case(2, attention="triton"),
    "a library's attention": Case(3, attention="torch", dtype=torch.float32),
    "relative": Case(2, relative=True),
    "relative in float32": Case(2, relative=True, dtype=torch.float32),
    "sink": Case(2, attention="triton", window=7, sink=1),
    "fp8": Case(2, attention="triton", fp8=True),
    "guided": Case(4, attention="triton", guided=True),
    "mixed reuse": Case(6, attention="triton", reuse=MIXED),
    "shared reuse": Case(4, attention="triton", reuse=SHARED),
    "ulysses": Case(2, "ulysses", 2, "triton"),
    "ulysses in head groups": Case(2, "ulysses", 2, "triton", head_groups=3),
    "shard-kv": Case(2, "shard-kv", 2, "triton"),
    "shard-kv, a library's attention": Case(3, "shard-kv", 2, "torch", dtype=torch.float32),
    "context passes alone": Case(1, attention="triton", fused=False),
    "gather-kv, a library's attention": Case(4, "gather-kv", 2, "torch", dtype=torch.float32),
    "gather-kv": Case(2, "gather-kv", 2, "triton"),
    "gather-kv, relative": Case(2, "gather-kv", 2, relative=True),
    "ulysses×gather-kv": Case(2, "ulysses2xgather-kv2", 4, "triton"),
    "ulysses×shard-kv": Case(2, "ulysses2xshard-kv2", 4, "triton"),
    "heads": Case(2, attention="triton", window=8, sink=1, heads=HEADS),
    "heads, relative": Case(2, attention="triton", window=8, sink=1, relative=True, heads=HEADS),
    "heads, gather-kv": Case(2, "gather-kv", 2, "triton", window=8, sink=1, heads=NEAR),
    "heads, shard-kv": Case(2, "shard-kv", 2, "triton", window=8, sink=1, heads=NEAR),
    "heads, ulysses": Case(2, "ulysses", 2, "triton", window=8, sink=1, heads=HEADS),
    "heads, a library's attention": Case(4, attention="torch", window=8, sink=1, heads=NEAR, dtype=torch.float32),
    "reuse on ranks": Case(4, "ulysses", 2, "triton", reuse=SHARED),
    "similar frames": Case(3, attention="triton", similar=2),
    "similar frames, the first pass by a library": Case(3, similar=2),
    "similar frames, gather-kv": Case(3, "gather-kv", 2, "triton", similar=2),
    "similar frames, ulysses, relative": Case(3, "ulysses", 2, relative=True, similar=2),
    "heads and similar frames": Case(4, attention="triton", window=8, sink=1, heads=HEADS, similar=2),
    "heads and similar frames, by a library": Case(4, window=8, sink=1, heads=HEADS, similar=2),
    "heads and similar frames, gather-kv": Case(3, "gather-kv", 2, "triton", window=8, sink=1, heads=HEADS, similar=2),
}


class EveryoneIsHere(Store):
    """A store in which all ranks are found to have come."""

    def add(self, key: str, amount: int) -> int:
        return 1

    def set(self, key: str, value: Any) -> None:
        pass

    def wait(self, keys: list[str], timeout: Any = None) -> None:
        pass


@pytest.fixture
def ranks() -> Iterator[Any]:
    """Makes the group of a rank whose collectives are recorded and do nothing."""

    store = EveryoneIsHere()  # torch keeps no reference to the Python object

    def make(count: int, case: Case) -> SequenceParallel:
        dist.init_process_group("fake", rank=0, world_size=count, store=store)
        membership: Any = SimpleNamespace(board=None, cause=lambda: None)
        return SequenceParallel(
            dist.group.WORLD,
            case.strategy,
            attention=case.attention,
            head_groups=case.head_groups,
            membership=membership,
        )

    yield make
    if dist.is_initialized():
        dist.destroy_process_group()


def model_of(case: Case) -> CausalDiT:
    model = make_model(case.dtype)
    if case.fp8:
        quantize_blocks(model)
        for name, parameter in model.named_parameters():
            if name.endswith((".numbers", ".scale")):
                parameter.data = torch.ones_like(parameter, dtype=torch.float32).to(parameter.dtype)
    return model


def open_stream(case: Case, ranks: Any, model: CausalDiT) -> tuple[list[CausalStream], RecordedPasses, Tensor]:
    """The streams of both branches or of one, what records their passes, and the tokens of a chunk."""
    shard, strategy, sharing = Shard(GRID), Strategy(GRID.tokens, CONFIG.num_heads, case.attention), None
    sizes = CONFIG.num_layers, CONFIG.num_heads
    if case.heads is not None:
        rings = HeadRings.of(case.heads, *sizes, 1, case.window, case.sink, FRAMES, frame_rows=GRID.rows)
        strategy = Strategy(GRID.tokens, CONFIG.num_heads, case.attention, rings.placements)
        whole = 0, GRID.tokens
        bands = tuple(None if n is None else bands_of(GRID, n, whole, whole) for n in rings.rows)
        strategy.cached = rings.cached(0, from_model=True, bands=(bands,))
    if case.ranks > 1:
        parallel: SequenceParallel = ranks(case.ranks, case)
        layout = parse_strategy(case.strategy, case.ranks)
        rings = HeadRings.of(case.heads, *sizes, layout.ulysses, case.window, case.sink, FRAMES, frame_rows=GRID.rows)
        strategy, shard = build_strategy(parallel, layout, GRID, rings), parallel.shard(GRID)
        sharing = parallel.sp_communicator()
    passes = RecordedPasses(sharing)
    plan = None if case.reuse is None else ReusePlan.of_causal(case.reuse, TIMESTEPS, CONFIG.num_layers)
    embeds = random(1, CONFIG.text_len, CONFIG.text_dim)
    graphs: Any = passes
    streams = [
        CausalStream(
            model, embeds, GRID, SlidingWindow(case.window, case.sink), shard, strategy,
            relative=case.relative, reuse=plan, graphs=graphs, similar=similar_of(case, sharing),
        )
        for _ in range(1 + case.guided)
    ]  # fmt: skip
    return streams, passes, random(1, FRAMES, shard.tokens, CONFIG.token_dim).float()


def similar_of(case: Case, sharing: Communicator | None) -> SimilarFrames | None:
    if case.similar is None:
        return None
    top, heads = case.similar, (tuple(range(CONFIG.num_heads)),) * CONFIG.num_layers
    return SimilarFrames(
        lambda chunk: top,
        CONFIG,
        sink=case.sink,
        relative=case.relative,
        heads=heads if case.heads is None else case.heads.whole(case.window),
        kept=12,
        communicator=sharing,
    )


@torch.inference_mode()
def make_passes(streams: list[CausalStream], x: Tensor, fused: bool) -> None:
    """Chunks whose window fills, and then slides around the ring."""
    finished = None
    for chunk in (Chunk(number, number * FRAMES, FRAMES) for number in range(CHUNKS)):
        for timestep in TIMESTEPS:
            for stream in streams:
                stream.denoise(chunk, x, timestep, finished)
            finished = None
        finished = Part(chunk, x, 0.0)
        if not fused:
            streams[0].commit(finished)
            finished = None


def launches_of_lists(record: list[Any]) -> int:
    """Returns how many launches of a pass have bounds by head, (H, N, 2)."""
    launches = [event[2] for event in record if event[0] == "attention_kernel"]
    return sum(len(shape) == 3 for (_, _, shape, *_) in (tensors[5] for tensors in launches))


@pytest.mark.parametrize("name", CASES)
def test_later_passes_of_a_kind_are_the_same_launches(name: str, ranks: Any) -> None:
    case = CASES[name]
    with as_on_a_gpu():
        streams, passes, x = open_stream(case, ranks, model_of(case))
        make_passes(streams, x, case.fused)
    recorded = passes.check()
    assert sum(count > 1 for count in recorded) == case.kinds
    names = {event[0] for records in passes.records.values() for record in records for event in record}
    assert {"projection_kernel", "add_norm_kernel"} <= names or case.ranks > 1
    assert ("attention_kernel" in names) == (case.attention != "torch")
    assert any(each.startswith("c10d::") for each in names) == (case.ranks > 1)
    assert not passes.refused
    sides = 2 if case.strategy == "gather-kv" else 1  # of a pass, whose frames are split in two
    of_heads = {launches_of_lists(record) for records in passes.records.values() for record in records}
    assert of_heads == ({0} if case.similar is None else {0, sides * CONFIG.num_layers}), "one a layer, not one a head"


def test_a_pass_that_cannot_be_captured_is_refused_by_name() -> None:
    case = Case(0, attention="triton", window=FRAMES)
    with as_on_a_gpu():
        streams, passes, x = open_stream(case, None, model_of(case))
        make_passes(streams, x, case.fused)
    (why,) = passes.refused
    assert "overwrites the frames of the chunk before it" in why
    assert sum(passes.check()) == (CHUNKS - 1) * (len(TIMESTEPS) - 1) - 1, "passes without a context pass are recorded"


def test_a_choice_that_is_read_on_the_host_is_refused_by_name() -> None:
    case = Case(0, attention="torch", similar=2, dtype=torch.float32)
    with as_on_a_gpu():
        streams, passes, x = open_stream(case, None, model_of(case))
        make_passes(streams, x, case.fused)
    (why,) = passes.refused
    assert "reads on the host which frames are similar" in why
