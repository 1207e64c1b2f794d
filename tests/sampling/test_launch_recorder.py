"""The recorder of launches finds what a captured graph could not replay, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from causalrope_kernels.launch import Kernel
from tests.support.launch_recorder import NotReadyError, RecordedPasses, as_on_a_gpu

OWN = torch.zeros(3)
OTHERS = [torch.zeros(3) for _ in range(4)]
KEPT: list[Tensor] = []
KERNEL = Kernel(SimpleNamespace(__name__="a_kernel"))


def keeps_memory(number: int) -> Tensor:
    KEPT.append(OWN + 1)
    return OWN * 2


def launches(grid: int, x: Tensor, size: int) -> Tensor:
    KERNEL.launch((grid,), (x,), (size,), ())
    return OWN * 2


WRONG: dict[str, tuple[Callable[[int], Tensor], str]] = {
    "a number is read": (lambda number: OWN * OWN.sum().item(), "item reads on the host"),
    "a list is read": (lambda number: OWN * len(OWN.tolist()), "tolist reads on the host"),
    "positions are asked for": (lambda number: OWN[OWN.nonzero()], "nonzero waits for the device"),
    "a condition is asked for": (lambda number: OWN if bool(OWN[0]) else -OWN, "waits for the device"),
    "a table is copied": (lambda number: OWN + torch.tensor([1.0, 2.0, 3.0]), "lift_fresh copies from the host"),
    "memory is kept": (keeps_memory, "memory of aten::add outlives the pass"),
    "a number is baked in": (lambda number: OWN + number, "differs"),
    "a shape changes": (lambda number: (OWN + 1)[:number], "differs"),
    "an operator writes elsewhere": (lambda number: OTHERS[number].mul_(2) + 1, "differs"),
    "an operator more": (lambda number: OWN * 2 if number > 2 else OWN * 2 + 0, "differs|events"),
    "another grid": (lambda number: launches(number, OWN, 1), "differs"),
    "another number of a kernel": (lambda number: launches(1, OWN, number), "differs"),
    "a kernel writes elsewhere": (lambda number: launches(1, OTHERS[number], 1), "differs"),
}


def three_passes(forward: Callable[[int], Tensor]) -> list[int]:
    passes = RecordedPasses()

    def run(number: int, inputs: Sequence[Tensor]) -> Tensor:
        return forward(number)

    with as_on_a_gpu():
        for number in range(1, 4):
            passes.run("kind", number, [], partial(run, number), lambda: None)
    return passes.check()


@pytest.mark.parametrize("name", WRONG)
def test_what_a_graph_could_not_replay_is_found(name: str) -> None:
    forward, why = WRONG[name]
    with pytest.raises(NotReadyError, match=why):
        three_passes(forward)


def test_new_memory_may_lie_anywhere() -> None:
    held: list[Tensor] = []

    def forward(number: int) -> Tensor:
        return launches(1, OWN + 1, 2).exp_()

    def elsewhere(number: int) -> Tensor:
        held.append(OWN)
        return forward(number)

    assert three_passes(elsewhere) == [2]


def test_inputs_are_copied_to_the_same_memory() -> None:
    passes = RecordedPasses()
    for number in range(1, 5):
        passes.run("kind", number, [torch.ones(3) * number], lambda inputs: (OWN + inputs[0]).exp_(), lambda: None)
    assert passes.check() == [3]
