"""Checks of single arguments. Each message is one sentence that names the argument, what was expected and what it
got."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterable, Mapping

from causalrope_sp.errors import ConfigError, printable

LONGEST_SHOWN = 80  # characters of a value that a message shows


def check_whole(name: str, value: object, least: int = 1, most: int | None = None) -> int:
    """Checks a whole number and returns it as an int. numpy's integers are accepted, booleans and floats are not.

    Args:
        name: of the argument, for the message.
        value: the argument.
        least: the smallest value that is accepted.
        most: the largest value that is accepted; None for no limit.

    Raises:
        ConfigError: `value` is not a whole number from `least` to `most`.
    """
    whole: int | None = None
    if not isinstance(value, bool | float):
        try:
            whole = operator.index(value)  # type: ignore[arg-type]  # a TypeError is the test
        except TypeError:
            whole = None
    if whole is None or whole < least or (most is not None and whole > most):
        expected = f"at least {least}" if most is None else f"at least {least} and at most {most}"
        raise ConfigError(f"{name} must be a whole number of {expected}, not {shown(value)}")
    return whole


def check_fields(owner: object, names: Iterable[str], least: int = 1, most: int | None = None) -> None:
    """Checks fields of a frozen dataclass with `check_whole` and replaces them by the ints it returns.

    Args:
        owner: the dataclass.
        names: of the fields.
        least: the smallest value that is accepted.
        most: the largest value that is accepted; None for no limit.

    Raises:
        ConfigError: a field is not a whole number from `least` to `most`.
    """
    for name in names:
        whole = check_whole(f"{type(owner).__name__}.{name}", getattr(owner, name), least, most)
        object.__setattr__(owner, name, whole)


def check_number(
    name: str, value: object, *, above: float = -math.inf, least: float = -math.inf, most: float = math.inf
) -> float:
    """Checks a number and returns it as a finite float.

    Args:
        name: of the argument, for the message.
        value: the argument.
        above: a lower bound that is not accepted itself.
        least: the smallest value that is accepted.
        most: the largest value that is accepted.

    Raises:
        ConfigError: `value` is not a finite number, not above `above`, below `least`, or above `most`.
    """
    number = math.nan
    if not isinstance(value, bool | str | bytes):
        try:
            number = float(value)  # type: ignore[arg-type]  # an error is the test
        except (TypeError, ValueError, OverflowError, RuntimeError):
            number = math.nan
    if not (math.isfinite(number) and number > above and least <= number <= most):
        limits = [f"above {above:g}" if above > -math.inf else "", f"at least {least:g}" if least > -math.inf else ""]
        limits.append(f"at most {most:g}" if most < math.inf else "")
        expected = " of ".join(["a finite number", " and ".join(filter(None, limits))]).removesuffix(" of ")
        expected = expected.replace("of above", "above")
        raise ConfigError(f"{name} must be {expected}, not {shown(value)}")
    return number


def check_flag(name: str, value: object) -> bool:
    """Checks a boolean and returns it; raises ConfigError otherwise."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False, not {shown(value)}")
    return value


def check_text(name: str, value: object) -> str:
    """Checks a string that must not be empty and returns it; raises ConfigError otherwise."""
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{name} must be a text that is not empty, not {shown(value)}")
    return value


def check_choice(name: str, value: object, known: Collection[str]) -> str:
    """Checks a string that must be one of `known` and returns it; raises ConfigError otherwise."""
    if not isinstance(value, str) or value not in known:
        raise ConfigError(f"{name} must be one of {', '.join(known)}, not {shown(value)}")
    return value


def check_names(what: str, given: object, known: Collection[str], needed: Collection[str]) -> None:
    """Checks that a value is a JSON object that has only known fields, and all that are needed.

    Args:
        what: the object, for the message.
        given: the value.
        known: names of all fields.
        needed: names of the fields that must be there.

    Raises:
        ConfigError: `given` is no object, lacks a field, or has an unknown one.
    """
    if not isinstance(given, Mapping):
        raise ConfigError(f"{what} must be a JSON object, not {shown(given)}")
    wrong = [f"no {name}" for name in sorted(needed) if name not in given]
    wrong += [f"an unknown {printable(name)}" for name in given if name not in known]
    if wrong:
        raise ConfigError(f"{what} has {', '.join(wrong[:4])}")


def shown(value: object) -> str:
    """Formats a value for a message: its repr in one line, shortened to `LONGEST_SHOWN` characters."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a foreign __repr__ may raise anything
        text = type(value).__name__
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"
