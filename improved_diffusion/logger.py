"""Key-value logging to stdout, log.txt, progress.csv, progress.json and TensorBoard.

Messages go through Python's :mod:`logging`: what any module of the package says under the logger
"improved_diffusion" lands in the same places as :func:`log`.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import logging
import logging.handlers
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from .log_formats import (
    CSVOutputFormat,
    HumanOutputFormat,
    JSONOutputFormat,
    KVWriter,
    SeqWriter,
    TensorBoardOutputFormat,
    make_output_format,
)

__all__ = [
    "CSVOutputFormat",
    "DEBUG",
    "DISABLED",
    "ERROR",
    "HumanOutputFormat",
    "INFO",
    "JSONOutputFormat",
    "KVWriter",
    "Logger",
    "SeqWriter",
    "TensorBoardOutputFormat",
    "WARN",
    "configure",
    "debug",
    "default_dir",
    "dump_tabular",
    "dumpkvs",
    "error",
    "get_current",
    "get_dir",
    "get_rank_without_mpi_import",
    "getkvs",
    "hold_messages",
    "info",
    "log",
    "logimage",
    "logkv",
    "logkv_mean",
    "logkvs",
    "make_output_format",
    "mpi_weighted_mean",
    "profile",
    "profile_kv",
    "record_tabular",
    "reset",
    "rewind",
    "scoped_configure",
    "set_comm",
    "set_level",
    "warn",
]

DEBUG = logging.DEBUG
INFO = logging.INFO
WARN = logging.WARNING
ERROR = logging.ERROR
DISABLED = logging.CRITICAL


class Logger:
    """A run folder and what is written to it.

    :param dir: the run folder.
    :param output_formats: where numbers and messages go.
    :param comm: an mpi4py communicator over which means are taken at each dump; None for this
        process's own numbers.
    """

    CURRENT: Logger | None = None

    def __init__(
        self, dir: str | None, output_formats: Sequence[KVWriter], comm: Any = None
    ) -> None:
        self.dir = dir
        self.output_formats = output_formats
        self.comm = comm
        self.level = INFO
        self.name2val: defaultdict[str, Any] = defaultdict(float)
        self.name2cnt: defaultdict[str, int] = defaultdict(int)

    def logkv(self, key: str, val: Any) -> None:
        """Set a number for the next dump; a tensor of one element stays on its device till then."""
        self.name2val[key] = val

    def logkv_mean(self, key: str, val: Any) -> None:
        """Add a number to a mean over all such calls until the next dump."""
        count = self.name2cnt[key]
        self.name2val[key] = self.name2val[key] * count / (count + 1) + val / (count + 1)
        self.name2cnt[key] = count + 1

    def dumpkvs(self) -> dict[str, Any]:
        """Write what was logged since the last dump, forget it, and return it.

        :raises ValueError: for a tensor of several elements, with its key.
        """
        values = {key: _as_number(key, value) for key, value in self.name2val.items()}
        if self.comm is not None:
            values = mpi_weighted_mean(
                self.comm,
                {key: (value, self.name2cnt.get(key, 1)) for key, value in values.items()},
            )
        if self.level < DISABLED and values:
            for output in self.output_formats:
                if isinstance(output, KVWriter):
                    output.writekvs(values)
        self._forget()
        return values

    def _forget(self) -> None:
        self.name2val.clear()
        self.name2cnt.clear()

    def logimage(self, key: str, image: np.ndarray, step: int) -> None:
        """Write an image, where an output can show it.

        :param image: uint8 [H, W, C].
        """
        if self.level < DISABLED:
            for output in self.output_formats:
                if isinstance(output, KVWriter):
                    output.writeimage(key, image, step)

    def rewind(self, step: int) -> int:
        """Forget the rows of ``step`` and later ones, and what was logged since the last dump.

        A run that goes on from a checkpoint writes them again.

        :return: how many rows of the CSV were dropped.
        """
        self._forget()
        dropped = 0
        for output in self.output_formats:
            if isinstance(output, KVWriter):
                count = output.rewind(step)
                if isinstance(output, CSVOutputFormat) and count:
                    dropped += count
                    name = os.path.basename(output.filename)
                    rows, they_come = ("row", "it comes") if count == 1 else ("rows", "they come")
                    self.log(
                        f"{name}: {count} {rows} from step {step} on dropped, {they_come} again"
                    )
        return dropped

    def log(self, *args: Any, level: int = INFO) -> None:
        """Write a message, its parts separated by spaces, if the level is high enough."""
        if self.level <= level:
            for output in self.output_formats:
                if isinstance(output, SeqWriter):
                    output.writeseq(args)

    def set_level(self, level: int) -> None:
        """Drop messages below ``level``; DISABLED drops numbers too."""
        self.level = level

    def set_comm(self, comm: Any) -> None:
        """Take means over ``comm`` from now on."""
        self.comm = comm

    def get_dir(self) -> str | None:
        """The run folder."""
        return self.dir

    def close(self) -> None:
        """Close all outputs."""
        for output in self.output_formats:
            output.close()


def _as_number(key: str, value: Any) -> Any:
    if not hasattr(value, "item"):
        return value
    shape = tuple(getattr(value, "shape", ()))
    if math.prod(shape) != 1:
        raise ValueError(
            f"logkv({key!r}, ...): one number is needed, not a tensor of shape {shape}"
        )
    return value.item()


class _ToCurrentLogger(logging.Handler):
    """Hands what the package's modules log to the current :class:`Logger`."""

    def emit(self, record: logging.LogRecord) -> None:
        if Logger.CURRENT is not None:
            Logger.CURRENT.log(self.format(record), level=record.levelno)


