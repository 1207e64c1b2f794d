"""`GenerationOptions`: the options of one call of a pipeline, frozen and checked at construction."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

from causalrope_sp.checks import check_choice, check_number, check_text, check_whole, shown
from causalrope_sp.config import Solver, StreamConfig, TimestepRule
from causalrope_sp.errors import ConfigError
from causalrope_sp.io.media_reader import Picture, Video, is_picture
from causalrope_sp.pipeline.option_checks import Steps, check_names, check_sampling, replace_checked
from causalrope_sp.reuse import ReusePolicy
from causalrope_sp.sampling.stream_options import Control

Embeds = Tensor | str | os.PathLike[str]
OutputType = Literal["np", "pil", "pt", "latent"]
StepCallback = Callable[[Any, int, float, dict[str, Any]], object]
LARGEST_SEED = 2**63 - 1
LONGEST_HISTORY = 2**20  # chunks
MOST_CHUNKS = 2**6  # over which a prompt may change


@dataclass(frozen=True)
class GenerationOptions:
    """The options of one call of a pipeline, under diffusers' names. None keeps the pipeline's own setting.

    Args:
        prompt: the text, or for a call a list of texts, whose videos are made one after the other.
        negative_prompt: the text of the unconditional branch of guidance; None is UMT5's embeddings of an empty text,
            or zeros for toybox.
        prompt_embeds, negative_prompt_embeds: embeddings in place of the text, (1, text_len, text_dim), or a file that
            `save_embeds` wrote. All ranks give the same; a file is read on rank 0.
        num_frames: pixel frames of the video. Whole chunks are generated, and the last one is trimmed. None goes on for
            ever, which needs a window, and which a call of the pipeline cannot return.
        window, sink: of the stream, in latent frames (see `StreamConfig`).
        height, width: pixels of a frame.
        num_inference_steps, solver, timestep_rule, shift, guidance_scale, guidance_interval: of the sampler (see
            `LoadOptions`).
        seed: the seed of all noise, in [0, 2^63 - 1]. Video n of a list of prompts uses seed + n.
        generator: a generator from which the seed is drawn; it replaces `seed`.
        output_type: "np", "pil", "pt" or "latent" (see `CausalVideoPipelineOutput`).
        image: the first frame of the video: a file, a PIL image, an array (H, W, 3), uint8 or float in [0, 1], or a
            tensor (3, H, W), float in [0, 1]. It is one of the `num_frames`. An image-to-video model makes that frame
            like the others, and reads the image in every chunk.
        image_embeds: image tokens, (1, N, width), in place of those that the model's own encoder makes of `image`, for
            a model that reads them (`DiTConfig.image_dim`).
        video: a video to continue: a file, or frames that are PIL images, such arrays or such tensors. Its last frames
            are the context of the stream, and the output begins after them. With `strength` it is a video to redraw.
        strength: the share of the denoising steps, rounded up, that redraw `video`, in (0, 1]. A smaller one changes
            less. The output has as many frames as `video`, up to `num_frames`.
        control: for a model that takes one (`DiTConfig.control_channels`), the control of every latent frame that is
            generated, such as a camera, an action or a mask: a tensor (1, F, channels, H, W), where H×W is the size of
            a latent frame or 1×1 for a control that is the same all over it; or a function that returns that of a
            `Chunk`, whose number and frames are counted from the first one that is generated. It is asked again for a
            chunk that is made again. `Session.step` takes the control of one chunk in its place. The control of what
            the stream begins with, such as an image, is zero.
        reuse: which attention outputs of a denoising step later steps reuse: a policy, a preset such as "pab:latte", or
            a JSON file (see `find_policy`).
        callback_on_step_end: a function that is called on every rank after each denoising step as (pipe, step,
            timestep, kwargs). kwargs has "chunk", "num_steps" and, with parallel chunks, "preview", a `PreviewFrame` or
            None. Its result is ignored. What it raises on one rank ends the chunk on all ranks.
        history: how many chunks a session takes back bit for bit. The keys and values that they evict, and the state of
            the decoder at each of them, are kept.
        kept_chunks: of how many chunks beyond the window the clean latents are kept, from which a session that is taken
            back further goes on.
        preview_every: with parallel chunks, the number of steps between two decoded previews; None makes no previews.

    Images and videos are scaled to cover the frame and cropped around the centre (see `io.media_reader`).

    Raises:
        ConfigError: a value has the wrong type or is outside its range, there are neither or both of a prompt and its
            embeddings, or there are both an image and a video.
    """

    prompt: str | Sequence[str] | None = None
    negative_prompt: str | None = None
    prompt_embeds: Embeds | None = None
    negative_prompt_embeds: Embeds | None = None
    num_frames: int | None = 81
    window: int | None = None
    sink: int | None = None
    height: int | None = None
    width: int | None = None
    num_inference_steps: Steps | None = None
    solver: Solver | None = None
    timestep_rule: TimestepRule | None = None
    shift: float | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    seed: int = 0
    generator: torch.Generator | None = None
    output_type: OutputType = "np"
    image: Picture | None = None
    video: Video | None = None
    strength: float | None = None
    image_embeds: Tensor | None = None
    control: Tensor | Control | None = None
    reuse: ReusePolicy | str | os.PathLike[str] | None = None
    callback_on_step_end: StepCallback | None = None
    preview_every: int | None = None
    history: int = 0
    kept_chunks: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", check_whole("seed", self.seed, 0, LARGEST_SEED))
        for name in ("num_frames", "height", "width", "window", "preview_every"):
            replace_checked(self, name, check_whole)
        replace_checked(self, "sink", partial(check_whole, least=0))
        for name in ("history", "kept_chunks"):
            object.__setattr__(self, name, check_whole(name, getattr(self, name), 0, LONGEST_HISTORY))
        if isinstance(self.prompt, str):
            check_text("prompt", self.prompt)
        elif self.prompt is not None:
            object.__setattr__(self, "prompt", _check_prompts(self.prompt))
        if self.negative_prompt is not None and not isinstance(self.negative_prompt, str):
            raise ConfigError(f"negative_prompt must be a text, not {shown(self.negative_prompt)}")
        check_choice("output_type", self.output_type, get_args(OutputType))
        if self.generator is not None and not isinstance(self.generator, torch.Generator):
            raise ConfigError(f"generator must be a torch.Generator, not {shown(self.generator)}")
        if self.callback_on_step_end is not None and not callable(self.callback_on_step_end):
            raise ConfigError(f"callback_on_step_end must be callable, not {shown(self.callback_on_step_end)}")
        if self.reuse is not None and not isinstance(self.reuse, ReusePolicy | str | os.PathLike):
            raise ConfigError(f"reuse must be a policy, a preset's name or a file, not {shown(self.reuse)}")
        if not (self.control is None or isinstance(self.control, Tensor) or callable(self.control)):
            raise ConfigError(f"control must be a tensor or a function of a chunk, not {shown(self.control)}")
        check_sampling(self)
        self._check_texts()
        self._check_conditioning()

    def _check_texts(self) -> None:
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Tensor | str | os.PathLike):
                raise ConfigError(f"{name} must be a tensor or a file, not {shown(value)}")
        if (self.prompt is None) == (self.prompt_embeds is None):
            raise ConfigError("give either a prompt or its embeddings (prompt_embeds)")
        if self.negative_prompt is not None and self.negative_prompt_embeds is not None:
            raise ConfigError("give either a negative prompt or its embeddings (negative_prompt_embeds)")

    def _check_conditioning(self) -> None:
        if self.image is not None and self.video is not None:
            raise ConfigError("give either an image or a video, not both")
        if not (self.image is None or isinstance(self.image, str | os.PathLike) or is_picture(self.image)):
            raise ConfigError(f"image must be a file, a PIL image, an array or a tensor, not {shown(self.image)}")
        if not (self.video is None or isinstance(self.video, str | os.PathLike | Iterable)):
            raise ConfigError(f"video must be a file, or PIL images, arrays or tensors, not {shown(self.video)}")
        if not (self.image_embeds is None or isinstance(self.image_embeds, Tensor)):
            raise ConfigError(f"image_embeds must be a tensor, not {shown(self.image_embeds)}")
        if self.strength is None:
            return
        if self.video is None:
            raise ConfigError("a strength needs a video")
        strength = check_number("strength", self.strength)
        if not 0 < strength <= 1:
            raise ConfigError(f"strength must be above 0 and at most 1, not {shown(self.strength)}")

    @classmethod
    def of(cls, **fields: Any) -> Self:
        """Builds options from fields by name.

        Raises:
            ConfigError: an option does not exist, or its value is wrong.
        """
        check_names(cls, fields)
        return cls(**fields)

    def stream_of(self, own: StreamConfig) -> StreamConfig:
        """Returns the stream of the call.

        Args:
            own: the pipeline's own stream.

        Raises:
            ConfigError: the window is smaller than chunk + sink.
        """
        window = own.window if self.window is None else self.window
        return replace(own, window=window, sink=own.sink if self.sink is None else self.sink)

    def override(self, **changes: Any) -> Self:
        """Returns these options with some of them replaced.

        Args:
            changes: fields of `GenerationOptions`.

        Raises:
            ConfigError: an option does not exist, or its value is wrong.
        """
        check_names(type(self), changes)
        return replace(self, **changes)

    def first_seed(self) -> int:
        """Returns the seed of the first video. With a generator it is drawn, which advances the generator."""
        if self.generator is None:
            return self.seed
        device = self.generator.device
        return int(torch.randint(LARGEST_SEED, (), generator=self.generator, device=device))

    def check_streamed(self) -> None:
        """Raises ConfigError for what a call of the pipeline has and a stream has not."""
        if isinstance(self.prompt, tuple):
            raise ConfigError("a stream has one prompt: call the pipeline for a list of prompts")
        if self.output_type == "latent":
            raise ConfigError("a stream yields frames: call the pipeline for output_type latent")

    @property
    def prompts(self) -> list[str | None]:
        """One text a video; None for a video whose text is given as embeddings."""
        return [self.prompt] if self.prompt is None or isinstance(self.prompt, str) else list(self.prompt)


def _check_prompts(prompts: object) -> tuple[str, ...]:
    if not isinstance(prompts, Sequence) or not prompts:
        raise ConfigError(f"prompt must be a text or a list of texts, not {shown(prompts)}")
    return tuple(check_text(f"prompt[{number}]", prompt) for number, prompt in enumerate(prompts))
