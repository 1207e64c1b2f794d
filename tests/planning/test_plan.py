"""The cost model: its counts against the model itself and torch's counter, its choice, and its command."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from causalrope_sp import CausalDiT, DiTConfig, LatentGrid, SamplerConfig, StreamConfig
from causalrope_sp.attention.base import Strategy
from causalrope_sp.cache.window import SlidingWindow
from causalrope_sp.cli.main import cli
from causalrope_sp.codec.codec_footprint import published_footprint
from causalrope_sp.codec.wan_vae_config import WAN_2_2
from causalrope_sp.config import PRESETS
from causalrope_sp.distributed.layout import parse_strategy, strategies
from causalrope_sp.grid import Chunk, Shard
from causalrope_sp.pipeline.offload import Offload
from causalrope_sp.pipeline.planned_model import PlannedModel
from causalrope_sp.planning.cost import plan
from causalrope_sp.planning.counts import attention_flops, cross_flops
from causalrope_sp.planning.decode_cost import VaeSize
from causalrope_sp.planning.machines import GPUS, LINKS, machine
from causalrope_sp.planning.workload import Workload
from causalrope_sp.sampling.pass_inputs import Part
from causalrope_sp.sampling.stream import CausalStream
from causalrope_sp.weights.key_layout import stored_tensors
from causalrope_sp.weights.wan_keys import WAN as WAN_KEYS

CONFIG = DiTConfig(dim=48, ffn_dim=80, num_heads=4, num_layers=3, text_dim=8, text_len=5, freq_dim=16, in_channels=2)
WORK = Workload(CONFIG, LatentGrid(3, 4), window=6, chunk_frames=2, steps=4, itemsize=4)
WAN = Workload(PRESETS["wan2.1-14b"], LatentGrid.from_pixels(480, 832, 8), window=21, chunk_frames=3, steps=4)
H100 = machine("h100", "nvlink")


def shell(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli, ["plan", *map(str, words)], env={"COLUMNS": "200"})
    return result.exit_code, result.output


def strategies_of(output: str) -> list[dict[str, Any]]:
    return json.loads(output)["strategies"]


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, image_dim=7, control_channels=3), *PRESETS.values()])
def test_parameters_are_the_models(config: DiTConfig) -> None:
    with torch.device("meta"):
        counted = sum(parameter.numel() for parameter in CausalDiT(config).parameters())
    assert replace(WORK, config=config).parameters == counted


def test_flops_are_those_that_torch_counts() -> None:
    """A pass in the middle of a stream, its window full."""
    torch.manual_seed(0)
    model, grid = CausalDiT(CONFIG).eval().requires_grad_(False), WORK.grid
    strategy = Strategy(grid.tokens, CONFIG.num_heads)
    stream = CausalStream(
        model, torch.randn(1, CONFIG.text_len, CONFIG.text_dim), grid, SlidingWindow(6), Shard(grid), strategy
    )
    x = torch.randn(1, 2, grid.tokens, CONFIG.token_dim)
    for n in range(3):
        stream.commit(Part(Chunk(n, 2 * n, 2), x, 0.0))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        stream.denoise(Chunk(3, 6, 2), x, 1000.0)
    tokens = 2 * grid.tokens
    a_timestep = 2 * CONFIG.dim * (CONFIG.freq_dim + CONFIG.dim + 6 * CONFIG.dim)
    alone = parse_strategy("ulysses", 1)
    expected = WORK.linear_flops * tokens + cross_flops(WORK, tokens) + attention_flops(alone, WORK, 0, 2, 6)
    assert counter.get_total_flops() == expected + a_timestep


def test_the_design_has_the_same_flops() -> None:
    """DESIGN §7: one steady pass at 480×832; 1.3B 11.7 TFLOP linear and 28.3 of attention, 14B 112 and 125."""
    alone = parse_strategy("ulysses", 1)
    for name, linear, attention in (("wan2.1-1.3b", 11.7e12, 28.3e12), ("wan2.1-14b", 112e12, 125.6e12)):
        work = replace(WAN, config=PRESETS[name])
        assert work.linear_flops * 4680 == pytest.approx(linear, rel=0.005)
        assert attention_flops(alone, work, 0, 3, 21) == pytest.approx(attention, rel=0.005)


@pytest.mark.parametrize("ranks", [2, 3, 5, 8, 12])
def test_ranks_share_the_work(ranks: int) -> None:
    alone = attention_flops(parse_strategy("ulysses", 1), WAN, 0, 3, 21)
    for name in strategies(ranks, 40):
        layout = parse_strategy(name, ranks)
        assert sum(attention_flops(layout, WAN, rank, 3, 21) for rank in range(ranks)) == alone


def test_auto_takes_the_fastest_that_fits() -> None:
    for ranks in (1, 2, 7, 8, 64):
        costs = plan(WAN, ranks, H100)
        (chosen,) = [cost for cost in costs if cost.chosen]
        assert chosen.chunk_ms == pytest.approx(min(cost.chunk_ms for cost in costs if cost.fits), abs=1e-3)
        assert plan(WAN, ranks, H100) == costs
    small = replace(H100, memory=40e9)
    assert {cost.strategy: cost.fits for cost in plan(WAN, 8, small)}["gather-kv"] is False
    (chosen,) = [cost for cost in plan(WAN, 8, small) if cost.chosen]
    assert chosen.fits
    assert chosen.strategy != "gather-kv"


def test_heads_that_do_not_divide_cost_balance() -> None:
    uneven = {cost.strategy: cost for cost in plan(replace(WAN, config=PRESETS["wan2.1-1.3b"]), 8, H100)}
    assert uneven["ulysses"].imbalance > 1.2  # 12 heads on 8 ranks: half of them attend with two
    assert uneven["ulysses4xgather-kv2"].imbalance < 1.01


def test_one_rank_communicates_nothing() -> None:
    (alone,) = plan(WAN, 1, H100)
    assert (alone.bytes_per_pass, alone.bytes_per_chunk, alone.collectives_per_chunk, alone.exposed_ms) == (0, 0, 0, 0)
    assert alone.efficiency == 1


def test_a_slow_link_is_exposed_and_a_fast_one_hidden() -> None:
    costs = {link: {p.strategy: p for p in plan(WAN, 8, machine("h100", link))} for link in LINKS}
    assert costs["nvlink"]["gather-kv"].exposed_ms < costs["nvlink"]["ulysses"].exposed_ms
    assert costs["ethernet"]["ulysses"].exposed_ms < costs["ethernet"]["gather-kv"].exposed_ms


def test_json_has_every_strategy_and_field() -> None:
    status, output = shell("--model", "wan2.1-14b", "--ranks", 8, "--json")
    assert status == 0
    found = strategies_of(output)
    assert [entry["strategy"] for entry in found] == strategies(8, 40)
    names = "strategy ranks collectives_per_pass bytes_per_pass memory_bytes compute_ms communication_ms exposed_ms"
    names += " chunk_ms fps first_frame_ms efficiency chosen"
    assert all(set(names.split()) <= set(entry) for entry in found)
    assert sum(entry["chosen"] for entry in found) == 1
    by_name = {entry["strategy"]: entry["bytes_per_pass"] for entry in found}
    elements = 4 * 585 * 5120 * 7 / 8  # DESIGN §4: 4·(C/P)·D·(P-1)/P a layer
    assert by_name["ulysses"] == 40 * 2 * elements


def test_decoding_is_planned_with_its_ranks() -> None:
    status, output = shell("--model", "wan2.1-1.3b", "--ranks", 8, "--json")
    assert status == 0
    decoding = json.loads(output)["decoding"]
    assert decoding["chunk_ms"] > decoding["decode_ms"] / 8
    assert decoding["fps"] == pytest.approx(12e3 / decoding["chunk_ms"], rel=1e-3)
    _, output = shell("--model", "wan2.1-1.3b", "--ranks", 8)
    way = f"{decoding['decoders']} of 8 ranks decode alone" if decoding["decoders"] else "all ranks decode"
    assert way in " ".join(output.split())
    _, output = shell("--model", "wan2.1-1.3b", "--ranks", 1)
    assert "one rank does both in turn" in " ".join(output.split())


def test_the_table_fits_a_screen() -> None:
    status, output = shell("--model", "wan2.1-14b", "--ranks", 8)
    assert status == 0
    assert "Predicted, not measured" in output
    assert len(output.splitlines()) < 24


def test_toybox_and_a_checkpoint_can_be_planned() -> None:
    from causalrope_sp.toybox import WEIGHTS

    for model in ("toybox", WEIGHTS / "toybox.safetensors"):
        status, output = shell("--model", model, "--height", 64, "--width", 64, "--ranks", 2, "--json")
        assert status == 0, output
        assert {entry["strategy"] for entry in strategies_of(output)} == {"ulysses", "gather-kv", "shard-kv"}


def test_measured_rates_count(tmp_path: Path) -> None:
    (tmp_path / "rates.json").write_text(json.dumps({"matmul": 1e12, "link": 1e9}))
    status, slow = shell("--ranks", 2, "--json", "--measured", tmp_path / "rates.json")
    assert status == 0
    assert strategies_of(slow)[0]["chunk_ms"] > 10 * strategies_of(shell("--ranks", 2, "--json")[1])[0]["chunk_ms"]


@pytest.mark.parametrize("text", ["[]", '{"nope": 1}', '{"matmul": true}', '{"link": Infinity}', "[" * 100_000, "{"])
def test_rates_that_are_none_are_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "rates.json").write_text(text)
    status, output = shell("--measured", tmp_path / "rates.json")
    assert (status, output.count("\n")) == (2, 1)
    assert output.startswith("error: cannot use the measured rates in")


def test_a_plot_draws_the_numbers_of_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = pytest.importorskip("matplotlib.axes")
    drawn: dict[tuple[str, int], list[float]] = {}
    plot = axes.Axes.plot

    def noting(self: Any, ranks: list[int], values: list[float], **options: Any) -> Any:
        for count, value in zip(ranks, values, strict=True):
            drawn.setdefault((options["label"], count), []).append(value)
        return plot(self, ranks, values, **options)

    monkeypatch.setattr(axes.Axes, "plot", noting)
    status, _ = shell("--model", "wan2.1-1.3b", "--plot", tmp_path / "plan.png")
    assert status == 0
    assert (tmp_path / "plan.png").stat().st_size > 5000
    for ranks in (1, 4):
        for cost in strategies_of(shell("--model", "wan2.1-1.3b", "--ranks", ranks, "--json")[1]):
            labels = [label for label, count in drawn if count == ranks and cost["strategy"] in (label, "single")]
            assert labels or "x" in cost["strategy"]
            for label in labels:
                fps, memory = drawn[label, ranks]
                assert (fps, memory) == pytest.approx((cost["fps"], cost["memory_bytes"] / 1e9), rel=1e-3)
    assert drawn["ulysses", 1][1] > 17  # with text encoder and codec


def test_small_numbers_are_not_shown_as_nothing() -> None:
    status, output = shell("--model", "toybox", "--ranks", 2, "--gpu", "cpu")
    assert status == 0
    assert "; cpu, loopback" in output
    row = next(line.split() for line in output.splitlines() if line.strip().startswith("ulysses"))
    memory, megabytes = float(row[1]), float(row[3])
    found = next(cost for cost in strategies_of(shell("--model", "toybox", "--ranks", 2, "--gpu", "cpu", "--json")[1]))
    assert memory == pytest.approx(found["memory_bytes"] / 1e9, rel=0.05)
    assert megabytes == pytest.approx(found["bytes_per_pass"] / 1e6, rel=0.05)
    assert not re.search(r"[a-z] 0\.0\b", output)
    assert "; cpu, pcie" in shell("--model", "toybox", "--gpu", "cpu", "--link", "pcie")[1]
    assert "; h100, nvlink" in shell("--model", "toybox")[1]


def test_what_nothing_says_is_called_assumed(tmp_path: Path) -> None:
    beside = ["UMT5-XXL in bfloat16", "the Wan VAE"]
    status, output = shell("--model", "wan2.1-1.3b", "--json", "--window", 12, "--height", 480)
    assert (status, json.loads(output)["assumed"]) == (0, ["width 832", "chunk_frames 3", "4 steps", *beside])
    said = "Assumed, because nothing says it: height 480, width 832, window 21, chunk_frames 3, 4 steps, UMT5-XXL in"
    assert said in " ".join(shell("--model", "wan2.1-1.3b")[1].split())
    assert json.loads(shell("--model", "toybox", "--json")[1])["assumed"] == []
    assert "Assumed" not in shell("--model", "toybox")[1]
    size = replace(CONFIG, dim=256, num_heads=2, in_channels=16)
    save_file(stored_tensors(WAN_KEYS, size, CausalDiT(size).state_dict()), tmp_path / "self_forcing.safetensors")
    assumed = json.loads(shell("--model", tmp_path / "self_forcing.safetensors", "--json")[1])["assumed"]
    assert assumed == ["height 480", "width 832", "2 heads", *beside]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpu", "abacus"], f"unknown gpu 'abacus'; there are: {', '.join(GPUS)}"),
        (["--link", "string"], "unknown link 'string'"),
        (["--model", "nothing"], "no model 'nothing'"),
        (["--ranks", "2000"], "2000 ranks are more than the 1560 tokens of a frame"),
        (["--window", "2"], "window 2 is smaller than chunk + sink"),
        (["--height", "481"], "height 481 is not divisible by 16"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--height", "0"], "height 0 is not divisible by 16; the nearest that work: 16"),
        (["--height", "-16"], "height -16 is not divisible by 16; the nearest that work: 16"),
        (["--plot", "plan.zzz"], "cannot draw plan.zzz: it must be a .png, .svg or .pdf file"),
        (["--plot", "/nowhere/plan.png"], "cannot draw /nowhere/plan.png: no such folder"),
        (["--measured", "nothing.json"], "cannot use the measured rates in nothing.json"),
    ],
)
def test_wrong_input_is_one_line(words: list[str], said: str) -> None:
    status, output = shell(*words)
    assert status == 2
    assert output.startswith(f"error: {said}")
    assert output.count("\n") == 1


def test_a_workload_comes_from_its_configuration() -> None:
    work = Workload.of(CONFIG, WORK.grid, StreamConfig(chunk_frames=8), SamplerConfig((1000,)), window=6)
    assert (work.chunk_frames, work.steps) == (6, 1)


def test_wan_2_2s_strides_are_those_of_its_vae(tmp_path: Path) -> None:
    """TI2V-5B alone: its own VAE's stride, frame size and memory, by its name and by the channels of a checkpoint."""
    planned = PlannedModel.open("wan2.2-ti2v-5b")
    work = planned.workload()
    assert (planned.height, planned.width) == (704, 1280)
    assert (work.grid.rows, work.grid.columns, work.temporal_stride) == (22, 40, 4)
    found = planned.auxiliary(work, Offload(), on_cpu=False)
    assert found.codec == published_footprint(WAN_2_2, 704, 1280, 3).weights
    decoding = planned.decoding(work, 8, H100)
    assert decoding is not None
    assert decoding.decode_ms == VaeSize.of(WAN_2_2).decode_ms(work.grid, 3, H100)
    size = replace(CONFIG, in_channels=48)
    save_file(stored_tensors(WAN_KEYS, size, CausalDiT(size).state_dict()), tmp_path / "ti2v.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": size.num_heads, "text_len": size.text_len}))
    alone = PlannedModel.open(str(tmp_path / "ti2v.safetensors"))
    assert (alone.height, alone.width, alone.workload().grid) == (704, 1280, work.grid)


