"""Open-Sora 1.2 against the reference cases, on one rank and on several, with and without reuse."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from causalrope_sp import CheckpointError, Chunk, ConfigError, LatentGrid
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.grid import shares
from causalrope_sp.reuse import PRESETS, Broadcast, ReusePlan, ReusePolicy
from causalrope_sp.spatiotemporal.guidance import Guidance
from causalrope_sp.spatiotemporal.open_sora import OpenSoraConfig, OpenSoraDiT, OpenSoraStream, load_open_sora, packed
from causalrope_sp.spatiotemporal.open_sora.sampling import timesteps
from tests.support.exchange_formulas import received_by_switches
from tests.support.open_sora_cases import OpenSoraCase, load_model, write_model

FRAMES, TOKENS, DIM, LAYERS = 5, 12, 96, 3  # of the cases


@pytest.fixture(scope="module")
def cases(goldens: Path) -> Path:
    return goldens / "open-sora"


@pytest.fixture(scope="module")
def folder(cases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(cases, tmp_path_factory.mktemp("open-sora"))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def on_ranks(group: dist.ProcessGroup | None, device: str, folder: Path, cases: Path, cfg: int) -> list[dict[str, Any]]:
    """On every rank: the latents of each case and the collectives that it took."""
    model, mine = load_model(folder), {}
    for name in ("plain", "given", "pab"):
        case, parallel = OpenSoraCase.load(cases / f"open-sora-{name}.safetensors"), SequenceParallel(group, cfg=cfg)
        latents = case.run(model, parallel, case.policy)
        taken = parallel.comm_stats.take()
        calls = Counter[int]()
        for (kind, layer), entry in taken.entries.items():
            calls[layer] += entry.calls * (kind == "switch")
        moved = {kind: (entry.calls, entry.elements) for kind, entry in taken.by_kind().items()}
        mine[name] = {"latents": latents, "moved": moved, "layers": [calls[layer] for layer in range(LAYERS)]}
    everyone: list[Any] = [mine]
    if group is not None:
        everyone = [None] * group.size()
        dist.all_gather_object(everyone, mine)
    return everyone


@pytest.mark.parametrize(("ranks", "cfg"), [(1, 1), (2, 1), (3, 1), (2, 2), (6, 1), (6, 2)])
def test_reference_cases_on_any_number_of_ranks(
    pool: RankPool, folder: Path, cases: Path, ranks: int, cfg: int
) -> None:
    """Five frames and twelve tokens are uneven on most ranks, and six ranks are more than the frames. A pass makes two
    switches a layer, and none where attention across frames is reused."""
    found = pool.run(on_ranks, ranks, folder, cases, cfg)
    sp = ranks // cfg
    frames, tokens = shares(FRAMES, sp), shares(TOKENS, sp)
    for name in ("plain", "given", "pab"):
        case = OpenSoraCase.load(cases / f"open-sora-{name}.safetensors")
        passes = len(case.timesteps)
        if case.policy is not None:
            plan = ReusePlan(case.policy, case.timesteps, LAYERS, OpenSoraDiT.kinds)
            passes = sum(not plan.reuses(step, 0, "temporal") for step in range(passes))
            assert passes < len(case.timesteps)
        for rank, seen in enumerate(found):
            assert relative(seen[name]["latents"], case.latents) < 1e-10
            moved, batch = seen[name]["moved"], 2 // cfg
            there, back = received_by_switches(frames, tokens, rank % sp, batch * DIM)
            switches = (2 * LAYERS * passes, LAYERS * passes * (there + back))
            assert moved.get("switch", (0, 0)) == (switches if sp > 1 else (0, 0))
            assert set(seen[name]["layers"]) == {2 * passes if sp > 1 else 0}
            assert moved.get("guidance", (0, 0))[0] == (len(case.timesteps) if cfg == 2 else 0)


def test_where_outputs_are_stored_matters(folder: Path, cases: Path) -> None:
    """The case stores them gated; stored before the gate they give another video, and so does no reuse."""
    case, model = OpenSoraCase.load(cases / "open-sora-pab.safetensors"), load_model(folder)
    assert case.policy is not None
    assert case.policy.stored == "gated"
    assert relative(case.run(model, reuse=ReusePolicy(case.policy.rules, "ungated")), case.latents) > 1e-3
    assert relative(case.run(model), case.latents) > 1e-2


@pytest.mark.parametrize("stored", ["gated", "ungated"])
def test_a_range_of_one_reuses_nothing(folder: Path, cases: Path, stored: Any) -> None:
    case, model = OpenSoraCase.load(cases / "open-sora-plain.safetensors"), load_model(folder)
    ones = ReusePolicy(tuple(Broadcast(kind, 1) for kind in model.kinds), stored)
    assert torch.equal(case.run(model, reuse=ones), case.run(model))


def test_the_first_calls_are_the_references(folder: Path, cases: Path) -> None:
    """Also the half of the prediction that sampling does not use. Of given frames the reference normalizes its output
    twice; nothing reads it."""
    for name in ("plain", "given"):
        case = OpenSoraCase.load(cases / f"open-sora-{name}.safetensors")
        given, grid = case.settings.get("given_frames", 0), LatentGrid(4, 3)
        texts = [*case.texts[0], *case.texts[1]]
        stream = OpenSoraStream(load_model(folder), texts, grid, fps=24, given=given)
        found = stream.denoise(Chunk(0, 0, 5), grid.patchify(case.noise).expand(2, -1, -1, -1), case.timesteps[0])
        expected = case.tensors["call.0.output"].transpose(1, 2)
        assert relative(grid.unpatchify(found)[:, given:], expected[:, given:]) < 1e-10


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_a_pass_in_other_dtypes(folder: Path, cases: Path, dtype: torch.dtype, bound: float) -> None:
    """Against float64, with outputs stored gated, in the dtype of the tokens."""
    case, grid = OpenSoraCase.load(cases / "open-sora-plain.safetensors"), LatentGrid(4, 3)
    policy, at = ReusePolicy((Broadcast("self", 2), Broadcast("temporal-mlp", 2)), "gated"), (1000.0, 900.0)
    found = {}
    for each in (torch.float64, dtype):
        model = load_open_sora(folder, dtype=each)
        stream = OpenSoraStream(model, case.texts[0], grid, fps=24, timesteps=at, reuse=policy)
        tokens = grid.patchify(case.noise)
        found[each] = [stream.denoise(Chunk(0, 0, 5), tokens, t) for t in at][1]
        assert found[each].dtype == torch.float64
    assert 0 < relative(found[dtype], found[torch.float64]) < bound


def test_timesteps_are_the_references(cases: Path) -> None:
    case = OpenSoraCase.load(cases / "open-sora-plain.safetensors")
    torch.testing.assert_close(torch.tensor(case.timesteps, dtype=torch.float64), case.tensors["timesteps"])
    assert timesteps(2, 512, 512, 1) == (1000.0, 500.0)


def test_texts_of_different_lengths_are_as_if_alone(folder: Path, cases: Path) -> None:
    case, model, grid = OpenSoraCase.load(cases / "open-sora-plain.safetensors"), load_model(folder), LatentGrid(4, 3)
    texts = [case.tensors["prompt_embeds"][0, :length] for length in (6, 6, 3, 9)]
    tokens = grid.patchify(case.noise)
    together = OpenSoraStream(model, texts, grid, fps=24).denoise(Chunk(0, 0, 5), tokens.expand(4, -1, -1, -1), 500.0)
    for entry, text in enumerate(texts):
        alone = OpenSoraStream(model, [text], grid, fps=24).denoise(Chunk(0, 0, 5), tokens, 500.0)
        assert relative(together[entry], alone[0]) < 1e-12
    assert relative(together[2], together[0]) > 1e-3


def test_the_published_policy_applies_to_thirty_steps_at_480p() -> None:
    """Its MLP rule names timesteps of the published size, 480×854 pixels and 2 s at 24 fps, of 51 frames."""
    at = timesteps(30, 480, 854, 51)
    policy = PRESETS["open-sora"]
    assert policy.stored == "gated"
    policy.check(at, 28)
    plan = ReusePlan(policy, at, 28, OpenSoraDiT.kinds)
    assert {kind for kind in plan.kinds if any(plan.reuses(step, 0, kind) for step in range(30))} == set(plan.kinds)
    assert not any(plan.reuses(step, 5, "mlp") for step in range(30))


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        ([[1, 1]], r"mask: expected the shape \(1, 3\) of the text's tokens, got \(1, 2\)"),
        ([1, 1, 1], r"mask: expected the shape \(1, 3\)"),
        ([[0, 0, 0]], "mask: expected at least one token of every text, got none of text 0"),
        ([[1, 2, 0]], "mask: expected 0 and 1, got other numbers"),
    ],
)
def test_masks_that_fit_no_text_are_refused(mask: list[Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        packed(torch.zeros(1, 3, 4), torch.tensor(mask))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "STDiT2"}, "not Open-Sora 1.2: its config has model_type 'STDiT2'"),
        ({"qk_norm": False}, "its config has qk_norm False, not True"),
        ({"patch_size": [2, 2, 2]}, r"its config has patch_size \[2, 2, 2\], not \[1, n, n\]"),
        ({"depth": 10**9}, "declares 1000000000 layers, its weights have 3"),
        ({"caption_channels": 11}, "of a wrong shape: "),
    ],
)
def test_other_checkpoints_are_one_line(folder: Path, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=said) as raised:
        load_open_sora(tmp_path)
    assert "\n" not in str(raised.value)


def test_the_stored_rotary_frequencies_are_passed_by(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    save_file(load_file(folder / "model.safetensors") | {"rope.freqs": torch.ones(12)}, tmp_path / "model.safetensors")
    assert load_open_sora(tmp_path).config == OpenSoraConfig(96, 4, 3, 4, 32, 10)


def test_wrong_sizes_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="hidden_size 6 must be divisible by 4"):
        OpenSoraConfig(hidden_size=6, num_heads=1)
    with pytest.raises(ConfigError, match="hidden_size 12 must be an even number of times num_heads 4"):
        OpenSoraConfig(hidden_size=12, num_heads=4)
    with pytest.raises(ConfigError, match="the grid's patch"):
        OpenSoraStream(load_model(folder), [torch.zeros(3, 32)], LatentGrid(4, 3, (1, 1)), fps=24)


def without_guidance(group: dist.ProcessGroup | None, device: str) -> str:
    with pytest.raises(ConfigError) as raised:
        Guidance(1.0, SequenceParallel(group, cfg=2))
    return str(raised.value)


def test_an_axis_without_use_is_refused(pool: RankPool) -> None:
    expected = "cfg of the mesh must be 1 without guidance (a guidance scale of 1), not 2"
    assert pool.run(without_guidance, 2) == expected
