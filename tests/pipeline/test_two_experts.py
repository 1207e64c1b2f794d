"""Two transformers that share the steps by noise level, as Wan 2.2's A14B has them. diffusers is the judge.

A stream of one chunk attends within the chunk alone, which is what diffusers' pipelines do with a whole video.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from causalrope_sp import CausalVideoPipeline, CheckpointError, ConfigError, SequenceParallel
from causalrope_sp.diffusion.noise import seeded_noise
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.grid import Chunk
from causalrope_sp.pipeline.experts import loras_of_models
from causalrope_sp.pipeline.load_options import LoadOptions
from causalrope_sp.pipeline.model_source import find_model
from causalrope_sp.pipeline.offload import Offload
from causalrope_sp.pipeline.planned_model import PlannedModel
from causalrope_sp.pipeline.preflight import describe_run
from causalrope_sp.weights import Lora
from tests.support.checkpoints import wan_name
from tests.support.loras import save_lora
from tests.support.published_folders import experts_pipeline, latents_on_ranks, shown
from tests.support.shell import shell

PROMPT = "the quick brown fox jumps over the lazy dog"
HEIGHT, WIDTH = 32, 48
ON_RANKS: dict[str, Any] = {"chunk_frames": 3, "window": 6, "num_inference_steps": 4}
ONE_CHUNK: dict[str, Any] = {"device": "cpu", "chunk_frames": 3, "window": 3, "num_inference_steps": 4}
CALL: dict[str, Any] = {"height": HEIGHT, "width": WIDTH, "num_frames": 9, "seed": 3}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return experts_pipeline(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def folder(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("published") / "a14b"
    theirs.save_pretrained(home)
    return home


def judged(theirs: Any, **options: Any) -> Tensor:
    noise = seeded_noise(3, (1, 16, HEIGHT // 8, WIDTH // 8))(Chunk(0, 0, 3), 0).transpose(1, 2)
    theirs.set_progress_bar_config(disable=True)
    call = {"prompt": PROMPT, "height": HEIGHT, "width": WIDTH, "num_frames": 9, "num_inference_steps": 4, **options}
    made = theirs(**call, latents=noise, output_type="latent").frames
    assert isinstance(made, Tensor)
    return made


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("ratio", [0.9, 0.5])
def test_each_step_is_made_by_the_model_that_diffusers_takes(
    theirs: Any, folder: Path, tmp_path: Path, guidance_scale: float, ratio: float
) -> None:
    """UniPC's timesteps with shift 5 are 999, 937, 833 and 625 or near: at 0.9 each model makes two, at 0.5 one all."""
    shutil.copytree(folder, tmp_path / "model")
    index = tmp_path / "model" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"boundary_ratio": ratio}))
    pipe = CausalVideoPipeline.from_pretrained(
        tmp_path / "model", solver="unipc", timestep_rule="diffusers", guidance_scale=guidance_scale, **ONE_CHUNK
    )
    assert pipe.config.boundary_ratio == ratio
    made = pipe(PROMPT, negative_prompt="quick" if guidance_scale > 1 else None, output_type="latent", **CALL).frames
    theirs.register_to_config(boundary_ratio=ratio)
    expected = judged(theirs, guidance_scale=guidance_scale, negative_prompt="quick")
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
    if ratio == 0.9:
        theirs.register_to_config(boundary_ratio=0.01)
        alone = judged(theirs, guidance_scale=guidance_scale, negative_prompt="quick")
        assert float((expected - alone).abs().max()) > 0.01


def test_wans_own_folder_has_the_boundary_of_its_models(theirs: Any, folder: Path, tmp_path: Path) -> None:
    """high_noise_model and low_noise_model, under Wan's own names; its code has 0.875 for text to video."""
    home = tmp_path / "Wan2.2-T2V-A14B"
    for name, model in (("high_noise_model", theirs.transformer), ("low_noise_model", theirs.transformer_2)):
        (home / name).mkdir(parents=True)
        state = {wan_name(key): tensor for key, tensor in model.state_dict().items()}
        torch.save(state, home / name / "diffusion_pytorch_model.pt")
        (home / name / "config.json").write_text(json.dumps({"num_heads": 2, "model_type": "t2v"}))
    options: dict[str, Any] = {**ONE_CHUNK, "shift": 5.0, "solver": "euler"}
    own = CausalVideoPipeline.from_pretrained(home, base=folder, **options)
    assert own.config.boundary_ratio == 0.875
    assert "low_noise_model makes the steps below timestep 875" in "; ".join(own.config.inferred)
    shutil.copytree(folder, tmp_path / "model")
    index = tmp_path / "model" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"boundary_ratio": 0.875}))
    other = CausalVideoPipeline.from_pretrained(tmp_path / "model", **options)
    assert np.array_equal(own(PROMPT, **CALL).frames, other(PROMPT, **CALL).frames)
    (home / "high_noise_model" / "config.json").write_text(json.dumps({"num_heads": 2}))
    with pytest.raises(CheckpointError, match=r"whose boundary_ratio must be a number in \(0, 1\) .* not None"):
        find_model(home, LoadOptions(base=folder))


