"""One set-up for a single process, torchrun, mpiexec and srun.

Nothing else in the package knows how the process group came to be.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import io
import multiprocessing
import os
import pickle
import re
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import Stop, UserError
from .solo_group import init_solo_process_group

GPUS_PER_NODE = 8  # where a launcher does not tell the local rank
SETUP_RETRY_COUNT = 3  # attempts to reach the first process

BROADCAST_CHUNK = 2**28  # bytes; one message of a whole checkpoint may exceed 2 GiB
# After srun has been ruled out, which may set the first two as well; then PALS and MVAPICH
OTHER_MPI_VARIABLES = ("PMI_SIZE", "PMIX_RANK", "PALS_RANKID", "MV2_COMM_WORLD_SIZE")
SLURM_BATCH_STEP = str(0xFFFFFFFB)  # the step ID of a batch script, which srun did not start


T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Where this process stands among those that were started together."""

    launcher: str  # "single", "torchrun", "mpiexec" or "srun"
    rank: int
    world_size: int
    local_rank: int  # among the processes of this machine


_local_rank = 0


def setup_dist() -> None:
    """Join the processes that a launcher started into a process group, and choose the GPU.

    Does nothing where a process group exists. One process forms a group of one without MPI and
    without a network port.

    :raises ValueError: when started by mpiexec without a working mpi4py.
    """
    global _local_rank
    if dist.is_initialized():
        return
    launcher = _launcher()
    if launcher == "mpiexec":
        place, store = _meet_by_mpi()
    else:
        place, store = _place_from_environment(launcher, os.environ), None
    _local_rank = place.local_rank
    if torch.cuda.is_available():
        torch.cuda.set_device(dev())
    if place.world_size == 1:
        init_solo_process_group()
        return
    if store is None:
        store = _meet_by_address(place)
    atexit.register(_leave)
    dist.init_process_group(
        # small agreements of the hosts do not wait for the GPUs
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        store=store,
        rank=place.rank,
        world_size=place.world_size,
    )


def dev() -> torch.device:
    """The device of this process: its GPU by local rank, or the CPU."""
    if torch.cuda.is_available():
        return torch.device(f"cuda:{_local_rank % torch.cuda.device_count()}")
    return torch.device("cpu")


def get_rank() -> int:
    """The index of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    """The number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for all processes."""
    if get_world_size() > 1:
        dist.barrier()


def broadcast_object(value: Any) -> Any:
    """The first process's ``value``, a small picklable object, on every process."""
    if get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=dev())
    return box[0]


def any_rank(*conditions: bool) -> list[bool]:
    """For each condition, whether it holds on any process."""
    if get_world_size() == 1:
        return list(conditions)
    votes = torch.tensor(conditions, dtype=torch.uint8)
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return [bool(vote) for vote in votes.tolist()]


def gather_objects(value: Any) -> list[Any]:
    """The small picklable ``value`` of every process, in the order of their ranks, on all."""
    if get_world_size() == 1:
        return [value]
    values = [None] * get_world_size()
    dist.all_gather_object(values, value)
    return values


