"""TAEHV, the tiny autoencoder (madebyollin/taehv; `taew2_1` is the one of Wan 2.1's latents), streaming.

Convolutions over pictures alone. Time enters in three ways: a memory block also sees its own input of the frame
before, a pool makes one frame of several, a grow several of one. So a stream keeps one frame a memory block. It takes
and gives the DiT's latents as they are, without a mean and deviation.

Both ways count frames in whole strides. The decoder's first latent frame gives a stride of frames too, of which all
but the last lie before the video and are dropped. The encoder's groups begin with the first frame, so that a latent
frame is complete 3 frames later than with the Wan VAE: after 1 + n strides frames n latent frames are there.

Shapes: B batch, F latent frames, C channels, T frames, H×W size; pixels are in [-1, 1], in the network in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt, prod

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from causalrope_sp.codec.codec_tensors import read_exactly, shape_of
from causalrope_sp.codec.interface import stream_pieces
from causalrope_sp.codec.sharded_decoder import sharing_weights, split_convolutions
from causalrope_sp.distributed.halo import SpatialShards
from causalrope_sp.errors import CheckpointError
from causalrope_sp.weights.tensor_files import WeightFiles

MARKER = "decoder.3.conv.0.weight"  # the first memory block
_STAGES = 3
MEMORIES = 3  # memory blocks in a stage


@dataclass(frozen=True)
class TaehvConfig:
    """`pools` and `grows` are the strides in time of the stages; `widths` the decoder's channels, before and after each
    stage; `patch` the side of the square of pixels that is one place at the outer end."""

    channels: int
    encoder_width: int
    widths: tuple[int, ...]
    pools: tuple[int, ...]
    grows: tuple[int, ...]
    patch: int = 1


class Bound(nn.Module):
    """Keeps latents within ±3."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(x / 3)


class MemoryBlock(nn.Module):
    """A residual block that sees a frame and the one before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(2 * width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width)
        )

    def forward(self, x_NCHW: Tensor, before_NCHW: Tensor) -> Tensor:
        return torch.relu(x_NCHW + self.conv(torch.cat([x_NCHW, before_NCHW], 1)))


class Pool(nn.Module):
    """Makes one frame of `stride`, whose channels are laid one after another."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(stride * width, width, 1, bias=False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.conv(x_NCHW.unflatten(0, (-1, self.stride)).flatten(1, 2))


