"""Image-to-video by channels: 36 in, of which 4 are a mask and 16 an image's latents. diffusers is the judge.

A stream of one chunk attends within the chunk alone, which is what diffusers' pipelines do with a whole video.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image
from torch import Tensor

from causalrope_sp import CausalVideoPipeline, CheckpointError, ConfigError
from causalrope_sp.codec import load_codec
from causalrope_sp.diffusion.noise import seeded_noise
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.grid import Chunk
from causalrope_sp.pipeline.image_control import ImageControl
from causalrope_sp.pipeline.image_encoder import encode_picture, encoder_bytes
from causalrope_sp.pipeline.offload import Offload
from causalrope_sp.pipeline.planned_model import PlannedModel
from causalrope_sp.weights import inspect_checkpoint
from tests.support.codecs import small_codec
from tests.support.published_folders import i2v_pipeline, latents_on_ranks, shown

PROMPT = "the quick brown fox jumps over the lazy dog"
HEIGHT, WIDTH = 32, 48
ON_RANKS: dict[str, Any] = {"chunk_frames": 3, "window": 6, "num_inference_steps": 4}
ONE_CHUNK: dict[str, Any] = {"device": "cpu", "chunk_frames": 3, "window": 3, "num_inference_steps": 4}
CALL: dict[str, Any] = {"height": HEIGHT, "width": WIDTH, "num_frames": 9, "seed": 3}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> WanImageToVideoPipeline:
    """With two transformers, as Wan 2.2's I2V-A14B has them."""
    return i2v_pipeline(tmp_path_factory.mktemp("words"), experts=True)


