"""Does a state dict fit a network; if not, which flags differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from . import checkpoint, dist_util
from .errors import UserError

LABELS = "--num_classes (one more with --class_dropout)"


def load_model(model: nn.Module, path: str) -> None:
    """Load a checkpoint into a model, on every process.

    :raises ValueError: naming the flags or the keys that differ, if it does not fit; see also
        :func:`.dist_util.load_state_dict`.
    """
    if checkpoint.is_sharded(path.rstrip("/")) or checkpoint.find_shares(path):
        raise UserError(
            f"checkpoint '{path}' is in shares: python scripts/merge_checkpoint.py --checkpoint "
            f"{path} makes model*.pt and ema_*.pt of it"
        )
    state = dist_util.load_state_dict(path, map_location="cpu")
    check_fit(model, state, path)
    model.load_state_dict(state)


def check_fit(model: nn.Module, state: Any, path: str) -> None:
    """Check that a checkpoint belongs to a model.

    :raises ValueError: unless ``state`` has exactly the keys and shapes of the model.
    """
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"checkpoint '{path}' is no state dict of a model: {_contents(state)}")
    check_shapes(model, {key: tuple(value.shape) for key, value in state.items()}, path)


def check_shapes(model: nn.Module, theirs: Mapping[str, tuple[int, ...]], path: str) -> None:
    """Check that the keys and shapes of a checkpoint are those of a model.

    :raises ValueError: naming the flags or the keys that differ, if they are not.
    """
    ours = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if theirs == ours:
        return
    kind, their_kind = kind_of(ours), kind_of(theirs)
    if their_kind and kind and kind != their_kind:
        raise UserError(f"checkpoint '{path}' is that of a {their_kind}, not of a {kind}")
    here, there = describe_network(ours), describe_network(theirs)
    different = [
        f"{name} {here[name]} here, {there[name]} in the checkpoint"
        for name in here
        if name in there and here[name] != there[name]
    ]
    if different:
        raise UserError(f"checkpoint '{path}' does not fit the flags: {'; '.join(different)}")
    if all(key.startswith("module.") for key in theirs):
        raise UserError(
            f"checkpoint '{path}' was saved from a wrapped model: remove 'module.' from its keys"
        )
    wrong = sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key))
    raise UserError(
        f"checkpoint '{path}' does not fit the model: {len(wrong)} keys are missing, unknown or of "
        f"another shape, such as {', '.join(wrong[:3])}"
    )


def _contents(state: Any) -> str:
    """What a file holds that is no state dict of a model."""
    if not isinstance(state, Mapping):
        return f"it holds a {type(state).__name__}"
    if "param_groups" in state:
        return "it is an optimiser's file; the weights are in model*.pt and ema_*.pt"
    return f"it holds {', '.join(map(str, list(state)[:5]))}; save the state dict alone"


def kind_of(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What a state dict's network is for: "diffusion model", "classifier", or "" for neither."""
    parts = {key.split(".")[0] for key in shapes}
    if not {"time_embed", "input_blocks", "middle_block", "out"} <= parts:
        return ""
    return "diffusion model" if "output_blocks" in parts else "classifier"


