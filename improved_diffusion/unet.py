"""The U-Net of IDDPM (arXiv 2102.09672, appendix A) and its super-resolution variant.

Attribute names and the order of modules fix the keys of the state dict: published checkpoints
load with ``strict=True``.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UserError
from .fp16_util import convert_module_to_f16, convert_module_to_f32
from .nn import (
    SiLU,
    avg_pool_nd,
    checkpoint,
    conv_nd,
    linear,
    normalization,
    timestep_embedding,
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
        :return: [N, D, ...] features.
        """
        return checkpoint(self._forward, (x, emb), self.parameters(), self.use_checkpoint)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x)  # [N, D, ...]
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
    :raises ValueError: unless ``num_heads`` divides ``channels``.
    """

    def __init__(self, channels: int, num_heads: int = 1, use_checkpoint: bool = False) -> None:
        super().__init__()
        _check_heads("num_heads", num_heads, channels)
        self.channels = channels
        self.num_heads = num_heads
        self.use_checkpoint = use_checkpoint
        self.norm = normalization(channels)
        self.qkv = conv_nd(1, channels, 3 * channels, 1)
        self.attention = QKVAttention()
        self.proj_out = zero_module(conv_nd(1, channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block.

        :param x: [N, C, ...] features.
        :return: [N, C, ...] features.
        """
        return checkpoint(self._forward, (x,), self.parameters(), self.use_checkpoint)

    def _forward(self, x: Tensor) -> Tensor:
        n, c = x.shape[:2]
        qkv = self.qkv(self.norm(x.reshape(n, c, -1)))  # [N, 3 C, L]
        qkv = qkv.reshape(n * self.num_heads, -1, qkv.shape[2])  # [N heads, 3 C / heads, L]
        h = self.attention(qkv).reshape(n, c, -1)  # [N, C, L]
        return x + self.proj_out(h).reshape(x.shape)  # no view: blocks may be sharded


def _check_heads(flag: str, num_heads: int, channels: int) -> None:
    if num_heads < 1 or channels % num_heads:
        legal = [n for n in range(1, channels + 1) if channels % n == 0]
        nearest = sorted(sorted(legal, key=lambda n: abs(n - num_heads))[:2])
        raise UserError(
            f"{flag} {num_heads} does not divide a level of {channels} channels; the nearest that "
            f"do are {' and '.join(map(str, nearest))}"
        )


class QKVAttention(nn.Module):
    """Scaled dot-product attention (arXiv 1706.03762, eq. 1) of packed queries, keys, values."""

    def forward(self, qkv: Tensor) -> Tensor:
        """Attend.

        :param qkv: [B, 3 D, L]: D channels each of queries, keys and values.
        :return: [B, D, L].
        """
        q, k, v = qkv.transpose(1, 2).chunk(3, dim=2)  # [B, L, D] each
        # as [B, 1, L, D]: the fused kernels want a dimension of heads
        h = F.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1))
        return h.squeeze(1).transpose(1, 2)

    @staticmethod
    def count_flops(model: Any, _x: Any, y: Tensor | Sequence[Tensor]) -> None:
        """A counter for the ``thop`` package: adds the two matrix products to ``total_ops``.

        :param y: the output [B, D, L], alone or as the first of several.
        """
        output = y if isinstance(y, Tensor) else y[0]
        b, d, *spatial = output.shape
        model.total_ops += torch.DoubleTensor([2 * b * math.prod(spatial) ** 2 * d])


