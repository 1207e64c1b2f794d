"""`LoadOptions`: how a model is loaded, frozen and checked at construction."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, get_args

import torch

from causalrope_sp.checks import check_choice, check_flag, check_text, check_whole, shown
from causalrope_sp.config import CacheDtype, Solver, TimestepRule, WindowPolicy, check_similar
from causalrope_sp.errors import ConfigError
from causalrope_sp.heads.policy import HeadPolicy
from causalrope_sp.pipeline.decoding import Decode
from causalrope_sp.pipeline.offload import Offload
from causalrope_sp.pipeline.option_checks import (
    Steps,
    check_names,
    check_path,
    check_sampling,
    device_field,
    dtype_field,
    offload_field,
    replace_checked,
)
from causalrope_sp.weights.dit_loader import Weights
from causalrope_sp.weights.lora import Lora


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded, and the settings of calls that do not override them. None keeps the model's own setting.

    Args:
        base: a folder or Hub repository whose text encoder and VAE are used, in place of the model's own if it has any.
        preset: the name of a published model whose window and sampler are used (see `weights.model_presets`); None
            infers it from the checkpoint.
        revision: the branch, tag or commit of a Hub repository; None takes the main branch.
        cache_dir: the folder of downloaded repositories; None takes huggingface_hub's own.
        local_files_only: whether only downloaded files are used and no server is contacted.
        device: the device of a single process; None takes the GPU if there is one.
        dtype: the dtype of the transformer; None takes bfloat16 on CUDA and float32 on the CPU.
        height, width: pixels of a frame.
        window: latent frames that attention looks back over, the current chunk counted.
        sink: how many of the first latent frames never leave the window.
        chunk_frames: latent frames in a chunk.
        rope: "absolute" or "relative" (see `StreamConfig`).
        window_policy: "sliding", "multi-shot" or "recomputed" (see `StreamConfig`).
        similar_frames: how many frames attention reads besides the newest and the sink, by similarity (see
            `StreamConfig`). It changes the result.
        cache: "model", "int8" or "fp8", how keys and values are stored (see `StreamConfig`).
        heads: how many of the window's frames each attention head sees, a `HeadPolicy` or a file (see `read_heads`). It
            changes the result; None lets every head see the whole window.
        num_inference_steps: how many evenly spaced denoising steps, or their unshifted timesteps in (0, 1000].
        solver, timestep_rule, shift, guidance_scale, guidance_interval: of the sampler (see `SamplerConfig`).
        weights: "full"; "fp8" for the blocks' matrices in 8 bits, or "fp8-dynamic" for products in 8 bits as well (see
            `load_model`).
        loras: LoRA files that are merged into the transformer, in this order, after those of a pipeline.json; a `Lora`
            or FILE:WEIGHT gives a file a weight.
        offload: which weights are on the device only while they are used: "text" (UMT5, read again for every prompt),
            "codec", both, or "none". An `Offload` has more settings. None keeps UMT5 on the CPU between two prompts.
        codec: the kind of codec that the file must hold, "wan" or "taehv"; None accepts both.
        codec_weights: the file or folder of the codec; None takes the model's own.
        decode: "inline", "overlap" or "spatial" (see `pipeline.decoding`).
        preflight: whether a run that is predicted not to fit into memory is refused before weights are read.
        graphs: whether a stream on GPUs runs its passes by CUDA graphs once its window slides;
            nothing changes on a CPU.
        parallel_chunks: "vin" denoises all chunks of a video at once with the model's Video Interface Network; None
            generates a stream.

    Raises:
        ConfigError: a value has the wrong type or is outside its range.
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
    window_policy: WindowPolicy | None = None
    similar_frames: float | None = None
    cache: CacheDtype | None = None
    heads: HeadPolicy | str | os.PathLike[str] | None = None
    num_inference_steps: Steps | None = None
    solver: Solver | None = None
    timestep_rule: TimestepRule | None = None
    shift: float | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    weights: Weights | None = None
    loras: Sequence[str | os.PathLike[str] | Lora] = ()
    offload: Offload | str | Sequence[str] | None = None
    codec: str | None = None
    codec_weights: str | os.PathLike[str] | None = None
    decode: Decode = "inline"
    preflight: bool = True
    graphs: bool = True
    parallel_chunks: Literal["vin"] | None = None

    def __post_init__(self) -> None:
        for name, least in (("height", 1), ("width", 1), ("window", 1), ("sink", 0), ("chunk_frames", 1)):
            replace_checked(self, name, check_whole, least)
        replace_checked(self, "rope", check_choice, ("absolute", "relative"))
        replace_checked(self, "window_policy", check_choice, get_args(WindowPolicy))
        replace_checked(self, "similar_frames", check_similar)
        replace_checked(self, "cache", check_choice, get_args(CacheDtype))
        replace_checked(self, "parallel_chunks", check_choice, ("vin",))
        replace_checked(self, "weights", check_choice, get_args(Weights))
        check_choice("decode", self.decode, get_args(Decode))
        for name in ("preset", "revision", "codec"):
            replace_checked(self, name, check_text)
        for name in ("base", "cache_dir", "codec_weights"):
            replace_checked(self, name, check_path)
        replace_checked(self, "heads", _check_heads)
        replace_checked(self, "device", device_field)
        replace_checked(self, "dtype", dtype_field)
        replace_checked(self, "offload", offload_field)
        replace_checked(self, "loras", _check_loras)
        check_sampling(self)
        for name in ("local_files_only", "preflight", "graphs"):
            check_flag(name, getattr(self, name))

    def override(self, **changes: Any) -> Self:
        """Returns these options with some of them replaced.

        Args:
            changes: fields of `LoadOptions`; `torch_dtype` is accepted for `dtype`, as in diffusers, and `lora` for
                `loras` of one file.

        Raises:
            ConfigError: an option does not exist, or its value is wrong.
        """
        if "torch_dtype" in changes:
            changes["dtype"] = changes.pop("torch_dtype")
        if "lora" in changes:
            if "loras" in changes:
                raise ConfigError("give either lora, with one file, or loras")
            changes["loras"] = [changes.pop("lora")]
        check_names(type(self), changes)
        return replace(self, **changes)


def _check_heads(name: str, value: object) -> HeadPolicy | str:
    """The windows of heads, or the path of their file."""
    if isinstance(value, HeadPolicy):
        return value
    if not isinstance(value, str | os.PathLike):
        raise ConfigError(f"{name}: expected a HeadPolicy or the path of a file that holds one, got {shown(value)}")
    return check_path(name, value)


def _check_loras(name: str, value: object) -> tuple[Lora, ...]:
    """The LoRAs as a tuple."""
    if isinstance(value, str | os.PathLike | Lora) or not isinstance(value, Sequence):
        raise ConfigError(f"{name} must be a list of files or of Lora objects, not {shown(value)}")
    return tuple(
        lora if isinstance(lora, Lora) else Lora.of(check_path(f"{name}[{n}]", lora)) for n, lora in enumerate(value)
    )
