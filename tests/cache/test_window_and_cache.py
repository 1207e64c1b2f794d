"""Which frames a chunk attends: the plan and the storage against a plain list of the frames kept."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from causalrope_kernels.reference import put_heads, ranges
from causalrope_sp import Chunk, ConfigError, KVCache, StreamConfig
from causalrope_sp.cache.layer_cache import LayerCache
from causalrope_sp.cache.window import SlidingWindow
from causalrope_sp.verification.reference import visible_past

LAYERS, BATCH, TOKENS, HEADS, WIDTH = 2, 2, 3, 2, 2


def kept(stop: int, window: int, sink: int) -> list[int]:
    """The frames in the window once all before `stop` came in: the oldest that is not of the sink leaves first."""
    frames: list[int] = []
    for frame in range(stop):
        frames.append(frame)
        if len(frames) > window:
            frames.pop(sink)
    return frames


def most_frames(start: int, window: SlidingWindow) -> int:
    """The largest chunk that fits at `start`: what is left of the sink, and the ring."""
    return max(window.sink - start, 0) + window.frames - window.sink


@st.composite
def streams(draw: st.DrawFn) -> tuple[SlidingWindow, list[Chunk]]:
    sink = draw(st.integers(0, 4))
    window = SlidingWindow(sink + draw(st.integers(1, 6)), sink)
    chunks, start = [], 0
    for index in range(draw(st.integers(1, 12))):
        chunk = Chunk(index, start, draw(st.integers(1, most_frames(start, window))))
        chunks.append(chunk)
        start = chunk.stop
    return window, chunks


@given(streams())
@settings(deadline=None)
def test_a_chunk_attends_what_a_plain_list_keeps(stream: tuple[SlidingWindow, list[Chunk]]) -> None:
    window, chunks = stream
    for chunk in chunks:
        expected = kept(chunk.stop, window.frames, window.sink)
        assert sorted(window.held(chunk.stop).values()) == expected
        assert visible_past(chunk, window.frames, window.sink) + list(range(chunk.start, chunk.stop)) == expected
        assert len(window.held(chunk.stop)) == len(expected)


@given(streams())
@settings(deadline=None)
def test_a_chunk_takes_no_slot_that_it_still_reads(stream: tuple[SlidingWindow, list[Chunk]]) -> None:
    window, chunks = stream
    in_slot: dict[int, int] = {}
    for chunk in chunks:
        past = visible_past(chunk, window.frames, window.sink)
        slots = window.slots(chunk)
        assert len(set(slots)) == chunk.frames
        assert not {in_slot[slot] for slot in slots if slot in in_slot} & set(past)
        in_slot |= dict(zip(slots, range(chunk.start, chunk.stop)))
        assert sorted(in_slot) == list(range(len(window.held(chunk.stop))))
        assert window.held(chunk.stop) == in_slot
        for since in range(chunk.stop + 1):
            for number, (mine, old) in enumerate(zip(window.ranges(chunk, since), (True, False))):
                covered = [slot for first, stop in mine for slot in range(first, stop)]
                assert covered == [slot for slot in sorted(in_slot) if (in_slot[slot] < since) == old], number
        assert max(map(len, window.ranges(chunk, chunk.start))) <= 2
        places = window.positions(chunk)
        assert places[len(in_slot) :] == [0] * (window.frames - len(in_slot))
        assert sorted(in_slot, key=in_slot.__getitem__) == sorted(in_slot, key=places.__getitem__)
        assert sorted(places[: len(in_slot)]) == list(range(len(in_slot)))


@given(streams(), st.data())
@settings(deadline=None)
def test_the_sink_never_moves_and_the_ring_is_oldest_first(
    stream: tuple[SlidingWindow, list[Chunk]], data: st.DataObject
) -> None:
    window, chunks = stream
    frame = data.draw(st.integers(0, chunks[-1].stop))
    assert 0 <= window.slot(frame) < window.frames
    if frame < window.sink:
        assert window.slot(frame) == frame
    else:
        assert window.slot(frame) == window.slot(frame + window.frames - window.sink)


def make_cache(window: SlidingWindow) -> KVCache:
    return KVCache(LAYERS, BATCH, window, TOKENS, HEADS, WIDTH, dtype=torch.float64)


class CacheOfAStream(RuleBasedStateMachine):
    """Anything that can happen to a cache, in any order. Every write has a number of its own, so that a frame that is
    read shows which write it comes from."""

    @initialize(sink=st.integers(0, 3), ring=st.integers(1, 5))
    def begin(self, sink: int, ring: int) -> None:
        self.window = SlidingWindow(sink + ring, sink)
        self.cache = make_cache(self.window)
        self.storage = [(x.data_ptr(), x.nbytes) for x in stored(self.cache)]
        self.clean: dict[int, float] = {}
        self.stamp = 0
        self.chunk: Chunk | None = None
        self.index = 0

    def next_chunk(self, data: st.DataObject, start: int) -> Chunk:
        self.index += 1
        return Chunk(self.index, start, data.draw(st.integers(1, most_frames(start, self.window))))

    def write(self, chunk: Chunk, layer: int) -> dict[int, float]:
        """Writes the chunk's frames with fresh numbers, distinct by layer."""
        numbers = {t: float(100 * self.stamp + 10 * layer + i) for i, t in enumerate(range(chunk.start, chunk.stop))}
        k = torch.tensor([*numbers.values()], dtype=torch.float64).view(1, -1, 1, 1, 1)
        k = k.expand(BATCH, -1, TOKENS, HEADS, WIDTH)
        write(self.cache.layer(layer), chunk, k, -k)
        return numbers

    def expect(self, chunk: Chunk, layer: int, numbers: dict[int, float]) -> None:
        """The chunk reads its own numbers and the committed ones of its past, and nothing else."""
        k, v = read(self.cache.layer(layer), chunk)
        frames = kept(chunk.stop, self.window.frames, self.window.sink)
        past = {t: number + 10 * layer for t, number in self.clean.items()}
        expected = sorted((past | numbers)[t] for t in frames)
        assert k.shape == v.shape == (BATCH, len(frames) * TOKENS, HEADS, WIDTH)
        assert torch.equal(k, -v)
        for entry in k.unflatten(1, (-1, TOKENS)):
            assert torch.equal(entry, entry[:, :1, :1, :1].expand_as(entry))
            assert sorted(entry[:, 0, 0, 0].tolist()) == expected

    def settle(self, chunk: Chunk) -> None:
        for i, frame in enumerate(range(chunk.start, chunk.stop)):
            self.clean[frame] = float(100 * self.stamp + i)

    @precondition(lambda self: self.chunk is None)
    @rule(data=st.data())
    def open(self, data: st.DataObject) -> None:
        self.chunk = self.next_chunk(data, self.cache.committed)
        self.cache.open(self.chunk)

    @precondition(lambda self: self.chunk is not None)
    @rule()
    def denoise(self) -> None:
        assert self.chunk is not None
        self.stamp += 1
        for layer in range(LAYERS):
            self.expect(self.chunk, layer, self.write(self.chunk, layer))

    @precondition(lambda self: self.chunk is not None)
    @rule()
    def context_pass(self) -> None:
        assert self.chunk is not None
        self.denoise()
        self.cache.commit()
        self.settle(self.chunk)
        self.chunk = None

    @precondition(lambda self: self.chunk is not None)
    @rule(data=st.data())
    def context_pass_with_the_next_chunk(self, data: st.DataObject) -> None:
        before = self.chunk
        assert before is not None
        self.denoise()  # a chunk is never committed before a pass has written it
        self.cache.commit()
        self.chunk = self.next_chunk(data, before.stop)
        self.cache.open(self.chunk)
        self.stamp += 2
        noisy_stamp = self.stamp
        for layer in range(LAYERS):
            self.stamp = noisy_stamp - 1
            self.expect(before, layer, self.write(before, layer))
            self.settle(before)
            self.stamp = noisy_stamp
            self.expect(self.chunk, layer, self.write(self.chunk, layer))

    @precondition(lambda self: self.chunk is not None)
    @rule(layers=st.integers(0, LAYERS))
    def cancel(self, layers: int) -> None:
        assert self.chunk is not None
        self.stamp += 1
        for layer in range(layers):
            self.write(self.chunk, layer)
        self.cache.cancel()
        self.chunk = None

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "cache"):
            return
        self.cache.check_integrity()
        assert self.cache.committed == len(self.clean)
        assert self.cache.open_chunk == self.chunk
        assert [(x.data_ptr(), x.nbytes) for x in stored(self.cache)] == self.storage
        if self.chunk is None:
            frames = kept(self.cache.committed, self.window.frames, self.window.sink)
            for layer, storage in enumerate(stored(self.cache)):
                k, v = storage[:, :, : len(frames)]
                expected = sorted(self.clean[frame] + 10 * layer for frame in frames)
                assert all(sorted(entry[:, 0, 0, 0].tolist()) == expected for entry in k)
                assert torch.equal(k, -v)


