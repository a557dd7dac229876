"""One rank fails while the others wait for it in a collective."""

import sys

import torch
import torch.distributed as dist

from improved_diffusion import dist_util
from improved_diffusion.errors import UserError


def main():
    kind = sys.argv[1]
    dist_util.setup_dist()
    if kind == "all":
        raise UserError("--flag 3: every rank dislikes it")
    if dist.get_rank() == 1:
        if kind == "user":
            raise UserError("--flag 3: one rank dislikes it")
        raise RuntimeError("a defect of ours")
    dist.all_reduce(torch.zeros(1))


if __name__ == "__main__":
    dist_util.run_main(main)
