"""What waits off the device while it is not in use."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import get_args

from causalrope_sp.config import Keep
from causalrope_sp.errors import ConfigError

WORDS = ("text", "codec", "none")


@dataclass(frozen=True)
class Offload:
    """What gives its memory up between two uses. The frames are the same either way.

    `text`: between two prompts UMT5 stays on the "device", waits on the "cpu", or is given up and read again ("free").
    `codec`: the codec's weights wait on the CPU, pinned, and are on the device only while they decode or encode.
    """

    text: Keep = "cpu"
    codec: bool = False

    def __post_init__(self) -> None:
        if self.text not in get_args(Keep):
            raise ConfigError(f"Offload.text must be one of {', '.join(get_args(Keep))}, not {self.text!r}")

    @classmethod
    def of(cls, said: str | Iterable[str]) -> Offload:
        """From words of `WORDS`, as a list or with commas between. What is not named stays on the device; UMT5, if it
        is named, is given up.

        Raises:
            ConfigError: no word, one that is not known, or "none" beside another.
        """
        given = [said] if isinstance(said, str) else list(said)
        words = [word.strip() for part in given for word in part.split(",")]
        unknown = [word for word in words if word not in WORDS]
        if unknown or not words:
            raise ConfigError(f"offload takes {', '.join(WORDS)}, not {', '.join(map(repr, unknown)) or 'nothing'}")
        if "none" in words and set(words) != {"none"}:
            raise ConfigError(f"offload none goes with no other, not with {', '.join(sorted({*words} - {'none'}))}")
        return cls("free" if "text" in words else "device", "codec" in words)

    def __str__(self) -> str:
        """The words that `of` takes."""
        return ",".join([*(["text"] if self.text != "device" else []), *(["codec"] if self.codec else [])]) or "none"
