"""What a run writes, when a write counts, and how a checkpoint is found with its flags.

A run folder holds ``config.json`` (the flags), and for each saved step N ``modelNNNNNN.pt``,
``ema_RATE_NNNNNN.pt`` for every EMA rate, and ``optNNNNNN.pt``.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor, nn

from . import dist_util
from .errors import UserError
from .flags import size_text

CONFIG = "config.json"
YOUNG_EMA = 0.05  # share of the initial weights in an average from which on to warn


# -- names ------------------------------------------------------------------------------------


def model_name(step: int) -> str:
    """File of the weights as trained."""
    return f"model{step:06d}.pt"


def ema_name(rate: str | float, step: int) -> str:
    """File of an exponential moving average of the weights."""
    return f"ema_{rate}_{step:06d}.pt"


def opt_name(step: int) -> str:
    """File of the optimiser's state."""
    return f"opt{step:06d}.pt"


def parse_resume_step_from_filename(filename: str) -> int:
    """The step in a name like ``path/to/modelNNNNNN.pt``; 0 for other names."""
    match = re.search(r"model(\d+)(?:\.[^/]*)?$", filename)
    return int(match.group(1)) if match else 0


def is_model_name(path: str) -> bool:
    """Whether a file is named as the loop names its models, so that others belong to it."""
    return re.search(r"model\d+\.[^/\\]*$", path) is not None


def describe_weights(path: str) -> str:
    """Which weights a file holds, by its name; warns of an average that is still young."""
    name = re.split(r"[/\\]", path)[-1]
    average = re.fullmatch(r"ema_([\d.]+)_(\d+)\.pt", name)
    if not average:
        raw = name.startswith("model")
        return "weights as trained; ema_*.pt files usually sample better" if raw else "weights"
    rate, step = float(average.group(1)), int(average.group(2))
    left = rate**step
    text = f"weights averaged at rate {rate:g}"
    if left > YOUNG_EMA:
        text += f"; WARNING: {left:.0%} of them is still the initial noise: try a lower EMA rate"
    return text


def find_beside(main_checkpoint: str, name: str) -> str | None:
    """The path of a file in the folder of a checkpoint, or None if there is no such file.

    The first process looks, for all.
    """
    import blobfile as bf

    path = bf.join(bf.dirname(main_checkpoint), name)
    return path if dist_util.on_first_rank(lambda: bf.exists(path)) else None


def find_newest_model(folder: str) -> str | None:
    """The model file of the highest step in a run folder, or None; the first process looks.

    The model is the last file of a save to be written: where it is, the others are.
    """
    import blobfile as bf

    def find() -> str | None:
        names = bf.listdir(folder) if bf.isdir(folder) else []
        models = [name for name in names if re.fullmatch(r"model\d{6,}\.pt", name)]
        newest = max(models, key=parse_resume_step_from_filename, default=None)
        return None if newest is None else bf.join(folder, newest)

    return dist_util.on_first_rank(find)


# -- writing ----------------------------------------------------------------------------------


@contextlib.contextmanager
def open_whole(path: str) -> Iterator[IO[bytes]]:
    """Open a file for writing that is there whole or not at all.

    A local file is written beside, flushed to the disk, then renamed; a blob appears when its
    upload is complete.

    :raises OSError: with the path as its ``filename``, also when the disk is full.
    """
    import blobfile as bf

    if "://" in path:
        with bf.BlobFile(path, "wb") as file:
            yield file
        return
    beside = f"{path}.tmp"
    try:
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # such as a full disk
            error.filename = path
        raise
    finally:
        with contextlib.suppress(FileNotFoundError):  # it is gone if all went well
            os.unlink(beside)


def write_file(path: str, data: bytes) -> None:
    """Write a file that is there whole or not at all; see :func:`open_whole`."""
    with open_whole(path) as file:
        file.write(data)


def write_tensors(path: str, value: Any) -> None:
    """``torch.save`` into a file that is there whole or not at all; see :func:`open_whole`."""
    with open_whole(path) as file:
        torch.save(value, file)


# -- flags beside checkpoints -----------------------------------------------------------------


def save_config(folder: str, flags: Mapping[str, Any], name: str = CONFIG) -> None:
    """Store the flags of a run in its folder."""
    import blobfile as bf

    text = json.dumps(dict(flags), indent=1) + "\n"
    write_file(bf.join(folder, name), text.encode())


def load_config(folder: str) -> dict[str, Any]:
    """The flags that a run folder holds; empty if it holds none. The first process reads them.

    :raises ValueError: naming the file, on every process, if it is damaged.
    """
    import blobfile as bf

    path = bf.join(folder, CONFIG)

    def read() -> dict[str, Any]:
        if not bf.exists(path):
            return {}
        try:
            with bf.BlobFile(path, "rb") as file:
                flags = json.loads(file.read())
            if isinstance(flags, dict):
                return flags
        except ValueError:
            pass
        raise UserError(f"'{path}' is damaged: repair it, or delete it and give the flags")

    return dist_util.on_first_rank(read)


