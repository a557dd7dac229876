"""Starts processes that form a group, alone on a network of their own, on one host or two.

Where Linux lets a user make network namespaces (``unshare``), each host is one, and two are joined
by a pair of virtual cards, both named "cable", whose speed can be limited. The cards' counters
then count what the processes send and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

TIMEOUT = 240  # seconds


def can_isolate() -> bool:
    """Whether this user may make network namespaces."""
    try:
        command = ["unshare", "--map-root-user", "--net", "ip", "link", "set", "lo", "up"]
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


def run(words: Sequence[str], processes: int, hosts: int = 1, mbits: int = 0) -> None:
    """Run a command in so many processes, with what torchrun sets for each, and wait for them.

    One host without the right to make namespaces is this machine itself.

    :param words: the command.
    :param hosts: 1 or 2; neighbouring processes share one.
    :param mbits: Mbit/s between two hosts; 0 for no limit.
    :raises RuntimeError: with what was written to stderr, if a process fails.
    """
    wrap = ["unshare", "--map-root-user", "--net"] if can_isolate() else []
    given = {"words": list(words), "processes": processes, "hosts": hosts, "mbits": mbits}
    command = [*wrap, sys.executable, __file__, json.dumps({**given, "isolated": bool(wrap)})]
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _, messages = started.communicate()
    except BaseException:  # such as Ctrl-C, which the new session does not hear of
        os.killpg(started.pid, signal.SIGKILL)
        started.wait()
        raise
    if started.returncode:
        raise RuntimeError(messages)


def sent_bytes() -> dict[str, int]:
    """Bytes that the cards "lo" and "cable" of this process's host have sent so far."""
    sent = {"lo": 0, "cable": 0}
    with contextlib.suppress(OSError), open("/proc/self/net/dev") as file:
        for line in file.readlines()[2:]:
            card, numbers = line.split(":")
            sent[card.strip()] = int(numbers.split()[8])
    return sent


# -- inside the namespace ---------------------------------------------------------------------


def main() -> None:
    given = json.loads(sys.argv[1])
    per_host, alone = given["processes"] // given["hosts"], given["hosts"] == 1
    if given["isolated"]:
        _call("ip link set lo up")
    with make_hosts(given["hosts"], given["mbits"]) as hosts:
        common = {
            "WORLD_SIZE": str(given["processes"]),
            "MASTER_ADDR": "127.0.0.1" if alone else "10.0.0.1",
            "MASTER_PORT": _free_port(),
        }
        if given["isolated"]:
            common["GLOO_SOCKET_IFNAME"] = "lo" if alone else "cable"
        everyone = []
        for rank in range(given["processes"]):
            place = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank % per_host)}
            command = [*hosts[rank // per_host], *given["words"]]
            everyone.append(subprocess.Popen(command, env={**os.environ, **place}))
        try:
            codes = [process.wait(timeout=TIMEOUT) for process in everyone]
        finally:
            for process in everyone:
                process.kill()
    if any(codes):
        sys.exit(f"the processes ended with {codes}")


def _free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@contextlib.contextmanager
def make_hosts(count: int, mbits: int) -> Iterator[list[list[str]]]:
    """Network namespaces that stand for hosts.

    :return: for each, the words before a command that run it there.
    """
    if count == 1:
        yield [[]]
        return
    # a namespace lives as long as the process that waits in it
    holders = [
        subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE) for _ in range(count)
    ]
    try:
        _wait_for_namespaces(holders)
        _call("ip link add cable type veth peer name other")
        _call(f"ip link set cable netns {holders[0].pid}")
        _call(f"ip link set other name cable netns {holders[1].pid}")
        hosts = [["nsenter", f"--net=/proc/{holder.pid}/ns/net"] for holder in holders]
        for number, inside in enumerate(hosts, start=1):
            _call(f"ip addr add 10.0.0.{number}/24 dev cable", inside)
            for card in ("lo", "cable"):
                _call(f"ip link set {card} up", inside)
            if mbits:
                limit = f"tbf rate {mbits}mbit burst 128kb latency 50ms"
                _call(f"tc qdisc add dev cable root {limit}", inside)
        yield hosts
    finally:
        for holder in holders:
            holder.kill()
            holder.communicate()


def _wait_for_namespaces(holders: Sequence[subprocess.Popen[bytes]]) -> None:
    mine = os.readlink("/proc/self/ns/net")
    deadline = time.monotonic() + 10
    while any(os.readlink(f"/proc/{holder.pid}/ns/net") == mine for holder in holders):
        if time.monotonic() > deadline:
            sys.exit("no network namespace could be made")
        time.sleep(0.01)


def _call(command: str, inside: Sequence[str] = ()) -> None:
    done = subprocess.run([*inside, *command.split()], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command}: {done.stderr.strip()}")


if __name__ == "__main__":
    main()
