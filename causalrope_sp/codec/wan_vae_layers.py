"""The blocks of the Wan VAE. Modules have diffusers' names, so that weights are stored under the same keys.

Shapes: B batch, C channels, H×W size. N = T·B frames with time outermost.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from causalrope_sp.codec.causal_conv import CausalConv, PointwiseConv, RMSNorm, UpsampleConv, convolve
from causalrope_sp.codec.conv_state import ConvCall


class ResidualBlock(nn.Module):
    """Two causal convolutions, each after a norm and SiLU, beside a shortcut."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = RMSNorm(channels), CausalConv(channels, out)
        self.norm2, self.conv2 = RMSNorm(out), CausalConv(out, out)
        self.conv_shortcut = PointwiseConv(channels, out) if channels != out else nn.Identity()

    def forward(self, x_NCHW: Tensor, call: ConvCall) -> Tensor:
        """Returns the block's output; the input may be overwritten."""
        shortcut = self.conv_shortcut(x_NCHW)
        return self.conv2(self.conv1(x_NCHW, call, self.norm1), call, self.norm2, shortcut)


class AttentionBlock(nn.Module):
    """Attention of one head within each frame. On spatial shards, keys and values of the whole frame are gathered."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, axes=2)
        self.to_qkv, self.proj = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x_NCHW: Tensor, call: ConvCall) -> Tensor:
        """Returns the block's output, of the shape of its input."""
        normed, channels = self.norm(x_NCHW), x_NCHW.shape[1]
        weight, bias = self.to_qkv.weight, self.to_qkv.bias
        assert bias is not None
        if call.spatial_shards is None:
            parts = convolve(normed, weight, bias).chunk(3, 1)
        else:
            q = convolve(normed, weight[:channels], bias[:channels])
            whole = call.spatial_shards.whole(normed)
            parts = (q, *convolve(whole, weight[channels:], bias[channels:]).chunk(2, 1))
        qkv = [part.flatten(2).transpose(1, 2).unsqueeze(1).contiguous().chunk(call.latent_frames) for part in parts]
        # One call a latent frame: torch orders the additions of a frame by how many there are.
        attended = torch.cat([functional.scaled_dot_product_attention(*each) for each in zip(*qkv, strict=True)])
        made = attended.flatten(0, 2).view(len(x_NCHW), *x_NCHW.shape[2:], channels).permute(0, 3, 1, 2)
        return x_NCHW + convolve(made, self.proj.weight, self.proj.bias)


class MidBlock(nn.Module):
    """A residual block, an attention, a residual block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([AttentionBlock(channels)])
        self.resnets = nn.ModuleList([ResidualBlock(channels, channels), ResidualBlock(channels, channels)])

    def forward(self, x_NCHW: Tensor, call: ConvCall) -> Tensor:
        """Returns the block's output, of the shape of its input, which may be overwritten."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x_NCHW, call), call), call)


class Upsample(nn.Module):
    """Doubles a picture's sides and, if asked for, its frames: all but the stream's first latent frame."""

    def __init__(self, channels: int, out: int, doubles_time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.Identity(), UpsampleConv(channels, out))
        self.time_conv = CausalConv(channels, 2 * channels, (3, 1, 1)) if doubles_time else None

    def forward(self, x_NCHW: Tensor, call: ConvCall) -> Tensor:
        """Returns frames of twice the size."""
        if self.time_conv is not None and not call.first:
            x_NCHW = _doubled(self.time_conv(x_NCHW, call), call.batch)
        convolution = self.resample[1]
        assert isinstance(convolution, UpsampleConv)
        return convolution.upsample(x_NCHW, call)


class Downsample(nn.Module):
    """Halves a picture's sides and, if asked for, its frames: all but the stream's first one."""

    def __init__(self, channels: int, halves_time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.Identity(), nn.Conv2d(channels, channels, 3, stride=2))
        self.time_conv = CausalConv(channels, channels, (3, 1, 1), time_stride=2) if halves_time else None

    def forward(self, x_NCHW: Tensor, call: ConvCall) -> Tensor:
        """Returns frames of half the size."""
        convolution = self.resample[1]
        assert isinstance(convolution, nn.Conv2d)
        x_NCHW = convolve(functional.pad(x_NCHW, (0, 1, 0, 1)), convolution.weight, convolution.bias, stride=2)
        if self.time_conv is None:
            return x_NCHW
        if call.first:  # read again by the next call, but not convolved
            self.time_conv.remember(x_NCHW, call)
            return x_NCHW
        return self.time_conv(x_NCHW, call)