class UNetModel(nn.Module):
    """A U-Net with residual blocks, attention and timestep embedding.

    :param in_channels: C of the input.
    :param model_channels: width of the first level.
    :param out_channels: channels of the output; twice C where the variance is learned.
    :param num_res_blocks: residual blocks per level.
    :param attention_resolutions: downsampling factors (1, 2, 4, ...) at which to attend.
    :param dropout: probability of dropping a feature.
    :param channel_mult: width of each level, in multiples of ``model_channels``.
    :param conv_resample: resample with convolutions rather than pooling and repetition.
    :param dims: 1, 2 or 3 spatial dimensions.
    :param num_classes: number of class labels; None for an unconditional model.
    :param use_checkpoint: recompute activations in the backward pass, to save memory.
    :param num_heads: attention heads.
    :param num_heads_upsample: heads on the upsampling path; -1 for ``num_heads``.
    :param use_scale_shift_norm: see :class:`ResBlock`.
    :raises ValueError: if heads or groups do not divide a level's channels.
    """

    def __init__(
        self,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Iterable[int],
        dropout: float = 0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | None = None,
        use_checkpoint: bool = False,
        num_heads: int = 1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.out_channels = out_channels
        self.num_res_blocks = num_res_blocks
        self.attention_resolutions = set(attention_resolutions)
        self.dropout = dropout
        self.channel_mult = channel_mult
        self.conv_resample = conv_resample
        self.dims = dims
        self.num_classes = num_classes
        self.use_checkpoint = use_checkpoint
        self.num_heads = num_heads
        self.num_heads_upsample = num_heads if num_heads_upsample == -1 else num_heads_upsample

        self.use_scale_shift_norm = use_scale_shift_norm

        # the order of these modules is that of the keys in the state dict
        self.emb_channels = model_channels * 4
        self.time_embed = nn.Sequential(
            linear(model_channels, self.emb_channels),
            SiLU(),
            linear(self.emb_channels, self.emb_channels),
        )
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, self.emb_channels)
        widths = [int(mult * model_channels) for mult in channel_mult]
        self.input_blocks, skip_channels = self._make_input_blocks(widths)
        self.middle_block = TimestepEmbedSequential(
            self._res_block(widths[-1], widths[-1]),
            self._attention(widths[-1], "num_heads"),
            self._res_block(widths[-1], widths[-1]),
        )
        self.output_blocks = self._make_output_blocks(widths, skip_channels)
        self.out = nn.Sequential(
            normalization(widths[0]),
            SiLU(),
            zero_module(conv_nd(dims, widths[0], out_channels, 3, padding=1)),
        )

    def _make_input_blocks(self, widths: Sequence[int]) -> tuple[nn.ModuleList, list[int]]:
        """The way down.

        :param widths: channels of each level.
        :return: the blocks, and the channels that each puts out, in order.
        """
        ch = widths[0]
        outputs = [ch]
        first = conv_nd(self.dims, self.in_channels, ch, 3, padding=1)
        blocks = nn.ModuleList([TimestepEmbedSequential(first)])
        for level, width in enumerate(widths):
            for _ in range(self.num_res_blocks):
                layers: list[nn.Module] = [self._res_block(ch, width)]
                ch = width
                if 2**level in self.attention_resolutions:
                    layers.append(self._attention(ch, "num_heads"))
                blocks.append(TimestepEmbedSequential(*layers))
                outputs.append(ch)
            if level < len(widths) - 1:
                down = Downsample(ch, self.conv_resample, dims=self.dims)
                blocks.append(TimestepEmbedSequential(down))
                outputs.append(ch)
        return blocks, outputs

    def _make_output_blocks(
        self, widths: Sequence[int], skip_channels: Sequence[int]
    ) -> nn.ModuleList:
        """The way up.

        :param widths: channels of each level.
        :param skip_channels: channels of the input blocks' outputs, used from the last on.
        """
        ch, skips = widths[-1], list(skip_channels)
        blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for i in range(self.num_res_blocks + 1):
                layers: list[nn.Module] = [self._res_block(ch + skips.pop(), width)]
                ch = width
                if 2**level in self.attention_resolutions:
                    layers.append(self._attention(ch, "num_heads_upsample"))
                if level > 0 and i == self.num_res_blocks:
                    layers.append(Upsample(ch, self.conv_resample, dims=self.dims))
                blocks.append(TimestepEmbedSequential(*layers))
        return blocks

    def _res_block(self, channels: int, width: int) -> ResBlock:
        return ResBlock(
            channels,
            self.emb_channels,
            self.dropout,
            out_channels=width,
            dims=self.dims,
            use_checkpoint=self.use_checkpoint,
            use_scale_shift_norm=self.use_scale_shift_norm,
        )

    def _attention(self, channels: int, heads_flag: str) -> AttentionBlock:
        """Attention with the heads that the argument ``heads_flag`` of the constructor sets."""
        num_heads = getattr(self, heads_flag)
        _check_heads(heads_flag, num_heads, channels)
        return AttentionBlock(channels, num_heads=num_heads, use_checkpoint=self.use_checkpoint)

    def convert_to_fp16(self) -> None:
        """Convert the convolutions of the U-Net's trunk to float16."""
        for trunk in (self.input_blocks, self.middle_block, self.output_blocks):
            trunk.apply(convert_module_to_f16)

    def convert_to_fp32(self) -> None:
        """Undo :meth:`convert_to_fp16`."""
        for trunk in (self.input_blocks, self.middle_block, self.output_blocks):
            trunk.apply(convert_module_to_f32)

    @property
    def inner_dtype(self) -> torch.dtype:
        """The type in which the trunk computes."""
        return next(self.input_blocks.parameters()).dtype

    @property
    def _outer_dtype(self) -> torch.dtype:
        """The type of the embedding and of the last layers, which stay out of half precision."""
        return next(self.time_embed.parameters()).dtype

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict the noise, or whatever the network was trained for.

        :param x: [N, C, ...] noised images.
        :param timesteps: [N] timesteps, integer or fractional.
        :param y: [N] int64 class labels, exactly if the model is class-conditional.
        :return: [N, out_channels, ...], in the type of ``x``.
        :raises ValueError: if labels are missing or given in vain, or if a side of ``x`` cannot be
            halved as often as the model has levels.
        """
        emb, skips = self._encode(x, timesteps, y)
        h = self.middle_block(skips[-1], emb)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb)  # popped: frees memory
        return self.out(h.type(self._outer_dtype)).type(x.dtype)

    def get_feature_vectors(
        self, x: Tensor, timesteps: Tensor, y: Tensor | None = None
    ) -> dict[str, Any]:
        """The activations inside the U-Net, for the arguments of :meth:`forward`.

        :return: "down": a list of [N, width, ...], one for each input block; "middle": one tensor;
            "up": a list, one for each output block; in the type of ``x``.
        """
        emb, down = self._encode(x, timesteps, y)
        middle = h = self.middle_block(down[-1], emb)
        up = []
        for block, skip in zip(self.output_blocks, reversed(down), strict=True):
            h = block(torch.cat([h, skip], dim=1), emb)
            up.append(h)
        return {
            "down": [h.type(x.dtype) for h in down],
            "middle": middle.type(x.dtype),
            "up": [h.type(x.dtype) for h in up],
        }

    def _encode(
        self, x: Tensor, timesteps: Tensor, y: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """The embedding [N, E], and the output of each input block."""
        self._check_input(x, y)
        embedding = timestep_embedding(timesteps, self.model_channels)
        emb = self.time_embed(embedding.type(self._outer_dtype))  # [N, E]
        if y is not None:
            emb = emb + self.label_emb(y)
        outputs = []
        h = x.type(self.inner_dtype)
        for block in self.input_blocks:
            h = block(h, emb)  # [N, width, H / 2**level, W / 2**level]
            outputs.append(h)
        return emb, outputs

    def _check_input(self, x: Tensor, y: Tensor | None) -> None:
        if (y is not None) != (self.num_classes is not None):
            raise UserError(
                "this model is class-conditional: pass labels y [N]"
                if y is None
                else "this model is not class-conditional: pass no labels y"
            )
        factor = 2 ** (len(self.channel_mult) - 1)
        halved = x.shape[-2:] if self.dims == 3 else x.shape[2:]
        if any(size % factor for size in halved):
            raise UserError(
                f"an input of size {tuple(halved)} cannot be halved {len(self.channel_mult) - 1} "
                f"times: each side must be a multiple of {factor}"
            )


class SuperResModel(UNetModel):
    """A U-Net that is also given a smaller image, upsampled and stacked onto its input.

    :param in_channels: C of the image; the network sees 2 C.
    :param args: the further arguments of :class:`UNetModel`, as ``kwargs``.
    """

    def __init__(self, in_channels: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(in_channels * 2, *args, **kwargs)

    def forward(  # type: ignore[override]
        self, x: Tensor, timesteps: Tensor, low_res: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Predict the noise, or whatever the network was trained for.

        :param x: [N, C, H, W] noised images.
        :param timesteps: [N] timesteps.
        :param low_res: [N, C, h, w] smaller images in [-1, 1].
        :return: [N, out_channels, H, W].
        """
        return super().forward(self._with_low_res(x, low_res), timesteps, **kwargs)

    def get_feature_vectors(  # type: ignore[override]
        self, x: Tensor, timesteps: Tensor, low_res: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The activations of :meth:`forward`; see :meth:`UNetModel.get_feature_vectors`."""
        return super().get_feature_vectors(self._with_low_res(x, low_res), timesteps, **kwargs)

    @staticmethod
    def _with_low_res(x: Tensor, low_res: Tensor | None) -> Tensor:
        if low_res is None:
            raise UserError("a super-resolution model needs low_res [N, C, h, w]")
        upsampled = F.interpolate(low_res, x.shape[2:], mode="bilinear")
        return torch.cat([x, upsampled], dim=1)  # [N, 2 C, H, W]
