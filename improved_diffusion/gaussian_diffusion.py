"""Gaussian diffusion over discrete time: tables, q, p, losses, DDPM and DDIM sampling.

DDPM: arXiv 2006.11239. DDIM: arXiv 2010.02502. IDDPM: arXiv 2102.09672. Guidance by a classifier:
arXiv 2105.05233.

Notation: ``x_start`` is the data x_0, ``x_t`` the data after t + 1 noising steps (the index t runs
from 0 to T - 1), ``alpha_bar`` the cumulative product of 1 - beta. See docs/notation.md.
"""

from __future__ import annotations

import enum
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import UserError
from .loss_weights import NO_WEIGHT, check_loss_weight, loss_weight_table
from .losses import discretized_gaussian_log_likelihood, mean_flat, normal_kl
from .predictions import ModelMeanType, coefficients, path_scale, to_x_start
from .rng import Generator, randn, randn_like
from .schedules import betas_for_alpha_bar, get_named_beta_schedule
from .tables import _extract_into_tensor, read_only

__all__ = [
    "GaussianDiffusion",
    "LossType",
    "ModelMeanType",
    "ModelVarType",
    "betas_for_alpha_bar",
    "get_named_beta_schedule",
]

Model = Callable[..., Tensor]
CondFn = Callable[..., Tensor] | None
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


class LossType(enum.Enum):
    """What training minimises."""

    MSE = enum.auto()  # L_simple, plus the bound if the variance is learned
    RESCALED_MSE = enum.auto()  # the same with the bound scaled by T / 1000: L_hybrid
    KL = enum.auto()  # one term of the variational bound
    RESCALED_KL = enum.auto()  # that term times T, an estimate of the whole bound

    def is_vb(self) -> bool:
        """Whether the loss is the variational bound."""
        return self in (LossType.KL, LossType.RESCALED_KL)


