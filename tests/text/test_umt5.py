"""Prompts become the embeddings that transformers and Wan compute of them, from either layout."""

from __future__ import annotations

import gc
import logging
import math
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from causalrope_sp.text import TextSource, UMT5TextEncoder, clean_prompt
from causalrope_sp.text.text_footprint import text_bytes
from causalrope_sp.text.umt5_checkpoint import T5Checkpoint
from tests.support import text_files as files
from tests.support.umt5_cases import CLEANED, expected, tokens

PROMPT = " A red   circle slides & jumps\n over the hills"
LAYOUTS = ["diffusers", "sharded", "wan", "diffusers/text_encoder", "wan/models_t5_umt5-xxl-enc-bf16.pth"]


@pytest.mark.parametrize("where", LAYOUTS)
def test_both_layouts_give_what_transformers_gives(home: Path, where: str) -> None:
    embeds = UMT5TextEncoder.from_pretrained(home / where).encode(PROMPT)
    length = len(tokens(CLEANED))
    assert (embeds.shape, embeds.dtype) == ((1, 512, files.WIDTH), torch.float32)
    torch.testing.assert_close(embeds, expected(CLEANED), rtol=0, atol=1e-5)
    assert not embeds[0, length:].any()
    assert embeds[0, :length].any(-1).all()


def test_both_layouts_give_the_same_parameters(home: Path) -> None:
    read = [
        T5Checkpoint.open(path).read(torch.float32, torch.device("cpu"))
        for path in (home / "diffusers" / "text_encoder", home / "wan" / "models_t5_umt5-xxl-enc-bf16.pth")
    ]
    theirs = files.make_encoder().state_dict()
    for state in read:
        assert state.keys() == theirs.keys() - {"encoder.embed_tokens.weight"}
        for name, tensor in state.items():
            assert torch.equal(tensor, theirs[name]), name


def bucket(distance: int) -> int:
    """T5's bucket of key position minus query position: half of the buckets for keys to the right; in each half, half
    for the distances one by one and the rest for logarithmic steps up to 128."""
    side, near = files.BUCKETS // 2, files.BUCKETS // 4
    away = abs(distance)
    if away >= near:
        away = min(side - 1, near + int(math.log(away / near) / math.log(128 / near) * (side - near) + 1e-6))
    return away + (side if distance > 0 else 0)


def wan_encoder(state: dict[str, Tensor], ids: list[int]) -> Tensor:
    """Wan's encoder, written from its description: RMS norms before attention and feed-forward, dot products that are
    not scaled, a bias by bucket and head in every block, a tanh-GELU gate."""
    state = {name: tensor.double() for name, tensor in state.items()}

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (files.HEADS, files.HEAD)).transpose(0, 1)

    length = len(ids)
    buckets = torch.tensor([[bucket(key - query) for key in range(length)] for query in range(length)])
    x = state["token_embedding.weight"][ids]
    for n in range(files.LAYERS):
        block = {name.removeprefix(f"blocks.{n}."): tensor for name, tensor in state.items()}
        y = norm(x, block["norm1.weight"])
        q, k, v = (heads(y @ block[f"attn.{letter}.weight"].T) for letter in "qkv")
        scores = q @ k.mT + block["pos_embedding.embedding.weight"][buckets].movedim(-1, 0)
        attended = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + attended @ block["attn.o.weight"].T
        y = norm(x, block["norm2.weight"])
        gate = torch.nn.functional.gelu(y @ block["ffn.gate.0.weight"].T, approximate="tanh")
        x = x + (gate * (y @ block["ffn.fc1.weight"].T)) @ block["ffn.fc2.weight"].T
    return norm(x, state["norm.weight"])


