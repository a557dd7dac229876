"""What the solvers do to distributions: weak and strong order, moments, marginals.

On Gaussian data D is linear, and so is a solver: its samples' variance follows from its answer to
unit draws, exactly. On the mixture many samples are drawn.
"""

import itertools
import math

import pytest
import torch
from analytic import Mixture, as_network, gaussian
from golden_data import make_diffusion
from test_solvers import MIXTURE, SHAPE, log_uniform

from improved_diffusion.solvers import SOLVERS

GAUSSIAN = gaussian([[0.4]], 0.5)
CLUSTERS = Mixture(  # far apart: their shares of the samples can be counted
    [0.5, 0.3, 0.2],
    [[[[-2.0]], [[-1.0]]], [[[2.0]], [[0.5]]], [[[0.0]], [[3.0]]]],
    [0.3, 0.4, 0.5],
)
COUNT = 6_400
STOCHASTIC = [
    ("heun", {"s_churn": 10.0}),
    ("dpmpp_2m_sde", {}),
    ("sde", {"stochasticity": 1.0}),
    ("sde", {"stochasticity": 0.5}),
    ("ancestral", {}),
]
SAMPLERS = [
    ("euler", {}),
    ("heun", {}),
    ("dpmpp_2m", {}),
    ("dpmpp_3m", {}),
    ("unipc", {}),
    *STOCHASTIC,
]


# -- the data -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.1, 1.0, 30.0])
def test_score_is_the_gradient_of_the_log_density(sigma):
    x = MIXTURE.sample(20, sigma).requires_grad_()
    (gradient,) = torch.autograd.grad(MIXTURE.log_density(x, sigma).sum(), x)
    torch.testing.assert_close(MIXTURE.score(x.detach(), sigma), gradient)


def test_levels_may_differ_in_a_batch():
    x, sigma = MIXTURE.sample(3, 1.0), torch.tensor([0.1, 1.0, 30.0])
    rows = [MIXTURE(x[i : i + 1], sigma[i].item()) for i in range(3)]
    torch.testing.assert_close(MIXTURE(x, sigma), torch.cat(rows))


@pytest.mark.parametrize("sigma", [0.0, 2.0])
def test_samples_of_the_data_have_its_moments_and_distribution(sigma):
    check_moments(CLUSTERS.sample(COUNT, sigma), CLUSTERS, sigma)
    assert ks_statistic(CLUSTERS.sample(COUNT, sigma), CLUSTERS, sigma) < 1.95


@pytest.mark.parametrize("respacing", ["", "10"])
@pytest.mark.parametrize("mean", ["PREVIOUS_X", "START_X", "EPSILON", "V", "FLOW"])
def test_exact_network_gives_the_process_the_exact_estimate(mean, respacing):
    diffusion = make_diffusion(mean=mean, var="FIXED_SMALL", respacing=respacing)
    network = as_network(diffusion, MIXTURE)
    for i in (1, diffusion.num_timesteps - 1):
        alpha_bar = diffusion.alphas_cumprod[i]
        sigma = math.sqrt((1 - alpha_bar) / alpha_bar)
        x = MIXTURE.sample(20, sigma)
        t = torch.full((20,), i)
        out = diffusion.p_mean_variance(
            network, x * math.sqrt(alpha_bar), t, clip_denoised=False
        )  # fmt: skip
        torch.testing.assert_close(out["pred_xstart"], MIXTURE(x, sigma), rtol=1e-3, atol=1e-3)


# -- weak order -----------------------------------------------------------------------------------


def variance_error(name, first, last, steps, **own):
    """Of the samples' variance, exactly, from the exact variance at the first level.

    Row 0 starts from the mean and draws zeros; row 1 starts one standard deviation off; row k + 2
    has 1 for its k-th draw. The squares of the rows less row 0 add up to the variance.
    """
    x = torch.full((steps + 2, 1, 1), 0.4, dtype=torch.float64)
    x[1] += math.sqrt(0.5**2 + first**2)
    draws = itertools.count(2)

    def noise(x, sigma, sigma_next):
        unit = torch.zeros_like(x)
        unit[next(draws)] = 1
        return unit

    y = SOLVERS[name](GAUSSIAN, x, log_uniform(first, last, steps), noise_sampler=noise, **own)
    assert next(draws) == steps + 2
    assert y[0].item() == pytest.approx(0.4, abs=1e-12)  # the mean is exact
    return (y[1:] - y[0]).square().sum().item() - (0.5**2 + last**2)


