"""A chunk's latents become frames on rank 0. By whom, and when:

    inline     rank 0, before the next chunk is denoised
    overlap    rank 0, while the next chunk is denoised (on CUDA in a stream of its own)
    spatial    all ranks that denoise, a spatial shard of the frames each, before the next chunk is denoised

or, where some of the ranks are *decode ranks*, those, a strip each, while the others denoise the next chunk (DeDiVAE of
PipeDiT, arXiv 2511.12056). They hold no transformer. Latents go to them, and frames come back, by way of the host.

Shapes: B batch, F latent frames, C latent channels, T pixel frames, H×W size.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from causalrope_sp.codec import Codec
from causalrope_sp.codec.pixels import to_uint8
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.distributed.halo import SpatialShards
from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import LatentGrid
from causalrope_sp.pipeline.prefetch import prefetch_one
from causalrope_sp.sampling.chunk import LatentChunk

Decode = Literal["inline", "overlap", "spatial"]
PrefetchedChunk = tuple[LatentChunk, torch.cuda.Event | None]


def check_decode(decode: str, decoders: int) -> None:
    """Raises ConfigError: an unknown way, or one beside decode ranks."""
    if decode not in get_args(Decode):
        raise ConfigError(f"decode must be one of {', '.join(get_args(Decode))}, not {decode!r}")
    if decoders and decode != "inline":
        raise ConfigError(f"decode ranks decode: give either {decoders} of them or decode {decode!r}")


class Frames(Protocol):
    """One video's decoder as the pipeline asks it; every rank that denoises does."""

    def decode(self, latents_BFCHW: Tensor, skip: int, stop: int) -> np.ndarray | None:
        """Pixel frames [skip, stop) of the next latent frames, uint8 (T, H, W, 3), on rank 0; None on the others."""
        ...

    def close(self) -> None:
        """There are no more."""
        ...


def frames_of(codec: Codec, parallel: SequenceParallel, grid: LatentGrid, decode: Decode) -> Frames:
    """How the ranks that denoise come by a video's frames."""
    if parallel.mesh.decode:
        return RemoteFrames(parallel, grid)
    shards = parallel.spatial_shards(grid, parallel.mesh.denoising) if decode == "spatial" else None
    return LocalFrames(codec, shards, parallel.rank == 0)


def prefetched(
    chunks: Generator[LatentChunk], parallel: SequenceParallel, decode: Decode
) -> Generator[PrefetchedChunk]:
    """The sampler's chunks, the next one in the making where decoding leaves it time."""
    if decode == "overlap" or parallel.mesh.decode:
        return prefetch_one(chunks, parallel.device)
    return ((chunk, None) for chunk in chunks)


class SideStream:
    """A CUDA stream for what is done with one chunk while the next is being made; nothing on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def after(self, made: torch.cuda.Event | None, latents: Tensor) -> Iterator[None]:
        """Work on `latents` that waits for the event alone; in the stream's order where there is none."""
        if self._stream is None or made is None:
            yield
            return
        self._stream.wait_event(made)
        latents.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            yield


class LocalFrames:
    """Decoded here: a strip of them by every rank, or all by rank 0."""

    def __init__(self, codec: Codec, spatial_shards: SpatialShards | None, first: bool) -> None:
        self._codec, self._spatial_shards = codec, spatial_shards
        self._stream = codec.decoder(spatial_shards) if first or spatial_shards is not None else None

    @torch.inference_mode()
    def decode(self, latents_BFCHW: Tensor, skip: int, stop: int) -> np.ndarray | None:
        if self._stream is None:
            return None
        pixels = self._stream.decode(latents_BFCHW.to(self._codec.device, self._codec.dtype))[:1, skip:stop]
        frames = to_uint8(pixels)
        whole = frames if self._spatial_shards is None else self._spatial_shards.gather_to_first(frames)
        return None if whole is None else whole[0].movedim(1, -1).cpu().numpy()

    def close(self) -> None:
        pass


class RemoteFrames:
    """Decoded by the decode ranks: rank 0 sends them a head and the latents, and gets frames back."""

    def __init__(self, parallel: SequenceParallel, grid: LatentGrid) -> None:
        self._channel = OutputChannel(parallel, grid) if parallel.rank == 0 else None

    def decode(self, latents_BFCHW: Tensor, skip: int, stop: int) -> np.ndarray | None:
        if self._channel is None:
            return None
        self._channel.send(latents_BFCHW[:1], skip, stop)
        return self._channel.receive_frames()

    def close(self) -> None:
        if self._channel is not None:
            self._channel.end()


def run_decode_worker(codec: Codec, parallel: SequenceParallel, grid: LatentGrid) -> Generator[int]:
    """What a decode rank does for one video: decodes what rank 0 sends until that says the end. Yields how many frames
    each time."""
    channel = OutputChannel(parallel, grid)
    leader = parallel.rank == parallel.mesh.decoding[0]
    frames = LocalFrames(codec, parallel.spatial_shards(grid, parallel.mesh.decoding), leader)
    while (asked := channel.receive(codec.channels)) is not None:
        latents, skip, stop = asked
        made = frames.decode(latents, skip, stop)
        if made is not None:
            channel.send_frames(made)
        try:
            yield stop - skip
        except GeneratorExit:  # rank 0 has stopped as well, and says so
            while channel.receive(codec.channels) is not None:
                pass
            return


class OutputChannel:
    """What travels between rank 0 and the decode ranks, on the host, so that neither side's GPU waits for the other's.

    A head is three numbers: latent frames (0: the end), and the first and last of their pixel frames that are wanted.
    """

    def __init__(self, parallel: SequenceParallel, grid: LatentGrid) -> None:
        self._communicator, self._decoding, self._grid = parallel.host_communicator, parallel.mesh.decoding, grid

    def send(self, latents_1FCHW: Tensor, skip: int, stop: int) -> None:
        self._to_all(torch.tensor([latents_1FCHW.shape[1], skip, stop]))
        self._to_all(latents_1FCHW.float().cpu().contiguous())

    def end(self) -> None:
        self._to_all(torch.zeros(3, dtype=torch.int64))

    def receive(self, channels: int) -> tuple[Tensor, int, int] | None:
        head = self._communicator.receive("to decode", torch.empty(3, dtype=torch.int64), 0)
        frames, skip, stop = head.tolist()
        if not frames:
            return None
        latents = torch.empty(1, frames, channels, self._grid.latent_height, self._grid.latent_width)
        return self._communicator.receive("to decode", latents, 0), skip, stop

    def _to_all(self, x: Tensor) -> None:
        for rank in self._decoding:
            self._communicator.send("to decode", x, rank)

    def send_frames(self, frames_THW3: np.ndarray) -> None:
        self._communicator.send("pixels", torch.tensor(frames_THW3.shape), 0)
        self._communicator.send("pixels", torch.from_numpy(np.ascontiguousarray(frames_THW3)), 0)

    def receive_frames(self) -> np.ndarray:
        leader = self._decoding[0]
        shape = self._communicator.receive("pixels", torch.empty(4, dtype=torch.int64), leader).tolist()
        return self._communicator.receive("pixels", torch.empty(shape, dtype=torch.uint8), leader).numpy()
