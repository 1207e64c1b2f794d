"""The configuration of a Latte DiT, read from diffusers' config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from causalrope_sp.checks import check_fields
from causalrope_sp.errors import CheckpointError, ConfigError

# fields of diffusers' class that have one value in every Latte; another value is another model
_FIXED = {
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "activation_fn": "gelu-approximate",
}


@dataclass(frozen=True)
class LatteConfig:
    """Sizes of a Latte DiT, under diffusers' names. The defaults are those of the published Latte-1.

    Attributes:
        num_attention_heads: heads H.
        attention_head_dim: head width d.
        num_layers: pairs of a spatial and a temporal block.
        in_channels: latent channels.
        out_channels: channels that the model predicts: latent channels, and with a learned variance twice as many.
        caption_channels: width of the text embeddings.
        sample_size: height, in latent pixels, that the model was trained at; positions of other sizes are interpolated
            to it.
        patch_size: side of a token, in latent pixels.
        attention_bias: whether the projections to queries, keys and values have a bias.
        norm_eps: epsilon of the blocks' norms.

    Raises:
        ConfigError: a size is below 1, the width is not divisible by 4, or a field has another type.
    """

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    num_layers: int = 28
    in_channels: int = 4
    out_channels: int = 8
    caption_channels: int = 4096
    sample_size: int = 64
    patch_size: int = 2
    attention_bias: bool = True
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        check_fields(self, [field.name for field in fields(self) if field.type == "int"])
        if self.dim % 4:
            raise ConfigError(f"width {self.dim} must be divisible by 4 to carry the sinusoids of two axes")
        if isinstance(self.norm_eps, bool) or not isinstance(self.norm_eps, int | float) or not 0 < self.norm_eps < 1:
            raise ConfigError(f"norm_eps must be a number above 0 and below 1, not {self.norm_eps!r}")
        if not isinstance(self.attention_bias, bool):
            raise ConfigError(f"attention_bias must be true or false, not {self.attention_bias!r}")

    @classmethod
    def of_diffusers(cls, declared: Mapping[str, Any]) -> Self:
        """Reads the config.json of diffusers' `LatteTransformer3DModel`.

        Args:
            declared: its content.

        Returns:
            The configuration.

        Raises:
            CheckpointError: a field is missing, or has a value that no Latte has.
            ConfigError: a size is impossible.
        """
        for name, expected in _FIXED.items():
            if declared.get(name) != expected:
                raise CheckpointError(f"not Latte: its config has {name} {declared.get(name)!r}, not {expected!r}")
        names = [field.name for field in fields(cls)]
        missing = [name for name in names if declared.get(name) is None and name != "out_channels"]
        if missing:
            raise CheckpointError(f"the model's config has no {', '.join(missing)}")
        values = {name: declared[name] for name in names if declared.get(name) is not None}
        found = cls(**{"out_channels": declared["in_channels"], **values})
        text_width = declared.get("cross_attention_dim")
        if text_width != found.dim:
            raise CheckpointError(f"not Latte: its cross-attention reads a width of {text_width}, not {found.dim}")
        return found

    @property
    def dim(self) -> int:
        """The model width D."""
        return self.num_attention_heads * self.attention_head_dim
