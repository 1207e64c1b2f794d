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
from causalrope_sp.sessions.part_checks import check_rising, check_tensor, writable
from causalrope_sp.sessions.saved_parts import (
    DTYPES,
    LARGEST_INDEX,
    PromptUse,
    SavedBranch,
    SavedCache,
    SavedDecoder,
    SavedTexts,
)
from causalrope_sp.version import __version__

_LARGEST_SIDE = 2**16  # pixels
_LONGEST_HISTORY = 2**20  # chunks


@dataclass(frozen=True, eq=False)
class SavedSession:
    """What a session is between two chunks.

    Args:
        model_digest: `weights.checkpoint_digest` of the model's files.
        height: of a pixel frame, in pixels.
        width: of a pixel frame, in pixels.
        dtype: the name of the model's dtype.
        stream: the stream's configuration.
        sampler: the sampler's.
        seed: of the noise.
        text_seed: from which a text encoder draws what a prompt leaves open.
        num_frames: pixel frames of the video; None for one without end.
        first_chunk: the number of the first chunk that was generated.
        shown: how many chunks were decoded; those after them are the newest kept ones.
        next_chunk: the number of the next chunk.
        next_frame: the global time index of its first latent frame.
        prompts: the history of prompts, in order.
        embeds: embeddings, (B, L, E), by the id of each prompt that is still needed, the newest among them.
        texts: the texts of a change of the prompt that is not over; None without.
        control: the control of the frames of `latents`, (B, F, control channels, H, W); None for a model without.
        latents: the clean latents that are kept, (B, F, C, H, W), in float32 or float64.
        chunks: the chunks, or parts of chunks, that these are, in order of time; the last one ends before `next_frame`.
        negative_prompt: the negative prompt; None without one.
        negative_embeds: its embeddings, (B, L, E); None without guidance.
        shots: the global time indices at which shots begin, in order.
        conditioning: the latents of an image or a video that the session began with, (B, F, C, H, W); None without.
        context_frames: how many pixel frames of these are no part of the video.
        reuse: the policy of reuse between steps, in words; None without.
        loras: the LoRAs that were merged into the model, as texts, in order.
        history: how many chunks could be taken back bit for bit.
        kept_chunks: of how many chunks beyond the window latents were kept.
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
    text_seed: int
    num_frames: int | None
    first_chunk: int
    shown: int
    next_chunk: int
    next_frame: int
    prompts: tuple[PromptUse, ...]
    embeds: Mapping[int, Tensor]
    latents: Tensor
    chunks: tuple[Chunk, ...]
    texts: SavedTexts | None = None
    control: Tensor | None = None
    negative_prompt: str | None = None
    negative_embeds: Tensor | None = None
    shots: tuple[int, ...] = (0,)
    conditioning: Tensor | None = None
    context_frames: int = 0
    reuse: str | None = None
    loras: tuple[str, ...] = ()
    history: int = 0
    kept_chunks: int = 0
    cache: SavedCache | None = None
    decoder: SavedDecoder | None = None
    library: str = __version__

    def __post_init__(self) -> None:
        if not re.fullmatch("[0-9a-f]{16}", check_text("the model's digest", self.model_digest)):
            raise ConfigError(f"the model's digest must be 16 hexadecimal digits, not {shown(self.model_digest)}")
        check_fields(self, ["height", "width"], most=_LARGEST_SIDE)
        check_choice("the model's dtype", self.dtype, DTYPE_NAMES)
        check_fields(self, ["seed", "text_seed"], least=-(LARGEST_INDEX**2), most=LARGEST_INDEX**2)
        check_fields(self, ["next_chunk", "next_frame", "context_frames"], least=0, most=LARGEST_INDEX)
        check_fields(self, ["history", "kept_chunks"], least=0, most=_LONGEST_HISTORY)
        check_fields(self, ["first_chunk"], least=0, most=self.next_chunk)
        check_fields(self, ["shown"], least=0, most=self.next_chunk - self.first_chunk)
        if self.num_frames is not None:
            check_fields(self, ["num_frames"], most=LARGEST_INDEX)
        check_text("the version of the library", self.library)
        object.__setattr__(self, "negative_prompt", writable("the negative prompt", self.negative_prompt))
        object.__setattr__(self, "reuse", writable("the policy of reuse", self.reuse))
        object.__setattr__(self, "loras", tuple(check_text("a LoRA", lora) for lora in self.loras))
        self._check_latents()
        check_rising("shots must begin", self.shots, self.next_frame)
        self._check_prompts()
        self._check_parts()

    @property
    def ahead(self) -> int:
        """How many chunks were made and not decoded."""
        return self.next_chunk - self.first_chunk - self.shown

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
        ahead = [chunk.index for chunk in self.chunks[len(self.chunks) - self.ahead :]]
        if ahead != list(range(self.next_chunk - self.ahead, self.next_chunk)):
            raise ConfigError(
                f"latents must be kept of the {self.ahead} newest chunks, which are not decoded, not of {shown(ahead)}"
            )
        if self.control is not None:
            check_tensor("the control", self.control, "B F C H W", (self.latents.dtype,), empty="F")
            if self.control[:, :, 0].shape != self.latents[:, :, 0].shape:
                raise ConfigError(f"the control of shape {tuple(self.control.shape)} is not that of the latents")
        if self.conditioning is not None:
            check_tensor("the latents of the conditioning", self.conditioning, "B F C H W", (self.latents.dtype,))
            if self.conditioning[:, 0].shape != (len(self.latents), *self.latents.shape[2:]):
                raise ConfigError(f"the conditioning of shape {tuple(self.conditioning.shape)} is not that of latents")

    def _check_prompts(self) -> None:
        check_rising("prompts must hold from", [use.first_chunk for use in self.prompts], self.next_chunk)
        ids = [use.id for use in self.prompts]
        if ids[-1] not in self.embeds or not set(self.embeds) <= set(ids):
            given = f"not of {shown(list(self.embeds))}"
            raise ConfigError(f"embeddings must be those of prompts {shown(ids)}, the last among them, {given}")
        held = {f"the embeddings of prompt {number}": embeds for number, embeds in self.embeds.items()}
        if self.negative_embeds is not None:
            held["the negative embeddings"] = self.negative_embeds
        if self.texts is not None:
            held |= {f"text {number} of the change": embeds for number, embeds in enumerate(self.texts.embeds)}
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
            if (cache.dtype == torch.int8) != (self.stream.cache != "model"):
                raise ConfigError(f"a cache of the kind {self.stream.cache!r} has no keys in {cache.dtype}")
            for branch in cache.branches:
                self._check_branch(branch)
        ahead = self.chunks[len(self.chunks) - self.ahead :]
        kept_before = not ahead or any(chunk.stop == ahead[0].start for chunk in self.chunks)
        if self.decoder is None and self.shown and not kept_before:
            raise ConfigError("the latents before the next frames to decode are not kept: save the cache as well")
        if self.decoder is not None and self.decoder.frames > self.next_frame:
            raise ConfigError(f"the decoder has had {self.decoder.frames} of {self.next_frame} latent frames")

    def _check_branch(self, branch: SavedBranch) -> None:
        check_fields(branch, ["oldest", "kept_shot"], least=0, most=self.next_frame)
        assert self.cache is not None, "the caller checks it"
        if self.cache.dtype == torch.int8 and branch.frames and branch.name not in self.cache.offsets:
            raise ConfigError(f"the quantized keys of {branch.name} need the offsets that were taken off them")
        if any(frame >= self.next_frame for frame in branch.frames):
            raise ConfigError(f"the cache holds frames from {self.next_frame} on, which are still to be made")
        if branch.pending is None:
            return
        start, stop = branch.pending
        if not self.chunks or start < self.chunks[-1].start or stop != self.next_frame:
            raise ConfigError(f"the pending frames {start} to {stop} are not those of the newest chunk")
