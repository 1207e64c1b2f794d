"""Attention on similar frames: a dense run with the same mask, on any ranks, and no choice at all frames."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from causalrope_kernels import PassOperations, Source
from causalrope_sp import Chunk, ConfigError, SamplerConfig, SequenceParallel, StreamConfig
from causalrope_sp.attention import base
from causalrope_sp.cache.layer_cache import LayerCache
from causalrope_sp.cache.window import SlidingWindow
from causalrope_sp.distributed import strategies
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.distributed.layout import parse_strategy
from causalrope_sp.grid import split_into_chunks
from causalrope_sp.heads import HeadPolicy
from causalrope_sp.planning.counts import attention_flops, chunk_flops, received_means
from causalrope_sp.planning.workload import Workload
from causalrope_sp.sampling.similarity_schedule import top_frames
from causalrope_sp.sampling.steered_loop import SteeredLoop
from causalrope_sp.sampling.stream_options import StreamOptions
from tests.support.list_session import SAMPLER
from tests.support.steered_runs import GRID, NOISE, TEXTS
from tests.support.strategy_runs import CONFIG, HEADS, Job, make_model, relative, single

TOP = 2
PLAIN = Job(1, 7, 17, StreamConfig(8, 1, 2), batch=2)
JOBS = {
    "window and sink, batch 2": PLAIN,
    "windows of heads": replace(PLAIN, stream=replace(PLAIN.stream, heads=HEADS)),
    "windows of heads, relative": replace(PLAIN, stream=replace(PLAIN.stream, rope="relative", heads=HEADS), batch=1),
    "the whole video": replace(PLAIN, stream=StreamConfig(None, 1, 2), frames=10),
    "context passes alone": replace(PLAIN, fuse=False),
    "initial frames": Job(1, 5, 10, StreamConfig(9, 2, 2), known=5),
    "Light Forcing's schedule": replace(PLAIN, stream=replace(PLAIN.stream, similar_frames=0.4)),
}


def choosing(job: Job) -> Job:
    stream = job.stream
    return job if stream.similar_frames else replace(job, stream=replace(stream, similar_frames=TOP))


class MaskedDense:
    """Attends with an explicit mask over all frames of the window, which it chooses by the means of rotated queries and
    keys as they are attended. Heads with a window of their own are masked by that."""

    def __init__(self, sink: int, heads: HeadPolicy | None) -> None:
        self.sink = sink
        self.windows = heads and heads.windows
        self.chosen: dict[tuple[int, Chunk], list[set[int]]] = {}  # by layer and chunk, the frames of each head
        self.keys: dict[tuple[int, int], Tensor] = {}  # by layer and frame: the mean of its clean keys
        self.masked = 0

    def attend(self, source: Source, cache: LayerCache, chunk: Chunk, operations: PassOperations, *rest: Any) -> Tensor:
        q = base.write_chunk(source, cache, chunk, operations, *rest)
        ((keys,), window) = cache.keys(chunk), cache._cache.window  # type: ignore[attr-defined]
        held = sorted((frame, slot) for slot, frame in window.held(chunk.stop).items())
        tokens, heads, layer = q.shape[2], q.shape[3], cache.index
        k, v = (
            torch.stack([x[:, slot * tokens : (slot + 1) * tokens] for _, slot in held], 1) for x in (keys.k, keys.v)
        )
        context = cache._cache.open_chunk != chunk  # type: ignore[attr-defined]
        mask = torch.ones(heads, len(held), dtype=torch.bool)
        if (layer, chunk) in self.chosen:
            mask = torch.tensor([[frame in of_head for frame, _ in held] for of_head in self.chosen[layer, chunk]])
            self.masked += int((~mask).sum())
        elif not context:  # the first pass
            free = [f for f, _ in held if self.sink <= f < chunk.start - 1]
            self.chosen[layer, chunk] = self.choose(q.mean((1, 2)), layer, [frame for frame, _ in held], free)
        if context:
            self.keys |= {(layer, frame): k[:, n].mean(1) for n, (frame, _) in enumerate(held) if frame >= chunk.start}
        others = [frame for frame, _ in held if frame >= self.sink]
        for head, window in enumerate(self.windows[layer] if self.windows else ()):
            if window is not None:
                newest = others[max(0, len(others) - window + self.sink) :]
                mask[head] = torch.tensor([window > 0 and (frame < self.sink or frame in newest) for frame, _ in held])
        wide = mask.view(1, heads, 1, -1, 1).expand(-1, -1, -1, -1, tokens).flatten(3)
        q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
        attended = scaled_dot_product_attention(q, k, v, wide).nan_to_num(0)  # of heads that attend nothing
        return attended.transpose(1, 2).unflatten(1, (chunk.frames, tokens))

    def choose(self, q_BHD: Tensor, layer: int, held: list[int], free: list[int]) -> list[set[int]]:
        if len(free) <= TOP:
            return [set(held)] * q_BHD.shape[1]
        found = []
        for head in range(q_BHD.shape[1]):
            scores = {f: float((q_BHD[:, head] * self.keys[layer, f][:, head]).sum()) for f in free}
            best = sorted(free, key=scores.__getitem__)[-TOP:]
            found.append({f for f in held if f not in free or f in best})
        return found


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    return {name: single(choosing(job)) for name, job in JOBS.items()}


@pytest.mark.parametrize("name", ["window and sink, batch 2", "windows of heads", "the whole video"])
def test_it_is_a_dense_run_with_the_same_mask(
    alone: dict[str, Tensor], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = JOBS[name]
    plain, masked = single(job), MaskedDense(1, job.stream.heads)
    monkeypatch.setattr(base, "attend_chunk", masked.attend)
    dense = replace(job, stream=replace(job.stream, heads=None))
    assert relative(alone[name], single(dense)) < 1e-12
    assert masked.masked > 50
    assert relative(alone[name], plain) > 1e-3


@pytest.mark.parametrize("similar", [5, 100])
@pytest.mark.parametrize("name", ["window and sink, batch 2", "windows of heads"])
def test_all_frames_are_no_choice_bit_for_bit(name: str, similar: int) -> None:
    """A window of 8 with a sink, the newest frame and a chunk of 2 leaves 4 to choose from."""
    job = JOBS[name]
    assert torch.equal(single(replace(job, stream=replace(job.stream, similar_frames=similar))), single(job))


def test_heads_that_see_the_whole_window_choose(alone: dict[str, Tensor]) -> None:
    """However it is said that they do; where none does, nothing is chosen."""

    def with_whole(window: int) -> Job:
        windows = tuple(tuple(window if w is None else w for w in layer) for layer in HEADS.windows)
        return replace(PLAIN, stream=replace(PLAIN.stream, heads=HeadPolicy(windows)))

    assert torch.equal(single(choosing(with_whole(9))), alone["windows of heads"])
    assert torch.equal(single(choosing(with_whole(4))), single(with_whole(4)))


def test_context_passes_may_run_by_themselves(alone: dict[str, Tensor]) -> None:
    assert relative(alone["context passes alone"], alone["window and sink, batch 2"]) < 1e-12


@pytest.mark.parametrize("heads", [None, HEADS])
def test_positions_in_the_window_choose_as_global_ones_do_without_a_sink(heads: HeadPolicy | None) -> None:
    stream = StreamConfig(8, 0, 2, similar_frames=TOP, heads=heads)
    made = [single(replace(PLAIN, stream=replace(stream, rope=rope))) for rope in ("absolute", "relative")]
    assert relative(*made) < 1e-12


WORK = Workload.of(CONFIG, PLAIN.grid, choosing(PLAIN).stream, SamplerConfig((1000, 500)), 8, batch=2, itemsize=8)


@pytest.mark.parametrize("heads", [None, HEADS])
def test_the_cost_model_counts_the_keys(heads: HeadPolicy | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the last chunk, whose window is full: its passes, and the context pass that its first one shares."""
    job = choosing(replace(PLAIN, frames=18, stream=replace(PLAIN.stream, heads=heads)))
    work = replace(WORK, heads=heads)
    pairs: dict[Chunk, list[int]] = {}
    write = base.write_chunk

    def counted(source: Source, cache: LayerCache, chunk: Chunk, *rest: Any) -> Tensor:
        of_heads = [own for keys in cache.keys(chunk) for own in keys.by_rows]
        read = sum(keys.k.shape[2] * sum(b - a for a, b in keys.rows) for keys in of_heads)
        if cache.index == 0:
            pairs.setdefault(chunk, []).append(0)
        pairs[chunk][-1] += chunk.frames * PLAIN.grid.tokens * read
        return write(source, cache, chunk, *rest)

    monkeypatch.setattr(base, "write_chunk", counted)
    single(job)
    chunks = sorted(pairs, key=lambda chunk: chunk.start)
    found = sum(pairs[chunks[-1]]) + pairs[chunks[-2]][-1]
    alone = parse_strategy("ulysses", 1)
    dense = replace(work, similar=None)
    saved = chunk_flops(alone, dense, 0) - chunk_flops(alone, work, 0)
    whole = attention_flops(alone, dense, 0, 2, 8) * (work.steps + 1)
    assert 4 * 2 * CONFIG.head_dim * found == whole - saved


