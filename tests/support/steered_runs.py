"""Scripts of what can be done to a stream, run on ranks and by lists."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from causalrope_sp import LatentGrid, SequenceParallel, StreamConfig
from causalrope_sp.diffusion.noise import seeded_noise
from causalrope_sp.distributed import strategies
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.sampling.steered_loop import SteeredLoop
from causalrope_sp.sampling.stream_options import StreamOptions
from tests.support.list_session import SAMPLER, ListSession
from tests.support.strategy_runs import CONFIG, HEADS, NEAR, make_model

GRID = LatentGrid(7, 1)
NOISE = seeded_noise(0, (1, CONFIG.in_channels, GRID.latent_height, GRID.latent_width))
TEXTS = [
    torch.randn(1, CONFIG.text_len, CONFIG.text_dim, generator=torch.Generator().manual_seed(n)).double()
    for n in range(3)
]
STREAMS = {
    "sink within a chunk": StreamConfig(6, 1, 2),
    "relative": StreamConfig(7, 2, 3, rope="relative"),
    "lone first frame": StreamConfig(5, 1, 2, independent_first_frame=True),
    "recomputed": StreamConfig(7, 2, 2, rope="relative", window_policy="recomputed"),
    "controlled": StreamConfig(6, 1, 2),
    "heads": StreamConfig(7, 1, 2, heads=HEADS),
    "heads, recomputed": StreamConfig(7, 1, 2, rope="relative", window_policy="recomputed", heads=NEAR),
}
CONTROL = torch.randn(
    1, 40, 3, GRID.latent_height, GRID.latent_width, generator=torch.Generator().manual_seed(4), dtype=torch.float64
)
STEPS = [("step",)] * 4
SCRIPTS: dict[str, list[tuple[Any, ...]]] = {
    "new text, window computed anew": [*STEPS, ("text", 1, True, False, False), *STEPS],
    "new text, sink too": [*STEPS, ("text", 1, True, True, False), *STEPS],
    "new text alone": [*STEPS, ("text", 1, False, False, False), *STEPS],
    "new shots": [*STEPS, ("text", 1, True, False, True), ("step",), ("text", 2, False, False, True), *STEPS],
    "taken back exactly": [*STEPS, ("text", 1, False, False, False), *STEPS[:2], ("rewind", 3), *STEPS],
    "taken back far": [*STEPS, *STEPS, ("text", 1, True, False, True), *STEPS[:2], ("rewind", 5), *STEPS],
    "text changed twice": [*STEPS, ("text", 1, True, False, False), ("text", 2, True, True, False), *STEPS],
}

# the operations of all scripts, in as few as hold them: what ranks add is the same for each operation
ON_RANKS = ("new shots", "taken back exactly", "taken back far", "text changed twice")


def by_lists(stream: str, script: str, recomputed_at: int | None = None) -> list[Tensor]:
    """The chunks that a script makes; before the operation `recomputed_at` the window is computed anew."""
    session = ListSession(model_of(stream), TEXTS, NOISE, GRID, STREAMS[stream], control_of(stream))
    made = []
    with torch.inference_mode():
        for number, (what, *arguments) in enumerate(SCRIPTS[script]):
            if number == recomputed_at:
                session.recompute(True)
            if what == "step":
                made.append(session.step())
            elif what == "text":
                session.set_text(*arguments)
            else:
                session.rewind(arguments[0], exact=is_exact(STREAMS[stream], script))
    return made


def control_of(stream: str) -> Tensor | None:
    return CONTROL if stream == "controlled" else None


def model_of(stream: str) -> CausalDiT:
    return make_model(control_channels=3 if stream == "controlled" else 0)


def options_of(stream: str) -> StreamOptions:
    control = None if control_of(stream) is None else lambda chunk: CONTROL[:, chunk.start : chunk.stop]
    return StreamOptions(stream=STREAMS[stream], sampler=SAMPLER, history=4, kept_chunks=8, control=control)


def is_exact(stream: StreamConfig, script: str) -> bool:
    """Whether what a script takes back is as it was; a window that is computed anew keeps nothing of before."""
    return script == "taken back exactly" and stream.window_policy != "recomputed"


Before = dict[int, Callable[[SteeredLoop], object]]


def open_loop(parallel: SequenceParallel, stream: str) -> SteeredLoop:
    return SteeredLoop(model_of(stream), TEXTS[0], NOISE, GRID, None, parallel, options_of(stream))


def by_loop(parallel: SequenceParallel, stream: str, script: str) -> list[Tensor]:
    """The same by a `SteeredLoop`."""
    return go_through(open_loop(parallel, stream), script)


@torch.inference_mode()
def go_through(loop: SteeredLoop, script: str, before: Before | None = None, first: int = 0) -> list[Tensor]:
    """The chunks that a script makes from the operation `first` on; `before` are calls before operations."""
    made, text = [], [0]
    for number, (what, *arguments) in enumerate(SCRIPTS[script][first:], first):
        if before is not None and number in before:
            before[number](loop)
        if what == "step":
            made.append(loop.step().latents)
            text.append(text[-1])
        elif what == "text":
            text[-1] = arguments[0]
            loop.set_text([TEXTS[arguments[0]]], recache=arguments[1], recache_sink=arguments[2], new_shot=arguments[3])
        else:
            text = text[: -arguments[0]]
            text[-1] = text[-2] if len(text) > 1 else 0
            assert loop.rewind(arguments[0], TEXTS[text[-1]]) == is_exact(loop.options.stream, script)
    return made


def in_turn(turn: int) -> list[tuple[str, str]]:
    """Streams and scripts that ranks run: every other one, the rest in the next turn."""
    every = itertools.product(enumerate(STREAMS), enumerate(ON_RANKS))
    return [(stream, script) for (row, stream), (column, script) in every if (row + column + turn) % 2 == 0]


def on_ranks(group: dist.ProcessGroup, device: str) -> list[dict[tuple[str, str, str], list[Tensor]]]:
    """Scripts on every stream with every strategy, rank by rank."""
    mine = {
        (strategy, stream, script): by_loop(SequenceParallel(group, strategy, device), stream, script)
        for turn, strategy in enumerate(strategies(group.size(), CONFIG.num_heads))
        for stream, script in in_turn(turn)
        if group.size() < 4 or stream in ("sink within a chunk", "controlled")
    }
    ranks: list[Any] = [None] * group.size()
    dist.all_gather_object(ranks, mine, group)
    return ranks
