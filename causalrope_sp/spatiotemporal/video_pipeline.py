"""Pipelines that make a whole video at once: every pass sees all its frames. They are decoded piece by piece.

Shapes: B batch, F latent frames, C latent channels, H×W latent size, L text tokens, E their width, T pixel frames.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from causalrope_sp.checks import check_number, check_whole
from causalrope_sp.codec.pixels import to_uint8
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.errors import ConfigError
from causalrope_sp.pipeline.option_checks import check_dtype
from causalrope_sp.pipeline.output import VideoChunk
from causalrope_sp.pipeline.timings import Timings
from causalrope_sp.reuse import ReusePolicy, find_policy
from causalrope_sp.spatiotemporal.folder import encode_texts

STRIDE = 8  # pixels a latent pixel, of the picture VAE of both models


@dataclass(frozen=True)
class VideoOptions:
    """How a whole-video model is loaded and sampled; None is the model's own value.

    Args:
        height: pixels of a frame.
        width: pixels of a frame.
        num_inference_steps: how many passes there are.
        guidance_scale: 1 has no unconditional branch.
        dtype: the dtype that all parts compute in; None is bfloat16 on a GPU and float32 on a CPU.

    Raises:
        ConfigError: a value has another type or is out of its range.
    """

    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    dtype: torch.dtype | str | None = None

    def __post_init__(self) -> None:
        for name in ("height", "width", "num_inference_steps"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, check_whole(name, getattr(self, name)))
        if self.guidance_scale is not None:
            object.__setattr__(self, "guidance_scale", check_number("guidance_scale", self.guidance_scale, least=1))
        if self.dtype is not None:
            object.__setattr__(self, "dtype", check_dtype(self.dtype))


@dataclass(frozen=True)
class VideoSettings:
    """What a model does unless `VideoOptions` say otherwise; fields as there."""

    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    fps: float
    num_frames: int
    text_len: int

    def replaced(self, options: VideoOptions) -> VideoSettings:
        """Returns the settings with those that the options replace."""
        names = {field.name for field in fields(VideoOptions)} - {"dtype"}
        changes = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
        return VideoSettings(**{**vars(self), **changes})


class WholeVideoPipeline(ABC):
    """A whole-video model of a folder, on one rank or several.

    Args:
        folder: the folder.
        options: how it is loaded and sampled.
        parallel: the ranks; None is one process.
        model: the transformer; None loads that of the folder.

    Attributes:
        model: the transformer.
        settings: the settings in use.
        parallel: the ranks.

    Raises:
        CheckpointError: a part cannot be read.
        ConfigError: a size does not fit the model.
    """

    strategy = "dynamic"  # how ranks share attention, for reports

    def __init__(
        self,
        folder: str | PathLike[str],
        options: VideoOptions,
        parallel: SequenceParallel | None = None,
        model: Any = None,
    ) -> None:
        self.folder, self.parallel = Path(folder), parallel or SequenceParallel.single()
        device = self.parallel.device
        dtype = options.dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        assert isinstance(dtype, torch.dtype), "VideoOptions checks it"
        self._dtype = dtype
        self.model = model or self.parallel.everyone.run_collectively(self.load_model)
        self.settings = self.parallel.everyone.run_collectively(lambda: self.default_settings().replaced(options))
        patch = STRIDE * self.model.config.patch_size
        for name, size in (("height", self.height), ("width", self.width)):
            if size % patch:
                raise ConfigError(f"{name} must be a multiple of {patch}, not {size}")

    @property
    def height(self) -> int:
        """Pixels of a frame."""
        return self.settings.height

    @property
    def width(self) -> int:
        """Pixels of a frame."""
        return self.settings.width

    @property
    def fps(self) -> float:
        """Pixel frames a second."""
        return self.settings.fps

    def stream(
        self,
        prompt: str,
        *,
        num_frames: int | None = None,
        seed: int = 0,
        negative_prompt: str | None = None,
        reuse: ReusePolicy | str | PathLike[str] | None = None,
    ) -> Iterator[VideoChunk]:
        """Makes a video. Every rank must call.

        Args:
            prompt: what the video shows.
            num_frames: pixel frames; None is the model's own number.
            seed: of the noise, which is drawn on the CPU.
            negative_prompt: what the video is guided away from; None is the model's own null text.
            reuse: a policy, its name or its file; None computes every output.

        Yields:
            VideoChunk: some consecutive frames, decoded on rank 0.

        Raises:
            ConfigError: the number of frames is none that the model makes, or a setting does not fit.
            CheckpointError: a part cannot be read.
        """
        frames = self.settings.num_frames if num_frames is None else check_whole("num_frames", num_frames)
        policy = None if reuse is None else find_policy(reuse)
        self.check_frames(frames)
        self.parallel.everyone.agree(
            {"prompt": prompt, "negative prompt": negative_prompt, "frames": frames, "seed": seed, "reuse": policy}
            | vars(self.settings)
        )
        self.parallel.everyone.run_collectively(lambda: self.decoder if self.parallel.rank == 0 else None)
        started = time.perf_counter()
        with torch.no_grad():
            latents = self.latents(self._noise(frames, seed), frames, prompt, negative_prompt, policy)
        denoised = time.perf_counter()
        first = 0
        for index, pixels in enumerate(self._decoded(latents, frames)):
            now = time.perf_counter()
            timings = Timings(denoised - started, now - denoised, 0.0, now - started)
            shown = None if pixels is None else to_uint8(pixels).permute(0, 2, 3, 1).cpu().numpy()
            yield VideoChunk(index, first, shown, 0, timings, self.parallel.comm_stats.take())
            first += 0 if shown is None else len(shown)
            started = denoised = time.perf_counter()
        self.parallel.everyone.all_say(True)  # the others wait until rank 0 has decoded

    def _noise(self, frames: int, seed: int) -> Tensor:
        """Draws the starting noise, (1, F, C, H, W), as diffusers draws it with a generator on the CPU."""
        shape = 1, self.model.config.in_channels, self.latent_frames(frames)
        generator = torch.Generator().manual_seed(seed)
        size = self.height // STRIDE, self.width // STRIDE
        noise = torch.randn(*shape, *size, generator=generator, dtype=self._dtype)
        return noise.transpose(1, 2).to(self.parallel.device)

    def _decoded(self, latents: Tensor, frames: int) -> Iterator[Tensor | None]:
        """Yields decoded pixels, (T, 3, H, W), on rank 0, and None once on the others."""
        if self.parallel.rank != 0:
            yield None
            return
        with torch.no_grad():
            yield from self.decode(latents, frames)

    def texts(self, texts: list[str], text_width: int) -> tuple[Tensor, Tensor]:
        """Encodes texts on rank 0 and broadcasts them; see `encode_texts`. Every rank must call."""
        everyone, device, dtype = self.parallel.everyone, self.parallel.device, self.model.dtype
        made: list[Tensor] = []

        def encode() -> Tensor:
            found = encode_texts(self.folder, texts, self.settings.text_len, text_width, dtype, device)
            made.extend(found)
            return found[0]

        shape = len(texts), self.settings.text_len
        embeds = everyone.from_first("text", encode, (*shape, text_width), dtype, device)
        return embeds, everyone.from_first("text", lambda: made[1], shape, torch.int64, device)

    @cached_property
    def _decoder(self) -> Any:
        return self.load_decoder()

    @property
    def decoder(self) -> Any:
        """What `load_decoder` returns, loaded before the first video."""
        return self._decoder

    @staticmethod
    @abstractmethod
    def model_on_meta(folder: Path) -> Any:
        """Makes the transformer of a folder from its config, without weights."""

    @abstractmethod
    def load_model(self) -> Any:
        """Loads the transformer."""

    @abstractmethod
    def timesteps(self, frames: int) -> tuple[float, ...]:
        """Returns the timesteps of the passes of a video of so many pixel frames."""

    @abstractmethod
    def default_settings(self) -> VideoSettings:
        """Returns the model's own settings."""

    @abstractmethod
    def check_frames(self, frames: int) -> None:
        """Raises ConfigError if the model makes no video of so many pixel frames."""

    @abstractmethod
    def latent_frames(self, frames: int) -> int:
        """Returns the latent frames of so many pixel frames."""

    @abstractmethod
    def latents(
        self, noise_BFCHW: Tensor, frames: int, prompt: str, negative_prompt: str | None, reuse: ReusePolicy | None
    ) -> Tensor:
        """Samples the latents, (1, F, C, H, W), on every rank."""

    @abstractmethod
    def load_decoder(self) -> Any:
        """Loads the VAE."""

    @abstractmethod
    def decode(self, latents_BFCHW: Tensor, frames: int) -> Iterator[Tensor]:
        """Decodes piece by piece to pixels, (T, 3, H, W) in [-1, 1]."""
