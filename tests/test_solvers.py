"""The solvers on data whose best denoiser is known: order of convergence, formulas, arguments.

What they do to distributions is in test_solver_statistics.py.
"""

import functools
import inspect
import itertools
import math
import sys

import numpy as np
import pytest
import torch
from analytic import Mixture, as_network, gaussian
from golden_data import formula_model, make_diffusion
from scipy.integrate import solve_ivp

from improved_diffusion import solvers
from improved_diffusion.denoiser import Denoiser
from improved_diffusion.errors import UserError
from improved_diffusion.noise_levels import noise_levels
from improved_diffusion.rng import sample_generators
from improved_diffusion.solvers import SOLVERS, get_solver

SHAPE = (2, 1, 1)
MIXTURE = Mixture(
    [0.5, 0.3, 0.2],
    [[[[-1.0]], [[-0.5]]], [[[1.2]], [[0.3]]], [[[0.1]], [[1.5]]]],
    [0.3, 0.4, 0.5],
)
STOCHASTIC = {  # with the arguments that make them so
    "heun": {"s_churn": 2.0},
    "dpmpp_2m_sde": {},
    "sde": {},
    "ancestral": {},
}
DETERMINISTIC = ["euler", "heun", "dpmpp_2m", "dpmpp_3m", "unipc", "ode", "ddim_inversion"]
SIGMAS = [10.0, 3.0, 1.0, 0.4, 0.1, 0.0]


def log_uniform(first, last, steps):
    """[steps + 1] levels, evenly spaced in lambda."""
    ends = math.log(first), math.log(last)
    return torch.exp(torch.linspace(*ends, steps + 1, dtype=torch.float64))


@functools.cache
def exact_flow(first, last, seed=1):
    """16 points of the mixture at a level, and where the ODE takes them."""
    x = MIXTURE.sample(16, first, seed)
    solution = solve_ivp(
        lambda s, y: MIXTURE(torch.from_numpy(y).view(x.shape), math.exp(-s)).flatten().numpy() - y,
        (-math.log(first), -math.log(last)),
        x.flatten().numpy(),
        method="DOP853",
        rtol=1e-12,
        atol=1e-12,
    )
    return x, torch.from_numpy(solution.y[:, -1].copy()).view(x.shape)


def rms(x):
    return x.square().mean().sqrt().item()


def measured_order(name, first, last, steps, **own):
    """The exponent with which the error falls from ``steps`` to twice as many."""
    x, exact = exact_flow(first, last)
    coarse, fine = (
        rms(SOLVERS[name](MIXTURE, x, log_uniform(first, last, n), **own) - exact)
        for n in (steps, 2 * steps)
    )
    return math.log2(coarse / fine)


# -- order ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "own", "steps", "order"),
    [
        ("euler", {}, 80, 1),
        ("heun", {}, 80, 2),
        ("dpmpp_2m", {}, 80, 2),
        ("dpmpp_3m", {}, 160, 3),
        ("unipc", {"order": 1}, 80, 2),
        ("unipc", {"order": 2}, 80, 3),
        ("unipc", {"order": 3}, 320, 4),
        ("sde", {"stochasticity": 0.0}, 80, 1),
    ],
)
def test_error_falls_with_the_claimed_order(name, own, steps, order):
    assert measured_order(name, 80.0, 0.02, steps, **own) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize(
    ("name", "own", "order"),
    [
        ("dpmpp_2m", {}, 2),
        ("dpmpp_3m", {}, 2),
        ("unipc", {"order": 2}, 3),
        ("unipc", {"order": 3}, 3),
    ],
)
def test_order_is_that_of_the_first_step_where_the_denoiser_changes_in_it(name, own, order):
    assert measured_order(name, 1.0, 0.02, 80, **own) == pytest.approx(order, abs=0.3)


def test_inversion_is_of_first_order():
    exact, x = exact_flow(80.0, 0.02)
    errors = [
        rms(SOLVERS["ddim_inversion"](MIXTURE, x, log_uniform(80.0, 0.02, n)) - exact)
        for n in (160, 320)
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.3)


