"""Words for what is wrong with a file. Names in it are whatever its writer chose, so none is printed as it stands."""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice

SHOWN = 4  # keys of a kind that a message names
LONGEST = 160  # characters of one of them


def shown(name: object) -> str:
    """A name from a file as a message can hold it: one line, without control characters, not endless."""
    text = str(name)
    text = text if len(text) <= LONGEST else text[:LONGEST] + "…"
    return text if text.isprintable() else ascii(text)


def some(keys: Collection[object]) -> str:
    rest = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return ", ".join(shown(key) for key in islice(keys, SHOWN)) + rest


def problem(missing: Collection[str], unexpected: Collection[str], misshapen: Collection[str]) -> str | None:
    """What is wrong with a checkpoint's keys, in one line; None if nothing is."""
    kinds = (("missing", missing), ("unexpected", unexpected), ("of a wrong shape", misshapen))
    found = [f"{len(keys)} {kind}: {some(keys)}" for kind, keys in kinds if keys]
    return "; ".join(found) or None


def one_line(error: Exception) -> str:
    """The first sentence of an error of another library; torch's go on for a paragraph."""
    return shown((str(error).splitlines() or [type(error).__name__])[0].split(". ")[0])
