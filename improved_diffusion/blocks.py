"""The blocks that the networks are made of: residual, attention, up and down.

IDDPM: arXiv 2102.09672, appendix A. Guided diffusion: arXiv 2105.05233, section 3. Attribute names
and the order of modules fix the keys of the state dict: published checkpoints load with
``strict=True``.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UserError
from .flags import ImageSize, height_width
from .nn import (
    HALVES,
    SiLU,
    avg_pool_nd,
    checkpoint,
    conv_nd,
    linear,
    normalization,
    zero_module,
)


class TimestepBlock(nn.Module):
    """A module whose forward takes a timestep embedding beside its input."""

    @abstractmethod
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Apply the module.

        :param x: [N, C, ...] features.
        :param emb: [N, E] timestep embedding.
        """


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    """A sequence that hands the timestep embedding to the children that take it."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, emb) if isinstance(layer, TimestepBlock) else layer(x)
        return x


class Upsample(nn.Module):
    """Double the spatial size by nearest neighbours; of 3-D signals the last two dimensions.

    :param channels: C of input and output.
    :param use_conv: follow with a 3-wide convolution.
    :param dims: 1, 2 or 3 spatial dimensions.
    """

    def __init__(self, channels: int, use_conv: bool, dims: int = 2) -> None:
        super().__init__()
        self.channels = channels
        self.use_conv = use_conv
        self.dims = dims
        if use_conv:
            self.conv = conv_nd(dims, channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == self.channels
        scale = (1.0, 2.0, 2.0) if self.dims == 3 else 2.0
        x = F.interpolate(x, scale_factor=scale, mode="nearest")  # [N, C, 2 H, 2 W]
        return self.conv(x) if self.use_conv else x


class Downsample(nn.Module):
    """Halve the spatial size; of 3-D signals the last two dimensions.

    :param channels: C of input and output.
    :param use_conv: by a strided convolution rather than average pooling.
    :param dims: 1, 2 or 3 spatial dimensions.
    """

    def __init__(self, channels: int, use_conv: bool, dims: int = 2) -> None:
        super().__init__()
        self.channels = channels
        self.use_conv = use_conv
        self.dims = dims
        stride = (1, 2, 2) if dims == 3 else 2
        if use_conv:
            self.op = conv_nd(dims, channels, channels, 3, stride=stride, padding=1)
        else:
            self.op = avg_pool_nd(dims, stride)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == self.channels
        return self.op(x)  # [N, C, H / 2, W / 2]


class ResBlock(TimestepBlock):
    """A residual block conditioned on the timestep.

    :param channels: C of the input.
    :param emb_channels: E of the timestep embedding.
    :param dropout: probability of dropping a feature.
    :param out_channels: D of the output; C if None.
    :param use_conv: where D differs from C, a 3-wide convolution on the skip path, not 1-wide.
    :param use_scale_shift_norm: the embedding scales and shifts the normalised features (IDDPM
        appendix A) rather than being added.
    :param dims: 1, 2 or 3 spatial dimensions.
    :param use_checkpoint: recompute activations in the backward pass.
    :param up: double the spatial size on both paths, before the first convolution (arXiv
        2105.05233, section 3, as in BigGAN).
    :param down: halve it there.
    """

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int | None = None,
        use_conv: bool = False,
        use_scale_shift_norm: bool = False,
        dims: int = 2,
        use_checkpoint: bool = False,
        up: bool = False,
        down: bool = False,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.emb_channels = emb_channels
        self.dropout = dropout
        self.out_channels = out_channels or channels
        self.use_conv = use_conv
        self.use_checkpoint = use_checkpoint
        self.use_scale_shift_norm = use_scale_shift_norm

        self.in_layers = nn.Sequential(
            normalization(channels),
            SiLU(),
            conv_nd(dims, channels, self.out_channels, 3, padding=1),
        )
        self.resample: nn.Module | None = None
        if up or down:  # without weights
            self.resample = (Upsample if up else Downsample)(channels, use_conv=False, dims=dims)
        self.emb_layers = nn.Sequential(
            SiLU(),
            linear(emb_channels, (2 if use_scale_shift_norm else 1) * self.out_channels),
        )
        self.out_layers = nn.Sequential(
            normalization(self.out_channels),
            SiLU(),
            nn.Dropout(p=dropout),
            zero_module(conv_nd(dims, self.out_channels, self.out_channels, 3, padding=1)),
        )
        self.skip_connection: nn.Module
        if self.out_channels == channels:
            self.skip_connection = nn.Identity()
        elif use_conv:
            self.skip_connection = conv_nd(dims, channels, self.out_channels, 3, padding=1)
        else:
            self.skip_connection = conv_nd(dims, channels, self.out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Apply the block.

        :param x: [N, C, ...] features.
        :param emb: [N, E] timestep embedding.
        :return: [N, D, ...] features, of twice or half the size with ``up`` or ``down``.
        """
        return checkpoint(self._forward, (x, emb), self.parameters(), self.use_checkpoint)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.resample is None:
            h = self.in_layers(x)  # [N, D, ...]
        else:
            norm_and_activate, convolve = self.in_layers[:-1], self.in_layers[-1]
            h = convolve(self.resample(norm_and_activate(x)))  # [N, D, 2 H or H / 2, ...]
            x = self.resample(x)
        emb_out = self.emb_layers(emb).type(h.dtype)  # [N, D] or [N, 2 D]
        emb_out = emb_out.view(*emb_out.shape, *[1] * (h.ndim - 2))
        if self.use_scale_shift_norm:
            norm, rest = self.out_layers[0], self.out_layers[1:]
            scale, shift = emb_out.chunk(2, dim=1)
            h = rest(norm(h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + emb_out)
        return self.skip_connection(x) + h


class AttentionBlock(nn.Module):
    """Self-attention over all spatial positions, with a residual connection.

    :param channels: C of input and output.
    :param num_heads: attention heads; must divide C.
    :param use_checkpoint: recompute activations in the backward pass.
    :param num_head_channels: channels of each head, which sets the number of heads; -1 for
        ``num_heads``.
    :param use_new_attention_order: the 3 C channels of queries, keys and values come as all
        queries, all keys, all values; else as those three of the first head, the second, ...
    :raises ValueError: unless the heads divide ``channels``.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        use_checkpoint: bool = False,
        num_head_channels: int = -1,
        use_new_attention_order: bool = False,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.num_heads = count_heads(channels, num_heads, num_head_channels)
        self.use_checkpoint = use_checkpoint
        self.use_new_attention_order = use_new_attention_order
        self.norm = normalization(channels)
        self.qkv = PointwiseConv1d(channels, 3 * channels)
        self.attention = QKVAttention(self.num_heads, use_new_attention_order)
        self.proj_out = zero_module(PointwiseConv1d(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block.

        :param x: [N, C, ...] features.
        :return: [N, C, ...] features.
        """
        return checkpoint(self._forward, (x,), self.parameters(), self.use_checkpoint)

    def _forward(self, x: Tensor) -> Tensor:
        n, c = x.shape[:2]
        qkv = self.qkv(self.norm(x.reshape(n, c, -1)))  # [N, 3 C, L]
        h = self.attention(qkv)  # [N, C, L]
        return x + self.proj_out(h).reshape(x.shape)  # no view: blocks may be sharded


class PointwiseConv1d(nn.Conv1d):
    """A 1-wide convolution as a product of matrices, which is what it is, and faster.

    The result's channels are neighbours in memory, as attention wants them.

    :param in_channels: C of the input.
    :param out_channels: D of the output.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer: [N, C, L] to [N, D, L]."""
        x = input.transpose(1, 2).contiguous()  # [N, L, C]
        return F.linear(x, self.weight.squeeze(2), self.bias).transpose(1, 2)


def split_heads(qkv: Tensor, num_heads: int, new_order: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values by head, with channels that are neighbours in memory.

    :param qkv: [N, 3 C, L].
    :param new_order: see :class:`AttentionBlock`.
    :return: q, k and v, [N, heads, L, C / heads] each.
    """
    qkv = qkv.transpose(1, 2)  # [N, L, 3 C]
    if qkv.stride(2) != 1:
        qkv = qkv.contiguous()  # as the fused kernels want it
    if new_order:
        q, k, v = qkv.unflatten(2, (3, num_heads, -1)).unbind(2)
    else:
        q, k, v = qkv.unflatten(2, (num_heads, 3, -1)).unbind(3)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def count_heads(
    channels: int, num_heads: int, num_head_channels: int = -1, flag: str = "num_heads"
) -> int:
    """How many heads attend at a level.

    :param num_head_channels: channels of each head; -1 for ``num_heads``.
    :param flag: what ``num_heads`` is called.
    :raises ValueError: unless they divide ``channels``, with the nearest that do.
    """
    value = num_heads
    if num_head_channels != -1:
        flag, value = "num_head_channels", num_head_channels
    if value < 1 or channels % value:
        legal = [n for n in range(1, channels + 1) if channels % n == 0]
        nearest = sorted(sorted(legal, key=lambda n: abs(n - value))[:2])
        raise UserError(
            f"{flag} {value} does not divide a level of {channels} channels; the nearest that "
            f"do are {' and '.join(map(str, nearest))}"
        )
    return num_heads if num_head_channels == -1 else channels // num_head_channels


class QKVAttention(nn.Module):
    """Scaled dot-product attention (arXiv 1706.03762, eq. 1) of packed queries, keys, values.

    :param num_heads: heads, each of which attends for itself.
    :param new_order: see :class:`AttentionBlock`.
    """

    def __init__(self, num_heads: int = 1, new_order: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.new_order = new_order

    def forward(self, qkv: Tensor) -> Tensor:
        """Attend.

        :param qkv: [N, 3 C, L]: C channels each of queries, keys and values.
        :return: [N, C, L].
        """
        q, k, v = split_heads(qkv, self.num_heads, self.new_order)  # [N, heads, L, D] each
        if q.dtype in HALVES and q.device.type == "cpu" and torch.is_grad_enabled():
            # the derivative of the kernel for halves is slower there than that for float32
            with torch.autocast("cpu", enabled=False):
                h = F.scaled_dot_product_attention(q.float(), k.float(), v.float()).type(q.dtype)
        else:
            h = F.scaled_dot_product_attention(q, k, v)
        return h.transpose(2, 3).flatten(1, 2)

    @staticmethod
    def count_flops(model: Any, _x: Any, y: Tensor | Sequence[Tensor]) -> None:
        """A counter for the ``thop`` package: adds the two matrix products to ``total_ops``.

        :param y: the output [N, C, L], alone or as the first of several.
        """
        output = y if isinstance(y, Tensor) else y[0]
        n, c, *spatial = output.shape
        model.total_ops += torch.DoubleTensor([2 * n * math.prod(spatial) ** 2 * c])


class AttentionPool2d(nn.Module):
    """A map of features to one vector: the mean position attends to all (CLIP, arXiv 2103.00020,
    section 2.4).

    :param spatial_size: the side of the map, or (H, W).
    :param channels: C of the map.
    :param num_head_channels: channels of each head.
    :param out_channels: D of the vector; C if None.
    """

    def __init__(
        self,
        spatial_size: ImageSize,
        channels: int,
        num_head_channels: int,
        out_channels: int | None = None,
    ) -> None:
        super().__init__()
        positions = math.prod(height_width(spatial_size))
        self.num_heads = count_heads(channels, -1, num_head_channels)
        self.positional_embedding = nn.Parameter(
            torch.randn(channels, positions + 1) / channels**0.5
        )
        self.qkv_proj = PointwiseConv1d(channels, 3 * channels)
        self.c_proj = PointwiseConv1d(channels, out_channels or channels)
        self.attention = QKVAttention(self.num_heads, new_order=True)

    def forward(self, x: Tensor) -> Tensor:
        """Pool.

        :param x: [N, C, H, W].
        :return: [N, D].
        """
        n, c = x.shape[:2]
        x = x.reshape(n, c, -1)
        x = torch.cat([x.mean(dim=-1, keepdim=True), x], dim=-1)  # [N, C, H W + 1]
        x = x + self.positional_embedding.to(x.dtype)
        h = self.attention(self.qkv_proj(x))
        return self.c_proj(h)[:, :, 0]
