"""The rule of reuse, the files that hold one, and what `plan` and a pipeline make of it."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from causalrope_sp import CausalVideoPipeline, Chunk, ConfigError, sample_chunks
from causalrope_sp.cli.main import cli
from causalrope_sp.diffusion.noise import seeded_noise
from causalrope_sp.planning.workload import Workload
from causalrope_sp.reuse import PRESETS, After, Broadcast, ReusePlan, ReusePolicy, find_policy, write_policy
from causalrope_sp.reuse.output_store import OutputStore, gated
from causalrope_sp.reuse.policy import KINDS, Rule, Stored
from tests.support.reuse_cases import (
    CONFIG,
    GRID,
    MIXED,
    SAMPLER,
    SHARED,
    STREAM,
    TIMESTEPS,
    make_model,
    random,
)
from tests.support.videos import video_of


def counted(rule: Broadcast, timesteps: tuple[float, ...]) -> list[bool]:
    """PAB's rule as it is published: one counter a block and kind."""
    decisions: list[bool] = []
    for step, t in enumerate(timesteps):
        low, high = rule.timesteps or (-1, 2000)
        among = rule.steps is None or step in range(*rule.steps)
        decisions.append(len(decisions) % rule.every != 0 and low < t < high and among)
    return decisions


@pytest.mark.parametrize("every", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("bounds", [None, (100, 800), (125.0, 750.0), (449, 451)])
@pytest.mark.parametrize("steps", [None, (0, 3), (2, 20)])
def test_the_rule_is_a_counters(every: int, bounds: tuple[float, float] | None, steps: tuple[int, int] | None) -> None:
    rule = Broadcast("self", every, bounds, steps)
    policy = ReusePolicy((rule,))
    found = [policy.reuses(step, TIMESTEPS, 0, "self") for step in range(len(TIMESTEPS))]
    assert found == counted(rule, TIMESTEPS)
    assert not any(policy.reuses(step, TIMESTEPS, 0, "cross") for step in range(len(TIMESTEPS)))


def test_bounds_are_strict_and_the_first_pass_is_computed() -> None:
    policy = ReusePolicy((Broadcast("self", 100, (125, 750)), After("mlp", (2000, 1000, 130), 9)))
    assert [policy.reuses(s, TIMESTEPS, 0, "self") for s in range(8)] == [False] * 3 + [True] * 4 + [False]
    assert [policy.reuses(s, TIMESTEPS, 3, "mlp") for s in range(8)] == [False] + [True] * 6 + [False]


def test_after_is_the_published_rule_for_the_feed_forward() -> None:
    """Latte's: computed at 720, 640, …, reused in the two steps that follow, in the first five blocks."""
    timesteps = tuple(float(t) for t in range(980, -1, -20))
    found = [t for s, t in enumerate(timesteps) if PRESETS["latte"].reuses(s, timesteps, 4, "mlp")]
    assert found == [t - d for t in (720, 640, 560, 480, 400) for d in (20, 40)]
    assert not any(PRESETS["latte"].reuses(s, timesteps, 5, "mlp") for s in range(50))


@pytest.mark.parametrize("policy", [MIXED, SHARED, *PRESETS.values()])
def test_what_is_kept_is_what_is_taken_over(policy: ReusePolicy) -> None:
    """A store against a list of everything: a hit is the last output computed, and no output is kept for nothing."""
    planned = ReusePlan(policy, TIMESTEPS, 3, KINDS)
    store = OutputStore(planned)
    last: dict[tuple[int, str], Tensor] = {}
    most = 0
    for step in range(8):
        ask = store.next_pass(Chunk(0, 0, 2), 5)
        for layer, kind in product(range(3), KINDS):
            fresh = torch.full((1, 5, 4), float(step))
            found, _ = ask(layer, kind, lambda fresh=fresh: fresh, None)  # type: ignore[misc]
            if policy.reuses(step, TIMESTEPS, layer, kind):
                assert found is last[layer, kind]
            else:
                assert found is fresh
                last[layer, kind] = fresh
        most = max(most, store.bytes)
        for layer, kind in product(range(3), KINDS):
            needed = step + 1 < 8 and policy.reuses(step + 1, TIMESTEPS, layer, kind)
            assert ((layer, kind) in store.kept_BTD) == needed
    assert most == store.most_bytes == planned.stored * 5 * 4 * 4
    assert store.bytes == 0
    with pytest.raises(ConfigError, match="more passes than the 8"):
        store.next_pass(Chunk(0, 0, 2), 5)
    store.next_pass(Chunk(1, 2, 2), 5)
    assert store.bytes == 0, "a new chunk begins with none"


def test_a_timestep_is_compared_by_its_whole_part() -> None:
    """As published: 450.6 is not above 450, and 864 means the pass at 864.2."""
    timesteps = (1000.0, 864.2, 700.0, 450.6, 300.0)
    policy = ReusePolicy((Broadcast("self", 9, (450, 930)), After("mlp", (864,), 1)))
    assert [policy.reuses(s, timesteps, 0, "self") for s in range(5)] == [False, True, True, False, False]
    assert [policy.reuses(s, timesteps, 0, "mlp") for s in range(5)] == [False, False, True, False, False]


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (Broadcast("self", 2, (10, 20)), "the rule for self expects a pass with a timestep between 10 and 20, but the"),
        (Broadcast("cross", 2, steps=(8, 9)), "expects a pass with the number 8, counted from 0, but the 8 passes are"),
        (After("mlp", (50, 100), 2), "one of the timesteps 50, 100, but the 8 passes are at 1000 to 125"),
        (Broadcast("self", 2, layers=(2, 7)), "the rule for self expects layers 2, 7, the model has 0 to 1"),
    ],
)
def test_rules_that_can_never_apply_are_refused(rule: Rule, said: str) -> None:
    policy = ReusePolicy((rule,))
    with pytest.raises(ConfigError, match=said):
        policy.check(TIMESTEPS, 2)
    with pytest.raises(ConfigError, match=said):
        next(
            sample_chunks(
                make_model(),
                random(1, 3, 8),
                seeded_noise(0, (1, 2, 2, 14)),
                GRID,
                2,
                stream=STREAM,
                sampler=SAMPLER,
                reuse=policy,
            )
        )
    with pytest.raises(ConfigError, match=said):
        Workload.of(CONFIG, GRID, STREAM, SAMPLER, 6, 1, 8, policy)


