"""What loading and calls take, under diffusers' names: every value is checked once, in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL.Image import Image
from safetensors.torch import save_file

from causalrope_sp import CausalVideoPipeline, ConfigError, GenerationOptions, LoadOptions, PromptError, load_model
from causalrope_sp.toybox import WEIGHTS
from causalrope_sp.weights import Lora
from tests.support.shell import shell
from tests.support.videos import video_of

PROMPT = "a red circle slides right"


@pytest.fixture(scope="module")
def pipe() -> CausalVideoPipeline:
    made = CausalVideoPipeline.from_pretrained("toybox", device="cpu")
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": 5}, "prompt must be a text or a list of texts, not 5"),
        ({"prompt": ""}, "prompt must be a text that is not empty, not ''"),
        ({"prompt": []}, r"prompt must be a text or a list of texts, not \[\]"),
        ({"prompt": ["a", 3]}, r"prompt\[1\] must be a text that is not empty, not 3"),
        ({}, "give either a prompt or its embeddings"),
        ({"prompt": "a", "num_frames": 2.5}, "num_frames must be a whole number of at least 1, not 2.5"),
        ({"prompt": "a", "num_frames": True}, "num_frames must be a whole number .*, not True"),
        ({"prompt": "a", "num_frames": "9"}, "num_frames must be a whole number .*, not '9'"),
        ({"prompt": "a", "num_frames": 0}, "num_frames must be a whole number .*, not 0"),
        (
            {"prompt": "a", "seed": -1},
            "seed must be a whole number of at least 0 and at most .*, not -1",
        ),
        ({"prompt": "a", "seed": None}, "seed must be a whole number of at least 0 and at most .*, not None"),
        ({"prompt": "a", "image": 5}, "image must be a file, a PIL image, an array or a tensor, not 5"),
        ({"prompt": "a", "video": 5}, "video must be a file, or PIL images, arrays or tensors, not 5"),
        ({"prompt": "a", "reuse": 5}, "reuse must be a policy, a preset's name or a file, not 5"),
        ({"prompt": "a", "height": -64}, "height must be a whole number of at least 1, not -64"),
        ({"prompt": "a", "num_inference_steps": 0}, "num_inference_steps must be a whole number .*, not 0"),
        ({"prompt": "a", "num_inference_steps": [1, "x"]}, "num_inference_steps must be a finite number, not 'x'"),
        ({"prompt": "a", "guidance_scale": float("nan")}, "guidance_scale must be a finite number, not nan"),
        (
            {"prompt": "a", "guidance_interval": 5},
            "guidance_interval must be two timesteps, .*, not 5",
        ),
        ({"prompt": "a", "output_type": "gif"}, "output_type must be one of np, pil, pt, latent, not 'gif'"),
        ({"prompt": "a", "generator": 3}, r"generator must be a torch\.Generator, not 3"),
        ({"prompt": "a", "negative_prompt": 3}, "negative_prompt must be a text, not 3"),
        ({"prompt": "a", "prompt_embeds": 3}, "prompt_embeds must be a tensor or a file, not 3"),
        ({"prompt": "a", "strength": 0.5}, "a strength needs a video"),
        ({"prompt": "a", "video": [], "strength": 2}, "strength must be above 0 and at most 1, not 2"),
        ({"prompt": "a", "callback_on_step_end": "x"}, "callback_on_step_end must be callable, not 'x'"),
        ({"prompt": "a", "frames": 9}, "there is no option frames; there are: prompt, negative_prompt, .*num_frames"),
    ],
)
def test_a_wrong_value_of_a_call_is_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        GenerationOptions.of(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "heads: expected a HeadPolicy or the path of a file that holds one, got 3"),
        ({"window": 2.0}, "window must be a whole number of at least 1, not 2.0"),
        ({"device": "gpu7"}, "device must be one that torch knows, such as cpu or cuda:0, not 'gpu7'"),
        ({"device": "cuda:64"}, "device must be one of this machine, which has 0 GPUs, not cuda:64"),
        ({"dtype": torch.int8}, "dtype must be one of float64, float32, float16, bfloat16, not torch.int8"),
        ({"torch_dtype": "half"}, "dtype must be one of float64, float32, float16, bfloat16, not 'half'"),
        ({"base": 3}, "base must be a path, not 3"),
        ({"codec_weights": ""}, "codec_weights must be a path, not ''"),
        ({"rope": "sideways"}, "rope must be one of absolute, relative, not 'sideways'"),
        ({"weights": "int4"}, "weights must be one of full, fp8, fp8-dynamic, not 'int4'"),
        ({"decode": "x"}, "decode must be one of inline, overlap, spatial, not 'x'"),
        ({"decode": None}, "decode must be one of inline, overlap, spatial, not None"),
        ({"offload": 5}, "offload takes text, codec, none, not 5"),
        ({"offload": [5]}, r"offload takes text, codec, none, not \[5\]"),
        ({"preflight": 1}, "preflight must be True or False, not 1"),
        ({"graphs": 1}, "graphs must be True or False, not 1"),
        ({"steps": 4}, "there is no option steps; there are: base, preset, .*num_inference_steps"),
    ],
)
def test_a_wrong_option_of_loading_is_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CausalVideoPipeline.from_pretrained("toybox", **options)


def test_options_are_taken_as_an_object_and_by_name() -> None:
    options = LoadOptions(dtype="float32", num_inference_steps=[1000, 500])
    pipe = CausalVideoPipeline.from_pretrained("toybox", options, device="cpu", torch_dtype=torch.float64)
    assert pipe.model.dtype == torch.float64
    assert pipe.config.sampler.steps == (1000, 500)
    with pytest.raises(AttributeError):
        options.window = 5  # type: ignore[misc]


def test_numpy_numbers_are_numbers(pipe: CausalVideoPipeline) -> None:
    plain = video_of(pipe, PROMPT, num_frames=9, seed=3)
    assert (video_of(pipe, PROMPT, num_frames=np.int64(9), seed=np.uint8(3)) == plain).all()


def test_every_type_of_output_holds_the_same_frames(pipe: CausalVideoPipeline) -> None:
    """float32 in [0, 1], in the axes that diffusers' pipelines return them."""
    frames = video_of(pipe, PROMPT, num_frames=9, seed=3)
    as_np, as_pt, as_pil = (pipe(PROMPT, num_frames=9, seed=3, output_type=kind).frames for kind in ("np", "pt", "pil"))
    assert (as_np.shape, as_np.dtype) == ((1, 9, 64, 64, 3), np.float32)
    assert ((as_np[0] * 255).round() == frames).all()
    assert torch.equal(as_pt.movedim(2, -1), torch.from_numpy(as_np))
    assert isinstance(as_pil[0][0], Image)
    assert (np.stack([np.asarray(picture) for picture in as_pil[0]]) == frames).all()


