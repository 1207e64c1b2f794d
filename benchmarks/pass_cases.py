"""The streams that `pass.py` times, eager and by graphs, and the gate that their velocities must pass.

Gate: the velocities of a small model, by every variant that is timed, against one masked forward over all frames on the
CPU in float64. Their error is at most twice that of the same forward on the CPU in the dtype that is timed.

Shapes: B batch, F frames, s tokens of a frame, E numbers in a token, L text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from causalrope_sp import CausalDiT, DiTConfig, LatentGrid
from causalrope_sp.attention.base import Strategy
from causalrope_sp.cache.window import SlidingWindow
from causalrope_sp.grid import Chunk, Shard, split_into_chunks
from causalrope_sp.sampling.pass_graphs import PassGraphs, stream_graphs
from causalrope_sp.sampling.pass_inputs import Part
from causalrope_sp.sampling.stream import CausalStream
from causalrope_sp.verification.reference import block_causal_velocity

FRAMES = 3
SMALL = DiTConfig(dim=256, ffn_dim=384, num_heads=2, num_layers=2, text_dim=32, text_len=9, freq_dim=32)  # the gate's
TIMESTEP = 937.5


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

    def stream(self, clean_BFSE: Tensor, graphs: PassGraphs | None = None) -> CausalStream:
        """Makes a stream whose cache holds these frames."""
        strategy = Strategy(self.grid.tokens, self.model.config.num_heads)
        shard = Shard(self.grid)
        stream = CausalStream(self.model, self.embeds_BLE, self.grid, self.window, shard, strategy, graphs=graphs)
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


def variants(setup: Setup, before_BFSE: Tensor, x_BFSE: Tensor) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Yields a denoise pass of the chunk after the frames `before_BFSE`, eager and, where there is one, by a graph.

    A graph needs CUDA and a window that was full before: its kind of pass is then that of the context pass before it.
    """
    start, frames = before_BFSE.shape[1], x_BFSE.shape[1]
    chunk = Chunk(start // FRAMES, start, frames)
    yield "eager", partial(setup.stream(before_BFSE).denoise, chunk, x_BFSE, TIMESTEP)
    graphs = stream_graphs(setup.device)
    if graphs is not None:
        run = partial(setup.stream(before_BFSE, graphs).denoise, chunk, x_BFSE, TIMESTEP)
        run()  # captures
        run()
        if graphs.replays:
            yield "graph", run


def differ(x: Tensor, y: Tensor, dtype: torch.dtype) -> bool:
    """Returns whether two velocities of one pass differ by more than a rounding to the dtype of the model."""
    x, y = x.double(), y.double()
    return not (x - y).norm() <= torch.finfo(dtype).eps * y.norm()


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
