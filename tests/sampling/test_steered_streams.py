"""Streams whose text changes, that are taken back, forked and cancelled, against plain lists that recompute all."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from causalrope_sp import ConfigError, KVCache, SamplerConfig, SequenceParallel, StreamConfig
from causalrope_sp.attention.base import Strategy
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.sampling.steered_loop import SteeredLoop
from causalrope_sp.sampling.stream_options import StreamOptions
from tests.support.list_session import SAMPLER, ListSession
from tests.support.sampler_cases import CONFIG, GRID, MODEL, noise_of, relative
from tests.support.saved_loops import resume_loop, save_loop
from tests.support.steered_runs import SCRIPTS, STREAMS, by_lists, by_loop, on_ranks

TEXTS = [
    torch.randn(1, CONFIG.text_len, CONFIG.text_dim, generator=torch.Generator().manual_seed(n)).double()
    for n in range(3)
]


@st.composite
def windows(draw: st.DrawFn) -> StreamConfig:
    chunk, sink = draw(st.integers(1, 3)), draw(st.integers(0, 2))
    window = draw(st.integers(chunk + sink, chunk + sink + 4))
    rope: Any = draw(st.sampled_from(["absolute", "relative"]))
    policy: Any = draw(st.sampled_from(["sliding", "recomputed"]))
    return StreamConfig(window, sink, chunk, draw(st.booleans()), rope, policy)


def draws(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CONTROLLED = MODEL.with_control(2)
CONTROLLED.patch_embedding.weight.copy_(draws(4, *CONTROLLED.patch_embedding.weight.shape))
CONTROL = draws(5, 1, 60, 2, GRID.latent_height, GRID.latent_width)


def open_loop(stream: StreamConfig, controlled: bool = False, **options: Any) -> SteeredLoop:
    control = (lambda chunk: CONTROL[:, chunk.start : chunk.stop]) if controlled else None
    every = StreamOptions(stream=stream, sampler=SAMPLER, control=control, **options)
    model, single = CONTROLLED if controlled else MODEL, SequenceParallel.single(device="cpu")
    return SteeredLoop(model, TEXTS[0], noise_of(1), GRID, None, single, every)


def lists(stream: StreamConfig, controlled: bool = False) -> ListSession:
    model, control = (CONTROLLED, CONTROL) if controlled else (MODEL, None)
    return ListSession(model, TEXTS, noise_of(1), GRID, stream, control)


@given(windows(), st.integers(0, 3), st.booleans(), st.data())
@settings(deadline=None, max_examples=40)
@torch.inference_mode()
def test_any_operations_give_what_lists_give(
    tmp_path_factory: pytest.TempPathFactory, stream: StreamConfig, history: int, controlled: bool, data: st.DataObject
) -> None:
    pairs = [(open_loop(stream, controlled, history=history, kept_chunks=9), lists(stream, controlled))]
    file = tmp_path_factory.getbasetemp() / "loop.safetensors"
    for _ in range(data.draw(st.integers(3, 12))):
        number = data.draw(st.integers(0, len(pairs) - 1))
        loop, expected = pairs[number]
        match data.draw(st.sampled_from(["step", "step", "step", "text", "rewind", "fork", "save"])):
            case "step":
                assert relative(loop.step().latents, expected.step()) < 1e-11
            case "text":
                flags = data.draw(st.tuples(st.integers(0, 2), st.booleans(), st.booleans(), st.booleans()))
                text, recache, recache_sink, new_shot = flags
                loop.set_text([TEXTS[text]], recache=recache, recache_sink=recache_sink, new_shot=new_shot)
                expected.set_text(text, recache, recache_sink, new_shot)
            case "rewind" if expected.chunks:
                chunks = data.draw(st.integers(1, len(expected.chunks)))
                held = expected.before[-chunks]
                exact = loop.rewind(chunks, TEXTS[held.text_made])
                expected.rewind(chunks, exact)
                assert loop.chunks_made == len(expected.chunks)
            case "save" if expected.chunks:
                cache = data.draw(st.booleans())
                save_loop(file, loop, TEXTS[expected.text], None, cache=cache)
                pairs[number] = resume_loop(file, loop.model, noise_of(1), GRID, loop.parallel, loop.options), expected
                if not cache:
                    expected.recompute(True)
                    expected.made = expected.copy()
            case "fork" if len(pairs) < 3:
                pairs.append((loop.fork(), expected.copy()))
        for each, _ in pairs:
            each.branches.branches[0].stream.cache.check_integrity()
    for loop, expected in pairs:
        assert relative(loop.step().latents, expected.step()) < 1e-11


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_ranks_give_what_lists_give(pool: RankPool, expected: dict[tuple[str, str], list[Tensor]], ranks: int) -> None:
    if ranks == 1:
        parallel = SequenceParallel.single(device="cpu")
        found = [{("one", *case): by_loop(parallel, *case) for case in expected}]
    else:
        found = pool.run(on_ranks, ranks)
    for results in found:
        for (strategy, stream, script), chunks in results.items():
            for chunk, wanted in zip(chunks, expected[stream, script], strict=True):
                assert relative(chunk, wanted) < 1e-11, (strategy, stream, script)


@pytest.fixture(scope="module")
def expected() -> dict[tuple[str, str], list[Tensor]]:
    return {(stream, script): by_lists(stream, script) for stream in STREAMS for script in SCRIPTS}


@pytest.mark.parametrize("rope", ["absolute", "relative"])
@torch.inference_mode()
def test_what_is_taken_back_within_the_history_comes_again_bit_for_bit(rope: Any) -> None:
    loop = open_loop(StreamConfig(6, 1, 2, rope=rope), history=3)
    first = [loop.step().latents for _ in range(7)]
    assert loop.rewind(3, TEXTS[0])
    assert all(torch.equal(loop.step().latents, chunk) for chunk in first[4:])
    loop.rewind(2, TEXTS[0])
    loop.step()
    assert not loop.rewind(5, TEXTS[0]), "the history is spent, the window is computed anew"


def address(cache: KVCache) -> int:
    return cache.rings[0].storage[0].numbers_2BKSHD.data_ptr()


@torch.inference_mode()
def test_a_fork_and_its_origin_do_not_disturb_each_other() -> None:
    stream = StreamConfig(6, 1, 2)
    undisturbed, loop = open_loop(stream, history=2), open_loop(stream, history=2)
    for _ in range(4):
        undisturbed.step(), loop.step()
    cache = loop.branches.branches[0].stream.cache
    fork = loop.fork(noise_of(1, seed=9))
    other = fork.branches.branches[0].stream.cache
    assert address(other) == address(cache), "shared until one writes"
    forked, mine = [fork.step().latents for _ in range(3)], [loop.step().latents for _ in range(3)]
    assert address(other) != address(cache)
    assert all(torch.equal(chunk, undisturbed.step().latents) for chunk in mine)
    again = open_loop(stream)
    for _ in range(4):
        again.step()
    again = again.fork(noise_of(1, seed=9))
    assert all(torch.equal(chunk, again.step().latents) for chunk in forked)
    fork.rewind(2, TEXTS[0])
    assert torch.equal(fork.step().latents, forked[1])
    assert torch.equal(loop.step().latents, undisturbed.step().latents)


class Stop(BaseException):
    """What a user's interruption raises."""


