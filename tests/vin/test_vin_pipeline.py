"""toybox-vin from the pipeline and the command line: the shipped weights, what is shown meanwhile, what is refused."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import safe_open

from causalrope_sp import CausalVideoPipeline, ConfigError
from causalrope_sp.cli.main import cli
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.toybox import WEIGHTS
from causalrope_sp.toybox.prompts import parse_prompt
from causalrope_sp.toybox.scenes import START_VARIABLES, render
from causalrope_sp.toybox.toybox_text import ToyboxText, leave_open
from tests.support.paths import ROOT
from tests.support.videos import video_of

PROMPT = "a large red circle slides right"
OPTIONS: dict[str, Any] = {"parallel_chunks": "vin", "num_inference_steps": 3}  # enough for what is tested here


@pytest.fixture(scope="module")
def pipe() -> CausalVideoPipeline:
    return CausalVideoPipeline.from_pretrained("toybox-vin", device="cpu", **OPTIONS)


def shell(*words: object) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words])


def test_chunks_are_handed_out_after_the_last_step(pipe: CausalVideoPipeline) -> None:
    """Lengths that fill no chunk are trimmed; previews are the whole video; the frames are those of one call."""
    seen: list[Any] = []

    def note(*told: Any) -> None:
        seen.append(told)

    chunks = list(pipe.stream(PROMPT, num_frames=40, callback_on_step_end=note, preview_every=2))
    assert [chunk.first_frame_index for chunk in chunks] == [0, 33]
    parts = [chunk.frames for chunk in chunks if chunk.frames is not None]
    assert [len(part) for part in parts] == [33, 7]
    assert all(told[0] is pipe for told in seen)
    assert [(step, kwargs["num_steps"]) for _, step, _, kwargs in seen] == [(0, 3), (1, 3), (2, 3)]
    previews = [kwargs["preview"] for *_, kwargs in seen]
    assert [None if p is None else (p.step, p.frames.shape) for p in previews] == [None, (2, (40, 64, 64, 3)), None]
    again = video_of(pipe, PROMPT, num_frames=40)
    assert again is not None
    assert np.array_equal(np.concatenate(parts), again)
    other = video_of(pipe, PROMPT, num_frames=40, seed=1)
    assert other is not None
    assert not np.array_equal(other, again)


def on_ranks(group: Any, device: str, frames: int) -> np.ndarray | None:
    parallel = SequenceParallel(group, device=device, chunk=1 if group is None else group.size())
    pipe = CausalVideoPipeline.from_pretrained("toybox-vin", parallel=parallel, **OPTIONS)
    made: np.ndarray | None = video_of(pipe, PROMPT, num_frames=frames)
    return made


def test_ranks_share_the_chunks(pool: RankPool, pipe: CausalVideoPipeline) -> None:
    made = pool.run(on_ranks, 2, 40)
    alone = video_of(pipe, PROMPT, num_frames=40)
    assert abs(made.astype(int) - alone).max() <= 1  # latents agree to 1e-5, pixels are rounded


def test_what_a_text_leaves_open_is_not_in_it() -> None:
    first, second = (ToyboxText().encode(PROMPT, seed) for seed in (0, 1))
    other = ToyboxText().encode("a large blue circle slides right on a light background", 0)
    assert not torch.equal(first, second)
    assert torch.equal(leave_open(first, starts=True), leave_open(second, starts=True))
    assert not torch.equal(first, other)
    assert torch.equal(leave_open(first, colors=True), leave_open(other, colors=True))
    assert torch.equal(leave_open(first), first)
    left = leave_open(first, colors=True, starts=True)
    assert (left == 1).sum() == (first == 1).sum() - 2  # a colour and a background


def test_the_shipped_weights_are_small_and_in_bfloat16() -> None:
    files = [WEIGHTS / "toybox-vin.safetensors", WEIGHTS / "toybox-vin-dit.safetensors"]
    assert sum(file.stat().st_size for file in files) <= 16 * 2**20
    for path in files:
        with safe_open(path, "pt") as file:
            wide = {name for name in file.keys() if file.get_slice(name).get_dtype() != "BF16"}
            assert wide == ({"frequencies"} if path.stem == "toybox-vin" else set())
    assert json.loads((WEIGHTS / "toybox-vin.json").read_text())["vin"] == files[0].name


def test_the_recipe_makes_what_is_shipped(pipe: CausalVideoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes of the VIN, and how videos are cut into chunks, fused and guided."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    recipe, shipped = importlib.import_module("train_vin"), pipe.parts.parallel_chunks
    assert shipped is not None
    assert (shipped.vin.config, shipped.chunks) == (recipe.CONFIG, recipe.CHUNKS)


def test_guidance_costs_a_forward_without_global_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the formulas of the benchmark, which guides nine of toybox-vin's 25 steps."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    made = importlib.import_module("vin_variants")
    names = ("VIN with guidance", "VIN", "VIN without global tokens")
    variants = made.Variants()
    guided, unguided, without = (made.flops_of(name, variants, 256) for name in names)
    assert guided - unguided == without * 9 // 25


def test_generate_makes_a_video_and_previews(tmp_path: Path) -> None:
    out = tmp_path / "clip.mp4"
    options = "--model", "toybox-vin", "--parallel-chunks", "vin", "--steps", 2, "--frames", 5, "--preview-every", 1
    result = shell("generate", PROMPT, *options, "--out", out)
    assert result.exit_code == 0, result.output
    assert "step 1 of 2" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.mp4", "clip.step1.mp4"]


def test_a_preview_that_cannot_be_written_loses_nothing(tmp_path: Path) -> None:
    """The first one is looked at before anything is loaded; a later one is a warning."""
    options = "--model", "toybox-vin", "--parallel-chunks", "vin", "--steps", 3, "--frames", 5, "--preview-every", 1
    (tmp_path / "clip.step2.mp4").mkdir()
    result = shell("generate", PROMPT, *options, "--out", tmp_path / "clip.mp4")
    assert result.exit_code == 0, result.output
    assert "warning: no preview of step 2: cannot write" in result.stderr
    assert (tmp_path / "clip.mp4").exists()
    (tmp_path / "other.step1.mp4").mkdir()
    result = shell("generate", PROMPT, *options, "--out", tmp_path / "other.mp4")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "other.step1.mp4: a folder of that name is in the way" in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--parallel-chunks", "vin"), "this model has no VIN weights to make its chunks in parallel with"),
        (("--model", "toybox-vin"), "this model makes its chunks in parallel alone: say --parallel-chunks vin"),
        (("--chunk-parallel", 1), "--chunk-parallel is for chunks made in parallel"),
        (("--model", "toybox-vin", "--parallel-chunks", "vin", "--reuse", "pab:latte"), "have no --reuse to set"),
        (("--model", "toybox-vin", "--parallel-chunks", "vin", "--guidance-parallel"), "no --guidance-parallel to set"),
        (("--preview-every", 2), "--preview-every is for chunks made in parallel"),
        (("--model", "toybox-vin", "--parallel-chunks", "vin", "--preview-every", 0), "must be at least 1, not 0"),
        (
            ("--model", "toybox-vin", "--parallel-chunks", "vin", "--chunk-parallel", 2),
            "must be a divisor of the 1 ranks, not 2",
        ),
        (("--model", "toybox-vin", "--parallel-chunks", "vin", "--rope", "relative"), "they have no rope to set"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path: Path, words: tuple[object, ...], message: str) -> None:
    result = shell("generate", PROMPT, *words, "--out", tmp_path / "a.mp4")
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("plan",), "toybox-vin makes its chunks in parallel: there is no plan of a stream"),
        (("profile-reuse", PROMPT), "toybox-vin makes its chunks in parallel, where nothing is reused"),
    ],
)
def test_commands_of_streams_say_that_it_is_none(words: tuple[str, ...], message: str) -> None:
    result = shell(*words, "--model", "toybox-vin")
    assert (result.exit_code, result.stderr) == (2, f"error: {message}\n")


def test_a_video_to_start_from_is_refused(pipe: CausalVideoPipeline) -> None:
    frame = np.zeros((64, 64, 3), np.uint8)
    with pytest.raises(ConfigError, match="start from noise alone"):
        pipe.stream(PROMPT, image=frame)
    toybox = CausalVideoPipeline.from_pretrained("toybox", device="cpu")
    with pytest.raises(ConfigError, match="only where chunks are made in parallel"):
        toybox.stream(PROMPT, preview_every=1)
    with pytest.raises(ConfigError, match="preview_every must be a whole number of at least 1, not 0"):
        pipe.stream(PROMPT, preview_every=0)
    with pytest.raises(ConfigError, match="callback_on_step_end must be callable, not 5"):
        pipe.stream(PROMPT, callback_on_step_end=5)
    with pytest.raises(ConfigError, match="compute every output: there is no reuse"):
        pipe.stream(PROMPT, reuse="pab:latte")
    with pytest.raises(ConfigError, match=r"250000000000001 latent frames made at once need at least .* GB on cpu"):
        pipe.stream(PROMPT, num_frames=10**15)


def test_what_holds_a_video_together_is_measured() -> None:
    """On rendered scenes nothing is cut or lost; a scene that jumps, recolours and vanishes at the seam shows it."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from vin_measures import agreement, measure

    spec = parse_prompt(PROMPT)
    starts = torch.rand(1, START_VARIABLES, generator=torch.Generator().manual_seed(0))

    def video(first: int, scene: str = PROMPT) -> np.ndarray:
        frames = render([parse_prompt(scene)], starts, torch.arange(first, first + 64), 64)
        return (255 * frames[0]).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()

    whole = measure(np.concatenate([video(0), video(64)]), spec, [64])
    assert whole["cuts"] == whole["not_found"] == 0
    assert max(whole["position"], whole["velocity"], whole["position_period_later"]) < 0.2
    assert whole["color"] < 1
    jumping = measure(np.concatenate([video(0), video(64 + 16)]), spec, [64])
    assert jumping["cuts"] == 1
    assert jumping["position"] == pytest.approx(25, abs=0.5)
    assert jumping["position_period_later"] == pytest.approx(25, abs=0.5)
    turning = measure(np.concatenate([video(0), video(64, PROMPT.replace("right", "left"))]), spec, [64])
    assert turning["velocity"] == pytest.approx(2 * 100 / 64, abs=0.1)
    gone = measure(np.concatenate([video(0), np.full_like(video(0), 20)]), spec, [64])
    assert gone["not_found"] == pytest.approx(0.5)
    assert math.isnan(gone["color"])
    assert agreement(np.concatenate([video(0), video(64)]), [64]) == {"one_background": 1, "colors_in_common": 1}
    recolored = np.concatenate([video(0), video(64, "a small blue square bounces on a light background")])
    assert agreement(recolored, [64]) == {"one_background": 0, "colors_in_common": 0}
