"""Times one pass of the DiT and one autoregressive step on one GPU, against the time that their products alone take.

    python benchmarks/pass.py --model wan2.1-14b
    python benchmarks/pass.py --layers 2    # fewer layers, for a quick run
    python benchmarks/pass.py --smoke       # a tiny model on the CPU, to check that it runs; its times mean nothing

The model has random weights; the video has 480×832 pixels, chunks of three frames and a window of 21; the dtype is
bfloat16. A pass is `CausalStream.denoise`. A step is the work of `sample_chunks` from one chunk to the next: four
passes with their noise and updates, where the first also runs the context pass of the chunk before ("fused"), or five
forwards ("separate"). With an empty window a pass is that of the first chunk and a step that of the second chunk, which
is the first that has a chunk to commit. With a full window every chunk evicts as many frames as it adds.

"graph" is the same stream with `PassGraphs`: its inputs are copied, and one launch replays the pass. Only a full window
has graphs. Gate: see `pass_cases.py`; and nothing is reported if a graph's velocity differs from the eager one.

Shapes: B batch, F frames, s tokens of a frame, E numbers in a token, L text tokens.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from statistics import median
from typing import Any

import click
import torch
from pass_cases import FRAMES, Setup, differ, gate, random_model, variants
from printed import finish, print_table, stop
from torch import Tensor

from causalrope_kernels.attention_choice import Shape, measure
from causalrope_sp import DiTConfig, LatentGrid, SamplerConfig, SequenceParallel, StreamConfig
from causalrope_sp.cache.window import SlidingWindow
from causalrope_sp.config import PRESETS
from causalrope_sp.diffusion.noise import seeded_noise
from causalrope_sp.distributed.layout import SINGLE, parse_strategy
from causalrope_sp.grid import Chunk
from causalrope_sp.planning.counts import attention_flops, cross_flops
from causalrope_sp.planning.workload import Workload
from causalrope_sp.sampling.chunk import LatentChunk
from causalrope_sp.sampling.chunk_loop import ChunkLoop
from causalrope_sp.sampling.stream_options import StreamOptions

GRID, WINDOW = LatentGrid(30, 52), 21
TINY = DiTConfig(dim=48, ffn_dim=64, num_heads=2, num_layers=2, text_dim=16, text_len=5, freq_dim=32)  # of a smoke run
RUNS = 5
CAPTURED = 2  # chunks behind a full window until every kind of pass has a graph
SIDE = 8192  # of the matrices that the matrix rate is measured with
PASS, STEP = "one denoise pass", "autoregressive step"


@dataclass(frozen=True)
class Case:
    """A pass or a step of a chunk, its FLOP, and the milliseconds that these take at the matrix rate, if it is
    known."""

    window: str
    what: str
    chunk: Chunk
    tflop: float
    roofline_ms: float | None


def cases(setup: Setup, matmul: float | None) -> list[Case]:
    def case(window: str, what: str, chunk: Chunk) -> Case:
        flop = flops(setup, chunk)
        if what == STEP:
            flop = len(SamplerConfig().steps) * flop + flops(setup, _chunk(chunk.index - 1))
        return Case(window, what, chunk, flop / 1e12, None if matmul is None else 1e3 * flop / matmul)

    full = _chunk(WINDOW // FRAMES)
    return [
        case("empty", PASS, _chunk(0)),
        case("full", PASS, full),
        case("empty", STEP, _chunk(1)),
        case("full", STEP, full),
    ]


def flops(setup: Setup, chunk: Chunk) -> int:
    """Counts the FLOP of linear layers and attention for one chunk's tokens in one forward."""
    work = Workload(setup.model.config, setup.grid, setup.window.frames, chunk.frames, steps=1)
    tokens, keys = chunk.frames * setup.grid.tokens, len(setup.window.held(chunk.stop))
    attended = attention_flops(parse_strategy(SINGLE, 1), work, 0, chunk.frames, keys)
    return work.linear_flops * tokens + cross_flops(work, tokens) + attended


def _chunk(index: int) -> Chunk:
    return Chunk(index, index * FRAMES, FRAMES)


@dataclass(frozen=True)
class Row:
    """The time of a case by one variant. `of_roofline` is the share of the matrix rate that it reaches."""

    window: str
    what: str
    variant: str
    tflop: float
    roofline_ms: float | None
    ms: float
    of_roofline: float | None

    @classmethod
    def of(cls, case: Case, variant: str, ms: float) -> Row:
        share = None if case.roofline_ms is None else case.roofline_ms / ms
        return cls(case.window, case.what, variant, case.tflop, case.roofline_ms, ms, share)


def time_passes(setup: Setup, case: Case) -> Iterator[Row]:
    before, x = setup.tokens(case.chunk.start), setup.tokens(FRAMES)
    eager: Tensor | None = None
    for variant, run in variants(setup, before, x):
        velocity = run()
        eager = velocity if eager is None else eager
        if differ(velocity, eager, setup.model.dtype):
            stop(f"no times: the velocity by {variant} differs from the eager one")
        yield Row.of(case, variant, 1e3 * median(seconds(run, setup.device) for _ in range(RUNS + 2)))


def time_steps(setup: Setup, empty: Case, full: Case) -> Iterator[Row]:
    """Times steps. Only a new stream has an empty window, so each of its times takes a new one; the first is a
    warm-up."""
    for variant, fused in (("fused", True), ("separate", False)):
        second = [step_seconds(setup, fused, empty.chunk.index + 1)[-1] for _ in range(RUNS + 1)]
        yield Row.of(empty, variant, 1e3 * median(second[1:]))
        later = step_seconds(setup, fused, full.chunk.index + RUNS)
        yield Row.of(full, variant, 1e3 * median(later[full.chunk.index :]))
    if setup.device.type == "cuda":
        first = full.chunk.index + CAPTURED
        yield Row.of(full, "fused, graph", 1e3 * median(step_seconds(setup, True, first + RUNS, graphs=True)[first:]))


