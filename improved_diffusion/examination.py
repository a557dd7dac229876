"""A real training, watched for a while: how long its parts take, and what it writes."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import multiprocessing
import os
import shutil
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint, dist_util, logger, memory
from .divergence import all_finite
from .errors import RunAgain, Stop, UserError
from .flags import pick
from .forecast import Look, Measured, Plan, duration_text, multiples, size_text
from .gaussian_diffusion import GaussianDiffusion
from .parallel import local
from .report import Report
from .resuming import restore
from .runs import Flags
from .saving import SavingOptions
from .stopping import Bounds
from .train_util import Batch, Cond, TrainLoop, Watcher, get_blob_logdir
from .training_data import TrainingData
from .training_runs import make_loop

FAR = 10**9  # a step that no examination comes to
WARM_UP_STEPS = 5  # at least; and at least a tenth of the seconds
LEAST_STEPS, MOST_STEPS = 3, 10_000  # that are measured


@dataclass(frozen=True)
class Examined:
    """What a training asks for and takes.

    :param memory: the most that this process has held, in bytes.
    :param workers: what each of its data workers holds for itself, in bytes.
    :param gpu: the most bytes of tensors on its GPU, and the most that were reserved for tensors;
        None without a GPU.
    :param free_bytes: on the disk of the run folder; None where that is not known.
    """

    plan: Plan
    measured: Measured
    global_batch: int
    memory: int
    workers: tuple[int, ...]
    free_bytes: int | None
    gpu: tuple[int, int] | None = None


class _Enough(Stop):
    """Ends the training of an examination, which has seen enough."""


class _TimedData(Iterator[tuple[Batch, Cond]]):
    """Data of a loop, and how many seconds the loop has waited for it."""

    def __init__(self, data: Iterator[tuple[Batch, Cond]]) -> None:
        self.data = data
        self.waited = 0.0

    def __next__(self) -> tuple[Batch, Cond]:
        start = time.perf_counter()
        try:
            return next(self.data)
        finally:
            self.waited += time.perf_counter() - start


def examine_training(
    model: nn.Module,
    diffusion: GaussianDiffusion,
    data: TrainingData,
    flags: Flags,
    report: Report,
    seconds: float,
) -> Examined:
    """Train for a while, save, and load what was saved.

    :param flags: of the training; its folder is new and will not be needed.
    :param seconds: how long to measure steps.
    :return: what was found, but for what happened before.
    :raises ValueError: on every process, if any of it does not work.
    """
    report.begin("training loop")
    free = dist_util.on_first_rank(_free_bytes)
    memory.forget_peak()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):  # its own words are no findings
        loop = make_loop(model, diffusion, data, flags)
        making = time.perf_counter() - start
        examination = Examination(loop, flags, report, seconds)
        try:
            loop.run_loop()
        except _Enough:
            pass
        except RunAgain:
            raise Stop("stopped by a signal before the forecast was made") from None
        peak, gpu = memory.peak_bytes(), _gpu_peaks()  # loading takes more
        examination.load(loop)
    measured = examination.measured(making)
    batch, workers = loop.global_batch, examination.workers
    return Examined(examination.plan, measured, batch, peak, workers, free, gpu)


class Examination:
    """A watcher that a training loop calls after each step.

    :param loop: which it keeps from saving, logging and ending as its flags ask for.
    """

    interval = 1

    def __init__(self, loop: TrainLoop, flags: Flags, report: Report, seconds: float) -> None:
        self.report = report
        self.seconds = seconds
        self.plan = Plan(
            first_step=loop.global_step,
            total_steps=loop.total_steps,
            seconds_left=loop.bounds.seconds_left(loop.seconds),
            log_interval=loop.log_interval,
            save_interval=loop.save_interval,
            saving=pick(SavingOptions, flags),
        )
        self.workers: tuple[int, ...] = ()
        self._watchers = list(loop.watchers)
        self._data = _TimedData(loop.data)
        self._values: dict[str, Any] = {}  # of Measured
        self._looks: list[Look] = []
        self._saved: list[str] = []
        self._skipped = loop.skipped
        self._take_over(loop)
        self._course = self._examine(loop)
        self._began = time.perf_counter()
        report.begin("step")

    def _take_over(self, loop: TrainLoop) -> None:
        """Let nothing but this examination decide when the loop saves, looks, and ends."""
        loop.data, loop.watchers = self._data, [self]
        loop.bounds, loop.total_steps = Bounds(), FAR
        loop.lr_anneal_steps = FAR if loop.lr_anneal_steps else 0
        loop.save_interval, loop.log_interval = FAR, 1
        if loop.global_step == 0:  # after that step the loop would save, and call no watchers
            loop.step = 1

    def __call__(self, loop: TrainLoop) -> None:
        """One step has been taken."""
        next(self._course)

    def measured(self, making: float) -> Measured:
        """What was found.

        :param making: the seconds that it took to make the loop.
        """
        measured = Measured(**self._values, looks=tuple(self._looks))
        return replace(measured, start_seconds=measured.start_seconds + making)

    def _examine(self, loop: TrainLoop) -> Iterator[None]:
        """What is done after which step: each ``yield`` lets the loop take one more."""
        first = time.perf_counter() - self._began
        self._check_loss(loop, first)
        yield from self._warm_up(loop)
        yield from self._measure_steps(loop)
        self._values["start_seconds"] = max(0.0, first - self._values["step_seconds"])
        for watcher in self._watchers:
            self._look(loop, watcher)
        yield from self._save(loop)
        pids = [child.pid for child in multiprocessing.active_children()]
        self.workers = tuple(memory.own_bytes(pid) for pid in pids if pid)
        raise _Enough

    def _check_loss(self, loop: TrainLoop, took: float) -> None:
        losses = torch.cat([terms["loss"] for _, terms in loop.pending_losses])
        if dist_util.any_rank(not all_finite([losses]))[0]:
            raise UserError("the loss of the first step is not finite")
        self.report.say(
            f"the first one has a finite loss, {losses.mean().item():.4g}, and took "
            f"{duration_text(took)}"
        )

    def _warm_up(self, loop: TrainLoop) -> Iterator[None]:
        """The first steps, which are slower than others; some of them write rows of the log."""
        yield
        one_row = _bytes_below(logger.get_dir())
        start = time.perf_counter()
        yield
        took = time.perf_counter() - start
        row = _bytes_below(logger.get_dir()) - one_row
        self._values |= {"row_bytes": row, "folder_bytes": one_row - row}
        loop.log_interval = self.plan.log_interval
        for _ in range(_agreed(0.1 * self.seconds / took, WARM_UP_STEPS - 2)):
            yield

    def _measure_steps(self, loop: TrainLoop) -> Iterator[None]:
        """Steps as most are: how long they take, and how much of that is waiting for data."""
        self.report.begin("speed")
        start = time.perf_counter()
        yield
        steps = _agreed(self.seconds / (time.perf_counter() - start), LEAST_STEPS)
        waited, times = self._data.waited, [time.perf_counter()]
        for _ in range(steps):
            yield
            times.append(time.perf_counter())
        total = dist_util.broadcast_object(times[-1] - times[0])
        self._values["step_seconds"] = total / steps
        share = max(dist_util.gather_objects((self._data.waited - waited) / total))
        median = statistics.median(after - at for at, after in itertools.pairwise(times))
        self.report.say(
            f"{loop.global_batch * steps / total:,.4g} images/s, {duration_text(total / steps)} a "
            f"step (median {duration_text(median)}) over {steps:,} steps, {share:.0%} waiting for "
            "data"
        )
        self._tell_skipped(loop, steps)

    def _tell_skipped(self, loop: TrainLoop, steps: int) -> None:
        """Steps without an update, of which the last ``steps`` were measured."""
        scaled = loop.use_fp16 or loop.optimization.precision == "fp16"  # skips until scaled well
        if loop.skipped_in_row >= steps and not scaled:
            raise UserError("losses or gradients are not finite in any step: lower --lr")
        skipped = loop.skipped - self._skipped
        if skipped:
            self.report.warn(
                f"{skipped} steps were skipped for losses or gradients that are not finite"
                f"{', as fp16 does until it has found its scale' if scaled else ''}"
            )

    def _look(self, loop: TrainLoop, watcher: Watcher) -> None:
        """Call what looks at the run once, if the run gets so far that it is called."""
        end = self.plan.end(self._values["step_seconds"])
        if not watcher.interval or not multiples(self.plan.first_step, end, watcher.interval):
            return
        name = type(watcher).__name__.removesuffix("Watcher").lower()
        self.report.begin(name)
        before, start = _bytes_below(logger.get_dir()), time.perf_counter()
        watcher(loop)
        took = time.perf_counter() - start
        added = _bytes_below(logger.get_dir()) - before
        self._looks.append(Look(name, watcher.interval, took, added))
        self.report.say(f"{duration_text(took)}, every {watcher.interval:,} steps")

    def _save(self, loop: TrainLoop) -> Iterator[None]:
        """Save while training goes on, as it will, until the checkpoint counts."""
        import blobfile as bf

        self.report.begin("save")
        if dist_util.any_rank(not all_finite(_tensors(loop)))[0]:
            raise UserError("weights or averages are not finite any more: lower --lr")
        self._saved, pending = _fingerprints(loop), len(loop.pending_losses)
        folder, step = get_blob_logdir(), loop.global_step
        manifest = bf.join(folder, checkpoint.manifest_name(step))
        start = time.perf_counter()
        loop.save()
        held_up = time.perf_counter() - start
        yield  # at least one step is taken while it is written
        steps = 1
        while dist_util.on_first_rank(lambda: not bf.exists(manifest)):
            yield
            steps += 1
        took = time.perf_counter() - start
        longer = took - steps * self._values["step_seconds"]
        self._values["save_seconds"] = min(took, max(held_up, longer))
        self._values["last_save_seconds"] = took
        self._values |= dist_util.on_first_rank(lambda: _sizes(loop, folder, step, pending))
        self.report.say(
            f"{size_text(self._values['checkpoint_bytes'])} in {duration_text(took)} while "
            f"training goes on, which it holds up for "
            f"{duration_text(self._values['save_seconds'])}"
        )

    def load(self, loop: TrainLoop) -> None:
        """Go back to the checkpoint as a run does that goes on; compare the tensors.

        :raises ValueError: on every process, if they differ from those that were saved.
        """
        self.report.begin("load")
        loop.data = self._data.data
        start = time.perf_counter()
        path = checkpoint.find_newest_model(get_blob_logdir())
        assert path is not None
        restore(loop, path)
        took = time.perf_counter() - start
        if dist_util.any_rank(_fingerprints(loop) != self._saved)[0]:
            raise UserError("tensors that were loaded differ from those that were saved")
        self.report.say(f"every tensor is back as it was saved, after {duration_text(took)}")


def _free_bytes() -> int | None:
    folder = get_blob_logdir()
    return None if "://" in folder else shutil.disk_usage(folder).free


def _gpu_peaks() -> tuple[int, int] | None:
    if not torch.cuda.is_available():
        return None
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


def _agreed(steps: float, least: int) -> int:
    """A number of steps within limits, the first process's on all."""
    return dist_util.broadcast_object(int(min(max(steps, least), MOST_STEPS)))


