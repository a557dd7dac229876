"""Sample images from a checkpoint, into an npz file and a grid."""

from improved_diffusion import runs
from improved_diffusion.compiling import CompileOptions
from improved_diffusion.dist_util import run_main
from improved_diffusion.flags import ArgumentParser, make_parser, pick
from improved_diffusion.guidance import GuidanceOptions
from improved_diffusion.sampling import SampleOptions
from improved_diffusion.sampling_runs import SamplingJob
from improved_diffusion.script_util import (
    ModelAndDiffusionOptions,
    args_to_dict,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)


def main() -> None:
    flags, given = runs.parse(create_argparser())
    options, _ = pick(SampleOptions, flags), pick(GuidanceOptions, flags)
    flags = runs.prepare_from_checkpoint(flags, given)
    model, diffusion = create_model_and_diffusion(
        **args_to_dict(flags, model_and_diffusion_defaults())
    )
    job = SamplingJob(model, diffusion, flags, flags["image_size"])
    job.start()
    job.run(options.num_samples, columns=job.classes)


def create_argparser() -> ArgumentParser:
    return make_parser(
        "Sample images from a checkpoint.",
        SampleOptions,
        GuidanceOptions,
        CompileOptions,
        ModelAndDiffusionOptions,
        runs.RunOptions,
    )


if __name__ == "__main__":
    run_main(main)
