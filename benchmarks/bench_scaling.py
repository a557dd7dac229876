"""How time grows with the batch, the resolution, depth and width, and with more processes.

A training pass (forward and backward) of one network in several sizes, in turns: the slope of
log time against log size beside the slope of the operations that torch counts. Then steps of 1, 2
and 4 gloo processes with one thread each: with gradients averaged and, in turns, without; the
share that this takes, beside the share expected of the bytes (scaling_model.py) at the speed of
an all-reduce. More processes than cores share them, which the table says. Clusters are in
docs/scaling.md.

    python benchmarks/bench_scaling.py --rounds 20

prints tables and writes benchmarks/results/scaling_one_host.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pretend_hosts
import torch
import torch.distributed as dist
from measuring import paired
from plain_unet import plain
from records import at_least, output_file, result_path, table, write_result
from scaling_model import FLOAT, Layout, Rings, Training, communication, describe, make_network
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from improved_diffusion import dist_util
from improved_diffusion.dist_util import run_main
from improved_diffusion.errors import UserError
from improved_diffusion.flags import numbers, require
from improved_diffusion.parallel import no_sync, replicate

# the network and the images per pass; of each axis one of them changes
BASE = {"image_size": 16, "num_channels": 64, "num_res_blocks": 1, "images": 4}
AXES: dict[str, list[int]] = {
    "images": [1, 2, 4, 8, 16, 32],
    "image_size": [8, 16, 32, 64],
    "num_res_blocks": [1, 2, 3, 4],
    "num_channels": [32, 64, 96, 128],
}
SPREAD = {  # over processes
    "image_size": 8,
    "num_channels": 64,
    "num_res_blocks": 2,
    "channel_mult": "1,2,3",
    "attention_resolutions": "4",
}
RESULT = "rows.json"  # of a worker
IMAGES = 8  # of each process, or of all together
PROBE = 2**22  # elements of the all-reduce whose speed is measured


def main(argv: list[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    if args.worker:
        work(args.worker, args.rounds)
        return
    torch.set_num_threads(args.threads or torch.get_num_threads())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    counts = process_counts(args.processes)
    axes = {name: measure_axis(name, sizes, args.rounds, device) for name, sizes in AXES.items()}
    spread = [row for count in counts for row in measure_processes(count, args.rounds)]
    result = {"axes": axes, "processes": spread}
    print(report(result))
    write_result(args.out, result)


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=at_least(1), default=20)
    parser.add_argument("--threads", type=at_least(0), default=0, help="0: torch's choice")
    parser.add_argument("--processes", default="1,2,4", help="separated by commas; '': none")
    parser.add_argument(
        "--out", type=output_file, default=result_path("scaling_one_host"), help="result file"
    )
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)  # folder for its rows
    return parser


# -- sizes ------------------------------------------------------------------------------------


def measure_axis(name: str, sizes: list[int], rounds: int, device: torch.device) -> dict[str, Any]:
    """Times of a training pass against one of the sizes, the others as in ``BASE``.

    :return: "sizes", and for each "seconds" and "operations"; the "slope" of the seconds, the
        median of the rounds' slopes, and the "expected_slope" of the operations; the same of the
        two largest sizes alone, where what each call costs counts less: "last_slope",
        "expected_last_slope".
    """
    passes = {str(size): SizedPass({**BASE, name: size}, device) for size in sizes}
    operations = [one.count_operations() for one in passes.values()]
    seconds = paired({size: one.run for size, one in passes.items()}, rounds)
    rounds_of_all = list(zip(*seconds.values(), strict=True))
    return {
        "sizes": sizes,
        "seconds": [statistics.median(times) for times in seconds.values()],
        "operations": operations,
        "slope": statistics.median(slope(sizes, times) for times in rounds_of_all),
        "expected_slope": slope(sizes, operations),
        "last_slope": statistics.median(slope(sizes[-2:], t[-2:]) for t in rounds_of_all),
        "expected_last_slope": slope(sizes[-2:], operations[-2:]),
    }


class SizedPass:
    """A training pass of a network of three levels, with attention on the lowest."""

    def __init__(self, sizes: Mapping[str, int], device: torch.device) -> None:
        flags = {key: value for key, value in sizes.items() if key != "images"}
        side = sizes["image_size"]
        lowest = {"channel_mult": "1,2,2", "attention_resolutions": str(side // 4)}
        torch.manual_seed(0)
        self.network = make_network({**flags, **lowest}).to(device)
        self.x = torch.randn(sizes["images"], 3, side, side, device=device)
        self.t = torch.arange(sizes["images"], device=device)

    def run(self) -> None:
        training_pass(self.network, self.x, self.t)

    def count_operations(self) -> int:
        """Of the plain rendering: torch's counter does not know every fused attention."""
        network = plain(self.network)
        with FlopCounterMode(display=False) as counter:
            training_pass(network, self.x, self.t)
        return counter.get_total_flops()


def training_pass(network: nn.Module, x: Tensor, t: Tensor) -> None:
    """Leave gradients on the network's parameters."""
    network.zero_grad()
    network(x, t).square().mean().backward()


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """That of the line through the logarithms, by least squares."""
    x, y = ([math.log(value) for value in numbers] for numbers in (sizes, values))
    return statistics.linear_regression(x, y).slope


