"""Gaussian data, for which everything about the best reverse process is known exactly.

With x_0 ~ N(mu, s^2) the marginals are x_t ~ N(m_t, V_t), where m_t = sqrt(alpha_bar_t) mu and
V_t = alpha_bar_t s^2 + 1 - alpha_bar_t. A step is x_t = sqrt(alpha) x_{t-1} + sqrt(beta) z, so the
true reverse step is Gaussian with

    mean      m_{t-1} + sqrt(alpha) V_{t-1} / V_t (x_t - m_t)
    variance  beta V_{t-1} / V_t,

and the best estimates of x_0 and of the noise are linear in x_t.
"""

import math

import numpy as np
import pytest
import torch
from golden_data import VARIANCES, make_diffusion
from torch.distributions import Normal, kl_divergence

from improved_diffusion.gaussian_diffusion import ModelMeanType, ModelVarType
from improved_diffusion.losses import approx_standard_normal_cdf

MEANS = [kind.name for kind in ModelMeanType]
MU, S = 0.2, 0.3
STEPS = 40
COUNT = 30_000  # values where moments are measured; few enough that torch stays on one thread


class GaussianData:
    """The data N(mu, s^2) under a process, all in float64 from its betas alone."""

    def __init__(self, diffusion, mu=MU, s=S):
        self.diffusion, self.mu, self.s = diffusion, mu, s
        self.beta = diffusion.betas
        self.alpha = 1 - self.beta
        self.alpha_bar = np.cumprod(self.alpha)
        self.alpha_bar_prev = np.append(1.0, self.alpha_bar[:-1])
        self.m, self.m_prev = (np.sqrt(a) * mu for a in (self.alpha_bar, self.alpha_bar_prev))
        self.v, self.v_prev = (a * s**2 + 1 - a for a in (self.alpha_bar, self.alpha_bar_prev))
        self.reverse_variance = self.beta * self.v_prev / self.v
        self.x_start_variance = s**2 * (1 - self.alpha_bar) / self.v  # of x_0 given x_t

    def x_start(self, x, i):
        return self.mu + np.sqrt(self.alpha_bar[i]) * self.s**2 / self.v[i] * (x - self.m[i])

    def eps(self, x, i):
        return np.sqrt(1 - self.alpha_bar[i]) / self.v[i] * (x - self.m[i])

    def previous(self, x, i):
        gain = np.sqrt(self.alpha[i]) * self.v_prev[i] / self.v[i]
        return self.m_prev[i] + gain * (x - self.m[i])

    def v_prediction(self, x, i):
        a, s = np.sqrt(self.alpha_bar[i]), np.sqrt(1 - self.alpha_bar[i])
        return a * self.eps(x, i) - s * self.x_start(x, i)

    def velocity(self, x_tau, i):
        """At a point of the linear path, which is x_t / (a + s)."""
        x = x_tau * (np.sqrt(self.alpha_bar[i]) + np.sqrt(1 - self.alpha_bar[i]))
        return self.eps(x, i) - self.x_start(x, i)

    def model(self, x, t):
        """The best model of the process's mean and variance types."""
        (original,) = set(t.tolist())
        i = self.diffusion.timestep_map.index(original)
        predict = {
            ModelMeanType.EPSILON: self.eps,
            ModelMeanType.START_X: self.x_start,
            ModelMeanType.PREVIOUS_X: self.previous,
            ModelMeanType.V: self.v_prediction,
            ModelMeanType.FLOW: self.velocity,
        }[self.diffusion.model_mean_type]
        return self.with_variance(predict(x, i), i)

    def with_variance(self, prediction, i):
        kind = self.diffusion.model_var_type
        if kind in (ModelVarType.FIXED_SMALL, ModelVarType.FIXED_LARGE):
            return prediction
        value = math.log(self.reverse_variance[i])
        if kind == ModelVarType.LEARNED_RANGE:  # from [log beta-tilde, log beta] to [-1, 1]
            small = self.beta * (1 - self.alpha_bar_prev) / (1 - self.alpha_bar)
            low, high = math.log(small[max(i, 1)]), math.log(self.beta[i])
            value = 2 * (value - low) / (high - low) - 1
        return torch.cat([prediction, torch.full_like(prediction, value)], dim=1)


