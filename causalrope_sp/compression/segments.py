"""The streams of latents of a compressed video: one for each segment, from a refresh to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

import torch
from torch import Tensor

from causalrope_sp.compression.bitstream import Header
from causalrope_sp.compression.codebook import Codebook
from causalrope_sp.compression.coded_loop import CodedLoop
from causalrope_sp.compression.residual import check_constriction
from causalrope_sp.config import SamplerConfig, StreamConfig
from causalrope_sp.errors import ConfigError, InputError
from causalrope_sp.grid import Chunk
from causalrope_sp.pipeline.numerics import own_numerics
from causalrope_sp.pipeline.session_plan import SessionPlan
from causalrope_sp.pipeline.texts import encode_all
from causalrope_sp.sampling.chunk import LatentChunk
from causalrope_sp.sampling.settled import SettledWeights
from causalrope_sp.sampling.stream_options import StreamOptions
from causalrope_sp.sessions.session_metadata import config_of

if TYPE_CHECKING:
    from causalrope_sp.pipeline.pipeline import CausalVideoPipeline

Loop = TypeVar("Loop", bound=CodedLoop)


class Segments(Generic[Loop]):
    """Makes the chunks of a video, segment after segment. All ranks make the same calls.

    Attributes:
        begins: whether the newest chunk is the first one of a segment.

    Args:
        pipe: the pipeline.
        kind: the class of the loops.
        header: the header of the video.

    Raises:
        ConfigError: the pipeline cannot code videos, or its memory does not suffice.
        InputError: the settings in the header are wrong.
    """

    def __init__(self, pipe: CausalVideoPipeline, kind: type[Loop], header: Header) -> None:
        if pipe.parallel.mesh.decode:
            raise ConfigError("decode_ranks of the mesh must be 0: rank 0 decodes compressed videos")
        if header.exact and (pipe.device.type, pipe.model.dtype) != ("cpu", torch.float64):
            raise ConfigError("exact compression is computed in float64 on a CPU: load the pipeline so")
        stream, sampler = parse_settings(header.settings)
        if sampler.solver != "renoise" or sampler.guidance_scale != 1:
            raise ConfigError("compression puts bits into fresh noise: the solver must be renoise, without guidance")
        if sampler.first_steps or pipe.parts.low_noise is not None:
            raise ConfigError("compression needs the same steps in all chunks, of one transformer")
        if len(sampler.steps) < 2:
            raise ConfigError("compression puts bits into noise between two steps: the sampler must have at least 2")
        if stream.window is None:
            raise ConfigError("compression needs a model with a window: load it with window=")
        if pipe.model.config.control_channels:
            raise ConfigError("compression needs a model that takes no control: control_channels must be 0")
        if header.residual:
            check_constriction()
        own = pipe.settings()
        settings = replace(own, sampler=sampler)
        self._plan = SessionPlan.of(pipe, pipe.open_streams, settings, stream, history=0, kept_chunks=0)
        self._pipe, self._kind, self._header, self._grid = pipe, kind, header, own.grid
        self._size = pipe.model.config.in_channels, self._grid.latent_height, self._grid.latent_width
        self._options = StreamOptions(
            stream=stream,
            sampler=sampler,
            initial_latents=pipe.text.opening(*self._size),
            layout=self._plan.layout,
            graphs=pipe.parts.options.graphs,
            settled=pipe.open_streams.settled,
        )
        self._texts: dict[bool, Tensor] = {}
        self._turns, self._made = pipe.parallel.open_stream(), 0
        self._loop: Loop | None = None
        self.begins = self.is_open = True

    @property
    def loop(self) -> Loop:
        """The loop of the present segment."""
        assert self._loop is not None, "the first step opens it"
        return self._loop

    @property
    def planned_bytes(self) -> int:
        """What the stream keeps on this rank between two chunks, in bytes, as `plan` predicts it."""
        return self._plan.bytes

    @property
    def settled(self) -> tuple[SettledWeights, ...] | None:
        """How the stream computes the model; None before it begins."""
        return self._options.settled

    def tensors(self) -> Iterator[Tensor]:
        """Yields what the stream keeps on this rank between two chunks."""
        yield from () if self._loop is None else self._loop.tensors()

    def __enter__(self) -> Self:
        self._taken = self._turns.taken()
        self._taken.__enter__()
        self._pipe.open_streams.add(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.is_open, self._loop = False, None
        self._taken.__exit__(kind, error, trace)

    def step(self, prepare: Callable[[Loop], None]) -> LatentChunk:
        """Makes the next chunk.

        Args:
            prepare: is called with the loop that makes it.
        """
        with own_numerics(), torch.inference_mode(), self._turns.chunk():
            self.begins = not self._made % self._header.refresh if self._header.refresh else not self._made
            if self._loop is None or self.begins:
                self._loop = None  # its memory is free before the next one takes as much
                self._loop = self._open()
            prepare(self._loop)
            made = self._loop.step()
            self._made += 1
            return made

    def _open(self) -> Loop:
        header, pipe = self._header, self._pipe
        later = self._made > 0  # then the text's starts are not those where the segment begins
        if later not in self._texts:
            (self._texts[later],) = encode_all(pipe, header.text_seed, later, [(header.prompt, None)])
        codebook = Codebook(header.seed, self._made, header.atoms, self._size)
        arguments = pipe.model, self._texts[later], _no_noise, self._grid, None, pipe.parallel, self._options
        loop = self._kind(codebook, header.residual, *arguments)
        self._options = replace(self._options, settled=loop.settled)
        return loop


def settings_of(stream: StreamConfig, sampler: SamplerConfig) -> dict[str, Any]:
    """Returns the fields that do not have their default, as JSON has them."""
    found = {
        each.name: (getattr(config, each.name), each.default) for config in (stream, sampler) for each in fields(config)
    }
    changed = {name: value for name, (value, default) in found.items() if value != default}
    if stream.heads is not None:
        changed["heads"] = {name: list(map(list, table)) for name, table in stream.heads.fields.items()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()}


def parse_settings(settings: dict[str, Any]) -> tuple[StreamConfig, SamplerConfig]:
    """Returns the configurations that `settings_of` was given.

    Raises:
        InputError: they are no such settings.
    """
    of_stream = {each.name for each in fields(StreamConfig)}
    stream = {name: value for name, value in settings.items() if name in of_stream}
    try:
        rest = {name: value for name, value in settings.items() if name not in of_stream}
        return config_of(StreamConfig, stream), config_of(SamplerConfig, rest)
    except ConfigError as reason:
        raise InputError(f"the settings in the header are wrong: {reason}") from None


def _no_noise(chunk: Chunk, step: int) -> Tensor:
    raise AssertionError("a coded loop draws its own noise")
