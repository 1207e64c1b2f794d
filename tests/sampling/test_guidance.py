"""Guidance and the solvers of many steps: against one forward over all frames, against diffusers, and on two lanes."""

from __future__ import annotations

import functools
import itertools
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from causalrope_sp import CausalVideoPipeline, ConfigError, SamplerConfig, SequenceParallel, StreamConfig
from causalrope_sp.cli.main import cli
from causalrope_sp.diffusion.schedule import add_noise, guided_steps, model_timesteps, sigmas, timesteps, with_overrides
from causalrope_sp.diffusion.solvers import start_solver
from causalrope_sp.distributed import strategies
from causalrope_sp.distributed.comm_stats import CommStats
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.grid import split_into_chunks
from causalrope_sp.pipeline.model_config import ModelConfig
from causalrope_sp.planning.cost import plan
from causalrope_sp.planning.machines import CPU
from causalrope_sp.planning.workload import Workload
from causalrope_sp.sampling.sampler import Source
from causalrope_sp.sampling.stream import CausalStream
from causalrope_sp.toybox import WEIGHTS
from causalrope_sp.verification.reference import block_causal_velocity
from tests.sampling.test_sampler import CONFIG, FRAME, GRID, MODEL, noise_of, relative, stream_configs, text
from tests.support.streams import run_chunks

MANY = (999.0, 700.0, 400.0, 100.0)


def negative(batch: int = 1) -> Tensor:
    return torch.randn(batch, CONFIG.text_len, CONFIG.text_dim, generator=torch.Generator().manual_seed(7)).double()


def sample(frames: int, batch: int = 1, **options: Any) -> Tensor:
    options = {"negative_embeds": negative(batch)} | options
    chunks = run_chunks(MODEL, text(batch), noise_of(batch), GRID, frames, **options)
    return torch.cat([chunk.latents for chunk in chunks], 1)


def from_one_forward(
    streamed: Tensor, stream: StreamConfig, sampler: SamplerConfig, redrawn: Tensor | None, begin: int
) -> Tensor:
    """What the solver reaches if every velocity of both prompts comes from one forward over all frames at once, with
    the streamed video as the clean past: that video itself, if each branch's cache holds what it should."""
    batch, frames = streamed.shape[:2]
    cut = split_into_chunks(frames, stream.chunk_frames, independent_first_frame=stream.independent_first_frame)
    chunks, draw, levels = list(cut), noise_of(batch), sigmas(sampler)
    low, high = sampler.guidance_interval

    def noise(step: int) -> Tensor:
        return torch.cat([draw(chunk, step) for chunk in chunks], 1).double()

    def velocity(prompt: Tensor, x: Tensor, t: float) -> Tensor:
        return block_causal_velocity(
            MODEL, prompt, GRID, chunks, streamed, x, t, window=stream.window, sink=stream.sink
        )

    x = noise(0) if redrawn is None else add_noise(redrawn, noise(begin), levels[begin])
    solve = start_solver(sampler, begin)
    for step, sigma in list(enumerate(levels))[begin:]:
        t = float(int(1000 * sigma)) if sampler.solver == "unipc" else 1000 * sigma
        v = velocity(text(batch), x, t)
        if sampler.guidance_scale != 1 and low <= t <= high:
            away = velocity(negative(batch), x, t)
            v = away + sampler.guidance_scale * (v - away)
        x = solve(x, v, sigma, [*levels, 0.0][step + 1], lambda step=step: noise(step + 1))
    return x


samplers = st.builds(
    SamplerConfig,
    st.sampled_from([(999.0,), MANY]),
    st.sampled_from([1.0, 5.0]),
    st.sampled_from(["renoise", "euler", "unipc"]),
    st.sampled_from([0.0, 1.0, 2.5]),
    st.sampled_from([(0, 1000), (450, 1000), (0, 999.5), (300, 800)]),
).filter(lambda sampler: sampler.guidance_scale == 1 or any(guided_steps(sampler)))


