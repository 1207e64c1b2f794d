"""`OpenStream`: an open stream of a pipeline, whose chunks are made when the caller asks for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from torch import Tensor

from causalrope_sp.distributed.stream_turns import StreamTurns
from causalrope_sp.errors import CausalRopeError, ConfigError
from causalrope_sp.pipeline.decoding import frames_of, run_decode_worker
from causalrope_sp.pipeline.numerics import own_numerics
from causalrope_sp.pipeline.output import ChunkDecoder, Made, VideoChunk
from causalrope_sp.pipeline.prefetch import OnDemand, Prefetch
from causalrope_sp.pipeline.prompt_changes import PromptChange, prompt_at
from causalrope_sp.pipeline.timings import Timings
from causalrope_sp.sampling.chunk import LatentChunk
from causalrope_sp.sampling.settled import SettledWeights

if TYPE_CHECKING:
    from causalrope_sp.pipeline.generation import Generation
    from causalrope_sp.sampling.steered_loop import SteeredLoop


BUSY = "another thread is in a call of this session: let one thread at a time call it"


class OpenStream:
    """An open stream. On several ranks each has one and makes the same calls.

    Iterating it makes chunks until the video is complete. Between two chunks the caller may wait for as long as it
    likes. A call that fails leaves the stream where it was.

    Attributes:
        prompts: the prompts so far, in order.
    """

    def __init__(self, generation: Generation, turns: StreamTurns | None = None) -> None:
        self._generation, self._parallel = generation, generation.parallel
        self._turns = turns or generation.turns
        self._taken: AbstractContextManager[None] | None = None
        self._worker: Generator[int] | None = None  # on a rank that only decodes
        self._shown = 0  # pixel frames that it has decoded
        self._loop: SteeredLoop | None = None  # from the first call on, on a rank that denoises
        self._source: OnDemand[Made] | None = None  # likewise
        self._decoder: ChunkDecoder | None = None  # likewise
        self._index, self._closed, self._ended = 0, False, False
        self._lock = threading.Lock()  # held during a call
        self._caller: int | None = None  # the thread that holds it
        self.prompts: list[PromptChange] = generation.first_prompt()

    def step(self, control: Tensor | None = None) -> VideoChunk:
        """Makes the next chunk.

        Args:
            control: the control of the chunk's latent frames, (1, F, channels, H, W), for a model that takes one; see
                `GenerationOptions.control`, in whose place it stands for this chunk. All ranks give the same.

        Returns:
            The chunk, with frames on rank 0.

        Raises:
            StopIteration: the video is complete.
            ConfigError: the session is closed, ranks make different calls, or the model takes no such control.
            RankLostError: another rank has ended or failed.
        """
        made = self._step(control)
        if made is None:
            raise StopIteration
        return made

    def _step(self, control: Tensor | None = None) -> VideoChunk | None:
        """Makes the next chunk; returns None if the video is complete."""
        if control is not None and self._generation.works_ahead:
            raise ConfigError("control must be a function given to `open` where chunks are made ahead of their `step`")
        started, made = time.perf_counter(), None
        try:
            with self._working():
                if self._parallel.decodes:
                    made = self._follow(started)
                elif not self.is_complete:
                    with self._turns.chunk("" if control is None else " with a control"):
                        made = self._next(started, time.perf_counter(), control)
        except StopIteration as error:  # to whoever iterates it would be the end of the video
            raise RuntimeError("a function of the caller raised StopIteration while a chunk was made") from error
        self._ended = made is None
        return made

    def __iter__(self) -> Iterator[VideoChunk]:
        return self

    def __next__(self) -> VideoChunk:
        return self.step()

    @property
    def is_complete(self) -> bool:
        """Whether the video has all its frames."""
        if self._ended or self._decoder is None:
            return self._ended
        return self._decoder.shown == self._decoder.frame_range.length

    @property
    def is_open(self) -> bool:
        """Whether more chunks can be made."""
        return not (self._closed or self.is_complete)

    @property
    def planned_bytes(self) -> int:
        """What the stream keeps on this rank between two chunks once its window is full, in bytes, as `plan` predicts
        it."""
        plan = self._generation.plan
        return 0 if plan is None else plan.bytes

    @property
    def settled(self) -> tuple[SettledWeights, ...] | None:
        """How the stream computes the model; None before it begins."""
        return None if self._loop is None else self._loop.settled

    def tensors(self) -> Iterator[Tensor]:
        """Yields what the stream keeps on this rank between two chunks. Some may share their memory."""
        if self._loop is not None:
            yield from self._loop.tensors()
            yield from (prompt.embeds for prompt in self.prompts if prompt.embeds is not None)
        if self._decoder is not None:
            yield from self._decoder.tensors()

    @property
    def next_index(self) -> int:
        """The number of the next chunk."""
        return self._index

    def close(self) -> None:
        """Ends the session and frees what it holds. A closed session stays closed.

        Raises:
            ConfigError: a callback of the session calls it.
        """
        if not self._closed:
            self._check_caller()
        self._leave(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_taken", None) is not None or getattr(self, "_source", None) is not None:
            self._leave(None, wait=False)

    def frames(self) -> Generator[VideoChunk]:
        """Yields the remaining chunks and closes the session."""
        try:
            while not self.is_complete and (chunk := self._step()) is not None:
                yield chunk
        except BaseException as error:
            self._leave(error)
            raise
        self._leave(None)

    def _check_caller(self) -> None:
        """Raises ConfigError while another call of the session runs, in this thread or another one."""
        if self._caller == threading.get_ident() or (self._source is not None and self._source.is_made_here()):
            raise ConfigError("a callback cannot call its session: call it between two chunks")
        if self._lock.locked():
            raise ConfigError(BUSY)

    @contextmanager
    def _working(self) -> Iterator[None]:
        if self._closed:
            raise ConfigError("the session is closed")
        self._check_caller()
        if not self._lock.acquire(blocking=False):
            raise ConfigError(BUSY)
        self._caller = threading.get_ident()
        try:
            if self._taken is None and not self._parallel.decodes:
                taken = self._turns.taken()
                taken.__enter__()
                self._taken = taken
            with own_numerics(), torch.inference_mode():
                yield
        finally:
            self._caller = None
            self._lock.release()

    def _next(self, started: float, entered: float, control: Tensor | None) -> VideoChunk | None:
        self._begin()
        assert self._source is not None, "`_begin` opens it"
        assert self._decoder is not None, "`_begin` opens it"
        taken = self._source.take() if control is None else self._take_under(control)
        if taken is None:
            return None
        made, ready = taken
        first, decoding = self._decoder.shown, time.perf_counter()
        decoder = self._decoder

        def decode() -> np.ndarray | None:
            if decoder.frame_range.stop(made.part.chunk.stop) == decoder.frame_range.length:
                made.part.check_finite()  # of every other chunk that is known once the next one has been denoised
            return decoder.decode(made.part, ready)

        try:  # a thread that makes chunks has the ranks' collectives for itself
            pixels = decode() if self._generation.works_ahead else self._parallel.denoisers.run_collectively(decode)
        except BaseException:
            decoder.refuse()
            self._source.put_back(taken)
            raise
        decoder.accept()
        now = time.perf_counter()
        timings = Timings(made.seconds, now - decoding, entered - started, now - started)
        self._index += 1
        return VideoChunk(self._index - 1, first, pixels, made.prompt_id, timings, self._parallel.comm_stats.take())

    def _take_under(self, control: Tensor) -> tuple[Made, torch.cuda.Event | None] | None:
        """Takes the next chunk, which is made under a control, or was by a call that failed later."""
        assert self._source is not None, "`_begin` opens it"
        if self._loop is None:
            raise ConfigError("control must be None: chunks that are made in parallel take none")
        if held := self._source.settle():
            self._loop.check_made_under(held[0].part.chunk, control)
        return self._source.take(control)

    def _follow(self, started: float) -> VideoChunk | None:
        """Decodes the next chunk on a rank that only decodes."""
        if self._worker is None:
            generation = self._generation
            self._worker = run_decode_worker(generation.codec, self._parallel, generation.grid, self._turns)
        frames = next(self._worker, None)
        if frames is None:
            return None
        seconds, first = time.perf_counter() - started, self._shown
        self._shown, self._index = first + frames, self._index + 1
        timings = Timings(0.0, seconds, 0.0, seconds)
        return VideoChunk(self._index - 1, first, None, 0, timings, self._parallel.comm_stats.take())

    def _begin(self) -> None:
        """Makes the stream and its decoder, in the first turn, so that videos that wait take no memory."""
        if self._source is not None:
            return
        with self._generation.streams.beginning if self._parallel.size == 1 else nullcontext():
            self._make()

    def _make(self) -> None:
        """Makes them, while no other thread changes the weights."""
        generation, chunks = self._generation, None
        frames = frames_of(generation.codec, self._parallel, generation.grid, generation.decode, self._turns)
        self._decoder = ChunkDecoder(
            frames,
            generation.frame_range,
            self._parallel.device,
            generation.history,
            keeps=generation.can_go_back,
        )
        if generation.is_parallel:
            chunks = generation.parallel_chunks()
        else:
            self._loop = generation.open_loop()
        self._source = self._open_source(chunks)

    def _open_source(self, chunks: Generator[LatentChunk] | None) -> OnDemand[Made]:
        loop, prompts = self._loop, self.prompts  # not the session, which a thread would keep

        def make(control: Tensor | None = None) -> Made | None:
            begun = time.perf_counter()
            if loop is None:
                assert chunks is not None, "a stream without a loop is a generator"
                number, part = 0, next(chunks, None)
            else:
                part = None if loop.next_chunk is None else loop.step(control)
                number = 0 if part is None else part.chunk.index - loop.first_chunk
            if part is None:
                return None
            return Made(part, prompt_at(prompts, number).prompt_id, time.perf_counter() - begun)

        if self._generation.works_ahead:
            return Prefetch(torch.inference_mode()(make), self._parallel.device, self._parallel.turns.stops)
        return OnDemand(make)

    def _leave(self, error: BaseException | None, wait: bool = True) -> None:
        """Ends the work, tells decode ranks the end of the video, and the other ranks if it is left before its end."""
        if self._closed:
            return
        self._closed = True
        if self._worker is not None:
            self._worker.close()
        if self._source is not None:
            self._source.close(wait)
        if self._loop is not None:
            self._loop.branches.close()
        if self._decoder is not None and (error is None or isinstance(error, GeneratorExit | CausalRopeError)):
            self._decoder.frames.close()
        if self._taken is not None:
            early = GeneratorExit() if error is None and not self.is_complete else error
            self._taken.__exit__(None if early is None else type(early), early, None)
            self._taken = None
        self._source = self._decoder = self._loop = None
