"""Files of embeddings."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from causalrope_sp import CheckpointError, ConfigError, OutputError
from causalrope_sp.text import load_embeds, save_embeds

# Files of embeddings


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_embeddings_come_back_as_they_were_saved(tmp_path: Path, dtype: torch.dtype) -> None:
    embeds = torch.zeros(1, 9, 4, dtype=dtype)
    embeds[0, :5] = torch.randn(5, 4)
    embeds[0, 2] = 0  # zeros within the text are text
    saved = save_embeds(tmp_path / "e.safetensors", embeds, "ein Kreis “rot” \ud800", "umt5")
    loaded = load_embeds(tmp_path / "e.safetensors")
    assert (saved.length, loaded.length, loaded.encoder, loaded.prompt) == (5, 5, "umt5", "ein Kreis “rot” ?")
    assert loaded.embeds.dtype == dtype
    assert torch.equal(loaded.embeds, embeds)


@pytest.mark.parametrize(
    ("embeds", "told"),
    [
        (torch.zeros(2, 3, 4), "have shape (2, 3, 4), expected (1, tokens, width)"),
        (torch.zeros(3, 4), "have shape (3, 4)"),
        (torch.zeros(1, 0, 4), "have shape (1, 0, 4)"),
        (torch.zeros(1, 3, 4, dtype=torch.int32), "are int32, expected float64"),
        (torch.full((1, 3, 4), math.nan), "have numbers that are not finite"),
    ],
)
def test_what_is_no_embedding_is_refused_both_ways(tmp_path: Path, embeds: Tensor, told: str) -> None:
    file = tmp_path / "e.safetensors"
    with pytest.raises(ConfigError, match=re.escape(told)):
        save_embeds(file, embeds, "", "")
    assert not file.exists()
    save_file({"prompt_embeds": embeds}, file, {"length": "0"})
    with pytest.raises(CheckpointError, match=re.escape(str(file))):
        load_embeds(file)


def test_files_that_hold_no_embeddings_are_told(tmp_path: Path) -> None:
    file = tmp_path / "e.safetensors"
    for state, metadata, told in (
        ({"prompt_embeds": torch.ones(1, 3, 4)}, None, "not a file of text embeddings"),
        ({"x": torch.ones(1, 3, 4)}, {"length": "3"}, "not a file of text embeddings"),
        ({"prompt_embeds": torch.ones(1, 3, 4)}, {"length": "2"}, "its text ends after 2 tokens, and holds 3"),
    ):
        save_file(state, file, metadata)
        with pytest.raises(CheckpointError, match=told):
            load_embeds(file)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="truncated"):
        load_embeds(file)
    with pytest.raises(CheckpointError, match="no such file"):
        load_embeds(tmp_path / "nothing")
    with pytest.raises(OutputError, match="cannot write"):
        save_embeds(tmp_path / "none" / "e.safetensors", torch.ones(1, 3, 4), "", "")
