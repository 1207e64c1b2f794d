"""Small checkpoints for the tests of weights, and one pass of the model that they make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from causalrope_kernels.reference import attention, project
from causalrope_sp.config import DiTConfig
from causalrope_sp.grid import LatentGrid, Shard
from causalrope_sp.models.block import ForwardPass
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.models.rope import RotaryTables

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

CONFIG = DiTConfig(dim=36, ffn_dim=40, num_heads=3, num_layers=2, text_dim=10, freq_dim=8, in_channels=5)

# diffusers' names and Wan's, from diffusers' own conversion of the published checkpoints. Order matters.
TO_WAN = (
    ("condition_embedder.image_embedder.norm1", "img_emb.proj.0"),
    ("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1"),
    ("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3"),
    ("condition_embedder.image_embedder.norm2", "img_emb.proj.4"),
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("proj_out", "head.head"),
    ("scale_shift_table", "modulation"),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
    (".norm2.", ".norm3."),
    ("attn1", "self_attn"),
    ("attn2", "cross_attn"),
    ("to_out.0", "o"),
    (".to_q.", ".q."),
    (".to_k.", ".k."),
    (".to_v.", ".v."),
    ("add_k_proj", "k_img"),
    ("add_v_proj", "v_img"),
    ("norm_added_k", "norm_k_img"),
)


def wan_name(name: str) -> str:
    for diffusers, wan in TO_WAN:
        name = name.replace(diffusers, wan)
    return "head.modulation" if name == "modulation" else name


def diffusers_model(dtype: torch.dtype = torch.float32) -> WanTransformer3DModel:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=CONFIG.num_heads,
        attention_head_dim=CONFIG.head_dim,
        in_channels=CONFIG.in_channels,
        out_channels=CONFIG.in_channels,
        text_dim=CONFIG.text_dim,
        freq_dim=CONFIG.freq_dim,
        ffn_dim=CONFIG.ffn_dim,
        num_layers=CONFIG.num_layers,
        rope_max_seq_len=16,
    ).to(dtype)
    for parameter in model.parameters():  # norms and biases too, which otherwise hide a swap behind ones and zeros
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


class Sinusoid64(nn.Module):
    """diffusers computes this embedding in float32 only."""

    def forward(self, timesteps: Tensor) -> Tensor:
        half = CONFIG.freq_dim // 2
        angles = timesteps.double()[:, None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        return torch.cat([angles.cos(), angles.sin()], 1)


def wan_state(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {wan_name(name): tensor.contiguous() for name, tensor in diffusers_model(dtype).state_dict().items()}


def save_wan(file: Path, state: dict[str, Tensor], num_heads: int | None = CONFIG.num_heads) -> Path:
    save_file(state, file, {"config": json.dumps({"num_heads": num_heads})} if num_heads else None)
    return file


def run(model: CausalDiT, latents_1CFHW: Tensor, timesteps_F: Tensor, text_1LE: Tensor) -> Tensor:
    """One pass of one chunk in which every token attends every other."""
    latents = latents_1CFHW.transpose(1, 2)
    frames = latents.shape[1]
    grid = LatentGrid.from_latent(*latents.shape[-2:])
    tables = RotaryTables(model.config.head_dim, model.config.theta, Shard(grid), model.device, model.dtype)
    step = ForwardPass(
        timesteps_F=timesteps_F,
        predicted_frames=frames,
        rotation=tables.rotation(range(frames)),
        text=model.encode_text(text_1LE),
        attend=lambda layer, projection: attention(*project(projection)),
    )
    tokens = model(grid.patchify(latents).flatten(1, 2), step)
    return grid.unpatchify(tokens.unflatten(1, (frames, -1))).transpose(1, 2)