@pytest.mark.parametrize(("guided", "forward"), [(False, 1), (False, 2), (True, 1), (True, 2), (True, 3), (True, 4)])
@torch.inference_mode()
def test_a_chunk_that_is_cut_short_comes_again_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, guided: bool, forward: int
) -> None:
    """Cut short in the middle of a forward, with the context pass of the chunk before in the same forward or not."""
    sampler = SamplerConfig((1000, 500), guidance_scale=2.0 if guided else 1.0)
    options = StreamOptions(StreamConfig(6, 1, 2), sampler, negative_embeds=TEXTS[2] if guided else None)
    single = SequenceParallel.single(device="cpu")
    undisturbed, loop = (SteeredLoop(MODEL, TEXTS[0], noise_of(1), GRID, None, single, options) for _ in range(2))

    def interrupt(calls: itertools.count[int]) -> Any:
        def attend(strategy: Strategy, *arguments: Any) -> Tensor:
            if next(calls) == CONFIG.num_layers * forward:  # the last layer of that forward
                raise Stop
            return whole(strategy, *arguments)

        return attend

    whole = Strategy.attend
    for chunk in range(6):
        if chunk in (0, 1, 4):
            with monkeypatch.context() as patch:
                patch.setattr(Strategy, "attend", interrupt(itertools.count(1)))
                with pytest.raises(Stop):
                    loop.step()
        assert torch.equal(loop.step().latents, undisturbed.step().latents)


@torch.inference_mode()
def test_a_chunk_that_is_cut_short_under_a_new_text_comes_again_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chunk before it was written under the old text and is not written again under the new one."""
    undisturbed, loop = (open_loop(StreamConfig(6, 1, 2)) for _ in range(2))
    for each in (undisturbed, loop):
        for _ in range(4):
            each.step()
        each.set_text([TEXTS[1]], recache=False)

    def interrupt(*_: Any) -> Tensor:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(Strategy, "attend", interrupt)
        with pytest.raises(Stop):
            loop.step()
    assert all(torch.equal(loop.step().latents, undisturbed.step().latents) for _ in range(3))


def test_a_stream_without_latents_cannot_be_taken_back() -> None:
    loop = open_loop(StreamConfig(4, 0, 2))
    with torch.inference_mode():
        for _ in range(6):
            loop.step()
        with pytest.raises(ConfigError, match="cannot rewind to chunk 1: its latents are not kept any more"):
            loop.rewind(5, TEXTS[0])
