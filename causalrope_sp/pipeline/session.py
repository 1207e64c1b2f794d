"""`Session`: an open stream that its caller steers, takes back and forks between two chunks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from causalrope_sp.checks import check_flag, check_text, check_whole
from causalrope_sp.codec.conv_state import ConvState
from causalrope_sp.diffusion.noise import Noise
from causalrope_sp.distributed.stream_turns import StreamTurns
from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import Chunk
from causalrope_sp.pipeline.generation_options import LARGEST_SEED, MOST_CHUNKS, Embeds
from causalrope_sp.pipeline.open_stream import OpenStream
from causalrope_sp.pipeline.option_checks import check_path
from causalrope_sp.pipeline.output import Made
from causalrope_sp.pipeline.prompt_changes import PromptChange
from causalrope_sp.pipeline.session_saving import save_session
from causalrope_sp.pipeline.texts import described_embeds
from causalrope_sp.sampling.steered_loop import SteeredLoop

if TYPE_CHECKING:
    from causalrope_sp.pipeline.generation import Generation

T = TypeVar("T")
WARMING = 12  # latent frames that a decoder reads again where none is kept; what older ones left in it is negligible


class Session(OpenStream):
    """An open stream that can be steered, which `CausalVideoPipeline.open` makes.

    What is called between two chunks takes effect with the next one; where a chunk is made ahead (`decode="overlap"`),
    with the one after it. A call that fails leaves the session where it was.
    """

    def __init__(self, generation: Generation, turns: StreamTurns | None = None) -> None:
        super().__init__(generation, turns)
        self._seed = generation.seed

    def set_prompt(
        self,
        prompt: str | None = None,
        *,
        prompt_embeds: Embeds | None = None,
        recache: bool = True,
        recache_sink: bool = False,
        new_shot: bool | None = None,
        over_chunks: int = 1,
    ) -> int:
        """Changes the prompt of the following chunks.

        Args:
            prompt: the text; None with `prompt_embeds`.
            prompt_embeds: embeddings in place of the text, (1, text_len, text_dim), or a file of them.
            recache: whether the keys and values of the window are computed anew under the prompt from its clean
                latents, as in LongLive and Krea: one context pass for each of its chunks. Without, only the text that
                the following chunks attend changes.
            recache_sink: whether those of the sink are computed anew too.
            new_shot: whether the next frames become the sink, in place of the present one; None says yes in a stream
                whose `window_policy` is "multi-shot", and no in others.
            over_chunks: over how many chunks the embeddings move from the present prompt's to the new one's, in equal
                parts. With `recache` the window is computed anew for each of them.

        Returns:
            The number of the prompt, which the chunks made under it have as `prompt_id`.

        Raises:
            PromptError: the text encoder does not know the prompt's words.
            ConfigError: there are neither or both of a prompt and embeddings, or an option is wrong.
        """

        def checked() -> int:
            shot = False if new_shot is None else new_shot
            for name, flag in (("recache", recache), ("recache_sink", recache_sink), ("new_shot", shot)):
                check_flag(name, flag)
            if prompt is not None:
                check_text("prompt", prompt)
            if (prompt is None) == (prompt_embeds is None):
                raise ConfigError("give either a prompt or its embeddings (prompt_embeds)")
            asked.append(described_embeds(prompt_embeds))
            return check_whole("over_chunks", over_chunks, most=MOST_CHUNKS)

        asked: list[object] = [prompt, over_chunks, recache, recache_sink, new_shot]
        with self._operation("changes its prompt", checked, asked) as count:
            embeds = self._generation.encode_prompt(prompt, prompt_embeds)
            loop, last = self._begun(), self.prompts[-1]
            parts = [
                torch.lerp(loop.text.to(embeds.device).double(), embeds.double(), number / count).to(embeds.dtype)
                for number in range(1, count)
            ]
            multi_shot = loop.options.stream.window_policy == "multi-shot"
            none_made = loop.chunks_made == 0  # then nothing was made under the prompt before
            loop.set_text(
                [*parts, embeds],
                recache=recache or none_made,
                recache_sink=recache_sink or none_made,
                new_shot=(multi_shot if new_shot is None else new_shot) and not none_made,
            )
            change = PromptChange(last.prompt_id + 1, loop.chunks_made, prompt, embeds)
            self.prompts[:] = [*(p for p in self.prompts if p.first_chunk < change.first_chunk), change]
            self._forget_embeds(loop)
        return change.prompt_id

    def _forget_embeds(self, loop: SteeredLoop) -> None:
        """Lets the embeddings go of prompts that the session cannot be taken back to; it can to its very beginning."""
        oldest = min((part.chunk.index for part in loop.kept.newest()), default=0) - loop.first_chunk
        for number, (prompt, later) in enumerate(pairwise(self.prompts)):
            if number and later.first_chunk < oldest:
                self.prompts[number] = replace(prompt, embeds=None)

    def rewind(self, chunks: int) -> bool:
        """Takes the last chunks back. The next chunk is made again, under the prompt of the chunk before it.

        Args:
            chunks: how many.

        Returns:
            Whether the session is as it was, bit for bit, which it is within the `history` that it was opened with and
            back to the last prompt change with `recache`. If not, the window's keys and values were computed anew from
            its clean latents.

        Raises:
            ConfigError: fewer chunks were made, or the latents from which to go on are not kept any more.
        """

        def checked() -> Chunk:
            self._check_source("taken back")
            if check_whole("chunks", chunks) > self._index:
                raise ConfigError(f"chunks must be at most {self._index}, which were made, not {chunks}")
            loop = self._begun()
            return loop.chunk_before(loop.chunks_made - self._index + chunks)

        with self._operation("is taken back", checked, chunks) as chunk:
            assert self._source is not None, "an operation begins the session"
            assert self._decoder is not None, "an operation begins the session"
            loop, decoder, target = self._begun(), self._decoder.fork(), self._index - chunks
            prompts = [p for p in self.prompts if p.first_chunk < max(1, target)]
            embeds = prompts[-1].embeds
            assert embeds is not None, "those of the prompts of the latents that are kept are kept too"
            before = partial(loop.latents_before, chunk.start, decoder.frame_range.prefix, WARMING)
            decoded = decoder.rewind(chunk, before)
            exact = loop.rewind(loop.chunks_made - target, embeds)
            self._source.drop()
            self._decoder, self.prompts[:], self._index, self._ended = decoder, prompts, target, False
        return self._parallel.denoisers.all_say(exact and decoded)

    def fork(self, seed: int | None = None) -> Session:
        """Returns a session that goes on from here by itself. Both share the cache until one of them writes it.

        Args:
            seed: of its noise from here on; None makes the same chunks.

        Raises:
            ConfigError: the seed is out of range, or another session does not fit into memory.
        """
        generation = self._generation

        def checked() -> Noise | None:
            self._check_source("forked")
            if generation.plan is not None:
                generation.plan.check()
            return None if seed is None else generation.noise(check_whole("seed", seed, 0, LARGEST_SEED))

        with self._operation("is forked", checked, seed) as noise:
            assert self._source is not None, "an operation begins the session"
            assert self._decoder is not None, "an operation begins the session"
            fork = Session(generation, self._parallel.open_stream(generation.works_ahead))
            fork._loop, fork._decoder = self._begun().fork(noise), self._decoder.fork()
            fork.prompts[:], fork._index = self.prompts, self._index
            fork._seed = self._seed if seed is None else seed
            fork._source = fork._open_source(None)
            for made in reversed(self._source.settle()):
                fork._source.put_back((made, None))
        generation.streams.add(fork)
        return fork

    def save(self, path: str | os.PathLike[str], *, cache: bool = True) -> None:
        """Writes the session to a file, from which `CausalVideoPipeline.resume` goes on; this one goes on as well.

        All ranks call it, and rank 0 writes. The chunks that follow are those of an uninterrupted session, bit for bit
        on as many ranks with the same strategy and dtype. What `history` keeps is not saved.

        Args:
            path: the file. One that is there is replaced when the new one is complete.
            cache: whether keys and values are saved too. The file is several times larger with them; without, whoever
                resumes computes them anew from the clean latents, under the present prompt.

        Raises:
            OutputError: the file cannot be written; the session goes on.
            ConfigError: no chunk was made yet, the newest one is not finite, a video is redrawn, or the session is
                closed.
        """

        def checked() -> str:
            self._check_source("saved")
            check_flag("cache", cache)
            if cache and self._generation.two_models:
                raise ConfigError("cache must be False for a model of two transformers, whose caches are not saved")
            if not self._index:
                raise ConfigError("a session can be saved once a chunk was made, and none was")
            if (newest := self._begun().unread) is not None:
                newest.read()
            return check_path("path", path)

        with self._operation("is saved", checked, cache) as file:
            assert self._decoder is not None, "an operation begins the session"
            codec, fields = self._generation.codec.name, partial(self._generation.saved_fields, self._seed)
            loop, prompts = self._begun(), self.prompts
            save_session(file, loop, self._decoder, codec, prompts, fields, self._index, cache=cache)

    def go_on(
        self,
        shown: int,
        ahead: Sequence[Made],
        start: int,
        state: ConvState | None,
        latents_before: Callable[[], Tensor],
    ) -> None:
        """Goes on where a saved session was, before the first call of this one.

        Args:
            shown: how many chunks that one had shown.
            ahead: the chunks that it had made and not shown.
            start: the global time index of the next frame to decode.
            state: what its decoder had kept; None without.
            latents_before: returns the latent frames before `start`, (B, F, C, H, W), for a decoder without a state.
        """
        with self._operation("is resumed", lambda: None, shown):
            assert self._source is not None, "an operation begins the session"
            assert self._decoder is not None, "an operation begins the session"
            self._decoder.resume(start, state, latents_before)
            self._index = shown
            for made in reversed(ahead):
                self._source.put_back((made, None))

    @property
    def turns(self) -> StreamTurns:
        """The turns of the stream."""
        return self._turns

    @property
    def has_begun(self) -> bool:
        """Whether it computes with the weights of the model already."""
        return self._source is not None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps other calls out while the body runs, between two chunks."""
        with self._working():
            yield

    def rested(self) -> SteeredLoop:
        """Returns the stream of latents once nothing is being made; within `held` and a turn.

        Raises:
            ConfigError: the chunks of the video are made in parallel.
        """
        if self._loop is None or self._source is None:
            raise ConfigError("a video whose chunks are made in parallel cannot be changed while it is made")
        self._source.settle()
        return self._loop

    @contextmanager
    def _operation(self, what: str, check: Callable[[], T], arguments: object) -> Iterator[T]:
        """Runs the body, which changes the session, when all ranks are about to change it so.

        Args:
            what: what happens to the session.
            check: checks the arguments; an error of one rank ends the call on all, before anything has changed.
            arguments: what must be the same on all ranks.

        Yields:
            What `check` returned.
        """
        if self._parallel.mesh.decode:
            raise ConfigError(f"a session with decode ranks goes on as it began: none of them {what}")
        if self._generation.is_parallel:
            raise ConfigError("a video whose chunks are made in parallel cannot be steered")
        with self._working(), self._turns.operation(what):
            self._begin()
            assert self._source is not None, "`_begin` opens it"
            self._source.settle()
            checked = self._parallel.denoisers.run_collectively(check)
            self._parallel.denoisers.agree({what: arguments})
            yield checked

    def _check_source(self, what: str) -> None:
        """Raises ConfigError if the session redraws a video, which is read once."""
        if self._generation.conditioning.source is not None:
            raise ConfigError(f"a session that redraws a video cannot be {what}: the video is read once")

    @property
    def loop(self) -> SteeredLoop:
        """The stream of latents, from the first chunk on, on a rank that denoises."""
        return self._begun()

    def _begun(self) -> SteeredLoop:
        assert self._loop is not None, "an operation begins the session"
        return self._loop
