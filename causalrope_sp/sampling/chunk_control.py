"""The control of a chunk: what a caller gives per latent frame, such as a camera, an action or a mask, checked and cut
into this rank's tokens.

Shapes: B batch, F latent frames of a chunk, C channels of the control, H×W latent size, s tokens of a frame on this
rank, E numbers of control in a token.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from causalrope_sp.checks import shown
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.errors import ConfigError
from causalrope_sp.sampling.agreement import digest
from causalrope_sp.sampling.chunk import ShardContext
from causalrope_sp.sampling.finite_chunks import check_finite
from causalrope_sp.sampling.stream_options import Control


def check_taken(channels: int, control: object) -> None:
    """Raises ConfigError if a model with so many channels of control lacks one, or one without is given one."""
    if control is None and channels:
        raise ConfigError(f"control must be given: the model takes {channels} channels of it for each latent frame")
    if control is not None and not channels:
        raise ConfigError("control must be None: the model takes none")


def checked_control(context: ShardContext, channels: int, frames: int, control_BFCHW: object) -> Tensor:
    """Checks the control of some latent frames.

    Args:
        context: of the stream.
        channels: C of the model.
        frames: F.
        control_BFCHW: what the caller gave; H×W may be 1×1 for a control that is the same all over a latent frame.

    Returns:
        The control, (B, F, C, H, W).

    Raises:
        ConfigError: the model takes none, it is no tensor of floating-point numbers, has another shape, or is not
            finite.
    """
    check_taken(channels, control_BFCHW)
    if not isinstance(control_BFCHW, Tensor) or not control_BFCHW.is_floating_point():
        found = control_BFCHW.dtype if isinstance(control_BFCHW, Tensor) else shown(control_BFCHW)
        raise ConfigError(f"control must be a tensor of floating-point numbers, not {found}")
    batch, _, _, *size = context.shape(frames)
    whole, uniform = (batch, frames, channels, *size), (batch, frames, channels, 1, 1)
    if control_BFCHW.shape not in (whole, uniform):
        raise ConfigError(f"control has shape {tuple(control_BFCHW.shape)}, expected {whole} or {uniform}")
    check_finite("control", control_BFCHW)
    return control_BFCHW.expand(whole)


def shared_control(
    parallel: SequenceParallel, context: ShardContext, channels: int, frames: int, ask: Callable[[], object]
) -> Tensor:
    """Returns this rank's part of the control of some latent frames, (B, F, s, E). All ranks that denoise must call it.

    Args:
        parallel: the ranks.
        context: of the stream.
        channels: C of the model.
        frames: F.
        ask: returns what the caller gives; see `checked_control`.

    Raises:
        ConfigError: it does not fit on some rank, or differs between ranks.
    """
    ranks = parallel.denoisers
    control = ranks.run_collectively(lambda: checked_control(context, channels, frames, ask()))
    if ranks.size > 1:
        ranks.agree({"control": digest(control)})
    return context.tokens(control)


def control_by_chunk(control: Tensor | Control | None, frames: int | None) -> Control | None:
    """Returns the control of a stream as a function of a chunk.

    Args:
        control: the function, or the control of all frames that are generated, (B, F, C, H, W).
        frames: how many frames are generated; None for a video without end.

    Raises:
        ConfigError: a tensor has fewer frames.
    """
    if not isinstance(control, Tensor):
        return control
    if frames is None:
        raise ConfigError("control must be a function for a video without end, since a tensor ends")
    if control.ndim != 5 or control.shape[1] < frames:
        raise ConfigError(
            f"control has shape {tuple(control.shape)}, expected (1, {frames}, channels, height, width) for the "
            f"{frames} latent frames that are generated"
        )
    return lambda chunk: control[:, chunk.start : chunk.stop]
