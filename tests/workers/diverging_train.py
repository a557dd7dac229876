"""Trains on digits with a fault in the arithmetic; each rank writes what it ended with.

DIVERGING says in JSON: ``steps`` [first, stop) in which the fault is there, ``rank`` that has it
(null: all), ``kind`` "layer", "loss" or "weights", and arguments of the loop under ``loop``.
"""

import json
import os
import sys

import torch
from toy import STEPS, make_model

from improved_diffusion import dist_util, logger
from improved_diffusion.gaussian_diffusion import LossType, ModelMeanType, ModelVarType
from improved_diffusion.image_datasets import load_data
from improved_diffusion.respace import SpacedDiffusion
from improved_diffusion.schedules import get_named_beta_schedule
from improved_diffusion.train_util import TrainLoop

LAYER = "middle_block.0"


def plant(loop, first, stop, rank, kind, once=False):
    """Make the arithmetic of some steps fail.

    :param once: only until the run has gone back, as if the lowered rate had helped.
    """

    def faulty():
        here = rank is None or rank == dist_util.get_rank()
        return here and first <= loop.global_step < stop and not (once and loop.lr_scale < 1)

    def spoil_layer(module, args, output):
        return output * float("nan") if faulty() else None

    def spoil_losses(*args, **kwargs):
        terms = training_losses(*args, **kwargs)
        return {**terms, "loss": terms["loss"] * float("inf")} if faulty() else terms

    def spoil_weights(batch, cond):
        run_step(batch, cond)
        if faulty():
            with torch.no_grad():
                loop.model_params[3].fill_(float("nan"))

    if kind == "layer":
        loop.model.get_submodule(LAYER).register_forward_hook(spoil_layer)
    elif kind == "loss":
        training_losses = loop.diffusion.training_losses
        loop.diffusion.training_losses = spoil_losses
    else:
        run_step = loop.run_step
        loop.run_step = spoil_weights
    return loop


def make_loop(data_dir, **changes):
    diffusion = SpacedDiffusion(
        use_timesteps=range(STEPS),
        betas=get_named_beta_schedule("cosine", STEPS),
        model_mean_type=ModelMeanType.EPSILON,
        model_var_type=ModelVarType.LEARNED_RANGE,
        loss_type=LossType.RESCALED_MSE,
        rescale_timesteps=True,
    )
    arguments = {
        "batch_size": 2,
        "microbatch": 1,
        "lr": 1e-3,
        "ema_rate": "0.9",
        "log_interval": 1,
        "save_interval": 5,
        "resume_checkpoint": "",
        "lr_anneal_steps": 0,
        "seed": 0,
        **changes,
    }
    stream = load_data(
        data_dir=data_dir,
        batch_size=arguments["batch_size"],
        image_size=8,
        channels=1,
        num_workers=0,
        seed=0,
    )
    return TrainLoop(model=make_model(), diffusion=diffusion, data=stream, **arguments)


def main():
    from improved_diffusion.stopping import Bounds

    out, data_dir, fault = sys.argv[1], sys.argv[2], json.loads(os.environ["DIVERGING"])
    dist_util.setup_dist()
    logger.configure(dir=f"{out}/run")
    loop = make_loop(data_dir, bounds=Bounds(train_steps=fault.pop("train_steps")))
    first, stop = fault.pop("steps")
    plant(loop, first, stop, **fault)
    try:
        loop.run_loop()
    finally:
        params = [param.detach() for param in loop.model_params]
        torch.save(params, f"{out}/rank{dist_util.get_rank()}.pt")


if __name__ == "__main__":
    dist_util.run_main(main)