class Sources:
    """Draws that make an affine sampler's result readable.

    In place of ``torch.randn_like``: the k-th draw is 1 in row k + 2 and 0 elsewhere. Row 1 is the
    unit start. So row 0 of the result is its mean, and each row less row 0 the weight of one
    source of noise: the sum of their squares is the variance, exactly.
    """

    def __init__(self, steps):
        self.shape = (steps + 2, 1)
        self.draws = 0

    def start(self, mean, variance):
        x = torch.full(self.shape, mean, dtype=torch.float64)
        x[1] += math.sqrt(variance)
        return x

    def randn_like(self, x):
        noise = torch.zeros_like(x)
        noise[self.draws + 2] = 1
        self.draws += 1
        return noise

    @staticmethod
    def moments(x):
        return x[0].item(), (x[1:] - x[0]).square().sum().item()


def trace(monkeypatch, diffusion, data, sampler, **options):
    """Mean and variance of the samples after each step, from the exact marginal at the end."""
    sources = Sources(diffusion.num_timesteps)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn_like", sources.randn_like)
        steps = getattr(diffusion, sampler)(
            data.model,
            sources.shape,
            noise=sources.start(data.m[-1], data.v[-1]),
            clip_denoised=False,
            device="cpu",
            **options,
        )
        moments = [sources.moments(step["sample"]) for step in steps]
    assert sources.draws == diffusion.num_timesteps
    return np.array(moments)  # [T, 2], the step from t = T - 1 first


def marginals(data):
    """What is left after each step: x_{t-1}'s marginal, but at t = 0 the estimate of x_0, which
    has less than the data's variance as no noise is added."""
    variance = data.v_prev - np.append(data.x_start_variance[0], np.zeros(len(data.v) - 1))
    return np.stack([data.m_prev, variance], axis=1)[::-1]


# -- DDPM ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("respacing", ["", "7", "10,4,2"])
@pytest.mark.parametrize("var", ["LEARNED", "LEARNED_RANGE"])
@pytest.mark.parametrize("mean", MEANS)
def test_ddpm_with_the_true_reverse_process_has_the_exact_marginal_at_every_step(
    monkeypatch, mean, var, respacing
):
    diffusion = make_diffusion(STEPS, respacing=respacing, mean=mean, var=var)
    data = GaussianData(diffusion)
    moments = trace(monkeypatch, diffusion, data, "p_sample_loop_progressive")
    np.testing.assert_allclose(moments, marginals(data), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(("var", "mu", "s"), [("FIXED_SMALL", 0.7, 0.0), ("FIXED_LARGE", 0.0, 1.0)])
@pytest.mark.parametrize("mean", MEANS)
def test_fixed_variances_are_exact_for_a_point_and_for_white_noise(monkeypatch, mean, var, mu, s):
    """DDPM section 3.2: the lower and the upper bound of the reverse process's entropy."""
    diffusion = make_diffusion(STEPS, mean=mean, var=var)
    data = GaussianData(diffusion, mu, s)
    moments = trace(monkeypatch, diffusion, data, "p_sample_loop_progressive")
    np.testing.assert_allclose(moments, marginals(data), rtol=2e-5, atol=2e-6)


def test_fixed_variances_bracket_the_exact_marginal(monkeypatch):
    variance = {}
    for var in ("FIXED_SMALL", "FIXED_LARGE"):
        diffusion = make_diffusion(STEPS, respacing="7", var=var)
        data = GaussianData(diffusion)
        moments = trace(monkeypatch, diffusion, data, "p_sample_loop_progressive")
        np.testing.assert_allclose(moments[:, 0], marginals(data)[:, 0], atol=2e-6)
        variance[var] = moments[1:-1, 1]
    exact = marginals(data)[1:-1, 1]
    assert np.all(variance["FIXED_SMALL"] < exact - 1e-4)
    assert np.all(variance["FIXED_LARGE"] > exact + 1e-4)


def test_many_ddpm_samples_have_the_datas_moments():
    """The same by drawing, from the global generator: the draws are normal and independent."""
    diffusion = make_diffusion(STEPS, var="LEARNED")
    data = GaussianData(diffusion)
    x = torch.randn(1, 1, COUNT)
    sample = diffusion.p_sample_loop(
        data.model, x.shape, noise=data.m[-1] + math.sqrt(data.v[-1]) * x, device="cpu",
        clip_denoised=False,
    )  # fmt: skip
    mean, variance = marginals(data)[-1]
    assert sample.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(variance / COUNT))
    assert sample.var().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / COUNT))
    normal = (sample - mean) / math.sqrt(variance)
    assert normal.pow(3).mean().abs() < 5 * math.sqrt(15 / COUNT)
    assert normal.pow(4).mean().item() == pytest.approx(3, abs=5 * math.sqrt(96 / COUNT))


