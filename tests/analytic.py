"""Data whose best denoiser is known exactly: mixtures of round Gaussians, in float64.

With x_start from sum_k w_k N(mu_k, s_k^2 I), x = x_start + sigma noise is from the same mixture
with variances s_k^2 + sigma^2, and

    D(x, sigma) = E[x_start | x] = sum_k p_k(x) (mu_k + s_k^2 / (s_k^2 + sigma^2) (x - mu_k)),

where p_k(x) is the probability of component k given x. One component is Gaussian data.
"""

import math

import numpy as np
import torch

from improved_diffusion.gaussian_diffusion import ModelMeanType, ModelVarType
from improved_diffusion.noise_levels import NoiseLevels
from improved_diffusion.predictions import coefficients, path_scale
from improved_diffusion.respace import SpacedDiffusion


class Mixture:
    """A mixture of K round Gaussians over tensors of one shape.

    It may be called as D(x, sigma).

    :param weights: [K], which add up to 1.
    :param means: [K, C, ...].
    :param stds: [K].
    """

    def __init__(self, weights, means, stds):
        self.weights = torch.as_tensor(weights, dtype=torch.float64)
        means = torch.as_tensor(means, dtype=torch.float64)
        self.shape = means.shape[1:]
        self.means = means.flatten(1)  # [K, d]
        self.stds = torch.as_tensor(stds, dtype=torch.float64)
        assert self.weights.sum().item() == 1

    def _log_parts(self, x, sigma):
        """log w_k N(x; mu_k, s_k^2 + sigma^2) [N, K], from x [N, d] and sigma [N] or [1]."""
        variance = self.stds**2 + sigma[:, None] ** 2  # [N, K]
        distance = (x[:, None] - self.means).square().sum(dim=2)  # [N, K]
        log_norm = x.shape[1] / 2 * torch.log(2 * math.pi * variance)
        return self.weights.log() - distance / (2 * variance) - log_norm

    def log_density(self, x, sigma=0.0):
        """log p_sigma(x) [N], of x [N, C, ...]; sigma is a number or [N]."""
        sigma = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1)
        return self._log_parts(x.double().flatten(1), sigma).logsumexp(dim=1)

    def __call__(self, x, sigma):
        """D(x, sigma) [N, C, ...], in the type of x; sigma is a number or [N]."""
        flat = x.double().flatten(1)
        sigma = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1)
        share = self._log_parts(flat, sigma).softmax(dim=1)  # [N, K]
        gain = self.stds**2 / (self.stds**2 + sigma[:, None] ** 2)  # [N, K]
        # sum_k share_k ((1 - gain_k) mu_k + gain_k x), without [N, K, d]
        denoised = (share * (1 - gain)) @ self.means + (share * gain).sum(dim=1)[:, None] * flat
        return denoised.view(x.shape).to(x.dtype)

    def score(self, x, sigma):
        """The gradient of log p_sigma at x, [N, C, ...]."""
        return (self(x, sigma) - x) / sigma**2

    def mean(self):
        """E[x_start], [d]."""
        return self.weights @ self.means

    def covariance(self, sigma=0.0):
        """Of x at a noise level, [d, d]."""
        centred = self.means - self.mean()
        between = (self.weights[:, None] * centred).T @ centred
        within = self.weights @ self.stds**2 + sigma**2
        return between + within * torch.eye(len(between), dtype=torch.float64)

    def cdf(self, values, coordinate, sigma=0.0):
        """The distribution function of one coordinate of x at a noise level."""
        z = (values[:, None] - self.means[:, coordinate]) / torch.sqrt(self.stds**2 + sigma**2)
        return torch.special.ndtr(z) @ self.weights

    def nearest(self, x):
        """The component whose mean is nearest, [N]."""
        return torch.cdist(x.double().flatten(1), self.means).argmin(dim=1)

    def sample(self, count, sigma=0.0, seed=0):
        """Draws of x at a noise level, float64 [count, C, ...]."""
        generator = torch.Generator().manual_seed(seed)
        component = torch.multinomial(self.weights, count, True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator, dtype=torch.float64)
        scale = torch.sqrt(self.stds[component] ** 2 + sigma**2)[:, None]
        return (self.means[component] + scale * noise).view(count, *self.shape)


