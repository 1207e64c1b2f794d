"""The format of a compressed video: a header and a packet for each chunk.

    header   "CVC" version, 1; the length of the rest in 2 bytes; the rest; its CRC-32 in 4 bytes
    packet   twice the length of the content, one more in the last packet, as a varint; the chunk's number modulo 256;
             the content; in the last packet the chunk's pixel frames as a varint; a CRC-16 in 2 bytes

The CRC-16 of a packet covers the chunk's whole number, so that no packet is taken for another's. A reader of a file
that meets bytes which are no packet looks for the next one that is, and the chunks between are lost. Numbers are
little-endian.
"""

from __future__ import annotations

import json
import zlib
from binascii import crc_hqx
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any, get_args

from causalrope_sp.checks import check_choice, check_whole
from causalrope_sp.errors import ConfigError, InputError
from causalrope_sp.weights.dit_loader import Weights

MAGIC, VERSION = b"CVC", 1
LARGEST_HEADER, LARGEST_TEXT, LARGEST_CONTENT = 1 << 14, 1 << 15, 1 << 26  # bytes
LARGEST_FOUND, MOST_LOST = 1 << 16, 64  # bytes of a packet that is found again, and chunks that are lost before it
MOST_ATOMS, MOST_CHOSEN, MOST_SIDE, MOST_FRAMES = 1 << 20, 1 << 10, 1 << 14, (1 << 32) - 1
LEAST_FPS, LEAST_RESIDUAL, LARGEST_RESIDUAL = 1e-3, 1e-3, 1e3
_WORDS = (  # texts are deflated with these words known, common ones of prompts last
    b"orbits counterclockwise orbits clockwise pulses stays still bounces slides up slides down slides left slides "
    b"right triangle square circle orange purple yellow green blue red small large on a light background on a dark "
    b"background at the camera of in with video and a "
    b'"rope":"relative","window_policy":"recomputed","chunk_frames":,"steps":[1000,750,500,250],false,true,["a small '
    b'and a small and a large on a dark background",64,64,16.0,null,null,null,null,null,null,null,null,{"window":13,'
    b'"sink":1,"independent_first_frame":true,"shift":1.0}]'
)


@dataclass(frozen=True)
class Header:
    """What a decoder must know.

    Args:
        prompt: the text that the model is told.
        model: the first 8 hexadecimal digits of the model's digest.
        height: pixels of a frame.
        width: pixels of a frame.
        fps: pixel frames a second.
        seed: of the codebook.
        text_seed: from which the text encoder draws what the prompt leaves open.
        atoms: K, the size of the codebook, a power of two.
        most: the most atoms of a frame and step, a power of two or 0.
        refresh: chunks from one refresh to the next; 0 for none.
        residual: the step of the residual; 0 without one.
        exact: whether the encoder computed in float64 on a CPU, and the decoder has to.
        settings: of the stream and its sampler, where they are not the model's own: fields of `StreamConfig` and
            `SamplerConfig`.
        weights: how the encoder's model was loaded (see `LoadOptions`).

    Raises:
        ConfigError: a value is of another type or out of range.
    """

    prompt: str
    model: str
    height: int
    width: int
    fps: float
    seed: int = 0
    text_seed: int = 0
    atoms: int = 1024
    most: int = 32
    refresh: int = 0
    residual: float = 0.0
    exact: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    weights: Weights = "full"

    def __post_init__(self) -> None:
        for name, least, largest in (
            *(("height", 1, MOST_SIDE), ("width", 1, MOST_SIDE), ("seed", 0, (1 << 63) - 1)),
            *(("text_seed", 0, (1 << 63) - 1), ("atoms", 2, MOST_ATOMS), ("refresh", 0, MOST_FRAMES)),
        ):
            check_whole(name, getattr(self, name), least=least, most=largest)
        check_whole("most", self.most, least=0, most=min(self.atoms, MOST_CHOSEN))
        for name, value in (("atoms", self.atoms), ("most", self.most)):
            if value & (value - 1):
                raise ConfigError(f"{name} must be a power of two, not {value}")
        for name, low, high in (("fps", LEAST_FPS, 1 / LEAST_FPS), ("residual", 0.0, LARGEST_RESIDUAL)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise ConfigError(f"{name} must be a number from {low:g} to {high:g}, not {value!r:.40}")
        if 0 < self.residual < LEAST_RESIDUAL:
            raise ConfigError(f"residual must be 0 or at least {LEAST_RESIDUAL:g}, not {self.residual}")
        if not isinstance(self.prompt, str) or not isinstance(self.model, str) or len(self.model) != 8:
            raise ConfigError("prompt must be a text, and model 8 digits of a digest")
        if not isinstance(self.exact, bool):
            raise ConfigError(f"exact must be True or False, not {self.exact!r:.40}")
        if not isinstance(self.settings, dict):
            raise ConfigError("settings must be an object")
        check_choice("weights", self.weights, get_args(Weights))

    def pack(self) -> bytes:
        """Packs the header. Fields that have their default are not sent."""
        defaults: dict[str, Any] = {each.name: each.default for each in fields(self)} | {"settings": {}}
        values = [value if value != defaults[name] else None for name, value in asdict(self).items()]
        while values[-1] is None:
            values.pop()
        try:
            return self._framed(json.dumps(values, separators=(",", ":"), ensure_ascii=False).encode())
        except UnicodeEncodeError:
            raise ConfigError(f"the prompt has characters that UTF-8 does not have: {self.prompt!r:.100}") from None

    def _framed(self, text: bytes) -> bytes:
        if len(text) > LARGEST_TEXT:
            raise ConfigError(f"a header holds {LARGEST_TEXT} bytes at most, and this one with its prompt {len(text)}")
        deflate = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=_WORDS)
        rest = deflate.compress(text) + deflate.flush()
        if len(rest) > LARGEST_HEADER:
            raise ConfigError(f"a header is at most {LARGEST_HEADER} bytes, which this prompt of {len(text)} exceeds")
        whole = MAGIC + bytes([VERSION]) + len(rest).to_bytes(2, "little") + rest
        return whole + zlib.crc32(whole).to_bytes(4, "little")

    @classmethod
    def read(cls, data: bytes) -> tuple[Header, int]:
        """Reads the header at the beginning of a compressed video.

        Returns:
            The header, and where the packets begin.

        Raises:
            InputError: there is none, it is damaged, or of another version.
        """
        if data[:3] != MAGIC or len(data) < 6:
            raise InputError("this is no compressed video: it does not begin with CVC")
        if data[3] != VERSION:
            raise InputError(f"the compressed video has version {data[3]}, and this library reads version {VERSION}")
        end = 6 + int.from_bytes(data[4:6], "little")
        if end > 6 + LARGEST_HEADER or zlib.crc32(data[:end]) != int.from_bytes(data[end : end + 4], "little"):
            raise InputError("the header of the compressed video is damaged or cut off")
        inflate = zlib.decompressobj(-15, zdict=_WORDS)
        try:
            text = inflate.decompress(data[6:end], LARGEST_TEXT)
            values = json.loads(text)
            if not isinstance(values, list) or len(values) < 5:
                raise InputError("the header of the compressed video is wrong: it lacks fields")
            named = dict(zip([each.name for each in fields(cls)], values, strict=False))
            return cls(**{name: value for name, value in named.items() if value is not None}), end + 4
        except (zlib.error, ValueError, TypeError, OverflowError, RecursionError) as reason:
            raise InputError(f"the header of the compressed video is wrong: {reason}") from None


