"""A stand-in for the driver of a GPU that this machine need not have.

Kernels are compiled for a GPU and launched by Triton's own code up to the call of the driver, which is counted and does
nothing. Tensors stay on the CPU, so that addresses and sizes are those of a real run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 asks which; 3.10 would no longer fuse

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

import causalrope_kernels
from causalrope_kernels import backend


class AbsentGPU:
    """A driver that answers what Triton asks of a GPU.

    Args:
        architecture: the compute capability as one number, such as 90.
        launched: called at every launch with the function that was loaded, the grid and the kernel's arguments.
    """

    def __init__(self, architecture: int, launched: Callable[..., None] | None = None) -> None:
        self._architecture = architecture
        self.utils = self
        self.launcher_cls = lambda source, metadata: _Launcher(source.fn.fn.__name__, launched)

    def get_current_device(self) -> int:
        return self._architecture  # Triton caches compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._architecture, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448, "multiprocessor_count": 132}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 1, 1, 32, 0, 1024

    def unload_module(self, module: int) -> None: ...


class _Launcher:
    def __init__(self, name: str, launched: Callable[..., None] | None) -> None:
        self._name, self._launched = name, launched

    def __call__(self, *arguments: Any) -> None:
        if self._launched is not None:
            x, y, z, _stream, _function, _metadata, _launch_metadata, _enter, _leave, *passed = arguments
            self._launched(self._name, (x, y, z), passed)


@contextmanager
def by_triton(architecture: int = 90, launched: Callable[..., None] | None = None) -> Iterator[None]:
    """Lets the operations choose Triton for tensors on the CPU and launches on an `AbsentGPU`; results are undefined.

    Args:
        architecture: the compute capability as one number.
        launched: see `AbsentGPU`.
    """
    driver.set_active(AbsentGPU(architecture, launched))
    with ExitStack() as patches:
        patches.enter_context(patch.object(backend, "runs_triton", lambda device: True))
        patches.enter_context(patch.object(backend, "obstacle", lambda tensors: None))
        inference = getattr(causalrope_kernels, "inference", None)  # which the build before does not have
        if inference is not None:  # as on a GPU: cuBLASLt's call, and not oneDNN
            patches.enter_context(patch.object(inference, "by_onednn", lambda dtype: False))
            patches.enter_context(patch.object(inference, "_linear_gelu", inference.linear_gelu_by_cublas))
        yield
