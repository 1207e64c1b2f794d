"""Text in, frames out: the text encoder, the sampler and the codec of one model, as a stream of chunks."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from causalrope_sp.codec import Codec, load_codec
from causalrope_sp.codec.pixels import to_uint8
from causalrope_sp.config import SamplerConfig, check_given
from causalrope_sp.errors import ConfigError
from causalrope_sp.given import NOTHING, Given, given_past, given_picture, given_source
from causalrope_sp.grid import LatentGrid
from causalrope_sp.model import CausalDiT
from causalrope_sp.noise import seeded_noise
from causalrope_sp.parallel import SequenceParallel
from causalrope_sp.parallel.ledger import Ledger
from causalrope_sp.reading import Picture, Video
from causalrope_sp.recipe import TEXT_ENCODERS, Recipe, find_recipe
from causalrope_sp.sampler import Source, sample_chunks
from causalrope_sp.schedule import timesteps
from causalrope_sp.text import TextSource, load_embeds
from causalrope_sp.text.shared import SharedUMT5, share_embeds
from causalrope_sp.text.umt5 import Keep
from causalrope_sp.toybox.text import ToyboxText
from causalrope_sp.version import __version__
from causalrope_sp.vin.video import Together, Watch, check_asked, check_start
from causalrope_sp.weights import load_model
from causalrope_sp.weights.digest import digest


@dataclass(frozen=True)
class VideoChunk:
    """Frames that are ready. `frames` is uint8 (T, H, W, 3) on rank 0 and None on the others; `start_frame` counts
    pixel frames from the video's start; `seconds` is what this chunk took, decoding included; `ledger` is what its
    collectives moved."""

    index: int
    start_frame: int
    frames: np.ndarray | None
    seconds: float
    ledger: Ledger


class CausalVideoPipeline:
    """A model that is ready to run. Under torchrun every rank builds one and makes the same calls."""

    def __init__(
        self,
        recipe: Recipe,
        model: CausalDiT,
        codec: Codec,
        parallel: SequenceParallel,
        keep_text: Keep = "cpu",
        together: Together | None = None,
    ) -> None:
        self.together = together
        self.recipe, self.model, self.codec, self.parallel = recipe, model, codec, parallel
        self.height, self.width, self.fps = recipe.height, recipe.width, recipe.fps
        self.text: ToyboxText | SharedUMT5
        if isinstance(recipe.text, TextSource):
            self.text = SharedUMT5(recipe.text, parallel, model.config, model.dtype, keep_text)
        else:
            self.text = TEXT_ENCODERS[recipe.text]()
        if codec.channels != model.config.in_channels:
            raise ConfigError(
                f"the codec's latents have {codec.channels} channels, the model's {model.config.in_channels}"
            )
        patch = model.config.patch_size[1:]
        self.grid = LatentGrid.from_pixels(self.height, self.width, codec.spatial_stride, patch)
        parallel.check(self.grid, model.config.num_heads)
        if parallel.size > 1:
            parallel.agree(
                {
                    "version": __version__,
                    "torch": torch.__version__,
                    "configuration": (model.config, recipe.height, recipe.width, recipe.stream, recipe.sampler),
                    "dtype": model.dtype,
                    "text encoder": type(self.text).__name__,
                    "weights": digest(model),
                    "parallel chunks": together and (together.chunks, digest(together.vin)),
                }
            )

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = "toybox",
        *,
        parallel: SequenceParallel | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        window: int | None = None,
        sink: int | None = None,
        rope: Literal["absolute", "relative"] | None = None,
        steps: int | Sequence[float] | None = None,
        keep_text: Keep = "cpu",
        codec: str | None = None,
        codec_weights: str | Path | None = None,
        parallel_chunks: Literal["vin"] | None = None,
    ) -> CausalVideoPipeline:
        """Loads a model.

        Args:
            model: an embedded model ("toybox", "toybox-flow"), a recipe file, or a folder with a pipeline.json.
            parallel: the ranks; one process if None.
            device: where to run on one process; if None, the GPU if there is one.
            dtype: of the DiT; if None, bfloat16 on CUDA and float32 on the CPU.
            window, sink: latent frames, in place of the recipe's.
            rope: where frames stand in time (see `StreamConfig`), in place of the recipe's.
            steps: timesteps from noise to data in (0, 1000], or how many of them, evenly spaced.
            keep_text: where UMT5 waits between two prompts: on the "device", on the "cpu", or "free": given up, and
                read again for the next. It is on rank 0 alone.
            codec: which kind of codec it must be; None takes what the file holds.
            codec_weights: its file or folder, in place of the recipe's.
            parallel_chunks: "vin" makes all chunks of a video at once, by the model's Video Interface Network.

        Raises:
            CheckpointError: nothing readable at `model`, or weights that do not fit.
            ConfigError: settings that cannot work together, or ranks that cannot share this model.
        """
        recipe = Recipe.load(find_recipe(model))
        given = {"window": window, "sink": sink, "rope": rope}
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        check_asked(parallel_chunks, recipe.vin, changes)
        stream = replace(recipe.stream, **changes)
        sampler = recipe.sampler if steps is None else replace(recipe.sampler, steps=timesteps(steps))
        recipe = replace(recipe, stream=stream, sampler=sampler)
        if parallel is not None and device is not None:
            raise ConfigError("give either `parallel`, which has a device, or `device`")
        parallel = parallel or SequenceParallel.single(device=device)
        place = parallel.device
        if dtype is None:
            dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
        dit = load_model(recipe.transformer, dtype=dtype, device=place)
        together = None if recipe.vin is None else Together.load(recipe.vin, dit.config, dtype, place)
        weights = recipe.codec if codec_weights is None else codec_weights
        pipe = cls(recipe, dit, load_codec(weights, codec, place), parallel, keep_text, together)
        if place.type == "cuda":
            pipe.warm_up()
        return pipe

    def warm_up(self) -> None:
        """Runs a stream of one pass a chunk until its window has been full for a chunk, and throws it away: kernels are
        compiled, the fastest attention is measured and the ranks are connected before anybody waits.

        `from_pretrained` does it on CUDA; every rank must.
        """
        config, stream = self.model.config, self.recipe.stream
        if self.together is not None:  # no pass of its depends on those before: a video of one chunk is all
            one = self._pixel_frames(self.together.chunks.chunk_frames)
            deque(self._run(torch.zeros(1, config.text_len, config.text_dim), one, seed=0), 0)
            return
        shape = (config.in_channels, self.grid.latent_height, self.grid.latent_width)
        chunks = sample_chunks(
            self.model,
            torch.zeros(1, config.text_len, config.text_dim),
            seeded_noise(0, (1, *shape)),
            self.grid,
            (stream.window or 0) + 2 * stream.chunk_frames,
            stream=stream,
            sampler=SamplerConfig(steps=(1000,)),
            parallel=self.parallel,
            initial_latents=self._opening(),
        )
        decoder = self.codec.decoder()
        for number, part in enumerate(chunks):
            if number < 2 and self.parallel.rank == 0:  # the first chunk of a video has fewer pixels than the others
                decoder.decode(part.latents.to(self.codec.dtype))
        self.parallel.ledger.take()

    def stream(
        self,
        prompt: str | None = None,
        frames: int = 81,
        seed: int = 0,
        *,
        embeds: Tensor | str | PathLike[str] | None = None,
        image: Picture | None = None,
        video: Video | None = None,
        strength: float | None = None,
        watch: Watch | None = None,
    ) -> Iterator[VideoChunk]:
        """Makes a video of `frames` pixel frames and yields every chunk as soon as it is decoded.

        Whole chunks are made; the last is trimmed. The same prompt, seed and model give the same video at any
        number of ranks. In place of a prompt, `embeds` are its embeddings, (1, text_len, text_dim), or a file of
        `save_embeds`; those of rank 0 count, and the others' file need not be there.

        Args:
            image: the video's first frame, a file or uint8 (H, W, 3), through the codec; it counts as one of `frames`.
            video: a video, as a file or as uint8 (H, W, 3) frames, to continue: its last frames are what the stream
                looks back on, and what is yielded comes after them. With `strength`, a video to redraw instead.
            strength: the share of the denoising steps, rounded up, that redraw `video`, chunk by chunk as it is read:
                above 0, which changes least, to 1, which leaves nothing of it if the first step is at pure noise.
                The result has as many frames as `video`, up to `frames`.
            watch: called after each step where chunks are made in parallel, and nothing is ready before the last one.

        Pictures and videos are scaled to cover the model's size and cropped around the centre; see `reading`.

        Raises:
            PromptError: the prompt is outside what the text encoder knows.
            InputError: a picture or video that cannot be read.
            ConfigError: fewer than 1 frame, neither or both of prompt and embeds, embeds of another size, or more than
                one thing to start from.
            CheckpointError: no text encoder, or a file that cannot be read.
        """
        check_start(self.together is not None, image is not None or video is not None, watch is not None)
        check_given(image is not None, video is not None, video is not None and strength is None, strength)
        if frames < 1:
            raise ConfigError(f"frames must be at least 1, not {frames}")
        if (prompt is None) == (embeds is None):
            raise ConfigError("give either a prompt or its embeddings")
        start = self._start(image, video, strength)
        said = {"frames": frames, "seed": seed, "prompt": prompt, "given embeddings": embeds is not None}
        self.parallel.agree({**said, "what is given": start.digest})
        if prompt is not None:
            return self._run(self.text.encode(prompt, seed), frames, seed, start, watch)
        shared = share_embeds(lambda: _given(embeds), self.parallel, self.model.config, self.model.dtype)
        return self._run(shared, frames, seed, start, watch)

    def __call__(self, prompt: str | None = None, frames: int = 81, seed: int = 0, **given: Any) -> np.ndarray | None:
        """The whole video, uint8 (T, H, W, 3), on rank 0; None on the others. Takes and raises what `stream` does."""
        made = [chunk.frames for chunk in self.stream(prompt, frames, seed, **given)]
        return None if self.parallel.rank else np.concatenate([part for part in made if part is not None])

    def _start(self, image: Picture | None, video: Video | None, strength: float | None) -> Given:
        size = self.height, self.width
        if image is not None:
            return given_picture(self.codec, image, *size)
        if video is None:
            return NOTHING
        if strength is not None:
            return given_source(self.codec, video, *size, self.fps, len(self.recipe.sampler.steps), strength)
        return given_past(self.codec, video, *size, self.fps, self.recipe.stream, _frames_of(self._opening()))

    def _opening(self) -> Tensor | None:
        return self.text.opening(self.model.config.in_channels, self.grid.latent_height, self.grid.latent_width)

    def _run(
        self, embeds: Tensor, frames: int, seed: int, given: Given = NOTHING, watch: Watch | None = None
    ) -> Iterator[VideoChunk]:
        shape = (1, self.model.config.in_channels, self.grid.latent_height, self.grid.latent_width)
        opening, past, source = self._opening(), given.latents, given.source
        first = [part.cpu() for part in (opening, past) if part is not None]
        decoder = self.codec.decoder()
        latent_frames = self._latent_frames(frames + given.hidden, _frames_of(opening), _frames_of(past))
        args = self.model, embeds, seeded_noise(seed, shape), self.grid, latent_frames
        options: dict[str, Any] = {
            "sampler": self.recipe.sampler,
            "parallel": self.parallel,
            "initial_latents": torch.cat(first, 1) if first else None,
        }
        if self.together is None:
            redrawn = None if source is None else Source(lambda chunk: source.take(chunk.frames), given.first_step)
            chunks = sample_chunks(*args, stream=self.recipe.stream, source=redrawn, **options)
        else:
            chunks = self.together.sample(*args, codec=self.codec, watch=watch, **options)
        done, clock = 0, time.perf_counter()
        for index, part in enumerate(chunks):
            made = self._pixel_frames(part.chunk.stop - _frames_of(opening)) - given.hidden
            length = None if source is None else source.length
            stop = min(frames, made) if length is None else min(frames, made, length)
            pixels = None
            if self.parallel.rank == 0:
                latents = part.latents
                if index == 0 and past is not None:
                    latents = torch.cat([past.to(latents), latents], 1)
                decoded = decoder.decode(latents.to(self.codec.dtype))[:, given.hidden if index == 0 else 0 :]
                pixels = to_uint8(decoded[:, : stop - done])[0]
            now = time.perf_counter()
            yield VideoChunk(index, done, pixels, now - clock, self.parallel.ledger.take())
            done, clock = stop, time.perf_counter()
            if length is not None and done == length:
                return

    def _pixel_frames(self, latent_frames: int) -> int:
        return 1 + self.codec.temporal_stride * (latent_frames - 1)

    def _latent_frames(self, frames: int, opening: int, past: int) -> int:
        """The latent frames, beside those that are given, of as many whole chunks as `frames` pixel frames need."""
        stream, stride = self.recipe.stream, self.codec.temporal_stride
        needed = max(1, 1 - (1 - frames) // stride - past)
        if self.together is not None:  # its last chunk may be short
            return needed
        lone = 1 if stream.independent_first_frame and opening + past == 0 else 0
        return lone - (lone - needed) // stream.chunk_frames * stream.chunk_frames


def _frames_of(latents: Tensor | None) -> int:
    return 0 if latents is None else latents.shape[1]


def _given(embeds: Tensor | str | PathLike[str] | None) -> Tensor:
    if isinstance(embeds, Tensor):
        return embeds
    assert embeds is not None, "checked"
    return load_embeds(embeds).embeds
