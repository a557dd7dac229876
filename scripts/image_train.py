"""Train a diffusion model on a folder of images."""

from improved_diffusion import runs, training_runs
from improved_diffusion.dist_util import run_main
from improved_diffusion.flags import ArgumentParser, make_parser
from improved_diffusion.script_util import (
    ModelAndDiffusionOptions,
    args_to_dict,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)


def main() -> None:
    flags, given = runs.parse(create_argparser())
    flags, data = training_runs.prepare_training(flags, given, size_flag="image_size")
    model, diffusion = create_model_and_diffusion(
        **args_to_dict(flags, model_and_diffusion_defaults())
    )
    training_runs.train(model, diffusion, data, flags)


def create_argparser() -> ArgumentParser:
    return make_parser(
        "Train a diffusion model on a folder of images.",
        *training_runs.TRAINING_OPTIONS,
        ModelAndDiffusionOptions,
        runs.RunOptions,
    )


if __name__ == "__main__":
    run_main(main)
