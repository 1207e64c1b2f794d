"""DoRA, LoHa, LoKr and LoRA's scales, against PEFT's and LyCORIS's own arithmetic on a Wan transformer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris.modules.full import FullModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from causalrope_sp.errors import CheckpointError
from causalrope_sp.weights import Lora, inspect_adapter, load_model
from causalrope_sp.weights.adapter_file import AdapterFile
from causalrope_sp.weights.adapter_names import PREFIXES
from tests.support.checkpoints import CONFIG, diffusers_model, save_wan, wan_name, wan_state
from tests.support.shell import shell

R = 4
LINEARS = r".*blocks\.\d\.(attn[12]\.to_[qkv]|ffn\.net\.2)"


def randomized(model: nn.Module, parts: tuple[str, ...] = ("lora_", "hada_", "lokr_")) -> nn.Module:
    """Draws all parameters of adapters, of which some begin as zeros; magnitudes are moved by a tenth."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if "magnitude" in name or "dora_scale" in name:
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
            elif any(part in name for part in parts):
                nn.init.normal_(parameter, std=0.4)
    return model


def merged_by_peft(config: PeftConfig, folder: Path) -> dict[str, Tensor]:
    """Saves an adapter of a Wan transformer in float64 by PEFT; returns what PEFT merges, by Wan's names."""
    wrapped: Any = randomized(get_peft_model(diffusers_model(torch.float64), config).double())
    wrapped.save_pretrained(folder)
    merged = wrapped.merge_and_unload()
    return {wan_name(name): tensor.contiguous() for name, tensor in merged.state_dict().items()}


def base(folder: Path) -> Path:
    return save_wan(folder / "base.safetensors", wan_state(torch.float64))


def check(folder: Path, adapter: Path | Lora, wanted: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    """The model with the adapter merged has the wanted weights, and others than without it."""
    ours = load_model(base(folder), loras=[adapter]).state_dict()
    theirs = load_model(save_wan(folder / "wanted.safetensors", wanted)).state_dict()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=tolerance, atol=tolerance, msg=name)
    plain = load_model(folder / "base.safetensors").state_dict()
    assert any(not torch.allclose(tensor, plain[name], atol=1e-3) for name, tensor in ours.items())


PEFT_CONFIGS = {
    "LoRA": LoraConfig(r=R, lora_alpha=6, target_modules=LINEARS, lora_bias=True),
    "rsLoRA": LoraConfig(r=R, lora_alpha=6, target_modules=LINEARS, use_rslora=True),
    "LoRA by patterns": LoraConfig(
        r=R,
        lora_alpha=6,
        target_modules=LINEARS,
        rank_pattern={r"blocks\.0\..*to_q": 2},
        alpha_pattern={"1.attn1.to_q": 32, r"^blocks\.0\.ffn\.net\.2": 3, r".*attn2\.(to_k|to_v)": 5},
    ),
    "DoRA": LoraConfig(r=R, lora_alpha=6, target_modules=LINEARS, use_dora=True),
    "DoRA, convolution": LoraConfig(r=R, lora_alpha=6, target_modules=["patch_embedding", "to_q"], use_dora=True),
    "LoHa": LoHaConfig(r=R, alpha=6, target_modules=LINEARS),
    "LoHa by patterns": LoHaConfig(r=R, alpha=6, target_modules=LINEARS, alpha_pattern={"to_q": 9}),
    "LoKr": LoKrConfig(r=2, alpha=6, target_modules=LINEARS),
    "LoKr, two pairs": LoKrConfig(r=2, alpha=6, target_modules=LINEARS, decompose_both=True, decompose_factor=6),
    "LoKr, two whole": LoKrConfig(r=64, alpha=6, target_modules=LINEARS, rank_pattern={"to_v": 48}),
}


@pytest.mark.parametrize("name", PEFT_CONFIGS)
def test_peft_is_merged_as_by_peft(tmp_path: Path, name: str) -> None:
    config = PEFT_CONFIGS[name]
    wanted = merged_by_peft(config, tmp_path / "adapter")
    check(tmp_path, tmp_path / "adapter", wanted)
    kinds = inspect_adapter(tmp_path / "adapter")
    assert kinds is not None
    assert set(kinds.kinds) == {name.split(",")[0].split(" ")[0].replace("rsLoRA", "LoRA")}


