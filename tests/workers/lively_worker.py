"""Processes that watch each other, each doing what the first argument names: see test_liveness.

The clock of the watch is faster than in earnest, unless $IN_EARNEST is set. When a process is in
place it writes the file ready.RANK in the folder that the second argument names.
"""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from improved_diffusion import dist_util, heartbeat, liveness, rendezvous, stalls
from improved_diffusion.errors import UserError

FOLDER = Path(sys.argv[2])
LONG = 300  # seconds; a process that is not ended fails its test


def in_place(rank):
    (FOLDER / f"ready.{rank}").write_text(str(os.getpid()))


def in_a_collective(rank):
    liveness.doing("saving step 500" if rank else "taking step 501")
    dist.barrier()
    time.sleep(3 * heartbeat.BEAT_SECONDS)  # the others have heard what this one does
    in_place(rank)
    dist.all_reduce(torch.zeros(1)) if rank != 1 else time.sleep(LONG)


def apart(rank):
    """No one waits for anyone."""
    liveness.doing(f"working on share {rank}")
    dist.barrier()
    time.sleep(3 * heartbeat.BEAT_SECONDS)
    in_place(rank)
    time.sleep(LONG)


def with_forked_children(rank):
    """As data workers are, but these do not notice the end of their parents."""
    if os.fork() == 0:
        (FOLDER / f"child.{rank}").write_text(str(os.getpid()))
        os.closerange(0, 3)
        time.sleep(LONG)
        os._exit(0)
    dist.barrier()
    in_place(rank)
    time.sleep(LONG)


def writing(rank):
    """The first process is in the midst of a file that should be finished."""
    dist.barrier()
    if rank:
        in_place(rank)
        time.sleep(LONG)
    with liveness.finishing():
        in_place(rank)
        time.sleep(5 * heartbeat.GRACE_SECONDS)
        (FOLDER / "file").write_text("whole")
    time.sleep(LONG)


def holding_the_lock(rank):
    """Longer than a beat, shorter than what counts as lost."""
    dist.barrier()
    if rank == int(sys.argv[3]):
        ctypes.PyDLL(None).usleep(int(0.75e6 * heartbeat.LOST_LOOKS * heartbeat.BEAT_SECONDS))
    dist.barrier()


def ending_one_by_one(rank):
    dist.barrier()
    time.sleep(rank if sys.argv[3] == "up" else 3 * (dist.get_world_size() - 1 - rank))


def failing(rank):
    dist.barrier()
    if rank == int(sys.argv[3]):
        raise UserError("--flag 3: one rank dislikes it")
    time.sleep(LONG)


def exiting(rank):
    dist.barrier()
    if rank == 1:
        sys.exit(7)
    time.sleep(LONG)


def stalling(rank):
    """The first process lists images; the others wait for it, or for what it has not begun."""
    dist.barrier()
    liveness.doing("listing the images of /data", starting=True)
    dist_util.on_first_rank(lambda: time.sleep(2.5 * stalls.STALL_SECONDS))
    dist.barrier()
    liveness.doing("taking step 1")
    time.sleep(2 * stalls.STALL_SECONDS)


def too_early(rank):
    """Ends before it meets the others: see main()."""


KINDS = {
    kind.__name__: kind
    for kind in (
        *(in_a_collective, apart, with_forked_children, writing, holding_the_lock),
        *(ending_one_by_one, failing, exiting, stalling, too_early),
    )
}


def main():
    if not os.environ.get("IN_EARNEST"):
        heartbeat.BEAT_SECONDS, heartbeat.GRACE_SECONDS = 0.25, 0.5
        stalls.STALL_SECONDS, stalls.GIVE_UP_SECONDS = 1.0, float(os.environ.get("GIVE_UP", 60))
        rendezvous.WORD_SECONDS = 20  # the others may need as long to import torch
    if sys.argv[1] == "too_early" and os.environ["RANK"] == sys.argv[3]:
        raise UserError("--flag 3: dislikes it at once")
    dist_util.setup_dist()
    KINDS[sys.argv[1]](dist.get_rank())


if __name__ == "__main__":
    if len(sys.argv) > 3 and sys.argv[3] == "bare":
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's "&" ignores it
        main()
    else:
        dist_util.run_main(main)
