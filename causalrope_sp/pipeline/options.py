"""What loading and a call can be told: two frozen objects, checked when they are made."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

from causalrope_sp.checks import check_choice, check_number, check_text, check_whole, shown
from causalrope_sp.config import Solver
from causalrope_sp.errors import ConfigError
from causalrope_sp.io.media_reader import Picture, Video
from causalrope_sp.pipeline.decoding import Decode
from causalrope_sp.pipeline.offload import Offload
from causalrope_sp.reuse import ReusePolicy
from causalrope_sp.weights.dit_loader import Weights

Embeds = Tensor | str | os.PathLike[str]
OutputType = Literal["np", "pil", "pt", "latent"]
Steps = int | Sequence[float]
StepCallback = Callable[[Any, int, float, dict[str, Any]], object]
LARGEST_SEED = 2**63 - 1
MOST_FRAMES = 10**9
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded, and what it does where a call says nothing else. None keeps what the model's own files
    say.

    Args:
        base: a folder or Hub repository with the text encoder and the VAE of a checkpoint that is a transformer alone.
        preset: how the model runs, by the name of a published one (see `weights.model_presets`); None infers it.
        revision: the branch, tag or commit of a Hub repository.
        cache_dir: the folder of downloaded repositories, in place of huggingface_hub's own.
        local_files_only: use what has been downloaded and ask no server.
        device: where one process computes; None takes the GPU if there is one.
        dtype: of the transformer; None takes bfloat16 on CUDA and float32 on the CPU.
        height, width: pixels of a frame.
        window: latent frames that attention looks back over, the current chunk counted.
        sink: latent frames of the very start that never leave the window.
        chunk_frames: latent frames that are denoised together.
        rope: "absolute" or "relative" (see `StreamConfig`).
        num_inference_steps: how many denoising steps, evenly spaced, or their unshifted timesteps in (0, 1000].
        solver, shift, guidance_scale, guidance_interval: of the sampler (see `SamplerConfig`).
        weights: "full", or "fp8" for the blocks' matrices in 8 bits (see `load_model`).
        offload: what is on the device only while it is used: "text" (UMT5, read again for every prompt), "codec", both,
            or "none"; an `Offload` says more. None lets UMT5 wait on the CPU between two prompts.
        codec: which kind of codec it must be, "wan" or "taehv"; None takes what the file holds.
        codec_weights: the file or folder of the codec.
        decode: "inline", "overlap" or "spatial" (see `pipeline.decoding`).
        preflight: refuse, before weights are read, what is predicted not to fit into memory.
        parallel_chunks: "vin" denoises all chunks of a video at once, by the model's Video Interface Network.

    Raises:
        ConfigError: a value of another type, or outside its range.
    """

    base: str | os.PathLike[str] | None = None
    preset: str | None = None
    revision: str | None = None
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False
    device: torch.device | str | None = None
    dtype: torch.dtype | str | None = None
    height: int | None = None
    width: int | None = None
    window: int | None = None
    sink: int | None = None
    chunk_frames: int | None = None
    rope: Literal["absolute", "relative"] | None = None
    num_inference_steps: Steps | None = None
    solver: Solver | None = None
    shift: float | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    weights: Weights | None = None
    offload: Offload | str | Sequence[str] | None = None
    codec: str | None = None
    codec_weights: str | os.PathLike[str] | None = None
    decode: Decode = "inline"
    preflight: bool = True
    parallel_chunks: Literal["vin"] | None = None

    def __post_init__(self) -> None:
        for name, least in (("height", 1), ("width", 1), ("window", 1), ("sink", 0), ("chunk_frames", 1)):
            _set(self, name, check_whole, least)
        _set(self, "rope", check_choice, ("absolute", "relative"))
        _set(self, "parallel_chunks", check_choice, ("vin",))
        _set(self, "weights", check_choice, get_args(Weights))
        for name in ("preset", "revision", "codec"):
            _set(self, name, check_text)
        for name in ("base", "cache_dir", "codec_weights"):
            _set(self, name, check_path)
        _set(self, "device", _check_device_field)
        _set(self, "dtype", _check_dtype_field)
        _set(self, "offload", _check_offload)
        _check_sampling(self)
        for name in ("local_files_only", "preflight"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, not {shown(getattr(self, name))}")

    def override(self, **changes: Any) -> Self:
        """These options with some of them changed; `torch_dtype` is diffusers' other name of `dtype`.

        Raises:
            ConfigError: no such option, or a value that it refuses.
        """
        if "torch_dtype" in changes:
            changes["dtype"] = changes.pop("torch_dtype")
        _check_names(type(self), changes)
        return replace(self, **changes)


@dataclass(frozen=True)
class GenerationOptions:
    """What a call asks for, under diffusers' names. None keeps what the pipeline was loaded with.

    Args:
        prompt: the text, or for a call a list of texts, made one after the other.
        negative_prompt: the text that guidance leads away from; None is no text: UMT5's empty prompt, toybox' zeros.
        prompt_embeds, negative_prompt_embeds: in place of a text its embeddings, (1, text_len, text_dim), or a file
            that `save_embeds` wrote; those of rank 0 count.
        num_frames: pixel frames. Whole chunks are made, and the last one is trimmed.
        height, width: pixels of a frame.
        num_inference_steps, solver, shift, guidance_scale, guidance_interval: of the sampler (see `LoadOptions`).
        seed: of all noise, from 0 on. Video n of a list of prompts has seed + n.
        generator: draws the seed, in its place.
        output_type: "np", "pil", "pt" or "latent" (see `CausalVideoPipelineOutput`).
        image: a picture that is the video's first frame, a file or uint8 (H, W, 3); it counts as one of `num_frames`.
        video: a video to continue, a file or uint8 (H, W, 3) frames: its last frames are what the stream looks back on,
            and the result is what comes after them. With `strength` it is a video to redraw.
        strength: the share of the denoising steps, rounded up, that redraw `video`: above 0, which changes least, to 1.
            The result has as many frames as `video`, up to `num_frames`.
        reuse: which attention outputs later steps take over from earlier ones: a policy, a preset such as "pab:latte",
            or a JSON file (see `find_policy`).
        callback_on_step_end: called on every rank after each denoising step as (pipe, step, timestep, kwargs). kwargs
            has "chunk", "num_steps" and, where chunks are made in parallel, "preview", a `PreviewFrame`. What it
            returns is not used. It must not raise on some of the ranks only.
        preview_every: with chunks made in parallel, how many steps there are between two decoded previews.

    Pictures and videos are scaled to cover the frame and cropped around the centre (see `io.media_reader`).

    Raises:
        ConfigError: a value of another type or outside its range; neither or both of a prompt and its embeddings; more
            than one thing to start from.
    """

    prompt: str | Sequence[str] | None = None
    negative_prompt: str | None = None
    prompt_embeds: Embeds | None = None
    negative_prompt_embeds: Embeds | None = None
    num_frames: int = 81
    height: int | None = None
    width: int | None = None
    num_inference_steps: Steps | None = None
    solver: Solver | None = None
    shift: float | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    seed: int = 0
    generator: torch.Generator | None = None
    output_type: OutputType = "np"
    image: Picture | None = None
    video: Video | None = None
    strength: float | None = None
    reuse: ReusePolicy | str | os.PathLike[str] | None = None
    callback_on_step_end: StepCallback | None = None
    preview_every: int | None = None

    def __post_init__(self) -> None:
        for name, value in zip(("num_frames", "seed"), (1, 0), strict=True):
            most = MOST_FRAMES if name == "num_frames" else LARGEST_SEED
            object.__setattr__(self, name, check_whole(name, getattr(self, name), value, most))
        for name in ("height", "width", "preview_every"):
            _set(self, name, check_whole)
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
        _check_sampling(self)
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
        if self.strength is None:
            return
        if self.video is None:
            raise ConfigError("a strength needs a video")
        strength = check_number("strength", self.strength)
        if not 0 < strength <= 1:
            raise ConfigError(f"strength must be above 0 and at most 1, not {shown(self.strength)}")

    @classmethod
    def of(cls, **given: Any) -> Self:
        """From fields by name.

        Raises:
            ConfigError: no such option, or a value that it refuses.
        """
        _check_names(cls, given)
        return cls(**given)

    def override(self, **changes: Any) -> Self:
        """These options with some of them changed.

        Raises:
            ConfigError: no such option, or a value that it refuses.
        """
        _check_names(type(self), changes)
        return replace(self, **changes)

    def first_seed(self) -> int:
        """The seed, drawn from the generator if there is one, which is then advanced."""
        if self.generator is None:
            return self.seed
        device = self.generator.device
        return int(torch.randint(LARGEST_SEED, (), generator=self.generator, device=device))

    @property
    def prompts(self) -> list[str | None]:
        """One entry for every video to make; None where embeddings stand in place of a text."""
        return [self.prompt] if self.prompt is None or isinstance(self.prompt, str) else list(self.prompt)


def check_path(name: str, value: object) -> str:
    """Raises ConfigError unless `value` is a path that is not empty."""
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise ConfigError(f"{name} must be a path, not {shown(value)}")
    return str(os.fspath(value))


def check_device(value: object) -> torch.device:
    """Raises ConfigError unless `value` names a device of this machine."""
    try:
        device = torch.device(value)  # type: ignore[call-overload]  # the error is what is asked for
    except (RuntimeError, TypeError, ValueError) as reason:
        raise ConfigError(f"device must be one that torch knows, such as cpu or cuda:0, not {shown(value)}") from reason
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device must be one of this machine, which has {torch.cuda.device_count()} GPUs, not {value}"
        )
    return device


