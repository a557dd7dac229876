"""Trains the toy problem on its share of the data; each rank writes what it ended with."""

import sys

import torch
import torch.distributed as dist
from toy import TimestepByImage, batches, calm, make_diffusion, make_model

from improved_diffusion import dist_util, logger
from improved_diffusion.train_util import TrainLoop


def main():
    out, microbatch, use_checkpoint = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "checkpoint"
    dist_util.setup_dist()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    logger.configure(dir=f"{out}/run", format_strs=[])
    loop = TrainLoop(
        model=make_model(seed=rank, use_checkpoint=use_checkpoint),  # differs: must be synchronised
        diffusion=make_diffusion(),
        data=batches(rank, world_size),
        schedule_sampler=TimestepByImage(),
        batch_size=4 // world_size,
        microbatch=microbatch,
        lr=1e-3,
        ema_rate="0.9",
        log_interval=10,
        save_interval=100,
        resume_checkpoint="",
        lr_anneal_steps=4,
    )
    calm(loop).run_loop()
    torch.save(
        {
            "world_size": world_size,
            "backend": dist.get_backend(),
            "params": [p.detach() for p in loop.model_params],
            "ema": [p.detach() for p in loop.ema_params[0]],
        },
        f"{out}/rank{rank}.pt",
    )


if __name__ == "__main__":
    dist_util.run_main(main)
