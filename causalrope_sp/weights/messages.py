"""Parts of messages on a faulty file. Names in a file may be hostile, so each is cut and escaped before printing."""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice

from causalrope_sp.errors import printable

SHOWN = 4  # keys that a message names, at most


def some(keys: Collection[object]) -> str:
    """Returns the first `SHOWN` keys, separated by commas, and how many more there are."""
    rest = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return ", ".join(printable(key) for key in islice(keys, SHOWN)) + rest


def problem(missing: Collection[str], unexpected: Collection[str], misshapen: Collection[str]) -> str | None:
    """Describes the problems of a checkpoint's keys.

    Args:
        missing: the keys that the model needs and the checkpoint lacks.
        unexpected: the keys that belong to no parameter.
        misshapen: a text for each key of a wrong shape.

    Returns:
        One line; None if all three are empty.
    """
    kinds = (("missing", missing), ("unexpected", unexpected), ("of a wrong shape", misshapen))
    found = [f"{len(keys)} {kind}: {some(keys)}" for kind, keys in kinds if keys]
    return "; ".join(found) or None


def one_line(error: Exception) -> str:
    """Returns the first sentence of another library's error; torch's messages are paragraphs."""
    return printable((str(error).splitlines() or [type(error).__name__])[0].split(". ")[0])