def test_error_of_ode_is_about_its_tolerance():
    x, exact = exact_flow(80.0, 0.02)
    errors = {}
    for tolerance in (1e-2, 1e-4, 1e-6):
        y = solvers.sample_ode(MIXTURE, x[:6], [80.0, 0.02], tolerance=tolerance)
        errors[tolerance] = rms(y - exact[:6])
        assert 1e-3 * tolerance < errors[tolerance] < 30 * tolerance
    assert list(errors.values()) == sorted(errors.values(), reverse=True)


# -- formulas -------------------------------------------------------------------------------------


class Script:
    """A denoiser that answers with given numbers in turn, and keeps the questions."""

    def __init__(self, *answers):
        self.answers, self.seen = list(answers), []

    def __call__(self, x, sigma):
        self.seen.append((x.clone(), sigma))
        return torch.full_like(x, self.answers.pop(0))


def ones(*shape):
    return torch.ones(*(shape or (1, 1)), dtype=torch.float64)


def numbers(x):
    return pytest.approx(x.flatten().tolist(), rel=1e-12)


def test_euler_by_hand():
    x = solvers.sample_euler(Script(0.5, -0.25), 4 * ones(), [2.0, 1.0, 0.25])
    # dx/dsigma = (4 - 0.5) / 2, then (2.25 + 0.25) / 1
    assert numbers(x) == [4 - 1.75 - 0.75 * 2.5]


def test_heun_by_hand():
    script = Script(0.5, -0.25, 1.0)
    x = solvers.sample_heun(script, 4 * ones(), [2.0, 1.0, 0.0])
    slope = ((4 - 0.5) / 2 + (4 - 1.75 + 0.25) / 1) / 2
    assert script.seen[1][0].item() == pytest.approx(4 - 1.75)
    assert script.seen[2][0].item() == pytest.approx(4 - slope)
    assert x.item() == 1.0


def test_churn_by_hand():
    script = Script(0.5, 0.5, 0.5, 0.5)
    solvers.sample_heun(
        script, 4 * ones(), [2.0, 1.0, 0.1],
        s_churn=0.5, s_noise=1.1, s_tmin=1.5, noise_sampler=lambda x, sigma, sigma_next: ones(),
    )  # fmt: skip
    assert [sigma for _, sigma in script.seen] == [2.5, 1.0, 1.0, 0.1]  # gamma = 0.5 / 2 steps
    assert script.seen[0][0].item() == pytest.approx(4 + 1.1 * math.sqrt(2.5**2 - 2**2))
    many = Script(0.5)
    solvers.sample_heun(many, 4 * ones(), [2.0, 0.0], s_churn=40.0)
    assert many.seen[0][1] == pytest.approx(2 * math.sqrt(2))  # and no more


@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_3m"])
def test_second_order_step_by_hand(name):
    h_1, h_2 = 0.5, 0.8
    levels = [2.0, 2 * math.exp(-h_1), 2 * math.exp(-h_1 - h_2)]
    x = SOLVERS[name](Script(0.5, -0.25), 4 * ones(), levels)
    first = math.exp(-h_1) * 4 - math.expm1(-h_1) * 0.5
    r = h_1 / h_2
    combined = (1 + 1 / (2 * r)) * -0.25 - 1 / (2 * r) * 0.5  # DPM-Solver++ Alg. 2
    assert [math.exp(-h_2) * first - math.expm1(-h_2) * combined] == numbers(x)


def test_second_order_sde_step_by_hand():
    h_1, h_2 = 0.5, 0.8
    levels = [2.0, 2 * math.exp(-h_1), 2 * math.exp(-h_1 - h_2)]
    x = solvers.sample_dpmpp_2m_sde(
        Script(0.5, -0.25), 4 * ones(), levels, noise_sampler=lambda x, s, s_next: 0.3 * ones()
    )
    deviation = [
        level * math.sqrt(-math.expm1(-2 * h))
        for level, h in zip(levels[1:], (h_1, h_2), strict=True)
    ]
    first = math.exp(-2 * h_1) * 4 - math.expm1(-2 * h_1) * 0.5 + deviation[0] * 0.3
    r = h_1 / h_2
    combined = (1 + 1 / (2 * r)) * -0.25 - 1 / (2 * r) * 0.5
    second = math.exp(-2 * h_2) * first - math.expm1(-2 * h_2) * combined + deviation[1] * 0.3
    assert [second] == numbers(x)


def quadratic(lambda_):
    return 0.3 - 0.7 * lambda_ + 0.4 * lambda_**2


