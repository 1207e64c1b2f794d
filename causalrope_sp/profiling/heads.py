"""Measures where the heads of a model look, and proposes how many latent frames each of them is to see.

Two rules: by attention mass (Forcing-KV, arXiv 2605.09681), and by a search (`head_search`).

Shapes: B batch, F latent frames, T tokens, S tokens of a frame, H heads, d head width, L keys, E numbers in a token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from causalrope_kernels import Projection, project
from causalrope_kernels.reference import ranges
from causalrope_sp.config import StreamConfig
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import Chunk
from causalrope_sp.heads.policy import HeadPolicy
from causalrope_sp.models.block import ForwardPass
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.pipeline.numerics import own_numerics
from causalrope_sp.profiling.head_search import HeadSearch, Sample, Searched, ladder
from causalrope_sp.profiling.sums import sum_of_ranks
from causalrope_sp.sampling.chunk_loop import ChunkLoop
from causalrope_sp.sampling.stream import CausalStream

if TYPE_CHECKING:
    from causalrope_sp.pipeline.pipeline import CausalVideoPipeline

QUERIES = 64  # of a pass, on each rank, whose attention is measured


class HeadRecorder:
    """Sums up the attention mass of every head in the passes of a chunk, and keeps these passes.

    Args:
        loop: the stream of latents, with a window of its own and the heads' whole.
        newest: how many of the newest latent frames a static head sees, its chunk included.
    """

    def __init__(self, loop: ChunkLoop, newest: int) -> None:
        config = loop.model.config
        self._newest, self._sink = newest, loop.options.stream.sink
        self._streams = {id(branch.stream.text): branch.stream for branch in loop.branches.branches}
        self.masses_LH2 = torch.zeros(config.num_layers, config.num_heads, 2, dtype=torch.float64)
        self.samples: list[Sample] = []  # of the newest chunk

    def attend(self, layer: int, projection: Projection, step: ForwardPass) -> Tensor:
        """Attends as the pass does, then adds up what its newest chunk's queries looked at."""
        output = step.attend(layer, projection)
        stream = self._streams.get(id(step.text))
        chunk = None if stream is None else stream.cache.open_chunk
        if stream is not None and chunk is not None and step.timestep is not None:
            frames = step.frames
            part = projection.part(slice(frames - chunk.frames, frames))
            self._add(stream, chunk, layer, project(part)[0])
        return output

    def _add(self, stream: CausalStream, chunk: Chunk, layer: int, q_BTHD: Tensor) -> None:
        """Adds the mass of the newest frames, and that of all frames that are not of the sink."""
        window = stream.cache.window
        frames = list(window.held(chunk.stop).values())  # in the order of slots
        begun, first = window.sink_at(chunk.stop).start, chunk.stop - self._newest
        sink = range(begun, begun + self._sink)  # which the window has none of, if it holds the whole video
        if not any(frame not in sink and frame < first for frame in frames):
            return  # there is nothing that a static head would not see
        (keys,) = stream.cache.keys(layer, chunk, since=0, old=False)
        k_BLHD = torch.cat([k for k, _ in ranges(keys)], 1)
        q = q_BTHD[:, :: -(-q_BTHD.shape[1] // QUERIES)]
        scores = torch.einsum("bthd,blhd->bthl", q.float(), k_BLHD.float()) * q.shape[-1] ** -0.5
        mass_HF = scores.softmax(-1).unflatten(-1, (len(frames), -1)).sum(-1, dtype=torch.float64).sum((0, 1))
        seen = torch.tensor([[f >= first and f not in sink, f not in sink] for f in frames], dtype=torch.float64)
        self.masses_LH2[layer] += mass_HF.cpu() @ seen

    def keep(self, step: ForwardPass, tokens_BTE: Tensor, velocity_BTE: Tensor) -> None:
        """Keeps a pass of the newest chunk by itself."""
        stream = self._streams.get(id(step.text))
        if stream is None or step.timestep is None or step.frames != step.predicted_frames:
            return
        chunk = stream.cache.open_chunk
        assert chunk is not None, "a denoise pass writes an open chunk"
        self.samples = [each for each in self.samples if each.chunk == chunk]
        tokens, velocity = (x.unflatten(1, (chunk.frames, -1)).clone() for x in (tokens_BTE, velocity_BTE))
        self.samples.append(Sample(stream, chunk, step.timestep, tokens, velocity))


@contextlib.contextmanager
def recording_heads(model: CausalDiT, recorder: HeadRecorder) -> Iterator[None]:
    """Records every pass of a model inside this context, by hooks."""

    def begin(_: nn.Module, args: tuple[Tensor, ForwardPass]) -> tuple[Tensor, ForwardPass]:
        tokens, step = args
        return tokens, replace(step, attend=lambda layer, projection: recorder.attend(layer, projection, step))

    def end(_: nn.Module, args: tuple[Tensor, ForwardPass], output: Tensor) -> None:
        recorder.keep(args[1], args[0], output)

    hooks = model.register_forward_pre_hook(begin), model.register_forward_hook(end)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def shares_of(recorders: Sequence[HeadRecorder], parallel: SequenceParallel) -> list[list[float]]:
    """Returns for each layer and head which share of the mass outside the sink the newest frames have. All ranks must
    call it.

    Args:
        recorders: one of each video.
        parallel: the ranks.

    Raises:
        ConfigError: no chunk looked back further than a static head does.
    """
    total = sum_of_ranks(torch.stack([recorder.masses_LH2 for recorder in recorders]).sum(0), parallel)
    if not bool((total[..., 1] > 0).all()):
        raise ConfigError("frames: expected a video in which chunks look back over more than a static head sees")
    return (total[..., 0] / total[..., 1]).tolist()


def by_mass(shares: Sequence[Sequence[float]], least: float, static: int) -> HeadPolicy:
    """Returns the policy in which a head is static if its share is at least `least`; layer 0 stays whole.

    Args:
        shares: what `shares_of` returned.
        least: the smallest share of a static head.
        static: the window of a static head, in latent frames.
    """
    windows = [tuple(static if layer and share >= least else None for share in of) for layer, of in enumerate(shares)]
    return HeadPolicy(tuple(windows))


def profile_heads(
    pipe: CausalVideoPipeline,
    prompts: Sequence[str],
    frames: int,
    seed: int,
    newest: int,
    search: tuple[float, float] | None = None,
) -> tuple[list[list[float]], Searched | None]:
    """Makes a video of each prompt with all frames seen, and measures its last chunk. All ranks must call it.

    Args:
        pipe: the pipeline, whose heads see the whole window.
        prompts: what the videos show.
        frames: pixel frames of a video.
        seed: of the first video; the following numbers for the others.
        newest: latent frames before its chunk that a static head sees, beside the sink.
        search: λ and the budget of a search (see `HeadSearch`); None for none.

    Returns:
        The share of each layer and head, and what the search found.

    Raises:
        ConfigError: the videos are too short, or a static head would see the whole window.
    """
    stream, static = pipe.config.stream, static_window(pipe.config.stream, newest)
    recorders, loops = [], []
    with contextlib.ExitStack() as stack:
        for number, prompt in enumerate(prompts):
            session = stack.enter_context(contextlib.closing(pipe.open(prompt, num_frames=frames, seed=seed + number)))
            session.step()
            while not is_last(session.loop):
                session.step()
            recorders.append(HeadRecorder(session.loop, newest + stream.chunk_frames))
            with recording_heads(pipe.model, recorders[-1]):
                for _ in session:
                    pass
            loops.append(session.loop)
        with pipe.parallel.turn("profiles heads"), own_numerics():
            shares = shares_of(recorders, pipe.parallel)
            samples = [each.samples[len(each.samples) // 2] for each in recorders if each.samples]
            if search is None:
                return shares, None
            if not samples:
                raise ConfigError("rule: expected a model that makes a chunk in two steps or more for a search")
            rungs = ladder(static, stream.chunk_frames, samples[0].stream.cache.window.frames)
            return shares, HeadSearch(loops[0], samples, rungs, *search).run()


def is_last(loop: ChunkLoop) -> bool:
    """Returns whether the next chunk is the last one of its video, or there is none."""
    chunk = loop.next_chunk
    return chunk is None or loop.chunk_at(chunk.index + 1, chunk.stop) is None


def static_window(stream: StreamConfig, newest: int) -> int:
    """Returns the window of a static head, in latent frames: the sink, `newest` frames before the chunk, and the chunk.

    Raises:
        ConfigError: it is not below the window of the stream.
    """
    static = stream.sink + newest + stream.chunk_frames
    if stream.window is not None and static >= stream.window:
        raise ConfigError(
            f"newest: expected sink + newest + chunk below the window of {stream.window} latent frames, got "
            f"{stream.sink} + {newest} + {stream.chunk_frames}"
        )
    return static
