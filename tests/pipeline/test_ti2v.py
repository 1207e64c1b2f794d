"""Wan 2.2's TI2V-5B family: 48 channels, a VAE of stride 16, a first frame at timestep 0. diffusers is the judge.

A stream of one chunk attends within the chunk alone, which is what diffusers' pipelines do with a whole video.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from torch import Tensor

from causalrope_sp import CausalVideoPipeline
from causalrope_sp.diffusion.noise import seeded_noise
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.grid import Chunk
from tests.support.published_folders import latents_on_ranks, save_wan_folder, shown, ti2v_pipeline

PROMPT = "the quick brown fox jumps over the lazy dog"
HEIGHT, WIDTH, FRAMES = 64, 96, 9
WHOLE: dict[str, Any] = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, "seed": 3}
ON_RANKS: dict[str, Any] = {"chunk_frames": 3, "window": 6, "num_inference_steps": 4}
ONE_CHUNK: dict[str, Any] = {"device": "cpu", "chunk_frames": 3, "window": 3, "sink": 0, "num_inference_steps": 4}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return ti2v_pipeline(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def folder(theirs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("published") / "ti2v"
    theirs.save_pretrained(home)
    return home


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def pipe(folder: Path) -> CausalVideoPipeline:
    return CausalVideoPipeline.from_pretrained(folder, solver="unipc", timestep_rule="diffusers", **ONE_CHUNK)


def noise() -> Tensor:
    """The stream's starting noise, as diffusers shapes it, (B, C, F, H, W)."""
    return seeded_noise(3, (1, 48, HEIGHT // 16, WIDTH // 16))(Chunk(0, 0, 3), 0).transpose(1, 2)


def judged(theirs: Any, **options: Any) -> Tensor:
    """The latents that diffusers' pipeline makes, (1, C, F, H, W)."""
    theirs.set_progress_bar_config(disable=True)
    made = theirs(
        prompt=PROMPT,
        height=HEIGHT,
        width=WIDTH,
        num_frames=FRAMES,
        num_inference_steps=4,
        guidance_scale=1.0,
        latents=noise(),
        output_type="latent",
        **options,
    ).frames
    assert isinstance(made, Tensor)
    return made


def test_text_to_video_is_diffusers_own(pipe: CausalVideoPipeline, theirs: Any) -> None:
    assert pipe.config.stream.image_in_chunk
    assert (pipe.fps, pipe.codec.spatial_stride) == (24, 16)
    made = pipe(PROMPT, output_type="latent", **WHOLE).frames
    torch.testing.assert_close(made, judged(theirs), rtol=1e-4, atol=1e-4)


def test_an_image_is_the_first_frame_at_timestep_0_as_in_diffusers(
    pipe: CausalVideoPipeline, theirs: Any, image: np.ndarray
) -> None:
    from PIL import Image

    parts = {**theirs.components, "image_encoder": None, "image_processor": None}
    i2v = WanImageToVideoPipeline(**parts, expand_timesteps=True)
    made = pipe(PROMPT, image=image, output_type="latent", **WHOLE).frames
    expected = judged(i2v, image=Image.fromarray(image))
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
    assert isinstance(made, Tensor)
    encoded = pipe.codec.encoder().encode(torch.from_numpy(image).movedim(2, 0)[None, None] / 127.5 - 1)
    assert torch.equal(made[:, :, :1], encoded.transpose(1, 2))
    without = pipe(PROMPT, output_type="latent", **WHOLE).frames
    assert float((made - without)[:, :, 1:].abs().max()) > 0.05  # the other frames see it


def test_wans_own_folder_makes_the_same_video(
    pipe: CausalVideoPipeline, theirs: Any, image: np.ndarray, tmp_path: Path
) -> None:
    """Its config.json says ti2v, as the published one does."""
    home = save_wan_folder(theirs, tmp_path / "Wan2.2-TI2V", num_heads=2, model_type="ti2v")
    own = CausalVideoPipeline.from_pretrained(home, solver="unipc", timestep_rule="diffusers", shift=5.0, **ONE_CHUNK)
    assert own.config.stream.image_in_chunk
    ours, again = (each(PROMPT, image=image, **WHOLE).frames for each in (pipe, own))
    assert np.array_equal(ours, again)


def test_an_image_in_the_first_chunk_on_two_ranks(pool: RankPool, folder: Path, image: np.ndarray) -> None:
    made = pool.run(
        latents_on_ranks, 2, str(folder), ON_RANKS, {"prompt": PROMPT, "image": image, **WHOLE, "num_frames": 21}
    )
    pipe = CausalVideoPipeline.from_pretrained(folder, **{**ONE_CHUNK, "window": 6})
    alone = pipe(PROMPT, image=image, output_type="latent", **{**WHOLE, "num_frames": 21}).frames
    torch.testing.assert_close(made, alone, rtol=1e-4, atol=1e-4)


def chunks_of(pipe: CausalVideoPipeline, **options: Any) -> Iterator[np.ndarray]:
    for chunk in pipe.stream(PROMPT, **{**WHOLE, "num_frames": 29, **options}):
        assert chunk.frames is not None
        yield chunk.frames


def test_a_stream_with_an_image_in_its_first_chunk(folder: Path, image: np.ndarray) -> None:
    """The first chunk is no longer than without, and a session is taken back to it and resumed bit for bit."""
    pipe = CausalVideoPipeline.from_pretrained(folder, **{**ONE_CHUNK, "window": 6, "num_inference_steps": 2})
    frames = list(chunks_of(pipe, image=image))
    assert [len(part) for part in frames] == [9, 12, 8]
    assert [len(part) for part in chunks_of(pipe)] == [9, 12, 8]
    session = pipe.open(PROMPT, image=image, height=HEIGHT, width=WIDTH, seed=3)
    made = [shown(session) for _ in range(2)]
    assert session.rewind(2)
    assert all(np.array_equal(shown(session), part) for part in made)


def test_a_saved_session_keeps_the_image(folder: Path, image: np.ndarray, tmp_path: Path) -> None:
    pipe = CausalVideoPipeline.from_pretrained(folder, **{**ONE_CHUNK, "window": 6, "num_inference_steps": 2})
    session = pipe.open(PROMPT, image=image, height=HEIGHT, width=WIDTH, seed=3)
    made = [shown(session) for _ in range(3)]
    other = pipe.open(PROMPT, image=image, height=HEIGHT, width=WIDTH, seed=3)
    next(other)
    other.save(tmp_path / "session")
    resumed = pipe.resume(tmp_path / "session")
    assert np.array_equal(shown(resumed), made[1])
    resumed.rewind(2)
    assert np.array_equal(shown(resumed), made[0])
