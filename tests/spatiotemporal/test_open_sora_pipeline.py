"""Open-Sora's door: its VAE against diffusers and stored numbers of the published code, the folder, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, T5EncoderModel

from causalrope_sp import CheckpointError
from causalrope_sp.cli.main import cli
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.reuse import Broadcast, ReusePolicy
from causalrope_sp.spatiotemporal.kinds import kind_of
from causalrope_sp.spatiotemporal.open_sora import load_open_sora
from causalrope_sp.spatiotemporal.open_sora.open_sora_vae import load_open_sora_vae
from causalrope_sp.spatiotemporal.open_sora.sampling import sample, timesteps
from causalrope_sp.spatiotemporal.opening import open_video_pipeline
from causalrope_sp.spatiotemporal.video_pipeline import VideoOptions
from tests.support.open_sora_folder import SCALE, SHIFT, save_open_sora_folder, save_vae, seeded, temporal_state

PROMPT = "A red circle"
SIZE = {"height": 64, "width": 48, "num_inference_steps": 3}
WORDS = ["--height", "64", "--width", "48", "--steps", "3"]


@pytest.fixture(scope="module")
def folder(goldens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_open_sora_folder(goldens / "open-sora", tmp_path_factory.mktemp("open-sora"))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_clips_are_those_of_the_published_decoder(goldens: Path, tmp_path: Path) -> None:
    case = load_file(goldens / "open-sora" / "temporal-decoder.safetensors")
    save_vae(tmp_path / "vae")
    vae = load_open_sora_vae(tmp_path / "vae", dtype=torch.float64)
    scale, shift = (torch.tensor(each, dtype=torch.float64).view(-1, 1, 1, 1) for each in (SCALE, SHIFT))
    for frames, latent_frames in ((17, 5), (1, 1)):
        stored = (case["z"][:, :, :latent_frames] - shift) / scale  # as the transformer makes them
        assert relative(vae.picture_latents(stored, frames), case[f"clip.{frames}"]) < 1e-6  # scale is float32


def test_pictures_are_diffusers_clip_by_clip(tmp_path: Path) -> None:
    """Two clips of one video: each as if alone, and its pictures those of diffusers' VAE."""
    picture = save_vae(tmp_path / "vae").double().requires_grad_(False)
    vae = load_open_sora_vae(tmp_path / "vae", dtype=torch.float64)
    latents = torch.randn(1, 10, 4, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    clips = list(vae.decode(latents, 34))
    assert [clip.shape for clip in clips] == [(17, 3, 24, 16)] * 2
    for number, clip in enumerate(clips):
        found = vae.picture_latents(latents[:, 5 * number : 5 * number + 5].transpose(1, 2), 17)
        expected = picture.decode(found[0].transpose(0, 1) / 0.18215).sample
        assert relative(clip, expected) < 1e-12
    (frame,) = vae.decode(latents[:, :1], 1)
    assert frame.shape == (1, 3, 24, 16)


def latents(pipe: Any, negative: str | None = None, reuse: ReusePolicy | None = None) -> Tensor:
    found = pipe.latents(pipe._noise(17, 3), 17, PROMPT, negative, reuse)
    assert isinstance(found, Tensor)
    return found


def opened(folder: Path, parallel: SequenceParallel | None = None) -> Any:
    return open_video_pipeline(folder, VideoOptions(**SIZE, dtype="float64"), parallel)


def test_texts_are_those_of_t5(folder: Path) -> None:
    """The prompt with the published score; the null text of as many tokens, or a negative prompt of its own length."""
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder / "tokenizer"),
        load_open_sora(folder / "transformer").double(),
    )
    encoder = T5EncoderModel.from_pretrained(folder / "text_encoder").double()

    def encoded(text: str) -> Tensor:
        tokens = tokenizer(text, max_length=10, truncation=True, return_tensors="pt")
        return encoder(**tokens)[0][0].detach()

    pipe = opened(folder)
    prompt, at = encoded("a red circle aesthetic score: 6.5."), timesteps(3, 64, 48, 17)
    for negative, null in ((None, model.null_text[: len(prompt)]), ("hills", encoded("hills"))):
        options = {"timesteps": at, "guidance_scale": 7.0, "fps": 24}
        expected = sample(model, pipe._noise(17, 3), [prompt], [null], **options)  # type: ignore[arg-type]
        assert relative(latents(pipe, negative), expected) < 1e-12