class Linears(nn.Module):
    """The Linears of 12 blocks by Wan's names, without numbers."""

    def __init__(self) -> None:
        super().__init__()

        def attention() -> nn.ModuleDict:
            return nn.ModuleDict({letter: nn.Linear(8, 8, device="meta") for letter in "qkvo"})

        self.blocks = nn.ModuleList(
            nn.ModuleDict({"self_attn": attention(), "cross_attn": attention()}) for _ in range(12)
        )


@pytest.mark.parametrize(
    "patterns",
    [
        {"1.self_attn.q": 32},
        {r".*blocks\.3\..*\.(q|k|v|o)": 32},
        {r"blocks\.(0|1)\.self_attn\.q": 32},
        {r"^blocks\.2\.self_attn\.v": 32},
        {"self_attn.q": 8, "blocks.0.self_attn.q": 16},  # the first one that matches
        {"elf_attn.q": 8},  # not the end of a whole name
        {r"q|k": 8},
    ],
)
@pytest.mark.parametrize("where", ["folder", "diffusers' header", "torch file"])
def test_patterns_are_peft_s_regular_expressions(tmp_path: Path, patterns: dict[str, Any], where: str) -> None:
    """The scale of each of 96 modules is that of PEFT's own layer."""
    config = LoraConfig(r=R, lora_alpha=R, target_modules=["q", "k", "v", "o"], alpha_pattern=patterns)
    wrapped = get_peft_model(Linears(), config)
    scales = {
        name.removeprefix("base_model.model."): module.scaling["default"]
        for name, module in wrapped.named_modules()
        if hasattr(module, "scaling")
    }
    assert len(scales) == 96
    prefix = "transformer." if where == "diffusers' header" else "base_model.model."
    state = {f"{prefix}{name}.lora_A.weight": torch.ones(R, 8) for name in scales}
    state |= {f"{prefix}{name}.lora_B.weight": torch.ones(8, R) for name in scales}
    declared = {"r": R, "lora_alpha": R, "alpha_pattern": patterns}
    file = tmp_path / "adapter_model.safetensors"
    if where == "folder":
        (tmp_path / "adapter_config.json").write_text(json.dumps(declared))
        save_file(state, file)
    elif where == "torch file":
        file = tmp_path / "lora.pt"
        torch.save({"generator_lora": state, "lora_config": declared}, file)
    else:
        save_file(
            state, file, {"lora_adapter_metadata": json.dumps({f"transformer.{k}": declared[k] for k in declared})}
        )
    adapter = AdapterFile(file)
    assert {name: adapter.scale(change)[0] for name, change in adapter.changes.items()} == scales


def pair(module: str, rank: int = 8) -> dict[str, Tensor]:
    return {
        f"diffusion_model.{module}.lora_A.weight": torch.ones(rank, CONFIG.dim),
        f"diffusion_model.{module}.lora_B.weight": torch.ones(CONFIG.dim, rank),
    }


@pytest.mark.parametrize("name", ["alpha", "lora_alpha", "network_alpha"])
def test_alpha_in_the_header_alone(tmp_path: Path, name: str) -> None:
    """128 columns, alpha 8: the scale is 8/128; shown by `inspect`. An .alpha tensor comes before it."""
    save_file(pair("blocks.0.self_attn.q", 128), tmp_path / "lora.safetensors", {name: "8"})
    report = inspect_adapter(tmp_path / "lora.safetensors")
    assert report is not None
    assert report.scales == {(8 / 128, f"{name} in its header"): 1}
    shown = shell("inspect", tmp_path / "lora.safetensors", "--json")
    assert shown.exit_code == 0
    fields = json.loads(shown.output)
    assert fields["scales"] == [{"scale": 0.0625, "alpha": f"{name} in its header", "modules": 1}]
    assert (fields["adapter"], fields["ranks"]) == ({"LoRA": 1}, [128])
    state = wan_state(torch.float64)
    state["blocks.0.self_attn.q.weight"] += 8 / 128 * 128
    check(tmp_path, tmp_path / "lora.safetensors", state)
    more = pair("blocks.0.self_attn.q") | {"diffusion_model.blocks.0.self_attn.q.alpha": torch.tensor(4.0)}
    save_file(more, tmp_path / "lora.safetensors", {name: "8"})
    assert AdapterFile(tmp_path / "lora.safetensors").report().scales == {(0.5, "its .alpha tensors"): 1}


