"""Opens the pipeline of a whole-video model's folder, or plans it without its weights."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from causalrope_sp.devices import on_meta
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.errors import CheckpointError
from causalrope_sp.reuse.policy import ReusePolicy
from causalrope_sp.spatiotemporal.cost import VideoWork
from causalrope_sp.spatiotemporal.kinds import kind_of
from causalrope_sp.spatiotemporal.video_pipeline import STRIDE, VideoOptions, WholeVideoPipeline

PLANNED_ITEMSIZE = 2  # bytes of bfloat16


def open_video_pipeline(
    folder: str | PathLike[str], options: VideoOptions | None = None, parallel: SequenceParallel | None = None
) -> WholeVideoPipeline:
    """Opens a folder of Latte or Open-Sora. Every rank must call.

    Args:
        folder: the folder; see `kind_of`.
        options: how it is loaded and sampled; None is the model's own way.
        parallel: the ranks; None is one process.

    Returns:
        The pipeline.

    Raises:
        CheckpointError: the folder holds no such model, or a part cannot be read.
        ConfigError: a size does not fit the model.
    """
    return _pipeline_of(folder)(folder, options or VideoOptions(), parallel)


def plan_video_pipeline(folder: str | PathLike[str], options: VideoOptions) -> WholeVideoPipeline:
    """Opens a folder with a transformer on the meta device, of which only sizes and settings are of use.

    Args:
        folder: the folder; see `kind_of`.
        options: how it would be sampled.

    Returns:
        The pipeline.

    Raises:
        CheckpointError: the folder holds no such model, or a config cannot be read.
        ConfigError: a size does not fit the model.
    """
    pipeline = _pipeline_of(folder)
    with on_meta():
        model = pipeline.model_on_meta(Path(folder))
    return pipeline(folder, options, SequenceParallel.single(device="cpu"), model)


def video_work(pipe: WholeVideoPipeline, reuse: ReusePolicy | None) -> VideoWork:
    """Returns the work of the model's own video in bfloat16.

    Args:
        pipe: the pipeline.
        reuse: the reuse policy, or None.

    Raises:
        ConfigError: a rule of the policy can never apply.
    """
    frames, patch = pipe.settings.num_frames, STRIDE * pipe.model.config.patch_size
    timesteps = pipe.timesteps(frames)
    work = VideoWork(
        pipe.model,
        pipe.latent_frames(frames),
        (pipe.height // patch) * (pipe.width // patch),
        pipe.settings.text_len,
        1 if pipe.settings.guidance_scale == 1 else 2,
        timesteps,
        PLANNED_ITEMSIZE,
        reuse,
    )
    if reuse is not None:
        reuse.check(timesteps, work.layers)
    return work


def _pipeline_of(folder: str | PathLike[str]) -> type[WholeVideoPipeline]:
    kind = kind_of(folder)
    if kind is None:
        raise CheckpointError(f"{folder} is no folder of Latte or Open-Sora")
    if kind == "latte":
        from causalrope_sp.spatiotemporal.latte.latte_pipeline import LattePipeline

        return LattePipeline
    from causalrope_sp.spatiotemporal.open_sora.open_sora_pipeline import OpenSoraPipeline

    return OpenSoraPipeline
