"""Guidance from prompts: in a pipeline, in a pipeline.json and on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner

from causalrope_sp import CausalVideoPipeline, ConfigError, SamplerConfig, SequenceParallel
from causalrope_sp.cli.main import cli
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.pipeline.model_config import ModelConfig
from causalrope_sp.toybox import WEIGHTS
from tests.support.videos import video_of

TOYBOX = "a red circle slides right"


def video(pipe: CausalVideoPipeline, **options: Any) -> np.ndarray:
    made = video_of(pipe, TOYBOX, num_frames=9, **options)
    assert made is not None
    return made


def test_a_pipeline_is_guided_by_prompts_and_by_embeddings(tmp_path: Path) -> None:
    pipe = CausalVideoPipeline.from_pretrained("toybox-flow", num_inference_steps=2, guidance_scale=2.0, device="cpu")
    made = video(pipe, negative_prompt="a blue square bounces")
    (embeds,) = pipe.text.encode_all(["a blue square bounces"], 0)
    assert np.array_equal(video(pipe, negative_prompt_embeds=embeds), made)
    zeros = torch.zeros_like(embeds)
    assert np.array_equal(video(pipe), video(pipe, negative_prompt_embeds=zeros))
    assert not np.array_equal(video(pipe), made)
    with pytest.raises(ConfigError, match="either a negative prompt or its embeddings"):
        pipe.stream(TOYBOX, negative_prompt="a blue square bounces", negative_prompt_embeds=embeds)
    with pytest.raises(ConfigError, match="cfg 2: expected a divisor of the 1 ranks that denoise"):
        SequenceParallel.single(cfg=2)


def pipeline_on_two_lanes(group: dist.ProcessGroup, device: str) -> list[Any]:
    parallel = SequenceParallel(group, "auto", device, cfg=2)
    pipe = CausalVideoPipeline.from_pretrained(
        "toybox-flow", num_inference_steps=2, guidance_scale=2.0, parallel=parallel
    )
    made = video_of(pipe, TOYBOX, num_frames=21, negative_prompt="a blue square bounces")
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, (made, pipe.strategy))
    return everyone


def test_a_pipeline_on_two_lanes_hands_its_frames_out_on_rank_0(pool: RankPool) -> None:
    (made, label), (nothing, _) = pool.run(pipeline_on_two_lanes, 2)
    pipe = CausalVideoPipeline.from_pretrained("toybox-flow", num_inference_steps=2, guidance_scale=2.0, device="cpu")
    alone = video_of(pipe, TOYBOX, num_frames=21, negative_prompt="a blue square bounces")
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
        (["--guidance", "3", "--guidance-parallel"], "cfg 2: expected a divisor of the 1 ranks that denoise"),
        (["--solver", "unipc", "--steps", "1000,500"], "solver unipc cannot start at 1000"),
        (
            ["--negative-prompt", TOYBOX, "--negative-embeds", "f"],
            "give either --negative-prompt or --negative-embeds, not both",
        ),
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
