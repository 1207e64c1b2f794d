"""Devices: their check, the default one, that of a rank, copies to them that do not block the host, events of their
streams, and the meta device for models whose weights are not read yet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from causalrope_sp.checks import shown
from causalrope_sp.errors import ConfigError


def send(x: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Returns `x` on `device`.

    Args:
        x: the tensor. It is copied to a CUDA device from pinned memory, in the order of the current CUDA stream.
        device: where the result lives.
        dtype: of the result; None keeps that of `x`.
    """
    x = x if dtype is None else x.to(dtype=dtype)
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and not x.is_cuda else x.to(device)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Returns the bytes of the memory that tensors refer to; what some of them share counts once."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def check_device(value: object) -> torch.device:
    """Returns `value` as a device. Raises ConfigError unless it names a device of this machine."""
    device = _known_device(value)
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise ConfigError(f"device must be cpu, cuda or cuda:NUMBER, not {shown(value)}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device must be one of this machine, which has {torch.cuda.device_count()} GPUs, not {value}"
        )
    return device


def own_device(value: object) -> torch.device:
    """Returns `value` as the device that this process computes on. "cuda" becomes the current GPU with its index, as
    tensors name it: threads have a current GPU each, and torch sets none without an index.

    Raises:
        ConfigError: it names no device of this machine.
    """
    device = check_device(value)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def recorded_event(device: torch.device, timing: bool = False) -> torch.cuda.Event:
    """Returns an event that is recorded now in the current CUDA stream of a GPU, which need not be the current GPU of
    this thread.

    Args:
        device: the GPU.
        timing: whether the event measures time.
    """
    event = torch.cuda.Event(enable_timing=timing)
    event.record(torch.cuda.current_stream(device))
    return event


def _known_device(value: object) -> torch.device:
    """Returns `value` as a device. Raises ConfigError unless torch knows it."""
    try:
        return torch.device(value)  # type: ignore[call-overload]  # a wrong type is caught
    except (RuntimeError, TypeError, ValueError) as reason:
        raise ConfigError(f"device must be one that torch knows, such as cpu or cuda:0, not {shown(value)}") from reason


def default_device() -> str:
    """Returns "cuda" if this machine has a CUDA device, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_of_rank(device: torch.device | str | None, local_rank: int) -> torch.device:
    """Returns where a rank that torchrun started computes, and makes a GPU the current one.

    Args:
        device: the device; "cuda" without a number is the GPU of the rank's number on this machine, and None is that
            or, without CUDA, the CPU.
        local_rank: the rank's number on this machine.

    Raises:
        ConfigError: torch does not know the device, or this machine has fewer GPUs than ranks.
    """
    own = _known_device(device or default_device())
    if own.type != "cuda":
        return own
    local = local_rank if own.index is None else own.index
    if local >= torch.cuda.device_count():
        raise ConfigError(f"local rank {local} has no GPU: this machine has {torch.cuda.device_count()}")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


class _Uninitialized(TorchFunctionMode):
    """Lets the functions of `torch.nn.init` return their tensor as it is."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def on_meta() -> Iterator[None]:
    """Builds modules without memory and without drawing their weights, for which torch would import much on meta."""
    with torch.device("meta"), _Uninitialized():
        yield
