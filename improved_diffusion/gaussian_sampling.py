"""Sampling by the process's own steps: DDPM and DDIM, led by a gradient or not.

DDPM: arXiv 2006.11239. DDIM: arXiv 2010.02502. Guidance by a classifier: arXiv 2105.05233.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .gaussian_process import Denoised, GaussianProcess, Model, ModelKwargs
from .rng import Generator, randn, randn_like
from .tables import look_up, remember

CondFn = Callable[..., Tensor] | None


class GaussianSampling(GaussianProcess):
    """The steps and loops of DDPM and DDIM; see :class:`.GaussianDiffusion`."""

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

        Where no signal is left x_t tells no class: the mean stays.

        :param cond_fn: (x_t, t, **model_kwargs) -> [N, C, ...], the gradient of log p(y | x_t) with
            respect to x_t; t as the model sees it.
        :param p_mean_var: from :meth:`p_mean_variance` for the same ``x`` and ``t``.
        :return: [N, C, ...].
        """
        gradient = cond_fn(x, self._scale_timesteps(t), **(model_kwargs or {}))
        gradient = torch.where(self._without_signal(t, x), 0, gradient.float())
        return p_mean_var["mean"].float() + p_mean_var["variance"] * gradient

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
        (sigma,) = look_up(t, x, self.sqrt_one_minus_alphas_cumprod)
        old = p_mean_var["pred_xstart"]
        eps = self._predict_eps_from_xstart(x, t, old) - sigma * gradient
        guided = self._predict_xstart_from_eps(x, t, eps)
        guided = torch.where(self._without_signal(t, x), old, guided)
        mean, _, _ = self.q_posterior_mean_variance(x_start=guided, x_t=x, t=t)
        return {**p_mean_var, "pred_xstart": guided, "mean": mean}

    def _without_signal(self, t: Tensor, x: Tensor) -> Tensor:
        """Where alpha_bar is 0, bool [N, 1, ...] for x [N, C, ...]."""
        return look_up(t, x, self.alphas_cumprod)[0] == 0

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
        noise = randn_like(x, generator) * _nonzero_mask(t, x)
        if cond_fn is not None:
            out["mean"] = self.condition_mean(cond_fn, out, x, t, model_kwargs=model_kwargs)
        sigma = torch.exp(0.5 * out["log_variance"])
        sample = out["mean"] + sigma * noise
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
        :param generator: a torch.Generator, or one per sample; None for torch's global one. With
            eta = 0, which needs no noise, the global one moves on, as ever, but no other.
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
        alpha_bar, alpha_bar_prev = look_up(t, x, self.alphas_cumprod, self.alphas_cumprod_prev)
        if eta == 0:
            if generator is None:
                torch.randn_like(x)  # the global generator moves on alike for every eta
            mean = pred_xstart * torch.sqrt(alpha_bar_prev)
            sample = mean + torch.sqrt(1 - alpha_bar_prev) * eps
            return {"sample": sample, "pred_xstart": pred_xstart}
        sigma = (  # DDIM eq. 16
            eta
            * torch.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar))
            * torch.sqrt(1 - alpha_bar / alpha_bar_prev)
        )
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
        (alpha_bar_next,) = look_up(t, x, self.alphas_cumprod_next)
        mean = pred_xstart * torch.sqrt(alpha_bar_next)
        sample = mean + torch.sqrt(1 - alpha_bar_next) * eps
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
            t = remember(torch.full((shape[0],), i, device=device), np.array([float(i)]))  # [N]
            with torch.no_grad():
                out = step(x, t)
            yield out
            x = out["sample"]


def _nonzero_mask(t: Tensor, like: Tensor) -> Tensor:
    """1 where t > 0 and 0 where t = 0, as [N, 1, ...]: the last step adds no noise."""
    return (t != 0).to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def _given(**optional: Any) -> dict[str, Any]:
    """The arguments that are not None: subclasses that override a step without them still work."""
    return {name: value for name, value in optional.items() if value is not None}


def _last(steps: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
    return deque(steps, maxlen=1)[0]