def test_a_session_of_two_models_is_steered_and_goes_on(folder: Path, tmp_path: Path) -> None:
    pipe = CausalVideoPipeline.from_pretrained(folder, **{**ONE_CHUNK, "window": 6})
    size: dict[str, Any] = {"height": HEIGHT, "width": WIDTH, "seed": 3, "num_frames": None, "kept_chunks": 9}
    session = pipe.open(PROMPT, history=2, **size)
    made = [shown(session) for _ in range(4)]
    fork = session.fork()
    assert session.rewind(2)
    assert all(np.array_equal(shown(session), part) for part in made[2:])
    with pytest.raises(ConfigError, match="cache must be False for a model of two transformers"):
        session.save(tmp_path / "s")
    session.save(tmp_path / "s", cache=False)
    later = shown(session)
    assert np.array_equal(later, shown(fork))
    resumed = pipe.resume(tmp_path / "s")
    assert np.abs(shown(resumed).astype(int) - later).max() <= 2  # its caches are computed anew
    fork.set_prompt("the lazy dog")
    assert not np.array_equal(shown(fork), shown(session))


@pytest.mark.parametrize("cfg", [1, 2])
def test_on_two_ranks_it_makes_the_same_video(pool: RankPool, folder: Path, cfg: int) -> None:
    """With the sequence shared, and with the branches of guidance on one rank each."""
    made = pool.run(
        latents_on_ranks,
        2,
        str(folder),
        {**ON_RANKS, "cfg": cfg, "guidance_scale": 2.0},
        {"prompt": PROMPT, **CALL, "num_frames": 21},
    )
    pipe = CausalVideoPipeline.from_pretrained(folder, **{**ONE_CHUNK, "window": 6, "guidance_scale": 2.0})
    alone = pipe(PROMPT, output_type="latent", **{**CALL, "num_frames": 21}).frames
    torch.testing.assert_close(made, alone, rtol=1e-4, atol=1e-4)


def test_it_is_saved_and_opened_again(folder: Path, tmp_path: Path) -> None:
    from diffusers import WanPipeline

    pipe = CausalVideoPipeline.from_pretrained(folder, **ONE_CHUNK)
    pipe.save_pretrained(tmp_path / "saved")
    again = CausalVideoPipeline.from_pretrained(tmp_path / "saved", **ONE_CHUNK)
    assert again.config.boundary_ratio == 0.9
    assert np.array_equal(pipe(PROMPT, **CALL).frames, again(PROMPT, **CALL).frames)
    whole = WanPipeline.from_pretrained(tmp_path / "saved")
    assert whole.config.boundary_ratio == 0.9
    for name, ours in (("transformer", pipe.model), ("transformer_2", pipe.components["transformer_2"])):
        theirs = getattr(whole, name).state_dict()["blocks.0.ffn.net.2.bias"]
        assert torch.equal(theirs, ours.state_dict()["blocks.0.ffn.down.bias"])


def save_loras(folder: Path) -> tuple[Path, Path]:
    """A LoRA of each of the two, under the names that LightX2V publishes."""
    names = ("high_noise_model.safetensors", "low_noise_model.safetensors")
    modules = ("transformer.blocks.0.attn1.to_q", "transformer.blocks.1.ffn.net.2")
    sizes = ((24, 24), (48, 24))
    high, low = (save_lora(folder / n, m, 7, 0.5, size) for n, m, size in zip(names, modules, sizes, strict=True))
    return high, low


