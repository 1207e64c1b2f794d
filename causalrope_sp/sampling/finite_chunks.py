"""Checks that the latents of chunks are finite numbers, without a wait for the device between two chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from causalrope_sp.devices import recorded_event
from causalrope_sp.errors import ConfigError


class FiniteCheck:
    """Whether the latents of one chunk are finite. The device is asked at construction, and the answer is read later.

    Args:
        chunk: the chunk's number.
        latents: its latents.
        dtype: the dtype that the model computes in, for the message.
    """

    def __init__(self, chunk: int, latents: Tensor, dtype: torch.dtype) -> None:
        self._chunk, self._dtype = chunk, dtype
        finite = torch.stack(latents.aminmax()).isfinite().all()
        self._arrived: torch.cuda.Event | None = None
        self._finite = finite
        if finite.is_cuda:
            self._finite = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(finite, non_blocking=True)
            self._arrived = recorded_event(finite.device)

    def read(self) -> None:
        """Waits for the answer; a caller that has launched the next chunk meanwhile finds it there.

        Raises:
            ConfigError: the latents hold NaN or infinity.
        """
        if self._arrived is not None:
            self._arrived.synchronize()
        if not self._finite:
            name = str(self._dtype).removeprefix("torch.")
            raise ConfigError(f"chunk {self._chunk} has latents that are not finite in {name}: {_way_out(self._dtype)}")


def check_finite(name: str, tensor: Tensor | None) -> None:
    """Checks what a caller gives once a stream, such as embeddings; it waits for the device.

    Raises:
        ConfigError: the tensor holds NaN or infinity.
    """
    if tensor is not None and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise ConfigError(f"{name} must be finite, and hold NaN or infinity in {dtype}")


def _way_out(dtype: torch.dtype) -> str:
    """What is likely to help."""
    if dtype == torch.float16:
        return "the model probably leaves float16's range, which ends at 65504; load it with dtype bfloat16 or float32"
    return "check the weights of its LoRAs, the guidance scale and the initial latents, or load it with dtype float32"
