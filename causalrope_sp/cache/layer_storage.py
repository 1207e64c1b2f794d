"""The memory of a layer's keys and values: as the model computes them, or quantized to 8 bits with scales.

Shapes: B batch, K slots, S tokens of a frame, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

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
        offset_BHD: what is taken off quantized keys, the same for all that the layer will hold, so that attention does
            not see it; float32 or wider.
    """

    numbers_2BKSHD: Tensor
    scales_2BKSH: Tensor | None = None
    offset_BHD: Tensor | None = None

    @classmethod
    def empty(
        cls, shape: tuple[int, ...], dtype: torch.dtype, quantized: torch.dtype | None, device: torch.device | str
    ) -> LayerStorage:
        """Allocates storage.

        Args:
            shape: (2, B, K, S, H, d).
            dtype: in which keys and values are computed.
            quantized: the dtype of 8 bits that they are stored in; None stores them as they are computed.
            device: where they live.
        """
        numbers = torch.empty(shape, dtype=quantized or dtype, device=device)
        if quantized is None:
            return cls(numbers)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        offset = torch.zeros(shape[1], *shape[4:], dtype=wide, device=device)
        return cls(numbers, torch.empty(shape[:-1], dtype=SCALE_DTYPE, device=device), offset)

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
        """Writes what `read` returned to some slots; returns whether it is finite."""
        if self.scales_2BKSH is None:
            self.numbers_2BKSHD[:, :, slots] = held.to(self.numbers_2BKSHD)
            return True  # as its reader has checked
        numbers, scales = held.split([self.numbers_2BKSHD.shape[-1], SCALE_DTYPE.itemsize], -1)
        own = numbers.contiguous().view(self.numbers_2BKSHD.dtype), scales.contiguous().view(SCALE_DTYPE).squeeze(-1)
        for part, new in zip(self.parts_2BK, own, strict=True):
            as_bits(part)[:, :, slots] = as_bits(new).to(part.device)
        return all(bool(x.float().isfinite().all()) for x in own)

    def tensors(self) -> Iterator[Tensor]:
        """Yields all memory of the layer."""
        yield from self.parts_2BK
        if self.offset_BHD is not None:
            yield self.offset_BHD

    def clone(self) -> LayerStorage:
        """Returns a copy of all that lies in slots."""
        scales = None if self.scales_2BKSH is None else self.scales_2BKSH.clone()
        return replace(self, numbers_2BKSHD=self.numbers_2BKSHD.clone(), scales_2BKSH=scales)

    def shared(self) -> LayerStorage:
        """Returns the same storage for a fork; the offset is its own, since it may be set before anything is stored."""
        return replace(self, offset_BHD=None if self.offset_BHD is None else self.offset_BHD.clone())
