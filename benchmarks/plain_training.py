"""The losses and the training step in textbook operations, to measure ours against.

They stand for the original implementation: each table comes from the host in each lookup, both
branches of the bound are computed always, and weights, averages, gradients and logs are handled one
tensor at a time, with AdamW's plain loop and a value read from the device for each.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from plain_tables import look_up
from torch import Tensor, nn

from improved_diffusion.gaussian_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
)


class PlainProcess:
    """The hybrid loss of IDDPM (arXiv 2102.09672, eq. 16) for a model of noise and variance.

    :param diffusion: whose tables are used; its loss must be a mean squared error of the noise.
    :raises ValueError: for another process.
    """

    def __init__(self, diffusion: GaussianDiffusion) -> None:
        epsilon = diffusion.model_mean_type == ModelMeanType.EPSILON
        if not epsilon or diffusion.loss_type.is_vb():
            raise ValueError("the plain process knows mean squared errors of the noise only")
        self.diffusion = diffusion
        self.timestep_map = np.array(
            getattr(diffusion, "timestep_map", range(diffusion.num_timesteps))
        )

    def training_losses(
        self,
        model: Callable[..., Tensor],
        x_start: Tensor,
        t: Tensor,
        model_kwargs: Mapping[str, Any],
        noise: Tensor,
    ) -> dict[str, Tensor]:
        """The losses of a batch, as :meth:`.GaussianDiffusion.training_losses` returns them."""
        d = self.diffusion
        x_t = self._of(d.sqrt_alphas_cumprod, t, x_start) * x_start
        x_t = x_t + self._of(d.sqrt_one_minus_alphas_cumprod, t, x_start) * noise
        output = model(x_t, self._model_timesteps(t), **model_kwargs)
        terms = {}
        if d.model_var_type in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE):
            output, values = torch.split(output, x_t.shape[1], dim=1)
            frozen = torch.cat([output.detach(), values], dim=1)
            terms["vb"] = self._bound(frozen, x_start, x_t, t)
            if d.loss_type == LossType.RESCALED_MSE:
                terms["vb"] = terms["vb"] * (d.num_timesteps / 1000.0)
        terms["mse"] = mean_of_rest((noise - output) ** 2)
        terms["loss"] = terms["mse"] + terms["vb"] if "vb" in terms else terms["mse"]
        return terms

    def _of(self, table: np.ndarray, t: Tensor, like: Tensor) -> Tensor:
        return look_up(table, t, like.shape)

    def _model_timesteps(self, t: Tensor) -> Tensor:
        """The timesteps as the model sees them, by tables of the host as the others."""
        d = self.diffusion
        original = torch.from_numpy(self.timestep_map).to(t.device)[t]
        if not d.rescale_timesteps:
            return original
        return original.float() * (1000.0 / getattr(d, "original_num_steps", d.num_timesteps))

    def _bound(self, output: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """A term of the variational bound, [N] in bits/dim: both branches, then one of them."""
        true_mean, _, true_log_variance = self._posterior(x_start, x_t, t)
        mean, _, log_variance = self._p(output, x_t, t)
        kl = 0.5 * (
            -1.0
            + log_variance
            - true_log_variance
            + torch.exp(true_log_variance - log_variance)
            + (true_mean - mean) ** 2 * torch.exp(-log_variance)
        )
        decoder_nll = -self._decoder(x_start, mean, 0.5 * log_variance)
        kl, decoder_nll = (mean_of_rest(term) / math.log(2.0) for term in (kl, decoder_nll))
        return torch.where(t == 0, decoder_nll, kl)

    def _posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        d = self.diffusion
        mean = self._of(d.posterior_mean_coef1, t, x_t) * x_start
        mean = mean + self._of(d.posterior_mean_coef2, t, x_t) * x_t
        variance = self._of(d.posterior_variance, t, x_t)
        return mean, variance, self._of(d.posterior_log_variance_clipped, t, x_t)

    def _p(self, output: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        d = self.diffusion
        eps, values = torch.split(output, x_t.shape[1], dim=1)
        log_variance = values
        if d.model_var_type == ModelVarType.LEARNED_RANGE:
            low = self._of(d.posterior_log_variance_clipped, t, x_t)
            high = self._of(np.log(d.betas), t, x_t)
            share = (values + 1) / 2
            log_variance = share * high + (1 - share) * low
        x_start = self._of(d.sqrt_recip_alphas_cumprod, t, x_t) * x_t
        x_start = x_start - self._of(d.sqrt_recipm1_alphas_cumprod, t, x_t) * eps
        mean, _, _ = self._posterior(x_start, x_t, t)
        return mean, torch.exp(log_variance), log_variance

    def _decoder(self, x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
        """The log-likelihood of 8-bit levels, DDPM (arXiv 2006.11239) eq. 13."""
        centered = x - mean
        inverse = torch.exp(-log_scale)
        above = _normal_cdf(inverse * (centered + 1.0 / 255.0))
        below = _normal_cdf(inverse * (centered - 1.0 / 255.0))
        log_above = torch.log(above.clamp(min=1e-12))
        log_beyond = torch.log((1.0 - below).clamp(min=1e-12))
        log_between = torch.log((above - below).clamp(min=1e-12))
        inner = torch.where(x > 0.999, log_beyond, log_between)
        return torch.where(x < -0.999, log_above, inner)


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))


def mean_of_rest(tensor: Tensor) -> Tensor:
    """Mean over all dimensions but the first."""
    return tensor.mean(dim=list(range(1, tensor.ndim)))


class PlainTraining:
    """Training steps of a model in textbook operations.

    :param model: a plain rendering; see plain_unet.py.
    :param diffusion: whose losses are minimised; see :class:`PlainProcess`.
    :param lr: learning rate of AdamW.
    :param ema_rates: of the averaged weights.
    """

    def __init__(
        self,
        model: nn.Module,
        diffusion: GaussianDiffusion,
        lr: float = 1e-4,
        ema_rates: Sequence[float] = (0.9999,),
    ) -> None:
        self.model = model
        self.process = PlainProcess(diffusion)
        self.num_timesteps = diffusion.num_timesteps
        self.params = list(model.parameters())
        self.opt = torch.optim.AdamW(
            self.params, lr=lr, weight_decay=0.0, foreach=False, fused=False
        )
        self.ema_rates = list(ema_rates)
        self.ema_params = [copy.deepcopy(self.params) for _ in self.ema_rates]
        self.log: dict[str, float] = {}

    def step(
        self,
        images: Tensor,
        cond: Mapping[str, Tensor],
        t: Tensor,
        noise: Tensor | None = None,
    ) -> dict[str, float]:
        """One update, logged at once.

        :param images: [N, C, H, W] in [-1, 1].
        :param t: [N] timesteps.
        :param noise: [N, C, H, W]; drawn if None.
        :return: the means of the losses, and those by quarter of the timesteps.
        """
        device = self.params[0].device
        images, t = images.to(device), t.to(device)
        cond = {name: value.to(device) for name, value in cond.items()}
        for param in self.params:
            if param.grad is not None:
                param.grad.detach_()
                param.grad.zero_()
        noise = torch.randn_like(images) if noise is None else noise
        losses = self.process.training_losses(self.model, images, t, cond, noise)
        losses["loss"].mean().backward()
        self._write_down(t, losses)
        self.update()
        return self.log

    def update(self) -> None:
        """From the gradients to weights and averages."""
        squares = [(param.grad**2).sum().item() for param in self.params if param.grad is not None]
        self.log["grad_norm"] = math.sqrt(sum(squares))
        self.opt.step()
        self._average()

    def _write_down(self, t: Tensor, losses: Mapping[str, Tensor]) -> None:
        self.log = {}
        for name, values in losses.items():
            self.log[name] = values.mean().item()
            for step, value in zip(t.cpu().numpy(), values.detach().cpu().numpy(), strict=True):
                quarter = int(4 * step / self.num_timesteps)
                self.log[f"{name}_q{quarter}"] = value.item()

    @torch.no_grad()
    def _average(self) -> None:
        for rate, averages in zip(self.ema_rates, self.ema_params, strict=True):
            for average, param in zip(averages, self.params, strict=True):
                average.mul_(rate).add_(param, alpha=1 - rate)
