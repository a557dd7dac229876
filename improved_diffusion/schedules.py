"""Named noise schedules, and those that a user brings: how much noise each of T steps adds.

DDPM: arXiv 2006.11239. IDDPM: arXiv 2102.09672.
"""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable, Sequence

import numpy as np

from .errors import UserError
from .flags import ImageSize, height_width

LINEAR_MIN_STEPS = 21  # with fewer, the scaled beta_T = 20 / T reaches 1 and alpha_bar 0
SCALED_LINEAR_MIN_STEPS = 13  # likewise, beta_T = 12 / T
SHIFT_BASE_SIZE = 64  # pixels: images of this size get the cosine schedule unshifted
SIGMOID_START, SIGMOID_END = -3.0, 3.0


def linear_betas(num_diffusion_timesteps: int) -> np.ndarray:
    """DDPM section 4's 1e-4 ... 0.02, scaled so that T steps add the noise that 1000 would.

    :return: float64 [T].
    :raises ValueError: for T < 21, where beta would reach 1.
    """
    _check_length("linear", num_diffusion_timesteps, LINEAR_MIN_STEPS)
    scale = 1000 / num_diffusion_timesteps
    return np.linspace(scale * 0.0001, scale * 0.02, num_diffusion_timesteps, dtype=np.float64)


def scaled_linear_betas(num_diffusion_timesteps: int) -> np.ndarray:
    """Linear in the root of beta: latent diffusion's 0.00085 ... 0.012 (arXiv 2112.10752), scaled.

    :return: float64 [T].
    :raises ValueError: for T < 13, where beta would reach 1.
    """
    _check_length("scaled_linear", num_diffusion_timesteps, SCALED_LINEAR_MIN_STEPS)
    roots = np.linspace(0.00085**0.5, 0.012**0.5, num_diffusion_timesteps, dtype=np.float64)
    return 1000 / num_diffusion_timesteps * roots**2


def _check_length(name: str, num_diffusion_timesteps: int, least: int) -> None:
    if num_diffusion_timesteps < least:
        raise UserError(
            f"noise schedule '{name}' needs at least {least} diffusion steps, not "
            f"{num_diffusion_timesteps}; 'cosine' works with any number"
        )


def cosine_betas(num_diffusion_timesteps: int) -> np.ndarray:
    """alpha_bar falls as a squared cosine: IDDPM eq. 17 with s = 0.008. float64 [T]."""
    return betas_for_alpha_bar(num_diffusion_timesteps, _squared_cosine)


def _squared_cosine(t: float) -> float:
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


def cosine_shifted_betas(num_diffusion_timesteps: int, image_size: ImageSize | None) -> np.ndarray:
    """The cosine schedule with 2 log(64 / d) added to its log-SNR: arXiv 2301.11093, section 3.1.

    Large images need more noise to lose their coarse features. For d = 64 it is ``cosine``.

    :param image_size: d in pixels; of (height, width), the geometric mean.
    :return: float64 [T].
    :raises ValueError: without an image size.
    """
    if image_size is None:
        raise UserError("noise schedule 'cosine_shifted' needs the argument image_size, in pixels")
    height, width = height_width(image_size)
    ratio = SHIFT_BASE_SIZE**2 / (height * width)  # of the SNRs: (64 / d)^2

    def alpha_bar(t: float) -> float:
        kept = _squared_cosine(t) / _squared_cosine(0)
        return ratio * kept / (ratio * kept + 1 - kept)

    return betas_for_alpha_bar(num_diffusion_timesteps, alpha_bar)


def sigmoid_betas(num_diffusion_timesteps: int) -> np.ndarray:
    """alpha_bar falls as a sigmoid from -3 to 3, tau = 1: arXiv 2212.11972.

    Written out in arXiv 2301.10972, algorithm 1.

    Differs from the paper: the last beta, not alpha_bar, is limited.

    :return: float64 [T].
    """
    first, last = (1 / (1 + math.exp(-x)) for x in (SIGMOID_START, SIGMOID_END))

    def alpha_bar(t: float) -> float:
        x = SIGMOID_START + t * (SIGMOID_END - SIGMOID_START)
        return (last - 1 / (1 + math.exp(-x))) / (last - first)

    return betas_for_alpha_bar(num_diffusion_timesteps, alpha_bar)


def linear_path_betas(num_diffusion_timesteps: int) -> np.ndarray:
    """The linear path of flow matching, (1 - tau) x_start + tau eps at tau = (t + 1) / T.

    Divided by its norm it is x_t, with alpha_bar = (1 - tau)^2 / ((1 - tau)^2 + tau^2), which ends
    at 0. arXiv 2210.02747, example II.

    :return: float64 [T], the last one 1.
    """
    tau = np.arange(1, num_diffusion_timesteps + 1) / num_diffusion_timesteps
    return _betas_of((1 - tau) ** 2 / ((1 - tau) ** 2 + tau**2))


NAMED_SCHEDULES: dict[str, Callable[..., np.ndarray]] = {
    "linear": linear_betas,
    "cosine": cosine_betas,
    "sigmoid": sigmoid_betas,
    "cosine_shifted": cosine_shifted_betas,
    "scaled_linear": scaled_linear_betas,
    "linear_path": linear_path_betas,
}
BY_IMAGE_SIZE = ("cosine_shifted",)


