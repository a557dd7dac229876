"""A trained model seen as whatever a sampler, a likelihood or an edit wants of it.

All views take x = x_start + sigma noise, the variance-exploding variable of EDM (arXiv 2206.00364),
which is x_t / sqrt(alpha_bar) in DDPM's scaling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import UserError
from .gaussian_diffusion import GaussianDiffusion, Model, ModelVarType
from .noise_levels import NoiseLevels
from .predictions import ModelMeanType, coefficients, path_scale
from .tables import remember

Sigma = float | Tensor

VIEWS = {
    "x_start": ModelMeanType.START_X,
    "eps": ModelMeanType.EPSILON,
    "v": ModelMeanType.V,
    "velocity": ModelMeanType.FLOW,
}


@dataclass(frozen=True)
class Prediction:
    """What one evaluation of the network says.

    ``x_start`` is the estimate of the data, [N, C, ...]; ``values`` are the raw outputs for the
    variance, [N, C, ...], of a model that learned it, else None.
    """

    x_start: Tensor
    values: Tensor | None


@dataclass(frozen=True)
class Posterior:
    """p(x_next | x) in the variance-exploding scaling: mean and variance, [N, C, ...] each."""

    mean: Tensor
    variance: Tensor
    x_start: Tensor


class Denoiser:
    """D(x, sigma), the best estimate of x_start, and all that follows from it.

    The network may be called between its timesteps: t is interpolated in log-SNR, float64. The
    conversions of levels are those of :attr:`levels`.

    :param model: see :class:`.GaussianDiffusion`. Gradients flow; use ``torch.no_grad()``.
    :param diffusion: the process it was trained with, respaced or not.
    :param model_kwargs: keyword arguments of the model, such as class labels ``y`` [N].
    :param clip_denoised: clamp x_start to [-1, 1]; all other views follow.
    :param denoised_fn: applied to x_start before clamping.
    :param discrete: call the network at the nearest timestep, for models that know no other.
    :raises ValueError: for a model of PREVIOUS_X, whose mean belongs to fixed steps; for one of the
        noise where the process ends without signal; for a log-SNR that does not fall.
    """

    def __init__(
        self,
        model: Model,
        diffusion: GaussianDiffusion,
        model_kwargs: dict[str, Any] | None = None,
        *,
        clip_denoised: bool = False,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        discrete: bool = False,
    ) -> None:
        self.model = model
        self.diffusion = diffusion
        self.model_kwargs = model_kwargs or {}
        self.clip_denoised = clip_denoised
        self.denoised_fn = denoised_fn
        self.discrete = discrete
        self.levels = NoiseLevels(diffusion)
        self.evaluations = 0  # calls of the network
        kind = diffusion.model_mean_type
        coefficients(kind, np.ones(1))  # refuses PREVIOUS_X
        if kind == ModelMeanType.EPSILON and self.levels.ends_without_signal:
            raise UserError(
                "a network that predicts eps cannot begin without signal (alpha_bar 0 at the last "
                "step): choose one that predicts xstart, v, flow"
            )

    # -- views --------------------------------------------------------------------------------

    def __call__(self, x: Tensor, sigma: Sigma) -> Tensor:
        """D(x, sigma).

        :param x: [N, C, ...] data plus noise of standard deviation sigma.
        :param sigma: above 0; a number, or [N] of them.
        :return: [N, C, ...] the estimate of x_start.
        """
        return self.predict(x, sigma).x_start

    def x_start(self, x: Tensor, sigma: Sigma) -> Tensor:
        """The estimate of the data, [N, C, ...]: D(x, sigma)."""
        return self(x, sigma)

    def eps(self, x: Tensor, sigma: Sigma) -> Tensor:
        """The estimate of the noise, [N, C, ...]: (x - D) / sigma."""
        return self.view("eps", x, sigma)

    def v(self, x: Tensor, sigma: Sigma) -> Tensor:
        """sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_start, [N, C, ...]: arXiv 2202.00512."""
        return self.view("v", x, sigma)

    def velocity(self, x: Tensor, sigma: Sigma) -> Tensor:
        """eps - x_start, [N, C, ...]: dx_tau/dtau on the linear path (1 - tau) x_start + tau eps,
        at tau = sigma / (1 + sigma) and x_tau = x / (1 + sigma). arXiv 2209.03003."""
        return self.view("velocity", x, sigma)

    def score(self, x: Tensor, sigma: Sigma) -> Tensor:
        """The gradient of log p_sigma at x, [N, C, ...]: (D - x) / sigma^2, EDM eq. 3."""
        return self.view("score", x, sigma)

    def view(self, name: str, x: Tensor, sigma: Sigma) -> Tensor:
        """The model's estimate as one of VIEWS or as the score, [N, C, ...]."""
        return convert(self(x, sigma), x, sigma, "x_start", name)

    def predict(self, x: Tensor, sigma: Sigma) -> Prediction:
        """Evaluate the network once, at the t of sigma."""
        level = _as_array(sigma)
        alpha_bar = 1 / (1 + level**2)
        scale = np.sqrt(alpha_bar)  # to DDPM's x_t
        kind = self.diffusion.model_mean_type
        if kind == ModelMeanType.FLOW:
            scale = scale * path_scale(alpha_bar)
        t = self._timesteps(self.levels.t_of_sigma(level), x)
        output = self.model(_times(scale, x), t, **self.model_kwargs)
        self.evaluations += 1
        values = None
        if self.diffusion.model_var_type in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE):
            output, values = output.chunk(2, dim=1)
        assert output.shape == x.shape
        x_start = convert(output, x, sigma, _NAMES[kind], "x_start")
        if self.denoised_fn is not None:
            x_start = self.denoised_fn(x_start)
        return Prediction(x_start.clamp(-1, 1) if self.clip_denoised else x_start, values)

    def _timesteps(self, t: np.ndarray, x: Tensor) -> Tensor:
        """The timesteps as the network sees them, [N]."""
        nearest = t.round()
        t = nearest if self.discrete else np.where(abs(t - nearest) < 1e-6, nearest, t)
        dtype = torch.float32
        if self.diffusion.rescale_timesteps:
            t = t * (1000.0 / self.levels.num_timesteps)
        elif self.discrete:
            dtype = torch.int64
        if len(t) > 1:
            seen = torch.from_numpy(t).to(device=x.device, dtype=dtype)
        else:  # made there, with no copy to wait for
            seen = torch.full((len(x),), t.item(), device=x.device, dtype=dtype)
        return remember(seen, t.astype(np.float32))  # exact for int64 too, in this range

    # -- between levels -----------------------------------------------------------------------

    def initial(self, noise: Tensor, sigma: float) -> Tensor:
        """Where sampling begins: the process's x_T = N(0, 1), in this scaling.

        Its variance is 1 + sigma^2, not sigma^2: so Euler's method from here is DDIM.

        :param noise: [N, C, ...] standard normal.
        """
        return noise * float(np.hypot(1, sigma))

    def posterior(self, x: Tensor, sigma: float, sigma_next: float) -> Posterior:
        """p(x_next | x), DDPM eqs. 6 and 7 between any two levels, with the checkpoint's variance.

        :param x: [N, C, ...] at sigma.
        :param sigma_next: a lower level; at 0 the variance is 0.
        """
        prediction = self.predict(x, sigma)
        x_start = prediction.x_start
        ratio = (sigma_next / sigma) ** 2
        mean = x_start + ratio * (x - x_start)
        small = ratio * (sigma - sigma_next) * (sigma + sigma_next)  # beta-tilde
        if small == 0:
            return Posterior(mean, torch.zeros_like(x), x_start)
        rescale = 1 + sigma_next**2  # variances of x_{t-1}, divided by its alpha_bar
        large = rescale / (1 + sigma**2) * (sigma - sigma_next) * (sigma + sigma_next)  # beta
        kind, values = self.diffusion.model_var_type, prediction.values
        if values is None:
            variance = small if kind == ModelVarType.FIXED_SMALL else large
            return Posterior(mean, torch.full_like(x, variance), x_start)
        if kind == ModelVarType.LEARNED:
            return Posterior(mean, values.exp() * rescale, x_start)
        v = (values + 1) / 2  # from [-1, 1]
        log_variance = v * float(np.log(large)) + (1 - v) * float(np.log(small))  # IDDPM eq. 15
        return Posterior(mean, log_variance.exp(), x_start)


