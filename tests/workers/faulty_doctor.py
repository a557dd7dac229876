"""scripts/doctor.py on a machine that $FAULT names: one with a bad "network" or a bad "disk"."""

import os
import runpy
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from improved_diffusion import examination

SCRIPT = str(Path(__file__).parents[2] / "scripts" / "doctor.py")


def spoil_network():
    """The last number of every large sum is wrong on the second process."""
    all_reduce = dist.all_reduce

    def faulty_all_reduce(tensor, *args, **kwargs):
        result = all_reduce(tensor, *args, **kwargs)
        if tensor.numel() > 1000 and dist.get_rank() == 1:
            tensor[-1] += 1
        return result

    dist.all_reduce = faulty_all_reduce


def spoil_disk():
    """One bit of the moments of the first parameter comes back flipped."""
    restore = examination.restore

    def faulty_restore(loop, path):
        restore(loop, path)
        moments = loop.opt.state[loop.master_params[0]]["exp_avg"]
        moments.view(torch.int32).view(-1)[0] ^= 1

    examination.restore = faulty_restore


if __name__ == "__main__":
    {"network": spoil_network, "disk": spoil_disk}[os.environ["FAULT"]]()
    sys.argv[0] = SCRIPT
    sys.path[0] = os.path.dirname(SCRIPT)
    runpy.run_path(SCRIPT, run_name="__main__")
