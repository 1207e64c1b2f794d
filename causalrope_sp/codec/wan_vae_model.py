"""The Wan VAE as a module: an encoder and a decoder of causal convolutions, with diffusers' names and layout of files.

Shapes: N = T·B frames with time outermost, C channels, H×W size.
"""

from __future__ import annotations

import json
from itertools import pairwise
from os import PathLike
from pathlib import Path

from torch import Tensor, nn

from causalrope_sp.codec.causal_conv import CausalConv, PointwiseConv, RMSNorm
from causalrope_sp.codec.conv_state import ConvCall
from causalrope_sp.codec.wan_vae_config import WanVaeConfig
from causalrope_sp.codec.wan_vae_layers import AttentionBlock, DownBlock, Downsample, MidBlock, ResidualBlock, UpBlock
from causalrope_sp.io.saved_tensors import save_tensors


class WanEncoder(nn.Module):
    """From pixel frames to the mean and logarithm of the variance of latent frames, before `quant_conv`."""

    def __init__(self, config: WanVaeConfig) -> None:
        super().__init__()
        widths = config.encoder_widths
        self.conv_in = CausalConv(config.in_channels, widths[0])
        self.down_blocks = nn.ModuleList(_down_blocks(config))
        self.mid_block = MidBlock(widths[-1])
        self.norm_out, self.conv_out = RMSNorm(widths[-1]), CausalConv(widths[-1], 2 * config.z_dim)

    def forward(self, x_NCHW: Tensor, call: ConvCall) -> Tensor:
        """Returns frames (N', 2·z_dim, H', W')."""
        x_NCHW = self.conv_in(x_NCHW, call)
        for layer in self.down_blocks:
            x_NCHW = layer(x_NCHW, call)
        return self.conv_out(self.mid_block(x_NCHW, call), call, self.norm_out)


class WanDecoder(nn.Module):
    """From latent frames, after `post_quant_conv`, to pixel frames."""

    def __init__(self, config: WanVaeConfig) -> None:
        super().__init__()
        widths = config.decoder_widths
        self.conv_in = CausalConv(config.z_dim, widths[0])
        self.mid_block = MidBlock(widths[0])
        self.up_blocks = nn.ModuleList()
        for stage, (wide, out) in enumerate(pairwise(widths)):
            halved = stage > 0 and not config.is_residual  # Wan 2.1 halves channels where it doubles the picture
            doubles = config.temporal_upsample[stage] if stage < len(widths) - 2 else None
            channels = wide // 2 if halved else wide
            self.up_blocks.append(UpBlock(channels, out, config.num_res_blocks + 1, doubles, config.is_residual))
        self.norm_out, self.conv_out = RMSNorm(widths[-1]), CausalConv(widths[-1], config.out_channels)

    def forward(self, x_NCHW: Tensor, call: ConvCall) -> Tensor:
        """Returns frames (N', out_channels, H', W')."""
        x_NCHW = self.mid_block(self.conv_in(x_NCHW, call), call)
        for block in self.up_blocks:
            x_NCHW = block(x_NCHW, call)
        return self.conv_out(x_NCHW, call, self.norm_out)

    def state_shapes(self, frames: int, batch: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """Computes what a stream keeps between two calls; see `Codec.decoder_state_shapes`."""
        shapes: dict[str, tuple[int, ...]] = {}
        for part in (self.conv_in, self.mid_block, *self.up_blocks, self.conv_out) if frames else ():
            upsample = part.upsample if isinstance(part, UpBlock) else None
            for module in part.modules():
                unused = frames == 1 and upsample is not None and module is upsample.time_conv
                if isinstance(module, CausalConv) and not unused:
                    shapes[module.key] = batch, module.in_channels, module.kept, height, width
            if upsample is not None:
                height, width = 2 * height, 2 * width
        return shapes


class WanVae(nn.Module):
    """The Wan VAE; its streams are in `wan_vae`.

    Args:
        config: its sizes.
    """

    def __init__(self, config: WanVaeConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = WanEncoder(config), WanDecoder(config)
        self.quant_conv = PointwiseConv(2 * config.z_dim, 2 * config.z_dim)
        self.post_quant_conv = PointwiseConv(config.z_dim, config.z_dim)
        for name, module in self.named_modules():
            if isinstance(module, CausalConv):
                module.key = name

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Writes a folder of diffusers' `AutoencoderKLWan`: config.json and one safetensors file.

        Args:
            folder: the folder, which is made if it does not exist.
        """
        home = Path(folder)
        home.mkdir(parents=True, exist_ok=True)
        declared = {"_class_name": "AutoencoderKLWan", **self.config.as_json()}
        (home / "config.json").write_text(json.dumps(declared, indent=2) + "\n")
        state = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_tensors(state, home / "diffusion_pytorch_model.safetensors", {"format": "pt"})


def _down_blocks(config: WanVaeConfig) -> list[nn.Module]:
    """The encoder's stages: Wan 2.2's as one module each, Wan 2.1's as a flat list of their layers."""
    widths, layers, scale = config.encoder_widths, list[nn.Module](), 1.0
    for stage, (channels, out) in enumerate(pairwise(widths)):
        halves = config.temperal_downsample[stage] if stage < len(widths) - 2 else None
        if config.is_residual:
            layers.append(DownBlock(channels, out, config.num_res_blocks, halves))
            continue
        for n in range(config.num_res_blocks):
            layers.append(ResidualBlock(out if n else channels, out))
            if scale in config.attn_scales:
                layers.append(AttentionBlock(out))
        if halves is not None:
            layers.append(Downsample(out, halves))
            scale /= 2
    return layers


def patchify(pixels_NCHW: Tensor, patch: int) -> Tensor:
    """Moves squares of `patch`×`patch` pixels into channels, columns before rows: (N, C·p·p, H/p, W/p)."""
    wide = pixels_NCHW.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))
    return wide.permute(0, 1, 5, 3, 2, 4).flatten(1, 3)


def unpatchify(x_NCHW: Tensor, patch: int) -> Tensor:
    """The inverse of `patchify`: (N, C/p/p, H·p, W·p)."""
    wide = x_NCHW.unflatten(1, (-1, patch, patch))
    return wide.permute(0, 1, 4, 3, 5, 2).flatten(4, 5).flatten(2, 3)
