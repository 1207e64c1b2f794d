"""`causalrope-sp --help`, `inspect` and `verify`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.shell import shell


def test_help_names_the_commands() -> None:
    result = shell("--help")
    assert result.exit_code == 0
    assert all(name in result.output for name in ("generate", "inspect", "verify", "torchrun"))


def test_inspect_tells_what_a_checkpoint_is(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from causalrope_sp.pipeline.model_config import ModelConfig
    from causalrope_sp.toybox import WEIGHTS

    weights = ModelConfig.load(WEIGHTS / "toybox.json").transformer
    text, plain = shell("inspect", weights), shell("inspect", weights, "--json")
    assert (text.exit_code, plain.exit_code) == (0, 0), text.output
    report = json.loads(plain.output)
    assert {"path", "layout", "config", "dtype", "parameters", "missing", "unexpected"} <= set(report)
    assert (report["missing"], report["unexpected"]) == ([], [])
    assert f"{report['parameters']:,}" in text.output
    save_file({"nonsense": torch.zeros(3)}, tmp_path / "other.safetensors")
    assert shell("inspect", tmp_path / "other.safetensors").exit_code == 2


def test_inspect_opens_the_pipeline_files_that_generate_opens(tmp_path: Path) -> None:
    from causalrope_sp.pipeline.model_config import ModelConfig
    from causalrope_sp.toybox import WEIGHTS

    config = ModelConfig.load(WEIGHTS / "toybox.json")
    own = {"transformer": str(config.transformer), "codec": str(config.codec), "text": "toybox"}
    (tmp_path / "pipeline.json").write_text(json.dumps(own))
    for path in (tmp_path, tmp_path / "pipeline.json"):
        result = shell("inspect", path, "--json")
        assert result.exit_code == 0, result.output
        report = json.loads(result.output)
        assert (report["preset"], report["missing"]) == ("own", [])
        assert any("no preset fits" in line for line in report["evidence"])
    (tmp_path / "pipeline.json").write_text(json.dumps({"fps": 16}))
    refused = shell("inspect", tmp_path)
    assert (refused.exit_code, len(refused.output.splitlines())) == (2, 1)
    assert "pipeline.json names no transformer" in refused.output


@pytest.mark.parametrize(("verdicts", "status"), [([True, None], 0), ([True, False], 1)])
def test_verify_prints_its_checks(verdicts: list[bool | None], status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from causalrope_sp.verification.runner import Check

    checks = [Check(f"case{i}", i + 1, "ulysses", [1e-7, float("nan")][i], ok, "") for i, ok in enumerate(verdicts)]
    monkeypatch.setattr("causalrope_sp.verification.runner.run_verification", lambda *_: checks)
    result = shell("verify", "--json")
    assert result.exit_code == status
    assert json.loads(result.output) == [
        {"case": "case0", "ranks": 1, "strategy": "ulysses", "error": 1e-7, "ok": True},
        {"case": "case1", "ranks": 2, "strategy": "ulysses", "error": None, "ok": verdicts[1]},
    ]
    table = shell("verify").output
    assert "case1" in table
    assert "1 of 2 checks passed" in table


def test_verify_starts_its_own_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = shell("verify")
    assert (result.exit_code, result.output) == (
        2,
        "error: verify starts its own processes: run it without torchrun\n",
    )
