"""The configuration of Open-Sora 1.2's DiT, read from the config.json of `STDiT3`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from causalrope_sp.checks import check_fields
from causalrope_sp.errors import CheckpointError, ConfigError

# fields of the published class that have one value in Open-Sora 1.2; another value is another model
_FIXED = {"qk_norm": True, "pred_sigma": True, "mlp_ratio": 4.0, "skip_y_embedder": False}


@dataclass(frozen=True)
class OpenSoraConfig:
    """Sizes of an STDiT3, under the published names. The defaults are those of the published Open-Sora 1.2.

    Attributes:
        hidden_size: model width D.
        num_heads: heads H.
        depth: pairs of a spatial and a temporal block.
        in_channels: latent channels.
        caption_channels: width of the text embeddings.
        model_max_length: text tokens of the learned null text.
        input_sq_size: side, in pixels, of the square that the model's positions were learned at.
        patch_size: side of a token, in latent pixels.

    Raises:
        ConfigError: a size is below 1, or the heads, or 4, do not divide the width, or the head width is odd.
    """

    hidden_size: int = 1152
    num_heads: int = 16
    depth: int = 28
    in_channels: int = 4
    caption_channels: int = 4096
    model_max_length: int = 300
    input_sq_size: int = 512
    patch_size: int = 2

    def __post_init__(self) -> None:
        check_fields(self, [field.name for field in fields(self)])
        if self.hidden_size % 4:
            raise ConfigError(
                f"hidden_size {self.hidden_size} must be divisible by 4 to carry the sinusoids of two axes"
            )
        if self.hidden_size % (2 * self.num_heads):
            raise ConfigError(
                f"hidden_size {self.hidden_size} must be an even number of times num_heads {self.num_heads}"
            )

    @classmethod
    def of_published(cls, declared: Mapping[str, Any]) -> Self:
        """Reads the config.json of `STDiT3`; a field that it lacks has the published class's default.

        Args:
            declared: its content.

        Returns:
            The configuration.

        Raises:
            CheckpointError: it is that of another kind of model, or a field has a value that no Open-Sora 1.2 has.
            ConfigError: a size is impossible.
        """
        kind = declared.get("model_type")
        if kind != "STDiT3":
            raise CheckpointError(f"not Open-Sora 1.2: its config has model_type {kind!r}, not 'STDiT3'")
        for name, expected in _FIXED.items():
            if declared.get(name, expected) != expected:
                raise CheckpointError(f"not Open-Sora 1.2: its config has {name} {declared[name]!r}, not {expected!r}")
        patch = declared.get("patch_size", [1, 2, 2])
        if not isinstance(patch, list) or len(patch) != 3 or patch[0] != 1 or patch[1] != patch[2]:
            raise CheckpointError(f"not Open-Sora 1.2: its config has patch_size {patch!r}, not [1, n, n]")
        names = {field.name for field in fields(cls)} - {"patch_size"}
        return cls(**{name: declared[name] for name in names & declared.keys()}, patch_size=patch[1])

    @property
    def head_dim(self) -> int:
        """The head width d."""
        return self.hidden_size // self.num_heads

    @property
    def predicted_channels(self) -> int:
        """Channels of a prediction: the velocity's, then as many for its variance."""
        return 2 * self.in_channels
