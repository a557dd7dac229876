"""The weights of a U-Net under the names of diffusers' ``UNet2DModel``, and back.

One table names every layer on both sides, so that what goes there comes back bit for bit. Only the
attention differs in more than the name: three matrices there are one here, whose rows go by head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import UserError


@dataclass(frozen=True)
class Layout:
    """What the names of the layers depend on."""

    num_res_blocks: int
    attends: tuple[bool, ...]  # for each level, the largest images first
    resblock_updown: bool
    head_width: int | None  # channels of each attention head; None: all, one head
    new_order: bool  # --use_new_attention_order


class Layer(NamedTuple):
    """A layer here, and there the layer or, of queries, keys and values, the three layers."""

    ours: str
    theirs: tuple[str, ...]


EMBEDDINGS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
}
ENDS = {"input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out"}
RES_BLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
ATTENTION = {"norm": "group_norm", "qkv": "to_q to_k to_v", "proj_out": "to_out.0"}
DOWNSAMPLE = {"op": "conv"}
UPSAMPLE = {"conv": "conv"}


def layers(layout: Layout) -> Iterator[Layer]:
    """The table: every layer that has weights, or may have them, on both sides."""
    for ours, theirs in {**EMBEDDINGS, **ENDS}.items():
        yield Layer(ours, (theirs,))
    yield from _down(layout)
    yield from _inside("middle_block.0", "mid_block.resnets.0", RES_BLOCK)
    yield from _inside("middle_block.1", "mid_block.attentions.0", ATTENTION)
    yield from _inside("middle_block.2", "mid_block.resnets.1", RES_BLOCK)
    yield from _up(layout)


def _inside(ours: str, theirs: str, parts: Mapping[str, str]) -> Iterator[Layer]:
    """The layers of a block."""
    for our_part, their_parts in parts.items():
        yield Layer(f"{ours}.{our_part}", tuple(f"{theirs}.{part}" for part in their_parts.split()))


def _down(layout: Layout) -> Iterator[Layer]:
    """The way down: there by level, here one list of blocks, of which the first is the input."""
    index = 1
    for level, attends in enumerate(layout.attends):
        block = f"down_blocks.{level}"
        for i in range(layout.num_res_blocks):
            yield from _inside(f"input_blocks.{index}.0", f"{block}.resnets.{i}", RES_BLOCK)
            if attends:
                yield from _inside(f"input_blocks.{index}.1", f"{block}.attentions.{i}", ATTENTION)
            index += 1
        if level < len(layout.attends) - 1:
            parts = RES_BLOCK if layout.resblock_updown else DOWNSAMPLE
            yield from _inside(f"input_blocks.{index}.0", f"{block}.downsamplers.0", parts)
            index += 1


def _up(layout: Layout) -> Iterator[Layer]:
    """The way up, from the smallest images; the upsampling ends a level's last block here."""
    index = 0
    for up, attends in enumerate(reversed(layout.attends)):
        block = f"up_blocks.{up}"
        for i in range(layout.num_res_blocks + 1):
            ours = f"output_blocks.{index}"
            yield from _inside(f"{ours}.0", f"{block}.resnets.{i}", RES_BLOCK)
            if attends:
                yield from _inside(f"{ours}.1", f"{block}.attentions.{i}", ATTENTION)
            if i == layout.num_res_blocks and up < len(layout.attends) - 1:
                parts = RES_BLOCK if layout.resblock_updown else UPSAMPLE
                last = f"{ours}.{2 if attends else 1}"
                yield from _inside(last, f"{block}.upsamplers.0", parts)
            index += 1


def to_diffusers(state: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """A state dict of ours as one of ``UNet2DModel``.

    :param state: of a network that ``layout`` describes.
    """
    table = {layer.ours: layer.theirs for layer in layers(layout)}
    made: dict[str, Tensor] = {}
    for key, value in state.items():
        ours, _, kind = key.rpartition(".")
        theirs = table[ours]
        parts = _split(value, layout) if len(theirs) == 3 else [value]
        for name, part in zip(theirs, parts, strict=True):
            made[f"{name}.{kind}"] = _flat(part) if _is_linear_there(ours) else part
    return made


def from_diffusers(theirs: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """A state dict of ``UNet2DModel`` as one of ours, in the order of the table.

    :param theirs: of a network that ``layout`` describes.
    :raises ValueError: naming some, if there are weights that no layer of ours has.
    """
    made, left = {}, dict(theirs)
    for ours, names in layers(layout):
        for kind in ("weight", "bias"):
            parts = [left.pop(f"{name}.{kind}") for name in names if f"{name}.{kind}" in left]
            if len(parts) == len(names):
                value = _join(parts, layout) if len(parts) == 3 else parts[0]
                deep = kind == "weight" and _is_linear_there(ours)
                made[f"{ours}.{kind}"] = value.unsqueeze(-1) if deep else value
    if left:
        raise UserError(
            f"{len(left)} weights of the diffusers network have no counterpart here, such as "
            f"{', '.join(sorted(left)[:3])}"
        )
    return made


def _is_linear_there(ours: str) -> bool:
    """Whether a layer is a 1-wide convolution here, and a linear layer there."""
    return ours.endswith((".qkv", ".proj_out"))


def _flat(value: Tensor) -> Tensor:
    """A weight [D, C, 1] as [D, C]; a bias as it is."""
    return value.squeeze(-1) if value.ndim == 3 else value


def _split(packed: Tensor, layout: Layout) -> list[Tensor]:
    """Queries, keys and values, [C, ...] each, of our [3 C, ...]: see :class:`.AttentionBlock`."""
    heads = _count_heads(len(packed) // 3, layout)
    first = (3, heads) if layout.new_order else (heads, 3)
    by_head = packed.unflatten(0, (*first, -1))
    if not layout.new_order:
        by_head = by_head.transpose(0, 1)  # [3, heads, C / heads, ...]
    return [part.reshape(-1, *packed.shape[1:]) for part in by_head]


def _join(parts: list[Tensor], layout: Layout) -> Tensor:
    """Our [3 C, ...] of queries, keys and values, [C, ...] each."""
    heads = _count_heads(len(parts[0]), layout)
    by_head = [part.unflatten(0, (heads, -1)) for part in parts]  # [heads, C / heads, ...] each
    packed = torch.stack(by_head, dim=0 if layout.new_order else 1)
    return packed.reshape(-1, *parts[0].shape[1:])


def _count_heads(channels: int, layout: Layout) -> int:
    return channels // (layout.head_width or channels)
