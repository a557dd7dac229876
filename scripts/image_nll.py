"""Evaluate the variational bound of a checkpoint on a folder of images, in bits/dim."""

import os
from dataclasses import dataclass

import numpy as np
from tqdm.auto import tqdm

from improved_diffusion import dist_util, logger, runs
from improved_diffusion.dist_util import run_main
from improved_diffusion.errors import UserError
from improved_diffusion.files import open_whole
from improved_diffusion.flags import ArgumentParser, make_parser, option, pick, require_at_least
from improved_diffusion.image_datasets import DataOptions, list_images, load_once
from improved_diffusion.likelihood import bits_of_a_range, estimate_bound
from improved_diffusion.pixels import check_files, parse_value_range
from improved_diffusion.script_util import (
    ModelAndDiffusionOptions,
    args_to_dict,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)


@dataclass(frozen=True)
class NLLOptions:
    """How many images to evaluate, and how."""

    clip_denoised: bool = option(True, "clamp each estimate of the image to the range of images")
    num_samples: int = option(1000, "how many images to evaluate, in the order of their names")
    batch_size: int = option(1, "images at a time and process; does not change the result")
    model_path: str = option("", "checkpoint; its flags are read from the folder it lies in")

    def __post_init__(self) -> None:
        require_at_least(1, self, ["num_samples", "batch_size"])
        if not self.model_path:
            raise UserError("--model_path is missing: name a checkpoint")


def main() -> None:
    flags, given = runs.parse(create_argparser())
    options, source = pick(NLLOptions, flags), pick(DataOptions, flags)
    flags = runs.prepare_from_checkpoint(flags, given)
    value_range = parse_value_range(flags["value_range"])
    images = list_images(
        source.data_dir, flags["class_cond"], flags["labels_from"], value_range=value_range
    )
    if value_range is not None and images.packed is None:
        check_files(images.paths, flags["channels"], value_range)
    images = runs.relabel(images, flags["class_names"])
    runs.check_class_names(flags, images)
    model, diffusion = create_model_and_diffusion(
        **args_to_dict(flags, model_and_diffusion_defaults())
    )
    runs.load_for_evaluation(model, options.model_path)
    rounds = load_once(
        images,
        options.num_samples,
        options.batch_size,
        flags["image_size"],
        channels=flags["channels"],
        num_workers=source.num_workers,
        value_range=value_range,
        device=dist_util.dev(),
    )
    runs.open_folder(flags["log_dir"], flags)

    wanted = min(options.num_samples, len(images.paths))
    estimates = estimate_bound(
        model,
        diffusion,
        rounds,
        clip_denoised=options.clip_denoised,
        seed=flags["seed"],
    )
    if value_range is not None:
        logger.log(f"the bound is in {bits_of_a_range(flags['value_range'])}")
    with tqdm(total=wanted, unit="image", disable=dist_util.get_rank() != 0) as bar:
        for estimate in estimates:
            bar.set_postfix_str(f"{estimate.bpd:.4f} +- {estimate.standard_error:.4f} bits/dim")
            bar.update(estimate.count - bar.n)
    if dist_util.get_rank() == 0:
        for name, terms in estimate.terms.items():
            with open_whole(os.path.join(flags["log_dir"], f"{name}_terms.npz")) as file:
                np.savez(file, terms.numpy())
        logger.log(
            f"done {estimate.count} of {len(images.paths)} images: "
            f"bpd={estimate.bpd:.6g} +- {estimate.standard_error:.2g}"
        )
        if options.num_samples > len(images.paths):
            logger.log(f"the data ended before --num_samples {options.num_samples}")


def create_argparser() -> ArgumentParser:
    return make_parser(
        "Evaluate the variational bound in bits/dim.",
        DataOptions,
        NLLOptions,
        ModelAndDiffusionOptions,
        runs.RunOptions,
    )


if __name__ == "__main__":
    run_main(main)
