"""A codec whose weights are on the device only while it decodes or encodes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from causalrope_sp.codec.conv_state import ConvState
from causalrope_sp.codec.interface import Codec, DecoderStream, EncoderStream
from causalrope_sp.distributed.halo import SpatialShards


class OffloadedCodec:
    """A `Codec` that computes on a device and keeps its weights on the CPU.

    The weights are pinned where the device is a GPU. Every call of a stream copies them to the device and frees the
    copies afterwards, one call at a time. The state that a stream keeps between chunks stays on the device.

    Args:
        codec: the codec, on the CPU.
        module: the module that holds all of its weights.
        device: the device that computes.
    """

    def __init__(self, codec: Codec, module: nn.Module, device: torch.device | str) -> None:
        self.codec = codec
        self.name, self.channels, self.dtype = codec.name, codec.channels, codec.dtype
        self.temporal_stride, self.spatial_stride = codec.temporal_stride, codec.spatial_stride
        self.device = torch.device(device)
        self._weights = [*module.parameters(), *module.buffers()]
        if self.device.type == "cuda":
            for weight in self._weights:
                weight.data = weight.data.pin_memory()
        self._on_cpu = [weight.data for weight in self._weights]
        self._one_at_a_time = threading.Lock()

    def decoder(self, spatial_shards: SpatialShards | None = None, state: ConvState | None = None) -> DecoderStream:
        """Starts a stream that decodes; see `Codec.decoder`."""
        return _Decoder(self, self.codec.decoder(spatial_shards, state))

    def decoder_state_shapes(self, frames: int, batch: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """Computes what a decoder keeps between two calls; see `Codec.decoder_state_shapes`."""
        return self.codec.decoder_state_shapes(frames, batch, height, width)

    def encoder(self) -> EncoderStream:
        """Starts a stream that encodes; see `Codec.encoder`."""
        return _Encoder(self, self.codec.encoder())

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Copies the weights to the device, in the order of its stream of work, and frees the copies on exit."""
        with self._one_at_a_time:
            try:
                for weight, on_cpu in zip(self._weights, self._on_cpu, strict=True):
                    weight.data = on_cpu.to(self.device, non_blocking=True, copy=True)
                yield
            finally:
                for weight, on_cpu in zip(self._weights, self._on_cpu, strict=True):
                    weight.data = on_cpu


class _Decoder:
    """A `DecoderStream` that has the codec's weights on the device during each call."""

    def __init__(self, codec: OffloadedCodec, stream: DecoderStream) -> None:
        self._codec, self._stream = codec, stream

    def decode(self, latents_BFCHW: Tensor) -> Tensor:
        with self._codec.on_device():
            return self._stream.decode(latents_BFCHW)

    @property
    def state(self) -> ConvState:
        return self._stream.state

    def fork(self) -> DecoderStream:
        return _Decoder(self._codec, self._stream.fork())


class _Encoder:
    """An `EncoderStream` that has the codec's weights on the device during each call."""

    def __init__(self, codec: OffloadedCodec, stream: EncoderStream) -> None:
        self._codec, self._stream = codec, stream

    @property
    def state(self) -> ConvState:
        return self._stream.state

    def encode(self, pixels_BT3HW: Tensor) -> Tensor:
        with self._codec.on_device():
            return self._stream.encode(pixels_BT3HW)
