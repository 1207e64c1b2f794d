"""Passes by captured graphs: the same latents, a graph for each kind of pass, and eager passes where one fails."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from causalrope_kernels import backend
from causalrope_sp import CausalVideoPipeline, SamplerConfig, SequenceParallel, StreamConfig
from causalrope_sp.config import CacheDtype
from causalrope_sp.grid import Chunk
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.reuse.policy import ReusePlan, ReusePolicy
from causalrope_sp.sampling.steered_loop import SteeredLoop
from causalrope_sp.sampling.stream_options import StreamOptions
from tests.support.cpu_graph import RecordedGraph, capture_on_cpu
from tests.support.graph_runs import FRAMES, NOISE, STEPS, Install, install, video
from tests.support.reuse_cases import CONFIG, GRID, MIXED, SAMPLER, SHARED, TIMESTEPS, make_model, random


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Install:
    return partial(install, monkeypatch)


def capture_into(captured: list[RecordedGraph], run: Callable[[], Tensor]) -> tuple[RecordedGraph, Tensor]:
    graph, output = capture_on_cpu(run)
    captured.append(graph)
    return graph, output


@pytest.mark.parametrize("rope", ["absolute", "relative"])
@pytest.mark.parametrize(
    ("window", "sink", "scale", "cache"),
    [(6, 0, 1.0, "model"), (7, 1, 1.0, "model"), (6, 2, 2.0, "model"), (2, 0, 1.0, "model"), (7, 1, 2.0, "int8")],
    ids=["window", "sink", "guided", "a window of one chunk", "int8"],
)  # fmt: skip
def test_a_stream_by_graphs_is_the_eager_one(
    window: int, sink: int, scale: float, cache: CacheDtype, rope: Literal["absolute", "relative"], graphs: Install
) -> None:
    stream = StreamConfig(window=window, sink=sink, chunk_frames=2, rope=rope, cache=cache)
    guided = SamplerConfig(steps=STEPS, guidance_scale=scale)
    eager = video(stream, sampler=guided)
    made = graphs()
    assert torch.equal(video(stream, sampler=guided), eager)
    (made_once,) = made  # both branches of guidance share the graphs' memory
    # eight chunks; the window is full in chunk `full`, whose kinds are captured one chunk later, and replayed from then
    full = -(-window // 2) - 1
    fused = 0 if window == 2 else 1  # which a window of one chunk saves layer by layer, and not by a graph
    later = 8 - (full + 1)
    expected = (len(STEPS) - 1) * later - 1 + fused * (later - 1)
    assert made_once.replays == pytest.approx(expected * (1 + (scale > 1)), abs=2)


@pytest.mark.parametrize("similar", [None, 2.0])
def test_rows_that_torch_reads_on_the_host_are_not_those_of_another_pass(
    similar: float | None, graphs: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 the kernel rotates no queries, so that torch attends keys in 8 bits that are rotated on read."""
    stream = StreamConfig(window=6, chunk_frames=2, rope="relative", cache="int8", similar_frames=similar)
    options: dict[str, Any] = {"frames": 10, "sampler": SamplerConfig((1000, 500))}
    model = CausalDiT(replace(CONFIG, num_layers=1, dim=12, num_heads=2)).eval().requires_grad_(False)
    expected = video(stream, model, **options)
    monkeypatch.setattr(backend, "runs_triton", lambda device: True)
    made = graphs()
    torch.testing.assert_close(video(stream, model, **options), expected, rtol=0, atol=1e-4)
    assert bool(made[0].replays) == (similar is None)


def test_a_graph_copies_nothing_from_the_host_and_asks_it_nothing(graphs: Install) -> None:
    captured: list[RecordedGraph] = []
    graphs(partial(capture_into, captured))
    video(StreamConfig(window=6, chunk_frames=2))
    assert len(captured) == 2, "a graph for denoise passes, and one for those with a context pass"
    for graph in captured:
        asked = {"aten::lift_fresh", "aten::_local_scalar_dense", "aten::_pin_memory", "aten::nonzero", "aten::equal"}
        assert not asked & set(graph.names)


