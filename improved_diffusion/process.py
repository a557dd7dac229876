"""The diffusion process of the flags: what is predicted, the noise levels, the loss, the steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from . import gaussian_diffusion as gd
from .errors import UserError
from .flags import ImageSize, option, require_at_least
from .loss_weights import LOSS_WEIGHTS, NO_WEIGHT
from .predictions import PREDICTIONS, ModelMeanType, named_prediction
from .respace import SpacedDiffusion, space_timesteps
from .schedules import NAMED_SCHEDULES, betas_flag, read_betas, zero_terminal_snr

DEFAULT_SCHEDULE = "linear"
FLOW_SCHEDULE = "linear_path"


@dataclass(frozen=True)
class DiffusionOptions:
    """The options of the process, of which each kind of network has some more."""

    learn_sigma: bool = option(False, "learn the variance of each step beside its mean")
    sigma_small: bool = option(False, "fixed variance: the posterior's (beta-tilde), not beta")
    diffusion_steps: int = option(1000, "noising steps T of the process; not the training's length")
    noise_schedule: str = option(DEFAULT_SCHEDULE, f"{', '.join(NAMED_SCHEDULES)}")
    timestep_respacing: str = option(
        "", "steps to sample with: '250', 'ddim50', '10,15,20' per section; '' for all"
    )
    use_kl: bool = option(False, "train on the variational bound")
    predict_xstart: bool = option(False, "the network predicts the image, not the noise")
    rescale_timesteps: bool = option(True, "the network sees timesteps scaled to 0 ... 1000")
    rescale_learned_sigmas: bool = option(
        True, "with --learn_sigma: weigh the bound's term by T / 1000"
    )
    predict: str = option(
        "",
        f"what the network predicts: {', '.join(PREDICTIONS)} (the velocity of the linear path); "
        "'': as --predict_xstart says",
    )
    loss_weight: str = option(
        NO_WEIGHT, f"weight of each noise level in the loss: {', '.join(LOSS_WEIGHTS)}"
    )
    betas: str = option(
        "",
        "noise levels of your own instead of --noise_schedule: an .npy file, a text file with one "
        "number per line, or the numbers themselves",
        betas_flag,
    )
    zero_terminal_snr: bool = option(
        False, "rescale the noise levels so that the last leaves no signal; not with eps"
    )

    _size_flag: ClassVar[str]  # the option that holds the size of the images made

    def __post_init__(self) -> None:
        require_at_least(1, self, ["diffusion_steps"])

    def diffusion(self) -> SpacedDiffusion:
        """The diffusion process of these options."""
        return create_gaussian_diffusion(
            steps=self.diffusion_steps,
            learn_sigma=self.learn_sigma,
            sigma_small=self.sigma_small,
            noise_schedule=self.noise_schedule,
            use_kl=self.use_kl,
            predict_xstart=self.predict_xstart,
            rescale_timesteps=self.rescale_timesteps,
            rescale_learned_sigmas=self.rescale_learned_sigmas,
            timestep_respacing=self.timestep_respacing,
            predict=self.predict,
            loss_weight=self.loss_weight,
            betas=self.betas,
            zero_terminal_snr=self.zero_terminal_snr,
            image_size=getattr(self, self._size_flag),
        )


def create_gaussian_diffusion(
    *,
    steps: int = 1000,
    learn_sigma: bool = False,
    sigma_small: bool = False,
    noise_schedule: str = "linear",
    use_kl: bool = False,
    predict_xstart: bool = False,
    rescale_timesteps: bool = False,
    rescale_learned_sigmas: bool = False,
    timestep_respacing: str | Sequence[int] = "",
    predict: str = "",
    loss_weight: str = NO_WEIGHT,
    betas: str | Sequence[float] | np.ndarray = "",
    zero_terminal_snr: bool = False,
    image_size: ImageSize | None = None,
) -> SpacedDiffusion:
    """A diffusion process over all timesteps or a subset.

    :param steps: T of the process that the model is trained for.
    :param learn_sigma: the variance is learned, between beta-tilde and beta.
    :param sigma_small: the fixed variance is beta-tilde rather than beta.
    :param noise_schedule: a name for :func:`.schedules.get_named_beta_schedule`.
    :param use_kl: the loss is the variational bound.
    :param predict_xstart: the model predicts x_0 rather than the noise.
    :param rescale_timesteps: the model sees timesteps scaled to 0 ... 1000.
    :param rescale_learned_sigmas: the bound's term of the hybrid loss is weighed by T / 1000.
    :param timestep_respacing: see :func:`.respace.space_timesteps`; empty for all steps.
    :param predict: what the model predicts: "eps", "xstart", "v", or "flow", whose schedule is the
        linear path; empty for what ``predict_xstart`` says.
    :param loss_weight: one of :data:`.loss_weights.LOSS_WEIGHTS`.
    :param betas: numbers instead of a named schedule, see :func:`.schedules.read_betas`; empty for
        the named one.
    :param zero_terminal_snr: rescale the schedule to end without signal.
    :param image_size: in pixels, or (height, width), for the schedules that depend on it.
    :return: the process over the kept steps.
    :raises ValueError: for an unknown schedule, an impossible respacing, and arguments that
        contradict each other.
    """
    kind = named_prediction(prediction_name(predict, predict_xstart))
    levels = _betas(steps, noise_schedule, betas, zero_terminal_snr, kind, image_size)
    if use_kl:
        loss_type = gd.LossType.RESCALED_KL
    elif rescale_learned_sigmas:
        loss_type = gd.LossType.RESCALED_MSE
    else:
        loss_type = gd.LossType.MSE
    if learn_sigma:
        var_type = gd.ModelVarType.LEARNED_RANGE
    elif sigma_small:
        var_type = gd.ModelVarType.FIXED_SMALL
    else:
        var_type = gd.ModelVarType.FIXED_LARGE
    return SpacedDiffusion(
        use_timesteps=space_timesteps(steps, timestep_respacing or [steps]),
        betas=levels,
        model_mean_type=kind,
        model_var_type=var_type,
        loss_type=loss_type,
        rescale_timesteps=rescale_timesteps,
        loss_weight=loss_weight,
    )


def prediction_name(predict: str, predict_xstart: bool) -> str:
    """What the network predicts by the flags of both ages, "eps", "xstart", ...

    :raises ValueError: naming both flags, if they contradict each other.
    """
    if predict_xstart and predict not in ("", "xstart"):
        raise UserError(
            f"--predict {predict} contradicts --predict_xstart True: leave --predict_xstart out"
        )
    return predict or ("xstart" if predict_xstart else "eps")


def schedule_name(noise_schedule: str, kind: ModelMeanType) -> str:
    """The schedule by the flags: the flow's own where none is given.

    :raises ValueError: naming both flags, for a flow on another schedule.
    """
    if kind != ModelMeanType.FLOW:
        return noise_schedule
    if noise_schedule not in (DEFAULT_SCHEDULE, FLOW_SCHEDULE):
        raise UserError(
            f"--predict flow follows the linear path, not --noise_schedule {noise_schedule}: leave "
            "--noise_schedule out, or choose --predict v"
        )
    return FLOW_SCHEDULE


def _betas(
    steps: int,
    noise_schedule: str,
    betas: str | Sequence[float] | np.ndarray,
    zero_snr: bool,
    kind: ModelMeanType,
    image_size: ImageSize | None,
) -> np.ndarray:
    """The noise levels, float64 [T], of flags that do not contradict each other."""
    own = len(betas) > 0
    levels = read_betas(betas) if own else None
    for flag, given in (("--betas", own), ("--zero_terminal_snr True", zero_snr)):
        if given and kind == ModelMeanType.FLOW:
            raise UserError(
                f"--predict flow follows the linear path: leave {flag} out, or choose --predict v"
            )
    if own and noise_schedule != DEFAULT_SCHEDULE:
        raise UserError(
            f"--betas contradicts --noise_schedule {noise_schedule}: leave one of them out"
        )
    if levels is not None and len(levels) != steps:
        raise UserError(
            f"--betas holds {len(levels)} numbers, --diffusion_steps is {steps}: give "
            f"--diffusion_steps {len(levels)}, or {steps} numbers"
        )
    if levels is None:
        name = schedule_name(noise_schedule, kind)
        levels = gd.get_named_beta_schedule(name, steps, image_size)
    if zero_snr:
        levels = zero_terminal_snr(levels)
    if levels[-1] == 1 and kind == ModelMeanType.EPSILON:
        source = "--betas" if own else f"--noise_schedule {noise_schedule}"
        source = "--zero_terminal_snr True" if zero_snr else source
        raise UserError(
            f"{source} ends without signal, where a network that predicts eps cannot begin: choose "
            "--predict xstart or v, or flow, which has a schedule of its own"
        )
    return levels
