"""Divergences and likelihoods of Gaussians, in nats.

DDPM: arXiv 2006.11239.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def mean_flat(tensor: Tensor) -> Tensor:
    """Mean over all dimensions but the first: [N, ...] to [N]."""
    return tensor.mean(dim=list(range(1, tensor.ndim)))


def normal_kl(
    mean1: Tensor | float,
    logvar1: Tensor | float,
    mean2: Tensor | float,
    logvar2: Tensor | float,
) -> Tensor:
    """KL(N(mean1, exp(logvar1)) || N(mean2, exp(logvar2))), elementwise, in nats.

    The arguments broadcast against each other; at least one is a tensor.

    :return: a tensor of the broadcast shape.
    :raises TypeError: when no argument is a tensor.
    """
    given = (mean1, logvar1, mean2, logvar2)
    like = next((value for value in given if isinstance(value, Tensor)), None)
    if like is None:
        raise TypeError("normal_kl needs at least one tensor among its arguments")
    logvar1, logvar2 = (
        value if isinstance(value, Tensor) else torch.tensor(value).to(like)
        for value in (logvar1, logvar2)
    )
    difference = logvar1 - logvar2
    return 0.5 * (torch.expm1(difference) - difference + (mean1 - mean2) ** 2 * (-logvar2).exp())


def approx_standard_normal_cdf(x: Tensor) -> Tensor:
    """The standard normal's cumulative distribution by the tanh approximation of GELU
    (arXiv 1606.08415, section 2); off by at most 3e-4. Elementwise."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x: Tensor, *, means: Tensor, log_scales: Tensor) -> Tensor:
    """Log-likelihood of 8-bit levels under a Gaussian integrated over each level's bin.

    DDPM eq. 13: the bins are 2 / 255 wide; the outermost reach to infinity.

    :param x: [N, ...] images whose 256 levels are rescaled to [-1, 1].
    :param means: [N, ...] means.
    :param log_scales: [N, ...] logarithms of the standard deviations.
    :return: [N, ...] log-probabilities in nats, never below log(1e-12).
    """
    assert x.shape == means.shape == log_scales.shape
    half_bin = 1 / 255
    inverse_scale = torch.exp(-log_scales)
    cdf_above = approx_standard_normal_cdf((x - means + half_bin) * inverse_scale)
    cdf_below = approx_standard_normal_cdf((x - means - half_bin) * inverse_scale)
    probability = torch.where(
        x < -0.999,
        cdf_above,
        torch.where(x > 0.999, 1 - cdf_below, cdf_above - cdf_below),
    )
    return probability.clamp(min=1e-12).log()
