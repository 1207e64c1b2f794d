"""The files of a UMT5 encoder: its weights and its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from causalrope_sp.errors import CheckpointError, first_line

TOKENIZER = "tokenizer.json"
# the file in Wan's own folder (models_t5_umt5-xxl-enc-bf16.pth), and the two kinds that transformers writes
WEIGHTS = ("models_t5*", "model*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class TextSource:
    """Where a UMT5 encoder's files are.

    The constructor looks for no file, because other ranks than the first need none.

    Attributes:
        path: a diffusers folder (`text_encoder/`, `tokenizer/`), Wan's own folder (a .pth, `google/umt5-xxl/`), or the
            weights alone.
        tokenizer: the folder or file of the tokenizer; None looks for it near the weights.
    """

    path: Path
    tokenizer: Path | None = None

    @classmethod
    def of(cls, path: str | PathLike[str], tokenizer: str | PathLike[str] | None = None) -> TextSource:
        """Makes a source from paths of any kind."""
        return cls(Path(path), None if tokenizer is None else Path(tokenizer))

    @classmethod
    def from_json(cls, text: Any, folder: Path) -> Any:
        """Reads the field `text` of a model config.

        Args:
            text: an object with `path` and `tokenizer`, a path (it has a "/" or a "." in it), or another value.
            folder: the folder of the model config, which relative paths start from.

        Returns:
            A `TextSource`; `text` itself if it is no path, such as an encoder's name.
        """
        if isinstance(text, dict):
            named = cls.of(**text)
            return cls(folder / named.path, None if named.tokenizer is None else folder / named.tokenizer)
        return cls(folder / text) if isinstance(text, str) and ("/" in text or "." in text) else text

    def is_here(self) -> bool:
        """Returns whether there are weights, faulty or not."""
        return bool(self._weights())

    def find(self) -> tuple[Path, Path]:
        """Finds the weights and the tokenizer.

        Returns:
            The file or folder of the weights, and the tokenizer's file.

        Raises:
            CheckpointError: either is missing, or there are several files of weights.
        """
        choices = self._weights()
        if not choices:
            looked_for = (
                f"no text_encoder/, {', '.join(WEIGHTS)} in it" if self.path.exists() else "no such file or folder"
            )
            raise CheckpointError(f"no text encoder at {self.path}: {looked_for}")
        if len(choices) > 1:
            names = ", ".join(file.name for file in choices)
            raise CheckpointError(f"{self.path}: several text encoders, name one of them: {names}")
        try:
            return choices[0], self._tokenizer_of(choices[0])
        except OSError as reason:
            raise CheckpointError(f"no tokenizer at {self.tokenizer}: {first_line(reason)}") from reason

    def _tokenizer_of(self, weights: Path) -> Path:
        """Returns the file of the tokenizer; raises CheckpointError if there is none."""
        home = weights if weights.is_dir() else weights.parent
        folders = [home / "tokenizer", home / "google" / "umt5-xxl", home.parent / "tokenizer", home]
        if self.tokenizer is not None:
            folders = [self.tokenizer if self.tokenizer.is_dir() else self.tokenizer.parent]
        found = next((folder / TOKENIZER for folder in folders if (folder / TOKENIZER).is_file()), None)
        if found is None:
            raise CheckpointError(f"{self.path}: no {TOKENIZER} in {', '.join(map(str, folders))}")
        return found

    def _weights(self) -> list[Path]:
        """Returns every file or folder that may be the weights; raises CheckpointError for a name no file can have."""
        try:
            if self.path.is_file():
                return [self.path]
            if (self.path / "text_encoder").is_dir():
                return [self.path / "text_encoder"]
        except OSError as reason:
            raise CheckpointError(f"no text encoder at {self.path}: {first_line(reason)}") from reason
        wan, *own = (sorted(self.path.glob(pattern)) for pattern in WEIGHTS)
        return wan or ([self.path] if any(own) else [])
