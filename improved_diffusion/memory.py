"""The memory that processes of this machine hold, and how much there is."""

from __future__ import annotations

import os
import re
import resource
import sys
import time


def peak_bytes() -> int:
    """The most memory that this process has held at a time since :func:`forget_peak`.

    Where that cannot be told, since the process started.
    """
    peak = _status_bytes("VmHWM")
    if peak is not None:
        return peak
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage has units of its own there
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak() -> None:
    """Let the peak of this process begin at what it holds now, where the system can do that."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # proc(5): reset the peak resident set size
    except OSError:
        pass


def _status_bytes(name: str) -> int | None:
    try:
        with open("/proc/self/status") as file:
            found = re.search(rf"^{name}:\s+(\d+) kB", file.read(), flags=re.MULTILINE)
    except OSError:
        return None
    return int(found.group(1)) * 1024 if found else None


def own_bytes(pid: int) -> int:
    """The memory that a process holds and shares with no other; 0 where that cannot be told."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            sizes = re.findall(r"^Private_\w+:\s+(\d+) kB", file.read(), flags=re.MULTILINE)
    except OSError:
        return 0
    return sum(map(int, sizes)) * 1024


def host_bytes() -> int:
    """The memory that the processes of this machine may hold together, in bytes."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        with open("/sys/fs/cgroup/memory.max") as file:  # of a container
            limit = file.read().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdecimal() else total


def seconds_since_start() -> float:
    """How long this process has lived; where that cannot be told, how long it has computed."""
    try:
        with open("/proc/self/stat") as file:
            fields = file.read().rsplit(")", 1)[1].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # since the machine started
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError):
        return time.process_time()
