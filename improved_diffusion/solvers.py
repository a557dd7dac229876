"""Few-step samplers on x = x_start + sigma noise, all with one signature.

Each walks down the noise levels ``sigmas`` with a denoiser D(x, sigma), the estimate of x_start,
and solves the probability-flow ODE dx/dsigma = (x - D) / sigma (EDM eqs. 1, 3) or a stochastic
equation with the same marginals. In lambda = -log sigma, half the log-SNR, the ODE is
dx/dlambda = D - x, whose linear part the DPM solvers and UniPC solve exactly.

DDIM: arXiv 2010.02502. Score SDE: 2011.13456. EDM: 2206.00364. DPM-Solver++: 2211.01095.
UniPC: 2302.04867. DDPM: 2006.11239.

================ ============================= =================================================
name             evaluations in S steps        order of convergence
================ ============================= =================================================
euler            S                             1
heun             2 S, one less if it ends at 0 2; with churn weak 2
dpmpp_2m         S                             2
dpmpp_3m         S                             3, less where D changes in the first step
dpmpp_2m_sde     S                             weak 2, strong 1
unipc            S                             order + 1; of 4, less where D changes at the start
sde              S                             weak 1, strong 1
ancestral        S                             weak 1, strong 1
ode              as its hardest sample needs   error of about a tolerance
ddim_inversion   S                             1, between levels above 0
================ ============================= =================================================

The order p says that the error falls as h^p where the steps in lambda are all about h and the last
level is above 0. A deterministic solver's error is that of x; a stochastic solver's weak error
that of the samples' distribution, and its strong error that of x for the same Brownian motion.
The step to sigma = 0, an infinite one in lambda, returns the first-order update: D.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from .errors import UserError
from .ode import Unsolved, solve_each
from .rng import Generator
from .solver_steps import (
    Callback,
    Denoise,
    NoiseSampler,
    PosteriorOf,
    Sigmas,
    check,
    check_levels,
    ddim_step,
    ignore,
    normal_noise,
    posterior_weights,
)
from .solvers_multistep import sample_dpmpp_2m, sample_dpmpp_2m_sde, sample_dpmpp_3m, sample_unipc

__all__ = [
    "SOLVERS",
    "get_solver",
    "sample_ancestral",
    "sample_ddim_inversion",
    "sample_dpmpp_2m",
    "sample_dpmpp_2m_sde",
    "sample_dpmpp_3m",
    "sample_euler",
    "sample_heun",
    "sample_ode",
    "sample_sde",
    "sample_unipc",
]

FAR = 100.0  # a step down by a larger factor is too far for Heun's trapezoid

# -- deterministic --------------------------------------------------------------------------------


@torch.no_grad()
def sample_euler(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sigmas,
    *,
    generator: Generator = None,
    callback: Callback | None = None,
) -> Tensor:
    """Euler's method on the probability-flow ODE, which is DDIM at eta 0: DDIM eq. 13.

    All solvers share these arguments and errors:

    :param denoise: D(x, sigma), the estimate of x_start, [N, C, ...] -> [N, C, ...]; sigma > 0.
    :param x: [N, C, ...] noise of standard deviation sigmas[0], or data with such noise.
    :param sigmas: [S + 1] falling noise levels; the last one, as a rule 0, is that of the result.
    :param generator: a torch.Generator, or one per sample; None for torch's global one. The
        deterministic solvers draw nothing.
    :param callback: see :class:`.Callback`.
    :return: [N, C, ...] samples, of the type of ``x``.
    :raises ValueError: unless the levels are two or more, finite, falling, and at least 0.
    """
    report = callback or ignore
    for i, (sigma, sigma_next) in enumerate(pairwise(check_levels(sigmas))):
        x_start = denoise(x, sigma).to(x)
        x = ddim_step(x, x_start, sigma, sigma_next)
        report(i, x=x, x_start=x_start, sigma=sigma)
    return x


@torch.no_grad()
def sample_heun(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sigmas,
    *,
    generator: Generator = None,
    callback: Callback | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Heun's second-order method with churn: EDM Algorithm 2; without churn its Algorithm 1.

    Churn adds noise before each step, up to the level sigma_hat = (1 + gamma) sigma, and so mends
    errors of earlier steps. The first step's sigma_hat lies above sigmas[0]: leave it out by
    ``s_tmax`` if D knows no such level.

    Differs from the paper: a step to less than a hundredth of sigma, such as one from a level that
    stands for no signal, is Euler's. There the trapezoid would multiply the change of D by half
    the ratio of the levels, where it should count once at most.

    The other arguments are those of :func:`sample_euler`.

    :param s_churn: S gamma, at least 0; gamma is at most sqrt(2) - 1.
    :param s_tmin: least level that is churned.
    :param s_tmax: largest level that is churned.
    :param s_noise: standard deviation of the noise added.
    :param noise_sampler: (x, sigma_hat, sigma) -> standard normal noise like x; in place of
        ``generator``.
    """
    check(0 <= s_churn < math.inf, "s_churn", s_churn, "at least 0")
    check(0 <= s_tmin <= s_tmax, "s_tmin", s_tmin, f"in 0 ... s_tmax, {s_tmax}")
    check(0 <= s_noise < math.inf, "s_noise", s_noise, "at least 0")
    levels, report = check_levels(sigmas), callback or ignore
    draw = noise_sampler or normal_noise(generator)
    most = min(s_churn / (len(levels) - 1), math.sqrt(2) - 1)
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        gamma = most if s_tmin <= sigma <= s_tmax else 0.0
        sigma_hat = sigma + gamma * sigma
        if gamma > 0:
            added = sigma * math.sqrt(gamma * (2 + gamma))  # sqrt(sigma_hat^2 - sigma^2)
            x = x + added * s_noise * draw(x, sigma_hat, sigma)
        x_start = denoise(x, sigma_hat).to(x)
        x_next = ddim_step(x, x_start, sigma_hat, sigma_next)  # Euler
        if sigma_next * FAR > sigma_hat:
            d = (x - x_start) / sigma_hat  # dx/dsigma, EDM eqs. 1 and 3
            d_next = (x_next - denoise(x_next, sigma_next).to(x)) / sigma_next
            x_next = x + (sigma_next - sigma_hat) * (d + d_next) / 2  # trapezoid
        x = x_next
        report(i, x=x, x_start=x_start, sigma=sigma)
    return x


