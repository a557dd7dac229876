"""Looking up a table of the process as textbook code does: copied from the host in each lookup."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def look_up(table: np.ndarray, t: Tensor, shape: Sequence[int]) -> Tensor:
    """The entries of a table for a batch of timesteps.

    :param table: float64 [T], on the host.
    :param t: int64 [N] timesteps.
    :param shape: [N, ...], what to expand the entries to.
    :return: float32 of ``shape``, on the device of ``t``.
    """
    # a copy first, as torch warns of sharing memory that must not be written to
    entries = torch.from_numpy(np.array(table)).to(device=t.device)[t].float()
    while entries.ndim < len(shape):
        entries = entries[..., None]
    return entries.expand(shape)