@given(stream_configs(), samplers, st.integers(1, 7), st.integers(1, 2), st.booleans(), st.data())
@settings(max_examples=40)
def test_both_branches_hold_the_whole_past(
    stream: StreamConfig, sampler: SamplerConfig, frames: int, batch: int, fuse: bool, data: st.DataObject
) -> None:
    options: dict[str, Any] = {"stream": stream, "sampler": sampler, "fuse_context_pass": fuse}
    redrawn, begin = None, data.draw(st.integers(0, len(sampler.steps) - 1))
    if begin:
        drawing = torch.randn(batch, frames, *FRAME, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
        options["source"] = Source(lambda chunk: drawing[:, chunk.start : chunk.stop], begin)
        redrawn = drawing
    streamed = sample(frames, batch, **options)
    assert relative(streamed, from_one_forward(streamed, stream, sampler, redrawn, begin)) < 1e-12


GUIDED = SamplerConfig(MANY, 5.0, "unipc", 2.5)
STREAM = StreamConfig(window=5, sink=1, chunk_frames=2)


def test_scale_1_is_no_guidance_and_no_second_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = sample(5, stream=STREAM, sampler=replace(GUIDED, guidance_scale=1.0), negative_embeds=None)
    opened: list[CausalStream] = []
    init = CausalStream.__init__
    monkeypatch.setattr(CausalStream, "__init__", lambda self, *a, **k: opened.append(self) or init(self, *a, **k))
    assert torch.equal(sample(5, stream=STREAM, sampler=replace(GUIDED, guidance_scale=1.0)), plain)
    assert len(opened) == 1
    assert relative(sample(5, stream=STREAM, sampler=GUIDED), plain) > 1e-2
    assert len(opened) == 3


def test_a_negative_prompt_that_is_the_prompt_changes_nothing() -> None:
    plain = sample(5, stream=STREAM, sampler=replace(GUIDED, guidance_scale=1.0))
    assert relative(sample(5, stream=STREAM, sampler=GUIDED, negative_embeds=text(1)), plain) < 1e-13


def test_only_guided_steps_cost_a_second_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[tuple[int, int, float, bool]] = []
    denoise = CausalStream.denoise

    def noting(self: CausalStream, chunk: Any, x: Tensor, timestep: float, context: Any = None) -> Tensor:
        passes.append((id(self), chunk.index, timestep, context is not None))
        return denoise(self, chunk, x, timestep, context)

    monkeypatch.setattr(CausalStream, "denoise", noting)
    sampler = replace(GUIDED, shift=1.0, guidance_interval=(400, 700))
    assert guided_steps(sampler) == [False, True, True, False]
    sample(5, stream=STREAM, sampler=sampler)
    conditional = passes[0][0]
    first, second = ([p[1:] for p in passes if (p[0] == conditional) == mine] for mine in (True, False))
    assert first == [(chunk, t, bool(chunk and t == 999)) for chunk in range(3) for t in MANY]
    assert second == [(chunk, t, bool(chunk and t == 700)) for chunk in range(3) for t in MANY[1:3]]


def run(solve: Callable[[Tensor, Tensor, int], Tensor], dtype: torch.dtype, steps: int) -> Tensor:
    """A flow that bends, from noise to wherever the solver leads."""
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    for step in range(steps):
        x = solve(x, torch.sin(3 * x) + x.roll(1, -1), step)
    return x


def ours(config: SamplerConfig, dtype: torch.dtype) -> Tensor:
    solve, levels = start_solver(config), [*sigmas(config), 0.0]
    return run(lambda x, v, n: solve(x, v, levels[n], levels[n + 1], lambda: x), dtype, len(config.steps))


@pytest.mark.parametrize(("steps", "shift"), [(1, 5.0), (2, 1.0), (8, 5.0), (50, 3.0)])
def test_unipc_is_diffusers(steps: int, shift: float) -> None:
    """As Wan's pipeline there calls it, noise levels in float32."""
    config = SamplerConfig(timesteps(steps, "unipc"), shift, "unipc")
    theirs = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    theirs.set_timesteps(sigmas=np.linspace(0.999, 0, steps + 1)[:-1])
    assert theirs.timesteps.tolist() == model_timesteps(config)
    told = [*theirs.timesteps]
    expected = run(lambda x, v, n: theirs.step(v, told[n], x).prev_sample, torch.float64, steps)
    assert relative(ours(config, torch.float64), expected) < 1e-5
    assert relative(ours(config, torch.float32).double(), ours(config, torch.float64)) < 1e-5
    assert ours(config, torch.float32).dtype == torch.float32


def unipc_by_hand(config: SamplerConfig) -> Callable[[Tensor, Tensor, int], Tensor]:
    """UniPC of order 2 with B(h) = e^h - 1 (arXiv 2302.04867), its coefficients in Python's floats."""
    levels = [*sigmas(config), 0.0]
    past: list[tuple[Tensor, Tensor, int]] = []  # (x, x0, order) of each step

    def log_snr(sigma: float) -> float:
        return math.log(1 - sigma) - math.log(sigma) if sigma else math.inf

    def solve(x: Tensor, v: Tensor, n: int) -> Tensor:
        x0 = x - levels[n] * v
        if past:  # correct what the last step predicted
            last, m0, order = past[-1]
            h = log_snr(levels[n]) - log_snr(levels[n - 1])
            phi1 = math.expm1(-h)
            base = levels[n] / levels[n - 1] * last - (1 - levels[n]) * phi1 * m0
            if order == 1:
                res = 0.5 * (x0 - m0)
            else:
                r = (log_snr(levels[n - 2]) - log_snr(levels[n - 1])) / h
                phi2 = phi1 / -h - 1
                b = phi2 / phi1, 2 * (phi2 / -h - 0.5) / phi1
                first = (b[1] - b[0]) / (r - 1)
                res = first * (past[-2][1] - m0) / r + (b[0] - first) * (x0 - m0)
            x = base - (1 - levels[n]) * phi1 * res
        order = min(2, len(config.steps) - n, len(past) + 1)
        past.append((x, x0, order))
        if not levels[n + 1]:
            return x0
        h = log_snr(levels[n + 1]) - log_snr(levels[n])
        phi1 = math.expm1(-h)
        made = levels[n + 1] / levels[n] * x - (1 - levels[n + 1]) * phi1 * x0
        if order == 2:
            r = (log_snr(levels[n - 1]) - log_snr(levels[n])) / h
            made = made - (1 - levels[n + 1]) * phi1 * 0.5 * (past[-2][1] - x0) / r
        return made

    return solve


@pytest.mark.parametrize("shift", [2.0, 3.0, 5.0, 8.0])
def test_the_model_is_told_what_diffusers_tells_it(shift: float) -> None:
    theirs = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    for steps in range(1, 101):
        theirs.set_timesteps(sigmas=np.linspace(0.999, 0, steps + 1)[:-1])
        assert theirs.timesteps.tolist() == model_timesteps(SamplerConfig(timesteps(steps, "unipc"), shift, "unipc"))


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 50])
def test_unipc_is_float64_throughout(steps: int) -> None:
    config = SamplerConfig(timesteps(steps, "unipc"), 5.0, "unipc")
    assert relative(ours(config, torch.float64), run(unipc_by_hand(config), torch.float64, steps)) < 1e-12


