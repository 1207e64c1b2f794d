"""A pipeline with UMT5, or without it from given embeddings, on one rank and on two of which one has no encoder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from causalrope_sp import (
    CausalRopeError,
    CausalVideoPipeline,
    CheckpointError,
    ConfigError,
    PromptError,
    SequenceParallel,
    load_model,
)
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.pipeline.offload import Offload
from causalrope_sp.text import UMT5TextEncoder, save_embeds
from causalrope_sp.text.umt5_checkpoint import T5Checkpoint
from causalrope_sp.toybox import WEIGHTS
from tests.support import text_files as files
from tests.support.videos import video_of
from tests.support.watching import noted

PROMPT = "a red dog"
CONFIG = load_model(WEIGHTS / "toybox.safetensors").config  # its text is 3 tokens long
SHAPE = (1, CONFIG.text_len, CONFIG.text_dim)


def write_recipe(folder: Path, text: object) -> Path:
    folder.mkdir(exist_ok=True)
    model_config = json.loads((WEIGHTS / "toybox.json").read_text())
    model_config |= {
        "transformer": str(WEIGHTS / model_config["transformer"]),
        "codec": str(WEIGHTS / model_config["codec"]),
    }
    (folder / "pipeline.json").write_text(json.dumps(model_config | {"text": text}))
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, whose text encoder is there, and `bare`, whose is not."""
    folder = tmp_path_factory.mktemp("model")
    files.save_diffusers(write_recipe(folder / "model", "./"), files.make_encoder(width=CONFIG.text_dim))
    write_recipe(folder / "bare", "umt5/")
    return folder


@pytest.fixture(scope="module")
def embeds(home: Path) -> Tensor:
    return UMT5TextEncoder.from_pretrained(home / "model", text_len=CONFIG.text_len).encode(PROMPT)


@pytest.fixture(scope="module")
def embeds_file(home: Path, embeds: Tensor) -> Path:
    save_embeds(home / "e.safetensors", embeds, PROMPT, "umt5")
    return home / "e.safetensors"


@pytest.fixture(scope="module")
def bare(home: Path) -> CausalVideoPipeline:
    return CausalVideoPipeline.from_pretrained(home / "bare", device="cpu")


def video(pipe: CausalVideoPipeline, prompt: str | None = None, **options: Any) -> np.ndarray:
    made = video_of(pipe, prompt, num_frames=9, **options)
    assert made is not None
    return made


@pytest.mark.parametrize("keep", ["device", "cpu", "free"])
def test_a_prompt_and_its_embeddings_give_the_same_video(
    home: Path, bare: CausalVideoPipeline, embeds: Tensor, embeds_file: Path, keep: Any
) -> None:
    pipe = CausalVideoPipeline.from_pretrained(home / "model", device="cpu", offload=Offload(keep))
    expected = video(pipe, PROMPT)
    assert np.array_equal(video(pipe, PROMPT), expected)
    assert not np.array_equal(video(pipe, "the quick fox"), expected)
    for given in (embeds, embeds.double(), embeds_file, str(embeds_file)):
        assert np.array_equal(video(bare, prompt_embeds=given), expected)


@pytest.mark.parametrize("spelled", ["text", "wan", "apart"])
def test_a_recipe_names_folders_files_and_tokenizers(home: Path, tmp_path: Path, embeds: Tensor, spelled: str) -> None:
    model = files.make_encoder(width=CONFIG.text_dim)
    files.save_wan(tmp_path, model)
    (tmp_path / "words").mkdir()
    text = {
        "text": "../" + files.save_diffusers(tmp_path / "text", model).name,
        "wan": "../models_t5_umt5-xxl-enc-bf16.pth",
        "apart": {"path": "../models_t5_umt5-xxl-enc-bf16.pth", "tokenizer": "../text/tokenizer"},
    }[spelled]
    pipe = CausalVideoPipeline.from_pretrained(write_recipe(tmp_path / "model", text), device="cpu")
    torch.testing.assert_close(pipe.text.encode(PROMPT, 0), embeds, rtol=0, atol=1e-6)


def test_two_prompts_are_one_reading_of_the_encoder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = CausalVideoPipeline.from_pretrained(
        home / "model", device="cpu", offload="text", guidance_scale=2.0, num_inference_steps=1
    )
    calls: list[Any] = []
    monkeypatch.setattr(T5Checkpoint, "read", noted(T5Checkpoint.read, lambda self, *args: calls.append(args)))
    made = video(pipe, PROMPT)
    assert len(calls) == 1
    assert np.array_equal(video(pipe, PROMPT, negative_prompt=""), made)
    assert not np.array_equal(video(pipe, PROMPT, negative_prompt="the quick fox"), made)


def test_without_the_encoder_a_prompt_is_refused(bare: CausalVideoPipeline, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no text encoder at .*umt5: no such file or folder"):
        bare.stream(PROMPT)
    without = CausalVideoPipeline.from_pretrained(write_recipe(tmp_path, "./"), device="cpu")
    with pytest.raises(CheckpointError, match=r"no text encoder at .*: no text_encoder/, models_t5"):
        without.stream(PROMPT)


def test_an_encoder_that_is_broken_is_told_when_the_model_is_loaded(tmp_path: Path) -> None:
    files.save_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "text_encoder").mkdir()
    with pytest.raises(CheckpointError, match="text_encoder: holds no weights"):
        CausalVideoPipeline.from_pretrained(write_recipe(tmp_path, "./"), device="cpu")


