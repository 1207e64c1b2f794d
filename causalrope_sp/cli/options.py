"""What several commands read from their words."""

from __future__ import annotations

from causalrope_sp.errors import ConfigError


def parse_steps(text: str | None) -> int | tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(word) for word in text.split(",")) if "," in text else int(text)
    except ValueError:
        raise ConfigError(f"--steps takes a count or a list like 1000,750,500,250, not {text!r}") from None
