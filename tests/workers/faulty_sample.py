"""scripts/image_sample.py, or $SCRIPT.py, which kills itself where $FAULT says: PLACE WHERE [RANK].

PLACE and WHERE are ``half 000000-000004.npz`` (half of the file is written), ``before`` or
``after`` with a file (its renaming), ``unlink`` with a file (before it is removed), or ``make 5``
(before sample 5 is made). RANK is 0 if not given.
"""

import os
import runpy
import signal
import sys
from pathlib import Path

from improved_diffusion import dist_util, sampling

SCRIPTS = Path(__file__).parents[2] / "scripts"


class Fault:
    def __init__(self, text):
        self.place, self.where, *rank = text.split()
        self.rank = int(rank[0]) if rank else 0

    def happens(self, place, *names):
        """Go on or end here."""
        here = place == self.place and self.where in map(str, names)
        if here and dist_util.get_rank() == self.rank:
            os.kill(os.getpid(), signal.SIGKILL)


def plant(fault):
    fsync, replace, unlink, draw = os.fsync, os.replace, os.unlink, sampling.draw_samples

    def faulty_fsync(descriptor):
        name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")).removesuffix(".tmp")
        if (fault.place, fault.where) == ("half", name):
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
        fault.happens("half", name)
        fsync(descriptor)

    def faulty_replace(source, target):
        fault.happens("before", os.path.basename(target))
        replace(source, target)
        fault.happens("after", os.path.basename(target))

    def faulty_unlink(path):
        fault.happens("unlink", os.path.basename(path))
        unlink(path)

    def faulty_draw(model, diffusion, indices, *args, **kwargs):
        fault.happens("make", *indices)
        return draw(model, diffusion, indices, *args, **kwargs)

    os.fsync, os.replace, os.unlink = faulty_fsync, faulty_replace, faulty_unlink
    sampling.draw_samples = faulty_draw


if __name__ == "__main__":
    if os.environ.get("FAULT"):
        plant(Fault(os.environ["FAULT"]))
    script = str(SCRIPTS / f"{os.environ.get('SCRIPT', 'image_sample')}.py")
    sys.argv[0] = script
    sys.path[0] = os.path.dirname(script)
    runpy.run_path(script, run_name="__main__")