class UpBlock(nn.Module):
    """A stage of the decoder. Wan 2.2's has a shortcut that repeats channels over the larger picture.

    Args:
        channels: input channels.
        out: channels of the residual blocks.
        blocks: residual blocks.
        doubles: None in the last stage; in others, whether frames are doubled too.
        shortcut: whether the stage is one of Wan 2.2's.
    """

    def __init__(self, channels: int, out: int, blocks: int, doubles: bool | None, shortcut: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(out if n else channels, out) for n in range(blocks)])
        self.out, self.upsampler, self.upsamplers = out, None, None
        self.time_factor = 2 if doubles else 1
        self.has_shortcut = shortcut and doubles is not None
        if doubles is not None and shortcut:
            self.upsampler = Upsample(out, out, doubles)
        elif doubles is not None:
            self.upsamplers = nn.ModuleList([Upsample(out, out // 2, doubles)])

    @property
    def upsample(self) -> Upsample | None:
        """The layer that doubles the picture, if the stage has one."""
        layer = self.upsampler if self.upsamplers is None else self.upsamplers[0]
        assert layer is None or isinstance(layer, Upsample)
        return layer

    def forward(self, x_NCHW: Tensor, call: ConvCall) -> Tensor:
        """Returns the stage's output; the input may be overwritten."""
        shortcut = self._repeated(x_NCHW, call) if self.has_shortcut else None
        for block in self.resnets:
            x_NCHW = block(x_NCHW, call)
        if self.upsample is not None:
            x_NCHW = self.upsample(x_NCHW, call)
        return x_NCHW if shortcut is None else x_NCHW + shortcut

    def _repeated(self, x_NCHW: Tensor, call: ConvCall) -> Tensor:
        """Repeats channels and moves them into time, height and width; diffusers' `DupUp3D`."""
        factors = self.time_factor, 2, 2
        repeats = self.out * 4 * self.time_factor // x_NCHW.shape[1]
        wide = x_NCHW.unflatten(0, (-1, call.batch)).repeat_interleave(repeats, 2).unflatten(2, (self.out, *factors))
        batch, height, width = call.batch, *x_NCHW.shape[-2:]
        made = wide.permute(0, 3, 1, 2, 6, 4, 7, 5).reshape(-1, self.out, 2 * height, 2 * width)
        return made[(self.time_factor - 1) * batch :] if call.first else made


class DownBlock(nn.Module):
    """A stage of Wan 2.2's encoder, with a shortcut that averages over the larger picture.

    Args:
        channels: input channels.
        out: channels of the residual blocks.
        blocks: residual blocks.
        halves: None in the last stage; in others, whether frames are halved too.
    """

    def __init__(self, channels: int, out: int, blocks: int, halves: bool | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(out if n else channels, out) for n in range(blocks)])
        self.downsampler = None if halves is None else Downsample(out, halves)
        self.out, self.factors = out, (2 if halves else 1, 1 if halves is None else 2)

    def forward(self, x_NCHW: Tensor, call: ConvCall) -> Tensor:
        """Returns the stage's output; the input may be overwritten."""
        shortcut = self._averaged(x_NCHW, call.batch)
        for block in self.resnets:
            x_NCHW = block(x_NCHW, call)
        if self.downsampler is not None:
            x_NCHW = self.downsampler(x_NCHW, call)
        return x_NCHW + shortcut

    def _averaged(self, x_NCHW: Tensor, batch: int) -> Tensor:
        """Moves time, height and width into channels and averages these by groups; diffusers' `AvgDown3D`."""
        in_time, in_space = self.factors
        missing = -(len(x_NCHW) // batch) % in_time
        x_NCHW = torch.cat([x_NCHW.new_zeros(missing * batch, *x_NCHW.shape[1:]), x_NCHW])
        channels, height, width = x_NCHW.shape[1:]
        shape = (-1, in_time, batch, channels, height // in_space, in_space, width // in_space, in_space)
        wide = x_NCHW.reshape(shape).permute(0, 2, 3, 1, 5, 7, 4, 6)
        return wide.reshape(-1, self.out, channels * in_time * in_space**2 // self.out, *wide.shape[-2:]).mean(2)


def _doubled(x_NCHW: Tensor, batch: int) -> Tensor:
    """Makes two frames of each, one after the other, of the halves of its channels; keeps the memory's order."""
    pairs = x_NCHW.unflatten(0, (-1, batch)).unflatten(2, (2, -1)).transpose(1, 2)
    if x_NCHW.is_contiguous(memory_format=torch.channels_last):
        return pairs.movedim(3, -1).flatten(0, 2).movedim(-1, 1)
    return pairs.flatten(0, 2)
