"""A prompt, its tokens and its embeddings as transformers has them."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.support import text_files as files

CLEANED = "A red circle slides & jumps over the hills"


def tokens(prompt: str) -> list[int]:
    """As transformers' own fast tokenizer cuts it: padded to nothing, to 512 tokens."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=files.train_tokenizer(), pad_token="<pad>", eos_token="</s>")
    ids: list[int] = tokenizer(prompt, truncation=True, max_length=512).input_ids
    return ids


def expected(cleaned: str, length: int = 512) -> Tensor:
    """As diffusers' pipeline asks transformers for it: padded, masked, cut to the prompt, filled with zeros."""
    ids = tokens(cleaned)
    padded = torch.tensor([ids + [0] * (length - len(ids))])
    mask = (torch.arange(length) < len(ids)).long()[None]
    made = files.make_encoder()(padded, mask).last_hidden_state
    return torch.cat([made[:, : len(ids)], torch.zeros(1, length - len(ids), files.WIDTH)], 1)
