"""What a stream is told besides its model, text, noise, size and ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from causalrope_sp.cache.window import SlidingWindow
from causalrope_sp.config import SamplerConfig, StreamConfig
from causalrope_sp.distributed.layout import Layout
from causalrope_sp.errors import ConfigError
from causalrope_sp.grid import Chunk
from causalrope_sp.models.causal_dit import CausalDiT
from causalrope_sp.reuse.policy import ReusePolicy
from causalrope_sp.sampling.settled import SettledWeights

OnStep = Callable[[Chunk, int, float], object]
BACKENDS_OF_8_BITS = ("auto", "torch", "triton")  # the attention backends that read a quantized cache
Control = Callable[[Chunk], Tensor]


@dataclass(frozen=True)
class Source:
    """A video to redraw: denoising starts from its latents, noised to the level of `first_step`.

    Args:
        latents: returns the clean latents of a chunk, (B, F, C, H, W); it is called once a chunk, in order.
        first_step: the number of the first step to run, counted from 0.
    """

    latents: Callable[[Chunk], Tensor]
    first_step: int


@dataclass(frozen=True)
class LowNoiseExpert:
    """The second of two models that share the steps by noise level, as Wan 2.2's A14B does.

    Each has a cache of its own, which its own context passes write: keys and values of one model mean nothing to the
    other. So does FastVideo's CausalBlockStrategy for SFWan2.2. A context pass shares a forward with the first pass
    that the same model makes of the next chunk.

    Args:
        model: the model, of the configuration of the first one.
        boundary: the timestep in [0, 1000] below which it makes the steps; at and above it the first model does.
    """

    model: CausalDiT
    boundary: float


@dataclass(frozen=True)
class Resumed:
    """What a stream that goes on has made.

    Args:
        kept: its newest chunks and those of its sinks, in order of time, with their whole latents, (B, F, C, H, W).
        shots: the global time indices at which shots begin.
        initial_frames: how many latent frames it began with that were given.
        control: the control of all these frames, in order, (B, F, control channels, H, W), for a model that takes one.
    """

    kept: Sequence[tuple[Chunk, Tensor]]
    shots: tuple[int, ...]
    initial_frames: int
    control: Tensor | None = None


@dataclass(frozen=True)
class StreamOptions:
    """Options of `sample_chunks`.

    Args:
        stream: chunk length, window, sink and positions in time.
        sampler: steps, solver and guidance.
        initial_latents: latent frames to continue, (B, F0, C, H, W); they are not yielded again.
        given_frames: latent frames that are the first of the first chunk, (B, F0, C, H, W). They are clean in each of
            its passes, at timestep 0, and are yielded as they are. They go without `initial_latents`.
        resumed: what the stream has made already, without `initial_latents`; None begins it. Whoever opens it gives its
            caches what they held, or has them computed anew.
        control: returns the control of a chunk, (B, F, control channels, H, W), for a model that takes one; H×W is the
            size of a latent frame, or 1×1 for a control that is the same all over it. The chunk's number and frames are
            counted from the first one that is generated. The control of initial latents is zero.
        source: a video to start each chunk from, instead of from noise alone.
        low_noise: the model of the steps at low noise, where another one makes those at high noise; it reuses no
            outputs. None for one model.
        image_embeds: image tokens, (B, N, image_dim), that every branch attends beside its text, for a model that has
            them.
        negative_embeds: embeddings of the negative prompt, (B, text_len, text_dim); ignored if the guidance scale is 1.
        reuse: which attention outputs later steps of a chunk take over from earlier ones (Pyramid Attention Broadcast,
            arXiv 2408.12588). It changes the result, equally on any number of ranks. None computes all outputs.
        layout: how the ranks share attention; None takes what `choose_strategy` returns.
        graphs: whether passes run by CUDA graphs once the window slides; nothing changes on a CPU.
        on_step: called on every rank after each denoising step with the chunk, the step's number within it and the
            timestep that the model was called with. If it raises on one rank, the chunk ends on all of them.
        history: how many chunks can be taken back bit for bit; the keys and values that they evict are kept.
        settled: how another stream of the model, or of each of the two, on the same ranks computes it; None settles it
            anew.
        kept_chunks: of how many more chunks than those in the window the clean latents are kept, at least `history`.
    """

    stream: StreamConfig = field(default_factory=StreamConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    initial_latents: Tensor | None = None
    given_frames: Tensor | None = None
    resumed: Resumed | None = None
    control: Control | None = None
    source: Source | None = None
    low_noise: LowNoiseExpert | None = None
    image_embeds: Tensor | None = None
    negative_embeds: Tensor | None = None
    reuse: ReusePolicy | None = None
    layout: Layout | None = None
    graphs: bool = True
    on_step: OnStep | None = None
    history: int = 0
    kept_chunks: int = 0
    settled: tuple[SettledWeights, ...] | None = None

    def model_of(self, timestep: float) -> int:
        """Returns the number of the model that makes a step."""
        return int(self.low_noise is not None and timestep < self.low_noise.boundary)


def window_of(stream: StreamConfig, frames: int | None, initial: int) -> SlidingWindow:
    """Returns the stream's window, or one that holds the whole video if that is shorter, so that nothing is evicted."""
    total = None if frames is None else initial + frames
    if total is not None and (stream.window is None or stream.window >= total):
        return SlidingWindow(total)
    assert stream.window is not None, "`check_length` has checked that an endless video has a window"
    return SlidingWindow(stream.window, stream.sink)


def check_attention(stream: StreamConfig, attention: str) -> None:
    """Raises ConfigError for an attention backend that cannot read the cache of a stream."""
    if stream.cache != "model" and attention not in BACKENDS_OF_8_BITS:
        raise ConfigError(
            f"attention: expected {', '.join(BACKENDS_OF_8_BITS[:-1])} or {BACKENDS_OF_8_BITS[-1]}, which read the "
            f"keys and values of cache={stream.cache}, got {attention}"
        )


def check_length(frames: int | None, stream: StreamConfig) -> None:
    """Raises ConfigError for a stream of no frames, or one without end and without a window."""
    if frames is None and stream.window is None:
        raise ConfigError("an endless video needs a window")
    if frames is not None and frames < 1:
        raise ConfigError(f"frames must be at least 1, not {frames}")
