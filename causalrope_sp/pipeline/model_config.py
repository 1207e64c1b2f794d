"""A model's recipe: a small JSON file that names its parts and how it runs. The embedded one is
toybox/weights/toybox.json.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from causalrope_sp.config import SamplerConfig, StreamConfig
from causalrope_sp.errors import CheckpointError, ConfigError
from causalrope_sp.text import TextSource
from causalrope_sp.toybox import EMBEDDED, WEIGHTS
from causalrope_sp.toybox.toybox_text import ToyboxText
from causalrope_sp.weights.dit_loader import Weights

TEXT_ENCODERS = {"toybox": ToyboxText}


@dataclass(frozen=True)
class ModelConfig:
    """What a model is made of and how it runs, in pixels, pixel frames a second and latent frames.

    `text` is one of `TEXT_ENCODERS` or where UMT5 lies; in the file a path, told from a name by its / or its dot, or
    {"path": ..., "tokenizer": ...}. `weights` is what `load_model` takes. `vin` is the Video Interface Network of a
    model that makes its chunks in parallel.

    Raises:
        ConfigError: a text encoder or weights that are not known, or a size that is no number.
    """

    transformer: Path
    codec: Path
    text: str | TextSource
    height: int
    width: int
    fps: float
    stream: StreamConfig
    sampler: SamplerConfig
    weights: Weights = "full"
    vin: Path | None = None

    def __post_init__(self) -> None:
        whole = all(isinstance(size, int) and not isinstance(size, bool) for size in (self.height, self.width))
        if not whole or not isinstance(self.fps, int | float):
            raise ConfigError(
                f"height, width and fps must be numbers, not {self.height!r}, {self.width!r}, {self.fps!r}"
            )
        if not isinstance(self.text, TextSource) and self.text not in TEXT_ENCODERS:
            raise ConfigError(
                f"unknown text encoder {self.text!r}; this version has: {', '.join(TEXT_ENCODERS)}; a path to UMT5 has "
                "a / or a dot in it"
            )
        if self.weights not in get_args(Weights):
            raise ConfigError(f"weights must be {' or '.join(get_args(Weights))}, not {self.weights!r}")

    @classmethod
    def load(cls, path: Path) -> ModelConfig:
        """Reads a recipe file; the paths in it are relative to its folder.

        Raises:
            CheckpointError: not readable, not JSON, or a field missing or unknown.
        """
        try:
            fields: dict[str, Any] = json.loads(path.read_text())
            fields["transformer"] = path.parent / fields["transformer"]
            fields["codec"] = path.parent / fields["codec"]
            if "vin" in fields:
                fields["vin"] = path.parent / fields["vin"]
            fields["text"] = TextSource.from_json(fields["text"], path.parent)
            fields["stream"] = StreamConfig(**fields["stream"])
            sampler = fields["sampler"]
            lists = {name: tuple(value) for name, value in sampler.items() if isinstance(value, list)}
            fields["sampler"] = SamplerConfig(**{**sampler, "steps": tuple(sampler["steps"]), **lists})
            return cls(**fields)
        except ConfigError:
            raise
        except (OSError, ValueError, TypeError, KeyError) as reason:
            raise CheckpointError(f"{path} is not a model recipe: {type(reason).__name__}: {reason}") from reason


def find_model_config(model: str | Path) -> Path:
    """The recipe file of an embedded model's name, a folder, or itself. Raises CheckpointError if there is none."""
    if str(model) in EMBEDDED:
        return WEIGHTS / f"{model}.json"
    path = Path(model)
    if path.is_dir() and (path / "pipeline.json").is_file():
        return path / "pipeline.json"
    if path.suffix == ".json" and path.is_file():
        return path
    if not path.exists():
        raise CheckpointError(f"no model {str(model)!r}: not one of {', '.join(EMBEDDED)}, not a file, not a folder")
    raise CheckpointError(
        f"{path} is not a whole model: it needs a recipe (pipeline.json) that names its transformer, codec and text "
        "encoder; a bare DiT runs from Python with load_model and sample_chunks"
    )
