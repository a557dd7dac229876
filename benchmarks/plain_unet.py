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

from improved_diffusion.blocks import AttentionBlock
from improved_diffusion.nn import GroupNorm32, SiLU


class PlainSiLU(nn.Module):
    """x * sigmoid(x), two operations."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class PlainGroupNorm(nn.GroupNorm):
    """Group normalisation between a cast to float32 and a cast back.

    :param layer: of which it is a copy.
    """

    def __init__(self, layer: GroupNorm32) -> None:
        super().__init__(layer.num_groups, layer.num_channels, layer.eps)
        self.load_state_dict(layer.state_dict())
        self.to(layer.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type(x.dtype)


class PlainAttention(nn.Module):
    """Self-attention by its formula, with all weights in memory; the keys of ours.

    :param block: of which it is a copy.
    """

    def __init__(self, block: AttentionBlock) -> None:
        super().__init__()
        if block.use_new_attention_order:
            raise ValueError("the plain rendering has the published order of attention alone")
        self.num_heads = block.num_heads
        self.norm = PlainGroupNorm(block.norm)
        self.qkv = plain_conv(block.qkv)
        self.proj_out = plain_conv(block.proj_out)

    def forward(self, x: Tensor) -> Tensor:
        n, c, *spatial = x.shape
        x = x.reshape(n, c, -1)
        qkv = self.qkv(self.norm(x)).reshape(n * self.num_heads, -1, x.shape[2])
        d = qkv.shape[1] // 3
        q, k, v = torch.split(qkv, d, dim=1)
        scale = 1 / math.sqrt(math.sqrt(d))  # on both sides: steadier in half precision
        weight = torch.einsum("bdt,bds->bts", q * scale, k * scale)
        weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
        h = torch.einsum("bts,bds->bdt", weight, v).reshape(n, c, -1)
        return (x + self.proj_out(h)).reshape(n, c, *spatial)


def plain_conv(layer: nn.Conv1d) -> nn.Conv1d:
    """The same 1-wide convolution as torch's own layer."""
    own = nn.Conv1d(layer.in_channels, layer.out_channels, 1)
    own.load_state_dict(layer.state_dict())
    return own.to(layer.weight.device)


def plain(model: nn.Module) -> nn.Module:
    """A copy of one of our networks, with the same weights, in textbook operations.

    :raises ValueError: for ``use_new_attention_order=True``.
    """
    return _replaced(copy.deepcopy(model))


def _replaced(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        if isinstance(child, SiLU):
            setattr(module, name, PlainSiLU())
        elif isinstance(child, AttentionBlock):
            setattr(module, name, PlainAttention(child))
        elif isinstance(child, GroupNorm32):
            setattr(module, name, PlainGroupNorm(child))
        else:
            _replaced(child)
    return module
