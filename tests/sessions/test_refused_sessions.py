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

from causalrope_sp import CheckpointError, ConfigError
from causalrope_sp.sessions import check_fits, read_session, write_session
from tests.support.sessions import HERE, small_session, whole_session, write_whole

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
            given = given[part]
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
        (put("fps", 16), "a saved session has an unknown fps"),
        (put("model_digest", "x"), "the model's digest must be 16 hexadecimal digits, not 'x'"),
        (put("height", 17), "latents of 2×3 are not those of frames of 17×24 pixels"),
        (put("width", True), "SavedSession.width must be a whole number of at least 1 and at most 65536, not True"),
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
        (put("oldest", 13), "SavedSession.oldest must be a whole number of at least 0 and at most 12, not 13"),
        (put("cache", None), "tensors are wrong: 4 unexpected: cache/conditional/0"),
        (put("cache.layers", 3), "tensors are wrong: 2 missing: cache/conditional/2, cache/unconditional/2"),
        (put("cache.layers", 10**30), "SavedCache.layers must be a whole number of at least 1 and at most 4096"),
        (put("cache.head_dim", 6), "tensors are wrong: 4 of a wrong shape: cache/conditional/0 is"),
        (put("cache.frames", [0, 8, 9, None, 6, 12]), "the cache holds frames from 12 on, which are still to be made"),
        (put("cache.frames", [0, 8, 9, None, 6, 6]), "the cache's slots must hold frames, each a different one"),
        (put("cache.branches", ["other"]), "the cache's branches must be of conditional, unconditional, not"),
        (put("cache.dtype", "float32"), "tensors are wrong: 4 of a wrong shape"),
        (put("cache.tokens", 4), "a cache of batch 1 with 4 tokens a frame is not that of latents"),
        (put("decoder", None), "there are tensors of a decoder that no field describes"),
        (put("decoder.frames", 0), "a decoder of 0 frames has a state of 2 layers"),
        (put("decoder.frames", 13), "the decoder has had 13 of 12 latent frames"),
        (put("decoder.codec", 1), "the codec's name must be a text that is not empty, not 1"),
        (drop("latents"), "there are no latents"),
        (drop("embeds/1"), "embeddings must be those of prompts \\[0, 3, 1\\], the last among them, not of \\[3\\]"),
        (drop("cache/conditional/1"), "tensors are wrong: 1 missing: cache/conditional/1"),
        (store("other", torch.ones(1)), "no saved session has other"),
        (store("embeds/01", torch.ones(1)), "embeds/01 is not the name of a prompt's embeddings"),
        (
            store("embeds/1", torch.ones(1, 4, 4)),
            r"the embeddings of prompt \d are \(1, \d, 4\), expected \(1, \d, 4\)",
        ),
        (store("embeds/1", torch.ones(4, 4)), r"the embeddings of prompt 1 must be of shape \(B, L, E\), not \(4, 4\)"),
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
        ({"model_digest": "f" * 16}, "the model's digest is 0123456789abcdef in the file and ffffffffffffffff here"),
        ({"height": 32}, "frames are 16×24 pixels in the file and 32×24 here"),
        ({"stream": replace(HERE["stream"], window=9)}, "window is 7 in the file and 9 here"),
        (
            {"sampler": replace(HERE["sampler"], steps=(1000,))},
            r"steps is \(1000, 500\) in the file and \(1000,\) h",
        ),
        ({"codec": "taehv"}, "the codec is 'wan' in the file and 'taehv' here"),
        (
            {"width": 48, "sampler": replace(HERE["sampler"], shift=3.0)},
            "frames are 16×24 pixels in the file and 16×48 here, shift is 5.0 in the file and 3.0 here",
        ),
    ],
)
def test_what_differs_is_told_in_one_sentence(here: dict[str, Any], says: str, tmp_path: Path) -> None:
    write_whole(tmp_path / "s")
    saved = read_session(tmp_path / "s")
    check_fits(saved, **HERE)
    with pytest.raises(ConfigError, match=f"^the saved session does not fit: {says}"):
        check_fits(saved, **{**HERE, **here})


def test_a_codec_matters_where_its_state_is_gone_on_from() -> None:
    check_fits(whole_session(), **{**HERE, "codec": None})
    check_fits(small_session(), **{**HERE, "codec": "taehv"})


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