@pytest.mark.parametrize("where", ["diffusers", "wan"])
def test_it_computes_what_wan_describes(home: Path, where: str) -> None:
    prompt = " ".join(files.SENTENCES[:2] * 3)  # more than 128 tokens: every bucket is used
    ids = tokens(prompt)
    assert len(ids) > 140
    made = UMT5TextEncoder.from_pretrained(home / where).encode(prompt)[0, : len(ids)]
    reference = wan_encoder(files.wan_state(files.make_encoder()), ids)
    torch.testing.assert_close(made.double(), reference, rtol=0, atol=1e-5 * reference.std().item())


def test_bfloat16_errs_as_transformers_errs(home: Path) -> None:
    """Against float32, twice what transformers' own encoder errs in bfloat16 is allowed."""
    exact = expected(CLEANED)
    ids = torch.tensor([tokens(CLEANED)])
    theirs = files.make_encoder(torch.bfloat16)(ids).last_hidden_state
    ours = UMT5TextEncoder.from_pretrained(home / "wan", dtype=torch.bfloat16).encode(PROMPT)
    assert ours.dtype == torch.bfloat16
    error = (ours[:, : ids.shape[1]] - exact[:, : ids.shape[1]]).norm()
    assert 0 < error <= 2 * (theirs - exact[:, : ids.shape[1]]).norm()


def test_float16_keeps_wide_what_transformers_keeps_wide(tmp_path: Path) -> None:
    """By its own list, the second matrix of the feed-forward."""
    from transformers import UMT5EncoderModel

    files.save_diffusers(tmp_path, files.make_encoder())
    theirs = UMT5EncoderModel.from_pretrained(
        tmp_path / "text_encoder", dtype=torch.float16, attn_implementation="eager"
    )
    wide = {name for name, parameter in theirs.named_parameters() if parameter.dtype == torch.float32}
    assert len(wide) == files.LAYERS
    checkpoint = T5Checkpoint.open(tmp_path / "text_encoder")
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        read = checkpoint.read(dtype, torch.device("cpu"))
        kept = {name for name, tensor in read.items() if tensor.dtype == torch.float32 != dtype}
        assert kept == (wide if dtype == torch.float16 else set())
    ids = torch.tensor([tokens(CLEANED)])
    made = UMT5TextEncoder.from_pretrained(tmp_path, dtype=torch.float16).encode(CLEANED)
    assert torch.equal(made[0, : ids.shape[1]], theirs(ids).last_hidden_state[0])
    theirs.save_pretrained(tmp_path / "half")
    stored = sum(p.nbytes for p in theirs.parameters())
    assert text_bytes(TextSource.of(tmp_path / "half", tmp_path / "tokenizer")) == stored


def test_float16_beyond_its_range_errs_as_transformers_errs(tmp_path: Path) -> None:
    """Feed-forward outputs beyond 65504, stored in float16, in transformers' layout and in Wan's."""
    from transformers import UMT5EncoderModel

    encoder = files.make_encoder()
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            parameter.mul_(20 if ".wi_" in name else 300 if ".wo." in name else 1)
    for each in ("transformers", "wan"):
        (files.save_diffusers if each == "transformers" else files.save_wan)(tmp_path / each, encoder.half())
    theirs = UMT5EncoderModel.from_pretrained(
        tmp_path / "transformers" / "text_encoder", dtype=torch.float16, attn_implementation="eager"
    )
    ids = torch.tensor([tokens(CLEANED)])
    exact, expected = encoder.float()(ids).last_hidden_state, theirs(ids).last_hidden_state
    assert (expected - exact).norm() < 0.01 * exact.norm()
    for each in ("transformers", "wan"):
        made = UMT5TextEncoder.from_pretrained(tmp_path / each, dtype=torch.float16).encode(CLEANED)
        assert torch.equal(made[0, : ids.shape[1]], expected[0].half())


def test_the_stored_dtype_is_kept(tmp_path: Path) -> None:
    files.save_wan(tmp_path, files.make_encoder(torch.bfloat16))
    assert UMT5TextEncoder.from_pretrained(tmp_path).encode("a dog").dtype == torch.bfloat16