@pytest.mark.parametrize("live", [False, True], ids=["loaded", "live"])
def test_each_has_loras_of_its_own_as_in_diffusers(folder: Path, tmp_path: Path, live: bool) -> None:
    from diffusers import WanPipeline

    high, low = save_loras(tmp_path)
    theirs = WanPipeline.from_pretrained(folder)
    options: dict[str, Any] = {**ONE_CHUNK, "solver": "unipc", "timestep_rule": "diffusers", "guidance_scale": 1.0}
    plain = judged(theirs, guidance_scale=1.0)
    theirs.load_lora_weights(str(high), adapter_name="high")
    theirs.load_lora_weights(str(low), adapter_name="low", load_into_transformer_2=True)
    theirs.set_adapters(["high", "low"], [1.0, 0.5])
    expected = judged(theirs, guidance_scale=1.0)
    assert float((expected - plain).abs().max()) > 0.01
    if live:
        pipe = CausalVideoPipeline.from_pretrained(folder, **options)
        with pipe.open(PROMPT, **{**CALL, "num_frames": None}) as session:
            shown(session)
            assert pipe.load_lora_weights(high, "high") == [1]
            pipe.load_lora_weights(low, "low", load_into_transformer_2=True)
            assert pipe.set_adapters(["high", "low"], [1.0, 0.5]) == [1]
            shown(session)
    else:
        pipe = CausalVideoPipeline.from_pretrained(folder, loras=[high, f"{low}:0.5"], **options)
    made = pipe(PROMPT, output_type="latent", **CALL).frames
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
    assert pipe.merged_loras == (
        "high_noise_model.safetensors (weight 1)",
        f"low_noise_model.safetensors (weight 0.5{', low-noise' if live else ''})",
    )


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise.safetensors", 0),
        ("Wan2.2-Lightning_T2V-A14B-4steps-lora_LOW_fp16.safetensors", 1),
        ("low_noise/adapter_model.safetensors", 1),
        ("style.safetensors:high-noise", 0),
        ("style.safetensors:0.5:low-noise", 1),
        ("style_high_noise.safetensors:low-noise", 1),
    ],
)
def test_which_of_the_two_a_lora_is_of(name: str, expert: int) -> None:
    assert [len(own) for own in loras_of_models([name], 2)] == [1 - expert, expert]


@pytest.mark.parametrize("name", ["high_quality.safetensors", "high_noise_low_noise.safetensors", "slow.safetensors"])
def test_a_name_that_does_not_say_it_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="must say of which of the two"):
        loras_of_models([name], 2)


def loras_on_ranks(group: dist.ProcessGroup | None, device: str, folder: str, loras: list[Path], load: Any) -> Any:
    """The frames of a guided session of two models, with a branch on each rank, whose LoRAs change in the middle."""
    parallel = SequenceParallel(group, "auto", device, cfg=2 if group is not None else 1)
    pipe = CausalVideoPipeline.from_pretrained(folder, parallel=parallel, **load)
    with pipe.open(PROMPT, negative_prompt="quick", **{**CALL, "num_frames": None}) as session:
        made = [session.step().frames for _ in range(2)]
        for lora in loras:
            pipe.load_lora_weights(lora, recache=True)
        return [*made, session.step().frames]


def test_branches_of_both_go_on_with_new_loras_on_two_ranks(pool: RankPool, folder: Path, tmp_path: Path) -> None:
    load = {**ON_RANKS, "guidance_scale": 2.0}
    loras = list(save_loras(tmp_path))
    made = pool.run(loras_on_ranks, 2, str(folder), loras, load)
    alone = loras_on_ranks(None, "cpu", str(folder), loras, load)
    without = loras_on_ranks(None, "cpu", str(folder), [], load)
    assert max(np.abs(a.astype(int) - b).max() for a, b in zip(made, alone, strict=True)) <= 2
    assert np.abs(alone[-1].astype(int) - without[-1]).max() > 5


def test_both_are_counted_before_they_are_loaded(folder: Path) -> None:
    config = find_model(folder, LoadOptions(height=HEIGHT, width=WIDTH, window=6))
    parallel = SequenceParallel.single(device="cpu")
    run = describe_run(config, parallel, Offload())
    one = describe_run(replace(config, transformer_2=None, boundary_ratio=None), parallel, Offload())
    assert run.plan().weights_bytes == 2 * one.plan().weights_bytes
    assert run.plan().cache_bytes == 2 * one.plan().cache_bytes
    assert run.loaded_bytes - one.loaded_bytes == one.work.weights_bytes
    assert PlannedModel.open(str(folder)).override(window=6, height=HEIGHT, width=WIDTH).workload().models == 2


def test_what_two_models_cannot_do_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    told = r"the LoRA lora.safetensors \(weight 1\) must say of which of the two transformers .* FILE:high-noise or"
    with pytest.raises(ConfigError, match=told):
        CausalVideoPipeline.from_pretrained(folder, loras=[tmp_path / "lora.safetensors"], **ONE_CHUNK)
    pipe = CausalVideoPipeline.from_pretrained(folder, **ONE_CHUNK)
    with pytest.raises(ConfigError, match=told):
        pipe.load_lora_weights(tmp_path / "lora.safetensors")
    with pytest.raises(ConfigError, match=r"names an expert, and the model has one transformer"):
        CausalVideoPipeline.from_pretrained("toybox", lora=Lora(tmp_path / "lora.safetensors", expert="low-noise"))
    with pytest.raises(ConfigError, match="reuse must be None where two models share the steps"):
        pipe(PROMPT, reuse="pab:latte", **CALL)
    with pytest.raises(ConfigError, match="transformer_2 and boundary_ratio must be given together"):
        replace(pipe.config, boundary_ratio=None)
    refused = shell("profile-reuse", "--model", folder, PROMPT)
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert "has two transformers, where nothing is reused" in refused.stderr
