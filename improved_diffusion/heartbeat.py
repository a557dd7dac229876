"""Each process of a run shows that it lives, and learns when another one does not.

The first process is the hub, to which every other one is connected: no message of a thousand
processes goes to more than one of them. Every few seconds each tells the hub what it is doing and
the hub tells each that it is there. A connection that closes before its process has said goodbye,
or says nothing for long, means that the process is lost; the hub tells all the others, and all end.

A thread does this, with sockets of its own, so that a main thread that waits in a collective, in
a store or for a disk is no obstacle. Silence is counted in the watcher's own looks, not by the
clock: a job that is suspended and resumed as a whole has missed none.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from . import stalls
from .stalls import Status, describe, hostname, say
from .wire import Message, Wire, open_port

BEAT_SECONDS = 5.0  # between signs of life, and between looks for those of others
LOST_LOOKS = 8  # looks without a sign: 40 s, as a call may keep Python's threads waiting for 30 s
GRACE_SECONDS = 2.0  # for processes to end by themselves and say why, when one has ended
HOLD_SECONDS = 50.0  # from the last sign of a lost process, to finish a file that is being written
FAREWELL_SECONDS = 1.0  # at most, for the last words to arrive


@dataclass(frozen=True)
class Loss:
    """A process that ended or fell silent."""

    rank: int
    line: str  # says so, naming it
    silent: float = 0.0  # seconds without a sign of it


@dataclass
class Peer:
    """Another process, as this one sees it."""

    rank: int
    host: str
    pid: int
    wire: Wire
    status: Status = field(default_factory=Status)
    looks: int = 0  # since its last sign
    done: bool = False  # it has said goodbye, or is lost
    heard: bool = False  # it knows that this process has said goodbye

    def name(self, world_size: int) -> str:
        """``process 3 of 8 (host gpu7, pid 4711)``."""
        return f"process {self.rank} of {world_size} (host {self.host}, pid {self.pid})"


class Watch(threading.Thread):
    """The thread that gives and looks for signs of life; see :class:`Hub` and :class:`Member`.

    :param status: tells what this process is doing.
    :param busy: tells whether this process is writing a file that should be finished.
    :param end: prints the line of an error and ends the process; called in the thread.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        status: Callable[[], Status],
        busy: Callable[[], bool],
        end: Callable[[str], None],
    ) -> None:
        super().__init__(name="liveness", daemon=True)
        self.rank, self.world_size = rank, world_size
        self.status, self.busy, self.end = status, busy, end
        self.peers: dict[int, Peer] = {}
        self.loss: Loss | None = None
        self.left = False
        self._known = threading.Event()  # there is a loss
        self._claimed = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._end_at = self._end_by = 0.0

    # -- for the main thread --------------------------------------------------------------------

    def claim(self) -> bool:
        """Whether the caller is the first of the two threads that wants to end this process."""
        return self._claimed.acquire(blocking=False)

    def blame(self, seconds: float) -> str:
        """Which process was lost; '' if none turns out to be within so many seconds."""
        self._known.wait(seconds)
        return self.loss.line if self.loss else ""

    def leave(self, word: str = "") -> None:
        """Say goodbye: this process is about to end, and is not lost.

        :param word: what went wrong, in a line; '' for nothing: the others need not end.
        """
        if self.left:
            return
        self.left = True
        for peer in list(self.peers.values()):
            peer.wire.send(self._goodbye(word))
        deadline = time.monotonic() + FAREWELL_SECONDS
        while self.loss is None and time.monotonic() < deadline:
            if all(peer.heard or peer.done for peer in list(self.peers.values())):
                break
            time.sleep(0.01)

    def forget(self) -> None:
        """Close the copies of the sockets that a forked process has, and nothing else."""
        self._selector.close()
        for peer in self.peers.values():
            peer.wire.sock.close()

    # -- the thread -----------------------------------------------------------------------------

    def run(self) -> None:
        """Look again and again, until the process ends."""
        look_at = time.monotonic() + BEAT_SECONDS
        while True:
            until = min(look_at, time.monotonic() + 0.1) if self.loss else look_at
            for key, _ in self._selector.select(max(0.0, until - time.monotonic())):
                key.data()
            if time.monotonic() >= look_at:
                self._look()
                look_at = time.monotonic() + BEAT_SECONDS
            if self.loss and not self.left and time.monotonic() >= self._end_at:
                self._end()

    def _listen_to(self, peer: Peer) -> None:
        self.peers[peer.rank] = peer
        self._selector.register(peer.wire.sock, selectors.EVENT_READ, lambda: self._hear(peer))

    def _hear(self, peer: Peer) -> None:
        for message in peer.wire.receive():
            peer.looks = 0
            self._take(peer, message)
        if not peer.wire.open:
            self._selector.unregister(peer.wire.sock)
            peer.wire.sock.close()
            if not peer.done:
                self._lose(peer, f"ended without a word{_last_seen(peer)}")

    def _look(self) -> None:
        """Give a sign of life, and look at those of the others."""
        status = self.status()
        for peer in list(self.peers.values()):
            if peer.done:
                continue
            peer.wire.send({"beat": [status.what, status.starting, status.waits]})
            peer.looks += 1
            if peer.looks > LOST_LOOKS:
                silent = LOST_LOOKS * BEAT_SECONDS
                how = f"has given no sign of life for {silent:.0f} s{_last_seen(peer)}"
                self._lose(peer, how, silent)

    def _take(self, peer: Peer, message: Message) -> None:
        """Act on a message."""
        if "beat" in message:
            what, starting, waits = message["beat"]
            peer.status = Status(str(what), bool(starting), bool(waits))
        elif "failed" in message:
            self._lose(peer, f"ended with: {message['failed']}")
            peer.wire.send({"heard": True})
        elif "bye" in message:
            peer.done = True
            peer.wire.send({"heard": True})
        elif "heard" in message:
            peer.heard = True

    def _lose(self, peer: Peer, how: str, silent: float = 0.0) -> None:
        peer.done = True
        self._decide(Loss(peer.rank, f"{peer.name(self.world_size)} {how}", silent))

    def _decide(self, loss: Loss) -> None:
        """Name the lost process; the first one counts, as others may end because of it."""
        if self.loss is None:
            self.loss = loss
            self._end_at = time.monotonic() + GRACE_SECONDS
            self._end_by = time.monotonic() + max(GRACE_SECONDS, HOLD_SECONDS - loss.silent)
            self._known.set()

    def _end(self) -> None:
        assert self.loss is not None
        if self.busy() and time.monotonic() < self._end_by:
            return
        if self.claim():
            self.end(f"{self.loss.line}: this process ends too")
        self.left = True  # the main thread is ending the process already

    def _goodbye(self, word: str) -> Message:
        return {"failed": word} if word else {"bye": True}