def on_ranks(group: dist.ProcessGroup, device: str, strategy: str) -> list[Any]:
    """Every job, and how many all-gathers of means one of them makes, from every rank."""
    parallel, made = SequenceParallel(group, strategy, device), dict[Any, Any]()
    for name, job in JOBS.items():
        if group.size() <= job.grid.tokens:
            parallel.comm_stats.take()
            made[name] = choosing(job).run(parallel)
            means = parallel.comm_stats.take().by_kind()["means"]
            made[name, "means"] = means.calls, means.elements
    parallel.comm_stats.take()
    PLAIN.run(parallel)
    made["off"] = "means" in parallel.comm_stats.take().by_kind()
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, made)
    return everyone


EVERY = [(ranks, strategy) for ranks in (2, 3, 4, 5) for strategy in strategies(ranks, CONFIG.num_heads)]


@pytest.mark.parametrize(("ranks", "strategy"), EVERY)
def test_many_ranks_choose_as_one(pool: RankPool, alone: dict[str, Tensor], ranks: int, strategy: str) -> None:
    for made in pool.run(on_ranks, ranks, strategy):
        for name, job in JOBS.items():
            assert relative(made[name], alone[name]) < 1e-12, name
            chunks = list(split_into_chunks(job.frames, 2, independent_first_frame=False))
            assert made[name, "means"][0] == len(chunks), "one exchange a chunk"
        for name, heads in (("window and sink, batch 2", None), ("windows of heads", HEADS)):
            steady = received_means(replace(WORK, heads=heads), ranks)  # of queries of two frames and keys of two
            assert made[name, "means"][1] == steady * (17 + 16) // 4
        assert not made["off"]


