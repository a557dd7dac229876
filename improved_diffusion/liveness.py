"""What this process is doing, for the others to know; and which of them was lost.

The marks are cheap and harmless where a process is alone. :mod:`.heartbeat` carries them.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

from .heartbeat import Watch
from .stalls import Status

BLAME_SECONDS = 5.0  # to learn which process ended, when a connection to it has broken

_status = Status()
_unfinished = 0
_lock = threading.Lock()
_watch: Watch | None = None


def doing(what: str, starting: bool = False) -> None:
    """Mark what this process does from now on, such as "saving step 500".

    :param starting: its work has not begun; a start-up that takes long is reported.
    """
    global _status
    _status = Status(what, starting)


@contextlib.contextmanager
def during(what: str = "", waits: bool = False) -> Iterator[None]:
    """Mark what this process does inside a ``with`` block; then the mark before holds again.

    :param what: '' for the mark that there is.
    :param waits: the process waits for the first one, which does it.
    """
    global _status
    before = _status
    _status = Status(what or before.what, before.starting, waits)
    try:
        yield
    finally:
        _status = before


@contextlib.contextmanager
def finishing() -> Iterator[None]:
    """Inside a ``with`` block, hold back for a while the end that another process's loss brings."""
    global _unfinished
    with _lock:
        _unfinished += 1
    try:
        yield
    finally:
        with _lock:
            _unfinished -= 1


def status() -> Status:
    """What this process is doing."""
    return _status


def busy() -> bool:
    """Whether something is to be finished."""
    return _unfinished > 0


def keep(watch: Watch) -> None:
    """Take a watch, which runs already, for that of this process."""
    global _watch
    _watch = watch


def watched() -> bool:
    """Whether this process is watched and has not said goodbye."""
    return _watch is not None and not _watch.left


def claim() -> bool:
    """Whether the main thread may say why this process ends; False if that is being said."""
    return _watch is None or _watch.claim()


def blame() -> str:
    """Which process was lost, in a line; '' if that is not known."""
    return _watch.blame(BLAME_SECONDS) if watched() and _watch else ""


def leave(word: str = "") -> None:
    """Say goodbye to the other processes; see :meth:`.Watch.leave`."""
    if _watch is not None:
        _watch.leave(word)


def _forget() -> None:
    """In a forked process: it is not the one that is watched, and must not hold the sockets."""
    global _watch
    if _watch is not None:
        _watch.forget()
        _watch = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
