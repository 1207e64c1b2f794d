"""The loop of every stage of toybox-vin's training."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from toybox_training.batches import Draws
from toybox_training.training import Training, processes, rank, rate_at, shares_of_time

M = TypeVar("M", bound=nn.Module)
Report = dict[str, float]
Loss = Callable[[M, Draws, float], tuple[Tensor, Report]]
Measure = Callable[[M], Report]
PLATEAU = 0.5  # the share of the time before the learning rate falls
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
    for share in shares_of_time(minutes, device):
        draws = Draws.seeded(seed + processes() * training.step + rank(), device)
        loss, report = loss_of(training.model, draws, share)
        if (training.step + 1) % MEASURED_EVERY == 0 and rank() == 0:
            report |= measure(training.ema)
        training.update(loss, rate_at(training.step, share, PLATEAU), report)
    training.save()
    return training.ema