# -- DDIM ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("respacing", ["", "7", "ddim10"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("mean", MEANS)
def test_ddim_is_exact_for_a_point_whatever_eta_and_respacing(monkeypatch, mean, eta, respacing):
    """DDIM section 3.1: the non-Markovian processes share the marginals given x_0."""
    diffusion = make_diffusion(STEPS, respacing=respacing, mean=mean, var="FIXED_SMALL")
    data = GaussianData(diffusion, mu=0.7, s=0.0)
    moments = trace(monkeypatch, diffusion, data, "ddim_sample_loop_progressive", eta=eta)
    np.testing.assert_allclose(moments, marginals(data), rtol=2e-5, atol=5e-6)


def ddim_weights(data, eta):
    """For each step, the last first: the weight of x_t - m_t and the sigma of DDIM eq. 12."""
    for i in reversed(range(len(data.beta))):
        a, a_prev = data.alpha_bar[i], data.alpha_bar_prev[i]
        sigma = eta * math.sqrt((1 - a_prev) / (1 - a) * (1 - a / a_prev))
        weight = math.sqrt(a_prev) * math.sqrt(a) * data.s**2 / data.v[i]
        weight += math.sqrt(max(1 - a_prev - sigma**2, 0)) * math.sqrt(1 - a) / data.v[i]
        yield weight, sigma


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("respacing", ["", "7", "ddim10"])
def test_ddim_has_the_moments_that_its_equation_gives(monkeypatch, respacing, eta):
    diffusion = make_diffusion(STEPS, respacing=respacing)
    data = GaussianData(diffusion)
    variance, expected = data.v[-1], []
    for i, (weight, sigma) in enumerate(ddim_weights(data, eta)):
        last = i == len(data.beta) - 1
        variance = weight**2 * variance + (0 if last else sigma**2)
        expected.append(variance)
    moments = trace(monkeypatch, diffusion, data, "ddim_sample_loop_progressive", eta=eta)
    np.testing.assert_allclose(moments[:, 0], data.m_prev[::-1], atol=5e-6)
    np.testing.assert_allclose(moments[:, 1], expected, rtol=5e-5)


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("respacing", ["", "7", "ddim10"])
def test_deterministic_ddim_is_the_composition_of_its_linear_steps(respacing, mean):
    diffusion = make_diffusion(STEPS, respacing=respacing, mean=mean, var="LEARNED")
    data = GaussianData(diffusion)
    x_end = data.m[-1] + torch.randn(5, 1, 4, 4, dtype=torch.float64)
    sample = diffusion.ddim_sample_loop(
        data.model, x_end.shape, noise=x_end, clip_denoised=False, device="cpu"
    )
    factor = np.prod([weight for weight, _ in ddim_weights(data, eta=0.0)])
    torch.testing.assert_close(
        sample, data.mu + factor * (x_end - data.m[-1]), rtol=1e-5, atol=1e-5
    )


def variance_error(monkeypatch, respacing, **options):
    """How far off the marginal's variance is after the last but one step, from alpha_bar ~ 0."""
    diffusion = make_diffusion(2000, respacing=respacing, mean="START_X", var="FIXED_SMALL")
    data = GaussianData(diffusion)
    moments = trace(monkeypatch, diffusion, data, "ddim_sample_loop_progressive", **options)
    return abs(moments[-2, 1] - data.v_prev[1])


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_approaches_the_exact_marginal_to_first_order(monkeypatch, eta):
    """Twice the steps halve the error; for eta = 0 the limit is the probability-flow ODE."""
    errors = [variance_error(monkeypatch, steps, eta=eta) for steps in ("100", "200", "400")]
    assert errors[-1] < 0.1 * S**2
    ratios = np.divide(errors[:-1], errors[1:])
    assert np.all((ratios > 1.7) & (ratios < 2.2)), ratios


