"""What the benchmarks leave: results as JSON with their circumstances, tables and pictures."""

import argparse
import contextlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch

import improved_diffusion
from improved_diffusion.errors import UserError

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def _load() -> list[float]:
    return list(os.getloadavg()) if hasattr(os, "getloadavg") else []


LOAD_BEFORE = _load()  # what the machine did before the benchmark


def write_result(path: str | os.PathLike, result: Mapping) -> None:
    """Write a result as JSON with the circumstances it was measured in, and say so."""
    complete = {**result, "circumstances": circumstances()}
    with open(path, "w") as file:
        json.dump(complete, file, indent=1)
    print(f"wrote {path}")


def at_least(least: int) -> Callable[[str], int]:
    """The type of an argument that is a number from ``least`` on."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"'{text}' is no number from {least} on")
        return int(text)

    return number


def above_zero(text: str) -> float:
    """The type of an argument that is a time, say."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"'{text}' is no number above 0")


def output_file(text: str) -> str:
    """The type of an argument that names a file to write; its folder is made."""
    folder = os.path.dirname(text) or "."
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot make the folder of '{text}': {error}") from None
    if os.path.isdir(text) or not os.access(folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"'{text}' is no file that can be written")
    return text


def result_path(name: str) -> str:
    """Where a result goes: results/NAME.json, and on a GPU results/NAME_CARD.json."""
    card = f"_{device_name().replace(' ', '_')}" if torch.cuda.is_available() else ""
    return str(RESULTS / f"{name}{card}.json")


def circumstances() -> dict:
    """Versions, machine, threads, load and commit, as they are when a result is written."""
    return {
        "versions": {
            "improved_diffusion": improved_diffusion.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "device": device_name(),
        "system": platform.system(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": torch.get_num_threads(),
        "arguments": sys.argv[1:],
        "load_before": LOAD_BEFORE,
        "load": _load(),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def device_name() -> str:
    """The name of the GPU, or of the processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()


def _commit() -> str:
    """The commit of the working tree, with a + if it has changed since; '' outside of git.

    Results, and the document with their tables, are no change.
    """
    ours = ["--", ".", ":!benchmarks/results", ":!docs/performance.md"]
    git = ["git", "-C", str(ROOT)]
    try:
        name = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        )
        changed = subprocess.run(
            [*git, "status", "--porcelain", *ours], capture_output=True, text=True
        )
    except OSError:
        return ""
    return name.stdout.strip() + ("+" if changed.stdout.strip() else "")


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table in Markdown."""
    lines = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    texts = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    texts.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(texts)


def pyplot():
    """matplotlib's pyplot, drawing into files.

    :raises ValueError: naming the extra, without matplotlib.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError(
            "matplotlib is missing: pip install 'improved-diffusion[plots]', or --picture ''"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
