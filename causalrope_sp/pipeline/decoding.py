"""Decoding of a chunk's latents into pixel frames on rank 0. `Decode` names which ranks decode:

    inline     rank 0 decodes a chunk before the next one is denoised
    overlap    rank 0 decodes a chunk while the next one is denoised (on CUDA in a second CUDA stream)
    spatial    every denoising rank decodes one spatial shard of a chunk before the next one is denoised

With *decode ranks*, those ranks decode one spatial shard each while the others denoise the next chunk (DeDiVAE in
PipeDiT, arXiv 2511.12056). Decode ranks hold no transformer. Latents and frames travel through host memory.

Shapes: B batch, F latent frames, C latent channels, T pixel frames, H×W size.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterable
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from causalrope_sp.codec import Codec
from causalrope_sp.codec.conv_state import ConvState
from causalrope_sp.codec.pixels import to_uint8
from causalrope_sp.codec.sharded_state import cut_state, gather_state
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.distributed.halo import SpatialShards
from causalrope_sp.distributed.stream_turns import StreamTurns
from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import LatentGrid

Decode = Literal["inline", "overlap", "spatial"]


def check_decode(decode: str, decoders: int) -> None:
    """Checks how frames are decoded.

    Args:
        decode: one of `Decode`.
        decoders: how many ranks only decode.

    Raises:
        ConfigError: `decode` is unknown, or is not "inline" although there are decode ranks.
    """
    if decode not in get_args(Decode):
        raise ConfigError(f"decode must be one of {', '.join(get_args(Decode))}, not {decode!r}")
    if decoders and decode != "inline":
        raise ConfigError(f"decode ranks decode: give either {decoders} of them or decode {decode!r}")


class Frames(Protocol):
    """The decoder of one video, which every denoising rank calls."""

    def decode(self, latents_BFCHW: Tensor, skip: int, stop: int) -> np.ndarray | None:
        """Decodes the next latent frames.

        Args:
            latents_BFCHW: the latent frames that follow those of the previous call.
            skip: the first of their pixel frames to return, counted from 0.
            stop: one past the last pixel frame to return.

        Returns:
            Pixel frames [skip, stop) of the first video of the batch on rank 0, uint8 (T, H, W, 3); None elsewhere.
        """
        ...

    def fork(self) -> Frames:
        """Returns a decoder that goes on from here by itself; decode ranks go on with one video alone."""
        ...

    def restarted(self, state: ConvState | None = None) -> Frames:
        """Returns a decoder that has decoded nothing yet, or that goes on from a state.

        Args:
            state: what a decoder of whole pictures has kept, as `gather_state` returns it.

        Raises:
            ConfigError: the decoder runs on decode ranks.
        """
        ...

    def gather_state(self) -> ConvState | None:
        """Returns on rank 0 what a decoder of whole pictures would have kept, in host memory; None on the others.

        Raises:
            ConfigError: the decoder runs on decode ranks.
        """
        ...

    def tensors(self) -> Iterable[Tensor]:
        """Returns what the decoder keeps on this rank between two calls."""
        ...

    def close(self) -> None:
        """Tells the decoder that no latent frames follow. Every denoising rank must call it once."""
        ...


def frames_of(codec: Codec, parallel: SequenceParallel, grid: LatentGrid, decode: Decode, turns: StreamTurns) -> Frames:
    """Creates the decoder of one video, on a rank that denoises.

    Args:
        codec: the VAE.
        parallel: the ranks.
        grid: the latent's size.
        decode: which ranks decode; ignored where there are decode ranks.
        turns: the turns of the stream.

    Returns:
        The decoder, whose frames arrive on rank 0.
    """
    if parallel.mesh.decode:
        return RemoteFrames(parallel, grid, turns)
    shards = parallel.spatial_shards(grid, parallel.mesh.denoising) if decode == "spatial" else None
    return LocalFrames(codec, shards, parallel.rank == 0)


class LocalFrames:
    """Frames that the denoising ranks decode: one spatial shard a rank, or all on rank 0.

    Args:
        codec: the VAE.
        spatial_shards: the shards of the picture; None to decode whole frames on one rank.
        first: whether this rank is the one that gets the frames.
        state: of this rank's spatial shard, to go on from; None starts a video.
    """

    def __init__(
        self, codec: Codec, spatial_shards: SpatialShards | None, first: bool, state: ConvState | None = None
    ) -> None:
        self._codec, self._spatial_shards, self._first = codec, spatial_shards, first
        self._stream = codec.decoder(spatial_shards, state) if first or spatial_shards is not None else None

    @torch.inference_mode()
    def decode(self, latents_BFCHW: Tensor, skip: int, stop: int) -> np.ndarray | None:
        """Decodes here; see `Frames.decode`."""
        if self._stream is None:
            return None
        pixels = self._stream.decode(latents_BFCHW.to(self._codec.device, self._codec.dtype))[:1, skip:stop]
        frames = to_uint8(pixels)
        whole = frames if self._spatial_shards is None else self._spatial_shards.gather_to_first(frames)
        return None if whole is None else whole[0].movedim(1, -1).cpu().numpy()

    def fork(self) -> LocalFrames:
        """Returns a decoder that goes on from here by itself; see `Frames.fork`."""
        fork = copy.copy(self)
        fork._stream = None if self._stream is None else self._stream.fork()
        return fork

    def restarted(self, state: ConvState | None = None) -> LocalFrames:
        """Returns a decoder that has decoded nothing yet, or that goes on from a state; see `Frames.restarted`."""
        own = None if state is None or self._stream is None else cut_state(self._spatial_shards, state)
        own = None if own is None else own.to(self._codec.device, self._codec.dtype)
        return LocalFrames(self._codec, self._spatial_shards, self._first, own)

    def gather_state(self) -> ConvState | None:
        """Gathers the decoder's state; see `Frames.gather_state`."""
        return None if self._stream is None else gather_state(self._spatial_shards, self._stream.state)

    def tensors(self) -> Iterable[Tensor]:
        """Returns the decoder's state; see `Frames.tensors`."""
        return () if self._stream is None else self._stream.state.frames.values()

    def close(self) -> None:
        """Does nothing, because no other rank waits."""