def _bytes_below(folder: str | None) -> int:
    """The bytes of all files of a run folder, as the first process sees it."""
    paths = [
        os.path.join(where, name) for where, _, names in os.walk(folder or ".") for name in names
    ]
    return sum(os.path.getsize(path) for path in paths)


def _sizes(loop: TrainLoop, folder: str, step: int, pending: int) -> dict[str, float]:
    """The bytes of a checkpoint, and how they change with the losses that are pending.

    :param pending: how many entries of pending losses the checkpoint holds.
    """
    import blobfile as bf

    entries = checkpoint.read_manifest(folder, step)
    entry_bytes = _entry_bytes(loop)
    parts = -(-loop.batch_size // loop.microbatch)  # entries of a step
    total = bf.stat(bf.join(folder, checkpoint.manifest_name(step))).size
    total += sum(entry["bytes"] for entry in entries.values())
    posthoc = [entry["bytes"] for name, entry in entries.items() if name.startswith("posthoc")]
    return {
        "checkpoint_bytes": round(total - pending * entry_bytes),
        "posthoc_bytes": sum(posthoc),
        "pending_bytes": parts * entry_bytes,
    }


def _entry_bytes(loop: TrainLoop) -> float:
    """The bytes that one entry of pending losses adds to a state file."""
    t, losses = loop.pending_losses[-1]
    sizes = []
    for count in (10, 60):
        file = io.BytesIO()
        entry = [(t.clone(), {key: v.clone() for key, v in losses.items()}) for _ in range(count)]
        torch.save(entry, file)
        sizes.append(len(file.getvalue()))
    return (sizes[1] - sizes[0]) / 50


def _tensors(loop: TrainLoop) -> list[Tensor]:
    """What this process holds of weights, averages and the optimiser's moments."""
    lists = [loop.master_params, *loop.ema_params, *loop.posthoc_params]
    states = [loop.opt.state[param] for param in loop.master_params]
    moments = [state[name] for state in states for name in sorted(state)]
    return local([*(param for params in lists for param in params), *moments])


def _fingerprints(loop: TrainLoop) -> list[str]:
    """A checksum of each tensor, which tells whether a bit has changed."""
    return [
        hashlib.sha256(tensor.cpu().contiguous().numpy().data).hexdigest()
        for tensor in _tensors(loop)
    ]
