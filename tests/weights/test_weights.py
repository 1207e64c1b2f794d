"""Checkpoints of both layouts become the same model, that model computes what diffusers computes, and whatever is
wrong with a file is one line that names it."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from causalrope_sp.config import DiTConfig
from causalrope_sp.errors import CheckpointError
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.weights import inspect_checkpoint, load_model, save_model, tensor_files
from tests.support.checkpoints import CONFIG, Sinusoid64, diffusers_model, run, save_wan, wan_state


@pytest.fixture
def exact_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers drops to float32 inside norms, gates and rotary tables; keep float64 throughout."""
    to_float32 = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else to_float32(x))


@pytest.mark.usefixtures("exact_float64")
@pytest.mark.parametrize(("shard_size", "shards"), [("1GB", 1), ("150KB", 3)])
def test_a_diffusers_folder_computes_what_diffusers_computes(tmp_path: Path, shard_size: str, shards: int) -> None:
    theirs = diffusers_model(torch.float64)
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert len(list(tmp_path.glob("*.safetensors"))) == shards
    theirs.condition_embedder.timesteps_proj = Sinusoid64()
    ours = load_model(tmp_path)
    assert (ours.config, ours.dtype) == (CONFIG, torch.float64)

    latents = torch.randn(1, CONFIG.in_channels, 3, 4, 6, dtype=torch.float64)
    text = torch.randn(1, 7, CONFIG.text_dim, dtype=torch.float64)
    timesteps = torch.tensor([0.0, 625.0, 937.5], dtype=torch.float64)
    with torch.no_grad():
        expected = theirs(latents, timesteps.repeat_interleave(2 * 3)[None], text).sample
    torch.testing.assert_close(run(ours, latents, timesteps, text), expected, rtol=0, atol=1e-10 * expected.std())


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("layout", ["wan", "diffusers"])
def test_both_layouts_give_the_same_parameters(tmp_path: Path, layout: str, prefix: str) -> None:
    theirs = diffusers_model()
    theirs.save_pretrained(tmp_path / "folder")
    state = wan_state() if layout == "wan" else theirs.state_dict()
    save_wan(tmp_path / "bare", {prefix + name: tensor for name, tensor in state.items()})
    assert inspect_checkpoint(tmp_path / "bare").layout == layout

    bare, folder = load_model(tmp_path / "bare").state_dict(), load_model(tmp_path / "folder").state_dict()
    assert bare.keys() == folder.keys()
    for name, parameter in bare.items():
        assert torch.equal(parameter, folder[name]), name


