"""The U-Net of IDDPM, its super-resolution variant, and the classifier that is half of it.

IDDPM: arXiv 2102.09672, appendix A. Guided diffusion: arXiv 2105.05233, section 3 and appendix H.
Attribute names and the order of modules fix the keys of the state dict: published checkpoints
load with ``strict=True``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import AttentionBlock as AttentionBlock
from .blocks import AttentionPool2d as AttentionPool2d
from .blocks import Downsample as Downsample
from .blocks import QKVAttention as QKVAttention
from .blocks import ResBlock as ResBlock
from .blocks import TimestepBlock as TimestepBlock
from .blocks import TimestepEmbedSequential as TimestepEmbedSequential
from .blocks import Upsample as Upsample
from .blocks import count_heads
from .errors import UserError
from .flags import ImageSize, height_width
from .fp16_util import convert_module_to_f16, convert_module_to_f32
from .nn import SiLU, conv_nd, linear, normalization, timestep_embedding, zero_module

POOLS = ("adaptive", "attention", "spatial", "spatial_v2")
SPATIAL_WIDTH = 2048  # hidden features of the spatial pools


class _Trunk(nn.Module):
    """The way down and the middle, conditioned on timestep and label: what the networks share.

    :param in_channels: C of the input.
    :param model_channels: width of the first level.
    :param num_res_blocks: residual blocks per level.
    :param attention_resolutions: downsampling factors (1, 2, 4, ...) at which to attend.
    :param dropout: probability of dropping a feature.
    :param channel_mult: width of each level, in multiples of ``model_channels``.
    :param conv_resample: resample with convolutions rather than pooling and repetition.
    :param dims: 1, 2 or 3 spatial dimensions.
    :param num_labels: rows of the embedding of labels; None for no labels.
    :param use_checkpoint: recompute activations in the backward pass, to save memory.
    :param num_heads: attention heads.
    :param num_heads_upsample: heads on the upsampling path; -1 for ``num_heads``.
    :param use_scale_shift_norm: see :class:`ResBlock`.
    :param num_head_channels: channels of each head, at every level; -1 for ``num_heads``.
    :param resblock_updown: resample by residual blocks.
    :param use_new_attention_order: see :class:`AttentionBlock`.
    :raises ValueError: if heads or groups do not divide a level's channels.
    """

    def __init__(
        self,
        in_channels: int,
        model_channels: int,
        num_res_blocks: int,
        attention_resolutions: Iterable[int],
        dropout: float = 0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_labels: int | None = None,
        use_checkpoint: bool = False,
        num_heads: int = 1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        num_head_channels: int = -1,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.num_res_blocks = num_res_blocks
        self.attention_resolutions = set(attention_resolutions)
        self.dropout = dropout
        self.channel_mult = channel_mult
        self.conv_resample = conv_resample
        self.dims = dims
        self.use_checkpoint = use_checkpoint
        self.num_heads = num_heads
        self.num_heads_upsample = num_heads if num_heads_upsample == -1 else num_heads_upsample
        self.use_scale_shift_norm = use_scale_shift_norm
        self.num_head_channels = num_head_channels
        self.resblock_updown = resblock_updown
        self.use_new_attention_order = use_new_attention_order

        # the order of these modules is that of the keys in the state dict
        self.emb_channels = model_channels * 4
        self.time_embed = nn.Sequential(
            linear(model_channels, self.emb_channels),
            SiLU(),
            linear(self.emb_channels, self.emb_channels),
        )
        if num_labels is not None:
            self.label_emb = nn.Embedding(num_labels, self.emb_channels)
        self._widths = [int(mult * model_channels) for mult in channel_mult]
        self.input_blocks, self._skip_channels = self._make_input_blocks(self._widths)
        self.middle_block = TimestepEmbedSequential(
            self._res_block(self._widths[-1], self._widths[-1]),
            self._attention(self._widths[-1], "num_heads"),
            self._res_block(self._widths[-1], self._widths[-1]),
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
                blocks.append(TimestepEmbedSequential(self._resample(ch, "down")))
                outputs.append(ch)
        return blocks, outputs

    def _res_block(self, channels: int, width: int, **kind: bool) -> ResBlock:
        return ResBlock(
            channels,
            self.emb_channels,
            self.dropout,
            out_channels=width,
            dims=self.dims,
            use_checkpoint=self.use_checkpoint,
            use_scale_shift_norm=self.use_scale_shift_norm,
            **kind,
        )

    def _resample(self, channels: int, direction: str) -> nn.Module:
        """What doubles ("up") or halves ("down") the size."""
        if self.resblock_updown:
            return self._res_block(channels, channels, **{direction: True})
        layer = Upsample if direction == "up" else Downsample
        return layer(channels, self.conv_resample, dims=self.dims)

    def _attention(self, channels: int, heads_flag: str) -> AttentionBlock:
        """Attention with the heads that the argument ``heads_flag`` of the constructor sets."""
        num_heads = getattr(self, heads_flag)
        return AttentionBlock(
            channels,
            num_heads=count_heads(channels, num_heads, self.num_head_channels, heads_flag),
            use_checkpoint=self.use_checkpoint,
            use_new_attention_order=self.use_new_attention_order,
        )

    @property
    def _halves(self) -> Iterable[nn.Module]:
        """The parts that compute in half precision."""
        return (self.input_blocks, self.middle_block)

    def convert_to_fp16(self) -> None:
        """Convert the convolutions of the network's trunk to float16."""
        for trunk in self._halves:
            trunk.apply(convert_module_to_f16)

    def convert_to_fp32(self) -> None:
        """Undo :meth:`convert_to_fp16`."""
        for trunk in self._halves:
            trunk.apply(convert_module_to_f32)

    @property
    def inner_dtype(self) -> torch.dtype:
        """The type in which the trunk computes."""
        return next(self.input_blocks.parameters()).dtype

    @property
    def _outer_dtype(self) -> torch.dtype:
        """The type of the embedding and of the last layers, which stay out of half precision."""
        return next(self.time_embed.parameters()).dtype

    def _encode(
        self, x: Tensor, timesteps: Tensor, y: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The embedding [N, E], and the output of each input block."""
        self._check_size(x)
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

    def _check_size(self, x: Tensor) -> None:
        factor = 2 ** (len(self.channel_mult) - 1)
        halved = x.shape[-2:] if self.dims == 3 else x.shape[2:]
        if any(size % factor for size in halved):
            raise UserError(
                f"an input of size {tuple(halved)} cannot be halved {len(self.channel_mult) - 1} "
                f"times: each side must be a multiple of {factor}"
            )


class UNetModel(_Trunk):
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
    :param num_head_channels: channels of each head, at every level; -1 for ``num_heads``.
    :param resblock_updown: resample by residual blocks.
    :param use_new_attention_order: see :class:`AttentionBlock`.
    :param null_class: one label more, ``num_classes``, which stands for no label: see
        :class:`.ClassifierFree`. Its attribute is the label, or None.
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
        num_head_channels: int = -1,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        null_class: bool = False,
    ) -> None:
        if null_class and num_classes is None:
            raise UserError("null_class needs num_classes: it stands for no label")
        super().__init__(
            in_channels,
            model_channels,
            num_res_blocks,
            attention_resolutions,
            dropout=dropout,
            channel_mult=channel_mult,
            conv_resample=conv_resample,
            dims=dims,
            num_labels=None if num_classes is None else num_classes + null_class,
            use_checkpoint=use_checkpoint,
            num_heads=num_heads,
            num_heads_upsample=num_heads_upsample,
            use_scale_shift_norm=use_scale_shift_norm,
            num_head_channels=num_head_channels,
            resblock_updown=resblock_updown,
            use_new_attention_order=use_new_attention_order,
        )
        self.out_channels = out_channels
        self.num_classes = num_classes
        self.null_class = num_classes if null_class else None
        self.output_blocks = self._make_output_blocks(self._widths, self._skip_channels)
        self.out = nn.Sequential(
            normalization(self._widths[0]),
            SiLU(),
            zero_module(conv_nd(dims, self._widths[0], out_channels, 3, padding=1)),
        )

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
                    layers.append(self._resample(ch, "up"))
                blocks.append(TimestepEmbedSequential(*layers))
        return blocks

    @property
    def _halves(self) -> Iterable[nn.Module]:
        return (self.input_blocks, self.middle_block, self.output_blocks)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict the noise, or whatever the network was trained for.

        :param x: [N, C, ...] noised images.
        :param timesteps: [N] timesteps, integer or fractional.
        :param y: [N] int64 class labels, exactly if the model is class-conditional.
        :return: [N, out_channels, ...], in the type of ``x``.
        :raises ValueError: if labels are missing or given in vain, or if a side of ``x`` cannot be
            halved as often as the model has levels.
        """
        self._check_labels(y)
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
        self._check_labels(y)
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

    def _check_labels(self, y: Tensor | None) -> None:
        if (y is not None) != (self.num_classes is not None):
            raise UserError(
                "this model is class-conditional: pass labels y [N]"
                if y is None
                else "this model is not class-conditional: pass no labels y"
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


class EncoderUNetModel(_Trunk):
    """The half of a U-Net that goes down, and a pool: a classifier of noised images.

    :param image_size: of the images, in pixels or (height, width); for the attention pool.
    :param in_channels: C of the input.
    :param model_channels: width of the first level.
    :param out_channels: K, the number of classes.
    :param num_res_blocks: residual blocks per level.
    :param attention_resolutions: downsampling factors (1, 2, 4, ...) at which to attend.
    :param dropout: probability of dropping a feature.
    :param channel_mult: width of each level, in multiples of ``model_channels``.
    :param pool: how the features become K numbers: "adaptive" (their mean), "attention"
        (:class:`AttentionPool2d`), "spatial" or "spatial_v2" (the means of every block's features
        through two layers, of which v2 normalises between).
    :param trunk: the further arguments of :class:`UNetModel`, but for those of labels.
    :raises ValueError: for an unknown pool; if heads or groups do not divide a level's channels.
    """

    def __init__(
        self,
        image_size: ImageSize,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Iterable[int],
        dropout: float = 0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        *,
        pool: str = "adaptive",
        **trunk: Any,
    ) -> None:
        super().__init__(
            in_channels,
            model_channels,
            num_res_blocks,
            attention_resolutions,
            dropout=dropout,
            channel_mult=channel_mult,
            **trunk,
        )
        if pool not in POOLS:
            raise UserError(f"pool '{pool}': choose one of {', '.join(POOLS)}")
        self.image_size = image_size
        self.out_channels = out_channels
        self.num_classes = out_channels
        self.pool = pool
        self.out = nn.Sequential(*self._make_out())

    def _make_out(self) -> list[nn.Module]:
        """The layers from features to logits."""
        width = self._widths[-1]
        if self.pool == "adaptive":
            return [
                normalization(width),
                SiLU(),
                nn.AdaptiveAvgPool2d((1, 1)),
                zero_module(conv_nd(self.dims, width, self.out_channels, 1)),
                nn.Flatten(),
            ]
        if self.pool == "attention":
            factor = 2 ** (len(self._widths) - 1)
            rows, columns = (side // factor for side in height_width(self.image_size))
            head = width if self.num_head_channels == -1 else self.num_head_channels
            pool = AttentionPool2d((rows, columns), width, head, self.out_channels)
            return [normalization(width), SiLU(), pool]
        features = sum(self._skip_channels) + width
        last = linear(SPATIAL_WIDTH, self.out_channels)
        if self.pool == "spatial":
            return [linear(features, SPATIAL_WIDTH), nn.ReLU(), last]
        return [linear(features, SPATIAL_WIDTH), normalization(SPATIAL_WIDTH), SiLU(), last]

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Classify.

        :param x: [N, C, H, W] noised images.
        :param timesteps: [N] timesteps, integer or fractional.
        :return: [N, K] logits, in the type of ``x``.
        :raises ValueError: for images of another size than the attention pool was made for.
        """
        if self.pool == "attention" and tuple(x.shape[2:]) != height_width(self.image_size):
            raise UserError(
                f"this classifier's attention pool is for images of {self.image_size} pixels, not "
                f"{x.shape[2]}x{x.shape[3]}"
            )
        emb, features = self._encode(x, timesteps)
        features.append(self.middle_block(features[-1], emb))
        if self.pool.startswith("spatial"):
            means = [h.type(self._outer_dtype).mean(dim=(2, 3)) for h in features]
            return self.out(torch.cat(means, dim=1)).type(x.dtype)
        return self.out(features[-1].type(self._outer_dtype)).type(x.dtype)