class Grow(nn.Module):
    """Makes `stride` frames of one."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(width, stride * width, 1, bias=False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.conv(x_NCHW).unflatten(1, (self.stride, -1)).flatten(0, 1)


class Taehv(nn.Module):
    """The two networks. Their layers stand where they stand in the public files, whose names are their places."""

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


class TaehvCodec:
    """A `Taehv` as a codec."""

    name = "taehv"

    def __init__(self, model: Taehv) -> None:
        self.model = model.eval().requires_grad_(False)
        self.channels = model.config.channels
        self.temporal_stride = prod(model.config.grows)
        self.spatial_stride = model.config.patch * 2**_STAGES

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def decoder(self, spatial_shards: SpatialShards | None = None) -> TaehvDecoderStream:
        return TaehvDecoderStream(self.model, spatial_shards)

    def encoder(self) -> TaehvEncoderStream:
        return TaehvEncoderStream(self.model)


class TaehvDecoderStream:
    """A `DecoderStream` through TAEHV. `memory` is what it keeps between two calls."""

    def __init__(self, model: Taehv, spatial_shards: SpatialShards | None = None) -> None:
        self._config, self._spatial_shards, self._decoder = model.config, spatial_shards, model.decoder
        if spatial_shards is not None:
            self._decoder = sharing_weights(model.decoder)
            split_convolutions(self._decoder, spatial_shards)
        self.memory: dict[int, Tensor] = {}
        self._started = False

    def decode(self, latents_BFCHW: Tensor) -> Tensor:
        before = prod(self._config.grows) - 1  # frames of the first latent frame that precede the video
        if self._spatial_shards is not None:
            latents_BFCHW = self._spatial_shards.mine(latents_BFCHW)
        pieces = []
        for frame in latents_BFCHW.split(1, dim=1):
            made = _walk(self._decoder, frame, self.memory)
            pieces.append(made if self._started else made[:, before:])
            self._started = True
        return pixel_shuffle(torch.cat(pieces, 1), self._config.patch) * 2 - 1


class TaehvEncoderStream:
    """An `EncoderStream` through TAEHV. `memory`, and `rest` of the pixels, are what it keeps between two calls."""

    def __init__(self, model: Taehv) -> None:
        self._model = model
        self.memory: dict[int, Tensor] = {}
        self.rest: Tensor | None = None

    def encode(self, pixels_BT3HW: Tensor) -> Tensor:
        config = self._model.config
        stride = prod(config.pools)
        stream_pieces(pixels_BT3HW.shape[1], stride, self.rest is not None)
        pixels = pixel_unshuffle((pixels_BT3HW + 1) / 2, config.patch)
        if self.rest is not None:
            pixels = torch.cat([self.rest, pixels], 1)
        whole = pixels.shape[1] // stride * stride
        self.rest = pixels[:, whole:].clone()  # a view would keep all of them
        groups = pixels[:, :whole].split(stride, dim=1) if whole else ()
        made = [_walk(self._model.encoder, group, self.memory) for group in groups]
        batch, _, _, height, width = pixels.shape
        empty = pixels.new_empty(batch, 0, config.channels, height // 2**_STAGES, width // 2**_STAGES)
        return torch.cat([empty, *made], 1)


def _walk(layers: nn.Sequential, x_BTCHW: Tensor, memory: dict[int, Tensor]) -> Tensor:
    """The next frames through all layers. `memory` holds the last frame that each memory block saw, by its place."""
    batch = len(x_BTCHW)
    x_NCHW = x_BTCHW.flatten(0, 1)
    for place, layer in enumerate(layers):
        if isinstance(layer, MemoryBlock):
            frames = x_NCHW.unflatten(0, (batch, -1))
            last = memory.get(place, torch.zeros_like(frames[:, :1]))
            memory[place] = frames[:, -1:].clone()
            x_NCHW = layer(x_NCHW, torch.cat([last, frames[:, :-1]], 1).flatten(0, 1))
        else:
            x_NCHW = layer(x_NCHW)
    return x_NCHW.unflatten(0, (batch, -1))


def load_taehv(files: WeightFiles) -> Taehv:
    """The model of an open file, in the shape that its tensors have.

    Raises:
        CheckpointError: a tensor that is missing, left over or of a wrong shape, or strides that do not agree.
    """
    model = taehv_on_meta(files)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    model.load_state_dict(read_exactly(files, expected), assign=True)
    return model


def taehv_on_meta(files: WeightFiles) -> Taehv:
    """The model of an open file without its weights. Raises as `load_taehv` does."""
    config = _infer(files)
    if prod(config.pools) != prod(config.grows):
        raise CheckpointError(
            f"{files.path}: encodes {prod(config.pools)} frames into one and decodes {prod(config.grows)} from it"
        )
    with torch.device("meta"):
        return Taehv(config)


def _infer(files: WeightFiles) -> TaehvConfig:
    stage = MEMORIES + 2  # layers of the encoder's: pool, convolution, memory blocks; the decoder's have one more
    pools = [shape_of(files, f"encoder.{2 + stage * n}.conv.weight", 4) for n in range(_STAGES)]
    grows = [shape_of(files, f"decoder.{7 + (stage + 1) * n}.conv.weight", 4) for n in range(_STAGES)]
    width, pixels = shape_of(files, "encoder.0.weight", 4)[:2]
    first, channels = shape_of(files, "decoder.1.weight", 4)[:2]
    narrowed = [shape_of(files, f"decoder.{8 + (stage + 1) * n}.weight", 4)[0] for n in range(_STAGES)]
    return TaehvConfig(
        channels=channels,
        encoder_width=width,
        widths=(first, *narrowed),
        pools=tuple(max(1, shape[1] // shape[0]) for shape in pools),
        grows=tuple(max(1, shape[0] // shape[1]) for shape in grows),
        patch=max(1, isqrt(pixels // 3)),
    )


def _conv(width: int, out: int, *, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(width, out, 3, stride=stride, padding=1, bias=bias)


def _memories(width: int) -> list[MemoryBlock]:
    return [MemoryBlock(width) for _ in range(MEMORIES)]