STEERED = StreamConfig(8, 1, 2, similar_frames=TOP, heads=HEADS)


def open_loop(**options: Any) -> SteeredLoop:
    of_stream = StreamOptions(stream=STEERED, sampler=SAMPLER, history=4, kept_chunks=4, **options)
    return SteeredLoop(make_model(), TEXTS[0], NOISE, GRID, None, SequenceParallel.single(device="cpu"), of_stream)


@pytest.fixture(scope="module")
def steps() -> list[Tensor]:
    with torch.inference_mode():
        loop = open_loop()
        return [loop.step().latents for _ in range(8)]


@torch.inference_mode()
def test_chunks_taken_back_are_made_as_before(steps: list[Tensor]) -> None:
    """Also where a fork went on in between, which chooses by itself."""
    loop = open_loop()
    for expected in steps[:6]:
        assert torch.equal(loop.step().latents, expected)
    fork = loop.fork()
    assert loop.rewind(3, TEXTS[0])
    fork.set_text([TEXTS[1]], recache=False, recache_sink=False, new_shot=False)
    assert not torch.equal(fork.step().latents, steps[6])
    for expected in steps[3:]:
        assert torch.equal(loop.step().latents, expected)


@torch.inference_mode()
def test_a_cancelled_chunk_leaves_no_choice(steps: list[Tensor]) -> None:
    fails = [5]  # the chunk that fails once, in its second step

    def on_step(chunk: Chunk, step: int, timestep: float) -> None:
        if chunk.index in fails and step == 1:
            fails.remove(chunk.index)
            raise KeyError("cut short")

    loop = open_loop(on_step=on_step)
    for number, expected in enumerate(steps):
        if number == 5:
            with pytest.raises(KeyError):
                loop.step()
        assert torch.equal(loop.step().latents, expected)


@torch.inference_mode()
def test_a_window_computed_anew_is_attended_whole_until_it_is_known() -> None:
    loop = open_loop()
    for _ in range(5):
        loop.step()
    loop.set_text([TEXTS[1]], recache=True, recache_sink=True, new_shot=False)
    similar = loop.branches.branches[0].stream._similar
    assert similar is not None
    assert not similar._choices
    made = [loop.step().latents for _ in range(3)]
    assert all(chunk.isfinite().all() for chunk in made)
    assert similar._choices, "the frames that were computed anew are chosen from"


def test_light_forcing_leaves_out_a_share_of_the_keys_and_less_of_early_chunks() -> None:
    """Over the chunks after the first the shares add up to what was asked, up to whole frames."""
    chunks, window = [Chunk(n, 3 * n, 3) for n in range(40)], SlidingWindow(21, 1)
    for share in (0.3, 0.5, 0.6):
        top = top_frames(share, 1, window, chunks)
        held = [len(window.held(chunk.stop)) for chunk in chunks]
        attended = [min(top(chunk) + 5, all_of) for chunk, all_of in zip(chunks, held, strict=True)]
        assert attended[0] == held[0]
        left_out = [1 - own / all_of for own, all_of in zip(attended, held, strict=True)]
        assert left_out[-1] > left_out[8] > left_out[2]
        assert 1 - sum(attended[1:]) / sum(held[1:]) == pytest.approx(share, abs=0.03)
    assert top_frames(4, 1, window, chunks)(chunks[9]) == 4


@pytest.mark.parametrize("wrong", [-1, 1.5, math.nan, "4", True])
def test_wrong_numbers_are_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="similar_frames must be"):
        StreamConfig(8, 1, 2, similar_frames=wrong)


def test_a_window_that_is_always_new_has_nothing_to_choose() -> None:
    with pytest.raises(ConfigError, match="similar_frames must be None with window_policy recomputed"):
        StreamConfig(8, 1, 2, window_policy="recomputed", similar_frames=4)