def test_a_rule_may_name_layers_that_a_smaller_model_lacks() -> None:
    ReusePolicy((Broadcast("self", 2, (100, 800)), After("mlp", (750,), 2, (0, 1, 2, 3, 4)))).check(TIMESTEPS, 2)


@pytest.mark.parametrize("stored", ["ungated", "gated"])
def test_the_gate_is_that_of_the_pass_that_reuses_or_that_computed(stored: Stored) -> None:
    computed, gates = random(1, 6, 4), random(2, 3, 4)  # of two passes; three frames of two tokens
    store = OutputStore(ReusePlan(ReusePolicy((Broadcast("self", 2),), stored), (2.0, 1.0), 1, KINDS))
    for step, gate in enumerate(gates):
        output, to_apply = store.next_pass(Chunk(0, 0, 3), 6)(0, "self", lambda: computed, gate)
        applied = output if to_apply is None else gated(output, to_apply)
        expected = gates[0] if stored == "gated" else gates[step]
        assert torch.equal(applied, computed * expected.repeat_interleave(2, 0))


def test_a_pipeline_takes_a_policy_by_name() -> None:
    pipe = CausalVideoPipeline.from_pretrained("toybox-flow", device="cpu", num_inference_steps=4)
    prompt = "a red circle slides right"
    plain, reused = (video_of(pipe, prompt, num_frames=9, reuse=reuse) for reuse in (None, "pab:latte"))
    assert plain is not None
    assert reused is not None
    assert plain.shape == reused.shape
    assert (plain != reused).any()
    with pytest.raises(ConfigError, match="no policy of reuse 'nothing'"):
        pipe.stream(prompt, reuse="nothing")


@pytest.mark.parametrize("policy", [MIXED, *PRESETS.values()])
def test_files_hold_policies(tmp_path: Path, policy: ReusePolicy) -> None:
    write_policy(policy, tmp_path / "policy.json", note="how it came about")
    assert find_policy(tmp_path / "policy.json") == find_policy(f"pab:{tmp_path / 'policy.json'}") == policy


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        '{"rules": 3}',
        '{"rules": [{"kind": "self"}]}',
        '{"rules": [{"kind": "nothing", "every": 2}]}',
        '{"rules": [{"kind": "self", "every": 0}]}',
        '{"rules": [{"kind": "self", "every": 2, "timesteps": [800, 100]}]}',
        '{"rules": [{"kind": "self", "every": 2, "steps": [1.5, 3]}]}',
        '{"rules": [{"kind": "self", "every": 2, "layers": [-1]}]}',
        '{"rules": [{"kind": "self", "every": 2, "layers": 3}]}',
        '{"rules": [{"kind": "self", "every": 2, "sometimes": 1}]}',
        '{"rules": [{"kind": "mlp", "after": [], "steps": 1}]}',
        '{"rules": [{"kind": "mlp", "after": [1], "steps": 0}]}',
        '{"rules": [{"kind": "self", "every": 2}, {"kind": "self", "every": 3}]}',
        '{"rules": [{"kind": "self", "every": 2}], "stored": "twice"}',
        "[" * 100_000,
    ],
)
def test_files_that_hold_none_are_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "policy.json").write_text(text)
    done = CliRunner().invoke(cli, ["generate", "a red circle slides right", "--reuse", str(tmp_path / "policy.json")])
    assert (done.exit_code, done.output.count("\n")) == (2, 1)
    assert done.output.startswith(f"error: {tmp_path / 'policy.json'} holds no policy of reuse: ")


def test_plan_knows_reuse() -> None:
    words = ["plan", "--model", "wan2.1-1.3b", "--steps", "30", "--ranks", "8", "--json"]
    plain, reused = (
        json.loads(CliRunner().invoke(cli, [*words, *more]).output)["strategies"]
        for more in ([], ["--reuse", "pab:vchitect"])
    )
    for before, after in zip(plain, reused, strict=True):
        for field in ("collectives_per_chunk", "bytes_per_chunk", "flops_per_chunk", "chunk_ms"):
            assert after[field] < before[field]
        assert after["stored_bytes"] > 0
        assert after["bytes_per_pass"] == before["bytes_per_pass"]
    shown = CliRunner().invoke(cli, [*words[:-1], "--reuse", "pab:vchitect"], env={"COLUMNS": "200"}).output
    assert "Of a chunk's outputs are reused: self " in shown
