"""Sampling in textbook operations, to measure ours against.

It stands for the original implementation: each table comes from the host in each lookup, expanded
to the shape of the images, and each formula is written out, one operation after another.

DDPM: arXiv 2006.11239. DDIM: arXiv 2010.02502. DPM-Solver++: arXiv 2211.01095.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from plain_tables import look_up
from plain_training import PlainProcess
from torch import Tensor

from improved_diffusion.gaussian_diffusion import ModelVarType

Model = Callable[..., Tensor]


class PlainSampling(PlainProcess):
    """The steps of three samplers for a model of the noise, estimates of x_0 clamped to [-1, 1]."""

    def p_mean_variance(self, model: Model, x: Tensor, t: Tensor) -> dict[str, Tensor]:
        """Moments of p(x_{t-1} | x_t) and the estimate of x_0, [N, C, ...] each."""
        d = self.diffusion
        output = model(x, self._model_timesteps(t))
        if d.model_var_type in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE):
            output, values = torch.split(output, x.shape[1], dim=1)
            log_variance = values
            if d.model_var_type == ModelVarType.LEARNED_RANGE:
                low = self._of(d.posterior_log_variance_clipped, t, x)
                high = self._of(np.log(d.betas), t, x)
                share = (values + 1) / 2
                log_variance = share * high + (1 - share) * low  # IDDPM eq. 15
            variance = torch.exp(log_variance)
        elif d.model_var_type == ModelVarType.FIXED_SMALL:
            variance = self._of(d.posterior_variance, t, x)
            log_variance = self._of(d.posterior_log_variance_clipped, t, x)
        else:
            large = np.append(d.posterior_variance[1], d.betas[1:])
            variance = self._of(large, t, x)
            log_variance = self._of(np.log(large), t, x)
        x_start = (
            self._of(d.sqrt_recip_alphas_cumprod, t, x) * x
            - self._of(d.sqrt_recipm1_alphas_cumprod, t, x) * output
        ).clamp(-1, 1)
        mean, _, _ = self._posterior(x_start, x, t)
        return {
            "mean": mean,
            "variance": variance,
            "log_variance": log_variance,
            "pred_xstart": x_start,
        }

    def p_sample(self, model: Model, x: Tensor, t: Tensor) -> Tensor:
        """x_{t-1} by DDPM Algorithm 2, [N, C, ...]."""
        out = self.p_mean_variance(model, x, t)
        noise = torch.randn_like(x)
        sigma = torch.exp(0.5 * out["log_variance"])
        return out["mean"] + self._after_first(t, x) * sigma * noise

    def ddim_sample(self, model: Model, x: Tensor, t: Tensor, eta: float = 0.0) -> Tensor:
        """x_{t-1} by DDIM eq. 12, [N, C, ...]."""
        d = self.diffusion
        x_start = self.p_mean_variance(model, x, t)["pred_xstart"]
        eps = (self._of(d.sqrt_recip_alphas_cumprod, t, x) * x - x_start) / self._of(
            d.sqrt_recipm1_alphas_cumprod, t, x
        )
        alpha_bar = self._of(d.alphas_cumprod, t, x)
        alpha_bar_prev = self._of(d.alphas_cumprod_prev, t, x)
        sigma = (  # DDIM eq. 16
            eta
            * torch.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar))
            * torch.sqrt(1 - alpha_bar / alpha_bar_prev)
        )
        noise = torch.randn_like(x)
        mean = (
            x_start * torch.sqrt(alpha_bar_prev) + torch.sqrt(1 - alpha_bar_prev - sigma**2) * eps
        )
        return mean + self._after_first(t, x) * sigma * noise

    def dpmpp_2m_step(
        self, model: Model, x: Tensor, t: Tensor, t_next: Tensor | None, memory: list
    ) -> Tensor:
        """One step of DPM-Solver++ Algorithm 2, [N, C, ...]; to x_0 where ``t_next`` is None.

        :param memory: what the step before left, empty at first: its t and its estimate of x_0.
        """
        x_start = self.p_mean_variance(model, x, t)["pred_xstart"]
        if t_next is None:
            return x_start
        _, s, lam = self._levels(t, x)
        a_next, s_next, lam_next = self._levels(t_next, x)
        h = lam_next - lam
        estimate = x_start
        if memory:
            t_before, x_start_before = memory
            r = (lam - self._levels(t_before, x)[2]) / h
            estimate = (1 + 1 / (2 * r)) * x_start - 1 / (2 * r) * x_start_before
        memory[:] = [t, x_start]
        return s_next / s * x - a_next * torch.expm1(-h) * estimate

    def _levels(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """alpha, sigma and half the log-SNR lambda of DPM-Solver++, [N, 1, ...] each."""
        d, column = self.diffusion, (len(x), *[1] * (x.ndim - 1))
        a = look_up(d.sqrt_alphas_cumprod, t, column)
        s = look_up(d.sqrt_one_minus_alphas_cumprod, t, column)
        return a, s, torch.log(a) - torch.log(s)

    def _after_first(self, t: Tensor, x: Tensor) -> Tensor:
        """1 where t > 0, else 0, [N, 1, ...]: the last step adds no noise."""
        return (t != 0).float().view(-1, *[1] * (x.ndim - 1))

    @torch.no_grad()
    def sample(self, name: str, model: Model, x: Tensor, eta: float = 0.0) -> Tensor:
        """Samples by "ddpm", "ddim" or "dpmpp_2m" over all steps of the process, [N, C, ...].

        :param x: [N, C, ...] standard normal noise.
        """
        memory: list = []
        for i in reversed(range(self.diffusion.num_timesteps)):
            t = torch.tensor([i] * len(x), device=x.device)
            if name == "ddpm":
                x = self.p_sample(model, x, t)
            elif name == "ddim":
                x = self.ddim_sample(model, x, t, eta)
            else:
                t_next = torch.tensor([i - 1] * len(x), device=x.device) if i else None
                x = self.dpmpp_2m_step(model, x, t, t_next, memory)
        return x
