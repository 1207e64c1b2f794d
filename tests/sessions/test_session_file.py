"""A session is read from its file as it was written, and a write that fails leaves what was there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from causalrope_sp import CheckpointError, ConfigError
from causalrope_sp.config import SamplerConfig, StreamConfig
from causalrope_sp.errors import OutputError
from causalrope_sp.sessions import SavedBranch, SavedSession, read_session, write_session
from causalrope_sp.sessions.session_metadata import tensors_of
from tests.support.sessions import layers_of, small_cache, small_session, write_whole

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
TENSORS = ("embeds", "texts", "latents", "control", "conditioning", "negative_embeds", "decoder")


def assert_same(found: SavedSession, expected: SavedSession) -> None:
    for name in (field.name for field in fields(SavedSession) if field.name not in TENSORS):
        assert getattr(found, name) == getattr(expected, name), name
    assert list(found.embeds) == sorted(expected.embeds)
    if found.texts is not None and expected.texts is not None:
        assert (found.texts.recache, found.texts.recache_sink) == (expected.texts.recache, expected.texts.recache_sink)
    if found.decoder is not None and expected.decoder is not None:
        assert (found.decoder.codec, found.decoder.frames) == (expected.decoder.codec, expected.decoder.frames)
    tensors, judge = tensors_of(found), tensors_of(expected)
    assert tensors.keys() == judge.keys()
    assert all(torch.equal(tensor, judge[name]) for name, tensor in tensors.items())


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
                part = found.cache.layer(branch.name, layer, tokens, heads)
                assert part.dtype == dtype
                assert torch.equal(part, expected[:, :, :, tokens, heads])
    assert next(layers, None) is None
    assert os.listdir(tmp_path) == ["s.safetensors"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"negative_prompt": None, "negative_embeds": None},
        {"texts": None, "conditioning": None, "reuse": None, "num_frames": 81},
        {"control": torch.ones(1, 7, 4, 2, 3)},
        {"negative_prompt": "half a \ud800 pair"},
        {"sampler": SamplerConfig(steps=(999.5, 20), solver="unipc", guidance_interval=(10, 900.5))},
        {"stream": StreamConfig(), "shots": (0,)},
        {"stream": StreamConfig(window=7, sink=1, chunk_frames=2, similar_frames=2)},
        {"stream": StreamConfig(window=7, sink=1, chunk_frames=2, similar_frames=0.5)},
        {"next_chunk": 0, "next_frame": 0, "chunks": (), "latents": torch.empty(1, 0, 3, 2, 3), "shots": (0,)}
        | {"first_chunk": 0, "shown": 0, "prompts": small_session().prompts[:1], "embeds": {0: torch.ones(1, 5, 4)}},
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
    names = {"latents", "embeds/3", "embeds/4", "negative_embeds", "decoder/decoder.a", "decoder/decoder.b.0"}
    names |= {"conditioning", "texts/0", "texts/1", "texts/2"}
    cache = [f"cache/{branch}/{layer}" for branch in ("conditional", "unconditional") for layer in (0, 1)]
    assert tensors.keys() == names | set(cache)
    for name, layer in zip(cache, layers_of(small_cache(torch.float16)), strict=True):
        assert torch.equal(tensors[name], layer)
    assert torch.equal(tensors["embeds/3"], saved.embeds[3])
    with safe_open(tmp_path / "s.safetensors", "pt") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["version"]) == ("causalrope_sp session", "1")
    assert json.loads(metadata["session"])["prompts"][1] == {"first_chunk": 2, "prompt": None, "id": 3}


def test_layers_are_written_one_after_the_other(tmp_path: Path) -> None:
    """When a layer is asked for, those before it are let go, so that the cache is not in memory twice."""
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
    """A file of 66 MB is opened, and a part of a layer read, in a fraction of that."""
    script = """
import sys
from dataclasses import replace
from math import prod
from pathlib import Path
import torch
from causalrope_sp.sessions import read_session, write_session
from tests.support.sessions import small_cache, small_session

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

path = sys.argv[1]
cache = replace(small_cache(), layers=4, tokens=6, heads=64, head_dim=600)
layers = (torch.zeros(cache.layer_shape(branch)) for branch in cache.branches for _ in range(4))
write_session(path, small_session(cache=cache), layers)
del cache
before = resident()
saved = read_session(path)
part = saved.cache.layer("unconditional", 3, slice(0, 6), slice(0, 2))
print(Path(path).stat().st_size, resident() - before, part.numel())
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "s"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    size, grown, numbers = map(int, done.stdout.split())
    assert size > 60_000_000
    assert numbers == 2 * 5 * 6 * 2 * 600
    assert grown < size / 4


def test_keys_and_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
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


def test_a_cache_that_holds_nothing_yet_is_kept(tmp_path: Path) -> None:
    """That of a session whose only chunk is pending."""
    cache = replace(small_cache(), branches=(SavedBranch("conditional", (), pending=(10, 12)),))
    write_session(tmp_path / "s", small_session(cache=cache), layers_of(cache))
    found = read_session(tmp_path / "s").cache
    assert found == cache
    assert found is not None
    assert found.layer("conditional", 1, slice(2, 4), slice(0, 1)).shape == (2, 1, 0, 2, 1, 10)


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        (lambda: list(layers_of(small_cache()))[:3], "cache/unconditional/1 was to be .*, not None"),
        (lambda: [*layers_of(small_cache()), torch.ones(1)], "there are more tensors than the 12"),
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