def exact_for_quadratic(x, sigma, sigma_next):
    """dx/dlambda = D(lambda) - x by quadrature."""
    start, end = -math.log(sigma), -math.log(sigma_next)
    nodes, weights = np.polynomial.legendre.leggauss(30)
    at = (start + end) / 2 + (end - start) / 2 * nodes
    integral = (end - start) / 2 * np.sum(weights * np.exp(at - end) * quadratic(at))
    return math.exp(start - end) * x + integral


def test_third_step_of_3m_is_exact_for_a_quadratic_denoiser():
    levels, xs = [3.0, 1.7, 1.2, 0.5, 0.45], []
    solvers.sample_dpmpp_3m(
        lambda x, sigma: torch.full_like(x, quadratic(-math.log(sigma))), ones(), levels,
        callback=lambda i, x, **_: xs.append(x.item()),
    )  # fmt: skip
    for i in (2, 3):
        assert xs[i] == pytest.approx(exact_for_quadratic(xs[i - 1], *levels[i : i + 2]), rel=1e-12)
    assert xs[1] != pytest.approx(exact_for_quadratic(xs[0], *levels[1:3]), rel=1e-4)


def test_second_step_of_unipc_is_exact_for_a_quadratic_denoiser():
    """The corrector of order 2 goes through three estimates, and so does the predictor of 3."""
    levels = [3.0, 1.7, 1.2, 0.5, 0.45]
    for order, exact_steps in ((1, ()), (2, (1, 2)), (3, (1, 2, 3))):
        xs = []
        solvers.sample_unipc(
            lambda x, sigma: torch.full_like(x, quadratic(-math.log(sigma))), ones(), levels,
            order=order, callback=lambda i, x, xs=xs, **_: xs.append(x.item()),
        )  # fmt: skip
        for i in (1, 2, 3):
            exact = exact_for_quadratic(xs[i - 1], *levels[i : i + 2])
            assert (xs[i] == pytest.approx(exact, rel=1e-12)) == (i in exact_steps)


def test_unipc_of_order_1_by_hand():
    h = math.log(2)
    script = Script(0.5, -0.25, 0.7)
    solvers.sample_unipc(script, 4 * ones(), [2.0, 1.0, 0.5, 0.0], order=1)
    predicted = 0.5 * 4 + 0.5 * 0.5
    corrected = predicted + -math.expm1(-h) * 0.5 * (-0.25 - 0.5)  # a_1 = 1/2, UniPC eq. 3
    assert [x.item() for x, _ in script.seen] == pytest.approx(
        [4, predicted, 0.5 * corrected + 0.5 * -0.25]
    )


def test_sde_by_hand():
    x = solvers.sample_sde(
        Script(0.5), 4 * ones(), [2.0, 1.5], stochasticity=0.6,
        noise_sampler=lambda x, sigma, sigma_next: 0.3 * ones(),
    )  # fmt: skip
    drift = (1 + 0.6**2) * (4 - 0.5) / 2  # EDM eq. 6
    assert [4 - 0.5 * drift + 0.6 * math.sqrt(2**2 - 1.5**2) * 0.3] == numbers(x)


def test_sde_step_beyond_d_by_hand():
    """Where 1 + s^2 times the step is more than sigma: exact for a D that stays, in any steps."""
    s, far = 0.6, [2.0, 0.3]
    assert (1 + s**2) * (1 - 0.3 / 2) > 1
    moments = []
    for levels in (far, np.geomspace(*far, 20_001)):
        unit = solvers.sample_sde(
            lambda x, sigma: torch.full_like(x, 0.5), 4 * ones(), levels, stochasticity=s,
            noise_sampler=lambda x, sigma, sigma_next: 0 * x,
        )  # fmt: skip
        moments.append(unit.item())
    assert moments[0] == pytest.approx(0.5 + (0.3 / 2) ** (1 + s**2) * 3.5, rel=1e-12)
    assert moments[1] == pytest.approx(moments[0], rel=1e-3)
    noisy = solvers.sample_sde(
        Script(0.5), 4 * ones(), far, stochasticity=s, noise_sampler=lambda x, *_: ones()
    )
    variance, sigmas = 0.0, np.geomspace(*far, 20_001)
    for sigma, after in itertools.pairwise(sigmas):  # d var = 2 (1 + s^2) var / sigma dsigma + ...
        variance *= (after / sigma) ** (2 * (1 + s**2))
        variance += s**2 * (sigma**2 - after**2)
    assert (noisy.item() - moments[0]) ** 2 == pytest.approx(variance, rel=1e-3)