def test_unipc_that_begins_late_is_unipc_of_the_steps_that_are_left() -> None:
    x = torch.randn(1, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    config = SamplerConfig(timesteps(8, "unipc"), 5.0, "unipc")
    left = replace(config, steps=config.steps[3:])
    late, fresh = start_solver(config, 3), start_solver(left)
    one, other, levels = x, x, [*sigmas(left), 0.0]
    for sigma, to in itertools.pairwise(levels):
        one = late(one, torch.sin(3 * one), sigma, to, lambda: x)
        other = fresh(other, torch.sin(3 * other), sigma, to, lambda: x)
    assert torch.equal(one, other)


def test_euler_is_diffusers() -> None:
    config = SamplerConfig(timesteps(20), 5.0, "euler")
    theirs = FlowMatchEulerDiscreteScheduler(shift=5.0)
    theirs.set_timesteps(sigmas=[step / 1000 for step in config.steps])
    told = [*theirs.timesteps]
    expected = run(lambda x, v, n: theirs.step(v, told[n], x).prev_sample, torch.float32, 20)
    assert relative(ours(config, torch.float32), expected) < 1e-5


def test_only_unipc_needs_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert sample(3, sampler=SamplerConfig((1000, 500), guidance_scale=2.0)).isfinite().all()
    with pytest.raises(ConfigError, match="unipc needs diffusers, which is not installed"):
        sample(3, sampler=GUIDED)


def test_another_solver_takes_as_many_steps() -> None:
    config = with_overrides(SamplerConfig(), solver="unipc", guidance=3.0)
    assert config.steps == (999, 749.25, 499.5, 249.75)
    assert with_overrides(config, guidance_interval=(0, 500)).steps == config.steps
    assert with_overrides(config, steps=2).steps == (999, 499.5)
    assert with_overrides(SamplerConfig(), steps=(900, 20), solver="unipc").steps == (900, 20)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"guidance_scale": -1.0}, "guidance scale must be from 0 to 1000, not -1"),
        ({"guidance_scale": math.nan}, "guidance scale must be from 0 to 1000"),
        ({"shift": math.inf}, "shift must be from 0.001 to 1000, not inf"),
        ({"shift": 1e-320}, "shift must be from 0.001 to 1000"),
        ({"guidance_interval": (500, 400)}, "guidance is within an interval of timesteps 0 to 1000, not"),
        ({"guidance_interval": (0, 1001)}, "guidance is within an interval"),
        ({"guidance_interval": (1.0,)}, "guidance is within an interval"),
        ({"steps": (1000, 500)}, "unipc cannot start at 1000"),
    ],
)
def test_guidance_that_is_nonsense_is_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        replace(GUIDED, **change)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"negative_embeds": None}, "a guidance scale of 2.5 needs the embeddings of a negative prompt"),
        ({"negative_embeds": negative(2)}, r"negative embeddings have shape \(2, 3, 8\), the prompt's \(1, 3, 8\)"),
        (
            {"sampler": replace(GUIDED, guidance_interval=(0, 0.5))},
            "no step is within the guidance interval 0 to 0.5; ",
        ),
    ],
)
def test_a_stream_that_cannot_be_guided_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        sample(3, **({"sampler": GUIDED} | options))