def test_prompts_of_a_batch_do_not_meet(home: Path) -> None:
    encoder = UMT5TextEncoder.from_pretrained(home / "wan")
    prompts = ["a dog", "", files.SENTENCES[0]]
    together = encoder.encode(prompts)
    assert together.shape == (3, 512, files.WIDTH)
    for row, prompt in zip(together, prompts, strict=True):
        assert torch.equal(row[None], encoder.encode(prompt))


def test_an_empty_prompt_is_the_end_token_alone(home: Path) -> None:
    for prompt in ("", " \n\t "):
        embeds = UMT5TextEncoder.from_pretrained(home / "wan").encode(prompt)
        torch.testing.assert_close(embeds, expected(""), rtol=0, atol=1e-5)
        assert embeds[0].any(-1).sum() == 1


def test_a_long_prompt_is_cut_as_the_tokenizer_cuts_and_said_once(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    prompt = " ".join(files.SENTENCES[:2] * 20)
    whole = len(files.train_tokenizer().encode(prompt).ids)
    assert len(tokens(prompt)) == 512 < whole
    encoder = UMT5TextEncoder.from_pretrained(home / "wan")
    with caplog.at_level(logging.WARNING):
        embeds = encoder.encode(prompt)
        encoder.encode(prompt)
    assert [record.getMessage() for record in caplog.records] == [
        f"the prompt has {whole} tokens and is cut to the first 512"
    ]
    torch.testing.assert_close(embeds, expected(prompt), rtol=0, atol=1e-5)
    assert torch.equal(embeds[0, 511], encoder.encode(prompt)[0, 511])
    short = UMT5TextEncoder.from_pretrained(home / "wan", text_len=7).encode(PROMPT)
    assert short.shape == (1, 7, files.WIDTH)
    assert short[0].any(-1).all()


@pytest.mark.parametrize("keep", ["device", "cpu", "free"])
def test_where_the_weights_wait(home: Path, monkeypatch: pytest.MonkeyPatch, keep: Any) -> None:
    reads: list[tuple[T5Checkpoint, list[weakref.ref[Tensor]]]] = []
    read = T5Checkpoint.read

    def counted(self: T5Checkpoint, *args: Any) -> Any:
        state = read(self, *args)
        reads.append((self, [weakref.ref(tensor) for tensor in state.values()]))
        return state

    monkeypatch.setattr(T5Checkpoint, "read", counted)
    encoder = UMT5TextEncoder.from_pretrained(home / "wan", keep=keep)
    assert not reads
    assert torch.equal(encoder.encode(PROMPT), encoder.encode(PROMPT))
    assert len(reads) == (2 if keep == "free" else 1)
    checkpoint, weights = reads[-1]
    gc.collect()
    assert {weight() is None for weight in weights} == {keep == "free"}
    assert all(parameter.is_meta for parameter in checkpoint.model.parameters())


@pytest.mark.parametrize("prompt", ["salt &amp;amp; pepper", "“très” naïve caf\u00c3\u00a9", "\ud800 x", "红色"])
def test_odd_prompts_are_embedded(home: Path, prompt: str) -> None:
    pytest.importorskip("ftfy", reason="ftfy is not installed")
    embeds = UMT5TextEncoder.from_pretrained(home / "wan").encode(prompt)
    torch.testing.assert_close(embeds, expected(clean_prompt(prompt)), rtol=0, atol=1e-5)


def test_nothing_is_imported_before_it_is_needed() -> None:
    import subprocess

    imports = "import sys, causalrope_sp.pipeline.pipeline, causalrope_sp.text"
    code = f"{imports}; print([m for m in sys.modules if m in sys.argv])"
    done = subprocess.run(
        [sys.executable, "-c", code, "transformers", "tokenizers", "ftfy", "diffusers"], capture_output=True, text=True
    )
    assert done.stdout == "[]\n", done.stderr
