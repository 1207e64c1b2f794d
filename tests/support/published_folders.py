"""Small models in the folders and files in which people have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.support.checkpoints import wan_name
from tests.support.text_files import WIDTH, make_encoder, save_tokenizer


def wan_pipeline(folder: Path, flow_shift: float = 5.0) -> Any:
    """diffusers' own pipeline of small random parts, in the shapes of Wan 2.1."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import PreTrainedTokenizerFast

    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=WIDTH, freq_dim=16, ffn_dim=48, num_layers=2
    )
    for parameter in transformer.parameters():
        nn.init.normal_(parameter, std=0.2)
    vae = AutoencoderKLWan(base_dim=8, num_res_blocks=1)
    words = save_tokenizer(folder / "words") / "tokenizer.json"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(words), eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift)
    return WanPipeline(tokenizer, make_encoder(), vae, scheduler, transformer)


def save_checkpoint(folder: Path) -> Path:
    """Saves a folder's transformer beside the folder, as Self-Forcing's training leaves it."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel.from_pretrained(folder / "transformer")
    state = {f"model.{wan_name(name)}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"generator_ema": state, "config": {"num_heads": 2}}, folder.parent / "self_forcing_dmd.pt")
    (folder.parent / "config.json").write_text(json.dumps({"num_heads": 2}))
    return folder.parent / "self_forcing_dmd.pt"
