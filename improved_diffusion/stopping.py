"""When training ends: bounds in steps, images or hours, and signals that ask it to stop."""

from __future__ import annotations

import math
import signal
import threading
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

from .errors import UserError
from .flags import option, require_at_least


@dataclass(frozen=True)
class Bounds:
    """How long to train; the bound that is reached first ends it."""

    train_steps: int = option(0, "train so many steps in all; 0: no such bound")
    train_images: int = option(0, "train on so many images in all; 0: no such bound")
    train_hours: float = option(
        0.0, "train so many hours in all, over all sittings of a run; 0: no such bound"
    )

    def __post_init__(self) -> None:
        require_at_least(0, self, ["train_steps", "train_images", "train_hours"])

    def total_steps(
        self, lr_anneal_steps: int, global_batch: int, step: int = 0, images: int = 0
    ) -> int | None:
        """The step at which training ends, but for ``train_hours``; None for no such bound.

        :param lr_anneal_steps: the learning rate is 0 from here on; 0 for no such step.
        :param global_batch: images per step of all processes.
        :param step: steps done already, and ``images`` seen in them.
        :raises ValueError: for bounds that contradict each other.
        """
        bounds = {}
        if self.train_steps:
            bounds[f"--train_steps {self.train_steps}"] = self.train_steps
        if self.train_images:
            left = max(0, self.train_images - images)
            bounds[f"--train_images {self.train_images}"] = step + math.ceil(left / global_batch)
        if len(set(bounds.values())) > 1:
            texts = [f"{flag} ({end} steps of {global_batch})" for flag, end in bounds.items()]
            raise UserError(f"{' and '.join(texts)} contradict each other: give one of them")
        for flag, end in bounds.items():
            if lr_anneal_steps and end > lr_anneal_steps:
                raise UserError(
                    f"{flag} goes on after --lr_anneal_steps {lr_anneal_steps}, where the learning "
                    "rate reaches 0: give one of them, or --lr_schedule"
                )
        ends = [*bounds.values(), lr_anneal_steps] if lr_anneal_steps else bounds.values()
        return min(ends, default=None)

    def seconds_left(self, seconds: float) -> float | None:
        """What is left of ``train_hours`` after so many seconds; None for no such bound."""
        return self.train_hours * 3600 - seconds if self.train_hours else None

    def describe(self, total_steps: int | None) -> str:
        """One line for people."""
        texts = [] if total_steps is None else [f"{total_steps:,} steps"]
        texts += [f"{self.train_hours:g} hours"] if self.train_hours else []
        return " or ".join(texts) or (
            "no --train_steps, --train_images, --train_hours or --lr_anneal_steps: trains until it "
            "is stopped"
        )


class StopSignals:
    """Takes note of SIGTERM, SIGUSR1 and SIGINT inside a ``with`` block.

    A second SIGINT interrupts at once. Python delivers signals to the main thread only; in
    another thread nothing is changed.
    """

    def __init__(self) -> None:
        self.received = ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for name in STOP_SIGNALS:
                if hasattr(signal, name):  # Windows has no SIGUSR1
                    number = getattr(signal, name)
                    self._before[number] = signal.signal(number, self._take_note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take_note(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name


STOP_SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT")


def ignore_stop_signals(*_: Any) -> None:
    """Leave the signals to the training process; for processes that load its data."""
    for name in STOP_SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
