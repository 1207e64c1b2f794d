"""Where the weights and the tokenizer of a UMT5 encoder lie."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from causalrope_sp.errors import CheckpointError

TOKENIZER = "tokenizer.json"
# models_t5_umt5-xxl-enc-bf16.pth among the files of Wan's own folder, and what transformers writes into a folder
WEIGHTS = ("models_t5*", "model*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class TextSource:
    """A diffusers folder (`text_encoder/`, `tokenizer/`), Wan's own (a .pth, `google/umt5-xxl/`), or weights alone and
    the folder of the tokenizer. Nothing is looked for before `find`: other ranks may have none of it."""

    path: Path
    tokenizer: Path | None = None

    @classmethod
    def of(cls, path: str | PathLike[str], tokenizer: str | PathLike[str] | None = None) -> TextSource:
        return cls(Path(path), None if tokenizer is None else Path(tokenizer))

    @classmethod
    def from_json(cls, text: Any, folder: Path) -> Any:
        """What a recipe in `folder` means by its `text`. A path has a / or a dot in it; a name is left as it is."""
        if isinstance(text, dict):
            named = cls.of(**text)
            return cls(folder / named.path, None if named.tokenizer is None else folder / named.tokenizer)
        return cls(folder / text) if isinstance(text, str) and ("/" in text or "." in text) else text

    def is_here(self) -> bool:
        """Whether there are weights to be found, right or wrong."""
        return bool(self._weights())

    def find(self) -> tuple[Path, Path]:
        """The file or folder of the weights, and the tokenizer's file.

        Raises:
            CheckpointError: either is not there.
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
        home = choices[0] if choices[0].is_dir() else choices[0].parent
        places = [home / "tokenizer", home / "google" / "umt5-xxl", home.parent / "tokenizer", home]
        if self.tokenizer is not None:
            places = [self.tokenizer if self.tokenizer.is_dir() else self.tokenizer.parent]
        found = next((place / TOKENIZER for place in places if (place / TOKENIZER).is_file()), None)
        if found is None:
            raise CheckpointError(f"{self.path}: no {TOKENIZER} in {', '.join(map(str, places))}")
        return choices[0], found

    def _weights(self) -> list[Path]:
        if self.path.is_file():
            return [self.path]
        if (self.path / "text_encoder").is_dir():
            return [self.path / "text_encoder"]
        wan, *own = (sorted(self.path.glob(pattern)) for pattern in WEIGHTS)
        return wan or ([self.path] if any(own) else [])
