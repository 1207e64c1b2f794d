"""Text in, frames out: the text encoder, the sampler and the codec of one model, as a stream of chunks."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from causalrope_sp.codec import Codec, load_codec
from causalrope_sp.config import SamplerConfig, Solver, check_conditioning, check_negative
from causalrope_sp.diffusion.noise import seeded_noise
from causalrope_sp.diffusion.schedule import guided_steps, with_overrides
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.distributed.layout import Layout, parse_strategy
from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import LatentGrid
from causalrope_sp.io.media_reader import Picture, Video
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.pipeline.conditioning import (
    NOTHING,
    Conditioning,
    condition_on_image,
    condition_on_past,
    condition_on_source,
)
from causalrope_sp.pipeline.decoding import Decode, check_decode, frames_of, run_decode_worker
from causalrope_sp.pipeline.model_config import TEXT_ENCODERS, ModelConfig, find_model_config
from causalrope_sp.pipeline.offload import Offload
from causalrope_sp.pipeline.output import Cut, StreamGuard, VideoChunk, decode_worker, decoded_chunks
from causalrope_sp.pipeline.parallel_chunks import ParallelChunks, Watch, check_asked, check_start
from causalrope_sp.pipeline.preflight import check_memory, describe_run
from causalrope_sp.planning.strategy import choose_strategy
from causalrope_sp.reuse import ReusePolicy, find_policy
from causalrope_sp.sampling.guidance import check_guidance
from causalrope_sp.sampling.sampler import Source, sample_chunks
from causalrope_sp.text import TextSource, load_embeds
from causalrope_sp.text.shared_encoder import SharedUMT5, share_embeds
from causalrope_sp.toybox.toybox_text import ToyboxText
from causalrope_sp.version import __version__
from causalrope_sp.weights import load_model, outline_model
from causalrope_sp.weights.digest import digest
from causalrope_sp.weights.dit_loader import Weights

Embeds = Tensor | str | PathLike[str]


class CausalVideoPipeline:
    """A model that is ready to run. Under torchrun every rank builds one and makes the same calls."""

    def __init__(
        self,
        model_config: ModelConfig,
        model: CausalDiT,
        codec: Codec,
        parallel: SequenceParallel,
        offload: Offload = Offload(),
        decode: Decode = "inline",
        together: ParallelChunks | None = None,
        layout: Layout | None = None,
    ) -> None:
        check_decode(decode, parallel.mesh.decode)
        self._decode, self.together, self._layout = decode, together, layout
        self._streams = StreamGuard(parallel.mesh.decode > 0 or (decode == "overlap" and parallel.size > 1))
        self.model_config, self.model, self.codec, self.parallel = model_config, model, codec, parallel
        self.height, self.width, self.fps = model_config.height, model_config.width, model_config.fps
        self.text: ToyboxText | SharedUMT5
        if isinstance(model_config.text, TextSource):
            self.text = SharedUMT5(model_config.text, parallel, model.config, model.dtype, offload.text)
        else:
            self.text = TEXT_ENCODERS[model_config.text]()
        if codec.channels != model.config.in_channels:
            raise ConfigError(
                f"the codec's latents have {codec.channels} channels, the model's {model.config.in_channels}"
            )
        patch = model.config.patch_size[1:]
        self.grid = LatentGrid.from_pixels(self.height, self.width, codec.spatial_stride, patch)
        parallel.check(self.grid, model.config.num_heads)
        parallel.everyone.agree(
            {
                "version": __version__,
                "torch": torch.__version__,
                "configuration": (
                    model.config,
                    model_config.height,
                    model_config.width,
                    model_config.stream,
                    model_config.sampler,
                ),
                "text encoder": type(self.text).__name__,
                "decode": decode,
                "parallel chunks": together and together.chunks,
            }
        )
        if not parallel.decodes and parallel.denoisers.size > 1:
            networks = digest(model), together and digest(together.vin)
            parallel.denoisers.agree({"dtype": model.dtype, "weights": networks})

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
        solver: Solver | None = None,
        shift: float | None = None,
        guidance: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        weights: Weights | None = None,
        offload: Offload | str | Sequence[str] | None = None,
        codec: str | None = None,
        codec_weights: str | Path | None = None,
        decode: Decode = "inline",
        preflight: bool = True,
        parallel_chunks: Literal["vin"] | None = None,
    ) -> CausalVideoPipeline:
        """Loads a model.

        Args:
            model: an embedded model ("toybox", "toybox-flow", "toybox-vin"), a recipe file, or a folder with a
                pipeline.json.
            parallel: the ranks; one process if None.
            device: where to run on one process; if None, the GPU if there is one.
            dtype: of the DiT; if None, bfloat16 on CUDA and float32 on the CPU.
            window, sink: latent frames, in place of the recipe's.
            rope: where frames stand in time (see `StreamConfig`), in place of the recipe's.
            steps: timesteps from noise to data in (0, 1000], or how many of them, evenly spaced.
            solver, shift, guidance, guidance_interval: of the sampler (see `SamplerConfig`), in place of the recipe's;
                another solver without `steps` takes as many as the recipe has, evenly spaced.
            weights: of the DiT: "full", or "fp8" (see `load_model`), in place of the recipe's.
            offload: what is on the device only while it is used: "text" (UMT5, read again for every prompt), "codec",
                both, or "none"; an `Offload` says more. If None, UMT5 waits on the CPU between two prompts. It is on
                rank 0 alone.
            codec: which kind of codec it must be; None takes what the file holds.
            codec_weights: its file or folder, in place of the recipe's.
            decode: who decodes, and when (see `decoding`); decode ranks are `parallel`'s.
            preflight: refuse, before anything is loaded, what is predicted not to fit (see `preflight`).
            parallel_chunks: "vin" makes all chunks of a video at once, by the model's Video Interface Network.

        Raises:
            CheckpointError: nothing readable at `model`, or weights that do not fit.
            ConfigError: settings that cannot work together, ranks that cannot share this model, or a run that does not
                fit into memory.
        """
        model_config = ModelConfig.load(find_model_config(model))
        given = {"window": window, "sink": sink, "rope": rope}
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        stream = replace(model_config.stream, **changes)
        sampler = with_overrides(
            model_config.sampler,
            steps=steps,
            solver=solver,
            shift=shift,
            guidance=guidance,
            guidance_interval=guidance_interval,
        )
        model_config = replace(model_config, stream=stream, sampler=sampler, weights=weights or model_config.weights)
        model_config = replace(model_config, codec=model_config.codec if codec_weights is None else Path(codec_weights))
        if parallel is not None and device is not None:
            raise ConfigError("give either `parallel`, which has a device, or `device`")
        parallel = parallel or SequenceParallel.single(device=device)
        if parallel.mesh.decode:
            changes["decode ranks"] = parallel.mesh.decode
        if sampler.guidance_scale != 1:
            changes["guidance"] = sampler.guidance_scale
        parallel.everyone.agree(
            {"parallel chunks": (parallel_chunks, model_config.vin is not None)}
        )  # before they part
        check_asked(parallel_chunks, model_config.vin, changes)
        check_guidance(sampler, parallel.mesh.cfg)
        place = parallel.device
        if dtype is None:
            dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
        offload = Offload() if offload is None else offload
        waiting = offload if isinstance(offload, Offload) else Offload.of(offload)
        ranks, together = parallel.everyone, None
        run = ranks.together(lambda: describe_run(model_config, parallel, waiting, decode, dtype.itemsize, codec))
        if preflight and model_config.vin is None:  # no cache of a stream is kept where chunks are made in parallel
            ranks.together(lambda: check_memory(run, parallel))
        chosen = choose_strategy(run.work, run.machine, parallel, run.auxiliary)
        layout = parse_strategy(ranks.first_says(chosen.name), parallel.mesh.sp)  # by what rank 0 has beside the DiT
        if parallel.decodes:
            dit = outline_model(model_config.transformer)
        else:
            readers = parallel.denoisers
            dit = load_model(
                model_config.transformer, dtype=dtype, device=place, weights=model_config.weights, readers=readers
            )
        if model_config.vin is not None:
            vin = model_config.vin
            together = ranks.together(lambda: ParallelChunks.load(vin, dit.config, dtype, place))
        decoder = ranks.together(lambda: load_codec(model_config.codec, codec, place, offload=waiting.codec))
        pipe = cls(model_config, dit, decoder, parallel, waiting, decode, together, layout)
        if place.type == "cuda":
            pipe.warm_up()
        return pipe

    @property
    def strategy(self) -> str:
        """The name of the attention strategy in use; "auto" where each stream chooses its own."""
        return self.parallel.strategy if self._layout is None else self.parallel.label(self._layout)

    def warm_up(self) -> None:
        """Runs a stream of one pass a chunk until its window has been full for a chunk, or a short video whose chunks
        are made in parallel, and throws it away: kernels are compiled, the fastest attention is measured and the ranks
        are connected before anybody waits.

        `from_pretrained` does it on CUDA; every rank must.
        """
        if self.parallel.decodes:
            deque(run_decode_worker(self.codec, self.parallel, self.grid), 0)
            self.parallel.comm_stats.take()
            return
        config, stream = self.model.config, self.model_config.stream
        if self.together is not None:  # a chunk for every lane
            latent_frames = self.together.chunks.filled_by(self.parallel.mesh.chunk)
            whole = 1 + self.codec.temporal_stride * (latent_frames - 1)
            deque(self._run(torch.zeros(1, config.text_len, config.text_dim), None, whole, seed=0), 0)
            return
        shape = (config.in_channels, self.grid.latent_height, self.grid.latent_width)
        text = torch.zeros(1, config.text_len, config.text_dim)
        chunks = sample_chunks(
            self.model,
            text,
            seeded_noise(0, (1, *shape)),
            self.grid,
            (stream.window or 0) + 2 * stream.chunk_frames,
            stream=stream,
            sampler=SamplerConfig(steps=(1000,), guidance_scale=self.model_config.sampler.guidance_scale),
            parallel=self.parallel,
            initial_latents=self._opening(),
            negative_embeds=text,
            layout=self._layout,
        )
        frames = frames_of(self.codec, self.parallel, self.grid, self._decode)
        for number, part in enumerate(chunks):
            if number < 2:  # the first chunk of a video has fewer pixels than the others
                frames.decode(part.latents, 0, self.codec.temporal_stride * part.chunk.frames)
        frames.close()
        self.parallel.comm_stats.take()

    def stream(
        self,
        prompt: str | None = None,
        frames: int = 81,
        seed: int = 0,
        *,
        embeds: Embeds | None = None,
        negative_prompt: str | None = None,
        negative_embeds: Embeds | None = None,
        image: Picture | None = None,
        video: Video | None = None,
        strength: float | None = None,
        reuse: ReusePolicy | str | PathLike[str] | None = None,
        watch: Watch | None = None,
    ) -> Iterator[VideoChunk]:
        """Makes a video of `frames` pixel frames and yields every chunk as soon as it is decoded.

        Whole chunks are made; the last is trimmed. The same prompt, seed and model give the same video at any
        number of ranks. In place of a prompt, `embeds` are its embeddings, (1, text_len, text_dim), or a file of
        `save_embeds`; those of rank 0 count, and the others' file need not be there.

        Args:
            negative_prompt, negative_embeds: what guidance leads away from; if neither is given, no text: UMT5's empty
                prompt, toybox' zeros.
            image: the video's first frame, a file or uint8 (H, W, 3), through the codec; it counts as one of `frames`.
            video: a video, as a file or as uint8 (H, W, 3) frames, to continue: its last frames are what the stream
                looks back on, and what is yielded comes after them. With `strength`, a video to redraw instead.
            strength: the share of the denoising steps, rounded up, that redraw `video`, chunk by chunk as it is read:
                above 0, which changes least, to 1, which leaves nothing of it if the first step is at pure noise.
                The result has as many frames as `video`, up to `frames`.
            reuse: which attention outputs later steps take over from earlier ones (see `find_policy`): a policy, a
                preset's name such as "pab:latte", or a JSON file.
            watch: called after each step where chunks are made in parallel, and nothing is ready before the last one.

        Pictures and videos are scaled to cover the model's size and cropped around the centre; see `reading`.

        Raises:
            PromptError: the prompt is outside what the text encoder knows.
            InputError: a picture or video that cannot be read.
            ConfigError: fewer than 1 frame, neither or both of prompt and embeds, embeds of another size, more than one
                thing to start from, both or without guidance any of negative prompt and embeds; another stream that is
                open and works ahead (see `handout.StreamGuard`).
            CheckpointError: no text encoder, or a file that cannot be read.
        """
        self._streams.check()
        given = image is not None or video is not None
        check_start(self.together is not None, given, reuse is not None, watch is not None)
        check_conditioning(image is not None, video is not None, video is not None and strength is None, strength)
        if frames < 1:
            raise ConfigError(f"frames must be at least 1, not {frames}")
        if (prompt is None) == (embeds is None):
            raise ConfigError("give either a prompt or its embeddings")
        guided = any(guided_steps(self.model_config.sampler))
        check_negative(negative_prompt is not None, negative_embeds is not None, guided)
        start = self._start(image, video, strength)
        said = {"frames": frames, "seed": seed, "prompt": prompt, "given embeddings": embeds is not None}
        policy = None if reuse is None else find_policy(reuse)
        said |= {"negative prompt": negative_prompt, "given negative embeddings": negative_embeds is not None}
        self.parallel.everyone.agree({**said, "what is given": start.digest})
        if (chunks := self.together) is not None:
            latent_frames = Cut(frames, self.codec.temporal_stride, 0, start).latent_frames(None)
            self.parallel.everyone.together(
                lambda: chunks.check_memory_for(self.model, self.grid, latent_frames, self.parallel)
            )
        wanted = [(prompt, embeds), (negative_prompt, negative_embeds)][: 1 + guided]
        texts = self.parallel.everyone.together(
            lambda: [] if self.parallel.decodes else self._encode(wanted, seed)  # decode ranks hear of wrong input too
        )
        if self.parallel.decodes:
            return self._streams.guard(decode_worker(self.codec, self.parallel, self.grid))
        made = self._run(texts[0], texts[1] if guided else None, frames, seed, start, policy, watch)
        return self._streams.guard(made)

    def _encode(self, wanted: Sequence[tuple[str | None, Embeds | None]], seed: int) -> list[Tensor]:
        """The embeddings of prompts, or those that are given in their place, (1, L, E) each, on every rank."""
        texts = iter(self.text.encode_all([prompt for prompt, embeds in wanted if embeds is None], seed))
        share = partial(share_embeds, parallel=self.parallel, config=self.model.config, dtype=self.model.dtype)
        return [next(texts) if embeds is None else share(partial(_given, embeds)) for _, embeds in wanted]

    def __call__(self, prompt: str | None = None, frames: int = 81, seed: int = 0, **given: Any) -> np.ndarray | None:
        """The whole video, uint8 (T, H, W, 3), on rank 0; None on the others. Takes and raises what `stream` does."""
        made = [chunk.frames for chunk in self.stream(prompt, frames, seed, **given)]
        return None if self.parallel.rank else np.concatenate([part for part in made if part is not None])

    def _start(self, image: Picture | None, video: Video | None, strength: float | None) -> Conditioning:
        size = self.height, self.width
        if image is not None:
            return condition_on_image(self.codec, image, *size)
        if video is None:
            return NOTHING
        if strength is not None:
            return condition_on_source(
                self.codec, video, *size, self.fps, len(self.model_config.sampler.steps), strength
            )
        opening = self._opening()
        before = 0 if opening is None else opening.shape[1]
        return condition_on_past(self.codec, video, *size, self.fps, self.model_config.stream, before)

    def _opening(self) -> Tensor | None:
        return self.text.opening(self.model.config.in_channels, self.grid.latent_height, self.grid.latent_width)

    def _run(
        self,
        embeds: Tensor,
        negative: Tensor | None,
        frames: int,
        seed: int,
        given: Conditioning = NOTHING,
        reuse: ReusePolicy | None = None,
        watch: Watch | None = None,
    ) -> Iterator[VideoChunk]:
        shape = (1, self.model.config.in_channels, self.grid.latent_height, self.grid.latent_width)
        opening, source, stream = self._opening(), given.source, self.model_config.stream
        first = [part.cpu() for part in (opening, given.latents) if part is not None]
        cut = Cut(frames, self.codec.temporal_stride, 0 if opening is None else opening.shape[1], given)
        frames_made = cut.latent_frames(None if self.together else stream)
        args = self.model, embeds, seeded_noise(seed, shape), self.grid, frames_made
        options: dict[str, Any] = {
            "sampler": self.model_config.sampler,
            "parallel": self.parallel,
            "layout": self._layout,
            "initial_latents": torch.cat(first, 1) if first else None,
        }
        if self.together is not None:
            chunks = self.together.sample(*args, codec=self.codec, watch=watch, shown=frames, **options)
        else:
            redrawn = None if source is None else Source(lambda chunk: source.take(chunk.frames), given.first_step)
            options |= {"stream": stream, "source": redrawn, "negative_embeds": negative, "reuse": reuse}
            chunks = sample_chunks(*args, **options)
        return decoded_chunks(chunks, self.codec, self.parallel, self.grid, self._decode, cut)


def _given(embeds: Embeds) -> Tensor:
    return embeds if isinstance(embeds, Tensor) else load_embeds(embeds).embeds
