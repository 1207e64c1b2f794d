"""UMT5, the text encoder of Wan: transformers' layers, Wan's cleaning of the prompt, weights of either key layout.

Shapes: B prompts, L = text_len tokens, E the encoder's width.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor

from causalrope_sp.config import Keep
from causalrope_sp.errors import CheckpointError, ConfigError, first_line
from causalrope_sp.text.clean import clean_prompt
from causalrope_sp.text.source import TextSource
from causalrope_sp.text.umt5_checkpoint import T5Checkpoint

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TEXT_LEN = 512  # tokens, as in Wan

_log = logging.getLogger(__name__)


class UMT5TextEncoder:
    """Encodes prompts to text embeddings. `from_pretrained` makes one.

    Between two prompts the weights stay on the device, stay on the CPU, or are freed and read again (`keep`).

    Args:
        checkpoint: the open weights.
        tokenizer: the tokenizer; its padding and truncation are set here.
        dtype: the dtype that it computes in; None takes that of the checkpoint.
        device: the device that computes.
        text_len: tokens that each prompt is cut or padded to.
        keep: "device", "cpu" or "free".

    Attributes:
        dim: the encoder's width E.
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
        self._warned: set[str] = set()
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
            path: a diffusers folder or its `text_encoder/`, Wan's own folder or its .pth.
            tokenizer: the folder with tokenizer.json, if it is not where diffusers' or Wan's folder has it.
            dtype: the dtype that it computes in; None takes that of the weights.
            device: the device that computes.
            text_len: tokens that each prompt is cut or padded to.
            keep: where the weights are kept between two prompts: "device", "cpu", or "free" to read them again.

        Returns:
            The encoder.

        Raises:
            CheckpointError: a file is missing, cannot be read, or does not fit the others.
            ConfigError: `keep` is unknown, or `text_len` is below 1.
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
        """A description of the encoder: its size, layout and dtype."""
        layers: int = self._checkpoint.model.config.num_layers
        layout, dtype = self._checkpoint.layout.name, str(self.dtype).removeprefix("torch.")
        return f"umt5, {layers} layers of {self.dim}, {layout} layout, {dtype}"

    @torch.no_grad()
    def encode(self, prompts: str | Sequence[str]) -> Tensor:
        """Encodes prompts one after the other.

        A prompt of more than L tokens is cut, and logged as a warning the first time.

        Args:
            prompts: a prompt or several.

        Returns:
            The embeddings on the encoder's device, (B, L, E), zeros after each prompt's last token.

        Raises:
            CheckpointError: the weights cannot be read, or hold NaN or infinity.
            PromptError: a prompt cannot be cleaned without ftfy.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        tokens = [self._tokens(prompt) for prompt in prompts]
        weights = self._weights()
        embeds = torch.zeros(len(tokens), self.text_len, self.dim, dtype=self.dtype, device=self.device)
        # One by one and without padding, which would be masked, so that no embedding depends on the other prompts.
        for row, ids in zip(embeds, tokens, strict=True):
            made = torch.func.functional_call(
                self._checkpoint.model, weights, (torch.tensor([ids], device=self.device),), tie_weights=False
            )
            row[: len(ids)] = made.last_hidden_state[0]
        del weights
        if self.device.type == "cuda" and self.keep != "device":
            torch.cuda.empty_cache()  # so that other allocators can use the freed memory
        return embeds

    def _tokens(self, prompt: str) -> list[int]:
        """Returns the numbers of a prompt's tokens, at most L."""
        text = clean_prompt(prompt)
        with _as_checkpoint_error("the tokenizer cannot encode a prompt"):
            encoding = self._tokenizer.encode(text)
        if encoding.overflowing and prompt not in self._warned:
            self._warned.add(prompt)
            parts = [encoding, *encoding.overflowing]
            count = sum(part.special_tokens_mask.count(0) for part in parts) + encoding.special_tokens_mask.count(1)
            _log.warning("the prompt has %d tokens and is cut to the first %d", count, self.text_len)
        ids: list[int] = encoding.ids
        return ids

    def _weights(self) -> dict[str, Tensor]:
        """Returns the parameters on the device, under every name that the model has them by."""
        state = self._kept
        if state is None:
            home = torch.device("cpu") if self.keep == "cpu" else self.device
            state = self._checkpoint.read(self.dtype, home)
            self._kept = None if self.keep == "free" else state
        on_device = {name: tensor.to(self.device) for name, tensor in state.items()}
        # Releases of transformers have the token table in one module under two names, or in two modules. Each module's
        # own table is named once, because functional_call restores a module wrongly if it finds it twice.
        modules = self._checkpoint.model.named_modules()
        names = [name for at, module in modules for name, _ in module.named_parameters(at, recurse=False)]
        return {name: on_device.get(name, on_device["shared.weight"]) for name in names}


def _open_tokenizer(file: Path) -> Tokenizer:
    """Opens the tokenizer as its file defines it.

    transformers 5 would build another one from the file, with a fixed number for unknown words and without the file's
    normalizer.
    """
    from tokenizers import Tokenizer

    with _as_checkpoint_error(f"{file}: not a tokenizer"):
        return Tokenizer.from_file(str(file))


@contextlib.contextmanager
def _as_checkpoint_error(problem: str) -> Iterator[None]:
    """Makes what tokenizers raises a CheckpointError: exceptions of no narrower class, and panics of its Rust code."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{problem} ({first_line(error)})") from error
