"""Opens the pipeline of a whole-video model's folder."""

from __future__ import annotations

from os import PathLike

from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.errors import CheckpointError
from causalrope_sp.spatiotemporal.folder import kind_of
from causalrope_sp.spatiotemporal.video_pipeline import VideoOptions, WholeVideoPipeline


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
    kind = kind_of(folder)
    if kind is None:
        raise CheckpointError(f"{folder} is no folder of Latte or Open-Sora")
    chosen = options or VideoOptions()
    if kind == "latte":
        from causalrope_sp.spatiotemporal.latte.latte_pipeline import LattePipeline

        return LattePipeline(folder, chosen, parallel)
    from causalrope_sp.spatiotemporal.open_sora.open_sora_pipeline import OpenSoraPipeline

    return OpenSoraPipeline(folder, chosen, parallel)