def test_ancestral_step_is_the_posterior_of_ddpm():
    """DDPM eq. 7, of x_t = sqrt(alpha_bar) x."""
    sigma, sigma_next = 2.0, 1.5
    bar, bar_prev = 1 / (1 + sigma**2), 1 / (1 + sigma_next**2)
    alpha, beta = bar / bar_prev, 1 - bar / bar_prev
    mean = math.sqrt(bar_prev) * beta / (1 - bar) * 0.5
    mean += math.sqrt(alpha) * (1 - bar_prev) / (1 - bar) * math.sqrt(bar) * 4
    variance = beta * (1 - bar_prev) / (1 - bar)
    for z in (0.0, 0.3):
        x = solvers.sample_ancestral(
            Script(0.5), 4 * ones(), [sigma, sigma_next],
            noise_sampler=lambda x, sigma, sigma_next, z=z: z * ones(),
        )  # fmt: skip
        assert [(mean + z * math.sqrt(variance)) / math.sqrt(bar_prev)] == numbers(x)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_solvers_are_exact_where_the_denoiser_is_constant(name):
    x = torch.randn(3, 2, 2, dtype=torch.float64)
    sigmas = [5.0, 2.0, 1.9, 0.3]
    down = 0.7 + 0.3 / 5.0 * (x - 0.7)
    start, end = (down, x) if name == "ddim_inversion" else (x, down)
    own = {"tolerance": 1e-9} if name == "ode" else {}
    y = SOLVERS[name](lambda x, sigma: torch.full_like(x, 0.7), start, sigmas, **own)
    torch.testing.assert_close(y, end, rtol=1e-8, atol=1e-8)


def test_inversion_by_hand():
    script = Script(0.5, -0.25)
    x = solvers.sample_ddim_inversion(script, ones(), [2.0, 1.5, 0.0])
    first = 1 + (1 - 0.5)  # to 1.5, along the direction there
    assert [first + 0.5 * (first + 0.25) / 1.5] == numbers(x)
    assert [sigma for _, sigma in script.seen] == [1.5, 1.5]


def test_inversion_leads_to_noise_that_leads_back():
    data = MIXTURE.sample(2000)
    sigmas = [*log_uniform(20.0, 0.01, 400).tolist(), 0.0]
    noise = solvers.sample_ddim_inversion(MIXTURE, data, sigmas)
    assert noise.std().item() == pytest.approx(20, rel=0.05)
    back = solvers.sample_euler(MIXTURE, noise, sigmas)
    assert rms(back - data) < 0.03


# -- the library's own samplers -------------------------------------------------------------------

RESPACINGS = ["", "10", "ddim10", "5,3,2"]
IMAGES = (3, 3, 4, 4)


def solver_and_levels(diffusion, model, **options):
    denoise = Denoiser(model, diffusion, **options)
    return denoise, noise_levels(diffusion, 0, "respacing")


