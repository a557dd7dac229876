"""The live line of a training run: where it is, how fast, when it ends, what it waits for."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import torch

log = logging.getLogger(__name__)


class Progress:
    """One live line on the first process of a run; plain lines where stdout is no terminal.

    Such as ``step 120/1500, 812 images/s, 0:01:42 left, loss 0.1234, 3% waiting for data``. Speed
    and waiting are those between the last two reports. A step counts when the host is done with
    it; for the speed to be the device's, read something from it before each report.

    :param first_step: steps that are done already.
    :param total_steps: the run ends when so many are done; None if it does not.
    :param seconds_left: the run ends after so much time from now; None if it does not.
    :param global_batch: images per step of all processes together.
    :param enabled: False shows nothing, for all processes but the first.
    :param clock: the time in seconds.
    """

    def __init__(
        self,
        *,
        first_step: int,
        total_steps: int | None,
        seconds_left: float | None,
        global_batch: int,
        enabled: bool,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._done = first_step
        self._total = total_steps
        self._global_batch = global_batch
        self._enabled = enabled
        self._clock = clock
        self._end = math.inf if seconds_left is None else clock() + seconds_left
        self._steps_per_second = 0.0  # 0: not known
        self._reported: list[str] = []  # what stays until the next report
        self._start_window()
        self._bar = self._open_bar(sys.stdout) if enabled and sys.stdout.isatty() else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        start = self._clock()
        try:
            yield
        finally:
            self._waited += self._clock() - start

    def step(self) -> None:
        """One step is done. This does not wait for the device."""
        self._done += 1
        if self._bar is not None:
            self._bar.set_description_str(self._line(), refresh=False)
            self._bar.update()  # tqdm draws it if the last time is long enough ago

    def report(self, loss: float | None) -> None:
        """A row of the log is written: measure, and show the loss if there is one."""
        if not self._enabled:
            return
        seconds = self._clock() - self._window_start
        steps = self._done - self._window_first
        self._steps_per_second = steps / seconds if seconds > 0 else 0.0
        self._reported = [] if loss is None else [f"loss {loss:.4g}"]
        if seconds > 0:
            self._reported.append(f"{self._waited / seconds:.0%} waiting for data")
        self._reported += _device_memory()
        self._start_window()
        if self._bar is None:
            log.info(self._line())
        else:
            self._bar.set_description_str(self._line())

    def close(self) -> None:
        """Leave the line as it is and go to the next one."""
        if self._bar is not None:
            self._bar.close()

    def _start_window(self) -> None:
        self._window_start = self._clock()
        self._window_first = self._done
        self._waited = 0.0

    def _line(self) -> str:
        parts = [f"step {self._done}" + ("" if self._total is None else f"/{self._total}")]
        if self._steps_per_second > 0:
            parts.append(f"{_three_digits(self._steps_per_second * self._global_batch)} images/s")
        seconds_left = self._seconds_left()
        if math.isfinite(seconds_left):
            parts.append(f"{_hours(seconds_left)} left")
        return ", ".join(parts + self._reported)

    def _seconds_left(self) -> float:
        """Until the last step or the end of the time, whichever comes first."""
        left = self._end - self._clock()
        if self._total is not None and self._steps_per_second > 0:
            left = min(left, (self._total - self._done) / self._steps_per_second)
        return max(left, 0.0)

    def _open_bar(self, terminal: TextIO) -> Any:
        from tqdm import tqdm  # here, as importing the package needs torch and NumPy only

        return tqdm(
            desc=self._line(),
            total=self._total,
            initial=self._done,
            file=terminal,
            miniters=1,  # look at the time after every step
            bar_format="{desc}" if self._total is None else "{desc} |{bar}|",
            **_size(terminal),
        )


def _size(terminal: TextIO) -> dict[str, Any]:
    """What tells tqdm the size of a terminal, some of which claim to have no columns at all."""
    try:
        known = os.get_terminal_size(terminal.fileno()).columns > 0
    except (OSError, ValueError):
        known = False
    return {"dynamic_ncols": True} if known else {"ncols": 79, "nrows": 24}


def _three_digits(number: float) -> str:
    """At least three significant digits: 0.0123, 4.56, 812, 12345."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def _hours(seconds: float) -> str:
    """h:mm:ss; the hours have as many digits as they need."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def _device_memory() -> list[str]:
    """The most that tensors of this process took at a time on a GPU, if it uses one."""
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
    return [f"{peak / 2**30:.1f} GiB of GPU memory"] if peak else []