def test_what_a_pipeline_returns_it_also_takes(pipe: CausalVideoPipeline) -> None:
    """As "np", "pil" and "pt" it is the conditioning that the uint8 frames are."""
    frames = video_of(pipe, PROMPT, num_frames=9, seed=3)
    expected = video_of(pipe, PROMPT, num_frames=5, seed=3, video=frames)
    first = video_of(pipe, PROMPT, num_frames=5, seed=3, image=frames[0])
    for kind in ("np", "pil", "pt"):
        returned = pipe(PROMPT, num_frames=9, seed=3, output_type=kind).frames[0]
        assert (video_of(pipe, PROMPT, num_frames=5, seed=3, video=returned) == expected).all()
        assert (video_of(pipe, PROMPT, num_frames=5, seed=3, image=returned[0]) == first).all()


def test_latents_are_those_that_the_codec_decodes(pipe: CausalVideoPipeline) -> None:
    latents = pipe(PROMPT, num_frames=9, seed=3, output_type="latent").frames
    assert latents.shape == (1, 16, 3, 8, 8)
    pixels = pipe.codec.decoder().decode(latents.transpose(1, 2))[0].movedim(1, -1)
    frames = (pixels * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
    assert (frames == video_of(pipe, PROMPT, num_frames=9, seed=3)).all()


def test_a_list_of_prompts_is_one_video_after_the_other(pipe: CausalVideoPipeline) -> None:
    prompts = [PROMPT, "a blue square pulses"]
    both = pipe(prompts, num_frames=9, seed=5).frames
    assert both.shape == (2, 9, 64, 64, 3)
    for number, prompt in enumerate(prompts):
        assert (both[number] == pipe(prompt, num_frames=9, seed=5 + number).frames[0]).all()
    with pytest.raises(ConfigError, match="a stream has one prompt"):
        pipe.stream(options=GenerationOptions(prompt=prompts))


def test_a_generator_draws_the_seed_and_goes_on(pipe: CausalVideoPipeline) -> None:
    def videos() -> list[np.ndarray]:
        generator = torch.Generator().manual_seed(7)
        return [video_of(pipe, PROMPT, num_frames=5, generator=generator) for _ in range(2)]

    first, again = videos(), videos()
    assert all((one == other).all() for one, other in zip(first, again, strict=True))
    assert (first[0] != first[1]).any()


def test_a_call_may_have_its_own_size_and_sampler(pipe: CausalVideoPipeline) -> None:
    wide = video_of(pipe, PROMPT, num_frames=5, height=48, width=80)
    assert wide.shape == (5, 48, 80, 3)
    fewer = video_of(pipe, PROMPT, num_frames=5, num_inference_steps=[1000, 500])
    loaded = CausalVideoPipeline.from_pretrained("toybox", device="cpu", num_inference_steps=[1000, 500])
    assert (fewer == video_of(loaded, PROMPT, num_frames=5)).all()
    assert (fewer != video_of(pipe, PROMPT, num_frames=5)).any()
    guided = video_of(pipe, PROMPT, num_frames=5, guidance_scale=1.5, negative_prompt="a blue square pulses")
    assert (guided != video_of(pipe, PROMPT, num_frames=5)).any()
    with pytest.raises(ConfigError, match="height 50 is not divisible by 16; the nearest that work: 48 or 64"):
        pipe.stream(PROMPT, height=50)


def test_a_callback_hears_of_every_step(pipe: CausalVideoPipeline) -> None:
    heard: list[tuple[int, float, int]] = []

    def callback(asked: CausalVideoPipeline, step: int, timestep: float, told: dict[str, Any]) -> None:
        assert asked is pipe
        assert told["num_steps"] == 4
        heard.append((step, timestep, told["chunk"]))

    video_of(pipe, PROMPT, num_frames=17, callback_on_step_end=callback)
    timesteps = [1000, 750, 500, 250]
    chunks = sorted({chunk for *_, chunk in heard})
    assert heard == [(step, timesteps[step], chunk) for chunk in chunks for step in range(4)]
    assert chunks == [chunk.index for chunk in pipe.stream(PROMPT, num_frames=17)]


def test_a_pipeline_moves_and_names_its_parts(pipe: CausalVideoPipeline) -> None:
    own = CausalVideoPipeline.from_pretrained("toybox", device="cpu")
    own.set_progress_bar_config(disable=True)
    assert own.to("cpu", torch.float64) is own
    assert own.model.dtype == torch.float64
    assert own.components.keys() == {"transformer", "vae", "text_encoder", "tokenizer", "scheduler"}
    difference = own(PROMPT, num_frames=5).frames - pipe(PROMPT, num_frames=5).frames
    assert abs(difference).max() < 0.1
    with pytest.raises(ConfigError, match="device must be one that torch knows"):
        own.to("gpu")
    assert own.to(torch.bfloat16).model.dtype == torch.bfloat16
    assert "transformer=CausalDiT" in repr(own)


def test_the_progress_bar_counts_frames(
    pipe: CausalVideoPipeline, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe.set_progress_bar_config(desc="video", ascii=True)
    pipe(PROMPT, num_frames=9)
    pipe.set_progress_bar_config(disable=True)
    said = capsys.readouterr().err
    assert "video: 100%" in said
    assert "9/9" in said
    pipe(PROMPT, num_frames=9)
    assert capsys.readouterr().err == ""


def test_a_lora_is_merged_as_load_model_merges_it(tmp_path: Path) -> None:
    down, up = torch.randn(2, 192), torch.randn(192, 2)
    name = "blocks.0.self_attn.q"
    state = {f"diffusion_model.{name}.lora_down.weight": down, f"diffusion_model.{name}.lora_up.weight": up}
    save_file(state, tmp_path / "lora.safetensors")
    pipe = CausalVideoPipeline.from_pretrained("toybox", device="cpu", loras=[tmp_path / "lora.safetensors"])
    expected = load_model(WEIGHTS / "toybox.safetensors", dtype=torch.float32, loras=[tmp_path / "lora.safetensors"])
    plain = load_model(WEIGHTS / "toybox.safetensors", dtype=torch.float32)
    key = "blocks.0.self_attn.qkv.weight"
    assert torch.equal(pipe.model.state_dict()[key], expected.state_dict()[key])
    assert not torch.equal(plain.state_dict()[key], expected.state_dict()[key])
    with pytest.raises(ConfigError, match=r"loras must be a list of files or of Lora objects, not 'a'"):
        LoadOptions(loras="a")


@pytest.mark.parametrize("how", ["lora", "loras", "pipeline.json", "both", "command line"])
def test_the_weight_of_a_lora_is_given_everywhere(tmp_path: Path, how: str) -> None:
    torch.manual_seed(0)
    name, file = "blocks.0.self_attn.q", tmp_path / "lora.safetensors"
    state = {f"{name}.lora_down.weight": torch.randn(2, 192), f"{name}.lora_up.weight": torch.randn(192, 2)}
    save_file(state, file)
    wanted = load_model(WEIGHTS / "toybox.safetensors", dtype=torch.float32, loras=[Lora(file, 0.25)])
    source: Path | str = "toybox"
    options: dict[str, Any] = {"lora": f"{file}:0.25"} if how == "lora" else {"loras": [f"{file}:0.25"]}
    if how in ("pipeline.json", "both"):
        content = json.loads((WEIGHTS / "toybox.json").read_text())
        content |= {key: str(WEIGHTS / content[key]) for key in ("transformer", "codec")}
        entry: Any = {"path": "lora.safetensors", "weight": 0.5} if how == "both" else "lora.safetensors:0.25"
        (tmp_path / "pipeline.json").write_text(json.dumps(content | {"loras": [entry]}))
        source = tmp_path / "pipeline.json"
        options = {"loras": [Lora(file, -0.25)]} if how == "both" else {}
    if how == "command line":
        args = ["--lora", f"{file}:0.25", "--lora", file, "--frames", 1, "--device", "cpu", "--out", tmp_path / "v.mp4"]
        said = shell("generate", PROMPT, *args).stderr
        assert f"{file}: LoRA on 1 module; rank 2; scale 1 (no alpha: 1) on 1 module, weight 0.25" in said
        assert "on 1 module, weight 1\n" in said
        return
    made = CausalVideoPipeline.from_pretrained(source, device="cpu", **options).model.state_dict()
    key = "blocks.0.self_attn.qkv.weight"
    torch.testing.assert_close(made[key], wanted.state_dict()[key], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_embeddings_that_are_not_finite_are_refused(pipe: CausalVideoPipeline, value: float) -> None:
    embeds = torch.full((1, 3, 51), value, dtype=torch.float64)
    with pytest.raises(ConfigError, match="text embeddings must be finite in float32"):
        pipe(prompt_embeds=embeds, num_frames=5)
    with pytest.raises(ConfigError, match="must be a dense floating-point tensor"):
        pipe(prompt_embeds=embeds.to(torch.int64 if value > 1e200 else torch.complex64), num_frames=5)


def test_a_wrong_prompt_late_in_a_list_is_found_before_the_first_video(pipe: CausalVideoPipeline) -> None:
    steps: list[int] = []
    with pytest.raises(PromptError):
        pipe([PROMPT, "zzz"], num_frames=5, callback_on_step_end=lambda *told: steps.append(told[1]))
    assert steps == []


@pytest.mark.parametrize("device", ["meta", "mps", "cpu:7"])
def test_devices_that_no_model_runs_on_are_refused(device: str) -> None:
    with pytest.raises(ConfigError, match="device must be cpu, cuda or cuda:NUMBER"):
        CausalVideoPipeline.from_pretrained("toybox", device=device)
    with pytest.raises(ConfigError, match="window must be a whole number of at least 1 and at most 2147483647"):
        CausalVideoPipeline.from_pretrained("toybox", window=2**70)
