"""Averages of the weights whose length is chosen after training: EDM2 (arXiv 2312.02696).

The average over T updates weighs the weights after update t by the power-function profile

    p(t) = (gamma + 1) t^gamma / T^(gamma + 1),  0 <= t <= T,

whose relative width is sigma_rel, its standard deviation divided by T (section 3.1). Training
keeps such averages of two or more widths and stores them now and then. The average of any other
width is a weighted sum of what was stored, as its profile is nearly a sum of theirs (section 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from . import dist_util
from .errors import UserError
from .flags import numbers, require

MAX_SIGMA_REL = 12**-0.5  # that of gamma = 0, the plain mean of all weights so far
CUTOFF = 1e-12  # share of the trace of A: eigenvalues below it are taken for rounding errors


# -- one average ------------------------------------------------------------------------------


def gamma_of(sigma_rel: float) -> float:
    """The exponent of the profile of a relative width.

    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), a cubic equation in gamma. For the
    widths allowed all three roots are real, and the largest is the only positive one.

    :raises ValueError: unless 0 < sigma_rel < 1 / sqrt(12).
    """
    if not 0 < sigma_rel < MAX_SIGMA_REL:
        raise UserError(f"sigma_rel {sigma_rel} must be above 0 and below {MAX_SIGMA_REL:.4f}")
    s = sigma_rel  # in terms of s gamma, which stays near 1, no coefficient can overflow
    roots = np.roots([1, 7 * s, 16 * s**2 - 1, 12 * s**3 - s])
    return float(roots.real.max()) / s


def sigma_rel_of(gamma: float) -> float:
    """The relative width of the profile of an exponent; the inverse of :func:`gamma_of`."""
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def power_rate(updates: int, gamma: float) -> float:
    """The rate beta of an update: average = beta average + (1 - beta) weights.

    The average is then exactly that of the weights held constant between updates: the weights
    after update t weigh the integral of p from t - 1 to t.

    :param updates: the number of updates so far with this one; at the first, beta is 0, so that
        the initial weights, before any update, leave no trace.
    """
    assert updates >= 1
    return (1 - 1 / updates) ** (gamma + 1)


def parse_sigma_rels(text: str, flag: str = "posthoc_ema") -> list[float]:
    """Read relative widths separated by commas; an empty text is an empty list.

    :raises ValueError: naming the flag, if a width is out of range or given twice.
    """
    widths = numbers(flag, text, float)
    for width in widths:
        require(0 < width < MAX_SIGMA_REL, flag, text, f"above 0 and below {MAX_SIGMA_REL:.4f}")
    require(len(set(widths)) == len(widths), flag, text, "widths that differ")
    return widths


# -- one from many ----------------------------------------------------------------------------


def profile_product(
    updates_a: npt.ArrayLike,
    gamma_a: npt.ArrayLike,
    updates_b: npt.ArrayLike,
    gamma_b: npt.ArrayLike,
) -> np.ndarray:
    """Inner products of pairs of profiles, the integral of p_a p_b (appendix C).

    The arguments are broadcast against each other. Only powers of ratios in [0, 1] are formed, so
    that nothing overflows.

    :return: float64, per update.
    """
    t_a, gamma_a, t_b, gamma_b = (
        np.asarray(value, np.float64) for value in (updates_a, gamma_a, updates_b, gamma_b)
    )
    t = np.minimum(t_a, t_b)  # where the shorter profile ends
    height = (gamma_a + 1) / (gamma_a + gamma_b + 1) * (gamma_b + 1) / np.maximum(t_a, t_b)
    return height * (t / t_a) ** gamma_a * (t / t_b) ** gamma_b


def _products(
    updates: Sequence[int], gammas: Sequence[float], target_updates: int, target_gamma: float
) -> tuple[np.ndarray, np.ndarray]:
    """A [K, K], of the stored profiles, and b [K], with the target's; time in target_updates."""
    t, gamma = np.array(updates, np.float64) / target_updates, np.array(gammas, np.float64)
    A = profile_product(t[:, None], gamma[:, None], t, gamma)
    return A, profile_product(t, gamma, 1, target_gamma)


def solve_weights(
    updates: Sequence[int], gammas: Sequence[float], target_updates: int, target_gamma: float
) -> np.ndarray:
    """The weights with which stored averages sum up to the one nearest to a target's profile.

    Least squares with the A and b of the paper (section 3.2). Differs from the paper: the weights
    sum to 1, as profiles do. Otherwise the network's weights, which change little by now compared
    with their size, would come out scaled, by up to tens of percent where snapshots are few.

    Starts from the stored profile nearest to the target and looks for the smallest correction, in
    multiples of the others' differences to it. The sum then is 1 by construction, a target that
    was stored is returned alone, and directions in which many snapshots hardly differ, where A is
    near-singular, are left at 0 instead of filled with rounding errors.

    :param updates: [K] numbers of updates of the stored averages, at least 1.
    :param gammas: [K] their exponents.
    :return: [K] float64.
    """
    assert len(updates) == len(gammas) > 0
    A, b = _products(updates, gammas, target_updates, target_gamma)
    k = int(np.argmin(A.diagonal() - 2 * b))  # nearest: |p_i - p|^2 = A_ii - 2 b_i + |p|^2
    # <p_i - p_k, p_j - p_k> and <p_i - p_k, p - p_k>, in units of the sizes of p_i and p_j
    size = np.sqrt(A.diagonal())
    differences = (A - A[:, [k]] - A[[k]] + A[k, k]) / (size[:, None] * size)
    right = (b - A[:, k] - b[k] + A[k, k]) / size
    values, vectors = np.linalg.eigh(differences)
    kept = values > CUTOFF * len(b)  # A / (size size) has the trace K
    weights = vectors[:, kept] @ (vectors[:, kept].T @ right / values[kept]) / size
    weights[k] = 0
    weights[k] = 1 - weights.sum()
    return weights


