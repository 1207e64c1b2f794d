"""No file, however broken or ill-meant, does more than be refused in one line: no code is run, no path leads elsewhere,
no size is believed, no process ends."""

from __future__ import annotations

import contextlib
import io
import json
import resource
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from causalrope_sp.errors import CheckpointError
from causalrope_sp.weights import Lora, inspect_checkpoint, load_model
from tests.support.checkpoints import CONFIG, save_wan, wan_state

MUCH = 256 << 20  # bytes; every file below is a few thousand, and torch sets aside some for its threads
FUZZED = settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
NAMES = st.sampled_from([*wan_state(), "blocks.999999.self_attn.q.weight", "_orig_mod", "model."]) | st.text(
    max_size=20
)
FIELDS = ["num_heads", "num_layers", "eps", "theta", "text_len", "dim", "patch_size", "local_attn_size", "sink_size"]
SIZES = st.integers(0, 9) | st.sampled_from([2**31, 2**40, 2**63 - 1, 2**63, 2**64, -1])
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F64", "F8_E4M3", "F4", "BOOL", "I64", "C64", "nothing"]),
        "shape": st.lists(SIZES, max_size=6),
        "data_offsets": st.lists(SIZES, min_size=2, max_size=2),
    }
)


def header(content: bytes, claimed: int | None = None, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(content) if claimed is None else claimed) + content + data


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Memory that is asked for beyond MUCH is not there: what aborts or dies on that fails the test run."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MUCH, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def refused(path: Path) -> str:
    """What is said of a file that does not load: one line."""
    with little_memory(), pytest.raises(CheckpointError) as caught:
        load_model(path)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 4000
    return message


def loads_or_is_refused(path: Path, **options: Any) -> None:
    with little_memory():
        try:
            load_model(path, **options)
        except CheckpointError as error:
            message = str(error)
        else:
            message = ""
    assert not message or message.isprintable()


@FUZZED
@given(st.binary(max_size=200))
def test_any_bytes(tmp_path: Path, content: bytes) -> None:
    for suffix in (".safetensors", ".pt"):
        (tmp_path / f"w{suffix}").write_bytes(content)
        refused(tmp_path / f"w{suffix}")


@FUZZED
@given(
    st.dictionaries(NAMES, ENTRIES | JSON, max_size=6), st.integers(0, 200), st.none() | SIZES.filter(lambda n: n >= 0)
)
def test_fuzzed_headers(tmp_path: Path, entries: dict[str, Any], data: int, claimed: int | None) -> None:
    content = json.dumps(entries).encode()
    claimed = None if claimed is None else min(claimed, 2**64 - 1)
    (tmp_path / "w.safetensors").write_bytes(header(content, claimed, bytes(data)))
    refused(tmp_path / "w.safetensors")


