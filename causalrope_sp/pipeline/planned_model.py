"""`PlannedModel`: the sizes and settings of a model for `causalrope-sp plan`, from file headers alone."""

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

WAN = (
    StreamConfig(window=21, chunk_frames=3),
    SamplerConfig(),
    (480, 832),
)  # settings of a lone size


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
            with UMT5-XXL in bfloat16 and the Wan VAE.
    """

    name: str
    dit: DiTConfig
    stream: StreamConfig
    sampler: SamplerConfig
    height: int
    width: int
    parts: ModelConfig | None = None

    @classmethod
    def open(cls, name: str) -> PlannedModel:
        """Opens a model without reading its weights.

        Args:
            name: one of `config.PRESETS`, an embedded model, or a path.

        Returns:
            The model.

        Raises:
            CheckpointError: the model cannot be read.
            ConfigError: the model makes its chunks in parallel, which cannot be planned.
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
        """Returns this model with some settings replaced.

        Args:
            changes: height, width, window, sink, chunk_frames, steps, guidance_scale or guidance_interval; None keeps
                the model's own.

        Raises:
            ConfigError: the settings contradict each other.
        """
        new = {name: value for name, value in changes.items() if value is not None}
        stream = {name: new[name] for name in ("window", "sink", "chunk_frames") if name in new}
        sampler = {name: new[name] for name in ("steps", "guidance_scale", "guidance_interval") if name in new}
        size = {name: new[name] for name in ("height", "width") if name in new}
        return replace(
            self, stream=replace(self.stream, **stream), sampler=with_overrides(self.sampler, **sampler), **size
        )

    def workload(self, reuse: ReusePolicy | None = None) -> Workload:
        """Returns the work of a stream in its steady state.

        Args:
            reuse: which attention outputs later steps reuse; None for none.

        Raises:
            ConfigError: guidance applies to no step, the stream has no window, or the strides do not divide the size.
        """
        check_guidance(self.sampler, cfg=1)
        if self.stream.window is None:
            raise ConfigError(f"{self.name} looks back over everything: give --window, the latent frames of the video")
        grid = LatentGrid.from_pixels(self.height, self.width, VAE_STRIDE[1], self.dit.patch_size[1:])
        return Workload.of(self.dit, grid, self.stream, self.sampler, self.stream.window, reuse=reuse)

    def auxiliary(self, work: Workload, offload: Offload, on_cpu: bool) -> AuxiliaryMemory:
        """Returns the memory of the text encoder and the codec.

        Args:
            work: the work of the stream.
            offload: which weights leave the device.
            on_cpu: whether the device is a CPU.

        Raises:
            CheckpointError: the model's codec or text encoder cannot be read.
        """
        size = VAE_STRIDE[1] * work.grid.latent_height, VAE_STRIDE[1] * work.grid.latent_width
        if self.parts is None:
            return auxiliary(umt5_xxl_bytes(), wan_2_1_footprint(*size, work.chunk_frames), offload, on_cpu)
        text = text_bytes(self.parts.text) if isinstance(self.parts.text, TextSource) else 0
        return auxiliary(text, codec_footprint(self.parts.codec, None, *size, work.chunk_frames), offload, on_cpu)

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