@pytest.mark.parametrize("clip_denoised", [False, True])
@pytest.mark.parametrize("respacing", RESPACINGS)
@pytest.mark.parametrize("mean", ["EPSILON", "START_X", "V"])
def test_euler_is_ddim_at_eta_0(mean, respacing, clip_denoised):
    diffusion = make_diffusion(mean=mean, respacing=respacing, rescale_timesteps=True)
    model, noise = formula_model("LEARNED_RANGE"), torch.randn(IMAGES)
    denoise, sigmas = solver_and_levels(diffusion, model, clip_denoised=clip_denoised)
    x = solvers.sample_euler(denoise, denoise.initial(noise, sigmas[0].item()), sigmas)
    ddim = diffusion.ddim_sample_loop(model, IMAGES, noise=noise, clip_denoised=clip_denoised)
    torch.testing.assert_close(x, ddim, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("clip_denoised", [False, True])
@pytest.mark.parametrize("respacing", RESPACINGS)
@pytest.mark.parametrize("var", ["FIXED_SMALL", "FIXED_LARGE", "LEARNED", "LEARNED_RANGE"])
def test_ancestral_is_ddpm(var, respacing, clip_denoised):
    diffusion = make_diffusion(var=var, respacing=respacing)
    model, noise = formula_model(var), torch.randn(IMAGES)
    denoise, sigmas = solver_and_levels(diffusion, model, clip_denoised=clip_denoised)
    x = solvers.sample_ancestral(
        denoise, denoise.initial(noise, sigmas[0].item()), sigmas,
        posterior=denoise.posterior, generator=sample_generators(0, range(3)),
    )  # fmt: skip
    ddpm = diffusion.p_sample_loop(
        model, IMAGES, noise=noise, clip_denoised=clip_denoised,
        generator=sample_generators(0, range(3)),
    )  # fmt: skip
    torch.testing.assert_close(x, ddpm, rtol=2e-4, atol=2e-4)
    if var == "FIXED_SMALL":
        own = solvers.sample_ancestral(
            denoise, denoise.initial(noise, sigmas[0].item()), sigmas,
            generator=sample_generators(0, range(3)),
        )  # fmt: skip
        torch.testing.assert_close(own, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("clip_denoised", [False, True])
@pytest.mark.parametrize("respacing", RESPACINGS)
def test_inversion_is_reverse_ddim(respacing, clip_denoised):
    """The library's begins at the first level and ends beyond the last: all steps but that."""
    diffusion = make_diffusion(respacing=respacing, rescale_timesteps=True)
    model, x_t = formula_model("LEARNED_RANGE"), torch.randn(IMAGES)
    denoise, sigmas = solver_and_levels(diffusion, model, clip_denoised=clip_denoised)
    x = x_t * math.hypot(1, sigmas[-2])
    x = solvers.sample_ddim_inversion(denoise, x, sigmas[:-1])
    for i in range(diffusion.num_timesteps - 1):
        t = torch.full((len(x_t),), i)
        x_t = diffusion.ddim_reverse_sample(model, x_t, t, clip_denoised=clip_denoised)["sample"]
    torch.testing.assert_close(x / math.hypot(1, sigmas[0]), x_t, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("mean", ["EPSILON", "START_X", "V", "FLOW"])
@pytest.mark.parametrize("var", ["FIXED_SMALL", "LEARNED_RANGE"])
def test_denoiser_of_the_exact_network_is_the_exact_denoiser(mean, var):
    """At steps and between them, for every prediction: what the solvers are proved on is what
    they get from a checkpoint."""
    diffusion = make_diffusion(100, mean=mean, var=var, rescale_timesteps=True)
    data = gaussian([[[0.4]], [[-0.2]]], 0.5) if var == "LEARNED_RANGE" else MIXTURE
    denoise = Denoiser(as_network(diffusion, data), diffusion)
    for sigma in (0.05, 0.7, 3.3, denoise.levels.sigma_max):
        x = data.sample(50, sigma)
        torch.testing.assert_close(denoise(x, sigma), data(x, sigma), rtol=1e-4, atol=1e-4)


def test_exact_learned_variance_gives_the_exact_posterior():
    """p(x_next | x) of Gaussian data: the variances s^2 + sigma^2 of the levels say it all."""
    diffusion = make_diffusion(100, var="LEARNED_RANGE", respacing="20")
    data = gaussian([[[0.4]]], 0.5)
    denoise = Denoiser(as_network(diffusion, data), diffusion)
    sigmas = noise_levels(diffusion, 0, "respacing").tolist()
    x = data.sample(50, 1.0)
    for sigma, sigma_next in itertools.pairwise(sigmas[:-1]):
        posterior = denoise.posterior(x, sigma, sigma_next)
        before, now = 0.25 + sigma_next**2, 0.25 + sigma**2
        variance = before * (sigma**2 - sigma_next**2) / now
        torch.testing.assert_close(
            posterior.variance, torch.full_like(x, variance), rtol=1e-4, atol=1e-7
        )


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_goes_down_the_levels_of_a_process(name):
    diffusion = make_diffusion(100, var="FIXED_SMALL", rescale_timesteps=True)
    denoise = Denoiser(as_network(diffusion, MIXTURE), diffusion)
    sigmas = noise_levels(diffusion, 20, "log_snr")
    x = MIXTURE.sample(4, sigmas[0].item())
    y, exact = (
        SOLVERS[name](d, start, sigmas, generator=sample_generators(0, range(4)))
        for d, start in ((denoise, x.float()), (MIXTURE, x))
    )
    torch.testing.assert_close(y.double(), exact, rtol=2e-3, atol=2e-3)


# -- arguments ------------------------------------------------------------------------------------


def run(name, x=None, sigmas=SIGMAS, denoise=MIXTURE, **options):
    x = MIXTURE.sample(4, sigmas[0]) if x is None else x
    options = {**STOCHASTIC.get(name, {}), **options}
    return SOLVERS[name](denoise, x, sigmas, **options)


class Counted:
    def __init__(self, denoise=MIXTURE):
        self.denoise, self.sigmas = denoise, []

    def __call__(self, x, sigma):
        self.sigmas.append(sigma)
        return self.denoise(x, sigma)


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "ode"])
def test_number_of_evaluations_is_as_documented(name):
    for sigmas in (SIGMAS, SIGMAS[:-1], SIGMAS[-2:]):
        counted, steps = Counted(), len(sigmas) - 1
        run(name, sigmas=sigmas, denoise=counted)
        expected = 2 * steps - (sigmas[-1] == 0) if name == "heun" else steps
        assert len(counted.sigmas) == expected
        assert all(isinstance(sigma, float) and sigma > 0 for sigma in counted.sigmas)


def test_ode_evaluates_more_for_a_smaller_tolerance_and_once_at_the_end():
    counts = []
    for tolerance in (1e-2, 1e-4, 1e-6):
        counted = Counted()
        run("ode", denoise=counted, tolerance=tolerance)
        assert all(sigma.shape == (4,) for sigma in counted.sigmas)
        assert counted.sigmas[-1].tolist() == [0.1] * 4
        assert all(((sigma >= 0.1) & (sigma <= 10)).all() for sigma in counted.sigmas)
        counts.append(len(counted.sigmas))
    assert counts == sorted(set(counts))


@pytest.mark.parametrize("name", SOLVERS)
def test_callback_gets_what_is_documented(name):
    calls = []
    x = MIXTURE.sample(4, SIGMAS[0])
    y = run(name, x, callback=lambda i, **step: calls.append((i, step)))
    begin = {"ode": [0.1], "ddim_inversion": SIGMAS[:0:-1]}.get(name, SIGMAS[:-1])
    assert [i for i, _ in calls] == list(range(len(begin)))
    assert [step["sigma"] for _, step in calls] == begin
    assert all(set(step) == {"x", "x_start", "sigma"} for _, step in calls)
    assert torch.equal(calls[-1][1]["x"], y)
    if name not in ("heun", "ode"):  # churn moves x first
        first = MIXTURE(x, 0.1 if name == "ddim_inversion" else 10.0)
        torch.testing.assert_close(calls[0][1]["x_start"], first)
    if name != "ddim_inversion":
        assert torch.equal(calls[-1][1]["x_start"], y)  # the step to 0 returns D


@pytest.mark.parametrize("name", SOLVERS)
def test_one_step_works_and_its_result_is_the_estimate(name):
    x = MIXTURE.sample(4, 10.0)
    y = run(name, x, sigmas=[10.0, 0.0], **({"s_churn": 0.0} if name == "heun" else {}))
    d = MIXTURE(x, 10.0)
    torch.testing.assert_close(y, x + (x - d) if name == "ddim_inversion" else d)


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
@pytest.mark.parametrize("name", SOLVERS)
def test_levels_may_be_a_list_an_array_or_a_tensor(name, kind):
    torch.manual_seed(5)
    expected = run(name)
    torch.manual_seed(5)
    torch.testing.assert_close(run(name, sigmas=kind(SIGMAS)), expected, rtol=1e-5, atol=1e-5)
    assert expected.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SOLVERS)
