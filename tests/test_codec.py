"""Streaming through the Wan VAE against diffusers' own decode and encode of the whole video."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from causalrope_sp import ConfigError
from causalrope_sp.codec.wan import WanDecoderStream, WanEncoderStream

SIDE, CHANNELS, BATCH = 3, 4, 2
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "residual"])
def codec(request: pytest.FixtureRequest) -> AutoencoderKLWan:
    """Wan 2.1's blocks, and those with shortcuts, which need to know a video's first frame."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        in_channels=12,
        out_channels=12,
        patch_size=2,
        is_residual=request.param,
        latents_mean=[0.5, -1.0, 0.25, 2.0],
        latents_std=[1.5, 0.5, 2.0, 0.75],
    )
    return vae.double().eval().requires_grad_(False)


def statistics(vae: AutoencoderKLWan, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and deviation as diffusers' pipelines shape them, for (B, C, F, H, W)."""
    mean, std = vae.config.latents_mean, vae.config.latents_std
    return torch.tensor(mean, dtype=dtype).view(1, -1, 1, 1, 1), torch.tensor(std, dtype=dtype).view(1, -1, 1, 1, 1)


def pieces(video: Tensor, sizes: list[int]) -> list[Tensor]:
    assert sum(sizes) == video.shape[1]
    return list(video.split(sizes, 1))


@DTYPES
@pytest.mark.parametrize("sizes", [[1] * 5, [3, 2], [1, 4], [2, 1, 2], [5]], ids=str)
def test_decoding_chunk_by_chunk_equals_decoding_the_whole(
    codec: AutoencoderKLWan, sizes: list[int], dtype: torch.dtype
) -> None:
    codec = codec.to(dtype)
    latents = torch.randn(BATCH, 5, CHANNELS, SIDE, SIDE, dtype=dtype, generator=torch.Generator().manual_seed(0))
    mean, std = statistics(codec, dtype)
    expected = codec.decode(latents.transpose(1, 2) * std + mean).sample.transpose(1, 2)

    stream = WanDecoderStream(codec)
    decoded = [stream.decode(piece) for piece in pieces(latents, sizes)]
    frames = [4 * size for size in sizes]
    frames[0] -= 3
    assert [piece.shape for piece in decoded] == [(BATCH, n, 3, 8 * SIDE, 8 * SIDE) for n in frames]
    video = torch.cat(decoded, 1)
    assert video.dtype == dtype
    assert ((video > -1) & (video < 1)).double().mean() > 0.5  # diffusers clamps; here there must be more to compare
    torch.testing.assert_close(video.clamp(-1, 1), expected, rtol=0, atol=TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("sizes", [[1, 4, 4, 4, 4], [5, 12], [1, 8, 8], [9, 4, 4], [17]], ids=str)
def test_encoding_piece_by_piece_equals_encoding_the_whole(
    codec: AutoencoderKLWan, sizes: list[int], dtype: torch.dtype
) -> None:
    codec = codec.to(dtype)
    shape = (BATCH, 17, 3, 8 * SIDE, 8 * SIDE)
    pixels = torch.rand(shape, dtype=dtype, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = statistics(codec, dtype)
    expected = (codec.encode(pixels.transpose(1, 2)).latent_dist.mode() - mean) / std

    stream = WanEncoderStream(codec)
    encoded = [stream.encode(piece) for piece in pieces(pixels, sizes)]
    ends = [(end + 3) // 4 for end in accumulate(sizes)]
    assert [piece.shape[1] for piece in encoded] == [b - a for a, b in zip([0, *ends], ends)]
    latents = torch.cat(encoded, 1)
    assert latents.dtype == dtype
    torch.testing.assert_close(latents, expected.transpose(1, 2), rtol=0, atol=TOLERANCE[dtype])


def test_streams_share_nothing(codec: AutoencoderKLWan) -> None:
    """Two videos at once through one VAE, and a whole decode by diffusers in between, disturb no one."""
    codec = codec.double()
    videos = torch.randn(2, 1, 4, CHANNELS, SIDE, SIDE, dtype=torch.float64)
    alone = [WanDecoderStream(codec).decode(video) for video in videos]
    streams = [WanDecoderStream(codec) for _ in videos]
    parts: list[list[Tensor]] = [[], []]
    for start in range(0, 4, 2):
        for part, stream, video in zip(parts, streams, videos):
            part.append(stream.decode(video[:, start : start + 2]))
        codec.decode(videos[0].transpose(1, 2))
    for part, whole in zip(parts, alone):
        torch.testing.assert_close(torch.cat(part, 1), whole, rtol=0, atol=1e-12)


def test_the_state_matters(codec: AutoencoderKLWan) -> None:
    """Decoding each chunk by itself gives other frames, so the comparisons above would see a state that is lost."""
    codec = codec.double()
    latents = torch.randn(1, 4, CHANNELS, SIDE, SIDE, dtype=torch.float64)
    whole = WanDecoderStream(codec).decode(latents)
    second = WanDecoderStream(codec).decode(latents[:, 2:])
    assert (second[:, -4:] - whole[:, -4:]).abs().max() > 1e-3


@pytest.mark.parametrize(("before", "count"), [(0, 0), (0, 2), (0, 4), (1, 1), (1, 0), (1, 5), (5, 3)])
def test_wrong_frame_counts_are_refused(codec: AutoencoderKLWan, before: int, count: int) -> None:
    codec = codec.double()
    stream, other = WanEncoderStream(codec), WanEncoderStream(codec)
    pixels = torch.rand(1, 9, 3, 8 * SIDE, 8 * SIDE, dtype=torch.float64)
    if before:
        stream.encode(pixels[:, :before])
        other.encode(pixels[:, :before])
    with pytest.raises(ConfigError, match=f"cannot encode {count} pixel frames") as caught:
        stream.encode(pixels[:, :count])
    assert "\n" not in str(caught.value)
    good = pixels[:, :4] if before else pixels[:, :5]
    assert torch.equal(stream.encode(good), other.encode(good))
