"""The configuration of a Wan VAE, with the fields and defaults of diffusers' `AutoencoderKLWan`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from causalrope_sp.errors import ConfigError

# Statistics of the latent channels, as published with each VAE: Wan 2.1's 16 and Wan 2.2's 48
_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)
_MEAN_48 = (
    *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557),
    *(-0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825),
    *(-0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
    *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230),
    *(-0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748),
    *(0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
)
_STD_48 = (
    *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013),
    *(0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978),
    *(0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
    *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093),
    *(0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887),
    *(0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
)
STATISTICS = {16: (_MEAN, _STD), 48: (_MEAN_48, _STD_48)}  # latent channels -> mean and deviation of each


@dataclass(frozen=True)
class WanVaeConfig:
    """The sizes of a Wan VAE; the defaults are Wan 2.1's.

    Attributes:
        base_dim: channels of the encoder's first layer, and of the decoder's last one without `decoder_base_dim`.
        decoder_base_dim: channels of the decoder's last layer, or None.
        z_dim: latent channels.
        dim_mult: for every stage of the encoder, its channels divided by `base_dim`.
        num_res_blocks: residual blocks of a stage of the encoder; a stage of the decoder has one more.
        attn_scales: scales of the picture, 1 for the first stage and half for each next one, at which the encoder has
            an attention after every residual block.
        temperal_downsample: for every stage of the encoder but the last, whether it halves the frames (diffusers'
            spelling).
        dropout: kept for diffusers; this library neither trains nor runs with it.
        latents_mean: the mean of every latent channel.
        latents_std: the standard deviation of every latent channel.
        is_residual: whether stages have shortcuts, as Wan 2.2's 48-channel VAE has.
        in_channels: channels that the encoder reads.
        out_channels: channels that the decoder makes.
        patch_size: the side in pixels of the square that one position of the outermost layers holds; None for 1.
        scale_factor_temporal: pixel frames of every latent frame but the first.
        scale_factor_spatial: pixels per side of a latent pixel.

    Raises:
        ConfigError: a field is of another kind or the fields contradict each other.
    """

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    dropout: float = 0.0
    latents_mean: tuple[float, ...] = _MEAN
    latents_std: tuple[float, ...] = _STD
    is_residual: bool = False
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None
    scale_factor_temporal: int = 4
    scale_factor_spatial: int = 8

    def __post_init__(self) -> None:
        for name in ("base_dim", "z_dim", "num_res_blocks", "in_channels", "out_channels"):
            _check(name, getattr(self, name), "a whole number above 0", _is_count)
        for name in ("scale_factor_temporal", "scale_factor_spatial"):
            _check(name, getattr(self, name), "a whole number above 0", _is_count)
        for name in ("decoder_base_dim", "patch_size"):
            _check(name, getattr(self, name), "a whole number above 0 or null", lambda v: v is None or _is_count(v))
        _check("dim_mult", self.dim_mult, "whole numbers above 0", lambda v: len(v) > 0 and all(map(_is_count, v)))
        for name in ("latents_mean", "latents_std"):
            _check(name, getattr(self, name), f"{self.z_dim} numbers", lambda v: len(v) == self.z_dim and _numbers(v))
        _check("latents_std", self.latents_std, "numbers above 0", lambda v: min(v) > 0)
        _check("attn_scales", self.attn_scales, "numbers", _numbers)
        resamplings = len(self.dim_mult) - 1
        _check(
            "temperal_downsample",
            self.temperal_downsample,
            f"{resamplings} of true or false, one for every resampling",
            lambda v: len(v) >= resamplings and all(isinstance(x, bool) for x in v),
        )
        self._check_shapes()

    def _check_shapes(self) -> None:
        """Checks that channels can be spread over patches and shared by shortcuts."""
        squared = (self.patch_size or 1) ** 2
        for name in ("in_channels", "out_channels"):
            _check(name, getattr(self, name), f"a multiple of {squared}, patch_size²", lambda v: v % squared == 0)
        if not self.is_residual:
            return
        factors = [4 * (2 if halves else 1) for halves in self.temperal_downsample[: len(self.dim_mult) - 1]]
        down = zip(self.encoder_widths, self.encoder_widths[1:], [*factors, 1])
        up = zip(self.decoder_widths, self.decoder_widths[1:], reversed(factors))
        shared = all(wide * factor % out == 0 for wide, out, factor in down)
        spread = all(out * factor % wide == 0 for wide, out, factor in up)
        _check("dim_mult", self.dim_mult, "widths that shortcuts can average and repeat", lambda _: shared and spread)

    @classmethod
    def from_json(cls, declared: Mapping[str, Any]) -> WanVaeConfig:
        """Reads the fields of diffusers' config.json; fields that this class does not have are passed by.

        Raises:
            ConfigError: as the class raises it.
        """
        known = {field.name: field.default for field in fields(cls)}
        given: dict[str, Any] = {}
        for name, value in declared.items():
            if name in known:
                many = isinstance(known[name], tuple)
                if many and not isinstance(value, list | tuple):
                    raise ConfigError(f"{name}: expected a list, got {value!r}")
                given[name] = tuple(value) if many else value
        return cls(**given)

    def as_json(self) -> dict[str, Any]:
        """Returns the fields as diffusers' config.json has them."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @property
    def encoder_widths(self) -> tuple[int, ...]:
        """The encoder's channels before its first stage and after each."""
        return tuple(self.base_dim * multiple for multiple in (1, *self.dim_mult))

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """The decoder's channels before its first stage and after each."""
        base = self.decoder_base_dim or self.base_dim
        return tuple(base * multiple for multiple in (self.dim_mult[-1], *reversed(self.dim_mult)))

    @property
    def temporal_upsample(self) -> tuple[bool, ...]:
        """For every stage of the decoder but the last, whether it doubles the frames."""
        return tuple(reversed(self.temperal_downsample))


def _check(name: str, value: Any, expected: str, holds: Any) -> None:
    try:
        good = bool(holds(value))
    except TypeError:
        good = False
    if not good:
        raise ConfigError(f"{name}: expected {expected}, got {value!r}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _numbers(values: Any) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


WAN_2_1 = WanVaeConfig()
WAN_2_2 = WanVaeConfig(
    base_dim=160,
    decoder_base_dim=256,
    z_dim=48,
    latents_mean=_MEAN_48,
    latents_std=_STD_48,
    is_residual=True,
    in_channels=12,
    out_channels=12,
    patch_size=2,
    scale_factor_spatial=16,
)
PUBLISHED = {vae.z_dim: vae for vae in (WAN_2_1, WAN_2_2)}  # latent channels -> the VAE that Wan published for them