def check_dtype(value: object) -> torch.dtype:
    """Raises ConfigError unless `value` is a floating type of torch's, or its name."""
    dtype = DTYPES.get(value.removeprefix("torch.")) if isinstance(value, str) else value
    if dtype not in DTYPES.values():
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, not {shown(value)}")
    assert isinstance(dtype, torch.dtype), "checked"
    return dtype


def _check_sampling(owner: LoadOptions | GenerationOptions) -> None:
    """The fields that both have; their ranges are `SamplerConfig`'s to check."""
    _set(owner, "solver", check_choice, get_args(Solver))
    for name in ("shift", "guidance_scale"):
        _set(owner, name, check_number)
    _set(owner, "num_inference_steps", _check_steps)
    _set(owner, "guidance_interval", _check_interval)


def _check_steps(name: str, value: object) -> Steps:
    if isinstance(value, str) or not isinstance(value, Sequence):
        return check_whole(name, value, 1, 1000)
    return tuple(check_number(name, step) for step in value)


def _check_interval(name: str, value: object) -> tuple[float, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        raise ConfigError(f"{name} must be two timesteps, the lower one first, not {shown(value)}")
    return tuple(check_number(name, bound) for bound in value)


def _check_prompts(prompts: object) -> tuple[str, ...]:
    if not isinstance(prompts, Sequence) or not prompts:
        raise ConfigError(f"prompt must be a text or a list of texts, not {shown(prompts)}")
    return tuple(check_text(f"prompt[{number}]", prompt) for number, prompt in enumerate(prompts))


def _check_device_field(_: str, value: object) -> torch.device:
    return check_device(value)


def _check_dtype_field(_: str, value: object) -> torch.dtype:
    return check_dtype(value)


def _check_offload(_: str, value: Any) -> Offload:
    return value if isinstance(value, Offload) else Offload.of(value)


def _set(owner: object, name: str, check: Callable[..., object], *limits: object) -> None:
    """Replaces a field that is not None by what its check makes of its name, its value and the limits."""
    value = getattr(owner, name)
    if value is not None:
        object.__setattr__(owner, name, check(name, value, *limits))


def _check_names(options: type[LoadOptions] | type[GenerationOptions], given: Collection[str]) -> None:
    known = [field.name for field in fields(options)]
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ConfigError(f"there is no option {', '.join(unknown)}; there are: {', '.join(known)}")


def local_path(path: str | os.PathLike[str]) -> Path:
    """A path with ~ for the home folder."""
    return Path(path).expanduser()