def describe_network(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What the keys and shapes of a network's state dict tell; {} for an unknown network.

    :return: the flag, or what it decides -> value.
    """
    kind = kind_of(shapes)
    if not kind:
        return {}
    try:
        return _describe_unet(shapes) if kind == "diffusion model" else _describe_encoder(shapes)
    except (KeyError, IndexError, StopIteration):
        return {}


def _describe_unet(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    num_channels = shapes["time_embed.0.weight"][1]
    embedding = shapes["input_blocks.1.0.emb_layers.1.bias"][0]
    first_width = shapes["input_blocks.1.0.in_layers.2.bias"][0]
    per_level = _blocks_per_level(shapes)
    blocks = _input_blocks(shapes, per_level)
    levels = 1 + max(block.level for block in blocks)
    widths = [next(b.width for b in blocks if b.level == level) for level in range(levels)]
    about = {
        "--num_channels": num_channels,
        "--channel_mult": ",".join(f"{width / num_channels:g}" for width in widths),
        "--num_res_blocks": per_level or len(blocks) // levels,
        "--resblock_updown": per_level is not None,
        "levels of attention (--attention_resolutions)": sorted(
            {block.level for block in blocks if block.attends}
        ),
        "--use_scale_shift_norm": embedding == 2 * first_width,
        "--class_cond": "label_emb.weight" in shapes,
        "input channels (--channels, doubled by super-resolution)": shapes[
            "input_blocks.0.0.weight"
        ][1],
        "output channels (--channels, doubled by --learn_sigma)": shapes["out.2.bias"][0],
    }
    if levels == 1:
        del about["--resblock_updown"]  # nothing is resampled
    if about["--class_cond"]:
        about[LABELS] = shapes["label_emb.weight"][0]
    return about


def _describe_encoder(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Of a classifier; its levels do not show."""
    last = [key for key in shapes if key.startswith("out.") and key.endswith("bias")][-1]
    pools = {
        "out.2.positional_embedding": "attention",
        "out.3.weight": "spatial_v2" if "out.1.weight" in shapes else "adaptive",
    }
    pool = next((pool for key, pool in pools.items() if key in shapes), "spatial")
    embedding = shapes["input_blocks.1.0.emb_layers.1.bias"][0]
    about = {
        "--classifier_width": shapes["time_embed.0.weight"][1],
        "--classifier_pool": pool,
        "--classifier_use_scale_shift_norm": (
            embedding == 2 * shapes["input_blocks.1.0.in_layers.2.bias"][0]
        ),
        "--channels": shapes["input_blocks.0.0.weight"][1],
        "--num_classes": shapes[last][0],
        "blocks (--classifier_depth and the levels)": 1
        + max(_index(key) for key in shapes if key.startswith("input_blocks.")),
        "--classifier_resblock_updown": not any(".op." in key for key in shapes),
        "blocks that attend (--classifier_attention_resolutions)": sorted(
            _index(key)
            for key in shapes
            if key.startswith("input_blocks.") and key.endswith("qkv.weight")
        ),
    }
    if pool == "attention":
        about["positions of the last level (--image_size)"] = (
            shapes["out.2.positional_embedding"][1] - 1
        )
    return about


class _ResBlockShape(NamedTuple):
    level: int
    width: int
    attends: bool


def _index(key: str) -> int:
    """The number of a block or layer: 3 of input_blocks.3.0.in_layers.2.bias."""
    return int(key.split(".")[1])


def _blocks_per_level(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Residual blocks of a level, if residual blocks resample; else None.

    On the way up, the last block of a level is followed by one more then.
    """
    ends = [
        _index(key)
        for key in shapes
        if key.startswith("output_blocks.")
        and key.endswith("in_layers.2.bias")
        and key.split(".")[2] != "0"
    ]
    return min(ends, default=None)


def _input_blocks(
    shapes: Mapping[str, tuple[int, ...]], per_level: int | None
) -> list[_ResBlockShape]:
    """The residual blocks on the way down, without those that halve the size.

    Downsampling by pooling has no weights, and so no keys.

    :param per_level: see :func:`_blocks_per_level`.
    """
    indices = {_index(key) for key in shapes if key.startswith("input_blocks.")}
    blocks, level = [], 0
    for i in range(1, max(indices) + 1):
        width = shapes.get(f"input_blocks.{i}.0.in_layers.2.bias")
        halves = i % (per_level + 1) == 0 if per_level else width is None
        if width is None or halves:
            level += 1
        else:
            attends = f"input_blocks.{i}.1.qkv.weight" in shapes
            blocks.append(_ResBlockShape(level, width[0], attends))
    return blocks
