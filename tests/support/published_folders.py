"""Small models in the folders and files in which people have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

from causalrope_sp import CausalVideoPipeline, SequenceParallel
from causalrope_sp.codec.wan_vae_config import WAN_2_2
from causalrope_sp.pipeline.session import Session
from tests.support.checkpoints import wan_name
from tests.support.text_files import WIDTH, make_encoder, save_tokenizer, save_wan


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


def ti2v_pipeline(folder: Path) -> Any:
    """diffusers' own pipeline of small random parts, in the shapes of Wan 2.2's TI2V-5B: 48 channels and stride 16."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    pipe = wan_pipeline(folder)
    torch.manual_seed(1)
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=48,
        out_channels=48,
        text_dim=WIDTH,
        freq_dim=16,
        ffn_dim=48,
        num_layers=2,
    )
    for parameter in transformer.parameters():
        nn.init.normal_(parameter, std=0.2)
    vae = AutoencoderKLWan.from_config({**WAN_2_2.as_json(), "base_dim": 4, "decoder_base_dim": 6, "num_res_blocks": 1})
    return type(pipe)(pipe.tokenizer, pipe.text_encoder, vae, pipe.scheduler, transformer, expand_timesteps=True)


def experts_pipeline(folder: Path, boundary_ratio: float = 0.9) -> Any:
    """diffusers' own pipeline of small random parts with two transformers, as Wan 2.2's A14B has them."""
    pipe = wan_pipeline(folder)
    torch.manual_seed(2)
    second = type(pipe.transformer)(**pipe.transformer.config)
    for parameter in second.parameters():
        nn.init.normal_(parameter, std=0.2)
    return type(pipe)(**{**pipe.components, "transformer_2": second}, boundary_ratio=boundary_ratio)


def i2v_pipeline(folder: Path, *, experts: bool = False, image_tokens: bool = False) -> Any:
    """diffusers' own image-to-video pipeline of small random parts.

    Args:
        folder: where the words of the tokenizer are saved.
        experts: with two transformers, in the shapes of Wan 2.2's I2V-A14B.
        image_tokens: with a CLIP encoder whose tokens cross-attention reads, as Wan 2.1's I2V models have it.
    """
    from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    pipe, transformers, size = wan_pipeline(folder), [], {"in_channels": 36, "out_channels": 16}
    encoder, processor = None, None
    if image_tokens:
        small = {"hidden_size": 20, "intermediate_size": 28, "num_hidden_layers": 3, "num_attention_heads": 2}
        encoder = CLIPVisionModel(CLIPVisionConfig(**small, image_size=16, patch_size=8)).eval()
        processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
        size |= {"image_dim": 20, "added_kv_proj_dim": 24}
    for seed in range(1 + experts):
        torch.manual_seed(seed)
        model = WanTransformer3DModel(**{**pipe.transformer.config, **size})
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
        transformers.append(model)
    parts = {**pipe.components, "transformer": transformers[0], "image_encoder": encoder, "image_processor": processor}
    second = {"transformer_2": transformers[1], "boundary_ratio": 0.9} if experts else {}
    return WanImageToVideoPipeline(**{**parts, **second})


def latents_on_ranks(group: dist.ProcessGroup, device: str, folder: str, load: Any, call: Any) -> Any:
    """The latents of a call on every rank.

    Args:
        group: the ranks.
        device: where they compute.
        folder: the model's folder.
        load: options of loading, and `cfg` of the mesh.
        call: the prompt and the options of the call.
    """
    parallel = SequenceParallel(group, "auto", device, cfg=load.pop("cfg", 1))
    pipe = CausalVideoPipeline.from_pretrained(folder, parallel=parallel, **load)
    return pipe(output_type="latent", **call).frames


def shown(session: Session) -> np.ndarray:
    """The frames of the next chunk."""
    frames = next(session).frames
    assert frames is not None
    return frames


def save_wan_folder(pipe: Any, folder: Path, **config: Any) -> Path:
    """Saves the parts of a TI2V pipeline as Wan's own folder has them: its names, files and config.json."""
    from tests.codec.test_codec_weights import under_wan_names

    folder.mkdir()
    save_wan(folder, pipe.text_encoder)  # with stand-ins of the other files
    (folder / "Wan2.1_VAE.pth").unlink()
    state = {wan_name(name): tensor.contiguous() for name, tensor in pipe.transformer.state_dict().items()}
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(under_wan_names(pipe.vae), folder / "Wan2.2_VAE.pth")
    return folder


def save_checkpoint(folder: Path) -> Path:
    """Saves a folder's transformer beside the folder, as Self-Forcing's training leaves it."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel.from_pretrained(folder / "transformer")
    state = {f"model.{wan_name(name)}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"generator_ema": state, "config": {"num_heads": 2}}, folder.parent / "self_forcing_dmd.pt")
    (folder.parent / "config.json").write_text(json.dumps({"num_heads": 2}))
    return folder.parent / "self_forcing_dmd.pt"
