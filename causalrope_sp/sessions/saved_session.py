"""What a session is between two chunks, as a file holds it. Its fields are checked against each other.

Shapes: B batch, F latent frames, C channels, H×W latent size, L tokens of a text, E its width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from causalrope_sp.checks import check_choice, check_fields, check_text, check_whole, shown
from causalrope_sp.config import DTYPE_NAMES, SamplerConfig, StreamConfig
from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import Chunk
from causalrope_sp.sessions.saved_parts import (
    DTYPES,
    LARGEST_INDEX,
    PromptUse,
    SavedCache,
    SavedDecoder,
    check_rising,
    check_tensor,
    writable,
)
from causalrope_sp.version import __version__

_LARGEST_SIDE = 2**16  # pixels


@dataclass(frozen=True, eq=False)
class SavedSession:
    """What a session is between two chunks.

    Args:
        model_digest: `weights.digest.digest` of the model.
        height: of a pixel frame, in pixels.
        width: of a pixel frame, in pixels.
        dtype: the name of the model's dtype.
        stream: the stream's configuration.
        sampler: the sampler's.
        seed: of the noise.
        next_chunk: the number of the next chunk.
        next_frame: the global time index of its first latent frame.
        prompts: the history of prompts, in order.
        embeds: embeddings, (B, L, E), by the id of each prompt that is still needed, the newest among them.
        latents: the clean latents that are kept, (B, F, C, H, W), in float32 or float64.
        chunks: the chunks, or parts of chunks, that these are, in order of time; the last one ends before `next_frame`.
        negative_prompt: the negative prompt; None without one.
        negative_embeds: its embeddings, (B, L, E); None without guidance.
        shots: the global time indices at which shots begin, in order.
        oldest: frames before this global time index are not in the window, but for a sink.
        kept_shot: where a shot begins; the sinks of shots before it are not in the window.
        cache: the keys and values; None to compute them from the latents.
        decoder: the codec's state; None without.
        library: the version of the library that wrote it.

    Raises:
        ConfigError: a field is out of bounds, or contradicts another one.
    """

    model_digest: str
    height: int
    width: int
    dtype: str
    stream: StreamConfig
    sampler: SamplerConfig
    seed: int
    next_chunk: int
    next_frame: int
    prompts: tuple[PromptUse, ...]
    embeds: Mapping[int, Tensor]
    latents: Tensor
    chunks: tuple[Chunk, ...]
    negative_prompt: str | None = None
    negative_embeds: Tensor | None = None
    shots: tuple[int, ...] = (0,)
    oldest: int = 0
    kept_shot: int = 0
    cache: SavedCache | None = None
    decoder: SavedDecoder | None = None
    library: str = __version__

    def __post_init__(self) -> None:
        if not re.fullmatch("[0-9a-f]{16}", check_text("the model's digest", self.model_digest)):
            raise ConfigError(f"the model's digest must be 16 hexadecimal digits, not {shown(self.model_digest)}")
        check_fields(self, ["height", "width"], most=_LARGEST_SIDE)
        check_choice("the model's dtype", self.dtype, DTYPE_NAMES)
        check_fields(self, ["seed"], least=-(LARGEST_INDEX**2), most=LARGEST_INDEX**2)
        check_fields(self, ["next_chunk", "next_frame"], least=0, most=LARGEST_INDEX)
        check_text("the version of the library", self.library)
        object.__setattr__(self, "negative_prompt", writable("the negative prompt", self.negative_prompt))
        self._check_latents()
        self._check_window()
        self._check_prompts()
        self._check_parts()

    def _check_latents(self) -> None:
        check_tensor("latents", self.latents, "B F C H W", (torch.float32, torch.float64), empty="F")
        _, frames, _, *size = self.latents.shape
        if any(pixels % latent for pixels, latent in zip((self.height, self.width), size)):
            raise ConfigError(
                f"latents of {size[0]}×{size[1]} are not those of frames of {self.height}×{self.width} pixels"
            )
        for chunk in self.chunks:
            for number in (chunk.index, chunk.start, chunk.frames):
                check_whole("a number of a kept chunk", number, 0, LARGEST_INDEX)
        ordered = all(a.stop <= b.start and a.index <= b.index for a, b in pairwise(self.chunks))
        if not ordered or sum(chunk.frames for chunk in self.chunks) != frames:
            raise ConfigError(f"{frames} latent frames are not the kept chunks, {shown(self.chunks)}")
        stop, index = (self.chunks[-1].stop, self.chunks[-1].index) if self.chunks else (0, -1)
        if (stop, index + 1) != (self.next_frame, self.next_chunk):
            raise ConfigError(
                f"chunk {self.next_chunk} at latent frame {self.next_frame} does not follow the last kept one, "
                f"{index} up to frame {stop}"
            )

    def _check_window(self) -> None:
        check_fields(self, ["oldest", "kept_shot"], least=0, most=self.next_frame)
        check_rising("shots must begin", self.shots, self.next_frame)

    def _check_prompts(self) -> None:
        check_rising("prompts must hold from", [use.first_chunk for use in self.prompts], self.next_chunk)
        ids = [use.id for use in self.prompts]
        if ids[-1] not in self.embeds or not set(self.embeds) <= set(ids):
            given = f"not of {shown(list(self.embeds))}"
            raise ConfigError(f"embeddings must be those of prompts {shown(ids)}, the last among them, {given}")
        held = {f"the embeddings of prompt {number}": embeds for number, embeds in self.embeds.items()}
        if self.negative_embeds is not None:
            held["the negative embeddings"] = self.negative_embeds
        expected = (len(self.latents), *next(iter(held.values())).shape[1:])
        for what, embeds in held.items():
            check_tensor(what, embeds, "B L E", DTYPES.values())
            if embeds.shape != expected:
                raise ConfigError(f"{what} are {tuple(embeds.shape)}, expected {tuple(expected)}")

    def _check_parts(self) -> None:
        cache, (batch, _, _, height, width) = self.cache, self.latents.shape
        if cache is not None:
            if cache.batch != batch or height * width % cache.tokens:
                raise ConfigError(
                    f"a cache of batch {cache.batch} with {cache.tokens} tokens a frame is not that of latents "
                    f"{tuple(self.latents.shape)}"
                )
            if any(frame >= self.next_frame for frame in cache.frames if frame is not None):
                raise ConfigError(f"the cache holds frames from {self.next_frame} on, which are still to be made")
        if self.decoder is not None and self.decoder.frames > self.next_frame:
            raise ConfigError(f"the decoder has had {self.decoder.frames} of {self.next_frame} latent frames")
