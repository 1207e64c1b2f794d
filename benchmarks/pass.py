"""Times one pass of the DiT and one autoregressive step on one GPU, against the time that their products alone take.

    python benchmarks/pass.py --model wan2.1-14b
    python benchmarks/pass.py --layers 2    # fewer layers, for a quick run
    python benchmarks/pass.py --smoke       # a tiny model on the CPU, to check that it runs; its times mean nothing

The model has random weights; the video has 480×832 pixels, chunks of three frames and a window of 21; the dtype is
bfloat16. A pass is `CausalStream.denoise`. A step is the work of `sample_chunks` from one chunk to the next: four
passes with their noise and updates, where the first also runs the context pass of the chunk before ("fused"), or five
forwards ("separate"). With an empty window a pass is that of the first chunk and a step that of the second chunk, which
is the first that has a chunk to commit. With a full window every chunk evicts as many frames as it adds.

A graph holds `CausalDiT.forward` alone: tokens, timesteps, rotation, slots and bounds are on the device already, and
the stream's work on the host is not timed. With "bounds on the device", as the cache returns them, one graph could
serve other windows, and attention is Triton's. With "fixed bounds" it is valid for this window alone, and attends as
eager does.

Gate: the velocities of a small model, by every variant that is timed, against one masked forward over all frames on the
CPU in float64. Their error is at most twice that of the same forward on the CPU in the dtype that is timed.

Shapes: B batch, F frames, s tokens of a frame, E numbers in a token, L text tokens.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from statistics import median
from typing import Any

import click
import torch
from printed import finish, print_table, stop
from torch import Tensor

from causalrope_kernels import PassOperations, Projection, attention
from causalrope_kernels.attention_choice import Shape, measure
from causalrope_sp import CausalDiT, DiTConfig, LatentGrid, SamplerConfig, SequenceParallel, StreamConfig
from causalrope_sp.attention.base import Strategy, write_chunk
from causalrope_sp.cache.window import SlidingWindow
from causalrope_sp.config import PRESETS
from causalrope_sp.diffusion.noise import seeded_noise
from causalrope_sp.distributed.layout import SINGLE, parse_strategy
from causalrope_sp.grid import Chunk, Shard, split_into_chunks
from causalrope_sp.models.block import ForwardPass
from causalrope_sp.models.rope import RotaryTables
from causalrope_sp.planning.cost import attention_flops, cross_flops
from causalrope_sp.planning.workload import Workload
from causalrope_sp.sampling.chunk import LatentChunk
from causalrope_sp.sampling.chunk_loop import ChunkLoop
from causalrope_sp.sampling.stream import CausalStream, Part
from causalrope_sp.sampling.stream_options import StreamOptions
from causalrope_sp.verification.reference import block_causal_velocity

GRID, FRAMES, WINDOW = LatentGrid(30, 52), 3, 21
SMALL = DiTConfig(dim=256, ffn_dim=384, num_heads=2, num_layers=2, text_dim=32, text_len=9, freq_dim=32)  # the gate's
TINY = DiTConfig(dim=48, ffn_dim=64, num_heads=2, num_layers=2, text_dim=16, text_len=5, freq_dim=32)  # of a smoke run
TIMESTEP = 937.5
RUNS = 5
SIDE = 8192  # of the matrices that the matrix rate is measured with
PASS, STEP = "one denoise pass", "autoregressive step"


@dataclass(frozen=True)
class Setup:
    """The arguments of a stream: model, grid, window and text embeddings."""

    model: CausalDiT
    grid: LatentGrid
    window: SlidingWindow
    embeds_BLE: Tensor

    @classmethod
    def random(cls, model: CausalDiT, grid: LatentGrid, window: SlidingWindow) -> Setup:
        c = model.config
        embeds = torch.randn(1, c.text_len, c.text_dim, generator=torch.Generator().manual_seed(1))
        return cls(model, grid, window, embeds.to(model.device, model.dtype))

    @property
    def device(self) -> torch.device:
        return self.model.device

    def stream(self, clean_BFSE: Tensor) -> CausalStream:
        """Makes a stream whose cache holds these frames."""
        strategy = Strategy(self.grid.tokens, self.model.config.num_heads)
        stream = CausalStream(self.model, self.embeds_BLE, self.grid, self.window, Shard(self.grid), strategy)
        for chunk in split_into_chunks(clean_BFSE.shape[1], FRAMES):
            stream.commit(Part(chunk, clean_BFSE[:, chunk.start : chunk.stop], 0.0))
        return stream

    def tokens(self, frames: int) -> Tensor:
        draw = torch.Generator().manual_seed(frames)
        shape = 1, frames, self.grid.tokens, self.model.config.token_dim
        return torch.randn(shape, generator=draw).to(self.device)


def random_model(config: DiTConfig, device: torch.device, dtype: torch.dtype) -> CausalDiT:
    """Makes a model with random weights directly on its device and in its dtype; 14B in float32 would fill most
    hosts."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = CausalDiT(config)
    finally:
        torch.set_default_dtype(torch.float32)
    return model.eval().requires_grad_(False)


