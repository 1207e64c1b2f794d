"""`PlannedModel`: the sizes and settings of a model for `causalrope-sp plan`, from file headers alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from causalrope_sp.codec.codec_footprint import CodecFootprint, codec_footprint, published_footprint
from causalrope_sp.codec.codec_loader import open_codec
from causalrope_sp.codec.wan_vae_config import PUBLISHED
from causalrope_sp.codec.wan_vae_weights import vae_on_meta
from causalrope_sp.config import PRESETS, DiTConfig, SamplerConfig, StreamConfig
from causalrope_sp.diffusion.schedule import with_overrides
from causalrope_sp.errors import CheckpointError, ConfigError
from causalrope_sp.grid import LatentGrid
from causalrope_sp.pipeline.image_encoder import encoder_bytes
from causalrope_sp.pipeline.load_options import LoadOptions
from causalrope_sp.pipeline.model_config import PIPELINE_FILE, ModelConfig, with_heads
from causalrope_sp.pipeline.model_source import BY_STRIDE, MODEL_INDEX, WAN, find_model, local_path
from causalrope_sp.pipeline.offload import Offload
from causalrope_sp.pipeline.option_checks import check_path
from causalrope_sp.pipeline.preflight import auxiliary
from causalrope_sp.planning.decode_cost import DecodePlan, VaeSize, plan_decoding
from causalrope_sp.planning.machines import Machine
from causalrope_sp.planning.memory import AuxiliaryMemory
from causalrope_sp.planning.workload import Workload
from causalrope_sp.reuse.policy import ReusePolicy
from causalrope_sp.sampling.guidance import check_guidance
from causalrope_sp.text import TextSource
from causalrope_sp.text.text_footprint import text_bytes, umt5_xxl_bytes
from causalrope_sp.toybox import EMBEDDED
from causalrope_sp.weights import CheckpointReport, inspect_checkpoint

_STREAM, _SAMPLER = StreamConfig(window=21, chunk_frames=3), SamplerConfig()  # settings of a lone size
_GUESSED: tuple[str, ...] = ("window", "chunk_frames", "steps")  # what a plan needs and a model may not say
_OPTIONS = {"steps": "num_inference_steps"}  # their names as loading options, where the two differ
_BESIDE = ("UMT5-XXL in bfloat16", "the Wan VAE")  # of a transformer alone


@dataclass(frozen=True)
class PlannedModel:
    """The sizes and settings of a model to plan for.

    Args:
        name: the name or path by which it was opened.
        dit: the sizes of the transformer.
        stream: chunks and window, in latent frames.
        sampler: steps and guidance.
        height: pixels of a frame.
        width: pixels of a frame.
        parts: the files of a whole model. None for a size or a checkpoint of the transformer alone, which are planned
            with UMT5-XXL in bfloat16 and the VAE that Wan published for their latent channels.
        wide: how many parameters stay in float32 (see `Workload`).
        assumed: the names of what neither the model nor the caller says.
    """

    name: str
    dit: DiTConfig
    stream: StreamConfig
    sampler: SamplerConfig
    height: int
    width: int
    parts: ModelConfig | None = None
    wide: int = 0
    assumed: tuple[str, ...] = ()

    @classmethod
    def open(cls, name: str) -> PlannedModel:
        """Opens a model without reading its weights.

        Args:
            name: one of `config.PRESETS`, an embedded model, or a path.

        Returns:
            The model.

        Raises:
            CheckpointError: the model cannot be read.
            ConfigError: the model makes its chunks in parallel, or is a lone transformer for a VAE that is none of
                Wan's; neither can be planned.
        """
        stream, sampler = _STREAM, _SAMPLER
        if name in PRESETS:
            size = _frame_of(PRESETS[name])
            return cls(name, PRESETS[name], stream, sampler, *size, assumed=("height", "width", *_GUESSED, *_BESIDE))
        check_path("model", name)
        parts = _whole_model(name)
        if parts is not None:
            if parts.vin is not None:
                raise ConfigError(f"{name} makes its chunks in parallel: there is no plan of a stream")
            report = inspect_checkpoint(parts.transformer)
            assumed = tuple(name for name in _GUESSED if _OPTIONS.get(name, name) in parts.assumed) + _heads(report)
            settings = parts.stream, parts.sampler, parts.height, parts.width
            return cls(name, report.config, *settings, parts, report.wide_parameters, assumed)
        if not local_path(name).exists():
            raise CheckpointError(
                f"no model {name!r}: not one of {', '.join(PRESETS)}, toybox, not a file, not a folder"
            )
        report = inspect_checkpoint(local_path(name))
        if report.config.in_channels not in PUBLISHED:
            raise ConfigError(
                f"{name} has {report.config.in_channels} latent channels, and a lone transformer is planned with the "
                f"VAE that Wan published for {' or '.join(map(str, PUBLISHED))}: name a folder that has the VAE as well"
            )
        size = _frame_of(report.config)
        assumed = _GUESSED
        if report.preset.stream.window is not None:
            stream, sampler = report.preset.stream, report.preset.sampler
            assumed = tuple(name for name in _GUESSED if name in report.preset.assumed)
        assumed = ("height", "width", *assumed, *_heads(report), *_BESIDE)
        return cls(name, report.config, stream, sampler, *size, wide=report.wide_parameters, assumed=assumed)

    def override(self, **changes: Any) -> PlannedModel:
        """Returns this model with some settings replaced.

        Args:
            changes: height, width, window, sink, chunk_frames, window_policy, similar_frames, cache, heads, steps,
                guidance_scale or guidance_interval; None keeps the model's own.

        Raises:
            ConfigError: the settings contradict each other.
        """
        new = {name: value for name, value in changes.items() if value is not None}
        of_stream = ("window", "sink", "chunk_frames", "window_policy", "similar_frames", "cache")
        stream = {name: new[name] for name in of_stream if name in new}
        sampler = {name: new[name] for name in ("steps", "guidance_scale", "guidance_interval") if name in new}
        size = {name: new[name] for name in ("height", "width") if name in new}
        return replace(
            self,
            stream=with_heads(replace(self.stream, **stream), new.get("heads")),
            sampler=with_overrides(self.sampler, **sampler),
            assumed=tuple(name for name in self.assumed if name not in new),
            **size,
        )

    def assumptions(self) -> list[str]:
        """Returns what the plan assumes, as texts."""
        known = {
            "height": f"height {self.height}",
            "width": f"width {self.width}",
            "window": f"window {self.stream.window}",
            "chunk_frames": f"chunk_frames {self.stream.chunk_frames}",
            "steps": f"{len(self.sampler.steps)} steps",
            "num_heads": f"{self.dit.num_heads} heads",
        }
        return [known.get(name, name) for name in self.assumed]

    def workload(self, reuse: ReusePolicy | None = None) -> Workload:
        """Returns the work of a stream in its steady state.

        Args:
            reuse: which attention outputs later steps reuse; None for none.

        Raises:
            CheckpointError: the model's codec cannot be read.
            ConfigError: guidance applies to no step, the stream has no window, or the strides do not divide the size.
        """
        check_guidance(self.sampler, cfg=1)
        if self.stream.window is None:
            raise ConfigError(f"{self.name} looks back over everything: give --window, the latent frames of the video")
        codec = self._codec(WAN["height"], WAN["width"], 1)  # the model's own size is not checked yet
        grid = LatentGrid.from_pixels(self.height, self.width, codec.stride, self.dit.patch_size[1:])
        work = Workload.of(self.dit, grid, self.stream, self.sampler, self.stream.window, reuse=reuse)
        models = 1 + (self.parts is not None and self.parts.transformer_2 is not None)
        return replace(work, wide=self.wide, temporal_stride=codec.temporal_stride, models=models)

    def auxiliary(self, work: Workload, offload: Offload, on_cpu: bool) -> AuxiliaryMemory:
        """Returns the memory of the text encoder and the codec; on a GPU passes run by graphs.

        Args:
            work: the work of the stream.
            offload: which weights leave the device.
            on_cpu: whether the device is a CPU.

        Raises:
            CheckpointError: the model's codec or text encoder cannot be read.
        """
        codec = self._codec(self.height, self.width, work.chunk_frames)
        if self.parts is None:
            return auxiliary(umt5_xxl_bytes(), codec, offload, on_cpu)
        text = text_bytes(self.parts.text) if isinstance(self.parts.text, TextSource) else 0
        encoder = self.parts.image_encoder if on_cpu else None  # it is never on a GPU
        return replace(auxiliary(text, codec, offload, on_cpu), image=0 if encoder is None else encoder_bytes(encoder))

    def _codec(self, height: int, width: int, frames: int) -> CodecFootprint:
        """The memory and the strides of the model's own codec, or of the published Wan VAE."""
        if self.parts is None:
            return published_footprint(PUBLISHED[self.dit.in_channels], height, width, frames)
        return codec_footprint(self.parts.codec, None, height, width, frames)

    def decoding(self, work: Workload, ranks: int, on: Machine) -> DecodePlan | None:
        """Plans how many of the ranks only decode.

        Args:
            work: the work of the stream.
            ranks: how many ranks there are.
            on: the machine.

        Returns:
            The plan for a Wan VAE; None for another codec.

        Raises:
            CheckpointError: the model's codec cannot be read.
        """
        if self.parts is None:
            return plan_decoding(VaeSize.of(PUBLISHED[self.dit.in_channels]), work, ranks, on)
        files, kind = open_codec(self.parts.codec)
        return plan_decoding(VaeSize.of(vae_on_meta(files).config), work, ranks, on) if kind == "wan" else None


def _frame_of(dit: DiTConfig) -> tuple[int, int]:
    """Height and width, in pixels, of the frames of a transformer alone."""
    frames = BY_STRIDE.get(PUBLISHED[dit.in_channels].scale_factor_spatial, WAN)
    return frames["height"], frames["width"]


def _heads(report: CheckpointReport) -> tuple[str, ...]:
    return tuple(name for name in report.assumed if name == "num_heads")


def _whole_model(name: str) -> ModelConfig | None:
    """The configuration of a model with all of its parts, or None for a checkpoint of the transformer alone.

    Raises:
        CheckpointError: a folder or a .json file that describes a whole model cannot be opened.
    """
    path = local_path(name)
    if name not in EMBEDDED and not path.exists():
        return None
    try:
        return find_model(name, LoadOptions())
    except CheckpointError:
        described = path.suffix == ".json" and not path.name.endswith(".index.json")
        if described or any((path / file).is_file() for file in (MODEL_INDEX, PIPELINE_FILE)):
            raise
        return None
