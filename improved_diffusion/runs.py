"""What the scripts share: from the command line to a run folder, and back from a checkpoint.

:mod:`.training_runs` has what the training scripts share.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import checkpoint, dist_util, liveness, logger, state_dicts, stored_flags
from ._version import __version__
from .classifier_options import ClassifierOptions
from .errors import UserError
from .flags import given_flags, option, pick, require_at_least
from .image_datasets import ImageList
from .process import FLOW_SCHEDULE, prediction_name
from .schedules import is_absent_file, shorten
from .script_util import (
    FIXED_BY_TRAINING,
    NUM_CLASSES,
    ModelAndDiffusionOptions,
    SuperResOptions,
)

log = logging.getLogger(__name__)

Flags = dict[str, Any]


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
    liveness.doing("comparing flags", starting=True)
    dist_util.setup_dist()
    _check_alike(flags)
    folder = os.path.abspath(os.path.expanduser(run.log_dir or logger.default_dir()))
    return dist_util.broadcast_object(folder)


def _check_alike(flags: Flags) -> None:
    """Check that all processes were started with the same flags, by the same versions.

    :raises ValueError: on every process alike, naming the first that differs from process 0.
    """
    versions = {"improved_diffusion": __version__, "torch": torch.__version__}
    everyone = dist_util.gather_objects((versions, flags))
    for rank, (others_versions, others_flags) in enumerate(everyone):
        theirs, first = _differing(others_versions, everyone[0][0], "{} {}")
        if theirs:
            raise UserError(
                f"process {rank} runs {theirs}, process 0 {first}: install the same everywhere"
            )
        theirs, first = _differing(others_flags, everyone[0][1], "--{} {}")
        if theirs:
            raise UserError(
                f"process {rank} was started with {theirs}, process 0 with {first}: give all the "
                "same flags"
            )


def _differing(theirs: Flags, first: Flags, form: str) -> tuple[str, str]:
    """The entries that differ, as texts of both sides; '' if none does."""
    names = [name for name in first if repr(theirs.get(name)) != repr(first[name])]
    texts = [
        " ".join(form.format(name, shorten(str(side.get(name, "missing")))) for name in names)
        for side in (theirs, first)
    ]
    return texts[0], texts[1]


def open_folder(folder: str, flags: Flags) -> None:
    """Make the run folder, log to it, and store the flags there under the script's name.

    So samples written into a training run leave its own flags alone.
    """
    liveness.doing("at work")
    logger.configure(dir=folder)
    script = os.path.splitext(os.path.basename(sys.argv[0]))[0]
    store_flags(folder, flags, f"{script}.json")
    announce(flags)


def store_flags(folder: str, flags: Flags, name: str) -> None:
    """Store the flags in a folder, which may be new; the first process does."""
    if dist_util.get_rank() == 0:
        if "://" not in folder:
            os.makedirs(folder, exist_ok=True)  # $DIFFUSION_BLOB_LOGDIR may be new
        stored_flags.save_config(folder, flags, name)


def announce(flags: Flags) -> None:
    """Say which processes and devices there are."""
    world, gpus = dist_util.get_world_size(), torch.cuda.device_count()
    logger.log(f"{dist_util.describe_processes()}, seed {flags['seed']}")
    if world == 1 and gpus > 1:
        logger.warn(
            f"{gpus} GPUs are visible but one is used: start with torchrun --nproc_per_node {gpus}"
        )


def inherit(flags: Flags, given: set[str], folder: str, stored: Flags | None = None) -> Flags:
    """Take the model's flags from the run folder that holds a checkpoint.

    :param folder: the folder; or a file that holds its flags itself.
    :param stored: those flags, if they are known; None for the folder's.
    :raises ValueError: naming both values, if a given flag contradicts what training settled.
    """
    stored = stored_flags.load_config(folder) if stored is None else stored
    if not stored:
        log.warning(
            f"no {stored_flags.CONFIG} beside the checkpoint: its flags are those given and the "
            f"defaults, such as --noise_schedule {flags['noise_schedule']} --diffusion_steps "
            f"{flags['diffusion_steps']}"
        )
    known = {field.name for cls in _OPTIONS for field in dataclasses.fields(cls)} | {"labels_from"}
    merged = _merge(flags, given, stored, known & flags.keys(), folder)
    merged["class_names"] = stored.get("class_names", [])
    return merged


def _merge(
    flags: Flags, given: set[str], stored: Flags, names: Collection[str], where: str
) -> Flags:
    """Take some flags from those of a checkpoint, {} for none; ``where`` they are stored.

    :raises ValueError: naming both values, if a given flag contradicts what training settled.
    """
    if stored:
        stored = {**_BEFORE, **stored}
        stored, given = _in_same_words(flags, given, stored)
        if stored["betas"] and is_absent_file(flags.get("betas", "")):
            log.info(f"--betas {flags['betas']} is gone: its numbers are stored with the run")
            flags = {**flags, "betas": stored["betas"]}
        _check_betas(flags, given, stored, where)
        _check_null_class(flags, given, stored, where)
    if not flags.get("num_classes"):
        given = given - {"num_classes"}  # 0: to be counted
    return stored_flags.merge_flags(flags, given, stored, FIXED_BY_TRAINING, names, where)


_OPTIONS = (ModelAndDiffusionOptions, SuperResOptions, ClassifierOptions)
# What runs did from before there were these flags: 8-bit pictures, the process of the other flags
_BEFORE = {
    "value_range": "",
    "predict": "",
    "betas": "",
    "zero_terminal_snr": False,
    "num_head_channels": -1,
    "resblock_updown": False,
    "use_new_attention_order": False,
    "class_dropout": 0.0,
}


def _in_same_words(flags: Flags, given: set[str], stored: Flags) -> tuple[Flags, set[str]]:
    """Let flags agree that say the same, such as --predict xstart and --predict_xstart True.

    :return: the stored flags, where a given one needs it in its words; and the given ones without
        those that the stored ones imply.
    """
    prediction = prediction_name(stored["predict"], stored.get("predict_xstart", False))
    implied = set()
    if flags.get("predict_xstart") and prediction == "xstart":
        implied.add("predict_xstart")
    if flags.get("noise_schedule") == FLOW_SCHEDULE and prediction == "flow":
        implied.add("noise_schedule")
    if "predict" in given and flags.get("predict"):
        stored = {**stored, "predict": prediction}
    return stored, given - implied


def _check_betas(flags: Flags, given: set[str], stored: Flags, folder: str) -> None:
    """Refuse other noise levels than the checkpoint's, without telling them all."""
    if "betas" in given and flags.get("betas") != stored["betas"]:
        ours, theirs = (shorten(side["betas"]) or "''" for side in (flags, stored))
        raise UserError(
            f"--betas {ours} contradicts the checkpoint, which was trained with --betas {theirs} "
            f"({stored_flags.place_of_flags(folder)}): leave the flag out"
        )


