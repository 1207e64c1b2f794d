"""A file that is no session, and a session that does not fit, are refused in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from causalrope_sp import CheckpointError, Chunk, ConfigError, SamplerConfig
from causalrope_sp.sessions import check_fits, read_session, write_session
from tests.support.sessions import HERE, MODEL, small_cache, small_decoder, small_session, write_whole

Change = Callable[[dict[str, Any], dict[str, Tensor], dict[str, str]], object]


def changed(path: Path, change: Change) -> None:
    """Writes a whole session, changes its fields, tensors or metadata, and writes it with safetensors' own writer."""
    write_whole(path)
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    given = json.loads(metadata["session"])
    texts: dict[str, str] = {}
    change(given, tensors, texts)
    save_file(tensors, path, {**metadata, "session": json.dumps(given), **texts})


def put(name: str, value: Any) -> Change:
    """Sets a field, that of a part for part.field."""

    def change(given: dict[str, Any], tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        *parts, last = name.split(".")
        for part in parts:
            given = given[int(part) if isinstance(given, list) else part]
        given[last] = value

    return change


def store(name: str, tensor: Tensor) -> Change:
    return lambda given, tensors, metadata: tensors.update({name: tensor})


def drop(name: str) -> Change:
    return lambda given, tensors, metadata: tensors.pop(name, None) if name in tensors else given.pop(name)


def say(**texts: str) -> Change:
    return lambda given, tensors, metadata: metadata.update(texts)


NEWER = "a saved session of version 2, written by causalrope_sp 9.1; this causalrope_sp reads version 1: update it"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (say(format="pt"), "not a saved session"),
        (say(version="one"), "not a saved session"),
        (say(version="2", library="9.1"), NEWER),
        (drop("shots"), "a saved session has no shots"),
        (drop("loras"), "a saved session has no loras"),
        (put("fps", 16), "a saved session has an unknown fps"),
        (put("model_digest", "x"), "the model's digest must be 16 hexadecimal digits, not 'x'"),
        (put("height", 17), "latents of 2×3 are not those of frames of 17×24 pixels"),
        (put("width", True), "SavedSession.width must be a whole number of at least 1 and at most 65536, not True"),
        (put("loras", "style"), "LoRAs must be a list, not 'style'"),
        (put("loras", [3]), "a LoRA must be a text that is not empty, not 3"),
        (put("dtype", "int8"), "the model's dtype must be one of float64, float32, float16, bfloat16, not 'int8'"),
        (put("seed", 0.5), "SavedSession.seed must be a whole number"),
        (put("stream.window", "9"), "StreamConfig.window must be a whole number"),
        (put("stream.window", 2), "window 2 is smaller than chunk \\+ sink = 2 \\+ 1 latent frames"),
        (put("stream.color", 2), "StreamConfig has an unknown color"),
        (put("stream", []), "StreamConfig must be a JSON object, not \\[\\]"),
        (put("sampler.steps", ["1000"]), "SamplerConfig.steps must be a finite number, not '1000'"),
        (put("sampler.guidance_scale", float("nan")), "SamplerConfig.guidance_scale must be a finite number, not nan"),
        (put("next_frame", 13), "chunk 6 at latent frame 13 does not follow the last kept one, 5 up to frame 12"),
        (put("chunks", [[0, 0, 1]]), "7 latent frames are not the kept chunks"),
        (put("chunks", [[0, 0]]), "a kept chunk must have 3 numbers, not 2"),
        (put("chunks", [[5, 10, 7]] * 2), "7 latent frames are not the kept chunks"),
        (put("prompts", []), "prompts must hold from at rising numbers from 0, not at \\[\\]"),
        (put("prompts", [{"first_chunk": 0, "prompt": 3, "id": 1}]), "the prompt must be a text or none, not 3"),
        (put("prompts", [{"first_chunk": 0, "prompt": "", "id": 1}]), "embeddings must be those of prompts \\[1\\]"),
        (put("shots", [0, 13]), "a number of those that shots must begin must be a whole number"),
        (put("text_seed", None), "SavedSession.text_seed must be a whole number"),
        (put("num_frames", 0), "SavedSession.num_frames must be a whole number of at least 1"),
        (put("first_chunk", 7), "SavedSession.first_chunk must be a whole number of at least 0 and at most 6, not 7"),
        (put("shown", 6), "SavedSession.shown must be a whole number of at least 0 and at most 5, not 6"),
        (
            put("shown", 1),
            "latents must be kept of the 4 newest chunks, which are not decoded, not of \\[0, 3, 4, 5\\]",
        ),
        (put("history", 2**21), "SavedSession.history must be a whole number of at least 0 and at most 1048576"),
        (put("reuse", 1), "the policy of reuse must be a text or none, not 1"),
        (put("texts", None), "there are tensors texts/ that no field describes"),
        (put("texts.recache", 1), "recache of the saved texts must be"),
        (put("texts", {"recache": True}), "the texts has no recache_sink"),
        (drop("texts/1"), "texts must be numbered from 0 on, not \\[0, 2\\]"),
        (store("texts/2", torch.ones(1, 5, 3)), "text 2 of the change are \\(1, 5, 3\\), expected \\(1, 5, 4\\)"),
        (
            store("conditioning", torch.ones(1, 1, 3, 2, 2)),
            "the conditioning of shape \\(1, 1, 3, 2, 2\\) is not that of",
        ),
        (store("control", torch.ones(1, 6, 2, 2, 3)), "the control of shape \\(1, 6, 2, 2, 3\\) is not that of the"),
        (store("control", torch.ones(1, 7, 2, 2, 2)), "the control of shape \\(1, 7, 2, 2, 2\\) is not that of the"),
        (store("control", torch.ones(1, 7, 2, 2, 3).bfloat16()), "the control must be in float32, not bfloat16"),
        (put("cache.branches.0.oldest", 13), "SavedBranch.oldest must be a whole number of at least 0 and at most 12"),
        (put("cache.branches.0.pending", [9, 12]), "pending frames must be two bounds behind the frames that are"),
        (put("cache.branches.0.pending", [10]), "pending frames must be two bounds"),
        (put("cache.branches.0.pending", [10, 11]), "the pending frames 10 to 11 are not those of the newest chunk"),
        (put("cache", None), "tensors are wrong: 4 unexpected: cache/conditional/0"),
        (
            put("cache.kinds", [[0, 0, 0]]),
            "the kinds of heads must be those of 2 layers of 3 heads, not of",
        ),
        (put("cache.kinds", [[0, 0, -1]] * 2), "the kinds of the cache's heads must be a whole number of at least 0"),
        (put("cache.kinds", [[0, 1, 1]] * 2), "conditional has frames of 0 kinds of heads, expected 2"),
        (put("cache.branches.0.seen", [[0]]), "conditional has frames of 1 kinds of heads, expected 0"),
        (put("cache.branches.0.seen", [[0, 4]]), "a number of a frame that heads hold must be a whole number of"),
        (put("cache.branches.0.seen", [[3, 3]]), "the frames that heads hold must be different ones, not \\(3, 3\\)"),
        (put("cache.layers", 3), "tensors are wrong: 2 missing: cache/conditional/2, cache/unconditional/2"),
        (put("cache.layers", 10**30), "SavedCache.layers must be a whole number of at least 1 and at most 4096"),
        (put("cache.head_dim", 6), "tensors are wrong: 4 of a wrong shape: cache/conditional/0 is"),
        (
            put("cache.branches.1.frames", [0, 8, 9, 6, 12]),
            "the cache holds frames from 12 on, which are still to be m",
        ),
        (put("cache.branches.1.frames", [0, 8, 9, 6, 6]), "the cache's frames must be different ones"),
        (put("cache.branches.1.frames", [0, 8, 9, 6]), "tensors are wrong: 2 of a wrong shape: cache/unconditional/0"),
        (put("cache.branches.1.name", "other"), "the name of a branch must be one of conditional, unconditional, not"),
        (
            put("cache.branches.1.name", "conditional"),
            "the cache's branches must be of conditional, unconditional, not",
        ),
        (put("cache.branches", ["other"]), "a branch of the cache must be a JSON object, not 'other'"),
        (put("cache.dtype", "float32"), "tensors are wrong: 4 of a wrong shape"),
        (put("cache.tokens", 4), "a cache of batch 1 with 4 tokens a frame is not that of latents"),
        (put("decoder", None), "there are tensors decoder/ that no field describes"),
        (put("decoder.frames", 0), "a decoder of 0 frames has a state of 2 layers"),
        (put("decoder.frames", 13), "the decoder has had 13 of 12 latent frames"),
        (put("decoder.codec", 1), "the codec's name must be a text that is not empty, not 1"),
        (drop("latents"), "there are no latents"),
        (drop("embeds/4"), "embeddings must be those of prompts \\[0, 3, 4\\], the last among them, not of \\[3\\]"),
        (drop("cache/conditional/1"), "tensors are wrong: 1 missing: cache/conditional/1"),
        (store("other", torch.ones(1)), "no saved session has other"),
        (store("embeds/01", torch.ones(1)), "embeds/01 is not the name of embeddings"),
        (
            store("embeds/4", torch.ones(1, 4, 4)),
            r"the embeddings of prompt \d are \(1, \d, 4\), expected \(1, \d, 4\)",
        ),
        (store("embeds/4", torch.ones(4, 4)), r"the embeddings of prompt 4 must be of shape \(B, L, E\), not \(4, 4\)"),
        (store("latents", torch.ones(1, 7, 3, 2, 3).half()), "latents must be in float32, float64, not float16"),
        (store("latents", torch.ones(1, 7, 0, 2, 3)), "latents must be of shape \\(B, F, C, H, W\\), not"),
        (store("latents", torch.full((1, 7, 3, 2, 3), torch.inf)), "1 with NaN or infinity: latents"),
        (store("latents", torch.ones(2, dtype=torch.int64)), "latents is stored as I64, which no session has"),
        (store("decoder/decoder.a", torch.ones(2)), "the decoder's decoder.a must be of shape"),
        (say(session="[]"), "metadata `session`: not a JSON object but a value of type list"),
    ],
)
def test_what_is_no_session_is_one_sentence(change: Any, says: str, tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    changed(path, change)
    with pytest.raises(CheckpointError, match=f"s.safetensors: .*{says}|s.safetensors: {says}") as caught:
        read_session(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0, 7, 8, 100, -1])
