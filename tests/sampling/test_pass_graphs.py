"""Passes by captured graphs: the same latents, a graph for each kind of pass, and eager passes where one fails."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from causalrope_sp import CausalVideoPipeline, SamplerConfig, StreamConfig
from causalrope_sp.diffusion.noise import seeded_noise
from causalrope_sp.sampling import chunk_loop
from causalrope_sp.sampling.pass_graphs import PassGraphs
from tests.support.cpu_graph import RecordedGraph, capture_on_cpu
from tests.support.reuse_cases import CONFIG, GRID, make_model, random
from tests.support.streams import run_chunks

FRAMES, STEPS = 16, (1000.0, 750.0, 400.0)
NOISE = seeded_noise(0, (1, CONFIG.in_channels, GRID.latent_height, GRID.latent_width))


def video(stream: StreamConfig, **options: Any) -> Tensor:
    embeds, negative = random(2, 1, CONFIG.text_len, CONFIG.text_dim)
    options = {"sampler": SamplerConfig(steps=STEPS), "negative_embeds": negative, "graphs": True} | options
    chunks = run_chunks(make_model(), embeds, NOISE, GRID, FRAMES, stream=stream, **options)
    return torch.cat([chunk.latents for chunk in chunks], 1)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[PassGraphs]]:
    """Lets streams capture graphs on the CPU, and returns those that they made."""

    def install(capture: Any = capture_on_cpu) -> list[PassGraphs]:
        made: list[PassGraphs] = []

        def stream_graphs(device: torch.device) -> PassGraphs:
            made.append(PassGraphs(capture, device))
            return made[-1]

        monkeypatch.setattr(chunk_loop, "stream_graphs", stream_graphs)
        return made

    return install


@pytest.mark.parametrize("rope", ["absolute", "relative"])
@pytest.mark.parametrize(
    ("window", "sink", "scale"), [(6, 0, 1.0), (7, 1, 1.0), (6, 2, 2.0), (2, 0, 1.0)],
    ids=["window", "sink", "guided", "a window of one chunk"],
)  # fmt: skip
def test_a_stream_by_graphs_is_the_eager_one(
    window: int, sink: int, scale: float, rope: Literal["absolute", "relative"], graphs: Callable[..., list[PassGraphs]]
) -> None:
    stream = StreamConfig(window=window, sink=sink, chunk_frames=2, rope=rope)
    guided = SamplerConfig(steps=STEPS, guidance_scale=scale)
    eager = video(stream, sampler=guided)
    made = graphs()
    assert torch.equal(video(stream, sampler=guided), eager)
    assert len(made) == 1 + (scale > 1)
    # eight chunks; the window is full in chunk `full`, whose kinds are captured one chunk later, and replayed from then
    full = -(-window // 2) - 1
    fused = 0 if window == 2 else 1  # which a window of one chunk saves layer by layer, and not by a graph
    later = 8 - (full + 1)
    expected = (len(STEPS) - 1) * later - 1 + fused * (later - 1)
    assert [each.replays for each in made] == [pytest.approx(expected, abs=2)] * len(made)


def test_a_graph_copies_nothing_from_the_host_and_asks_it_nothing(graphs: Callable[..., list[PassGraphs]]) -> None:
    captured: list[RecordedGraph] = []

    def capture(run: Callable[[], Tensor]) -> tuple[RecordedGraph, Tensor]:
        graph, output = capture_on_cpu(run)
        captured.append(graph)
        return graph, output

    graphs(capture)
    video(StreamConfig(window=6, chunk_frames=2))
    assert len(captured) == 2, "a graph for denoise passes, and one for those with a context pass"
    for graph in captured:
        asked = {"aten::lift_fresh", "aten::_local_scalar_dense", "aten::_pin_memory", "aten::nonzero", "aten::equal"}
        assert not asked & set(graph.names)


def test_a_failed_capture_leaves_eager_passes_and_one_line(
    graphs: Callable[..., list[PassGraphs]], caplog: pytest.LogCaptureFixture
) -> None:
    stream = StreamConfig(window=6, chunk_frames=2)
    eager = video(stream)

    def capture(_: Callable[[], Tensor]) -> tuple[RecordedGraph, Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing\nlong trace")

    made = graphs(capture)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(video(stream), eager)
    assert caplog.messages == ["passes run without CUDA graphs: operation not permitted when stream is capturing"]
    assert made[0].replays == 0


def test_a_graph_whose_output_differs_is_not_used(
    graphs: Callable[..., list[PassGraphs]], caplog: pytest.LogCaptureFixture
) -> None:
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


def test_the_pipeline_passes_the_option_on(graphs: Callable[..., list[PassGraphs]]) -> None:
    made = graphs()
    for expected, wanted in ((0, False), (1, True)):
        options: dict[str, Any] = {"graphs": True} if wanted else {}
        pipe = CausalVideoPipeline.from_pretrained("toybox", device="cpu", **options)
        pipe("a red circle slides right", num_frames=9, output_type="latent")
        assert len(made) == expected


def test_graphs_are_left_out_by_option_and_with_reuse(graphs: Callable[..., list[PassGraphs]]) -> None:
    from causalrope_sp.reuse import Broadcast, ReusePolicy

    stream, made = StreamConfig(window=6, chunk_frames=2), graphs()
    video(stream, graphs=False)
    assert not made
    video(stream, reuse=ReusePolicy((Broadcast("cross", 2),)))
    assert [each.replays for each in made] == [0]
