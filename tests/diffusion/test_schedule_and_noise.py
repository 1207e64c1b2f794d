"""The arithmetic of noise levels, and noise that is a function of (seed, stream, chunk, step) and nothing else."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from causalrope_sp import Chunk, ConfigError, SamplerConfig
from causalrope_sp.diffusion.noise import seeded_noise
from causalrope_sp.diffusion.schedule import SOLVERS, add_noise, predict_x0, shift_sigma, sigmas

SHAPE = (2, 3, 4, 5)
levels = st.floats(0.01, 1)


def test_self_forcing_steps() -> None:
    timesteps = [1000 * sigma for sigma in sigmas(SamplerConfig())]
    assert timesteps == pytest.approx([1000, 937.5, 2500 / 3, 625], rel=1e-14)


@given(sigma=st.floats(0, 1), shift=st.floats(0.1, 20))
@settings(deadline=None)
def test_shift_keeps_both_ends_and_undoes_itself(sigma: float, shift: float) -> None:
    assert shift_sigma(0, shift) == 0
    assert shift_sigma(1, shift) == pytest.approx(1, rel=1e-15)
    assert shift_sigma(shift_sigma(sigma, shift), 1 / shift) == pytest.approx(sigma, abs=1e-12)
    assert shift_sigma(sigma, 1) == sigma


@given(
    st.lists(st.floats(0.5, 1000), min_size=1, max_size=20, unique=True),
    st.floats(0.1, 20),
    st.sampled_from([*SOLVERS]),
)
@settings(deadline=None)
def test_levels_fall_from_noise_to_data(steps: list[float], shift: float, solver: str) -> None:
    steps.sort(reverse=True)
    assume(all(a - b > 1e-6 for a, b in itertools.pairwise(steps)))
    result = sigmas(SamplerConfig(tuple(steps), shift, solver))  # type: ignore[arg-type]
    assert len(result) == len(steps)
    assert all(a > b for a, b in itertools.pairwise(result))
    assert 0 < result[-1] < result[0] < 1 + 1e-15 or len(result) == 1


def data_and_noise() -> tuple[Tensor, Tensor]:
    x0, noise = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x0, noise


def no_noise() -> Tensor:
    raise AssertionError("draws noise that it has no use for")


@given(sigma=levels)
@settings(deadline=None)
def test_x0_round_trip(sigma: float) -> None:
    x0, noise = data_and_noise()
    x = add_noise(x0, noise, sigma)
    torch.testing.assert_close(predict_x0(x, noise - x0, sigma), x0)
    torch.testing.assert_close(add_noise(x0, noise, 1.0), noise)
    assert torch.equal(add_noise(x0, noise, 0.0), x0)


@given(sigma=levels, part=st.floats(0.01, 0.99))
@settings(deadline=None)
def test_renoise_jumps_to_data_and_back_up_with_fresh_noise(sigma: float, part: float) -> None:
    x0, noise = data_and_noise()
    fresh = noise.flip(0)
    x, to = add_noise(x0, noise, sigma), part * sigma
    step = SOLVERS["renoise"]
    torch.testing.assert_close(step(x, noise - x0, sigma, to, lambda: fresh), add_noise(x0, fresh, to))
    torch.testing.assert_close(step(x, noise - x0, sigma, 0.0, no_noise), x0)


@given(steps=st.lists(st.floats(0.01, 0.99), max_size=12, unique=True))
@settings(deadline=None)
def test_euler_follows_a_straight_flow_exactly(steps: list[float]) -> None:
    """With v = ε - x0 everywhere on the line, any steps lead from the noise to the data, over the points between."""
    x0, noise = data_and_noise()
    x, sigma = noise, 1.0
    for to in [*sorted(steps, reverse=True), 0.0]:
        x, sigma = SOLVERS["euler"](x, noise - x0, sigma, to, no_noise), to
        torch.testing.assert_close(x, add_noise(x0, noise, sigma))


@pytest.mark.parametrize(
    "make",
    [
        lambda: SamplerConfig(()),
        lambda: SamplerConfig((1000, 1000)),
        lambda: SamplerConfig((500, 750)),
        lambda: SamplerConfig((1001,)),
        lambda: SamplerConfig((500, 0)),
        lambda: SamplerConfig((float("nan"),)),
        lambda: SamplerConfig(shift=0),
        lambda: SamplerConfig(shift=float("nan")),
        lambda: SamplerConfig(solver="heun"),  # type: ignore[arg-type]
    ],
)
def test_schedules_that_lead_nowhere_are_refused(make: Callable[[], SamplerConfig]) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert "\n" not in str(caught.value)


def draw(seed: int, stream: int, chunk: int, step: int, frames: int = 2) -> Tensor:
    return seeded_noise(seed, SHAPE, stream)(Chunk(chunk, 2 * chunk, frames), step)


keys = st.tuples(st.integers(0, 2**40), st.integers(0, 12), st.integers(0, 12), st.integers(0, 12))


@given(keys, keys)
@settings(deadline=None)
def test_noise_is_a_function_of_its_key(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> None:
    noise = draw(*one)
    assert noise.shape == (2, 2, 3, 4, 5)
    assert torch.equal(noise, draw(*one))
    assert torch.equal(noise, draw(*other)) == (one == other)


def test_every_part_of_the_key_counts_and_does_not_run_into_the_next() -> None:
    """(1, 11) and (11, 1) must not meet, as they would in a sum or in digits side by side."""
    numbers = (0, 1, 2, 11, 12, 111, 112)
    first = [draw(*key)[0, 0, 0, 0, 0].item() for key in itertools.product(numbers, repeat=4)]
    assert len(set(first)) > 0.999 * len(first)
    assert not torch.equal(draw(1, 0, 0, 0), draw(-1, 0, 0, 0))


def test_noise_neither_uses_nor_moves_the_global_generator() -> None:
    torch.manual_seed(1)
    noise = draw(5, 0, 1, 2)
    after = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), after)
    assert torch.equal(draw(5, 0, 1, 2), noise)


def test_order_of_draws_does_not_matter() -> None:
    places = [(Chunk(i, 3 * i, 3), step) for i in range(3) for step in range(3)]
    source = seeded_noise(3, SHAPE)
    forwards = [source(*place) for place in places]
    backwards = [source(*place) for place in reversed(places)]
    assert all(torch.equal(a, b) for a, b in zip(forwards, reversed(backwards)))


def test_noise_is_standard_normal_and_independent_of_its_neighbours() -> None:
    big = (1, 16, 32, 32)
    draws = torch.stack(
        [
            seeded_noise(0, big, stream)(Chunk(chunk, 4 * chunk, 4), step).flatten()
            for stream, chunk, step in itertools.product(range(2), repeat=3)
        ]
    ).double()
    count = draws.shape[1]
    assert draws.mean(1).abs().max() < 5 / count**0.5
    assert (draws.var(1) - 1).abs().max() < 5 * (2 / count) ** 0.5
    assert (draws.pow(4).mean(1) - 3).abs().max() < 5 * (96 / count) ** 0.5
    correlation = torch.corrcoef(draws) - torch.eye(len(draws))
    assert correlation.abs().max() < 5 / count**0.5


def test_one_key_is_pinned() -> None:
    """A video must stay the same from one version to the next."""
    noise = seeded_noise(42, (1, 16, 4, 4), stream=1)(Chunk(3, 9, 3), 2)
    assert noise.dtype == torch.float32
    torch.testing.assert_close(noise[0, 0, 0, 0], torch.tensor([0.0641491, 2.1194868, 1.4818827, -0.3156495]))
    torch.testing.assert_close(noise[0, 2, 15, 3], torch.tensor([-0.4738502, -0.5962191, 0.1076564, -1.1706948]))