def _check_null_class(flags: Flags, given: set[str], stored: Flags, folder: str) -> None:
    """Refuse to add or drop the label that stands for none; its share may change."""
    ours, theirs = flags.get("class_dropout", 0), stored["class_dropout"]
    if "class_dropout" in given and (ours > 0) != (theirs > 0):
        raise UserError(
            f"--class_dropout {ours} contradicts the checkpoint, which was trained with "
            f"--class_dropout {theirs} ({stored_flags.place_of_flags(folder)}): leave the flag out"
        )


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
    return dataclasses.replace(images, classes=classes, class_names=tuple(names))


def check_class_names(flags: Flags, images: ImageList) -> None:
    """Check that labels made from the data mean to the checkpoint what they mean in the data.

    :raises ValueError: if the classes of the data are not those that the checkpoint was trained
        on, or are more than it has.
    """
    trained = list(flags.get("class_names") or [])
    found = list(images.class_names)
    most = flags.get("num_classes") or NUM_CLASSES
    if trained and found and trained != found:
        sides = {"data": set(found) - set(trained), "checkpoint": set(trained) - set(found)}
        odd = [f"only in the {side}: {_some(names)}" for side, names in sides.items() if names]
        raise UserError(
            f"the data's {len(found)} classes are not the {len(trained)} that the checkpoint was "
            f"trained on: {'; '.join(odd) or 'they come in another order'}"
        )
    if len(found) > most:
        raise UserError(f"the data has {len(found)} classes, more than the model's {most}")


def _some(names: set[str]) -> str:
    """At most five of the names, in order."""
    return ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")


# -- a classifier for a diffusion model -------------------------------------------------------

