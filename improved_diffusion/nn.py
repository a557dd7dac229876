"""Building blocks of the networks that are not networks themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from .errors import UserError
from .losses import mean_flat

__all__ = [
    "GroupNorm32",
    "SiLU",
    "avg_pool_nd",
    "checkpoint",
    "conv_nd",
    "linear",
    "mean_flat",
    "normalization",
    "scale_module",
    "timestep_embedding",
    "update_ema",
    "zero_module",
]

NUM_GROUPS = 32
HALVES = (torch.bfloat16, torch.float16)


class SiLU(nn.Module):
    """x * sigmoid(x) (arXiv 1702.03118)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x)


class GroupNorm32(nn.GroupNorm):
    """Group normalisation computed in float32 and returned in the type of its input.

    The statistics of a half-precision tensor would overflow or lose digits.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (None if p is None else p.float() for p in (self.weight, self.bias))
        # the kernel for CPUs takes halves beside float32 weights, and computes in float32
        ready = x if x.dtype in HALVES and x.device.type == "cpu" else x.float()
        return F.group_norm(ready, self.num_groups, weight, bias, self.eps).type(x.dtype)


def conv_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """A 1-D, 2-D or 3-D convolution; the other arguments are those of :class:`nn.Conv2d`."""
    return _by_dims((nn.Conv1d, nn.Conv2d, nn.Conv3d), dims)(*args, **kwargs)


def avg_pool_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """1-D, 2-D or 3-D average pooling; the other arguments are those of :class:`nn.AvgPool2d`."""
    return _by_dims((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), dims)(*args, **kwargs)


def _by_dims(classes: Sequence[type[nn.Module]], dims: int) -> type[nn.Module]:
    if dims not in (1, 2, 3):
        raise ValueError(f"unsupported number of spatial dimensions: {dims}; choose 1, 2 or 3")
    return classes[dims - 1]


def linear(*args: Any, **kwargs: Any) -> nn.Linear:
    """A fully connected layer; the arguments of :class:`nn.Linear`."""
    return nn.Linear(*args, **kwargs)


@torch.no_grad()
def update_ema(
    target_params: Iterable[Tensor], source_params: Iterable[Tensor], rate: float = 0.99
) -> None:
    """Move the targets in place: target <- rate * target + (1 - rate) * source.

    :param rate: in [0, 1]; nearer to 1 is slower.
    """
    targets, sources = list(target_params), list(source_params)
    if targets:
        torch._foreach_mul_(targets, rate)
        torch._foreach_add_(targets, sources, alpha=1 - rate)


def zero_module(module: nn.Module) -> nn.Module:
    """Set a module's parameters to zero, in place, and return it."""
    return scale_module(module, 0.0)


def scale_module(module: nn.Module, scale: float) -> nn.Module:
    """Multiply a module's parameters by ``scale``, in place, and return it."""
    for parameter in module.parameters():
        parameter.detach().mul_(scale)
    return module


def normalization(channels: int) -> nn.Module:
    """The networks' normalisation layer: 32 groups.

    :raises ValueError: unless 32 divides ``channels``.
    """
    if channels % NUM_GROUPS:
        lower = channels // NUM_GROUPS * NUM_GROUPS
        nearest = f"{lower} or {lower + NUM_GROUPS}" if lower else str(NUM_GROUPS)
        raise UserError(
            f"num_channels times channel_mult gives a level of {channels} channels, which is no "
            f"multiple of the {NUM_GROUPS} groups of the normalisation; the nearest are {nearest}"
        )
    return GroupNorm32(NUM_GROUPS, channels)


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000) -> Tensor:
    """Sinusoidal embedding of timesteps (arXiv 1706.03762, section 3.5).

    :param timesteps: [N], integer or fractional.
    :param dim: number of embedding channels; an odd one ends in a zero column.
    :param max_period: the longest wavelength is 2 pi times this.
    :return: float32 [N, dim]: cosines, then sines.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    frequencies = torch.exp(-math.log(max_period) * exponents)  # [half]
    angles = timesteps[:, None].float() * frequencies[None]  # [N, half]
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(embedding, (0, dim % 2))


def checkpoint(
    func: Callable[..., Any], inputs: Sequence[Any], params: Iterable[Tensor], flag: bool
) -> Any:
    """Call ``func(*inputs)``, recomputing its activations in the backward pass if ``flag``.

    Trades time for memory (arXiv 1604.06174). Random numbers such as dropout's are replayed, and
    DistributedDataParallel's hooks work.

    :param params: what ``func`` depends on besides its inputs; found without being told.
    """
    if flag and torch.is_grad_enabled():
        return torch.utils.checkpoint.checkpoint(func, *inputs, use_reentrant=False)
    return func(*inputs)
