"""Configuration of model, stream and sampler: frozen dataclasses that check their values at construction."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, Literal, get_args

from causalrope_sp.checks import check_choice, check_fields, check_number, shown
from causalrope_sp.errors import ConfigError
from causalrope_sp.heads.policy import HeadPolicy

DTYPE_NAMES = ("float64", "float32", "float16", "bfloat16")  # of a transformer


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of a Wan 2.1 text-to-video DiT.

    Args:
        dim: D, the model width.
        ffn_dim: width of the feed-forward.
        num_heads: H, attention heads.
        num_layers: blocks.
        text_dim: width of a text embedding.
        text_len: text embeddings of a prompt, padding included.
        freq_dim: width of the sinusoidal embedding of a timestep.
        in_channels: channels of the latents.
        patch_size: latent frames, height and width of a token, in latent pixels.
        eps: of the norms.
        theta: base of the rotary frequencies.
        control_channels: channels of the control that the model takes beside the latents; 0 for none.
        image_dim: width of the image tokens that cross-attention reads beside the text, as Wan 2.1's image-to-video
            models do; 0 for none.

    Raises:
        ConfigError: a size is below 1, `num_heads` does not divide `dim`, the head width is odd or below 6, `freq_dim`
            is odd, or `eps` or `theta` is not a positive finite number.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    in_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    theta: float = 10000.0
    control_channels: int = 0
    image_dim: int = 0

    def __post_init__(self) -> None:
        sizes = ("dim", "ffn_dim", "num_heads", "num_layers", "text_dim", "text_len", "freq_dim", "in_channels")
        check_fields(self, sizes)
        check_fields(self, ["control_channels", "image_dim"], least=0)
        if self.dim % self.num_heads:
            raise ConfigError(f"dim {self.dim} is not divisible by num_heads {self.num_heads}")
        if self.head_dim % 2 or self.head_dim < 6:
            raise ConfigError(f"head width {self.head_dim} must be even and at least 6 to carry three rotary axes")
        if self.freq_dim % 2:
            raise ConfigError(f"freq_dim {self.freq_dim} must be even")
        if len(self.patch_size) != 3 or self.patch_size[0] != 1 or min(self.patch_size) < 1:
            raise ConfigError(f"patch_size {self.patch_size} must be (1, height, width)")

        if not all(value > 0 and math.isfinite(value) for value in (self.eps, self.theta)):
            raise ConfigError(f"eps {self.eps} and theta {self.theta} must be positive and finite")

    @property
    def head_dim(self) -> int:
        """d, the width of a head."""
        return self.dim // self.num_heads

    @property
    def token_dim(self) -> int:
        """E, the numbers in one token of latents, and in one output of the model's head."""
        return self.in_channels * self.patch_size[0] * self.patch_size[1] * self.patch_size[2]

    @property
    def embedded_channels(self) -> int:
        """Channels that the patch embedding reads: those of the latents, then those of the control."""
        return self.in_channels + self.control_channels

    @property
    def embedded_dim(self) -> int:
        """The numbers in one token that the patch embedding reads."""
        return self.token_dim // self.in_channels * self.embedded_channels


PRESETS = {
    "wan2.1-1.3b": DiTConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30),
    "wan2.1-14b": DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),
    "wan2.2-ti2v-5b": DiTConfig(dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, in_channels=48),
}


NEWEST = 1  # frames right before a chunk that it attends beside its `similar_frames`
LONGEST_WINDOW = 2**31 - 1  # latent frames; a thousand years of video
CacheDtype = Literal["model", "int8", "fp8"]
WindowPolicy = Literal["sliding", "multi-shot", "recomputed"]


