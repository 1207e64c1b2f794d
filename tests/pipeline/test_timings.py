"""Quantiles of timings are values that occurred."""

from __future__ import annotations

import random

from causalrope_sp.pipeline.timings import Timings, quantiles


def test_quantiles_are_by_rank() -> None:
    values = [n / 1000 for n in range(1, 101)]
    random.Random(0).shuffle(values)
    found = quantiles([Timings(value, 2 * value, 0.0, 3 * value) for value in values])
    assert found["denoise"] == {"p50": 50, "p95": 95, "max": 100}
    assert found["total"] == {"p50": 150, "p95": 285, "max": 300}
    assert found["wait"] == {"p50": 0, "p95": 0, "max": 0}
    assert quantiles([Timings(0.001, 0.002, 0.003, 0.006)])["decode"] == {"p50": 2, "p95": 2, "max": 2}