def test_the_order_of_what_says_alpha(tmp_path: Path) -> None:
    """Argument, .alpha tensors, declared configuration, header, rank; the log at loading names the scale."""
    state = pair("blocks.0.self_attn.q") | pair("blocks.1.self_attn.q")
    stored = {"diffusion_model.blocks.0.self_attn.q.alpha": torch.tensor(2.0)}
    header = {"alpha": "16"}
    config = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 4})}
    file = tmp_path / "lora.safetensors"

    def scales(tensors: dict[str, Tensor], metadata: dict[str, str], alpha: float | None = None) -> list[float]:
        save_file(tensors, file, metadata)
        adapter = AdapterFile(file, alpha)
        return [adapter.scale(change)[0] for change in adapter.changes.values()]

    assert scales(state, {}) == [1, 1]
    assert scales(state, header) == [2, 2]
    assert scales(state, header | config) == [0.5, 0.5]
    assert scales(state | stored, header | config) == [0.25, 0.5]
    assert scales(state | stored, header | config, 80.0) == [10, 10]
    torch.save({"lora": state, "alpha": 16, "rank": 8}, tmp_path / "lora.pt")
    assert set(AdapterFile(tmp_path / "lora.pt").report().scales) == {(2.0, "alpha in its header")}


def test_the_log_at_loading_says_the_scale(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file(pair("blocks.0.self_attn.q"), tmp_path / "lora.safetensors", {"alpha": "4"})
    with caplog.at_level("INFO", "causalrope_sp"):
        load_model(base(tmp_path), loras=[Lora(tmp_path / "lora.safetensors", 0.7)])
    (line,) = [record.getMessage() for record in caplog.records if "lora.safetensors" in record.getMessage()]
    told = "LoRA on 1 module; rank 8; scale 0.5 (alpha in its header) on 1 module, weight 0.7"
    assert line == f"{tmp_path / 'lora.safetensors'}: {told}"


@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        ({"alpha": "Dynamic"}, "alpha of blocks.0.self_attn.q must be a finite number, not Dynamic (alpha in its head"),
        ({"lora_alpha": "inf"}, "must be a finite number, not inf (lora_alpha in its header); give it as Lora(alpha=)"),
        ({"lora_adapter_metadata": '{"alpha_pattern": {"(": 2}}'}, "has (, which is no regular expression"),
        ({"lora_adapter_metadata": '{"alpha_pattern": [2]}'}, "declares an alpha_pattern that is no JSON object"),
    ],
)
def test_an_alpha_that_is_none_is_refused(tmp_path: Path, metadata: dict[str, str], told: str) -> None:
    save_file(pair("blocks.0.self_attn.q"), tmp_path / "lora.safetensors", metadata)
    with pytest.raises(CheckpointError) as caught:
        load_model(base(tmp_path), loras=[tmp_path / "lora.safetensors"])
    assert told in str(caught.value)


def effective(module: Any, org: Any) -> Tensor:
    """The weight that a LyCORIS module computes with: its outputs on the unit vectors of its inputs."""
    if isinstance(org, nn.Linear):
        return (module(torch.eye(org.in_features, dtype=torch.float64)) - org.bias).T
    count = org.weight[0].numel()
    units = torch.eye(count, dtype=torch.float64).reshape(count, *org.weight.shape[1:])
    return (module(units).reshape(count, -1) - org.bias).T.reshape(org.weight.shape)


LYCORIS: dict[str, tuple[Any, dict[str, Any]]] = {
    "locon": (LoConModule, {}),
    "locon, rsLoRA": (LoConModule, {"rs_lora": True}),
    "locon, tucker": (LoConModule, {"use_tucker": True}),
    "locon, DoRA": (LoConModule, {"weight_decompose": True}),
    "locon, DoRA of inputs": (LoConModule, {"weight_decompose": True, "wd_on_out": False}),
    "loha": (LohaModule, {}),
    "loha, tucker": (LohaModule, {"use_tucker": True}),
    "loha, DoRA": (LohaModule, {"weight_decompose": True}),
    "lokr": (LokrModule, {}),
    "lokr, tucker": (LokrModule, {"use_tucker": True}),
    "lokr, DoRA": (LokrModule, {"weight_decompose": True}),
    "lokr, two pairs": (LokrModule, {"decompose_both": True, "lora_dim": 2}),
    "lokr, two whole": (LokrModule, {"full_matrix": True}),
}


