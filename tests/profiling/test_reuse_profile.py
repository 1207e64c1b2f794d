"""Differences between neighbouring passes as they are measured on a running model, and the ranges made of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from torch import Tensor

from causalrope_sp import CausalDiT, ConfigError
from causalrope_sp.cli.main import cli
from causalrope_sp.diffusion.noise import seeded_noise
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.profiling.outputs import Profile, errors, propose, recording
from causalrope_sp.reuse import Broadcast, ReusePolicy, find_policy
from causalrope_sp.reuse.policy import CAUSAL_KINDS, Kind
from tests.support.model_outputs import note_outputs
from tests.support.paths import ROOT
from tests.support.reuse_cases import CONFIG, GRID, SAMPLER, STREAM, make_model, random
from tests.support.streams import run_chunks

STEPS = len(SAMPLER.steps)


def run(model: CausalDiT, parallel: SequenceParallel, **given: Any) -> None:
    frame = CONFIG.in_channels, GRID.latent_height, GRID.latent_width
    embeds, noise = random(1, CONFIG.text_len, CONFIG.text_dim), seeded_noise(0, (1, *frame))
    for _ in run_chunks(model, embeds, noise, GRID, 6, stream=STREAM, sampler=SAMPLER, parallel=parallel, **given):
        pass


def profiled(group: dist.ProcessGroup | None, device: str, reach: int, fuse: bool) -> Profile:
    model, parallel = make_model(), SequenceParallel(group, "gather-kv", device)
    with recording(model, reach) as recorder:
        run(model, parallel, initial_latents=random(1, 4, *noise_frame()), fuse_context_pass=fuse)
    return recorder.profile(CONFIG.num_layers, parallel)


def noise_frame() -> tuple[int, int, int]:
    return CONFIG.in_channels, GRID.latent_height, GRID.latent_width


def test_differences_are_those_of_all_outputs(pool: RankPool) -> None:
    """Against a list of every output: chunks of two frames, the first pass of each also of the chunk before. Context
    passes by themselves count for nothing, and ranks add up."""
    model = make_model()
    seen: dict[tuple[str, int], list[Tensor]] = {}

    note_outputs(model, lambda layer, kind, output: seen.setdefault((kind, layer), []).append(output))
    run(model, SequenceParallel.single(device="cpu"), initial_latents=random(1, 4, *noise_frame()))
    tokens = 2 * GRID.tokens
    first = profiled(None, "cpu", 3, True)
    assert first.timesteps == SAMPLER.steps
    for kind in CAUSAL_KINDS:
        for step in range(1, STEPS):
            for before in range(1, min(step, 3) + 1):
                ratios = []
                for layer in range(CONFIG.num_layers):
                    outputs = seen[kind, layer][1:]  # the first is a context pass by itself
                    chunks = [outputs[n * STEPS : (n + 1) * STEPS] for n in range(3)]
                    now, then = (torch.cat([c[s][:, -tokens:] for c in chunks]) for s in (step, step - before))
                    moved = sum((c[step][:, -tokens:] - c[step - before][:, -tokens:]).square().sum() for c in chunks)
                    assert (moved - (now - then).square().sum()).abs() < 1e-9
                    ratios.append((moved / now.square().sum()).sqrt())
                assert first.difference(kind, step, before) == pytest.approx(float(sum(ratios)) / 2, rel=1e-6)
    for ranks, fuse in ((1, False), (2, True)):
        other = pool.run(profiled, ranks, 3, fuse)
        for kind in CAUSAL_KINDS:
            assert other.curve(kind) == pytest.approx(first.curve(kind), rel=1e-6)


def made_up(difference: Callable[[int, int], float], steps: int = 8, reach: int = 3) -> Profile:
    squares: dict[tuple[Kind, int, int, int], float] = {("self", 0, step, 0): 1.0 for step in range(steps)}
    squares |= {
        ("self", 0, step, before): difference(step, before) ** 2
        for step in range(steps)
        for before in range(1, min(step, reach) + 1)
    }
    return Profile(tuple(range(steps, 0, -1)), 1, reach, squares)


def test_ranges_keep_the_bound_and_reuse_most() -> None:
    """A U: much at both ends, little in the middle, and twice as much two steps apart."""
    u_shaped = made_up(lambda step, before: before * (1.0 if step in (1, 2, 7) else 0.1))
    (rule,) = propose(u_shaped, 0.15, ("self",)).rules
    assert isinstance(rule, Broadcast)
    assert (rule.every, errors(u_shaped, rule)) == (2, [0.1, 0.1])  # steps 3 and 5: 4 and 6 are computed
    (rule,) = propose(u_shaped, 0.35, ("self",)).rules
    assert isinstance(rule, Broadcast)
    assert max(errors(u_shaped, rule)) <= 0.35
    best = 0
    for every in range(2, 5):
        for first in range(8):
            for stop in range(first + 1, 9):
                found = errors(u_shaped, Broadcast("self", every, steps=(first, stop)))
                best = max(best, len(found) if found and max(found) <= 0.35 else 0)
    assert len(errors(u_shaped, rule)) == best > 2
    assert propose(u_shaped, 0.05, ("self",)) == ReusePolicy()
    (rule,) = propose(made_up(lambda step, before: 0.0), 1.0, ("self",)).rules
    assert isinstance(rule, Broadcast)
    assert (rule.every, len(errors(u_shaped, rule))) == (4, 6)
    with pytest.raises(ConfigError, match="above 0"):
        propose(u_shaped, 0)


def test_the_command_writes_what_generate_takes(tmp_path: Path) -> None:
    policy, curve, out = (str(tmp_path / name) for name in ("policy.json", "curve.svg", "video.gif"))
    words = ["profile-reuse", "a red circle slides right", "--steps", "4", "--frames", "9", "--bound", "0.5", "--json"]
    done = CliRunner().invoke(cli, [*words, "--out", policy, "--plot", curve])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert [len(curve) for curve in found["difference"].values()] == [3, 3, 3]
    assert found["ranges"]
    assert all(entry["largest_difference"] <= 0.5 for entry in found["ranges"])
    assert [rule.kind for rule in find_policy(policy).rules] == [entry["kind"] for entry in found["ranges"]]
    assert (tmp_path / "curve.svg").stat().st_size > 5000
    words = ["generate", "a red circle slides right", "--model", "toybox-flow", "--steps", "4", "--frames", "9"]
    done = CliRunner().invoke(cli, [*words, "--reuse", policy, "--out", out, "--json"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "video.gif").stat().st_size > 500


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steps", "1"], "chunks of a single step have nothing to reuse"),
        (["--bound", "0", "--model", "nothing"], "the bound must be above 0"),
        (["--plot", "curve.zzz", "--model", "nothing"], "cannot draw curve.zzz"),
        (["--out", "/nowhere/policy.json", "--model", "nothing"], "cannot write /nowhere/policy.json"),
    ],
)
def test_wrong_input_is_one_line(words: list[str], said: str) -> None:
    done = CliRunner().invoke(cli, ["profile-reuse", "a red circle slides right", "--frames", "1", *words])
    assert (done.exit_code, done.output.count("\n")) == (2, 1)
    assert done.output.startswith(f"error: {said}")


def test_pictures_are_compared_as_published(monkeypatch: pytest.MonkeyPatch) -> None:
    """SSIM at one place by its formula, window by window; PSNR of a difference that is known."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from pictures import psnr, ssim

    draw = np.random.default_rng(0)
    x, y = draw.integers(0, 256, (2, 1, 11, 11, 3)).astype(np.uint8)
    assert ssim(x, x) == pytest.approx(1)
    taps = np.exp(-(np.arange(-5, 6) ** 2) / 4.5)
    weights = np.outer(taps, taps) / taps.sum() ** 2
    values = []
    for channel in range(3):
        a, b = (v[0, :, :, channel].astype(float) for v in (x, y))
        mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
        var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
        both = (weights * (a - mean_a) * (b - mean_b)).sum()
        light = (2 * mean_a * mean_b + 6.5025) / (mean_a**2 + mean_b**2 + 6.5025)
        values.append(light * (2 * both + 58.5225) / (var_a + var_b + 58.5225))
    assert ssim(x, y) == pytest.approx(float(np.mean(values)), rel=1e-9)
    assert psnr(np.zeros_like(x), np.full_like(x, 51)) == pytest.approx(20 * np.log10(5))
