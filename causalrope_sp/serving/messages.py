"""The JSON messages of a viewer: which fields they have, and what each field may be."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from causalrope_sp.checks import check_choice, check_flag, check_text, check_whole, shown
from causalrope_sp.errors import ConfigError
from causalrope_sp.pipeline.generation_options import LARGEST_SEED, MOST_CHUNKS

LONGEST_PROMPT = 2000  # characters
LONGEST_MESSAGE = 64 * 1024  # bytes
LARGEST_CONTROL = 10_000.0  # so that it is finite in every dtype
_LARGEST_NUMBER = 2**53 - 1  # that JavaScript counts exactly


def check_prompt(name: str, value: object) -> str:
    """Checks a prompt and returns it.

    Raises:
        ConfigError: it is no text, is empty or too long, or holds half of a character.
    """
    text = check_text(name, value)
    if len(text) > LONGEST_PROMPT:
        raise ConfigError(f"{name} must have at most {LONGEST_PROMPT} characters, not {len(text)}")
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise ConfigError(f"{name} must be Unicode text, and holds half of a surrogate pair")
    return text


def _name(name: str, value: object) -> str:
    text = check_text(name, value)
    if len(text) > 64 or not text.isascii() or not text.replace("-", "").replace("_", "").isalnum():
        raise ConfigError(f"{name} must be what the server has given, letters, digits, - and _, not {shown(value)}")
    return text


def _control(name: str, value: object) -> list[float]:
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{name} must be a list of numbers, not {shown(value)}")
    for number in value:
        if type(number) not in (int, float) or not -LARGEST_CONTROL <= number <= LARGEST_CONTROL:
            most = f"{LARGEST_CONTROL:.0f}"
            raise ConfigError(f"{name} must hold numbers of at least -{most} and at most {most}, not {shown(number)}")
    return [float(number) for number in value]


Check = Callable[[str, object], Any]
_WHOLE: Check = partial(check_whole, least=0, most=_LARGEST_NUMBER)
_MEDIA: Check = partial(check_choice, known=("mp4", "jpeg"))
FIELDS: dict[str, dict[str, Check]] = {
    "open": {
        "prompt": check_prompt,
        "seed": partial(check_whole, least=0, most=LARGEST_SEED),
        "control": _control,
        "media": _MEDIA,
        "session": _name,
        "played": _WHOLE,
        "saved": _name,
    },
    "prompt": {
        "prompt": check_prompt,
        "recache": check_flag,
        "recache_sink": check_flag,
        "new_shot": check_flag,
        "over_chunks": partial(check_whole, most=MOST_CHUNKS),
    },
    "control": {"values": _control},
    "played": {"sequence": _WHOLE},
    "pause": {},
    "resume": {},
    "seek": {"chunk": _WHOLE},
    "save": {"cache": check_flag},
    "close": {},
}
REQUIRED = {"prompt": "prompt", "control": "values", "played": "sequence", "seek": "chunk"}


@dataclass(frozen=True)
class Message:
    """A message of a viewer.

    Args:
        kind: its "type".
        id: the number that its answer repeats; None without one.
        fields: its other fields, checked.
    """

    kind: str
    id: int | None
    fields: Mapping[str, Any]


class WrongMessage(ConfigError):
    """A message cannot be read.

    Args:
        reason: a sentence.
        kind: the type of the message, as far as it was read.
        id: its number, likewise.
    """

    def __init__(self, reason: str, kind: str | None = None, id: int | None = None) -> None:
        super().__init__(reason)
        self.kind, self.id = kind, id


class Refused(Exception):
    """A message that cannot be obeyed.

    Args:
        code: a word for programs.
        reason: a sentence.
    """

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def read_message(text: str) -> Message:
    """Reads a message.

    Args:
        text: JSON.

    Raises:
        WrongMessage: it is no JSON object, its type is unknown, a field is missing, unknown or wrong.
    """
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        raise WrongMessage("a message must be a JSON object") from None
    if not isinstance(fields, dict):
        raise WrongMessage("a message must be a JSON object")
    kind, number = fields.pop("type", None), fields.pop("id", None)
    try:
        number = None if number is None else check_whole("id", number, 0, _LARGEST_NUMBER)
    except ConfigError as error:
        raise WrongMessage(str(error)) from None
    if not isinstance(kind, str) or kind not in FIELDS:
        raise WrongMessage(f"type must be one of {', '.join(FIELDS)}, not {shown(kind)}", None, number)
    try:
        return Message(kind, number, _checked(kind, fields))
    except ConfigError as error:
        raise WrongMessage(str(error), kind, number) from None


def _checked(kind: str, fields: dict[str, Any]) -> dict[str, Any]:
    known, required = FIELDS[kind], REQUIRED.get(kind)
    if unknown := sorted(fields.keys() - known.keys()):
        raise ConfigError(f"{kind} has no field {shown(unknown[0])}; its fields are {', '.join(known) or 'none'}")
    if required is not None and required not in fields:
        raise ConfigError(f"{kind} needs the field {required}")
    if kind == "open":
        _check_open(fields)
    return {name: known[name](name, value) for name, value in fields.items()}


def _check_open(fields: dict[str, Any]) -> None:
    """Raises ConfigError unless a message says in one way what to open."""
    if len({"prompt", "session", "saved"} & fields.keys()) != 1:
        raise ConfigError("open needs one of the fields prompt, session and saved")
    if "seed" in fields and "prompt" not in fields:
        raise ConfigError("seed goes with a prompt: a session has its seed already")
    if "control" in fields and "session" in fields:
        raise ConfigError("control goes with a prompt or a saved session: an open one has its control already")
    if "played" in fields and "session" not in fields:
        raise ConfigError("played goes with a session: nothing has been played of another one")
