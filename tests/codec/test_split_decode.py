"""A frame decoded in spatial shards by several ranks is the one decoded whole: either codec and axis, uneven shards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from causalrope_sp import ConfigError, LatentGrid, SequenceParallel
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.planning.decode_cost import VaeSize
from tests.support.codecs import CHANNELS, CODECS, small_codec

CUT = (1, 3, 2)  # latent frames a chunk


def latents_of(height: int, width: int, dtype: torch.dtype) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(2, sum(CUT), CHANNELS, height, width, dtype=dtype, generator=draw)


def decode_in_strips(
    group: Any, device: str, kind: str, height: int, width: int, dtype: torch.dtype
) -> tuple[list[Tensor], dict[str, Any]]:
    codec, parallel = small_codec(kind, dtype), SequenceParallel(group, device=device)
    spatial_shards = parallel.spatial_shards(LatentGrid.from_latent(height, width, (1, 1)), parallel.mesh.denoising)
    assert spatial_shards is not None
    stream = codec.decoder(spatial_shards)
    made = []
    for part in latents_of(height, width, dtype).split(CUT, 1):
        whole = spatial_shards.gather_to_first(stream.decode(part))
        assert (whole is None) == (parallel.rank > 0)
        if whole is not None:
            made.append(whole)
    return made, parallel.comm_stats.as_json()


@torch.no_grad()
@pytest.mark.parametrize("kind", CODECS)
@pytest.mark.parametrize(("ranks", "height", "width"), [(2, 3, 5), (3, 7, 4), (4, 2, 9)])
def test_strips_make_the_whole_picture(pool: RankPool, kind: str, ranks: int, height: int, width: int) -> None:
    dtype = torch.float64
    whole = small_codec(kind, dtype).decoder()
    expected = [whole.decode(part) for part in latents_of(height, width, dtype).split(CUT, 1)]
    made, moved = pool.run(decode_in_strips, ranks, kind, height, width, dtype)
    for part, other in zip(made, expected, strict=True):
        assert other.std() > 1e-3
        torch.testing.assert_close(part, other, rtol=0, atol=1e-12)
    assert ("mid" in moved) == (kind != "taehv")
    calls = moved["halo"]["calls"] + moved.get("mid", {"calls": 0})["calls"]
    if kind == "wan":
        assert calls == sum(CUT) * VaeSize.of(small_codec(kind, dtype).vae.config).collectives  # type: ignore[attr-defined]
    else:
        assert calls > 0


@torch.no_grad()
def test_in_float32_strips_cost_no_more_than_rounding(pool: RankPool) -> None:
    for kind in CODECS:
        whole = small_codec(kind, torch.float32).decoder()
        expected = torch.cat([whole.decode(part) for part in latents_of(3, 5, torch.float32).split(CUT, 1)], 1)
        made, _ = pool.run(decode_in_strips, 2, kind, 3, 5, torch.float32)
        assert (torch.cat(made, 1) - expected).norm() <= 1e-5 * expected.norm()


def refuses_more_ranks_than_columns(group: Any, device: str) -> str:
    parallel = SequenceParallel(group, device=device)
    try:
        parallel.spatial_shards(LatentGrid.from_latent(1, 2, (1, 1)), parallel.mesh.denoising)
    except ConfigError as error:
        return str(error)
    return ""


def test_more_ranks_than_columns_are_refused(pool: RankPool) -> None:
    message = "3 ranks that decode are more than the 2 latent columns of a picture"
    assert pool.run(refuses_more_ranks_than_columns, 3) == message
