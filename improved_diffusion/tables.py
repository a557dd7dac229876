"""Looking up per-timestep tables on a device, without a copy to or from the host in each step."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_on_device: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}
_stacks: dict[tuple[tuple[int, ...], torch.device, int], Tensor] = {}


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


def look_up(timesteps: Tensor, like: Tensor, *tables: np.ndarray) -> tuple[Tensor, ...]:
    """Look up entries of several tables for a batch of timesteps, in one operation.

    :param timesteps: [N] indices.
    :param like: [N, C, ...] what the entries are to be multiplied with.
    :param tables: [T] each.
    :return: for each table its entries, float32 [N, 1, ...], on the device of ``timesteps``.
    """
    stack = _stack(tables, timesteps.device, like.ndim - 1)
    return stack[timesteps.reshape(-1)].unbind(1)


def _stack(tables: tuple[np.ndarray, ...], device: torch.device, ones: int) -> Tensor:
    """K tables as float32 [T, K, 1, ...], kept while they live if all of them are read-only."""
    key = (tuple(map(id, tables)), device, ones)
    locked = not any(table.flags.writeable for table in tables)
    if locked and key in _stacks:
        return _stacks[key]
    with torch.inference_mode(False):  # also usable by later steps that need gradients
        stack = torch.tensor(np.stack(tables, axis=1), dtype=torch.float32, device=device)
        stack = stack.view(*stack.shape, *[1] * ones)
    if locked:
        _stacks[key] = stack
        for table in tables:
            weakref.finalize(table, _stacks.pop, key, None)
    return stack


# -- what the host knows of timesteps on a device ----------------------------------------------

_NOTE = "_values_on_host"


def remember(timesteps: Tensor, values: np.ndarray) -> Tensor:
    """Note what a tensor holds, so that :func:`on_host` need not wait for its device to tell.

    The note holds until the tensor is changed in place. Inference tensors, of which that is not
    known, get none.

    :param timesteps: [N].
    :param values: its very values, [N], or [1] where all are alike.
    :return: ``timesteps``.
    """
    if not timesteps.is_inference():
        setattr(timesteps, _NOTE, (timesteps._version, values.astype(np.float64)))
    return timesteps


def on_host(timesteps: Tensor) -> np.ndarray:
    """The values of timesteps, float64 [N], or [1] where all are known to be alike."""
    values = _noted(timesteps)
    return timesteps.detach().cpu().double().numpy() if values is None else values


def scaled(timesteps: Tensor, scale: float) -> Tensor:
    """Timesteps times a number, float32, with the note that they carry."""
    values, product = _noted(timesteps), timesteps.float() * scale
    if values is None:
        return product
    return remember(product, values.astype(np.float32) * np.float32(scale))


def mapped(timesteps: Tensor, table: np.ndarray) -> Tensor:
    """The entries of an integer table [T] at timesteps, in their type, with the note they carry."""
    values = _noted(timesteps)
    entries = device_table(table, timesteps.device, timesteps.dtype)[timesteps]
    return entries if values is None else remember(entries, table[values.astype(int)])


def _noted(timesteps: Tensor) -> np.ndarray | None:
    version, values = getattr(timesteps, _NOTE, (None, None))
    if values is None or timesteps.is_inference() or timesteps._version != version:
        return None
    return values
