"""A second CUDA stream, in which one chunk is decoded while the next is denoised."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class SideStream:
    """A second CUDA stream, in which one chunk is decoded while the next is denoised; without effect on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def after(self, ready: torch.cuda.Event | None, latents: Tensor) -> Iterator[None]:
        """Runs the body in the second CUDA stream once the event has occurred, or in the current one without an event.

        Args:
            ready: the event after which `latents` are ready, or None.
            latents: the tensor that the body reads.
        """
        if self._stream is None or ready is None:
            yield
            return
        self._stream.wait_event(ready)
        latents.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            yield
