"""The flags that a run stores beside its checkpoints, and what they mean to the next command."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from typing import Any

from . import dist_util
from .errors import UserError
from .files import write_file
from .flags import size_text
from .safetensors_format import is_safetensors, read_flags

CONFIG = "config.json"
CONVERTED_FROM = "converted_from"  # flag of a conversion: the file that its weights came from


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


def flags_of(path: str) -> tuple[str, dict[str, Any]]:
    """The flags of a checkpoint: those that its file itself holds, else those of its folder.

    :param path: a file; one of safetensors may hold its flags.
    :return: that file or folder, and the flags, empty if there are none.
    :raises ValueError: on every process, if what holds the flags is damaged.
    """
    inside = dist_util.on_first_rank(lambda: read_flags(path)) if is_safetensors(path) else {}
    if inside:
        return path, inside
    folder = os.path.dirname(path)
    return folder, load_config(folder)


def place_of_flags(where: str) -> str:
    """The file that holds the flags, of a folder or of a file that holds them itself."""
    return where if is_safetensors(where) else f"{where}/{CONFIG}"


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
    :param where: the folder of the checkpoint, or the file that holds its flags, for the error.
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
            f"({place_of_flags(where)}): leave the {flag} out"
        )
    return merged


def _flag_text(value: Any) -> str:
    return size_text(value) if isinstance(value, tuple) else str(value)