def whole(kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "safetensors":
        return save(wan_state())
    torch.save({"generator": wan_state()}, buffer, _use_new_zipfile_serialization=kind == "zipped")
    return buffer.getvalue()


WHOLE = {kind: whole(kind) for kind in ("safetensors", "zipped", "legacy")}


@FUZZED
@given(st.sampled_from(list(WHOLE)), st.data())
def test_damaged_files(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    """Whole checkpoints with some bytes changed, most of them in the headers at either end, and some cut short."""
    content = bytearray(WHOLE[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(-9000, 9000))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from([0, 0, 1, 1000]))
    (tmp_path / "w").write_bytes(content[: len(content) - cut])
    loads_or_is_refused(tmp_path / "w", config=CONFIG)


@FUZZED
@given(JSON)
def test_fuzzed_configs(tmp_path: Path, content: Any) -> None:
    save_file(wan_state(), tmp_path / "w.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(content))
    refused(tmp_path)


@FUZZED
@given(
    st.dictionaries(st.sampled_from(["num_heads", "num_layers", "eps", "theta", "text_len", "dim", "patch_size"]), JSON)
)
def test_fuzzed_fields_of_a_config(tmp_path: Path, content: dict[str, Any]) -> None:
    save_file(wan_state(), tmp_path / "w.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 3} | content))
    loads_or_is_refused(tmp_path)


@FUZZED
@given(JSON | st.fixed_dictionaries({"weight_map": JSON | st.dictionaries(st.text(max_size=5), st.text(max_size=300))}))
def test_fuzzed_indexes(tmp_path: Path, content: Any) -> None:
    (tmp_path / "w.safetensors.index.json").write_text(json.dumps(content))
    refused(tmp_path)


@FUZZED
@given(st.dictionaries(st.text(max_size=20) | st.sampled_from(["blocks.0.ffn.0.lora_A.weight"]), ENTRIES, max_size=4))
def test_fuzzed_loras(tmp_path: Path, entries: dict[str, Any]) -> None:
    base = save_wan(tmp_path / "base.safetensors", wan_state())
    (tmp_path / "lora.safetensors").write_bytes(header(json.dumps(entries).encode(), data=bytes(100)))
    with pytest.raises(CheckpointError) as caught:
        load_model(base, loras=[Lora(tmp_path / "lora.safetensors")])
    assert str(caught.value).isprintable()


def absolute(folder: Path, outside: Path) -> str:
    return str(outside)


def upwards(folder: Path, outside: Path) -> str:
    return f"../{outside.name}"


def by_a_detour(folder: Path, outside: Path) -> str:
    (folder / "sub").mkdir()
    return f"sub/../../{outside.name}"


def by_a_link(folder: Path, outside: Path) -> str:
    (folder / "w-1.safetensors").symlink_to(outside)
    return "w-1.safetensors"


def by_a_chain_of_links(folder: Path, outside: Path) -> str:
    (folder / "a").symlink_to(outside)
    (folder / "w-1.safetensors").symlink_to(folder / "a")
    return "w-1.safetensors"


def in_a_folder_below(folder: Path, outside: Path) -> str:
    (folder / "sub").symlink_to(outside.parent)
    return f"sub/{outside.name}"


def with_backslashes(folder: Path, outside: Path) -> str:
    return f"..\\{outside.name}"


def itself_a_folder(folder: Path, outside: Path) -> str:
    return "."


@pytest.mark.parametrize(
    "lead",
    [
        absolute,
        upwards,
        by_a_detour,
        by_a_link,
        by_a_chain_of_links,
        in_a_folder_below,
        with_backslashes,
        itself_a_folder,
    ],
)
def test_an_index_leads_nowhere_else(tmp_path: Path, lead: Callable[[Path, Path], str]) -> None:
    outside = save_wan(tmp_path / "outside.safetensors", wan_state())
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    index = folder / "w.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"head.head.bias": lead(folder, outside)}}))
    assert "which is not a file in" in refused(index)


def test_links_of_a_hubs_cache_are_followed(tmp_path: Path) -> None:
    """There every file of a snapshot is a link into the blobs of the same repository."""
    folder, blobs = (
        tmp_path / "models--x--y" / "snapshots" / "1f0c" / "transformer",
        tmp_path / "models--x--y" / "blobs",
    )
    folder.mkdir(parents=True)
    blobs.mkdir()
    save_wan(blobs / "aa", wan_state())
    (folder / "w-1.safetensors").symlink_to("../../../blobs/aa")
    (blobs / "bb").write_text(json.dumps({"weight_map": {"head.head.bias": "w-1.safetensors"}}))
    (folder / "w.safetensors.index.json").symlink_to("../../../blobs/bb")
    assert inspect_checkpoint(folder).problem is None


def compressed(file: Path) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w/data.pkl", bytes(100 << 20))


def a_record_larger_than_the_file(file: Path) -> None:
    torch.save(wan_state(), file)
    raw = bytearray(file.read_bytes())
    entry = raw.rindex(b"PK\x01\x02")
    raw[entry + 24 : entry + 28] = struct.pack("<I", 2**31)
    file.write_bytes(raw)


def spread_over_disks(file: Path) -> None:
    torch.save(wan_state(), file)
    raw = bytearray(file.read_bytes())
    raw[raw.rindex(b"PK\x06\x07") + 16] = 9
    file.write_bytes(raw)


def more_numbers_than_bytes(file: Path) -> None:
    torch.save({"blocks.0.self_attn.q.weight": torch.zeros(1).expand(2**20, 2**20)}, file)


def no_numbers_at_all(file: Path) -> None:
    torch.save({"blocks.0.self_attn.q.weight": torch.zeros(2, 2).to_sparse()}, file)


def on_meta(file: Path) -> None:
    torch.save({"blocks.0.self_attn.q.weight": torch.zeros(2, 2, device="meta")}, file)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (compressed, "is compressed"),
        (a_record_larger_than_the_file, "larger than the file"),
        (spread_over_disks, "truncated or not a torch file"),
        (more_numbers_than_bytes, "more numbers than the file can hold"),
        (no_numbers_at_all, "no plain tensor"),
        (on_meta, "no plain tensor"),
    ],
)
def test_torch_files_that_claim_too_much(tmp_path: Path, make: Callable[[Path], None], told: str) -> None:
    make(tmp_path / "w.pt")
    assert told in refused(tmp_path / "w.pt")


def test_json_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(wan_state(), tmp_path / "w.safetensors")
    (tmp_path / "config.json").write_text("[" * 100_000)
    assert "config.json: not JSON" in refused(tmp_path)
    with (tmp_path / "config.json").open("wb") as stream:
        stream.truncate(10 << 30)  # a hole: it takes no room on the disk
    assert "config.json: longer than 64 MiB" in refused(tmp_path)


def test_names_cannot_write_on_the_terminal(tmp_path: Path) -> None:
    state = wan_state() | {"\x1b[2J\nall is well": torch.zeros(1)}
    assert r"\x1b[2J\nall is well" in refused(save_wan(tmp_path / "w", state))
    assert len(refused(save_wan(tmp_path / "w", wan_state() | {"a" * 100_000: torch.zeros(1)}))) < 500


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_are_named(tmp_path: Path, dtype: torch.dtype) -> None:
    state = wan_state(dtype)
    state["blocks.0.self_attn.k.weight"][3, 4] = torch.nan
    state["blocks.1.ffn.2.bias"][5] = -torch.inf
    told = refused(save_wan(tmp_path / "w", state))
    kind = str(dtype).removeprefix("torch.")
    assert f"2 NaN or infinite in {kind}: blocks.0.self_attn.k.weight, blocks.1.ffn.2.bias" in told


def test_numbers_that_the_dtype_cannot_hold_are_named(tmp_path: Path) -> None:
    state = wan_state()
    state["head.head.bias"][0] = 1e30
    file = save_wan(tmp_path / "w", state)
    assert load_model(file).dtype == torch.float32
    with pytest.raises(CheckpointError, match=r"1 NaN or infinite in float16: head\.head\.bias$"):
        load_model(file, dtype=torch.float16)