def describe_processes() -> str:
    """How many processes there are, on which devices of how many machines."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    everyone = gather_objects((socket.gethostname(), name))
    machines = len({host for host, _ in everyone})
    devices = collections.Counter(device for _, device in everyone)
    where = " and ".join(f"{n} x {d}" if n > 1 else d for d, n in devices.items())
    plural = "es" if len(everyone) > 1 else ""
    on = f" of {machines} machines" if machines > 1 else ""
    return f"{len(everyone)} process{plural} on {where}{on}"


def sync_params(params: Iterable[Tensor]) -> None:
    """Overwrite parameters, in place, with those of the first process."""
    if get_world_size() > 1:
        for param in params:
            dist.broadcast(param.detach(), 0)  # detached: a leaf must not change under autograd


def on_first_rank(function: Callable[[], T]) -> T:
    """Call a function on the first process alone and give its small result to all.

    :raises ValueError: on every process alike, if the function raises :class:`UserError` or cannot
        read a file.
    """
    result, problem = None, ""
    if get_rank() == 0:
        try:
            result = function()
        except UserError as error:
            problem = str(error)
        except OSError as error:
            problem = str(error) or type(error).__name__
    result, problem = broadcast_object((result, problem))
    if problem:
        raise UserError(problem)
    return result


def load_state_dict(path: str, **kwargs: Any) -> Any:
    """Load a file of tensors, which the first process reads, on every process.

    :param path: anything that blobfile opens.
    :param kwargs: arguments of :func:`torch.load`, such as ``map_location``.
    :raises ValueError: on every process alike, if the file is missing, damaged, or holds anything
        but tensors and plain containers of them.
    """
    data = b""

    def read() -> int:
        nonlocal data
        data = _read_bytes(path)
        return len(data)

    size = on_first_rank(read)
    if get_world_size() > 1:
        data = _broadcast_bytes(data, size)
    return _load_tensors(data, path, kwargs)


def _load_tensors(data: bytes, path: str, kwargs: dict[str, Any]) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of foreign pickles before it refuses them
            kwargs = {name: value for name, value in kwargs.items() if name != "weights_only"}
            return torch.load(io.BytesIO(data), weights_only=True, **kwargs)
    except pickle.UnpicklingError as error:
        if re.search("unsupported (global|class)", str(error), flags=re.IGNORECASE):
            raise UserError(
                f"checkpoint '{path}' holds something other than tensors, which could run code; "
                "only tensors are loaded: save a plain state dict"
            ) from None
        raise UserError(f"checkpoint '{path}' is damaged or no checkpoint at all") from None
    except MemoryError:
        raise
    except Exception as error:  # whatever foreign or cut-off bytes make the unpickler raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"checkpoint '{path}' is damaged or no checkpoint at all: {reason}"
        ) from None


def _read_bytes(path: str) -> bytes:
    import blobfile as bf

    try:
        if not path or bf.isdir(path) or not bf.exists(path):
            raise UserError(f"checkpoint '{path}' does not exist or is no file")
        with bf.BlobFile(path, "rb") as file:
            return file.read()
    except bf.Error as error:  # no access to the blob storage
        raise UserError(f"checkpoint '{path}' cannot be read: {error}") from None


def _broadcast_bytes(data: bytes, size: int) -> bytes:
    """``data`` of the first process on every process, in chunks."""
    received = bytearray(0 if get_rank() == 0 else size)
    for start in range(0, size, BROADCAST_CHUNK):
        length = min(BROADCAST_CHUNK, size - start)
        if get_rank() == 0:
            chunk = torch.frombuffer(bytearray(data[start : start + length]), dtype=torch.uint8)
        else:
            chunk = torch.empty(length, dtype=torch.uint8)
        chunk = chunk.to(dev())
        dist.broadcast(chunk, 0)
        if get_rank() != 0:
            received[start : start + length] = chunk.cpu().numpy().data
    return data or bytes(received)


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


def _place_from_environment(launcher: str, env: Mapping[str, str]) -> Place:
    if launcher == "torchrun":
        rank = int(env["RANK"])
        local_rank = int(env.get("LOCAL_RANK", rank % GPUS_PER_NODE))
        return Place(launcher, rank, int(env["WORLD_SIZE"]), local_rank)
    if launcher == "srun":
        world_size = int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1")))
        rank = int(env["SLURM_PROCID"])
        local_rank = int(env.get("SLURM_LOCALID", rank % GPUS_PER_NODE))
        return Place(launcher, rank, world_size, local_rank)
    return Place("single", 0, 1, int(env.get("LOCAL_RANK", "0")))


def _meet_by_address(place: Place) -> dist.Store:
    """A key-value store at an address that every process can tell beforehand."""
    if place.launcher == "torchrun":
        # torchrun's agent may hold the port already and serve the store: let torch find out
        try:
            rendezvous = dist.rendezvous("env://", rank=place.rank, world_size=place.world_size)
            return next(rendezvous)[0]
        except (RuntimeError, ValueError, dist.DistError) as error:
            raise UserError(
                f"process {place.rank} of {place.world_size} cannot meet the others at MASTER_ADDR "
                f"{os.environ['MASTER_ADDR']}, MASTER_PORT {os.environ['MASTER_PORT']}: "
                f"{_first_line(error)}"
            ) from None
    host = os.environ.get("MASTER_ADDR") or _first_slurm_host(os.environ)
    port = os.environ.get("MASTER_PORT") or str(_slurm_port(os.environ))
    if not port.isdecimal():
        raise UserError(f"MASTER_PORT {port} is no port number")
    return _connect(host, int(port), place)


def _connect(host: str, port: int, place: Place) -> dist.Store:
    for attempt in range(SETUP_RETRY_COUNT):
        try:
            return dist.TCPStore(host, port, place.world_size, is_master=place.rank == 0)
        except (RuntimeError, dist.DistError) as error:
            if attempt == SETUP_RETRY_COUNT - 1:
                raise UserError(
                    f"process {place.rank} of {place.world_size} cannot meet the others at "
                    f"{host}:{port}; set MASTER_ADDR and MASTER_PORT to an address and a free port "
                    f"of the first machine ({_first_line(error)})"
                ) from None
            time.sleep(2**attempt)
    raise AssertionError("unreachable")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


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


def _meet_by_mpi() -> tuple[Place, dist.Store | None]:
    """Tell the rank by MPI; the first process opens a port and sends its address to the others.

    The port is bound before its number is known to anyone, so that no one can take it between.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            "started by mpiexec, but mpi4py does not work here: install an MPI library (pip "
            "install 'improved-diffusion[mpi]') or use torchrun, which needs none "
            f"({_first_line(error)})"
        ) from None
    comm = MPI.COMM_WORLD
    local = comm.Split_type(MPI.COMM_TYPE_SHARED)
    place = Place("mpiexec", comm.Get_rank(), comm.Get_size(), local.Get_rank())
    started = os.environ.get("OMPI_COMM_WORLD_SIZE") or os.environ.get("PMI_SIZE")
    if started and place.world_size != int(started):
        raise UserError(
            f"mpiexec started {started} processes, but mpi4py sees {place.world_size}: it is "
            "linked to another MPI library than this mpiexec; use that library's mpiexec"
        )
    if place.world_size == 1:
        return place, None
    store, address, problem = None, None, ""
    if place.rank == 0:
        one_machine = local.Get_size() == place.world_size
        host = "127.0.0.1" if one_machine else os.environ.get("MASTER_ADDR") or _own_address()
        try:
            store = dist.TCPStore(host, 0, place.world_size, is_master=True, wait_for_workers=False)
            address = (host, store.port)
        except (RuntimeError, dist.DistError) as error:
            problem = f"the first process cannot open a port on {host}: {_first_line(error)}"
    address, problem = comm.bcast((address, problem), root=0)
    if problem:
        raise UserError(problem)
    return place, store or _connect(address[0], address[1], place)


