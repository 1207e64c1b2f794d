"""The Wan VAE's decoder against diffusers' `AutoencoderKLWan` on the same weights: CPU time of a chunk on one thread,
the two in turn. Gate: their frames agree to 1e-5, relative. Part of decode.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import conv2d
from torch.utils.flop_counter import FlopCounterMode

from causalrope_sp.codec.wan_vae import WanDecoderStream
from causalrope_sp.codec.wan_vae_config import WanVaeConfig
from causalrope_sp.codec.wan_vae_model import WanVae
from causalrope_sp.toybox import WEIGHTS

CHUNK = 3  # latent frames
# name -> (diffusers' VAE, latent height and width)
PEERS: dict[str, tuple[Callable[[], AutoencoderKLWan], tuple[int, int]]] = {
    "toybox": (lambda: AutoencoderKLWan.from_pretrained(WEIGHTS / "codec", torch_dtype=torch.float32), (8, 8)),
    "wan2.1": (AutoencoderKLWan, (96 // 8, 160 // 8)),
}


class PeerStream:
    """diffusers' decoder, whose state is kept between chunks: its own `decode` would begin anew."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self._vae, self._first = vae, True
        self._kept: list[Any] = [None] * vae._cached_conv_counts["decoder"]

    def decode(self, latents_BFCHW: Tensor) -> Tensor:
        """Decodes as `AutoencoderKLWan._decode` does: frame by frame, then concatenates."""
        config = self._vae.config
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (config.latents_mean, config.latents_std))
        latents = self._vae.post_quant_conv((latents_BFCHW * std + mean).transpose(1, 2))
        made = []
        for frame in latents.split(1, 2):
            made.append(self._vae.decoder(frame, feat_cache=self._kept, feat_idx=[0], first_chunk=self._first))
            self._first = False
        pixels = torch.cat(made, 2)
        return (pixels if config.patch_size is None else unpatchify(pixels, config.patch_size)).transpose(1, 2)


@torch.inference_mode()
def compare(name: str, runs: int) -> dict[str, Any]:
    """Times chunks of one of `PEERS` by both decoders in turn.

    Returns:
        Milliseconds of CPU time a chunk (least and median), their ratio, the difference of the frames, and the floor of
        a direct convolution.
    """
    torch.manual_seed(0)
    make, size = PEERS[name]
    theirs = make().eval().requires_grad_(False)
    ours = WanVae(WanVaeConfig.from_json(theirs.config)).eval().requires_grad_(False)
    ours.load_state_dict(theirs.state_dict())
    chunk = torch.randn(1, CHUNK, ours.config.z_dim, *size)
    streams: dict[str, PeerStream | WanDecoderStream] = {
        "diffusers": PeerStream(theirs),
        "ours": WanDecoderStream(ours),
    }
    gigaflop = _gigaflop(ours.config, size)
    floor = 1e3 * gigaflop / _rate()
    for _ in range(2):
        expected, made = (stream.decode(chunk) for stream in streams.values())
        off = float((made - expected).norm() / expected.norm())
        assert off <= 1e-5, f"{name}: frames differ by {off:.1e}"
    spent: dict[str, list[float]] = {kind: [] for kind in streams}
    for _ in range(runs):
        for kind, stream in streams.items():
            started = time.process_time()
            stream.decode(chunk)
            spent[kind].append(1e3 * (time.process_time() - started))
    found: dict[str, Any] = {"vae": name, "pixels": f"{8 * size[0]}x{8 * size[1]}", "gigaflop": round(gigaflop, 2)}
    found["floor_ms"] = round(floor, 1)
    for kind, took in spent.items():
        found |= {f"{kind}_ms": round(min(took), 1), f"{kind}_median_ms": round(float(np.median(took)), 1)}
    found["ratio"] = round(min(spent["ours"]) / min(spent["diffusers"]), 3)
    found["median_ratio"] = round(float(np.median(spent["ours"]) / np.median(spent["diffusers"])), 3)
    return found | {"relative_difference": float(f"{off:.1e}")}


def _gigaflop(config: WanVaeConfig, size: tuple[int, int]) -> float:
    """The arithmetic of a steady chunk without Winograd's transforms, counted where a layer is one convolution."""
    with torch.device("meta"):
        stream, chunk = WanDecoderStream(WanVae(config)), torch.empty(1, CHUNK, config.z_dim, *size)
    stream.decode(chunk)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        stream.decode(chunk)
    return counter.get_total_flops() / 1e9


def _rate() -> float:
    """Measures the GFLOP a second of a large 3×3 convolution in channels-last order, the fastest that torch has."""
    x, weight = torch.randn(3, 96, 96, 160), torch.randn(96, 96, 3, 3)
    x, weight = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, weight))
    took = list[float]()
    for _ in range(5):
        started = time.process_time()
        conv2d(x, weight, padding=1)
        took.append(time.process_time() - started)
    return 2 * x.numel() * 96 * 9 / min(took) / 1e9
