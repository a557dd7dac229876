"""Solvers that remember earlier estimates: DPM-Solver++ and UniPC, one evaluation a step.

In lambda = -log sigma the probability-flow ODE is dx/dlambda = D - x. Its linear part is solved
exactly and D(lambda) is a polynomial through the last estimates: DPM-Solver++ proposition 4.1,
with alpha = 1. h is a step in lambda, e^-h = sigma_next / sigma.

DPM-Solver++: arXiv 2211.01095. UniPC: arXiv 2302.04867.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from .rng import Generator
from .solver_steps import (
    Callback,
    Denoise,
    NoiseSampler,
    Sigmas,
    check,
    check_levels,
    ddim_step,
    ignore,
    normal_noise,
    posterior_weights,
)

Node = tuple[float, Tensor]  # a level and the estimate of x_start that was made there


@torch.no_grad()
def sample_dpmpp_2m(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sigmas,
    *,
    generator: Generator = None,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++(2M), second order from one evaluation a step: DPM-Solver++ Algorithm 2.

    The arguments are those of :func:`.sample_euler`.
    """
    report = callback or ignore
    previous: Node | None = None
    for i, (sigma, sigma_next) in enumerate(pairwise(check_levels(sigmas))):
        x_start = denoise(x, sigma).to(x)
        x = ddim_step(
            x, _second_order(x_start, previous, sigma, sigma_next), sigma, sigma_next
        )  # DPM-Solver++ Alg. 2: e^-h = sigma_next / sigma
        previous = (sigma, x_start)
        report(i, x=x, x_start=x_start, sigma=sigma)
    return x


