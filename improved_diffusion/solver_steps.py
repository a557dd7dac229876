"""What the solvers share: types, checks, noise, and the steps that several of them take.

In the variance-exploding scaling x = x_start + sigma noise. DDIM: arXiv 2010.02502. DDPM:
2006.11239.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .errors import UserError
from .rng import Generator, randn_like

Denoise = Callable[[Tensor, float], Tensor]
NoiseSampler = Callable[[Tensor, float, float], Tensor]
Sigmas = Tensor | np.ndarray | Sequence[float]


class Callback(Protocol):
    """Called after each step with what it did; it must not change the tensors.

    ``i`` is the number of the step from 0, ``x`` [N, C, ...] what the step returns, ``x_start``
    the estimate of the data that it began with, and ``sigma`` the level that it began at.
    """

    def __call__(self, i: int, *, x: Tensor, x_start: Tensor, sigma: float) -> Any: ...


class Posterior(Protocol):
    """p(x_next | x): see :class:`.denoiser.Posterior`."""

    @property
    def mean(self) -> Tensor: ...
    @property
    def variance(self) -> Tensor: ...
    @property
    def x_start(self) -> Tensor: ...


PosteriorOf = Callable[[Tensor, float, float], Posterior]


def check_levels(sigmas: Sigmas) -> list[float]:
    """The levels as numbers, checked.

    :raises ValueError: unless they are two or more, finite, falling, and at least 0.
    """
    if isinstance(sigmas, Tensor):
        sigmas = sigmas.detach().cpu().double().numpy()  # once: the loops never wait for a device
    levels = [float(sigma) for sigma in sigmas]
    if len(levels) < 2:
        raise UserError(f"a solver needs 2 noise levels or more, not {len(levels)}")
    for i, sigma in enumerate(levels):
        if not 0 <= sigma < math.inf:
            raise UserError(f"noise level {i} is {sigma}: it must be finite and not negative")
        if i and not sigma < levels[i - 1]:
            raise UserError(
                f"noise levels must fall, but level {i} is {sigma} after {levels[i - 1]}"
            )
    return levels


def check(condition: bool, name: str, value: object, expected: str) -> None:
    """Refuse a solver's own argument unless a condition holds.

    :raises ValueError: naming it, its value, and what is expected.
    """
    if not condition:
        raise UserError(f"{name} is {value}: it must be {expected}")


def ignore(i: int, *, x: Tensor, x_start: Tensor, sigma: float) -> None:
    """The callback of those who give none."""


def normal_noise(generator: Generator) -> NoiseSampler:
    """Noise drawn from ``generator``, as :func:`.randn_like` does."""
    return lambda x, sigma, sigma_next: randn_like(x, generator)


def ddim_step(x: Tensor, x_start: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """The first-order update, exact if x_start does not change on the way: DDIM eq. 13."""
    return torch.lerp(x_start, x, sigma_next / sigma)


def posterior_weights(sigma: float, sigma_next: float) -> tuple[float, float]:
    """The weight of x in the mean of q(x_next | x, x_start), and its variance: DDPM eq. 7.

    With alpha_bar = 1 / (1 + sigma^2) and x_t = sqrt(alpha_bar) x, mean = r x + (1 - r) x_start
    where r = (sigma_next / sigma)^2, and beta-tilde / alpha_bar_next = sigma_next^2 (1 - r).
    """
    ratio = (sigma_next / sigma) ** 2
    return ratio, ratio * (sigma - sigma_next) * (sigma + sigma_next)