@pytest.fixture(scope="module")
def folder(theirs: WanImageToVideoPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("published") / "i2v-a14b"
    theirs.save_pretrained(home)
    return home


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def judged(theirs: Any, image: np.ndarray, **options: Any) -> Tensor:
    noise = seeded_noise(3, (1, 16, HEIGHT // 8, WIDTH // 8))(Chunk(0, 0, 3), 0).transpose(1, 2)
    theirs.set_progress_bar_config(disable=True)
    call = {"prompt": PROMPT, "height": HEIGHT, "width": WIDTH, "num_frames": 9, "num_inference_steps": 4, **options}
    made = theirs(image=Image.fromarray(image), **call, latents=noise, output_type="latent").frames
    assert isinstance(made, Tensor)
    return made


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_video_from_an_image_is_diffusers_own(
    theirs: Any, folder: Path, image: np.ndarray, guidance_scale: float
) -> None:
    pipe = CausalVideoPipeline.from_pretrained(
        folder, solver="unipc", timestep_rule="diffusers", guidance_scale=guidance_scale, **ONE_CHUNK
    )
    assert (pipe.model.config.in_channels, pipe.model.config.control_channels) == (16, 20)
    negative: dict[str, Any] = {"negative_prompt": "quick"} if guidance_scale > 1 else {}
    made = pipe(PROMPT, image=image, output_type="latent", **CALL, **negative).frames
    expected = judged(theirs, image, guidance_scale=guidance_scale, negative_prompt="quick")
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
    other = pipe(PROMPT, image=255 - image, output_type="latent", **CALL, **negative).frames
    assert isinstance(made, Tensor)
    assert float((made - other).abs().max()) > 0.05


@pytest.mark.parametrize("kind", ["wan", "wan with shortcuts", "taehv"])
def test_the_control_of_any_chunk_is_that_of_the_whole_video(kind: str) -> None:
    """However chunks are asked for, and also once the encoder holds nothing of the image any more."""
    codec = small_codec(kind, torch.float32)
    side, frames = codec.spatial_stride, 24
    image = np.random.default_rng(1).integers(0, 256, (2 * side, 3 * side, 3), dtype=np.uint8)
    video = torch.zeros(1, 1 + 4 * frames, 3, 2 * side, 3 * side)
    video[:, 0] = torch.from_numpy(image).movedim(2, 0) / 127.5 - 1
    latents = codec.encoder().encode(video)[:, :frames]
    control = ImageControl(codec, image)
    for start, count in ((0, 3), (3, 2), (5, 19), (1, 4), (0, 24)):
        part = control(Chunk(0, start, count))
        assert part.shape[:3] == (1, count, 4 + codec.channels)
        assert torch.equal(part[:, :, 4:], latents[:, start : start + count])
        mask = torch.zeros_like(part[:, :, :4])
        mask[:, : start == 0] = 1
        assert torch.equal(part[:, :, :4], mask)
    assert control._settled
    assert len(control._latents) < frames
    assert torch.equal(control(Chunk(0, 500, 1))[:, :, 4:], latents[:, -1:])


def test_a_stream_from_an_image_goes_on_is_taken_back_and_resumed(
    folder: Path, image: np.ndarray, tmp_path: Path
) -> None:
    pipe = CausalVideoPipeline.from_pretrained(folder, **{**ONE_CHUNK, "window": 6, "num_inference_steps": 2})
    size: dict[str, Any] = {"height": HEIGHT, "width": WIDTH, "seed": 3, "num_frames": None, "kept_chunks": 9}
    session = pipe.open(PROMPT, image=image, history=2, **size)
    made = [shown(session) for _ in range(4)]
    assert [len(part) for part in made] == [9, 12, 12, 12]
    assert session.rewind(2)
    assert all(np.array_equal(shown(session), part) for part in made[2:])
    session.save(tmp_path / "s", cache=False)
    resumed = pipe.resume(tmp_path / "s", image=image)
    assert np.abs(shown(resumed).astype(int) - shown(session)).max() <= 2
    with pytest.raises(ConfigError, match="image or control must be given, one of them: the model is image-to-video"):
        pipe.resume(tmp_path / "s")


def test_on_two_ranks_it_makes_the_same_video(pool: RankPool, folder: Path, image: np.ndarray) -> None:
    made = pool.run(
        latents_on_ranks, 2, str(folder), ON_RANKS, {"prompt": PROMPT, "image": image, **CALL, "num_frames": 21}
    )
    pipe = CausalVideoPipeline.from_pretrained(folder, **{**ONE_CHUNK, "window": 6})
    alone = pipe(PROMPT, image=image, output_type="latent", **{**CALL, "num_frames": 21}).frames
    torch.testing.assert_close(made, alone, rtol=1e-4, atol=1e-4)


def test_what_an_image_to_video_model_needs_is_one_sentence(folder: Path, image: np.ndarray) -> None:
    pipe = CausalVideoPipeline.from_pretrained(folder, **ONE_CHUNK)
    told = "the model is image-to-video, 36 channels in, 20 of them of a mask and an image"
    both: dict[str, Any] = {"image": image, "control": torch.zeros(1, 3, 20, 4, 6)}
    for given in (dict[str, Any](), both):
        with pytest.raises(ConfigError, match=told):
            pipe(PROMPT, **CALL, **given)
    with pytest.raises(ConfigError, match="video must be None: an image-to-video model goes on from an image alone"):
        pipe(PROMPT, video=np.stack([image]), **CALL)


def test_the_codec_of_a_folder_is_the_one_that_encodes(folder: Path) -> None:
    assert inspect_checkpoint(folder / "transformer").config.embedded_channels == 36
    assert load_codec(folder / "vae").channels == 16


@pytest.fixture(scope="module")
def with_tokens(tmp_path_factory: pytest.TempPathFactory) -> WanImageToVideoPipeline:
    """With a CLIP encoder, as Wan 2.1's I2V has it."""
    return i2v_pipeline(tmp_path_factory.mktemp("words"), image_tokens=True)


@pytest.fixture(scope="module")
def token_folder(with_tokens: WanImageToVideoPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("published") / "i2v-14b"
    with_tokens.save_pretrained(home)
    return home


def test_image_tokens_are_diffusers_own(
    with_tokens: Any, token_folder: Path, image: np.ndarray, tmp_path: Path
) -> None:
    pipe = CausalVideoPipeline.from_pretrained(token_folder, solver="unipc", timestep_rule="diffusers", **ONE_CHUNK)
    made = pipe(PROMPT, image=image, output_type="latent", **CALL).frames
    torch.testing.assert_close(made, judged(with_tokens, image, guidance_scale=1.0), rtol=1e-4, atol=1e-4)
    tokens = with_tokens.encode_image(Image.fromarray(image), "cpu")
    same = pipe(PROMPT, image=image, image_embeds=tokens, output_type="latent", **CALL).frames
    other = pipe(PROMPT, image=image, image_embeds=-tokens, output_type="latent", **CALL).frames
    assert isinstance(made, Tensor)
    torch.testing.assert_close(same, made, rtol=1e-4, atol=1e-4)
    assert float((other - made).abs().max()) > 0.05
    pipe.save_pretrained(tmp_path / "saved")
    again = CausalVideoPipeline.from_pretrained(tmp_path / "saved", **ONE_CHUNK)
    assert torch.equal(again(PROMPT, image=image, output_type="latent", **CALL).frames, made)
    assert isinstance(WanImageToVideoPipeline.from_pretrained(tmp_path / "saved"), WanImageToVideoPipeline)


def test_image_tokens_on_two_ranks_and_in_a_session(
    pool: RankPool, token_folder: Path, image: np.ndarray, tmp_path: Path
) -> None:
    made = pool.run(
        latents_on_ranks, 2, str(token_folder), ON_RANKS, {"prompt": PROMPT, "image": image, **CALL, "num_frames": 21}
    )
    pipe = CausalVideoPipeline.from_pretrained(token_folder, **{**ONE_CHUNK, "window": 6})
    alone = pipe(PROMPT, image=image, output_type="latent", **{**CALL, "num_frames": 21}).frames
    torch.testing.assert_close(made, alone, rtol=1e-4, atol=1e-4)
    size: dict[str, Any] = {"height": HEIGHT, "width": WIDTH, "seed": 3, "num_frames": None, "kept_chunks": 9}
    session = pipe.open(PROMPT, image=image, **size)
    first = shown(session)
    fork = session.fork()
    fork.set_prompt("the lazy dog")
    session.save(tmp_path / "s")
    assert np.array_equal(shown(pipe.resume(tmp_path / "s", image=image)), shown(session))
    assert len(shown(fork)) == len(first) + 3


def save_wans_clip(file: Path, layers: int = 3) -> Any:
    """Writes transformers' encoder under the names of Wan's own file, in float16; returns the encoder."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    small = {"hidden_size": 160, "intermediate_size": 28, "num_hidden_layers": layers, "num_attention_heads": 2}
    model = CLIPVisionModel(CLIPVisionConfig(**small, image_size=16, patch_size=8, hidden_act="gelu")).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape).div_(4).half().float()
    state = {name.removeprefix("vision_model."): tensor.half() for name, tensor in model.state_dict().items()}
    named = {"cls_embedding": state["embeddings.class_embedding"].view(1, 1, -1)}
    same = {"norm1": "layer_norm1", "norm2": "layer_norm2", "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2"}
    named["pos_embedding"] = state["embeddings.position_embedding.weight"].unsqueeze(0)
    named["patch_embedding.weight"] = state["embeddings.patch_embedding.weight"]
    for end in ("weight", "bias"):
        named[f"pre_norm.{end}"] = state[f"pre_layrnorm.{end}"]
        named[f"post_norm.{end}"] = state[f"post_layernorm.{end}"]
        for number in range(layers):
            own, theirs = f"transformer.{number}", f"encoder.layers.{number}"
            qkv = [state[f"{theirs}.self_attn.{letter}_proj.{end}"] for letter in "qkv"]
            named[f"{own}.attn.to_qkv.{end}"] = torch.cat(qkv)
            named[f"{own}.attn.proj.{end}"] = state[f"{theirs}.self_attn.out_proj.{end}"]
            for one, other in same.items():
                named[f"{own}.{one}.{end}"] = state[f"{theirs}.{other}.{end}"]
    named["head"] = torch.zeros(160, 24).half()
    whole = {f"visual.{name}": tensor for name, tensor in named.items()}
    torch.save(whole | {"log_scale": torch.tensor(2.6), "textual.head.0.weight": torch.zeros(4, 4)}, file)
    return model


def test_wans_own_clip_file_computes_what_transformers_computes(tmp_path: Path) -> None:
    file = tmp_path / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
    theirs = save_wans_clip(file)
    picture = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    scaled = torch.nn.functional.interpolate(
        torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1, size=(16, 16), mode="bicubic"
    )
    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    rows = [(scaled[:, n] / 2 + 0.5 - mean[n]) / deviation[n] for n in range(3)]
    expected = theirs(pixel_values=torch.stack(rows, 1), output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(encode_picture(file, picture), expected, rtol=1e-5, atol=1e-5)
    assert encoder_bytes(file) == 4 * (sum(p.numel() for p in theirs.parameters()) + 160 * 24)


def test_a_folder_with_wans_clip_file(theirs: Any, token_folder: Path, image: np.ndarray, tmp_path: Path) -> None:
    """Its tokens are those of the encoder; it is counted, saved and opened again."""
    from diffusers import WanTransformer3DModel

    shutil.copytree(token_folder, tmp_path / "model", ignore=shutil.ignore_patterns("image_*", "transformer"))
    torch.manual_seed(0)
    config = WanTransformer3DModel.load_config(token_folder / "transformer")
    WanTransformer3DModel.from_config({**config, "image_dim": 160}).save_pretrained(tmp_path / "model" / "transformer")
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    index = {name: part for name, part in index.items() if not name.startswith("image_")}
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index))
    file = tmp_path / "model" / "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
    save_wans_clip(file)
    pipe = CausalVideoPipeline.from_pretrained(tmp_path / "model", **ONE_CHUNK)
    made = pipe(PROMPT, image=image, output_type="latent", **CALL).frames
    tokens = encode_picture(file, image)
    given = pipe(PROMPT, image=image, image_embeds=tokens, output_type="latent", **CALL).frames
    assert torch.equal(made, given)
    assert pipe.parts.run is not None
    plan = pipe.parts.run.plan()
    assert plan.auxiliary.image == encoder_bytes(file)
    assert plan.bytes_by_time["image"] > plan.weights_bytes + encoder_bytes(file)
    planned = PlannedModel.open(str(tmp_path / "model")).override(window=3, height=HEIGHT, width=WIDTH)
    for on_cpu, counted in ((True, encoder_bytes(file)), (False, 0)):
        assert planned.auxiliary(planned.workload(), Offload(), on_cpu).image == counted
    pipe.save_pretrained(tmp_path / "saved")
    again = CausalVideoPipeline.from_pretrained(tmp_path / "saved", **ONE_CHUNK)
    assert torch.equal(again(PROMPT, image=image, output_type="latent", **CALL).frames, made)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"visual.patch_embedding.weight": torch.zeros(20, 3, 8, 8)}, "not Wan's CLIP encoder, a vision transformer"),
        ({"visual.transformer.1.mlp.2.bias": None}, r"1 missing: transformer\.1\.mlp\.2\.bias"),
        ({"visual.pre_norm.bias": torch.zeros(3)}, r"pre_norm.bias is \(3,\)"),
    ],
)
def test_a_faulty_clip_file_is_one_sentence(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    save_wans_clip(tmp_path / "models_clip_x.pth")
    state = torch.load(tmp_path / "models_clip_x.pth") | change
    torch.save({name: x for name, x in state.items() if x is not None}, tmp_path / "models_clip_x.pth")
    with pytest.raises(CheckpointError, match=told):
        encode_picture(tmp_path / "models_clip_x.pth", np.zeros((8, 8, 3), np.uint8))


def test_what_image_tokens_cannot_be_is_one_sentence(folder: Path, token_folder: Path, image: np.ndarray) -> None:
    pipe = CausalVideoPipeline.from_pretrained(token_folder, **ONE_CHUNK)
    with pytest.raises(ConfigError, match=r"image embeddings have shape \(1, 5, 9\), expected \(1, tokens, 20\)"):
        pipe(PROMPT, image=image, image_embeds=torch.zeros(1, 5, 9), **CALL)
    with pytest.raises(ConfigError, match=r"image_embeds must be given: .* of 20 numbers, and no image is given"):
        pipe(PROMPT, control=torch.zeros(1, 3, 20, 4, 6), **CALL)
    with pytest.raises(ConfigError, match="image_embeds must be a tensor, not 'tokens'"):
        pipe(PROMPT, image=image, image_embeds="tokens", **CALL)
    without = CausalVideoPipeline.from_pretrained(token_folder / "transformer", base=folder, **ONE_CHUNK)
    with pytest.raises(ConfigError, match=r"and its folder has no image_encoder/ .* no models_clip_"):
        without(PROMPT, image=image, **CALL)
    plain = CausalVideoPipeline.from_pretrained(folder, **ONE_CHUNK)
    with pytest.raises(ConfigError, match="image_embeds must be None: the model reads no image tokens"):
        plain(PROMPT, image=image, image_embeds=torch.zeros(1, 5, 20), **CALL)
