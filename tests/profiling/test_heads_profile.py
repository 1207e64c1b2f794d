"""Where heads look, and what a search decides, against masks and plain sums over toybox's own passes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from causalrope_kernels import project
from causalrope_sp import CausalVideoPipeline, SequenceParallel
from causalrope_sp.cli.main import cli
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.heads import HeadPolicy, read_heads
from causalrope_sp.profiling import heads
from causalrope_sp.profiling.head_search import HeadSearch, ladder
from causalrope_sp.profiling.heads import HeadRecorder, by_mass, profile_heads, recording_heads
from causalrope_sp.toybox import WEIGHTS

PROMPT = "a red circle slides right"
FRAMES, STATIC = 45, 5  # toybox: 12 latent frames; sink 1, the newest frame and a chunk of 3


@pytest.fixture(scope="module")
def pipe() -> CausalVideoPipeline:
    return CausalVideoPipeline.from_pretrained("toybox", dtype="float64", device="cpu")


@pytest.fixture(scope="module")
def recorded(pipe: CausalVideoPipeline) -> tuple[Any, HeadRecorder, list[Tensor]]:
    """A video's session, its recorder, and by layer the queries of its last kept pass."""
    session = pipe.open(PROMPT, num_frames=FRAMES, seed=3)
    session.step()
    recorder, queries = HeadRecorder(session.loop, newest=4), list[Tensor]()
    attend = recorder.attend

    def noting(layer: int, projection: Any, step: Any) -> Tensor:
        if layer == 0:
            queries.clear()
        queries.append(project(projection)[0])
        return attend(layer, projection, step)

    recorder.attend = noting  # type: ignore[method-assign]
    while not heads.is_last(session.loop):
        session.step()
    with recording_heads(pipe.model, recorder):
        for _ in session:
            pass
    return session, recorder, queries


