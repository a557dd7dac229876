"""How samples are drawn: the sampler, its steps and their spacing; seeded by index."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import dist_util
from .denoiser import Denoiser
from .errors import UserError
from .flags import option, require, require_at_least
from .gaussian_diffusion import GaussianDiffusion, Model
from .guidance import ClassifierGuidance, CondFn
from .noise_levels import (
    KARRAS_RHO,
    SPACINGS,
    NoiseLevels,
    noise_levels,
    spaced_timesteps,
)
from .predictions import ModelMeanType
from .respace import SpacedDiffusion, original_alphas_cumprod, respaced, space_timesteps
from .rng import randn, sample_generators
from .solvers import get_solver

log = logging.getLogger(__name__)

OF_THE_PROCESS = ("ddpm", "ddim")  # the process's own samplers, which take its timesteps alone
BY_TIMESTEP = ("respacing", "leading", "linspace", "trailing")

# How --steps are spaced unless --spacing says so. Trailing timesteps are some that the network was
# trained at; long memories and noise want steps that are even in log-SNR (docs/samplers.md).
DEFAULT_SPACING = {
    "ddpm": "respacing",
    "ddim": "respacing",
    "euler": "trailing",
    "heun": "trailing",
    "dpmpp_2m": "trailing",
    "dpmpp_3m": "log_snr",
    "dpmpp_2m_sde": "log_snr",
    "unipc": "trailing",
    "sde": "log_snr",
    "ancestral": "trailing",
    "ode": "",  # chooses its own steps
}
SAMPLERS = tuple(DEFAULT_SPACING)


@dataclass(frozen=True)
class SampleOptions:
    """How many samples to draw, and how."""

    clip_denoised: bool = option(True, "clamp each estimate of the image to the range of images")
    num_samples: int = option(10000, "how many images to make")
    batch_size: int = option(16, "images at a time and process; does not change the images")
    use_ddim: bool = option(False, "as --sampler ddim, rather than ddpm")
    model_path: str = option("", "checkpoint; its flags are read from the folder it lies in")
    sampler: str = option("", f"{', '.join(SAMPLERS)}; '': as --use_ddim says")
    steps: int = option(0, "steps to sample with; 0: those of --timestep_respacing")
    spacing: str = option(
        "", f"of --steps: {', '.join(SPACINGS)}; '': what suits the sampler; see docs/samplers.md"
    )
    rho: float = option(
        KARRAS_RHO, "with --spacing karras: the larger, the more of the steps at low noise"
    )
    churn: float = option(
        0.0, "with --sampler heun: noise to add and take away again over all steps (EDM's S_churn)"
    )
    stochasticity: float = option(
        1.0, "with --sampler sde: randomness from 0, none, to 1, the reverse SDE"
    )
    ode_tolerance: float = option(1e-4, "with --sampler ode: error to allow in a step")
    eta: float = option(0.0, "with --sampler ddim: randomness from 0, none, to 1, like DDPM")
    classes: str = option(
        "", "classes to make in turn: numbers or names such as '3,7', or 'all'; '': at random"
    )
    save_png: bool = option(
        False,
        "also write each image as a PNG file; with --value_range as 16-bit grey PNG or .npy",
    )
    use_fp16: bool = option(False, "compute in float16, as far as the network can")

    def __post_init__(self) -> None:
        require_at_least(1, self, ["num_samples", "batch_size"])
        require_at_least(0, self, ["churn"])
        require(self.steps >= 0, "steps", self.steps, "1 or more (0: as --timestep_respacing says)")
        for name, choices in (("sampler", SAMPLERS), ("spacing", SPACINGS)):
            value = getattr(self, name)
            require(value in ("", *choices), name, value, f"one of {', '.join(choices)}")
        for name in ("eta", "stochasticity"):
            value = getattr(self, name)
            require(0 <= value <= 1, name, value, "in [0, 1]")
        require(0 < self.rho < math.inf, "rho", self.rho, "above 0")
        tolerance = self.ode_tolerance
        require(1e-9 <= tolerance < 1, "ode_tolerance", tolerance, "in [1e-9, 1)")
        if self.use_ddim and self.sampler not in ("", "ddim"):
            raise UserError(
                f"--use_ddim True contradicts --sampler {self.sampler}: leave one of them out"
            )
        self._check_needs()
        self._check_spacing()

    def _check_needs(self) -> None:
        """Check that what belongs to one sampler is given with that sampler alone."""
        if self.eta and self.chosen != "ddim":
            raise UserError(
                f"--eta {self.eta} needs --use_ddim True or --sampler ddim: {self.chosen} has no "
                "eta"
            )
        owners = {"churn": (0.0, "heun"), "stochasticity": (1.0, "sde")}
        owners["ode_tolerance"] = (1e-4, "ode")
        for name, (default, owner) in owners.items():
            value = getattr(self, name)
            if value != default and self.chosen != owner:
                raise UserError(
                    f"--{name} {value} needs --sampler {owner}: {self.chosen} does not take it"
                )

    def _check_spacing(self) -> None:
        """Check that steps and spacing are what the sampler can take."""
        if self.steps and self.chosen == "ode":
            raise UserError(
                f"--steps {self.steps} contradicts --sampler ode, which chooses its own steps: "
                "give --ode_tolerance"
            )
        if self.spacing and not self.steps:
            raise UserError(f"--spacing {self.spacing} needs --steps: give the number of steps")
        if self.chosen in OF_THE_PROCESS and self.spacing not in ("", *BY_TIMESTEP):
            raise UserError(
                f"--spacing {self.spacing} contradicts --sampler {self.chosen}, which takes the "
                f"process's own timesteps: choose one of {', '.join(BY_TIMESTEP)}"
            )
        if self.rho != KARRAS_RHO and self.chosen_spacing != "karras":
            raise UserError(f"--rho {self.rho} needs --steps and --spacing karras")

    @property
    def chosen(self) -> str:
        """The name of the sampler."""
        return self.sampler or ("ddim" if self.use_ddim else "ddpm")

    @property
    def chosen_spacing(self) -> str:
        """How the steps are spaced; '' without ``steps``."""
        return (self.spacing or DEFAULT_SPACING[self.chosen]) if self.steps else ""

    def resolved(self) -> dict[str, Any]:
        """What was left to others to decide, as flags."""
        return {"sampler": self.chosen, "spacing": self.chosen_spacing}


def check_sampler(
    model: Model, diffusion: GaussianDiffusion, options: SampleOptions, respacing: str = ""
) -> None:
    """Check before sampling that the options can serve the model and its process.

    :param respacing: ``--timestep_respacing``, which ``diffusion`` has been made with.
    :raises ValueError: naming the flags, if they cannot.
    """
    if respacing and (options.steps or options.chosen == "ode"):
        other = f"--steps {options.steps}" if options.steps else "--sampler ode"
        raise UserError(
            f"{other} contradicts --timestep_respacing {respacing}: both choose the steps; leave "
            "one of them out ('' is no respacing)"
        )
    if options.steps:
        _respaced(diffusion, options.steps, "respacing")  # in 1 ... T ?
    _check_beginning(diffusion, options)
    if options.chosen in OF_THE_PROCESS:
        return
    if diffusion.model_mean_type == ModelMeanType.PREVIOUS_X:
        raise UserError(
            f"--sampler {options.chosen} cannot serve a model that predicts PREVIOUS_X: choose "
            f"one of {', '.join(OF_THE_PROCESS)}"
        )
    try:
        Denoiser(model, diffusion)
    except UserError as error:
        raise UserError(f"--sampler {options.chosen}: {error}") from None


def _check_beginning(diffusion: GaussianDiffusion, options: SampleOptions) -> None:
    """Warn of steps that begin where some signal is left, if the process ends without."""
    levels = NoiseLevels(diffusion)
    first = float(sampling_levels(diffusion, options)[0])
    if levels.ends_without_signal and first < 0.999 * levels.sigma_max:
        log.warning(
            "the steps leave out the last one of the process, at which no signal is left: images "
            "come out greyer; choose --spacing trailing, or a respacing that holds it"
        )


def describe_sampler(diffusion: GaussianDiffusion, options: SampleOptions) -> str:
    """The sampler and its steps, in words."""
    if options.chosen == "ode":
        return f"sampler ode, steps to a tolerance of {options.ode_tolerance:g}"
    steps = options.steps or diffusion.num_timesteps
    spacing = f", spaced by {options.chosen_spacing}" if options.steps else ""
    return f"sampler {options.chosen}, {steps} of {_all_steps(diffusion)} steps{spacing}"


def draw_samples(
    model: Model,
    diffusion: GaussianDiffusion,
    indices: Sequence[int],
    image_shape: Sequence[int],
    options: SampleOptions,
    seed: int,
    model_kwargs: dict[str, Any],
    cond_fn: CondFn | None = None,
) -> Tensor:
    """Draw the samples of the given indices; each depends on its index and the seed alone.

    :param diffusion: the process; its own steps are taken unless the options say how many.
    :param image_shape: (C, H, W).
    :param model_kwargs: for the model, with N = len(indices) rows each; ``cond_fn`` gets them too.
    :param cond_fn: a gradient to follow, see :class:`.ClassifierGuidance`: by the mean of ddpm's
        steps, by the score of those of all other samplers.
    :return: float32 [N, C, H, W], mostly in [-1, 1].
    """
    if options.chosen == "ode" and len(indices) > 1:
        # one at a time: its steps grow the rounding that a network does in another batch
        alone = [
            {name: value[row : row + 1] for name, value in model_kwargs.items()}
            for row in range(len(indices))
        ]
        rows = [
            draw_samples(model, diffusion, [index], image_shape, options, seed, own, cond_fn)
            for index, own in zip(indices, alone, strict=True)
        ]
        return torch.cat(rows)
    shape = (len(indices), *image_shape)
    generators = sample_generators(seed, indices)
    if options.chosen not in OF_THE_PROCESS:
        if cond_fn is not None:
            model = ClassifierGuidance(model, diffusion, cond_fn)
        return _solve(model, diffusion, shape, options, generators, model_kwargs)
    if options.steps:
        diffusion = _respaced(diffusion, options.steps, options.chosen_spacing)
    arguments: dict[str, Any] = {
        "clip_denoised": options.clip_denoised,
        "model_kwargs": model_kwargs,
        "device": dist_util.dev(),
        "generator": generators,
        "cond_fn": cond_fn,
    }
    if options.chosen == "ddim":
        return diffusion.ddim_sample_loop(model, shape, eta=options.eta, **arguments)
    return diffusion.p_sample_loop(model, shape, **arguments)


def _solve(
    model: Model,
    diffusion: GaussianDiffusion,
    shape: Sequence[int],
    options: SampleOptions,
    generators: list[torch.Generator],
    model_kwargs: dict[str, Any],
) -> Tensor:
    """Draw samples [N, C, H, W] by one of the solvers."""
    denoise = Denoiser(model, diffusion, model_kwargs, clip_denoised=options.clip_denoised)
    sigmas = sampling_levels(diffusion, options)
    own: dict[str, dict[str, Any]] = {
        # no churn before the first step: it would go above the highest level of the process
        "heun": {"s_churn": options.churn, "s_tmax": float(sigmas[1])},
        "sde": {"stochasticity": options.stochasticity},
        "ancestral": {"posterior": denoise.posterior},  # the checkpoint's variance
        "ode": {"tolerance": options.ode_tolerance},
    }
    with torch.no_grad():
        noise = randn(shape, generators, dist_util.dev())
        x = denoise.initial(noise, float(sigmas[0]))
        return get_solver(options.chosen)(
            denoise, x, sigmas, generator=generators, **own.get(options.chosen, {})
        )


def sampling_levels(diffusion: GaussianDiffusion, options: SampleOptions) -> Tensor:
    """The noise levels that a solver goes through.

    :return: float64 [S + 1] on the CPU, falling, the last one 0.
    :raises ValueError: if the process has fewer steps.
    """
    if options.chosen_spacing in ("", "respacing"):
        if options.steps:
            diffusion = _respaced(diffusion, options.steps, "respacing")
        return noise_levels(diffusion, 0, "respacing")
    return noise_levels(diffusion, options.steps, options.chosen_spacing, options.rho)


def _all_steps(diffusion: GaussianDiffusion) -> int:
    """T of the process that the model was trained for."""
    return len(original_alphas_cumprod(diffusion))


def _respaced(diffusion: GaussianDiffusion, steps: int, spacing: str) -> SpacedDiffusion:
    """The process over some of the timesteps that its model was trained for.

    :param steps: how many.
    :param spacing: one of BY_TIMESTEP.
    :raises ValueError: unless steps are in 1 ... T.
    """
    total = _all_steps(diffusion)
    if spacing != "respacing":
        return respaced(diffusion, spaced_timesteps(total, steps, spacing))
    require(1 <= steps <= total, "steps", steps, f"in 1 ... {total}, the steps of the process")
    return respaced(diffusion, space_timesteps(total, str(steps)))