@dataclass(frozen=True)
class StreamConfig:
    """How a video is cut into chunks and how far back attention looks. Lengths are in latent frames.

    Args:
        window: how far back attention looks, the current chunk included (Self-Forcing's `local_attn_size`); None looks
            back over all frames, which needs a video of known length.
        sink: how many of the stream's first frames never leave the window.
        chunk_frames: length of a chunk.
        independent_first_frame: whether the stream's first frame is a chunk of its own.
        rope: a frame's position in time. "absolute" is its global time index, as in training; "relative" is its
            position within the window, so that a stream of hours stays within the trained range and its sink stays
            near. Without a sink both give the same result.
        window_policy: what happens to the window as the stream goes on. "sliding" keeps the sink and the newest frames
            (Self-Forcing, LongLive). "multi-shot" does so too, and a change of prompt begins a shot with a sink of its
            own, unless it says otherwise (LongLive). "recomputed" computes the keys and values of the window anew from
            its clean latents before every chunk, once frames have left it, so that they hold nothing of those frames:
            the newest frames read the sink and each other again (Krea Realtime).
        similar_frames: how many frames of the window a head attends, after a chunk's first pass, beyond the sink, the
            newest frame before the chunk and the chunk: those whose mean key resembles the mean query most (Light
            Forcing, arXiv 2602.04789). From 1 on it is a number, and so is 0; between them it is the share of frames
            that chunks after the first leave out, early ones less than later ones. None attends all of the window. A
            head with a window of its own (`heads`) attends that, whatever this says.
        image_in_chunk: whether a given image is the first frame of the first chunk, at timestep 0 in each of its
            passes, as Wan 2.2's TI2V models are trained. Without, it is a chunk of its own before the first one.
        cache: how keys and values are stored. "model" keeps the model's dtype; "int8" and "fp8" (float8_e4m3fn) are
            lossy and take about half of bfloat16's memory.
        heads: how many of the window's frames each attention head sees, and which rows of tokens of them; None for
            all. It changes the result.

    Raises:
        ConfigError: a length is below its minimum, the window or that of a head is smaller than chunk + sink, or
            `rope`, `cache` or `window_policy` is unknown; or `similar_frames` is neither a whole number nor between 0
            and 1, or goes with a recomputed window or with rows of `heads`.
    """

    window: int | None = None
    sink: int = 0
    chunk_frames: int = 3
    independent_first_frame: bool = False
    rope: Literal["absolute", "relative"] = "absolute"
    window_policy: WindowPolicy = "sliding"
    image_in_chunk: bool = False
    similar_frames: float | None = None
    cache: CacheDtype = "model"
    heads: HeadPolicy | None = None

    def __post_init__(self) -> None:
        check_fields(self, ["chunk_frames"], most=LONGEST_WINDOW)
        if self.similar_frames is not None:
            object.__setattr__(self, "similar_frames", check_similar("similar_frames", self.similar_frames))
            if self.window_policy == "recomputed":
                raise ConfigError("similar_frames must be None with window_policy recomputed: its keys are always new")
        if self.rope not in ("absolute", "relative"):
            raise ConfigError(f"rope must be absolute or relative, not {self.rope!r}")
        if self.window_policy not in get_args(WindowPolicy):
            raise ConfigError(
                f"window_policy must be one of {', '.join(get_args(WindowPolicy))}, not {self.window_policy!r}"
            )
        check_choice("cache", self.cache, get_args(CacheDtype))
        check_fields(self, ["sink"], least=0, most=LONGEST_WINDOW)
        if self.heads is not None:
            if not isinstance(self.heads, HeadPolicy):
                raise ConfigError(f"heads: expected a HeadPolicy (read_heads reads its file), got {shown(self.heads)}")
            self.heads.check_stream(self.chunk_frames, self.sink)
            if self.heads.rows and self.similar_frames is not None:
                raise ConfigError("heads: expected no rows with similar_frames, which chooses among whole frames")
        if self.window is None:
            return
        check_fields(self, ["window"], most=LONGEST_WINDOW)
        if self.window < self.chunk_frames + self.sink:
            raise ConfigError(
                f"window {self.window} is smaller than chunk + sink = {self.chunk_frames} + {self.sink} latent frames"
            )


def check_similar(name: str, value: object) -> float:
    """Checks a number of similar frames, or a share of frames to leave out, and returns it.

    Args:
        name: of the argument, for the message.
        value: the argument.

    Raises:
        ConfigError: it is neither a whole number nor a share between 0 and 1.
    """
    number = check_number(name, value, least=0, most=LONGEST_WINDOW)
    if number > 1 and number != int(number):
        raise ConfigError(f"{name} must be a whole number, or a share between 0 and 1, not {shown(value)}")
    return number


