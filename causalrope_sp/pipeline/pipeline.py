"""Text in, frames out: the text encoder, the sampler and the codec of one model, as a stream of chunks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Self

import numpy as np
import torch

from causalrope_sp.codec import load_codec
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import LatentGrid
from causalrope_sp.pipeline.generation import Generation, StreamSettings
from causalrope_sp.pipeline.generation_options import GenerationOptions
from causalrope_sp.pipeline.load_options import LoadOptions
from causalrope_sp.pipeline.loading import Parts, load_parts
from causalrope_sp.pipeline.model_config import TEXT_ENCODERS
from causalrope_sp.pipeline.option_checks import check_device, check_dtype
from causalrope_sp.pipeline.output import StreamGuard, VideoChunk
from causalrope_sp.pipeline.results import CausalVideoPipelineOutput, as_output
from causalrope_sp.pipeline.saving import save_parts
from causalrope_sp.pipeline.warm_up import warm_up
from causalrope_sp.text import TextSource
from causalrope_sp.text.shared_encoder import SharedUMT5
from causalrope_sp.toybox.toybox_text import ToyboxText
from causalrope_sp.version import __version__
from causalrope_sp.weights.digest import digest
from causalrope_sp.weights.fp8 import is_fp8


class CausalVideoPipeline:
    """A model that is ready to run. Under torchrun every rank builds one and makes the same calls.

    Attributes:
        config: what the model is made of and how it runs.
        model: the transformer.
        codec: the VAE.
        text: the text encoder.
        parallel: the ranks.
        height, width, fps: of a frame in pixels, and pixel frames a second.
    """

    def __init__(self, parts: Parts, parallel: SequenceParallel) -> None:
        self._progress: dict[str, Any] = {}
        self._open(parts, parallel)

    def _open(self, parts: Parts, parallel: SequenceParallel) -> None:
        self.parts, self.parallel = parts, parallel
        self.config, self.model, self.codec = parts.config, parts.model, parts.codec
        self.height, self.width, self.fps = self.config.height, self.config.width, self.config.fps
        self.text = self._open_text()
        channels = self.model.config.in_channels
        if self.codec.channels != channels:
            raise ConfigError(f"the codec's latents have {self.codec.channels} channels, the model's {channels}")
        works_ahead = parallel.mesh.decode > 0 or (parts.options.decode == "overlap" and parallel.size > 1)
        self._streams = StreamGuard(works_ahead)
        parallel.check(self.settings().grid, self.model.config.num_heads)
        self._agree()

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str] = "toybox",
        options: LoadOptions | None = None,
        *,
        parallel: SequenceParallel | None = None,
        **overrides: Any,
    ) -> Self:
        """Loads a model.

        Args:
            model: an embedded model ("toybox", "toybox-flow", "toybox-vin"); a diffusers folder (with a
                model_index.json); a folder of Wan's own layout; a folder with a pipeline.json, or such a file, whose
                fields come before all others; a checkpoint of the transformer alone, with `base`; or any of these in a
                Hub repository, as "org/name" or "org/name/file".
            options: how it is loaded.
            parallel: the ranks; one process on `device` if None.
            overrides: fields of `LoadOptions`, in place of those of `options`.

        Raises:
            CheckpointError: nothing readable at `model`, a part that is missing, or weights that do not fit.
            ConfigError: settings that cannot work together, ranks that cannot share this model, or a run that is
                predicted not to fit into memory.
        """
        options = (options or LoadOptions()).override(**overrides)
        if parallel is not None and options.device is not None:
            raise ConfigError("give either `parallel`, which has a device, or `device`")
        parallel = parallel or SequenceParallel.single(device=options.device)
        pipe = cls(load_parts(model, options, parallel), parallel)
        if parallel.device.type == "cuda":
            pipe.warm_up()
        return pipe

    def stream(
        self, prompt: str | None = None, options: GenerationOptions | None = None, **overrides: Any
    ) -> Iterator[VideoChunk]:
        """Makes a video and yields every chunk as soon as it is decoded.

        The same prompt, seed and model give the same video at any number of ranks.

        Args:
            prompt: the text; None where `prompt_embeds` stands in its place.
            options: what is asked for.
            overrides: fields of `GenerationOptions`, in place of those of `options`.

        Returns:
            The chunks, with uint8 frames (T, H, W, 3) on rank 0.

        Raises:
            PromptError: the prompt is outside what the text encoder knows.
            InputError: a picture or video that cannot be read.
            ConfigError: options that cannot work together or do not fit the model; another stream that is open and
                works ahead (see `output.StreamGuard`).
            CheckpointError: no text encoder, or a file that cannot be read.
        """
        asked = _asked(prompt, options, overrides)
        if isinstance(asked.prompt, tuple):
            raise ConfigError("a stream has one prompt: call the pipeline for a list of prompts")
        if asked.output_type == "latent":
            raise ConfigError("a stream yields frames: call the pipeline for output_type latent")
        return self._generation(asked).stream()

    @torch.inference_mode()
    def __call__(
        self, prompt: str | list[str] | None = None, options: GenerationOptions | None = None, **overrides: Any
    ) -> CausalVideoPipelineOutput:
        """Makes whole videos. It takes and raises what `stream` does.

        Args:
            prompt: a text, or several for as many videos, made one after the other.
            options: what is asked for.
            overrides: fields of `GenerationOptions`, in place of those of `options`.

        Returns:
            The frames in the type that `output_type` names, on rank 0.
        """
        asked = _asked(prompt, options, overrides)
        seed = asked.first_seed()
        each = [
            asked.override(prompt=text, seed=seed + number, generator=None) for number, text in enumerate(asked.prompts)
        ]
        if asked.output_type == "latent":
            latents = [self._generation(one).latents() for one in each]
            return CausalVideoPipelineOutput(None if self.parallel.rank else torch.cat(latents).transpose(1, 2))
        videos = [self._collect(self._generation(one).stream(), one) for one in each]
        return CausalVideoPipelineOutput(None if self.parallel.rank else as_output(videos, asked.output_type))

    def settings(self, asked: GenerationOptions | None = None) -> StreamSettings:
        """The size, the grid and the sampler of a call, or without one of the pipeline.

        Raises:
            ConfigError: a size that the strides do not divide, or what `SamplerConfig` refuses.
        """
        height, width, sampler = self.height, self.width, self.config.sampler
        if asked is not None:
            height, width = asked.height or height, asked.width or width
            sampler = self.config.sampler_of(asked)
        patch = self.model.config.patch_size[1:]
        grid = LatentGrid.from_pixels(height, width, self.codec.spatial_stride, patch)
        return StreamSettings(height, width, grid, sampler)

    @property
    def strategy(self) -> str:
        """The name of the attention strategy in use."""
        return self.parallel.label(self.parts.layout)

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self.parallel.device

    @property
    def components(self) -> dict[str, Any]:
        """The parts by diffusers' names."""
        return {
            "transformer": self.model,
            "vae": getattr(self.codec, "vae", self.codec),
            "text_encoder": self.text,
            "tokenizer": getattr(self.text, "tokenizer", None),
            "scheduler": self.config.sampler,
        }

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | str | None = None) -> Self:
        """Moves the model of one process to a device, or casts its transformer, and returns the pipeline.

        Raises:
            ConfigError: a device that this machine has not, several ranks, whose devices are their group's, or weights
                in 8 bits, which are not cast.
        """
        place = self.device if device is None else check_device(device)
        kind = self.model.dtype if dtype is None else check_dtype(dtype)
        if self.parallel.size > 1:
            raise ConfigError(
                f"device must be None on {self.parallel.size} ranks: each computes where its group put it"
            )
        if is_fp8(self.model) and kind != self.model.dtype:
            raise ConfigError("dtype must be None for weights in 8 bits: load the model in another dtype")
        offloaded = self.parts.offload.codec
        codec = load_codec(self.config.codec, self.codec.name, place, offload=offloaded)
        parts = replace(self.parts, model=self.model.to(place, kind), codec=codec)
        self._open(parts, self.parallel.moved_to(place))
        return self

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes the model as a diffusers folder with a pipeline.json, on rank 0: diffusers reads the transformer and
        the Wan VAE back, and `from_pretrained` all of it.

        Raises:
            ConfigError: weights in 8 bits, which no layout has.
            OutputError: the folder cannot be written.
        """
        if self.parallel.rank == 0:
            save_parts(self.parts, folder)

    def set_progress_bar_config(self, **config: Any) -> None:
        """Options of the progress bar of a call, those of `tqdm.auto.tqdm`; disable=True for none."""
        self._progress = config

    def warm_up(self) -> None:
        """Runs a short stream and throws it away, so that kernels are compiled, attention libraries are measured and
        ranks are connected before anybody waits. `from_pretrained` does it on CUDA; every rank must."""
        warm_up(self)

    def _generation(self, asked: GenerationOptions) -> Generation:
        self._streams.check()
        return Generation(self, asked, self._streams)

    def _collect(self, chunks: Iterator[VideoChunk], asked: GenerationOptions) -> np.ndarray:
        """All frames of a stream on rank 0, and none on the others."""
        from tqdm.auto import tqdm

        made: list[np.ndarray] = []
        silent = self.parallel.rank > 0
        shown = {"total": asked.num_frames, "unit": "frame", "disable": silent, **self._progress}
        with tqdm(**shown) as progress:
            for chunk in chunks:
                if chunk.frames is not None:
                    made.append(chunk.frames)
                    progress.update(len(chunk.frames))
        return np.concatenate(made) if made else np.empty((0, 0, 0, 3), np.uint8)

    def _open_text(self) -> ToyboxText | SharedUMT5:
        text, model = self.config.text, self.model
        if isinstance(text, TextSource):
            return SharedUMT5(text, self.parallel, model.config, model.dtype, self.parts.offload.text)
        return TEXT_ENCODERS[text]()

    def _agree(self) -> None:
        """Makes sure that all ranks have the same model, before any stream."""
        parallel, config, chunks = self.parallel, self.config, self.parts.parallel_chunks
        parallel.everyone.agree(
            {
                "version": __version__,
                "torch": torch.__version__,
                "configuration": (self.model.config, config.height, config.width, config.stream, config.sampler),
                "text encoder": type(self.text).__name__,
                "decode": self.parts.options.decode,
                "parallel chunks": chunks and chunks.chunks,
            }
        )
        if not parallel.decodes and parallel.denoisers.size > 1:
            networks = digest(self.model), chunks and digest(chunks.vin)
            parallel.denoisers.agree({"dtype": self.model.dtype, "weights": networks})


def _asked(prompt: Any, options: GenerationOptions | None, overrides: dict[str, Any]) -> GenerationOptions:
    """The options of a call with its prompt and overrides."""
    if prompt is not None:
        overrides = {"prompt": prompt, **overrides}
    return GenerationOptions.of(**overrides) if options is None else options.override(**overrides)
