"""Where the numbers and messages of a run are written: tables, JSON, CSV, TensorBoard.

What the files hold survives a kill at any moment, and :meth:`KVWriter.rewind` forgets what a
resumed run will write again.
"""

from __future__ import annotations

import contextlib
import csv
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TextIO

import numpy as np

from .errors import UserError

KEY_WIDTH = 30  # longer keys and values are cut in the table on stdout


class KVWriter:
    """Something that writes a dict of numbers at each dump."""

    def writekvs(self, kvs: dict[str, Any]) -> None:
        """Write one row."""
        raise NotImplementedError

    def writeimage(self, key: str, image: np.ndarray, step: int) -> None:
        """Write an image, uint8 [H, W, C]; nothing by default."""

    def rewind(self, step: int) -> int:
        """Forget the rows of ``step`` and later ones, as they come again; nothing by default.

        :return: how many rows were dropped.
        """
        return 0

    def close(self) -> None:
        """Finish writing."""


class SeqWriter:
    """Something that writes messages."""

    def writeseq(self, seq: Iterable[Any]) -> None:
        """Write one message, given as its parts."""
        raise NotImplementedError


class HumanOutputFormat(KVWriter, SeqWriter):
    """Messages and tables for people, through a :class:`logging.Handler`.

    :param filename_or_file: a path to append to, or an open text file.
    """

    def __init__(self, filename_or_file: str | TextIO) -> None:
        self.handler: logging.StreamHandler
        if isinstance(filename_or_file, str):
            self.handler = logging.FileHandler(filename_or_file, encoding="utf-8")
        else:
            self.handler = logging.StreamHandler(filename_or_file)

    def writekvs(self, kvs: dict[str, Any]) -> None:
        """Write a table of two columns, sorted by key."""
        if not kvs:
            return
        rows = [(_cut(key), _cut(_human(value))) for key, value in sorted(kvs.items())]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        rule = "-" * (sum(widths) + 7)
        lines = [f"| {key:<{widths[0]}} | {value:<{widths[1]}} |" for key, value in rows]
        self.writeseq(["\n".join([rule, *lines, rule])])

    def writeseq(self, seq: Iterable[Any]) -> None:
        """Write the parts, separated by spaces."""
        message = " ".join(map(str, seq))
        with _above_live_bars(self.handler.stream):
            self.handler.emit(logging.makeLogRecord({"msg": "%s", "args": (message,)}))

    def close(self) -> None:
        """Close the file, unless it was open when we got it."""
        self.handler.close()


def _above_live_bars(stream: TextIO | None) -> contextlib.AbstractContextManager[None]:
    """Take tqdm's bars off a terminal while something is written, if a program has any."""
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    isatty = getattr(stream, "isatty", None)
    if tqdm is None or isatty is None or not isatty():
        return contextlib.nullcontext()
    return tqdm.external_write_mode(file=stream)


def _human(value: Any) -> str:
    return f"{value:<8.3g}".rstrip() if hasattr(value, "__float__") else str(value)


def _cut(text: str) -> str:
    return text if len(text) <= KEY_WIDTH else text[: KEY_WIDTH - 3] + "..."


class _Row(NamedTuple):
    """Where a row stands in its file."""

    start: int  # bytes
    step: float  # NaN, which is not at or after any step, if it says none
    whole: bool  # False if a crash cut it off, or seems to have


def _step_number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _lines(filename: str) -> Iterator[bytes]:
    if os.path.exists(filename):
        with open(filename, "rb") as file:
            yield from file


def _text(line: bytes) -> str:
    """A line, whatever a crash left in it: cut-off characters, zeros."""
    return line.decode(errors="replace").replace("\0", "\ufffd")