def test_an_encoder_of_another_width_is_refused(tmp_path: Path) -> None:
    files.save_diffusers(write_recipe(tmp_path, "./"), files.make_encoder())
    pipe = CausalVideoPipeline.from_pretrained(tmp_path, device="cpu")
    with pytest.raises(ConfigError, match=r"text embeddings have shape \(1, 3, 24\), the model takes \(1, 3, 51\)"):
        pipe.stream(PROMPT)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "give either a prompt or its embeddings"),
        ({"prompt": PROMPT, "prompt_embeds": torch.zeros(SHAPE)}, "give either a prompt or its embeddings"),
        (
            {"prompt_embeds": torch.zeros(1, 4, 51)},
            r"text embeddings have shape \(1, 4, 51\), the model takes \(1, 3, 51\)",
        ),
        ({"prompt_embeds": "nothing.safetensors"}, "nothing.safetensors: no such file"),
    ],
)
def test_text_that_cannot_be_used_is_refused(bare: CausalVideoPipeline, options: dict[str, Any], told: str) -> None:
    with pytest.raises(CausalRopeError, match=told):
        bare.stream(**options)


@pytest.mark.parametrize("text", ["umt5", 5, None, ["./"]])
def test_a_recipe_whose_text_is_nothing_known_is_one_line(tmp_path: Path, text: object) -> None:
    with pytest.raises(
        CausalRopeError, match=r"unknown text encoder|not a model's pipeline.json|is not a whole model"
    ) as caught:
        CausalVideoPipeline.from_pretrained(write_recipe(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_toybox_takes_embeddings_too(tmp_path: Path) -> None:
    pipe = CausalVideoPipeline.from_pretrained("toybox", device="cpu")
    prompt = "a red circle slides right"
    save_embeds(tmp_path / "e.safetensors", pipe.text.encode(prompt, 3), prompt, "toybox")
    assert np.array_equal(video(pipe, prompt_embeds=tmp_path / "e.safetensors", seed=3), video(pipe, prompt, seed=3))


def on_two_ranks(group: dist.ProcessGroup, device: str, home: Path, embeds_file: Path) -> list[dict[str, Any]]:
    """Rank 0 has the encoder and the file of embeddings; the others have neither."""
    parallel = SequenceParallel(group, "gather-kv", device)
    first = parallel.rank == 0
    pipe = CausalVideoPipeline.from_pretrained(home / ("model" if first else "bare"), parallel=parallel)
    sys.modules["ftfy"] = None  # type: ignore[assignment]
    found: dict[str, Any] = {}
    taken: dict[str, dict[str, Any]] = {
        "prompt": {"prompt": PROMPT},
        "embeds": {"prompt_embeds": embeds_file if first else "nowhere.safetensors"},
    }
    for name, options in taken.items():
        chunks = list(pipe.stream(num_frames=9, **options))
        found[name] = [chunk.frames for chunk in chunks]
        entries = {(kind, layer): entry for kind, layer, entry in _entries(chunks[0].comm_stats)}
        found[f"{name} moved"] = entries["text", -1]
    refused: dict[str, dict[str, Any]] = {
        "ftfy": {"prompt": "“dog”"},
        "shape": {"prompt_embeds": torch.zeros(2, 2, 2)},
        "none": {},
    }
    for name, options in refused.items():
        with pytest.raises(CausalRopeError) as caught:
            pipe.stream(**options)
        found[name] = type(caught.value), str(caught.value)
    found["text"] = pipe.text.encode(PROMPT, 0)
    found["encoder"] = pipe.text.encoder is not None  # type: ignore[union-attr]
    del sys.modules["ftfy"]
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, found)
    return everyone


def _entries(comm_stats: Any) -> list[tuple[str, int, tuple[int, int, int]]]:
    return [(kind, layer, (e.calls, e.elements, e.bytes)) for (kind, layer), e in comm_stats.entries.items()]


def test_the_encoder_runs_on_rank_0_alone(
    pool: RankPool, home: Path, bare: CausalVideoPipeline, embeds: Tensor, embeds_file: Path
) -> None:
    ranks = pool.run(on_two_ranks, 2, home, embeds_file)
    expected = video(bare, prompt_embeds=embeds)
    numbers = torch.Size(SHAPE).numel()
    for rank, found in enumerate(ranks):
        torch.testing.assert_close(found["text"], embeds, rtol=0, atol=1e-6)
        assert found["encoder"] == (rank == 0)
        for name in ("prompt", "embeds"):
            assert found[f"{name} moved"] == (1, numbers * rank, 4 * numbers * rank)
            assert (found[name][0] is None) == (rank > 0)
    assert torch.equal(ranks[0]["text"], ranks[1]["text"])
    for name in ("prompt", "embeds"):
        first = ranks[0][name][0].astype(int)
        assert np.abs(first - expected[: len(first)]).max() <= 1
    for name, error, told in (
        ("ftfy", PromptError, "needs ftfy"),
        ("shape", ConfigError, "text embeddings have shape (2, 2, 2)"),
        ("none", ConfigError, "give either"),
    ):
        assert ranks[0][name][0] is ranks[1][name][0] is error
        assert told in ranks[0][name][1]
        assert ranks[1][name][1] == ranks[0][name][1] + (" (on rank 0)" if name != "none" else "")