class GaussianDiffusion:
    """The forward process q, the reverse process p, training losses and samplers.

    A model is any callable ``model(x, t, **model_kwargs)`` from [N, C, ...] and [N] to
    [N, C, ...], or to [N, 2 C, ...] when the variance is learned: mean first.

    The tables are float64 arrays of shape [T], read-only: derive a new process to change them.

    :param betas: T noise levels, each in (0, 1].
    :param model_mean_type: what the model predicts.
    :param model_var_type: how the variance of p is found.
    :param loss_type: what :meth:`training_losses` returns under "loss".
    :param rescale_timesteps: pass the model float timesteps scaled to 0 ... 1000.
    :param loss_weight: the weight of each noise level in a mean squared error, one of
        :data:`.loss_weights.LOSS_WEIGHTS`.
    :raises ValueError: unless the betas are a one-dimensional, non-empty sequence in (0, 1]; for a
        weight that the prediction makes infinite, or one with the variational bound.
    """

    def __init__(
        self,
        *,
        betas: Sequence[float] | np.ndarray,
        model_mean_type: ModelMeanType,
        model_var_type: ModelVarType,
        loss_type: LossType,
        rescale_timesteps: bool = False,
        loss_weight: str = NO_WEIGHT,
    ) -> None:
        check_loss_weight(loss_weight)
        if loss_type.is_vb() and loss_weight != NO_WEIGHT:
            raise UserError(
                f"--loss_weight {loss_weight} with --use_kl True: the variational bound has its "
                "own weights; leave one of them out"
            )
        self.model_mean_type = model_mean_type
        self.model_var_type = model_var_type
        self.loss_type = loss_type
        self.rescale_timesteps = rescale_timesteps
        self.loss_weight = loss_weight

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

        if self.loss_weight != NO_WEIGHT:
            self._loss_weights = loss_weight_table(
                self.loss_weight, kind, alphas_cumprod, self.posterior_mean_coef1
            )

        # The variances that p can take, as tables
        self._log_betas = np.log(betas)
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
        return (
            _extract_into_tensor(self.sqrt_alphas_cumprod, t, x_start.shape) * x_start
            + _extract_into_tensor(self.sqrt_one_minus_alphas_cumprod, t, x_start.shape) * noise
        )

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
        mean = (
            _extract_into_tensor(self.posterior_mean_coef1, t, x_t.shape) * x_start
            + _extract_into_tensor(self.posterior_mean_coef2, t, x_t.shape) * x_t
        )
        variance = _extract_into_tensor(self.posterior_variance, t, x_t.shape)
        log_variance = _extract_into_tensor(self.posterior_log_variance_clipped, t, x_t.shape)
        return mean, variance, log_variance

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
            x_t = _extract_into_tensor(self._path_scale, t, x_t.shape) * x_t
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
                low = _extract_into_tensor(self.posterior_log_variance_clipped, t, x.shape)
                high = _extract_into_tensor(self._log_betas, t, x.shape)
                v = (values + 1) / 2  # from [-1, 1]
                log_variance = v * high + (1 - v) * low  # IDDPM eq. 15
            return model_output, log_variance.exp(), log_variance
        variance, log_variance = {
            ModelVarType.FIXED_LARGE: (self._fixed_large_variance, self._fixed_large_log_variance),
            ModelVarType.FIXED_SMALL: (
                self.posterior_variance,
                self.posterior_log_variance_clipped,
            ),
        }[self.model_var_type]
        return (
            model_output,
            _extract_into_tensor(variance, t, x.shape),
            _extract_into_tensor(log_variance, t, x.shape),
        )

    @property
    def _learns_variance(self) -> bool:
        return self.model_var_type in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)

    def _predict_xstart(self, x_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """x_0 by the model's prediction, [N, C, ...] each."""
        if self.model_mean_type == ModelMeanType.START_X:
            return output
        if self.model_mean_type == ModelMeanType.EPSILON:
            return self._predict_xstart_from_eps(x_t=x_t, t=t, eps=output)
        return (
            _extract_into_tensor(self._xstart_of_x_t, t, x_t.shape) * x_t
            + _extract_into_tensor(self._xstart_of_output, t, x_t.shape) * output
        )

    def _predict_xstart_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """DDPM eq. 4 solved for x_0."""
        assert x_t.shape == eps.shape
        return (
            _extract_into_tensor(self.sqrt_recip_alphas_cumprod, t, x_t.shape) * x_t
            - _extract_into_tensor(self.sqrt_recipm1_alphas_cumprod, t, x_t.shape) * eps
        )

    def _predict_xstart_from_xprev(self, x_t: Tensor, t: Tensor, xprev: Tensor) -> Tensor:
        """The posterior mean, DDPM eq. 7, solved for x_0."""
        assert x_t.shape == xprev.shape
        coef1 = _extract_into_tensor(self.posterior_mean_coef1, t, x_t.shape)
        coef2 = _extract_into_tensor(self.posterior_mean_coef2, t, x_t.shape)
        return (xprev - coef2 * x_t) / coef1

    def _predict_eps_from_xstart(self, x_t: Tensor, t: Tensor, pred_xstart: Tensor) -> Tensor:
        """DDPM eq. 4 solved for the noise; it is x_t where no signal is left."""
        recip = _extract_into_tensor(self.sqrt_recip_alphas_cumprod, t, x_t.shape)
        recipm1 = _extract_into_tensor(self.sqrt_recipm1_alphas_cumprod, t, x_t.shape)
        eps = (recip * x_t - pred_xstart) / recipm1
        return torch.where(recip.isinf(), x_t, eps) if self.alphas_cumprod[-1] == 0 else eps

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        """The timesteps as the model sees them, [N]."""
        return t.float() * (1000.0 / self.num_timesteps) if self.rescale_timesteps else t

    # -- guidance -----------------------------------------------------------------------------

    def condition_mean(
        self,
        cond_fn: Callable[..., Tensor],
        p_mean_var: dict[str, Tensor],
        x: Tensor,
        t: Tensor,
        model_kwargs: ModelKwargs = None,
    ) -> Tensor:
        """The mean of p(x_{t-1} | x_t), moved along a gradient: arXiv 2105.05233 Algorithm 1.

        :param cond_fn: (x_t, t, **model_kwargs) -> [N, C, ...], the gradient of log p(y | x_t) with
            respect to x_t; t as the model sees it.
        :param p_mean_var: from :meth:`p_mean_variance` for the same ``x`` and ``t``.
        :return: [N, C, ...].
        """
        gradient = cond_fn(x, self._scale_timesteps(t), **(model_kwargs or {}))
        return p_mean_var["mean"].float() + p_mean_var["variance"] * gradient.float()

    def condition_score(
        self,
        cond_fn: Callable[..., Tensor],
        p_mean_var: dict[str, Tensor],
        x: Tensor,
        t: Tensor,
        model_kwargs: ModelKwargs = None,
    ) -> dict[str, Tensor]:
        """What :meth:`p_mean_variance` says, if a gradient is added to the score of its x_0.

        arXiv 2105.05233 Algorithm 2. Where no signal is left x_t tells no class: x_0 stays.

        :param cond_fn: as for :meth:`condition_mean`.
        :param p_mean_var: from :meth:`p_mean_variance` for the same ``x`` and ``t``.
        :return: a copy of ``p_mean_var`` with another "pred_xstart", not clamped, and "mean".
        """
        gradient = cond_fn(x, self._scale_timesteps(t), **(model_kwargs or {}))
        sigma = _extract_into_tensor(self.sqrt_one_minus_alphas_cumprod, t, x.shape)
        old = p_mean_var["pred_xstart"]
        eps = self._predict_eps_from_xstart(x, t, old) - sigma * gradient
        guided = self._predict_xstart_from_eps(x, t, eps)
        recip = _extract_into_tensor(self.sqrt_recip_alphas_cumprod, t, x.shape)
        guided = torch.where(recip.isinf(), old, guided)
        mean, _, _ = self.q_posterior_mean_variance(x_start=guided, x_t=x, t=t)
        return {**p_mean_var, "pred_xstart": guided, "mean": mean}

    # -- sampling -----------------------------------------------------------------------------

    def p_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Denoised = None,
        model_kwargs: ModelKwargs = None,
        generator: Generator = None,
        cond_fn: CondFn = None,
    ) -> dict[str, Tensor]:
        """Draw x_{t-1} from p(x_{t-1} | x_t): DDPM Algorithm 2.

        The arguments are those of :meth:`p_mean_variance`, and:

        :param generator: a torch.Generator, or one per sample; None for torch's global one.
        :param cond_fn: see :meth:`condition_mean`; None for no guidance.
        :return: "sample" and "pred_xstart", each [N, C, ...].
        """
        out = self.p_mean_variance(
            model,
            x,
            t,
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
            model_kwargs=model_kwargs,
        )
        noise = randn_like(x, generator)
        if cond_fn is not None:
            out["mean"] = self.condition_mean(cond_fn, out, x, t, model_kwargs=model_kwargs)
        sigma = torch.exp(0.5 * out["log_variance"])
        sample = out["mean"] + _nonzero_mask(t, x) * sigma * noise
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def p_sample_loop(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Denoised = None,
        model_kwargs: ModelKwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        generator: Generator = None,
        cond_fn: CondFn = None,
    ) -> Tensor:
        """Draw samples by DDPM Algorithm 2.

        :param model: see the class.
        :param shape: (N, C, ...) of the samples.
        :param noise: [N, C, ...] x_T, drawn if None.
        :param clip_denoised: clamp each estimate of x_0 to [-1, 1].
        :param denoised_fn: applied to each estimate of x_0 before clamping.
        :param model_kwargs: keyword arguments for the model.
        :param device: where to sample; that of the model's parameters if None.
        :param progress: show a tqdm bar over the timesteps.
        :param generator: a torch.Generator, or one per sample; None for torch's global one.
        :param cond_fn: see :meth:`condition_mean`; None for no guidance.
        :return: [N, C, ...] samples.
        """
        steps = self.p_sample_loop_progressive(
            model,
            shape,
            noise=noise,
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
            model_kwargs=model_kwargs,
            device=device,
            progress=progress,
            **_given(generator=generator, cond_fn=cond_fn),
        )
        return _last(steps)["sample"]

    def p_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Denoised = None,
        model_kwargs: ModelKwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        generator: Generator = None,
        cond_fn: CondFn = None,
    ) -> Iterator[dict[str, Tensor]]:
        """Like :meth:`p_sample_loop`, yielding the dict of :meth:`p_sample` at every step."""

        def step(x: Tensor, t: Tensor) -> dict[str, Tensor]:
            return self.p_sample(
                model,
                x,
                t,
                clip_denoised=clip_denoised,
                denoised_fn=denoised_fn,
                model_kwargs=model_kwargs,
                **_given(generator=generator, cond_fn=cond_fn),
            )

        yield from self._sample_loop(step, model, shape, noise, device, progress, generator)

    def ddim_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Denoised = None,
        model_kwargs: ModelKwargs = None,
        eta: float = 0.0,
        generator: Generator = None,
        cond_fn: CondFn = None,
    ) -> dict[str, Tensor]:
        """One step from x_t to x_{t-1}, DDIM eq. 12.

        The arguments are those of :meth:`p_mean_variance`, and:

        :param eta: 0 is deterministic, 1 has the variance of DDPM's posterior (DDIM eq. 16).
        :param generator: a torch.Generator, or one per sample; None for torch's global one.
        :param cond_fn: see :meth:`condition_score`; None for no guidance.
        :return: "sample" and "pred_xstart", each [N, C, ...].
        """
        out = self.p_mean_variance(
            model,
            x,
            t,
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
            model_kwargs=model_kwargs,
        )
        if cond_fn is not None:
            out = self.condition_score(cond_fn, out, x, t, model_kwargs=model_kwargs)
        pred_xstart = out["pred_xstart"]
        eps = self._predict_eps_from_xstart(x, t, pred_xstart)  # x_0 has changed
        alpha_bar = _extract_into_tensor(self.alphas_cumprod, t, x.shape)
        alpha_bar_prev = _extract_into_tensor(self.alphas_cumprod_prev, t, x.shape)
        sigma = (  # DDIM eq. 16
            eta
            * torch.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar))
            * torch.sqrt(1 - alpha_bar / alpha_bar_prev)
        )
        # drawn for eta = 0 too: the global generator moves on alike for every eta
        noise = randn_like(x, generator)
        # of eta = 1 on a step from no signal nothing is left, which rounding must not make negative
        left = (1 - alpha_bar_prev - sigma**2).clamp(min=0)
        mean = pred_xstart * torch.sqrt(alpha_bar_prev) + torch.sqrt(left) * eps
        sample = mean + _nonzero_mask(t, x) * sigma * noise
        return {"sample": sample, "pred_xstart": pred_xstart}

    def ddim_reverse_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Denoised = None,
        model_kwargs: ModelKwargs = None,
        eta: float = 0.0,
    ) -> dict[str, Tensor]:
        """One step from x_t to x_{t+1} along DDIM's deterministic path (DDIM section 4.3).

        The arguments are those of :meth:`p_mean_variance`, and:

        :param eta: must be 0: only the deterministic path can be followed backwards.
        :return: "sample" (x_{t+1}) and "pred_xstart", each [N, C, ...].
        :raises ValueError: for any other eta.
        """
        if eta != 0.0:
            raise ValueError(f"ddim_reverse_sample follows the path of eta = 0, not {eta}")
        out = self.p_mean_variance(
            model,
            x,
            t,
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
            model_kwargs=model_kwargs,
        )
        pred_xstart = out["pred_xstart"]
        eps = self._predict_eps_from_xstart(x, t, pred_xstart)
        alpha_bar_next = _extract_into_tensor(self.alphas_cumprod_next, t, x.shape)
        sample = pred_xstart * torch.sqrt(alpha_bar_next) + torch.sqrt(1 - alpha_bar_next) * eps
        return {"sample": sample, "pred_xstart": pred_xstart}

    def ddim_sample_loop(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Denoised = None,
        model_kwargs: ModelKwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
        generator: Generator = None,
        cond_fn: CondFn = None,
    ) -> Tensor:
        """Draw samples by DDIM; the arguments of :meth:`p_sample_loop` and ``eta``.

        :return: [N, C, ...] samples.
        """
        steps = self.ddim_sample_loop_progressive(
            model,
            shape,
            noise=noise,
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
            model_kwargs=model_kwargs,
            device=device,
            progress=progress,
            eta=eta,
            **_given(generator=generator, cond_fn=cond_fn),
        )
        return _last(steps)["sample"]

    def ddim_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Denoised = None,
        model_kwargs: ModelKwargs = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
        generator: Generator = None,
        cond_fn: CondFn = None,
    ) -> Iterator[dict[str, Tensor]]:
        """Like :meth:`ddim_sample_loop`, yielding the dict of :meth:`ddim_sample` at every step."""

        def step(x: Tensor, t: Tensor) -> dict[str, Tensor]:
            return self.ddim_sample(
                model,
                x,
                t,
                clip_denoised=clip_denoised,
                denoised_fn=denoised_fn,
                model_kwargs=model_kwargs,
                eta=eta,
                **_given(generator=generator, cond_fn=cond_fn),
            )

        yield from self._sample_loop(step, model, shape, noise, device, progress, generator)

    def _sample_loop(
        self,
        step: Callable[[Tensor, Tensor], dict[str, Tensor]],
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None,
        device: torch.device | str | None,
        progress: bool,
        generator: Generator,
    ) -> Iterator[dict[str, Tensor]]:
        """Run ``step`` from t = T - 1 down to 0 without gradients."""
        if device is None:
            device = next(model.parameters()).device  # type: ignore[attr-defined]
        x = noise if noise is not None else randn(shape, generator, device)
        timesteps: Iterable[int] = range(self.num_timesteps - 1, -1, -1)
        if progress:
            from tqdm.auto import tqdm  # here, as importing the package needs torch and NumPy only

            timesteps = tqdm(timesteps)
        for i in timesteps:
            t = torch.full((shape[0],), i, device=device)  # [N]
            with torch.no_grad():
                out = step(x, t)
            yield out
            x = out["sample"]

    # -- losses -------------------------------------------------------------------------------

    def training_losses(
        self,
        model: Model,
        x_start: Tensor,
        t: Tensor,
        model_kwargs: ModelKwargs = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The training loss at one timestep per image.

        :param model: see the class.
        :param x_start: [N, C, ...] data in [-1, 1].
        :param t: [N] timesteps.
        :param model_kwargs: keyword arguments for the model.
        :param noise: [N, C, ...] standard normal noise, drawn if None.
        :return: "loss" [N]; with a mean squared error also "mse" [N], which has no loss weight, and
            "vb" [N] (the bound's term as in the loss, bits/dim) if the variance is learned.
        """
        if noise is None:
            noise = torch.randn_like(x_start)
        x_t = self.q_sample(x_start, t, noise=noise)
        if self.loss_type.is_vb():
            bound = self._vb_terms_bpd(
                model, x_start=x_start, x_t=x_t, t=t, clip_denoised=False, model_kwargs=model_kwargs
            )["output"]
            scale = self.num_timesteps if self.loss_type == LossType.RESCALED_KL else 1
            return {"loss": scale * bound}

        terms = {}
        output = self._evaluate(model, x_t, t, model_kwargs)
        if self._learns_variance:
            terms["vb"] = self._variance_loss(output, x_start, x_t, t)
            output, _ = output.chunk(2, dim=1)
        target = self._target(x_start, x_t, t, noise)
        assert output.shape == target.shape == x_start.shape
        terms["mse"] = mean_flat((target - output) ** 2)
        weighted = self._weighted(terms["mse"], t)
        terms["loss"] = weighted + terms["vb"] if "vb" in terms else weighted
        return terms

    def _weighted(self, mse: Tensor, t: Tensor) -> Tensor:
        """Squared errors [N] times the weights of their timesteps."""
        if self.loss_weight == NO_WEIGHT:
            return mse
        return _extract_into_tensor(self._loss_weights, t, mse.shape) * mse

    def _target(self, x_start: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the model should predict, [N, C, ...]."""
        if self.model_mean_type == ModelMeanType.PREVIOUS_X:
            return self.q_posterior_mean_variance(x_start=x_start, x_t=x_t, t=t)[0]
        if self.model_mean_type == ModelMeanType.START_X:
            return x_start
        if self.model_mean_type == ModelMeanType.EPSILON:
            return noise
        return (
            _extract_into_tensor(self._target_of_xstart, t, x_t.shape) * x_start
            + _extract_into_tensor(self._target_of_noise, t, x_t.shape) * noise
        )

    def _variance_loss(
        self, model_output: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor
    ) -> Tensor:
        """The bound's term as it trains the variance alone: IDDPM section 3.1, eq. 16.

        :return: [N] bits/dim; times T / 1000 for RESCALED_MSE: T times one term estimates the
            whole bound, which eq. 16 weighs by lambda = 0.001.
        """
        mean, values = model_output.chunk(2, dim=1)
        frozen = torch.cat([mean.detach(), values], dim=1)
        bound = self._vb_terms_bpd(
            lambda *_: frozen, x_start=x_start, x_t=x_t, t=t, clip_denoised=False
        )["output"]
        return bound * (
            self.num_timesteps / 1000.0 if self.loss_type == LossType.RESCALED_MSE else 1.0
        )

    def _vb_terms_bpd(
        self,
        model: Model,
        x_start: Tensor,
        x_t: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        model_kwargs: ModelKwargs = None,
    ) -> dict[str, Tensor]:
        """One term of the variational bound, DDPM eq. 5: L_{t-1}, or L_0 where t = 0.

        :return: "output" [N] in bits/dim; "pred_xstart" [N, C, ...].
        """
        true_mean, _, true_log_variance = self.q_posterior_mean_variance(
            x_start=x_start, x_t=x_t, t=t
        )
        out = self.p_mean_variance(
            model, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs
        )
        kl = normal_kl(true_mean, true_log_variance, out["mean"], out["log_variance"])
        decoder_nll = -discretized_gaussian_log_likelihood(
            x_start, means=out["mean"], log_scales=0.5 * out["log_variance"]
        )
        output = torch.where(t == 0, mean_flat(decoder_nll), mean_flat(kl)) / math.log(2)
        return {"output": output, "pred_xstart": out["pred_xstart"]}

    def _prior_bpd(self, x_start: Tensor) -> Tensor:
        """KL(q(x_T | x_0) || N(0, 1)), the term L_T of DDPM eq. 5, [N] in bits/dim."""
        t = torch.full((x_start.shape[0],), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        return mean_flat(normal_kl(mean, log_variance, 0.0, 0.0)) / math.log(2)

    def calc_bpd_loop(
        self,
        model: Model,
        x_start: Tensor,
        clip_denoised: bool = True,
        model_kwargs: ModelKwargs = None,
        generator: Generator = None,
    ) -> dict[str, Tensor]:
        """The whole variational bound, DDPM eq. 5, and errors at every timestep.

        Evaluates the model at T timesteps, the last first.

        :param x_start: [N, C, ...] data in [-1, 1].
        :param generator: a torch.Generator, or one per image; None for torch's global one.
        :return: "total_bpd" [N] and "prior_bpd" [N], the bound and its term L_T in bits/dim; and
            per timestep, with t = T - 1 in the first column, "vb" [N, T] in bits/dim and the mean
            squared errors "xstart_mse" [N, T] and "mse" [N, T] of x_0 and of the noise.
        """
        columns: dict[str, list[Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
        for i in range(self.num_timesteps - 1, -1, -1):
            t = torch.full((x_start.shape[0],), i, device=x_start.device)
            noise = randn_like(x_start, generator)
            x_t = self.q_sample(x_start, t, noise=noise)
            with torch.no_grad():
                out = self._vb_terms_bpd(
                    model,
                    x_start=x_start,
                    x_t=x_t,
                    t=t,
                    clip_denoised=clip_denoised,
                    model_kwargs=model_kwargs,
                )
            eps = self._predict_eps_from_xstart(x_t, t, out["pred_xstart"])
            columns["vb"].append(out["output"])
            columns["xstart_mse"].append(mean_flat((out["pred_xstart"] - x_start) ** 2))
            columns["mse"].append(mean_flat((eps - noise) ** 2))

        terms = {name: torch.stack(column, dim=1) for name, column in columns.items()}  # [N, T]
        prior_bpd = self._prior_bpd(x_start)
        return {
            "total_bpd": terms["vb"].sum(dim=1) + prior_bpd,
            "prior_bpd": prior_bpd,
            **terms,
        }


def _nonzero_mask(t: Tensor, like: Tensor) -> Tensor:
    """1 where t > 0 and 0 where t = 0, as [N, 1, ...]: the last step adds no noise."""
    return (t != 0).to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def _given(**optional: Any) -> dict[str, Any]:
    """The arguments that are not None: subclasses that override a step without them still work."""
    return {name: value for name, value in optional.items() if value is not None}


def _last(steps: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
    return deque(steps, maxlen=1)[0]
