"""A stream that can be steered, by plain lists: what a chunk attends is looked up frame by frame. It knows neither
slots nor rings nor pending passes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from causalrope_kernels import Projection, project
from causalrope_kernels.reference import attention
from causalrope_sp import Chunk, LatentGrid, SamplerConfig, StreamConfig
from causalrope_sp.diffusion.noise import Noise
from causalrope_sp.diffusion.schedule import sigmas
from causalrope_sp.diffusion.solvers import start_solver
from causalrope_sp.grid import Shard, split_into_chunks
from causalrope_sp.heads import HeadPolicy
from causalrope_sp.models.block import ForwardPass
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.models.rope import RotaryTables

SAMPLER = SamplerConfig((1000, 500))


class ListSession:
    """One stream, whose configuration has a window.

    Args:
        texts: the embeddings of each text, by number.
        control: that of every frame, (B, F, C, H, W), or None.
    """

    def __init__(
        self,
        model: CausalDiT,
        texts: Sequence[Tensor],
        noise: Noise,
        grid: LatentGrid,
        stream: StreamConfig,
        control: Tensor | None = None,
    ) -> None:
        self.control = control
        self.model, self.texts, self.noise, self.grid, self.stream = model, texts, noise, grid, stream
        self.text = self.text_made = 0  # the text of the next chunk, and of the newest one
        self.shots = [0]
        self.seen: list[int] = []  # frames of the window
        self.inputs: dict[tuple[int, int], Tensor] = {}  # layer, frame -> what q, k and v are made of
        self.chunks: list[tuple[Chunk, Tensor]] = []
        self.before: list[ListSession] = []  # as it was right after the chunk before each chunk
        device = torch.device("cpu")
        self.tables = RotaryTables(model.config.head_dim, model.config.theta, Shard(grid), device, torch.float64)
        self.made = self.copy()  # as it was right after the newest chunk

    def sinks(self, stop: int) -> tuple[set[int], set[int]]:
        """The frames that stay once all before `stop` came in, and those that stayed in the shots before."""
        *old, shot = [shot for shot in self.shots if shot < stop] or [0]
        length = self.stream.sink
        return set(range(shot, shot + length)), {f for begun in old for f in range(begun, min(shot, begun + length))}

    def next_chunk(self) -> Chunk:
        index, start = (self.chunks[-1][0].index + 1, self.chunks[-1][0].stop) if self.chunks else (0, 0)
        lone = self.stream.independent_first_frame
        return next(
            split_into_chunks(None, self.stream.chunk_frames, independent_first_frame=lone, index=index, start=start)
        )

    def step(self) -> Tensor:
        self.before.append(self.made)
        self.text_made, chunk = self.text, self.next_chunk()
        if self.stream.window_policy == "recomputed" and len(self.seen) < chunk.start:
            stay = self.seen_with(chunk)
            self.seen = [frame for frame in self.seen if frame in stay]
            self.recompute(False)
        x, levels = self.fresh(chunk, 0), sigmas(SAMPLER)
        solve = start_solver(SAMPLER, 0)
        for step, (sigma, to) in enumerate(zip(levels, [*levels[1:], 0.0], strict=True)):
            velocity = self.forward(chunk, x, 1000 * sigma)
            x = solve(x, velocity, sigma, to, partial(self.fresh, chunk, step + 1))
        self.chunks.append((chunk, x))
        self.commit(chunk, x)
        self.made = self.copy()
        return x

    def fresh(self, chunk: Chunk, step: int) -> Tensor:
        return self.noise(chunk, step).double()

    def commit(self, chunk: Chunk, clean: Tensor) -> None:
        self.forward(chunk, clean, 0.0)
        self.seen = self.seen_with(chunk)

    def seen_with(self, chunk: Chunk) -> list[int]:
        """The frames of the window once a chunk came in, one by one: the oldest that is not of the sink leaves."""
        seen = list(self.seen)
        for frame in range(chunk.start, chunk.stop):
            sink, old_sinks = self.sinks(frame + 1)
            seen = [*(f for f in seen if f not in old_sinks), frame]  # a sink goes as soon as a new shot begins
            ring = sorted(f for f in seen if f not in sink)
            assert self.stream.window is not None
            if len(ring) > self.stream.window - self.stream.sink:
                seen.remove(ring[0])
        return seen

    def forward(self, chunk: Chunk, x: Tensor, timestep: float) -> Tensor:
        own = list(range(chunk.start, chunk.stop))
        order = sorted(self.seen_with(chunk))
        relative = self.stream.rope == "relative"
        rotation = self.tables.rotation([order.index(frame) if relative else frame for frame in order])

        def attend(layer: int, projection: Projection) -> Tensor:
            self.inputs |= {(layer, frame): projection.like[:, n].clone() for n, frame in enumerate(own)}
            everything = torch.stack([self.inputs[layer, frame] for frame in order], 1)
            q, k, v = project(replace(projection, qkv_BFSN=everything, rotation=rotation))
            q = q.unflatten(1, (len(order), -1))[:, [order.index(frame) for frame in own]].flatten(1, 2)
            if self.stream.heads is None:
                return attention(q, k, v)
            return self.by_head(q, k, v, order, self.stream.heads, layer, chunk.stop)

        step = ForwardPass(
            timesteps_F=torch.tensor([timestep] * len(own), dtype=torch.float32),
            predicted_frames=len(own),
            rotation=self.tables.rotation(own),
            text=self.model.encode_text(self.texts[self.text]),
            attend=attend,
        )
        added = [] if self.control is None else [self.control[:, chunk.start : chunk.stop]]
        velocity = self.model(self.grid.patchify(torch.cat([x, *added], 2)).flatten(1, 2), step)
        return self.grid.unpatchify(velocity.unflatten(1, (len(own), -1)))

    def by_head(
        self, q: Tensor, k: Tensor, v: Tensor, order: list[int], heads: HeadPolicy, layer: int, stop: int
    ) -> Tensor:
        """Attention of each head by itself, with a mask of the frames and the rows that it sees."""
        sink, _ = self.sinks(stop)
        others = [frame for frame in order if frame not in sink]
        outputs = []
        for head, (window, rows) in enumerate(zip(heads.windows[layer], heads.rows_of_heads[layer], strict=True)):
            seen = set(order)
            if window is not None and window < self.stream.window:  # type: ignore[operator]  # it has one
                seen = ({*order} & sink) | set(others[len(others) - min(window - self.stream.sink, len(others)) :])
            if window == 0:
                outputs.append(torch.zeros_like(q[:, :, head : head + 1]))
                continue
            of_frame = torch.tensor([frame in seen for frame in order])
            mask = self.near(rows).repeat(q.shape[1] // self.grid.tokens, len(order))
            mask = mask & of_frame.repeat_interleave(self.grid.tokens)
            q_h, k_h, v_h = (x[:, :, head : head + 1].transpose(1, 2) for x in (q, k, v))
            outputs.append(
                scaled_dot_product_attention(q_h, k_h, v_h, attn_mask=mask.expand(1, 1, -1, -1)).transpose(1, 2)
            )
        return torch.cat(outputs, 2)

    def near(self, rows: int | None) -> Tensor:
        """Which tokens of a frame the tokens of another see, with bands of so many rows."""
        bands = torch.arange(self.grid.tokens) // self.grid.columns // (rows or self.grid.rows)
        return (bands[:, None] - bands).abs() <= 1

    def set_text(self, number: int, recache: bool, recache_sink: bool, new_shot: bool) -> None:
        self.text = number
        if recache:
            self.recompute(recache_sink)
        if new_shot:
            start = self.next_chunk().start
            self.shots = [*(shot for shot in self.shots if shot < start), start]

    def recompute(self, with_sink: bool) -> None:
        """Empties the window, but for the sink if it stays, and commits its clean latents again in order of time."""
        sink, _ = self.sinks(self.next_chunk().start)
        wanted = {f for f in self.seen if with_sink or f not in sink}
        self.seen = [f for f in self.seen if f not in wanted]
        for chunk, clean in self.chunks:
            frames = [f for f in range(chunk.start, chunk.stop) if f in wanted]
            for _, run in groupby(enumerate(frames), lambda numbered: numbered[1] - numbered[0]):
                adjacent = [f for _, f in run]
                part = Chunk(chunk.index, adjacent[0], len(adjacent))
                later = [f for f in self.seen if f >= part.stop]  # a sink that stays, of a shot that begins later
                self.seen = [f for f in self.seen if f not in later]
                self.commit(part, clean[:, [f - chunk.start for f in adjacent]])
                self.seen += later

    def rewind(self, chunks: int, exact: bool) -> None:
        """Goes back to right after a chunk; if that is not to be exact, the cache is computed anew."""
        state = self.before[-chunks]
        self.__dict__.update(state.copy().__dict__)
        if not exact:
            self.recompute(True)
        self.made = self.copy()

    def copy(self) -> ListSession:
        other = copy.copy(self)
        other.seen, other.inputs, other.shots = list(self.seen), dict(self.inputs), list(self.shots)
        other.chunks, other.before = list(self.chunks), list(self.before)
        return other
