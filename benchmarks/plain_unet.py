"""The published architecture and training step in textbook operations, to measure against.

It stands for the original implementation: einsum attention with a float32 softmax, x * sigmoid(x),
GroupNorm between casts, AdamW and the averages one tensor at a time, tables copied from the host in
each step. The networks have the keys of ours, so that both can have the same weights.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from improved_diffusion.blocks import QKVAttention
from improved_diffusion.nn import GroupNorm32, SiLU


class PlainSiLU(nn.Module):
    """x * sigmoid(x), two operations."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class PlainGroupNorm(nn.GroupNorm):
    """Group normalisation between a cast to float32 and a cast back."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type(x.dtype)


class PlainAttention(nn.Module):
    """Attention by its formula, [B, 3 D, L] -> [B, D, L], with all weights in memory."""

    def forward(self, qkv: Tensor) -> Tensor:
        d = qkv.shape[1] // 3
        q, k, v = torch.split(qkv, d, dim=1)
        scale = 1 / math.sqrt(math.sqrt(d))  # on both sides: steadier in half precision
        weight = torch.einsum("bdt,bds->bts", q * scale, k * scale)
        weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
        return torch.einsum("bts,bds->bdt", weight, v)


def plain(model: nn.Module) -> nn.Module:
    """A copy of one of our networks, with the same weights, in textbook operations."""
    return _replaced(copy.deepcopy(model))


def _replaced(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        if isinstance(child, SiLU):
            setattr(module, name, PlainSiLU())
        elif isinstance(child, QKVAttention):
            setattr(module, name, PlainAttention())
        elif isinstance(child, GroupNorm32):
            own = PlainGroupNorm(child.num_groups, child.num_channels, child.eps)
            own.load_state_dict(child.state_dict())
            setattr(module, name, own)
        else:
            _replaced(child)
    return module
