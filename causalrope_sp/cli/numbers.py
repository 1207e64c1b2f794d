"""Types of numeric options, which take plain digits alone."""

from __future__ import annotations

from typing import Any

import click


class _Plain(click.ParamType):
    """Refuses what Python's `int` and `float` read beyond plain numbers: underscores and other scripts' digits."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and ("_" in value or not value.isascii()):
            self.fail(f"{value!r} is not a number in plain digits.", param, ctx)
        return super().convert(value, param, ctx)


class _Integer(_Plain, click.types.IntParamType):
    pass


class _Float(_Plain, click.types.FloatParamType):
    pass


class IntRange(_Plain, click.IntRange):
    """An integer between two bounds, both included, in plain digits."""


INTEGER, FLOAT = _Integer(), _Float()
SEED = IntRange(0, 2**63 - 1)