def stream_fields(stream: StreamConfig) -> dict[str, Any]:
    """Returns the fields of a stream's configuration, as JSON has them; `heads` only if there are windows of heads."""
    found = asdict(stream)
    del found["heads"]
    return found if stream.heads is None else {**found, "heads": stream.heads.fields}


Keep = Literal["device", "cpu", "free"]  # where weights are kept between two uses
Solver = Literal["renoise", "euler", "unipc"]
TimestepRule = Literal["wan", "diffusers"]
LARGEST = 1000.0  # bound of a shift or a guidance scale; a hundred times the largest in use


@dataclass(frozen=True)
class SamplerConfig:
    """The denoising steps and their guidance.

    Args:
        steps: unshifted timesteps in (0, 1000], falling.
        shift: moves steps to higher noise, σ = shift·s / (1 + (shift - 1)·s) with s = step/1000.
        solver: "renoise" is Self-Forcing's few-step loop (arXiv 2506.08009); "euler" follows the flow ODE from noise to
            data through `steps` and then 0; "unipc" does so to second order (UniPC, arXiv 2302.04867).
        guidance_scale: s of classifier-free guidance, v = v⁻ + s·(v⁺ - v⁻), where v⁺ is the conditional and v⁻ the
            unconditional velocity; at 1 there is no guidance, v = v⁺.
        guidance_interval: lowest and highest timestep, as the model is called with it, at which steps are guided
            (arXiv 2404.07724); at other steps v = v⁺.
        timestep_rule: how "unipc" spaces a number of steps: "wan" from 999 to 0, as Wan's own code; "diffusers" from
            1000 to 1, as diffusers' UniPCMultistepScheduler since 0.37. The update is infinite at noise level 1: "wan"
            refuses a first step of 1000, "diffusers" lowers that level by 1e-6. Other solvers ignore it.
        first_steps: the steps of a stream's first chunk, where they are others than those of later ones
            (Causal-Forcing++, arXiv 2605.15141, makes it in 4 and later ones in 1 or 2); empty for the same.

    Raises:
        ConfigError: there are no steps, steps are outside (0, 1000] or not falling, `shift` or `guidance_scale` is out
            of range (`LARGEST`), the solver or the rule is unknown, or the interval is not within [0, 1000].
    """

    steps: tuple[float, ...] = (1000, 750, 500, 250)
    shift: float = 5.0
    solver: Solver = "renoise"
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] = (0, 1000)
    timestep_rule: TimestepRule = "wan"
    first_steps: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name, steps in (("steps", self.steps), ("first_steps", self.first_steps or self.steps)):
            if not steps or not all(0 < s <= 1000 for s in steps):
                raise ConfigError(f"{name} must be timesteps above 0 and up to 1000, not {steps}")
            if any(later >= earlier for earlier, later in pairwise(steps)):
                raise ConfigError(f"{name} must fall from noise to data, not {steps}")
        if not 1 / LARGEST <= self.shift <= LARGEST:
            raise ConfigError(f"shift must be from {1 / LARGEST:g} to {LARGEST:g}, not {self.shift}")
        if self.solver not in get_args(Solver):
            raise ConfigError(f"solver must be one of {', '.join(get_args(Solver))}, not {self.solver!r}")
        if self.timestep_rule not in get_args(TimestepRule):
            raise ConfigError(
                f"timestep_rule must be one of {', '.join(get_args(TimestepRule))}, not {self.timestep_rule!r}"
            )
        if self.solver == "unipc" and self.timestep_rule == "wan" and 1000 in (*self.steps, *self.first_steps):
            raise ConfigError(
                "solver unipc cannot start at 1000, where its logarithms are infinite: with timestep_rule wan it "
                "starts at 999, with diffusers it lowers the noise level"
            )
        if not 0 <= self.guidance_scale <= LARGEST:
            raise ConfigError(f"the guidance scale must be from 0 to {LARGEST:g}, not {self.guidance_scale}")
        if len(self.guidance_interval) != 2 or not 0 <= self.guidance_interval[0] <= self.guidance_interval[1] <= 1000:
            raise ConfigError(f"guidance is within an interval of timesteps 0 to 1000, not {self.guidance_interval}")

    @property
    def first_chunk(self) -> SamplerConfig:
        """The sampler of a stream's first chunk."""
        return replace(self, steps=self.first_steps or self.steps, first_steps=())
