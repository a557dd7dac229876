"""What processes are doing, and lines that say what a start waits for."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

STALL_SECONDS = 120.0  # between lines that say what a start waits for
GIVE_UP_SECONDS = 600.0  # for processes that do not join


@dataclass(frozen=True)
class Status:
    """What a process is doing."""

    what: str = ""  # "saving step 500"
    starting: bool = False  # before the first step
    waits: bool = False  # for the first process, which does it for all


def hostname() -> str:
    """This machine, for people."""
    return socket.gethostname()


def describe(everyone: dict[int, Status]) -> str:
    """Who is doing what: ``process 0 is listing images; processes 1-7 wait for it``."""
    groups: dict[Status, list[int]] = {}
    for rank, status in sorted(everyone.items()):
        groups.setdefault(status, []).append(rank)
    texts = []
    for status, ranks in groups.items():
        many = len(ranks) > 1
        if status.waits:
            texts.append(f"{processes(ranks)} wait{'' if many else 's'} for process 0")
        elif status.starting:
            texts.append(f"{processes(ranks)} {'are' if many else 'is'} {status.what}")
        else:
            texts.append(f"{processes(ranks)} {'have' if many else 'has'} started")
    return "; ".join(texts)


def processes(ranks: list[int]) -> str:
    """``process 3``, or ``processes 0-2, 5`` for sorted ranks."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    texts = [str(a) if a == b else f"{a}{'-' if b - a > 1 else ', '}{b}" for a, b in spans]
    return f"process{'es' if len(ranks) > 1 else ''} {', '.join(texts)}"


@contextlib.contextmanager
def overdue(
    who: str, waits_for: Callable[[], str], end: Callable[[str], None] | None
) -> Iterator[None]:
    """Inside a ``with`` block, say every two minutes what it waits for; after ten, end.

    A thread says it, as the block may wait where nothing can interrupt it.

    :param who: this process.
    :param waits_for: for whom or what it waits.
    :param end: prints the line of an error and ends the process; None never does.
    """
    done = threading.Event()

    def tell() -> None:
        waited = 0.0
        while not done.wait(STALL_SECONDS):
            waited += STALL_SECONDS
            line = f"{who} has waited {waited:.0f} s for {waits_for()}"
            if end is not None and waited >= GIVE_UP_SECONDS:
                end(f"{line}: it gives up")
                return
            say(line)

    threading.Thread(target=tell, name="overdue", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def say(line: str) -> None:
    """Print a line on stderr in one go: other processes write to the same terminal."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
