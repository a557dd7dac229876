"""Looking up per-timestep tables on a device, without a copy from the host in each step."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_on_device: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}


def read_only(table: np.ndarray) -> np.ndarray:
    """Make an array read-only, so that a copy of it on a device can be kept."""
    table.flags.writeable = False
    return table


def device_table(table: np.ndarray, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``table`` [T] on a device; the copy of a read-only array is kept while the array lives."""
    if table.flags.writeable:  # its values may change: copy each time
        return torch.tensor(table, dtype=dtype, device=device)
    key = (id(table), device, dtype)
    if key not in _on_device:
        with torch.inference_mode(False):  # also usable by later steps that need gradients
            _on_device[key] = torch.tensor(table, dtype=dtype, device=device)
        weakref.finalize(table, _on_device.pop, key, None)
    return _on_device[key]


def _extract_into_tensor(
    arr: np.ndarray, timesteps: Tensor, broadcast_shape: Sequence[int]
) -> Tensor:
    """Look up table entries for a batch of timesteps.

    :param arr: [T] table.
    :param timesteps: [N] indices.
    :param broadcast_shape: the shape [N, ...] to expand to.
    :return: float32 of ``broadcast_shape``, on the device of ``timesteps``.
    """
    values = device_table(arr, timesteps.device, torch.float32)[timesteps]
    return values.view(-1, *[1] * (len(broadcast_shape) - 1)).expand(broadcast_shape)
