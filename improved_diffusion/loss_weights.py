"""How much each noise level counts in the training loss, by its signal-to-noise ratio.

A weight w(SNR) is one of the squared error of x_start. Divided by the prediction's loss factor it
is the weight of the prediction's own squared error: so the same name is the same objective,
whatever the network predicts. Here every weight is w = SNR u(SNR), so that u is the weight of the
squared error of eps, which stays exact where no signal is left.

SNR, truncated SNR: arXiv 2202.00512, section 4. min-SNR: arXiv 2303.09556. P2: arXiv 2204.00227.
EDM: arXiv 2206.00364. Sigmoid: arXiv 2303.00848, 2410.19324.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .errors import UserError
from .predictions import PREDICTIONS, ModelMeanType, loss_factor

MIN_SNR_GAMMA = 5.0
P2_K, P2_GAMMA = 1.0, 1.0
SIGMA_DATA = 0.5
SIGMOID_BIAS = -1.0  # the papers tune it to the images; lower for larger ones

# u(SNR), the weight of the squared error of eps: w(SNR) / SNR
_EPS_WEIGHTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "min_snr": lambda snr: np.minimum(1, MIN_SNR_GAMMA / snr),  # w = min(SNR, gamma)
    "snr": np.ones_like,  # w = SNR
    "truncated_snr": lambda snr: np.maximum(1, 1 / snr),  # w = max(SNR, 1)
    "p2": lambda snr: (P2_K + snr) ** -P2_GAMMA,  # w = SNR / (k + SNR)^gamma
    "edm": lambda snr: 1 + 1 / (SIGMA_DATA**2 * snr),  # w = SNR + 1 / sigma_data^2, table 1
    # w = SNR sigmoid(b - log SNR) = SNR / (1 + SNR e^-b)
    "sigmoid": lambda snr: 1 / (1 + snr * np.exp(-SIGMOID_BIAS)),
}
NO_WEIGHT = "none"
LOSS_WEIGHTS = (NO_WEIGHT, *_EPS_WEIGHTS)

_LEAST_ALPHA_BAR = 1e-200  # stands for 0: limits are reached, and infinities stay beyond float32
_NAMES = {kind: name for name, kind in PREDICTIONS.items()}


def loss_weight_table(
    name: str, kind: ModelMeanType, alpha_bar: np.ndarray, posterior_mean_coef1: np.ndarray
) -> np.ndarray:
    """The weights of a prediction's squared error.

    :param name: one of LOSS_WEIGHTS but "none".
    :param kind: what the network predicts.
    :param alpha_bar: float64 [T] shares of the data's variance.
    :param posterior_mean_coef1: float64 [T], the derivative of PREVIOUS_X by x_start at fixed x_t.
    :return: float64 [T].
    :raises ValueError: for an unknown weight, and for one that is infinite somewhere or zero
        everywhere for this prediction, naming those that are not.
    """
    check_loss_weight(name)
    table = _table(name, kind, alpha_bar, posterior_mean_coef1)
    if not _usable(table):
        fitting = [
            other
            for other in _EPS_WEIGHTS
            if _usable(_table(other, kind, alpha_bar, posterior_mean_coef1))
        ]
        wrong = "zero everywhere" if (table <= 1).all() else "infinite somewhere"
        raise UserError(
            f"--loss_weight {name} is {wrong} for a network that predicts "
            f"{_NAMES.get(kind, kind.name)} with this noise schedule: choose one of "
            f"{', '.join([NO_WEIGHT, *fitting])}"
        )
    return table


def check_loss_weight(name: str) -> None:
    """Refuse the name of no weight.

    :raises ValueError: naming those there are.
    """
    if name not in LOSS_WEIGHTS:
        raise UserError(f"--loss_weight {name}: choose one of {', '.join(LOSS_WEIGHTS)}")


def _table(
    name: str, kind: ModelMeanType, alpha_bar: np.ndarray, posterior_mean_coef1: np.ndarray
) -> np.ndarray:
    alpha_bar = np.maximum(alpha_bar, _LEAST_ALPHA_BAR)
    with np.errstate(divide="ignore", invalid="ignore"):  # where no noise is left
        snr = alpha_bar / (1 - alpha_bar)
        if kind == ModelMeanType.PREVIOUS_X:
            factor = posterior_mean_coef1**2
        else:
            factor = loss_factor(kind, alpha_bar)
        return _EPS_WEIGHTS[name](snr) * snr / factor


def _usable(table: np.ndarray) -> bool:
    """Whether a table is finite in float32, in which it is used, and not zero there everywhere."""
    least, most = np.finfo(np.float32).tiny, np.finfo(np.float32).max
    return bool((table <= most).all() and (table >= least).any())
