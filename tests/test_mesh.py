"""Who does what: lanes of equal size, then decode ranks; every rank has one place."""

from __future__ import annotations

import pytest

from causalrope_sp import ConfigError
from causalrope_sp.distributed.mesh import Mesh


@pytest.mark.parametrize(("ranks", "lanes", "decoders"), [(1, 1, 0), (8, 2, 0), (7, 2, 1), (9, 3, 3), (5, 1, 4)])
def test_every_rank_has_one_place(ranks: int, lanes: int, decoders: int) -> None:
    mesh = Mesh(ranks, lanes, decoders)
    in_lanes = [rank for lane in range(lanes) for rank in mesh.lane(lane)]
    assert in_lanes == list(mesh.denoising)
    assert [*in_lanes, *mesh.decoding] == list(range(ranks))
    for lane in range(lanes):
        for place, rank in enumerate(mesh.lane(lane)):
            assert mesh.place(rank) == (lane, place)
            assert mesh.across(place)[lane] == rank


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ((4, 3, 0), "4 ranks that denoise cannot be cut into 3 lanes"),
        ((4, 2, 1), "3 ranks that denoise cannot be cut into 2 lanes"),
        ((2, 1, 2), "2 decode ranks leave none of 2 ranks to denoise"),
        ((2, 0, 0), "no mesh"),
        ((2, 1, -1), "no mesh"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(mesh: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Mesh(*mesh)
