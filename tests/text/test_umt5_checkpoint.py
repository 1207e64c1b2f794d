"""Text encoders that are broken or incomplete are told in one line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from causalrope_sp import CheckpointError, ConfigError
from causalrope_sp.text import UMT5TextEncoder
from tests.support import text_files as files
from tests.support.umt5_cases import CLEANED, expected

# What can be wrong with an encoder's files


def change(home: Path, **changes: Tensor | None) -> None:
    """Rewrites the .pth with some keys replaced, or removed where None."""
    file = home / "models_t5_umt5-xxl-enc-bf16.pth"
    state = torch.load(file) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, file)


def without_a_bias(home: Path) -> None:
    change(home, blocks__1__pos_embedding__embedding__weight=None)


def without_a_table(home: Path) -> None:
    change(home, token_embedding__weight=None)


def with_a_leftover(home: Path) -> None:
    change(home, head__weight=torch.zeros(2, 2))


def with_a_wrong_shape(home: Path) -> None:
    change(home, blocks__1__ffn__fc2__weight=torch.zeros(24, 41))


def whole_numbers(home: Path) -> None:
    change(home, blocks__1__ffn__fc2__weight=torch.zeros(24, 40, dtype=torch.int8))


def another_model(home: Path) -> None:
    torch.save({"blocks.0.self_attn.q.weight": torch.zeros(2, 2)}, home / "models_t5_umt5-xxl-enc-bf16.pth")


def without_a_tokenizer(home: Path) -> None:
    (home / "google" / "umt5-xxl" / "tokenizer.json").unlink()


def with_a_broken_tokenizer(home: Path) -> None:
    (home / "google" / "umt5-xxl" / "tokenizer.json").write_text("{")


def with_too_few_rows(home: Path) -> None:
    change(home, token_embedding__weight=torch.zeros(5, files.WIDTH))


def with_two_encoders(home: Path) -> None:
    (home / "models_t5_other.pth").write_bytes(b"")


def truncated(home: Path) -> None:
    file = home / "models_t5_umt5-xxl-enc-bf16.pth"
    file.write_bytes(file.read_bytes()[:-3000])


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (without_a_bias, "(wan layout of UMT5): 1 missing: blocks.1.pos_embedding.embedding.weight"),
        (without_a_table, "1 missing: token_embedding.weight"),
        (with_a_leftover, "1 unexpected: head.weight"),
        (with_a_wrong_shape, "blocks.1.ffn.fc2.weight is (24, 41), expected (24, 40)"),
        (whole_numbers, "blocks.1.ffn.fc2.weight is stored as torch.int8"),
        (another_model, "not a UMT5 encoder: none of its keys (blocks.0.self_attn.q.weight)"),
        (without_a_tokenizer, "no tokenizer.json in "),
        (with_a_broken_tokenizer, "tokenizer.json: not a tokenizer"),
        (with_too_few_rows, "only 5"),
        (with_two_encoders, "several text encoders, name one of them: models_t5_other.pth, models_t5_umt5"),
        (truncated, "truncated or not a torch file"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_wrong_is_told_in_one_line(tmp_path: Path, make: Callable[[Path], None], told: str) -> None:
    files.save_wan(tmp_path, files.make_encoder())
    make(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        UMT5TextEncoder.from_pretrained(tmp_path)
    assert told in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_that_are_no_numbers_are_told_when_they_are_read(tmp_path: Path) -> None:
    files.save_wan(tmp_path, files.make_encoder())
    change(tmp_path, blocks__1__ffn__fc2__weight=torch.full((24, 40), torch.nan))
    encoder = UMT5TextEncoder.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"1 NaN or infinite in float32: blocks\.1\.ffn\.fc2\.weight"):
        encoder.encode("a dog")


@pytest.mark.parametrize(
    ("declared", "told"),
    [
        ({"num_layers": 3}, "10 missing: encoder.block.2.layer.0.layer_norm.weight"),
        ({"num_layers": 10**9}, "declares 1000000000 layers"),
        ({"d_ff": 41}, "of a wrong shape"),
        ({"d_kv": "ten"}, "declares d_kv as 'ten', not as a number above 0"),
        ({"num_heads": 0}, "declares num_heads as 0"),
        ({"feed_forward_proj": "relu"}, "declares feed_forward_proj as 'relu'"),
    ],
)
def test_a_config_that_does_not_fit_is_told(tmp_path: Path, declared: dict[str, Any], told: str) -> None:
    files.save_diffusers(tmp_path, files.make_encoder())
    config = tmp_path / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | declared))
    with pytest.raises(CheckpointError, match=re.escape(told)):
        UMT5TextEncoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("kept", [["shared.weight"], ["encoder.embed_tokens.weight"], None])
def test_the_table_may_have_either_name_and_a_decoder_is_left_alone(
    home: Path, tmp_path: Path, kept: list[str] | None
) -> None:
    """Published folders hold `shared`, others the other or both; transformers ties them, or forgets to."""
    files.save_diffusers(tmp_path, files.make_encoder())
    file = tmp_path / "text_encoder" / "model.safetensors"
    state = load_file(file)
    table = state.pop("shared.weight")
    state |= {name: table.clone() for name in kept or ["shared.weight", "encoder.embed_tokens.weight"]}
    save_file({**state, "decoder.x": torch.zeros(1), "lm_head.weight": torch.zeros(1)}, file)
    made = UMT5TextEncoder.from_pretrained(tmp_path).encode(CLEANED)
    torch.testing.assert_close(made, expected(CLEANED), rtol=0, atol=1e-5)


def test_a_tokenizer_elsewhere_is_named(home: Path, tmp_path: Path) -> None:
    torch.save(files.wan_state(files.make_encoder()), tmp_path / "t5.pth")
    with pytest.raises(CheckpointError, match=r"no tokenizer.json in "):
        UMT5TextEncoder.from_pretrained(tmp_path / "t5.pth")
    named = UMT5TextEncoder.from_pretrained(tmp_path / "t5.pth", tokenizer=home / "diffusers" / "tokenizer")
    assert torch.equal(named.encode("a dog"), UMT5TextEncoder.from_pretrained(home / "wan").encode("a dog"))


def test_nothing_there() -> None:
    with pytest.raises(CheckpointError, match="no text encoder at nowhere: no such file or folder"):
        UMT5TextEncoder.from_pretrained("nowhere")


def test_wrong_options_are_refused(home: Path) -> None:
    with pytest.raises(ConfigError, match="keep must be one of device, cpu, free, not 'gpu'"):
        UMT5TextEncoder.from_pretrained(home / "wan", keep="gpu")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="text_len must be at least 1, not 0"):
        UMT5TextEncoder.from_pretrained(home / "wan", text_len=0)
