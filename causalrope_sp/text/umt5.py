"""UMT5, the text encoder of Wan: transformers' layers, Wan's cleaning of the prompt, either layout of the weights.

Shapes: B prompts, L = text_len tokens, E the encoder's width.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor

from causalrope_sp.config import Keep
from causalrope_sp.errors import CheckpointError, ConfigError
from causalrope_sp.text.clean import clean_prompt
from causalrope_sp.text.source import TextSource
from causalrope_sp.text.umt5_checkpoint import T5Checkpoint

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TEXT_LEN = 512  # Wan's

_log = logging.getLogger(__name__)


class UMT5TextEncoder:
    """Prompts to embeddings. Made by `from_pretrained`.

    Between two prompts the weights stay on the device, wait on the CPU, or are given up and read again (`keep`).
    """

    def __init__(
        self,
        checkpoint: T5Checkpoint,
        tokenizer: Tokenizer,
        dtype: torch.dtype | None,
        device: torch.device,
        text_len: int,
        keep: Keep,
    ) -> None:
        self._checkpoint, self._tokenizer = checkpoint, tokenizer
        self.dtype = dtype or checkpoint.dtype
        self.device, self.text_len, self.keep = device, text_len, keep
        self.dim: int = checkpoint.model.config.d_model
        self._kept: Mapping[str, Tensor] | None = None
        self._said: set[str] = set()
        tokenizer.no_padding()
        tokenizer.enable_truncation(text_len)

    @classmethod
    def from_pretrained(
        cls,
        path: str | PathLike[str] | TextSource,
        *,
        tokenizer: str | PathLike[str] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        text_len: int = TEXT_LEN,
        keep: Keep = "device",
    ) -> UMT5TextEncoder:
        """Opens and checks an encoder; its weights are read for the first prompt.

        Args:
            path: a diffusers folder (or its `text_encoder/`), Wan's own folder or its .pth.
            tokenizer: the folder with the tokenizer.json, where it is not beside the weights as either layout has it.
            dtype: what it computes in; if None, as stored.
            device: where it computes.
            text_len: tokens that a prompt is cut to and filled up to.
            keep: where the weights wait between two prompts.

        Raises:
            CheckpointError: a file that is not there, cannot be read, or does not fit the others.
            ConfigError: an unknown `keep`, or a `text_len` below 1.
        """
        if keep not in get_args(Keep):
            raise ConfigError(f"keep must be one of {', '.join(get_args(Keep))}, not {keep!r}")
        if text_len < 1:
            raise ConfigError(f"text_len must be at least 1, not {text_len}")
        source = path if isinstance(path, TextSource) else TextSource.of(path, tokenizer)
        weights, tokens = source.find()
        checkpoint, words = T5Checkpoint.open(weights), _open_tokenizer(tokens)
        size: int = checkpoint.model.config.vocab_size
        if words.get_vocab_size() > size:
            raise CheckpointError(f"{tokens} has {words.get_vocab_size()} tokens, the encoder at {weights} only {size}")
        return cls(checkpoint, words, dtype, torch.device(device), text_len, keep)

    @property
    def name(self) -> str:
        """What made its embeddings, in words."""
        layers: int = self._checkpoint.model.config.num_layers
        layout, dtype = self._checkpoint.layout.name, str(self.dtype).removeprefix("torch.")
        return f"umt5, {layers} layers of {self.dim}, {layout} layout, {dtype}"

    @torch.no_grad()
    def encode(self, prompts: str | Sequence[str]) -> Tensor:
        """(B, L, E) on the encoder's device, zeros after each prompt's end.

        A prompt that has more than L tokens is cut, and a line of log says so, once.

        Raises:
            PromptError: the prompt cannot be cleaned without ftfy.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        tokens = [self._tokens(prompt) for prompt in prompts]
        weights = self._weights()
        embeds = torch.zeros(len(tokens), self.text_len, self.dim, dtype=self.dtype, device=self.device)
        # One by one and without padding, which is masked anyway: then none depends on the others.
        for row, ids in zip(embeds, tokens, strict=True):
            made = torch.func.functional_call(
                self._checkpoint.model, weights, (torch.tensor([ids], device=self.device),), tie_weights=False
            )
            row[: len(ids)] = made.last_hidden_state[0]
        del weights
        if self.device.type == "cuda" and self.keep != "device":
            torch.cuda.empty_cache()  # given up means that other allocators can have it
        return embeds

    def _tokens(self, prompt: str) -> list[int]:
        encoding = self._tokenizer.encode(clean_prompt(prompt))
        if encoding.overflowing and prompt not in self._said:
            self._said.add(prompt)
            parts = [encoding, *encoding.overflowing]
            count = sum(part.special_tokens_mask.count(0) for part in parts) + encoding.special_tokens_mask.count(1)
            _log.warning("the prompt has %d tokens and is cut to the first %d", count, self.text_len)
        ids: list[int] = encoding.ids
        return ids

    def _weights(self) -> dict[str, Tensor]:
        """The parameters on the device, by every name that the model has them under."""
        state = self._kept
        if state is None:
            home = torch.device("cpu") if self.keep == "cpu" else self.device
            state = self._checkpoint.read(self.dtype, home)
            self._kept = None if self.keep == "free" else state
        on_device = {name: tensor.to(self.device) for name, tensor in state.items()}
        # The token table is in one module under two names, or in two, depending on transformers' release. Each module's
        # own is named once, because functional_call would put a module back wrongly that it finds twice.
        modules = self._checkpoint.model.named_modules()
        names = [name for at, module in modules for name, _ in module.named_parameters(at, recurse=False)]
        return {name: on_device.get(name, on_device["shared.weight"]) for name in names}


def _open_tokenizer(file: Path) -> Tokenizer:
    """The tokenizer as its file has it. transformers 5 would build another of it, with a fixed number for unknown
    words and without the file's normaliser."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing more special
        raise CheckpointError(f"{file}: not a tokenizer ({str(error).splitlines()[0]})") from error
