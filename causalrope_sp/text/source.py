"""Where the weights and the tokenizer of a UMT5 encoder lie."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from causalrope_sp.errors import CheckpointError

TOKENIZER = "tokenizer.json"
WAN_WEIGHTS = "models_t5*"  # models_t5_umt5-xxl-enc-bf16.pth among the files of Wan's own folder


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
    def in_recipe(cls, text: Any, folder: Path) -> Any:
        """What a recipe in `folder` means by its `text`. A path has a / or a dot in it; a name is left as it is."""
        if isinstance(text, dict):
            named = cls.of(**text)
            return cls(folder / named.path, None if named.tokenizer is None else folder / named.tokenizer)
        return cls(folder / text) if isinstance(text, str) and ("/" in text or "." in text) else text

    def find(self) -> tuple[Path, Path]:
        """The file or folder of the weights, and the tokenizer's file.

        Raises:
            CheckpointError: either is not there.
        """
        if not self.path.exists():
            raise CheckpointError(f"no text encoder at {self.path}: no such file or folder")
        weights = self._weights()
        home = weights if weights.is_dir() else weights.parent
        places = [home / "tokenizer", home / "google" / "umt5-xxl", home.parent / "tokenizer", home]
        if self.tokenizer is not None:
            places = [self.tokenizer] if self.tokenizer.is_dir() else [self.tokenizer.parent]
        found = next((place / TOKENIZER for place in places if (place / TOKENIZER).is_file()), None)
        if found is None:
            raise CheckpointError(f"{self.path}: no {TOKENIZER} in {', '.join(map(str, places))}")
        return weights, found

    def _weights(self) -> Path:
        if self.path.is_file():
            return self.path
        if (self.path / "text_encoder").is_dir():
            return self.path / "text_encoder"
        wan = sorted(self.path.glob(WAN_WEIGHTS))
        if len(wan) > 1:
            raise CheckpointError(
                f"{self.path}: several text encoders, name one of them: {', '.join(file.name for file in wan)}"
            )
        return wan[0] if wan else self.path
