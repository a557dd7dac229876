"""Trains the toy problem as its JSON arguments say; the first process writes the weights."""

import json
import sys

import torch
import torch.distributed as dist
from toy import batches, make_diffusion, make_model

from improved_diffusion import dist_util, logger
from improved_diffusion.optimization import OptimizationOptions
from improved_diffusion.parallel import ParallelOptions, local, whole
from improved_diffusion.respace import SpacedDiffusion
from improved_diffusion.saving import SavingOptions
from improved_diffusion.train_util import TrainLoop

GLOBAL_BATCH = 8


def main():
    out, given = sys.argv[1], json.loads(sys.argv[2])
    dist_util.setup_dist()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    logger.configure(dir=given.get("log_dir", out), format_strs=["csv", "log"])
    loop = make_loop(rank, world_size, given)
    saved = count_elements(loop)
    for group in loop.opt.param_groups:
        group["eps"] = given.get("eps", 1e-8)
    loop.run_loop()
    result = {
        "model": [whole(p.detach()) for p in loop.model_params],
        "ema": [whole(p.detach()) for p in loop.ema_params[0]],
        "moments": [whole(state["exp_avg"]) for state in loop.opt.state.values()],
        "elements": saved,
        "scale": loop.lg_loss_scale,
    }
    torch.save(result, f"{out}/{given['name']}_rank{rank}.pt")


def make_loop(rank, world_size, given):
    share = GLOBAL_BATCH // world_size
    return TrainLoop(
        model=make_model(seed=rank, use_checkpoint=given.get("use_checkpoint", False)),
        diffusion=make_diffusion(SpacedDiffusion),
        data=Blocks(rank * share, share),
        batch_size=share,
        microbatch=given.get("microbatch", -1),
        lr=1e-3,
        ema_rate="0.9",
        log_interval=5,
        save_interval=given.get("save_interval", 1000),
        resume_checkpoint=given.get("resume_checkpoint", ""),
        lr_anneal_steps=given.get("steps", 20),
        seed=given.get("seed", 7),
        use_fp16=given.get("use_fp16", False),
        optimization=OptimizationOptions(
            precision=given.get("precision", ""), grad_clip=given.get("grad_clip", 0.0)
        ),
        posthoc_ema=given.get("posthoc_ema", ""),
        saving=SavingOptions(keep_checkpoints=given.get("keep_checkpoints", 0)),
        parallel=ParallelOptions(
            parallel=given.get("parallel", "ddp"),
            shard_processes=given.get("shard_processes", 0),
        ),
    )


class Blocks:
    """This process's part of common batches; goes on from any position."""

    def __init__(self, first, share):
        self.first, self.share = first, share
        self.seek(0)

    def seek(self, images):
        self.batches = batches(size=GLOBAL_BATCH, first=images // GLOBAL_BATCH)

    def files(self, first, count):
        return [f"image {position}" for position in range(first, first + count)]

    def __iter__(self):
        return self

    def __next__(self):
        images, cond = next(self.batches)
        return images[self.first : self.first + self.share], cond


def count_elements(loop):
    """How many numbers this process holds of weights, and of averages."""
    return {
        "model": sum(t.numel() for t in local(loop.model_params)),
        "ema": sum(t.numel() for t in local(loop.ema_params[0])),
    }


if __name__ == "__main__":
    dist_util.run_main(main)
