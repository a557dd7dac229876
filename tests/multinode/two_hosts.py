"""Two "hosts" on one machine: network namespaces joined by a cable, with names of their own."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from script_runner import script_environment

INTERFACE = "cable0"


class Host:
    """A network namespace with an address, and what runs in it.

    :ivar name: what ``hostname`` says there.
    """

    def __init__(self, namespace, name, address):
        self.namespace, self.name, self.address = namespace, name, address
        self.running = []

    def words(self, command):
        """The command line that runs a command on this host."""
        named = ["unshare", "--uts", "sh", "-c", f'hostname {self.name} && exec "$@"', "sh"]
        return ["ip", "netns", "exec", self.namespace, *named, *map(str, command)]

    def start(self, command, cwd, env=None):
        """Start a command there; its output goes to files of its own."""
        log = cwd / f"{self.name}.{len(self.running)}"
        environment = script_environment({"GLOO_SOCKET_IFNAME": INTERFACE, **(env or {})})
        with open(f"{log}.out", "w") as out, open(f"{log}.err", "w") as err:
            process = subprocess.Popen(
                self.words(command), cwd=cwd, env=environment, stdout=out, stderr=err
            )
        process.log = log
        self.running.append(process)
        return process

    def unplug(self):
        """Take the cable out."""
        ip("-n", self.namespace, "link", "set", INTERFACE, "down")

    def pids(self):
        """All processes on this host, those of torchrun's sessions included."""
        return [int(pid) for pid in ip("netns", "pids", self.namespace).split()]

    def switch_off(self):
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.running:
            process.wait()


def ip(*words):
    return subprocess.run(
        ["ip", *words], check=True, capture_output=True, text=True, timeout=60
    ).stdout


def end(process, timeout):
    """Wait for a process of :meth:`Host.start`."""
    process.wait(timeout=timeout)
    texts = [Path(f"{process.log}.{end}").read_text() for end in ("out", "err")]
    return subprocess.CompletedProcess(process.args, process.returncode, *texts)


def torchrun(host, *words):
    """The command line of docs/clusters.md, with one process per host."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    command += ["--nproc_per_node", "1", "--rdzv_backend", "c10d"]
    return [*command, "--rdzv_endpoint", f"{host}:29500", "--rdzv_id", "big", *words]


@contextlib.contextmanager
def two_hosts():
    """Two hosts, ``alpha`` and ``beta``, that know each other's names; gone afterwards.

    Skips the test where that is not allowed.
    """
    mark = f"idtest{os.getpid()}"
    hosts = [Host(f"{mark}a", "alpha", "10.77.0.1"), Host(f"{mark}b", "beta", "10.77.0.2")]
    allowed = shutil.which("ip") and shutil.which("unshare") and os.geteuid() == 0
    try:
        if not allowed:
            pytest.skip("needs root and iproute2")
        try:
            for host in hosts:
                ip("netns", "add", host.namespace)
        except subprocess.CalledProcessError:  # root of a container without the right to
            pytest.skip("needs root and iproute2")
        _plug(hosts)
        yield hosts
    finally:
        _remove(hosts)


def _plug(hosts):
    first, second = (host.namespace for host in hosts)
    cable = ["link", "add", INTERFACE, "netns", first, "type", "veth"]
    ip(*cable, "peer", "name", INTERFACE, "netns", second)
    for host in hosts:
        ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", INTERFACE)
        for interface in ("lo", INTERFACE):
            ip("-n", host.namespace, "link", "set", interface, "up")
        etc = Path("/etc/netns") / host.namespace  # "ip netns exec" puts it in place of /etc
        etc.mkdir(parents=True)
        names = "".join(f"{other.address} {other.name}\n" for other in hosts)
        (etc / "hosts").write_text(f"127.0.0.1 localhost\n{names}")


def _remove(hosts):
    existing = ip("netns", "list").split() if shutil.which("ip") else []
    for host in hosts:
        if host.namespace in existing:
            host.switch_off()
            ip("netns", "delete", host.namespace)
        shutil.rmtree(Path("/etc/netns") / host.namespace, ignore_errors=True)
    with contextlib.suppress(OSError):
        Path("/etc/netns").rmdir()  # if nothing else is in it


def wait_until(condition, seconds=90):
    """Wait for what must come to pass."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it has not happened"
        time.sleep(0.1)
