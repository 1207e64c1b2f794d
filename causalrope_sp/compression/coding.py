"""`encode` and `decode`: a video as a stream of packets, by the sampler of a causal model.

Nothing is trained. Both ends run the same few-step sampler; before every step but the first the encoder picks, for each
latent frame, the atoms of a seeded codebook whose sum points from the model's estimate to the video (turbo-DDCM and
GVCC, arXiv 2603.26571), and sends their numbers. New here is that the model is causal, so that it streams with a
latency of one chunk, and that each frame and step gets as many atoms as lower the error most for their bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from hashlib import blake2b
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from causalrope_sp.codec.interface import DecoderStream
from causalrope_sp.codec.pixels import to_uint8
from causalrope_sp.compression.bitstream import Header, pack_chunk, read_packet
from causalrope_sp.compression.choice_code import pack, unpack
from causalrope_sp.compression.coded_loop import Choices, CodedChunk, DecodingLoop, EncodingLoop
from causalrope_sp.compression.residual import pack_residual, unpack_residual
from causalrope_sp.compression.segments import Segments, settings_of
from causalrope_sp.errors import ConfigError, InputError
from causalrope_sp.grid import Chunk
from causalrope_sp.io.media_reader import Video, read_video
from causalrope_sp.pipeline.conditioning import VideoLatents
from causalrope_sp.pipeline.numerics import own_numerics
from causalrope_sp.sampling.agreement import digest

if TYPE_CHECKING:
    from causalrope_sp.pipeline.pipeline import CausalVideoPipeline

RATE = 0.03
FRAMING = 8 * 5  # bits of a packet beside its choices


@dataclass(frozen=True)
class EncodingOptions:
    """How a video is encoded.

    Args:
        rate: λ, how much mean square error of the latents a bit for each of a frame's numbers is worth. Smaller values
            give more bits and less error. None is 0.03, unless `bpp` is given.
        bpp: bits a pixel of the output to keep to, in place of `rate`, all of it counted but header and residual.
        atoms: K, the atoms of the codebook, a power of two.
        most: the most atoms of a frame and step, a power of two; 0 sends nothing but the prompt.
        seed: of the codebook.
        text_seed: from which the text encoder draws what the prompt leaves open.
        refresh: every so many chunks the model forgets what was before, so that a loss ends there; 0 never does.
        residual: the step of a quantized residual on top, in numbers of the latents; 0 for none.
        exact: whether the decoder must compute in float64 on a CPU, as this pipeline does.

    Raises:
        ConfigError: `rate` or `bpp` is out of range, or both are given; `Header` checks the others.
    """

    rate: float | None = None
    bpp: float | None = None
    atoms: int = 1024
    most: int = 32
    seed: int = 0
    text_seed: int = 0
    refresh: int = 0
    residual: float = 0.0
    exact: bool = False

    def __post_init__(self) -> None:
        if self.rate is not None and self.bpp is not None:
            raise ConfigError(f"give rate or bpp, not both: rate {self.rate}, bpp {self.bpp}")
        for name, value in (("rate", self.rate), ("bpp", self.bpp)):
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1000:
                raise ConfigError(f"{name} must be above 0 and at most 1000, not {value}")


@dataclass(frozen=True)
class DecodedChunk:
    """A chunk of a decoded video.

    Args:
        index: the number of the chunk, from 0 on.
        frames: its pixel frames on rank 0, uint8 (T, H, W, 3); None on other ranks.
        lost: whether its packet was lost or damaged, so that the model alone drew it.
    """

    index: int
    frames: np.ndarray | None
    lost: bool


def encode(
    pipe: CausalVideoPipeline, video: Video, prompt: str, options: EncodingOptions | None = None, **overrides: Any
) -> Iterator[bytes]:
    """Encodes a video, chunk by chunk, while it is read. All ranks call it and take the same packets.

    Args:
        pipe: the pipeline whose model is the prior, of the size that the video is scaled to.
        video: a file, or frames at the pipeline's frame rate.
        prompt: what the video shows; the decoder is sent it.
        options: how the video is encoded; None takes the defaults.
        overrides: fields of `EncodingOptions`.

    Yields:
        The header, and a packet for each chunk.

    Raises:
        ConfigError: an option is wrong, or the pipeline cannot encode: it must re-noise and have a window.
        InputError: the video cannot be read.
        PromptError: the text encoder does not know the prompt's words.
    """
    chosen = replace(options or EncodingOptions(), **overrides)
    same = {each.name for each in fields(EncodingOptions)} & {each.name for each in fields(Header)}
    header = Header(
        prompt,
        pipe.model_digest[:8],
        pipe.height,
        pipe.width,
        float(pipe.fps),
        settings=settings_of(pipe.config.stream, pipe.config.sampler),
        weights=pipe.config.weights,
        **{name: getattr(chosen, name) for name in same},
    )
    source = _Source(pipe, video)
    pipe.parallel.everyone.agree({"compressed video": (header, chosen.rate, chosen.bpp)})

    def within_bpp() -> float:  # what was not spent so far is kept
        assert chosen.bpp is not None, "it is called with a budget alone"
        return max(0.0, chosen.bpp * header.height * header.width * source.covered - spent - FRAMING)

    def prepare(loop: EncodingLoop) -> None:
        loop.most, loop.rate = header.most, RATE if chosen.rate is None else chosen.rate
        loop.budget = None if chosen.bpp is None else within_bpp
        loop.target = partial(_agreed_target, pipe, source, segments.begins)

    spent = 0
    with Segments(pipe, EncodingLoop, header) as segments:
        yield header.pack()
        for number in count():
            segments.step(prepare)
            choices, content = _pack(segments.loop.sent, header)
            spent += 8 * choices + FRAMING
            yield pack_chunk(number, content, source.last)
            if source.last is not None:
                return


def decode(pipe: CausalVideoPipeline, packets: Iterable[bytes]) -> Iterator[DecodedChunk]:
    """Decodes a video, chunk by chunk. All ranks call it and take the same chunks.

    A chunk whose packet is lost is drawn by the model from what it knows, and the following ones go on from there.

    Args:
        pipe: a pipeline with the model of the encoder, at the video's size; number of ranks, strategy and dtype may
            differ.
        packets: what `encode` yields, each packet in one piece. Packets may be missing, but for the header; `split`
            cuts a file into them.

    Yields:
        DecodedChunk: its chunks, in order.

    Raises:
        InputError: the header is damaged or of another version; after all chunks, the end is missing.
        ConfigError: the model, its `weights` or the size is not the encoder's.
    """
    pieces = iter(packets)
    header, _ = Header.read(_bytes(next(pieces, b"")))
    _check_decoder(pipe, header)
    number, ended, decoder = 0, False, _Decoder(pipe)
    with Segments(pipe, DecodingLoop, header) as segments:
        for piece in pieces:
            packet = read_packet(_bytes(piece), 0, number)
            while packet is not None and number <= packet.number:
                content, most = (packet.content, packet.frames) if number == packet.number else (None, None)
                pipe.parallel.everyone.agree({f"packet {number}": content and blake2b(content).hexdigest()})
                made = segments.step(partial(_receive, content, header))
                decode_frames = partial(decoder.decode, made.latents, segments.begins, most)
                frames = pipe.parallel.everyone.run_collectively(decode_frames)
                yield DecodedChunk(number, frames, segments.loop.lost)
                number, ended = number + 1, most is not None
            if ended:
                return
    raise InputError(f"the compressed video is cut off: it has {number} whole chunks and no last one")


def _bytes(piece: object) -> bytes:
    if not isinstance(piece, bytes):
        raise ConfigError(f"packets must be bytes, one piece each (`split` cuts a file), not {type(piece).__name__}")
    return piece


class _Decoder:
    """Decodes latents on rank 0, segment by segment."""

    def __init__(self, pipe: CausalVideoPipeline) -> None:
        self._pipe = pipe
        self._decoder: DecoderStream | None = None

    def decode(self, latents: Tensor, begins: bool, most: int | None) -> np.ndarray | None:
        """Returns the pixel frames of a chunk, uint8 (T, H, W, 3), on rank 0; None on the others.

        Args:
            latents: the next latents, (1, F, C, H, W).
            begins: whether they begin a segment.
            most: how many pixel frames to return at most; None for all.
        """
        codec = self._pipe.codec
        if self._pipe.parallel.rank:
            return None
        with own_numerics(), torch.inference_mode():
            if self._decoder is None or begins:
                self._decoder = codec.decoder()
            pixels = self._decoder.decode(latents.to(codec.device, codec.dtype))[:, :most]
            return to_uint8(pixels)[0].movedim(1, -1).cpu().numpy()


class _Source:
    """The latents of the video that is encoded.

    Attributes:
        covered: the pixel frames of the chunks so far.
        last: those of the newest chunk once the video has ended; None before.
    """

    def __init__(self, pipe: CausalVideoPipeline, video: Video) -> None:
        self._latents = VideoLatents(pipe.codec, read_video(video, pipe.height, pipe.width, pipe.fps))
        self._stride, self.covered = pipe.codec.temporal_stride, 0
        self.last: int | None = None

    def target(self, begins: bool, chunk: Chunk) -> tuple[Tensor, int]:
        """Returns the latents of the next chunk, which begins a segment or not; see `EncodingLoop.target`."""
        if begins and self.covered:
            self._latents.restart()
        latents, first = self._latents.take(chunk.frames), 1 if begins else 0
        shown, length = first + self._stride * (chunk.frames - first), self._latents.length
        if length is not None:
            shown = min(shown, length - self.covered)
        self.covered += shown
        self.last = shown if self.covered == length else None
        return latents, first + -(-(shown - first) // self._stride)


def _agreed_target(pipe: CausalVideoPipeline, source: _Source, begins: bool, chunk: Chunk) -> tuple[Tensor, int]:
    """What `source.target` returns; an error on one rank, or a difference between ranks, is an error on all."""
    ranks = pipe.parallel.denoisers
    latents, wanted = ranks.run_collectively(partial(source.target, begins, chunk))
    if ranks.size > 1:
        ranks.agree({f"the video's chunk {chunk.index}": (digest(latents), source.last)})
    return latents, wanted


def _check_decoder(pipe: CausalVideoPipeline, header: Header) -> None:
    """Raises ConfigError if the pipeline is not one that decodes this video."""
    if pipe.model_digest[:8] != header.model:
        raise ConfigError(
            f"the video was compressed with the model {header.model}, and this one is {pipe.model_digest[:8]}"
        )
    if header.weights != pipe.config.weights:
        raise ConfigError(
            f"weights: expected {header.weights}, with which the video was compressed, got {pipe.config.weights}"
        )
    if (pipe.height, pipe.width) != (header.height, header.width):
        size, own = f"{header.width}×{header.height}", f"{pipe.width}×{pipe.height}"
        raise ConfigError(f"the compressed video has frames of {size}, and the pipeline was loaded for {own}")


def _pack(sent: CodedChunk, header: Header) -> tuple[int, bytes]:
    """The bytes of a chunk's choices, and the content of its packet."""
    choices = pack([choice for frame in sent.choices for choice in frame], header.atoms, header.most)
    if sent.levels is None:
        return len(choices), choices
    return len(choices), len(choices).to_bytes(3, "little") + choices + pack_residual(sent.levels)


def _receive(content: bytes | None, header: Header, loop: DecodingLoop) -> None:
    loop.receive = partial(_unpack, content, header)


def _unpack(content: bytes | None, header: Header, loop: DecodingLoop, chunk: Chunk) -> CodedChunk | None:
    """What was sent of a chunk; None if it was lost, or if it is none."""
    if content is None:
        return None
    choices, residual = content, None
    try:
        if header.residual:
            end = 3 + int.from_bytes(content[:3], "little")
            choices = content[3:end]
            residual = unpack_residual(content[end:], (chunk.frames, *loop.codebook.shape))
        flat = unpack(choices, chunk.frames * loop.coded_steps, header.atoms, header.most)
    except InputError:
        return None
    by_frame: Choices = [flat[n : n + loop.coded_steps] for n in range(0, len(flat), loop.coded_steps)]
    return CodedChunk(by_frame, residual)