@torch.no_grad()
def sample_ode(
    denoise: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    sigmas: Sigmas,
    *,
    generator: Generator = None,
    callback: Callback | None = None,
    tolerance: float = 1e-4,
) -> Tensor:
    """The probability-flow ODE by scipy's adaptive Runge-Kutta method of order 5(4).

    Goes from the largest level to the smallest above 0 in steps of its own, and from there to 0, if
    that is the last, by D; the levels between do not matter. The steps of each sample are its own:
    what the batch changes, by rounding in D, stays within the tolerance. It is integrated in
    float64.

    The other arguments are those of :func:`sample_euler`; the callback is called once, at the end,
    with i = 0, the smallest level above 0 and D there.

    :param denoise: as for the others, but the samples are at levels of their own: sigma is a
        tensor [N], float64 on the CPU.
    :param tolerance: of a step's estimated error: root mean square over a sample's values, each
        relative to 1 + |x|.
    :raises ValueError: also if scipy is missing, D is not finite, or a step fails.
    """
    check(1e-9 <= tolerance < 1, "tolerance", tolerance, "in [1e-9, 1)")
    levels = check_levels(sigmas)
    smallest = levels[-1] if levels[-1] > 0 else levels[-2]
    # the samples that have come to their end keep their places: D may depend on the place
    states, now = _as_rows(x).copy(), np.full(len(x), levels[0])

    def slopes(lambdas: np.ndarray, asked: np.ndarray, rows: list[int]) -> np.ndarray:
        states[rows], now[rows] = asked, np.exp(-lambdas)
        level = torch.from_numpy(now.clip(smallest, levels[0]))  # not beyond by rounding
        return (_as_rows(denoise(_like(x, states), level)) - states)[rows]  # dx/dlambda = D - x

    span = -math.log(levels[0]), -math.log(smallest)
    try:
        states = solve_each(slopes, states.copy(), span, tolerance).states
    except Unsolved as error:
        raise UserError(f"solver 'ode', sample {error.sample} of the batch: {error}") from None
    x = _like(x, states)
    x_start = denoise(x, torch.full((len(x),), smallest, dtype=torch.float64)).to(x)
    x = x if levels[-1] > 0 else x_start
    (callback or ignore)(0, x=x, x_start=x_start, sigma=smallest)
    return x


def _as_rows(x: Tensor) -> np.ndarray:
    """[N, C, ...] as float64 [N, K]."""
    return x.flatten(1).cpu().double().numpy()


def _like(x: Tensor, rows: np.ndarray) -> Tensor:
    """float64 [N, K] in the shape, type and place of ``x``."""
    return torch.tensor(rows, dtype=x.dtype, device=x.device).view(x.shape)  # a copy


@torch.no_grad()
def sample_ddim_inversion(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sigmas,
    *,
    generator: Generator = None,
    callback: Callback | None = None,
) -> Tensor:
    """From data to the noise that Euler's method turns into it: DDIM section 4.3.

    Euler's method up the levels. At sigma = 0, where D is undefined, the direction is that at the
    smallest level above 0.

    The other arguments are those of :func:`sample_euler`.

    :param x: [N, C, ...] at the last level: data, if that is 0.
    :param sigmas: [S + 1] falling levels, as for sampling; the last is where this begins.
    :return: [N, C, ...] of standard deviation about sigmas[0].
    """
    levels, report = check_levels(sigmas), callback or ignore
    smallest = levels[-1] if levels[-1] > 0 else levels[-2]
    for i, (sigma, sigma_next) in enumerate(pairwise(reversed(levels))):
        x_start = denoise(x, max(sigma, smallest)).to(x)
        d = (x - x_start) / max(sigma, smallest)  # dx/dsigma, EDM eqs. 1 and 3
        x = x + (sigma_next - sigma) * d  # DDIM eq. 13, backwards
        report(i, x=x, x_start=x_start, sigma=sigma)
    return x


