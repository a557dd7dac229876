"""Guidance: wrappers round a model that push its prediction towards a class, or away from errors.

A wrapper is called like the model, by any sampler. With x_t = sqrt(alpha_bar) x_start +
sqrt(1 - alpha_bar) eps every prediction is linear in eps at a given x_t, so that extrapolating it
extrapolates the score, whatever the network predicts.

Classifier guidance: arXiv 2105.05233. Classifier-free: arXiv 2207.12598, whose scale is w + 1.
Autoguidance: arXiv 2406.02507. Interval: arXiv 2404.07724. Rescaling: arXiv 2305.08891.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UserError
from .flags import numbers, option, require
from .gaussian_diffusion import GaussianDiffusion, Model
from .noise_levels import NoiseLevels
from .predictions import ModelMeanType, coefficients, path_scale
from .tables import on_host

CondFn = Callable[..., Tensor]
Interval = tuple[float, float]

OFF = 1.0  # the scale at which guidance changes nothing


@dataclass(frozen=True)
class GuidanceOptions:
    """How a model guides itself; see :func:`guided_model`."""

    guidance_scale: float = option(
        OFF,
        "follow the class more than the model does: 1 is off, 0 ignores the class; needs a model "
        "trained with --class_dropout, or --guide_path",
    )
    guidance_interval: str = option(
        "", "LOW,HIGH: guide at these noise levels sigma alone; '': at all levels"
    )
    guidance_rescale: float = option(
        0.0, "0 ... 1: how much of the contrast that guidance adds to take away again"
    )
    guide_path: str = option(
        "", "a weaker checkpoint to be guided away from, rather than from the model without a class"
    )

    def __post_init__(self) -> None:
        scale = self.guidance_scale
        require(0 <= scale < math.inf, "guidance_scale", scale, "at least 0; 1 is off")
        rescale = self.guidance_rescale
        require(0 <= rescale <= 1, "guidance_rescale", rescale, "in 0 ... 1")
        parse_interval(self.guidance_interval)
        for name in ("guidance_interval", "guidance_rescale", "guide_path"):
            if getattr(self, name) and scale == OFF:
                raise UserError(
                    f"--{name} {getattr(self, name)} needs --guidance_scale: at {OFF:g}, the "
                    "default, nothing is guided"
                )


def parse_interval(text: str) -> Interval | None:
    """Read a range of noise levels "LOW,HIGH"; None for an empty text.

    :raises ValueError: unless 0 <= LOW < HIGH; HIGH may be inf.
    """
    if not text:
        return None
    ends = numbers("guidance_interval", text, float)
    right = len(ends) == 2 and 0 <= ends[0] < ends[1]
    require(right, "guidance_interval", text, "LOW,HIGH with 0 <= LOW < HIGH, such as 0.3,5")
    return ends[0], ends[1]


def guided_model(
    model: Model,
    diffusion: GaussianDiffusion,
    options: GuidanceOptions,
    weak: Model | None = None,
) -> Model:
    """The model with the guidance that the options ask for; itself if they ask for none.

    :param model: a network; its ``null_class`` is the label that stands for no class, or None.
    :param diffusion: its process, respaced or not.
    :param weak: the model of ``guide_path``, on the same device.
    :raises ValueError: for classifier-free guidance of a model without a null class.
    """
    scale = options.guidance_scale
    if scale == OFF:
        return model
    how: dict[str, Any] = {
        "interval": parse_interval(options.guidance_interval),
        "rescale": options.guidance_rescale,
    }
    if weak is not None:
        if getattr(weak, "num_classes", None) is None and getattr(model, "num_classes", None):
            weak = Unlabelled(weak)  # without the class, as by a null class of its own
        return Autoguidance(model, weak, diffusion, scale, **how)
    if options.guide_path:
        raise ValueError(f"the model of guide_path {options.guide_path} must be given as weak")
    null_class = getattr(model, "null_class", None)
    if null_class is None:
        raise UserError(f"--guidance_scale {scale:g}: {_why_not(model)}")
    return ClassifierFree(model, diffusion, scale, null_class, **how)


def _why_not(model: Model) -> str:
    """Why a model without a null class cannot guide itself, and what to do."""
    if getattr(model, "num_classes", None) is None:
        return (
            "the model was trained without classes, so that there is none to follow: give a weaker "
            "checkpoint by --guide_path, or a classifier to classifier_sample.py"
        )
    return (
        "the model was trained without --class_dropout and knows no images without a class: train "
        "one with --class_dropout 0.1, or give a weaker checkpoint by --guide_path"
    )


class _Extrapolation(nn.Module):
    """What guidance by a second prediction shares; subclasses say which two there are.

    :param model: the model that is guided.
    :param diffusion: its process, respaced or not.
    :param scale: w in other + w (own - other): 1 changes nothing.
    :param interval: (low, high), noise levels sigma = sqrt((1 - alpha_bar) / alpha_bar) to guide
        at, low < sigma <= high; elsewhere the model is called alone. None: all levels.
    :param rescale: phi, 0 ... 1; of the guided prediction, which may be too far from its mean.
    """

    def __init__(
        self,
        model: Model,
        diffusion: GaussianDiffusion,
        scale: float,
        *,
        interval: Interval | None = None,
        rescale: float = 0.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.diffusion = diffusion
        self.scale = scale
        self.interval = interval
        self.rescale = rescale
        self._levels = NoiseLevels(diffusion) if interval else None

    def forward(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        """The guided prediction; a learned variance is the model's own, at scale 0 the other's.

        :param x: [N, C, ...] as the model sees it.
        :param t: [N] as the model sees them.
        :param kwargs: the model's arguments, such as ``y`` [N].
        :return: [N, C, ...], or [N, 2 C, ...] with a learned variance.
        """
        inside = self._inside(t)
        if self.scale == OFF or not inside.any():
            return self.model(x, t, **kwargs)
        own, other = self._predictions(x, t, kwargs)
        channels = x.shape[1]
        prediction = own[:, :channels]
        guided = other[:, :channels] + self.scale * (prediction - other[:, :channels])
        if self.rescale:
            guided = rescaled(guided, prediction, self.rescale)
        if not inside.all():
            where = torch.from_numpy(inside).to(x.device).view(-1, *[1] * (x.ndim - 1))
            guided = torch.where(where, guided, prediction)
        source = other if self.scale == 0 and other.shape == own.shape else own
        return torch.cat([guided, source[:, channels:]], dim=1)

    def _inside(self, t: Tensor) -> np.ndarray:
        """Whether each sample is to be guided, bool [N], or [1] where all are alike."""
        if self._levels is None or self.interval is None:
            return np.ones(1, dtype=bool)
        low, high = self.interval
        sigma = self._levels.sigma_of_t(_timesteps(t, self.diffusion, self._levels))
        return (low < sigma) & (sigma <= high)

    def _predictions(self, x: Tensor, t: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """What the model says, and what it is to be led away from."""
        raise NotImplementedError


class ClassifierFree(_Extrapolation):
    """Classifier-free guidance: without + scale (with - without the class), arXiv 2207.12598 eq. 6.

    Both predictions come from one call of the model with a batch of 2 N. The paper's w is
    ``scale`` - 1. The other arguments are those of :class:`Autoguidance`.

    :param model: called with labels ``y`` [N].
    :param null_class: the label that stands for no class.
    """

    def __init__(
        self,
        model: Model,
        diffusion: GaussianDiffusion,
        scale: float,
        null_class: int,
        *,
        interval: Interval | None = None,
        rescale: float = 0.0,
    ) -> None:
        super().__init__(model, diffusion, scale, interval=interval, rescale=rescale)
        self.null_class = null_class

    def _predictions(self, x: Tensor, t: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        if kwargs.get("y") is None:
            raise UserError("classifier-free guidance needs labels: give the model its y")
        both = {
            name: torch.cat([value, value]) if isinstance(value, Tensor) else value
            for name, value in kwargs.items()
        }
        y = kwargs["y"]
        both["y"] = torch.cat([y, torch.full_like(y, self.null_class)])  # [2 N]
        own, other = self.model(torch.cat([x, x]), torch.cat([t, t]), **both).chunk(2)
        return own, other


class Autoguidance(_Extrapolation):
    """Guidance by a weaker version of the model: weak + scale (model - weak), arXiv 2406.02507.

    The errors that both make, and the weak one makes more of, shrink; the class stays as it is.

    :param model: the model that is guided.
    :param weak: a model of the same data and process that is smaller or trained for a shorter
        time; its variance, if it learned one, is not used.
    :param diffusion: their process, respaced or not.
    :param scale: 1 changes nothing, 0 is the weak model's prediction.
    :param interval: (low, high), noise levels sigma = sqrt((1 - alpha_bar) / alpha_bar) to guide
        at, low < sigma <= high; elsewhere the model is called alone. None: all levels.
    :param rescale: phi of :func:`rescaled`; 0 leaves the guided prediction as it is.
    """

    def __init__(
        self,
        model: Model,
        weak: Model,
        diffusion: GaussianDiffusion,
        scale: float,
        *,
        interval: Interval | None = None,
        rescale: float = 0.0,
    ) -> None:
        super().__init__(model, diffusion, scale, interval=interval, rescale=rescale)
        self.weak = weak

    def _predictions(self, x: Tensor, t: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return self.model(x, t, **kwargs), self.weak(x, t, **kwargs)


def rescaled(guided: Tensor, prediction: Tensor, phi: float) -> Tensor:
    """Give a guided prediction the spread of the one that it came from: arXiv 2305.08891.

    :param guided: [N, C, ...].
    :param prediction: [N, C, ...] before guidance.
    :param phi: the share of the rescaled one in the result.
    :return: [N, C, ...].
    """
    axes = tuple(range(1, guided.ndim))  # of an image
    old, new = (y.std(dim=axes, keepdim=True, correction=0) for y in (prediction, guided))
    smallest = torch.finfo(guided.dtype).tiny  # an untrained network says 0 everywhere
    evened = guided * (old / new.clamp(min=smallest))  # arXiv 2305.08891 eq. 15
    return phi * evened + (1 - phi) * guided  # arXiv 2305.08891 eq. 16


class ClassifierGuidance(nn.Module):
    """A model led by the gradient of a classifier, for any sampler and prediction.

    The score form, arXiv 2105.05233 eq. 14: eps - sqrt(1 - alpha_bar) gradient, and for other
    predictions what follows from it at the same x_t. Where no signal is left x_t tells no class,
    and the model is left as it is.

    :param model: called with the same arguments as ``cond_fn``; see :class:`Unlabelled`.
    :param diffusion: its process, respaced or not.
    :param cond_fn: (x_t, t, **kwargs) -> [N, C, ...], a gradient with respect to x_t, such as
        :func:`classifier_gradient`; t as the model sees it.
    :raises ValueError: for a model of PREVIOUS_X, whose mean belongs to fixed steps.
    """

    def __init__(self, model: Model, diffusion: GaussianDiffusion, cond_fn: CondFn) -> None:
        super().__init__()
        coefficients(diffusion.model_mean_type, np.ones(1))  # refuses PREVIOUS_X
        self.model = model
        self.diffusion = diffusion
        self.cond_fn = cond_fn
        self._levels = NoiseLevels(diffusion)

    def forward(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        """The guided prediction; a learned variance is the model's own.

        :param x: [N, C, ...] as the model sees it.
        :param t: [N] as the model sees them.
        :param kwargs: for the model and for ``cond_fn``.
        :return: [N, C, ...], or [N, 2 C, ...] with a learned variance.
        """
        output = self.model(x, t, **kwargs)
        timesteps = _timesteps(t, self.diffusion, self._levels)
        alpha_bar = 1 / (1 + self._levels.sigma_of_t(timesteps) ** 2)
        kind, x_t = self.diffusion.model_mean_type, x
        if kind == ModelMeanType.FLOW:  # the model sees the linear path, the classifier does not
            x_t = x * _column(1 / path_scale(alpha_bar), x)
        gradient = self.cond_fn(x_t, t, **kwargs).to(output.dtype)
        weight = gradient_weight(kind, alpha_bar)
        if self._levels.ends_without_signal:
            last = self._levels.num_timesteps - 1
            weight = np.where(timesteps > last - 1e-3, 0.0, weight)  # float32 has rounded t
        channels = x.shape[1]
        guided = output[:, :channels] + _column(weight, output) * gradient
        return torch.cat([guided, output[:, channels:]], dim=1)


def gradient_weight(kind: ModelMeanType, alpha_bar: np.ndarray) -> np.ndarray:
    """What a gradient of log p(y | x_t) adds to a prediction at the same x_t, times the gradient.

    With y = p x_start + q eps, a = sqrt(alpha_bar) and s = sqrt(1 - alpha_bar): eps moves by -s,
    x_start by s^2 / a, and y by p s^2 / a - q s.

    :param alpha_bar: float64 [N], above 0.
    :return: float64 [N].
    """
    p, q = coefficients(kind, alpha_bar)
    a, s = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    return p * s**2 / a - q * s  # arXiv 2105.05233 eq. 14


def classifier_gradient(classifier: Model, scale: float = 1.0) -> CondFn:
    """The gradient of scale log p(y | x_t) with respect to x_t: arXiv 2105.05233.

    :param classifier: (x_t [N, C, ...], t [N]) -> logits [N, K], trained on noised images.
    :param scale: 1 for the class as the classifier sees it; more is surer and less varied.
    :return: ``cond_fn(x, t, y)`` -> [N, C, ...], also under ``torch.no_grad()``.
    """

    def cond_fn(x: Tensor, t: Tensor, y: Tensor | None = None, **_: Any) -> Tensor:
        if y is None:
            raise UserError("guidance by a classifier needs labels: give y")
        with torch.enable_grad():
            x_t = x.detach().requires_grad_(True)
            logits = classifier(x_t, t).to(x.dtype)  # of a classifier in float16 too
            log_p = F.log_softmax(logits, dim=-1)  # [N, K]
            chosen = log_p.gather(1, y.view(-1, 1)).sum()  # the samples do not touch each other
            return torch.autograd.grad(chosen, x_t)[0] * scale

    return cond_fn


class Unlabelled(nn.Module):
    """A model without classes that may be called with labels: they are for the classifier."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, **kwargs: Any) -> Tensor:
        """What the model says, without its labels."""
        return self.model(x, t, **kwargs)


def _timesteps(t: Tensor, diffusion: GaussianDiffusion, levels: NoiseLevels) -> np.ndarray:
    """The timesteps of the process of what the model sees, float64 [N], or [1] where all are alike.

    They may lie between steps. In the loops of the samplers nothing waits for the device here.
    """
    seen = on_host(t)
    return seen * (levels.num_timesteps / 1000.0) if diffusion.rescale_timesteps else seen


def _column(values: np.ndarray, like: Tensor) -> Tensor | float:
    """Numbers [N] to multiply a tensor [N, ...] with, in its type and place; [1] as a number."""
    if len(values) == 1:
        return float(values[0])
    return torch.from_numpy(values).to(like).view(-1, *[1] * (like.ndim - 1))