def test_the_model_is_ready_to_run_and_owns_its_memory(tmp_path: Path) -> None:
    file = save_wan(tmp_path / "w.safetensors", wan_state())
    model = load_model(file)
    before = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    with file.open("r+b") as stream:
        stream.seek(-(file.stat().st_size // 2), os.SEEK_END)
        stream.write(bytes(file.stat().st_size // 2))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.is_contiguous()
        assert not parameter.requires_grad
        assert parameter.device.type == "cpu"
    assert not model.training


def test_a_model_too_large_to_describe_is_one_line(tmp_path: Path) -> None:
    save_model(CausalDiT(CONFIG), tmp_path / "model.safetensors")
    too_large = replace(CONFIG, ffn_dim=1 << 62)
    with pytest.raises(CheckpointError, match="declares a model that cannot be"):
        inspect_checkpoint(tmp_path / "model.safetensors", config=too_large)


def test_dtype_is_kept_converted_or_that_of_most_numbers(tmp_path: Path) -> None:
    state = wan_state(torch.bfloat16)
    file = save_wan(tmp_path / "w.safetensors", state)
    assert load_model(file).dtype == torch.bfloat16
    assert load_model(file, dtype=torch.float64).dtype == torch.float64
    mixed = {name: t.float() if "modulation" in name or "norm" in name else t for name, t in state.items()}
    model = load_model(save_wan(tmp_path / "mixed.safetensors", mixed))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_inspection_neither_builds_a_model_nor_reads_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = wan_state(torch.bfloat16)
    numbers = sum(tensor.numel() for tensor in state.values())
    state["blocks.0.extra"] = torch.zeros(3)
    removed = state.pop("blocks.1.self_attn.k.bias")
    state["head.head.bias"] = torch.zeros(21)
    file = save_wan(tmp_path / "w.safetensors", state)

    monkeypatch.setitem(sys.modules, "causalrope_sp.models.causal_dit", None)
    monkeypatch.setattr(tensor_files.WeightFiles, "read", None)
    report = inspect_checkpoint(file)
    assert (report.path, report.layout, report.config, report.dtype) == (file, "wan", CONFIG, torch.bfloat16)
    assert report.missing == ["blocks.1.self_attn.k.bias"]
    assert report.unexpected == ["blocks.0.extra"]
    assert report.misshapen == ["head.head.bias is (21,), expected (20,)"]
    assert report.parameters == numbers - removed.numel() + 1
    assert report.problem is not None


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("nested", [None, "generator_ema"])
def test_torch_files_of_tensors_alone(tmp_path: Path, zipped: bool, nested: str | None) -> None:
    state = wan_state()
    file = tmp_path / "w.pt"
    content = {nested: state, "generator": {}, "step": 3} if nested else state
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    model = load_model(tmp_path, config=CONFIG)
    assert torch.equal(model.get_parameter("blocks.0.ffn.up.weight"), state["blocks.0.ffn.0.weight"])


def test_heads_of_128_are_assumed_only_where_the_width_allows(tmp_path: Path) -> None:
    config = DiTConfig(dim=256, ffn_dim=8, num_heads=2, num_layers=1, text_dim=4, freq_dim=4, in_channels=2)
    state = {name: torch.zeros(1) for name in wan_state() if not name.startswith("blocks.1.")}
    sizes = {
        "patch_embedding.weight": (256, 2, 1, 2, 2),
        "blocks.0.ffn.0.weight": (8, 256),
        "text_embedding.0.weight": (256, 4),
        "time_embedding.0.weight": (256, 4),
        "head.head.weight": (8, 256),
    }
    state |= {name: torch.zeros(shape) for name, shape in sizes.items()}
    assert inspect_checkpoint(save_wan(tmp_path / "w", state, num_heads=None)).config == config


def test_a_given_config_is_used(tmp_path: Path) -> None:
    given = DiTConfig(**{**vars(CONFIG), "num_heads": 2, "text_len": 77})
    file = save_wan(tmp_path / "w.safetensors", wan_state(), num_heads=None)
    assert load_model(file, config=given).config == given


class Bomb:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch exploded",)


def without_a_key(folder: Path) -> None:
    state = wan_state()
    del state["blocks.1.norm3.weight"]
    save_wan(folder / "w.safetensors", state)


def without_a_key_that_tells_a_size(folder: Path) -> None:
    state = wan_state()
    del state["blocks.0.ffn.0.weight"]
    save_wan(folder / "w.safetensors", state)


def without_a_declared_block(folder: Path) -> None:
    save_file({n: t for n, t in wan_state().items() if not n.startswith("blocks.1.")}, folder / "w.safetensors")
    (folder / "config.json").write_text('{"num_heads": 3, "num_layers": 2}')


def with_a_leftover(folder: Path) -> None:
    save_wan(folder / "w.safetensors", wan_state() | {"blocks.0.extra.weight": torch.zeros(2)})


def with_a_wrong_shape(folder: Path) -> None:
    save_wan(folder / "w.safetensors", wan_state() | {"blocks.0.ffn.2.weight": torch.zeros(36, 41)})


def truncated(folder: Path) -> None:
    file = save_wan(folder / "w.safetensors", wan_state())
    file.write_bytes(file.read_bytes()[:-100])


def truncated_header(folder: Path) -> None:
    file = save_wan(folder / "w.safetensors", wan_state())
    file.write_bytes(file.read_bytes()[:5])


def truncated_torch_file(folder: Path) -> None:
    torch.save(wan_state(), folder / "w.pt")
    (folder / "w.pt").write_bytes((folder / "w.pt").read_bytes()[:-3000])


def no_weights(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def two_checkpoints(folder: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        save_wan(folder / name, wan_state())


def another_model(folder: Path) -> None:
    save_file({"transformer_blocks.0.attn1.to_q.weight": torch.zeros(2, 2)}, folder / "w.safetensors")


def unknown_heads(folder: Path) -> None:
    save_wan(folder / "w.safetensors", wan_state(), num_heads=None)


def impossible_heads(folder: Path) -> None:
    save_wan(folder / "w.safetensors", wan_state(), num_heads=5)


def a_billion_layers(folder: Path) -> None:
    save_file(wan_state(), folder / "w.safetensors")
    (folder / "config.json").write_text('{"num_heads": 3, "num_layers": 1000000000}')


def a_config_of_words(folder: Path) -> None:
    save_file(wan_state(), folder / "w.safetensors")
    (folder / "config.json").write_text('{"num_heads": 3, "eps": "small"}')


def a_broken_config(folder: Path) -> None:
    save_file(wan_state(), folder / "w.safetensors")
    (folder / "config.json").write_text("{")


def a_model_inside(folder: Path) -> None:
    (folder / "weights").mkdir()
    (folder / "weights" / "model_index.json").write_text("{}")


def checkpoints_beside_a_model(folder: Path) -> None:
    two_checkpoints(folder)
    a_model_inside(folder)


def an_absent_shard(folder: Path) -> None:
    (folder / "w.safetensors.index.json").write_text('{"weight_map": {"a": "w-00001.safetensors"}}')


def a_shard_elsewhere(folder: Path) -> None:
    save_wan(folder.parent / "outside.safetensors", wan_state())
    (folder / "w.safetensors.index.json").write_text('{"weight_map": {"a": "../outside.safetensors"}}')


def whole_numbers(folder: Path) -> None:
    save_wan(folder / "w.safetensors", {name: tensor.to(torch.int8) for name, tensor in wan_state().items()})


def code_in_a_pickle(folder: Path) -> None:
    torch.save({"generator": Bomb()}, folder / "w.pt")


def code_in_a_bare_pickle(folder: Path) -> None:
    (folder / "w.pt").write_bytes(pickle.dumps(Bomb(), protocol=2))


def a_list_of_tensors(folder: Path) -> None:
    torch.save([torch.zeros(1)], folder / "w.pt")


def text_under_a_torch_name(folder: Path) -> None:
    (folder / "w.pt").write_text("hello, this is no checkpoint")


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (without_a_key, "1 missing: blocks.1.norm3.weight"),
        (without_a_key_that_tells_a_size, "1 missing: blocks.0.ffn.0.weight"),
        (without_a_declared_block, "27 missing: blocks.1.modulation"),
        (with_a_leftover, "1 unexpected: blocks.0.extra.weight"),
        (with_a_wrong_shape, "blocks.0.ffn.2.weight is (36, 41), expected (36, 40)"),
        (truncated, "w.safetensors: truncated"),
        (truncated_header, "w.safetensors: truncated"),
        (truncated_torch_file, "w.pt: truncated"),
        (no_weights, "holds no weights"),
        (two_checkpoints, "a.safetensors, b.safetensors"),
        (a_model_inside, "; to open a whole model in it name /"),
        (checkpoints_beside_a_model, "a.safetensors, b.safetensors; to open a whole model in it name /"),
        (another_model, "transformer_blocks.0.attn1.to_q.weight"),
        (unknown_heads, "give `config`"),
        (impossible_heads, "num_heads 5"),
        (a_billion_layers, "declares 1000000000 layers"),
        (a_config_of_words, "declares eps as 'small'"),
        (a_broken_config, "config.json: not JSON"),
        (an_absent_shard, "w-00001.safetensors"),
        (a_shard_elsewhere, "../outside.safetensors"),
        (whole_numbers, "stored as I8"),
        (code_in_a_pickle, "refused"),
        (code_in_a_bare_pickle, "refused"),
        (a_list_of_tensors, "holds a list"),
        (text_under_a_torch_name, "neither a safetensors file nor"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_wrong_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None], told: str
) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    monkeypatch.chdir(folder)
    make(folder)
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert told in message
    assert str(folder) in message
    assert "\n" not in message
    assert not (folder / "exploded").exists()


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        inspect_checkpoint(tmp_path / "nothing")


def test_long_lists_of_keys_are_cut(tmp_path: Path) -> None:
    state = wan_state() | {f"extra.{n}": torch.zeros(1) for n in range(9)}
    with pytest.raises(CheckpointError, match=r"9 unexpected: extra.0, extra.1, extra.2, extra.3 and 5 more$"):
        load_model(save_wan(tmp_path / "w.safetensors", state))


def test_the_file_holds_what_was_saved(tmp_path: Path) -> None:
    """The other tests lean on `wan_name`; this one spells Wan's names out."""
    names = set(load_file(save_wan(tmp_path / "w.safetensors", wan_state())))
    linears = [
        "patch_embedding",
        "time_projection.1",
        "head.head",
        "blocks.0.norm3",
        "blocks.0.ffn.0",
        "blocks.0.ffn.2",
    ]
    linears += [f"{module}_embedding.{n}" for module in ("text", "time") for n in (0, 2)]
    linears += [f"blocks.0.{side}_attn.{letter}" for side in ("self", "cross") for letter in "qkvo"]
    spelled = {f"{name}.{part}" for name in linears for part in ("weight", "bias")}
    spelled |= {f"blocks.0.{side}_attn.norm_{letter}.weight" for side in ("self", "cross") for letter in "qk"}
    spelled |= {"head.modulation", "blocks.0.modulation"}
    assert {name for name in names if not name.startswith("blocks.1.")} == spelled


def test_a_saved_model_loads_back_bit_for_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = DiTConfig(dim=24, ffn_dim=40, num_heads=2, num_layers=2, text_dim=8, text_len=3, freq_dim=16)
    model = CausalDiT(config)
    save_model(model, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors")
    assert loaded.config == config
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
