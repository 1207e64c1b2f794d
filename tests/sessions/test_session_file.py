"""A session is read from its file as it was written; what no session is, is refused in one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from causalrope_sp import CheckpointError, ConfigError
from causalrope_sp.config import SamplerConfig, StreamConfig
from causalrope_sp.errors import OutputError
from causalrope_sp.sessions import SavedSession, check_fits, read_session, write_session
from tests.support.sessions import HERE, layers_of, small_cache, small_decoder, small_session

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
TENSORS = ("embeds", "latents", "negative_embeds", "decoder")


def whole_session(dtype: torch.dtype = torch.bfloat16) -> SavedSession:
    return small_session(dtype, cache=small_cache(dtype), decoder=small_decoder())


def write_whole(path: Path, dtype: torch.dtype = torch.bfloat16) -> SavedSession:
    saved = whole_session(dtype)
    write_session(path, saved, layers_of(small_cache(dtype)))
    return saved


def assert_same(found: SavedSession, expected: SavedSession) -> None:
    for name in (field.name for field in fields(SavedSession) if field.name not in TENSORS):
        assert getattr(found, name) == getattr(expected, name), name
    assert list(found.embeds) == sorted(expected.embeds)
    assert all(torch.equal(embeds, expected.embeds[number]) for number, embeds in found.embeds.items())
    assert torch.equal(found.latents, expected.latents)
    assert (found.negative_embeds is None) == (expected.negative_embeds is None)
    if found.negative_embeds is not None and expected.negative_embeds is not None:
        assert torch.equal(found.negative_embeds, expected.negative_embeds)
    assert (found.decoder is None) == (expected.decoder is None)
    if found.decoder is not None and expected.decoder is not None:
        assert (found.decoder.codec, found.decoder.frames) == (expected.decoder.codec, expected.decoder.frames)
        state, judge = found.decoder.state.frames, expected.decoder.state.frames
        assert state.keys() == judge.keys()
        assert all(torch.equal(frames, judge[name]) for name, frames in state.items())


@DTYPES
def test_a_session_is_read_as_it_was_written(dtype: torch.dtype, tmp_path: Path) -> None:
    saved = write_whole(tmp_path / "s.safetensors", dtype)
    found = read_session(tmp_path / "s.safetensors")
    assert_same(found, saved)
    assert found.cache is not None
    layers = layers_of(small_cache(dtype))
    for branch in found.cache.branches:
        for layer in range(found.cache.layers):
            expected = next(layers)
            for tokens, heads in ((slice(None), slice(None)), (slice(2, 5), slice(None)), (slice(None), slice(1, 3))):
                part = found.cache.layer(branch, layer, tokens, heads)
                assert part.dtype == dtype
                assert torch.equal(part.nan_to_num(), expected[:, :, :, tokens, heads].nan_to_num())
    assert next(layers, None) is None
    assert os.listdir(tmp_path) == ["s.safetensors"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"negative_prompt": None, "negative_embeds": None},
        {"negative_prompt": "half a \ud800 pair"},
        {"sampler": SamplerConfig(steps=(999.5, 20), solver="unipc", guidance_interval=(10, 900.5))},
        {"stream": StreamConfig(), "shots": (0,)},
        {"next_chunk": 0, "next_frame": 0, "chunks": (), "latents": torch.empty(1, 0, 3, 2, 3), "shots": (0,)}
        | {"oldest": 0, "prompts": small_session().prompts[:1], "embeds": {0: torch.ones(1, 5, 4)}},
        {"seed": 2**63},
    ],
    ids=str,
)
def test_every_form_of_a_session_is_kept(changes: dict[str, Any], tmp_path: Path) -> None:
    saved = small_session(**changes)
    write_session(tmp_path / "s", saved)
    assert_same(read_session(tmp_path / "s"), saved)


def test_safetensors_itself_reads_the_file(tmp_path: Path) -> None:
    saved = write_whole(tmp_path / "s.safetensors", torch.float16)
    tensors = load_file(tmp_path / "s.safetensors")
    names = {"latents", "embeds/1", "embeds/3", "negative_embeds", "decoder/decoder.a", "decoder/decoder.b.0"}
    cache = [f"cache/{branch}/{layer}" for branch in ("conditional", "unconditional") for layer in (0, 1)]
    assert tensors.keys() == names | set(cache)
    for name, layer in zip(cache, layers_of(small_cache(torch.float16)), strict=True):
        assert torch.equal(tensors[name].nan_to_num(), layer.nan_to_num())
    assert torch.equal(tensors["embeds/3"], saved.embeds[3])
    with safe_open(tmp_path / "s.safetensors", "pt") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["version"]) == ("causalrope_sp session", "1")
    assert json.loads(metadata["session"])["prompts"][1] == {"first_chunk": 2, "prompt": None, "id": 3}


def test_layers_are_written_one_after_the_other(tmp_path: Path) -> None:
    """When a layer is asked for, those before it are let go, so that the cache is not in memory twice."""
    import weakref

    alive: list[weakref.ref[Tensor]] = []

    def layers() -> Iterator[Tensor]:
        for layer in layers_of(small_cache()):
            alive.append(weakref.ref(layer))
            yield layer
            del layer
            assert [ref for ref in alive[:-1] if ref() is not None] == []

    saved = small_session(cache=small_cache())
    write_session(tmp_path / "s", saved, layers())
    assert len(alive) == 4


def test_tensors_are_views_of_the_file(tmp_path: Path) -> None:
    """A file of 86 MB is opened, and a part of a layer read, in a fraction of that."""
    script = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from causalrope_sp.sessions import read_session, write_session
from tests.support.sessions import small_cache, small_session

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

path = sys.argv[1]
cache = replace(small_cache(), layers=4, tokens=6, heads=64, head_dim=600)
write_session(path, small_session(cache=cache), (torch.zeros(cache.layer_shape) for _ in range(8)))
del cache
before = resident()
saved = read_session(path)
part = saved.cache.layer("unconditional", 3, slice(0, 6), slice(0, 2))
print(Path(path).stat().st_size, resident() - before, part.numel())
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "s"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    size, grown, numbers = map(int, done.stdout.split())
    assert size > 80_000_000
    assert numbers == 2 * 6 * 6 * 2 * 600
    assert grown < size / 4


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


def test_keys_and_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    """Where no frame is, anything may be."""
    cache = small_cache()
    layers = list(layers_of(cache))
    layers[3][1, 0, 4, 2, 1, 0] = torch.nan
    write_session(tmp_path / "s", small_session(cache=cache), layers)
    found = read_session(tmp_path / "s").cache
    assert found is not None
    found.layer("unconditional", 0)
    found.layer("unconditional", 1, tokens=slice(0, 2))
    with pytest.raises(CheckpointError, match="keys and values of layer 1, unconditional, hold NaN or infinity"):
        found.layer("unconditional", 1)


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
    ("layers", "says"),
    [
        (lambda: list(layers_of(small_cache()))[:3], "cache/unconditional/1 was to be .*, not None"),
        (lambda: [*layers_of(small_cache()), torch.ones(1)], "there are more tensors than the 8"),
        (lambda: [layer[..., :4] for layer in layers_of(small_cache())], r"cache/conditional/0 was to be .*, not \(\("),
        (lambda: [layer.double() for layer in layers_of(small_cache())], "cache/conditional/0 was to be"),
    ],
)
def test_wrong_layers_are_refused_and_nothing_is_left(layers: Any, says: str, tmp_path: Path) -> None:
    write_session(tmp_path / "s", small_session())
    before = (tmp_path / "s").read_bytes()
    with pytest.raises(ConfigError, match=says):
        write_session(tmp_path / "s", small_session(cache=small_cache()), layers())
    assert os.listdir(tmp_path) == ["s"]
    assert (tmp_path / "s").read_bytes() == before


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    """All layers are taken all the same: other ranks may take part in making them."""
    script = """
