"""Types of options, parsing and shell completion that several commands share."""

from __future__ import annotations

from collections.abc import Iterable

import click
from click.shell_completion import CompletionItem

from causalrope_sp.checks import shown
from causalrope_sp.errors import ConfigError


def parse_steps(text: str | None) -> int | tuple[float, ...] | None:
    """Parses the option --steps.

    Args:
        text: a number of denoising steps, or their timesteps separated by commas; None if the option is not set.

    Returns:
        The number, the timesteps, or None.

    Raises:
        ConfigError: the text is neither.
    """
    if text is None:
        return None
    try:
        if "_" in text or not text.isascii():
            raise ValueError("not in plain digits")
        return tuple(float(word) for word in text.split(",")) if "," in text else int(text)
    except ValueError:
        raise ConfigError(f"--steps takes a count or a list like 1000,750,500,250, not {shown(text)}") from None


def complete_model(_: click.Context, __: click.Parameter, begun: str) -> list[CompletionItem]:
    """Completes the names of embedded models, and files."""
    from causalrope_sp.toybox import EMBEDDED

    return [*_items(EMBEDDED, begun), CompletionItem(begun, type="file")]


def complete_preset(_: click.Context, __: click.Parameter, begun: str) -> list[CompletionItem]:
    """Completes the names of published presets."""
    from causalrope_sp.weights import FAMILY

    return _items(FAMILY, begun)


def complete_strategy(_: click.Context, __: click.Parameter, begun: str) -> list[CompletionItem]:
    """Completes the names of attention strategies, products of two for two to eight ranks."""
    from causalrope_sp.distributed.layout import AUTO, strategies

    names = [name for ranks in range(2, 9) for name in strategies(ranks, 64)]
    return _items([AUTO, *dict.fromkeys(names)], begun)


def _items(names: Iterable[str], begun: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in names if name.startswith(begun)]
