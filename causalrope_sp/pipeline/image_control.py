"""The control of image-to-video models: a mask and the latents of a video that is the image, then nothing.

Wan 2.1's and 2.2's image-to-video transformers read 36 channels: 16 of noise, 4 of a mask that is 1 in the given pixel
frame, and the 16 of the VAE's latents of the image followed by grey frames.

Shapes: F latent frames, C latent channels, H×W latent size.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from causalrope_sp.codec import Codec
from causalrope_sp.config import DiTConfig
from causalrope_sp.grid import Chunk


def takes_image(model: DiTConfig, codec: Codec) -> bool:
    """Returns whether a model's control is a mask by pixel frame and an image's latents."""
    return model.control_channels == codec.temporal_stride + codec.channels


class ImageControl:
    """The control of each chunk of a stream that starts from an image; a `Control`.

    The VAE is causal, so latents of grey frames are encoded as chunks need them, until nothing of the image is in the
    encoder's state any more: all later ones are the last one.

    Args:
        codec: the VAE.
        image: the image, uint8 (height, width, 3), of the stream's size.
    """

    def __init__(self, codec: Codec, image: np.ndarray) -> None:
        self._codec, self._encoder = codec, codec.encoder()
        first = torch.tensor(image).movedim(2, 0)[None, None].to(codec.device, codec.dtype) / 127.5 - 1
        self._next, self._settled = first, False
        self._latents = list[Tensor]()  # of each latent frame, (1, 1, C, H, W)

    @torch.inference_mode()
    def __call__(self, chunk: Chunk) -> Tensor:
        """Returns the control of a chunk whose frames are counted from the image on, (1, F, mask and C, H, W)."""
        while len(self._latents) < chunk.stop and not self._settled:
            self._encode()
        frames = [min(frame, len(self._latents) - 1) for frame in range(chunk.start, chunk.stop)]
        latents = torch.cat([self._latents[frame] for frame in frames], 1)
        mask = latents.new_zeros(1, chunk.frames, self._codec.temporal_stride, *latents.shape[3:])
        if chunk.start == 0:
            mask[:, 0] = 1
        return torch.cat([mask, latents], 2)

    def _encode(self) -> None:
        """Encodes the image, or the grey frames of one more latent frame."""
        before = self._encoder.state.fork().frames
        latents = self._encoder.encode(self._next)
        self._latents += [latents[:, n : n + 1] for n in range(latents.shape[1])]
        shape = 1, self._codec.temporal_stride, *self._next.shape[2:]
        grey = self._next.new_zeros(shape)
        was_grey = self._next.shape == shape
        after = self._encoder.state.frames
        same = was_grey and before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in after)
        self._next, self._settled = grey, same and len(self._latents) > 1