def test_a_file_that_was_cut_off_is_refused(kept: int, tmp_path: Path) -> None:
    write_whole(tmp_path / "s.safetensors")
    content = (tmp_path / "s.safetensors").read_bytes()
    (tmp_path / "s.safetensors").write_bytes(content[:kept])
    with pytest.raises(CheckpointError, match=r"s\.safetensors: truncated or not a safetensors file"):
        read_session(tmp_path / "s.safetensors")


def test_what_is_elsewhere_is_refused(tmp_path: Path) -> None:
    torch.save({"latents": torch.ones(1)}, tmp_path / "s.pth")
    for name, says in (
        ("none", "no such file or folder"),
        ("", "not a saved session"),
        ("s.pth", "not a saved session"),
    ):
        with pytest.raises(CheckpointError, match=says):
            read_session(tmp_path / name)


@pytest.mark.parametrize(
    ("here", "says"),
    [
        (
            {"model_digest": "f" * 16},
            "the model's digest is '0123456789abcdef' in the file and 'ffffffffffffffff' here",
        ),
        (
            {"model_digest": "f" * 16, "loras": ()},
            r"LoRAs are 'style.safetensors \(weight 0.5\)' in the file and 'none' here",
        ),
        ({"stride": 4}, r"a latent frame is \(1, 3, 2, 3\) in the file and \(1, 3, 4, 6\) here"),
        (
            {"model": replace(MODEL, in_channels=4)},
            r"a latent frame is \(1, 3, 2, 3\) in the file and \(1, 4, 2, 3\) here",
        ),
        ({"model": replace(MODEL, text_len=7)}, r"embeddings are \(5, 4\) in the file and \(7, 4\) here"),
        (
            {"model": replace(MODEL, num_layers=3, num_heads=5, dim=50)},
            r"layers, tokens, heads and head width are \(2, 6, 3, 10\) in the file and \(3, 6, 5, 10\) here",
        ),
        ({"model": replace(MODEL, control_channels=2)}, "channels of control are 0 in the file and 2 here"),
        ({"codec": "taehv"}, "the codec is 'wan' in the file and 'taehv' here"),
        (
            {"model_digest": "f" * 16, "codec": "taehv"},
            "the model's digest is '0123456789abcdef' in the file and 'ffffffffffffffff' here, the codec is 'wan' in",
        ),
    ],
)
def test_what_differs_is_told_in_one_sentence(here: dict[str, Any], says: str, tmp_path: Path) -> None:
    write_whole(tmp_path / "s")
    saved = read_session(tmp_path / "s")
    check_fits(saved, **HERE)
    check_fits(saved, **{**HERE, "loras": ("the same, renamed (weight 0.5)",)})
    with pytest.raises(ConfigError, match=f"^the saved session does not fit: {says}"):
        check_fits(saved, **{**HERE, **here})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"negative_embeds": None}, "guidance with negative embeddings is False in the file and True here"),
        ({"sampler": SamplerConfig()}, "guidance with negative embeddings is True in the file and False here"),
        (
            {"cache": replace(small_cache(), branches=small_cache().branches[:1])},
            r"branches are \['conditional'\] in the file and \['conditional', 'unconditional'\] here",
        ),
    ],
)
def test_what_a_session_lacks_is_told_in_one_sentence(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=f"^the saved session does not fit: {says}"):
        check_fits(small_session(**changes), **HERE)


