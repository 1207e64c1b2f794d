"""A stream's latent chunks to a video's chunks of frames, each handed out as soon as it is decoded."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch

from causalrope_sp.codec import Codec
from causalrope_sp.config import StreamConfig
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.distributed.comm_stats import CommStats
from causalrope_sp.errors import CausalRopeError, ConfigError
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
    """Frames that are ready. `frames` is uint8 (T, H, W, 3) on rank 0 and None on the others; `start_frame` counts
    pixel frames from the video's start; `seconds` is what this chunk took, decoding included; `ledger` is what its
    collectives moved, and where the next chunk is in the making, those of it so far."""

    index: int
    start_frame: int
    frames: np.ndarray | None
    seconds: float
    comm_stats: CommStats


class StreamGuard:
    """Where a stream works ahead, in a thread, its collectives would meet those of another: only one may be open."""

    def __init__(self, needed: bool) -> None:
        self._needed, self._open = needed, False

    def check(self) -> None:
        """Before anything is exchanged.

        Raises:
            ConfigError: a stream has been begun, and neither finished nor closed.
        """
        if self._open:
            raise ConfigError(
                "another stream of this pipeline is open, and works ahead: finish it, or call its close(), first"
            )

    def guard(self, chunks: Iterator[VideoChunk]) -> Iterator[VideoChunk]:
        """The chunks of a stream, which is open from the first one on. Raises as `check` does."""
        self.check()
        self._open = self._needed
        try:
            yield from chunks
        finally:
            self._open = False


@dataclass(frozen=True)
class Cut:
    """Which pixel frames are the video: `frames` of them, or as many as its source has.

    The stream's first `opening` latent frames are never decoded; those that are given come next, and the pixel frames
    that `given` hides are not handed out. A latent frame stands for `stride` pixel frames, the first for one.
    """

    frames: int
    stride: int
    opening: int
    given: Conditioning

    def latent_frames(self, stream: StreamConfig | None) -> int:
        """How many latent frames, beside those that are given, are made: in whole chunks of a stream."""
        past = self.given.latent_frames
        needed = max(1, 1 - (1 - self.frames - self.given.hidden) // self.stride - past)
        if stream is None:
            return needed
        lone = 1 if stream.independent_first_frame and self.opening + past == 0 else 0
        return lone - (lone - needed) // stream.chunk_frames * stream.chunk_frames

    @property
    def length(self) -> int:
        """The video's frames, as far as is known."""
        source = self.given.source
        return self.frames if source is None or source.length is None else source.length

    def stop(self, latent_frame: int) -> int:
        """How many of the video's frames there are once all before this latent frame of the stream are decoded."""
        made = 1 + self.stride * (latent_frame - self.opening - 1) - self.given.hidden
        return min(self.frames, self.length, made)


def decoded_chunks(
    chunks: Generator[LatentChunk],
    codec: Codec,
    parallel: SequenceParallel,
    grid: LatentGrid,
    decode: Decode,
    cut: Cut,
) -> Iterator[VideoChunk]:
    """Decodes the chunks as they come, on a rank that denoises. Decode ranks hear of the end, be it one that was wished
    for or wrong input that every rank met."""
    decoder = frames_of(codec, parallel, grid, decode)
    try:
        with closing(prefetched(chunks, parallel, decode)) as coming:
            yield from _decoded(coming, decoder, parallel, cut)
    except GeneratorExit:
        decoder.close()
    except CausalRopeError:
        decoder.close()
        raise
    else:
        decoder.close()


def _decoded(
    coming: Iterator[PrefetchedChunk], decoder: Frames, parallel: SequenceParallel, cut: Cut
) -> Iterator[VideoChunk]:
    side, past, done, clock = SideStream(parallel.device), cut.given.latents, 0, time.perf_counter()
    for index, (part, made) in enumerate(coming):
        stop = cut.stop(part.chunk.stop)
        with side.after(made, part.latents):
            latents, hidden = part.latents, 0
            if index == 0 and past is not None:
                latents, hidden = torch.cat([past.to(latents), latents], 1), cut.given.hidden
            pixels = decoder.decode(latents, hidden, hidden + stop - done)
        now = time.perf_counter()
        yield VideoChunk(index, done, pixels, now - clock, parallel.comm_stats.take())
        done, clock = stop, time.perf_counter()
        if done == cut.length:
            return


def decode_worker(codec: Codec, parallel: SequenceParallel, grid: LatentGrid) -> Iterator[VideoChunk]:
    """A decode rank's share of a video: chunks without frames, which rank 0 has."""
    done, clock = 0, time.perf_counter()
    with closing(run_decode_worker(codec, parallel, grid)) as asked:
        for index, frames in enumerate(asked):
            now = time.perf_counter()
            yield VideoChunk(index, done, None, now - clock, parallel.comm_stats.take())
            done, clock = done + frames, time.perf_counter()
