"""Finds the text of a toybox video: the one, of those it may show, under which the model expects it most."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from causalrope_sp.compression.bitstream import Header
from causalrope_sp.compression.codebook import Choice
from causalrope_sp.compression.coded_loop import CodedLoop
from causalrope_sp.compression.segments import Segments, settings_of
from causalrope_sp.errors import ConfigError, InputError
from causalrope_sp.grid import Chunk
from causalrope_sp.io.media_reader import Video, read_video
from causalrope_sp.pipeline.conditioning import VideoLatents
from causalrope_sp.pipeline.numerics import own_numerics
from causalrope_sp.toybox.described import describe
from causalrope_sp.toybox.toybox_text import ToyboxText

if TYPE_CHECKING:
    from causalrope_sp.pipeline.pipeline import CausalVideoPipeline

SEEN = 49  # pixel frames that are looked at
CHUNKS = 3  # that the model is asked about
MOST = 48  # sentences that are compared


def find_prompt(pipe: CausalVideoPipeline, video: Video) -> str:
    """Returns the sentence of toybox's grammar, with starts, that a video shows.

    Args:
        pipe: a pipeline of toybox.
        video: a file, or frames at the pipeline's frame rate, of which the first ones are read.

    Raises:
        ConfigError: the pipeline's model is another one.
        PromptError: the video is no scene of the grammar.
        InputError: the video cannot be read.
    """
    if not isinstance(pipe.text, ToyboxText):
        raise ConfigError("a prompt is found for scenes of toybox alone: give the text of the video")
    read = read_video(video, pipe.height, pipe.width, pipe.fps)
    first = [frame for frame, _ in zip(read, range(SEEN), strict=False)]
    if not first:
        raise InputError("the video holds no frame")
    frames = np.stack(first)
    sentences = describe(frames)[:MOST]
    with own_numerics(), torch.inference_mode():
        latents = VideoLatents(pipe.codec, iter(frames)).take(CHUNKS * pipe.config.stream.chunk_frames)
    return min(sentences, key=partial(_surprise, pipe, latents))


class _Surprise(CodedLoop):
    """Sums the errors of what the model expects of each chunk after the true ones before it."""

    latents: Tensor
    error = 0.0

    def denoise(self, chunk: Chunk, control_BFSE: Tensor | None = None) -> Tensor:
        """Returns the true tokens of the chunk, (1, F, s, E)."""
        first = chunk.start - self._initial
        target = self.context.tokens(self.latents[:, first : first + chunk.frames])
        x = self.context.tokens(self.drawn_noise(chunk, 0, [Choice()] * chunk.frames))
        expected = x - self.levels[0] * self.velocity(chunk, x, 0)
        self.error += float(self.errors(expected, target).sum())
        return target


def _surprise(pipe: CausalVideoPipeline, latents: Tensor, prompt: str) -> float:
    """How much the model errs at pure noise, summed over the first chunks."""
    settings = settings_of(pipe.config.stream, pipe.config.sampler)
    header = Header(prompt, "0" * 8, pipe.height, pipe.width, float(pipe.fps), settings=settings)
    with Segments(pipe, _Surprise, header) as segments:

        def prepare(loop: _Surprise) -> None:
            loop.latents = latents

        for _ in range(CHUNKS):
            segments.step(prepare)
        return segments.loop.error
