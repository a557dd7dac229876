"""scripts/image_nll.py, which saves after each round and kills itself at save number $KILL_AT.

$KILL_WHERE is "before" the save, or "amid": then half of the file beside has been written. Rank
$KILL_RANK, 0 if not given, dies.
"""

import os
import runpy
import signal
import sys
from pathlib import Path

from improved_diffusion import dist_util, nll_results

SCRIPT = Path(__file__).parents[2] / "scripts" / "image_nll.py"


def plant(number, where, rank):
    saves, save, fsync = 0, nll_results.Results.save, os.fsync

    def die():
        if dist_util.get_rank() == rank:
            os.kill(os.getpid(), signal.SIGKILL)

    def faulty_fsync(descriptor):
        if saves == number and where == "amid":
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            die()
        fsync(descriptor)

    def faulty_save(self, path, deciding):
        nonlocal saves
        saves += 1
        if saves == number and where == "before":
            die()
        save(self, path, deciding)

    nll_results.SAVE_SECONDS = 0
    nll_results.Results.save, os.fsync = faulty_save, faulty_fsync


if __name__ == "__main__":
    plant(
        int(os.environ["KILL_AT"]), os.environ["KILL_WHERE"], int(os.environ.get("KILL_RANK", "0"))
    )
    sys.argv[0] = str(SCRIPT)
    sys.path[0] = str(SCRIPT.parent)
    runpy.run_path(str(SCRIPT), run_name="__main__")