def on_ranks(group: dist.ProcessGroup | None, device: str, folder: Path, cfg: int) -> list[Any]:
    parallel = SequenceParallel(group, cfg=cfg)
    chunks = list(opened(folder, parallel).stream(PROMPT, num_frames=34, seed=3))
    return [chunk.frames for chunk in chunks]


@pytest.mark.parametrize(("ranks", "cfg"), [(2, 1), (2, 2)])
def test_ranks_make_the_same_video(pool: RankPool, folder: Path, ranks: int, cfg: int) -> None:
    expected = on_ranks(None, "cpu", folder, 1)
    found = pool.run(on_ranks, ranks, folder, cfg)
    assert [frames.shape for frames in found] == [(17, 64, 48, 3)] * 2
    assert np.abs(np.concatenate(found).astype(int) - np.concatenate(expected)).max() <= 1


def test_reuse_changes_the_video(folder: Path) -> None:
    pipe = opened(folder)
    reused = latents(pipe, reuse=ReusePolicy((Broadcast("temporal", 2),), "gated"))
    assert relative(reused, latents(pipe)) > 1e-4


def test_the_command_writes_the_video(folder: Path, tmp_path: Path) -> None:
    assert kind_of(folder) == "open-sora"
    words = ["generate", PROMPT, "--model", str(folder), *WORDS, "--out", str(tmp_path / "video.mp4"), "--json"]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1])["frames"] == 51


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--frames", "20"], "num_frames must be 1 or a multiple of 17, the frames of a clip of the VAE, not 20; the"),
        (["--frames", "20"], "the nearest that work: 17 or 34"),
        (["--frames", "5"], "the nearest that work: 1 or 17"),
        (["--image", __file__], "Open-Sora 1.2 makes its video at once: it has no --image to set"),
    ],
)
def test_wrong_options_are_one_line(folder: Path, tmp_path: Path, words: list[str], said: str) -> None:
    done = CliRunner().invoke(
        cli, ["generate", PROMPT, "--model", str(folder), *WORDS, "--out", str(tmp_path / "v.mp4"), *words]
    )
    assert (done.exit_code, done.output.count("\n")) == (2, 1), done.output
    assert said in done.output


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"temporal_vae.decoder.norm1.weight": None}, "1 missing: temporal_vae.decoder.norm1.weight"),
        (
            {"temporal_vae.decoder.norm1.weight": torch.zeros(3)},
            "1 of a wrong shape: temporal_vae.decoder.norm1.weight",
        ),
        ({"temporal_vae.other": torch.zeros(3)}, "1 unexpected: temporal_vae.other"),
        ({"temporal_vae.decoder.conv_out.conv.weight": None}, "not the VAE of Open-Sora 1.2"),
        ({"scale": torch.zeros(3)}, "scale has 3 numbers, expected 4"),
        ({"shift": None}, "shift has 0 numbers, expected 4"),
    ],
)
def test_other_vaes_are_one_line(folder: Path, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    state = load_file(folder / "vae" / "model.safetensors") | change
    save_file({name: x for name, x in state.items() if x is not None}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=said) as raised:
        load_open_sora_vae(tmp_path)
    assert "\n" not in str(raised.value)


def test_the_stored_numbers_have_these_weights() -> None:
    """The sum of all weights, so that another generator of random numbers shows here and not in the numbers."""
    total = sum(float(x.double().abs().sum()) for x in seeded(temporal_state()).values())
    assert total == pytest.approx(55583.6537600229, rel=1e-9)
