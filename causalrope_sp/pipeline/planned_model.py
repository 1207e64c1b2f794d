"""A model as `causalrope-sp plan` sees it: its sizes and how it runs, from headers alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from causalrope_sp.codec.codec_footprint import codec_footprint, wan_2_1_footprint
from causalrope_sp.codec.codec_loader import open_codec
from causalrope_sp.codec.wan_vae_weights import vae_on_meta
from causalrope_sp.config import PRESETS, VAE_STRIDE, DiTConfig, SamplerConfig, StreamConfig
from causalrope_sp.diffusion.schedule import with_overrides
from causalrope_sp.errors import CheckpointError, ConfigError
from causalrope_sp.grid import LatentGrid
from causalrope_sp.pipeline.load_options import LoadOptions
from causalrope_sp.pipeline.model_config import ModelConfig
from causalrope_sp.pipeline.model_source import find_model
from causalrope_sp.pipeline.offload import Offload
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
from causalrope_sp.weights import inspect_checkpoint

WAN = StreamConfig(window=21, chunk_frames=3), SamplerConfig(), (480, 832)  # what a size alone runs as


@dataclass(frozen=True)
class PlannedModel:
    """A model's sizes and how it runs. `parts` is None for a preset or a checkpoint of the transformer alone; then the
    text encoder and the codec are Wan's own, UMT5-XXL in bfloat16 and the Wan VAE."""

    name: str
    dit: DiTConfig
    stream: StreamConfig
    sampler: SamplerConfig
    height: int
    width: int
    parts: ModelConfig | None = None

    @classmethod
    def open(cls, name: str) -> PlannedModel:
        """From the name of a size or of an embedded model, or from a path.

        Raises:
            CheckpointError: nothing readable there.
            ConfigError: a model that makes its chunks in parallel, of which there is no plan.
        """
        stream, sampler, size = WAN
        if name in PRESETS:
            return cls(name, PRESETS[name], stream, sampler, *size)
        parts = _whole_model(name)
        if parts is not None:
            if parts.vin is not None:
                raise ConfigError(f"{name} makes its chunks in parallel: there is no plan of a stream")
            dit = inspect_checkpoint(parts.transformer).config
            return cls(name, dit, parts.stream, parts.sampler, parts.height, parts.width, parts)
        if not Path(name).exists():
            raise CheckpointError(
                f"no model {name!r}: not one of {', '.join(PRESETS)}, toybox, not a file, not a folder"
            )
        report = inspect_checkpoint(name)
        if report.preset.stream.window is not None:
            stream, sampler = report.preset.stream, report.preset.sampler
        return cls(name, report.config, stream, sampler, *size)

    def override(self, **changes: Any) -> PlannedModel:
        """With whatever is not None in place of its own: height, width, window, sink, chunk_frames, and the sampler's
        steps, guidance_scale and guidance_interval.

        Raises:
            ConfigError: settings that cannot work together.
        """
        given = {name: value for name, value in changes.items() if value is not None}
        stream = {name: given[name] for name in ("window", "sink", "chunk_frames") if name in given}
        sampler = {name: given[name] for name in ("steps", "guidance_scale", "guidance_interval") if name in given}
        size = {name: given[name] for name in ("height", "width") if name in given}
        return replace(
            self, stream=replace(self.stream, **stream), sampler=with_overrides(self.sampler, **sampler), **size
        )

    def workload(self, reuse: ReusePolicy | None = None) -> Workload:
        """The stream.

        Raises:
            ConfigError: guidance at no step, a stream without a window, or a size that the strides do not divide.
        """
        check_guidance(self.sampler, cfg=1)
        if self.stream.window is None:
            raise ConfigError(f"{self.name} looks back over everything: give --window, the latent frames of the video")
        grid = LatentGrid.from_pixels(self.height, self.width, VAE_STRIDE[1], self.dit.patch_size[1:])
        return Workload.of(self.dit, grid, self.stream, self.sampler, self.stream.window, reuse=reuse)

    def auxiliary(self, work: Workload, offload: Offload, on_cpu: bool) -> AuxiliaryMemory:
        """The text encoder and the codec beside the transformer.

        Raises:
            CheckpointError: the model's codec or text encoder cannot be read.
        """
        size = VAE_STRIDE[1] * work.grid.latent_height, VAE_STRIDE[1] * work.grid.latent_width
        if self.parts is None:
            return auxiliary(umt5_xxl_bytes(), wan_2_1_footprint(*size, work.chunk_frames), offload, on_cpu)
        text = text_bytes(self.parts.text) if isinstance(self.parts.text, TextSource) else 0
        return auxiliary(text, codec_footprint(self.parts.codec, None, *size, work.chunk_frames), offload, on_cpu)

    def decoding(self, work: Workload, ranks: int, on: Machine) -> DecodePlan | None:
        """How denoising and decoding are best spread over the ranks, for a Wan VAE; None for another codec.

        Raises:
            CheckpointError: the model's codec cannot be read.
        """
        vae = VaeSize()
        if self.parts is not None:
            files, kind = open_codec(self.parts.codec)
            if kind != "wan":
                return None
            vae = VaeSize.of(vae_on_meta(files).config)
        return plan_decoding(vae, work, ranks, on)


def _whole_model(name: str) -> ModelConfig | None:
    """The configuration of a model with all of its parts, or None for a checkpoint of the transformer alone."""
    if name not in EMBEDDED and not Path(name).exists():
        return None
    try:
        return find_model(name, LoadOptions())
    except CheckpointError:
        return None
