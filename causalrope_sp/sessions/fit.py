"""Whether a saved session can go on in an engine."""

from __future__ import annotations

from collections.abc import Sequence

from causalrope_sp.checks import shown
from causalrope_sp.config import DiTConfig
from causalrope_sp.diffusion.schedule import guided_steps
from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import LatentGrid
from causalrope_sp.sessions.saved_parts import BRANCHES
from causalrope_sp.sessions.saved_session import SavedSession


def check_fits(
    saved: SavedSession, *, model_digest: str, loras: Sequence[str], model: DiTConfig, stride: int, codec: str
) -> None:
    """Checks that a session was made by the same model, and has the tensors that it needs.

    The number of ranks, the strategy and the dtype may differ. The session goes on with its own size, window and steps.

    Args:
        saved: the session.
        model_digest: `weights.checkpoint_digest` of the model's files.
        loras: the LoRAs that are merged into the model, as texts.
        model: the model's configuration.
        stride: the codec's spatial stride, in pixels a latent pixel.
        codec: the codec's name.

    Raises:
        ConfigError: something differs; the message is one sentence that names all of it.
    """
    grid = LatentGrid.from_pixels(saved.height, saved.width, stride, model.patch_size[1:])
    guided = any(guided_steps(saved.sampler))
    embeds = next(iter(saved.embeds.values()))
    model_of: tuple[str, object, object] = ("the model's digest is", saved.model_digest, model_digest)
    if saved.model_digest != model_digest and saved.loras != tuple(loras):
        ours, here = (", ".join(several) or "none" for several in (saved.loras, loras))
        model_of = ("LoRAs are", ours, here)
    compared: list[tuple[str, object, object]] = [
        model_of,
        (
            "a latent frame is",
            (len(saved.latents), *saved.latents.shape[2:]),
            (1, model.in_channels, grid.latent_height, grid.latent_width),
        ),
        ("channels of control are", 0 if saved.control is None else saved.control.shape[2], model.control_channels),
        ("embeddings are", tuple(embeds.shape[1:]), (model.text_len, model.text_dim)),
        ("guidance with negative embeddings is", saved.negative_embeds is not None, guided),
    ]
    if saved.decoder is not None:
        compared.append(("the codec is", saved.decoder.codec, codec))
    if (cache := saved.cache) is not None:
        found = cache.layers, cache.tokens, cache.heads, cache.head_dim
        expected = model.num_layers, grid.tokens, model.num_heads, model.head_dim
        compared.append(("layers, tokens, heads and head width are", found, expected))
        branches = [branch.name for branch in cache.branches]
        compared.append(("branches are", branches, list(BRANCHES[: 1 + guided])))
    differences = [
        f"{what} {shown(ours)} in the file and {shown(here)} here" for what, ours, here in compared if ours != here
    ]
    if differences:
        raise ConfigError(f"the saved session does not fit: {', '.join(differences)}")