def test_type_of_x_is_kept_whatever_the_denoiser_returns(name, dtype):
    x = MIXTURE.sample(4, SIGMAS[0])
    denoise = lambda x, sigma: MIXTURE(x, sigma).double()  # noqa: E731
    options = {"noise_sampler": lambda x, *_: torch.ones_like(x)} if name in STOCHASTIC else {}
    if name == "ode":
        options = {"tolerance": 1e-2}  # of a step: below bfloat16's rounding it takes tiny ones
    y = run(name, x.to(dtype), denoise=denoise, **options)
    assert y.dtype == dtype
    size = y.double().abs().max().item()
    rounding = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.1}[dtype]
    assert rms(y.double() - run(name, x, **options)) < rounding * size


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "ode"])
def test_loops_never_wait_for_the_device(name):
    """A tensor of the meta device has no values: asking for one is an error."""
    x = torch.empty(4, *SHAPE, device="meta")
    y = run(name, x, denoise=lambda x, sigma: x / (1 + sigma**2))
    assert (y.device.type, y.shape, y.dtype) == ("meta", x.shape, x.dtype)


@pytest.mark.parametrize("name", SOLVERS)
def test_gradients_are_not_kept_and_x_is_left_alone(name):
    weight = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    x = MIXTURE.sample(4, SIGMAS[0])
    before = x.clone()
    y = run(name, x, denoise=lambda x, sigma: weight * MIXTURE(x, sigma))
    assert not y.requires_grad
    assert torch.equal(x, before)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", SOLVERS)
