"""Streaming through the Wan VAE against diffusers' own decode and encode of the whole video."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders import autoencoder_kl_wan
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from causalrope_sp import ConfigError
from causalrope_sp.codec.conv_state import ConvState
from causalrope_sp.codec.wan_vae import WanDecoderStream, WanEncoderStream
from causalrope_sp.codec.wan_vae_model import WanVae
from tests.support.codecs import CHANNELS, small_wan_vae, wan_vae_like

SIDE, BATCH = 3, 2
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}  # of the norm of the difference, relative
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
# Wan 2.1's blocks; those with shortcuts, which need to know a video's first frame; Wan 2.1's stages, narrow, and with
# attention in the encoder; a decoder that is wider than the encoder
KINDS = {
    "plain": lambda: small_wan_vae(False),
    "residual": lambda: small_wan_vae(True),
    "wan 2.1": lambda: AutoencoderKLWan(base_dim=4, attn_scales=[0.5]),
    "wide decoder": lambda: AutoencoderKLWan(
        base_dim=4, decoder_base_dim=6, dim_mult=[2, 1, 3, 2], num_res_blocks=1, temperal_downsample=[True, False, True]
    ),
}


class Pair(NamedTuple):
    """diffusers' VAE and this library's, of the same weights."""

    theirs: AutoencoderKLWan
    ours: WanVae

    def to(self, dtype: torch.dtype) -> Pair:
        return Pair(self.theirs.to(dtype), self.ours.to(dtype))

    @property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation as diffusers' pipelines shape them, for (B, C, F, H, W)."""
        mean, std = (torch.tensor(v, dtype=self.theirs.dtype) for v in (self.ours.config.latents_mean, self._std))
        return mean.view(1, -1, 1, 1, 1), std.view(1, -1, 1, 1, 1)

    @property
    def _std(self) -> tuple[float, ...]:
        return self.ours.config.latents_std

    def decode(self, latents_BFCHW: Tensor) -> Tensor:
        mean, std = self.statistics
        return self.theirs.decode(latents_BFCHW.transpose(1, 2) * std + mean).sample.transpose(1, 2)

    def encode(self, pixels_BT3HW: Tensor) -> Tensor:
        mean, std = self.statistics
        return ((self.theirs.encode(pixels_BT3HW.transpose(1, 2)).latent_dist.mode() - mean) / std).transpose(1, 2)

    def latents(self, frames: int, height: int = SIDE, width: int = SIDE) -> Tensor:
        shape = BATCH, frames, self.ours.config.z_dim, height, width
        return torch.randn(shape, dtype=self.theirs.dtype, generator=torch.Generator().manual_seed(0))

    def pixels(self, frames: int, height: int = SIDE, width: int = SIDE) -> Tensor:
        shape = BATCH, frames, 3, 8 * height, 8 * width
        return torch.rand(shape, dtype=self.theirs.dtype, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(autouse=True)
def diffusers_without_two_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64 diffusers upsamples in float32, and its encoder cannot call the attention that `attn_scales` adds."""
    forward = autoencoder_kl_wan.WanAttentionBlock.forward

    def attend(self: nn.Module, x: Tensor, feat_cache: Any = None, feat_idx: Any = None) -> Tensor:
        return forward(self, x)

    monkeypatch.setattr(autoencoder_kl_wan.WanUpsample, "forward", nn.Upsample.forward)
    monkeypatch.setattr(autoencoder_kl_wan.WanAttentionBlock, "forward", attend)


@pytest.fixture(scope="module", params=KINDS)
def codec(request: pytest.FixtureRequest) -> Pair:
    torch.manual_seed(0)
    theirs = KINDS[request.param]().eval().requires_grad_(False)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("gamma"):
                parameter.mul_(1 + torch.rand_like(parameter))
    return Pair(theirs, wan_vae_like(theirs))


@pytest.fixture
def small() -> Pair:
    theirs = small_wan_vae(False).eval().requires_grad_(False)
    return Pair(theirs, wan_vae_like(theirs))


def error_of(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def pieces(video: Tensor, sizes: list[int]) -> list[Tensor]:
    assert sum(sizes) == video.shape[1]
    return list(video.split(sizes, 1))


@DTYPES
@pytest.mark.parametrize("sizes", [[1] * 5, [3, 2], [1, 4], [5]], ids=str)
def test_decoding_chunk_by_chunk_equals_decoding_the_whole(codec: Pair, sizes: list[int], dtype: torch.dtype) -> None:
    codec = codec.to(dtype)
    latents = codec.latents(5)
    expected = codec.decode(latents)
    stream = WanDecoderStream(codec.ours)
    decoded = [stream.decode(piece) for piece in pieces(latents, sizes)]
    frames = [4 * size for size in sizes]
    frames[0] -= 3
    assert [piece.shape for piece in decoded] == [(BATCH, n, 3, 8 * SIDE, 8 * SIDE) for n in frames]
    video = torch.cat(decoded, 1)
    assert video.dtype == dtype
    assert ((video > -1) & (video < 1)).double().mean() > 0.5  # diffusers clamps; here there must be more to compare
    assert error_of(video.clamp(-1, 1), expected) <= TOLERANCE[dtype]


@DTYPES
@pytest.mark.parametrize("sizes", [[1, 4, 4, 4, 4], [5, 12], [9, 4, 4], [17]], ids=str)
def test_encoding_piece_by_piece_equals_encoding_the_whole(codec: Pair, sizes: list[int], dtype: torch.dtype) -> None:
    codec = codec.to(dtype)
    pixels = codec.pixels(17)
    stream = WanEncoderStream(codec.ours)
    encoded = [stream.encode(piece) for piece in pieces(pixels, sizes)]
    ends = [(end + 3) // 4 for end in accumulate(sizes)]
    assert [piece.shape[1] for piece in encoded] == [b - a for a, b in zip([0, *ends], ends)]
    latents = torch.cat(encoded, 1)
    assert latents.dtype == dtype
    assert error_of(latents, codec.encode(pixels)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("size", [(3, 3), (2, 5), (1, 1), (4, 7), (8, 6)], ids=str)
def test_no_chunking_changes_a_bit(codec: Pair, size: tuple[int, int]) -> None:
    codec = codec.to(torch.float32)
    latents, pixels = codec.latents(7, *size), codec.pixels(17, *size)
    decoded, encoded = WanDecoderStream(codec.ours).decode(latents), WanEncoderStream(codec.ours).encode(pixels)
    for sizes in ([1] * 7, [3, 3, 1], [2, 5]):
        decoder = WanDecoderStream(codec.ours)
        assert torch.equal(torch.cat([decoder.decode(piece) for piece in pieces(latents, sizes)], 1), decoded)
    for sizes in ([1, 4, 4, 4, 4], [5, 12], [9, 8]):
        encoder = WanEncoderStream(codec.ours)
        assert torch.equal(torch.cat([encoder.encode(piece) for piece in pieces(pixels, sizes)], 1), encoded)


def test_autograd_records_the_same_numbers_and_diffusers_gradients(codec: Pair) -> None:
    """With gradients each layer is one call of torch's convolution; its state is the one that streams without have."""
    codec = codec.to(torch.float64)
    latents, pixels = codec.latents(3), codec.pixels(9)
    expected = WanDecoderStream(codec.ours).decode(latents), WanEncoderStream(codec.ours).encode(pixels)
    gradients = []
    for vae in codec:
        vae.requires_grad_(True)
    started, encoder = WanDecoderStream(codec.ours), WanEncoderStream(codec.ours)
    with torch.no_grad():
        first = started.decode(latents[:, :1]), encoder.encode(pixels[:, :5])
    rest = started.decode(latents[:, 1:]), encoder.encode(pixels[:, 5:])
    for head, tail, whole in zip(first, rest, expected):
        assert tail.requires_grad
        torch.testing.assert_close(torch.cat([head, tail], 1), whole, rtol=0, atol=1e-12)
    ours = WanDecoderStream(codec.ours).decode(latents), WanEncoderStream(codec.ours).encode(pixels)
    theirs = codec.decode(latents), codec.encode(pixels)
    for vae, (video, encoded) in ((codec.ours, (ours[0].clamp(-1, 1), ours[1])), (codec.theirs, theirs)):
        (video.square().mean() + encoded.square().mean()).backward()
        gradients.append({name: parameter.grad for name, parameter in vae.named_parameters()})
        vae.zero_grad()
        vae.requires_grad_(False)
    mine, judge = gradients
    assert max(float(grad.abs().max()) for grad in mine.values() if grad is not None) > 1e-4
    for name, grad in mine.items():
        torch.testing.assert_close(grad, judge[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_it_errs_no_more_than_diffusers(codec: Pair, dtype: torch.dtype) -> None:
    """Against float64; Winograd's transforms and summed kernels cost nothing to speak of."""
    codec = codec.to(dtype)
    latents, pixels = codec.latents(5), codec.pixels(9)
    ours = WanDecoderStream(codec.ours).decode(latents).clamp(-1, 1), WanEncoderStream(codec.ours).encode(pixels)
    theirs = codec.decode(latents), codec.encode(pixels)
    codec = codec.to(torch.float64)
    exact = codec.decode(latents.double()), codec.encode(pixels.double())
    for made, judge, truth in zip(ours, theirs, exact):
        assert made.dtype == dtype
        assert 0 < error_of(made, truth) <= 1.3 * error_of(judge, truth)


def bytes_of(state: ConvState) -> int:
    """What a stream keeps between two calls, by the memory that its tensors hold on to, not by what they show of it."""
    return sum(part.untyped_storage().nbytes() for part in state.frames.values())


def test_a_stream_of_any_length_keeps_as_much(codec: Pair) -> None:
    codec = codec.to(torch.float32)
    decoder, encoder = WanDecoderStream(codec.ours), WanEncoderStream(codec.ours)
    encoder.encode(torch.zeros(1, 1, 3, 8 * SIDE, 8 * SIDE))
    kept: list[tuple[int, int]] = []
    for count in (3, 1, 3, 2, 3, 3, 3, 3):
        decoder.decode(torch.zeros(1, count, codec.ours.config.z_dim, SIDE, SIDE))
        encoder.encode(torch.zeros(1, 4 * count, 3, 8 * SIDE, 8 * SIDE))
        kept.append((bytes_of(decoder.state), bytes_of(encoder.state)))
    assert min(kept[0]) > 0
    assert len(set(kept)) == 1


def test_streams_share_nothing(small: Pair) -> None:
    """Two videos at once through one VAE disturb no one."""
    videos = torch.randn(2, 1, 4, CHANNELS, SIDE, SIDE)
    alone = [WanDecoderStream(small.ours).decode(video) for video in videos]
    streams = [WanDecoderStream(small.ours) for _ in videos]
    parts: list[list[Tensor]] = [[], []]
    for start in range(0, 4, 2):
        for part, stream, video in zip(parts, streams, videos):
            part.append(stream.decode(video[:, start : start + 2]))
    for part, whole in zip(parts, alone):
        assert torch.equal(torch.cat(part, 1), whole)


def test_a_state_is_forked_saved_and_gone_on_from(small: Pair, tmp_path: Path) -> None:
    latents, pixels = small.latents(6), small.pixels(21)
    whole, encoded = WanDecoderStream(small.ours).decode(latents), WanEncoderStream(small.ours).encode(pixels)
    decoder, encoder = WanDecoderStream(small.ours), WanEncoderStream(small.ours)
    decoder.decode(latents[:, :2])
    encoder.encode(pixels[:, :9])
    fork = decoder.state.fork()
    for name, stream in (("decoder", decoder), ("encoder", encoder)):
        save_file({key: part.contiguous() for key, part in stream.state.frames.items()}, tmp_path / name)
    decoder.decode(-latents[:, 2:])
    for state in (fork, ConvState(load_file(tmp_path / "decoder"))):
        assert torch.equal(WanDecoderStream(small.ours, state=state).decode(latents[:, 2:]), whole[:, 5:])
    state = ConvState(load_file(tmp_path / "encoder"))
    assert torch.equal(WanEncoderStream(small.ours, state=state).encode(pixels[:, 9:]), encoded[:, 3:])


def test_the_state_matters(small: Pair) -> None:
    """Decoding each chunk by itself gives other frames, so the comparisons above would see a state that is lost."""
    latents = small.latents(4)
    whole = WanDecoderStream(small.ours).decode(latents)
    second = WanDecoderStream(small.ours).decode(latents[:, 2:])
    assert (second[:, -4:] - whole[:, -4:]).abs().max() > 1e-3


def test_weights_that_change_are_taken_up(small: Pair) -> None:
    latents = small.latents(3)
    before = WanDecoderStream(small.ours).decode(latents)
    with torch.no_grad():
        for vae in small:
            for parameter in vae.decoder.parameters():
                parameter.mul_(1.1)
    after = WanDecoderStream(small.ours).decode(latents)
    assert (after - before).abs().max() > 1e-2
    assert error_of(after.clamp(-1, 1), small.decode(latents)) <= 1e-5


@pytest.mark.parametrize(("before", "count"), [(0, 0), (0, 2), (0, 4), (1, 1), (1, 0), (1, 5), (5, 3)])
def test_wrong_frame_counts_are_refused(small: Pair, before: int, count: int) -> None:
    stream, other = WanEncoderStream(small.ours), WanEncoderStream(small.ours)
    pixels = torch.rand(1, 9, 3, 8 * SIDE, 8 * SIDE)
    if before:
        stream.encode(pixels[:, :before])
        other.encode(pixels[:, :before])
    with pytest.raises(ConfigError, match=f"cannot encode {count} pixel frames") as caught:
        stream.encode(pixels[:, :count])
    assert "\n" not in str(caught.value)
    good = pixels[:, :4] if before else pixels[:, :5]
    assert torch.equal(stream.encode(good), other.encode(good))
