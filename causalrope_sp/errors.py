"""The exceptions of the library. Every message is one line that names what is wrong and what was expected."""

from __future__ import annotations


class CausalRopeError(ValueError):
    """Base of every error that wrong input causes; the command line turns it into one line and status 2.

    Attributes:
        of_rank: for an error of another rank that this one raises too, its message there and the number of that rank.
    """

    of_rank: tuple[str, str] | None = None


class ConfigError(CausalRopeError):
    """A configuration, size, window or strategy is invalid."""


class PromptError(CausalRopeError):
    """The model's text encoder cannot encode a prompt."""


class CheckpointError(CausalRopeError):
    """A checkpoint cannot be read, or does not hold what its layout requires."""


class InputError(CausalRopeError):
    """An image or video cannot be read."""


class OutputError(CausalRopeError):
    """An output file or folder cannot be written."""


class RankLostError(RuntimeError):
    """Another rank of the stream exited, was stopped or does not respond. It is not caused by wrong input."""

    of_rank: tuple[str, str] | None = None  # as for `CausalRopeError`


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message: of an OSError its reason, of one without a message its type."""
    return getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]


_OUT_OF_MEMORY = ("allocate memory", "failed to map segment", "start new thread", "bad_alloc", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error, or one that led to it, says that memory ended, on the host or on a device."""
    cause: BaseException | None = error
    while cause is not None:
        known = isinstance(cause, RuntimeError | ImportError | OSError)
        if isinstance(cause, MemoryError) or (known and any(words in str(cause) for words in _OUT_OF_MEMORY)):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def escaped_line(message: str) -> str:
    """Returns a message in one line, with what a terminal would obey escaped; it may quote a file or an option."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(message.split()))


LONGEST_SHOWN = 160  # characters of a text from outside that a message shows


def printable(name: object) -> str:
    """Returns a text from outside as one printable line of at most `LONGEST_SHOWN` characters, longer if escaped."""
    text = str(name)
    text = text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + "…"
    return text if text.isprintable() else ascii(text)
