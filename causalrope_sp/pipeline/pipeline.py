"""`CausalVideoPipeline`: a loaded model that turns prompts into videos, chunk by chunk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, Self

import torch

from causalrope_sp.devices import own_device
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import LatentGrid
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.pipeline.adapters import WithAdapters
from causalrope_sp.pipeline.generation import Generation
from causalrope_sp.pipeline.generation_options import GenerationOptions
from causalrope_sp.pipeline.latent_video import whole_latents
from causalrope_sp.pipeline.load_options import LoadOptions
from causalrope_sp.pipeline.loading import Parts, load_parts
from causalrope_sp.pipeline.open_streams import OpenStreams
from causalrope_sp.pipeline.option_checks import check_dtype
from causalrope_sp.pipeline.output import VideoChunk
from causalrope_sp.pipeline.results import CausalVideoPipelineOutput, as_output, collect
from causalrope_sp.pipeline.resumed_generation import ResumedGeneration, read_resumed
from causalrope_sp.pipeline.same_model import agree_on_model, open_text
from causalrope_sp.pipeline.saving import save_parts
from causalrope_sp.pipeline.session import Session
from causalrope_sp.pipeline.stream_settings import StreamSettings
from causalrope_sp.pipeline.warm_up import warm_up
from causalrope_sp.weights.fp8 import check_dynamic, is_dynamic, is_fp8


class CausalVideoPipeline(WithAdapters):
    """A model that is ready to run. Under torchrun every rank builds one and makes the same calls.

    Attributes:
        parts: the loaded parts of the model, as `from_pretrained` loads them.
        config: the files of the model and its settings.
        codec: the VAE.
        text: the text encoder.
        parallel: the ranks.
        height, width: pixels of a frame.
        fps: pixel frames per second.

    Raises:
        ConfigError: parts that do not fit each other or the ranks, or ranks with different models.
    """

    def __init__(self, parts: Parts, parallel: SequenceParallel) -> None:
        self._progress: dict[str, Any] = {}
        self._open(parts, parallel)

    def _open(self, parts: Parts, parallel: SequenceParallel) -> None:
        self.parts, self.parallel = parts, parallel
        self.config, self.codec = parts.config, parts.codec
        self.height, self.width, self.fps = self.config.height, self.config.width, self.config.fps
        self.text = open_text(parts, parallel)
        channels = self.model.config.in_channels
        if self.codec.channels != channels:
            raise ConfigError(f"the codec's latents have {self.codec.channels} channels, the model's {channels}")
        if parts.parallel_chunks is not None and self.model.config.control_channels:
            raise ConfigError("a model that makes its chunks in parallel takes no control: control_channels must be 0")
        self._streams = OpenStreams()
        parallel.check(self.settings().grid, self.model.config.num_heads)
        with parallel.turn("opens a pipeline"):
            agree_on_model(parts, parallel, type(self.text).__name__)

    @property
    def model(self) -> CausalDiT:
        """The transformer; of two, that of the steps at high noise.

        Another one, such as that of `with_control`, may be assigned while no stream is open, on every rank.

        Raises:
            ConfigError: a stream is open, or the new model does not fit the codec or the ranks.
        """
        return self.parts.model

    @model.setter
    def model(self, model: CausalDiT) -> None:
        self._refuse_open("be given another model")
        self._open(self.parts.with_model(model), self.parallel)

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str] = "toybox",
        options: LoadOptions | None = None,
        *,
        parallel: SequenceParallel | None = None,
        **overrides: Any,
    ) -> Self:
        """Loads a model, and on CUDA warms it up. Every rank must call it.

        Args:
            model: an embedded model ("toybox", "toybox-flow", "toybox-vin"); a diffusers folder (with a
                model_index.json); a folder of Wan's own layout; a pipeline.json or a folder with one, whose fields
                override all others; a checkpoint of the transformer alone, with `base`; or any of these in a Hub
                repository, as "org/name" or "org/name/file".
            options: how the model is loaded; None takes the defaults.
            parallel: the ranks; None takes one process on the device that the options name.
            overrides: fields of `LoadOptions` that replace those of `options`.

        Returns:
            The pipeline.

        Raises:
            CheckpointError: `model` cannot be read, lacks a part, or has weights that do not fit it.
            ConfigError: settings contradict each other, ranks cannot share this model, or it will not fit into memory.
        """
        options = (options or LoadOptions()).override(**overrides)
        if parallel is not None and options.device is not None:
            raise ConfigError("give either `parallel`, which has a device, or `device`")
        parallel = parallel or SequenceParallel.single(device=options.device)
        with parallel.turn("loads a model"):
            parts = load_parts(model, options, parallel)
        pipe = cls(parts, parallel)
        if parallel.device.type == "cuda":
            pipe.warm_up()
        return pipe

    def stream(
        self, prompt: str | None = None, options: GenerationOptions | None = None, **overrides: Any
    ) -> Iterator[VideoChunk]:
        """Makes a video and yields every chunk as soon as it is decoded.

        The same prompt, seed and model give the same video at any number of ranks.

        Args:
            prompt: the text; None with `prompt_embeds`.
            options: the options of the call; None takes the defaults.
            overrides: fields of `GenerationOptions` that replace those of `options`.

        Returns:
            An iterator over the chunks, with uint8 frames (T, H, W, 3) on rank 0.

        Raises:
            PromptError: the text encoder does not know the prompt's words.
            InputError: the image or the video cannot be read.
            ConfigError: options contradict each other or do not fit the model; on several ranks, ranks that make other
                calls, or another stream is open that prefetches.
            RankLostError: another rank has ended, failed, or left the stream.
            CheckpointError: there is no text encoder, or a file cannot be read.
        """
        return self._session("calls stream", prompt, options, overrides).frames()

    def open(self, prompt: str | None = None, options: GenerationOptions | None = None, **overrides: Any) -> Session:
        """Opens a stream that the caller drives: it can be steered, taken back and forked between two chunks.

        Args:
            prompt: the text that the stream begins with; None with `prompt_embeds`.
            options: the options of the call; None takes the defaults, but for a video without end (`num_frames` None)
                and the latents of 64 chunks beyond the window (`kept_chunks`).
            overrides: fields of `GenerationOptions` that replace those of `options`.

        Returns:
            The session.

        Raises:
            CausalRopeError: what `stream` raises.
        """
        if options is None:
            overrides = {"num_frames": None, "kept_chunks": 64, **overrides}
        return self._session("opens a session", prompt, options, overrides)

    def _session(
        self, call: str, prompt: str | None, options: GenerationOptions | None, overrides: dict[str, Any]
    ) -> Session:
        request = self._request(call, prompt, options, overrides)
        request.check_streamed()
        return Generation(self, request, self._streams).session()

    def resume(self, path: str | os.PathLike[str], **overrides: Any) -> Session:
        """Goes on with a session that `Session.save` wrote, on any number of ranks, with any strategy and dtype.

        The session keeps its own size, window, steps, seed and prompts, whatever the pipeline's are. Every rank reads
        the file, its own part of the keys and values alone.

        Args:
            path: the file.
            overrides: `history`, `kept_chunks`, `control`, `image` and `callback_on_step_end` of `GenerationOptions`;
                the first two are those of the saved session by default. A session with `reuse` needs the same policy
                again, and one of an image-to-video model its image.

        Returns:
            The session, where it was.

        Raises:
            CheckpointError: the file cannot be read, or is no saved session.
            ConfigError: the session is of another model or codec, does not fit into memory, or an option is unknown.
        """
        with self.parallel.turn("resumes a session"):
            saved = self.parallel.everyone.run_collectively(lambda: read_resumed(path, overrides))
        return ResumedGeneration(self, saved, overrides, self._streams).session()

    @torch.inference_mode()
    def __call__(
        self, prompt: str | list[str] | None = None, options: GenerationOptions | None = None, **overrides: Any
    ) -> CausalVideoPipelineOutput:
        """Makes whole videos.

        Args:
            prompt: a text, or a list of texts, whose videos are made one after the other.
            options: the options of the call; None takes the defaults.
            overrides: fields of `GenerationOptions` that replace those of `options`.

        Returns:
            The frames on rank 0, in the type that `output_type` names; None in place of frames on the other ranks.

        Raises:
            CausalRopeError: what `stream` raises.
        """
        request = self._request("calls its pipeline", prompt, options, overrides)
        if request.num_frames is None:
            raise ConfigError("num_frames must be given for a call, which returns a whole video: open a session")
        seed = request.first_seed()
        requests = [
            request.override(prompt=text, seed=seed + number, generator=None)
            for number, text in enumerate(request.prompts)
        ]
        generations = [Generation(self, one, self._streams) for one in requests]  # wrong input of any of them raises
        if request.output_type == "latent":
            latents = [whole_latents(one) for one in generations]
            return CausalVideoPipelineOutput(None if self.parallel.rank else torch.cat(latents).transpose(1, 2))
        bar = {"total": request.num_frames, "unit": "frame", "disable": self.parallel.rank > 0, **self._progress}
        videos = [collect(made.session().frames(), bar) for made in generations]
        return CausalVideoPipelineOutput(None if self.parallel.rank else as_output(videos, request.output_type))

    def settings(self, request: GenerationOptions | None = None) -> StreamSettings:
        """Combines the options of a call with the pipeline's own settings.

        Args:
            request: the options of the call; None for the pipeline's own settings.

        Returns:
            The size, the grid and the sampler.

        Raises:
            ConfigError: the strides do not divide the size, or `SamplerConfig` refuses a value.
        """
        height, width, sampler = self.height, self.width, self.config.sampler
        if request is not None:
            height, width = request.height or height, request.width or width
            sampler = self.config.sampler_of(request)
        patch = self.model.config.patch_size[1:]
        grid = LatentGrid.from_pixels(height, width, self.codec.spatial_stride, patch)
        return StreamSettings(height, width, grid, sampler)

    @property
    def open_streams(self) -> OpenStreams:
        """The open streams of the pipeline."""
        return self._streams

    @property
    def strategy(self) -> str:
        """The name of the attention strategy in use."""
        return self.parallel.label(self.parts.layout)

    def __repr__(self) -> str:
        parts = ", ".join(f"{name}={type(part).__name__}" for name, part in self.components.items())
        return f"{type(self).__name__}({parts}, strategy={self.strategy}, device={self.device})"

    @property
    def device(self) -> torch.device:
        """The device on which this rank computes."""
        return self.parallel.device

    @property
    def components(self) -> dict[str, Any]:
        """The parts of the pipeline by diffusers' names."""
        expert = self.parts.low_noise
        return {
            "transformer": self.model,
            **({} if expert is None else {"transformer_2": expert.model}),
            "vae": getattr(self.codec, "vae", self.codec),
            "text_encoder": self.text,
            "tokenizer": getattr(self.text, "tokenizer", None),
            "scheduler": self.config.sampler,
        }

    def to(
        self, device: torch.device | torch.dtype | str | None = None, dtype: torch.dtype | str | None = None
    ) -> Self:
        """Moves the model of one process to another device, or casts its transformer.

        Args:
            device: the new device, or the new dtype as in torch; None keeps the current one.
            dtype: the transformer's new dtype, of all its parameters; None keeps the current ones.

        Returns:
            This pipeline.

        Raises:
            ConfigError: the machine has no such device, there are several ranks, fp8 weights would be cast, or a stream
                is open, which goes on.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        target = self.device if device is None else own_device(device)
        kind = self.model.dtype if dtype is None else check_dtype(dtype)
        if self.parallel.size > 1:
            raise ConfigError(f"device must be None on {self.parallel.size} ranks: each computes on its group's device")
        if is_fp8(self.model) and kind != self.model.dtype:
            raise ConfigError("dtype must be None for weights in 8 bits: load the model in another dtype")
        if is_dynamic(self.model):
            check_dynamic(target, kind)
        self._refuse_open("be moved or cast")
        self._open(self.parts.moved_to(target, kind), self.parallel.moved_to(target))
        return self

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes the model from rank 0 as a diffusers folder with a pipeline.json.

        diffusers can load the transformer and the Wan VAE from it; `from_pretrained` can load all of it.

        Args:
            folder: the folder to write; it is created if it does not exist.

        Raises:
            ConfigError: the weights are fp8, which the diffusers layout does not have.
            OutputError: the folder cannot be written; every rank raises it.
        """
        saves = self.parallel.rank == 0
        with self.parallel.turn("saves its model"):
            self.parallel.everyone.run_collectively(lambda: save_parts(self.parts, folder) if saves else None)

    def set_progress_bar_config(self, **config: Any) -> None:
        """Sets the options of the progress bar, which are those of `tqdm.auto.tqdm`; `disable=True` hides it."""
        self._progress = config

    def warm_up(self) -> None:
        """Runs a short stream and discards it, so that the first call need not compile kernels, measure attention
        libraries or connect ranks. `from_pretrained` calls it on CUDA. Every rank must call it."""
        warm_up(self)

    def _refuse_open(self, done: str) -> None:
        """Refuses what a pipeline cannot do while streams are open."""
        if self._streams:
            raise ConfigError(
                f"a pipeline with an open stream cannot {done}, and {len(self._streams)} are open: finish "
                "them, or call their close(), first"
            )

    def _request(
        self, call: str, prompt: Any, options: GenerationOptions | None, overrides: dict[str, Any]
    ) -> GenerationOptions:
        """The options of a call with its prompt and overrides; an error of one rank ends the call on all of them."""
        own = overrides if prompt is None else {"prompt": prompt, **overrides}
        merge = GenerationOptions.of if options is None else options.override
        with self.parallel.turn(call):
            return self.parallel.everyone.run_collectively(lambda: merge(**own))
