"""Short messages between processes, over sockets on which nothing waits."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from typing import Any

MAX_LINE = 2**16  # bytes; no message comes near
MAX_UNSENT = 2**20  # bytes; a process that reads none of it is lost anyway

Message = dict[str, Any]


class Wire:
    """Messages over a socket, a line of JSON each; nothing waits."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.open = True
        self._received, self._unsent = b"", b""
        self._lock = threading.Lock()  # the main thread says goodbye

    def send(self, message: Message) -> None:
        """Send, or keep for the next time what does not go now."""
        with self._lock:
            self._unsent += json.dumps(message).encode() + b"\n"
            try:
                self._unsent = self._unsent[self.sock.send(self._unsent) :]
            except BlockingIOError:
                self._unsent = self._unsent[-MAX_UNSENT:]
            except OSError:
                self._unsent = b""  # the next receive() tells

    def receive(self) -> list[Message]:
        """The messages that have arrived; :attr:`open` is False after the last."""
        while self.open:
            try:
                data = self.sock.recv(MAX_LINE)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            self._received += data
            self.open = bool(data)
        *lines, self._received = self._received.split(b"\n")
        messages = [message for line in lines if (message := _parse(line)) is not None]
        if len(self._received) > MAX_LINE or len(messages) < len(lines):
            self.open = False  # nothing of ours
        return messages


def _parse(line: bytes) -> Message | None:
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None


def open_port() -> socket.socket:
    """A free port, open to all networks of this machine."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return _nonblocking(
                socket.create_server(
                    ("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096
                )
            )
    return _nonblocking(socket.create_server(("", 0), backlog=4096))


def _nonblocking(server: socket.socket) -> socket.socket:
    server.setblocking(False)
    return server