def prepared(setup: Setup, stream: CausalStream, chunk: Chunk, fixed: bool) -> ForwardPass:
    """Makes the denoise pass of the open chunk as `CausalStream` does, with all its tensors on the device.

    `fixed` takes the bounds of the keys' ranges from the host. Otherwise Triton's attention is named explicitly: "auto"
    would choose the fastest one before capture and Triton's under capture, which the warm-up would not have compiled.
    """
    config, device = setup.model.config, setup.device
    tables = RotaryTables(config.head_dim, config.theta, Shard(setup.grid), device, torch.float32)

    operations = PassOperations.unchecked(setup.model.patch_embedding.weight)

    def attend(layer: int, projection: Projection) -> Tensor:
        cache = stream.cache.layer(layer)
        q_BFSHD = write_chunk(projection, cache, chunk, operations)
        q, keys = q_BFSHD.flatten(1, 2), cache.keys(chunk)
        return attention(q, replace(keys, bounds_N2=None)) if fixed else attention(q, keys, backend="triton")

    return ForwardPass(
        timesteps_F=torch.full((chunk.frames,), TIMESTEP, device=device),
        predicted_frames=chunk.frames,
        rotation=tables.rotation(list(range(chunk.start, chunk.stop))),
        text=setup.model.encode_text(setup.embeds_BLE),
        attend=attend,
        operations=operations,
    )


def captured(setup: Setup, stream: CausalStream, chunk: Chunk, x_BFSE: Tensor, fixed: bool) -> Callable[[], Tensor]:
    """Captures the pass of a chunk that was denoised before in a CUDA graph; returns a function that replays it and
    returns the velocity."""
    run = partial(setup.model, x_BFSE.flatten(1, 2).to(setup.model.dtype), prepared(setup, stream, chunk, fixed))
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        velocity = run()

    def replay() -> Tensor:
        graph.replay()
        return velocity.view(x_BFSE.shape)

    return replay


def variants(setup: Setup, before_BFSE: Tensor, x_BFSE: Tensor) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Yields a denoise pass of the chunk after the frames `before_BFSE`, by every variant that the device has."""
    stream = setup.stream(before_BFSE)
    start, frames = before_BFSE.shape[1], x_BFSE.shape[1]
    chunk = Chunk(start // FRAMES, start, frames)
    yield "eager", partial(stream.denoise, chunk, x_BFSE, TIMESTEP)
    if setup.device.type == "cuda":
        yield "graph, bounds on the device", captured(setup, stream, chunk, x_BFSE, fixed=False)
        yield "graph, fixed bounds", captured(setup, stream, chunk, x_BFSE, fixed=True)


@dataclass(frozen=True)
class Gate:
    """Relative errors against float64: of the reference in the dtype that is timed, and of each variant by its name."""

    reference: float
    errors: dict[str, float]

    @property
    def bound(self) -> float:
        return 2 * self.reference

    @property
    def passed(self) -> bool:
        return all(error <= self.bound for error in self.errors.values())


def gate(device: torch.device, dtype: torch.dtype) -> Gate:
    """Runs the gate on the fifth chunk of a stream with a sink, whose ring of seven frames has wrapped."""
    rough = Setup.random(random_model(SMALL, torch.device("cpu"), dtype), LatentGrid(3, 5), SlidingWindow(7, 1))
    chunks = list(split_into_chunks(5 * FRAMES, FRAMES))
    clean, noisy = (torch.randn(1, 5 * FRAMES, 16, 6, 10, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    clean, noisy = clean.to(dtype).float(), noisy.to(dtype).float()

    def velocity(model: CausalDiT) -> Tensor:
        args = model, rough.embeds_BLE, rough.grid, chunks, clean.to(model.dtype), noisy.to(model.dtype), TIMESTEP
        return rough.grid.patchify(block_causal_velocity(*args, window=7, sink=1))[:, -FRAMES:]

    truth = velocity(deepcopy(rough.model).double())

    def error(found: Tensor) -> float:
        return ((found.cpu().double() - truth).norm() / truth.norm()).item()

    on_device = replace(rough, model=deepcopy(rough.model).to(device), embeds_BLE=rough.embeds_BLE.to(device))
    before, x = (rough.grid.patchify(latents).to(device) for latents in (clean[:, :-FRAMES], noisy[:, -FRAMES:]))
    errors = {name: error(run()) for name, run in variants(on_device, before, x)}
    context = Part(chunks[-2], before[:, -FRAMES:], 0.0)
    fused = on_device.stream(before[:, :-FRAMES]).denoise(chunks[-1], x, TIMESTEP, context)
    return Gate(error(velocity(rough.model)), errors | {"fused": error(fused)})


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
    for variant, run in variants(setup, before, x):
        yield Row.of(case, variant, 1e3 * median(seconds(run, setup.device) for _ in range(RUNS + 2)))


def time_steps(setup: Setup, empty: Case, full: Case) -> Iterator[Row]:
    """Times steps. Only a new stream has an empty window, so each of its times takes a new one; the first is a
    warm-up."""
    for variant, fused in (("fused", True), ("separate", False)):
        second = [step_seconds(setup, fused, empty.chunk.index + 1)[-1] for _ in range(RUNS + 1)]
        yield Row.of(empty, variant, 1e3 * median(second[1:]))
        later = step_seconds(setup, fused, full.chunk.index + RUNS)
        yield Row.of(full, variant, 1e3 * median(later[full.chunk.index :]))


def step_seconds(setup: Setup, fused: bool, chunks: int) -> list[float]:
    """Measures the seconds of every chunk of a new stream, from the output of the chunk before to its own output."""
    config, grid = setup.model.config, setup.grid
    loop = ChunkLoop(
        setup.model,
        setup.embeds_BLE,
        seeded_noise(0, (1, config.in_channels, grid.latent_height, grid.latent_width)),
        grid,
        None,
        SequenceParallel.single(device=setup.device),
        StreamOptions(stream=StreamConfig(setup.window.frames, setup.window.sink, FRAMES)),
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
