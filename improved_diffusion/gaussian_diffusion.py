"""Gaussian diffusion over discrete time: tables, q, p, losses, DDPM and DDIM sampling.

The process itself is in :mod:`.gaussian_process`, its steps in :mod:`.gaussian_sampling`; here are
the losses and the variational bound.

DDPM: arXiv 2006.11239. IDDPM: arXiv 2102.09672. Notation: see docs/notation.md.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .errors import UserError
from .gaussian_process import Model as Model
from .gaussian_process import ModelKwargs, ModelVarType
from .gaussian_sampling import GaussianSampling
from .loss_weights import NO_WEIGHT, check_loss_weight, loss_weight_table
from .losses import discretized_gaussian_log_likelihood, mean_flat, normal_kl
from .predictions import ModelMeanType
from .rng import Generator, randn_like
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


class LossType(enum.Enum):
    """What training minimises."""

    MSE = enum.auto()  # L_simple, plus the bound if the variance is learned
    RESCALED_MSE = enum.auto()  # the same with the bound scaled by T / 1000: L_hybrid
    KL = enum.auto()  # one term of the variational bound
    RESCALED_KL = enum.auto()  # that term times T, an estimate of the whole bound

    def is_vb(self) -> bool:
        """Whether the loss is the variational bound."""
        return self in (LossType.KL, LossType.RESCALED_KL)


class GaussianDiffusion(GaussianSampling):
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
        self.loss_type = loss_type
        self.loss_weight = loss_weight
        super().__init__(betas, model_mean_type, model_var_type, rescale_timesteps)
        if loss_weight != NO_WEIGHT:
            self._loss_weights = read_only(
                loss_weight_table(
                    loss_weight, model_mean_type, self.alphas_cumprod, self.posterior_mean_coef1
                )
            )

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
        bound = self._vb_terms_bpd(
            lambda *_: model_output,
            x_start=x_start,
            x_t=x_t,
            t=t,
            clip_denoised=False,
            variance_alone=True,
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
        variance_alone: bool = False,
    ) -> dict[str, Tensor]:
        """One term of the variational bound, DDPM eq. 5: L_{t-1}, or L_0 where t = 0.

        :param variance_alone: no gradient reaches the model by the mean.
        :return: "output" [N] in bits/dim; "pred_xstart" [N, C, ...].
        """
        true_mean, _, true_log_variance = self.q_posterior_mean_variance(
            x_start=x_start, x_t=x_t, t=t
        )
        out = self.p_mean_variance(
            model, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs
        )
        mean = out["mean"].detach() if variance_alone else out["mean"]
        kl = normal_kl(true_mean, true_log_variance, mean, out["log_variance"])
        nats = _or_decoder_nll(mean_flat(kl), x_start, mean, out["log_variance"], t)
        output = nats / math.log(2)
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


def _or_decoder_nll(
    kl: Tensor, x_start: Tensor, mean: Tensor, log_variance: Tensor, t: Tensor
) -> Tensor:
    """KL divergences [N] in nats, or where t = 0 the decoder's: DDPM eq. 5, L_{t-1} and L_0.

    On a CPU L_0 is computed for the few images at t = 0; elsewhere for all, as the host would have
    to wait for the device to know which they are. Under torch.func's transforms no value is known.
    """
    if t.device.type != "cpu" or torch._C._functorch.is_functorch_wrapped_tensor(t):
        return torch.where(t == 0, _decoder_nll(x_start, mean, log_variance), kl)
    first = [i for i, step in enumerate(t.tolist()) if step == 0]
    if not first:
        return kl
    nll = _decoder_nll(x_start[first], mean[first], log_variance[first])
    return kl.index_put((torch.tensor(first),), nll)


def _decoder_nll(x_start: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """L_0 of DDPM eq. 5 for 8-bit images: [N, C, ...] each to [N] in nats."""
    return -mean_flat(
        discretized_gaussian_log_likelihood(x_start, means=mean, log_scales=0.5 * log_variance)
    )