# late: the negative branch makes up for its context pass while the positive one begins a chunk
LATE = replace(GUIDED, shift=1.0, guidance_interval=(0, 800))
SHORT = replace(GUIDED, shift=1.0, guidance_interval=(600, 1000))


def on_lanes(group: dist.ProcessGroup, device: str, lanes: int) -> list[dict[Any, Any]]:
    """Videos, ledgers of a chunk in mid-stream and refusals of every rank, in order of rank."""
    half, mine = group.size() // lanes, dict[Any, Any]()
    for strategy in strategies(half, CONFIG.num_heads) if half > 1 else ["ulysses"]:
        for name, sampler in {"all": GUIDED, "late": LATE, "short": SHORT}.items():
            parallel = SequenceParallel(group, strategy, device, cfg=lanes)
            options = {"stream": STREAM, "sampler": sampler, "negative_embeds": negative(), "parallel": parallel}
            parts = []
            for chunk in run_chunks(MODEL, text(1), noise_of(1), GRID, 8, **options):
                parts.append(chunk.latents)
                comm_stats = parallel.comm_stats.take()
            total, kinds = comm_stats.total(), {kind: e.calls for kind, e in comm_stats.by_kind().items()}
            mine[strategy, name] = torch.cat(parts, 1), total.calls, total.elements, kinds
    said = []
    for sampler in (replace(GUIDED, guidance_scale=1.0), GUIDED):
        count = 2 if sampler.guidance_scale == 1 else group.size()
        try:
            parallel = SequenceParallel(group, "auto", device, cfg=count)
            sample(3, sampler=sampler, parallel=parallel)
            said.append("nothing")
        except ConfigError as error:
            said.append(str(error))
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, mine | {"said": said})
    return everyone


Found = Callable[[int, int], list[dict[Any, Any]]]


@pytest.fixture(scope="module")
def found_on(pool: RankPool) -> Found:
    return functools.cache(lambda ranks, lanes: pool.run(on_lanes, ranks, lanes))