def _end_last_line(filename: str) -> None:
    """End a line that a crash cut off, so that the next one starts afresh."""
    if os.path.exists(filename) and os.path.getsize(filename):
        with open(filename, "rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.write(b"\n")


def _drop_rows(filename: str, rows: list[_Row], step: int) -> int:
    """End a file before its first row of ``step`` or later, or before a last one that is cut off.

    A file of no rows is removed. A kill leaves the old file or the new one.

    :return: how many rows were dropped.
    """
    last = len(rows) - 1
    kept = 0
    while kept <= last and not (rows[kept].step >= step or (kept == last and not rows[kept].whole)):
        kept += 1
    if kept == 0:
        with contextlib.suppress(FileNotFoundError):
            os.remove(filename)
    elif kept <= last:
        with open(filename, "rb+") as file:
            file.truncate(rows[kept].start)
            os.fsync(file.fileno())
    return len(rows) - kept


class JSONOutputFormat(KVWriter):
    """One JSON object per line, appended.

    :param filename: path.
    """

    def __init__(self, filename: str) -> None:
        self.filename = filename

    def writekvs(self, kvs: dict[str, Any]) -> None:
        """Append one line."""
        _end_last_line(self.filename)
        with open(self.filename, "a", encoding="utf-8") as file:
            file.write(json.dumps(kvs, sort_keys=True, default=float) + "\n")

    def rewind(self, step: int) -> int:
        """Drop the lines from the first one of ``step`` or later on, and one that was cut off."""
        return _drop_rows(self.filename, list(self._rows()), step)

    def _rows(self) -> Iterator[_Row]:
        start = 0
        for line in _lines(self.filename):
            try:
                step, whole = _step_number(json.loads(line).get("step")), True
            except (ValueError, AttributeError):  # no JSON, or not an object
                step, whole = math.nan, False
            yield _Row(start, step, whole)
            start += len(line)


class CSVOutputFormat(KVWriter):
    """Comma-separated rows, appended; a new key adds a column to the rows already there.

    :param filename: path.
    """

    def __init__(self, filename: str) -> None:
        self.filename = filename
        self.keys: list[str] = next(self._read(), [])

    def writekvs(self, kvs: dict[str, Any]) -> None:
        """Append one row; a key that is missing leaves its cell empty."""
        _end_last_line(self.filename)
        new = sorted(kvs.keys() - set(self.keys))
        if new:
            self._add_columns(new)
        with open(self.filename, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.keys, restval="").writerow(kvs)

    def _add_columns(self, new: list[str]) -> None:
        rows = [row for row in self._read() if row][1:]
        keys = self.keys + new
        with open(self._beside, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(keys)
            writer.writerows(row + [""] * (len(keys) - len(row)) for row in rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(self._beside, self.filename)  # a crash leaves the old file or the new one
        self.keys = keys

    @property
    def _beside(self) -> str:
        return self.filename + ".tmp"

    def rewind(self, step: int) -> int:
        """Drop the rows from the first one of ``step`` or later on, and one that was cut off.

        What stands before is kept byte for byte, the header with all its columns too. If no row
        is left, nor is the file: the columns start afresh.
        """
        with contextlib.suppress(FileNotFoundError):  # a crash left it while adding columns
            os.remove(self._beside)
        dropped = _drop_rows(self.filename, list(self._rows()), step)
        self.keys = next(self._read(), [])
        return dropped

    def _rows(self) -> Iterator[_Row]:
        """Where the rows below the header stand; one may have several lines."""
        read, ended = 0, True

        def lines() -> Iterator[str]:
            nonlocal read, ended
            for line in _lines(self.filename):
                read, ended = read + len(line), line.endswith(b"\n")
                yield _text(line)

        rows = csv.reader(lines())
        keys = next(rows, [])
        start = read
        for row in rows:
            step = _step_number(dict(zip(keys, row, strict=False)).get("step"))
            if row:  # not an empty line
                yield _Row(start, step, whole=ended and len(row) >= len(keys))
            start = read

    def _read(self) -> Iterator[list[str]]:
        """All rows, the header first."""
        return csv.reader(map(_text, _lines(self.filename)))


class TensorBoardOutputFormat(KVWriter):
    """Event files for TensorBoard; needs the extra ``tensorboard``.

    :param dir: folder for the event files.
    :raises ValueError: if the extra is not installed.
    """

    def __init__(self, dir: str) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "log format 'tensorboard' needs a package: pip install "
                "'improved-diffusion[tensorboard]'"
            ) from None
        self._open = SummaryWriter
        self.dir = dir
        self.writer = SummaryWriter(dir)
        self.step = 0

    def writekvs(self, kvs: dict[str, Any]) -> None:
        """Write one point per key, at the step under the key "step" or else at a running count."""
        self.step = int(kvs.get("step", self.step + 1))
        for key, value in kvs.items():
            self.writer.add_scalar(key, float(value), self.step)
        self.writer.flush()

    def writeimage(self, key: str, image: np.ndarray, step: int) -> None:
        """Write an image, uint8 [H, W, C]."""
        self.writer.add_image(key, image, step, dataformats="HWC")
        self.writer.flush()

    def rewind(self, step: int) -> int:
        """Go on in a new event file that tells TensorBoard to drop the points from ``step`` on."""
        self.writer.close()
        self.writer = self._open(self.dir, purge_step=step)
        self.step = step - 1
        return 0  # nobody knows: they stay in the older files

    def close(self) -> None:
        """Close the event file."""
        self.writer.close()


def make_output_format(format: str, ev_dir: str, log_suffix: str = "") -> KVWriter:
    """One output by name.

    :param format: "stdout", "log", "json", "csv" or "tensorboard".
    :param ev_dir: the run folder; made if missing.
    :param log_suffix: goes before the ending of the file's name.
    :raises ValueError: for an unknown format.
    """
    makers: dict[str, Callable[[], KVWriter]] = {
        "stdout": lambda: HumanOutputFormat(sys.stdout),
        "log": lambda: HumanOutputFormat(os.path.join(ev_dir, f"log{log_suffix}.txt")),
        "json": lambda: JSONOutputFormat(os.path.join(ev_dir, f"progress{log_suffix}.json")),
        "csv": lambda: CSVOutputFormat(os.path.join(ev_dir, f"progress{log_suffix}.csv")),
        "tensorboard": lambda: TensorBoardOutputFormat(os.path.join(ev_dir, f"tb{log_suffix}")),
    }
    if format not in makers:
        raise UserError(f"unknown log format '{format}'; choose among {', '.join(makers)}")
    os.makedirs(ev_dir, exist_ok=True)
    return makers[format]()
