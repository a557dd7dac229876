"""Named noise schedules: how much noise each of T steps adds.

DDPM: arXiv 2006.11239. IDDPM: arXiv 2102.09672.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from .errors import UserError

LINEAR_MIN_STEPS = 21  # with fewer, the scaled beta_T = 20 / T reaches 1 and alpha_bar 0


def linear_betas(num_diffusion_timesteps: int) -> np.ndarray:
    """DDPM section 4's 1e-4 ... 0.02, scaled so that T steps add the noise that 1000 would.

    :return: float64 [T].
    :raises ValueError: for T < 21, where beta would reach 1.
    """
    if num_diffusion_timesteps < LINEAR_MIN_STEPS:
        raise UserError(
            f"noise schedule 'linear' needs at least {LINEAR_MIN_STEPS} diffusion steps, not "
            f"{num_diffusion_timesteps}; 'cosine' works with any number"
        )
    scale = 1000 / num_diffusion_timesteps
    return np.linspace(scale * 0.0001, scale * 0.02, num_diffusion_timesteps, dtype=np.float64)


def cosine_betas(num_diffusion_timesteps: int) -> np.ndarray:
    """alpha_bar falls as a squared cosine: IDDPM eq. 17 with s = 0.008. float64 [T]."""
    return betas_for_alpha_bar(
        num_diffusion_timesteps, lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    )


NAMED_SCHEDULES: dict[str, Callable[[int], np.ndarray]] = {
    "linear": linear_betas,
    "cosine": cosine_betas,
}


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> np.ndarray:
    """The betas of a schedule by name.

    :param schedule_name: a key of NAMED_SCHEDULES.
    :param num_diffusion_timesteps: T, the number of diffusion steps.
    :return: float64 [T].
    :raises ValueError: for an unknown name, T < 1, or a T too small for the schedule.
    """
    if schedule_name not in NAMED_SCHEDULES:
        raise UserError(
            f"unknown noise schedule '{schedule_name}'; choose one of {', '.join(NAMED_SCHEDULES)}"
        )
    if num_diffusion_timesteps < 1:
        raise UserError(f"diffusion steps must be at least 1, not {num_diffusion_timesteps}")
    return NAMED_SCHEDULES[schedule_name](num_diffusion_timesteps)


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999
) -> np.ndarray:
    """Betas whose cumulative product follows a given function of time.

    :param num_diffusion_timesteps: T.
    :param alpha_bar: the share of the signal's variance left at time t in [0, 1].
    :param max_beta: upper limit, below 1 so that the last steps stay finite (IDDPM section 3.2).
    :return: float64 [T], beta_i = 1 - alpha_bar((i + 1) / T) / alpha_bar(i / T).
    """
    steps = num_diffusion_timesteps
    betas = [1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps) for i in range(steps)]
    return np.minimum(np.array(betas, dtype=np.float64), max_beta)
