"""`Offload`: which weights leave the device while they are not in use."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import get_args

from causalrope_sp.checks import check_choice, check_flag, shown
from causalrope_sp.config import Keep
from causalrope_sp.errors import ConfigError

WORDS = ("text", "codec", "none")


@dataclass(frozen=True)
class Offload:
    """Which weights leave the device between two uses. The frames are the same for all settings.

    Args:
        text: where UMT5's weights are between two prompts: on the "device", on the "cpu", or in their file alone
            ("free"), from which they are read again.
        codec: whether the codec's weights stay in pinned memory of the CPU and are copied to the device only while
            the codec encodes or decodes.

    Raises:
        ConfigError: `text` is none of these, or `codec` is no boolean.
    """

    text: Keep = "cpu"
    codec: bool = False

    def __post_init__(self) -> None:
        check_choice("Offload.text", self.text, get_args(Keep))
        check_flag("Offload.codec", self.codec)

    @classmethod
    def of(cls, names: str | Iterable[str]) -> Offload:
        """Reads the option's words. A part that is not named stays on the device; "text" means `text="free"`.

        Args:
            names: words of `WORDS`, as a list or separated by commas.

        Returns:
            The setting that the words stand for.

        Raises:
            ConfigError: there is no word, an unknown word, another type, or "none" with another word.
        """
        parts = [names] if isinstance(names, str) else list(names) if isinstance(names, Iterable) else [names]
        if not all(isinstance(part, str) for part in parts):
            raise ConfigError(f"offload takes {', '.join(WORDS)}, not {shown(names)}")
        words = [word.strip() for part in parts for word in part.split(",")]
        unknown = [word for word in words if word not in WORDS]
        if unknown or not words:
            raise ConfigError(f"offload takes {', '.join(WORDS)}, not {', '.join(map(repr, unknown)) or 'nothing'}")
        if "none" in words and set(words) != {"none"}:
            raise ConfigError(f"offload none goes with no other, not with {', '.join(sorted({*words} - {'none'}))}")
        return cls("free" if "text" in words else "device", "codec" in words)

    def __str__(self) -> str:
        """The setting as words that `of` takes."""
        return ",".join([*(["text"] if self.text != "device" else []), *(["codec"] if self.codec else [])]) or "none"
