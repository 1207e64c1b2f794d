"""Turns the latent chunks of a stream into chunks of pixel frames, and yields each as soon as it is decoded."""

from __future__ import annotations

import inspect
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from weakref import WeakSet

import numpy as np
import torch

from causalrope_sp.codec import Codec
from causalrope_sp.config import StreamConfig
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.distributed.comm_stats import CommStats
from causalrope_sp.distributed.stream_turns import StreamTurns
from causalrope_sp.errors import CausalRopeError
from causalrope_sp.grid import LatentGrid
from causalrope_sp.pipeline.conditioning import Conditioning
from causalrope_sp.pipeline.decoding import (
    Decode,
    Frames,
    PrefetchedChunk,
    SideStream,
    frames_of,
    prefetched,
    run_decode_worker,
)
from causalrope_sp.sampling.chunk import LatentChunk


@dataclass(frozen=True)
class VideoChunk:
    """Decoded frames of a video.

    Args:
        index: the chunk's number, from 0 on.
        start_frame: the number of its first pixel frame, counted from the start of the video.
        frames: uint8 (T, H, W, 3) on rank 0; None on the others.
        seconds: the time that this chunk took, decoding included.
        comm_stats: the collectives since the chunk before. With a prefetched next chunk, its collectives so far count.
    """

    index: int
    start_frame: int
    frames: np.ndarray | None
    seconds: float
    comm_stats: CommStats


class OpenStreams:
    """The streams of a pipeline, as long as they are referred to and neither finished nor closed."""

    def __init__(self) -> None:
        self._streams: WeakSet[Generator[VideoChunk]] = WeakSet()

    def add(self, stream: Generator[VideoChunk]) -> Generator[VideoChunk]:
        """Adds a stream and returns it."""
        self._streams.add(stream)
        return stream

    def __len__(self) -> int:
        return sum(inspect.getgeneratorstate(stream) != inspect.GEN_CLOSED for stream in self._streams)


@dataclass(frozen=True)
class FrameRange:
    """Which pixel frames of a stream are the output video.

    A stream has `prefix` latent frames, which are never decoded, then the conditioning latents, whose context frames
    are not part of the video, then the generated latent frames.

    Args:
        frames: pixel frames of the video; a video to redraw may end it earlier.
        stride: pixel frames of a latent frame; the first decoded latent frame stands for one pixel frame.
        prefix: latent frames that the model itself starts every stream with.
        conditioning: what the stream starts from.
    """

    frames: int
    stride: int
    prefix: int
    conditioning: Conditioning

    def latent_frames(self, stream: StreamConfig | None) -> int:
        """Returns how many latent frames are generated, conditioning latents not counted.

        Args:
            stream: the stream, to whose whole chunks the number is rounded up; None not to round.
        """
        conditioned = self.conditioning.latent_frames
        needed = max(1, 1 - (1 - self.frames - self.conditioning.context_frames) // self.stride - conditioned)
        if stream is None:
            return needed
        single = 1 if stream.independent_first_frame and self.prefix + conditioned == 0 else 0
        return single - (single - needed) // stream.chunk_frames * stream.chunk_frames

    @property
    def length(self) -> int:
        """Pixel frames of the video; `frames` until the end of a video to redraw has been read."""
        source = self.conditioning.source
        return self.frames if source is None or source.length is None else min(self.frames, source.length)

    @property
    def latent_length(self) -> int:
        """Latent frames that the video decodes from, its image's included and a continued video's end excluded."""
        if self.conditioning.context_frames:
            return -(-self.length // self.stride)
        return 1 - (1 - self.length) // self.stride

    def stop(self, latent_frame: int) -> int:
        """Returns how many pixel frames of the video the stream's first `latent_frame` latent frames decode to."""
        decoded = 1 + self.stride * (latent_frame - self.prefix - 1) - self.conditioning.context_frames
        return min(self.frames, self.length, decoded)


def decoded_chunks(
    chunks: Generator[LatentChunk],
    codec: Codec,
    parallel: SequenceParallel,
    grid: LatentGrid,
    decode: Decode,
    frame_range: FrameRange,
    turns: StreamTurns,
) -> Iterator[VideoChunk]:
    """Decodes latent chunks as they are sampled, on a rank that denoises. Every chunk is a turn of all such ranks.

    Decode ranks are sent the end of the video when it is complete, when the caller closes the iterator, and when wrong
    input raises a `CausalRopeError` on every rank. Any other error may be this rank's alone and is not announced.

    Args:
        chunks: the sampler's chunks.
        codec: the VAE.
        parallel: the ranks.
        grid: the latent's size.
        decode: which ranks decode.
        frame_range: which pixel frames are the video.
        turns: the turns of the stream.

    Yields:
        Chunks of the video, with frames on rank 0.

    Raises:
        CausalRopeError: what the sampler raises for wrong input.
    """
    with turns.taken():
        decoder = frames_of(codec, parallel, grid, decode, turns)
        try:
            with closing(prefetched(chunks, parallel, decode)) as latent_chunks:
                yield from _decoded(latent_chunks, decoder, parallel, frame_range, turns)
        except (GeneratorExit, CausalRopeError):
            decoder.close()
            raise
        decoder.close()


def _decoded(
    latent_chunks: Iterator[PrefetchedChunk],
    decoder: Frames,
    parallel: SequenceParallel,
    frame_range: FrameRange,
    turns: StreamTurns,
) -> Iterator[VideoChunk]:
    """Decodes until the video has all its frames. Conditioning latents are decoded with the first chunk."""
    side, conditioning = SideStream(parallel.device), frame_range.conditioning
    done, clock = 0, time.perf_counter()
    while done != frame_range.length:
        index = turns.next
        with turns.chunk():
            part, ready = next(latent_chunks)
            stop = frame_range.stop(part.chunk.stop)
            with side.after(ready, part.latents):
                latents, skip = part.latents, 0
                if index == 0 and conditioning.latents is not None:
                    latents = torch.cat([conditioning.latents.to(latents), latents], 1)
                    skip = conditioning.context_frames
                pixels = decoder.decode(latents, skip, skip + stop - done)
        now = time.perf_counter()
        yield VideoChunk(index, done, pixels, now - clock, parallel.comm_stats.take())
        done, clock = stop, time.perf_counter()


def decode_worker(
    codec: Codec, parallel: SequenceParallel, grid: LatentGrid, turns: StreamTurns
) -> Iterator[VideoChunk]:
    """Decodes one video on a decode rank.

    Args:
        codec: the VAE.
        parallel: the ranks.
        grid: the latent's size.
        turns: the turns of the stream.

    Yields:
        Chunks without frames, which rank 0 has.
    """
    done, clock = 0, time.perf_counter()
    with closing(run_decode_worker(codec, parallel, grid, turns)) as requests:
        for index, frames in enumerate(requests):
            now = time.perf_counter()
            yield VideoChunk(index, done, None, now - clock, parallel.comm_stats.take())
            done, clock = done + frames, time.perf_counter()
