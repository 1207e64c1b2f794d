"""Policies of heads as JSON files: {"windows": [[null, 5, 0, …], …]}, one list a layer, one entry a head.

An entry is a number of latent frames, chunk included, 0 for a head that attends nothing, or null for the whole window.
Where heads see some rows of each frame alone, "rows" is another such table, of the rows of a band (see `HeadPolicy`) or
null for whole frames.

The per-head files that Forcing-KV (arXiv 2605.09681) publishes are read too. They name for every layer the heads of two
kinds, which are "static" and "dynamic", or "local" and "temporal" in older files; some are the bare list of layers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from causalrope_sp.checks import shown
from causalrope_sp.errors import ConfigError, printable
from causalrope_sp.heads.policy import LARGEST, HeadPolicy, Window, heads_of
from causalrope_sp.io.json_files import read_value
from causalrope_sp.io.report_files import write_text

_KINDS = (("static_head", "dynamic_head"), ("local_head", "temporal_head"))


def read_heads(path: str | PathLike[str], chunk_frames: int, sink: int) -> HeadPolicy:
    """Reads the policy of a stream's heads.

    A static head of a file of Forcing-KV sees the sink, the newest frame before its chunk, and the chunk; a dynamic
    head and all heads of layer 0 see the whole window. (Forcing-KV's own dynamic heads see a part of it.)

    Args:
        path: a file that `write_heads` wrote, or one of Forcing-KV.
        chunk_frames: latent frames of the stream's chunks.
        sink: latent frames of its sink.

    Raises:
        ConfigError: the file cannot be read or holds no such policy, or a window is smaller than chunk + sink.
    """
    try:
        given = read_value(Path(path))
        if isinstance(given, Mapping) and "windows" in given:
            policy = heads_of(given)
        else:
            policy = forcing_kv_heads(given, sink + 1 + chunk_frames)
        policy.check_stream(chunk_frames, sink)
    except (ValueError, OverflowError) as reason:
        raise ConfigError(f"{printable(path)} holds no policy of heads: {printable(reason)}") from reason
    return policy


def write_heads(policy: HeadPolicy, path: Path, **notes: Any) -> None:
    """Writes a policy to a JSON file that `read_heads` reads.

    Args:
        policy: the policy.
        path: the file.
        **notes: further fields for human readers, which `read_heads` ignores.

    Raises:
        OutputError: the file cannot be written.
    """
    lines = [f' "{name}": {json.dumps(value)}' for name, value in notes.items()]
    for name, layers in policy.fields.items():
        table = ",\n  ".join(map(json.dumps, layers))
        lines.append(f' "{name}": [\n  {table}\n ]')
    write_text("{\n" + ",\n".join(lines) + "\n}\n", path)


def forcing_kv_heads(given: Any, static: int) -> HeadPolicy:
    """Returns the policy of a file of Forcing-KV.

    Args:
        given: what the file holds as JSON.
        static: the window of its static heads, in latent frames.

    Raises:
        ValueError: it is no such file.
    """
    if isinstance(given, Mapping) and "layers" not in given:
        raise ValueError(f'expected "windows", or "layers" as in a file of Forcing-KV, got {shown(list(given))}')
    if isinstance(given, Mapping) and "rows" in given:
        raise ValueError('expected "windows" beside "rows", got "layers" as in a file of Forcing-KV')
    layers = _list('the file\'s "layers"', given["layers"] if isinstance(given, Mapping) else given)
    windows: list[tuple[Window, ...]] = []
    for number, layer in enumerate(layers):
        if not isinstance(layer, Mapping) or layer.get("layer_idx") != number:
            raise ValueError(f'expected an object with "layer_idx" {number} as layer {number}, got {shown(layer)}')
        kinds = next((kinds for kinds in _KINDS if kinds[0] in layer), _KINDS[0])
        short, whole = (_list(f'"{kind}" of layer {number}', layer.get(kind)) for kind in kinds)
        heads = len(short) + len(whole)
        if heads > LARGEST or sorted(map(str, (*short, *whole))) != sorted(map(str, range(heads))):
            raise ValueError(f"expected each head of layer {number} once, from 0 on, got {shown((*short, *whole))}")
        windows.append(tuple(static if number and head in short else None for head in range(heads)))
    if isinstance(given, Mapping):
        for name, size in (("num_layers", len(windows)), ("num_heads", len(windows[0]) if windows else 0)):
            if given.get(name, size) != size:
                raise ValueError(f'expected "{name}" {size}, as it lists, got {shown(given[name])}')
    return HeadPolicy(tuple(windows))


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"expected a list as {name}, got {shown(value)}")
    return value
