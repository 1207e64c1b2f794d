"""Checks of single values. Each message is one sentence that names the argument, what is expected and what was
given."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterable

from causalrope_sp.errors import ConfigError

LONGEST_SHOWN = 80  # characters of a value that a message shows


def check_whole(name: str, value: object, least: int = 1, most: int | None = None) -> int:
    """`value` as an int; numpy's whole numbers are taken, booleans and floats are not.

    Raises:
        ConfigError: no whole number from `least` to `most`.
    """
    whole: int | None = None
    if not isinstance(value, bool | float):
        try:
            whole = operator.index(value)  # type: ignore[arg-type]  # the error is what is asked for
        except TypeError:
            whole = None
    if whole is None or whole < least or (most is not None and whole > most):
        expected = f"at least {least}" if most is None else f"at least {least} and at most {most}"
        raise ConfigError(f"{name} must be a whole number of {expected}, not {shown(value)}")
    return whole


def check_fields(owner: object, names: Iterable[str], least: int = 1) -> None:
    """Replaces fields of a frozen dataclass by what `check_whole` makes of them.

    Raises:
        ConfigError: a field that is no whole number of at least `least`.
    """
    for name in names:
        whole = check_whole(f"{type(owner).__name__}.{name}", getattr(owner, name), least)
        object.__setattr__(owner, name, whole)


def check_number(name: str, value: object, *, above: float = -math.inf, least: float = -math.inf) -> float:
    """`value` as a finite float.

    Raises:
        ConfigError: no number, or one that is not above `above` and at least `least`.
    """
    number = math.nan
    if not isinstance(value, bool | str | bytes):
        try:
            number = float(value)  # type: ignore[arg-type]  # the error is what is asked for
        except (TypeError, ValueError, OverflowError, RuntimeError):
            number = math.nan
    if not (math.isfinite(number) and number > above and number >= least):
        limits = [f"above {above:g}" if above > -math.inf else "", f"at least {least:g}" if least > -math.inf else ""]
        expected = " of ".join(["a finite number", *filter(None, limits)]).replace("of above", "above")
        raise ConfigError(f"{name} must be {expected}, not {shown(value)}")
    return number


def check_text(name: str, value: object) -> str:
    """Raises ConfigError unless `value` is a text that is not empty."""
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{name} must be a text that is not empty, not {shown(value)}")
    return value


def check_choice(name: str, value: object, known: Collection[str]) -> str:
    """Raises ConfigError unless `value` is one of the words `known`."""
    if not isinstance(value, str) or value not in known:
        raise ConfigError(f"{name} must be one of {', '.join(known)}, not {shown(value)}")
    return value


def shown(value: object) -> str:
    """A value as a message shows it: its repr in one line, cut where it is long."""
    try:
        said = " ".join(repr(value).split())
    except Exception:  # a repr is anybody's code
        said = type(value).__name__
    return said if len(said) <= LONGEST_SHOWN else f"{said[:LONGEST_SHOWN]}…"
