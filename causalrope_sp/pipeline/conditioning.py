"""What a video can start from besides noise: a picture, a video to continue, a video to redraw.

    picture     one latent frame that comes first, and is the video's first pixel frame
    continue    the video's last frames, as latent frames that come first; what is handed out follows them
    redraw      every chunk of the video, noised to the level of a later step and denoised from there

Given frames take a context pass a chunk, cut as the stream would have cut them had it made them, so that frames after
them stand where they would have stood.
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
from causalrope_sp.config import StreamConfig
from causalrope_sp.errors import InputError
from causalrope_sp.io.media_reader import Picture, Video, read_picture, read_video


class VideoLatents:
    """The latent frames of a video whose pixel frames come one by one, encoded as they are asked for.

    After the video's end its last frame is repeated for ever. `frames` counts the video's own frames so far.

    Raises:
        InputError: there is no frame at all.
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
        """How many frames the video has, once its end is known."""
        return self.frames if self._next is None else None

    @torch.inference_mode()
    def take(self, count: int) -> Tensor:
        """The next latent frames, (1, count, C, H, W)."""
        while sum(part.shape[1] for part in self._ready) < count:
            size = self._codec.temporal_stride if self._started else 1
            self._started = True
            pixels = torch.from_numpy(np.stack([self._frame() for _ in range(size)])).movedim(3, 1).unsqueeze(0)
            pixels = pixels.to(self._codec.device, self._codec.dtype) / 127.5 - 1
            self._ready.append(self._encoder.encode(pixels))
        ready = torch.cat(self._ready, 1)
        self._ready = [ready[:, count:]]
        return ready[:, :count]

    def _frame(self) -> np.ndarray:
        if self._next is not None:
            self._last = self._next
            self.frames += 1  # first: another thread may ask for the length
            self._next = next(self._source, None)
        return self._last


@dataclass(frozen=True)
class Conditioning:
    """What a stream starts from. `hidden` of the pixel frames of `latents` are not part of the video handed out."""

    latents: Tensor | None = None
    hidden: int = 0
    source: VideoLatents | None = None
    first_step: int = 0
    digest: str = "nothing"  # the same on all ranks that were given the same

    @property
    def latent_frames(self) -> int:
        return 0 if self.latents is None else self.latents.shape[1]


NOTHING = Conditioning()


def condition_on_image(codec: Codec, image: Picture, height: int, width: int) -> Conditioning:
    """A picture that is the video's first frame. Raises InputError."""
    frame = read_picture(image, height, width)
    return Conditioning(VideoLatents(codec, iter([frame])).take(1), digest=_digest("image", [frame]))


def condition_on_past(
    codec: Codec, video: Video, height: int, width: int, fps: float, stream: StreamConfig, opening: int
) -> Conditioning:
    """The end of a video that is continued, behind `opening` latent frames of the model's own. Raises InputError."""
    stride, room = codec.temporal_stride, None
    if stream.window is not None:
        room = max(1, stream.window - stream.chunk_frames - opening)
    most = None if room is None else 1 + stride * (room - 1)
    frames = list(deque(read_video(video, height, width, fps), most))
    if not frames:
        raise InputError("the video to continue holds no frame")
    count = whole_chunks(1 + (len(frames) - 1) // stride, stream, opening)
    hidden = 1 + stride * (count - 1)
    last = frames[-hidden:]
    return Conditioning(VideoLatents(codec, iter(last)).take(count), hidden, digest=_digest("video", last))


def condition_on_source(
    codec: Codec, video: Video, height: int, width: int, fps: float, steps: int, strength: float
) -> Conditioning:
    """A video to redraw by the last ⌈strength · steps⌉ steps. Raises InputError."""
    source = VideoLatents(codec, read_video(video, height, width, fps))
    first = steps - math.ceil(strength * steps - 1e-9)
    return Conditioning(source=source, first_step=first, digest=_digest(f"source {first}", [source.first]))


def whole_chunks(most: int, stream: StreamConfig, opening: int) -> int:
    """The most latent frames, up to `most`, that fill whole chunks of a stream; all where not one chunk is full."""
    lone = 1 if stream.independent_first_frame and opening == 0 else 0
    whole = lone + (most - lone) // stream.chunk_frames * stream.chunk_frames
    return whole if whole > 0 else most


def _digest(kind: str, frames: list[np.ndarray]) -> str:
    total = hashlib.blake2b(digest_size=8)
    for frame in frames:
        total.update(frame.tobytes())
    return f"{kind} {total.hexdigest()}"
