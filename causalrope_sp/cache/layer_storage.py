"""The memory of a layer's keys and values: as the model computes them, or quantized to 8 bits with scales.

Shapes: B batch, K slots, S tokens of a frame, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from causalrope_kernels.quantized_heads import SCALE_DTYPE, as_bits

STORED_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}  # by `StreamConfig.cache`


@dataclass(frozen=True)
class LayerStorage:
    """Keys and values of a layer.

    Args:
        numbers_2BKSHD: the keys and the values, in the model's dtype or quantized.
        scales_2BKSH: their scales if they are quantized, one for every token and head.
    """

    numbers_2BKSHD: Tensor
    scales_2BKSH: Tensor | None = None

    @property
    def parts_2BK(self) -> list[Tensor]:
        """What lies in slots: the numbers, and the scales if there are any."""
        return [self.numbers_2BKSHD] if self.scales_2BKSH is None else [self.numbers_2BKSHD, self.scales_2BKSH]

    def read(self, slots: Sequence[int]) -> Tensor:
        """Returns what lies in some slots as one tensor, (2, B, len(slots), S, H, d). If it is quantized, the bytes of
        a head's numbers and then those of its scale are its last axis, in int8."""
        if self.scales_2BKSH is None:
            return self.numbers_2BKSHD[:, :, slots]
        numbers, scales = (part[:, :, slots] for part in self.parts_2BK)
        return torch.cat([numbers.view(torch.int8), scales.unsqueeze(-1).view(torch.int8)], -1)

    def write(self, slots: Sequence[int], held: Tensor) -> bool:
        """Writes what `read` returned to some slots.

        Returns:
            Whether numbers and scales are ones that quantizing makes: finite, no scale below 0, and none of 0 but for
            numbers that all are.
        """
        if self.scales_2BKSH is None:
            self.numbers_2BKSHD[:, :, slots] = held.to(self.numbers_2BKSHD)
            return True  # as its reader has checked
        numbers, scales = held.split([self.numbers_2BKSHD.shape[-1], SCALE_DTYPE.itemsize], -1)
        own = numbers.contiguous().view(self.numbers_2BKSHD.dtype), scales.contiguous().view(SCALE_DTYPE).squeeze(-1)
        for part, new in zip(self.parts_2BK, own, strict=True):
            as_bits(part)[:, :, slots] = as_bits(new).to(part.device)
        stored, scale = own[0].float(), own[1]
        finite = stored.isfinite().all() and scale.isfinite().all()
        return bool(finite and torch.where(stored.count_nonzero(-1) > 0, scale > 0, scale >= 0).all())


@dataclass(frozen=True)
class LayerViews:
    """The views of a layer's storage.

    Args:
        rings: keys and values in slots, each (B, K, S, H, d).
        rows: the same as rows, each (B, K·S, H, d).
        scales: their scales, each (B, K, S, H), or None.
        scale_rows: the same as rows, each (B, K·S, H), or None.
    """

    rings: tuple[Tensor, Tensor]
    rows: tuple[Tensor, Tensor]
    scales: tuple[Tensor | None, Tensor | None]
    scale_rows: tuple[Tensor | None, Tensor | None]

    @classmethod
    def of(cls, layer: LayerStorage) -> LayerViews:
        """Makes the views, each once, since a view costs the host as much as a launch."""
        k, v = layer.numbers_2BKSHD
        rows = k.flatten(1, 2), v.flatten(1, 2)
        if layer.scales_2BKSH is None:
            return cls((k, v), rows, (None, None), (None, None))
        k_scales, v_scales = layer.scales_2BKSH
        scale_rows = k_scales.flatten(1, 2), v_scales.flatten(1, 2)
        return cls((k, v), rows, (k_scales, v_scales), scale_rows)
