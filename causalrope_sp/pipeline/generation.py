"""`Generation`: one video of a pipeline, from checked and encoded options to its chunks."""

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
from causalrope_sp.distributed.stream_turns import StreamTurns
from causalrope_sp.errors import CausalRopeError, ConfigError
from causalrope_sp.grid import Chunk, LatentGrid
from causalrope_sp.pipeline.conditioning import (
    NOTHING,
    Conditioning,
    condition_on_image,
    condition_on_source,
    condition_on_video_end,
)
from causalrope_sp.pipeline.decoding import frames_of
from causalrope_sp.pipeline.generation_options import Embeds, GenerationOptions
from causalrope_sp.pipeline.loading import plan_run
from causalrope_sp.pipeline.numerics import own_numerics, steady
from causalrope_sp.pipeline.output import FrameRange, OpenStreams, VideoChunk, decode_worker, decoded_chunks
from causalrope_sp.pipeline.parallel_chunks import PreviewFrame, check_call
from causalrope_sp.reuse import find_policy
from causalrope_sp.sampling.chunk import LatentChunk
from causalrope_sp.sampling.guidance import check_guidance
from causalrope_sp.sampling.sampler import sample_within_turns
from causalrope_sp.sampling.stream_options import Source
from causalrope_sp.text import load_embeds
from causalrope_sp.text.shared_encoder import share_embeds
from causalrope_sp.vin.parallel_sampler import StepOutput

if TYPE_CHECKING:
    from causalrope_sp.pipeline.pipeline import CausalVideoPipeline


@dataclass(frozen=True)
class StreamSettings:
    """The size of a call's frames and how they are denoised.

    Args:
        height: pixels of a frame.
        width: pixels of a frame.
        grid: the size of its latent in tokens.
        sampler: steps, solver and guidance.
    """

    height: int
    width: int
    grid: LatentGrid
    sampler: SamplerConfig