_package_log = logging.getLogger("improved_diffusion")
_handler = _ToCurrentLogger()
_waiting = logging.handlers.MemoryHandler(capacity=1000, flushLevel=sys.maxsize)


def _make_current(logger: Logger | None) -> None:
    Logger.CURRENT = logger
    _package_log.removeHandler(_handler)
    if logger is not None:
        _package_log.addHandler(_handler)
        _package_log.setLevel(DEBUG)  # the current logger's own level decides


def hold_messages() -> None:
    """Keep what the package's modules log until a run folder is open, to write it there."""
    _package_log.addHandler(_waiting)
    _package_log.setLevel(DEBUG)


def _release_messages() -> None:
    _package_log.removeHandler(_waiting)
    _waiting.setTarget(_handler)
    _waiting.flush()


# -- the current logger -----------------------------------------------------------------------


def configure(
    dir: str | None = None,
    format_strs: Sequence[str] | None = None,
    comm: Any = None,
    log_suffix: str = "",
) -> None:
    """Open a run folder and make it the current one; its absolute path is the first message.

    :param dir: the folder; by default $OPENAI_LOGDIR, or ``runs/SCRIPT-DATE``.
    :param format_strs: names for :func:`make_output_format`; by default $OPENAI_LOG_FORMAT or
        stdout, log, csv and json on the first process, $OPENAI_LOG_FORMAT_MPI or log on others.
    :param comm: see :class:`Logger`.
    :param log_suffix: goes into the names of the files; ranks other than 0 add ``-rankNNN``.
    """
    dir = os.path.abspath(os.path.expanduser(dir or default_dir()))
    os.makedirs(dir, exist_ok=True)
    rank = get_rank_without_mpi_import()
    if rank > 0:
        log_suffix += f"-rank{rank:03d}"
    if format_strs is None:
        if rank == 0:
            names = os.environ.get("OPENAI_LOG_FORMAT", "stdout,log,csv,json")
        else:
            names = os.environ.get("OPENAI_LOG_FORMAT_MPI", "log")
        format_strs = [name for name in names.split(",") if name]
    outputs = [make_output_format(name, dir, log_suffix) for name in format_strs]
    _make_current(Logger(dir, outputs, comm))
    if outputs:
        log(f"Logging to {dir}")
    _release_messages()


def default_dir() -> str:
    """$OPENAI_LOGDIR, or ``runs/SCRIPT-DATE`` below the working directory."""
    script = os.path.splitext(os.path.basename(sys.argv[0] or "python"))[0] or "python"
    date = datetime.datetime.now().strftime("%Y-%m-%d-%H-%M-%S-%f")
    return os.environ.get("OPENAI_LOGDIR") or os.path.join("runs", f"{script}-{date}")


