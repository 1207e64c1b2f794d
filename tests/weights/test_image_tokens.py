"""Image tokens in cross-attention, as Wan 2.1's image-to-video models have them, against diffusers' own forward."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor, nn

from causalrope_kernels.reference import attention, project
from causalrope_sp import CausalDiT, CheckpointError, LatentGrid
from causalrope_sp.grid import Shard
from causalrope_sp.models.block import ForwardPass
from causalrope_sp.models.rope import RotaryTables
from causalrope_sp.weights import inspect_checkpoint, load_model, save_diffusers, save_model
from tests.support.checkpoints import wan_name

IMAGE_DIM, TOKENS = 14, 5
KNOWN_NAMES = (  # of Wan's own file
    *("img_emb.proj.0.weight", "img_emb.proj.1.bias", "img_emb.proj.3.weight", "img_emb.proj.4.bias"),
    *("blocks.1.cross_attn.k_img.weight", "blocks.0.cross_attn.v_img.bias", "blocks.0.cross_attn.norm_k_img.weight"),
)


@pytest.fixture(scope="module")
def theirs() -> WanTransformer3DModel:
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=36,
        out_channels=16,
        text_dim=10,
        freq_dim=8,
        ffn_dim=40,
        num_layers=2,
        image_dim=IMAGE_DIM,
        added_kv_proj_dim=24,
        rope_max_seq_len=16,
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False)


def save(model: WanTransformer3DModel, layout: str, folder: Path) -> Path:
    if layout == "diffusers":
        model.save_pretrained(folder)
        return folder
    state = {wan_name(name): tensor.contiguous() for name, tensor in model.state_dict().items()}
    assert set(KNOWN_NAMES) <= state.keys()
    save_file(state, folder / "model.safetensors", {"config": json.dumps({"num_heads": 2})})
    return folder / "model.safetensors"


def forward(model: CausalDiT, latents_BCFHW: Tensor, text: Tensor, image: Tensor) -> Tensor:
    latents = latents_BCFHW.transpose(1, 2)
    frames = latents.shape[1]
    grid = LatentGrid.from_latent(*latents.shape[-2:])
    rotation = RotaryTables(model.config.head_dim, 10000.0, Shard(grid), model.device, model.dtype).rotation(
        range(frames)
    )
    step = ForwardPass(
        timesteps_F=torch.full((frames,), 700.0),
        predicted_frames=frames,
        rotation=rotation,
        text=model.encode_text(text, image),
        attend=lambda layer, projection: attention(*project(projection)),
    )
    tokens = model(grid.patchify(latents).flatten(1, 2), step)
    return grid.unpatchify(tokens.unflatten(1, (frames, -1))).transpose(1, 2)


@pytest.mark.parametrize("layout", ["wan", "diffusers"])
def test_a_forward_is_diffusers_own(theirs: WanTransformer3DModel, layout: str, tmp_path: Path) -> None:
    file = save(theirs, layout, tmp_path)
    report = inspect_checkpoint(file)
    assert report.problem is None
    assert (report.config.image_dim, report.config.in_channels, report.config.control_channels) == (IMAGE_DIM, 16, 20)
    generator = torch.Generator().manual_seed(1)
    latents, text, image = (
        torch.randn(shape, generator=generator) for shape in ((1, 36, 2, 4, 6), (1, 512, 10), (1, TOKENS, IMAGE_DIM))
    )
    expected = theirs(latents, torch.tensor([700.0]), text, image, return_dict=False)[0]
    model = load_model(file)
    made = forward(model, latents, text, image)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
    assert float((forward(model, latents, text, -image) - made).abs().max()) > 0.01
    save_model(model, tmp_path / "own.safetensors")
    again = load_model(tmp_path / "own.safetensors")
    assert again.config == model.config
    assert torch.equal(forward(again, latents, text, image), made)
    save_diffusers(model, tmp_path / "folder")
    back = WanTransformer3DModel.from_pretrained(tmp_path / "folder")
    assert torch.equal(back(latents, torch.tensor([700.0]), text, image, return_dict=False)[0], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_of_image_tokens_compute_in_float32(
    theirs: WanTransformer3DModel, dtype: torch.dtype, tmp_path: Path
) -> None:
    """As diffusers keeps them; in 16 bits both err alike against float32."""
    theirs.save_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(1)
    image = 30 * torch.randn((1, TOKENS, IMAGE_DIM), generator=generator)
    exact = theirs.condition_embedder.image_embedder(image)
    judge = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=dtype).condition_embedder.image_embedder
    model = load_model(tmp_path, dtype=dtype)
    assert model.image_embedding[0].weight.dtype == judge.norm1.weight.dtype == torch.float32
    error = (model._embed_image(image).float() - exact).norm()
    assert error <= 2 * (judge(image.to(dtype)).float() - exact).norm()


def test_a_missing_tensor_of_image_tokens_is_named(theirs: WanTransformer3DModel, tmp_path: Path) -> None:
    state = {wan_name(name): tensor.contiguous() for name, tensor in theirs.state_dict().items()}
    del state["blocks.1.cross_attn.v_img.bias"]
    save_file(state, tmp_path / "model.safetensors", {"config": json.dumps({"num_heads": 2})})
    with pytest.raises(CheckpointError, match=r"1 missing: blocks\.1\.cross_attn\.v_img\.bias$"):
        load_model(tmp_path / "model.safetensors")
