"""LoRA files of every spelling change the weights by weight · alpha / rank · up @ down; what does not fit is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from causalrope_sp.errors import CheckpointError, ConfigError
from causalrope_sp.weights import Lora, checkpoint_digest, load_model
from tests.support.checkpoints import CONFIG, diffusers_model, save_wan, wan_name, wan_state

RANK, ALPHA = 2, 6.0
EMBEDDER = "condition_embedder.image_embedder"
MODULES = [f"blocks.{n}.{side}_attn.{letter}" for n in range(2) for side in ("self", "cross") for letter in "qkvo"]
MODULES += ["blocks.1.ffn.0", "blocks.0.ffn.2", "time_projection.1", "head.head", "patch_embedding", "text_embedding.2"]
TO_DIFFUSERS = {wan_name(name): name for name in diffusers_model().state_dict()}


def pairs(seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """(down, up) by Wan's names of the modules, the patch convolution's as a convolution."""
    made, state = {}, wan_state()  # which seeds the generator too
    torch.manual_seed(seed)
    for module in MODULES:
        out, *rest = state[f"{module}.weight"].shape
        made[module] = torch.randn(RANK, *rest), torch.randn(out, RANK, *(1 for _ in rest[1:]))
    return made


def adapted(changes: dict[str, tuple[Tensor, Tensor]], scale: float, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state with the changes made, in float64."""
    state = {name: tensor.double() for name, tensor in state.items()}
    for module, (down, up) in changes.items():
        delta = up.double().flatten(1) @ down.double().flatten(1)
        state[f"{module}.weight"] += scale * delta.reshape(state[f"{module}.weight"].shape)
    return state


def in_diffusers(module: str) -> str:
    return TO_DIFFUSERS[f"{module}.weight"].removesuffix(".weight")


SPELLINGS = {
    "peft": lambda m: (f"base_model.model.{m}.lora_A.weight", f"base_model.model.{m}.lora_B.weight"),
    "peft, named": lambda m: (
        f"base_model.model.{m}.lora_A.default.weight",
        f"base_model.model.{m}.lora_B.default.weight",
    ),
    "peft of a wrapper": lambda m: (
        f"base_model.model.model.{m}.lora_A.weight",
        f"base_model.model.model.{m}.lora_B.weight",
    ),
    "peft of fsdp": lambda m: (
        f"model._fsdp_wrapped_module.{m}.lora_A.weight",
        f"model._fsdp_wrapped_module.{m}.lora_B.weight",
    ),
    "diffusers": lambda m: (
        f"transformer.{in_diffusers(m)}.lora_A.weight",
        f"transformer.{in_diffusers(m)}.lora_B.weight",
    ),
    "diffusers, down and up": lambda m: (f"{in_diffusers(m)}.lora_down.weight", f"{in_diffusers(m)}.lora_up.weight"),
    "diffusers, old": lambda m: (
        f"transformer.{in_diffusers(m)}.lora.down.weight",
        f"transformer.{in_diffusers(m)}.lora.up.weight",
    ),
    "comfy": lambda m: (f"diffusion_model.{m}.lora_down.weight", f"diffusion_model.{m}.lora_up.weight"),
    "kohya": lambda m: (
        f"lora_unet_{m.replace('.', '_')}.lora_down.weight",
        f"lora_unet_{m.replace('.', '_')}.lora_up.weight",
    ),
}


def spell(spelling: str, changes: dict[str, tuple[Tensor, Tensor]], alpha: float | None = None) -> dict[str, Tensor]:
    spelled: dict[str, Tensor] = {}
    for module, (down, up) in changes.items():
        names = SPELLINGS[spelling](module)
        spelled |= dict(zip(names, (down, up)))
        if alpha is not None:
            stem = names[0].split(".lora_")[0].split(".lora.")[0]
            spelled[f"{stem}.alpha"] = torch.tensor(alpha)
    return {name: tensor.clone() for name, tensor in spelled.items()}


def base(folder: Path, dtype: torch.dtype = torch.float64) -> Path:
    return save_wan(folder / "base.safetensors", wan_state(dtype))