def get_rank_without_mpi_import() -> int:
    """The rank of this process by what the launchers set, without asking them."""
    for name in ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID"):
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    return 0


def get_current() -> Logger:
    """The current logger; opens the default run folder if there is none."""
    if Logger.CURRENT is None:
        configure()
    assert Logger.CURRENT is not None
    return Logger.CURRENT


def reset() -> None:
    """Close the current logger."""
    if Logger.CURRENT is not None:
        Logger.CURRENT.close()
        _make_current(None)


@contextlib.contextmanager
def scoped_configure(
    dir: str | None = None, format_strs: Sequence[str] | None = None, comm: Any = None
) -> Iterator[None]:
    """Use another run folder inside a ``with`` block."""
    before = Logger.CURRENT
    configure(dir=dir, format_strs=format_strs, comm=comm)
    try:
        yield
    finally:
        get_current().close()
        _make_current(before)


def logkv(key: str, val: Any) -> None:
    """Set a number for the next dump."""
    get_current().logkv(key, val)


def logkv_mean(key: str, val: Any) -> None:
    """Add a number to the mean for the next dump."""
    get_current().logkv_mean(key, val)


def logkvs(d: dict[str, Any]) -> None:
    """Set several numbers for the next dump."""
    for key, value in d.items():
        logkv(key, value)


def dumpkvs() -> dict[str, Any]:
    """Write and return what was logged since the last dump."""
    return get_current().dumpkvs()


def getkvs() -> dict[str, Any]:
    """What was logged since the last dump."""
    return get_current().name2val


def logimage(key: str, image: np.ndarray, step: int) -> None:
    """Write an image, uint8 [H, W, C], where an output can show it: TensorBoard."""
    get_current().logimage(key, image, step)


def rewind(step: int) -> int:
    """Forget the rows of ``step`` and later ones; see :meth:`Logger.rewind`."""
    return get_current().rewind(step)


def log(*args: Any, level: int = INFO) -> None:
    """Write a message, its parts separated by spaces, to stdout and log.txt."""
    get_current().log(*args, level=level)


def debug(*args: Any) -> None:
    """:func:`log` at level DEBUG."""
    log(*args, level=DEBUG)


def info(*args: Any) -> None:
    """:func:`log` at level INFO."""
    log(*args, level=INFO)


def warn(*args: Any) -> None:
    """:func:`log` at level WARN."""
    log(*args, level=WARN)


def error(*args: Any) -> None:
    """:func:`log` at level ERROR."""
    log(*args, level=ERROR)


def set_level(level: int) -> None:
    """Drop messages below ``level``."""
    get_current().set_level(level)


def set_comm(comm: Any) -> None:
    """Take means over an mpi4py communicator."""
    get_current().set_comm(comm)


def get_dir() -> str | None:
    """The run folder."""
    return get_current().get_dir()


record_tabular = logkv
dump_tabular = dumpkvs


@contextlib.contextmanager
def profile_kv(scopename: str) -> Iterator[None]:
    """Add the seconds spent in a ``with`` block to the number ``wait_SCOPENAME``."""
    start = time.perf_counter()
    try:
        yield
    finally:
        get_current().name2val[f"wait_{scopename}"] += time.perf_counter() - start


def profile(n: str) -> Callable[[Callable], Callable]:
    """A decorator: :func:`profile_kv` round every call."""

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with profile_kv(n):
                return function(*args, **kwargs)

        return timed

    return decorate


def mpi_weighted_mean(
    comm: Any, local_name2valcount: dict[str, tuple[float, float]]
) -> dict[str, float]:
    """Weighted means over the processes of an mpi4py communicator.

    :param local_name2valcount: name -> (value, weight) of this process.
    :return: name -> mean on rank 0; an empty dict elsewhere.
    """
    gathered = comm.gather(local_name2valcount)
    if comm.rank != 0:
        return {}
    totals: defaultdict[str, float] = defaultdict(float)
    counts: defaultdict[str, float] = defaultdict(float)
    for local in gathered:
        for name, (value, count) in local.items():
            totals[name] += value * count
            counts[name] += count
    return {name: totals[name] / counts[name] for name in totals if counts[name]}
