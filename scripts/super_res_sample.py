"""Upsample images by a super-resolution checkpoint, into an npz file and a grid."""

from dataclasses import dataclass

import torch
from torch import Tensor

from improved_diffusion import logger, runs
from improved_diffusion.base_samples import BaseSamples, load_base_samples
from improved_diffusion.compiling import CompileOptions
from improved_diffusion.dist_util import run_main
from improved_diffusion.errors import UserError
from improved_diffusion.flags import ArgumentParser, make_parser, option, pick
from improved_diffusion.guidance import GuidanceOptions
from improved_diffusion.sampling import SampleOptions
from improved_diffusion.sampling_runs import SamplingJob
from improved_diffusion.script_util import (
    SuperResOptions,
    args_to_dict,
    sr_create_model_and_diffusion,
    sr_model_and_diffusion_defaults,
)


@dataclass(frozen=True)
class BaseOptions:
    """What to upsample."""

    base_samples: str = option(
        "", "images to upsample, in turn: an npz of image_sample.py, a folder, or one picture"
    )
    num_samples: int = option(
        10000,
        "how many images to make, going through the given ones again and again; if not given, one "
        "for each of a folder or picture",
    )

    def __post_init__(self) -> None:
        if not self.base_samples:
            raise UserError("--base_samples is missing: name an npz file, a folder or a picture")


def main() -> None:
    flags, given = runs.parse(create_argparser())
    options, base_path = pick(SampleOptions, flags), pick(BaseOptions, flags).base_samples
    pick(GuidanceOptions, flags)
    flags = runs.prepare_from_checkpoint(flags, given)
    model, diffusion = sr_create_model_and_diffusion(
        **args_to_dict(flags, sr_model_and_diffusion_defaults())
    )
    job = SamplingJob(model, diffusion, flags, flags["large_size"])
    base = load_base(job, base_path)
    one_each = "num_samples" not in given and not base_path.endswith(".npz")
    num_samples = len(base.images) if one_each else options.num_samples
    job.start(base_samples=[base.images, *([] if base.labels is None else [base.labels])])
    logger.log(f"upsampling {len(base.images)} images to {num_samples} samples")
    job.run(num_samples, lambda indices: conditions(job, base, indices))


def load_base(job: SamplingJob, path: str) -> BaseSamples:
    """The images to upsample, with labels if the model needs them and none are chosen."""
    return load_base_samples(
        path,
        job.flags["small_size"],
        job.flags["channels"],
        want_labels=job.num_classes is not None and not job.classes,
        class_names=job.class_names,
        num_classes=job.num_classes or 0,
        value_range=job.value_range,
    )


def conditions(job: SamplingJob, base: BaseSamples, indices: list[int]) -> dict[str, Tensor]:
    """The small images of the samples, in turn, and their classes."""
    rows = torch.tensor(indices) % len(base.images)
    labels = job.labels(indices) if base.labels is None else {"y": base.labels[rows]}
    return {"low_res": base.images[rows], **labels}


def create_argparser() -> ArgumentParser:
    return make_parser(
        "Upsample images by a super-resolution checkpoint.",
        BaseOptions,
        SampleOptions,
        GuidanceOptions,
        CompileOptions,
        SuperResOptions,
        runs.RunOptions,
    )


if __name__ == "__main__":
    run_main(main)
