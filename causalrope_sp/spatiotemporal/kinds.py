"""Which whole-video model a folder holds. A command asks before anything slow, such as torch, is imported."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from causalrope_sp.io.json_files import read_object

Kind = Literal["latte", "open-sora"]
NAMES: dict[Kind, str] = {"latte": "Latte", "open-sora": "Open-Sora 1.2"}


def kind_of(model: str | os.PathLike[str]) -> Kind | None:
    """Returns which whole-video model a folder holds; None for anything else.

    A Latte folder is one of diffusers' `LattePipeline`. An Open-Sora folder has the published models as transformer/
    (STDiT3), vae/, text_encoder/ and tokenizer/.

    Args:
        model: a path, or a name that is none.
    """
    index = _read(Path(model) / "model_index.json")
    if index.get("_class_name") == "LattePipeline":
        return "latte"
    return "open-sora" if _read(Path(model) / "transformer" / "config.json").get("model_type") == "STDiT3" else None


def _read(file: Path) -> dict[str, object]:
    """The content of a JSON file; nothing if it is none, which whoever opens the model reports."""
    try:
        return read_object(file) if file.is_file() else {}
    except (ValueError, OSError):
        return {}
