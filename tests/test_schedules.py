import numpy as np
import pytest
from golden_data import assert_rel, group, make_diffusion, npz

from improved_diffusion import gaussian_diffusion
from improved_diffusion.errors import UserError
from improved_diffusion.gaussian_diffusion import GaussianDiffusion
from improved_diffusion.schedules import (
    LINEAR_MIN_STEPS,
    NAMED_SCHEDULES,
    betas_for_alpha_bar,
    get_named_beta_schedule,
)

SCHEDULES = [("linear", 100), ("linear", 1000), ("cosine", 100), ("cosine", 1000)]


@pytest.mark.parametrize(("name", "steps"), SCHEDULES)
def test_tables_equal_the_recorded_ones(name, steps):
    recorded = group("schedules", f"{name}-{steps}")
    assert len(recorded) == 13
    diffusion = make_diffusion(steps, schedule=name, cls=GaussianDiffusion)
    for table, values in recorded.items():
        ours = getattr(diffusion, table)
        assert ours.dtype == np.float64
        assert_rel(ours, values, 1e-12)


def test_every_recorded_schedule_is_compared():
    assert {key.split("/")[0] for key in npz("schedules")} == {f"{n}-{s}" for n, s in SCHEDULES}


@pytest.mark.parametrize(("name", "steps"), SCHEDULES)
def test_named_schedule_gives_the_recorded_betas(name, steps):
    betas = get_named_beta_schedule(name, steps)
    assert isinstance(betas, np.ndarray)
    assert_rel(betas, npz("schedules")[f"{name}-{steps}/betas"], 1e-12)


@pytest.mark.parametrize("steps", [LINEAR_MIN_STEPS, 22, 50, 4000])
def test_linear_schedule_is_finite_from_its_shortest_length_on(steps):
    betas = get_named_beta_schedule("linear", steps)
    assert betas.shape == (steps,)
    assert np.all((betas > 0) & (betas < 1))
    assert np.all(np.cumprod(1 - betas) > 0)


@pytest.mark.parametrize("steps", [1, 19, 20])
def test_linear_schedule_too_short_says_so_and_names_cosine(steps):
    with pytest.raises(UserError, match=rf"at least 21 .*not {steps};.*cosine"):
        get_named_beta_schedule("linear", steps)


@pytest.mark.parametrize("steps", [1, 2, 20, 4000])
def test_cosine_schedule_works_with_any_length(steps):
    betas = get_named_beta_schedule("cosine", steps)
    assert betas.shape == (steps,)
    assert np.all((betas > 0) & (betas <= 0.999))


def test_cosine_schedule_follows_iddpm_eq_17():
    steps = 200
    time = np.arange(steps + 1) / steps
    f = np.cos((time + 0.008) / 1.008 * np.pi / 2) ** 2
    alpha_bar = np.cumprod(1 - get_named_beta_schedule("cosine", steps))
    np.testing.assert_allclose(alpha_bar[:-1], f[1:-1] / f[0], rtol=1e-10)  # the last is capped


def test_linear_schedule_scales_so_that_any_length_ends_at_a_like_noise_level():
    """1000 steps are DDPM's own; half as many steps add twice the noise each."""
    np.testing.assert_allclose(
        get_named_beta_schedule("linear", 1000), np.linspace(1e-4, 0.02, 1000), rtol=1e-12
    )
    np.testing.assert_allclose(
        get_named_beta_schedule("linear", 500), np.linspace(2e-4, 0.04, 500), rtol=1e-12
    )


def test_unknown_schedule_error_lists_the_choices():
    with pytest.raises(UserError, match="quadratic") as caught:
        get_named_beta_schedule("quadratic", 100)
    for name in NAMED_SCHEDULES:
        assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [0, -5])
def test_fewer_than_one_step_is_an_error_that_names_the_number(name, steps):
    with pytest.raises(UserError, match=str(steps)):
        get_named_beta_schedule(name, steps)


def test_betas_for_alpha_bar_reproduce_the_function_they_came_from():
    betas = betas_for_alpha_bar(40, lambda t: np.exp(-3 * t - 2 * t**2))
    time = np.arange(1, 41) / 40
    np.testing.assert_allclose(np.cumprod(1 - betas), np.exp(-3 * time - 2 * time**2), rtol=1e-12)


def test_betas_for_alpha_bar_are_capped_at_max_beta():
    betas = betas_for_alpha_bar(4, lambda t: 1 - t)
    np.testing.assert_allclose(betas, [1 / 4, 1 / 3, 1 / 2, 0.999], rtol=1e-12)
    capped = betas_for_alpha_bar(4, lambda t: 1 - t, max_beta=0.4)
    np.testing.assert_allclose(capped, [1 / 4, 1 / 3, 0.4, 0.4], rtol=1e-12)


def test_schedules_are_also_found_in_gaussian_diffusion():
    assert gaussian_diffusion.get_named_beta_schedule is get_named_beta_schedule
    assert gaussian_diffusion.betas_for_alpha_bar is betas_for_alpha_bar
