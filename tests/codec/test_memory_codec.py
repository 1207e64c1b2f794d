"""What codecs take of a device, counted: what they keep between chunks to the byte, what they need at once nearly."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from causalrope_sp.codec import Codec, load_codec
from causalrope_sp.codec.causal_conv import CausalConv, UpsampleConv
from causalrope_sp.codec.codec_footprint import CodecFootprint, published_footprint, taehv_footprint, wan_footprint
from causalrope_sp.codec.taehv import TaehvCodec
from causalrope_sp.codec.taehv_model import Taehv, TaehvConfig
from causalrope_sp.codec.wan_vae import WanCodec, frames_together
from causalrope_sp.codec.wan_vae_config import WAN_2_1, WAN_2_2, WanVaeConfig
from causalrope_sp.codec.wan_vae_model import WanVae
from causalrope_sp.toybox import WEIGHTS


class Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that operations made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}
        self.most = 0

    @property
    def now(self) -> int:
        return sum(self._sizes.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in tree_leaves(args) if isinstance(tensor, Tensor)}
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given | self._sizes.keys():
                storage = tensor.untyped_storage()
                self._sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self._sizes.pop, storage._cdata, None)
        self.most = max(self.most, self.now)
        return made


def small_wan() -> WanCodec:
    torch.manual_seed(0)
    return WanCodec(WanVae(WanVaeConfig(base_dim=8)))


def small_wan_2_2() -> WanCodec:
    torch.manual_seed(0)
    return WanCodec(WanVae(replace(WAN_2_2, base_dim=8, decoder_base_dim=16)))


def tiny() -> TaehvCodec:
    torch.manual_seed(0)
    return TaehvCodec(Taehv(TaehvConfig(16, 16, (64, 32, 16, 16), (1, 2, 2), (1, 2, 2))))


def footprint(codec: Codec, size: tuple[int, int], frames: int) -> CodecFootprint:
    if isinstance(codec, WanCodec):
        return wan_footprint(codec.vae, *size, frames)
    assert isinstance(codec, TaehvCodec)
    return taehv_footprint(codec.model, *size, frames)


@pytest.mark.parametrize("codec", [small_wan, small_wan_2_2, lambda: load_codec(WEIGHTS / "codec"), tiny])
@torch.inference_mode()
def test_what_a_cpu_derives_is_counted(codec: Any) -> None:
    loaded = codec()
    stream = loaded.decoder()
    for _ in range(2):  # a stream's first latent frame is decoded otherwise
        stream.decode(torch.randn(1, 3, loaded.channels, 4, 6))
    module: nn.Module = getattr(loaded, "vae", None) or loaded.model
    kept = [layer._mixed for layer in module.modules() if isinstance(layer, CausalConv | UpsampleConv)]
    made = [tensor for each in kept for _, _, tensor in each._made.values()]
    predicted = footprint(loaded, (4 * loaded.spatial_stride, 6 * loaded.spatial_stride), 3).derived
    assert predicted == sum(tensor.nbytes for tensor in made)
    assert (predicted > 0) == (codec is not tiny)


def test_what_wan_2_1_derives() -> None:
    """By hand: the blocks at 2 and at 4 frames, in convolutions of two dimensions, and three layers that upsample."""
    at_2 = 4 * 9 * (192 * 384 + 5 * 384 * 384) + 4 * 384 * 768
    at_4 = 6 * 9 * (6 * 192 * 192 + 6 * 96 * 96 + 96 * 3)
    upsampling = 16 * (384 * 192 + 384 * 192 + 192 * 96)
    assert published_footprint(WAN_2_1, 480, 832, 3).derived == 4 * (at_2 + at_4 + upsampling)


@pytest.mark.parametrize(
    ("codec", "size"),
    [
        (small_wan, (16, 24)),
        (small_wan_2_2, (16, 24)),
        (tiny, (8, 12)),
        (lambda: load_codec(WEIGHTS / "codec"), (24, 32)),
    ],
)
@pytest.mark.parametrize("device", ["meta", "cpu"])
@torch.inference_mode()
def test_a_decoder_takes_what_is_predicted(codec: Any, size: tuple[int, int], device: str) -> None:
    """As on a GPU, which the meta device stands for, and on a CPU."""
    loaded = codec()
    module = getattr(loaded, "vae", None) or loaded.model
    module.to(device)
    chunk = torch.randn(1, 3, loaded.channels, *size, device=device)
    loaded.decoder().decode(chunk)  # a CPU derives weights from those that it has
    stream = loaded.decoder()
    stride = loaded.spatial_stride
    predicted = footprint(loaded, (stride * size[0], stride * size[1]), 3)
    with Alive() as alive:
        stream.decode(chunk)
        alive.most = 0
        stream.decode(chunk)
    assert alive.now == predicted.state
    assert 0.9 < (alive.most - predicted.state) / predicted.activations < 1.1


@torch.inference_mode()
def test_latent_frames_that_are_decoded_together_take_no_more() -> None:
    loaded, chunk = small_wan(), torch.randn(1, 3, 16, 6, 4)
    loaded.decoder().decode(chunk)
    stream, predicted = loaded.decoder(), footprint(loaded, (48, 32), 3)
    assert frames_together(loaded.vae.config, 24) >= 2
    with Alive() as alive:
        stream.decode(chunk)
        stream.decode(chunk)
    assert alive.now == predicted.state
    assert alive.most - predicted.state < 1.2 * predicted.activations


def test_the_public_vae_is_known_without_its_file() -> None:
    found = published_footprint(WAN_2_1, 480, 832, 3)
    assert found.weights == 4 * 126_892_531
    assert 7.0e9 < found.state + found.activations < 7.1e9