TestCacheOfAStream = CacheOfAStream.TestCase
TestCacheOfAStream.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def stored(cache: KVCache) -> list[Tensor]:
    """The storage of every layer."""
    (ring,) = cache.rings
    return [layer.numbers_2BKSHD for layer in ring.storage]


def write(cache: LayerCache, chunk: Chunk, k: Tensor, v: Tensor) -> None:
    for (room,), x in zip(cache.kv_slots(chunk), (k, v), strict=True):
        put_heads([room], x)


def read(cache: LayerCache, chunk: Chunk) -> tuple[Tensor, Tensor]:
    (keys,) = cache.keys(chunk)
    ((k, v),) = ranges(keys)
    return k, v


def fill(cache: KVCache, chunk: Chunk, passes: int = 1) -> None:
    for _ in range(passes):
        for layer in range(LAYERS):
            k, v = torch.randn(2, BATCH, chunk.frames, TOKENS, HEADS, WIDTH, dtype=torch.float64)
            write(cache.layer(layer), chunk, k, v)


def committed_bytes(cache: KVCache) -> Tensor:
    return torch.stack(stored(cache))[:, :, :, : min(cache.committed, cache.window.frames)]


@given(streams(), st.data())
@settings(max_examples=50, deadline=None)
def test_cancel_restores_every_byte(stream: tuple[SlidingWindow, list[Chunk]], data: st.DataObject) -> None:
    window, chunks = stream
    cache = make_cache(window)
    for chunk in chunks:
        before = committed_bytes(cache)
        for _ in range(data.draw(st.integers(0, 2))):
            abandoned = Chunk(99, chunk.start, data.draw(st.integers(1, most_frames(chunk.start, window))))
            cache.open(abandoned)
            fill(cache, abandoned, passes=data.draw(st.integers(0, 3)))
            cache.cancel()
            cache.check_integrity()
            assert torch.equal(committed_bytes(cache), before)
        cache.open(chunk)
        fill(cache, chunk)
        cache.commit()
        cache.check_integrity()


