"""`Generation`: the call that opens one stream, with its options checked and its conditioning and texts encoded."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from causalrope_sp.codec import Codec
from causalrope_sp.diffusion.noise import Noise, seeded_noise
from causalrope_sp.diffusion.schedule import guided_steps
from causalrope_sp.distributed.layout import Layout
from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import LatentGrid
from causalrope_sp.pipeline.conditioning import Conditioning, condition_by_control, condition_of
from causalrope_sp.pipeline.decoding import Decode
from causalrope_sp.pipeline.generation_options import Embeds, GenerationOptions
from causalrope_sp.pipeline.image_control import takes_image
from causalrope_sp.pipeline.image_tokens import share_image_tokens
from causalrope_sp.pipeline.numerics import own_numerics
from causalrope_sp.pipeline.open_streams import OpenStreams
from causalrope_sp.pipeline.output import FrameRange
from causalrope_sp.pipeline.parallel_chunks import check_call
from causalrope_sp.pipeline.prompt_changes import PromptChange
from causalrope_sp.pipeline.session import Session
from causalrope_sp.pipeline.session_plan import SessionPlan
from causalrope_sp.pipeline.step_callback import StepCalls
from causalrope_sp.pipeline.texts import described_embeds, encode_all
from causalrope_sp.reuse import find_policy
from causalrope_sp.sampling.agreement import digest
from causalrope_sp.sampling.chunk import LatentChunk, compute_dtype
from causalrope_sp.sampling.chunk_control import check_taken, control_by_chunk
from causalrope_sp.sampling.guidance import check_guidance
from causalrope_sp.sampling.steered_loop import SteeredLoop
from causalrope_sp.sampling.stream_options import Control, Resumed, Source, StreamOptions

if TYPE_CHECKING:
    from causalrope_sp.pipeline.pipeline import CausalVideoPipeline


class Generation:
    """A call that opens a stream. Its construction checks the options on every rank and encodes conditioning and texts.

    Args:
        pipe: the pipeline.
        request: the options of the call, with one prompt.
        streams: the open streams of the pipeline.

    Attributes:
        parallel: the ranks.
        turns: the turns of the stream.
        streams: the open streams of the pipeline.
        conditioning: what the stream starts from.
        frame_range: which pixel frames of the stream are the video.
        plan: its plan; None for a video whose chunks are made in parallel.

    Raises:
        CausalRopeError: what `CausalVideoPipeline.stream` raises.
    """

    def __init__(self, pipe: CausalVideoPipeline, request: GenerationOptions, streams: OpenStreams) -> None:
        self._pipe, self._request, self.streams = pipe, request, streams
        self.parallel, self._chunks = pipe.parallel, pipe.parts.parallel_chunks
        self._calls: StepCalls | None = None
        self.plan: SessionPlan | None = None
        with own_numerics(), self.parallel.turn("opens a stream"):
            self.turns = self.parallel.open_stream(self.works_ahead)
            everyone = self.parallel.everyone
            everyone.run_collectively(self._prepare)  # an error of one rank ends the call on all
            if not everyone.all_say(request.callback_on_step_end is None):  # those of some ranks call too
                self._calls = StepCalls(pipe, request.callback_on_step_end, self._settings.sampler)
            everyone.agree(everyone.run_collectively(self._described))
            self._layout = self._choose_layout()
            self.conditioning = everyone.run_collectively(self._condition)
            everyone.agree({"conditioning": self.conditioning.digest})
            self._texts = self._open()

    @property
    def works_ahead(self) -> bool:
        """Whether a thread makes the next chunk while one is decoded; then no other call may come in between."""
        mesh, latent = self.parallel.mesh, self._request.output_type == "latent"
        return not latent and (mesh.decode > 0 or self.decode == "overlap")

    @property
    def decode(self) -> Decode:
        """Which ranks decode."""
        return self._pipe.parts.options.decode

    @property
    def codec(self) -> Codec:
        """The VAE."""
        return self._pipe.codec

    @property
    def grid(self) -> LatentGrid:
        """The size of a latent frame in tokens."""
        return self._settings.grid

    @property
    def history(self) -> int:
        """How many chunks can be taken back bit for bit."""
        return self._request.history

    @property
    def seed(self) -> int:
        """The seed of the noise."""
        return self._seed

    @property
    def can_go_back(self) -> bool:
        """Whether the stream keeps what it needs to make a chunk again."""
        return self._request.history > 0 or self._request.kept_chunks > 0

    @property
    def two_models(self) -> bool:
        """Whether two transformers share the steps."""
        return self._pipe.parts.low_noise is not None

    @property
    def is_parallel(self) -> bool:
        """Whether the chunks of the video are made in parallel."""
        return self._chunks is not None

    def _prepare(self) -> None:
        request = self._request
        self._settings, self._seed = self._pipe.settings(request), request.first_seed()
        self._guided = any(guided_steps(self._settings.sampler))
        self._stream = request.stream_of(self._pipe.config.stream)
        self._check()
        self._policy = None if request.reuse is None else find_policy(request.reuse)

    def _condition(self) -> Conditioning:
        """Reads and encodes what the stream starts from, once its size is known to fit into memory."""
        size, steps = (self._settings.height, self._settings.width), len(self._settings.sampler.steps)
        config, given = self._pipe.model.config, self._prefix_frames()
        if takes_image(config, self.codec):
            return condition_by_control(self.codec, self._request, size, config)
        return condition_of(self.codec, self._request, size, self._pipe.fps, self._stream, steps, given)

    def _open(self) -> list[Tensor]:
        """Checks the memory of a video whose chunks are sampled in parallel; returns the encoded texts."""
        self.frame_range = self._frame_range_of(self._request.num_frames)
        self.parallel.everyone.run_collectively(self._control)
        if self._chunks is not None:
            model, grid, chunks = self._pipe.model, self._settings.grid, self._chunks
            latent_frames = self.frame_range.latent_frames(None)
            assert latent_frames is not None, "`check_call` refuses a video without end"
            self.parallel.everyone.run_collectively(
                lambda: chunks.check_memory_for(model, grid, latent_frames, self.parallel)
            )
        if not self.parallel.decodes:
            config, width = self._pipe.config, self._pipe.model.config.image_dim
            picture = self.conditioning.picture
            self._image = share_image_tokens(self._request, config.image_encoder, picture, width, self.parallel)
        return self.parallel.everyone.run_collectively(
            lambda: [] if self.parallel.decodes else self._encode()  # decode ranks raise for wrong input too
        )

    def session(self) -> Session:
        """Opens the stream."""
        session = Session(self)
        self.streams.add(session)
        return session

    def _check(self) -> None:
        """Raises ConfigError for options that this pipeline does not support, before any file is read."""
        request, parallel_chunks = self._request, self._chunks is not None
        conditioned = request.image is not None or request.video is not None
        check_call(parallel_chunks, conditioned, request.reuse is not None, request.preview_every is not None)
        if parallel_chunks and (request.num_frames is None or self._stream != self._pipe.config.stream):
            raise ConfigError("chunks made in parallel have no window: num_frames must be given, window and sink not")
        if parallel_chunks and self._settings.sampler.guidance_scale != 1:
            raise ConfigError(
                "chunks made in parallel have no guidance by a negative text: guidance_scale must be 1, not "
                f"{self._settings.sampler.guidance_scale:g}"
            )
        negative = request.negative_prompt is not None or request.negative_prompt_embeds is not None
        if negative and not self._guided:
            raise ConfigError("a negative prompt needs guidance: a scale other than 1")
        check_guidance(self._settings.sampler, self.parallel.mesh.cfg)
        if request.control is not None:
            check_taken(self._pipe.model.config.control_channels, request.control)

    def _control(self) -> Control | None:
        given = self.conditioning.control or self._request.control
        return control_by_chunk(given, self.frame_range.latent_frames(self._stream))

    def _described(self) -> dict[str, object]:
        """Everything that determines the video; it must be equal on all ranks."""
        request, settings, control = self._request, self._settings, self._request.control
        return {
            "num_frames": request.num_frames,
            "seed": self._seed,
            "prompt": request.prompt,
            "prompt_embeds": described_embeds(request.prompt_embeds),
            "negative_prompt": request.negative_prompt,
            "negative_prompt_embeds": described_embeds(request.negative_prompt_embeds),
            "size": (settings.height, settings.width),
            "sampler": settings.sampler,
            "output_type": request.output_type == "latent",
            "window": self._stream,
            "history": request.history,
            "kept_chunks": request.kept_chunks,
            "control": digest(control) if isinstance(control, Tensor) else control is not None,
        }

    def _choose_layout(self) -> Layout:
        if self.is_parallel:
            return self._pipe.parts.layout
        request = self._request
        history = request.history and request.history + self.works_ahead
        kept = history, request.kept_chunks
        self.plan = SessionPlan.of(self._pipe, self.streams, self._settings, self._stream, *kept)
        return self.plan.layout

    def _frame_range_of(self, frames: int | None) -> FrameRange:
        return FrameRange(frames, self.codec.temporal_stride, self._prefix_frames(), self.conditioning)

    def _encode(self) -> list[Tensor]:
        """The embeddings of the prompt and, under guidance, of the negative prompt, each (1, L, E)."""
        request = self._request
        wanted: Sequence[tuple[Any, Embeds | None]] = [
            (request.prompt, request.prompt_embeds),
            (request.negative_prompt, request.negative_prompt_embeds),
        ][: 1 + self._guided]
        return encode_all(self._pipe, self._seed, self.conditioning.pictured, wanted)

    def first_prompt(self) -> list[PromptChange]:
        """The prompt of the call as the first one of a session; none on a rank that only decodes."""
        prompt = self._request.prompt
        assert not isinstance(prompt, Sequence) or isinstance(prompt, str), "a stream has one prompt"
        return [PromptChange(0, 0, prompt, embeds) for embeds in self._texts[:1]]

    def encode_prompt(self, prompt: str | None, embeds: Embeds | None) -> Tensor:
        """Encodes another prompt, (1, L, E). All ranks that denoise must call it.

        Args:
            prompt: its text; None with embeddings.
            embeds: embeddings in place of the text, or a file of them.

        Raises:
            PromptError: the text encoder does not know its words.
            ConfigError: there are neither or both.
        """

        def encode() -> Tensor:
            GenerationOptions.of(prompt=prompt, prompt_embeds=embeds)
            return encode_all(self._pipe, self._seed, self.conditioning.pictured, [(prompt, embeds)])[0]

        return self.parallel.denoisers.run_collectively(encode)

    def noise(self, seed: int) -> Noise:
        """The noise of the stream for a seed."""
        grid = self.grid
        return seeded_noise(seed, (1, self._pipe.model.config.in_channels, grid.latent_height, grid.latent_width))

    def _prefix(self) -> Tensor | None:
        """The latent frames that the model starts every stream with and that are not decoded; None for most models."""
        grid = self._settings.grid
        return self._pipe.text.opening(self._pipe.model.config.in_channels, grid.latent_height, grid.latent_width)

    def _prefix_frames(self) -> int:
        """How many latent frames these are."""
        prefix = self._pipe.text.opening(self._pipe.model.config.in_channels, 1, 1)  # whatever the size
        return 0 if prefix is None else prefix.shape[1]

    def open_loop(self) -> SteeredLoop:
        """Makes the stream of latents. All ranks that denoise must call it, in a turn."""
        pipe, source = self._pipe, self.conditioning.source
        redrawn = None
        if source is not None:
            redrawn = Source(lambda chunk: source.take(chunk.frames), self.conditioning.first_step)
        options = StreamOptions(
            stream=self._stream,
            sampler=self._settings.sampler,
            initial_latents=self._initial(),
            given_frames=self.conditioning.in_chunk,
            resumed=self._resumed(),
            control=self._control(),
            source=redrawn,
            low_noise=pipe.parts.low_noise,
            image_embeds=self._image,
            negative_embeds=self._texts[1] if self._guided else None,
            reuse=self._policy,
            layout=self._layout,
            graphs=pipe.parts.options.graphs,
            on_step=None if self._calls is None else self._calls.after_step,
            history=self.history and self.history + self.works_ahead,
            kept_chunks=self._request.kept_chunks,
            settled=self.streams.settled,
        )
        frames = self.frame_range.latent_frames(self._stream)
        return SteeredLoop(pipe.model, self._texts[0], self.noise(self.seed), self.grid, frames, self.parallel, options)

    def _resumed(self) -> Resumed | None:
        """What the stream has made already; None if it begins."""
        return None

    def saved_fields(self, seed: int) -> dict[str, Any]:
        """Returns the fields of a `SavedSession` that the call determines.

        Args:
            seed: of the session's noise.
        """
        request, settings, given = self._request, self._settings, self.conditioning
        conditioning = given.latents if given.in_chunk is None else given.in_chunk
        latents = None if conditioning is None else conditioning.cpu().to(compute_dtype(self._pipe.model.dtype))
        return {
            "model_digest": self._pipe.model_digest,
            "loras": self._pipe.merged_loras,
            "height": settings.height,
            "width": settings.width,
            "dtype": str(self._pipe.model.dtype).removeprefix("torch."),
            "stream": self._stream,
            "sampler": settings.sampler,
            "seed": seed,
            "text_seed": self._seed,
            "num_frames": request.num_frames,
            "negative_prompt": request.negative_prompt,
            "negative_embeds": self._texts[1].cpu() if self._guided else None,
            "conditioning": latents,
            "context_frames": given.context_frames,
            "reuse": None if self._policy is None else repr(self._policy),
            "history": request.history,
            "kept_chunks": request.kept_chunks,
        }

    def parallel_chunks(self) -> Generator[LatentChunk]:
        """Samples a video whose chunks are made in parallel."""
        pipe, chunks, frames = self._pipe, self._chunks, self.frame_range.latent_frames(None)
        assert chunks is not None, "only such a video is sampled so"
        shown = self._request.num_frames
        assert frames is not None, "such a video has an end"
        assert shown is not None, "such a video has an end"
        return chunks.sample(
            pipe.model,
            self._texts[0],
            self.noise(self._seed),
            self.grid,
            frames,
            sampler=self._settings.sampler,
            parallel=self.parallel,
            layout=self._layout,
            initial_latents=self._initial(),
            codec=pipe.codec,
            on_step=None if self._calls is None else self._calls.after_parallel_step,
            preview_every=self._request.preview_every,
            shown=shown,
        )

    def _initial(self) -> Tensor | None:
        """The latent frames that the stream goes on from."""
        initial = [part.cpu() for part in (self._prefix(), self.conditioning.latents) if part is not None]
        return torch.cat(initial, 1) if initial else None
