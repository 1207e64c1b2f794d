"""Streams of latents that are saved, and that go on from their file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from causalrope_sp.codec.conv_state import ConvState
from causalrope_sp.diffusion.noise import Noise
from causalrope_sp.distributed import SequenceParallel, strategies
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.pipeline.prompt_changes import PromptChange
from causalrope_sp.pipeline.saved_cache import restore_cache
from causalrope_sp.pipeline.session_saving import save_session
from causalrope_sp.sampling.steered_loop import SteeredLoop
from causalrope_sp.sampling.stream_options import Resumed, StreamOptions
from causalrope_sp.sessions import read_session
from tests.support import steered_runs
from tests.support.steered_runs import GRID, NOISE, SCRIPTS, STREAMS, TEXTS, go_through, model_of, options_of
from tests.support.strategy_runs import CONFIG


class NoDecoder:
    """Stands for the decoder of a stream whose latents nobody decodes."""

    frames = frame_range = property(lambda self: self)
    prefix = 0

    def gather_state(self) -> ConvState | None:
        return None


def save_loop(path: Path, loop: SteeredLoop, text: Tensor, negative: Tensor | None, *, cache: bool) -> None:
    """Saves a stream that began with noise, between two chunks."""
    config, grid = loop.model.config, loop.context.grid
    options = loop.options
    fields: dict[str, Any] = {
        "model_digest": "0" * 16,
        "height": 8 * grid.latent_height,
        "width": 8 * grid.latent_width,
        "dtype": str(loop.model.dtype).removeprefix("torch."),
        "stream": options.stream,
        "sampler": options.sampler,
        "seed": 0,
        "text_seed": 0,
        "num_frames": None,
        "negative_embeds": negative,
    }
    assert config.in_channels == loop.context.channels
    prompts = [PromptChange(0, 0, None, text)]
    decoder: Any = NoDecoder()
    save_session(path, loop, decoder, "none", prompts, lambda: fields, loop.chunks_made, cache=cache)


def resume_loop(
    path: Path, model: CausalDiT, noise: Noise, grid: Any, parallel: SequenceParallel, options: StreamOptions
) -> SteeredLoop:
    """Goes on with a stream that `save_loop` saved."""
    saved = read_session(path)
    latents = saved.latents.split([chunk.frames for chunk in saved.chunks], 1)
    kept = list(zip(saved.chunks, latents, strict=True))
    resumed = replace(
        options, resumed=Resumed(kept, saved.shots, 0, saved.control), negative_embeds=saved.negative_embeds
    )
    text = saved.embeds[0].clone()  # a product of what lies elsewhere in memory may differ in its last bits
    loop = SteeredLoop(model, text, noise, grid, None, parallel, resumed)
    if saved.cache is None:
        loop.compute_anew()
    else:
        restore_cache(loop, saved.cache)
    return loop


Case = tuple[str, str, int, bool]  # stream, script, the operation before which it is saved, and whether with the cache


def every_case() -> list[Case]:
    """Right after the last change of a script, one chunk later, and before the window is full."""
    found = []
    for script, operations in SCRIPTS.items():
        last = max(number for number, (what, *_) in enumerate(operations) if what != "step")
        early = [] if "rewind" in (what for what, *_ in operations) else [2]
        found += [(script, number) for number in (*early, last + 1, last + 2)]
    return [
        (stream, script, number, cache) for stream in STREAMS for script, number in found for cache in (True, False)
    ]


def some_cases(turn: int) -> list[Case]:
    """One of each script; the streams and the places take turns, and so does the cache: those that have it in one turn
    lack it in the next."""
    chosen = []
    for number, script in enumerate(SCRIPTS):
        stream = list(STREAMS)[(number + 2) % len(STREAMS)]
        places = [case for case in every_case() if case[0] == stream and case[1] == script and case[3]]
        chosen.append((*places[number % len(places)][:3], (number + turn) % 2 == 0))
    return chosen


def cases() -> list[Case]:
    """Those of both turns, and every ninth of the others."""
    return list(dict.fromkeys([*some_cases(0), *some_cases(1), *every_case()[::9]]))


def strategies_of(ranks: int) -> list[str]:
    """Those without a product, and on 4 ranks the products alone."""
    return strategies(ranks, CONFIG.num_heads)[3 if ranks == 4 else 0 :]


def text_of(script: str, number: int) -> int:
    """The text that holds before an operation; those that are taken back are taken back to the first one."""
    done = SCRIPTS[script][:number]
    texts = [arguments[0] for what, *arguments in done if what == "text"]
    return texts[-1] if texts and "rewind" not in (what for what, *_ in done) else 0


def go_on(file: Path, parallel: SequenceParallel, case: Case, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """The chunks that follow, of a stream that goes on from its file."""
    stream, script, number, _ = case
    model = model_of(stream).to(dtype)
    with torch.inference_mode():
        loop = resume_loop(file, model, NOISE, GRID, parallel, options_of(stream))
    return go_through(loop, script, first=number)


def uninterrupted(folder: Path, parallel: SequenceParallel, case: Case) -> list[Tensor]:
    """Saves a stream in mid-script; returns the chunks that follow in the stream itself."""
    stream, script, number, cache = case
    loop, made = steered_runs.open_loop(parallel, stream), list[int]()

    def save(loop: SteeredLoop) -> None:
        made.append(loop.chunks_made)
        save_loop(folder / name_of(case), loop, TEXTS[text_of(script, number)], None, cache=cache)

    steps = [what for what, *_ in SCRIPTS[script][number:]].count("step")
    return go_through(loop, script, {number: save})[-steps:]


def name_of(case: Case) -> str:
    return "-".join(map(str, case)).replace(" ", "_")


def saved_and_resumed(group: dist.ProcessGroup, device: str, folder: Path) -> dict[Any, bool]:
    """Cases with every strategy, which take turns: saved to a folder of its own, resumed by the same ranks; whether
    every rank has every bit of what the stream itself makes."""
    same = {}
    for turn, strategy in enumerate(strategies_of(group.size())):
        parallel = SequenceParallel(group, strategy, device)
        own = folder / f"{group.size()}-{strategy}"
        own.mkdir(exist_ok=True)
        for case in some_cases(turn):
            expected = uninterrupted(own, parallel, case)
            found = go_on(own / name_of(case), parallel, case)
            equal = [torch.equal(one, other) for one, other in zip(found, expected, strict=True)]
            if case[3]:
                same[strategy, case] = all(equal)
    ranks: list[Any] = [None] * group.size()
    dist.all_gather_object(ranks, same, group)
    return {key: all(rank[key] for rank in ranks) for key in same}


def resumed_elsewhere(group: dist.ProcessGroup, device: str, saved: Path, turn: int) -> dict[Any, list[Tensor]]:
    """The cases of a turn that other ranks saved, resumed with every strategy of these."""
    made = dict[Any, list[Tensor]]()
    for strategy in strategies_of(group.size()):
        parallel = SequenceParallel(group, strategy, device)
        made |= {(strategy, case): go_on(saved / name_of(case), parallel, case) for case in some_cases(turn)}
    return made