def step_seconds(setup: Setup, fused: bool, chunks: int, graphs: bool = False) -> list[float]:
    """Measures the seconds of every chunk of a new stream, from the output of the chunk before to its own output."""
    config, grid = setup.model.config, setup.grid
    loop = ChunkLoop(
        setup.model,
        setup.embeds_BLE,
        seeded_noise(0, (1, config.in_channels, grid.latent_height, grid.latent_width)),
        grid,
        None,
        SequenceParallel.single(device=setup.device),
        StreamOptions(stream=StreamConfig(setup.window.frames, setup.window.sink, FRAMES), graphs=graphs),
    )

    @torch.inference_mode()
    def generate() -> Iterator[LatentChunk]:
        while loop.next_chunk is not None:
            if not fused:
                loop.commit()
            yield loop.step()

    found = generate()
    return [seconds(partial(next, found), setup.device) for _ in range(chunks)]


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Measures the seconds until the device is done."""
    wait(device)
    started = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - started


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matrix_rate(device: torch.device) -> float:
    """Measures the FLOP a second of a large bfloat16 product of random numbers."""
    a, b = torch.randn(2, SIDE, SIDE, device=device).to(torch.bfloat16)
    return 2 * SIDE**3 / median(seconds(lambda: a @ b, device) for _ in range(4 * RUNS))


def attention_backends(setup: Setup) -> dict[str, str]:
    """Returns the attention backends that eager runs, and the times of those that they were chosen from."""
    if setup.device.type == "cpu":
        return {"self-attention": "torch", "cross-attention": "torch"}
    config, tokens = setup.model.config, FRAMES * setup.grid.tokens
    keys = {"self-attention": setup.window.frames * setup.grid.tokens, "cross-attention": config.text_len}
    found = {}
    for name, count in keys.items():
        device = torch.empty(0, device=setup.device).device  # with its index, which the remembered choice is keyed by
        shape = Shape(device, setup.model.dtype, 1, tokens, count, config.num_heads, config.head_dim)
        chosen = measure(shape.rounded())
        times = (f"{other} {ms:.3g} ms" for other, ms in sorted(chosen.milliseconds.items(), key=lambda item: item[1]))
        found[name] = f"{chosen.chosen} (of {', '.join(times)})"
    return found


def rounded(number: float | None, digits: int) -> float | None:
    return None if number is None else round(number, digits)


def timed(setup: Setup, matmul: float | None) -> list[Row]:
    """Prints floors, then times as they are measured; returns the rows of times."""
    all_cases = cases(setup, matmul)
    floors = [(case.window, case.what, f"{case.tflop:.3g}", rounded(case.roofline_ms, 2)) for case in all_cases]
    print_table(("window", "what", "TFLOP", "roofline ms"), floors)
    rows: list[Row] = []

    def lines() -> Iterator[tuple[object, ...]]:
        passes = (time_passes(setup, case) for case in all_cases if case.what == PASS)
        for row in chain(*passes, time_steps(setup, *(case for case in all_cases if case.what == STEP))):
            rows.append(row)
            yield row.window, row.what, row.variant, f"{row.ms:.2f}", rounded(row.of_roofline, 3)

    print_table(("window", "what", "variant", "ms", "of the roofline"), lines())
    return rows


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", "name", type=click.Choice(list(PRESETS)), default="wan2.1-1.3b", show_default=True)
@click.option("--layers", type=click.IntRange(min=1), help="Run only so many layers.")
@click.option("--smoke", is_flag=True, help="Run a tiny model on the CPU, in float32.")
@torch.inference_mode()
def main(name: str, layers: int | None, smoke: bool) -> None:
    """Times a pass and a step of a model with random weights against their roofline; the last line is JSON."""
    if not smoke and not torch.cuda.is_available():
        stop("a pass is timed on CUDA, and there is none here; --smoke runs a tiny model on the CPU")
    device, dtype = (torch.device("cpu"), torch.float32) if smoke else (torch.device("cuda"), torch.bfloat16)
    judged = gate(device, dtype)
    errors = ", ".join(f"{variant} {error:.1e}" for variant, error in judged.errors.items())
    print(f"gate: allowed {judged.bound:.1e}, found {errors}: {'passed' if judged.passed else 'failed'}\n", flush=True)
    fields = {"model": "tiny" if smoke else name, "smoke": smoke, "gate": asdict(judged) | {"passed": judged.passed}}
    if not judged.passed:
        finish("pass", **fields)
        sys.exit(1)
    config = TINY if smoke else PRESETS[name]
    config = replace(config, num_layers=layers or config.num_layers)
    setup = Setup.random(
        random_model(config, device, dtype), LatentGrid(3, 5) if smoke else GRID, SlidingWindow(WINDOW)
    )
    backends = attention_backends(setup)
    matmul = None if smoke else matrix_rate(device)
    rate = "a smoke run on the CPU: its times mean nothing" if matmul is None else f"{matmul / 1e12:.0f} TFLOP/s"
    print(f"{fields['model']}, {config.num_layers} layers, {dtype}; {rate}")
    for attended, backend in backends.items():
        print(f"{attended}: {backend}")
    print()
    rows = timed(setup, matmul)
    gpu = None if smoke else torch.cuda.get_device_name(device)
    finish(
        "pass",
        **fields,
        layers=config.num_layers,
        device=gpu,
        matmul=matmul,
        attention=backends,
        rows=list(map(asdict, rows)),
    )


if __name__ == "__main__":
    main()