def _own_address() -> str:
    """This machine's address in the network; no packet is sent to find it."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # an address reserved for documentation: RFC 5737
        return probe.getsockname()[0]
    return socket.gethostbyname(socket.gethostname())


# -- the end ----------------------------------------------------------------------------------


def run_main(main: Callable[[], None]) -> None:
    """Run a script's ``main`` and end the process, on all ranks when one of them fails.

    A user's mistake, a file that cannot be opened and too little GPU memory print one line on
    stderr and exit with 2; anything else that goes wrong prints its traceback and exits with 1. A
    :class:`.Stop`, which comes on all processes together, prints a line and has a code of its own.
    """
    code = 0
    try:
        main()
    except Stop as stop:
        if get_rank() == 0:
            sys.stderr.write(f"{stop}\n")
        code = stop.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        _take_down(130)
    except Exception as error:
        _take_down(_report(error))
    _leave()
    if code:
        sys.exit(code)


def _leave() -> None:
    """Leave the process group; gloo's threads may abort a process that ends without."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _report(error: Exception) -> int:
    """Print what went wrong; the exit code."""
    if isinstance(error, UserError) or (isinstance(error, OSError) and error.filename is not None):
        line = str(error)
    elif isinstance(error, torch.OutOfMemoryError):
        line = (
            "out of GPU memory: lower --batch_size; in training, --microbatch N or "
            "--use_checkpoint True need less without changing the result"
        )
    elif get_world_size() > 1 and re.search("Connection (closed|reset)", str(error)):
        line = "another process of this run ended; what it printed says why"
    else:
        traceback.print_exception(error)
        return 1
    sys.stderr.write(f"error: {line}\n")  # in one go: other ranks write to the same terminal
    sys.stderr.flush()
    return 2


def _take_down(code: int) -> None:
    """Exit so that the launcher ends the other processes too."""
    sys.stdout.flush()
    sys.stderr.flush()
    mpi = sys.modules.get("mpi4py.MPI")
    if get_world_size() == 1 and (mpi is None or mpi.COMM_WORLD.Get_size() == 1):
        sys.exit(code)
    for worker in multiprocessing.active_children():
        worker.kill()
    if mpi is not None:
        # An ordinary exit would wait in MPI_Finalize for processes that wait for this one.
        time.sleep(1)  # for the others to say the same, if they failed too
        mpi.COMM_WORLD.Abort(code)
    os._exit(code)  # a half-finished collective must not hold it back
