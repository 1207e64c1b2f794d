"""`plan`, `inspect` and `profile-reuse` for whole-video models; the plan's counts against runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from click.testing import CliRunner
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from causalrope_sp.cli.main import cli
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.grid import shares
from causalrope_sp.planning.machines import CPU
from causalrope_sp.reuse import After, Broadcast, ReusePolicy, find_policy
from causalrope_sp.spatiotemporal.cost import VideoWork, pass_flops, video_cost
from causalrope_sp.spatiotemporal.open_sora.sampling import sample
from tests.support.latte_folder import save_latte_folder
from tests.support.open_sora_cases import OpenSoraCase, load_model, write_model
from tests.support.open_sora_folder import save_open_sora_folder

POLICY = ReusePolicy((Broadcast("temporal", 2), Broadcast("cross", 3), After("mlp", (1000,), 1, (1,))), "gated")
STEPS = 4


@pytest.fixture(scope="module")
def latte(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_latte_folder(tmp_path_factory.mktemp("latte"))


@pytest.fixture(scope="module")
def open_sora(goldens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_open_sora_folder(goldens / "open-sora", tmp_path_factory.mktemp("open-sora"))


def counted(group: dist.ProcessGroup | None, device: str, folder: Path, cases: Path, cfg: int) -> list[dict[str, Any]]:
    """On every rank: FLOPs, collectives and kept bytes of a short video with reuse."""
    case, parallel, model = (
        OpenSoraCase.load(cases / "open-sora-plain.safetensors"),
        SequenceParallel(group, cfg=cfg),
        None,
    )
    model = load_model(folder)
    texts, nulls = case.texts
    options: dict[str, Any] = {"timesteps": case.timesteps[:STEPS], "guidance_scale": 7.0, "fps": 24}
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # of the fused one none are counted
        sample(model, case.noise, texts, nulls, parallel=parallel, reuse=POLICY, **options)
    taken = parallel.comm_stats.take()
    calls = {kind: entry for kind, entry in taken.by_kind().items() if kind != "latents"}
    mine = {
        "flops": counter.get_total_flops(),
        "calls": sum(entry.calls for entry in calls.values()),
        "bytes": sum(entry.bytes for entry in calls.values()),
        "stored": taken.stored_bytes,
    }
    everyone: list[Any] = [mine]
    if group is not None:
        everyone = [None] * group.size()
        dist.all_gather_object(everyone, mine)
    return everyone


@pytest.mark.parametrize(("ranks", "cfg"), [(1, 1), (3, 1), (2, 2)])
def test_a_plan_counts_what_a_run_does(pool: RankPool, goldens: Path, tmp_path: Path, ranks: int, cfg: int) -> None:
    cases = goldens / "open-sora"
    found = pool.run(counted, ranks, write_model(cases, tmp_path), cases, cfg)
    case, model = OpenSoraCase.load(cases / "open-sora-plain.safetensors"), load_model(tmp_path)
    text = len(case.texts[0][0])
    work = VideoWork(model, 5, 12, text, 2, case.timesteps[:STEPS], 8, POLICY)
    cost, sp = video_cost(work, ranks, cfg, CPU), ranks // cfg
    assert cost.collectives == max(seen["calls"] for seen in found)
    assert cost.bytes == max(seen["bytes"] for seen in found)
    assert cost.stored_bytes == max(seen["stored"] for seen in found)
    d, layers = model.config.hidden_size, model.config.depth
    embedded = STEPS * 2 * (2 * 256 * d + 2 * d * d + 6 * d * d)  # of timestep and frame rate
    keys = (2 // cfg) * text * 2 * (model.config.caption_channels * d + d * d + 2 * layers * 2 * d * d)
    for rank, seen in enumerate(found):
        frames, tokens = shares(5, sp)[rank % sp], shares(12, sp)[rank % sp]
        passes = [sum(pass_flops(work, step, 2 // cfg, frames, tokens)) for step in range(STEPS)]
        assert seen["flops"] == sum(passes) + embedded + keys


def test_plan_prints_what_reuse_saves(latte: Path, open_sora: Path) -> None:
    words = ["plan", "--model", str(latte), "--ranks", "4", "--reuse", "pab:latte"]
    shown = CliRunner().invoke(cli, words)
    assert shown.exit_code == 0, shown.output
    assert "2 layers of 24, 16 latent frames of 16 tokens, 50 steps, guided; 4 ranks, h100, nvlink" in shown.output
    assert "Reuse saves " in shown.output
    found = json.loads(CliRunner().invoke(cli, [*words, "--json"]).output)["strategies"]
    assert [each["strategy"] for each in found] == ["dynamic", "2×dynamic"]
    assert all(0.2 < each["saved_flops"] < 0.6 for each in found)
    words = ["plan", "--model", str(open_sora), "--height", "64", "--width", "48", "--guidance", "1", "--json"]
    (alone,) = json.loads(CliRunner().invoke(cli, [*words, "--ranks", "6"]).output)["strategies"]
    assert (alone["cfg"], alone["saved_flops"]) == (1, 0)


def test_inspect_describes_the_folder(latte: Path, open_sora: Path) -> None:
    for folder, name, kinds in ((latte, "Latte", 5), (open_sora, "Open-Sora 1.2", 6)):
        found = json.loads(CliRunner().invoke(cli, ["inspect", str(folder), "--json"]).output)
        assert (found["model"], len(found["reused"])) == (name, kinds)
        assert found["parts"][:4] == ["transformer", "vae", "text_encoder", "tokenizer"]
        assert found["parameters"] > 10_000
    assert "Open-Sora 1.2" in CliRunner().invoke(cli, ["inspect", str(open_sora)]).output


def test_a_profile_becomes_a_policy(latte: Path, tmp_path: Path) -> None:
    policy = str(tmp_path / "policy.json")
    words = ["profile-reuse", "a red circle", "--model", str(latte), "--steps", "5", "--frames", "3", "--bound", "0.9"]
    done = CliRunner().invoke(cli, [*words, "--out", policy, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert list(found["difference"]) == ["self", "cross", "mlp", "temporal", "temporal-mlp"]
    assert all(len(curve) == 4 and all(0 < x < 3 for x in curve) for curve in found["difference"].values())
    assert find_policy(policy).rules
    more = ["--steps", "5", "--frames", "3", "--out", str(tmp_path / "v.mp4"), "--reuse", policy]
    done = CliRunner().invoke(cli, ["generate", "a red circle", "--model", str(latte), *more])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plan", "--window", "3"], "Latte makes its video at once: it has no --window to set"),
        (["plan", "--ranks", "40"], "ranks: expected at most the 16 tokens of a frame, got 40"),
        (["plan", "--reuse", "pab:latte", "--steps", "1"], "reuse: the rule for"),
        (["inspect", "--part", "x"], "Latte makes its video at once: it has no --part to set"),
    ],
)
def test_wrong_options_are_one_line(latte: Path, words: list[str], said: str) -> None:
    command, *more = words
    model = [str(latte)] if command == "inspect" else ["--model", str(latte)]
    done = CliRunner().invoke(cli, [command, *model, *more])
    assert (done.exit_code, done.output.count("\n")) == (2, 1), done.output
    assert said in done.output
