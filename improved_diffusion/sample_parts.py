"""The finished parts of a sampling job, kept until all are there, so that it can be cut off.

A part is ``partial/START-STOP.npz`` in the run folder: the samples of those indices, whole or not
at all. ``partial/flags.json`` beside them holds what decides the images.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import dist_util
from .errors import UserError
from .files import open_whole, write_file
from .flags import size_text

log = logging.getLogger(__name__)

FOLDER = "partial"
FLAGS = "flags.json"
LONGEST = 100  # characters of a flag's value in an error; --betas may hold thousands of numbers
_PART = r"(\d{6,})-(\d{6,})\.npz"

# Flags that leave the images as they are, or that are kept in another form
OTHER_FLAGS = frozenset(
    [
        "num_samples",
        "batch_size",
        "log_dir",
        "save_png",
        "use_ddim",  # by the sampler
        "class_names",
        "model_path",  # by what it holds
        "base_samples",
        "dropout",  # of training alone
        "use_kl",
        "rescale_learned_sigmas",
        "loss_weight",
        "use_checkpoint",
    ]
)


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """A checksum of the types, shapes and values of tensors, in order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def deciding_flags(flags: Mapping[str, Any], **contents: Iterable[Tensor]) -> dict[str, Any]:
    """What decides the images: flags, and what the files hold that flags name.

    :param flags: all flags of the script, with those of the checkpoint.
    :param contents: by the name of a flag that names a file: the tensors that were read from it.
    :return: name -> value, as JSON holds it; of a file {"path": ..., "sha256": ...}.
    """
    deciding = {name: value for name, value in flags.items() if name not in OTHER_FLAGS}
    checksums = dist_util.on_first_rank(
        lambda: {name: fingerprint(tensors) for name, tensors in contents.items()}
    )
    for name, checksum in checksums.items():
        deciding[name] = {"path": str(flags[name]), "sha256": checksum}
    return deciding


class SampleParts:
    """The parts in one run folder. The first process reads and writes them.

    :param run: the run folder; it may not exist yet, and is not made before the first part.
    :param deciding: see :func:`deciding_flags`.
    :raises ValueError: on every process, if parts are there that were made with other flags.
    """

    def __init__(self, run: str, deciding: Mapping[str, Any]) -> None:
        self.folder = os.path.join(run, FOLDER)
        self._deciding = json.loads(json.dumps(deciding))  # as they are read back: tuples are lists
        self._marked = False  # whether the flags beside the parts are known to be those of this job
        dist_util.on_first_rank(self._check)

    def _names(self, form: str = _PART) -> list[str]:
        names = os.listdir(self.folder) if os.path.isdir(self.folder) else []
        return sorted(name for name in names if re.fullmatch(form, name))

    def _check(self) -> None:
        """Check that the parts there, if any, are parts of this job."""
        if not self._names():
            return
        path = os.path.join(self.folder, FLAGS)
        stored = None
        with contextlib.suppress(FileNotFoundError, ValueError), open(path, "rb") as file:
            stored = json.loads(file.read())
        if not isinstance(stored, dict):
            raise UserError(
                f"'{path}' is missing or damaged, which tells what the samples beside it were made "
                f"with: delete {self.folder}, or name another --log_dir"
            )
        names = [
            name for name in {**self._deciding, **stored} if _differ(name, self._deciding, stored)
        ]
        if names:
            theirs, ours = (
                " ".join(_flag_text(name, side.get(name)) for name in names)
                for side in (stored, self._deciding)
            )
            raise UserError(
                f"{self.folder} holds samples of a job that was cut off, made with {theirs}, not "
                f"{ours}: finish it with the same flags, delete {self.folder}, or name another "
                "--log_dir"
            )

    def read(self, num_samples: int) -> Iterator[tuple[int, np.ndarray, np.ndarray | None]]:
        """The parts that are whole, on the first process.

        :param num_samples: pass over samples from this index on.
        :return: of each part its first index, its images and its labels or None.
        """
        for name in self._names():
            start, stop = (int(number) for number in name.removesuffix(".npz").split("-"))
            if start >= num_samples:
                continue
            part = _read_part(os.path.join(self.folder, name), stop - start)
            if part is None:
                log.warning(f"{self.folder}/{name} is damaged: its samples are made again")
                continue
            images, labels = part
            count = num_samples - start
            yield start, images[:count], None if labels is None else labels[:count]

    def write(self, start: int, images: np.ndarray, labels: np.ndarray | None) -> None:
        """Keep the samples of indices ``start``, ``start + 1``, ..., on the first process."""
        os.makedirs(self.folder, exist_ok=True)
        flags = os.path.join(self.folder, FLAGS)
        if not (self._marked and os.path.exists(flags)):  # first, so that no part is without
            self._marked = True
            write_file(flags, (json.dumps(self._deciding, indent=1) + "\n").encode())
        path = os.path.join(self.folder, f"{start:06d}-{start + len(images):06d}.npz")
        with open_whole(path) as file:
            if labels is None:
                np.savez(file, images=images)
            else:
                np.savez(file, images=images, labels=labels)

    def remove(self) -> None:
        """Remove the parts, on the first process, once the samples are written elsewhere."""
        for form in (_PART, rf"{_PART}\.tmp", re.escape(FLAGS), rf"{re.escape(FLAGS)}\.tmp"):
            for name in self._names(form):
                os.unlink(os.path.join(self.folder, name))
        with contextlib.suppress(OSError):  # not ours alone, or never made
            os.rmdir(self.folder)


def _read_part(path: str, count: int) -> tuple[np.ndarray, np.ndarray | None] | None:
    """Images and labels of a part; None unless all its rows are there as they were written."""
    try:
        with np.load(path, allow_pickle=False) as arrays:  # checks the archive's checksums
            images, labels = arrays["images"], arrays.get("labels")
    except Exception:  # whatever a damaged archive makes zipfile or NumPy raise
        return None
    whole = len(images) == count and (labels is None or len(labels) == count)
    return (images, labels) if whole else None


def _differ(name: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Whether an entry differs; where a file lies does not matter."""
    a, b = ours.get(name), theirs.get(name)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.get("sha256") != b.get("sha256")
    return a != b


def _flag_text(name: str, value: Any) -> str:
    """A flag as it is written on the command line; for a file with the start of its checksum."""
    if value is None:
        return f"no --{name}"
    if isinstance(value, dict):
        return f"--{name} {value.get('path')} (sha256 {str(value.get('sha256'))[:8]})"
    if isinstance(value, list) and len(value) == 2:
        return f"--{name} {size_text(value)}"
    text = str(value) or "''"
    return f"--{name} {text if len(text) <= LONGEST else text[:LONGEST] + '...'}"