def test_tokens_heads_and_batch_stay_in_their_places() -> None:
    cache = make_cache(SlidingWindow(4, 1))
    shape = (BATCH, 6, TOKENS, HEADS, WIDTH)
    k = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape)
    for start in range(0, 6, 2):
        chunk = Chunk(start // 2, start, 2)
        cache.open(chunk)
        for layer in range(LAYERS):
            write(cache.layer(layer), chunk, k[:, start : chunk.stop] + layer, -k[:, start : chunk.stop])
        cache.commit()
    read_k, read_v = read(cache.layer(1), Chunk(2, 4, 2))
    by_slot = k[:, [0, 4, 5, 3]].flatten(1, 2)
    assert torch.equal(read_k, by_slot + 1)
    assert torch.equal(read_v, -by_slot)


def test_a_context_pass_reads_before_the_next_chunk_takes_its_slots() -> None:
    """The order inside the fused forward: with window 4 and chunks of 2, chunk 2 takes over the slots of chunk 0."""
    cache = make_cache(SlidingWindow(4))
    first, second, third = (Chunk(i, 2 * i, 2) for i in range(3))
    for chunk in (first, second):
        cache.open(chunk)
        fill(cache, chunk)
        if chunk is first:
            cache.commit()
    cache.commit()
    cache.open(third)
    frames = torch.arange(6, dtype=torch.float64).view(1, 6, 1, 1, 1).expand(BATCH, -1, TOKENS, HEADS, WIDTH)
    write(cache.layer(0), first, frames[:, :2], frames[:, :2])
    write(cache.layer(0), second, frames[:, 2:4], frames[:, 2:4])
    assert read(cache.layer(0), second)[0].unique().tolist() == [0, 1, 2, 3]
    write(cache.layer(0), third, frames[:, 4:], frames[:, 4:])
    assert read(cache.layer(0), third)[1].unique().tolist() == [2, 3, 4, 5]
    cache.cancel()
    assert read(cache.layer(0), second)[0].unique().tolist() == [0, 1, 2, 3]


def test_integrity_sees_a_commit_of_nothing_and_a_wrong_cursor() -> None:
    cache = make_cache(SlidingWindow(4, 1))
    cache.check_integrity()
    cache.open(Chunk(0, 0, 3))
    cache.commit()
    with pytest.raises(AssertionError, match="does not hold frame 0"):
        cache.check_integrity()

    cache = make_cache(SlidingWindow(4, 1))
    cache.open(Chunk(0, 0, 3))
    fill(cache, Chunk(0, 0, 3))
    cache.committed = 1
    with pytest.raises(AssertionError, match="not the next one"):
        cache.check_integrity()


def test_misuse_is_refused_and_changes_nothing() -> None:
    cache = make_cache(SlidingWindow(5, 2))
    with pytest.raises(ConfigError, match="no chunk is open"):
        cache.commit()
    with pytest.raises(ConfigError, match="stands at latent frame 0, the chunk starts at 3"):
        cache.open(Chunk(1, 3, 3))
    cache.cancel()
    first = Chunk(0, 0, 3)
    cache.open(first)
    with pytest.raises(ConfigError, match="chunk 0 is still open"):
        cache.open(Chunk(1, 3, 3))
    fill(cache, first)
    cache.commit()
    with pytest.raises(ConfigError, match="stands at latent frame 3"):
        cache.open(first)
    with pytest.raises(ConfigError, match=r"window 5 is smaller than chunk \+ sink = 4 \+ 2"):
        cache.open(Chunk(1, 3, 4))
    assert cache.open_chunk is None
    assert cache.committed == 3
    cache.check_integrity()


@pytest.mark.parametrize(("frames", "sink"), [(0, 0), (-3, 0), (3, -1), (3, 3), (2, 5)])
def test_windows_that_hold_nothing_are_refused(frames: int, sink: int) -> None:
    with pytest.raises(ConfigError) as caught:
        SlidingWindow(frames, sink)
    assert "\n" not in str(caught.value)


@given(window=st.integers(-1, 9), sink=st.integers(-1, 5), chunk=st.integers(-1, 5))
@settings(deadline=None)
def test_a_stream_that_is_configured_fits_its_window(window: int, sink: int, chunk: int) -> None:
    if sink >= 0 and chunk >= 1 and window >= chunk + sink:
        config = StreamConfig(window, sink, chunk)
        assert config.window == window
        plan = SlidingWindow(window, config.sink)
        assert all(plan.slots(Chunk(i, i * chunk, chunk)) for i in range(20))
    else:
        with pytest.raises(ConfigError):
            StreamConfig(window, sink, chunk)


def test_an_unknown_place_in_time_is_refused() -> None:
    with pytest.raises(ConfigError, match="rope must be absolute or relative, not 'reversed'"):
        StreamConfig(rope="reversed")  # type: ignore[arg-type]