class Member(Watch):
    """Any process but the first: it watches the first one, which watches all.

    :param wire: to the hub.
    :param token: the hub's, which tells its run from others.
    """

    def __init__(self, wire: Wire, token: str, host: str, *args: Any) -> None:
        super().__init__(*args)
        self.gone = threading.Event()  # the hub has closed, or refuses this process
        self.welcome = threading.Event()
        self.all_here = threading.Event()
        self._listen_to(Peer(0, host, 0, wire))
        wire.send({"hello": token, "rank": self.rank, "host": hostname(), "pid": os.getpid()})

    def _take(self, peer: Peer, message: Message) -> None:
        if "welcome" in message:
            peer.host, peer.pid = message["welcome"]
            self.welcome.set()
        elif "go" in message:
            self.all_here.set()
        elif "lost" in message:
            self._decide(Loss(*message["lost"]))
            if "bye" in message:
                super()._take(peer, message)
        else:
            super()._take(peer, message)

    def _lose(self, peer: Peer, how: str, silent: float = 0.0) -> None:
        if self.welcome.is_set():
            super()._lose(peer, how, silent)
        peer.done = True
        self.gone.set()


class Hub(Watch):
    """The first process: it watches all others and tells them who is lost."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.token = secrets.token_hex(8)
        self.all_here = threading.Event()
        self._strangers: set[socket.socket] = set()
        self._began = math.inf  # until all are here, others say who is missing
        self._reports = 0
        self._server = open_port()
        self._selector.register(self._server, selectors.EVENT_READ, self._accept)

    @property
    def port(self) -> int:
        """Where the others connect."""
        return self._server.getsockname()[1]

    def missing(self) -> list[int]:
        """The processes that have not joined."""
        return [rank for rank in range(1, self.world_size) if rank not in self.peers]

    def go(self) -> None:
        """Tell everyone that all are here; from now on a start-up that stalls is reported."""
        self._began = time.monotonic()
        for peer in list(self.peers.values()):
            peer.wire.send({"go": True})

    def refuse(self, word: str) -> None:
        """Tell everyone who joins that this process ends, and why."""
        self.left = True
        self._decide(Loss(0, f"{self._own_name()} ended with: {word}"))

    def forget(self) -> None:
        super().forget()
        for sock in [self._server, *self._strangers]:
            sock.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            sock, _ = self._server.accept()
            wire = Wire(sock)
            self._strangers.add(sock)
            self._selector.register(sock, selectors.EVENT_READ, lambda: self._greet(wire))

    def _greet(self, wire: Wire) -> None:
        """Take a stranger for the process that it says it is, if it knows the token."""
        messages = wire.receive()
        if not messages and wire.open:
            return
        self._selector.unregister(wire.sock)
        self._strangers.discard(wire.sock)
        hello = messages.pop(0) if messages else {}
        rank = int(hello.get("rank", -1))
        known = hello.get("hello") == self.token and rank in self.missing()
        if not known:
            wire.sock.close()
            return
        peer = Peer(rank, str(hello["host"]), int(hello["pid"]), wire)
        wire.send({"welcome": [hostname(), os.getpid()]})
        if self.loss:
            wire.send(_lost(self.loss))
        self._listen_to(peer)
        for message in messages:
            self._take(peer, message)
        if not self.missing():
            self.all_here.set()
        self._hear(peer)

    def _decide(self, loss: Loss) -> None:
        if self.loss is None:
            for peer in list(self.peers.values()):
                peer.wire.send(_lost(loss))
        super()._decide(loss)

    def _goodbye(self, word: str) -> Message:
        if not word:
            return super()._goodbye(word)
        own = Loss(0, f"{self._own_name()} ended with: {word}")
        return {**_lost(self.loss or own), "bye": True}

    def _own_name(self) -> str:
        return f"process 0 of {self.world_size} (host {hostname()}, pid {os.getpid()})"

    def _look(self) -> None:
        super()._look()
        everyone = {0: self.status(), **{r: p.status for r, p in self.peers.items() if not p.done}}
        started = not any(status.starting for status in everyone.values())
        waited = time.monotonic() - self._began
        if (
            not started
            and self.loss is None
            and waited >= (self._reports + 1) * stalls.STALL_SECONDS
        ):
            self._reports += 1
            say(f"start-up has taken {waited:.0f} s: {describe(everyone)}")


def _lost(loss: Loss) -> Message:
    return {"lost": [loss.rank, loss.line, loss.silent]}


def _last_seen(peer: Peer) -> str:
    return f", last seen {peer.status.what}" if peer.status.what else ""