def test_deterministic_ddim_follows_the_probability_flow_ode(monkeypatch):
    """Its exact solution keeps (x_t - m_t) / sqrt(V_t)."""
    diffusion = make_diffusion(2000, respacing="500")
    data = GaussianData(diffusion)
    x = torch.tensor([[-1.5], [0.0], [2.0]], dtype=torch.float64)
    steps = list(
        diffusion.ddim_sample_loop_progressive(
            data.model, x.shape, clip_denoised=False, device="cpu",
            noise=data.m[-1] + math.sqrt(data.v[-1]) * x,
        )
    )  # fmt: skip
    for i in (400, 250, 100, 10):
        x_prev = steps[len(steps) - 1 - i]["sample"]
        standardised = (x_prev - data.m_prev[i]) / math.sqrt(data.v_prev[i])
        torch.testing.assert_close(standardised, x, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("mean", MEANS)
def test_reverse_ddim_is_the_composition_of_its_linear_steps(mean):
    diffusion = make_diffusion(STEPS, respacing="10", mean=mean, var="LEARNED")
    data = GaussianData(diffusion)
    x = start = data.m[0] + 0.3 * torch.randn(5, 1, 4, 4, dtype=torch.float64)
    factor = 1.0
    for i in range(9):
        x = diffusion.ddim_reverse_sample(data.model, x, torch.full((5,), i), clip_denoised=False)[
            "sample"
        ]
        a, a_next = data.alpha_bar[i], data.alpha_bar[i + 1]
        factor *= (math.sqrt(a_next * a) * data.s**2 + math.sqrt((1 - a_next) * (1 - a))) / data.v[
            i
        ]
        expected = data.m[i + 1] + factor * (start - data.m[0])
        torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


# -- the variational bound -------------------------------------------------------------------------


def model_variance(data, var):
    """The variance of p at each step. At t = 0 the fixed ones take beta-tilde of t = 1."""
    small = data.beta * (1 - data.alpha_bar_prev) / (1 - data.alpha_bar)
    first = small[1]
    small[0] = first
    return {
        "LEARNED": data.reverse_variance,
        "LEARNED_RANGE": data.reverse_variance,
        "FIXED_SMALL": small,
        "FIXED_LARGE": np.append(first, data.beta[1:]),
    }[var]


@pytest.mark.parametrize("respacing", ["", "7"])
@pytest.mark.parametrize("var", VARIANCES)
@pytest.mark.parametrize("mean", MEANS)
def test_each_term_of_the_bound_is_the_divergence_of_known_gaussians(mean, var, respacing):
    """Given the draws: KL(q(x_{t-1} | x_t, x_0) || p), and at t = 0 the probability of x_0's bin
    (by the package's approximate cdf, which has tests of its own)."""
    diffusion = make_diffusion(STEPS, respacing=respacing, mean=mean, var=var)
    data = GaussianData(diffusion)
    x_start = (MU + S * torch.randn(3, 1, 5, 5, dtype=torch.float64)).clamp(-0.99, 0.99)
    torch.manual_seed(21)
    out = diffusion.calc_bpd_loop(data.model, x_start, clip_denoised=False)
    torch.manual_seed(21)
    sigma_p = np.sqrt(model_variance(data, var))
    steps = len(data.beta)
    for column, i in enumerate(reversed(range(steps))):
        a, a_prev = data.alpha_bar[i], data.alpha_bar_prev[i]
        noise = torch.randn_like(x_start)
        x_t = math.sqrt(a) * x_start + math.sqrt(1 - a) * noise
        p = Normal(data.previous(x_t, i), sigma_p[i])
        if i > 0:
            variance = 1 / (data.alpha[i] / data.beta[i] + 1 / (1 - a_prev))  # Bayes' rule
            weighted = math.sqrt(data.alpha[i]) / data.beta[i] * x_t
            weighted = weighted + math.sqrt(a_prev) / (1 - a_prev) * x_start
            nats = kl_divergence(Normal(variance * weighted, math.sqrt(variance)), p)
        else:
            above, below = (
                approx_standard_normal_cdf((edge - p.mean) / p.stddev)
                for edge in (x_start + 1 / 255, x_start - 1 / 255)
            )
            nats = -(above - below).log()
        bits = nats.flatten(1).mean(dim=1) / math.log(2)
        torch.testing.assert_close(out["vb"][:, column], bits, rtol=1e-4, atol=1e-5)
        x_start_error = (data.x_start(x_t, i) - x_start).square().flatten(1).mean(dim=1)
        torch.testing.assert_close(out["xstart_mse"][:, column], x_start_error, rtol=1e-4, atol=0)
        eps_error = (data.eps(x_t, i) - noise).square().flatten(1).mean(dim=1)
        torch.testing.assert_close(out["mse"][:, column], eps_error, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("var", VARIANCES)
def test_terms_of_the_bound_average_to_their_expectation_over_the_data(var):
    """E KL = (log(v_p / v_q) - 1 + (v_q + c^2 Var(x_0 | x_t)) / v_p) / 2, where the variance of
    the true reverse step is v_q + c^2 Var(x_0 | x_t)."""
    diffusion = make_diffusion(STEPS, var=var)
    data = GaussianData(diffusion)
    x_start = MU + S * torch.randn(1, 1, COUNT)
    out = diffusion.calc_bpd_loop(data.model, x_start, clip_denoised=False)
    v_q = (data.beta * (1 - data.alpha_bar_prev) / (1 - data.alpha_bar))[1:]
    v_p = model_variance(data, var)[1:]
    nats = 0.5 * (np.log(v_p / v_q) - 1 + data.reverse_variance[1:] / v_p)
    np.testing.assert_allclose(out["vb"][0, :-1], nats[::-1] / math.log(2), rtol=0.04, atol=1e-6)
    np.testing.assert_allclose(out["xstart_mse"][0], data.x_start_variance[::-1], rtol=0.04)
    eps_variance = data.alpha_bar * data.s**2 / data.v
    np.testing.assert_allclose(out["mse"][0], eps_variance[::-1], rtol=0.04)


@pytest.mark.parametrize(("steps", "respacing"), [(100, ""), (1000, "100"), (1000, "25")])
def test_bound_of_the_true_reverse_process_is_the_datas_entropy(steps, respacing):
    """The bound is tight, so bits/dim is the Gaussian's entropy at the resolution of 8 bits,
    however few the steps; only the first one must be wide against a bin."""
    s = 0.2  # narrow enough to stay off the outermost bins
    diffusion = make_diffusion(steps, schedule="cosine", respacing=respacing, var="LEARNED")
    data = GaussianData(diffusion, s=s)
    z = torch.randn(3, 1, COUNT // 3)
    x_start = MU + s * (z - z.mean()) / z.std()
    out = diffusion.calc_bpd_loop(data.model, x_start, clip_denoised=False)
    entropy = 0.5 * math.log2(2 * math.pi * math.e * s**2)
    bits = entropy + math.log2(255 / 2)  # bins are 2 / 255 wide
    assert out["total_bpd"].mean().item() == pytest.approx(bits, abs=0.05)


@pytest.mark.parametrize("steps", [30, 100, 1000])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_prior_bpd_equals_its_closed_form_in_float64(schedule, steps):
    diffusion = make_diffusion(steps, schedule=schedule)
    x_start = torch.rand(4, 3, 8, 8) * 2 - 1
    a = np.prod(1 - diffusion.betas)
    nats = 0.5 * (a * x_start.double() ** 2 - a - np.log1p(-a))
    bits = nats.flatten(1).mean(dim=1) / math.log(2)
    ours = diffusion._prior_bpd(x_start)
    torch.testing.assert_close(ours.double(), bits, rtol=1e-5, atol=1e-12)
    assert (ours > 0).all()


def test_total_bits_contain_the_prior_where_the_process_stops_early():
    """Ten of a thousand steps leave much of the data in x_T: the prior term dominates."""
    diffusion = make_diffusion(1000, respacing="10,0,0,0,0,0,0,0,0,0", var="LEARNED")
    data = GaussianData(diffusion)
    out = diffusion.calc_bpd_loop(data.model, torch.full((2, 1, 4, 4), 0.9), clip_denoised=False)
    torch.testing.assert_close(out["total_bpd"] - out["vb"].sum(dim=1), out["prior_bpd"])
    assert (out["prior_bpd"] > 0.5).all()
