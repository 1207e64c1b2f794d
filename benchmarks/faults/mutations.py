"""Seeded mutations of files: bytes, and the structure of JSON, safetensors and torch.save's archives."""

from __future__ import annotations

import io
import json
import math
import random
import struct
import zipfile
from collections.abc import Sequence
from typing import Any

LONGEST = 1 << 20  # bytes of a mutated input
_NUMBERS = (0, 1, -1, 2, 7, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63))
_FLOATS = (0.0, -0.0, 0.5, 1e-300, 1e308, -1e308, 3.0, math.inf, math.nan)
_TEXTS = (
    *("", " ", "0", "-1", "1_0", "１", "1e999", "nan", "\x1b[31mred", "\x07\r\n", "x" * 300, "../x", "/", "~", "a/b"),
    *("cpu:9", "cuda:x", "\ud800", "\u202e", "9" * 5000, "[[[", "%s{}", "auto", "none", "-", "--", "0x10", "1,2,x"),
)
_DEEP = (2_000, 100_000)


def mutate(data: bytes, draw: random.Random, others: Sequence[bytes] = ()) -> bytes:
    """Changes an input in one to three places.

    Args:
        data: the input.
        draw: the source of all choices.
        others: further inputs, parts of which may be taken over.

    Returns:
        The changed input, at most `LONGEST` bytes long.
    """
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        structured = draw.random() < 0.7
        changed = _mutate_structure(data, draw) if structured else None
        data = changed if changed is not None else _mutate_bytes(data, draw, others)
    return data[:LONGEST]


def _mutate_structure(data: bytes, draw: random.Random) -> bytes | None:
    """Changes a file by what it says; None if it is of no kind that is known here."""
    if data[:4] == b"PK\x03\x04":
        return _mutate_archive(data, draw)
    if len(data) > 8 and data[8:9] == b"{":
        return _mutate_safetensors(data, draw)
    return _mutate_json(data, draw)


def _mutate_bytes(data: bytes, draw: random.Random, others: Sequence[bytes]) -> bytes:
    """Changes, inserts, removes, repeats or takes over some bytes, mostly near either end, where headers are."""
    found = bytearray(data or b"\0")
    at = draw.randrange(len(found))
    if draw.random() < 0.6:
        at = min(at, draw.randrange(400)) if draw.random() < 0.7 else max(at, len(found) - 1 - draw.randrange(400))
        at = max(0, min(at, len(found) - 1))
    length = draw.choice((1, 1, 2, 4, 8, 16, 64, 500))
    kind = draw.randrange(8)
    if kind == 0:
        found[at] ^= 1 << draw.randrange(8)
    elif kind == 1:
        found[at] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
    elif kind == 2:
        number = draw.choice(_NUMBERS) & (2**64 - 1)
        size, order = draw.choice((2, 4, 8)), draw.choice(("little", "big"))
        found[at : at + size] = (number & (2 ** (8 * size) - 1)).to_bytes(size, order)
    elif kind == 3:
        found[at:at] = draw.randbytes(length)
    elif kind == 4:
        del found[at : at + length]
    elif kind == 5:
        found[at:at] = found[at : at + length] * draw.choice((1, 2, 50))
    elif kind == 6:
        del found[at:]
    else:
        other = draw.choice(others) if others else data
        start = draw.randrange(len(other) + 1)
        found[at : at + length] = other[start : start + length]
    return bytes(found)


def _mutate_json(data: bytes, draw: random.Random) -> bytes | None:
    """Changes one value, name or list of a JSON text; None if it is none."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if draw.random() < 0.02:
        depth = draw.choice(_DEEP)
        return json.dumps(content).replace("1", "[" * depth + "]" * depth, 1).encode()
    return json.dumps(_changed(content, draw), default=str).encode("utf-8", "surrogatepass")


def _changed(content: Any, draw: random.Random) -> Any:
    """A copy of a JSON value with one change in it, the deeper the likelier."""
    if isinstance(content, dict) and content and draw.random() < 0.85:
        name = draw.choice(list(content))
        kind = draw.random()
        rest = {key: value for key, value in content.items() if key != name}
        if kind < 0.1:
            return rest
        if kind < 0.17:
            return {**rest, draw.choice((*_TEXTS, name.upper(), f"{name}.weight")): content[name]}
        if kind < 0.22:
            return {**content, draw.choice((*_TEXTS, f"{name}2")): draw.choice(list(content.values()))}
        return {**content, name: _changed(content[name], draw)}
    if isinstance(content, list) and content and draw.random() < 0.85:
        at = draw.randrange(len(content))
        kind = draw.random()
        if kind < 0.15:
            return content[:at] + content[at + 1 :]
        if kind < 0.3:
            return content[:at] + [_value(content[at], draw)] * draw.choice((1, 2, 1000)) + content[at:]
        return [*content[:at], _changed(content[at], draw), *content[at + 1 :]]
    if isinstance(content, str) and content[:1] in ("{", "[") and draw.random() < 0.8:  # JSON in a JSON's text
        inner = _mutate_json(content.encode("utf-8", "replace"), draw)
        return content if inner is None else inner.decode("utf-8", "replace")
    return _value(content, draw)


def _value(before: Any, draw: random.Random) -> Any:
    """Another value, often one of the same type."""
    if isinstance(before, int) and not isinstance(before, bool) and draw.random() < 0.6:
        return draw.choice((*_NUMBERS, before + 1, before - 1, 2 * before, -before))
    if isinstance(before, str) and draw.random() < 0.6:
        return draw.choice((*_TEXTS, before + "x", before[:-1], before * 2, before.upper()))
    wrapped: tuple[Any, ...] = ([before], {"x": before}, [], {}, [before] * 1000, str(before))
    return draw.choice((None, True, False, *wrapped, *_NUMBERS, *_FLOATS, *_TEXTS))


def _mutate_safetensors(data: bytes, draw: random.Random) -> bytes | None:
    """Changes the header, with a length that fits, or numbers of the body."""
    (length,) = struct.unpack("<Q", data[:8])
    head, body = data[8 : 8 + length], bytearray(data[8 + length :])
    if body and draw.random() < 0.15:
        for _ in range(draw.choice((1, 1, 8))):
            at = draw.randrange(0, len(body), 4)
            body[at : at + 4] = struct.pack("<f", draw.choice((0.0, -0.0, 1e-40, 1e38, -1e38, math.nan, math.inf)))
        return data[: 8 + length] + bytes(body)
    changed = _mutate_json(head, draw)
    if changed is None:
        return None
    return struct.pack("<Q", len(changed)) + changed + bytes(body)


def _mutate_archive(data: bytes, draw: random.Random) -> bytes | None:
    """Changes, drops, repeats or packs a record of a zip archive; mostly the pickle, in which all names are."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            records = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    except Exception:  # a mutated archive
        return None
    if not records:
        return None
    pickles = [n for n, (name, _) in enumerate(records) if name.endswith("data.pkl")]
    at = draw.choice(pickles) if pickles and draw.random() < 0.7 else draw.randrange(len(records))
    name, content = records[at]
    kind = draw.random()
    if kind < 0.1:
        del records[at]
    elif kind < 0.2:
        records[at] = (draw.choice((name + "x", "data.pkl", "../x", "a/.data/serialization_id")), content)
    else:
        records[at] = (name, _mutate_bytes(content, draw, [record for _, record in records]))
    packed = zipfile.ZIP_DEFLATED if draw.random() < 0.03 else zipfile.ZIP_STORED
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", packed) as archive:
        for name, content in records:
            archive.writestr(zipfile.ZipInfo(name), content, packed)  # without the time of day
    return made.getvalue()