def check(model: nn.Module, state: dict[str, Tensor], folder: Path, tolerance: float = 1e-12) -> None:
    wanted = load_model(save_wan(folder / "wanted.safetensors", state))
    for (name, parameter), (_, other) in zip(model.named_parameters(), wanted.named_parameters(), strict=True):
        torch.testing.assert_close(parameter.double(), other, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("kind", [".safetensors", ".pt"])
@pytest.mark.parametrize("alpha", [None, ALPHA])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling(tmp_path: Path, spelling: str, alpha: float | None, kind: str) -> None:
    file = tmp_path / f"lora{kind}"
    (torch.save if kind == ".pt" else save_file)(spell(spelling, pairs(), alpha), file)
    scale = 1.0 if alpha is None else ALPHA / RANK
    model = load_model(base(tmp_path), loras=[Lora(file, weight=0.5)])
    check(model, adapted(pairs(), 0.5 * scale, wan_state(torch.float64)), tmp_path)


def test_over_the_other_layout(tmp_path: Path) -> None:
    diffusers_model(torch.float64).save_pretrained(tmp_path / "folder")
    save_file(spell("peft", pairs()), tmp_path / "lora.safetensors")
    model = load_model(tmp_path / "folder", loras=[tmp_path / "lora.safetensors"])
    check(model, adapted(pairs(), 1.0, wan_state(torch.float64)), tmp_path)


def test_longlive_keeps_it_under_a_part(tmp_path: Path) -> None:
    torch.save({"generator_lora": spell("peft", pairs()), "critic_lora": spell("peft", pairs(1))}, tmp_path / "lora.pt")
    model = load_model(base(tmp_path), loras=[tmp_path / "lora.pt"])
    check(model, adapted(pairs(), 1.0, wan_state(torch.float64)), tmp_path)


def test_a_digest_tells_adapters_and_their_weights_apart(tmp_path: Path) -> None:
    file, checkpoint = tmp_path / "lora.safetensors", base(tmp_path)
    save_file(spell("comfy", pairs()), file)
    save_file(spell("comfy", pairs(1)), tmp_path / "other.safetensors")
    ways: list[list[Path | Lora]] = [[], [file], [tmp_path / "other.safetensors"]]
    ways += [[Lora(file, weight=0.5)], [Lora(file, alpha=3.0)], [file, file]]
    assert len({checkpoint_digest(checkpoint, loras) for loras in ways}) == len(ways)
    assert checkpoint_digest(checkpoint, [Lora(file, weight=0.5)]) == checkpoint_digest(checkpoint, ways[3])
    assert checkpoint_digest(save_wan(tmp_path / "copy.safetensors", wan_state(torch.float64))) == checkpoint_digest(
        checkpoint
    )


def test_several_are_merged(tmp_path: Path) -> None:
    for seed in (0, 1):
        save_file(spell("comfy", pairs(seed)), tmp_path / f"{seed}.safetensors")
    loras: list[Path | Lora] = [tmp_path / "0.safetensors", Lora(tmp_path / "1.safetensors", weight=-2.0, alpha=3.0)]
    state = adapted(pairs(1), -2.0 * 3.0 / RANK, adapted(pairs(0), 1.0, wan_state(torch.float64)))
    check(load_model(base(tmp_path), loras=loras), state, tmp_path)


def test_sums_are_rounded_once(tmp_path: Path) -> None:
    """In bfloat16 a small change would vanish if each were rounded by itself."""
    state = {name: torch.ones_like(tensor) for name, tensor in wan_state(torch.bfloat16).items()}
    save_wan(tmp_path / "base.safetensors", state)
    module, count = "blocks.0.self_attn.q", 8
    step = torch.full((CONFIG.dim, 1), 2.0**-9)
    for n in range(count):
        save_file(
            {f"{module}.lora_A.weight": torch.ones(1, CONFIG.dim), f"{module}.lora_B.weight": step}, tmp_path / f"{n}"
        )
    model = load_model(tmp_path / "base.safetensors", loras=[tmp_path / f"{n}" for n in range(count)])
    changed = model.get_parameter("blocks.0.self_attn.qkv.weight")[: CONFIG.dim]
    assert model.dtype == torch.bfloat16
    assert torch.equal(changed.float(), torch.full_like(changed.float(), 1 + count * 2.0**-9))


@pytest.mark.parametrize(("name", "pieces"), [("attn1.to_qkv", "qkv"), ("self_attn.qkv", "qkv"), ("attn2.to_kv", "kv")])
def test_fused_projections(tmp_path: Path, name: str, pieces: str) -> None:
    torch.manual_seed(0)
    down, up = torch.randn(RANK, CONFIG.dim), torch.randn(len(pieces) * CONFIG.dim, RANK)
    save_file({f"blocks.1.{name}.lora_A.weight": down, f"blocks.1.{name}.lora_B.weight": up}, tmp_path / "lora")
    side = "cross" if "2" in name else "self"
    changes = {f"blocks.1.{side}_attn.{letter}": (down, part) for letter, part in zip(pieces, up.chunk(len(pieces)))}
    check(
        load_model(base(tmp_path), loras=[tmp_path / "lora"]), adapted(changes, 1.0, wan_state(torch.float64)), tmp_path
    )


def test_differences_and_biases(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = wan_state(torch.float64)
    down, up = torch.randn(RANK, CONFIG.dim), torch.randn(CONFIG.dim, RANK)
    differences = {
        "blocks.0.norm3.diff": "blocks.0.norm3.weight",
        "blocks.0.norm3.diff_b": "blocks.0.norm3.bias",
        "blocks.0.cross_attn.norm_k.diff": "blocks.0.cross_attn.norm_k.weight",
        "blocks.1.modulation.diff": "blocks.1.modulation",
        "patch_embedding.diff": "patch_embedding.weight",
    }
    lora = {f"diffusion_model.{key}": torch.randn(state[name].shape) for key, name in differences.items()}
    for key, name in differences.items():
        state[name] = state[name] + 0.5 * lora[f"diffusion_model.{key}"]
    module = "blocks.0.self_attn.k"
    lora |= {
        f"{module}.lora_A.weight": down,
        f"{module}.lora_B.weight": up,
        f"{module}.lora_B.bias": torch.randn(CONFIG.dim),
    }
    lora[f"{module}.alpha"] = torch.tensor(ALPHA)
    state[f"{module}.bias"] = state[f"{module}.bias"] + 0.5 * ALPHA / RANK * lora[f"{module}.lora_B.bias"].double()
    save_file(lora, tmp_path / "lora")
    model = load_model(base(tmp_path), loras=[Lora(tmp_path / "lora", 0.5)])
    check(model, adapted({module: (down, up)}, 0.5 * ALPHA / RANK, state), tmp_path)


@pytest.mark.parametrize("where", ["folder", "metadata"])
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_tells_alpha(tmp_path: Path, where: str, rslora: bool) -> None:
    """One alpha for all, another for one module, in a folder's adapter_config.json or in diffusers' metadata."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    declared = {"r": RANK, "lora_alpha": ALPHA, "use_rslora": rslora, "alpha_pattern": {"blocks.0.self_attn.q": 1.0}}
    if where == "folder":
        (folder / "adapter_config.json").write_text(json.dumps(declared))
        metadata = None
    else:
        metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": v for key, v in declared.items()})}
    save_file(spell("peft", pairs()), folder / "adapter_model.safetensors", metadata)
    divisor = RANK**0.5 if rslora else RANK
    changes = pairs()
    one = {"blocks.0.self_attn.q": changes.pop("blocks.0.self_attn.q")}
    state = adapted(one, 1.0 / divisor, adapted(changes, ALPHA / divisor, wan_state(torch.float64)))
    check(load_model(base(tmp_path), loras=[folder]), state, tmp_path, 1e-9)


def unknown_module(lora: dict[str, Tensor]) -> None:
    lora["base_model.model.blocks.0.cross_attn.k_img.lora_A.weight"] = torch.zeros(RANK, CONFIG.dim)
    lora["base_model.model.blocks.0.cross_attn.k_img.lora_B.weight"] = torch.zeros(CONFIG.dim, RANK)


def unknown_layer(lora: dict[str, Tensor]) -> None:
    lora["blocks.7.ffn.0.lora_A.weight"] = torch.zeros(RANK, CONFIG.dim)
    lora["blocks.7.ffn.0.lora_B.weight"] = torch.zeros(CONFIG.ffn_dim, RANK)


def another_kind(lora: dict[str, Tensor]) -> None:
    lora["blocks.0.ffn.0.hada_w1_a"] = torch.zeros(2)


def unmerged(lora: dict[str, Tensor]) -> None:
    lora["blocks.0.ffn.0.oft_blocks"] = torch.zeros(2)


def half_a_pair(lora: dict[str, Tensor]) -> None:
    del lora["base_model.model.blocks.0.ffn.2.lora_B.weight"]


def alone(lora: dict[str, Tensor]) -> None:
    lora["blocks.0.ffn.0.alpha"] = torch.tensor(1.0)


def wrong_width(lora: dict[str, Tensor]) -> None:
    lora["base_model.model.blocks.0.ffn.2.lora_A.weight"] = torch.zeros(RANK, 7)


def wrong_rank(lora: dict[str, Tensor]) -> None:
    lora["base_model.model.blocks.0.ffn.2.lora_A.weight"] = torch.zeros(3, CONFIG.ffn_dim)


def no_rank(lora: dict[str, Tensor]) -> None:
    lora["base_model.model.blocks.0.ffn.2.lora_A.weight"] = torch.zeros(0, CONFIG.ffn_dim)
    lora["base_model.model.blocks.0.ffn.2.lora_B.weight"] = torch.zeros(CONFIG.dim, 0)


def whole_numbers(lora: dict[str, Tensor]) -> None:
    lora["base_model.model.blocks.0.ffn.2.lora_A.weight"] = torch.zeros(RANK, CONFIG.ffn_dim, dtype=torch.int8)


def nan(lora: dict[str, Tensor]) -> None:
    lora["base_model.model.blocks.0.ffn.2.lora_A.weight"][0, 0] = torch.nan


def two_adapters(lora: dict[str, Tensor]) -> None:
    lora["base_model.model.blocks.0.ffn.2.lora_A.second.weight"] = torch.zeros(RANK, CONFIG.ffn_dim)


def nothing(lora: dict[str, Tensor]) -> None:
    lora.clear()


@pytest.mark.parametrize("spelling", ["wan", "diffusers"])
def test_an_image_to_video_lora_is_merged_without_its_image_on_request(tmp_path: Path, spelling: str) -> None:
    """With keys of image tokens and a patch embedding of 36 channels where the model has 5: the others are merged."""
    save_wan(tmp_path / "model.safetensors", wan_state())
    changes = {name: pair for name, pair in pairs().items() if name != "patch_embedding"}
    both = {"wan": lambda m: m, "diffusers": in_diffusers}[spelling]
    image = {
        "wan": ("blocks.0.cross_attn.k_img", "blocks.1.cross_attn.v_img", "img_emb.proj.1"),
        "diffusers": (
            "blocks.0.attn2.add_k_proj",
            "blocks.1.attn2.add_v_proj",
            "condition_embedder.image_embedder.ff.net.2",
        ),
    }[spelling]
    lora = dict[str, Tensor]()
    for module, (down, up) in changes.items():
        lora |= {f"{both(module)}.lora_A.weight": down, f"{both(module)}.lora_B.weight": up}
    save_file(lora, tmp_path / "plain.safetensors")
    for module in image:
        lora |= {f"{module}.lora_A.weight": torch.ones(2, 36), f"{module}.lora_B.weight": torch.ones(36, 2)}
    patch = torch.ones(2, 36, 1, 2, 2)
    lora |= {"patch_embedding.lora_A.weight": patch, "patch_embedding.lora_B.weight": torch.ones(36, 2, 1, 1, 1)}
    file = tmp_path / "i2v.safetensors"
    save_file(lora, file)
    with pytest.raises(CheckpointError, match=r"an image-to-video LoRA: 8 of its keys .* FILE:no-image") as caught:
        load_model(tmp_path / "model.safetensors", loras=[file])
    assert "\n" not in str(caught.value)
    expected = load_model(
        tmp_path / "model.safetensors", loras=[Lora(tmp_path / "plain.safetensors", 0.5)]
    ).state_dict()
    for given in (Lora(file, 0.5, leave_out_image=True), Lora.of(f"{file}:0.5:no-image")):
        made = load_model(tmp_path / "model.safetensors", loras=[given]).state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in made.items())


@pytest.mark.parametrize(
    ("break_it", "told"),
    [
        (
            unknown_module,
            "an image-to-video LoRA: 2 of its keys are of layers that read an image, which the model has not",
        ),
        (unknown_layer, "2 keys of the LoRA fit no parameter of the model: blocks.7.ffn.0.lora_A.weight"),
        (another_kind, "blocks.0.ffn.0 has only hada_w1_a of hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b"),
        (unmerged, "holds an adapter of the kind OFT (blocks.0.ffn.0.oft_blocks), which is not merged"),
        (half_a_pair, "has only down of down and up"),
        (alone, "has only alpha of down and up"),
        (wrong_width, "lora_A.weight is (2, 7), base_model.model.blocks.0.ffn.2.lora_B.weight is (36, 2), which does"),
        (wrong_rank, "which does not fit"),
        (no_rank, "blocks.0.ffn.2 has rank 0, expected at least 1"),
        (whole_numbers, "is stored as I8"),
        (nan, "NaN or infinite for blocks.0.ffn.down.weight"),
        (two_adapters, "are the same twice"),
        (nothing, "holds no LoRA"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_does_not_fit_is_named(tmp_path: Path, break_it: Callable[[dict[str, Tensor]], None], told: str) -> None:
    lora = spell("peft", pairs())
    break_it(lora)
    save_file(lora, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_model(base(tmp_path), loras=[tmp_path / "lora.safetensors"])
    message = str(caught.value)
    assert told in message
    assert str(tmp_path / "lora.safetensors") in message
    assert "\n" not in message


def test_a_lora_is_no_model(tmp_path: Path) -> None:
    save_file(spell("peft", pairs()), tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match="a LoRA, to be given to load_model as one of `loras`"):
        load_model(tmp_path / "lora.safetensors")


def test_a_dora_without_magnitudes_is_refused(tmp_path: Path) -> None:
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.use_dora": True})}
    save_file(spell("diffusers", pairs()), tmp_path / "lora", metadata)
    with pytest.raises(CheckpointError, match="declares use_dora and holds no magnitudes"):
        load_model(base(tmp_path), loras=[tmp_path / "lora"])


@pytest.mark.parametrize("weight", [float("nan"), "much"])
def test_a_weight_is_a_number(weight: float) -> None:
    with pytest.raises(ConfigError, match="weight of a LoRA"):
        Lora("lora.safetensors", weight)


def test_a_weight_behind_the_file(tmp_path: Path) -> None:
    """FILE:WEIGHT, unless a file has the whole name."""
    assert Lora.of("a.safetensors") == Lora("a.safetensors")
    assert Lora.of("a.safetensors:0.8") == Lora("a.safetensors", 0.8)
    both = Lora("a.safetensors", 0.8, leave_out_image=True, expert="low-noise")
    assert Lora.of("a.safetensors:0.8:no-image:low-noise") == Lora.of("a.safetensors:0.8:low-noise:no-image") == both
    assert Lora.of(both) is both
    assert str(both) == "a.safetensors (weight 0.8, no image, low-noise)"
    assert Lora.of(f"{tmp_path}/b:c.safetensors:-1") == Lora(f"{tmp_path}/b:c.safetensors", -1.0)
    (tmp_path / "odd:2").touch()
    assert Lora.of(f"{tmp_path}/odd:2") == Lora(f"{tmp_path}/odd:2")
    for wrong in ("a.safetensors:", "a.safetensors:much", "a.safetensors:nan"):
        with pytest.raises(ConfigError, match=f"a LoRA is FILE or FILE:WEIGHT with a finite number, .* file {wrong}"):
            Lora.of(wrong)
