"""`ModelConfig`: the files of a model and its settings, and how a pipeline.json stores them."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from causalrope_sp.checks import check_number, check_whole, shown
from causalrope_sp.config import SamplerConfig, StreamConfig, stream_fields
from causalrope_sp.diffusion.schedule import with_overrides
from causalrope_sp.errors import CheckpointError, ConfigError, printable
from causalrope_sp.heads import HeadPolicy, read_heads
from causalrope_sp.heads.policy import heads_of
from causalrope_sp.io.json_files import read_object
from causalrope_sp.pipeline.generation_options import GenerationOptions
from causalrope_sp.pipeline.load_options import LoadOptions
from causalrope_sp.text import TextSource
from causalrope_sp.toybox import WEIGHTS
from causalrope_sp.toybox.toybox_text import ToyboxText
from causalrope_sp.weights.dit_loader import Weights
from causalrope_sp.weights.lora import Lora

TEXT_ENCODERS = {"toybox": ToyboxText}
PIPELINE_FILE = "pipeline.json"
PATHS = (
    "transformer",
    "codec",
    "vin",
    "transformer_2",
    "image_encoder",
)  # fields of the file that are paths, relative to its folder


@dataclass(frozen=True)
class ModelConfig:
    """The files of a model and its settings.

    Args:
        transformer: the file or folder of the DiT.
        codec: the file or folder of the VAE.
        text: one of `TEXT_ENCODERS`, or the files of UMT5. In a pipeline.json UMT5 is {"path": ..., "tokenizer": ...}
            or a path, which is distinguished from a name by a slash or a dot.
        height, width: pixels of a frame.
        fps: pixel frames per second.
        stream: chunks and window, in latent frames.
        sampler: steps, solver and guidance.
        weights: how `load_model` keeps the weights, "full", "fp8" or "fp8-dynamic".
        loras: LoRA files that are merged into the DiT. In a pipeline.json a list of FILE, FILE:WEIGHT or {"path": ...,
            "weight": ..., "alpha": ...}.
        transformer_2: the file or folder of the DiT of the steps at low noise, where there are two; `transformer` is
            then that of the steps at high noise.
        image_encoder: the folder of the CLIP vision encoder of a model that reads image tokens, beside the folder
            `image_processor`; or Wan's own file of it.
        boundary_ratio: the timestep, divided by 1000, below which `transformer_2` makes the steps.
        vin: the file of the Video Interface Network of a model that samples chunks in parallel; None for a stream.
        inferred: settings that no file has and that were inferred from the checkpoint's content, as texts.
        assumed: the loading options whose settings are guesses, because neither the files nor a preset say them.

    Raises:
        ConfigError: the text encoder or `weights` is unknown, or a size or `fps` is not a valid number.
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
    loras: tuple[Lora, ...] = ()
    vin: Path | None = None
    transformer_2: Path | None = None
    boundary_ratio: float | None = None
    image_encoder: Path | None = None
    inferred: tuple[str, ...] = field(default=(), compare=False)
    assumed: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            object.__setattr__(self, name, check_whole(name, getattr(self, name)))
        object.__setattr__(self, "fps", check_number("fps", self.fps, least=1, most=1000))
        if not isinstance(self.text, TextSource) and self.text not in TEXT_ENCODERS:
            raise ConfigError(
                f"unknown text encoder {self.text!r}; this version has: {', '.join(TEXT_ENCODERS)}; a path to UMT5 has "
                "a / or a dot in it"
            )
        self._check_experts()
        if self.weights not in get_args(Weights):
            raise ConfigError(f"weights must be {' or '.join(get_args(Weights))}, not {self.weights!r}")

    def _check_experts(self) -> None:
        """Raises ConfigError unless two transformers have a boundary and one has none."""
        ratio = self.boundary_ratio
        if ratio is not None:
            object.__setattr__(self, "boundary_ratio", check_number("boundary_ratio", ratio, above=0, most=1))
        if (self.transformer_2 is None) != (ratio is None):
            raise ConfigError("transformer_2 and boundary_ratio must be given together, or neither")
        if self.transformer_2 is not None and self.vin is not None:
            raise ConfigError("a model of two transformers makes no chunks in parallel")

    @property
    def transformers(self) -> list[Path]:
        """The files or folders of the transformers, one or two."""
        return [self.transformer] if self.transformer_2 is None else [self.transformer, self.transformer_2]

    @classmethod
    def load(cls, path: Path) -> ModelConfig:
        """Reads a pipeline.json with all fields, whose paths are relative to its folder.

        Raises:
            CheckpointError: the file cannot be read, is not JSON, or has a missing or an unknown field.
            ConfigError: a field has a wrong value.
        """
        return cls.of(read_fields(path), path)

    @classmethod
    def of(cls, fields: dict[str, Any], source_file: Path) -> ModelConfig:
        """Builds a configuration from fields as `read_fields` returns them.

        Args:
            fields: the fields of `ModelConfig`; `stream` and `sampler` may be JSON objects.
            source_file: the file that the error message names.

        Raises:
            CheckpointError: a field is missing or unknown.
            ConfigError: a field has a wrong value.
        """
        try:
            stream, sampler = fields["stream"], fields["sampler"]
            parsed = {
                "stream": stream if isinstance(stream, StreamConfig) else _stream_of(stream),
                "sampler": sampler if isinstance(sampler, SamplerConfig) else _sampler_of(sampler),
            }
            return cls(**{**fields, **parsed})
        except ConfigError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as reason:
            raise CheckpointError(f"{source_file} is not a whole model: {type(reason).__name__}: {reason}") from reason

    def with_options(self, options: LoadOptions) -> ModelConfig:
        """Returns the configuration with the settings that the loading options replace.

        Raises:
            ConfigError: the values contradict each other.
        """
        names = ("window", "sink", "chunk_frames", "rope", "window_policy", "similar_frames", "cache")
        changes = {name: getattr(options, name) for name in names}
        stream = replace(self.stream, **{name: value for name, value in changes.items() if value is not None})
        stream = with_heads(stream, options.heads)
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
        """Returns the model's sampler with the settings that the options replace.

        Raises:
            ConfigError: `SamplerConfig` refuses a value.
        """
        return with_overrides(
            self.sampler,
            steps=options.num_inference_steps,
            solver=options.solver,
            timestep_rule=options.timestep_rule,
            shift=options.shift,
            guidance_scale=options.guidance_scale,
            guidance_interval=options.guidance_interval,
        )

    def as_json(self) -> dict[str, Any]:
        """Returns all settings except paths, in the form that `read_fields` reads."""
        boundary = {} if self.boundary_ratio is None else {"boundary_ratio": self.boundary_ratio}
        return {
            **boundary,
            "height": self.height,
            "width": self.width,
            "fps": self.fps,
            "stream": stream_fields(self.stream),
            "sampler": asdict(self.sampler),
            "weights": self.weights,
        }


