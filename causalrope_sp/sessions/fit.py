"""Whether a saved session can go on in an engine."""

from __future__ import annotations

from dataclasses import fields

from causalrope_sp.checks import shown
from causalrope_sp.config import SamplerConfig, StreamConfig
from causalrope_sp.errors import ConfigError
from causalrope_sp.sessions.saved_session import SavedSession


def check_fits(
    saved: SavedSession,
    *,
    model_digest: str,
    height: int,
    width: int,
    stream: StreamConfig,
    sampler: SamplerConfig,
    codec: str | None,
) -> None:
    """Checks that a session was made by the same model, of the same size and with the same configuration.

    The number of ranks, the strategy and the dtype may differ.

    Args:
        saved: the session.
        model_digest: `weights.digest.digest` of the model.
        height: of a pixel frame, in pixels.
        width: of a pixel frame, in pixels.
        stream: the stream's configuration.
        sampler: the sampler's.
        codec: the name of the codec that decodes; None if nothing is decoded, or the decoder's state is not gone on
            from.

    Raises:
        ConfigError: something differs; the message is one sentence that names all of it.
    """
    differences = []
    if saved.model_digest != model_digest:
        differences.append(f"the model's digest is {saved.model_digest} in the file and {model_digest} here")
    if (saved.height, saved.width) != (height, width):
        differences.append(f"frames are {saved.height}×{saved.width} pixels in the file and {height}×{width} here")
    for kept, here in ((saved.stream, stream), (saved.sampler, sampler)):
        for name in (field.name for field in fields(kept)):
            ways = getattr(kept, name), getattr(here, name)
            if ways[0] != ways[1]:
                differences.append(f"{name} is {shown(ways[0])} in the file and {shown(ways[1])} here")
    if codec is not None and saved.decoder is not None and saved.decoder.codec != codec:
        differences.append(f"the codec is {shown(saved.decoder.codec)} in the file and {codec!r} here")
    if differences:
        raise ConfigError(f"the saved session does not fit: {', '.join(differences)}")
