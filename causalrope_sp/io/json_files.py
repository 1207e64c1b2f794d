"""JSON from files, bounded in size; each fault of a file is one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LONGEST = 64 << 20  # bytes; the index of the largest published model has a thousandth of that


def read_object(file: Path) -> dict[str, Any]:
    """Reads a JSON object from a regular file.

    Args:
        file: the file.

    Returns:
        The fields of the object.

    Raises:
        ValueError: the file cannot be read, is longer than `LONGEST`, or is not a JSON object.
    """
    return parse_object(_text_of(file))


def read_value(file: Path) -> Any:
    """Reads any JSON value from a regular file; raises ValueError as `read_object`."""
    return _parse(_text_of(file))


def _text_of(file: Path) -> bytes:
    try:
        if not file.is_file():
            raise ValueError("no such file" if not file.exists() else "not a regular file")
        with file.open("rb") as stream:
            text = stream.read(LONGEST + 1)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror or error}") from error
    if len(text) > LONGEST:
        raise ValueError(f"longer than {LONGEST >> 20} MiB")
    return text


def parse_object(text: str | bytes) -> dict[str, Any]:
    """Parses a JSON object.

    Args:
        text: the JSON text.

    Returns:
        The fields of the object.

    Raises:
        ValueError: the text is not JSON, is nested too deeply, or is not an object.
    """
    content = _parse(text)
    if not isinstance(content, dict):
        raise ValueError(f"not a JSON object but a value of type {type(content).__name__}")
    return content


def _parse(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("not JSON that can be read: it is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise ValueError("not JSON but bytes that are no text") from error
    except ValueError as error:  # integers of thousands of digits too
        raise ValueError(f"not JSON ({str(error).split('; use sys.')[0]})") from error