def test_sample_does_not_depend_on_its_batch(name):
    x = MIXTURE.sample(4, SIGMAS[0])

    def sample(*indices):
        return run(name, x[list(indices)], generator=sample_generators(0, indices))

    together = sample(0, 1, 2, 3)
    for split in ([[0, 1], [2, 3]], [[0], [1, 2, 3]], [[3, 1], [2, 0]]):
        for part in split:
            torch.testing.assert_close(sample(*part), together[part], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_noise_comes_from_the_generator(name):
    x = MIXTURE.sample(4, SIGMAS[0])
    before = torch.get_rng_state()
    first, second, again = (
        run(name, x, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2, 1)
    )
    assert torch.equal(first, again)
    assert not torch.isclose(first, second).any()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    own = run(name, x)  # from the global generator
    torch.manual_seed(1)
    torch.testing.assert_close(run(name, x), own)
    assert not torch.isclose(run(name, x), own).any()


@pytest.mark.parametrize("name", STOCHASTIC)
def test_noise_sampler_is_asked_once_for_each_step_with_noise(name):
    asked = []

    def noise(x, sigma, sigma_next):
        asked.append((sigma, sigma_next))
        return torch.zeros_like(x)

    before = torch.get_rng_state()
    run(name, noise_sampler=noise)
    steps = list(itertools.pairwise(SIGMAS))
    if name == "heun":
        gamma = 2.0 / len(steps)
        assert asked == [(pytest.approx((1 + gamma) * sigma), sigma) for sigma, _ in steps]
    else:
        assert asked == steps[:-1]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "own"),
    [
        *((name, {}) for name in DETERMINISTIC),
        ("heun", {"s_churn": 0.0}),
        ("sde", {"stochasticity": 0.0}),
    ],
)
def test_deterministic_solvers_draw_nothing(name, own):
    before = torch.get_rng_state()
    SOLVERS[name](MIXTURE, MIXTURE.sample(4, SIGMAS[0]), SIGMAS, **own)
    assert torch.equal(torch.get_rng_state(), before)


OWN = [  # the changed argument, and what else is needed for it to matter
    ("heun", {"s_churn": 1.0}, {}),
    ("heun", {"s_tmin": 2.0}, {"s_churn": 1.0}),
    ("heun", {"s_tmax": 2.0}, {"s_churn": 1.0}),
    ("heun", {"s_noise": 1.01}, {"s_churn": 1.0}),
    ("unipc", {"order": 1}, {}),
    ("unipc", {"order": 3}, {}),
    ("sde", {"stochasticity": 0.9}, {}),
    ("ode", {"tolerance": 1e-3}, {}),
    ("ancestral", {"posterior": lambda x, s, s_next: types_of_posterior(x, s)}, {}),
    *((name, {"noise_sampler": lambda x, *_: torch.zeros_like(x)}, STOCHASTIC[name])
      for name in STOCHASTIC),
]  # fmt: skip


def types_of_posterior(x, sigma):
    class Posterior:
        mean, variance, x_start = 0.9 * x, torch.full_like(x, 0.01), MIXTURE(x, sigma)

    return Posterior


@pytest.mark.parametrize(("name", "changed", "base"), OWN)
def test_every_own_argument_changes_the_result(name, changed, base):
    x = MIXTURE.sample(4, SIGMAS[0])
    results = []
    for own in (base, {**base, **changed}):
        torch.manual_seed(0)
        results.append(SOLVERS[name](MIXTURE, x, SIGMAS, **own))
    assert not torch.isclose(*results, rtol=1e-7, atol=1e-7).any()


