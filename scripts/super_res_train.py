"""Train a super-resolution model on a folder of images."""

from collections.abc import Iterator

import torch.nn.functional as F

from improved_diffusion import dist_util, runs
from improved_diffusion.dist_util import run_main
from improved_diffusion.flags import ArgumentParser, ImageSize, height_width, make_parser
from improved_diffusion.image_datasets import DataOptions
from improved_diffusion.script_util import (
    SuperResOptions,
    args_to_dict,
    check_sizes,
    sr_create_model_and_diffusion,
    sr_model_and_diffusion_defaults,
)
from improved_diffusion.train_util import Batch, Cond, TrainOptions


def main() -> None:
    flags, given = runs.parse(create_argparser())
    check_sizes(flags["small_size"], flags["large_size"])
    flags, data = runs.prepare_training(flags, given, size_flag="large_size")
    model, diffusion = sr_create_model_and_diffusion(
        **args_to_dict(flags, sr_model_and_diffusion_defaults())
    )
    runs.train(model, diffusion, with_low_res(data, flags["small_size"]), flags)


def with_low_res(
    data: Iterator[tuple[Batch, Cond]], small_size: ImageSize
) -> Iterator[tuple[Batch, Cond]]:
    """Add each image shrunk by averaging as "low_res", [N, C, h, w]."""
    for large, cond in data:
        large = large.to(dist_util.dev(), non_blocking=True)
        cond["low_res"] = F.interpolate(large, height_width(small_size), mode="area")
        yield large, cond


def create_argparser() -> ArgumentParser:
    return make_parser(
        "Train a super-resolution model on a folder of images.",
        DataOptions,
        TrainOptions,
        SuperResOptions,
        runs.RunOptions,
    )


if __name__ == "__main__":
    run_main(main)
