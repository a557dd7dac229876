"""Trains a small U-Net by 1, 2 and 4 gloo processes and compares with :mod:`scaling_model`.

Traffic is what the network cards of :mod:`pretend_hosts` count.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pretend_hosts
import torch
from scaling_model import (
    Layout,
    Network,
    Rings,
    Training,
    communication,
    describe,
    make_network,
    memory,
)

from improved_diffusion import dist_util, logger
from improved_diffusion.errors import UserError
from improved_diffusion.files import write_file
from improved_diffusion.optimization import OptimizationOptions
from improved_diffusion.parallel import ParallelOptions, local
from improved_diffusion.script_util import create_gaussian_diffusion
from improved_diffusion.train_util import TrainLoop

FLAGS: dict[str, Any] = {
    "image_size": 8,
    "num_res_blocks": 2,
    "channel_mult": "1,2,3",
    "attention_resolutions": "4",
}
WARM_UP = 2  # steps; in the first DDP finds the order of its buckets


@dataclass(frozen=True)
class Case:
    """A training to measure."""

    kind: str  # "ddp", "fsdp" or "hybrid"
    processes: int
    hosts: int = 1
    shard_processes: int = 0  # of "hybrid"
    microbatches: int = 1
    averages: int = 1
    precision: str = "fp32"
    images: int = 2  # per process and step
    mbits: int = 0  # Mbit/s between the hosts; 0: as many as there are
    channels: int = 64  # width of the network
    steps: int = 4  # that are counted; the peak within a step is looked for if they are several

    @property
    def layout(self) -> Layout:
        per_host = self.processes // self.hosts
        return Layout(self.kind, self.processes, per_host, self.shard_processes)

    @property
    def training(self) -> Training:
        return Training(self.images, self.microbatches, self.averages, self.precision)

    @property
    def flags(self) -> dict[str, Any]:
        """Of the network."""
        return {**FLAGS, "num_channels": self.channels}

    @property
    def title(self) -> str:
        parts = [f"{self.processes} x {self.kind}"]
        parts += [f"shares of {self.shard_processes}"] * bool(self.shard_processes)
        parts += [f"{self.hosts} hosts"] * (self.hosts > 1)
        parts += [self.precision] * (self.precision != "fp32")
        parts += [f"{self.microbatches} microbatches"] * (self.microbatches > 1)
        parts += [f"{self.averages} averages"] * (self.averages > 1)
        parts += [f"{self.mbits} Mbit/s"] * bool(self.mbits)
        return ", ".join(parts)


CASES = [  # first one process for each precision: what activations take is taken from it
    Case("ddp", 1),
    Case("ddp", 1, precision="bf16"),
    Case("ddp", 2),
    Case("fsdp", 2),
    Case("fsdp", 2, precision="bf16"),
    Case("ddp", 2, microbatches=2),
    Case("fsdp", 2, microbatches=2, averages=2),
    Case("ddp", 4),
    Case("fsdp", 4),
    Case("hybrid", 4, shard_processes=2),
]
ACROSS = [
    Case("ddp", 4, hosts=2),
    Case("fsdp", 4, hosts=2),
    Case("hybrid", 4, hosts=2, shard_processes=2),
]
SLOW_MBITS = 100  # of the cable between the two hosts, when it is limited


# -- the comparison ---------------------------------------------------------------------------


def measure(out: str) -> None:
    """Measure all cases, print how far off the calculation is, and write the numbers.

    :param out: JSON file.
    """
    load = os.getloadavg()[0]
    network = describe("small", CASES[0].flags)
    rows: list[dict[str, Any]] = []
    activations: dict[str, int] = {}
    for case in CASES:
        measured = run_case(case)
        rows += compare(case, network, measured)
        in_flight = memory(network, case.layout, case.training).in_flight
        if case.processes == 1:
            activations[case.precision] = measured["transient"] - in_flight
        elif case.microbatches == 1:
            calculated = activations[case.precision] + in_flight
            rows.append(_row(case, "peak_in_step", calculated, measured["transient"]))
    for case in ACROSS if pretend_hosts.can_isolate() else ():
        rows += compare_speeds(case, network)
    record = {**_circumstances(load), "parameters": network.parameters, "rows": rows}
    os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
    write_file(out, (json.dumps(record, indent=1) + "\n").encode())
    print(f"wrote {out}")


def compare(case: Case, network: Network, measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of memory and of traffic; what was measured, calculated, and how far apart they are.

    :param measured: what :func:`run_case` returns.
    """
    calculated = calculate(case, network)
    rows = [
        _row(case, name, value, measured[name])
        for name, value in calculated.items()
        if name in measured
    ]
    rows[-1] |= {name: measured[name] for name in ("transient", "resident", "seconds")}
    return rows


