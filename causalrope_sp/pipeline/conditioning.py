"""Conditioning of a stream: an image, a video to continue, or a video to redraw, encoded as latents.

    image       becomes the first latent frame, which is the first pixel frame of the video
    continue    the last frames of the video become the first latent frames; the output follows them
    redraw      every chunk of the video is noised to the level of a later step and denoised from there

The context pass writes the K/V of conditioning latents chunk by chunk, in the chunks that the stream itself would have
generated, so that later frames see them at the same time indices.

Shapes: C latent channels, H×W size of a latent frame.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from causalrope_sp.codec import Codec
from causalrope_sp.config import DiTConfig, StreamConfig
from causalrope_sp.errors import ConfigError, InputError
from causalrope_sp.io.media_reader import Picture, Video, read_picture, read_video
from causalrope_sp.pipeline.generation_options import GenerationOptions
from causalrope_sp.pipeline.image_control import ImageControl


class VideoLatents:
    """Encodes a video frame by frame and returns its latent frames on request.

    After the end of the video, its last frame is repeated without limit.

    Attributes:
        first: the first pixel frame, uint8 (H, W, 3).
        frames: how many pixel frames of the video have been read so far.

    Args:
        codec: the VAE that encodes.
        frames: pixel frames, uint8 (H, W, 3), already of the stream's size.

    Raises:
        InputError: the video has no frame.
    """

    def __init__(self, codec: Codec, frames: Iterator[np.ndarray]) -> None:
        self._codec, self._encoder, self._source = codec, codec.encoder(), frames
        self._next = next(frames, None)
        if self._next is None:
            raise InputError("the video holds no frame")
        self._last = self.first = self._next
        self._started = False
        self._ready: list[Tensor] = []
        self.frames = 0

    @property
    def length(self) -> int | None:
        """Pixel frames in the whole video; None before its end has been read."""
        return self.frames if self._next is None else None

    @torch.inference_mode()
    def take(self, count: int) -> Tensor:
        """Returns the next `count` latent frames, (1, count, C, H, W)."""
        while sum(part.shape[1] for part in self._ready) < count:
            size = self._codec.temporal_stride if self._started else 1
            self._started = True
            pixels = torch.from_numpy(np.stack([self._frame() for _ in range(size)])).movedim(3, 1).unsqueeze(0)
            pixels = pixels.to(self._codec.device, self._codec.dtype) / 127.5 - 1
            self._ready.append(self._encoder.encode(pixels))
        ready = torch.cat(self._ready, 1)
        self._ready = [ready[:, count:]]
        return ready[:, :count]

    def restart(self) -> None:
        """Encodes the following frames as those of another video."""
        self._encoder, self._started, self._ready = self._codec.encoder(), False, []

    def _frame(self) -> np.ndarray:
        if self._next is not None:
            self._last = self._next
            self.frames += 1  # before the next read, because another thread may read `length`
            self._next = next(self._source, None)
        return self._last


@dataclass(frozen=True)
class Conditioning:
    """What a stream starts from.

    Args:
        latents: latent frames that precede the generated ones, (1, F, C, H, W); None without an image or a past video.
        context_frames: how many pixel frames of `latents`, from the first on, are context only and not part of the
            output.
        source: the video to redraw; None without one.
        first_step: the index of the denoising step at which redrawing starts.
        control: an image that every chunk of an image-to-video model is controlled by.
        picture: that image, uint8 (H, W, 3).
        in_chunk: an image that is the first latent frame of the first chunk, in place of `latents`, (1, 1, C, H, W).
        digest: a text that is the same on all ranks that have the same conditioning.
    """

    latents: Tensor | None = None
    context_frames: int = 0
    source: VideoLatents | None = None
    first_step: int = 0
    in_chunk: Tensor | None = None
    control: ImageControl | None = None
    picture: np.ndarray | None = None
    digest: str = "nothing"

    @property
    def pictured(self) -> bool:
        """Whether an image is the first frame of the video."""
        return self.in_chunk is not None or (self.latents is not None and not self.context_frames)

    @property
    def latent_frames(self) -> int:
        """How many latent frames precede the generated ones."""
        return 0 if self.latents is None else self.latents.shape[1]


NOTHING = Conditioning()


def condition_of(
    codec: Codec,
    request: GenerationOptions,
    size: tuple[int, int],
    fps: float,
    stream: StreamConfig,
    steps: int,
    prefix: int,
) -> Conditioning:
    """Encodes the image or the video of a call, if it has one.

    Args:
        codec: the VAE that encodes it.
        request: the options of the call.
        size: height and width of a frame, in pixels.
        fps: the stream's pixel frames per second.
        stream: the stream.
        steps: denoising steps of a chunk.
        prefix: latent frames that the model itself starts every stream with.

    Raises:
        InputError: it cannot be read.
    """
    if request.image is not None:
        return condition_on_image(codec, request.image, *size, in_chunk=stream.image_in_chunk)
    if request.video is None:
        return NOTHING
    if request.strength is not None:
        return condition_on_source(codec, request.video, *size, fps, steps, request.strength)
    return condition_on_video_end(codec, request.video, *size, fps, stream, prefix)


def condition_by_control(
    codec: Codec, request: GenerationOptions, size: tuple[int, int], model: DiTConfig
) -> Conditioning:
    """Makes the image of a call the control of an image-to-video model; nothing, if it has a control itself.

    Args:
        codec: the VAE that encodes it.
        request: the options of the call.
        size: height and width of a frame, in pixels.
        model: the sizes of the model.

    Raises:
        ConfigError: the call has a video, or neither or both of an image and a control.
        InputError: the image cannot be read.
    """
    if request.video is not None:
        raise ConfigError("video must be None: an image-to-video model goes on from an image alone")
    if (request.image is None) == (request.control is None):
        raise ConfigError(
            f"image or control must be given, one of them: the model is image-to-video, {model.embedded_channels} "
            f"channels in, {model.control_channels} of them of a mask and an image"
        )
    if request.image is None:
        return Conditioning()
    frame = read_picture(request.image, *size)
    return Conditioning(control=ImageControl(codec, frame), picture=frame, digest=_digest("image", [frame]))


def condition_on_image(
    codec: Codec, image: Picture, height: int, width: int, *, in_chunk: bool = False
) -> Conditioning:
    """Makes an image the first frame of the video.

    Args:
        codec: the VAE that encodes it.
        image: a file, a PIL image, an array or a tensor (see `read_picture`).
        height: pixels of a frame.
        width: pixels of a frame.
        in_chunk: whether it is the first frame of the first chunk (see `StreamConfig.image_in_chunk`).

    Returns:
        Conditioning with one latent frame, which is part of the output.

    Raises:
        InputError: the image cannot be read.
    """
    frame = read_picture(image, height, width)
    latents, digest = VideoLatents(codec, iter([frame])).take(1), _digest("image", [frame])
    return Conditioning(in_chunk=latents, digest=digest) if in_chunk else Conditioning(latents, digest=digest)


def condition_on_video_end(
    codec: Codec, video: Video, height: int, width: int, fps: float, stream: StreamConfig, prefix: int
) -> Conditioning:
    """Makes the last frames of a video the context of the frames that continue it.

    Args:
        codec: the VAE that encodes it.
        video: a file, or PIL images, arrays or tensors (see `read_video`).
        height: pixels of a frame.
        width: pixels of a frame.
        fps: the stream's pixel frames per second, at which the video is sampled.
        stream: chunks and window of the stream; frames that the window cannot hold are not encoded.
        prefix: latent frames that the model itself starts every stream with.

    Returns:
        Conditioning with whole chunks of latent frames, none of which is part of the output.

    Raises:
        InputError: the video cannot be read or has no frame.
    """
    stride, latent_limit = codec.temporal_stride, None
    if stream.window is not None:
        latent_limit = max(1, stream.window - stream.chunk_frames - prefix)
    pixel_limit = None if latent_limit is None else 1 + stride * (latent_limit - 1)
    frames = list(deque(read_video(video, height, width, fps), pixel_limit))
    if not frames:
        raise InputError("the video to continue holds no frame")
    count = whole_chunks(1 + (len(frames) - 1) // stride, stream, prefix)
    context_frames = 1 + stride * (count - 1)
    last = frames[-context_frames:]
    return Conditioning(VideoLatents(codec, iter(last)).take(count), context_frames, digest=_digest("video", last))


def condition_on_source(
    codec: Codec, video: Video, height: int, width: int, fps: float, steps: int, strength: float
) -> Conditioning:
    """Makes a video the source that the last ⌈strength · steps⌉ denoising steps redraw.

    Args:
        codec: the VAE that encodes it.
        video: a file, or PIL images, arrays or tensors (see `read_video`).
        height: pixels of a frame.
        width: pixels of a frame.
        fps: the stream's pixel frames per second, at which the video is sampled.
        steps: denoising steps of a chunk.
        strength: the share of the steps that redraw, in (0, 1].

    Returns:
        Conditioning with a source and the first step.

    Raises:
        InputError: the video cannot be read or has no frame.
    """
    source = VideoLatents(codec, read_video(video, height, width, fps))
    first = steps - math.ceil(strength * steps - 1e-9)
    return Conditioning(source=source, first_step=first, digest=_digest(f"source {first}", [source.first]))


def whole_chunks(most: int, stream: StreamConfig, prefix: int) -> int:
    """Rounds a number of latent frames down to whole chunks of a stream.

    Args:
        most: the latent frames that are available.
        stream: the size of chunks, and whether the first frame is a chunk of its own.
        prefix: latent frames that the model itself starts every stream with.

    Returns:
        The latent frames in whole chunks, or `most` if they do not fill one chunk.
    """
    single = 1 if stream.independent_first_frame and prefix == 0 else 0
    whole = single + (most - single) // stream.chunk_frames * stream.chunk_frames
    return whole if whole > 0 else most


def _digest(kind: str, frames: list[np.ndarray]) -> str:
    """The kind of conditioning with a hash of its pixel frames."""
    total = hashlib.blake2b(digest_size=8)
    for frame in frames:
        total.update(frame.tobytes())
    return f"{kind} {total.hexdigest()}"