def pack_chunk(number: int, content: bytes, frames: int | None = None) -> bytes:
    """Returns the packet of a chunk.

    Args:
        number: of the chunk, from 0 on.
        content: its packed choices and residual.
        frames: the pixel frames of the last chunk; None for the others.
    """
    last = frames is not None
    body = content + (_varint(frames) if frames is not None else b"")
    return _varint(2 * len(content) + last) + bytes([number % 256]) + body + _check(number, body).to_bytes(2, "little")


@dataclass(frozen=True)
class Packet:
    """A packet that was read.

    Args:
        number: of its chunk.
        content: its packed choices and residual.
        frames: the pixel frames of the last chunk; None for the others.
        stop: where the next packet begins.
    """

    number: int
    content: bytes
    frames: int | None
    stop: int


def read_packet(data: bytes, at: int, least: int, scanning: bool = False) -> Packet | None:
    """Reads a packet.

    Args:
        data: bytes that hold it.
        at: where it begins.
        least: the least number that its chunk can have.
        scanning: whether a packet may begin anywhere: only short ones that are soon due are then found.

    Returns:
        The packet; None if the bytes there are none.
    """
    doubled, begin = _read_varint(data, at)
    length, last = doubled >> 1, doubled & 1
    if length > LARGEST_CONTENT or begin >= len(data):
        return None
    number = least + (data[begin] - least) % 256
    if scanning and (length > LARGEST_FOUND or number - least >= MOST_LOST):
        return None
    end, frames = begin + 1 + length, None
    if last:
        frames, end = _read_varint(data, end)
        if not frames:
            return None
    body, check = data[begin + 1 : end], data[end : end + 2]
    if len(check) < 2 or _check(number, body) != int.from_bytes(check, "little"):
        return None
    return Packet(number, body[:length], frames, end + 2)


def split(data: bytes) -> Iterator[bytes]:
    """Yields the header of a compressed video in a file and then its packets, and passes by what is none.

    Raises:
        InputError: the header is damaged or of another version.
    """
    _, at = Header.read(data)
    yield data[:at]
    least, scanning = 0, False
    while at < len(data):
        packet = read_packet(data, at, least, scanning)
        if packet is None and not scanning and (after := _after_damage(data, at, least)) is not None:
            at, least = after, least + 1
            continue
        if packet is None or (scanning and not _goes_on(data, packet)):
            at, scanning = at + 1, True
            continue
        yield data[at : packet.stop]
        at, least, scanning = packet.stop, packet.number + 1, False


def _after_damage(data: bytes, at: int, least: int) -> int | None:
    """Where the next packet begins if only the content of the one here is damaged; None if none begins there."""
    doubled, begin = _read_varint(data, at)
    stop = begin + 1 + (doubled >> 1) + 2
    return stop if not doubled & 1 and read_packet(data, stop, least + 1) is not None else None


def _goes_on(data: bytes, packet: Packet) -> bool:
    """Whether another packet or the end follows; a CRC-16 alone is right by chance once in 65536 places."""
    return packet.stop == len(data) or read_packet(data, packet.stop, packet.number + 1) is not None


def _check(number: int, content: bytes) -> int:
    return crc_hqx(number.to_bytes(8, "little") + content, 0xFFFF)


def _varint(value: int) -> bytes:
    found = bytearray()
    while value >= 128:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """The number there, at most of 5 bytes, and the place after it."""
    value = 0
    for place in range(5):
        if at + place >= len(data):
            break
        value |= (data[at + place] & 127) << 7 * place
        if data[at + place] < 128:
            return value, at + place + 1
    return LARGEST_CONTENT + 1, at + 1
