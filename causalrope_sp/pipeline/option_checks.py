"""Checks that `LoadOptions` and `GenerationOptions` share. Each returns the value in its final type."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from typing import Any, get_args

import torch

from causalrope_sp.checks import check_choice, check_number, check_whole, shown
from causalrope_sp.config import DTYPE_NAMES, Solver, TimestepRule
from causalrope_sp.devices import check_device
from causalrope_sp.errors import ConfigError
from causalrope_sp.pipeline.offload import Offload

Steps = int | Sequence[float]  # a number of steps, or their unshifted timesteps
DTYPES = {name: getattr(torch, name) for name in DTYPE_NAMES}


def check_path(name: str, value: object) -> str:
    """Returns `value` as a text. Raises ConfigError unless it is a path that a file can have, and not empty."""
    if not isinstance(value, str | os.PathLike) or not os.fspath(value) or "\0" in str(value):
        raise ConfigError(f"{name} must be a path, not {shown(value)}")
    try:
        os.lstat(value)
    except UnicodeEncodeError:
        raise ConfigError(f"{name} must be a path, not {shown(value)}") from None
    except OSError as reason:
        if reason.errno in (errno.ENAMETOOLONG, errno.ELOOP):  # whoever reads a missing or forbidden file says so
            raise ConfigError(f"{name} must be a path, not {shown(value)}: {reason.strerror}") from reason
    return str(os.fspath(value))


def check_dtype(value: object) -> torch.dtype:
    """Returns `value` as a dtype. Raises ConfigError unless it is one of `DTYPES` or its name."""
    dtype = DTYPES.get(value.removeprefix("torch.")) if isinstance(value, str) else value
    if dtype not in DTYPES.values():
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, not {shown(value)}")
    assert isinstance(dtype, torch.dtype), "checked"
    return dtype


def check_sampling(owner: object) -> None:
    """Checks the types of the sampler's fields, which both kinds of options have; `SamplerConfig` checks their ranges.

    Raises:
        ConfigError: a field has the wrong type.
    """
    replace_checked(owner, "solver", check_choice, get_args(Solver))
    replace_checked(owner, "timestep_rule", check_choice, get_args(TimestepRule))
    for name in ("shift", "guidance_scale"):
        replace_checked(owner, name, check_number)
    replace_checked(owner, "num_inference_steps", _check_steps)
    replace_checked(owner, "guidance_interval", _check_interval)


def _check_steps(name: str, value: object) -> Steps:
    if isinstance(value, str) or not isinstance(value, Sequence):
        return check_whole(name, value, 1, 1000)
    return tuple(check_number(name, step) for step in value)


def _check_interval(name: str, value: object) -> tuple[float, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence) or len(value) != 2:
        raise ConfigError(f"{name} must be two timesteps, the lower one first, not {shown(value)}")
    return tuple(check_number(name, bound) for bound in value)


def device_field(_: str, value: object) -> torch.device:
    """Calls `check_device` with the arguments of `replace_checked`."""
    return check_device(value)


def dtype_field(_: str, value: object) -> torch.dtype:
    """Calls `check_dtype` with the arguments of `replace_checked`."""
    return check_dtype(value)


def offload_field(_: str, value: Any) -> Offload:
    """Returns `value` as an `Offload`, which is parsed from words if necessary."""
    return value if isinstance(value, Offload) else Offload.of(value)


def replace_checked(owner: object, name: str, check: Callable[..., object], *limits: object) -> None:
    """Replaces a field of a frozen dataclass, unless it is None, by the value that its check returns.

    Args:
        owner: the dataclass instance.
        name: the field.
        check: a function of the name, the value and the limits.
        limits: further arguments of `check`.
    """
    value = getattr(owner, name)
    if value is not None:
        object.__setattr__(owner, name, check(name, value, *limits))


def check_names(options: Any, names: Collection[str]) -> None:
    """Raises ConfigError unless all `names` are fields of the dataclass `options`."""
    known = [field.name for field in fields(options)]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(f"there is no option {', '.join(unknown)}; there are: {', '.join(known)}")
