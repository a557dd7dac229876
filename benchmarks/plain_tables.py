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
    entries = torch.from_numpy(_writeable(table)).to(device=t.device)[t].float()
    while entries.ndim < len(shape):
        entries = entries[..., None]
    return entries.expand(shape)


_copies: dict[int, tuple[np.ndarray, np.ndarray]] = {}


def _writeable(table: np.ndarray) -> np.ndarray:
    """The table, or a copy made once: torch warns of sharing memory that must not be written to."""
    if table.flags.writeable:
        return table
    return _copies.setdefault(id(table), (table, table.copy()))[1]
