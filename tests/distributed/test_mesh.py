"""Who does what: the axes `cfg`, `chunk` and `sp`, then decode ranks; every rank has one set of coordinates."""

from __future__ import annotations

from typing import Any

import pytest

from causalrope_sp import ConfigError
from causalrope_sp.distributed.mesh import Mesh


@pytest.mark.parametrize(
    ("ranks", "cfg", "chunk", "decode"),
    [(1, 1, 1, 0), (8, 2, 1, 0), (7, 2, 1, 1), (9, 1, 3, 3), (5, 1, 1, 4), (13, 2, 3, 1)],
)
def test_every_rank_has_one_set_of_coordinates(ranks: int, cfg: int, chunk: int, decode: int) -> None:
    mesh = Mesh(ranks, cfg, chunk, decode)
    every = [(a, b, c) for a in range(cfg) for b in range(chunk) for c in range(mesh.sp)]
    assert [mesh.rank(*at) for at in every] == list(mesh.denoising)
    assert [*mesh.denoising, *mesh.decoding] == list(range(ranks))
    for rank, at in enumerate(every):
        assert mesh.coordinates(rank) == at
        for axis, group in enumerate((mesh.cfg_group(rank), mesh.chunk_group(rank), mesh.sp_group(rank))):
            assert group[at[axis]] == rank
            others = [mesh.coordinates(other) for other in group]
            assert [other[axis] for other in others] == list(range((cfg, chunk, mesh.sp)[axis]))
            assert {other[:axis] + other[axis + 1 :] for other in others} == {at[:axis] + at[axis + 1 :]}


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ((4, 3, 1, 0), "cfg 3: expected a divisor of the 4 ranks that denoise"),
        ((4, 2, 1, 1), "cfg 2: expected a divisor of the 3 ranks that denoise"),
        ((4, 1, 3, 0), "chunk 3: expected a divisor of the 4 ranks that denoise"),
        ((2, 1, 1, 2), "decode: expected fewer than the 2 ranks, got 2 decode ranks"),
        ((2, 0, 1, 0), "cfg must be a whole number of at least 1, not 0"),
        ((2, 1, 0, 0), "chunk must be a whole number of at least 1, not 0"),
        ((2, 1, 1, -1), "decode must be a whole number of at least 0, not -1"),
        ((2, "x", 1, 0), "cfg must be a whole number of at least 1, not 'x'"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(mesh: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Mesh(*mesh)
