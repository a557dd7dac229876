"""Try in short all that a training does, where it will run, and forecast what it takes.

:mod:`.examination` has the training, :mod:`.forecast` the arithmetic.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from . import dist_util, logger, memory, rendezvous
from ._version import __version__
from .errors import UserError
from .examination import Examined, examine_training
from .flags import option, require
from .forecast import UNBOUNDED_STEPS, Forecast, duration_text, forecast, size_text
from .gaussian_diffusion import GaussianDiffusion
from .image_datasets import ImageStream
from .report import Report
from .runs import Flags
from .stalls import hostname
from .training_data import TrainingData

REDUCED_BYTES = 64 * 2**20
REDUCTIONS = 5
LOADER_SECONDS = 5.0  # at most, for the images/s of the loader alone
BLOBS = "DIFFUSION_BLOB_LOGDIR"


@dataclass(frozen=True)
class DoctorOptions:
    """How thorough the examination is."""

    doctor_seconds: float = option(
        30.0, "how long to measure the speed of steps; at least 3 steps are taken"
    )

    def __post_init__(self) -> None:
        seconds = self.doctor_seconds
        require(0 < seconds <= 3600, "doctor_seconds", seconds, "above 0 and at most 3600")


def examine(
    model: nn.Module,
    diffusion: GaussianDiffusion,
    data: TrainingData,
    flags: Flags,
    seconds: float,
) -> Forecast:
    """Try each part of a training, in a folder that is removed again; print what is found.

    The run folder is read, as by a training that goes on from it; nothing there changes.

    :param flags: as of :func:`.prepare_training`.
    :param seconds: how long to measure steps.
    :raises ValueError: naming the part that does not work and why.
    """
    preparing, prepared = memory.seconds_since_start(), memory.peak_bytes()
    report = Report()
    with report.naming_failures():
        place = rendezvous.find_place(dist_util.GPUS_PER_NODE, lambda line: None)
        describe_environment(report, place)
        describe_processes(report, place)
        check_all_reduce(report)
        check_data(report, data, min(LOADER_SECONDS, seconds))
        report.begin("run folder")
        with workplace(flags["log_dir"]) as folder:
            there = {**flags, "log_dir": folder}
            examined = examine_training(model, diffusion, data, there, report, seconds)
        measured = examined.measured
        measured = replace(measured, start_seconds=measured.start_seconds + preparing)
        examined = replace(examined, measured=measured, memory=max(examined.memory, prepared))
        return tell_forecast(report, examined)


@contextlib.contextmanager
def workplace(log_dir: str) -> Iterator[str]:
    """A new folder on the disk of a run folder, beside it; it is removed after a ``with`` block.

    What training writes elsewhere, by $DIFFUSION_BLOB_LOGDIR, goes to a new folder there.

    :return: its path, alike on every process.
    """
    import blobfile as bf

    blobs = os.environ.get(BLOBS, "")
    remote = "://" in blobs
    near = log_dir if remote or not blobs else blobs
    folder = dist_util.on_first_rank(
        lambda: tempfile.mkdtemp(prefix=".doctor-", dir=_existing_folder(near))
    )
    place = bf.join(blobs, os.path.basename(folder)) if remote else folder
    os.environ[BLOBS] = place
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield folder
        dist_util.barrier()
    finally:
        signal.signal(signal.SIGTERM, before)
        os.environ[BLOBS] = blobs
        logger.reset()
        shutil.rmtree(folder, ignore_errors=True)  # each process: it may be one on each machine
        if remote and dist_util.get_rank() == 0:
            with contextlib.suppress(bf.Error, OSError):
                bf.rmtree(place)


def _existing_folder(path: str) -> str:
    """The folder that a path lies in, or will; the path itself if only that is on its disk."""
    path = os.path.abspath(path)
    above = os.path.dirname(path)
    while not os.path.isdir(above):
        above = os.path.dirname(above)
    if os.path.isdir(path):
        alike = os.stat(path).st_dev == os.stat(above).st_dev
        return above if alike and os.access(above, os.W_OK) else path
    return above


def _interrupt(*_: Any) -> None:
    """End by an exception, which lets the folder be removed."""
    raise KeyboardInterrupt


# -- where it runs ----------------------------------------------------------------------------


def describe_environment(report: Report, place: rendezvous.Place) -> None:
    """Versions, launcher, and what the processes talk by."""
    report.begin("environment")
    cuda = f" for CUDA {torch.version.cuda}" if torch.version.cuda else ""
    alone = dist_util.get_world_size() == 1
    backend = "none" if alone else "gloo" + (" and nccl" if torch.cuda.is_available() else "")
    started = "one process" if place.launcher == "single" else f"started by {place.launcher}"
    report.say(
        f"Python {platform.python_version()}, torch {torch.__version__}{cuda}, "
        f"improved_diffusion {__version__}; {started}, backend {backend}"
    )


def describe_processes(report: Report, place: rendezvous.Place) -> None:
    """A table of the processes, with warnings of GPUs that are idle or shared."""
    report.begin("processes")
    gpu = torch.cuda.is_available()
    device = dist_util.dev()
    name = f"{device} {torch.cuda.get_device_name()}" if gpu else "CPU"
    total = torch.cuda.get_device_properties(device).total_memory if gpu else memory.host_bytes()
    row = (hostname(), name, size_text(total), place.local_rank, torch.get_num_threads())
    gathered = dist_util.gather_objects((row, torch.cuda.device_count()))
    rows = [(rank, *row) for rank, (row, _) in enumerate(gathered)]
    table = [("rank", "host", "device", "memory", "local rank", "threads"), *rows]
    widths = [max(len(str(row[i])) for row in table) for i in range(len(table[0]))]
    report.write("processes:")
    for row in table:
        cells = (str(cell).ljust(width) for cell, width in zip(row, widths, strict=True))
        report.write(f"  {'  '.join(cells)}".rstrip())
    for (where, on), count in Counter((row[0], row[1]) for row, _ in gathered).items():
        if gpu and count > 1:
            report.warn(f"{count} processes of {where} share {on}")
    for where, count in Counter(row[0] for row, _ in gathered).items():
        gpus = max(gpus for row, gpus in gathered if row[0] == where)
        if gpus > count:
            report.warn(f"{where} has {gpus} GPUs for {count} process{'es' * (count > 1)}")


# -- talking to each other --------------------------------------------------------------------


def check_all_reduce(report: Report) -> None:
    """Sum tensors over all processes, on the device that trains; small ones and large ones.

    :raises ValueError: on every process, if the sum is wrong.
    """
    report.begin("all-reduce")
    world_size = dist_util.get_world_size()
    latency, long = _reduce(1), _reduce(REDUCED_BYTES // 4)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what training needs is measured later
    if world_size == 1:
        report.say("nothing to do for one process")
        return
    # on a ring each process sends and receives so much of the tensor
    rate = 2 * (world_size - 1) / world_size * REDUCED_BYTES / long
    report.say(
        f"right over {world_size} processes; {duration_text(latency)} for one number, "
        f"{duration_text(long)} for {size_text(REDUCED_BYTES)}, which is {size_text(rate)}/s"
    )


def _reduce(count: int) -> float:
    """The seconds of an all-reduce of float32 numbers, whose sum is checked."""
    world_size = dist_util.get_world_size()
    tensor = torch.full((count,), float(dist_util.get_rank() + 1), device=dist_util.dev())
    dist.all_reduce(tensor)
    wrong = (tensor != world_size * (world_size + 1) / 2).sum().item()
    if dist_util.any_rank(wrong > 0)[0]:
        raise UserError(
            f"the sum over {world_size} processes is wrong in {wrong} of {count} numbers on "
            f"process {dist_util.get_rank()}: the network or a device damages data"
        )
    tensor.zero_()
    dist_util.barrier()
    _wait_for_device()
    start = time.perf_counter()
    for _ in range(REDUCTIONS):
        dist.all_reduce(tensor)
    _wait_for_device()
    return (time.perf_counter() - start) / REDUCTIONS


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# -- data -------------------------------------------------------------------------------------


def check_data(report: Report, data: TrainingData, seconds: float) -> None:
    """Read batches without training on them; afterwards the stream is at its start again.

    :param seconds: how long to read.
    :raises ValueError: if images are not finite numbers.
    """
    report.begin("data")
    start = time.perf_counter()
    images, cond = next(data.stream)
    first = time.perf_counter() - start
    if not images.isfinite().all():
        raise UserError("the first batch holds numbers that are not finite")
    low, high = images.min().item(), images.max().item()
    rate = _loader_speed(data, seconds)
    if isinstance(data.stream, ImageStream):
        data.stream.seek(0)
    else:
        data.stream.reshuffle(0)
    also = "".join(f" with {name} {list(value.shape)}" for name, value in cond.items())
    report.say(
        f"batches of {str(images.dtype).removeprefix('torch.')} {list(images.shape)} in "
        f"[{low:.3g}, {high:.3g}]{also}, the first after {duration_text(first)}; the loader alone "
        f"reads {sum(dist_util.gather_objects(rate)):,.0f} images/s"
    )
    if low == high:
        report.warn(f"all pixels of the first batch are {low:.3g}")


def _loader_speed(data: TrainingData, seconds: float) -> float:
    """Images per second of this process, once what was read ahead is used up."""
    begin = time.perf_counter()
    while time.perf_counter() < begin + seconds / 3:
        next(data.stream)
    count, start = 0, time.perf_counter()
    while not count or time.perf_counter() < begin + seconds:
        count += len(next(data.stream)[0])
    _wait_for_device()
    return count / (time.perf_counter() - start)


# -- what will come ---------------------------------------------------------------------------


def tell_forecast(report: Report, examined: Examined) -> Forecast:
    """Print what the training takes, with warnings of what does not fit."""
    result = forecast(examined.plan, examined.measured)
    report.write("forecast:")
    _tell_memory(report, examined)
    _tell_time(report, examined, result)
    _tell_disk(report, examined, result)
    return result


def _tell_memory(report: Report, examined: Examined) -> None:
    report.begin("memory")
    own = (hostname(), memory.host_bytes(), examined.memory, examined.workers)
    everyone = dist_util.gather_objects(own)
    workers = [size for *_, sizes in everyone for size in sizes]
    beside = ""
    if workers:
        count = max(len(sizes) for *_, sizes in everyone)
        beside = f" and {size_text(max(workers))} for each of its {count} data workers"
    most = max(peak for _, _, peak, _ in everyone)
    report.say(f"{size_text(most)} per process{beside}, of {size_text(memory.host_bytes())}")
    for host, there in sorted({(host, there) for host, there, _, _ in everyone}):
        total = sum(peak + sum(sizes) for where, _, peak, sizes in everyone if where == host)
        if total > there:
            report.warn(f"{host} has {size_text(there)}, and its processes need {size_text(total)}")
    if examined.gpu is not None:
        peaks = dist_util.gather_objects(examined.gpu)
        tensors, reserved = (max(values) for values in zip(*peaks, strict=True))
        total = torch.cuda.get_device_properties(dist_util.dev()).total_memory
        report.begin("GPU memory")
        report.say(
            f"{size_text(tensors)} of tensors, {size_text(reserved)} reserved for them, of "
            f"{size_text(total)}"
        )


def _tell_time(report: Report, examined: Examined, result: Forecast) -> None:
    report.begin("time")
    speed = examined.global_batch / examined.measured.step_seconds
    parts = [f"{duration_text(result.step_seconds)} of steps at {speed:,.4g} images/s"]
    if examined.plan.bounded:
        parts.insert(0, f"{duration_text(result.start_seconds)} to start")
    if result.saves:
        plural = "s" if result.saves > 1 else ""
        parts.append(f"{duration_text(result.save_seconds)} for {result.saves} save{plural}")
    if result.look_seconds:
        names = " and ".join(look.name for look in examined.measured.looks)
        parts.append(f"{duration_text(result.look_seconds)} for {names}")
    if not result.steps:
        report.say(f"nothing is left to do: {examined.plan.first_step:,} steps are done")
    elif examined.plan.bounded:
        total = duration_text(result.seconds)
        report.say(f"{total} for {result.steps:,} steps: {', '.join(parts)}")
    else:
        total = duration_text(result.seconds - result.start_seconds)
        report.say(
            f"{total} for each {UNBOUNDED_STEPS:,} steps, and it trains until it is stopped: "
            f"{', '.join(parts)}"
        )


def _tell_disk(report: Report, examined: Examined, result: Forecast) -> None:
    report.begin("disk")
    free = examined.free_bytes
    there = "unknown space is" if free is None else f"{size_text(free)} are"
    some = "" if result.kept == result.saves else f" of {result.saves}"
    until = "" if examined.plan.bounded else f" after {UNBOUNDED_STEPS:,} steps"
    report.say(
        f"{size_text(result.bytes)} ({result.bytes:,} bytes){until} for {result.kept}{some} "
        f"checkpoint{'s' if result.saves != 1 else ''} of "
        f"{size_text(examined.measured.checkpoint_bytes)}, logs and pictures; {there} free"
    )
    if free is not None and result.most_bytes > free:
        report.warn(
            f"{size_text(result.most_bytes)} are needed, {size_text(free)} are free: lower "
            "--keep_checkpoints, raise --save_interval, or name a --log_dir on another disk"
        )