def test_a_chunk_with_given_frames_is_made_again_after_graphs_were_captured(graphs: Install) -> None:
    """Its passes have a timestep for each frame, those that were captured one for each chunk."""
    stream, given = (
        StreamConfig(window=2, chunk_frames=2),
        torch.randn(1, 1, CONFIG.in_channels, GRID.latent_height, GRID.latent_width),
    )
    embeds = random(1, 1, CONFIG.text_len, CONFIG.text_dim)[0]
    options = StreamOptions(stream=stream, sampler=SamplerConfig(steps=STEPS), given_frames=given, kept_chunks=5)
    made = graphs()
    loop = SteeredLoop(make_model(), embeds, NOISE, GRID, None, SequenceParallel.single(device="cpu"), options)
    with torch.inference_mode():
        first = [loop.step().latents for _ in range(5)]
        loop.rewind(5, embeds)
        again = [loop.step().latents for _ in range(5)]
    assert made[0].replays > 0
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_a_failed_capture_leaves_eager_passes_and_one_line(graphs: Install, caplog: pytest.LogCaptureFixture) -> None:
    stream = StreamConfig(window=6, chunk_frames=2)
    eager = video(stream)

    def capture(_: Callable[[], Tensor]) -> tuple[RecordedGraph, Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing\nlong trace")

    made = graphs(capture)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(video(stream), eager)
    assert caplog.messages == ["passes run without CUDA graphs: operation not permitted when stream is capturing"]
    assert made[0].replays == 0


def test_a_graph_whose_output_differs_is_not_used(graphs: Install, caplog: pytest.LogCaptureFixture) -> None:
    stream = StreamConfig(window=6, chunk_frames=2)
    eager = video(stream)

    class Wrong:
        def replay(self) -> None:
            pass

    made = graphs(lambda run: (Wrong(), run().clone()))  # what an empty graph would be: right, and never written again
    with caplog.at_level(logging.WARNING):
        assert torch.equal(video(stream), eager)
    assert "its output differs from that of the eager pass" in caplog.text
    assert made[0].replays == 0


def test_passes_run_by_graphs_unless_an_option_says_not(graphs: Install) -> None:
    made = graphs()
    every: list[dict[str, Any]] = [{"graphs": False}, {}]
    for expected, options in enumerate(every):
        pipe = CausalVideoPipeline.from_pretrained("toybox", device="cpu", **options)
        pipe("a red circle slides right", num_frames=9, output_type="latent")
        assert len(made) == expected
    video(StreamConfig(window=6, chunk_frames=2), graphs=False)
    assert len(made) == 1


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_chunk_that_overwrites_its_own_context_is_refused_by_name(
    scale: float, graphs: Install, caplog: pytest.LogCaptureFixture
) -> None:
    graphs()
    with caplog.at_level(logging.INFO, "causalrope_sp"):  # a command that ran before in this process sets its level
        video(StreamConfig(window=2, chunk_frames=2), sampler=SamplerConfig(steps=STEPS, guidance_scale=scale))
    (line,) = [line for line in caplog.messages if "graphs" in line]
    assert line.endswith("a chunk overwrites the frames of the chunk before it, whose context pass it shares")


@pytest.mark.parametrize(("policy", "kinds"), [(MIXED, 8), (SHARED, 4)], ids=["mixed", "shared"])
def test_passes_that_reuse_outputs_are_graphs_of_their_own(policy: ReusePolicy, kinds: int, graphs: Install) -> None:
    stream = StreamConfig(window=6, chunk_frames=2)
    eager = video(stream, sampler=SAMPLER, reuse=policy)
    captured: list[RecordedGraph] = []
    made = graphs(partial(capture_into, captured))
    assert torch.equal(video(stream, sampler=SAMPLER, reuse=policy), eager)
    assert len(set(ReusePlan.of_causal(policy, TIMESTEPS, CONFIG.num_layers).patterns)) == kinds
    assert len(captured) == kinds
    # chunk 3 is the second behind a full window and captures all kinds but that with a context pass, which chunk 4 does
    assert made[0].replays == 5 * len(TIMESTEPS) - kinds - 1


def test_a_hook_sees_every_pass(graphs: Install, caplog: pytest.LogCaptureFixture) -> None:
    stream, seen = StreamConfig(window=6, chunk_frames=2), []
    eager = video(stream)
    model = make_model()
    model.register_forward_hook(lambda *_: seen.append(1))
    made = graphs()
    with caplog.at_level(logging.WARNING):
        assert torch.equal(video(stream, model), eager)
    assert caplog.messages == ["passes run without CUDA graphs: the model has hooks"]
    assert made[0].replays == 0
    assert len(seen) == 3 * FRAMES // 2 + 1, "one pass was run again"


def test_a_hook_that_comes_later_sees_passes_that_were_captured(graphs: Install) -> None:
    """Also where an eager pass reuses what a replayed one kept."""
    stream = StreamConfig(window=6, chunk_frames=2)
    eager = video(stream, sampler=SAMPLER, reuse=SHARED)
    made, model, seen = graphs(), make_model(), []

    def on_step(chunk: Chunk, step: int, timestep: float) -> None:
        if (chunk.index, step) == (6, 3):
            handles.append(model.register_forward_hook(lambda *_: seen.append(1)))
        if (chunk.index, step) == (6, 5):
            handles.pop().remove()

    handles: list[Any] = []
    assert torch.equal(video(stream, model, sampler=SAMPLER, reuse=SHARED, on_step=on_step), eager)
    assert made[0].replays > 0
    assert len(seen) == 2