@torch.no_grad()
def sample_dpmpp_3m(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sigmas,
    *,
    generator: Generator = None,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++(3M), third order from one evaluation a step.

    The Taylor expansion of D in lambda (DPM-Solver++ section 4) with its derivatives taken from
    the last three estimates. The first step, of first order, and the second have no such memory:
    at large sigma, where sampling begins, D hardly changes and nothing is lost; from a level where
    it does change, the first step limits the order to 2.

    The arguments are those of :func:`.sample_euler`.
    """
    report = callback or ignore
    nodes: list[Node] = []  # the newest first
    for i, (sigma, sigma_next) in enumerate(pairwise(check_levels(sigmas))):
        x_start = denoise(x, sigma).to(x)
        nodes = [(sigma, x_start), *nodes[:2]]
        if len(nodes) < 3 or sigma_next == 0:
            previous = nodes[1] if len(nodes) > 1 else None
            estimate = _second_order(x_start, previous, sigma, sigma_next)
            x = ddim_step(x, estimate, sigma, sigma_next)
        else:
            slope, curvature = _derivatives(nodes)
            _, psi_1, psi_2 = _psi(math.log(sigma / sigma_next), 2)
            x = ddim_step(x, x_start, sigma, sigma_next) + psi_1 * slope + psi_2 * curvature
        report(i, x=x, x_start=x_start, sigma=sigma)
    return x


@torch.no_grad()
def sample_unipc(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sigmas,
    *,
    generator: Generator = None,
    callback: Callback | None = None,
    order: int = 2,
) -> Tensor:
    """UniPC, multistep, for data prediction, with the second B(h): UniPC Algorithms 1 and 2.

    Each estimate serves to correct the step that led to it and, not made anew, to predict the
    next ones. So the order is one above the predictor's, at one evaluation a step. The last step
    is not corrected. The first step's order is 2: with ``order`` 3 it limits the whole to 3 if D
    changes there (see :func:`sample_dpmpp_3m`).

    The other arguments are those of :func:`.sample_euler`.

    :param order: of the predictor, 1, 2 or 3; the first steps have as much as their memory allows.
    """
    check(order in (1, 2, 3), "order", order, "1, 2 or 3")
    levels, report = check_levels(sigmas), callback or ignore
    nodes = [(levels[0], denoise(x, levels[0]).to(x))]  # the newest first
    for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
        x_start = nodes[0][1]
        predicted = _unified_step(x, nodes, sigma_next)  # UniP
        if i == len(levels) - 2:
            x = predicted
        else:
            new = (sigma_next, denoise(predicted, sigma_next).to(x))
            x = _unified_step(x, [*nodes, new], sigma_next)  # UniC
            nodes = [new, *nodes[: order - 1]]
        report(i, x=x, x_start=x_start, sigma=sigma)
    return x


@torch.no_grad()
def sample_dpmpp_2m_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sigmas,
    *,
    generator: Generator = None,
    callback: Callback | None = None,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """SDE-DPM-Solver++(2M), on the reverse SDE: :func:`.sample_sde`'s of stochasticity 1.

    The other arguments are those of :func:`.sample_euler`.

    :param noise_sampler: (x, sigma, sigma_next) -> standard normal noise like x; in place of
        ``generator``. The noise is the Brownian motion with the clock 1 / sigma^2.
    """
    draw, report = noise_sampler or normal_noise(generator), callback or ignore
    previous: Node | None = None
    for i, (sigma, sigma_next) in enumerate(pairwise(check_levels(sigmas))):
        x_start = denoise(x, sigma).to(x)
        estimate = _second_order(x_start, previous, sigma, sigma_next)
        ratio, variance = posterior_weights(sigma, sigma_next)  # e^-2h and sigma^2 (1 - e^-2h)
        x = ratio * x + (1 - ratio) * estimate
        if variance > 0:
            x = x + math.sqrt(variance) * draw(x, sigma, sigma_next)
        previous = (sigma, x_start)
        report(i, x=x, x_start=x_start, sigma=sigma)
    return x


# -- polynomials in lambda ------------------------------------------------------------------------


def _second_order(
    x_start: Tensor, previous: Node | None, sigma: float, sigma_next: float
) -> Tensor:
    """The estimate of the middle of a step by extrapolation: D_i of DPM-Solver++ Algorithm 2."""
    if previous is None or sigma_next == 0:
        return x_start
    sigma_previous, x_start_previous = previous
    r = math.log(sigma_previous / sigma) / math.log(sigma / sigma_next)  # h_{i-1} / h_i
    return torch.lerp(x_start_previous, x_start, 1 + 1 / (2 * r))


def _derivatives(nodes: Sequence[Node]) -> tuple[Tensor, Tensor]:
    """D' and D'' in lambda at the newest of three estimates, of the parabola through them."""
    (sigma_0, d_0), (sigma_1, d_1), (sigma_2, d_2) = nodes
    h_1, h_2 = math.log(sigma_1 / sigma_0), math.log(sigma_2 / sigma_1)
    slope_1, slope_2 = (d_0 - d_1) / h_1, (d_1 - d_2) / h_2  # divided differences
    half_curvature = (slope_1 - slope_2) / (h_1 + h_2)
    return slope_1 + h_1 * half_curvature, 2 * half_curvature


def _psi(h: float, count: int) -> list[float]:
    """psi_k = integral of e^(u - h) u^k / k! over u = 0 ... h, for k = 0 ... count.

    It is what D^(k), the k-th derivative in lambda, contributes to a step: the Taylor expansion
    in DPM-Solver++ section 4.
    """
    psi = [-math.expm1(-h)]
    for k in range(1, count + 1):
        psi.append(h**k / math.factorial(k) - psi[-1])  # by parts
    return psi


def _unified_step(x: Tensor, nodes: Sequence[Node], sigma_next: float) -> Tensor:
    """A step that uses estimates at any levels: UniPC eq. 3, for data prediction.

    :param nodes: the first is at the level of ``x``. For the predictor the others are earlier ones;
        for the corrector the last is at ``sigma_next``.
    """
    (sigma, x_start), *others = nodes
    x_next = ddim_step(x, x_start, sigma, sigma_next)
    if sigma_next == 0:
        return x_next
    h = math.log(sigma / sigma_next)
    r = [math.log(sigma / level) / h for level, _ in others]  # (lambda_m - lambda) / h
    for r_m, a_m, (_, estimate) in zip(r, _unified_weights(r, h), others, strict=True):
        # B(h) = 1 - e^-h for data prediction
        x_next = x_next - math.expm1(-h) * a_m / r_m * (estimate - x_start)
    return x_next


def _unified_weights(r: Sequence[float], h: float) -> list[float]:
    """a_1 ... a_p with which UniPC eq. 3 is exact for D of degree p in lambda: UniPC theorem 3.1.

    sum_m a_m r_m^(k-1) = k! psi_k / (h^k psi_0) for k = 1 ... p.
    """
    if len(r) <= 1:
        return [0.5] * len(r)  # UniPC's choice for p = 1, with which UniP-2 is 2M
    psi = _psi(h, len(r))
    degrees = range(1, len(r) + 1)
    matrix = np.array([[r_m ** (k - 1) for r_m in r] for k in degrees])
    wanted = np.array([math.factorial(k) * psi[k] / (h**k * psi[0]) for k in degrees])
    return np.linalg.solve(matrix, wanted).tolist()
