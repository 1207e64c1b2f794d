"""The tiny autoencoder, streamed, against all frames at once by plain functions on tensors under their public names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor

from causalrope_sp import CausalVideoPipeline, CheckpointError, ConfigError
from causalrope_sp.codec import load_codec
from causalrope_sp.codec.taehv import TaehvCodec
from causalrope_sp.codec.taehv_model import Taehv, TaehvConfig
from causalrope_sp.codec.wan_vae_config import WAN_2_2
from causalrope_sp.toybox import WEIGHTS
from tests.support.videos import video_of

# taew2_1's own sizes, and narrow ones that differ wherever they can
TAEW2_1 = TaehvConfig(16, 64, (256, 128, 64, 64), (2, 2, 1), (1, 2, 2))
NARROW = TaehvConfig(5, 4, (8, 6, 4, 2), (2, 2, 1), (1, 2, 2))
PATCHED = TaehvConfig(3, 4, (6, 4, 4, 2), (1, 2, 1), (1, 1, 2), patch=2)
BATCH = 2
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
CONFIGS = pytest.mark.parametrize("config", [NARROW, PATCHED], ids=["narrow", "patched"])

# where a memory block, a layer that changes time, and a plain convolution of both networks stand in the public files
SHAPES = {
    "encoder.0.weight": (64, 3, 3, 3),
    "encoder.0.bias": (64,),
    "encoder.2.conv.weight": (64, 128, 1, 1),
    "encoder.3.weight": (64, 64, 3, 3),
    "encoder.4.conv.0.weight": (64, 128, 3, 3),
    "encoder.6.conv.4.bias": (64,),
    "encoder.7.conv.weight": (64, 128, 1, 1),
    "encoder.12.conv.weight": (64, 64, 1, 1),
    "encoder.16.conv.2.weight": (64, 64, 3, 3),
    "encoder.17.weight": (16, 64, 3, 3),
    "decoder.1.weight": (256, 16, 3, 3),
    "decoder.3.conv.0.weight": (256, 512, 3, 3),
    "decoder.7.conv.weight": (256, 256, 1, 1),
    "decoder.8.weight": (128, 256, 3, 3),
    "decoder.13.conv.weight": (256, 128, 1, 1),
    "decoder.17.conv.4.weight": (64, 64, 3, 3),
    "decoder.19.conv.weight": (128, 64, 1, 1),
    "decoder.20.weight": (64, 64, 3, 3),
    "decoder.22.bias": (3,),
}


def make(config: TaehvConfig, dtype: torch.dtype = torch.float64) -> Taehv:
    torch.manual_seed(0)
    model = Taehv(config).double()
    for parameter in model.parameters():
        parameter.data.mul_(2)  # so that a frame seen too much or too little shows
    return model.to(dtype)


def convolved(x_BTCHW: Tensor, tensors: dict[str, Tensor], name: str, stride: int = 1) -> Tensor:
    """Frame by frame."""
    weight = tensors[f"{name}.weight"]
    bias, padding = tensors.get(f"{name}.bias"), weight.shape[-1] // 2
    return torch.stack([F.conv2d(frame, weight, bias, stride, padding) for frame in x_BTCHW.unbind(1)], 1)


def remembered(x_BTCHW: Tensor, tensors: dict[str, Tensor], name: str) -> Tensor:
    """A memory block: every frame with the one before it, the first with nothing."""
    before = torch.cat([torch.zeros_like(x_BTCHW[:, :1]), x_BTCHW[:, :-1]], 1)
    inner = convolved(torch.cat([x_BTCHW, before], 2), tensors, f"{name}.conv.0").relu()
    inner = convolved(inner, tensors, f"{name}.conv.2").relu()
    return (convolved(inner, tensors, f"{name}.conv.4") + x_BTCHW).relu()


def encoded_whole(x: Tensor, tensors: dict[str, Tensor], config: TaehvConfig) -> Tensor:
    x = convolved(F.pixel_unshuffle((x + 1) / 2, config.patch), tensors, "encoder.0").relu()
    place = 2
    for stride in config.pools:
        together = torch.stack([torch.cat(group.unbind(1), 1) for group in x.split(stride, 1)], 1)
        x = convolved(convolved(together, tensors, f"encoder.{place}.conv"), tensors, f"encoder.{place + 1}", 2)
        for block in range(place + 2, place + 5):
            x = remembered(x, tensors, f"encoder.{block}")
        place += 5
    return convolved(x, tensors, f"encoder.{place}")


def decoded_whole(x: Tensor, tensors: dict[str, Tensor], config: TaehvConfig) -> Tensor:
    x = convolved((x / 3).tanh() * 3, tensors, "decoder.1").relu()
    place, total = 3, 1
    for stride in config.grows:
        for block in range(place, place + 3):
            x = remembered(x, tensors, f"decoder.{block}")
        x = x.repeat_interleave(2, 3).repeat_interleave(2, 4)
        grown = convolved(x, tensors, f"decoder.{place + 4}.conv")
        x = torch.stack([part for frame in grown.unbind(1) for part in frame.chunk(stride, 1)], 1)
        x = convolved(x, tensors, f"decoder.{place + 5}")
        place, total = place + 6, total * stride
    pixels = F.pixel_shuffle(convolved(x.relu(), tensors, f"decoder.{place + 1}"), config.patch)
    return pixels[:, total - 1 :] * 2 - 1


def test_the_names_and_shapes_are_those_of_the_public_file() -> None:
    with torch.device("meta"):
        state = Taehv(TAEW2_1).state_dict()
    assert {name: tuple(state[name].shape) for name in SHAPES} == SHAPES
    assert len(state) == 2 * 2 + 6 + 9 * 6 + 2 * 2 + 6 + 9 * 6  # ends with a bias, pools and grows, memory blocks


@DTYPES
@CONFIGS
def test_streams_are_the_whole_and_no_cut_changes_a_bit(config: TaehvConfig, dtype: torch.dtype) -> None:
    codec = TaehvCodec(make(config, dtype))
    tensors, stride = dict(codec.model.state_dict()), codec.temporal_stride
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(BATCH, 6, config.channels, 3, 5, dtype=dtype, generator=generator)
    expected = decoded_whole(latents, tensors, config)
    assert expected.shape == (BATCH, 1 + stride * 5, 3, 3 * codec.spatial_stride, 5 * codec.spatial_stride)
    videos = []
    for sizes in ([1] * 6, [3, 3], [1, 3, 2], [6]):
        decoder = codec.decoder()
        videos.append(torch.cat([decoder.decode(part) for part in latents.split(sizes, 1)], 1))
    assert all(torch.equal(video, videos[0]) for video in videos)
    torch.testing.assert_close(videos[0], expected, rtol=0, atol=TOLERANCE[dtype])

    pixels = torch.rand(BATCH, 1 + 4 * stride, *expected.shape[2:], dtype=dtype, generator=generator) * 2 - 1
    complete = encoded_whole(pixels[:, : 4 * stride], tensors, config)
    results = []
    for sizes in ([1, 1, 1, 1, 1], [1, 4], [3, 2], [5]):
        encoder, cut = codec.encoder(), [stride * size for size in sizes]
        cut[0] -= stride - 1
        results.append(torch.cat([encoder.encode(part) for part in pixels.split(cut, 1)], 1))
    assert all(torch.equal(result, results[0]) for result in results)
    torch.testing.assert_close(results[0], complete, rtol=0, atol=TOLERANCE[dtype])


def test_a_stream_of_any_length_keeps_as_much() -> None:
    codec = TaehvCodec(make(NARROW))
    decoder, encoder = codec.decoder(), codec.encoder()
    encoder.encode(torch.zeros(1, 1, 3, 16, 16, dtype=torch.float64))
    kept = set()
    for count in (3, 1, 2, 3):
        decoder.decode(torch.zeros(1, count, 5, 2, 2, dtype=torch.float64))
        encoder.encode(torch.zeros(1, 4 * count, 3, 16, 16, dtype=torch.float64))
        states = [*decoder.state.frames.values(), *encoder.state.frames.values(), encoder.rest]
        kept.add(sum(state.untyped_storage().nbytes() for state in states if state is not None))
    assert len(kept) == 1
    assert len(states) == 9 + 9 + 1


@pytest.mark.parametrize("count", [0, 2, 4])
def test_wrong_frame_counts_are_refused(count: int) -> None:
    encoder = TaehvCodec(make(NARROW)).encoder()
    with pytest.raises(ConfigError, match=rf"cannot encode {count} pixel frames: a stream takes 1 \+ 4n"):
        encoder.encode(torch.zeros(1, count, 3, 16, 16, dtype=torch.float64))


@CONFIGS
def test_a_file_is_read_in_the_shape_it_has(config: TaehvConfig, tmp_path: Path) -> None:
    model = make(config, torch.float16)
    torch.save(model.state_dict(), tmp_path / "taew2_1.pth")
    codec = load_codec(tmp_path / "taew2_1.pth", "taehv")
    assert isinstance(codec, TaehvCodec)
    assert codec.model.config == config
    assert codec.dtype == torch.float32
    latents = torch.randn(1, 2, config.channels, 2, 2)
    assert torch.equal(codec.decoder().decode(latents), TaehvCodec(model.float()).decoder().decode(latents))


@pytest.mark.parametrize("channels", [16, 48])
def test_light_files_have_latents_that_are_not_normalized(channels: int, tmp_path: Path) -> None:
    """LightX2V's files, by their names, with the statistics of diffusers' VAE, or of Wan 2.2's."""
    model = make(TaehvConfig(channels, 4, (6, 4, 4, 2), (2, 2, 1), (1, 2, 2), patch=channels // 16), torch.float32)
    for name in ("lighttae", "tae"):
        torch.save(model.state_dict(), tmp_path / f"{name}w2.pth")
    light, plain = (load_codec(tmp_path / f"{name}w2.pth") for name in ("lighttae", "tae"))
    known = AutoencoderKLWan().config if channels == 16 else WAN_2_2.as_json()
    mean, std = (torch.tensor(known[key]).view(-1, 1, 1) for key in ("latents_mean", "latents_std"))
    latents = torch.randn(1, 3, channels, 2, 2)
    assert torch.equal(light.decoder().decode(latents), plain.decoder().decode(latents * std + mean))
    pixels = torch.rand(1, 9, 3, 2 * light.spatial_stride, 2 * light.spatial_stride) * 2 - 1
    encoded = light.encoder().encode(pixels) * std + mean
    torch.testing.assert_close(encoded, plain.encoder().encode(pixels), rtol=1e-5, atol=1e-6)


def test_light_files_of_other_channels_are_one_line(tmp_path: Path) -> None:
    torch.save(make(NARROW).state_dict(), tmp_path / "LightTAE.pth")
    with pytest.raises(
        CheckpointError, match=r"has 5 latent channels that are not normalized; .* 16 and 48 channels alone"
    ):
        load_codec(tmp_path / "LightTAE.pth")


def test_what_does_not_fit_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "taew2_1.pth"
    for name, says in (
        ("decoder.22.bias", "1 missing: decoder.22.bias"),
        ("encoder.2.conv.weight", "1 missing: encoder.2.conv.weight"),
        (None, "encodes 4 frames into one and decodes 2 from it"),
    ):
        config = NARROW if name else TaehvConfig(5, 4, (8, 6, 4, 2), (2, 2, 1), (1, 1, 2))
        state = make(config).state_dict()
        if name:
            del state[name]
        torch.save(state, file)
        with pytest.raises(CheckpointError, match=f"cannot read the codec: .*taew2_1.pth: {says}") as caught:
            load_codec(file)
        assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="holds a wan codec, not taehv"):
        load_codec(WEIGHTS / "codec", "taehv")


def test_a_pipeline_takes_it_in_place_of_its_own(tmp_path: Path) -> None:
    """toybox's latents are not those that any TAEHV was trained on: only sizes and frame counts are to be seen here."""
    file = tmp_path / "tiny.pth"
    torch.save(make(TaehvConfig(16, 4, (8, 6, 4, 2), (2, 2, 1), (1, 2, 2))).state_dict(), file)
    pipe = CausalVideoPipeline.from_pretrained("toybox", codec="taehv", codec_weights=file)
    video = video_of(pipe, "a red circle slides right", num_frames=14)
    assert video is not None
    assert video.shape == (14, 64, 64, 3)
    for given, frames in (({"image": video[0]}, 15), ({"video": video}, 15), ({"video": video, "strength": 0.5}, 14)):
        chunks = [chunk.frames for chunk in pipe.stream("a red circle slides right", num_frames=15, **given)]
        assert sum(len(chunk) for chunk in chunks if chunk is not None) == frames
    torch.save(make(NARROW).state_dict(), file)
    with pytest.raises(ConfigError, match="the codec's latents have 5 channels, the model's 16"):
        CausalVideoPipeline.from_pretrained("toybox", codec_weights=file)
