"""Who started this process, where it meets the others, and that all of them come."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from . import liveness
from .errors import UserError
from .heartbeat import Hub, Member
from .stalls import hostname, overdue, processes
from .wire import Wire

# After srun has been ruled out, which may set the first two as well; then PALS and MVAPICH
OTHER_MPI_VARIABLES = ("PMI_SIZE", "PMIX_RANK", "PALS_RANKID", "MV2_COMM_WORLD_SIZE")
SLURM_BATCH_STEP = str(0xFFFFFFFB)  # the step ID of a batch script, which srun did not start

POLL_SECONDS = 0.1
CONNECT_SECONDS = 5.0  # for one attempt
WORD_SECONDS = 5.0  # at most, for a process that fails before it has met the others to tell them
HUB = "improved_diffusion/hub"  # the key under which the first process says where to connect

End = Callable[[str], None]


@dataclass(frozen=True)
class Place:
    """Where this process stands among those that were started together."""

    launcher: str  # "single", "torchrun", "mpiexec" or "srun"
    rank: int
    world_size: int
    local_rank: int  # among the processes of this machine
    one_machine: bool = False  # known under mpiexec

    @property
    def name(self) -> str:
        """``process 3 of 8 (host gpu7)``."""
        return f"process {self.rank} of {self.world_size} (host {hostname()})"


def find_place(gpus_per_node: int, end: End) -> Place:
    """Tell by the launcher's variables, or by MPI, which of the processes this one is.

    :param gpus_per_node: where a launcher does not tell the local rank.
    :param end: see :func:`meet`.
    :raises ValueError: when started by mpiexec without a working mpi4py.
    """
    launcher = _launcher()
    if launcher == "mpiexec":
        return _place_by_mpi(end)
    return _place_from_environment(launcher, os.environ, gpus_per_node)


def meet(place: Place, attempts: int, end: End) -> dist.Store:
    """Wait for all processes, each of which is watched from then on.

    Who waits long says for whom; see :func:`.overdue`.

    :param attempts: to open a port, or to find an address.
    :param end: prints the line of an error and ends the process; called in another thread.
    :return: a key-value store for this meeting alone.
    :raises ValueError: if there is no way to meet.
    """
    arguments = (place.rank, place.world_size, liveness.status, liveness.busy, end)
    if place.rank == 0:
        hub = Hub(*arguments)
        hub.start()
        liveness.keep(hub)
        store = _publish(place, hub, attempts)
        waits_for = lambda: f"{processes(hub.missing())}, not joined yet"  # noqa: E731
        with overdue(place.name, waits_for, end):
            hub.all_here.wait()
        hub.go()
        return dist.PrefixStore(hub.token, store)
    address = _address_of_the_first(place)
    where = "process 0" + (f" at {address[0]}:{address[1]}" if address else "")
    with overdue(place.name, lambda: where, end):
        address = address or _address_by_mpi()
        store, member, token = _join(place, address, attempts, arguments)
    liveness.keep(member)
    member.all_here.wait()  # the first process says who is missing; if it is lost, this one ends
    return dist.PrefixStore(token, store)


def send_word(word: str, gpus_per_node: int) -> None:
    """Tell the others, for which this process has not waited yet, why it ends; for some seconds.

    :param word: what went wrong, in a line.
    """
    launcher = _launcher()
    if launcher in ("single", "mpiexec"):  # mpiexec ends the others
        return
    place = _place_from_environment(launcher, os.environ, gpus_per_node)
    deadline = time.monotonic() + WORD_SECONDS
    arguments = (place.rank, place.world_size, liveness.status, liveness.busy, lambda line: None)
    if place.world_size == 1:
        return
    with contextlib.suppress(UserError, RuntimeError, OSError):
        if place.rank == 0:
            hub = Hub(*arguments)
            hub.refuse(word)
            hub.start()
            _store = _publish(place, hub, attempts=1)  # it lives as long as its name
            hub.all_here.wait(deadline - time.monotonic())
        else:
            address = _address_of_the_first(place)
            assert address is not None
            _, member, _ = _join(place, address, 1, arguments, deadline)
            member.leave(word)


# -- who started us ---------------------------------------------------------------------------


def _launcher(env: Mapping[str, str] = os.environ) -> str:
    """Tell the launcher by the variables that it sets."""
    if all(name in env for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")):
        return "torchrun"
    if "OMPI_COMM_WORLD_SIZE" in env or "MPI_LOCALNRANKS" in env:  # Open MPI; MPICH, Intel MPI
        return "mpiexec"  # before srun: inside a Slurm job mpiexec starts its daemons by srun
    if "SLURM_PROCID" in env and env.get("SLURM_STEP_ID", SLURM_BATCH_STEP) != SLURM_BATCH_STEP:
        return "srun"
    if any(name in env for name in OTHER_MPI_VARIABLES):
        return "mpiexec"
    return "single"


def _place_from_environment(launcher: str, env: Mapping[str, str], gpus_per_node: int) -> Place:
    if launcher == "torchrun":
        rank = int(env["RANK"])
        local_rank = int(env.get("LOCAL_RANK", rank % gpus_per_node))
        return Place(launcher, rank, int(env["WORLD_SIZE"]), local_rank)
    if launcher == "srun":
        world_size = int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1")))
        rank = int(env["SLURM_PROCID"])
        local_rank = int(env.get("SLURM_LOCALID", rank % gpus_per_node))
        return Place(launcher, rank, world_size, local_rank)
    return Place("single", 0, 1, int(env.get("LOCAL_RANK", "0")))


def _place_by_mpi(end: End) -> Place:
    try:
        with overdue(f"a process of mpiexec (host {hostname()})", lambda: "MPI to start", end):
            from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            "started by mpiexec, but mpi4py does not work here: install an MPI library (pip "
            "install 'improved-diffusion[mpi]') or use torchrun, which needs none "
            f"({_first_line(error)})"
        ) from None
    comm = MPI.COMM_WORLD
    local = comm.Split_type(MPI.COMM_TYPE_SHARED)
    one_machine = local.Get_size() == comm.Get_size()
    place = Place("mpiexec", comm.Get_rank(), comm.Get_size(), local.Get_rank(), one_machine)
    started = os.environ.get("OMPI_COMM_WORLD_SIZE") or os.environ.get("PMI_SIZE")
    if started and place.world_size != int(started):
        raise UserError(
            f"mpiexec started {started} processes, but mpi4py sees {place.world_size}: it is "
            "linked to another MPI library than this mpiexec; use that library's mpiexec"
        )
    return place


# -- where to meet ----------------------------------------------------------------------------


def _address_of_the_first(place: Place) -> tuple[str, int] | None:
    """The address that every process can tell beforehand; None where MPI will tell it."""
    if place.launcher == "mpiexec":
        return None
    if place.launcher == "torchrun":
        host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    else:
        host = os.environ.get("MASTER_ADDR") or _first_slurm_host(os.environ)
        port = os.environ.get("MASTER_PORT") or str(_slurm_port(os.environ))
    if not port.isdecimal() or int(port) >= 2**16:
        raise UserError(f"MASTER_PORT {port} is no port number")
    return host, int(port)


def _first_slurm_host(env: Mapping[str, str]) -> str:
    """The first name of a list such as ``gpu[003-006,9],login1``: ``gpu003``."""
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "127.0.0.1"
    first = re.match(r"([^,\[]*)(?:\[(\d+)[^\]]*\]([^,\[]*))?", nodes)
    assert first is not None  # the pattern matches anything
    return "".join(part or "" for part in first.groups())


def _slurm_port(env: Mapping[str, str]) -> int:
    """A port that all tasks of a job step compute alike and other steps likely do not."""
    job, step = int(env.get("SLURM_JOB_ID", "0")), int(env["SLURM_STEP_ID"])
    return 15000 + (job * 97 + step) % 15000


def _address_by_mpi() -> tuple[str, int]:
    """Where the first process has opened its port, told by MPI."""
    from mpi4py import MPI

    address, problem = MPI.COMM_WORLD.bcast(None, root=0)
    if problem:
        raise UserError(problem)
    return address


def _own_address() -> str:
    """This machine's address in the network; no packet is sent to find it."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # an address reserved for documentation: RFC 5737
        return probe.getsockname()[0]
    return socket.gethostbyname(socket.gethostname())