_NAMES = {kind: name for name, kind in VIEWS.items()}


def convert(y: Tensor, x: Tensor, sigma: Sigma, source: str, target: str) -> Tensor:
    """Turn one view of the same x into another.

    With x_t = a x_start + s eps, y = p x_start + q eps gives x_start = (q x_t - s y) / (q a - p s)
    and eps = (a y - p x_t) / (q a - p s), of which every other view is made.

    :param y: [N, C, ...] the view ``source``.
    :param x: [N, C, ...] data plus noise of standard deviation sigma.
    :param sigma: above 0; a number, or [N] of them.
    :param source: a key of VIEWS, or "score".
    :param target: likewise.
    :return: [N, C, ...] the view ``target``.
    :raises ValueError: for an unknown view.
    """
    weights = _weights_at if isinstance(sigma, int | float) else _weights
    of_x, of_y = weights(source, target, sigma)
    return _times(of_x, x) + _times(of_y, y)


def _weights(source: str, target: str, sigma: Sigma) -> tuple[np.ndarray, np.ndarray]:
    """What to multiply x and the view ``source`` with, float64 [1] or [N] each."""
    alpha_bar = 1 / (1 + _as_array(sigma) ** 2)
    a, s = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    p, q = _view_coefficients(source, alpha_bar)
    p_target, q_target = _view_coefficients(target, alpha_bar)
    determinant = q * a - p * s
    of_x = a * (p_target * q - q_target * p) / determinant  # x_t = a x
    of_y = (q_target * a - p_target * s) / determinant
    return of_x, of_y


_weights_at = lru_cache(maxsize=4096)(_weights)  # the next batch goes through the same levels


def _view_coefficients(name: str, alpha_bar: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """p and q of the view y = p x_start + q eps, float64."""
    if name == "score":  # EDM eq. 3: -eps / sigma
        return np.zeros_like(alpha_bar), -np.sqrt(alpha_bar / (1 - alpha_bar))
    if name not in VIEWS:
        raise UserError(f"unknown view '{name}'; choose one of {', '.join(VIEWS)}, score")
    return coefficients(VIEWS[name], alpha_bar)


def _as_array(sigma: Sigma) -> np.ndarray:
    """A level, [1], or one for each sample, [N], in float64."""
    if isinstance(sigma, Tensor):
        return np.atleast_1d(sigma.detach().cpu().double().numpy())
    return np.atleast_1d(np.float64(sigma))


def _times(factor: np.ndarray, x: Tensor) -> Tensor:
    """x [N, C, ...] times a factor for all, [1], or for each sample, [N]; the type of x stays."""
    if len(factor) == 1:
        return x * float(factor[0])
    return x * torch.from_numpy(factor).to(x).view(-1, *[1] * (x.ndim - 1))
