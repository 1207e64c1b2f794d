"""What a stream through causal convolutions keeps between two calls, and what its layers know in a call.

Shapes: B batch, C channels, T frames, H×W size. A layer's frames are the batch of a two-dimensional network,
(T·B, C, H, W) with time outermost; a *video* is the same as (B, C, T, H, W).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from causalrope_sp.distributed.halo import SpatialShards


@dataclass
class ConvState:
    """The past of one video: the last frames that each causal convolution has read. Whoever has it can go on.

    Tensors in it are replaced, never written to, so that a fork shares them.

    Attributes:
        frames: the frames by the convolution's name, (B, C, T, H, W), of this rank's spatial shard.
        started: whether the stream has had its first latent frame.
    """

    frames: dict[str, Tensor] = field(default_factory=dict)
    started: bool = False

    def fork(self) -> ConvState:
        """Returns a state that goes on from here by itself."""
        return ConvState(dict(self.frames), self.started)


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


def is_trained(*tensors: Tensor | None) -> bool:
    """Tells whether autograd records what is done with these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