@pytest.mark.parametrize("spelling", ["lycoris_{}", "lora_unet_{}", "diffusion_model.{}"])
@pytest.mark.parametrize("name", LYCORIS)
def test_lycoris_is_merged_as_lycoris_computes(tmp_path: Path, name: str, spelling: str) -> None:
    kind, options = LYCORIS[name]
    wide = wan_state(torch.float64)
    modules = ["blocks.0.self_attn.k", "blocks.1.ffn.2"]
    if "of inputs" not in name:  # a norm for each input channel of a convolution is refused
        modules.append("patch_embedding")
    stored: dict[str, Tensor] = {}
    for module in modules:
        weight = wide[f"{module}.weight"]
        sizes: list[Any] = [weight.shape[1], weight.shape[0]]
        if weight.ndim == 5:
            sizes += [tuple(weight.shape[2:])] * 2
        org: nn.Module = nn.Linear(*sizes) if weight.ndim == 2 else nn.Conv3d(*sizes)
        org.load_state_dict({"weight": weight, "bias": wide[f"{module}.bias"]})
        made = kind("x", org.double(), **{"lora_dim": R, "alpha": 6.0, **options}).double()
        randomized(made)
        made.apply_to()
        spelled = spelling.format(module if "." in spelling else module.replace(".", "_"))
        stored |= {f"{spelled}.{key}": tensor.detach().contiguous() for key, tensor in made.custom_state_dict().items()}
        wide[f"{module}.weight"] = effective(made, org).detach().contiguous()
    save_file(stored, tmp_path / "lora.safetensors")
    check(tmp_path, tmp_path / "lora.safetensors", wide, tolerance=1e-6)  # LyCORIS adds an epsilon to DoRA's norms


def test_lycoris_differences_and_norms(tmp_path: Path) -> None:
    state = wan_state(torch.float64)
    torch.manual_seed(0)
    full = FullModule("x", nn.Linear(CONFIG.dim, CONFIG.dim).double()).double()
    norm = NormModule("x", nn.LayerNorm(CONFIG.dim).double()).double()
    stored = {}
    for name, made in (("lycoris_blocks_0_cross_attn_q", full), ("lycoris_blocks_1_norm3", norm)):
        for key, tensor in made.state_dict().items():
            if key in ("weight", "bias", "w_norm", "b_norm", "diff", "diff_b"):
                key = {"weight": "diff", "bias": "diff_b"}.get(key, key)
                stored[f"{name}.{key}"] = torch.randn_like(tensor)
    assert {key.rpartition(".")[2] for key in stored} == {"diff", "diff_b", "w_norm", "b_norm"}
    state["blocks.0.cross_attn.q.weight"] += stored["lycoris_blocks_0_cross_attn_q.diff"]
    state["blocks.0.cross_attn.q.bias"] += stored["lycoris_blocks_0_cross_attn_q.diff_b"]
    state["blocks.1.norm3.weight"] += stored["lycoris_blocks_1_norm3.w_norm"]
    state["blocks.1.norm3.bias"] += stored["lycoris_blocks_1_norm3.b_norm"]
    save_file(stored, tmp_path / "lora.safetensors")
    check(tmp_path, tmp_path / "lora.safetensors", state)


def test_a_weight_scales_the_whole_change_of_a_dora(tmp_path: Path) -> None:
    """As ComfyUI does: W + weight · (W' - W), W' being the weight as trained."""
    wanted = merged_by_peft(PEFT_CONFIGS["DoRA"], tmp_path / "adapter")
    plain = wan_state(torch.float64)
    half = {key: plain[key] + 0.5 * (tensor - plain[key]) for key, tensor in wanted.items()}
    check(tmp_path, Lora(tmp_path / "adapter", 0.5), half)


@pytest.mark.parametrize("layout", ["wan", "diffusers"])
def test_modulations_of_lightx2v(tmp_path: Path, layout: str) -> None:
    """Its extractor writes `diff_m` for what ends in .modulation, of blocks and of the head."""
    state = wan_state(torch.float64)
    torch.manual_seed(0)
    changes = {key: torch.randn_like(state[key]) for key in ("blocks.1.modulation", "head.modulation")}
    save_file(
        {f"diffusion_model.{key.removesuffix('modulation')}diff_m": tensor for key, tensor in changes.items()},
        tmp_path / "lora.safetensors",
    )
    for key, tensor in changes.items():
        state[key] = state[key] + 0.5 * tensor
    check(tmp_path, Lora(tmp_path / "lora.safetensors", 0.5), state)
    if layout == "diffusers":
        diffusers_model(torch.float64).save_pretrained(tmp_path / "folder")
        ours = load_model(tmp_path / "folder", loras=[Lora(tmp_path / "lora.safetensors", 0.5)])
        assert math.isclose(float(ours.head.modulation.sum()), float(state["head.modulation"].sum()), rel_tol=1e-9)


