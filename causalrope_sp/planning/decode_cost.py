"""What decoding costs, and how many of the ranks should do nothing else.

FLOPs are exact for a steady latent frame of the Wan VAE's decoder and tested against torch's counter; times are
predictions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from causalrope_sp.distributed.mesh import possible_cfg_sizes
from causalrope_sp.grid import LatentGrid
from causalrope_sp.planning.cost import Plan, plan
from causalrope_sp.planning.machines import Machine
from causalrope_sp.planning.workload import Workload

# Of the rate of large matrix products: what Self-Forcing's published frame rates with and without decoding amount to,
# about 270 ms for 12 frames of 480×832 on an H100. A guess until it is measured.
CONVOLUTIONS = 0.15


@dataclass(frozen=True)
class VaeSize:
    """The sizes of a Wan VAE's decoder, stage by stage from the latent on; `patch` is the side of a pixel square."""

    widths: tuple[int, ...] = (384, 384, 384, 192, 96)
    doubles_time: tuple[bool, ...] = (True, True, False)
    blocks: int = 3
    channels: int = 16
    patch: int = 1

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> VaeSize:
        """That of diffusers' `AutoencoderKLWan` with this configuration."""
        multiples = config["dim_mult"]
        base = config.get("decoder_base_dim") or config["base_dim"]
        return cls(
            tuple(base * m for m in (multiples[-1], *reversed(multiples))),
            tuple(reversed(config["temperal_downsample"])),
            config["num_res_blocks"] + 1,
            config["z_dim"],
            config.get("patch_size") or 1,
        )

    def decode_flops(self, height: int, width: int) -> int:
        """FLOPs of one latent frame, not the first, of height×width latent pixels."""
        places, first = height * width, self.widths[0]
        flops = places * (_conv(self.channels, self.channels, 1) + _conv(self.channels, first, 27))
        flops += places * (2 * _block(first, first) + _conv(first, 3 * first, 1) + _conv(first, first, 1))
        flops += 4 * places**2 * first  # attention over the frame
        for stage, (before, wide) in enumerate(zip(self.widths, self.widths[1:])):
            flops += places * _block(before if stage == 0 else before // 2, wide)
            flops += places * (self.blocks - 1) * _block(wide, wide)
            if stage < len(self.doubles_time):
                if self.doubles_time[stage]:
                    flops += places * _conv(wide, 2 * wide, 3)
                    places *= 2
                places *= 4
                flops += places * _conv(wide, wide // 2, 9)
        return flops + places * _conv(self.widths[-1], 3 * self.patch**2, 27)

    @property
    def collectives(self) -> int:
        """Collectives a latent frame where ranks decode in strips: one a convolution of 3×3, and one in the middle."""
        stages = len(self.widths) - 1
        return 1 + 4 + 1 + 2 * self.blocks * stages + len(self.doubles_time) + 1

    def decode_ms(self, grid: LatentGrid, frames: int, on: Machine, ranks: int = 1) -> float:
        """Predicted milliseconds for so many latent frames on some ranks, a strip each."""
        flops = self.decode_flops(grid.latent_height, grid.latent_width) / ranks
        waits = self.collectives * on.latency if ranks > 1 else 0.0
        return 1e3 * frames * (flops / (CONVOLUTIONS * on.matmul) + waits)


@dataclass(frozen=True)
class DecodePlan:
    """The fastest way to denoise and decode on some ranks: `decoders` of them only decode, or, with 0, all of them do
    both in turn (`together`). `rule` is what DeDiVAE's balance, N·T_decode / (T_decode + T_denoise), comes to."""

    decode_ms: float
    rule: float
    decoders: int
    chunk_ms: float
    fps: float
    denoise: Plan


def plan_decoding(vae: VaeSize, work: Workload, ranks: int, on: Machine) -> DecodePlan:
    """Tries numbers of decode ranks around the rule, and none; times are those of `plan`, the best strategy each."""
    decode = vae.decode_ms(work.grid, work.chunk_frames, on)
    alone = plan(work, 1, on)[0].chunk_ms
    rule = ranks * decode / (decode + alone)
    tries = {0, *(n for n in (int(rule), int(rule) + 1, int(rule) + 2) if 0 < n < ranks)}
    found = [_with_decoders(n, vae, work, ranks, on) for n in sorted(tries)]
    best = min(found, key=lambda each: each.chunk_ms)
    return replace(best, decode_ms=decode, rule=rule)


def _with_decoders(decoders: int, vae: VaeSize, work: Workload, ranks: int, on: Machine) -> DecodePlan:
    cfg_sizes = possible_cfg_sizes(work.guided > 0, ranks - decoders)
    denoise = next(cost for cost in plan(work, ranks - decoders, on, cfg_sizes=cfg_sizes) if cost.chosen)
    decode_ms = vae.decode_ms(work.grid, work.chunk_frames, on, decoders or ranks)
    chunk_ms = max(denoise.chunk_ms, decode_ms) if decoders else denoise.chunk_ms + decode_ms
    fps = denoise.fps * denoise.chunk_ms / chunk_ms
    return DecodePlan(decode_ms, 0.0, decoders, chunk_ms, fps, denoise)


def _conv(wide: int, out: int, kernel: int) -> int:
    return 2 * wide * out * kernel


def _block(wide: int, out: int) -> int:
    """A residual block: two convolutions of 3×3×3, and a pointwise one past them where the width changes."""
    return _conv(wide, out, 27) + _conv(out, out, 27) + (_conv(wide, out, 1) if wide != out else 0)