def relative_error(
    weights: npt.ArrayLike,
    updates: Sequence[int],
    gammas: Sequence[float],
    target_updates: int,
    target_gamma: float,
) -> float:
    """The distance of a weighted sum of profiles to the target's, divided by the target's size.

    The size of a profile is the root of its integrated square. Errors below 1e-7 are rounding.

    :param weights: [K], such as those of :func:`solve_weights`; the rest as there.
    """
    A, b = _products(updates, gammas, target_updates, target_gamma)
    x = np.asarray(weights, np.float64)
    square = float(profile_product(1, target_gamma, 1, target_gamma))
    return math.sqrt(max(0.0, float(x @ A @ x - 2 * x @ b) + square) / square)


# -- stored averages --------------------------------------------------------------------------


@dataclass(frozen=True)
class Snapshot:
    """A stored average, without its weights."""

    path: str
    updates: int  # that it averages over
    sigma_rel: float

    @property
    def gamma(self) -> float:
        return gamma_of(self.sigma_rel)


def load_snapshot(path: str) -> dict[str, Any]:
    """What training stored: {"updates": int, "sigma_rel": float, "weights": state dict}.

    :raises ValueError: if the file is damaged or holds something else; or its weights are not
        finite, as no average with them would be.
    """
    content = dist_util.load_state_dict(path, map_location="cpu")
    if not _is_snapshot(content):
        raise UserError(
            f"'{path}' is no snapshot of --posthoc_ema, which holds updates, sigma_rel and weights"
        )
    if not all(value.isfinite().all() for value in content["weights"].values()):
        raise UserError(f"'{path}' holds non-finite weights: its training diverged; move it away")
    return content


def _is_snapshot(content: Any) -> bool:
    if not isinstance(content, dict):
        return False
    updates, sigma_rel, weights = map(content.get, ("updates", "sigma_rel", "weights"))
    return (
        isinstance(updates, int)
        and updates >= 0
        and isinstance(sigma_rel, float)
        and 0 < sigma_rel < MAX_SIGMA_REL
        and isinstance(weights, dict)
        and all(isinstance(value, Tensor) for value in weights.values())
    )


def read_snapshots(paths: Iterable[str]) -> list[Snapshot]:
    """What is stored in files, of which one at a time is in memory.

    :return: sorted by updates, then width; those of 0 updates average nothing and are left out.
    :raises ValueError: for a file that :func:`load_snapshot` refuses, and for two files of
        different networks.
    """
    snapshots: list[Snapshot] = []
    first: tuple[str, dict[str, torch.Size]] | None = None
    for path in paths:
        content = load_snapshot(path)
        shapes = {key: value.shape for key, value in content["weights"].items()}
        first = first or (path, shapes)
        if shapes != first[1]:
            _refuse_to_mix(*first, path, shapes)
        if content["updates"]:
            snapshots.append(Snapshot(path, content["updates"], content["sigma_rel"]))
    return sorted(snapshots, key=lambda snapshot: (snapshot.updates, snapshot.sigma_rel))


def _refuse_to_mix(
    path_a: str, a: dict[str, torch.Size], path_b: str, b: dict[str, torch.Size]
) -> None:
    wrong = sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))
    raise UserError(
        f"'{path_a}' and '{path_b}' are of different networks: {len(wrong)} keys are on one side "
        f"only or of another shape, such as {', '.join(wrong[:3])}; move one network's files away"
    )


def reconstruct(
    snapshots: Sequence[Snapshot], target_updates: int, target_gamma: float
) -> dict[str, Tensor]:
    """The state dict of the average of any length, as nearly as the stored ones can tell it.

    :func:`relative_error` tells how nearly that is. See :func:`weighted_sum` for the tensors.
    """
    updates, gammas = [s.updates for s in snapshots], [s.gamma for s in snapshots]
    return weighted_sum(snapshots, solve_weights(updates, gammas, target_updates, target_gamma))


def weighted_sum(snapshots: Sequence[Snapshot], weights: npt.ArrayLike) -> dict[str, Tensor]:
    """The sum of the stored averages, each times its weight [K].

    Reads one file at a time, so that memory does not grow with their number, and none whose weight
    is 0. Sums in float64: terms of both signs may be many times larger than their sum.

    :return: a state dict of the dtypes stored; tensors that are not floating-point, such as
        counters, are those of the last snapshot.
    """
    state: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    for snapshot, weight in zip(snapshots, np.asarray(weights).tolist(), strict=True):
        if weight == 0:
            continue
        state = load_snapshot(snapshot.path)["weights"]
        for key, value in state.items():
            if value.is_floating_point():
                sums[key] = sums.get(key, 0) + weight * value.double()
    return {key: sums[key].to(state[key].dtype) if key in sums else state[key] for key in state}