@pytest.mark.parametrize("prefix", [*PREFIXES, "", "base_model.model.model.", "model._fsdp_wrapped_module."])
@pytest.mark.parametrize("layout", ["wan", "diffusers"])
@pytest.mark.parametrize("dots", [True, False])
def test_every_prefix_over_either_layout(tmp_path: Path, prefix: str, layout: str, dots: bool) -> None:
    """Modules with dots, or with kohya's underscores; musubi-tuner's files have dots after an underscore."""
    torch.manual_seed(0)
    names = {wan_name(name): name for name in diffusers_model().state_dict()} if layout == "diffusers" else {}
    state, stored = wan_state(torch.float64), dict[str, Tensor]()
    for module in ("blocks.0.cross_attn.o", "blocks.1.ffn.0", "head.head", "time_projection.1"):
        weight = state[f"{module}.weight"]
        down, up = torch.randn(R, weight.shape[1]).double(), torch.randn(weight.shape[0], R).double()
        own = names.get(f"{module}.weight", f"{module}.weight").removesuffix(".weight")
        spelled = prefix + (own if dots else own.replace(".", "_"))
        stored |= {f"{spelled}.lora_down.weight": down, f"{spelled}.lora_up.weight": up}
        state[f"{module}.weight"] = weight + up @ down
    save_file(stored, tmp_path / "lora.safetensors")
    check(tmp_path, tmp_path / "lora.safetensors", state)


@pytest.mark.parametrize("key", ["diff", "diff_b", "dora_scale", "hada_w1_a", "lokr_w1", "w_norm"])
def test_any_adapter_key_makes_a_file_an_adapter(tmp_path: Path, key: str) -> None:
    state = pair("blocks.0.self_attn.q") | {f"diffusion_model.blocks.0.norm3.{key}": torch.zeros(CONFIG.dim)}
    save_file(state, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match="a LoRA, to be given to load_model as one of `loras`"):
        load_model(tmp_path / "lora.safetensors")


def test_a_model_with_an_unmerged_lora_is_named(tmp_path: Path) -> None:
    wrapped = get_peft_model(diffusers_model(), PEFT_CONFIGS["LoRA"])
    save_file({name: tensor.contiguous() for name, tensor in wrapped.state_dict().items()}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"a model with a LoRA that is not merged .*base_layer.*merge_and_unload"):
        load_model(tmp_path / "m.safetensors")


def test_inspect_shows_whose_names_an_adapter_has(tmp_path: Path) -> None:
    save_file(
        pair("blocks.0.self_attn.q") | {"lora_unet__blocks_0_self_attn_k.diff_b": torch.zeros(CONFIG.dim)},
        tmp_path / "lora.safetensors",
    )
    shown = shell("inspect", tmp_path / "lora.safetensors")
    assert shown.exit_code == 0
    assert "diffusion_model. (ComfyUI, diffusion-pipe, ai-toolkit, LightX2V)" in shown.output
    assert "lora_unet__ (VideoX-Fun)" in shown.output
    assert "LoRA = 1" in shown.output
    assert "difference = 1" in shown.output


MODULES = [f"blocks.{n}.{side}_attn.{letter}" for n in range(2) for side in ("self", "cross") for letter in "qkvo"]
MODULES += [f"blocks.{n}.ffn.{layer}" for n in range(2) for layer in (0, 2)]