def calculate(case: Case, network: Network) -> dict[str, float]:
    """Bytes that the first process holds, and bytes per step that all processes send.

    :return: "weights", "gradients", "moments", "averages"; with several processes
        "sent_within_hosts"; with several hosts "sent_between_hosts".
    """
    found = memory(network, case.layout, case.training)
    names = ("weights", "gradients", "moments", "averages")
    calculated: dict[str, float] = {name: getattr(found, name) for name in names}
    if case.processes == 1:
        return calculated
    rings = rings_of(case, network)
    sent = case.processes * sum(ring.sent for ring in rings)
    between = case.hosts * sum(ring.leaving(case.layout.per_node) for ring in rings)
    calculated["sent_within_hosts"] = sent - between
    if case.hosts > 1:
        calculated["sent_between_hosts"] = between
    return calculated


def rings_of(case: Case, network: Network) -> list[Rings]:
    """What the processes send; gloo makes a reduce-scatter of an all-reduce."""
    return communication(network, case.layout, case.training, scatter_rounds=2)


def compare_speeds(case: Case, network: Network) -> list[dict[str, Any]]:
    """Rows of two hosts: traffic, and the time of a step where the cable between them is slow."""
    free, slow = run_case(case), replace(case, mbits=SLOW_MBITS, steps=1)
    rows = compare(case, network, free)
    leaving = sum(ring.leaving(case.layout.per_node) for ring in rings_of(case, network))
    cable = leaving * 8 / (SLOW_MBITS * 1e6)
    # nothing at once: the step without the limit, and then the bytes through the cable
    row = _row(slow, "seconds_per_step", free["seconds"] + cable, run_case(slow)["seconds"])
    return [*rows, {**row, "calculated_all_at_once": max(free["seconds"], cable)}]


def _row(case: Case, what: str, calculated: float, measured: float) -> dict[str, Any]:
    difference = measured / calculated - 1
    row = f"{case.title:42} {what:20} {measured:14,.6g} {calculated:14,.6g} {difference:+8.2%}"
    print(row, flush=True)
    return {
        "case": case.title,
        **asdict(case),
        "what": what,
        "measured": measured,
        "calculated": calculated,
        "difference": round(difference, 6),
    }


def _circumstances(load: float) -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads_per_process": 1,
        "load_before": round(load, 2),
        "network": CASES[0].flags,
    }


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.machine()