def get_named_beta_schedule(
    schedule_name: str, num_diffusion_timesteps: int, image_size: ImageSize | None = None
) -> np.ndarray:
    """The betas of a schedule by name.

    :param schedule_name: a key of NAMED_SCHEDULES.
    :param num_diffusion_timesteps: T, the number of diffusion steps.
    :param image_size: in pixels, or (height, width); for the schedules of BY_IMAGE_SIZE.
    :return: float64 [T].
    :raises ValueError: for an unknown name, T < 1, a T too small for the schedule, or a missing
        image size.
    """
    if schedule_name not in NAMED_SCHEDULES:
        raise UserError(
            f"unknown noise schedule '{schedule_name}'; choose one of {', '.join(NAMED_SCHEDULES)}"
        )
    if num_diffusion_timesteps < 1:
        raise UserError(f"diffusion steps must be at least 1, not {num_diffusion_timesteps}")
    if schedule_name in BY_IMAGE_SIZE:
        return NAMED_SCHEDULES[schedule_name](num_diffusion_timesteps, image_size)
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


def _betas_of(alpha_bar: np.ndarray) -> np.ndarray:
    """The betas whose cumulative product is ``alpha_bar`` [T], above 0 until the last."""
    return 1 - alpha_bar / np.append(1.0, alpha_bar[:-1])


def zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Rescale a schedule so that its last step leaves no signal: arXiv 2305.08891, algorithm 1.

    sqrt(alpha_bar) is shifted and scaled: its last value becomes 0 and the first one stays.

    :param betas: float64 [T].
    :return: float64 [T], the last one exactly 1.
    :raises ValueError: for T = 1, whose first value cannot stay.
    """
    if len(betas) < 2:
        raise UserError("--zero_terminal_snr True needs at least 2 diffusion steps, not 1")
    root = np.sqrt(np.cumprod(1.0 - np.asarray(betas, dtype=np.float64)))
    return _betas_of(((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2)


def check_falling(alpha_bar: np.ndarray) -> None:
    """Check that every step adds noise.

    :param alpha_bar: float64 [T] shares of the data's variance.
    :raises ValueError: naming the first step after which as much signal is left as before.
    """
    rising = np.flatnonzero(np.diff(alpha_bar, prepend=1.0) >= 0)
    if len(rising):
        raise UserError(
            f"the schedule's log-SNR does not fall at step {rising[0]} of {len(alpha_bar)}: every "
            "beta must be above 0 and only the last may be 1, as in the named schedules"
        )


# -- a user's own betas -----------------------------------------------------------------------


def read_betas(source: str | Sequence[float] | np.ndarray) -> np.ndarray:
    """A user's betas, checked.

    :param source: the numbers; or a text of them, separated by commas or white space; or the path
        of a file of such a text, or of an .npy file.
    :return: float64 [T].
    :raises ValueError: naming ``--betas`` and what is wrong: no such file, no numbers, a number
        outside (0, 1], a log-SNR that does not fall.
    """
    betas = _load_betas(source) if isinstance(source, str) else np.array(source, dtype=np.float64)
    shown = f"--betas {shorten(source) if isinstance(source, str) else shorten(betas_text(betas))}"
    if betas.ndim != 1 or not len(betas):
        raise UserError(f"{shown}: must be a list of numbers, not of shape {list(betas.shape)}")
    outside = np.flatnonzero(~((betas > 0) & (betas <= 1)))  # NaN too
    if len(outside):
        first = outside[0]
        raise UserError(f"{shown}: number {first} (from 0) is {betas[first]}: must be in (0, 1]")
    try:
        check_falling(np.cumprod(1 - betas))
    except UserError as error:
        raise UserError(f"{shown}: {error}") from None
    return betas


def _load_betas(source: str) -> np.ndarray:
    betas = _numbers(source)
    if betas is not None:
        return betas
    if not os.path.isfile(source):
        raise UserError(
            f"--betas {shorten(source)}: no such file, and no list of numbers: name an .npy file, "
            "or a text file with one number per line"
        )
    try:
        if source.endswith(".npy"):
            return np.load(source, allow_pickle=False).astype(np.float64)
        with open(source, encoding="utf-8") as file:
            betas = _numbers(file.read())
    except (OSError, ValueError, EOFError, TypeError) as error:  # of a file that is no such array
        raise UserError(f"--betas {source} cannot be read: {error}") from None
    if betas is None:
        raise UserError(f"--betas {source}: must hold numbers, one per line or between commas")
    return betas


def _numbers(text: str) -> np.ndarray | None:
    """The numbers of a text, float64 [T]; None if it holds something else, or nothing."""
    try:
        values = [float(word) for word in re.split(r"[,\s]+", text.strip(", \t\r\n"))]
    except ValueError:
        return None
    return np.array(values, dtype=np.float64)


def betas_text(betas: np.ndarray) -> str:
    """Betas as a text from which :func:`read_betas` makes exactly the same numbers."""
    return ",".join(repr(float(beta)) for beta in betas)


def betas_flag(text: str) -> str:
    """Read ``--betas``: the numbers as a text, which travels where a file does not.

    The name of a file that does not exist stays, as a run that goes on has its numbers already.

    :raises argparse.ArgumentTypeError: for what else :func:`read_betas` refuses.
    """
    if not text or is_absent_file(text):
        return text
    try:
        return betas_text(read_betas(text))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("--betas ")) from None


def is_absent_file(text: str) -> bool:
    """Whether ``--betas`` holds neither numbers nor the name of a file that exists."""
    return bool(text) and _numbers(text) is None and not os.path.isfile(text)


def shorten(text: str, most: int = 60) -> str:
    """A long list for a message: its beginning and how many entries there are."""
    if len(text) <= most or "," not in text:
        return text
    return f"{text[: most // 2].rpartition(',')[0]},... ({text.count(',') + 1} in all)"