def test_two_models_are_counted_with_all_that_each_has() -> None:
    """Twice the weights and the cache, and one context pass more, which shares its forward with another pass."""
    (one,), (two,) = plan(WAN, 1, H100), plan(replace(WAN, models=2), 1, H100)
    assert (two.weights_bytes, two.cache_bytes) == (2 * one.weights_bytes, 2 * one.cache_bytes)
    assert two.activation_bytes == one.activation_bytes
    tokens, alone = 3 * WAN.grid.tokens, parse_strategy("ulysses", 1)
    context = WAN.linear_flops * tokens + cross_flops(WAN, tokens) + attention_flops(alone, WAN, 0, 3, 21)
    assert two.flops_per_chunk - one.flops_per_chunk == context - WAN.left_out_flops * tokens
    assert two.chunk_ms > one.chunk_ms
    costs = {n: {c.strategy: c for c in plan(replace(WAN, models=n), 8, H100)} for n in (1, 2)}
    for name, single in costs[1].items():
        assert costs[2][name].collectives_per_chunk == single.collectives_per_chunk
        assert costs[2][name].bytes_per_chunk > single.bytes_per_chunk or not single.bytes_per_pass


def test_the_rate_is_that_of_the_codecs_stride() -> None:
    """With twice the pixel frames a latent frame, twice the frames a second."""
    (four,), (eight,) = plan(WAN, 1, H100), plan(replace(WAN, temporal_stride=8), 1, H100)
    assert eight.fps == 2 * four.fps
    assert four.fps == pytest.approx(4e3 * 3 / four.chunk_ms)
