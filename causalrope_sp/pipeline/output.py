"""Turns the latent chunks of a stream into chunks of pixel frames."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from causalrope_sp.codec.conv_state import ConvState
from causalrope_sp.config import StreamConfig
from causalrope_sp.distributed.comm_stats import CommStats
from causalrope_sp.grid import Chunk
from causalrope_sp.pipeline.conditioning import Conditioning
from causalrope_sp.pipeline.decoding import Frames
from causalrope_sp.pipeline.side_stream import SideStream
from causalrope_sp.pipeline.timings import Timings
from causalrope_sp.sampling.chunk import LatentChunk


@dataclass(frozen=True)
class VideoChunk:
    """Decoded frames of a video.

    Args:
        index: the chunk's number, from 0 on.
        first_frame_index: the number of its first pixel frame, counted from the start of the video.
        frames: uint8 (T, H, W, 3) on rank 0; None on the others.
        prompt_id: the number of the prompt that the chunk was made under; 0 is the prompt that the stream began with.
        timings: where the time went.
        comm_stats: the collectives since the chunk before. With a prefetched next chunk, its collectives so far count.
    """

    index: int
    first_frame_index: int
    frames: np.ndarray | None
    prompt_id: int
    timings: Timings
    comm_stats: CommStats


@dataclass(frozen=True)
class Made:
    """A chunk of latents, the prompt that it was made under, and the seconds that its passes took."""

    part: LatentChunk
    prompt_id: int
    seconds: float


@dataclass(frozen=True)
class FrameRange:
    """Which pixel frames of a stream are the output video.

    A stream has `prefix` latent frames, which are never decoded, then the conditioning latents, whose context frames
    are not part of the video, then the generated latent frames.

    Args:
        frames: pixel frames of the video, which a video to redraw may end earlier; None for a video without end.
        stride: pixel frames of a latent frame; the first decoded latent frame stands for one pixel frame.
        prefix: latent frames that the model itself starts every stream with.
        conditioning: what the stream starts from.
    """

    frames: int | None
    stride: int
    prefix: int
    conditioning: Conditioning

    def latent_frames(self, stream: StreamConfig | None) -> int | None:
        """Returns how many latent frames are generated, conditioning latents not counted; None for a video without end.

        Args:
            stream: the stream, to whose whole chunks the number is rounded up; None not to round.
        """
        if self.frames is None:
            return None
        conditioned = self.conditioning.latent_frames
        needed = max(1, 1 - (1 - self.frames - self.conditioning.context_frames) // self.stride - conditioned)
        if stream is None:
            return needed
        single = 1 if stream.independent_first_frame and self.prefix + conditioned == 0 else 0
        return single - (single - needed) // stream.chunk_frames * stream.chunk_frames

    @property
    def length(self) -> int | None:
        """Pixel frames of the video; `frames` until the end of a video to redraw has been read."""
        source = self.conditioning.source
        ends = [end for end in (self.frames, None if source is None else source.length) if end is not None]
        return min(ends, default=None)

    def latent_length(self, length: int) -> int:
        """Latent frames that so many pixel frames decode from, an image's included, a continued video's excluded."""
        if self.conditioning.context_frames:
            return -(-length // self.stride)
        return 1 - (1 - length) // self.stride

    def stop(self, latent_frame: int) -> int:
        """Returns how many pixel frames of the video the stream's first `latent_frame` latent frames decode to."""
        decoded = 1 + self.stride * (latent_frame - self.prefix - 1) - self.conditioning.context_frames
        return decoded if self.length is None else min(self.length, decoded)


@dataclass(frozen=True)
class _Before:
    """The decoder as it was before a chunk."""

    chunk: Chunk
    frames: Frames
    shown: int


