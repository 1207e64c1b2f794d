"""What a codec's stream keeps between two calls, and what the layers of the Wan VAE know in a call.

Shapes: B batch, C channels, T frames, H×W size. A layer's frames are the batch of a two-dimensional network,
(T·B, C, H, W) with time outermost; a *video* is the same as (B, C, T, H, W).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from causalrope_sp.distributed.halo import SpatialShards
from causalrope_sp.errors import ConfigError, printable


@dataclass
class ConvState:
    """The past of one video: the last frames that each layer has read that reads earlier ones. Whoever has it can go
    on.

    Tensors in it are replaced, never written to, so that a fork shares them.

    Attributes:
        frames: the frames by the layer's name, (B, C, T, H, W), of this rank's spatial shard; empty before the stream's
            first latent frame.
    """

    frames: dict[str, Tensor] = field(default_factory=dict)

    @property
    def started(self) -> bool:
        """Whether the stream has had its first latent frame."""
        return bool(self.frames)

    @property
    def bytes(self) -> int:
        """The bytes of its tensors."""
        return sum(frames.nbytes for frames in self.frames.values())

    def fork(self) -> ConvState:
        """Returns a state that goes on from here by itself, and shares every tensor until either replaces it."""
        return ConvState(dict(self.frames))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> ConvState:
        """Returns the state on a device and in a dtype, its own one by default; tensors that are so are shared."""
        return ConvState({name: frames.to(device, dtype) for name, frames in self.frames.items()})

    def check(self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> None:
        """Checks that the state is one of a decoder that has started.

        Args:
            shapes: what `Codec.decoder_state_shapes` returns.
            dtype: the dtype that the decoder computes in.
            device: the device that computes.

        Raises:
            ConfigError: a layer's frames are missing, unknown, or of another shape, dtype or device.
        """
        for name in [*shapes, *self.frames]:
            held = self.frames.get(name)
            if held is None or name not in shapes:
                wrong = "are missing" if held is None else "belong to no layer of this codec"
                raise ConfigError(f"the decoder's state does not fit: the frames of {printable(name)} {wrong}")
            found, expected = (tuple(held.shape), held.dtype, held.device), (shapes[name], dtype, device)
            if found != expected:
                raise ConfigError(
                    f"the decoder's state does not fit: the frames of {name} are {_described(*found)}, "
                    f"expected {_described(*expected)}"
                )


class ForkableStream:
    """A decoder's stream whose past is a `ConvState` alone.

    Args:
        state: what another stream has kept, to go on from there; None starts a video.
        shapes: the codec's `decoder_state_shapes`.

    Attributes:
        state: what it keeps between two calls.
    """

    def __init__(
        self, state: ConvState | None, shapes: Callable[[int, int, int, int], dict[str, tuple[int, ...]]]
    ) -> None:
        self.state = ConvState() if state is None else state.fork()
        self._shapes, self._checked = shapes, not self.state.started

    def check_state(self, latents_BFCHW: Tensor) -> None:
        """Checks in the first call that the state that was given fits this rank's latents.

        Raises:
            ConfigError: it does not.
        """
        if self._checked:
            return
        sizes = len(latents_BFCHW), *latents_BFCHW.shape[-2:]
        shapes = self._shapes(1, *sizes)  # after one latent frame fewer layers of a Wan VAE have been used
        if self.state.frames.keys() != shapes.keys():
            shapes = self._shapes(2, *sizes)
        self.state.check(shapes, latents_BFCHW.dtype, latents_BFCHW.device)
        self._checked = True

    def fork(self) -> Self:
        """Returns a stream that goes on from here by itself; see `DecoderStream.fork`."""
        made = copy.copy(self)
        made.state = self.state.fork()
        return made


@dataclass
class ConvCall:
    """What the layers know in one call of a stream.

    Attributes:
        state: the stream's state, which the layers read and replace.
        batch: B.
        latent_frames: how many latent frames the call has; the stream's first one is in a call by itself.
        first: whether the call has the stream's first latent frame.
        spatial_shards: how ranks share a picture; None if they do not.
    """

    state: ConvState
    batch: int
    latent_frames: int
    first: bool
    spatial_shards: SpatialShards | None = None
    _scratch: dict[str, Tensor] = field(default_factory=dict)

    def scratch(self, name: str, count: int, like_NCHW: Tensor, channels: int) -> Tensor:
        """Returns `count` frames of scratch memory in channels-last order, of a frame's size and dtype.

        The memory is shared by the layers of the call: what was written under the same name before is lost.
        """
        height, width = like_NCHW.shape[-2:]
        needed = count * height * width * channels
        flat = self._scratch.get(name)
        if flat is None or flat.numel() < needed:
            flat = self._scratch[name] = like_NCHW.new_empty(needed)
        return flat[:needed].view(count, height, width, channels).permute(0, 3, 1, 2)


def to_video(frames_NCHW: Tensor, batch: int) -> Tensor:
    """Views frames (T·B, C, H, W) as a video (B, C, T, H, W)."""
    return frames_NCHW.unflatten(0, (-1, batch)).permute(1, 2, 0, 3, 4)


def to_frames(video_BCTHW: Tensor) -> Tensor:
    """Returns a video's frames, (T·B, C, H, W); a view where the memory's order allows it."""
    return video_BCTHW.permute(2, 0, 1, 3, 4).flatten(0, 1)


def _described(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str:
    return f"{shape} in {str(dtype).removeprefix('torch.')} on {device}"


def is_trained(*tensors: Tensor | None) -> bool:
    """Tells whether autograd records what is done with these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
