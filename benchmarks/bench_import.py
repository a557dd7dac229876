"""Seconds to import the package and its main modules, above those of ``import torch``.

Every import has a fresh process, which imports torch first and then times the rest; the modules
take turns.

    python benchmarks/bench_import.py --rounds 9

prints a table and writes benchmarks/results/import.json. The target is at most 0.2 s above torch.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from typing import Any

from measuring import paired
from records import at_least, output_file, result_path, table, write_result

from improved_diffusion.dist_util import run_main

PACKAGE = "improved_diffusion"
MODULES = (PACKAGE, *(f"{PACKAGE}.{name}" for name in ("script_util", "train_util", "sampling")))
TARGET = 0.2  # seconds


def main(argv: list[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    result = measure(args.rounds)
    print(report(result))
    write_result(args.out, result)


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=at_least(1), default=9)
    parser.add_argument(
        "--out", type=output_file, default=result_path("import"), help="result file"
    )
    return parser


def measure(rounds: int) -> dict[str, Any]:
    """Medians over the rounds: "torch_seconds", and module -> "above_torch_seconds"."""
    candidates = {"torch": lambda: import_seconds("sys", "torch")}
    candidates |= {name: lambda name=name: import_seconds("torch", name) for name in MODULES}
    seconds = paired(candidates, rounds)  # the first, not counted, leaves the byte code
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "target_seconds": TARGET,
        "torch_seconds": medians.pop("torch"),
        "above_torch_seconds": medians,
    }


def import_seconds(first: str, module: str) -> float:
    """Seconds that a fresh process takes to import a module after another."""
    code = (
        f"import time, {first}; started = time.perf_counter(); import {module}; "
        "print(time.perf_counter() - started)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def report(result: dict[str, Any]) -> str:
    """The table that is printed."""
    rows = [["torch", f"{result['torch_seconds']:.3f}"]]
    for name, seconds in result["above_torch_seconds"].items():
        rows.append([f"{name}, above torch", f"{seconds:.3f}"])
    return table(["import", "seconds"], rows)


if __name__ == "__main__":
    run_main(main)
