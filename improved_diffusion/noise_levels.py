"""Noise levels: discrete and continuous t, sigma and log-SNR, and which levels to sample at.

In the variance-exploding scaling x = x_start + sigma noise, a level is sigma = sqrt((1 - alpha_bar)
/ alpha_bar) and log-SNR = -2 log sigma (VDM, arXiv 2107.00630). A process knows its T levels;
between them log-SNR is linear in t. EDM: arXiv 2206.00364.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .errors import UserError
from .gaussian_diffusion import GaussianDiffusion
from .respace import SpacedDiffusion, original_alphas_cumprod
from .schedules import check_falling

SPACINGS = ("respacing", "leading", "linspace", "trailing", "karras", "log_snr")
KARRAS_RHO = 7.0  # EDM table 1
# Where no signal is left sigma is infinite: this stands for it, a share of 1e-8 of the variance
LARGEST_SIGMA = 1e4
HIGHEST_START = 80.0  # where karras and log_snr begin, EDM table 1: all above it is noise


class NoiseLevels:
    """The levels of a process, all of the process that the network was trained for.

    Numbers and arrays go in and float64 arrays of the same shape come out. Beyond the first and
    the last level t stays at 0 and T - 1.

    :param diffusion: a process; of a respaced one the original steps count.
    :raises ValueError: if the log-SNR does not fall from each step to the next.
    """

    def __init__(self, diffusion: GaussianDiffusion) -> None:
        alpha_bar = original_alphas_cumprod(diffusion)
        check_falling(alpha_bar)
        self.ends_without_signal = bool(alpha_bar[-1] == 0)
        self.log_snr = _log_snr(alpha_bar)
        self.num_timesteps = len(alpha_bar)
        self._timesteps = np.arange(self.num_timesteps, dtype=np.float64)
        # np.interp wants a rising axis, in one piece of memory
        self._rising_log_snr = self.log_snr[::-1].copy()
        self._falling_timesteps = self._timesteps[::-1].copy()
        self.sigma_min, self.sigma_max = self.sigma_of_t(np.array([0, self.num_timesteps - 1]))

    def log_snr_of_t(self, t: float | np.ndarray) -> np.ndarray:
        """Log-SNR at t in 0 ... T - 1, which may lie between steps."""
        return np.asarray(np.interp(t, self._timesteps, self.log_snr))

    def t_of_log_snr(self, log_snr: float | np.ndarray) -> np.ndarray:
        """The t, between steps as a rule, of a log-SNR."""
        return np.asarray(np.interp(log_snr, self._rising_log_snr, self._falling_timesteps))

    def sigma_of_t(self, t: float | np.ndarray) -> np.ndarray:
        """Sigma at t in 0 ... T - 1, which may lie between steps."""
        return np.asarray(np.exp(-0.5 * self.log_snr_of_t(t)))

    def t_of_sigma(self, sigma: float | np.ndarray) -> np.ndarray:
        """The t, between steps as a rule, of a sigma above 0."""
        return self.t_of_log_snr(-2 * np.log(sigma))


def _log_snr(alpha_bar: np.ndarray) -> np.ndarray:
    """log(alpha_bar / (1 - alpha_bar)), and a large finite noise where alpha_bar is 0."""
    with np.errstate(divide="ignore"):
        log_snr = np.log(alpha_bar) - np.log1p(-alpha_bar)
    if alpha_bar[-1] == 0:
        least = -2 * np.log(LARGEST_SIGMA)
        log_snr[-1] = min(least, *(log_snr[-2:-1] + 2 * np.log(0.1)), 0)
    return log_snr


def noise_levels(
    diffusion: GaussianDiffusion, steps: int, spacing: str, rho: float = KARRAS_RHO
) -> Tensor:
    """The levels of a sampling run.

    :param diffusion: the process; with spacing "respacing" its own kept steps are the levels, and
        ``steps`` is their number, or 0.
    :param steps: S, the number of steps, 1 ... T.
    :param spacing: "respacing"; timesteps "leading", "linspace" or "trailing" (arXiv 2305.08891
        table 2); "karras" (EDM eq. 5); or "log_snr", uniform in log-SNR (arXiv 2206.00927,
        "step size schedule"). The last two begin at sigma 80 if the process reaches as high, and,
        if it ends without signal, one step before, there.
    :param rho: the exponent of karras: the larger, the more levels of low noise.
    :return: float64 [S + 1] on the CPU, falling, the last one 0.
    :raises ValueError: for an unknown spacing, or steps out of range.
    """
    levels = NoiseLevels(diffusion)
    if spacing == "respacing":
        sigmas = _own_levels(diffusion, levels, steps)
    elif spacing in ("karras", "log_snr"):
        _check_steps(steps, levels.num_timesteps)
        before = [levels.sigma_max] if levels.ends_without_signal else []
        power = 1 / rho if spacing == "karras" else 0.0
        sigmas = np.append(before, _ramp(levels, steps - len(before), power))
    else:
        t = spaced_timesteps(levels.num_timesteps, steps, spacing)
        sigmas = levels.sigma_of_t(np.array(t[::-1]))
    return torch.from_numpy(np.append(sigmas, 0.0))


def _ramp(levels: NoiseLevels, count: int, power: float) -> np.ndarray:
    """Levels evenly spaced in a power of sigma, for power 0 in its logarithm; float64 [count]."""
    largest, smallest = min(levels.sigma_max, HIGHEST_START), levels.sigma_min
    share = np.linspace(0, 1, count)
    if not power:
        return largest * (smallest / largest) ** share
    return (largest**power + share * (smallest**power - largest**power)) ** (1 / power)  # EDM eq. 5


def _own_levels(diffusion: GaussianDiffusion, levels: NoiseLevels, steps: int) -> np.ndarray:
    kept = range(levels.num_timesteps)
    t = np.array(diffusion.timestep_map if isinstance(diffusion, SpacedDiffusion) else kept)
    if steps not in (0, len(t)):
        raise UserError(f"the process keeps {len(t)} steps, not {steps}: respace it to as many")
    return levels.sigma_of_t(t[::-1])


def spaced_timesteps(num_timesteps: int, steps: int, spacing: str) -> list[int]:
    """Timesteps evenly spaced in t: arXiv 2305.08891, table 2.

    :param num_timesteps: T.
    :param steps: how many to choose, 1 ... T.
    :param spacing: "leading" holds the first step, "trailing" the last, "linspace" both.
    :return: distinct timesteps, rising.
    :raises ValueError: for another spacing, or steps out of range.
    """
    _check_steps(steps, num_timesteps)
    i = np.arange(steps)
    if spacing == "leading":
        t = i * (num_timesteps // steps)
    elif spacing == "trailing":
        t = np.floor((i + 1) * num_timesteps / steps + 0.5) - 1
    elif spacing == "linspace":
        ramp = i / max(steps - 1, 1) if steps > 1 else np.ones(1)  # one step begins at the end
        t = np.floor(ramp * (num_timesteps - 1) + 0.5)
    else:
        raise UserError(f"unknown spacing '{spacing}'; choose one of {', '.join(SPACINGS)}")
    return [int(step) for step in t]


def _check_steps(steps: int, num_timesteps: int) -> None:
    if not 1 <= steps <= num_timesteps:
        raise UserError(
            f"--steps {steps}: must be in 1 ... {num_timesteps}, the diffusion steps of the process"
        )
