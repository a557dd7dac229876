"""Levels between the steps, and which of them a sampling run takes."""

import itertools

import numpy as np
import pytest
import torch

from improved_diffusion.errors import UserError
from improved_diffusion.gaussian_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
)
from improved_diffusion.noise_levels import SPACINGS, NoiseLevels, noise_levels, spaced_timesteps
from improved_diffusion.respace import SpacedDiffusion, space_timesteps
from improved_diffusion.schedules import get_named_beta_schedule

KINDS = {
    "model_mean_type": ModelMeanType.V,
    "model_var_type": ModelVarType.FIXED_LARGE,
    "loss_type": LossType.MSE,
}
T = 100


def process(respacing="", schedule="cosine", steps=T):
    return SpacedDiffusion(
        use_timesteps=space_timesteps(steps, respacing or [steps]),
        betas=get_named_beta_schedule(schedule, steps),
        **KINDS,
    )


# -- t, sigma, log-SNR -----------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_at_the_steps_levels_are_the_process_own(schedule):
    diffusion = process(schedule=schedule)
    levels, t = NoiseLevels(diffusion), np.arange(T)
    alpha_bar = diffusion.alphas_cumprod
    np.testing.assert_allclose(levels.sigma_of_t(t), np.sqrt(1 / alpha_bar - 1), rtol=1e-9)
    np.testing.assert_allclose(levels.log_snr_of_t(t), np.log(alpha_bar / (1 - alpha_bar)))
    assert levels.sigma_of_t(t).dtype == np.float64


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_round_trips_of_every_pair(schedule):
    levels = NoiseLevels(process(schedule=schedule))
    t = np.linspace(0, T - 1, 1234)
    np.testing.assert_allclose(levels.t_of_sigma(levels.sigma_of_t(t)), t, atol=1e-9)
    np.testing.assert_allclose(levels.t_of_log_snr(levels.log_snr_of_t(t)), t, atol=1e-9)
    sigma = np.geomspace(levels.sigma_min, levels.sigma_max, 1234)
    np.testing.assert_allclose(levels.sigma_of_t(levels.t_of_sigma(sigma)), sigma, rtol=1e-9)
    log_snr = -2 * np.log(sigma)
    np.testing.assert_allclose(levels.log_snr_of_t(levels.t_of_log_snr(log_snr)), log_snr)
    np.testing.assert_allclose(levels.log_snr_of_t(levels.t_of_sigma(sigma)), log_snr)
    np.testing.assert_allclose(levels.sigma_of_t(levels.t_of_log_snr(log_snr)), sigma, rtol=1e-9)


def test_between_two_steps_log_snr_is_linear_in_t():
    levels = NoiseLevels(process())
    middle = levels.log_snr_of_t(30.5)
    assert middle == pytest.approx(np.mean(levels.log_snr_of_t(np.array([30, 31]))))
    assert levels.sigma_of_t(30.5) == pytest.approx(np.exp(-middle / 2))


def test_a_respaced_process_has_the_levels_of_its_base():
    np.testing.assert_allclose(NoiseLevels(process("7")).log_snr, NoiseLevels(process()).log_snr)
    plain = GaussianDiffusion(betas=get_named_beta_schedule("cosine", T), **KINDS)
    np.testing.assert_allclose(NoiseLevels(plain).log_snr, NoiseLevels(process()).log_snr)


def test_beyond_the_ends_t_stays():
    levels = NoiseLevels(process())
    assert levels.t_of_sigma(levels.sigma_max * 2) == T - 1
    assert levels.t_of_sigma(levels.sigma_min / 2) == 0


@pytest.mark.parametrize("betas", [[1.0], [0.5, 1.0], [*[0.1] * 30, 1.0]])
def test_a_process_that_ends_without_signal_has_a_last_level(betas):
    levels = NoiseLevels(GaussianDiffusion(betas=betas, **KINDS))
    assert np.isfinite(levels.sigma_max)
    assert levels.sigma_max >= 1e4
    assert np.all(np.diff(levels.log_snr) < 0)


# -- spacings --------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", SPACINGS)
def test_any_number_of_steps_gives_falling_levels_within_the_process(spacing):
    for total in (1, 2, 7, 40):
        for steps in range(1, total + 1):
            diffusion = process(str(steps) if spacing == "respacing" else "", steps=total)
            levels = noise_levels(diffusion, steps, spacing)
            assert levels.shape == (steps + 1,)
            assert levels.dtype == torch.float64
            assert levels[-1] == 0
            assert bool((levels.diff() < 0).all())
            bounds = NoiseLevels(diffusion)
            assert levels[0] <= bounds.sigma_max * (1 + 1e-9)
            assert levels[-2] >= bounds.sigma_min * (1 - 1e-9)


