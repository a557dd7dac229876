"""What a network predicts, and how one prediction becomes another.

With a = sqrt(alpha_bar) and s = sqrt(1 - alpha_bar), x_t = a x_start + s eps (DDPM eq. 4). Every
prediction y = p x_start + q eps is another coordinate of the same plane, so that one pair (p, q)
per kind says all there is to know: how to train on it, and how x_start and eps come back.

DDPM: arXiv 2006.11239. v: progressive distillation, arXiv 2202.00512. Flow matching on the linear
path: arXiv 2209.03003, 2210.02747. Loss weights across predictions: arXiv 2303.09556.
"""

from __future__ import annotations

import enum

import numpy as np

from .errors import UserError


class ModelMeanType(enum.Enum):
    """What the network predicts."""

    PREVIOUS_X = enum.auto()  # the mean of x_{t-1}
    START_X = enum.auto()  # x_0
    EPSILON = enum.auto()  # the noise
    V = enum.auto()  # sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0
    FLOW = enum.auto()  # eps - x_0, the velocity of the linear path; the network sees that path


PREDICTIONS = {
    "eps": ModelMeanType.EPSILON,
    "xstart": ModelMeanType.START_X,
    "v": ModelMeanType.V,
    "flow": ModelMeanType.FLOW,
}


def named_prediction(name: str) -> ModelMeanType:
    """A prediction by name.

    :raises ValueError: for an unknown one, naming those there are.
    """
    if name not in PREDICTIONS:
        raise UserError(f"--predict {name}: choose one of {', '.join(PREDICTIONS)}")
    return PREDICTIONS[name]


def coefficients(kind: ModelMeanType, alpha_bar: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """p and q of the prediction y = p x_start + q eps.

    :param kind: any but PREVIOUS_X, whose mean depends on the step that is taken.
    :param alpha_bar: float64 [T] shares of the data's variance.
    :return: p and q, float64 [T].
    :raises ValueError: for PREVIOUS_X.
    """
    a, s = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    zeros, ones = np.zeros_like(a), np.ones_like(a)
    pairs = {
        ModelMeanType.EPSILON: (zeros, ones),
        ModelMeanType.START_X: (ones, zeros),
        ModelMeanType.V: (-s, a),  # arXiv 2202.00512, section 4
        ModelMeanType.FLOW: (-ones, ones),  # arXiv 2209.03003, eq. 1
    }
    if kind not in pairs:
        raise UserError(
            f"a network that predicts {kind.name} has no view but at the process's own steps: "
            f"choose one that predicts {', '.join(PREDICTIONS)}"
        )
    return pairs[kind]


def to_x_start(kind: ModelMeanType, alpha_bar: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The weights of x_t and of the prediction y in x_start = (q x_t - s y) / (q a - p s).

    :return: float64 [T] each; infinite where x_t and y together do not tell x_start: eps at
        alpha_bar = 0.
    """
    p, q, a, s = (*coefficients(kind, alpha_bar), np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar))
    with np.errstate(divide="ignore"):
        return q / (q * a - p * s), -s / (q * a - p * s)


def loss_factor(kind: ModelMeanType, alpha_bar: np.ndarray) -> np.ndarray:
    """The squared error of a prediction, for a squared error of 1 in x_start at the same x_t.

    With eps = (x_t - a x_start) / s, dy/dx_start = p - q a / s. In terms of the signal-to-noise
    ratio SNR = (a / s)^2: SNR for eps, 1 for x_start, SNR + 1 for v, (sqrt(SNR) + 1)^2 for flow.

    :return: float64 [T].
    """
    p, q = coefficients(kind, alpha_bar)
    return (p - q * np.sqrt(alpha_bar / (1 - alpha_bar))) ** 2


def path_scale(alpha_bar: np.ndarray) -> np.ndarray:
    """1 / (a + s): times x_t it is x_tau = (1 - tau) x_start + tau eps, with tau = s / (a + s)."""
    return 1 / (np.sqrt(alpha_bar) + np.sqrt(1 - alpha_bar))
