"""Whoever decodes, and whenever, the frames are those of one rank that decodes in line."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from causalrope_sp import CausalRopeError, CausalVideoPipeline, ConfigError, SequenceParallel
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.pipeline.prefetch import OnDemand, Prefetch
from tests.support.videos import video_of

PROMPT = "a large red circle slides right"
FRAMES = 30
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    video = video_of(CausalVideoPipeline.from_pretrained("toybox"), PROMPT, num_frames=FRAMES, seed=3)
    assert video is not None
    return video


def make(group: Any, device: str, decoders: int, decode: Any, given: dict[str, Any], stop: int) -> Any:
    """Two videos, one after the other; with `stop` the first is left after so many chunks."""
    torch.use_deterministic_algorithms(True)
    parallel = SequenceParallel(group, device=device, decode_ranks=decoders)
    pipe = CausalVideoPipeline.from_pretrained("toybox", parallel=parallel, decode=decode)
    left: Any = pipe.stream("a blue square pulses", num_frames=FRAMES, seed=5)
    for _ in range(stop):
        next(left)
    left.close()
    chunks = list(pipe.stream(PROMPT, num_frames=FRAMES, seed=3, **given))
    assert [chunk.first_frame_index for chunk in chunks] == ([0, 12, 24] if given else [0, 9, 21])
    parts = [chunk.frames for chunk in chunks]
    if parallel.rank:
        assert parts == [None] * 3
        return None
    moved = {kind: entry["calls"] for chunk in chunks for kind, entry in chunk.comm_stats.as_json().items()}
    return np.concatenate([part for part in parts if part is not None]), moved


def close_to(video: np.ndarray, expected: np.ndarray) -> bool:
    """To rounding: spatial shards add in another order, and a number on the edge goes to either side."""
    return bool(np.abs(video.astype(int) - expected).max() <= 1)


def test_overlap_on_one_rank_changes_no_bit(expected: np.ndarray) -> None:
    video, _ = make(None, "cpu", 0, "overlap", {}, 1)
    assert np.array_equal(video, expected)


@pytest.mark.parametrize(
    ("ranks", "decoders", "decode"),
    [(2, 0, "spatial"), (3, 0, "spatial"), (2, 0, "overlap"), (2, 1, "inline"), (3, 2, "inline"), (3, 1, "inline")],
)
@pytest.mark.parametrize("stop", [0, 2])
def test_every_way_makes_the_same_frames(
    pool: RankPool, expected: np.ndarray, ranks: int, decoders: int, decode: str, stop: int
) -> None:
    video, moved = pool.run(make, ranks, decoders, decode, {}, stop)
    assert close_to(video, expected)
    assert ("halo" in moved) == (decode == "spatial")  # rank 0's own; decode ranks have theirs among themselves
    assert ("pixels" in moved) == (decode == "spatial" or decoders > 0)


def test_a_continued_video_is_decoded_elsewhere_too(pool: RankPool, expected: np.ndarray) -> None:
    given = {"video": list(expected)}
    alone, _ = make(None, "cpu", 0, "inline", given, 0)
    video, _ = pool.run(make, 2, 1, "inline", given, 0)
    assert close_to(video, alone)


def left_open(group: Any, device: str, decoders: int, decode: Any) -> list[str]:
    parallel = SequenceParallel(group, device=device, decode_ranks=decoders)
    pipe = CausalVideoPipeline.from_pretrained("toybox", parallel=parallel, decode=decode)
    open_one, late = (pipe.stream("a blue square pulses", num_frames=FRAMES, seed=5) for _ in range(2))
    next(open_one)
    said = []
    for begin in (lambda: pipe.stream(PROMPT, num_frames=FRAMES, seed=3), lambda: next(late)):
        try:
            begin()
        except ConfigError as error:
            said.append(str(error))
    rest = len(list(open_one))
    return [*said, f"{rest} more", f"{len(list(pipe.stream(PROMPT, num_frames=FRAMES, seed=3)))} chunks"]


@pytest.mark.parametrize(("decoders", "decode"), [(1, "inline"), (0, "overlap")])
def test_a_second_stream_beside_one_that_works_ahead_is_refused(pool: RankPool, decoders: int, decode: str) -> None:
    said = pool.run(left_open, 2, decoders, decode)
    assert all("another stream is open and works ahead" in refusal for refusal in said[:2])
    assert said[2:] == ["2 more", "3 chunks"]


def refused_then_made(group: Any, device: str, decoders: int) -> Any:
    """Wrong input of several kinds, on every rank; then a video."""
    parallel = SequenceParallel(group, device=device, decode_ranks=decoders)
    pipe = CausalVideoPipeline.from_pretrained("toybox", parallel=parallel)
    said: list[int | str] = []

    def broken() -> Iterator[np.ndarray]:
        yield from np.zeros((11, 64, 64, 3), np.uint8)
        yield np.zeros((64, 64), np.uint8)

    for prompt, given in (
        ("a dog", {}),
        (None, {"prompt_embeds": torch.zeros(1, 2, 3)}),
        (PROMPT, {"video": broken(), "strength": 0.5}),
    ):
        try:
            said.append(len(list(pipe.stream(prompt, num_frames=FRAMES, seed=3, **given))))
        except CausalRopeError as error:
            said.append(str(error))
    return said, video_of(pipe, PROMPT, num_frames=FRAMES, seed=3)


@pytest.mark.parametrize(("ranks", "decoders"), [(2, 1), (3, 1)])
def test_after_wrong_input_the_ranks_make_the_next_video(
    pool: RankPool, expected: np.ndarray, ranks: int, decoders: int
) -> None:
    said, video = pool.run(refused_then_made, ranks, decoders)
    assert "dog" in said[0]
    assert "text embeddings have shape (1, 2, 3)" in said[1]
    assert "a frame must be a PIL image, an array (height, width, 3)" in said[2]
    assert close_to(video, expected)


def test_a_decode_rank_loads_no_transformer(pool: RankPool) -> None:
    assert pool.run(devices_of_the_model, 3) == ["cpu", "cpu", "meta"]


def devices_of_the_model(group: Any, device: str) -> list[str]:
    parallel = SequenceParallel(group, device=device, decode_ranks=1)
    pipe = CausalVideoPipeline.from_pretrained("toybox", parallel=parallel)
    said = parallel.host_communicator.everyone({"device": pipe.model.device.type})
    return [rank["device"] for rank in said]


def test_wrong_ways_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="decode must be one of inline, overlap, spatial, not 'sometimes'"):
        CausalVideoPipeline.from_pretrained("toybox", decode="sometimes")
    with pytest.raises(ConfigError, match="expected fewer than the 1 ranks, got 1 decode ranks"):
        SequenceParallel.single(decode_ranks=1)


def counting(made: list[int]) -> Callable[[], int]:
    def make() -> int:
        made.append(len(made))
        return made[-1]

    return make


@pytest.mark.parametrize("taken", [1, 2, 7])
def test_one_ahead_is_always_one_ahead(taken: int) -> None:
    made: list[int] = []
    items = Prefetch(counting(made), CPU, set())
    assert [items.take() for _ in range(taken)] == [(n, None) for n in range(taken)]
    assert items.settle() == [taken]
    items.close()
    assert made == list(range(taken + 1))


def test_one_ahead_works_while_its_caller_is_busy() -> None:
    reached = threading.Event()
    items = iter([0, 1])

    def make() -> int | None:
        item = next(items, None)
        if item == 1:
            reached.set()
        return item

    ahead = Prefetch(make, CPU, set())
    assert ahead.take() == (0, None)
    assert reached.wait(10)
    assert ahead.take() == (1, None)
    assert ahead.take() is None
    ahead.close()


def test_what_an_item_raises_comes_in_its_turn_and_the_item_again() -> None:
    tries: Iterator[int | ValueError] = iter([0, ValueError("boom"), 1])

    def make() -> int | None:
        item = next(tries, None)
        if isinstance(item, ValueError):
            raise item
        return item

    ahead = Prefetch(make, CPU, set())
    assert ahead.take() == (0, None)
    with pytest.raises(ValueError, match="boom"):
        ahead.take()
    assert ahead.take() == (1, None)
    ahead.close()


def test_what_fails_before_an_item_reaches_the_caller_too() -> None:
    """Without a GPU the thread cannot make one the current one."""
    ahead = Prefetch(lambda: 0, torch.device("cuda", 0), set())
    raised: list[BaseException] = []

    def take() -> None:
        try:
            ahead.take()
        except Exception as error:
            raised.append(error)

    for _ in range(2):
        caller = threading.Thread(target=take, daemon=True)
        caller.start()
        caller.join(10)
        assert not caller.is_alive(), "the caller waits for a thread that has ended"
    assert len(raised) == 2
    ahead.close()


@pytest.mark.parametrize("ahead", [False, True])
def test_what_is_put_back_comes_again_before_what_was_made_ahead(ahead: bool) -> None:
    made: list[int] = []
    make = counting(made)
    items = Prefetch(make, CPU, set()) if ahead else OnDemand(make)
    first = items.take()
    assert first is not None
    items.put_back(first)
    assert [items.take() for _ in range(3)] == [(n, None) for n in range(3)]
    items.drop()
    assert items.take() == (4 if ahead else 3, None)
    items.close()
