import math

import pytest
import torch
from golden_data import assert_rel, npz
from torch.distributions import Normal, kl_divergence

from improved_diffusion.losses import (
    approx_standard_normal_cdf,
    discretized_gaussian_log_likelihood,
    mean_flat,
    normal_kl,
)

LEVELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1  # what 8-bit pixels become


def recorded(key):
    return torch.tensor(npz("functions")[key])


def test_normal_kl_equals_the_recorded_numbers():
    arguments = [recorded(f"normal_kl/{n}") for n in ("mean1", "logvar1", "mean2", "logvar2")]
    assert_rel(normal_kl(*arguments), recorded("normal_kl/out"), 1e-5)
    assert_rel(normal_kl(*arguments[:2], 0.0, 0.0), recorded("normal_kl/out_standard"), 1e-5)


def test_approximate_cdf_equals_the_recorded_numbers():
    out = approx_standard_normal_cdf(recorded("approx_standard_normal_cdf/x"))
    assert out.dtype == torch.float64
    assert_rel(out, recorded("approx_standard_normal_cdf/out"), 1e-9)


def test_discretized_likelihood_equals_the_recorded_numbers():
    out = discretized_gaussian_log_likelihood(
        recorded("discretized/x"),
        means=recorded("discretized/means"),
        log_scales=recorded("discretized/log_scales"),
    )
    assert out.dtype == torch.float64
    assert_rel(out, recorded("discretized/out"), 1e-9)


def test_normal_kl_agrees_with_the_divergence_of_two_normal_distributions():
    mean1, logvar1, mean2, logvar2 = torch.randn(4, 50, dtype=torch.float64)
    expected = kl_divergence(Normal(mean1, (logvar1 / 2).exp()), Normal(mean2, (logvar2 / 2).exp()))
    torch.testing.assert_close(normal_kl(mean1, logvar1, mean2, logvar2), expected)


def test_normal_kl_of_a_distribution_with_itself_is_zero_and_otherwise_positive():
    mean, logvar = torch.randn(2, 20)
    assert torch.equal(normal_kl(mean, logvar, mean, logvar), torch.zeros(20))
    assert (normal_kl(mean, logvar, mean, logvar + 1e-3) > 0).all()  # no loss to cancellation
    assert (normal_kl(mean, logvar, mean, logvar - 1e-3) > 0).all()


def test_normal_kl_broadcasts_and_takes_numbers_in_any_place():
    mean, logvar = torch.randn(3, 1), torch.randn(1, 4)
    assert normal_kl(mean, logvar, 0.5, -1.0).shape == (3, 4)
    full = normal_kl(torch.full((3, 4), 0.5), torch.full((3, 4), -1.0), mean, logvar)
    torch.testing.assert_close(normal_kl(0.5, -1.0, mean, logvar), full)
    torch.testing.assert_close(
        normal_kl(0.5, -1.0, torch.tensor(0.0), 0.0), normal_kl(torch.tensor(0.5), -1.0, 0.0, 0.0)
    )


def test_normal_kl_without_a_tensor_is_a_type_error():
    with pytest.raises(TypeError, match="tensor"):
        normal_kl(0.0, 0.0, 1.0, 1.0)


def test_approximate_cdf_is_within_its_stated_error_of_the_normal_cdf():
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    error = (approx_standard_normal_cdf(x) - torch.special.ndtr(x)).abs().max()
    assert 1e-5 < error <= 3e-4  # an approximation, and one as good as it says


@pytest.mark.parametrize("mean", [-1.5, -0.999, -0.3, 0.0, 0.77, 1.2])
@pytest.mark.parametrize("log_scale", [-3.0, -1.0, 0.5])
def test_probabilities_of_the_256_levels_sum_to_one(mean, log_scale):
    log_probability = discretized_gaussian_log_likelihood(
        LEVELS,
        means=torch.full_like(LEVELS, mean),
        log_scales=torch.full_like(LEVELS, log_scale),
    )
    assert log_probability.exp().sum().item() == pytest.approx(1, abs=1e-8)


def test_likelihood_of_a_level_is_the_integral_of_the_density_over_its_bin():
    x = LEVELS[1:-1]  # the outermost bins reach to infinity
    mean, scale = 0.2, 0.6
    out = discretized_gaussian_log_likelihood(
        x, means=torch.full_like(x, mean), log_scales=torch.full_like(x, math.log(scale))
    )
    density = Normal(mean, scale).log_prob(x) + math.log(2 / 255)
    near = (x - mean).abs() < scale  # where the approximate cdf is good
    assert (out - density)[near].abs().max() < 5e-3


def test_outermost_levels_take_the_whole_tail():
    x = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    far_out = discretized_gaussian_log_likelihood(
        x, means=4 * x, log_scales=torch.full_like(x, -2.0)
    )
    torch.testing.assert_close(far_out, torch.zeros_like(x), atol=1e-9, rtol=0)


def test_an_impossible_level_has_the_least_likelihood_and_a_finite_gradient():
    means = torch.tensor([[0.9, 0.0]], requires_grad=True)
    x = torch.tensor([[-0.9, 0.1]])
    out = discretized_gaussian_log_likelihood(x, means=means, log_scales=torch.full_like(x, -6.0))
    assert out[0, 0].item() == pytest.approx(math.log(1e-12), rel=1e-5)
    out.sum().backward()
    assert torch.isfinite(means.grad).all()


def test_mean_flat_averages_all_but_the_batch():
    x = torch.randn(3, 2, 4, 5)
    torch.testing.assert_close(mean_flat(x), torch.stack([image.mean() for image in x]))
