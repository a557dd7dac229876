"""Train a super-resolution model on a folder of images."""

import functools

import torch.nn.functional as F

from improved_diffusion import dist_util, runs, training_runs
from improved_diffusion.dist_util import run_main
from improved_diffusion.flags import ArgumentParser, ImageSize, height_width, make_parser
from improved_diffusion.image_datasets import Batch
from improved_diffusion.script_util import (
    SuperResOptions,
    args_to_dict,
    check_sizes,
    sr_create_model_and_diffusion,
    sr_model_and_diffusion_defaults,
)


def main() -> None:
    flags, given = runs.parse(create_argparser())
    check_sizes(flags["small_size"], flags["large_size"])
    flags, data = training_runs.prepare_training(flags, given, size_flag="large_size")
    model, diffusion = sr_create_model_and_diffusion(
        **args_to_dict(flags, sr_model_and_diffusion_defaults())
    )
    with_low_res = functools.partial(add_low_res, small_size=flags["small_size"])
    training_runs.train(model, diffusion, data.map(with_low_res), flags)


def add_low_res(batch: Batch, small_size: ImageSize) -> Batch:
    """Add each image shrunk by averaging as "low_res", [N, C, h, w]."""
    large, cond = batch
    large = large.to(dist_util.dev(), non_blocking=True)
    low_res = F.interpolate(large, height_width(small_size), mode="area")
    return large, {**cond, "low_res": low_res}


def create_argparser() -> ArgumentParser:
    return make_parser(
        "Train a super-resolution model on a folder of images.",
        *training_runs.TRAINING_OPTIONS,
        SuperResOptions,
        runs.RunOptions,
    )


if __name__ == "__main__":
    run_main(main)
