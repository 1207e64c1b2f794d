"""Streaming through the Wan VAE against diffusers' own decode and encode of the whole video."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from causalrope_sp import ConfigError
from causalrope_sp.codec.wan_vae import WanDecoderStream, WanEncoderStream
from tests.support.codecs import CHANNELS, small_wan_vae

SIDE, BATCH = 3, 2
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "residual"])
def codec(request: pytest.FixtureRequest) -> AutoencoderKLWan:
    """Wan 2.1's blocks, and those with shortcuts, which need to know a video's first frame."""
    return small_wan_vae(request.param).double().eval().requires_grad_(False)


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


@contextmanager
def pointwise_by_frame(codec: AutoencoderKLWan) -> Iterator[None]:
    """diffusers takes its two pointwise convolutions over all latent frames at once, where the library below chooses
    another order of additions for another number of them: the one difference that is left, taken away."""

    def by_frame(convolution: nn.Module) -> Callable[[Tensor], Tensor]:
        forward = convolution.forward
        return lambda x: torch.cat([forward(frame.contiguous()) for frame in x.split(1, 2)], 2)

    convolutions = codec.quant_conv, codec.post_quant_conv
    for convolution in convolutions:
        convolution.forward = by_frame(convolution)
    yield
    for convolution in convolutions:
        del convolution.forward


@DTYPES
@pytest.mark.parametrize("size", [(3, 3), (2, 5), (1, 1), (4, 7), (8, 6)], ids=str)
def test_no_chunking_changes_a_bit_and_diffusers_has_the_same_bits(
    codec: AutoencoderKLWan, size: tuple[int, int], dtype: torch.dtype
) -> None:
    codec = codec.to(dtype)
    mean, std = statistics(codec, dtype)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(BATCH, 7, CHANNELS, *size, dtype=dtype, generator=generator)
    pixels = torch.rand(BATCH, 17, 3, 8 * size[0], 8 * size[1], dtype=dtype, generator=generator) * 2 - 1
    with pointwise_by_frame(codec):
        decoded = codec.decode(latents.transpose(1, 2) * std + mean).sample.transpose(1, 2)
        encoded = ((codec.encode(pixels.transpose(1, 2)).latent_dist.mode() - mean) / std).transpose(1, 2)
    for sizes in ([1] * 7, [3, 3, 1], [2, 5], [7]):
        decoder = WanDecoderStream(codec)
        video = torch.cat([decoder.decode(piece) for piece in pieces(latents, sizes)], 1)
        assert torch.equal(video.clamp(-1, 1), decoded)
    for sizes in ([1, 4, 4, 4, 4], [5, 12], [9, 8], [17]):
        encoder = WanEncoderStream(codec)
        assert torch.equal(torch.cat([encoder.encode(piece) for piece in pieces(pixels, sizes)], 1), encoded)


def bytes_of(state: list[Any]) -> int:
    """What a stream keeps between two calls, by the memory that its tensors hold on to, not by what they show of it."""
    return sum(part.untyped_storage().nbytes() for part in state if isinstance(part, Tensor))


def test_a_stream_of_any_length_keeps_as_much(codec: AutoencoderKLWan) -> None:
    codec = codec.to(torch.float32)
    decoder, encoder = WanDecoderStream(codec), WanEncoderStream(codec)
    encoder.encode(torch.zeros(1, 1, 3, 8 * SIDE, 8 * SIDE))
    kept: list[tuple[int, int]] = []
    for count in (3, 1, 3, 2, 3, 3, 3, 3):
        decoder.decode(torch.zeros(1, count, CHANNELS, SIDE, SIDE))
        encoder.encode(torch.zeros(1, 4 * count, 3, 8 * SIDE, 8 * SIDE))
        kept.append((bytes_of(decoder.state), bytes_of(encoder.state)))
    assert min(kept[0]) > 0
    assert len(set(kept)) == 1


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
