"""Wan's cleaning of a prompt before the tokenizer."""

from __future__ import annotations

import html
import re

from causalrope_sp.errors import PromptError

# Printable ASCII without entities. ftfy changes only its line ends, which are collapsed in any case.
_PLAIN = re.compile(r"(?:[\t\n\r -%'-~]|&(?!#?[0-9A-Za-z]+;))*")


def clean_prompt(prompt: str) -> str:
    """Cleans a prompt: ftfy repairs it, HTML entities are resolved twice, each run of white space becomes one space.

    Wan does the same. ftfy also straightens quotation marks and expands ligatures and full-width letters, so without it
    ordinary prompts would give other tokens. Such a prompt is refused where ftfy is missing.

    Args:
        prompt: the prompt as the user wrote it.

    Returns:
        The cleaned prompt.

    Raises:
        PromptError: ftfy is not installed and might change this prompt.
    """
    repaired = prompt if _PLAIN.fullmatch(prompt) else _repair(prompt)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(repaired))).strip()


def _repair(prompt: str) -> str:
    """Returns the prompt with its text repaired by ftfy."""
    try:
        import ftfy
    except ImportError:
        found = re.sub(_PLAIN, "", prompt)[0]
        raise PromptError(
            f"the prompt has {found!a}, and Wan's cleaning of such text needs ftfy: pip install ftfy"
        ) from None
    return ftfy.fix_text(prompt)
