"""What decoding is predicted to cost: FLOPs against torch's counter, the balance against trying everything."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from causalrope_sp import LatentGrid
from causalrope_sp.codec.wan_vae import WanDecoderStream
from causalrope_sp.codec.wan_vae_config import WanVaeConfig
from causalrope_sp.codec.wan_vae_model import WanVae
from causalrope_sp.config import PRESETS
from causalrope_sp.planning.cost import plan
from causalrope_sp.planning.decode_cost import VaeSize, plan_decoding
from causalrope_sp.planning.machines import H100
from causalrope_sp.planning.workload import Workload


@pytest.mark.parametrize("size", [(3, 5), (4, 2)])
@pytest.mark.parametrize(
    "sizes",
    [
        {"base_dim": 4, "dim_mult": [1, 2, 2], "temperal_downsample": [True, True], "patch_size": 2},
        {"base_dim": 8, "dim_mult": [1, 2, 4, 4], "temperal_downsample": [False, True, True], "num_res_blocks": 2},
        {"base_dim": 8, "num_res_blocks": 2, "patch_size": 2, "decoder_base_dim": 16, "is_residual": True},
    ],
    ids=["small", "like Wan 2.1's", "like Wan 2.2's"],
)
@torch.no_grad()
def test_flops_are_those_that_torch_counts(sizes: dict[str, object], size: tuple[int, int]) -> None:
    pixels = 3 * sizes.get("patch_size", 1) ** 2  # type: ignore[operator]
    given = {"num_res_blocks": 1, "z_dim": 16, "in_channels": pixels, "out_channels": pixels} | sizes
    with torch.device("meta"):  # where a layer is one call of torch's convolution, as on a GPU
        stream, latents = WanDecoderStream(WanVae(WanVaeConfig.from_json(given))), torch.randn(1, 2, 16, *size)
    stream.decode(latents)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # of the fused one none are counted
        stream.decode(latents[:, :1])
    assert VaeSize.of(WanVaeConfig.from_json(given)).decode_flops(*size) == counter.get_total_flops()


def test_the_sizes_assumed_are_wan_2_1_s() -> None:
    assert VaeSize.of(WanVaeConfig()) == VaeSize()
    with torch.device("meta"):
        assert WanVaeConfig.from_json(AutoencoderKLWan().config) == WanVaeConfig()


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("model", ["wan2.1-1.3b", "wan2.1-14b"])
def test_the_balance_is_the_best_of_all(ranks: int, model: str) -> None:
    work = Workload(PRESETS[model], LatentGrid(30, 52), window=21, chunk_frames=3, steps=4)
    vae = VaeSize()

    def chunk(decoders: int) -> float:
        denoise = min(cost.chunk_ms for cost in plan(work, ranks - decoders, H100))
        decode = vae.decode_ms(work.grid, 3, H100, decoders or ranks)
        return max(denoise, decode) if decoders else denoise + decode

    best = plan_decoding(vae, work, ranks, H100)
    assert best.chunk_ms == pytest.approx(min(chunk(n) for n in range(ranks)), rel=1e-3)
    assert best.chunk_ms == pytest.approx(chunk(best.decoders), rel=1e-3)
    assert best.fps == pytest.approx(12e3 / best.chunk_ms)
