"""What a run writes, when a write counts, and how a checkpoint is found.

A run folder holds ``config.json`` (the flags), and for each saved step N ``modelNNNNNN.pt``,
``ema_RATE_NNNNNN.pt`` for every EMA rate, ``optNNNNNN.pt``, ``stateNNNNNN.pt`` (what else a run
needs to go on) and, written last, ``checkpointNNNNNN.json``: the manifest with the sizes and
checksums of the others. The checkpoint exists when its manifest does.

A run whose processes hold a share of the model each writes the folder ``shardedNNNNNN`` in place
of the model, EMA and optimiser files; see :mod:`.sharded`.

Folders of the original improved-diffusion, and of release 0.1.0, have no state files and no
manifests: there the model file, written last, stands for the checkpoint.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from . import dist_util
from .errors import UserError
from .files import file_entry, write_file, write_tensors
from .stored_flags import CONVERTED_FROM, flags_of, load_config

log = logging.getLogger(__name__)

YOUNG_EMA = 0.05  # share of the initial weights in an average from which on to warn
SET_ASIDE = ".set_aside"  # ends the name of a manifest that counts no more


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


def state_name(step: int) -> str:
    """File of what else a run needs to go on: counters, loss scale, sampler, pending log."""
    return f"state{step:06d}.pt"


def manifest_name(step: int) -> str:
    """File that makes a checkpoint exist: names, sizes and checksums of the others."""
    return f"checkpoint{step:06d}.json"


def posthoc_name(sigma_rel: float, step: int) -> str:
    """File of a power-function average of the weights; see :mod:`.posthoc_ema`."""
    return f"posthoc_{sigma_rel}_{step:06d}.pt"


def sharded_name(step: int) -> str:
    """Folder of the shares of a checkpoint that all processes wrote together."""
    return f"sharded{step:06d}"


_MODEL, _STATE, _MANIFEST = r"model(\d{6,})\.pt", r"state(\d{6,})\.pt", r"checkpoint(\d{6,})\.json"
_POSTHOC = r"posthoc_[\d.e-]+_\d{6,}\.pt"
_OTHERS = r"opt(\d{6,})\.pt|ema_[\d.e-]+_(\d{6,})\.pt|sharded(\d{6,})"
_OF_A_STEP = rf"{_MODEL}|{_STATE}|{_MANIFEST}|{_OTHERS}"


def step_of(path: str) -> int | None:
    """The step in the name of any file of a checkpoint; None for other names."""
    match = re.fullmatch(_OF_A_STEP, _basename(path))
    return next(int(group) for group in match.groups() if group) if match else None


def _basename(path: str) -> str:
    return re.split(r"[/\\]", path)[-1]


def parse_resume_step_from_filename(filename: str) -> int:
    """The step in a name like ``path/to/modelNNNNNN.pt``; 0 for other names.

    Folders ``shardedNNNNNN`` have one, too.
    """
    match = re.search(r"(?:model|sharded)(\d+)(?:\.[^/]*)?$", filename)
    return int(match.group(1)) if match else 0


def is_model_name(path: str) -> bool:
    """Whether a file is named as the loop names its models, so that others belong to it."""
    return re.search(r"model\d+\.[^/\\]*$", path) is not None or is_sharded(path)


def is_sharded(path: str) -> bool:
    """Whether a path is named as the loop names its folders of shares."""
    return re.fullmatch(r"sharded\d{6,}", _basename(path)) is not None


def describe_weights(path: str) -> str:
    """Which weights a file holds, by its name; warns of an average that is still young."""
    name = _basename(path)
    posthoc = re.fullmatch(r"ema_posthoc([\d.e-]+)_\d+\.pt", name)
    if posthoc:
        return f"weights averaged after training, of relative width {posthoc.group(1)}"
    average = re.fullmatch(r"ema_([\d.e-]+)_(\d+)\.pt", name)
    if not average:
        source = origin(path, flags_of(path)[1])
        if source:
            return f"converted from {source}"
        raw = name.startswith("model")
        return "weights as trained; ema_*.pt files usually sample better" if raw else "weights"
    rate, step = float(average.group(1)), int(average.group(2))
    left = rate**step
    text = f"weights averaged at rate {rate:g}"
    if load_config(os.path.dirname(path)).get("ema_warmup"):
        return f"{text}, warmed up"
    if left > YOUNG_EMA:
        text += f"; WARNING: {left:.0%} of them is still the initial noise: try a lower EMA rate"
    return text


def origin(path: str, flags: Mapping[str, Any]) -> str:
    """The name of the file that a converted checkpoint was made of; '' for any other.

    :param flags: those stored with it.
    """
    is_average = re.fullmatch(r"ema_.+_\d+\.pt", _basename(path))  # not of a conversion
    return "" if is_average else str(flags.get(CONVERTED_FROM) or "")


# -- finding ----------------------------------------------------------------------------------


def find_beside(main_checkpoint: str, name: str) -> str | None:
    """The path of a file in the folder of a checkpoint, or None if there is no such file.

    The first process looks, for all.
    """
    import blobfile as bf

    path = bf.join(bf.dirname(main_checkpoint), name)
    return path if dist_util.on_first_rank(lambda: bf.exists(path)) else None


def find_newest_model(folder: str, before: int | None = None) -> str | None:
    """The newest whole checkpoint in a run folder, or None if there is none.

    The first process looks, for all. Files are compared with their checksums; a damaged
    checkpoint is passed over, with a warning, for the one before.

    :param before: if given, pass over the checkpoints of this step and later ones.
    :return: its model file; or its folder of shares, if it has no model file.
    :raises ValueError: on every process, if there are checkpoints but all are damaged.
    """
    return dist_util.on_first_rank(lambda: _newest_model(folder, before))


def locate(path: str, flag: str = "resume_checkpoint") -> str:
    """The model file, or the folder of shares, of the checkpoint that a user named.

    The first process looks, for all.

    :param path: any file of a checkpoint, its folder of shares, a folder of checkpoints, or a
        lone file of weights.
    :param flag: the flag that named it, for the errors.
    :raises ValueError: on every process, if there is no such checkpoint, or it is not whole.
    """
    return dist_util.on_first_rank(lambda: _locate(path, flag))


def refuse_folder(flag: str, path: str) -> None:
    """Refuse a folder of checkpoints where one of its files must be named.

    :param flag: that names the path.
    :raises ValueError: on every process, with the newest file to name.
    """
    is_folder = dist_util.on_first_rank(lambda: "://" not in path and os.path.isdir(path))
    if is_folder and not (is_sharded(path.rstrip("/")) or find_shares(path)):  # told elsewhere
        names = sorted(os.listdir(path))
        averages = [name for name in names if re.fullmatch(r"ema_.+_\d+\.pt", name)]
        models = [name for name in names if is_model_name(name)]
        known = (averages or models)[-1:] or ["ema_0.9999_010000.pt"]
        raise UserError(
            f"--{flag} {path} is a folder: name a file in it, such as {os.path.join(path, *known)}"
        )


def find_posthoc(folder: str) -> list[str]:
    """The paths of the power-function averages in a run folder, sorted by name."""
    import blobfile as bf

    return [bf.join(folder, name) for name in _names(folder) if re.fullmatch(_POSTHOC, name)]


def find_shares(folder: str) -> list[str]:
    """The folders of shares of the checkpoints in a run folder, by step.

    :return: those that a manifest lists; files of them may be damaged.
    :raises ValueError: if a manifest is damaged.
    """
    import blobfile as bf

    names = _names(folder)
    steps = [step for step in sorted(_steps(names, _MANIFEST)) if sharded_name(step) in names]
    return [bf.join(folder, sharded_name(step)) for step in steps if _has_shares(folder, step)]


def _has_shares(folder: str, step: int) -> bool:
    """Whether the shares belong to the checkpoint, and are not left from an earlier one."""
    return any(name.startswith(sharded_name(step)) for name in read_manifest(folder, step))


def _names(folder: str) -> list[str]:
    import blobfile as bf

    return sorted(bf.listdir(folder)) if bf.isdir(folder) else []


def _steps(names: Collection[str], pattern: str) -> set[int]:
    """The steps of the files whose whole name matches a pattern."""
    matches = (re.fullmatch(pattern, name) for name in names)
    return {int(match.group(1)) for match in matches if match}


def _newest_model(folder: str, before: int | None = None) -> str | None:
    import blobfile as bf

    names = _names(folder)
    problems: list[str] = []
    steps = (step for step in _steps(names, _MANIFEST) if before is None or step < before)
    for step in sorted(steps, reverse=True):
        problem = _problem(folder, step)
        if not problem:
            if problems:
                log.warning(f"WARNING: going back to the checkpoint of step {step} in {folder}")
            return _main_file(folder, step)
        problems.append(problem)
        log.warning(f"WARNING: the checkpoint of step {step} is passed over: {problem}")
    if problems:
        raise UserError(
            f"'{folder}' holds no whole checkpoint: {problems[0]}; move its files away to start "
            "anew, or name another --log_dir"
        )
    # A state file without a manifest tells of a save that was cut off, not of a foreign folder
    foreign = _steps(names, _MODEL) - _steps(names, _STATE)
    foreign = {step for step in foreign if before is None or step < before}
    return bf.join(folder, model_name(max(foreign))) if foreign else None


def _main_file(folder: str, step: int) -> str:
    """The model file of a whole checkpoint; or its folder of shares, if it has none."""
    import blobfile as bf

    names = read_manifest(folder, step)
    return bf.join(folder, model_name(step) if model_name(step) in names else sharded_name(step))


def _locate(path: str, flag: str) -> str:
    import blobfile as bf

    path = path.rstrip("/")
    if bf.isdir(path) and not is_sharded(path):
        newest = _newest_model(path)
        if newest is None:
            raise UserError(f"--{flag} '{path}': the folder holds no checkpoint")
        return newest
    if not bf.exists(path):
        raise UserError(f"--{flag} '{path}' does not exist or is no file")
    step = step_of(path)
    if step is None:
        return path
    folder = bf.dirname(path)
    names = set(_names(folder or "."))
    model = bf.join(folder, model_name(step))
    if manifest_name(step) in names:
        problem = _problem(folder, step)
        if problem:
            raise UserError(f"--{flag} '{path}': the checkpoint is damaged: {problem}")
        return _main_file(folder, step)
    if state_name(step) in names:
        raise UserError(
            f"--{flag} '{path}': the checkpoint is incomplete: its manifest "
            f"{manifest_name(step)} is missing, as after a save that was cut off"
        )
    if model_name(step) in names:
        return model
    if _basename(path).startswith("ema_"):
        return path  # weights like any others, without the rest of their checkpoint
    raise UserError(f"--{flag} '{path}': {model_name(step)} is missing beside it")


# -- writing ----------------------------------------------------------------------------------


def write_checkpoint(folder: str, step: int, files: Mapping[str, Any]) -> None:
    """Write the files of a checkpoint, then the manifest that makes it count.

    :param files: name -> what :func:`torch.save` is to write, in this order.
    """
    import blobfile as bf

    discard(folder, step)
    entries = {name: write_tensors(bf.join(folder, name), files[name]) for name in files}
    write_manifest(folder, step, entries)


def write_manifest(folder: str, step: int, entries: Mapping[str, Any]) -> None:
    """Make a checkpoint count, once its files are complete.

    :param entries: name -> size and checksum, as of :func:`write_tensors`.
    """
    import blobfile as bf

    manifest = json.dumps({"step": step, "files": dict(entries)}, indent=1) + "\n"
    path = bf.join(folder, manifest_name(step))
    write_file(path, manifest.encode())
    if bf.exists(path + SET_ASIDE):  # of an earlier checkpoint of this step
        bf.remove(path + SET_ASIDE)


def read_manifest(folder: str, step: int) -> dict[str, Any]:
    """The names, sizes and checksums of the files of a checkpoint that exists.

    :raises ValueError: if the manifest is damaged.
    """
    import blobfile as bf

    try:
        with bf.BlobFile(bf.join(folder, manifest_name(step)), "rb") as file:
            entries = json.loads(file.read())["files"]
        return {
            name: {"bytes": entry["bytes"], "sha256": entry["sha256"]}
            for name, entry in entries.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{manifest_name(step)} is damaged") from None


def discard(folder: str, step: int, suffix: str = "") -> None:
    """Make a checkpoint count no more, before its files are overwritten or removed.

    :param suffix: if given, keep the manifest under a name that ends so.
    """
    import blobfile as bf

    path = bf.join(folder, manifest_name(step))
    if not bf.exists(path):
        return
    if suffix:
        with bf.BlobFile(path, "rb") as file:
            write_file(path + suffix, file.read())
    bf.remove(path)


def set_aside_newer(folder: str, step: int) -> list[int]:
    """Let the checkpoints after a step count no more, as a run goes back to that step.

    Their files stay until the run comes to their steps again.

    :return: the steps of those checkpoints.
    """
    newer = sorted(s for s in _steps(_names(folder), _MANIFEST) if s > step)
    for later in newer:
        discard(folder, later, SET_ASIDE)
    return newer


def remove_partial_files(folder: str) -> None:
    """Remove what a crash in the middle of a write left behind; no file of a checkpoint."""
    if os.path.isdir(folder):
        for name in os.listdir(folder):
            whole = name.removesuffix(".tmp")
            ours = step_of(whole) is not None or re.fullmatch(_POSTHOC, whole)
            if whole != name and ours:
                os.unlink(os.path.join(folder, name))


def prune(folder: str, keep: Callable[[list[int]], Collection[int]]) -> None:
    """Remove old checkpoints; power-function averages stay.

    What a cut-off save left behind goes too. Files without a state file beside them, as the
    original improved-diffusion writes them, stay.

    :param keep: from the sorted steps of all checkpoints to those that stay.
    """
    import blobfile as bf

    names = _names(folder)
    whole = sorted(_steps(names, _MANIFEST))
    ours = {step for step in _steps(names, _STATE) if step <= max(whole, default=-1)}
    for step in ours - set(keep(whole)):
        discard(folder, step)
        doomed = [name for name in names if step_of(name) == step and name.endswith(".pt")]
        if sharded_name(step) in names:
            bf.rmtree(bf.join(folder, sharded_name(step)))
        # the state file last: as long as it is there, the others are known to be leftovers
        for name in sorted(doomed, key=lambda name: name == state_name(step)):
            bf.remove(bf.join(folder, name))


def _problem(folder: str, step: int) -> str:
    """What is wrong with a checkpoint by its manifest; empty if nothing."""
    import blobfile as bf

    try:
        entries = read_manifest(folder, step)
    except UserError as error:
        return str(error)
    for name, expected in entries.items():
        path = bf.join(folder, name)
        if not bf.exists(path):
            return f"{name} is missing"
        size = bf.stat(path).size
        if size != expected["bytes"]:
            return f"{name} has {size:,} bytes instead of {expected['bytes']:,}"
        if file_entry(path) != expected:
            return f"{name} is damaged (its checksum is wrong)"
    return ""