@pytest.mark.parametrize(("ranks", "lanes"), [(2, 1), (2, 2), (4, 2)])
def test_lanes_make_the_same_video_with_the_collectives_that_plan_counts(
    found_on: Found, ranks: int, lanes: int
) -> None:
    found = found_on(ranks, lanes)
    for name, sampler in {"all": GUIDED, "late": LATE, "short": SHORT}.items():
        alone = sample(8, stream=STREAM, sampler=sampler)
        work = Workload.of(CONFIG, GRID, STREAM, sampler, STREAM.window or 0, itemsize=8)
        # a plan counts a chunk's latents as the float32 that they are for a float32 model
        costs = {cost.strategy: cost for cost in plan(replace(work, itemsize=4), ranks, CPU, cfg_sizes=[lanes])}
        for strategy in [key[0] for key in found[0] if key[1:] == (name,)]:
            cost = costs["single" if ranks == lanes else strategy]
            rows = [rank[strategy, name] for rank in found]
            assert all(torch.equal(row[0], rows[0][0]) for row in rows)
            assert relative(rows[0][0], alone) < 1e-10
            conditional = rows[: ranks // lanes]
            assert all(row[1] == cost.collectives_per_chunk for row in conditional)
            assert max(row[2] for row in conditional) == cost.bytes_per_chunk // 4
            assert max(row[2] for row in rows) == cost.bytes_per_chunk // 4
            assert all(row[3].get("guidance", 0) == (len(MANY) if lanes == 2 else 0) for row in rows)
            steps = sum(guided_steps(sampler))
            for row in rows[ranks // lanes :]:  # the negative lane, whose context pass rides or is made up for
                passes = steps if guided_steps(sampler)[0] else steps + 1
                rest = len(MANY) + (ranks > lanes)
                assert row[1] == cost.collectives_per_pass * passes + rest


def test_lanes_without_branches_are_refused_on_every_rank(found_on: Found) -> None:
    for rank in found_on(4, 2):
        assert rank["said"] == [
            "2 lanes of ranks need as many branches: without guidance, a scale other than 1, there is one",
            "4 lanes of ranks need as many branches: guidance has two",
        ]


def test_lanes_that_cross_are_even_for_the_watchdog() -> None:
    """Or a rank that waits in the lane with fewer collectives would be taken for the one that is stuck."""
    busy, idle = CommStats(), CommStats()
    for _ in range(3):
        for _ in range(5):
            busy.begin("kv", 0, 1, torch.zeros(1))
        idle.begin("guidance", -1, 1, torch.zeros(1))
        assert idle.begun > busy.begun
        busy.begin("guidance", -1, 1, torch.zeros(1))
        assert idle.begun == busy.begun


def test_one_lane_keeps_two_caches_and_two_lanes_one_each() -> None:
    work = Workload.of(CONFIG, GRID, STREAM, GUIDED, 5)
    one, two = ({c.strategy: c for c in plan(work, 4, CPU, cfg_sizes=[lanes])} for lanes in (1, 2))
    plain = {c.strategy: c for c in plan(replace(work, guided=0), 4, CPU)}
    assert one["gather-kv"].cache_bytes == 2 * plain["gather-kv"].cache_bytes
    assert two["gather-kv"].cache_bytes == plain["gather-kv"].cache_bytes  # all tokens, one branch
    assert one["gather-kv"].compute_ms == pytest.approx(2 * plain["gather-kv"].compute_ms)
    (chosen,) = [c for c in plan(work, 4, CPU, cfg_sizes=[1, 2]) if c.chosen]
    assert chosen.chunk_ms == min(c.chunk_ms for c in [*one.values(), *two.values()])


TOYBOX = "a red circle slides right"


def test_a_pipeline_is_guided_by_prompts_and_by_embeddings(tmp_path: Path) -> None:
    pipe = CausalVideoPipeline.from_pretrained("toybox-flow", steps=2, guidance=2.0, device="cpu")
    made = pipe(TOYBOX, frames=9, negative_prompt="a blue square bounces")
    (embeds,) = pipe.text.encode_all(["a blue square bounces"], 0)
    assert np.array_equal(pipe(TOYBOX, frames=9, negative_embeds=embeds), made)
    zeros = torch.zeros_like(embeds)
    assert np.array_equal(pipe(TOYBOX, frames=9), pipe(TOYBOX, frames=9, negative_embeds=zeros))
    assert not np.array_equal(pipe(TOYBOX, frames=9), made)
    with pytest.raises(ConfigError, match="either a negative prompt or its embeddings"):
        pipe.stream(TOYBOX, negative_prompt="a blue square bounces", negative_embeds=embeds)
    with pytest.raises(ConfigError, match="1 ranks that denoise cannot be cut into 2 lanes"):
        SequenceParallel.single(cfg=2)


def pipeline_on_two_lanes(group: dist.ProcessGroup, device: str) -> list[Any]:
    parallel = SequenceParallel(group, "auto", device, cfg=2)
    pipe = CausalVideoPipeline.from_pretrained("toybox-flow", steps=2, guidance=2.0, parallel=parallel)
    made = pipe(TOYBOX, frames=21, negative_prompt="a blue square bounces")
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, (made, pipe.strategy))
    return everyone


def test_a_pipeline_on_two_lanes_hands_its_frames_out_on_rank_0(pool: RankPool) -> None:
    (made, label), (nothing, _) = pool.run(pipeline_on_two_lanes, 2)
    pipe = CausalVideoPipeline.from_pretrained("toybox-flow", steps=2, guidance=2.0, device="cpu")
    alone = pipe(TOYBOX, frames=21, negative_prompt="a blue square bounces")
    assert np.abs(made.astype(int) - alone).max() <= 1
    assert (label, nothing) == ("2×single", None)


def test_a_recipe_may_be_guided(tmp_path: Path) -> None:
    model_config = json.loads((WEIGHTS / "toybox.json").read_text())
    model_config |= {
        "transformer": str(WEIGHTS / model_config["transformer"]),
        "codec": str(WEIGHTS / model_config["codec"]),
    }
    guided = {"solver": "unipc", "steps": [999, 500], "guidance_scale": 3, "guidance_interval": [400, 1000]}
    (tmp_path / "pipeline.json").write_text(json.dumps(model_config | {"sampler": guided}))
    assert ModelConfig.load(tmp_path / "pipeline.json").sampler == SamplerConfig(
        (999, 500), 5.0, "unipc", 3, (400, 1000)
    )


def shell(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli, [*words])
    return result.exit_code, result.output


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--guidance", "-1"], "the guidance scale must be from 0 to 1000"),
        (["--guidance", "3", "--guidance-interval", "0", "1"], "no step is within the guidance interval 0 to 1"),
        (["--guidance-interval", "0", "500"], "a guidance interval says nothing without a guidance scale other than 1"),
        (["--negative-prompt", TOYBOX], "a negative prompt needs guidance"),
        (["--negative-prompt", "nothing"], "unknown word 'nothing' in the prompt"),
        (["--guidance", "3", "--guidance-parallel"], "1 ranks that denoise cannot be cut into 2 lanes"),
        (["--solver", "unipc", "--steps", "1000,500"], "solver unipc cannot start at 1000"),
        (["--negative-prompt", TOYBOX, "--negative-embeds", "f"], "give either a negative prompt or its embeddings"),
    ],
)
def test_wrong_guidance_is_one_line_and_status_2(words: list[str], told: str, tmp_path: Path) -> None:
    status, output = shell("generate", TOYBOX, "--frames", "1", "--out", str(tmp_path / "v.mp4"), *words)
    assert (status, output.count("\n")) == (2, 1)
    assert told in output


def test_generate_and_plan_take_guidance(tmp_path: Path) -> None:
    words = ["--guidance", "2", "--guidance-interval", "300", "1000", "--steps", "3"]
    out = str(tmp_path / "v.mp4")
    status, output = shell("generate", TOYBOX, "--frames", "1", "--out", out, "--solver", "unipc", "--json", *words)
    assert status == 0, output
    status, output = shell("plan", "--model", "toybox", "--ranks", "2", *words)
    assert status == 0, output
    assert "3 steps, 3 of them guided" in output.replace("\n", " ").replace("  ", " ")
    assert "2×single" in output
