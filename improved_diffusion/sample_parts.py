"""The finished parts of a sampling job, kept until all are there, so that it can be cut off.

A part is ``partial/START-STOP.npz`` in the run folder: the samples of those indices, whole or not
at all. ``partial/flags.json`` beside them holds what decides the images.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from . import dist_util
from .errors import UserError
from .files import open_whole, write_file
from .same_job import as_stored, differences

log = logging.getLogger(__name__)

FOLDER = "partial"
FLAGS = "flags.json"
_PART = r"(\d{6,})-(\d{6,})\.npz"


class SampleParts:
    """The parts in one run folder. The first process reads and writes them.

    :param run: the run folder; it may not exist yet, and is not made before the first part.
    :param deciding: see :func:`deciding_flags`.
    :raises ValueError: on every process, if parts are there that were made with other flags.
    """

    def __init__(self, run: str, deciding: Mapping[str, Any]) -> None:
        self.folder = os.path.join(run, FOLDER)
        self._deciding = as_stored(deciding)
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
        theirs, ours = differences(stored, self._deciding)
        if theirs:
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
