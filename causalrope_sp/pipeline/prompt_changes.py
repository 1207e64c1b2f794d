"""The prompts of a session, each with the chunk from which it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PromptChange:
    """A prompt of a session.

    Args:
        prompt_id: its number, from 0 on.
        first_chunk: the number of the first chunk that is made under it.
        prompt: its text; None if it was given as embeddings.
        embeds: its embeddings, (1, L, E); None in a resumed session for a prompt that it cannot be taken back to.
    """

    prompt_id: int
    first_chunk: int
    prompt: str | None
    embeds: Tensor | None


def prompt_at(prompts: Sequence[PromptChange], chunk: int) -> PromptChange:
    """Returns the prompt under which the chunk of this number is made."""
    return [prompt for prompt in prompts if prompt.first_chunk <= chunk][-1]
