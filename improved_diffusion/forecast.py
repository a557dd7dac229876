"""From what was measured in short to what a whole training takes: its time and its disk."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from .saving import SavingOptions

UNBOUNDED_STEPS = 1000  # what is forecast of a training without an end


@dataclass(frozen=True)
class Look:
    """A preview or a pass over the validation images, measured once."""

    name: str
    interval: int  # steps
    seconds: float
    bytes: int  # of the picture that it leaves


@dataclass(frozen=True)
class Measured:
    """What the parts of a training take; seconds and bytes."""

    start_seconds: float  # from the start of the process to the first step
    step_seconds: float
    save_seconds: float  # that one save in the middle adds to the steps
    last_save_seconds: float  # for which the end waits
    checkpoint_bytes: int  # with no step pending
    posthoc_bytes: int  # of these: what stays when the checkpoint is removed
    pending_bytes: float  # more, for each step since the last row of the log
    row_bytes: float  # that a row adds to the logs
    folder_bytes: int  # what else the run folder holds
    looks: tuple[Look, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What the flags ask for.

    :param first_step: steps that are done already.
    :param total_steps: the step at which training ends; None for no such bound.
    :param seconds_left: of training, until it ends; None for no such bound.
    """

    first_step: int
    total_steps: int | None
    seconds_left: float | None
    log_interval: int
    save_interval: int
    saving: SavingOptions

    @property
    def bounded(self) -> bool:
        """Whether training ends."""
        return self.total_steps is not None or self.seconds_left is not None

    def end(self, step_seconds: float) -> int:
        """The step at which training ends; without bounds, some steps from now."""
        ends = [] if self.total_steps is None else [self.total_steps]
        if self.seconds_left is not None:
            ends.append(self.first_step + math.ceil(max(0, self.seconds_left) / step_seconds))
        return max(self.first_step, min(ends, default=self.first_step + UNBOUNDED_STEPS))


@dataclass(frozen=True)
class Forecast:
    """What a whole training takes, from now on."""

    steps: int
    seconds: float
    start_seconds: float
    step_seconds: float  # of all steps
    save_seconds: float  # of all saves
    look_seconds: float  # of all previews and validations
    saves: int
    kept: int  # of these, what stays
    bytes: int  # that the run leaves on the disk
    most_bytes: int  # that it needs there at a time


def forecast(plan: Plan, measured: Measured) -> Forecast:
    """What a training takes that goes as planned."""
    end = plan.end(measured.step_seconds)
    steps = end - plan.first_step
    saves = list(saved_steps(plan, end, measured.step_seconds)) if steps else []
    kept = plan.saving.kept([step for step, _ in saves])
    sizes = {
        step: round(measured.checkpoint_bytes + pending * measured.pending_bytes)
        for step, pending in saves
    }
    left = sum(sizes[step] if step in kept else measured.posthoc_bytes for step in sizes)
    looks = [(look, multiples(plan.first_step, end, look.interval)) for look in measured.looks]
    rows = multiples(plan.first_step, end, plan.log_interval) + (plan.first_step == 0 < steps)
    left += round(rows * measured.row_bytes) + measured.folder_bytes
    left += sum(look.bytes * count for look, count in looks)
    at_end = bool(saves) and saves[-1][0] == end
    parts = {
        "start_seconds": measured.start_seconds,
        "step_seconds": steps * measured.step_seconds,
        "save_seconds": measured.save_seconds * (len(saves) - at_end)
        + measured.last_save_seconds * at_end,
        "look_seconds": sum(look.seconds * count for look, count in looks),
    }
    return Forecast(
        steps=steps,
        seconds=sum(parts.values()),
        **parts,
        saves=len(saves),
        kept=len(kept),
        bytes=left,
        # a checkpoint is complete before an old one goes
        most_bytes=left + (max(sizes.values()) if len(kept) < len(saves) else 0),
    )


def multiples(first: int, end: int, interval: int) -> int:
    """How many of the steps first ... end - 1 are multiples of an interval, but for step 0."""
    return (max(end, 1) - 1) // interval - (max(first, 1) - 1) // interval


def saved_steps(plan: Plan, end: int, step_seconds: float) -> Iterator[tuple[int, int]]:
    """The steps that the checkpoints of a training are named after.

    :param end: the step at which training ends.
    :return: pairs of a step and the number of steps whose losses are pending there, which is that
        since the last row of the log.
    """
    last, interval = plan.first_step, plan.save_interval
    gap = math.inf
    if plan.saving.save_minutes:  # the clock starts again at each save
        gap = max(1, math.ceil(60 * plan.saving.save_minutes / step_seconds))
    step = math.ceil(plan.first_step / interval) * interval
    while (step := int(min(step, last + gap))) < end:
        yield step, step % plan.log_interval
        last = step
        step = (step // interval + 1) * interval
    if (end - 1) % interval:  # that step is saved already
        yield end, (end - 1) % plan.log_interval


def size_text(size: float) -> str:
    """A number of bytes for people: ``12.3 MiB``, ``1.23 GiB``."""
    units = ["bytes", "KiB", "MiB", "GiB", "TiB"]
    power = min(max(int(size).bit_length() - 1, 0) // 10, len(units) - 1)
    return f"{size / 1024**power:.{(0, 1, 1, 2, 2)[power]}f} {units[power]}"


def duration_text(seconds: float) -> str:
    """A time for people: ``0.52 ms``, ``12.3 s``, ``1:02:03``, ``3 days 4:05:06``."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, left = divmod(round(seconds), 60)
    days, hours = divmod(minutes // 60, 24)
    text = f"{hours}:{minutes % 60:02}:{left:02}"
    return f"{days} day{'s' if days > 1 else ''} {text}" if days else text