# What a classifier must have in common with the diffusion model that it guides
SETTLED_BY_DIFFUSION = (
    "image_size",
    "channels",
    "value_range",
    "diffusion_steps",
    "noise_schedule",
    "predict",  # the flow has a schedule of its own
    "predict_xstart",
    "betas",
    "zero_terminal_snr",
    "rescale_timesteps",
)
_OF_THE_CLASSES = ("num_classes", "labels_from")


def classifier_for(flags: Flags, given: set[str]) -> Flags:
    """Take noise levels, size and classes from the diffusion checkpoint that a classifier guides.

    :param flags: ``classifier_for`` is a file of the checkpoint, or the folder of its run.
    :param given: the names of the flags that are settled.
    :raises ValueError: on every process, if there is no such checkpoint of a diffusion model with
        its flags; naming both values, if a given flag contradicts them.
    """
    where, stored = _flags_of_diffusion(flags["classifier_for"])
    names = SETTLED_BY_DIFFUSION + (_OF_THE_CLASSES if stored.get("class_cond") else ())
    merged = _merge(flags, given, stored, names, where)
    known, theirs = flags.get("class_names") or [], stored.get("class_names") or []
    if known and stored.get("class_cond") and known != theirs:
        raise UserError(
            f"--classifier_for {flags['classifier_for']}: its classes are not those that this "
            "classifier was trained on: name another --log_dir, to begin anew"
        )
    log.info(f"noise levels, size and classes are those of {flags['classifier_for']}")
    return {**merged, "class_names": theirs if stored.get("class_cond") else known}


def _flags_of_diffusion(path: str) -> tuple[str, Flags]:
    """Where the flags of a diffusion checkpoint are stored, and those flags."""
    import blobfile as bf

    flag = f"--classifier_for {path}"
    if not dist_util.on_first_rank(lambda: bf.exists(path)):
        raise UserError(f"{flag} does not exist: name a checkpoint of the diffusion model")
    is_folder = dist_util.on_first_rank(lambda: bf.isdir(path))
    where, stored = stored_flags.flags_of(bf.join(path, "") if is_folder else path)
    if not stored:
        raise UserError(
            f"{flag} has no {stored_flags.CONFIG} beside it, which would tell its flags: give them "
            "instead, such as --image_size, --noise_schedule and --diffusion_steps"
        )
    kind = "a super-resolution model" if "large_size" in stored else "no model of image_train.py"
    kind = "a classifier" if is_of_classifier(stored) else kind
    if is_of_classifier(stored) or "image_size" not in stored:
        raise UserError(
            f"{flag} is {kind}: name a checkpoint of the diffusion model that is to be guided"
        )
    return where, stored


# -- from a checkpoint ------------------------------------------------------------------------


def prepare_from_checkpoint(flags: Flags, given: set[str]) -> Flags:
    """Join the other processes and read the flags stored beside ``--model_path``."""
    if not flags["model_path"]:
        raise UserError("--model_path is missing: name a checkpoint, such as runs/x/ema_....pt")
    folder = set_up(flags)
    checkpoint.refuse_folder("model_path", flags["model_path"])
    where, stored = stored_flags.flags_of(flags["model_path"])
    refuse_classifier(flags["model_path"], stored)
    flags = inherit(flags, given, where, stored)
    return {**flags, "log_dir": folder}


def is_of_classifier(stored: Flags) -> bool:
    """Whether the flags beside a checkpoint are those of a classifier."""
    return "classifier_width" in stored


def refuse_classifier(path: str, stored: Flags) -> None:
    """Refuse a checkpoint by the flags beside it, if it is one of a classifier."""
    if is_of_classifier(stored):
        raise UserError(
            f"checkpoint '{path}' is that of a classifier, which makes no images: give it as "
            "--classifier_path of classifier_sample.py"
        )


def load_for_evaluation(model: nn.Module, path: str) -> nn.Module:
    """The model with a checkpoint's weights, on its device, in evaluation mode.

    :raises ValueError: if the checkpoint does not fit, or its weights are not finite.
    """
    state_dicts.load_model(model, path)
    check_finite(model, path)
    return model.to(dist_util.dev()).eval()


def check_finite(model: nn.Module, path: str) -> None:
    """Refuse the weights that a model has from a checkpoint, unless they are finite.

    :raises ValueError: naming the checkpoint.
    """
    if not all(param.isfinite().all() for param in model.parameters()):
        raise UserError(f"checkpoint '{path}' holds non-finite weights: its training diverged")
