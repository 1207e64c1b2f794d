"""Winograd's convolution in time against torch's own over the same frames."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from causalrope_sp.codec.causal_conv import CausalConv, UpsampleConv
from causalrope_sp.codec.conv_state import ConvCall, ConvState, to_frames
from causalrope_sp.codec.time_winograd import BIASED, block_of, mixed_weights, transforms

CHANNELS, OUT = 24, 20


def convolved(layer: CausalConv, video: Tensor, per_latent: int) -> Tensor:
    frames = to_frames(video).contiguous(memory_format=torch.channels_last)
    return layer(frames, ConvCall(ConvState(), len(video), video.shape[2] // per_latent, False))


@pytest.mark.parametrize("m", [2, 4])
def test_the_transforms_make_a_convolution(m: int) -> None:
    bt, g, at = transforms(m)
    frames, taps = torch.randn(m + 2, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    made = at @ ((g @ taps) * (bt @ frames))
    torch.testing.assert_close(made, frames.unfold(0, 3, 1) @ taps, rtol=0, atol=1e-13)
    assert (at[:, BIASED] == 1).all()
    weights = mixed_weights(torch.randn(OUT, CHANNELS, 3, 3, 3), m)
    assert weights.shape == (m + 2, OUT, CHANNELS, 3, 3)
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


def test_blocks_never_cross_latent_frames() -> None:
    assert [block_of(frames) for frames in (1, 2, 3, 4, 6, 8)] == [1, 2, 1, 4, 2, 4]


@torch.no_grad()
@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 1, 1)], ids=str)
@pytest.mark.parametrize("per_latent", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 2])
def test_it_is_torchs_convolution(kernel: tuple[int, int, int], per_latent: int, batch: int) -> None:
    torch.manual_seed(0)
    layer = CausalConv(CHANNELS, OUT, kernel).double()
    video = torch.randn(batch, CHANNELS, 3 * per_latent, 5, 3, dtype=torch.float64)
    around = (kernel[2] // 2,) * 2 + (kernel[1] // 2,) * 2 + (2, 0)
    exact = to_frames(functional.conv3d(functional.pad(video, around), layer.weight, layer.bias))
    torch.testing.assert_close(convolved(layer, video, per_latent), exact, rtol=0, atol=1e-12)
    single = layer.float()
    direct = to_frames(functional.conv3d(functional.pad(video.float(), around), layer.weight, layer.bias))
    made = convolved(single, video.float(), per_latent)
    off = [float((found.double() - exact).norm()) for found in (made, direct)]
    assert 0 < off[0] < 5 * off[1]


@torch.no_grad()
def test_phases_are_a_convolution_of_the_upsampled_picture() -> None:
    torch.manual_seed(0)
    layer, frames = UpsampleConv(CHANNELS, OUT).double(), torch.randn(3, CHANNELS, 5, 4, dtype=torch.float64)
    expected = layer(functional.interpolate(frames, scale_factor=2, mode="nearest"))
    call = ConvCall(ConvState(), 1, 3, False)
    made = layer.upsample(frames.contiguous(memory_format=torch.channels_last), call)
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-12)
