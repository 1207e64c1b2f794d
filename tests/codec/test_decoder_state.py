"""A decoder whose state is forked, saved, restored or moved to another number of ranks goes on as if it were not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from causalrope_sp import ConfigError, LatentGrid, SequenceParallel
from causalrope_sp.codec import Codec
from causalrope_sp.codec.codec_footprint import state_bytes
from causalrope_sp.codec.conv_state import ConvState
from causalrope_sp.codec.offloaded_codec import OffloadedCodec
from causalrope_sp.codec.sharded_state import cut_state, gather_state
from causalrope_sp.distributed.launch import RankPool
from tests.support.codecs import CHANNELS, CODECS, small_codec

CUT = (2, 3)  # latent frames before and after
KINDS = pytest.mark.parametrize("kind", [*CODECS, "offloaded"])


def codec_of(kind: str, dtype: torch.dtype = torch.float32) -> Codec:
    if kind != "offloaded":
        return small_codec(kind, dtype)
    inner = small_codec("wan", dtype)
    return OffloadedCodec(inner, inner.vae, "cpu")  # type: ignore[attr-defined]


def latents_of(
    height: int, width: int, dtype: torch.dtype = torch.float32, cut: tuple[int, ...] = CUT
) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(1)
    whole = torch.randn(2, sum(cut), CHANNELS, height, width, dtype=torch.float64, generator=draw)
    return whole.to(dtype).split(cut, 1)


@torch.no_grad()
@KINDS
def test_a_fork_goes_on_by_itself(kind: str) -> None:
    codec, (before, after) = codec_of(kind), latents_of(3, 5)
    whole = codec.decoder().decode(torch.cat([before, after], 1))
    stream = codec.decoder()
    head = stream.decode(before)
    fork, other = stream.fork(), stream.fork()
    assert fork.state.frames is not stream.state.frames
    assert all(frames is stream.state.frames[name] for name, frames in fork.state.frames.items())
    untouched = copy.deepcopy(fork.state.frames)
    stream.decode(-after)  # what the first stream does changes no fork
    for again in (fork, other):
        assert all(torch.equal(frames, untouched[name]) for name, frames in again.state.frames.items())
        assert torch.equal(torch.cat([head, again.decode(after)], 1), whole)


@torch.no_grad()
@KINDS
def test_a_stream_is_forked_before_its_first_frame(kind: str) -> None:
    codec, (before, _) = codec_of(kind), latents_of(2, 3)
    stream = codec.decoder()
    fork = stream.fork()
    expected = stream.decode(before)
    assert torch.equal(fork.decode(before), expected)
    assert torch.equal(codec.decoder(state=ConvState()).decode(before), expected)


@torch.no_grad()
@KINDS
@pytest.mark.parametrize("cut", [(1, 2), CUT], ids=str)
def test_a_saved_state_goes_on_bit_for_bit(kind: str, cut: tuple[int, ...], tmp_path: Path) -> None:
    codec, (before, after) = codec_of(kind), latents_of(3, 5, cut=cut)
    whole = codec.decoder().decode(torch.cat([before, after], 1))
    stream = codec.decoder()
    head = stream.decode(before)
    save_file({name: frames.contiguous() for name, frames in stream.state.frames.items()}, tmp_path / "state")
    state = ConvState(load_file(tmp_path / "state"))
    for _ in range(2):  # what a stream was given is not changed
        again = codec_of(kind).decoder(state=state)
        assert torch.equal(torch.cat([head, again.decode(after)], 1), whole)
    lost = codec.decoder().decode(after)[:, :1]  # of the latent frame whose last pixel frame follows
    kept = whole[:, head.shape[1] + codec.temporal_stride - 1][:, None]
    assert (lost - kept).abs().max() > 1e-2  # else a lost state would not be seen


@torch.no_grad()
@KINDS
@pytest.mark.parametrize("frames", [0, 1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_a_decoder_keeps_is_known_to_the_byte(kind: str, frames: int, dtype: torch.dtype) -> None:
    codec, (latents,) = codec_of(kind, dtype), latents_of(3, 5, dtype, cut=(5,))
    stream = codec.decoder()
    for number in range(frames):
        stream.decode(latents[:, number : number + 1])
    shapes = codec.decoder_state_shapes(frames, 2, 3, 5)
    assert {name: tuple(kept.shape) for name, kept in stream.state.frames.items()} == shapes
    storages = sum(kept.untyped_storage().nbytes() for kept in stream.state.frames.values())
    assert state_bytes(shapes, dtype.itemsize) == stream.state.bytes == storages
    assert (storages > 0) == (frames > 0)


@torch.no_grad()
@KINDS
def test_a_state_that_does_not_fit_is_one_sentence(kind: str) -> None:
    codec, (before, after) = codec_of(kind), latents_of(3, 5)
    stream = codec.decoder()
    stream.decode(before)
    state = stream.state
    name = next(reversed(state.frames))
    rest = {key: frames for key, frames in state.frames.items() if key != name}
    shown = r"the decoder's state does not fit: the frames of"
    for wrong, latents, says in (
        (rest, after, rf"{shown} {name} are missing"),
        ({**state.frames, "decoder.x\n": state.frames[name]}, after, rf"{shown} 'decoder.x\\n' belong to no layer"),
        ({**state.frames, name: state.frames[name][:1]}, after, rf"{shown} {name} are \(1, .* expected \(2, "),
        ({**state.frames, name: state.frames[name].double()}, after, rf"{shown} {name} are .* in float64 on cpu, exp"),
        (state.frames, after[..., :4], rf"{shown} \S+ are .* 3, 5\) in float32 on cpu, expected .* 3, 4\)"),
        (state.frames, after.double(), rf"{shown} \S+ are .* in float32 on cpu, expected .* in float64 on cpu"),
    ):
        with pytest.raises(ConfigError, match=says) as caught:
            codec.decoder(state=ConvState(wrong)).decode(latents)
        assert "\n" not in str(caught.value)
    assert codec.decoder(state=state).decode(after).isfinite().all()


def decode_on_ranks(
    group: Any, device: str, kind: str, height: int, width: int, dtype: torch.dtype, saved: dict[str, Tensor] | None
) -> tuple[dict[str, Tensor], Tensor]:
    """Decodes a video in two calls, or goes on with its second half from a saved state.

    Returns:
        The state after the first half, and the second half.
    """
    codec, parallel = small_codec(kind, dtype), SequenceParallel(group, device=device)
    shards = parallel.spatial_shards(LatentGrid.from_latent(height, width, (1, 1)), parallel.mesh.denoising)
    before, after = latents_of(height, width, dtype)
    with torch.no_grad():
        if saved is None:
            stream = codec.decoder(shards)
            stream.decode(before)
        else:
            stream = codec.decoder(shards, cut_state(shards, ConvState(saved)))
        whole = gather_state(shards, stream.state)
        assert (whole is None) == (parallel.rank > 0)
        fork = stream.fork()
        stream.decode(-after)
        made = fork.decode(after)
        pixels = made if shards is None else shards.gather_to_first(made)
    if whole is None or pixels is None:
        return {}, before
    return whole.frames, pixels


@pytest.mark.parametrize("kind", CODECS)
@pytest.mark.parametrize(("height", "width"), [(3, 5), (7, 4)])
def test_a_state_saved_by_any_number_of_ranks_is_gone_on_from_by_any(
    pool: RankPool, kind: str, height: int, width: int
) -> None:
    dtype = torch.float64
    made = {ranks: pool.run(decode_on_ranks, ranks, kind, height, width, dtype, None) for ranks in (1, 2, 3)}
    shapes = small_codec(kind, dtype).decoder_state_shapes(CUT[0], 2, height, width)
    for saved, (state, expected) in made.items():
        assert {name: tuple(frames.shape) for name, frames in state.items()} == shapes
        for name, frames in state.items():
            torch.testing.assert_close(frames, made[1][0][name], rtol=0, atol=1e-12)
        for ranks in made:
            again, pixels = pool.run(decode_on_ranks, ranks, kind, height, width, dtype, state)
            assert all(torch.equal(frames, state[name]) for name, frames in again.items())
            if ranks == saved:
                assert torch.equal(pixels, expected)
            torch.testing.assert_close(pixels, made[1][1], rtol=0, atol=1e-12)


def test_in_float32_other_ranks_cost_no_more_than_rounding(pool: RankPool) -> None:
    for kind in CODECS:
        _, exact = pool.run(decode_on_ranks, 1, kind, 3, 5, torch.float64, None)
        state, _ = pool.run(decode_on_ranks, 3, kind, 3, 5, torch.float32, None)
        _, pixels = pool.run(decode_on_ranks, 2, kind, 3, 5, torch.float32, state)
        assert (pixels - exact).norm() <= 1e-5 * exact.norm()
