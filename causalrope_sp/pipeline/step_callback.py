"""Calls of a caller's `callback_on_step_end`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from causalrope_sp.config import SamplerConfig
from causalrope_sp.grid import Chunk
from causalrope_sp.pipeline.generation_options import StepCallback
from causalrope_sp.pipeline.parallel_chunks import PreviewFrame
from causalrope_sp.vin.parallel_sampler import StepOutput


@dataclass
class StepCalls:
    """Calls a callback after each denoising step.

    Args:
        pipe: the pipeline, which the callback is given.
        callback: the callback; None on a rank that has none where another one has.
        sampler: the steps of the chunks.
        first_chunk: the number in its stream of the first chunk that has a `VideoChunk`; None for the first one made.
    """

    pipe: Any
    callback: StepCallback | None
    sampler: SamplerConfig
    first_chunk: int | None = None

    def after_step(self, chunk: Chunk, step: int, timestep: float) -> None:
        """Calls it after a step of a chunk."""
        self.first_chunk = chunk.index if self.first_chunk is None else self.first_chunk
        number = chunk.index - self.first_chunk  # that of the `VideoChunk`: chunks of initial latents are not counted
        steps = len(self.sampler.steps if number else self.sampler.first_chunk.steps)
        if self.callback is not None:
            self.callback(self.pipe, step, timestep, {"chunk": number, "num_steps": steps})

    def after_parallel_step(self, output: StepOutput, preview: PreviewFrame | None) -> None:
        """Calls it after a step of all chunks, which are made in parallel."""
        kwargs = {"chunk": None, "num_steps": output.steps, "preview": preview}
        if self.callback is not None:
            self.callback(self.pipe, output.step - 1, output.timestep, kwargs)
