"""`verify` on the reference cases and on itself, and what it says of a case that is wrong or cannot be read."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from causalrope_sp import CheckpointError, ConfigError
from causalrope_sp.cli.main import cli
from causalrope_sp.distributed import STRATEGIES, strategies
from causalrope_sp.verification.runner import Check, run_verification

SMALLEST = "dmd-batch2-framewise"
WEIGHTS = "weights-a"


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()


def kinds_and_heads(folder: Path) -> dict[str, tuple[str, int]]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            if text := (file.metadata() or {}).get("case"):
                case = json.loads(text)
                found[path.stem] = case["kind"], case["cfg"]["num_heads"]
    return found


@pytest.fixture
def folder(goldens: Path, tmp_path: Path) -> Path:
    """A folder of its own with one case and its weights."""
    for name in (SMALLEST, WEIGHTS):
        shutil.copyfile(goldens / f"{name}.safetensors", tmp_path / f"{name}.safetensors")
    return tmp_path


def tamper(folder: Path, name: str = "tampered") -> None:
    """A second case: the first one with a single number of its latents changed by a thousandth."""
    tensors, metadata = read(folder / f"{SMALLEST}.safetensors")
    tensors["latents"][0, 2, 3, 1, 4] += 1e-3
    save_file(tensors, folder / f"{name}.safetensors", metadata)


def one_rank(folder: Path | None, dtype: torch.dtype = torch.float64) -> list[Check]:
    return run_verification(folder, [1], "gather-kv", dtype)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5])
def test_every_reference_case_is_met(goldens: Path, ranks: int) -> None:
    checks = run_verification(goldens, [ranks], "all", torch.float64)
    cases = kinds_and_heads(goldens)
    expected = {(case, ranks, name) for case, (_, heads) in cases.items() for name in strategies(ranks, heads)}
    for case, (kind, heads) in cases.items():
        if kind == "diffusion" and ranks % 2 == 0:  # two guidance branches, on the cfg axis
            halves = strategies(ranks // 2, heads) if ranks > 2 else ["single"]
            expected |= {(case, ranks, f"2×{name}") for name in halves}
    assert {kind for kind, _ in cases.values()} == {"dmd", "diffusion"}
    assert {(c.case, c.ranks, c.strategy) for c in checks} == expected
    for check in checks:
        assert check.ok
        assert check.error is not None
        assert check.error <= 1e-6


def test_reference_cases_hold_in_float32(folder: Path) -> None:
    (check,) = one_rank(folder, torch.float32)
    assert check.ok
    assert check.error is not None
    assert 1e-9 < check.error < 1e-4


def test_the_self_check_passes() -> None:
    checks = run_verification(None, [1, 2], "all", torch.float64)
    assert all(check.ok for check in checks)
    assert {check.ranks for check in checks} == {1, 2}
    found = {(check.case, check.strategy) for check in checks if check.ranks == 2}
    cases = {case for case, _ in found}
    on_cfg_axis = {(case, "2×single") for case in cases if "guidance" in case}
    assert found == {(case, strategy) for case in cases for strategy in STRATEGIES} | on_cfg_axis
    assert len(cases) >= 5
    assert len(on_cfg_axis) == 2
    assert sum(check.case.endswith("one forward over all") for check in checks) >= 4


def test_the_self_check_in_half_precision_is_bounded_by_what_it_costs() -> None:
    checks = one_rank(None, torch.bfloat16)
    assert all(check.ok for check in checks)


def test_a_number_that_was_changed_fails(folder: Path) -> None:
    tamper(folder)
    found = {check.case: check for check in one_rank(folder)}
    assert found[SMALLEST].ok is True
    assert found["tampered"].ok is False
    assert found["tampered"].error == pytest.approx(1e-5, rel=0.9)


def test_weights_that_were_changed_fail(folder: Path) -> None:
    tensors, metadata = read(folder / f"{WEIGHTS}.safetensors")
    tensors["blocks.1.self_attn.k.weight"][0, 0] += 0.1
    save_file(tensors, folder / f"{WEIGHTS}.safetensors", metadata)
    (check,) = one_rank(folder)
    assert check.ok is False


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def drop(path: Path, name: str) -> None:
    tensors, metadata = read(path)
    del tensors[name]
    save_file(tensors, path, metadata)


def relabel(path: Path, case: str) -> None:
    tensors, metadata = read(path)
    save_file(tensors, path, metadata | {"case": case})


DAMAGE: dict[str, Any] = {
    "junk": lambda case, weights: case.write_bytes(b"not a tensor in sight"),
    "truncated case": lambda case, weights: truncate(case),
    "truncated weights": lambda case, weights: truncate(weights),
    "no weights": lambda case, weights: weights.unlink(),
    "weights without a key": lambda case, weights: drop(weights, "blocks.0.ffn.0.bias"),
    "no case": lambda case, weights: case.unlink(),
    "no noise": lambda case, weights: drop(case, "noise"),
    "no latents": lambda case, weights: drop(case, "latents"),
    "fewer fresh draws": lambda case, weights: drop(case, "renoise.014"),
    "a case that is no JSON": lambda case, weights: relabel(case, "{"),
    "a case without a kind": lambda case, weights: relabel(case, "{}"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_cannot_be_read_is_one_line_and_status_2(folder: Path, damage: str) -> None:
    DAMAGE[damage](folder / f"{SMALLEST}.safetensors", folder / f"{WEIGHTS}.safetensors")
    with pytest.raises(CheckpointError) as caught:
        one_rank(folder)
    assert "\n" not in str(caught.value)
    result = CliRunner().invoke(cli, ["verify", str(folder), "--ranks", "1", "--strategy", "gather-kv"])
    assert result.exit_code == 2
    assert str(caught.value) in result.stderr


def test_ranks_agree_with_a_cache_in_8_bits(tmp_path: Path) -> None:
    checks = run_verification(None, [1, 2], "gather-kv", torch.float32, cache="fp8")
    assert len(checks) > 14
    assert all(check.ok for check in checks)
    with pytest.raises(ConfigError, match="not with a cache in int8"):
        run_verification(tmp_path, [1], "gather-kv", torch.float32, cache="int8")


def test_weights_that_are_missing_end_several_ranks_the_same_way(folder: Path) -> None:
    (folder / f"{WEIGHTS}.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        run_verification(folder, [2], "gather-kv", torch.float64)


def test_wrong_questions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a folder"):
        one_rank(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no reference case"):
        one_rank(tmp_path)
    with pytest.raises(ConfigError, match="unknown strategy 'ring'"):
        run_verification(None, [1], "ring", torch.float64)
    for ranks in ([], [0], [2, -1]):
        with pytest.raises(ConfigError, match="rank counts"):
            run_verification(None, ranks, "all", torch.float64)


def test_the_command_line_prints_json_and_fails_for_one_failure(folder: Path) -> None:
    tamper(folder)
    shutil.copyfile(folder / f"{SMALLEST}.safetensors", folder / "other-kind.safetensors")
    relabel(folder / "other-kind.safetensors", json.dumps({"kind": "consistency"}))
    command = [sys.executable, "-m", "causalrope_sp", "verify", str(folder), "--ranks", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    rows = json.loads(done.stdout)
    assert all(set(row) == {"case", "ranks", "strategy", "error", "ok"} for row in rows)
    verdicts = {(row["case"], row["strategy"]): row["ok"] for row in rows}
    assert verdicts == {
        (case, strategy): ok
        for case, ok in ((SMALLEST, True), ("tampered", False), ("other-kind", None))
        for strategy in STRATEGIES
    }
    assert all((row["error"] is None) == (row["ok"] is None) and row["ranks"] == 1 for row in rows)