def gaussian(mean, std):
    """The data N(mean, std^2 I); ``mean`` is [C, ...]."""
    return Mixture([1.0], torch.as_tensor(mean, dtype=torch.float64)[None], [std])


def as_network(diffusion, data):
    """The best network for the data: model(x_t, t, **kwargs), for any mean and variance type.

    As to a real network, ``t`` is a timestep of the process that it was trained for, scaled if
    that process rescales timesteps, and may lie between timesteps: log-SNR is then linear in t. A
    learned variance is the exact one of Gaussian data, for the steps that this process takes.
    """
    levels = NoiseLevels(diffusion)
    kept = range(diffusion.num_timesteps)
    if isinstance(diffusion, SpacedDiffusion):
        kept = diffusion.timestep_map
    kind, variance_kind = diffusion.model_mean_type, diffusion.model_var_type

    def network(x, t, **kwargs):
        t = t.double().cpu()
        if diffusion.rescale_timesteps:
            t = t * (levels.num_timesteps / 1000)
        shape = (-1, *[1] * (x.ndim - 1))
        log_snr = torch.from_numpy(levels.log_snr_of_t(t.numpy()))
        alpha_bar = torch.sigmoid(log_snr).view(shape)
        x_t = x.double()
        if kind == ModelMeanType.FLOW:  # the network sees the linear path
            x_t = x_t / torch.from_numpy(path_scale(alpha_bar.numpy()))
        x_start = data(x_t / alpha_bar.sqrt(), torch.exp(-log_snr / 2))
        if kind == ModelMeanType.PREVIOUS_X:
            i = torch.tensor([kept.index(round(step)) for step in t.tolist()])
            prediction = _previous(diffusion, x_start, x_t, i)
        else:
            eps = (x_t - alpha_bar.sqrt() * x_start) / (1 - alpha_bar).sqrt()
            p, q = (torch.from_numpy(c) for c in coefficients(kind, alpha_bar.numpy()))
            prediction = p * x_start + q * eps
        if variance_kind in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE):
            nearest = (t[:, None] - torch.tensor(list(kept))).abs().argmin(dim=1)
            values = _variance_values(diffusion, data)[nearest].view(shape).expand_as(prediction)
            prediction = torch.cat([prediction, values], dim=1)
        return prediction.to(x.dtype)

    return network


def _previous(diffusion, x_start, x_t, i):
    """The mean of q(x_{t-1} | x_t, x_start), DDPM eq. 7, at the steps i [N]."""
    shape = (-1, *[1] * (x_t.ndim - 1))
    first, second = (
        torch.from_numpy(table.copy())[i].view(shape)
        for table in (diffusion.posterior_mean_coef1, diffusion.posterior_mean_coef2)
    )
    return first * x_start + second * x_t


def _variance_values(diffusion, data):
    """What a network says for the exact variance of p(x_{t-1} | x_t) of Gaussian data, [T].

    With V_t = alpha_bar_t s^2 + 1 - alpha_bar_t, it is beta V_{t-1} / V_t.
    """
    assert len(data.weights) == 1, "the variance is one number for Gaussian data only"
    s, beta = data.stds.item(), diffusion.betas
    now, before = (
        a * s**2 + 1 - a for a in (diffusion.alphas_cumprod, diffusion.alphas_cumprod_prev)
    )
    values = np.log(beta * before / now)
    if diffusion.model_var_type == ModelVarType.LEARNED_RANGE:  # from log beta-tilde ... log beta
        low, high = diffusion.posterior_log_variance_clipped, np.log(beta)
        span = np.where(high > low, high - low, 1.0)
        values = 2 * (values - low) / span - 1
    return torch.from_numpy(values)
