"""One set-up for a single process, torchrun, mpiexec and srun; what all processes do together.

:mod:`.rendezvous` knows how they were started and where they meet.
"""

from __future__ import annotations

import atexit
import collections
import io
import multiprocessing
import os
import pickle
import re
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from . import liveness, rendezvous
from .errors import Stop, UserError
from .safetensors_format import is_safetensors, parse_safetensors
from .solo_group import init_solo_process_group
from .stalls import say

GPUS_PER_NODE = 8  # where a launcher does not tell the local rank
SETUP_RETRY_COUNT = 3  # attempts to reach the first process

MPI_ABORT_SECONDS = 5  # for MPI to end all processes; then this one ends alone
BROADCAST_CHUNK = 2**28  # bytes; one message of a whole checkpoint may exceed 2 GiB


T = TypeVar("T")


_local_rank = 0


def setup_dist() -> None:
    """Join the processes that a launcher started into a process group, and choose the GPU.

    Does nothing where a process group exists. One process forms a group of one without MPI and
    without a network port.

    From then on the processes watch each other: when one is lost the others end too, with a line
    that names it.

    :raises ValueError: when started by mpiexec without a working mpi4py, or if the processes
        cannot meet.
    """
    global _local_rank
    if dist.is_initialized():
        return
    place = rendezvous.find_place(GPUS_PER_NODE, _end)
    _local_rank = place.local_rank
    if torch.cuda.is_available():
        torch.cuda.set_device(dev())
    if place.world_size == 1:
        init_solo_process_group()
        return
    atexit.register(_leave)
    with liveness.during("connecting to the other processes"):
        dist.init_process_group(
            # small agreements of the hosts do not wait for the GPUs
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=rendezvous.meet(place, SETUP_RETRY_COUNT, _end),
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
    with liveness.during(waits=get_rank() != 0):
        result, problem = broadcast_object((result, problem))
    if problem:
        raise UserError(problem)
    return result


def load_state_dict(path: str, **kwargs: Any) -> Any:
    """Load a file of tensors, which the first process reads, on every process.

    :param path: anything that blobfile opens; of safetensors if it is named so.
    :param kwargs: arguments of :func:`torch.load`, such as ``map_location``.
    :raises ValueError: on every process alike, if the file is missing, damaged, or holds anything
        but tensors and plain containers of them.
    """
    data = b""

    def read() -> int:
        nonlocal data
        data = _read_bytes(path)
        return len(data)

    with liveness.during(f"loading {path}"):
        size = on_first_rank(read)
        if get_world_size() > 1:
            data = _broadcast_bytes(data, size)
    return _load_tensors(data, path, kwargs)


_BEGINNINGS = (b"PK", b"\x80")  # of a zip archive, as since torch 1.6; of a pickle


def _load_tensors(data: bytes, path: str, kwargs: dict[str, Any]) -> Any:
    if is_safetensors(path):
        tensors = parse_safetensors(data, path)
        place = kwargs.get("map_location")
        return {key: t.to(place or "cpu") for key, t in tensors.items()}
    if not data.startswith(_BEGINNINGS):  # torch would name a byte of it
        raise UserError(
            f"checkpoint '{path}' is damaged or no checkpoint at all: it does not begin as the "
            "files of torch.save do"
        )
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
            say(str(stop))
        code = stop.exit_code
    except KeyboardInterrupt:
        say("interrupted")
        _leave_word("interrupted")
        _take_down(130)
    except SystemExit as ending:  # of argparse, among others
        if ending.code not in (None, 0):
            _leave_word(f"exit code {ending.code}: what it printed says why")
        raise
    except Exception as error:
        code, word = _report(error)
        _leave_word(word)
        _take_down(code)
    _leave()
    if code:
        sys.exit(code)


def _leave() -> None:
    """Leave the process group; gloo's threads may abort a process that ends without."""
    error = getattr(sys, "last_value", None)  # what ended a script that does not use run_main
    if error is not None:
        liveness.leave(_last_words(error))
    if dist.is_initialized():
        dist.destroy_process_group()
    liveness.leave()


def _report(error: Exception) -> tuple[int, str]:
    """Print what went wrong.

    :return: the exit code; and what to tell the other processes.
    """
    culprit = liveness.blame() if _broke_off(error) else ""
    if not liveness.claim():
        time.sleep(60)  # the thread that watches is ending this process
    if isinstance(error, UserError) or (isinstance(error, OSError) and error.filename is not None):
        line = str(error)
    elif isinstance(error, torch.OutOfMemoryError):
        line = (
            "out of GPU memory: lower --batch_size; in training, --microbatch N or "
            "--use_checkpoint True need less without changing the result"
        )
    elif culprit:
        line = f"{culprit}: this process ends too"
    elif _broke_off(error):
        line = (
            "another process of this run ended, what it printed says why; or the connection to it "
            f"broke: {_last_words(error)}"
        )
    else:
        traceback.print_exception(error)
        sys.stderr.flush()
        return 1, _last_words(error)
    say(f"error: {line}")
    return 2, f"error: {line}"


def _broke_off(error: Exception) -> bool:
    """Whether the connection to another process broke."""
    signs = "Connection (closed|reset)|Broken pipe|remote process exited|Socket closed"
    network = isinstance(error, RuntimeError | dist.DistError)
    return get_world_size() > 1 and network and bool(re.search(signs, str(error)))


def _last_words(error: BaseException) -> str:
    """The last line of a traceback, in short."""
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:500]


def _leave_word(word: str) -> None:
    """Tell the other processes why this one ends, whether or not it has met them."""
    if liveness.watched():
        liveness.leave(word)
    elif not dist.is_initialized():
        rendezvous.send_word(word, GPUS_PER_NODE)


def _end(line: str) -> None:
    """End this process from a thread, as the main one may wait where nothing can interrupt it."""
    say(f"error: {line}")
    liveness.leave(f"error: {line}")
    _take_down(2)


def _take_down(code: int) -> None:
    """Exit so that the launcher ends the other processes too; their watches know already."""
    sys.stdout.flush()
    sys.stderr.flush()
    mpi = _running_mpi()
    alone = get_world_size() == 1 and (mpi is None or mpi.COMM_WORLD.Get_size() == 1)
    if alone and threading.current_thread() is threading.main_thread():
        sys.exit(code)
    for worker in multiprocessing.active_children():
        worker.kill()
    if mpi is not None:
        # An ordinary exit would wait in MPI_Finalize for processes that wait for this one.
        last = threading.Timer(MPI_ABORT_SECONDS, os._exit, [code])
        last.daemon = True
        last.start()
        time.sleep(1)  # for the others to say the same, if they failed too
        mpi.COMM_WORLD.Abort(code)
    os._exit(code)  # a half-finished collective must not hold it back


def _running_mpi() -> Any:
    """MPI, if it was started."""
    mpi = sys.modules.get("mpi4py.MPI")
    started = mpi is not None and hasattr(mpi, "COMM_WORLD") and mpi.Is_initialized()
    return mpi if started else None
