"""TAEHV, the tiny autoencoder, as a codec: streams that keep one frame for each memory block between chunks.

The decoder and the encoder work on whole strides of frames. The decoder's first latent frame gives a stride of pixel
frames, of which all but the last precede the video and are dropped. The encoder's groups begin with the first frame, so
that a latent frame is complete 3 pixel frames later than with the Wan VAE: 1 + n·stride pixel frames give n latent
frames.

Shapes: B batch, F latent frames, C channels, T frames, H×W size; pixels are in [-1, 1], in the network in [0, 1].
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from causalrope_sp.codec.conv_state import ConvState, ForkableStream
from causalrope_sp.codec.interface import stream_pieces
from causalrope_sp.codec.sharded_decoder import sharing_weights, split_convolutions
from causalrope_sp.codec.taehv_model import STAGES, MemoryBlock, Taehv, TaehvConfig
from causalrope_sp.distributed.halo import SpatialShards


class TaehvCodec:
    """A `Codec` that runs a `Taehv`.

    Args:
        model: the model, which is set to eval mode without gradients.
    """

    name = "taehv"

    def __init__(self, model: Taehv) -> None:
        self.model = model.eval().requires_grad_(False)
        self.channels = model.config.channels
        self.temporal_stride = prod(model.config.grows)
        self.spatial_stride = model.config.patch * 2**STAGES

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that it computes in."""
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """The device that computes."""
        return next(self.model.parameters()).device

    def decoder(
        self, spatial_shards: SpatialShards | None = None, state: ConvState | None = None
    ) -> TaehvDecoderStream:
        """Starts a stream that decodes; see `Codec.decoder`."""
        return TaehvDecoderStream(self.model, spatial_shards, state)

    def decoder_state_shapes(self, frames: int, batch: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """Computes what a decoder keeps between two calls; see `Codec.decoder_state_shapes`."""
        return self.model.decoder_state_shapes(frames, batch, height, width)

    def encoder(self) -> TaehvEncoderStream:
        """Starts a stream that encodes; see `Codec.encoder`."""
        return TaehvEncoderStream(self.model)


class TaehvDecoderStream(ForkableStream):
    """A `DecoderStream` through TAEHV.

    Args:
        model: the model.
        spatial_shards: how ranks share a picture; None decodes the whole picture.
        state: what another stream has kept, to go on from there; None starts a video.

    Attributes:
        state: what it keeps between two calls.
    """

    def __init__(
        self, model: Taehv, spatial_shards: SpatialShards | None = None, state: ConvState | None = None
    ) -> None:
        super().__init__(state, model.decoder_state_shapes)
        self._config, self._spatial_shards, self._decoder = model.config, spatial_shards, model.decoder
        if spatial_shards is not None:
            self._decoder = sharing_weights(model.decoder)
            split_convolutions(self._decoder, spatial_shards)

    def decode(self, latents_BFCHW: Tensor) -> Tensor:
        """Decodes the next latent frames; see `DecoderStream.decode`."""
        config = self._config
        before = prod(config.grows) - 1  # frames of the first latent frame that precede the video
        if self._spatial_shards is not None:
            latents_BFCHW = self._spatial_shards.mine(latents_BFCHW)
        self.check_state(latents_BFCHW)
        statistics = _statistics(config, latents_BFCHW)
        if statistics is not None:
            latents_BFCHW = latents_BFCHW * statistics[1] + statistics[0]
        pieces = []
        for frame in latents_BFCHW.split(1, dim=1):
            started = self.state.started
            made = _walk(self._decoder, frame, self.state)
            pieces.append(made if started else made[:, before:])
        return pixel_shuffle(torch.cat(pieces, 1), config.patch) * 2 - 1


class TaehvEncoderStream:
    """An `EncoderStream` through TAEHV. `state`, and `rest` of the pixels, are what it keeps between two calls."""

    def __init__(self, model: Taehv) -> None:
        self._model = model
        self.state = ConvState()
        self.rest: Tensor | None = None

    def encode(self, pixels_BT3HW: Tensor) -> Tensor:
        """Encodes the next pixel frames; see `EncoderStream.encode`."""
        config = self._model.config
        stride = prod(config.pools)
        stream_pieces(pixels_BT3HW.shape[1], stride, self.rest is not None)
        pixels = pixel_unshuffle((pixels_BT3HW + 1) / 2, config.patch)
        if self.rest is not None:
            pixels = torch.cat([self.rest, pixels], 1)
        whole = pixels.shape[1] // stride * stride
        self.rest = pixels[:, whole:].clone()  # a view would keep all of them
        groups = pixels[:, :whole].split(stride, dim=1) if whole else ()
        made = [_walk(self._model.encoder, group, self.state) for group in groups]
        batch, _, _, height, width = pixels.shape
        empty = pixels.new_empty(batch, 0, config.channels, height // 2**STAGES, width // 2**STAGES)
        latents, statistics = torch.cat([empty, *made], 1), _statistics(config, pixels)
        return latents if statistics is None else (latents - statistics[0]) / statistics[1]


def _statistics(config: TaehvConfig, like: Tensor) -> Tensor | None:
    """Returns mean and deviation of each latent channel, (2, C, 1, 1); None if the latents need none."""
    return None if config.statistics is None else like.new_tensor(config.statistics).view(2, -1, 1, 1)


def _walk(layers: nn.Sequential, x_BTCHW: Tensor, state: ConvState) -> Tensor:
    """Runs the next frames through all layers. `state` holds each memory block's last input."""
    batch = len(x_BTCHW)
    x_NCHW = x_BTCHW.flatten(0, 1)
    for layer in layers:
        if isinstance(layer, MemoryBlock):
            frames = x_NCHW.unflatten(0, (batch, -1))
            kept = state.frames.get(layer.key)
            last = torch.zeros_like(frames[:, :1]) if kept is None else kept.transpose(1, 2)
            state.frames[layer.key] = frames[:, -1:].clone().transpose(1, 2)
            x_NCHW = layer(x_NCHW, torch.cat([last, frames[:, :-1]], 1).flatten(0, 1))
        else:
            x_NCHW = layer(x_NCHW)
    return x_NCHW.unflatten(0, (batch, -1))
