"""What a model is made of and how it runs: read from a pipeline.json, a diffusers folder, or a checkpoint and its
base."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from causalrope_sp.checks import check_number, check_whole
from causalrope_sp.config import SamplerConfig, StreamConfig
from causalrope_sp.diffusion.schedule import with_overrides
from causalrope_sp.errors import CheckpointError, ConfigError
from causalrope_sp.pipeline.generation_options import GenerationOptions
from causalrope_sp.pipeline.load_options import LoadOptions
from causalrope_sp.text import TextSource
from causalrope_sp.toybox import WEIGHTS
from causalrope_sp.toybox.toybox_text import ToyboxText
from causalrope_sp.weights.dit_loader import Weights

TEXT_ENCODERS = {"toybox": ToyboxText}
PIPELINE_FILE = "pipeline.json"
PATHS = ("transformer", "codec", "vin")  # fields of the file that are paths, relative to its folder


@dataclass(frozen=True)
class ModelConfig:
    """What a model is made of and how it runs.

    Args:
        transformer: the file or folder of the DiT.
        codec: the file or folder of the VAE.
        text: one of `TEXT_ENCODERS`, or where UMT5 lies. In the file it is a path, told from a name by its / or its
            dot, or {"path": ..., "tokenizer": ...}.
        height, width: pixels of a frame.
        fps: pixel frames a second.
        stream: chunks and window, in latent frames.
        sampler: steps, solver and guidance.
        weights: what `load_model` takes.
        vin: the Video Interface Network of a model that makes its chunks in parallel.
        inferred: what no file says and was taken from the checkpoint's content, in words.

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
    inferred: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            object.__setattr__(self, name, check_whole(name, getattr(self, name)))
        object.__setattr__(self, "fps", check_number("fps", self.fps, above=0))
        if not isinstance(self.text, TextSource) and self.text not in TEXT_ENCODERS:
            raise ConfigError(
                f"unknown text encoder {self.text!r}; this version has: {', '.join(TEXT_ENCODERS)}; a path to UMT5 has "
                "a / or a dot in it"
            )
        if self.weights not in get_args(Weights):
            raise ConfigError(f"weights must be {' or '.join(get_args(Weights))}, not {self.weights!r}")

    @classmethod
    def load(cls, path: Path) -> ModelConfig:
        """Reads a pipeline.json that says everything; the paths in it are relative to its folder.

        Raises:
            CheckpointError: not readable, not JSON, or a field missing or unknown.
        """
        return cls.of(read_fields(path), path)

    @classmethod
    def of(cls, fields: dict[str, Any], said_by: Path) -> ModelConfig:
        """From fields as `read_fields` gives them.

        Raises:
            CheckpointError: a field missing or unknown; the message names the file that said them.
        """
        try:
            stream, sampler = fields["stream"], fields["sampler"]
            made = {
                "stream": stream if isinstance(stream, StreamConfig) else StreamConfig(**stream),
                "sampler": sampler if isinstance(sampler, SamplerConfig) else _sampler_of(sampler),
            }
            return cls(**{**fields, **made})
        except ConfigError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as reason:
            raise CheckpointError(f"{said_by} is not a whole model: {type(reason).__name__}: {reason}") from reason

    def with_options(self, options: LoadOptions) -> ModelConfig:
        """What loading was told, in place of the model's own.

        Raises:
            ConfigError: values that cannot work together.
        """
        named = ("window", "sink", "chunk_frames", "rope")
        given = {name: getattr(options, name) for name in named}
        stream = replace(self.stream, **{name: value for name, value in given.items() if value is not None})
        return replace(
            self,
            stream=stream,
            sampler=self.sampler_of(options),
            height=options.height or self.height,
            width=options.width or self.width,
            weights=options.weights or self.weights,
            codec=self.codec if options.codec_weights is None else Path(options.codec_weights),
        )

    def sampler_of(self, options: LoadOptions | GenerationOptions) -> SamplerConfig:
        """The model's sampler with what the options say in place of its own.

        Raises:
            ConfigError: what `SamplerConfig` refuses.
        """
        return with_overrides(
            self.sampler,
            steps=options.num_inference_steps,
            solver=options.solver,
            shift=options.shift,
            guidance_scale=options.guidance_scale,
            guidance_interval=options.guidance_interval,
        )

    def as_json(self) -> dict[str, Any]:
        """All but the paths, as `read_fields` reads it back."""
        return {
            "height": self.height,
            "width": self.width,
            "fps": self.fps,
            "stream": asdict(self.stream),
            "sampler": asdict(self.sampler),
            "weights": self.weights,
        }


def read_fields(path: Path) -> dict[str, Any]:
    """The fields of a pipeline.json, paths made absolute.

    Raises:
        CheckpointError: not readable, not JSON, or no object.
    """
    try:
        fields = json.loads(path.read_text())
        if not isinstance(fields, dict):
            raise ValueError(f"expected a JSON object, got {type(fields).__name__}")
        made = {name: path.parent / fields[name] for name in PATHS if name in fields}
        if "text" in fields:
            made["text"] = TextSource.from_json(fields["text"], path.parent)
        return {**fields, **made}
    except (OSError, ValueError, TypeError, RecursionError) as reason:
        raise CheckpointError(f"{path} is not a model's {PIPELINE_FILE}: {type(reason).__name__}: {reason}") from reason


def embedded_config(name: str) -> ModelConfig:
    """That of an embedded model."""
    return ModelConfig.load(WEIGHTS / f"{name}.json")


def _sampler_of(sampler: Any) -> SamplerConfig:
    lists = {name: tuple(value) for name, value in sampler.items() if isinstance(value, list)}
    return SamplerConfig(**{**sampler, "steps": tuple(sampler["steps"]), **lists})
