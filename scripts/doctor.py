"""Try in short what a training script does with the same flags, and forecast what it takes."""

import functools
import sys
from collections.abc import Sequence

from super_res_train import add_low_res

from improved_diffusion import doctor, runs, training_runs
from improved_diffusion.dist_util import run_main
from improved_diffusion.flags import ArgumentParser, make_parser, pick
from improved_diffusion.script_util import (
    ModelAndDiffusionOptions,
    SuperResOptions,
    args_to_dict,
    check_sizes,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
    sr_create_model_and_diffusion,
    sr_model_and_diffusion_defaults,
)


def main() -> None:
    super_res = is_super_res(sys.argv[1:])
    flags, given = runs.parse(create_argparser(super_res))
    seconds = pick(doctor.DoctorOptions, flags).doctor_seconds
    if super_res:
        examine_super_res(flags, given, seconds)
        return
    flags, data = training_runs.prepare_training(flags, given, size_flag="image_size")
    model, diffusion = create_model_and_diffusion(
        **args_to_dict(flags, model_and_diffusion_defaults())
    )
    doctor.examine(model, diffusion, data, flags, seconds)


def examine_super_res(flags: runs.Flags, given: set[str], seconds: float) -> None:
    """Do as super_res_train.py does."""
    check_sizes(flags["small_size"], flags["large_size"])
    flags, data = training_runs.prepare_training(flags, given, size_flag="large_size")
    model, diffusion = sr_create_model_and_diffusion(
        **args_to_dict(flags, sr_model_and_diffusion_defaults())
    )
    with_low_res = functools.partial(add_low_res, small_size=flags["small_size"])
    doctor.examine(model, diffusion, data.map(with_low_res), flags, seconds)


def is_super_res(words: Sequence[str]) -> bool:
    """Whether flags are those of super_res_train.py, by the sizes that it alone has."""
    return any(word.split("=")[0] in ("--large_size", "--small_size") for word in words)


def create_argparser(super_res: bool = False) -> ArgumentParser:
    return make_parser(
        "Try in short what image_train.py does with the same flags (or super_res_train.py, if "
        "--large_size or --small_size is given), and forecast its memory, time and disk.",
        *training_runs.TRAINING_OPTIONS,
        SuperResOptions if super_res else ModelAndDiffusionOptions,
        runs.RunOptions,
        doctor.DoctorOptions,
    )


if __name__ == "__main__":
    run_main(main)