# -- processes --------------------------------------------------------------------------------


def process_counts(text: str) -> list[int]:
    """Numbers of processes, separated by commas; none of an empty text.

    :raises ValueError: naming the flag, unless each has an image of those of all together.
    """
    counts = numbers("processes", text)
    fits = all(1 <= count <= IMAGES for count in counts)
    require(fits, "processes", text, f"numbers in 1 ... {IMAGES}, separated by commas")
    return counts


def measure_processes(count: int, rounds: int) -> list[dict[str, Any]]:
    """Steps of so many processes, with a batch of each process and with one of all together.

    :return: for each of the two, but for one process only once: "processes", "cores" that they
        share, "images_each", "seconds" of a step, and what averaging the gradients takes of it:
        "share", and the "expected_share".
    """
    with tempfile.TemporaryDirectory() as folder:
        words = ["env", "OMP_NUM_THREADS=1", "CUDA_VISIBLE_DEVICES=", sys.executable, __file__]
        words += ["--worker", folder, "--rounds", str(rounds)]
        try:
            pretend_hosts.run(words, count)
        except RuntimeError as error:
            raise UserError(f"{count} processes failed:\n{error}") from None
        return json.loads((Path(folder) / RESULT).read_text())


def work(folder: str, rounds: int) -> None:
    """In each process: measure together; the first writes the rows."""
    dist_util.setup_dist()
    count = dist_util.get_world_size()
    network = make_network(SPREAD).to(dist_util.dev())
    spread = replicate(network, dist_util.dev(), accumulate=True) if count > 1 else network
    cases = dict.fromkeys([IMAGES, IMAGES // count])
    rows = [measure_case(spread, images, rounds) for images in cases]
    if dist_util.get_rank() == 0:
        (Path(folder) / RESULT).write_text(json.dumps(rows))
    dist_util.barrier()


def measure_case(network: nn.Module, images: int, rounds: int) -> dict[str, Any]:
    """Steps with and without averaging, and the all-reduce of a probe, in turns."""
    count, side = dist_util.get_world_size(), SPREAD["image_size"]
    x = torch.randn(images, 3, side, side, device=dist_util.dev())
    t = torch.arange(images, device=dist_util.dev())
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    probe = torch.zeros(PROBE, device=dist_util.dev())

    def step() -> None:
        training_pass(network, x, t)
        optimizer.step()
        dist_util.barrier()  # all are done

    def step_alone() -> None:
        with no_sync(network):
            step()

    candidates: dict[str, Callable[[], object]] = {"step": step}
    if count > 1:
        candidates |= {"alone": step_alone, "probe": lambda: dist.all_reduce(probe)}
    seconds = paired(candidates, rounds, warm_up=2)  # in the first DDP orders its buckets
    return {
        "processes": count,
        "cores": available_cores(),
        "images_each": images,
        "seconds": statistics.median(seconds["step"]),
        **(shares(seconds, count) if count > 1 else {"share": 0.0, "expected_share": 0.0}),
    }


def shares(seconds: Mapping[str, Sequence[float]], processes: int) -> dict[str, float]:
    """The part of a step that averaging takes; and what its bytes would take, with nothing else
    at once, at the speed of the probe."""
    probe = Rings(FLOAT * PROBE, 2, processes, stride=1, calls=1)
    speed = probe.sent / statistics.median(seconds["probe"])
    layout = Layout("ddp", processes, processes)
    sent = sum(ring.sent for ring in communication(describe("", SPREAD), layout, Training()))
    alone = statistics.median(seconds["alone"])
    pairs = zip(seconds["alone"], seconds["step"], strict=True)
    return {
        "share": statistics.median(1 - without / step for without, step in pairs),
        "expected_share": sent / speed / (alone + sent / speed),
        "sent_bytes": sent,
        "bytes_per_second": speed,
    }


def available_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# -- tables -----------------------------------------------------------------------------------


def report(result: dict[str, Any]) -> str:
    """The tables that are printed."""
    rows = []
    for name, found in result["axes"].items():
        times = ", ".join(f"{1e3 * seconds:.1f}" for seconds in found["seconds"])
        sizes = ", ".join(map(str, found["sizes"]))
        slopes = ("slope", "expected_slope", "last_slope", "expected_last_slope")
        rows.append([name, sizes, times, *(f"{found[key]:.2f}" for key in slopes)])
    header = ["size", "values", "ms", "slope", "of the operations", "of the last two", "operations"]
    tables = [table(header, rows)]
    if result["processes"]:
        header = ["processes", "cores", "images each", "ms per step", "images/s", "averaging"]
        rows = [process_row(found) for found in result["processes"]]
        tables.append(table([*header, "expected, nothing at once"], rows))
    return "\n\n".join(tables)


def process_row(found: Mapping[str, Any]) -> list[str]:
    count, cores, each = found["processes"], found["cores"], found["images_each"]
    shared = f"{cores}, shared" if count > cores else str(cores)
    row = [str(count), shared, str(each), f"{1e3 * found['seconds']:.1f}"]
    row += [f"{count * each / found['seconds']:.1f}"]
    return row + [f"{found[key]:.0%}" for key in ("share", "expected_share")]


if __name__ == "__main__":
    run_main(main)
