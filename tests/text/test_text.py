"""Prompts become the embeddings that transformers and Wan compute of them, from either layout; files of embeddings; and
ranks that have no encoder."""

from __future__ import annotations

import html
import json
import logging
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from causalrope_sp import CheckpointError, ConfigError, OutputError, PromptError
from causalrope_sp.text import UMT5TextEncoder, clean_prompt, load_embeds, save_embeds
from causalrope_sp.text.umt5_checkpoint import T5Checkpoint
from tests.support import text_files as files

PROMPT = " A red   circle slides & jumps\n over the hills"
CLEANED = "A red circle slides & jumps over the hills"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same encoder in both layouts, one of them in shards too."""
    folder = tmp_path_factory.mktemp("text")
    for name in ("diffusers", "sharded", "wan"):
        (folder / name).mkdir()
    files.save_diffusers(folder / "diffusers", files.make_encoder())
    files.save_diffusers(folder / "sharded", files.make_encoder(), shard="20KB")
    assert len(list((folder / "sharded" / "text_encoder").glob("*.safetensors"))) > 1
    files.save_wan(folder / "wan", files.make_encoder())
    return folder


def tokens(prompt: str) -> list[int]:
    """As transformers' own fast tokenizer cuts it: padded to nothing, to 512 tokens."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=files.train_tokenizer(), pad_token="<pad>", eos_token="</s>")
    ids: list[int] = tokenizer(prompt, truncation=True, max_length=512).input_ids
    return ids


def expected(cleaned: str, length: int = 512) -> Tensor:
    """As diffusers' pipeline asks transformers for it: padded, masked, cut to the prompt, filled with zeros."""
    ids = tokens(cleaned)
    padded = torch.tensor([ids + [0] * (length - len(ids))])
    mask = (torch.arange(length) < len(ids)).long()[None]
    made = files.make_encoder()(padded, mask).last_hidden_state
    return torch.cat([made[:, : len(ids)], torch.zeros(1, length - len(ids), files.WIDTH)], 1)


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
    reads = []
    read = T5Checkpoint.read
    monkeypatch.setattr(T5Checkpoint, "read", lambda self, *args: reads.append(args) or read(self, *args))
    encoder = UMT5TextEncoder.from_pretrained(home / "wan", keep=keep)
    assert not reads
    assert torch.equal(encoder.encode(PROMPT), encoder.encode(PROMPT))
    assert len(reads) == (2 if keep == "free" else 1)
    assert (encoder._kept is None) == (keep == "free")
    assert all(parameter.is_meta for parameter in encoder._checkpoint.model.parameters())


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [
        ("  a\t dog \r\n\n runs  ", "a dog runs"),
        ("", ""),
        ("cats, dogs; 'and' (more) ~ 100%!", "cats, dogs; 'and' (more) ~ 100%!"),
    ],
)
def test_plain_prompts_are_cleaned_without_ftfy(prompt: str, cleaned: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    assert clean_prompt(prompt) == cleaned


@pytest.mark.parametrize("prompt", ["a “dog”", "&amp;", "a\x00b", "\ud800"])
def test_what_ftfy_might_change_is_refused_without_it(prompt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(PromptError, match="needs ftfy: pip install ftfy") as caught:
        clean_prompt(prompt)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [
        ("salt &amp;amp; pepper&nbsp;&#33;", "salt & pepper !"),
        ("&lt;b&gt;bold&lt;/b&gt; a<b", "<b>bold</b> a<b"),
        ("the cafÃ© â€œsignâ€\x9d", 'the café "sign"'),
        ("“curly” ‘quotes’", "\"curly\" 'quotes'"),
        ("ﬁn ＷＩＤＥ", "fin WIDE"),
        ("half a pair: \ud83d", "half a pair: \ufffd"),
        ("a\x00b\u3000 c", "ab c"),
        ("红色的圆形", "红色的圆形"),
    ],
)
def test_broken_text_is_repaired(prompt: str, cleaned: str) -> None:
    pytest.importorskip("ftfy", reason="ftfy is not installed")
    assert clean_prompt(prompt) == cleaned


@given(st.text(st.one_of(st.characters(max_codepoint=127), st.sampled_from("&;#<>amp“é\u3000"))))
def test_any_prompt_is_cleaned_as_wan_cleans_it(prompt: str) -> None:
    ftfy = pytest.importorskip("ftfy", reason="ftfy is not installed")
    unescaped = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    assert clean_prompt(prompt) == re.sub(r"\s+", " ", unescaped.strip()).strip()


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