class Generation:
    """One video. Its construction checks the options on every rank and encodes conditioning and texts.

    Args:
        pipe: the pipeline.
        request: the options of the call, with one prompt.
        streams: the open streams of the pipeline.

    Raises:
        CausalRopeError: what `CausalVideoPipeline.stream` raises.
    """

    def __init__(self, pipe: CausalVideoPipeline, request: GenerationOptions, streams: OpenStreams) -> None:
        self._pipe, self._request, self._streams = pipe, request, streams
        self._parallel, self._chunks = pipe.parallel, pipe.parts.parallel_chunks
        self._first_chunk: int | None = None
        with own_numerics(), self._parallel.turn("opens a stream"):
            self._turns = self._open_turns()
            self._parallel.everyone.run_collectively(self._prepare)  # an error of one rank ends the call on all
            self._parallel.everyone.agree(self._described())
            self._layout = self._choose_layout()
            self._texts = self._open()

    def _open_turns(self) -> StreamTurns:
        """The turns of the stream; while it is open it allows no other call if a thread works ahead."""
        mesh, latent = self._parallel.mesh, self._request.output_type == "latent"
        ahead = not latent and (mesh.decode > 0 or self._pipe.parts.options.decode == "overlap")
        return self._parallel.open_stream(ahead)

    def _prepare(self) -> None:
        request = self._request
        self._settings, self._seed = self._pipe.settings(request), request.first_seed()
        self._guided = any(guided_steps(self._settings.sampler))
        self._check()
        self._policy = None if request.reuse is None else find_policy(request.reuse)
        self._conditioning = self._condition()

    def _open(self) -> list[Tensor]:
        """Checks the memory of a video whose chunks are sampled in parallel; returns the encoded texts."""
        self._frame_range = self._frame_range_of(self._request.num_frames)
        if self._chunks is not None:
            model, grid, chunks = self._pipe.model, self._settings.grid, self._chunks
            latent_frames = self._frame_range.latent_frames(None)
            self._parallel.everyone.run_collectively(
                lambda: chunks.check_memory_for(model, grid, latent_frames, self._parallel)
            )
        return self._parallel.everyone.run_collectively(
            lambda: [] if self._parallel.decodes else self._encode()  # decode ranks raise for wrong input too
        )

    def stream(self) -> Iterator[VideoChunk]:
        """Yields the chunks of the video, each as soon as it is decoded; decode ranks yield chunks without frames."""
        codec, parallel, grid = self._pipe.codec, self._parallel, self._settings.grid
        if parallel.decodes:
            return self._streams.add(steady(decode_worker(codec, parallel, grid, self._turns)))
        decode = self._pipe.parts.options.decode
        chunks = decoded_chunks(self._sample(), codec, parallel, grid, decode, self._frame_range, self._turns)
        return self._streams.add(steady(chunks))

    def latents(self) -> Tensor:
        """Returns the latent frames that the video decodes from, (1, F, C, H, W); an empty tensor on decode ranks."""
        codec, parallel, grid = self._pipe.codec, self._parallel, self._settings.grid
        if parallel.decodes:
            for _ in steady(decode_worker(codec, parallel, grid, self._turns)):
                pass
            return torch.empty(0)
        generated, done = list[Tensor](), 0
        with self._turns.taken(), closing(steady(self._sample())) as chunks:
            decoder = frames_of(codec, parallel, grid, "inline", self._turns)
            try:
                while done != self._frame_range.length:
                    with self._turns.chunk():
                        part = next(chunks)
                    generated.append(part.latents)
                    done = self._frame_range.stop(part.chunk.stop)
            except CausalRopeError:
                decoder.close()  # an error of all ranks; decode ranks wait for the end of the video
                raise
            decoder.close()
        latents = self._conditioning.latents
        image = [] if latents is None or self._conditioning.context_frames else [latents.to(generated[0])]
        return torch.cat([*image, *generated], 1)[:, : self._frame_range.latent_length]

    def _check(self) -> None:
        """Raises ConfigError for options that this pipeline does not support, before any file is read."""
        request, parallel_chunks = self._request, self._chunks is not None
        conditioned = request.image is not None or request.video is not None
        check_call(parallel_chunks, conditioned, request.reuse is not None, request.preview_every is not None)
        if parallel_chunks and self._settings.sampler.guidance_scale != 1:
            raise ConfigError("chunks made in parallel are not guided: guidance_scale must be 1")
        negative = request.negative_prompt is not None or request.negative_prompt_embeds is not None
        if negative and not self._guided:
            raise ConfigError("a negative prompt needs guidance: a scale other than 1")
        check_guidance(self._settings.sampler, self._parallel.mesh.cfg)

    def _condition(self) -> Conditioning:
        """Encodes the image or the video that the stream starts from."""
        request, pipe, size = self._request, self._pipe, (self._settings.height, self._settings.width)
        if request.image is not None:
            return condition_on_image(pipe.codec, request.image, *size)
        if request.video is None:
            return NOTHING
        if request.strength is not None:
            steps = len(self._settings.sampler.steps)
            return condition_on_source(pipe.codec, request.video, *size, pipe.fps, steps, request.strength)
        prefix = self._prefix()
        prefix_frames = 0 if prefix is None else prefix.shape[1]
        return condition_on_video_end(pipe.codec, request.video, *size, pipe.fps, pipe.config.stream, prefix_frames)

    def _described(self) -> dict[str, object]:
        """Everything that determines the video; it must be equal on all ranks."""
        request, settings = self._request, self._settings
        return {
            "num_frames": request.num_frames,
            "seed": self._seed,
            "prompt": request.prompt,
            "prompt_embeds": request.prompt_embeds is not None,
            "negative_prompt": request.negative_prompt,
            "negative_prompt_embeds": request.negative_prompt_embeds is not None,
            "size": (settings.height, settings.width),
            "sampler": settings.sampler,
            "output_type": request.output_type == "latent",
            "conditioning": self._conditioning.digest,
        }

    def _choose_layout(self) -> Layout:
        """The layout chosen at loading, or for another size or guidance a new one, with a new check of memory."""
        pipe, parts, own, settings = self._pipe, self._pipe.parts, self._pipe.settings(), self._settings
        if own.grid == settings.grid and any(guided_steps(own.sampler)) == self._guided:
            return parts.layout
        config = replace(pipe.config, height=settings.height, width=settings.width, sampler=settings.sampler)
        return plan_run(config, parts.options, self._parallel, loaded=True)

    def _frame_range_of(self, frames: int) -> FrameRange:
        prefix = self._prefix()
        prefix_frames = 0 if prefix is None else prefix.shape[1]
        return FrameRange(frames, self._pipe.codec.temporal_stride, prefix_frames, self._conditioning)

    def _encode(self) -> list[Tensor]:
        """The embeddings of the prompt and, under guidance, of the negative prompt, each (1, L, E)."""
        request, pipe = self._request, self._pipe
        wanted: Sequence[tuple[Any, Embeds | None]] = [
            (request.prompt, request.prompt_embeds),
            (request.negative_prompt, request.negative_prompt_embeds),
        ][: 1 + self._guided]
        texts = iter(pipe.text.encode_all([text for text, embeds in wanted if embeds is None], self._seed))
        share = partial(share_embeds, parallel=pipe.parallel, config=pipe.model.config, dtype=pipe.model.dtype)
        return [next(texts) if embeds is None else share(partial(_loaded, embeds)) for _, embeds in wanted]

    def _prefix(self) -> Tensor | None:
        """The latent frames that the model starts every stream with and that are not decoded; None for most models."""
        grid = self._settings.grid
        return self._pipe.text.opening(self._pipe.model.config.in_channels, grid.latent_height, grid.latent_width)

    def _sample(self) -> Generator[LatentChunk]:
        """The latent chunks of the stream, or of the video whose chunks are sampled in parallel."""
        pipe, settings, source = self._pipe, self._settings, self._conditioning.source
        grid, stream = settings.grid, pipe.config.stream
        shape = (1, pipe.model.config.in_channels, grid.latent_height, grid.latent_width)
        initial = [part.cpu() for part in (self._prefix(), self._conditioning.latents) if part is not None]
        frames = self._frame_range.latent_frames(None if self._chunks is not None else stream)
        args = pipe.model, self._texts[0], seeded_noise(self._seed, shape), grid, frames
        options: dict[str, Any] = {
            "sampler": settings.sampler,
            "parallel": self._parallel,
            "layout": self._layout,
            "initial_latents": torch.cat(initial, 1) if initial else None,
        }
        if self._chunks is not None:
            every, shown = self._request.preview_every, self._request.num_frames
            on_step = None if self._request.callback_on_step_end is None else self._parallel_step
            return self._chunks.sample(
                *args, codec=pipe.codec, on_step=on_step, preview_every=every, shown=shown, **options
            )
        redrawn = None
        if source is not None:
            redrawn = Source(lambda chunk: source.take(chunk.frames), self._conditioning.first_step)
        return sample_within_turns(
            *args,
            stream=stream,
            source=redrawn,
            negative_embeds=self._texts[1] if self._guided else None,
            reuse=self._policy,
            graphs=pipe.parts.options.graphs,
            on_step=None if self._request.callback_on_step_end is None else self._step,
            **options,
        )

    def _step(self, chunk: Chunk, step: int, timestep: float) -> None:
        callback = self._request.callback_on_step_end
        assert callback is not None, "only called if there is a callback"
        self._first_chunk = chunk.index if self._first_chunk is None else self._first_chunk
        number = chunk.index - self._first_chunk  # that of the `VideoChunk`: chunks of initial latents are not counted
        callback(self._pipe, step, timestep, {"chunk": number, "num_steps": len(self._settings.sampler.steps)})

    def _parallel_step(self, output: StepOutput, preview: PreviewFrame | None) -> None:
        callback = self._request.callback_on_step_end
        assert callback is not None, "only called if there is a callback"
        kwargs = {"chunk": None, "num_steps": output.steps, "preview": preview}
        callback(self._pipe, output.step - 1, output.timestep, kwargs)


def _loaded(embeds: Embeds) -> Tensor:
    """The embeddings themselves, or those in a file."""
    return embeds if isinstance(embeds, Tensor) else load_embeds(embeds).embeds