def masked(recorder: HeadRecorder, policy: HeadPolicy) -> float:
    """The relative squared error of the velocity with a mask for each head over the frames that the cache holds."""
    sample = recorder.samples[-1]
    stream, chunk = sample.stream, sample.chunk
    window = stream.cache.window
    frames = list(window.held(chunk.stop).values())
    sink = [0]
    others = sorted(frame for frame in frames if frame not in sink)

    def begin(_: Any, args: Any) -> Any:
        tokens, step = args

        def attend(layer: int, projection: Any) -> Tensor:
            step.attend(layer, projection)  # writes the chunk's keys and values
            q = project(projection)[0]
            (keys,) = stream.cache.keys(layer, chunk, 0, False)
            k, v = (torch.cat([x[:, a:b] for a, b in keys.ranges or ()], 1) for x in (keys.k, keys.v))
            found = []
            for head, seen in enumerate(policy.frames(window.frames)[layer]):
                newest = others[max(0, len(others) - (seen - len(sink))) :]
                mask = torch.tensor([frame in sink or frame in newest for frame in frames])
                mask = mask.repeat_interleave(k.shape[1] // len(frames)).expand(1, 1, 1, -1)
                q_h, k_h, v_h = (x[:, :, head : head + 1].transpose(1, 2) for x in (q, k, v))
                output = scaled_dot_product_attention(q_h, k_h, v_h, attn_mask=mask).transpose(1, 2)
                found.append(output if seen else torch.zeros_like(output))
            return torch.cat(found, 2)

        return tokens, replace(step, attend=attend)

    hook = stream._model.register_forward_pre_hook(begin)
    with torch.inference_mode():
        velocity = stream.denoise(chunk, sample.tokens_BFSE, sample.timestep)
    hook.remove()
    return float((velocity - sample.velocity_BFSE).square().sum() / sample.velocity_BFSE.square().sum())


def test_the_error_of_a_policy_is_that_of_masks(recorded: tuple[Any, HeadRecorder, list[Tensor]]) -> None:
    session, recorder, _ = recorded
    search = HeadSearch(session.loop, recorder.samples[-1:], [STATIC], 0.5, 0.5)
    windows: list[list[int | None]] = [[None] * 6 for _ in range(6)]
    assert search.error(HeadPolicy(tuple(map(tuple, windows)))) < 1e-20
    for changes in ({(3, 2): STATIC}, {(1, 0): STATIC, (2, 5): 0, (5, 3): 7}):
        for (layer, head), window in changes.items():
            windows[layer][head] = window
        policy = HeadPolicy(tuple(map(tuple, windows)))
        assert search.error(policy) == pytest.approx(masked(recorder, policy), rel=1e-8)
        assert search.error(policy) > 1e-8


def test_masses_are_sums_over_softmax(recorded: tuple[Any, HeadRecorder, list[Tensor]]) -> None:
    """One more pass, layer by layer, adds what a plain softmax over the cache says."""
    _, recorder, queries = recorded
    sample, stream = recorder.samples[-1], recorder.samples[-1].stream
    frames = list(stream.cache.window.held(sample.chunk.stop).values())
    before = recorder.masses_LH2.clone()
    for layer, q in enumerate(queries):
        recorder._add(stream, sample.chunk, layer, q)
        (keys,) = stream.cache.keys(layer, sample.chunk, 0, False)
        k = torch.cat([keys.k[:, a:b] for a, b in keys.ranges or ()], 1)
        weights = (torch.einsum("bthd,blhd->bhtl", q, k) / q.shape[-1] ** 0.5).softmax(-1).sum((0, 2))
        by_frame = dict(zip(frames, weights.unflatten(1, (len(frames), -1)).sum(-1).unbind(1), strict=True))
        newest = torch.stack([mass for frame, mass in by_frame.items() if frame >= sample.chunk.stop - 4]).sum(0)
        outside = torch.stack([mass for frame, mass in by_frame.items() if frame >= 1]).sum(0)
        added = (recorder.masses_LH2 - before)[layer]
        torch.testing.assert_close(added, torch.stack([newest, outside], 1), rtol=1e-5, atol=0)


def test_the_search_keeps_what_lowers_error_and_keys_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps down the ladder come by their price, are carried forward, and the search ends at its budget; layer 0 is
    left alone."""
    tried: list[tuple[tuple[int | None, ...], ...]] = []
    costs: dict[tuple[int, int], dict[int | None, float]] = {
        (1, 0): {8: 0.001, 5: 0.02},  # a step for each
        (1, 1): {8: 9.0, 5: 9.0},
        (2, 0): {8: 0.01, 5: 0.011},  # both in one step
        (2, 1): {8: 0.0, 5: 0.0},
    }

    def error(self: HeadSearch, policy: HeadPolicy) -> float:
        tried.append(policy.windows)
        return sum(
            costs[layer, head].get(window, 10.0)
            for layer, windows in enumerate(policy.windows)
            for head, window in enumerate(windows)
            if window is not None
        )

    def kept(self: HeadSearch, policy: HeadPolicy) -> float:
        return sum(sum(layer) for layer in policy.frames(10)) / 60

    monkeypatch.setattr(HeadSearch, "error", error)
    monkeypatch.setattr(HeadSearch, "kept", kept)
    loop: Any = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(num_layers=3, num_heads=2)))
    found = HeadSearch(loop, [], [8, 5, 0], 0.5, 0.0).run()
    assert found.policy.windows == ((None, None), (5, None), (5, 5))
    assert [round(60 * keys) for keys, _ in found.curve] == [60, 58, 55, 53, 48, 45]
    assert tried[12:17] == [
        ((None, None), (None, None), (None, 8)),
        ((None, None), (None, None), (None, 5)),
        ((None, None), (8, None), (None, 5)),
        ((None, None), (8, None), (5, 5)),
        ((None, None), (5, None), (5, 5)),
    ]
    assert HeadSearch(loop, [], [8, 5, 0], 0.5, 0.9).run().policy.windows == ((None, None), (8, None), (None, 5))


def test_a_ladder_has_the_windows_between_a_static_head_and_the_whole() -> None:
    assert ladder(5, 3, 21) == [13, 8, 5, 0]
    assert ladder(5, 3, 13) == [9, 8, 5, 0]
    assert ladder(5, 3, 6) == [5, 0]


def on_ranks(group: dist.ProcessGroup, device: str) -> Any:
    parallel = SequenceParallel(group, "gather-kv", device)
    pipe = CausalVideoPipeline.from_pretrained("toybox", dtype="float64", parallel=parallel)
    return profile_heads(pipe, [PROMPT], FRAMES, 3, 1, search=(0.5, 0.9))


def test_ranks_measure_and_decide_alike(pool: RankPool, pipe: CausalVideoPipeline) -> None:
    """All of toybox's queries of a pass are measured, so the shares of two ranks are those of one."""
    assert pipe.settings().grid.tokens * 3 <= heads.QUERIES
    shares, searched = profile_heads(pipe, [PROMPT], FRAMES, 3, 1, search=(0.5, 0.9))
    assert searched is not None
    others, other = pool.run(on_ranks, 2)
    torch.testing.assert_close(torch.tensor(others), torch.tensor(shares), rtol=1e-5, atol=1e-6)
    assert other.policy == searched.policy
    torch.testing.assert_close(torch.tensor(other.curve), torch.tensor(searched.curve), rtol=1e-6, atol=1e-12)
    assert searched.curve[-1][0] <= 0.9
    static = by_mass(shares, 0.8, STATIC)
    assert all(window is None for window in static.windows[0])
    assert [[w == STATIC for w in layer] for layer in static.windows[1:]] == [
        [share >= 0.8 for share in layer] for layer in shares[1:]
    ]


def test_the_command_writes_what_generate_and_plan_take(tmp_path: Path) -> None:
    out, plot = str(tmp_path / "heads.json"), tmp_path / "heads.svg"
    words = ["profile-heads", PROMPT, "--frames", str(FRAMES), "--out", out, "--plot", str(plot), "--json"]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    policy = read_heads(out, chunk_frames=3, sink=1)
    assert found["shortened"] == sum(w is not None for layer in policy.windows for w in layer) > 5
    assert found["keys_seen"] < 0.95
    assert plot.stat().st_size > 5000
    video = str(tmp_path / "video.gif")
    done = CliRunner().invoke(cli, ["generate", PROMPT, "--frames", "33", "--heads", out, "--out", video, "--json"])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(cli, ["plan", "--model", "toybox", "--heads", out, "--ranks", "3", "--json"])
    strategies = {each["strategy"]: each for each in json.loads(done.output)["strategies"]}
    assert strategies["ulysses"]["head_imbalance"] > 1
    whole = json.loads(CliRunner().invoke(cli, ["plan", "--model", "toybox", "--ranks", "3", "--json"]).output)
    assert all(strategies[each["strategy"]]["cache_bytes"] < each["cache_bytes"] for each in whole["strategies"])
    done = CliRunner().invoke(cli, ["plan", "--model", "toybox", "--heads", out, "--similar-frames", "4"])
    said = " ".join(done.output.split())
    assert re.search(r"Heads see \d\d% of the window's keys, and attend \d\d% after a chunk's first pass", said)
    done = CliRunner().invoke(cli, ["plan", "--model", "wan2.1-1.3b", "--heads", out])
    assert (done.exit_code, done.output.count("\n")) == (2, 1)
    assert "heads: expected windows of 30 layers × 12 heads, got 6 × 6" in done.output


def test_a_file_says_what_the_search_was_asked_for(tmp_path: Path) -> None:
    out = tmp_path / "heads.json"
    words = [
        "profile-heads",
        PROMPT,
        "--frames",
        str(FRAMES),
        "--rule",
        "search",
        "--budget",
        "0.97",
        "--out",
        str(out),
    ]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    assert {name: found[name] for name in ("model", "rule", "weight", "budget")} == {
        "model": "toybox",
        "rule": "search",
        "weight": 0.5,
        "budget": 0.97,
    }


def test_all_frames_of_a_model_that_chooses_frames_are_measured(tmp_path: Path) -> None:
    model = json.loads((WEIGHTS / "toybox.json").read_text())
    model |= {name: str(WEIGHTS / model[name]) for name in ("transformer", "codec")}
    model["stream"]["similar_frames"] = 2
    (tmp_path / "pipeline.json").write_text(json.dumps(model))
    words = ["profile-heads", PROMPT, "--frames", str(FRAMES), "--json", "--model"]
    choosing, plain = (json.loads(CliRunner().invoke(cli, [*words, name]).output) for name in (str(tmp_path), "toybox"))
    assert choosing["shares"] == plain["shares"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--frames", "9"], "frames: expected a video in which chunks look back over more than a static head sees"),
        (
            ["--newest", "9"],
            "newest: expected sink + newest + chunk below the window of 13 latent frames",
        ),
        (["--rule", "search", "--share", "0.8"], "--share: expected with --rule mass alone, got --rule search"),
        (["--budget", "0.5"], "--budget: expected with --rule search alone, got --rule mass"),
        (["--weight", "1"], "--weight: expected with --rule search alone, got --rule mass"),
        (["--share", "2"], "--share must be a finite number of at least 0 and at most 1, not 2.0"),
        (["--model", "toybox-vin"], "toybox-vin makes its chunks in parallel, whose heads are not profiled"),
        (["--plot", "heads.zzz", "--model", "nothing"], "cannot draw heads.zzz"),
    ],
)
def test_wrong_input_is_one_line(words: list[str], said: str) -> None:
    done = CliRunner().invoke(cli, ["profile-heads", PROMPT, *words])
    assert (done.exit_code, done.output.count("\n")) == (2, 1), done.output
    assert done.output.startswith(f"error: {said}")