@pytest.mark.parametrize(
    ("name", "own", "order"),
    [
        ("heun", {"s_churn": 2.0}, 2),
        ("heun", {"s_churn": 10.0}, 2),
        ("dpmpp_2m_sde", {}, 2),
        ("sde", {"stochasticity": 1.0}, 1),
        ("sde", {"stochasticity": 0.5}, 1),
        ("ancestral", {}, 1),
    ],
)
@pytest.mark.parametrize("first", [80.0, 3.0])
def test_error_of_the_variance_falls_with_the_claimed_weak_order(name, own, order, first):
    coarse, fine = (variance_error(name, first, 0.3, steps, **own) for steps in (160, 320))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.3)


class Brownian:
    """The same Brownian motion at any of the levels, as a noise sampler.

    :param clock: from a level to the time that the solver's noise goes by.
    :param levels: [S + 1], the finest that will be asked for.
    """

    def __init__(self, clock, levels, shape, seed=0):
        self.clock = clock
        self.index = {round(math.log(level), 9): i for i, level in enumerate(levels.tolist())}
        generator = torch.Generator().manual_seed(seed)
        times = torch.tensor([clock(level) for level in levels.tolist()], dtype=torch.float64)
        normal = torch.randn(len(times) - 1, *shape, generator=generator, dtype=torch.float64)
        steps = times.diff().sqrt().view(-1, *[1] * len(shape)) * normal
        self.path = torch.cat([torch.zeros(1, *shape, dtype=torch.float64), steps.cumsum(0)])

    def at(self, level):
        return self.path[self.index[round(math.log(level), 9)]]

    def __call__(self, x, sigma, sigma_next):
        elapsed = self.clock(sigma_next) - self.clock(sigma)
        return (self.at(sigma_next) - self.at(sigma)) / math.sqrt(elapsed)


CLOCKS = {
    "sde": lambda sigma: -(sigma**2),
    "ancestral": lambda sigma: 1 / sigma**2,
    "dpmpp_2m_sde": lambda sigma: 1 / sigma**2,
}


def coupled_changes(name, count, steps, statistic):
    """``statistic(a) - statistic(b)`` for samples a and b of the mixture by few and twice as many
    steps, and by twice and four times as many, all of the same noise."""
    first, last = 10.0, 0.5
    x = MIXTURE.sample(count, first)
    noise = Brownian(CLOCKS[name], log_uniform(first, last, 4 * steps), x.shape)
    results = [
        statistic(SOLVERS[name](MIXTURE, x, log_uniform(first, last, n), noise_sampler=noise))
        for n in (steps, 2 * steps, 4 * steps)
    ]
    return [a - b for a, b in itertools.pairwise(results)]


@pytest.mark.parametrize("name", CLOCKS)
def test_strong_order_is_1_for_the_same_brownian_motion(name):
    coarse, fine = (change.abs().mean() for change in coupled_changes(name, 1000, 40, lambda x: x))
    assert math.log2(coarse / fine) == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize(("name", "least", "most"), [("dpmpp_2m_sde", 2, 5), ("ancestral", 1, 1)])
def test_weak_order_where_the_denoiser_is_not_linear(name, least, most):
    """Drawn, not exact; with the same noise little is left of it. So few steps that the change is
    above the noise are too few for the last word: the error may still fall faster."""
    changes = coupled_changes(name, 50_000, 6, lambda x: x.square().flatten(1).sum(dim=1))
    for change in changes:
        assert change.mean().abs() > 4 * change.std() / math.sqrt(len(change))
    order = math.log2(changes[0].mean() / changes[1].mean())
    assert least - 0.3 < order < most + 0.3


# -- moments and marginals ------------------------------------------------------------------------


