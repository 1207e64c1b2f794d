"""What `host.py` times, in a process of its own for every build: a line on stdin runs a case once, and the answer is
the processor time of one unit in microseconds.

    python benchmarks/host_worker.py CASE

It also runs against the build before (commit ace63fc), whose modules have other names.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

try:
    from causalrope_sp.attention.base import Strategy
    from causalrope_sp.cache.window import SlidingWindow
    from causalrope_sp.models.causal_dit import CausalDiT
    from causalrope_sp.sampling.pass_inputs import Part
    from causalrope_sp.sampling.stream import CausalStream
except ImportError:
    from causalrope_sp.model import CausalDiT  # type: ignore[import-not-found, no-redef]
    from causalrope_sp.parallel.strategy import Strategy  # type: ignore[import-not-found, no-redef]
    from causalrope_sp.stream import CausalStream, Part  # type: ignore[import-not-found, no-redef]
    from causalrope_sp.window import SlidingWindow  # type: ignore[import-not-found, no-redef]

from causalrope_sp.config import DiTConfig
from causalrope_sp.grid import Chunk, LatentGrid, Shard

LAYERS = 30
TINY = DiTConfig(dim=64, ffn_dim=128, num_heads=2, num_layers=LAYERS, text_dim=16, text_len=4, freq_dim=16)
TOYBOX = DiTConfig(dim=192, ffn_dim=768, num_heads=6, num_layers=6, text_dim=51, text_len=3, freq_dim=64)
WIDE = DiTConfig(dim=768, ffn_dim=3072, num_heads=6, num_layers=2, text_dim=4096, text_len=512)
FRAMES = 3
PROMPT = "a red circle slides right and a blue square bounces"


def a_pass(
    config: DiTConfig, grid: LatentGrid, window: int, dtype: torch.dtype = torch.float32, attention: str = "auto"
) -> Callable[[], Any]:
    """Returns a denoise pass of the open chunk behind a full window."""
    torch.manual_seed(0)
    model = CausalDiT(config).to(dtype).eval().requires_grad_(False)
    embeds = torch.randn(1, config.text_len, config.text_dim).to(dtype)
    strategy = Strategy(grid.tokens, config.num_heads, attention)
    stream = CausalStream(model, embeds, grid, SlidingWindow(window), Shard(grid), strategy)
    before = torch.randn(1, window, grid.tokens, config.token_dim)
    for number in range(window // FRAMES):
        chunk = Chunk(number, FRAMES * number, FRAMES)
        stream.commit(Part(chunk, before[:, chunk.start : chunk.stop], 0.0))
    chunk = Chunk(window // FRAMES, window, FRAMES)
    return partial(stream.denoise, chunk, torch.randn(1, FRAMES, grid.tokens, config.token_dim), 500.0)


def diffusers_pass() -> Callable[[], Any]:
    """Returns diffusers' forward of a chunk of the same size, eager; its self-attention sees the chunk alone."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=TINY.num_heads, attention_head_dim=TINY.dim // TINY.num_heads, num_layers=LAYERS,
        ffn_dim=TINY.ffn_dim, freq_dim=TINY.freq_dim, text_dim=TINY.text_dim,
    ).eval().requires_grad_(False)  # fmt: skip
    latents, text = torch.randn(1, 16, FRAMES, 4, 4), torch.randn(1, TINY.text_len, TINY.text_dim)
    timestep = torch.tensor([500.0])
    return lambda: model(latents, timestep, text, return_dict=False)


def toybox() -> Callable[[], Any]:
    """Returns the forwards of a toybox video of 81 frames, without decoding, which it skips."""
    from causalrope_sp import CausalVideoPipeline

    pipe = CausalVideoPipeline.from_pretrained("toybox")
    options: Any = {"num_frames" if hasattr(pipe, "components") else "frames": 81}
    spent = SimpleNamespace(seconds=0.0)
    forward = CausalStream._forward

    def timed(self: CausalStream, *arguments: Any) -> Any:
        started = time.process_time()
        try:
            return forward(self, *arguments)
        finally:
            spent.seconds += time.process_time() - started

    CausalStream._forward = timed  # type: ignore[method-assign, assignment]

    def run() -> float:
        spent.seconds = 0.0
        for _ in pipe.stream(PROMPT, **options):
            pass
        return spent.seconds

    return run


def triton_layer() -> Callable[[], Any]:
    from absent_gpu import by_triton

    stack = ExitStack()
    stack.enter_context(by_triton())
    run = a_pass(TINY, LatentGrid(2, 2), 9, attention="triton")  # in float32: tiny products cost a launch
    return lambda: (stack, run())  # Triton is chosen for as long as this function lives


def counted(attention: str) -> Callable[[], Any]:
    """Returns a pass by Triton that answers how many kernels it launches and how many torch operators it calls."""
    from absent_gpu import by_triton
    from torch.utils._python_dispatch import TorchDispatchMode

    launches: list[str] = []
    stack = ExitStack()
    stack.enter_context(by_triton(launched=lambda name, *_: launches.append(name)))
    run = a_pass(TINY, LatentGrid(2, 2), 9, attention=attention)
    calls: list[str] = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            aliases = [each.alias_info for each in func._schema.returns]
            if not any(alias and not alias.is_write for alias in aliases):  # a view computes nothing
                calls.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    def count() -> tuple[float, float]:
        launches.clear()
        calls.clear()
        with Count():
            run()
        return len(launches) / LAYERS, len(calls) / LAYERS

    return lambda: (stack, count())[1]


CASES: dict[str, tuple[Callable[[], Callable[[], Any]], int]] = {  # and how many units one run has
    "layer, torch": (partial(a_pass, TINY, LatentGrid(2, 2), 9), LAYERS),
    "layer, triton": (triton_layer, LAYERS),
    "layer, diffusers": (diffusers_pass, LAYERS),
    "toybox chunk": (toybox, 7),
    "calls, triton attention": (partial(counted, "triton"), 1),
    "calls, torch attention": (partial(counted, "torch"), 1),
    "toybox pass": (partial(a_pass, TOYBOX, LatentGrid(4, 4), 9), 1),
    "D 768 pass, float32": (partial(a_pass, WIDE, LatentGrid(12, 20), 9), 1),
    "D 768 pass, bfloat16": (partial(a_pass, WIDE, LatentGrid(12, 20), 9, torch.bfloat16), 1),
}


@torch.inference_mode()
def main(case: str) -> None:
    torch.set_num_threads(1)
    make, units = CASES[case]
    run = make()
    run()
    run()
    print("ready", flush=True)
    for _ in sys.stdin:
        started = time.process_time()
        own = run()
        if isinstance(own, tuple) and isinstance(own[0], float):
            print(*own, flush=True)
        else:
            spent = own if isinstance(own, float) else time.process_time() - started
            print(1e6 * spent / units, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