class ChunkDecoder:
    """Decodes the chunks of one stream, in order. The conditioning latents are decoded with the first one.

    Args:
        frames: the decoder.
        frame_range: which pixel frames are the video.
        device: the device that decodes.
        history: how many chunks `rewind` can take back without decoding anything again.
        keeps: whether the state before a chunk is kept while it is decoded, so that it can be decoded again.

    Attributes:
        shown: how many pixel frames of the video were decoded.
    """

    def __init__(
        self, frames: Frames, frame_range: FrameRange, device: torch.device, history: int = 0, *, keeps: bool = False
    ) -> None:
        self.frames, self.frame_range, self.shown, self._keeps = frames, frame_range, 0, keeps
        self._side = SideStream(device)
        self._before: deque[_Before] = deque(maxlen=history)
        self._last: _Before | None = None  # until the chunk that was decoded last is accepted

    def decode(self, part: LatentChunk, ready: torch.cuda.Event | None = None) -> np.ndarray | None:
        """Decodes the next chunk; `accept` or `refuse` follows.

        Args:
            part: the chunk.
            ready: the CUDA event after which it is ready; None if it is.

        Returns:
            Its pixel frames on rank 0, uint8 (T, H, W, 3); None elsewhere.
        """
        conditioning, stop = self.frame_range.conditioning, self.frame_range.stop(part.chunk.stop)
        before = _Before(part.chunk, self.frames.fork() if self._keeps else self.frames, self.shown)
        with self._side.after(ready, part.latents):
            latents, skip = part.latents, 0
            if part.chunk.start == self._first and conditioning.latents is not None:
                latents = torch.cat([conditioning.latents.to(latents), latents], 1)
                skip = conditioning.context_frames
            self._last = before
            pixels = self.frames.decode(latents, skip, skip + stop - self.shown)
        self.shown = stop
        return pixels

    def accept(self) -> None:
        """Keeps what the last call of `decode` did."""
        if self._last is not None:
            self._before.append(self._last)
        self._last = None

    def refuse(self) -> None:
        """Takes back what the last call of `decode` did, so that a decoder that `keeps` can decode the chunk again."""
        if self._last is not None:
            self.frames, self.shown = self._last.frames, self._last.shown
        self._last = None

    def rewind(self, chunk: Chunk, latents_before: Callable[[], Tensor]) -> bool:
        """Goes back to before a chunk.

        Args:
            chunk: the chunk to decode next.
            latents_before: returns the latent frames right before it, (B, F, C, H, W). They are decoded again and
                discarded unless the decoder of that time is kept.

        Returns:
            Whether the decoder is as it was.
        """
        while self._before and self._before[-1].chunk.index > chunk.index:
            self._before.pop()
        if self._before and self._before[-1].chunk == chunk:
            before = self._before.pop()
            self.frames, self.shown = before.frames, before.shown
            return True
        self._before.clear()
        self.resume(chunk.start, None, latents_before)
        return chunk.start == self._first

    def resume(self, start: int, state: ConvState | None, latents_before: Callable[[], Tensor]) -> None:
        """Goes on where another decoder has stood.

        Args:
            start: the global time index of the next frame to decode.
            state: what that decoder had kept, of whole pictures; None without.
            latents_before: returns the latent frames right before it, (B, F, C, H, W). Without a state they are decoded
                again and discarded.
        """
        self.frames = self.frames.restarted(state)
        first = start == self._first
        self.shown = 0 if first else self.frame_range.stop(start)
        if not first and state is None:
            self.frames.decode(latents_before(), 0, 0)

    def tensors(self) -> Iterator[Tensor]:
        """Yields what the decoder keeps between two chunks."""
        for frames in (self.frames, *(before.frames for before in self._before)):
            yield from frames.tensors()

    def fork(self) -> ChunkDecoder:
        """Returns a decoder that goes on from here by itself."""
        history = self._before.maxlen or 0
        fork = ChunkDecoder(self.frames.fork(), self.frame_range, self._side.device, history, keeps=self._keeps)
        fork.shown = self.shown
        fork._before.extend(_Before(b.chunk, b.frames.fork(), b.shown) for b in self._before)
        fork._side = self._side
        return fork

    @property
    def _first(self) -> int:
        """The global time index of the first frame that was not given."""
        return self.frame_range.prefix + self.frame_range.conditioning.latent_frames
