"""What the scripts share: from the command line to a run folder, and back from a checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from . import checkpoint, dist_util, logger
from .errors import UserError
from .flags import given_flags, option, pick, require_at_least
from .gaussian_diffusion import GaussianDiffusion
from .image_datasets import DataOptions, ImageList, list_images, load_data
from .resample import create_named_schedule_sampler
from .rng import derive_seed
from .script_util import (
    FIXED_BY_TRAINING,
    NUM_CLASSES,
    ModelAndDiffusionOptions,
    SuperResOptions,
)
from .train_util import Batch, Cond, TrainLoop, TrainOptions, get_blob_logdir

log = logging.getLogger(__name__)

Flags = dict[str, Any]

MANY_DIFFUSION_STEPS = 4000  # the most that IDDPM uses


@dataclass(frozen=True)
class RunOptions:
    """Where a run keeps its files, and what its random draws start from."""

    log_dir: str = option("", "run folder; '': $OPENAI_LOGDIR, or runs/SCRIPT-DATE")
    seed: int = option(0, "seed of all random draws; the same seed gives the same result")

    def __post_init__(self) -> None:
        require_at_least(0, self, ["seed"])
        if "://" in self.log_dir:
            raise UserError(
                f"--log_dir {self.log_dir}: logs go to a local folder; set $DIFFUSION_BLOB_LOGDIR "
                "for checkpoints on blob storage"
            )


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> tuple[Flags, set[str]]:
    """Read the command line.

    :return: all flags; and the names of those that the user gave.
    """
    logger.hold_messages()  # an error comes alone; otherwise they go to the run's log
    return vars(parser.parse_args(argv)), given_flags(parser, argv)


def set_up(flags: Flags) -> str:
    """Join the other processes and agree on the run folder.

    :return: the absolute path of the folder, alike on every process; it may not exist yet.
    """
    run = pick(RunOptions, flags)
    if os.path.isfile(run.log_dir):
        raise UserError(f"--log_dir {run.log_dir} is a file: name a folder, which may be new")
    dist_util.setup_dist()
    folder = os.path.abspath(os.path.expanduser(run.log_dir or logger.default_dir()))
    return dist_util.broadcast_object(folder)


def open_folder(folder: str, flags: Flags, config: str = "") -> None:
    """Make the run folder, log to it, and store the flags there.

    :param config: name of the file for the flags; by default that of the script, so that samples
        written into a training run leave its own flags alone.
    """
    logger.configure(dir=folder)
    if dist_util.get_rank() == 0:
        script = os.path.splitext(os.path.basename(sys.argv[0]))[0]
        folder = get_blob_logdir()
        if "://" not in folder:
            os.makedirs(folder, exist_ok=True)  # $DIFFUSION_BLOB_LOGDIR may be new
        stored = {**flags, "resume_checkpoint": ""} if config else flags
        checkpoint.save_config(folder, stored, config or f"{script}.json")
    world, gpus = dist_util.get_world_size(), torch.cuda.device_count()
    device = torch.cuda.get_device_name() if gpus else "CPU"
    logger.log(f"{world} process{'es' if world > 1 else ''} on {device}, seed {flags['seed']}")
    if world == 1 and gpus > 1:
        logger.warn(
            f"{gpus} GPUs are visible but one is used: start with torchrun --nproc_per_node {gpus}"
        )


def seed_everything(seed: int, *purpose: str | int) -> None:
    """Seed torch's and NumPy's global generators for a purpose."""
    torch.manual_seed(derive_seed(seed, *purpose, "torch"))
    np.random.seed(derive_seed(seed, *purpose, "numpy"))


def inherit(flags: Flags, given: set[str], folder: str) -> Flags:
    """Take the model's flags from the run folder that holds a checkpoint.

    :raises ValueError: naming both values, if a given flag contradicts what training settled.
    """
    stored = checkpoint.load_config(folder)
    if not stored:
        log.warning(
            f"no {checkpoint.CONFIG} beside the checkpoint: its flags are those given and the "
            f"defaults, such as --noise_schedule {flags['noise_schedule']} --diffusion_steps "
            f"{flags['diffusion_steps']}"
        )
    if not flags.get("num_classes"):
        given = given - {"num_classes"}  # 0: to be counted
    known = {field.name for cls in _OPTIONS for field in dataclasses.fields(cls)} | {"labels_from"}
    merged = checkpoint.merge_flags(
        flags, given, stored, FIXED_BY_TRAINING, known & flags.keys(), folder
    )
    merged["class_names"] = stored.get("class_names", [])
    return merged


_OPTIONS = (ModelAndDiffusionOptions, SuperResOptions)


# -- training ---------------------------------------------------------------------------------


def prepare_training(
    flags: Flags, given: set[str], size_flag: str
) -> tuple[Flags, Iterator[tuple[Batch, Cond]]]:
    """Check everything that can be checked before the run folder is made.

    :param size_flag: the flag that holds the size of the images to load.
    :return: the flags with the folder, inherited values and the number of classes filled in; and
        the endless batches of the data.
    """
    train, source = pick(TrainOptions, flags), pick(DataOptions, flags)
    flags = {**flags, "log_dir": set_up(flags)}
    folder = os.environ.get("DIFFUSION_BLOB_LOGDIR") or flags["log_dir"]
    own = checkpoint.find_newest_model(folder)
    continued = train.resume_checkpoint or own
    step = 0
    if continued:
        flags = inherit(flags, given, os.path.dirname(continued))
        flags["resume_checkpoint"] = continued
        if checkpoint.is_model_name(continued):
            step = checkpoint.parse_resume_step_from_filename(continued) + 1
    if own:  # the flags stored there must go on fitting what lies there
        inherit(flags, set(flags), folder)
    source = pick(DataOptions, flags)
    images = list_images(source.data_dir, flags["class_cond"], source.labels_from)
    flags = _with_classes(flags, images)
    data = load_data(
        data_dir=source.data_dir,
        batch_size=train.batch_size,
        image_size=flags[size_flag],
        class_cond=flags["class_cond"],
        images=images,
        channels=flags["channels"],
        num_workers=source.num_workers,
        seed=flags["seed"],
        start=step,
    )
    seed_everything(flags["seed"], "train", dist_util.get_rank(), step)
    return {**flags, "num_images": len(images.paths)}, data


def _with_classes(flags: Flags, images: ImageList) -> Flags:
    """Fill in the number of classes and their names, from the data.

    :raises ValueError: if the data has more classes than the model, or not those of the run that
        is continued.
    """
    if not flags["class_cond"]:
        return flags
    found, wanted = list(images.class_names), flags["num_classes"] or len(images.class_names)
    if len(found) == len(images.paths) > 1:
        raise UserError(
            f"--class_cond True: each of the {len(found)} images would be a class of its own; name "
            "files CLASS_anything, or put each class into a folder and give --labels_from folder"
        )
    if len(found) > wanted:
        raise UserError(
            f"the data has {len(found)} classes ({', '.join(found[:5])}, ...), more than "
            f"--num_classes {wanted}"
        )
    check_class_names(flags, images)
    return {**flags, "num_classes": wanted, "class_names": found}


def relabel(images: ImageList, class_names: Sequence[str]) -> ImageList:
    """Labels by the class names of a checkpoint, of which the data may lack some.

    :raises ValueError: if the data has a class that the checkpoint does not know.
    """
    if images.classes is None or not class_names:
        return images
    unknown = sorted(set(images.class_names) - set(class_names))
    if unknown:
        raise UserError(
            f"the data has classes that the checkpoint was not trained on: {', '.join(unknown[:5])}"
            f" (--labels_from, and the names of files or folders, make the classes)"
        )
    names = list(class_names)
    classes = [names.index(images.class_names[label]) for label in images.classes]
    return ImageList(images.paths, classes, tuple(names))


def check_class_names(flags: Flags, images: ImageList) -> None:
    """Check that labels made from the data mean to the checkpoint what they mean in the data.

    :raises ValueError: if the classes of the data are not those that the checkpoint was trained
        on, or are more than it has.
    """
    trained = list(flags.get("class_names") or [])
    found = list(images.class_names)
    most = flags.get("num_classes") or NUM_CLASSES
    if len(found) > most:
        raise UserError(f"the data has {len(found)} classes, more than the model's {most}")
    if trained and found and trained != found:
        odd = sorted(set(trained) ^ set(found))
        raise UserError(
            f"the data's {len(found)} classes are not the {len(trained)} that the checkpoint was "
            f"trained on: {', '.join(odd[:5])} on one side only"
        )


def train(
    model: nn.Module,
    diffusion: GaussianDiffusion,
    data: Iterator[tuple[Batch, Cond]],
    flags: Flags,
) -> None:
    """Open the run folder and train in it."""
    options = pick(TrainOptions, flags)
    if options.resume_checkpoint:  # fails before anything is written
        checkpoint.load_model(model, options.resume_checkpoint)
    open_folder(flags["log_dir"], flags, checkpoint.CONFIG)
    parameters = sum(param.numel() for param in model.parameters())
    world = dist_util.get_world_size()
    classes = f", {len(flags['class_names'])} classes" if flags["class_cond"] else ""
    logger.log(f"{parameters:,} parameters, {flags['num_images']:,} images{classes}")
    bound = (
        f"{options.lr_anneal_steps} steps"
        if options.lr_anneal_steps
        else "no --lr_anneal_steps: trains until it is stopped"
    )
    batch = world * options.batch_size
    logger.log(f"{world} x {options.batch_size} = global batch of {batch}; {bound}")
    if flags["diffusion_steps"] > MANY_DIFFUSION_STEPS:
        logger.warn(
            f"--diffusion_steps {flags['diffusion_steps']} is the number of noising steps; the "
            "length of training is --lr_anneal_steps"
        )
    arguments = dataclasses.asdict(options)
    arguments["schedule_sampler"] = create_named_schedule_sampler(
        options.schedule_sampler, diffusion
    )
    model.to(dist_util.dev())
    try:
        TrainLoop(model=model, diffusion=diffusion, data=data, **arguments).run_loop()
    except KeyboardInterrupt:
        logger.log(f"interrupted; checkpoints are in {get_blob_logdir()}")
        raise
    logger.log(f"training complete; checkpoints are in {get_blob_logdir()}")


# -- from a checkpoint ------------------------------------------------------------------------


def prepare_from_checkpoint(flags: Flags, given: set[str]) -> Flags:
    """Join the other processes and read the flags stored beside ``--model_path``."""
    if not flags["model_path"]:
        raise UserError("--model_path is missing: name a checkpoint, such as runs/x/ema_....pt")
    folder = set_up(flags)
    flags = inherit(flags, given, os.path.dirname(flags["model_path"]))
    return {**flags, "log_dir": folder}


def load_for_evaluation(model: nn.Module, path: str) -> nn.Module:
    """The model with a checkpoint's weights, on its device, in evaluation mode.

    :raises ValueError: if the checkpoint does not fit, or its weights are not finite.
    """
    checkpoint.load_model(model, path)
    if not all(param.isfinite().all() for param in model.parameters()):
        raise UserError(f"checkpoint '{path}' holds non-finite weights: its training diverged")
    return model.to(dist_util.dev()).eval()
