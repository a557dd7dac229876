"""Sample images from a checkpoint, led to their classes by a classifier of noised images."""

from improved_diffusion import runs
from improved_diffusion.classifier_options import ClassifierOptions
from improved_diffusion.compiling import CompileOptions
from improved_diffusion.dist_util import run_main
from improved_diffusion.flags import ArgumentParser, make_parser, pick
from improved_diffusion.guidance import GuidanceOptions
from improved_diffusion.guides import ClassifierGuidanceOptions, load_classifier
from improved_diffusion.sampling import SampleOptions
from improved_diffusion.sampling_runs import SamplingJob
from improved_diffusion.script_util import (
    ModelAndDiffusionOptions,
    args_to_dict,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)


def main() -> None:
    asked, given = runs.parse(create_argparser())
    options, _ = pick(SampleOptions, asked), pick(GuidanceOptions, asked)
    pick(ClassifierGuidanceOptions, asked)
    # an unconditional model knows of no classes: --num_classes is the classifier's
    flags = runs.prepare_from_checkpoint(asked, given - {"num_classes"})
    model, diffusion = create_model_and_diffusion(
        **args_to_dict(flags, model_and_diffusion_defaults())
    )
    classifier = load_classifier(asked, given, flags, diffusion)
    job = SamplingJob(model, diffusion, classifier.add_to(flags), flags["image_size"], classifier)
    job.start()
    job.run(options.num_samples, columns=job.classes)


def create_argparser() -> ArgumentParser:
    return make_parser(
        "Sample images from a checkpoint, led by a classifier.",
        ClassifierGuidanceOptions,
        SampleOptions,
        GuidanceOptions,
        CompileOptions,
        ModelAndDiffusionOptions,
        ClassifierOptions,
        runs.RunOptions,
    )


if __name__ == "__main__":
    run_main(main)