def check_moments(x, data, sigma=0.0):
    """Mean and covariance within five standard errors of the exact ones."""
    flat = x.double().flatten(1)
    covariance = data.covariance(sigma)
    error = covariance.diagonal().div(len(x)).sqrt()
    assert ((flat.mean(dim=0) - data.mean()).abs() < 5 * error).all()
    products = (flat - data.mean())[:, :, None] * (flat - data.mean())[:, None, :]
    error = products.std(dim=0) / math.sqrt(len(x))
    assert ((products.mean(dim=0) - covariance).abs() < 5 * error).all()


def ks_statistic(x, data, sigma=0.0):
    """The largest Kolmogorov-Smirnov statistic of a coordinate, times sqrt(N).

    Of exact samples it exceeds 1.95 once in a thousand.
    """
    flat = x.double().flatten(1).sort(dim=0).values
    below = torch.arange(len(flat), dtype=torch.float64) / len(flat)
    largest = 0.0
    for coordinate in range(flat.shape[1]):
        cdf = data.cdf(flat[:, coordinate], coordinate, sigma)
        gap = torch.maximum((cdf - below).abs(), (cdf - below - 1 / len(flat)).abs()).max()
        largest = max(largest, gap.item() * math.sqrt(len(flat)))
    return largest


def check_shares(x, data):
    """The components' shares of the samples, within five standard errors."""
    shares = torch.bincount(data.nearest(x), minlength=3) / len(x)
    exact = torch.bincount(data.nearest(data.sample(200_000, seed=9)), minlength=3) / 200_000
    error = (exact * (1 - exact) / len(x)).sqrt()
    assert ((shares - exact).abs() < 5 * error).all()
    assert ((exact - data.weights).abs() < 0.01).all()  # hardly any is nearer to another


@pytest.mark.parametrize(("name", "own"), SAMPLERS)
def test_samples_have_the_datas_moments_and_shares(name, own):
    x = CLUSTERS.sample(COUNT, 20.0, seed=1)
    sigmas = [*log_uniform(20.0, 0.02, 150).tolist(), 0.0]
    y = SOLVERS[name](CLUSTERS, x, sigmas, generator=torch.Generator().manual_seed(2), **own)
    check_moments(y, CLUSTERS)
    check_shares(y, CLUSTERS)


def test_samples_of_ode_have_the_datas_moments_and_shares():
    """As one image of many points, each with its own D: one by one would take minutes."""
    points = CLUSTERS.sample(COUNT, 20.0, seed=1)
    image = points.view(COUNT, 2).T.reshape(1, 2, 80, 80)

    def denoise(x, sigma):
        flat = x.reshape(2, COUNT).T.reshape(COUNT, *SHAPE)
        return CLUSTERS(flat, sigma).view(COUNT, 2).T.reshape(x.shape)

    y = SOLVERS["ode"](denoise, image, [20.0, 0.02, 0.0])
    y = y.reshape(2, COUNT).T.reshape(COUNT, *SHAPE)
    check_moments(y, CLUSTERS)
    check_shares(y, CLUSTERS)


def test_inversion_of_data_has_the_moments_of_the_noise():
    sigmas = [*log_uniform(20.0, 0.02, 150).tolist(), 0.0]
    y = SOLVERS["ddim_inversion"](CLUSTERS, CLUSTERS.sample(COUNT), sigmas)
    check_moments(y, CLUSTERS, 20.0)
    assert ks_statistic(y, CLUSTERS, 20.0) < 1.95


@pytest.mark.parametrize(("name", "own"), [*STOCHASTIC, ("dpmpp_2m", {})])
@pytest.mark.parametrize(("first", "last"), [(10.0, 1.0), (2.0, 0.2)])
def test_marginals_are_kept_between_levels(name, own, first, last):
    x = CLUSTERS.sample(COUNT, first, seed=3)
    y = SOLVERS[name](
        CLUSTERS,
        x,
        log_uniform(first, last, 150),
        generator=torch.Generator().manual_seed(4),
        **own,
    )
    check_moments(y, CLUSTERS, last)
    assert ks_statistic(y, CLUSTERS, last) < 1.95
    moved = (y - x).flatten(1)
    assert moved.std() > last  # it did walk
