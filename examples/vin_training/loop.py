"""The loop of every stage of toybox-vin's training."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from toybox_training.batches import Draws
from toybox_training.training import Training, agreed, processes, rank

M = TypeVar("M", bound=nn.Module)
Report = dict[str, float]
Loss = Callable[[M, Draws, float], tuple[Tensor, Report]]
Measure = Callable[[M], Report]
WARM_UP, FALLS = 100, 0.5  # steps, and the share of the time after which the learning rate falls
MEASURED_EVERY = 200  # steps


def learn(
    training: Training[M],
    minutes: float,
    seed: int,
    device: torch.device,
    loss_of: Loss[M],
    measure: Measure[M],
) -> M:
    """Trains for so many minutes, counted from zero when a run resumes, and saves.

    Args:
        training: the model and its optimisers.
        minutes: how long, at least one step, and with 0 not at all; the learning rate is constant for half of it, then
            falls to a fiftieth.
        seed: of the draws.
        device: where the model is.
        loss_of: returns the loss of a step, given the model, the draws and the share of the time that is over, and what
            to log of it.
        measure: returns what to log of the averaged model now and then.

    Returns:
        The averaged model.
    """
    if training.step == 0:
        training.save()  # the stage before is over
    started, began = time.monotonic(), training.step
    while minutes:
        elapsed = agreed((time.monotonic() - started) / (60 * minutes), device)
        if elapsed >= 1 and training.step > began:
            break
        draws = Draws.seeded(seed + processes() * training.step + rank(), device)
        loss, report = loss_of(training.model, draws, elapsed)
        if (training.step + 1) % MEASURED_EVERY == 0 and rank() == 0:
            report |= measure(training.ema)
        rate = min(1, (training.step + 1) / WARM_UP) * min(1, max(0.02, (1 - elapsed) / (1 - FALLS)))
        training.update(loss, rate, report)
    training.save()
    return training.ema
