"""Streams of `sample_chunks` that ranks take in another order, or make of other things: an error, and never a video."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from causalrope_sp.diffusion.noise import seeded_noise
from causalrope_sp.distributed import SequenceParallel
from causalrope_sp.distributed.launch import RankPool
from causalrope_sp.errors import ConfigError, RankLostError
from causalrope_sp.sampling.agreement import digest
from causalrope_sp.sampling.sampler import sample_chunks
from tests.support.reuse_cases import CONFIG, GRID, SAMPLER, STREAM, make_model, random

SHAPE = 1, CONFIG.in_channels, GRID.latent_height, GRID.latent_width


def taken(group: dist.ProcessGroup, device: str, orders: list[str], differ: str) -> str:
    """What a rank hears that takes the first chunks of two streams, which differ in text or noise, in its own order."""
    parallel = SequenceParallel(group, "gather-kv", device)
    texts = random(2, 1, CONFIG.text_len, CONFIG.text_dim)
    streams = {
        name: sample_chunks(
            make_model(),
            texts[number if differ == "text" else 0],
            seeded_noise(number if differ == "noise" else 0, SHAPE),
            GRID,
            4,
            stream=STREAM,
            sampler=SAMPLER,
            parallel=parallel,
        )
        for number, name in enumerate("xy")
    }
    try:
        for name in orders[parallel.rank]:
            next(streams[name])
    except (ConfigError, RankLostError) as error:
        return str(error)
    return "all taken"


@pytest.mark.parametrize("differ", ["text", "noise"])
def test_another_order_on_one_rank_is_an_error_on_all(differ: str, pool: RankPool) -> None:
    assert pool.run(taken, 2, ["xy", "xy"], differ) == "all taken"
    assert f"ranks differ in {differ}" in pool.run(taken, 2, ["xy", "yx"], differ)


def test_digests_tell_tensors_apart() -> None:
    x = torch.arange(6.0)
    different = [x, x.view(2, 3), x.double(), -x, x.bfloat16()]
    assert len({digest(each) for each in different}) == len(different)
    assert digest(x.view(2, 3).T) == digest(x.view(2, 3).T.contiguous())
