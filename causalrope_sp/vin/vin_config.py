"""Configuration of a Video Interface Network and of the parallel chunks of a video (arXiv 2503.17539)."""

from __future__ import annotations

from dataclasses import dataclass

from causalrope_sp.checks import check_fields, check_number, check_whole, shown
from causalrope_sp.config import LARGEST
from causalrope_sp.errors import ConfigError


def check_preview(every: int | None) -> None:
    """Checks an interval between previews, in steps; None stands for no previews.

    Raises:
        ConfigError: the interval is not a whole number of at least 1.
    """
    if every is not None:
        check_whole("preview_every", every)


@dataclass(frozen=True)
class VINConfig:
    """Sizes of a Video Interface Network.

    Args:
        global_tokens: G, the global tokens of a video.
        dim: width of a global token.
        heads: attention heads of a block.
        layers: self-attention blocks after the read; one more is before it.
        position_layers: layers in which the positions of keyframes' tokens attend the text.

    Raises:
        ConfigError: a size is below 1, or `heads` does not divide `dim`.
    """

    global_tokens: int
    dim: int
    heads: int
    layers: int
    position_layers: int

    def __post_init__(self) -> None:
        check_fields(self, ["global_tokens", "dim", "heads", "layers", "position_layers"])
        if self.dim % self.heads:
            raise ConfigError(f"VINConfig.dim {self.dim} is not divisible by its {self.heads} heads")


@dataclass(frozen=True)
class ParallelChunksConfig:
    """How a video is cut into parallel chunks, and how these are fused and guided. Lengths are in latent frames.

    The shared frames serve two purposes of the paper: they are the end of the chunk before, which a chunk attends as
    context, and the frames whose velocities are fused.

    Args:
        chunk_frames: length of a chunk.
        overlap: frames that neighbouring chunks share.
        keyframe_every: one keyframe in so many frames is read into the global tokens.
        fuse_above: overlaps are fused while more than this share of the steps is left.
        global_guidance_scale: s of classifier-free guidance (arXiv 2207.12598) by the global tokens alone, as by an
            image in arXiv 2211.09800, section 3.2: v = v⁻ + s·(v⁺ - v⁻), where v⁺ is the velocity with global tokens
            and v⁻ that without. At 1 there is no guidance, v = v⁺, and a step is one forward of the DiT; at other
            values a guided step is two.
        global_guidance_interval: lowest and highest timestep, as the model is called with it, at which steps are
            guided (arXiv 2404.07724).

    Raises:
        ConfigError: a length is below 1, the overlap is more than half a chunk (a frame would be in three chunks), or
            the share, the scale or the interval is out of range, or there is an interval and no guidance.
    """

    chunk_frames: int
    overlap: int
    keyframe_every: int
    fuse_above: float = 0.4
    global_guidance_scale: float = 1.0
    global_guidance_interval: tuple[float, float] = (0.0, 1000.0)

    def __post_init__(self) -> None:
        check_fields(self, ["chunk_frames", "overlap", "keyframe_every"])
        if 2 * self.overlap > self.chunk_frames:
            raise ConfigError(
                f"an overlap of {self.overlap} is more than half of a chunk of {self.chunk_frames} frames"
            )
        object.__setattr__(self, "fuse_above", check_number("fuse_above", self.fuse_above, least=0, most=1))
        scale = check_number("global_guidance_scale", self.global_guidance_scale, least=0, most=LARGEST)
        object.__setattr__(self, "global_guidance_scale", scale)
        object.__setattr__(self, "global_guidance_interval", _interval(self.global_guidance_interval))
        if scale == 1 and self.global_guidance_interval != (0, 1000):
            raise ConfigError("global_guidance_interval says nothing without a global_guidance_scale other than 1")

    def filled_by(self, chunks: int) -> int:
        """Returns the latent frames that so many whole chunks cover."""
        return self.chunk_frames + (chunks - 1) * (self.chunk_frames - self.overlap)

    def fuses(self, step: int, steps: int) -> bool:
        """Whether overlaps are fused at step `step` of `steps`, counted from 0.

        The paper's condition is t > t_α, where t = steps - step is the number of steps left.
        """
        return steps - step > self.fuse_above * steps

    def guides(self, timestep: float) -> bool:
        """Whether a step at this timestep is guided by the global tokens."""
        low, high = self.global_guidance_interval
        return self.global_guidance_scale != 1 and low <= timestep <= high


def _interval(value: object) -> tuple[float, float]:
    """Checks an interval of timesteps, and returns it as two floats."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ConfigError(f"global_guidance_interval must be two timesteps, not {shown(value)}")
    low, high = (check_number("a timestep of global_guidance_interval", x, least=0, most=1000) for x in value)
    if low > high:
        raise ConfigError(f"global_guidance_interval must begin with its lower timestep, not {shown(value)}")
    return low, high


# The paper's sizes. Its chunk has 20 latent frames, at 5 latent frames for 16 pixel frames. Its overlap of 12 pixel
# frames is therefore 3.75 latent frames, and its keyframe a second, at 16 pixel frames a second, one in 5; t_α = 20 of
# 50 steps. What comes before the read, two layers of positions and a block of text, is not the paper's.
PAPER_VIN = VINConfig(global_tokens=512, dim=4096, heads=32, layers=4, position_layers=2)
PAPER_CHUNKS = ParallelChunksConfig(chunk_frames=20, overlap=4, keyframe_every=5, fuse_above=0.4)