@pytest.mark.parametrize("alpha", [None, 3.0])
@pytest.mark.parametrize("spelling", ["lora_unet_{}", "diffusion_model.{}"])
def test_other_trainers_files_as_diffusers_converts_and_merges_them(
    tmp_path: Path, spelling: str, alpha: float | None
) -> None:
    """musubi-tuner's and ComfyUI's names, by diffusers' own converter and PEFT."""
    from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin

    torch.manual_seed(0)
    stored: dict[str, Tensor] = {}
    for module in MODULES:
        out, into = wan_state()[f"{module}.weight"].shape
        name = spelling.format(module if "." in spelling else module.replace(".", "_"))
        stored |= {f"{name}.lora_down.weight": torch.randn(R, into), f"{name}.lora_up.weight": torch.randn(out, R)}
        if alpha is not None or "." not in spelling:  # musubi-tuner's files have alpha, and diffusers asks for it
            stored[f"{name}.alpha"] = torch.tensor(alpha or float(R))
    save_file(stored, tmp_path / "lora.safetensors")
    theirs: Any = diffusers_model(torch.float64)
    theirs.load_lora_adapter(WanLoraLoaderMixin.lora_state_dict(tmp_path / "lora.safetensors"), prefix="transformer")
    theirs.double().fuse_lora()
    theirs.unload_lora()
    wanted = {wan_name(name): tensor.contiguous() for name, tensor in theirs.state_dict().items()}
    check(tmp_path, tmp_path / "lora.safetensors", wanted, tolerance=1e-5)  # diffusers scales in float32


def test_what_diffusers_saves_with_its_metadata(tmp_path: Path) -> None:
    """`save_lora_weights` puts PEFT's configuration, with its patterns, into the file's header."""
    from diffusers import WanPipeline
    from peft.utils import get_peft_model_state_dict

    config = PEFT_CONFIGS["LoRA by patterns"]
    theirs: Any = diffusers_model(torch.float64)
    theirs.add_adapter(config)
    randomized(theirs.double())
    metadata = {**config.to_dict(), "target_modules": LINEARS}
    WanPipeline.save_lora_weights(
        tmp_path, get_peft_model_state_dict(theirs), transformer_lora_adapter_metadata=metadata
    )
    theirs.fuse_lora()
    theirs.unload_lora()
    wanted = {wan_name(name): tensor.contiguous() for name, tensor in theirs.state_dict().items()}
    check(tmp_path, tmp_path / "pytorch_lora_weights.safetensors", wanted)
    report = inspect_adapter(tmp_path / "pytorch_lora_weights.safetensors")
    assert report is not None
    assert {source for _, source in report.scales} == {"the adapter's configuration"}
    assert len(report.scales) > 2


def test_many_ranks_and_scales_are_spans(tmp_path: Path) -> None:
    """As of LoRAs whose ranks were chosen module by module."""
    state: dict[str, Tensor] = {}
    for number, module in enumerate(MODULES[:8], 1):
        state |= pair(module, number)
    save_file(state, tmp_path / "lora.safetensors", {"alpha": "4"})
    told = "LoRA on 8 modules; rank 1 to 8; scale 0.5 to 4 (alpha in its header)"
    assert str(inspect_adapter(tmp_path / "lora.safetensors")) == f"{tmp_path / 'lora.safetensors'}: {told}"


def test_a_file_that_has_a_model_too_is_a_model(tmp_path: Path) -> None:
    torch.save({"generator": wan_state(), "generator_lora": pair("blocks.0.self_attn.q")}, tmp_path / "m.pt")
    assert inspect_adapter(tmp_path / "m.pt") is None
    torch.save({"generator_lora": pair("blocks.0.self_attn.q"), "critic_lora": {}}, tmp_path / "lora.pt")
    assert inspect_adapter(tmp_path / "lora.pt") is not None


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_a_lora_of_another_base_model_is_refused(tmp_path: Path, start: str) -> None:
    """PEFT takes a part out of the base weights when training begins, so the adapter belongs to what is left."""
    config = LoraConfig(r=R, lora_alpha=R, target_modules=LINEARS, init_lora_weights=start)
    get_peft_model(diffusers_model(), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=rf"changed the base model at the start \(init_lora_weights {start}\)"):
        load_model(base(tmp_path), loras=[tmp_path / "adapter"])


def test_a_variant_of_lora_is_refused(tmp_path: Path) -> None:
    header = {"lora_adapter_metadata": json.dumps({"transformer.alora_invocation_tokens": [1, 2]})}
    save_file(pair("blocks.0.self_attn.q"), tmp_path / "lora.safetensors", header)
    with pytest.raises(CheckpointError, match=r"a variant of LoRA .* \(it declares alora_invocation_tokens\)"):
        load_model(base(tmp_path), loras=[tmp_path / "lora.safetensors"])
