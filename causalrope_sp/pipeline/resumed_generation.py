"""`ResumedGeneration`: the call that opens a stream which goes on from a saved session."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from causalrope_sp.diffusion.schedule import guided_steps
from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import LatentGrid
from causalrope_sp.pipeline.conditioning import Conditioning
from causalrope_sp.pipeline.generation import Generation
from causalrope_sp.pipeline.generation_options import GenerationOptions
from causalrope_sp.pipeline.image_control import takes_image
from causalrope_sp.pipeline.open_streams import OpenStreams
from causalrope_sp.pipeline.option_checks import check_path
from causalrope_sp.pipeline.output import Made
from causalrope_sp.pipeline.prompt_changes import PromptChange, prompt_at
from causalrope_sp.pipeline.saved_cache import restore_cache
from causalrope_sp.pipeline.session import WARMING, Session
from causalrope_sp.pipeline.stream_settings import StreamSettings
from causalrope_sp.reuse import find_policy
from causalrope_sp.sampling.agreement import digest
from causalrope_sp.sampling.chunk import LatentChunk
from causalrope_sp.sampling.finite_chunks import FiniteCheck
from causalrope_sp.sampling.steered_loop import SteeredLoop
from causalrope_sp.sampling.stream_options import Resumed
from causalrope_sp.sessions import SavedSession, check_fits, read_session
from causalrope_sp.weights.messages import some

if TYPE_CHECKING:
    from causalrope_sp.pipeline.pipeline import CausalVideoPipeline

OPTIONS = (
    "history",
    "kept_chunks",
    "callback_on_step_end",
    "control",
    "image",
    "image_embeds",
    "reuse",
)  # that a resumed session takes


def read_resumed(path: str | PathLike[str], overrides: Collection[str]) -> SavedSession:
    """Reads the session to go on with.

    Args:
        path: the file.
        overrides: the names of the options of the call.

    Raises:
        CheckpointError: the file cannot be read, or is no saved session.
        ConfigError: the path is none, or there is no such option.
    """
    unknown = [name for name in overrides if name not in OPTIONS]
    if unknown:
        raise ConfigError(f"a resumed session has no option {', '.join(unknown)}; there are: {', '.join(OPTIONS)}")
    return read_session(check_path("path", path))


class ResumedGeneration(Generation):
    """A call that opens a stream which goes on from a saved session, with its size, window, steps and prompts.

    Args:
        pipe: the pipeline.
        saved: the session, of one file on all ranks.
        overrides: options of `OPTIONS`.
        streams: the open streams of the pipeline.

    Raises:
        ConfigError: the session does not fit the pipeline, or an option is unknown or wrong.
    """

    def __init__(
        self, pipe: CausalVideoPipeline, saved: SavedSession, overrides: dict[str, Any], streams: OpenStreams
    ) -> None:
        self._saved = saved
        latents = saved.latents.split([chunk.frames for chunk in saved.chunks], 1)
        self._kept = [(chunk, whole.clone()) for chunk, whole in zip(saved.chunks, latents, strict=True)]
        kept = {"history": saved.history, "kept_chunks": saved.kept_chunks, "num_frames": saved.num_frames}
        embeds = saved.embeds[saved.prompts[-1].id]
        options = {**kept, **overrides}
        request = pipe.parallel.everyone.run_collectively(lambda: GenerationOptions.of(prompt_embeds=embeds, **options))
        super().__init__(pipe, request, streams)

    @property
    def seed(self) -> int:
        return self._saved.seed

    def session(self) -> Session:
        """Opens the stream where it was. All ranks that denoise must call it."""
        session, saved = Session(self), self._saved
        ahead, dtype = self._kept[len(self._kept) - saved.ahead :], self._pipe.model.dtype
        made = []
        for chunk, latents in ahead:
            prompt = prompt_at(session.prompts, chunk.index - saved.first_chunk)
            part = LatentChunk(chunk, latents, FiniteCheck(chunk.index, latents, dtype))
            made.append(Made(part, prompt.prompt_id, 0.0))
        start = ahead[0][0].start if ahead else saved.next_frame
        try:
            state = None if saved.decoder is None else saved.decoder.state
            session.go_on(saved.shown, made, start, state, partial(self._latents_before, start))
        except BaseException:
            session.close()
            raise
        self.streams.add(session)
        return session

    def _prepare(self) -> None:
        saved, request, codec = self._saved, self._request, self.codec
        model, stride = self._pipe.model.config, codec.spatial_stride
        own, loras = self._pipe.model_digest, self._pipe.merged_loras
        check_fits(saved, model_digest=own, loras=loras, model=model, stride=stride, codec=codec.name)
        grid = LatentGrid.from_pixels(saved.height, saved.width, stride, model.patch_size[1:])
        self._settings = StreamSettings(saved.height, saved.width, grid, saved.sampler)
        self._seed, self._stream = saved.text_seed, saved.stream
        self._guided = any(guided_steps(saved.sampler))
        self._check()
        self._policy = None if request.reuse is None else find_policy(request.reuse)
        reuse = None if self._policy is None else repr(self._policy)
        if reuse != saved.reuse:
            raise ConfigError(f"reuse must be that of the saved session, {saved.reuse}, not {reuse}")
        if saved.decoder is not None:
            self._check_decoder(saved)

    def _condition(self) -> Conditioning:
        saved = self._saved
        if takes_image(self._pipe.model.config, self.codec):
            return super()._condition()
        latents = None if saved.conditioning is None else saved.conditioning.clone()
        if latents is not None and saved.stream.image_in_chunk and not saved.context_frames:
            return Conditioning(in_chunk=latents)
        return Conditioning(latents, saved.context_frames)

    def _check_decoder(self, saved: SavedSession) -> None:
        """Raises ConfigError unless the state is one of the codec for pictures of this size."""
        assert saved.decoder is not None, "the caller checks it"
        frames, size = saved.decoder.frames, (self.grid.latent_height, self.grid.latent_width)
        expected = self.codec.decoder_state_shapes(frames, 1, *size) if frames else {}
        found = {name: tuple(held.shape) for name, held in saved.decoder.state.frames.items()}
        wrong = [name for name in sorted(expected | found) if expected.get(name) != found.get(name)]
        if wrong:
            raise ConfigError(f"the saved decoder's state is not that of this codec and size: {some(wrong)}")

    def _described(self) -> dict[str, object]:
        saved, request = self._saved, self._request
        position = saved.seed, saved.next_chunk, saved.shown, saved.shots, saved.cache, saved.prompts
        return {
            "saved session": position,
            "saved latents": digest(saved.latents),
            "history": (request.history, request.kept_chunks),
            "reuse": self._policy,
        }

    def _encode(self) -> list[Tensor]:
        """The embeddings of the present text and, under guidance, of the negative prompt, each (1, L, E)."""
        saved = self._saved
        text = saved.embeds[saved.prompts[-1].id] if saved.texts is None else saved.texts.embeds[0]
        negative = [] if saved.negative_embeds is None else [saved.negative_embeds]
        # copies: products of what lies in a file, aligned otherwise, may differ in their last bits
        return [embeds.to(self.parallel.device, copy=True) for embeds in (text, *negative)]

    def saved_fields(self, seed: int) -> dict[str, Any]:
        return {**super().saved_fields(seed), "negative_prompt": self._saved.negative_prompt}

    def first_prompt(self) -> list[PromptChange]:
        """The prompts of the saved session."""
        saved, device = self._saved, self.parallel.device
        embeds = {number: tensor.to(device, copy=True) for number, tensor in saved.embeds.items()}
        return [PromptChange(use.id, use.first_chunk, use.prompt, embeds.get(use.id)) for use in saved.prompts]

    def open_loop(self) -> SteeredLoop:
        """Makes the stream of latents as it was. All ranks that denoise must call it, in a turn."""
        saved, loop = self._saved, super().open_loop()
        if self._calls is not None:
            self._calls.first_chunk = loop.first_chunk
        if loop.first_chunk != saved.first_chunk:
            raise ConfigError(
                f"the saved session has {saved.first_chunk} chunks that were given, the model begins with "
                f"{loop.first_chunk}"
            )
        if (cache := saved.cache) is None:
            loop.compute_anew()
        else:
            self.parallel.denoisers.run_collectively(lambda: restore_cache(loop, cache))
        if (texts := saved.texts) is not None:
            later = [text.to(self.parallel.device, copy=True) for text in texts.embeds[1:]]
            loop.later_texts = [(text, texts.recache, texts.recache_sink) for text in later]
        return loop

    def _initial(self) -> None:
        """None: what the stream began with is among what it has made."""

    def _resumed(self) -> Resumed:
        given = self.conditioning.latent_frames + self._prefix_frames()
        return Resumed(self._kept, self._saved.shots, given, self._saved.control)

    def _latents_before(self, start: int) -> Tensor:
        """The newest latent frames right before a frame, as many as a decoder reads again."""
        parts, first = list[Tensor](), start
        for chunk, whole in reversed(self._kept):
            if chunk.stop == first:
                parts.insert(0, whole)
                first = chunk.start
        latents = torch.cat(parts, 1)[:, -WARMING:]
        return latents[:, -max(1, start - self.frame_range.prefix) :]