# -- the meeting ------------------------------------------------------------------------------


def _publish(place: Place, hub: Hub, attempts: int) -> dist.Store:
    """Open the store, on the first process, and say in it where the hub is."""
    if place.launcher == "mpiexec":
        store = _open_store_for_mpi(place)
    else:
        address = _address_of_the_first(place)
        assert address is not None
        serve = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)  # torchrun's own
        store = _retry(lambda: _store(place, address, serve), place, address, attempts)
    store.set(HUB, json.dumps([hub.port, hub.token]))
    return store


def _open_store_for_mpi(place: Place) -> dist.Store:
    """Open a port, which is bound before its number is known to anyone, and tell it by MPI."""
    from mpi4py import MPI

    store, address, problem = None, None, ""
    host = "127.0.0.1" if place.one_machine else os.environ.get("MASTER_ADDR") or _own_address()
    try:
        store = _store(place, (host, 0), serve=True)
        address = (host, store.port)
    except (RuntimeError, dist.DistError) as error:
        problem = f"the first process cannot open a port on {host}: {_first_line(error)}"
    MPI.COMM_WORLD.bcast((address, problem), root=0)
    if store is None:
        raise UserError(problem)
    return store


def _store(place: Place, address: tuple[str, int], serve: bool) -> dist.TCPStore:
    return dist.TCPStore(
        *address,
        place.world_size,
        is_master=serve,
        wait_for_workers=False,
        multi_tenant=serve,
    )