def test_a_codec_matters_where_its_state_is_gone_on_from() -> None:
    check_fits(small_session(), **{**HERE, "codec": "taehv"})


def test_a_size_of_no_whole_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match="height 16 is not divisible by 32"):
        check_fits(small_session(), **{**HERE, "stride": 32})


def test_chunks_that_are_not_decoded_need_the_latents_before_them_or_the_state() -> None:
    gap: dict[str, Any] = {"chunks": (Chunk(0, 0, 1), Chunk(4, 5, 1), Chunk(5, 7, 5))}
    with pytest.raises(ConfigError, match="the latents before the next frames to decode are not kept: save the cache"):
        small_session(**gap)
    small_session(**gap, decoder=replace(small_decoder(), frames=7))
    small_session(**gap, shown=5)


@pytest.mark.parametrize("shape", [[2**40, 1, 3, 2, 3], [2**63, 2, 3, 2, 3], [1, 2**31, 3, 2, 3]], ids=str)
@pytest.mark.parametrize("fits", [False, True])
def test_a_header_of_more_than_the_file_holds_is_refused(shape: list[int], fits: bool, tmp_path: Path) -> None:
    """Whether or not the place that it names is within the file."""
    write_session(tmp_path / "s.safetensors", small_session())
    content = (tmp_path / "s.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    start, stop = header["latents"]["data_offsets"]
    header["latents"] |= {"shape": shape, "data_offsets": [start, stop if fits else start + 4 * prod(shape)]}
    text = json.dumps(header).encode()
    (tmp_path / "s.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(CheckpointError, match=r"s\.safetensors: truncated or not a safetensors file"):
        read_session(tmp_path / "s.safetensors")