def _path(name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} must be a path, not {shown(value)}")
    return value


def read_fields(path: Path) -> dict[str, Any]:
    """Reads the fields of a pipeline.json, and resolves its paths against its folder.

    Raises:
        CheckpointError: the file cannot be read or is not a JSON object.
    """
    try:
        fields = read_object(path)
        resolved: dict[str, Any] = {name: path.parent / _path(name, fields[name]) for name in PATHS if name in fields}
        if "text" in fields:
            resolved["text"] = TextSource.from_json(fields["text"], path.parent)
        if "loras" in fields:
            resolved["loras"] = tuple(_lora_of(entry, path.parent) for entry in fields["loras"])
        return {**fields, **resolved}
    except (OSError, ValueError, TypeError, KeyError) as reason:
        raise CheckpointError(f"{path} is not a model's {PIPELINE_FILE}: {printable(reason)}") from reason


def _lora_of(entry: Any, folder: Path) -> Lora:
    """A LoRA of a pipeline.json, whose path is relative to its folder."""
    return Lora(**{**entry, "path": folder / entry["path"]}) if isinstance(entry, dict) else Lora.of(folder / entry)


def embedded_config(name: str) -> ModelConfig:
    """Returns the configuration of an embedded model.

    Args:
        name: one of `toybox.EMBEDDED`.
    """
    return ModelConfig.load(WEIGHTS / f"{name}.json")


def with_heads(stream: StreamConfig, heads: HeadPolicy | str | os.PathLike[str] | None) -> StreamConfig:
    """Returns a stream's configuration with the windows of its heads, or of a file; None keeps its own.

    Raises:
        ConfigError: the file holds none, or a window is smaller than chunk + sink.
    """
    if heads is None:
        return stream
    if not isinstance(heads, HeadPolicy):
        heads = read_heads(heads, stream.chunk_frames, stream.sink)
    return replace(stream, heads=heads)


def _stream_of(stream: Any) -> StreamConfig:
    """A stream's configuration from its JSON object."""
    heads = stream.get("heads")
    return StreamConfig(**{**stream, "heads": None if heads is None else heads_of(heads)})


def _sampler_of(sampler: Any) -> SamplerConfig:
    """A sampler from its JSON object, whose lists become tuples."""
    lists = {name: tuple(value) for name, value in sampler.items() if isinstance(value, list)}
    return SamplerConfig(**{**sampler, "steps": tuple(sampler["steps"]), **lists})