import resource, sys
from causalrope_sp.errors import OutputError
from causalrope_sp.sessions import write_session
from tests.support.sessions import layers_of, small_cache, small_session

path, cache, taken = sys.argv[1], small_cache(), 0
write_session(path, small_session())

def layers():
    global taken
    for layer in layers_of(cache):
        taken += 1
        yield layer

resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000))
try:
    write_session(path, small_session(cache=cache), layers())
except OutputError as error:
    print(taken, error)
"""
    file = tmp_path / "s.safetensors"
    done = subprocess.run([sys.executable, "-c", script, file], capture_output=True, text=True, timeout=120)
    assert done.stdout == f"4 cannot write {file}: File too large\n", done.stderr
    assert os.listdir(tmp_path) == ["s.safetensors"]
    assert_same(read_session(file), small_session())


def test_an_interrupt_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    def layers() -> Iterator[Tensor]:
        yield next(layers_of(small_cache()))
        raise KeyboardInterrupt

    write_session(tmp_path / "s", small_session())
    with pytest.raises(KeyboardInterrupt):
        write_session(tmp_path / "s", small_session(cache=small_cache()), layers())
    assert os.listdir(tmp_path) == ["s"]
    assert_same(read_session(tmp_path / "s"), small_session())


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path, says in ((tmp_path / "folder", "it is a folder"), (tmp_path / "none" / "s", "No such file or directory")):
        with pytest.raises(OutputError, match=f"cannot write {path}: {says}"):
            write_session(path, small_session())
    assert os.listdir(tmp_path) == ["folder"]


def test_a_file_that_is_being_written_is_left_to_its_writer(tmp_path: Path) -> None:
    def layers() -> Iterator[Tensor]:
        for layer in layers_of(small_cache()):
            with pytest.raises(OutputError, match="another run is writing it"):
                write_session(tmp_path / "s", small_session())
            yield layer

    saved = small_session(cache=small_cache())
    write_session(tmp_path / "s", saved, layers())
    assert_same(read_session(tmp_path / "s"), saved)
    assert os.listdir(tmp_path) == ["s"]


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