def test_timesteps_as_in_the_paper():
    """arXiv 2305.08891, table 2, for T = 1000 and 10 steps; its timesteps are ours plus 1."""
    assert [t + 1 for t in spaced_timesteps(1000, 10, "leading")] == list(range(1, 1000, 100))
    assert [t + 1 for t in spaced_timesteps(1000, 10, "linspace")] == [
        1, 112, 223, 334, 445, 556, 667, 778, 889, 1000,
    ]  # fmt: skip
    assert [t + 1 for t in spaced_timesteps(1000, 10, "trailing")] == list(range(100, 1001, 100))
    assert spaced_timesteps(10, 3, "linspace") == [0, 5, 9]  # halves are rounded up


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_timesteps_are_distinct_and_all_of_them_if_asked(spacing):
    for total in (1, 2, 3, 10, 37):
        for steps in range(1, total + 1):
            t = spaced_timesteps(total, steps, spacing)
            assert len(t) == steps
            assert t == sorted(set(t))
            assert t[0] >= 0
            assert t[-1] < total
        assert t == list(range(total))
    assert spaced_timesteps(1000, 1, spacing) == [0 if spacing == "leading" else 999]


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_levels_of_timesteps_are_those_of_the_process(spacing):
    diffusion = process()
    t = np.array(spaced_timesteps(T, 8, spacing))
    expected = np.sqrt(1 / diffusion.alphas_cumprod[t] - 1)[::-1]
    np.testing.assert_allclose(noise_levels(diffusion, 8, spacing)[:-1], expected, rtol=1e-9)


def test_respacing_takes_the_kept_steps():
    diffusion = process("10,4,2")
    expected = np.sqrt(1 / diffusion.alphas_cumprod - 1)[::-1]
    for steps in (0, 16):
        levels = noise_levels(diffusion, steps, "respacing")
        np.testing.assert_allclose(levels[:-1], expected, rtol=1e-9)


def test_karras_is_uniform_in_a_root_of_sigma():
    """EDM eq. 5."""
    roots = {rho: noise_levels(process(), 9, "karras", rho)[:-1] ** (1 / rho) for rho in (3.0, 7.0)}
    for root in roots.values():
        np.testing.assert_allclose(root.diff(), float(root[1] - root[0]), rtol=1e-9)
    assert torch.equal(
        noise_levels(process(), 9, "karras"), noise_levels(process(), 9, "karras", 7)
    )
    assert roots[3.0][4] ** 3 > roots[7.0][4] ** 7


def test_log_snr_is_uniform_in_its_logarithm():
    levels = noise_levels(process(), 9, "log_snr")[:-1]
    np.testing.assert_allclose(levels.log().diff(), float((levels[1] / levels[0]).log()))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("spacing", ["karras", "log_snr"])
def test_spacings_by_level_begin_at_80_if_the_process_reaches_it(spacing, schedule):
    """EDM table 1; the highest level of linear is 157 for T = 1000, of cosine thousands."""
    for betas in ([0.02] * 40, get_named_beta_schedule(schedule, T)):
        diffusion = GaussianDiffusion(betas=betas, **KINDS)
        bounds = NoiseLevels(diffusion)
        levels = noise_levels(diffusion, 5, spacing)
        assert levels[0].item() == pytest.approx(min(80, bounds.sigma_max))
        assert levels[-2].item() == pytest.approx(bounds.sigma_min)


@pytest.mark.parametrize("spacing", ["karras", "log_snr"])
def test_spacings_by_level_begin_without_signal_if_the_process_does(spacing):
    betas = np.append(get_named_beta_schedule("linear", T)[:-1], 1.0)
    diffusion = GaussianDiffusion(betas=betas, **KINDS)
    bounds = NoiseLevels(diffusion)
    levels = noise_levels(diffusion, 5, spacing)
    assert levels[0].item() == pytest.approx(bounds.sigma_max)
    assert levels[1].item() == pytest.approx(80)
    assert levels[-2].item() == pytest.approx(bounds.sigma_min)
    assert noise_levels(diffusion, 1, spacing).tolist() == [levels[0].item(), 0]


@pytest.mark.parametrize(
    ("spacing", "steps"),
    list(itertools.product(["leading", "trailing", "karras", "log_snr"], [0, 101])),
)
def test_steps_out_of_range_are_refused(spacing, steps):
    with pytest.raises(UserError, match=rf"--steps {steps}: must be in 1 \.\.\. 100"):
        noise_levels(process(), steps, spacing)


def test_what_else_is_refused():
    with pytest.raises(UserError, match="unknown spacing 'even'; choose one of respacing, leading"):
        noise_levels(process(), 5, "even")
    with pytest.raises(UserError, match="keeps 7 steps, not 5"):
        noise_levels(process("7"), 5, "respacing")
