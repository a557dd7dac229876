"""Train a classifier of noised images, to guide a diffusion model."""

from improved_diffusion import runs, training_runs
from improved_diffusion.classifier_training import (
    ClassifierLoss,
    ClassifierTrainOptions,
    training_flags,
)
from improved_diffusion.dist_util import run_main
from improved_diffusion.flags import ArgumentParser, make_parser
from improved_diffusion.script_util import (
    ClassifierOptions,
    args_to_dict,
    classifier_and_diffusion_defaults,
    create_classifier_and_diffusion,
)


def main() -> None:
    flags, given = runs.parse(create_argparser())
    flags = training_flags(flags, given)
    flags, data = training_runs.prepare_training(flags, given, size_flag="image_size")
    model, diffusion = create_classifier_and_diffusion(
        **args_to_dict(flags, classifier_and_diffusion_defaults())
    )
    training_runs.train(model, ClassifierLoss(diffusion, flags["noised"]), data, flags)


def create_argparser() -> ArgumentParser:
    return make_parser(
        "Train a classifier of noised images, to guide a diffusion model. Of the flags of the "
        "process it needs those of the noise levels, best by --classifier_for.",
        ClassifierTrainOptions,
        *training_runs.TRAINING_OPTIONS,
        ClassifierOptions,
        runs.RunOptions,
        lr=3e-4,
        batch_size=4,
    )


if __name__ == "__main__":
    run_main(main)
