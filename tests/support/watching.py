"""Calls that are noted as they are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def noted(call: Callable[..., Any], note: Callable[..., object]) -> Callable[..., Any]:
    """`call`, whose arguments `note` gets first."""

    def noting(*args: Any, **options: Any) -> Any:
        note(*args, **options)
        return call(*args, **options)

    return noting
