"""Bits per dimension image by image: collected from all processes, stored, taken up again."""

from __future__ import annotations

import json
import math
import os
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from . import dist_util
from .errors import UserError
from .files import open_whole
from .same_job import as_stored, differences

SAVE_SECONDS = 30.0  # between two writes of what is there; a killed job loses no more

Batches = Iterable[tuple[Tensor, dict[str, Tensor], list[int]]]
DAMAGE = (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Measured:
    """Of a batch: ``bpd`` float64 [N]; ``sums`` over its images of further numbers, by name."""

    bpd: np.ndarray
    sums: dict[str, np.ndarray]


class Likelihood(Protocol):
    """A way to measure bits/dim."""

    def measure(
        self, images: Tensor, model_kwargs: Mapping[str, Tensor], indices: Sequence[int]
    ) -> Measured:
        """Bits/dim of images [N, C, ...] in [-1, 1], N > 0.

        :param model_kwargs: arguments of the model, [N] each.
        :param indices: of the images, on which with the seed all draws depend.
        """

    def protocol(self) -> dict[str, Any]:
        """What of the way decides the numbers, in words that JSON knows."""


@dataclass(frozen=True)
class Estimate:
    """The mean over the images seen so far, in bits/dim, and its standard error."""

    count: int
    bpd: float
    standard_error: float


class Results:
    """What is known of each image, by every method, the same on all processes.

    :ivar indices: int64 [count] the images, in the order in which they came.
    :ivar bpd: by method float64 [count].
    :ivar sums: by method and name, sums over the images.
    """

    def __init__(self, methods: Iterable[str]) -> None:
        self.indices = np.zeros(0, dtype=np.int64)
        self.bpd = {method: np.zeros(0) for method in methods}
        self.sums: dict[str, dict[str, np.ndarray]] = {method: {} for method in self.bpd}

    @property
    def count(self) -> int:
        """How many images there are."""
        return len(self.indices)

    def add(self, indices: Sequence[int], measured: Mapping[str, Measured]) -> None:
        """Take in a batch of images, measured by every method."""
        self.indices = np.append(self.indices, np.array(indices, dtype=np.int64))
        for method, new in measured.items():
            self.bpd[method] = np.append(self.bpd[method], new.bpd)
            sums = self.sums[method]
            for name, values in new.sums.items():
                sums[name] = sums[name] + values if name in sums else values

    def missing(self, wanted: int) -> list[int]:
        """Which of the first images are not there."""
        return sorted(set(range(wanted)) - set(self.indices.tolist()))

    def estimate(self, method: str) -> Estimate:
        """The mean of a method; the error is infinite where there is one image alone."""
        bpd = self.bpd[method]
        error = bpd.std(ddof=1) / math.sqrt(len(bpd)) if len(bpd) > 1 else math.inf
        return Estimate(len(bpd), float(bpd.mean()), float(error))

    def means(self, method: str) -> dict[str, np.ndarray]:
        """The further numbers of a method, as means over the images."""
        return {name: values / self.count for name, values in self.sums[method].items()}

    # -- files --------------------------------------------------------------------------------

    def save(self, path: str, deciding: Mapping[str, Any]) -> None:
        """Write an npz file: "index", the images in order, "bpd_METHOD", and sums.

        :param deciding: what decides the numbers, see :func:`.deciding_flags`.
        """
        order = np.argsort(self.indices, kind="stable")
        arrays = {
            "flags": np.array(json.dumps(dict(deciding))),
            "index": self.indices[order],
            **{f"bpd_{method}": bpd[order] for method, bpd in self.bpd.items()},
            **{
                f"sum_{method}_{name}": values
                for method, sums in self.sums.items()
                for name, values in sums.items()
            },
        }
        with open_whole(path) as file:
            np.savez(file, allow_pickle=False, **arrays)

    def load(self, path: str, deciding: Mapping[str, Any]) -> None:
        """Take in what an earlier sitting saved, if it did; the first process reads, for all.

        :raises ValueError: on every process, if the file is damaged, or if its numbers were decided
            by something else, which is named.
        """
        self.indices, self.bpd, self.sums = dist_util.on_first_rank(
            lambda: self._read(path, deciding)
        )

    def _read(self, path: str, deciding: Mapping[str, Any]) -> tuple[Any, Any, Any]:
        if not os.path.exists(path):
            return self.indices, self.bpd, self.sums
        try:
            with np.load(path, allow_pickle=False) as file:  # checks the archive's checksums
                arrays = {name: file[name] for name in file.files}
            stored = json.loads(str(arrays["flags"]))
            index = arrays["index"]
        except DAMAGE:
            raise UserError(
                f"'{path}' is damaged: delete it to begin anew, or name another --log_dir"
            ) from None
        _check_same(path, stored, as_stored(deciding))
        sums: dict[str, dict[str, np.ndarray]] = {}
        for method in self.bpd:
            start = f"sum_{method}_"
            sums[method] = {
                name.removeprefix(start): values
                for name, values in arrays.items()
                if name.startswith(start)
            }
        return index, {method: arrays[f"bpd_{method}"] for method in self.bpd}, sums


def _check_same(path: str, stored: Mapping[str, Any], deciding: Mapping[str, Any]) -> None:
    theirs, ours = differences(stored, deciding)
    if theirs:
        raise UserError(
            f"'{path}' holds results of {theirs}, not {ours}: give the same flags, or name another "
            "--log_dir"
        )


def measure_all(
    methods: Mapping[str, Likelihood], batches: Batches, results: Results
) -> Iterator[Results]:
    """Measure batches by every method; every process must bring equally many, some maybe empty.

    :param batches: (float [N, C, ...] in [-1, 1], arguments of the model [N], indices of the
        images, on which with the seed the draws depend), on the device.
    :param results: what there is already; grows.
    :return: ``results``, after each round of batches.
    """
    for images, cond, indices in batches:
        measured = {}
        if len(images):
            measured = {
                name: method.measure(images, cond, indices) for name, method in methods.items()
            }
        for share, theirs in dist_util.gather_objects((indices, measured)):
            if theirs:
                results.add(share, theirs)
        yield results


def saving(rounds: Iterable[Results], path: str, deciding: Mapping[str, Any]) -> Iterator[Results]:
    """Pass on results; the first process saves them now and then, and when they are complete."""
    last = time.monotonic()
    results = None
    for results in rounds:
        yield results
        if dist_util.get_rank() == 0 and time.monotonic() - last >= SAVE_SECONDS:
            results.save(path, deciding)
            last = time.monotonic()
    if results is not None and dist_util.get_rank() == 0:
        results.save(path, deciding)
