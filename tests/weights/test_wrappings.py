"""Whatever training code leaves around a model comes off: every wrapping, over both layouts and all kinds of file,
gives a model that computes what the bare one computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.errors import CheckpointError
from causalrope_sp.verification.cases import case_files, load_case
from causalrope_sp.weights import inspect_checkpoint, load_model
from tests.support.checkpoints import CONFIG, diffusers_model, run, save_wan, wan_state

State = dict[str, Tensor]


def prefixed(prefix: str) -> Callable[[State], State]:
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


def in_every_block(wrapper: str) -> Callable[[State], State]:
    """As FSDP, checkpointing and compile name the blocks that they wrap one by one."""

    def wrap(state: State) -> State:
        words = {name: name.split(".") for name in state}
        return {
            ".".join((*w[:2], wrapper, *w[2:])) if w[0] == "blocks" else name: state[name] for name, w in words.items()
        }

    return wrap


def around_every_linear(state: State) -> State:
    """As activation checkpointing inside FSDP names attentions."""
    return {
        name.replace("self_attn.", "_checkpoint_wrapped_module.self_attn._fsdp_wrapped_module."): tensor
        for name, tensor in state.items()
    }


def both(outer: Callable[[State], State], inner: Callable[[State], State]) -> Callable[[State], State]:
    return lambda state: outer(inner(state))


NAMES: dict[str, Callable[[State], State]] = {
    "bare": prefixed(""),
    "model": prefixed("model."),
    "net": prefixed("net."),
    "module": prefixed("module."),
    "fsdp": prefixed("_fsdp_wrapped_module."),
    "compiled": prefixed("_orig_mod."),
    "ddp of fsdp of model": prefixed("module._fsdp_wrapped_module.model."),
    "another name": prefixed("student.backbone."),
    "fsdp blocks": in_every_block("_fsdp_wrapped_module"),
    "checkpointed blocks": in_every_block("_checkpoint_wrapped_module"),
    "compiled blocks": in_every_block("_orig_mod"),
    "self-forcing's ema": both(prefixed("model._fsdp_wrapped_module."), in_every_block("_fsdp_wrapped_module")),
    "all at once": both(
        prefixed("module._orig_mod.model._fsdp_wrapped_module."),
        both(in_every_block("_fsdp_wrapped_module._checkpoint_wrapped_module"), around_every_linear),
    ),
    "generator, flat": prefixed("generator.model."),
}
PARTS = [(), ("generator",), ("generator_ema",), ("model",), ("state_dict",), ("state_dict", "model", "generator_ema")]


def nested(parts: tuple[str, ...], state: State) -> dict[str, Any]:
    content: dict[str, Any] = {**state}
    for part in reversed(parts):
        content = {part: content, "step": 3, "critic": {"weight": torch.zeros(2)}}
    return content


def outputs(path: Path, **options: Any) -> Tensor:
    model = load_model(path, config=CONFIG, **options)
    torch.manual_seed(1)
    latents, text = torch.randn(1, CONFIG.in_channels, 2, 4, 6), torch.randn(1, 7, CONFIG.text_dim)
    return run(model, latents, torch.tensor([250.0, 875.0]), text)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    return outputs(save_wan(tmp_path_factory.mktemp("bare") / "w.safetensors", wan_state()))


def state_of(layout: str) -> State:
    return wan_state() if layout == "wan" else dict(diffusers_model().state_dict())


@pytest.mark.parametrize("layout", ["wan", "diffusers"])
@pytest.mark.parametrize("names", NAMES)
def test_wrapped_names(tmp_path: Path, expected: Tensor, names: str, layout: str) -> None:
    save_file(NAMES[names](state_of(layout)), tmp_path / "w.safetensors")
    assert torch.equal(outputs(tmp_path), expected)
    assert inspect_checkpoint(tmp_path, config=CONFIG).layout == layout


@pytest.mark.parametrize("layout", ["wan", "diffusers"])
@pytest.mark.parametrize("parts", PARTS, ids=" > ".join)
def test_nested_parts(tmp_path: Path, expected: Tensor, parts: tuple[str, ...], layout: str) -> None:
    torch.save(nested(parts, NAMES["self-forcing's ema"](state_of(layout))), tmp_path / "model.pt")
    assert torch.equal(outputs(tmp_path), expected)
    wrapping = inspect_checkpoint(tmp_path, config=CONFIG).wrapping
    assert (wrapping.parts, wrapping.prefix) == (parts, "model.")
    assert wrapping.modules == ("_fsdp_wrapped_module",)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".safetensors"])
def test_shards_with_an_index(tmp_path: Path, expected: Tensor, suffix: str) -> None:
    state = NAMES["self-forcing's ema"](wan_state())
    shards = {f"w-{n}{suffix}": dict(list(state.items())[n::3]) for n in range(3)}
    for name, shard in shards.items():
        (save_file if suffix == ".safetensors" else torch.save)(shard, tmp_path / name)
    weight_map = {key: name for name, shard in shards.items() for key in shard}
    index = tmp_path / f"w{suffix}.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(outputs(tmp_path), expected)
    assert torch.equal(outputs(index), expected)


def test_the_averaged_weights_are_taken_and_any_part_can_be_asked_for(tmp_path: Path, expected: Tensor) -> None:
    raw = {name: torch.zeros_like(tensor) for name, tensor in wan_state().items()}
    torch.save({"generator": raw, "generator_ema": wan_state(), "critic": raw}, tmp_path / "nested.pt")
    flat = {
        f"{part}.model.{name}": tensor.clone()
        for part, state in (("generator", raw), ("critic", raw))
        for name, tensor in state.items()
    }
    flat |= {f"generator_ema.model.{name}": tensor for name, tensor in wan_state().items()}
    save_file(flat | {"critic.logits.weight": torch.zeros(2)}, tmp_path / "flat.safetensors")
    for name in ("nested.pt", "flat.safetensors"):
        file = tmp_path / name
        assert torch.equal(outputs(file), expected)
        assert torch.equal(outputs(file, part="generator_ema"), expected)
        assert not outputs(file, part="generator").any()
        with pytest.raises(CheckpointError, match=r"has no part teacher; it has: .*generator"):
            load_model(file, part="teacher", config=CONFIG)


def test_an_average_that_was_never_begun_is_passed_over(tmp_path: Path, expected: Tensor) -> None:
    torch.save({"generator_ema": {}, "generator": wan_state()}, tmp_path / "model.pt")
    assert torch.equal(outputs(tmp_path), expected)


def test_two_models_that_nothing_tells_apart_are_named(tmp_path: Path) -> None:
    save_file({f"{side}.{name}": t.clone() for side in "ab" for name, t in wan_state().items()}, tmp_path / "w")
    with pytest.raises(CheckpointError, match=r"holds several models, under a\., b\.; say which one as `part`"):
        load_model(tmp_path / "w", config=CONFIG)
    assert inspect_checkpoint(tmp_path / "w", config=CONFIG, part="a").problem is None


def test_the_same_tensor_wrapped_and_bare_is_one_line(tmp_path: Path) -> None:
    state = wan_state()
    save_file(state | {"_orig_mod.head.head.bias": torch.zeros(20)}, tmp_path / "w")
    with pytest.raises(CheckpointError, match=r"head\.head\.bias are the same tensor twice"):
        load_model(tmp_path / "w", config=CONFIG)


def test_a_dictionary_that_holds_itself_is_refused(tmp_path: Path) -> None:
    content: dict = {}
    content["model"] = content
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="is a dict, not a tensor"):
        load_model(tmp_path / "w.pt")


def test_a_message_names_what_is_wrong_as_it_is_stored(tmp_path: Path) -> None:
    state = NAMES["self-forcing's ema"](wan_state())
    del state["model._fsdp_wrapped_module.head.head.bias"]
    state["model._fsdp_wrapped_module.blocks.0.extra"] = torch.zeros(1)
    save_file(state, tmp_path / "w")
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path / "w", config=CONFIG)
    assert "1 missing: head.head.bias; 1 unexpected: model._fsdp_wrapped_module.blocks.0.extra" in str(caught.value)


def test_a_pipeline_of_diffusers_keeps_its_dit_in_a_folder(tmp_path: Path, expected: Tensor) -> None:
    diffusers_model().save_pretrained(tmp_path / "transformer")
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    assert torch.equal(outputs(tmp_path), expected)


@pytest.mark.parametrize("kind", [".safetensors", ".pt"])
@pytest.mark.parametrize("names", ["fsdp", "self-forcing's ema", "all at once", "generator, flat"])
def test_reference_cases_with_their_weights_wrapped(goldens: Path, tmp_path: Path, names: str, kind: str) -> None:
    path = next(path for path, _ in case_files(goldens) if path.stem == "dmd-window-sink")
    state = NAMES[names](load_file(goldens / "weights-a.safetensors"))
    case, latents = load_case(path, torch.float64)
    if kind == ".pt":
        torch.save({"generator_ema": state, "critic": {}}, tmp_path / "model.pt")
    else:
        save_file(state, tmp_path / "model.safetensors")
    model = load_model(tmp_path / f"model{kind}", config=case.model.config, dtype=torch.float64)
    made = replace(case, model=model).run(SequenceParallel.single())
    error = (made - latents).norm() / latents.norm()
    assert error < 1e-6
