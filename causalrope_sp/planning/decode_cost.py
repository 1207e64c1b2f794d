"""The cost of decoding, and the number of ranks that should only decode.

FLOPs are exact for a steady latent frame of the Wan VAE's decoder and tested against torch's FLOP counter; times are
predictions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from causalrope_sp.codec.wan_vae_config import WanVaeConfig
from causalrope_sp.distributed.mesh import possible_cfg_sizes
from causalrope_sp.grid import LatentGrid
from causalrope_sp.planning.cost import Plan, plan
from causalrope_sp.planning.machines import Machine
from causalrope_sp.planning.workload import Workload

# The rate of convolutions divided by that of large matrix products. It is a guess until it is measured: Self-Forcing's
# published frame rates with and without decoding amount to about 270 ms for 12 frames of 480×832 on an H100.
CONVOLUTIONS = 0.15


@dataclass(frozen=True)
class VaeSize:
    """The sizes of a Wan VAE's decoder.

    Args:
        widths: the channels of the first stage's input and of every stage's output, from the latent on.
        doubles_time: for every upsampling, whether it doubles the number of frames.
        blocks: the residual blocks of a stage.
        channels: the channels of the latent.
        patch: the side in pixels of the square that one output position holds.
        halves: whether an upsampling halves the channels, as Wan 2.1's does and Wan 2.2's does not.
    """

    widths: tuple[int, ...] = (384, 384, 384, 192, 96)
    doubles_time: tuple[bool, ...] = (True, True, False)
    blocks: int = 3
    channels: int = 16
    patch: int = 1
    halves: bool = True

    @classmethod
    def of(cls, config: WanVaeConfig) -> VaeSize:
        """Reads the sizes from a VAE's configuration."""
        return cls(
            config.decoder_widths,
            config.temporal_upsample,
            config.num_res_blocks + 1,
            config.z_dim,
            config.patch_size or 1,
            not config.is_residual,
        )

    def decode_flops(self, height: int, width: int) -> int:
        """Returns the FLOPs of one latent frame of height×width latent pixels. The stream's first frame needs fewer."""
        pixels, first = height * width, self.widths[0]
        flops = pixels * (_conv(self.channels, self.channels, 1) + _conv(self.channels, first, 27))
        flops += pixels * (2 * _block(first, first) + _conv(first, 3 * first, 1) + _conv(first, first, 1))
        flops += 4 * pixels**2 * first  # attention over the frame
        for stage, (before, wide) in enumerate(zip(self.widths, self.widths[1:])):
            flops += pixels * _block(before // 2 if stage and self.halves else before, wide)
            flops += pixels * (self.blocks - 1) * _block(wide, wide)
            if stage < len(self.doubles_time):
                if self.doubles_time[stage]:
                    flops += pixels * _conv(wide, 2 * wide, 3)
                    pixels *= 2
                pixels *= 4
                flops += pixels * _conv(wide, wide // 2 if self.halves else wide, 9)
        return flops + pixels * _conv(self.widths[-1], 3 * self.patch**2, 27)

    @property
    def collectives(self) -> int:
        """The collectives per latent frame on spatial shards: one per 3×3 convolution, and one for the attention."""
        stages = len(self.widths) - 1
        return 1 + 4 + 1 + 2 * self.blocks * stages + len(self.doubles_time) + 1

    def decode_ms(self, grid: LatentGrid, frames: int, on: Machine, ranks: int = 1) -> float:
        """Predicts the milliseconds to decode some latent frames.

        Args:
            grid: the latent frame in tokens.
            frames: how many latent frames.
            on: the machine.
            ranks: how many ranks decode a spatial shard each.
        """
        flops = self.decode_flops(grid.latent_height, grid.latent_width) / ranks
        waits = self.collectives * on.latency if ranks > 1 else 0.0
        return 1e3 * frames * (flops / (CONVOLUTIONS * on.matmul) + waits)


@dataclass(frozen=True)
class DecodePlan:
    """How ranks denoise and decode a stream.

    Args:
        decode_ms: the milliseconds that one rank takes to decode a chunk.
        rule: the number of decode ranks by DeDiVAE's balance, N·T_decode / (T_decode + T_denoise).
        decoders: how many ranks only decode; with 0, all ranks denoise and decode in turn.
        chunk_ms: the milliseconds of a chunk, with decoding.
        fps: the pixel frames a second, with decoding.
        denoise: the plan of the ranks that denoise.
    """

    decode_ms: float
    rule: float
    decoders: int
    chunk_ms: float
    fps: float
    denoise: Plan


def plan_decoding(vae: VaeSize, work: Workload, ranks: int, on: Machine) -> DecodePlan:
    """Predicts the fastest number of decode ranks: 0, or one near DeDiVAE's rule.

    Args:
        vae: the sizes of the decoder.
        work: the stream.
        ranks: how many ranks there are in all.
        on: the machine.

    Returns:
        The plan with the fastest chunk; every number of ranks that denoise uses its best strategy.
    """
    decode = vae.decode_ms(work.grid, work.chunk_frames, on)
    denoise = plan(work, 1, on)[0].chunk_ms
    rule = ranks * decode / (decode + denoise)
    decoders = {0, *(n for n in (int(rule), int(rule) + 1, int(rule) + 2) if 0 < n < ranks)}
    plans = [_with_decoders(n, vae, work, ranks, on) for n in sorted(decoders)]
    best = min(plans, key=lambda each: each.chunk_ms)
    return replace(best, decode_ms=decode, rule=rule)


def _with_decoders(decoders: int, vae: VaeSize, work: Workload, ranks: int, on: Machine) -> DecodePlan:
    """The plan with so many decode ranks."""
    cfg_sizes = possible_cfg_sizes(work.guided > 0, ranks - decoders)
    denoise = next(cost for cost in plan(work, ranks - decoders, on, cfg_sizes=cfg_sizes) if cost.chosen)
    decode_ms = vae.decode_ms(work.grid, work.chunk_frames, on, decoders or ranks)
    chunk_ms = max(denoise.chunk_ms, decode_ms) if decoders else denoise.chunk_ms + decode_ms
    fps = denoise.fps * denoise.chunk_ms / chunk_ms
    return DecodePlan(decode_ms, 0.0, decoders, chunk_ms, fps, denoise)


def _conv(wide: int, out: int, kernel: int) -> int:
    """FLOPs of a convolution per output position, with `kernel` taps."""
    return 2 * wide * out * kernel


def _block(wide: int, out: int) -> int:
    """FLOPs of a residual block per position: two 3×3×3 convolutions, and a pointwise one where the width changes."""
    return _conv(wide, out, 27) + _conv(out, out, 27) + (_conv(wide, out, 1) if wide != out else 0)