def merge_flags(
    flags: Mapping[str, Any],
    given: Collection[str],
    stored: Mapping[str, Any],
    fixed: Collection[str],
    inherited: Collection[str],
    where: str,
) -> dict[str, Any]:
    """Flags of the command line over those that a checkpoint was trained with.

    :param flags: all flags of the script.
    :param given: the names of those that the user gave.
    :param stored: the checkpoint's flags.
    :param fixed: names that training has settled: a given one must agree.
    :param inherited: names to take from the checkpoint where they are not given.
    :param where: the folder of the checkpoint, for the error.
    :raises ValueError: naming flags, values and the checkpoint's values, for those that contradict.
    """
    merged = dict(flags)
    ours, theirs = [], []
    for name in sorted(stored.keys() & set(inherited)):
        value = tuple(stored[name]) if isinstance(stored[name], list) else stored[name]
        if name not in given:
            merged[name] = value
        elif name in fixed and merged[name] != value:
            ours.append(f"--{name} {_flag_text(merged[name])}")
            theirs.append(f"--{name} {_flag_text(value)}")
    if ours:
        verb, flag = ("contradicts", "flag") if len(ours) == 1 else ("contradict", "flags")
        raise UserError(
            f"{' '.join(ours)} {verb} the checkpoint, which was trained with {' '.join(theirs)} "
            f"({where}/{CONFIG}): leave the {flag} out"
        )
    return merged


def _flag_text(value: Any) -> str:
    return size_text(value) if isinstance(value, tuple) else str(value)


# -- loading a model --------------------------------------------------------------------------


def load_model(model: nn.Module, path: str) -> None:
    """Load a checkpoint into a model, on every process.

    :raises ValueError: naming the flags or the keys that differ, if it does not fit; see also
        :func:`.dist_util.load_state_dict`.
    """
    state = dist_util.load_state_dict(path, map_location="cpu")
    check_fit(model, state, path)
    model.load_state_dict(state)


def check_fit(model: nn.Module, state: Any, path: str) -> None:
    """Check that a checkpoint belongs to a model.

    :raises ValueError: unless ``state`` has exactly the keys and shapes of the model.
    """
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"checkpoint '{path}' is no state dict of a model: {_contents(state)}")
    theirs = {key: tuple(value.shape) for key, value in state.items()}
    ours = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if theirs == ours:
        return
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


def describe_network(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What the keys and shapes of a U-Net's state dict tell; {} for another network.

    :return: the flag, or what it decides -> value.
    """
    try:
        num_channels = shapes["time_embed.0.weight"][1]
        inputs = shapes["input_blocks.0.0.weight"][1]
        outputs = shapes["out.2.bias"][0]
        embedding = shapes["input_blocks.1.0.emb_layers.1.bias"][0]
        first_width = shapes["input_blocks.1.0.in_layers.2.bias"][0]
        blocks = _input_blocks(shapes)
        levels = 1 + max(block.level for block in blocks)
        widths = [next(b.width for b in blocks if b.level == level) for level in range(levels)]
    except (KeyError, IndexError, StopIteration):
        return {}
    about = {
        "--num_channels": num_channels,
        "--channel_mult": ",".join(f"{width / num_channels:g}" for width in widths),
        "--num_res_blocks": len(blocks) // levels,
        "levels of attention (--attention_resolutions)": sorted(
            {block.level for block in blocks if block.attends}
        ),
        "--use_scale_shift_norm": embedding == 2 * first_width,
        "--class_cond": "label_emb.weight" in shapes,
        "input channels (--channels, doubled by super-resolution)": inputs,
        "output channels (--channels, doubled by --learn_sigma)": outputs,
    }
    if about["--class_cond"]:
        about["--num_classes"] = shapes["label_emb.weight"][0]
    return about


class _ResBlockShape(NamedTuple):
    level: int
    width: int
    attends: bool


def _input_blocks(shapes: Mapping[str, tuple[int, ...]]) -> list[_ResBlockShape]:
    """The residual blocks on the way down; a block that is none of them halves the size.

    Downsampling by pooling has no weights, and so no keys.
    """
    indices = {int(key.split(".")[1]) for key in shapes if key.startswith("input_blocks.")}
    blocks, level = [], 0
    for i in range(1, max(indices) + 1):
        width = shapes.get(f"input_blocks.{i}.0.in_layers.2.bias")
        if width is None:
            level += 1
        else:
            attends = f"input_blocks.{i}.1.qkv.weight" in shapes
            blocks.append(_ResBlockShape(level, width[0], attends))
    return blocks