def run_case(case: Case) -> dict[str, Any]:
    """Train, with a network of its own if that may be made.

    :return: bytes that the first process holds ("weights", "gradients", "moments", "averages"),
        the most that it holds besides within a step ("transient"), if there are several, its
        peak "resident" memory, "seconds" per step, and the bytes per step that all processes send
        ("sent_within_hosts", "sent_between_hosts") if nothing else uses their network.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = ["env", "OMP_NUM_THREADS=1", "CUDA_VISIBLE_DEVICES=", sys.executable, __file__]
        try:
            pretend_hosts.run(
                [*words, folder, json.dumps(asdict(case))], case.processes, case.hosts, case.mbits
            )
        except RuntimeError as error:
            raise UserError(f"{case.title} failed:\n{error}") from None
        results = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    first = results[0]
    counters = [result.pop("counters") for result in results]
    if pretend_hosts.can_isolate():
        one_of_each_host = counters[:: case.layout.per_node]
        for name in counters[0]:
            first[name] = sum(counter[name] for counter in one_of_each_host)
    return first


# -- in each process --------------------------------------------------------------------------


def train(folder: str, case: Case) -> None:
    """Train some steps, and write what this process holds, sends and takes."""
    dist_util.setup_dist()
    logger.configure(dir=folder, format_strs=[])
    loop = _make_loop(case)
    size = FLAGS["image_size"]
    batch = torch.rand(case.images, 3, size, size)
    for _ in range(WARM_UP):
        loop.run_step(batch, {})
    result = _held(loop)
    counters, seconds = _step_counters(loop, batch, case.steps)
    result |= {"counters": counters, "seconds": seconds, "resident": _peak_resident()}
    if case.steps > 1:
        result["transient"] = _transient(loop, batch)
    name = f"{dist_util.get_rank():03d}.json"
    write_file(os.path.join(folder, name), json.dumps(result).encode())
    dist_util.barrier()


def _make_loop(case: Case) -> TrainLoop:
    return TrainLoop(
        model=make_network(case.flags),
        diffusion=create_gaussian_diffusion(learn_sigma=True),
        data=iter(()),
        batch_size=case.images,
        microbatch=case.images // case.microbatches,
        lr=1e-4,
        ema_rate=",".join(["0.9"] * case.averages),
        log_interval=1000,
        save_interval=1000,
        resume_checkpoint="",
        optimization=OptimizationOptions(precision=case.precision),
        parallel=ParallelOptions(
            parallel="ddp" if case.kind == "ddp" else "fsdp",
            shard_processes=case.shard_processes,
        ),
    )


def _held(loop: TrainLoop) -> dict[str, Any]:
    """Bytes of the tensors that this process holds from step to step."""
    states = list(loop.opt.state.values())
    averages = [*loop.ema_params, *loop.posthoc_params]
    held: dict[str, list[Any]] = {
        "weights": loop.model_params,
        "gradients": [param.grad for param in loop.model_params],
        "moments": [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")],
        "averages": [param for params in averages for param in params],
    }
    return {name: sum(tensor.nbytes for tensor in local(tensors)) for name, tensors in held.items()}


def _step_counters(
    loop: TrainLoop, batch: torch.Tensor, steps: int
) -> tuple[dict[str, float], float]:
    """Bytes per step that the cards of this host sent; the median of the seconds of a step."""
    dist_util.barrier()
    before = pretend_hosts.sent_bytes()
    dist_util.barrier()  # nobody starts before everybody has read
    times = []
    for _ in range(steps):
        started = time.perf_counter()
        loop.run_step(batch, {})
        times.append(time.perf_counter() - started)
    dist_util.barrier()
    after = pretend_hosts.sent_bytes()
    dist_util.barrier()
    names = {"lo": "sent_within_hosts", "cable": "sent_between_hosts"}
    sent = {name: (after[card] - before[card]) / steps for card, name in names.items()}
    return sent, statistics.median(times)


def _transient(loop: TrainLoop, batch: torch.Tensor) -> int:
    """The most bytes that tensors take within a step, beyond those held before it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        loop.run_step(batch, {})
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "trace.json")
        profile.export_chrome_trace(path)
        events = json.loads(Path(path).read_text())["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]"]
    now = peak = 0
    for event in sorted(changes, key=lambda event: event["ts"]):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    return peak


def _peak_resident() -> int:
    """The most memory that this process had, with libraries and all, in bytes."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    folder, given = sys.argv[1:]
    train(folder, Case(**json.loads(given)))


if __name__ == "__main__":
    dist_util.run_main(main)