def _retry(
    open_store: Callable[[], dist.Store], place: Place, address: tuple[str, int], attempts: int
) -> dist.Store:
    for attempt in range(attempts):
        try:
            return open_store()
        except (RuntimeError, dist.DistError) as error:
            if attempt == attempts - 1:
                raise _no_way(place, address, error) from None
            time.sleep(2**attempt)
    raise AssertionError("unreachable")


def _no_way(place: Place, address: tuple[str, int], error: Exception) -> UserError:
    return UserError(
        f"process {place.rank} of {place.world_size} cannot meet the others at "
        f"{address[0]}:{address[1]}; set MASTER_ADDR and MASTER_PORT to an address and a free port "
        f"of the first machine ({_first_line(error)})"
    )


def _join(
    place: Place,
    address: tuple[str, int],
    attempts: int,
    arguments: tuple[Any, ...],
    deadline: float = float("inf"),
) -> tuple[dist.Store, Member, str]:
    """Connect to the store and the hub of the first process, which may not be there yet.

    :return: the store, the watch of this process, which runs, and the hub's token.
    """
    while not _reachable(place, address, attempts):
        _pause(deadline)
    store = _store(place, address, serve=False)
    while True:
        if store.check([HUB]):
            port, token = json.loads(store.get(HUB))
            with contextlib.suppress(OSError):
                wire = Wire(socket.create_connection((address[0], port), CONNECT_SECONDS))
                member = Member(wire, token, address[0], *arguments)
                member.start()
                # the key may be of an earlier start, whose store torchrun keeps
                while not member.gone.is_set():
                    if member.welcome.wait(POLL_SECONDS):
                        return store, member, token
        _pause(deadline)


def _pause(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError("no one came")
    time.sleep(POLL_SECONDS)


def _reachable(place: Place, address: tuple[str, int], attempts: int) -> bool:
    """Whether anything listens at an address.

    :raises ValueError: if the name of the machine is unknown.
    """
    for attempt in range(attempts):
        try:
            socket.create_connection(address, CONNECT_SECONDS).close()
            return True
        except socket.gaierror as error:
            if attempt == attempts - 1:
                raise _no_way(place, address, error) from None
            time.sleep(2**attempt)
        except OSError:
            return False
    return False


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
