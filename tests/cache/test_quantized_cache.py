"""The KV cache in 8 bits: the stream of a dense emulation of its rounding, its bytes, and what a pass takes at most."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from causalrope_kernels import PassOperations, Source, quantized_attention
from causalrope_kernels.quantized_heads import dequantize, quantize
from causalrope_sp import Chunk, ConfigError, LatentGrid, StreamConfig
from causalrope_sp.attention import base
from causalrope_sp.cache.kv_cache import KVCache
from causalrope_sp.cache.layer_cache import LayerCache
from causalrope_sp.cache.layer_storage import STORED_DTYPES
from causalrope_sp.cache.window import SlidingWindow
from causalrope_sp.config import PRESETS, CacheDtype
from causalrope_sp.distributed.layout import parse_strategy
from causalrope_sp.heads.placement import HeadPlacement
from causalrope_sp.planning.counts import cache_bytes
from causalrope_sp.planning.workload import Workload
from causalrope_sp.sampling.stream_options import check_attention
from tests.support import strategy_runs
from tests.support.strategy_runs import CONFIG, HEADS, Job, make_model, relative, single

ALONE = parse_strategy("single", 1)
KINDS: tuple[CacheDtype, ...] = ("int8", "fp8")
JOBS = {
    "window and sink": Job(2, 5, 11, StreamConfig(5, 1, 2), batch=2),
    "relative": Job(2, 4, 9, StreamConfig(5, 1, 2, rope="relative")),
    "initial frames": Job(1, 4, 4, StreamConfig(4, 2, 2), known=5),
    "heads": Job(2, 5, 11, StreamConfig(6, 1, 2, heads=HEADS), batch=2),
    "float32": Job(2, 5, 9, StreamConfig(5, 1, 2), dtype=torch.float32),
}


def with_cache(job: Job, kind: CacheDtype) -> Job:
    return replace(job, stream=replace(job.stream, cache=kind))


def rounding_as_they_are_written(
    kind: CacheDtype, still: int
) -> Callable[[Source, LayerCache, Chunk, PassOperations, HeadPlacement], Tensor]:
    """Writes keys and values in the model's dtype, rounded to 8 bits and back; the keys without the mean of the first
    that were written, which is added again. `still` channels, which rotate on read, have no mean taken."""
    plain, means = base.write_chunk, dict[tuple[int, int], Tensor]()

    def write(
        source: Source, cache: LayerCache, chunk: Chunk, operations: PassOperations, placement: HeadPlacement
    ) -> Tensor:
        q = plain(source, cache, chunk, operations, placement)
        for number, (k_slots, v_slots) in enumerate(zip(*cache.kv_slots(chunk), strict=True)):
            key = cache.index, number
            if key not in means:
                means[key] = k_slots.x[:, k_slots.slots_F].mean((1, 2), keepdim=True)
                means[key][..., :still] = 0
            for slots, offset in ((k_slots, means[key]), (v_slots, 0.0)):
                numbers, scales = quantize(slots.x[:, slots.slots_F] - offset, STORED_DTYPES[kind])
                slots.x[:, slots.slots_F] = dequantize(numbers, scales, slots.x.dtype) + offset
        return q

    return write


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", JOBS)
def test_a_stream_is_that_of_a_dense_emulation(name: str, kind: CacheDtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 a number that is rounded another way at the border of two shows."""
    job = JOBS[name]
    quantized = single(with_cache(job, kind))
    monkeypatch.setattr(base, "write_chunk", rounding_as_they_are_written(kind, 2 if name == "relative" else 0))
    emulated = single(job)
    assert relative(quantized, emulated) < (1e-12 if job.dtype == torch.float64 else 1e-4)
    monkeypatch.undo()
    assert relative(quantized, single(job)) > 1e-4, "8 bits cost something"


def work_of(kind: CacheDtype, width: int) -> Workload:
    heads = PRESETS["wan2.1-1.3b"].dim // width
    config = replace(PRESETS["wan2.1-1.3b"], num_heads=heads)
    return Workload(config, LatentGrid(30, 52), window=21, chunk_frames=3, steps=4, cache=kind)


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_half_of_the_bytes_by_formula(kind: CacheDtype, width: int) -> None:
    share = cache_bytes(ALONE, work_of(kind, width), 0) / cache_bytes(ALONE, work_of("model", width), 0)
    assert share <= 0.53


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_half_of_the_bytes_when_they_are_allocated(kind: CacheDtype, width: int) -> None:
    def held(quantized: torch.dtype | None) -> int:
        return KVCache(2, 1, SlidingWindow(7, 1), 40, 3, width, dtype=torch.bfloat16, quantized=quantized).bytes

    assert held(STORED_DTYPES[kind]) / held(None) <= 0.53


def strided(found: Any) -> list[Tensor]:
    """The tensors in it, but for weights in a layout of oneDNN's."""
    return [x for x in tree_leaves(found) if isinstance(x, Tensor) and x.layout == torch.strided]


class Alive(TorchDispatchMode):
    """Counts the bytes of the storages that are alive: those of some tensors, and what operations make."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in strided((args, kwargs))}
        for x in strided(made):
            if x.untyped_storage()._cdata not in given | self._sizes.keys():
                storage = x.untyped_storage()
                self._sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self._sizes.pop, storage._cdata, None)
        self.most = max(self.most, sum(self._sizes.values()))
        return made


@pytest.mark.parametrize("kind", KINDS)
def test_the_peak_of_a_stream_falls_by_what_the_cache_saves(kind: CacheDtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of bfloat16, all tensors counted: keys and values are unpacked a block at a time."""
    monkeypatch.setattr(quantized_attention, "BLOCK", 64)
    sizes: dict[str, Any] = {"dim": 96, "ffn_dim": 384, "num_heads": 3, "num_layers": 4}
    job = Job(6, 8, 15, StreamConfig(9, 1, 3), dtype=torch.bfloat16)

    model = make_model(job.dtype, **sizes)
    monkeypatch.setattr(strategy_runs, "make_model", lambda dtype: model)  # whose weights do not count

    def peak(job: Job) -> int:
        single(job)  # what is made once and kept does not count
        gc.collect()
        with Alive() as alive:
            single(job)
        return alive.most

    def planned(kind: CacheDtype) -> int:
        config = replace(CONFIG, **sizes)
        return cache_bytes(ALONE, Workload(config, job.grid, window=9, chunk_frames=3, steps=2, cache=kind), 0)

    saving = planned("model") - planned(kind)
    assert saving > 0.4 * planned("model")
    assert peak(with_cache(job, kind)) <= peak(job) - saving


def test_what_cannot_read_or_store_8_bits_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"expected auto, torch or triton, .* cache=int8, got flash"):
        check_attention(StreamConfig(cache="int8"), "flash")
    check_attention(StreamConfig(cache="fp8"), "triton")
    check_attention(StreamConfig(), "flash")
    with pytest.raises(ConfigError, match="cache must be one of model, int8, fp8, not 'int4'"):
        StreamConfig(cache="int4")  # type: ignore[arg-type]
