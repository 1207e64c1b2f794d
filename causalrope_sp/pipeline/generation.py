"""One call of a pipeline: what it asks for is settled on every rank, then its chunks are made."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from causalrope_sp.config import SamplerConfig
from causalrope_sp.diffusion.noise import seeded_noise
from causalrope_sp.diffusion.schedule import guided_steps
from causalrope_sp.distributed.layout import Layout
from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import Chunk, LatentGrid
from causalrope_sp.pipeline.conditioning import (
    NOTHING,
    Conditioning,
    condition_on_image,
    condition_on_past,
    condition_on_source,
)
from causalrope_sp.pipeline.decoding import frames_of
from causalrope_sp.pipeline.generation_options import Embeds, GenerationOptions
from causalrope_sp.pipeline.loading import plan_run
from causalrope_sp.pipeline.output import Cut, StreamGuard, VideoChunk, decode_worker, decoded_chunks
from causalrope_sp.pipeline.parallel_chunks import PreviewFrame, check_call
from causalrope_sp.reuse import find_policy
from causalrope_sp.sampling.chunk import LatentChunk
from causalrope_sp.sampling.guidance import check_guidance
from causalrope_sp.sampling.sampler import sample_chunks
from causalrope_sp.sampling.stream_options import Source
from causalrope_sp.text import load_embeds
from causalrope_sp.text.shared_encoder import share_embeds
from causalrope_sp.vin.parallel_sampler import StepOutput

if TYPE_CHECKING:
    from causalrope_sp.pipeline.pipeline import CausalVideoPipeline


@dataclass(frozen=True)
class StreamSettings:
    """The size of a frame in pixels, its grid, and how it is denoised."""

    height: int
    width: int
    grid: LatentGrid
    sampler: SamplerConfig


class Generation:
    """One video in the making. When it is built, all ranks have agreed on what is made, and texts are encoded.

    Args:
        pipe: the pipeline.
        asked: what is asked for, with one prompt.
        streams: lets one stream be open at a time where that is needed.

    Raises:
        CausalRopeError: what `CausalVideoPipeline.stream` raises.
    """

    def __init__(self, pipe: CausalVideoPipeline, asked: GenerationOptions, streams: StreamGuard) -> None:
        self._pipe, self._asked, self._streams = pipe, asked, streams
        self._parallel, self._chunks = pipe.parallel, pipe.parts.parallel_chunks
        self._settings, self._seed = pipe.settings(asked), asked.first_seed()
        self._guided = any(guided_steps(self._settings.sampler))
        self._check()
        self._policy = None if asked.reuse is None else find_policy(asked.reuse)
        self._conditioning = self._condition()
        self._parallel.everyone.agree(self._described())
        self._layout = self._choose_layout()
        self._cut = self._cut_for(asked.num_frames)
        if self._chunks is not None:
            latent_frames, chunks = self._cut.latent_frames(None), self._chunks
            self._parallel.everyone.run_collectively(
                lambda: chunks.check_memory_for(pipe.model, self._settings.grid, latent_frames, self._parallel)
            )
        self._texts = self._parallel.everyone.run_collectively(
            lambda: [] if self._parallel.decodes else self._encode()  # decode ranks hear of wrong input too
        )

    def stream(self) -> Iterator[VideoChunk]:
        """The chunks of frames, each as soon as it is decoded."""
        codec, parallel, grid = self._pipe.codec, self._parallel, self._settings.grid
        if parallel.decodes:
            return self._streams.guard(decode_worker(codec, parallel, grid))
        decode = self._pipe.parts.options.decode
        return self._streams.guard(decoded_chunks(self._sample(), codec, parallel, grid, decode, self._cut))

    def latents(self) -> Tensor:
        """All latent frames, (1, F, C, H, W), on every rank that denoises; decode ranks have an empty tensor."""
        codec, parallel, grid = self._pipe.codec, self._parallel, self._settings.grid
        if parallel.decodes:
            for _ in decode_worker(codec, parallel, grid):
                pass
            return torch.empty(0)
        decoder = frames_of(codec, parallel, grid, "inline")
        with closing(self._sample()) as chunks:
            made = [chunk.latents for chunk in chunks]
        decoder.close()
        past = self._conditioning.latents
        shown = [] if past is None or self._conditioning.hidden else [past.to(made[0])]
        return torch.cat([*shown, *made], 1)

    def _check(self) -> None:
        """Refuses what does not go with this pipeline, before anything is read."""
        asked, parallel_chunks = self._asked, self._chunks is not None
        conditioned = asked.image is not None or asked.video is not None
        check_call(parallel_chunks, conditioned, asked.reuse is not None, asked.preview_every is not None)
        if parallel_chunks and self._settings.sampler.guidance_scale != 1:
            raise ConfigError("chunks made in parallel are not guided: guidance_scale must be 1")
        negative = asked.negative_prompt is not None or asked.negative_prompt_embeds is not None
        if negative and not self._guided:
            raise ConfigError("a negative prompt needs guidance: a scale other than 1")
        check_guidance(self._settings.sampler, self._parallel.mesh.cfg)

    def _condition(self) -> Conditioning:
        """What the stream starts from besides noise, through the codec."""
        asked, pipe, size = self._asked, self._pipe, (self._settings.height, self._settings.width)
        if asked.image is not None:
            return condition_on_image(pipe.codec, asked.image, *size)
        if asked.video is None:
            return NOTHING
        if asked.strength is not None:
            steps = len(self._settings.sampler.steps)
            return condition_on_source(pipe.codec, asked.video, *size, pipe.fps, steps, asked.strength)
        opening = self._opening()
        before = 0 if opening is None else opening.shape[1]
        return condition_on_past(pipe.codec, asked.video, *size, pipe.fps, pipe.config.stream, before)

    def _described(self) -> dict[str, object]:
        """All that decides what is made, as every rank must say it."""
        asked, settings = self._asked, self._settings
        return {
            "num_frames": asked.num_frames,
            "seed": self._seed,
            "prompt": asked.prompt,
            "prompt_embeds": asked.prompt_embeds is not None,
            "negative_prompt": asked.negative_prompt,
            "negative_prompt_embeds": asked.negative_prompt_embeds is not None,
            "size": (settings.height, settings.width),
            "sampler": settings.sampler,
            "output_type": asked.output_type == "latent",
            "conditioning": self._conditioning.digest,
        }

    def _choose_layout(self) -> Layout:
        """The layout that was chosen at loading; another size or guidance is checked and chosen for anew."""
        pipe, parts, own, settings = self._pipe, self._pipe.parts, self._pipe.settings(), self._settings
        if own.grid == settings.grid and any(guided_steps(own.sampler)) == self._guided:
            return parts.layout
        config = replace(pipe.config, height=settings.height, width=settings.width, sampler=settings.sampler)
        return plan_run(config, parts.options, self._parallel, loaded=True)

    def _cut_for(self, frames: int) -> Cut:
        opening = self._opening()
        opened = 0 if opening is None else opening.shape[1]
        return Cut(frames, self._pipe.codec.temporal_stride, opened, self._conditioning)

    def _encode(self) -> list[Tensor]:
        """The embeddings of the prompt and, under guidance, of the negative prompt, each (1, L, E)."""
        asked, pipe = self._asked, self._pipe
        wanted: Sequence[tuple[Any, Embeds | None]] = [
            (asked.prompt, asked.prompt_embeds),
            (asked.negative_prompt, asked.negative_prompt_embeds),
        ][: 1 + self._guided]
        texts = iter(pipe.text.encode_all([text for text, embeds in wanted if embeds is None], self._seed))
        share = partial(share_embeds, parallel=pipe.parallel, config=pipe.model.config, dtype=pipe.model.dtype)
        return [next(texts) if embeds is None else share(partial(_loaded, embeds)) for _, embeds in wanted]

    def _opening(self) -> Tensor | None:
        """The latent frames that the text encoder's model opens every stream with, never shown; None for most
        models."""
        grid = self._settings.grid
        return self._pipe.text.opening(self._pipe.model.config.in_channels, grid.latent_height, grid.latent_width)

    def _sample(self) -> Generator[LatentChunk]:
        pipe, settings, source = self._pipe, self._settings, self._conditioning.source
        grid, stream = settings.grid, pipe.config.stream
        shape = (1, pipe.model.config.in_channels, grid.latent_height, grid.latent_width)
        initial = [part.cpu() for part in (self._opening(), self._conditioning.latents) if part is not None]
        frames = self._cut.latent_frames(None if self._chunks is not None else stream)
        args = pipe.model, self._texts[0], seeded_noise(self._seed, shape), grid, frames
        options: dict[str, Any] = {
            "sampler": settings.sampler,
            "parallel": self._parallel,
            "layout": self._layout,
            "initial_latents": torch.cat(initial, 1) if initial else None,
        }
        if self._chunks is not None:
            every, shown = self._asked.preview_every, self._asked.num_frames
            on_step = None if self._asked.callback_on_step_end is None else self._parallel_step
            return self._chunks.sample(
                *args, codec=pipe.codec, on_step=on_step, preview_every=every, shown=shown, **options
            )
        redrawn = None
        if source is not None:
            redrawn = Source(lambda chunk: source.take(chunk.frames), self._conditioning.first_step)
        return sample_chunks(
            *args,
            stream=stream,
            source=redrawn,
            negative_embeds=self._texts[1] if self._guided else None,
            reuse=self._policy,
            on_step=None if self._asked.callback_on_step_end is None else self._step,
            **options,
        )

    def _step(self, chunk: Chunk, step: int, timestep: float) -> None:
        callback = self._asked.callback_on_step_end
        assert callback is not None, "asked for"
        callback(self._pipe, step, timestep, {"chunk": chunk.index, "num_steps": len(self._settings.sampler.steps)})

    def _parallel_step(self, output: StepOutput, preview: PreviewFrame | None) -> None:
        callback = self._asked.callback_on_step_end
        assert callback is not None, "asked for"
        told = {"chunk": None, "num_steps": output.steps, "preview": preview}
        callback(self._pipe, output.step - 1, output.timestep, told)


def _loaded(embeds: Embeds) -> Tensor:
    return embeds if isinstance(embeds, Tensor) else load_embeds(embeds).embeds
