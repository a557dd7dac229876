"""The process of Gaussian diffusion over discrete time: tables, q, and p by a model.

DDPM: arXiv 2006.11239. IDDPM: arXiv 2102.09672.

Notation: ``x_start`` is the data x_0, ``x_t`` the data after t + 1 noising steps (the index t runs
from 0 to T - 1), ``alpha_bar`` the cumulative product of 1 - beta. See docs/notation.md.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .predictions import ModelMeanType, coefficients, path_scale, to_x_start
from .tables import _extract_into_tensor, look_up, read_only, scaled

Model = Callable[..., Tensor]
Denoised = Callable[[Tensor], Tensor] | None
ModelKwargs = dict[str, Any] | None


class ModelVarType(enum.Enum):
    """The variance of p(x_{t-1} | x_t).

    LEARNED and LEARNED_RANGE double the network's output channels; LEARNED_RANGE interpolates
    between FIXED_SMALL and FIXED_LARGE in the log domain.
    """

    LEARNED = enum.auto()
    FIXED_SMALL = enum.auto()  # beta-tilde, the posterior's
    FIXED_LARGE = enum.auto()  # beta
    LEARNED_RANGE = enum.auto()


class GaussianProcess:
    """The forward process q and the reverse process p; see :class:`.GaussianDiffusion`."""

    def __init__(
        self,
        betas: Sequence[float] | np.ndarray,
        model_mean_type: ModelMeanType,
        model_var_type: ModelVarType,
        rescale_timesteps: bool,
    ) -> None:
        self.model_mean_type = model_mean_type
        self.model_var_type = model_var_type
        self.rescale_timesteps = rescale_timesteps

        betas = np.array(betas, dtype=np.float64)  # float64: products over T steps lose digits
        if betas.ndim != 1 or not len(betas):
            raise ValueError(f"betas must be a non-empty 1-D sequence, not of shape {betas.shape}")
        if not ((betas > 0) & (betas <= 1)).all():
            raise ValueError("betas must lie in (0, 1]")
        self.num_timesteps = len(betas)
        self._make_tables(betas)

    def _make_tables(self, betas: np.ndarray) -> None:
        alphas = 1.0 - betas
        alphas_cumprod = np.cumprod(alphas)
        self.betas = betas
        self.alphas_cumprod = alphas_cumprod
        self.alphas_cumprod_prev = np.append(1.0, alphas_cumprod[:-1])
        self.alphas_cumprod_next = np.append(alphas_cumprod[1:], 0.0)

        # q(x_t | x_0), DDPM eq. 4, and its inverse
        self.sqrt_alphas_cumprod = np.sqrt(alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1.0 - alphas_cumprod)
        self.log_one_minus_alphas_cumprod = np.log(1.0 - alphas_cumprod)
        with np.errstate(divide="ignore"):  # infinite where no signal is left
            self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / alphas_cumprod)
            self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / alphas_cumprod - 1)

        # q(x_{t-1} | x_t, x_0), DDPM eq. 7
        alphas_cumprod_prev = self.alphas_cumprod_prev
        self.posterior_variance = betas * (1.0 - alphas_cumprod_prev) / (1.0 - alphas_cumprod)
        self.posterior_log_variance_clipped = np.log(
            self._replace_first(self.posterior_variance, betas)
        )
        self.posterior_mean_coef1 = betas * np.sqrt(alphas_cumprod_prev) / (1.0 - alphas_cumprod)
        self.posterior_mean_coef2 = (
            (1.0 - alphas_cumprod_prev) * np.sqrt(alphas) / (1.0 - alphas_cumprod)
        )

        kind = self.model_mean_type
        if kind in (ModelMeanType.V, ModelMeanType.FLOW):
            self._target_of_xstart, self._target_of_noise = coefficients(kind, alphas_cumprod)
            self._xstart_of_x_t, self._xstart_of_output = to_x_start(kind, alphas_cumprod)
            self._path_scale = path_scale(alphas_cumprod)

        # The variances that p can take, as tables
        low, high = self.posterior_log_variance_clipped, np.log(betas)
        self._middle_log_variance, self._half_range = (high + low) / 2, (high - low) / 2
        self._fixed_large_variance = self._replace_first(betas, betas)
        self._fixed_large_log_variance = np.log(self._fixed_large_variance)
        for table in vars(self).values():
            if isinstance(table, np.ndarray):
                read_only(table)

    def _replace_first(self, table: np.ndarray, betas: np.ndarray) -> np.ndarray:
        """``table`` with its entry at t = 0 replaced by the posterior variance at t = 1.

        The posterior variance at t = 0 is 0, which has no logarithm. A process of one step has
        no t = 1: its beta is used.
        """
        first = self.posterior_variance[1] if self.num_timesteps > 1 else betas[0]
        return np.append(first, table[1:])

    # -- the forward process ------------------------------------------------------------------

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Moments of q(x_t | x_0), DDPM eq. 4.

        :param x_start: [N, C, ...] data.
        :param t: [N] timesteps.
        :return: mean, variance, log-variance, each of the shape of ``x_start``.
        """
        mean = _extract_into_tensor(self.sqrt_alphas_cumprod, t, x_start.shape) * x_start
        log_variance = _extract_into_tensor(self.log_one_minus_alphas_cumprod, t, x_start.shape)
        sigma = _extract_into_tensor(self.sqrt_one_minus_alphas_cumprod, t, x_start.shape)
        return mean, sigma**2, log_variance

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Draw x_t from q(x_t | x_0), DDPM eq. 4.

        :param x_start: [N, C, ...] data.
        :param t: [N] timesteps.
        :param noise: [N, C, ...] standard normal noise, drawn if None.
        :return: [N, C, ...] x_t.
        """
        if noise is None:
            noise = torch.randn_like(x_start)
        assert noise.shape == x_start.shape
        a, s = look_up(t, x_start, self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod)
        return a * x_start + s * noise

    def q_posterior_mean_variance(
        self, x_start: Tensor, x_t: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Moments of q(x_{t-1} | x_t, x_0), DDPM eqs. 6 and 7.

        :param x_start: [N, C, ...] data.
        :param x_t: [N, C, ...] the data after step t.
        :param t: [N] timesteps.
        :return: mean, variance, log-variance (clipped at t = 0), each [N, C, ...].
        """
        assert x_start.shape == x_t.shape
        coef1, coef2, variance, log_variance = look_up(
            t,
            x_t,
            self.posterior_mean_coef1,
            self.posterior_mean_coef2,
            self.posterior_variance,
            self.posterior_log_variance_clipped,
        )
        mean = coef1 * x_start + coef2 * x_t
        return mean, variance.expand(x_t.shape), log_variance.expand(x_t.shape)

    # -- the reverse process ------------------------------------------------------------------

    def p_mean_variance(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Denoised = None,
        model_kwargs: ModelKwargs = None,
    ) -> dict[str, Tensor]:
        """Moments of p(x_{t-1} | x_t) and the model's estimate of x_0.

        :param model: see the class.
        :param x: [N, C, ...] x_t.
        :param t: [N] timesteps.
        :param clip_denoised: clamp the estimate of x_0 to [-1, 1].
        :param denoised_fn: applied to the estimate of x_0 before clamping.
        :param model_kwargs: keyword arguments for the model, such as class labels ``y``.
        :return: "mean", "variance", "log_variance", "pred_xstart", each [N, C, ...].
        """
        output = self._evaluate(model, x, t, model_kwargs)
        output, variance, log_variance = self._p_variance(output, x, t)

        def process(x_start: Tensor) -> Tensor:
            if denoised_fn is not None:
                x_start = denoised_fn(x_start)
            return x_start.clamp(-1, 1) if clip_denoised else x_start

        if self.model_mean_type == ModelMeanType.PREVIOUS_X:
            mean = output
            pred_xstart = process(self._predict_xstart_from_xprev(x_t=x, t=t, xprev=output))
        else:
            pred_xstart = process(self._predict_xstart(x, t, output))
            mean, _, _ = self.q_posterior_mean_variance(x_start=pred_xstart, x_t=x, t=t)

        assert mean.shape == log_variance.shape == pred_xstart.shape == x.shape
        return {
            "mean": mean,
            "variance": variance,
            "log_variance": log_variance,
            "pred_xstart": pred_xstart,
        }

    def _evaluate(self, model: Model, x_t: Tensor, t: Tensor, model_kwargs: ModelKwargs) -> Tensor:
        """The model's output; a model of the flow sees the linear path's point instead of x_t."""
        if self.model_mean_type == ModelMeanType.FLOW:
            (scale,) = look_up(t, x_t, self._path_scale)
            x_t = scale * x_t
        return model(x_t, self._scale_timesteps(t), **(model_kwargs or {}))

    def _p_variance(
        self, model_output: Tensor, x: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Split off the variance that the model learned, or look up the fixed one.

        :return: the model's prediction, the variance and its logarithm, each [N, C, ...].
        """
        if self._learns_variance:
            assert model_output.shape == (x.shape[0], 2 * x.shape[1], *x.shape[2:])
            model_output, values = model_output.chunk(2, dim=1)
            if self.model_var_type == ModelVarType.LEARNED:
                log_variance = values
            else:
                # IDDPM eq. 15 with v = (values + 1) / 2
                middle, half = look_up(t, x, self._middle_log_variance, self._half_range)
                log_variance = middle + half * values
            return model_output, log_variance.exp(), log_variance
        variance, log_variance = {
            ModelVarType.FIXED_LARGE: (self._fixed_large_variance, self._fixed_large_log_variance),
            ModelVarType.FIXED_SMALL: (
                self.posterior_variance,
                self.posterior_log_variance_clipped,
            ),
        }[self.model_var_type]
        of_steps = look_up(t, x, variance, log_variance)
        return model_output, of_steps[0].expand(x.shape), of_steps[1].expand(x.shape)

    @property
    def _learns_variance(self) -> bool:
        return self.model_var_type in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)

    def _predict_xstart(self, x_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """x_0 by the model's prediction, [N, C, ...] each."""
        if self.model_mean_type == ModelMeanType.START_X:
            return output
        if self.model_mean_type == ModelMeanType.EPSILON:
            return self._predict_xstart_from_eps(x_t=x_t, t=t, eps=output)
        of_x_t, of_output = look_up(t, x_t, self._xstart_of_x_t, self._xstart_of_output)
        return of_x_t * x_t + of_output * output

    def _predict_xstart_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """DDPM eq. 4 solved for x_0."""
        assert x_t.shape == eps.shape
        recip, recipm1 = self._of_x_t_and_eps(t, x_t)
        return recip * x_t - recipm1 * eps

    def _of_x_t_and_eps(self, t: Tensor, x_t: Tensor) -> tuple[Tensor, ...]:
        """1 / sqrt(alpha_bar) and sqrt(1 / alpha_bar - 1), [N, 1, ...] each."""
        return look_up(t, x_t, self.sqrt_recip_alphas_cumprod, self.sqrt_recipm1_alphas_cumprod)

    def _predict_xstart_from_xprev(self, x_t: Tensor, t: Tensor, xprev: Tensor) -> Tensor:
        """The posterior mean, DDPM eq. 7, solved for x_0."""
        assert x_t.shape == xprev.shape
        coef1, coef2 = look_up(t, x_t, self.posterior_mean_coef1, self.posterior_mean_coef2)
        return (xprev - coef2 * x_t) / coef1

    def _predict_eps_from_xstart(self, x_t: Tensor, t: Tensor, pred_xstart: Tensor) -> Tensor:
        """DDPM eq. 4 solved for the noise; it is x_t where no signal is left."""
        recip, recipm1 = self._of_x_t_and_eps(t, x_t)
        eps = (recip * x_t - pred_xstart) / recipm1
        return torch.where(recip.isinf(), x_t, eps) if self.alphas_cumprod[-1] == 0 else eps

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        """The timesteps as the model sees them, [N]."""
        if not self.rescale_timesteps:
            return t
        return scaled(t, 1000.0 / self.num_timesteps)