class RemoteFrames:
    """Frames that the decode ranks decode: rank 0 sends them a header with the latents and receives the frames.

    Args:
        parallel: the ranks.
        grid: the latent's size.
        turns: the turns of the stream.
    """

    def __init__(self, parallel: SequenceParallel, grid: LatentGrid, turns: StreamTurns) -> None:
        self._channel = OutputChannel(parallel, grid, turns) if parallel.rank == 0 else None

    def decode(self, latents_BFCHW: Tensor, skip: int, stop: int) -> np.ndarray | None:
        """Has the decode ranks decode; see `Frames.decode`."""
        if self._channel is None:
            return None
        self._channel.send(latents_BFCHW[:1], skip, stop)
        return self._channel.receive_frames()

    def fork(self) -> RemoteFrames:
        """Returns this decoder: the decode ranks go on with one video alone."""
        return self

    def restarted(self, state: ConvState | None = None) -> RemoteFrames:
        """Raises ConfigError; see `Frames.restarted`."""
        raise ConfigError("decode ranks go on with one video alone: they cannot go back in it")

    def gather_state(self) -> ConvState:
        """Raises ConfigError; see `Frames.gather_state`."""
        raise ConfigError("decode ranks go on with one video alone: their state stays with them")

    def tensors(self) -> Iterable[Tensor]:
        """Returns nothing; see `Frames.tensors`."""
        return ()

    def close(self) -> None:
        """Sends the decode ranks the end of the video."""
        if self._channel is not None:
            self._channel.end()


def run_decode_worker(codec: Codec, parallel: SequenceParallel, grid: LatentGrid, turns: StreamTurns) -> Generator[int]:
    """Decodes, on a decode rank, the latents that rank 0 sends until rank 0 announces the end of the video.

    Args:
        codec: the VAE.
        parallel: the ranks.
        grid: the latent's size.
        turns: the turns of the stream.

    Yields:
        How many pixel frames each request asked for.

    Raises:
        RankLostError: rank 0 has left the stream by an error.
    """
    channel = OutputChannel(parallel, grid, turns)
    leader = parallel.rank == parallel.mesh.decoding[0]
    frames = LocalFrames(codec, parallel.spatial_shards(grid, parallel.mesh.decoding), leader)
    with turns.taken():
        while (request := channel.hear()) is not None:
            latent_frames, skip, stop = request
            with turns.followed():
                decoded = frames.decode(channel.receive(codec.channels, latent_frames), skip, stop)
                if decoded is not None:
                    channel.send_frames(decoded)
            yield stop - skip


class OutputChannel:
    """The transfers between rank 0 and the decode ranks, through host memory, so that no GPU waits for another.

    Rank 0 announces a request through the rendezvous store, where a decode rank can wait for it as long as rank 0's
    caller likes. A request has three numbers: how many latent frames follow (0 at the end of the video), the first of
    their pixel frames to return, and one past the last.

    Args:
        parallel: the ranks.
        grid: the latent's size.
        turns: the turns of the stream.
    """

    def __init__(self, parallel: SequenceParallel, grid: LatentGrid, turns: StreamTurns) -> None:
        self._communicator, self._decoding, self._grid = parallel.host_communicator, parallel.mesh.decoding, grid
        self._turns = turns

    def send(self, latents_1FCHW: Tensor, skip: int, stop: int) -> None:
        """Sends a request with its latents from rank 0 to all decode ranks; arguments are those of `Frames.decode`."""
        self._turns.announce(self._decoding, latents_1FCHW.shape[1], skip, stop)
        latents = latents_1FCHW.float().cpu().contiguous()
        for rank in self._decoding:
            self._communicator.send("to decode", latents, rank)

    def end(self) -> None:
        """Announces the end of the video from rank 0 to all decode ranks."""
        self._turns.announce(self._decoding, 0, 0, 0)

    def hear(self) -> list[int] | None:
        """Waits on a decode rank for the next request.

        Returns:
            How many latent frames follow, and `skip` and `stop` of `Frames.decode`; None at the end of the video.

        Raises:
            RankLostError: rank 0 has left the stream by an error.
        """
        request = self._turns.hear(0)
        return request if request[0] else None

    def receive(self, channels: int, frames: int) -> Tensor:
        """Receives the latents of a request on a decode rank.

        Args:
            channels: the codec's latent channels.
            frames: their latent frames.

        Returns:
            Latents (1, F, C, H, W) in float32.
        """
        shape = 1, frames, channels, self._grid.latent_height, self._grid.latent_width
        return self._communicator.receive("to decode", torch.empty(shape, dtype=torch.float32), 0)

    def send_frames(self, frames_THW3: np.ndarray) -> None:
        """Sends uint8 frames from the first decode rank to rank 0."""
        self._communicator.send("pixels", torch.tensor(frames_THW3.shape), 0)
        self._communicator.send("pixels", torch.from_numpy(np.ascontiguousarray(frames_THW3)), 0)

    def receive_frames(self) -> np.ndarray:
        """Receives on rank 0 the frames of the last request, uint8 (T, H, W, 3)."""
        leader = self._decoding[0]
        shape = self._communicator.receive("pixels", torch.empty(4, dtype=torch.int64), leader).tolist()
        return self._communicator.receive("pixels", torch.empty(shape, dtype=torch.uint8), leader).numpy()
