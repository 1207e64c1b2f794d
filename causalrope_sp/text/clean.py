"""Wan's cleaning of a prompt, before it is cut into tokens."""

from __future__ import annotations

import html
import re

from causalrope_sp.errors import PromptError

# Printable ASCII without entities: what ftfy leaves as it is, but for line ends, which are collapsed anyway.
_PLAIN = re.compile(r"(?:[\t\n\r -%'-~]|&(?!#?[0-9A-Za-z]+;))*")


def clean_prompt(prompt: str) -> str:
    """The prompt with its text repaired, entities of HTML resolved twice and runs of white space made one.

    ftfy does the repair, as for Wan. It also straightens quotation marks and unfolds ligatures and full-width letters,
    so that leaving it out would change the tokens of ordinary prompts: rather than that, they are refused.

    Raises:
        PromptError: ftfy is not installed and might change this prompt.
    """
    repaired = prompt if _PLAIN.fullmatch(prompt) else _repair(prompt)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(repaired))).strip()


def _repair(prompt: str) -> str:
    try:
        import ftfy
    except ImportError:
        found = re.sub(_PLAIN, "", prompt)[0]
        raise PromptError(
            f"the prompt has {found!a}, and Wan's cleaning of such text needs ftfy: pip install ftfy"
        ) from None
    return ftfy.fix_text(prompt)