def test_every_own_argument_is_in_the_test_above():
    common = set(inspect.signature(SOLVERS["euler"]).parameters)
    own = {
        (name, argument)
        for name, solver in SOLVERS.items()
        for argument in set(inspect.signature(solver).parameters) - common
    }
    assert own == {(name, argument) for name, changed, _ in OWN for argument in changed}


@pytest.mark.parametrize("name", SOLVERS)
def test_signature_is_the_one_of_all_solvers(name):
    assert SOLVERS[name] is getattr(solvers, f"sample_{name}")
    parameters = list(inspect.signature(SOLVERS[name]).parameters.values())
    assert [p.name for p in parameters][:5] == ["denoise", "x", "sigmas", "generator", "callback"]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in parameters[3:])


# -- samples at levels of their own: ode -----------------------------------------------------------


def test_ode_keeps_each_sample_in_its_place():
    """A denoiser's answer may depend on the place in the batch, by labels for example."""
    x = MIXTURE.sample(3, 10.0)
    shifts = torch.tensor([0.0, 0.5, -1.0], dtype=torch.float64).view(-1, 1, 1, 1)

    def shifted(x, sigma):
        return MIXTURE(x, sigma) + shifts

    together = run("ode", x, denoise=shifted, tolerance=1e-7)
    close = solvers.sample_unipc(shifted, x, [*log_uniform(10.0, 0.1, 200).tolist(), 0.0])
    torch.testing.assert_close(together, close, rtol=1e-4, atol=1e-4)


def test_ode_without_scipy_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.integrate", None)
    with pytest.raises(UserError, match=r"pip install 'improved-diffusion\[ode\]'"):
        run("ode")


@pytest.mark.parametrize("broken_from", [10.0, 1.0])
def test_ode_ends_where_the_denoiser_fails(broken_from):
    """scipy alone would go on for ever."""

    def broken(x, sigma):
        answer = MIXTURE(x, sigma)
        answer[1][sigma[1] <= broken_from] = math.nan
        return answer

    with pytest.raises(UserError, match=r"solver 'ode', sample 1 of the batch: .* not finite"):
        run("ode", denoise=broken)


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([], "2 noise levels or more, not 0"),
        ([1.0], "2 noise levels or more, not 1"),
        ([1.0, 2.0], "level 1 is 2.0 after 1.0"),
        ([2.0, 1.0, 1.0], "level 2 is 1.0 after 1.0"),
        ([1.0, 0.0, 0.0], "level 2 is 0.0 after 0.0"),
        ([1.0, -0.5], "level 1 is -0.5"),
        ([math.inf, 1.0], "level 0 is inf"),
        ([1.0, math.nan], "level 1 is nan"),
    ],
)
@pytest.mark.parametrize("name", SOLVERS)
def test_levels_that_do_not_fall_are_refused(name, sigmas, message):
    with pytest.raises(UserError, match=message):
        SOLVERS[name](MIXTURE, torch.zeros(1, *SHAPE), sigmas)


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("heun", {"s_churn": -1.0}),
        ("heun", {"s_churn": math.nan}),
        ("heun", {"s_tmin": -1.0}),
        ("heun", {"s_tmin": 2.0, "s_tmax": 1.0}),
        ("heun", {"s_noise": -1.0}),
        ("unipc", {"order": 0}),
        ("unipc", {"order": 4}),
        ("sde", {"stochasticity": -0.1}),
        ("sde", {"stochasticity": 1.1}),
        ("ode", {"tolerance": 0.0}),
        ("ode", {"tolerance": math.nan}),
    ],
)
def test_own_arguments_out_of_range_are_refused(name, own):
    argument, value = next(iter(own.items()))
    with pytest.raises(UserError, match=f"^{argument} is {value}: it must be "):
        SOLVERS[name](MIXTURE, torch.zeros(1, *SHAPE), SIGMAS, **own)


def test_solver_by_name():
    assert {name: get_solver(name) for name in SOLVERS} == SOLVERS
    with pytest.raises(UserError, match=r"unknown solver 'dpm'; .*euler, heun, dpmpp_2m, .*ode"):
        get_solver("dpm")
