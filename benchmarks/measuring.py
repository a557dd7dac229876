"""How the benchmarks measure: in pairs, against the machine's peak, and memory.

A noisy machine slows whatever runs at the moment. So the candidates take turns, A B A B, and what
is reported is the median over the rounds of the ratio within a round.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping

import torch

PRODUCTS = 4  # in a row, of which the fastest counts


def paired(
    candidates: Mapping[str, Callable[[], object]], rounds: int = 5, warm_up: int = 1
) -> dict[str, list[float]]:
    """Time candidates in turn.

    :param candidates: name -> what is timed, called once in each round; one that returns a float
        has timed itself, in seconds.
    :param warm_up: rounds before, which do not count.
    :return: name -> seconds of each round, in order.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(-warm_up, rounds):
        for name, run in candidates.items():
            taken = _timed(run)
            if number >= 0:
                seconds[name].append(taken)
    return seconds


def _timed(run: Callable[[], object]) -> float:
    synchronise()
    started = time.perf_counter()
    own = run()
    synchronise()
    return own if isinstance(own, float) else time.perf_counter() - started


def warm(run: Callable[[], object]) -> Callable[[], float]:
    """A candidate of milliseconds, which otherwise pays for what ran before it: run twice, and the
    second counts. Above all its threads sleep while another process takes its turn."""

    def twice() -> float:
        run()
        return _timed(run)

    return twice


def synchronise() -> None:
    """Wait until the device is done, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def speedup(seconds: Mapping[str, list[float]], of: str, against: str) -> dict[str, float]:
    """How many times as fast one candidate is as another: by the rounds' ratios.

    :return: "median", and the quartiles "low" and "high".
    """
    ratios = [b / a for a, b in zip(seconds[of], seconds[against], strict=True)]
    if len(ratios) == 1:
        return {"median": ratios[0], "low": ratios[0], "high": ratios[0]}
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def matmul(dtype: torch.dtype, device: torch.device) -> Callable[[], float]:
    """A candidate that is the machine's peak: products of matrices of the side that is best here.

    :return: a call makes some products, and returns the seconds of a floating-point operation in
        the fastest of them.
    """

    def product(side: int) -> float:
        a, b, c = (torch.randn(side, side, device=device).to(dtype) for _ in range(3))
        seconds = [_timed(lambda: torch.mm(a, b, out=c)) for _ in range(PRODUCTS)]
        return min(seconds) / (2 * side**3)

    best = min((512, 1024, 2048, 4096), key=product)
    return lambda: product(best)


def added_memory(run: Callable[[], object]) -> int:
    """Bytes at the peak of a call, above those before it; in a process that has done little else.

    A second call shows less: what the first has freed may still be the process's. What torch loads
    when activations are recomputed for the first time is loaded before.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    importlib.import_module("torch._dynamo")
    before = _resident_peak(reset=True)
    run()
    return _resident_peak() - before


def in_a_fresh_process(words: list[str]) -> int:
    """The number that a Python process prints last, such as what :func:`added_memory` finds.

    Its allocator hands memory back to the system at once, so that what was freed before does not
    hide what is added.
    """
    handing_back = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **handing_back},
    )
    return int(done.stdout.split()[-1])


def _resident_peak(reset: bool = False) -> int:
    """The most memory that this process has had, bytes; since the last reset, on Linux."""
    if reset:
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak becomes what is in use now
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        (line,) = [line for line in file if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
