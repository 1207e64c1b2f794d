"""Image-to-video by channels: 36 in, of which 4 are a mask and 16 an image's latents. diffusers is the judge.

A stream of one chunk attends within the chunk alone, which is what diffusers' pipelines do with a whole video.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image
from torch import Tensor

from causalrope_sp import CausalVideoPipeline, ConfigError
from causalrope_sp.codec import load_codec
from causalrope_sp.diffusion.noise import seeded_noise
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.grid import Chunk
from causalrope_sp.pipeline.image_control import ImageControl
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


def test_what_image_tokens_cannot_be_is_one_sentence(folder: Path, token_folder: Path, image: np.ndarray) -> None:
    pipe = CausalVideoPipeline.from_pretrained(token_folder, **ONE_CHUNK)
    with pytest.raises(ConfigError, match=r"image embeddings have shape \(1, 5, 9\), expected \(1, tokens, 20\)"):
        pipe(PROMPT, image=image, image_embeds=torch.zeros(1, 5, 9), **CALL)
    with pytest.raises(ConfigError, match=r"image_embeds must be given: .* of 20 numbers, and no image is given"):
        pipe(PROMPT, control=torch.zeros(1, 3, 20, 4, 6), **CALL)
    with pytest.raises(ConfigError, match="image_embeds must be a tensor, not 'tokens'"):
        pipe(PROMPT, image=image, image_embeds="tokens", **CALL)
    without = CausalVideoPipeline.from_pretrained(token_folder / "transformer", base=folder, **ONE_CHUNK)
    with pytest.raises(ConfigError, match="and its folder has no image_encoder/ in diffusers' layout"):
        without(PROMPT, image=image, **CALL)
    plain = CausalVideoPipeline.from_pretrained(folder, **ONE_CHUNK)
    with pytest.raises(ConfigError, match="image_embeds must be None: the model reads no image tokens"):
        plain(PROMPT, image=image, image_embeds=torch.zeros(1, 5, 20), **CALL)