# -- stochastic -----------------------------------------------------------------------------------


@torch.no_grad()
def sample_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sigmas,
    *,
    generator: Generator = None,
    callback: Callback | None = None,
    stochasticity: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Euler-Maruyama on dx = (1 + s^2) (x - D) / sigma dsigma + s sqrt(2 sigma) dw, sigma falling.

    EDM eq. 6 with beta(t) = s^2 / t, where s is the stochasticity. All s have the same marginals:
    s = 0 is the probability-flow ODE, and this is Euler's method; s = 1 is the reverse of adding
    noise, the variance-exploding SDE of 2011.13456 eqs. 6 and 9.

    Differs from Euler-Maruyama where its step would lead x beyond D, for s = 1 to less than half of
    sigma, as the step to 0 does: there the step is the exact solution for a D that stays the same.

    The other arguments are those of :func:`sample_euler`.

    :param stochasticity: 0 ... 1.
    :param noise_sampler: (x, sigma, sigma_next) -> standard normal noise like x; in place of
        ``generator``. The noise is the Brownian motion with the clock -sigma^2.
    """
    check(0 <= stochasticity <= 1, "stochasticity", stochasticity, "in 0 ... 1")
    draw, report = noise_sampler or normal_noise(generator), callback or ignore
    squared = stochasticity**2
    for i, (sigma, sigma_next) in enumerate(pairwise(check_levels(sigmas))):
        x_start = denoise(x, sigma).to(x)
        ratio = sigma_next / sigma
        kept = 1 - (1 + squared) * (1 - ratio)  # of x - D, by EDM eq. 6
        # the integral of 2 sigma, rather than 2 sigma |dsigma|: no more work, less error
        variance = squared * (sigma - sigma_next) * (sigma + sigma_next)
        if kept < 0:  # beyond D: the step that is exact while D stays
            kept = ratio ** (1 + squared)
            variance = sigma_next**2 * (1 - ratio ** (2 * squared))
        x = x_start + kept * (x - x_start)
        if stochasticity > 0 and sigma_next > 0:
            x = x + math.sqrt(variance) * draw(x, sigma, sigma_next)
        report(i, x=x, x_start=x_start, sigma=sigma)
    return x


@torch.no_grad()
def sample_ancestral(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sigmas,
    *,
    generator: Generator = None,
    callback: Callback | None = None,
    posterior: PosteriorOf | None = None,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Draw each x from p(x_next | x): DDPM Algorithm 2, in this scaling.

    The other arguments are those of :func:`sample_euler`.

    :param posterior: (x, sigma, sigma_next) -> an object with ``mean``, ``variance`` and
        ``x_start``, such as :meth:`.Denoiser.posterior`, which has a checkpoint's variance; then
        ``denoise`` is not called. None: the posterior q's variance, beta-tilde, DDPM eq. 7.
    :param noise_sampler: (x, sigma, sigma_next) -> standard normal noise like x; in place of
        ``generator``. With beta-tilde, the noise is the Brownian motion with the clock
        1 / sigma^2.
    """
    draw, report = noise_sampler or normal_noise(generator), callback or ignore
    for i, (sigma, sigma_next) in enumerate(pairwise(check_levels(sigmas))):
        scale: float | Tensor
        if posterior is None:
            x_start = denoise(x, sigma).to(x)
            ratio, variance = posterior_weights(sigma, sigma_next)
            mean = ratio * x + (1 - ratio) * x_start  # DDPM eq. 7
            scale = math.sqrt(variance)
        else:
            step = posterior(x, sigma, sigma_next)
            x_start, mean, scale = step.x_start, step.mean.to(x), step.variance.sqrt().to(x)
        x = mean if sigma_next == 0 else mean + scale * draw(x, sigma, sigma_next)
        report(i, x=x, x_start=x_start, sigma=sigma)
    return x


SOLVERS: dict[str, Callable[..., Tensor]] = {
    "euler": sample_euler,
    "heun": sample_heun,
    "dpmpp_2m": sample_dpmpp_2m,
    "dpmpp_3m": sample_dpmpp_3m,
    "dpmpp_2m_sde": sample_dpmpp_2m_sde,
    "unipc": sample_unipc,
    "sde": sample_sde,
    "ancestral": sample_ancestral,
    "ode": sample_ode,
    "ddim_inversion": sample_ddim_inversion,
}


def get_solver(name: str) -> Callable[..., Tensor]:
    """The solver of a name.

    :param name: a key of SOLVERS.
    :raises ValueError: for another name.
    """
    if name not in SOLVERS:
        raise UserError(f"unknown solver '{name}'; choose one of {', '.join(SOLVERS)}")
    return SOLVERS[name]
