"""TAEHV, the tiny autoencoder (madebyollin/taehv; `taew2_1` is for Wan 2.1's latents, `taew2_2` for Wan 2.2's 48
channels), as a module; its streams are in `taehv`.

All convolutions are two-dimensional. Frames meet in three layers: a memory block also reads its own input of the frame
before, a pool makes one frame of several, a grow makes several frames of one. Its latents are those of the DiT, without
a mean and deviation. LightX2V's `lighttaew2_1` and `lighttaew2_2` have the same layout and the Wan VAE's own latents,
before normalization; only their names tell (LightX2V's `need_scaled` goes by the name too).

Shapes: B batch, F latent frames, C channels, N frames, H×W size; pixels are in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt, prod

import torch
from torch import Tensor, nn

from causalrope_sp.codec.codec_tensors import read_exactly, shape_of
from causalrope_sp.codec.wan_vae_config import STATISTICS
from causalrope_sp.devices import on_meta
from causalrope_sp.errors import CheckpointError
from causalrope_sp.weights.tensor_files import WeightFiles

MARKER = "decoder.3.conv.0.weight"  # the first memory block
UNSCALED = "lighttae"  # in the name of a file whose latents are not normalized
STAGES = 3
_MEMORIES = 3  # memory blocks in a stage


@dataclass(frozen=True)
class TaehvConfig:
    """Sizes of a TAEHV.

    Attributes:
        channels: latent channels.
        encoder_width: channels of the encoder.
        widths: channels of the decoder, before the first stage and after each.
        pools: strides in time of the encoder's stages.
        grows: strides in time of the decoder's stages.
        patch: side, in pixels, of the square that the outermost layers treat as one position.
        unscaled: whether its latents are those of the Wan VAE before they are normalized.
    """

    channels: int
    encoder_width: int
    widths: tuple[int, ...]
    pools: tuple[int, ...]
    grows: tuple[int, ...]
    patch: int = 1
    unscaled: bool = False

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """The mean and deviation that the DiT's latents are normalized by; None if this model takes them so."""
        return STATISTICS[self.channels] if self.unscaled else None


class Bound(nn.Module):
    """Keeps latents within ±3."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns a tensor of the same shape, within ±3."""
        return 3 * torch.tanh(x / 3)


class MemoryBlock(nn.Module):
    """A residual block that reads a frame and the one before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.key = ""  # the name in its network, under which its last input is kept
        self.conv = nn.Sequential(
            _conv(2 * width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width)
        )

    def forward(self, x_NCHW: Tensor, before_NCHW: Tensor) -> Tensor:
        """Returns the block's output for each frame; `before_NCHW` holds the frame before each."""
        return torch.relu(x_NCHW + self.conv(torch.cat([x_NCHW, before_NCHW], 1)))


class Pool(nn.Module):
    """Makes one frame of `stride` frames by a pointwise convolution over all their channels."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(stride * width, width, 1, bias=False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N/stride, C, H, W)."""
        return self.conv(x_NCHW.unflatten(0, (-1, self.stride)).flatten(1, 2))


class Grow(nn.Module):
    """Makes `stride` frames of one by a pointwise convolution."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(width, stride * width, 1, bias=False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N·stride, C, H, W)."""
        return self.conv(x_NCHW).unflatten(1, (self.stride, -1)).flatten(0, 1)


class Taehv(nn.Module):
    """TAEHV's encoder and decoder. Layers have the order of the published files, whose keys are positions."""

    def __init__(self, config: TaehvConfig) -> None:
        super().__init__()
        self.config = config
        pixels, width, widths = 3 * config.patch**2, config.encoder_width, config.widths
        encoder: list[nn.Module] = [_conv(pixels, width), nn.ReLU()]
        for stride in config.pools:
            encoder += [Pool(width, stride), _conv(width, width, stride=2, bias=False), *_memories(width)]
        self.encoder = nn.Sequential(*encoder, _conv(width, config.channels))
        decoder: list[nn.Module] = [Bound(), _conv(config.channels, widths[0]), nn.ReLU()]
        for stride, wide, narrow in zip(config.grows, widths, widths[1:]):
            up = nn.Upsample(scale_factor=2)
            decoder += [*_memories(wide), up, Grow(wide, stride), _conv(wide, narrow, bias=False)]
        self.decoder = nn.Sequential(*decoder, nn.ReLU(), _conv(widths[-1], pixels))
        for name, module in self.named_modules():
            if isinstance(module, MemoryBlock):
                module.key = name

    def decoder_state_shapes(self, frames: int, batch: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """Computes what a decoder keeps between two calls; see `Codec.decoder_state_shapes`."""
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in self.decoder if frames else ():
            if isinstance(layer, MemoryBlock):
                shapes[layer.key] = batch, layer.width, 1, height, width
            elif isinstance(layer, nn.Upsample):
                height, width = 2 * height, 2 * width
        return shapes


def load_taehv(files: WeightFiles) -> Taehv:
    """Loads the model of an open file; its sizes are inferred from the shapes of its tensors.

    Args:
        files: the open file.

    Returns:
        The model in float32 on the CPU.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of a wrong shape, or the encoder's stride in time is not the
            decoder's.
    """
    model = taehv_on_meta(files)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    model.load_state_dict(read_exactly(files, expected), assign=True)
    return model


def taehv_on_meta(files: WeightFiles) -> Taehv:
    """Builds the model of an open file on the meta device, without weights; raises as `load_taehv` does."""
    config = _infer(files)
    if prod(config.pools) != prod(config.grows):
        raise CheckpointError(
            f"{files.path}: encodes {prod(config.pools)} frames into one and decodes {prod(config.grows)} from it"
        )
    if config.unscaled and config.channels not in STATISTICS:
        raise CheckpointError(
            f"{files.path}: has {config.channels} latent channels that are not normalized; mean and deviation are "
            f"known of {' and '.join(map(str, STATISTICS))} channels alone"
        )
    with on_meta():
        return Taehv(config)


def _infer(files: WeightFiles) -> TaehvConfig:
    """Infers the sizes from the shapes of the tensors."""
    stage = _MEMORIES + 2  # layers of an encoder's stage: pool, convolution, memory blocks; a decoder's has one more
    pools = [shape_of(files, f"encoder.{2 + stage * n}.conv.weight", 4) for n in range(STAGES)]
    grows = [shape_of(files, f"decoder.{7 + (stage + 1) * n}.conv.weight", 4) for n in range(STAGES)]
    width, pixels = shape_of(files, "encoder.0.weight", 4)[:2]
    first, channels = shape_of(files, "decoder.1.weight", 4)[:2]
    narrowed = [shape_of(files, f"decoder.{8 + (stage + 1) * n}.weight", 4)[0] for n in range(STAGES)]
    return TaehvConfig(
        channels=channels,
        encoder_width=width,
        widths=(first, *narrowed),
        pools=tuple(max(1, shape[1] // shape[0]) for shape in pools),
        grows=tuple(max(1, shape[0] // shape[1]) for shape in grows),
        patch=max(1, isqrt(pixels // 3)),
        unscaled=UNSCALED in files.files[0].name.lower(),
    )


def _conv(width: int, out: int, *, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(width, out, 3, stride=stride, padding=1, bias=bias)


def _memories(width: int) -> list[MemoryBlock]:
    return [MemoryBlock(width) for _ in range(_MEMORIES)]
