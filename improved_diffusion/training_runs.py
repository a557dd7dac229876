"""What the training scripts share: from the flags to checks, watchers and the loop."""

from __future__ import annotations

import dataclasses
import logging
import math
import os

import torch
from torch import nn

from . import checkpoint, dist_util, liveness, logger, sharded, state_dicts, stored_flags
from .augment import AugmentOptions
from .classifier_training import ClassifierLoss
from .compiling import CompileOptions, check_compiler, compile_if_asked
from .errors import UserError
from .flags import pick
from .image_datasets import DataOptions
from .likelihood import bits_of_a_range
from .objectives import Objective
from .optimization import OptimizationOptions, check_precision
from .parallel import ParallelOptions
from .previews import Previews
from .resample import create_named_schedule_sampler
from .rng import seed_everything
from .runs import (
    SETTLED_BY_DIFFUSION,
    Flags,
    announce,
    classifier_for,
    inherit,
    is_of_classifier,
    set_up,
    store_flags,
)
from .same_job import as_stored, differences
from .saving import SavingOptions
from .script_util import ModelAndDiffusionOptions, SuperResOptions
from .stopping import Bounds
from .train_util import TrainLoop, TrainOptions, Watcher, get_blob_logdir
from .training_data import FixedBatch, TrainingData, load_shares, load_some, open_data
from .validation import Validation, spread_out
from .watching import PreviewWatcher, ValidationWatcher, WatchOptions
from .webdata import ShardStream

log = logging.getLogger(__name__)

MANY_DIFFUSION_STEPS = 4000  # the most that IDDPM uses
PREVIEW_STEPS = 50
PREVIEW_IMAGES = 25
REFERENCE_IMAGES = 256

TRAINING_OPTIONS = (
    DataOptions,
    AugmentOptions,
    TrainOptions,
    Bounds,
    OptimizationOptions,
    CompileOptions,
    ParallelOptions,
    SavingOptions,
    WatchOptions,
)


def prepare_training(flags: Flags, given: set[str], size_flag: str) -> tuple[Flags, TrainingData]:
    """Check everything that can be checked before the run folder is made; then seed the weights.

    :param flags: those of a classifier went through :func:`.classifier_training.training_flags`.
    :param size_flag: the flag that holds the size of the images to load.
    :return: the flags with the folder, inherited values and the number of classes filled in; and
        the data.
    """
    for options in TRAINING_OPTIONS:
        pick(options, flags)  # says what is wrong with them
    flags = {**flags, "log_dir": set_up(flags)}
    flags = _spread(flags, given)
    liveness.doing("looking for a checkpoint", starting=True)
    flags = _with_checkpoint(flags, given)
    if is_of_classifier(flags):
        flags = _for_diffusion_model(flags, given)
    flags, data = open_data(flags, size_flag)
    train = pick(TrainOptions, flags)
    check_precision(pick(OptimizationOptions, flags), train.use_fp16, dist_util.dev())
    check_compiler(pick(CompileOptions, flags), flags["parallel"])
    total = pick(Bounds, flags).total_steps(
        train.lr_anneal_steps, train.batch_size * dist_util.get_world_size()
    )
    pick(OptimizationOptions, flags).lr_factor(0, train.lr_anneal_steps, total)
    liveness.doing("making the network", starting=True)
    seed_everything(flags["seed"], "initial weights")
    return flags, data


def _spread(flags: Flags, given: set[str]) -> Flags:
    """Check how training is spread over the processes, and fill in the batch of each.

    :raises ValueError: if so many processes cannot share the model or the batch, or what they
        write could not be kept.
    """
    world_size, parallel = dist_util.get_world_size(), pick(ParallelOptions, flags)
    parallel.check(world_size, flags["use_fp16"])
    blobs = os.environ.get("DIFFUSION_BLOB_LOGDIR", "")
    if parallel.sharded and "://" in blobs:
        raise UserError(
            f"--parallel fsdp: every process writes its share into a folder that all see; "
            f"$DIFFUSION_BLOB_LOGDIR {blobs} is none"
        )
    if parallel.sharded and flags["posthoc_ema"] and flags["keep_checkpoints"]:
        raise UserError(
            f"--keep_checkpoints {flags['keep_checkpoints']} with --parallel fsdp removes the "
            f"averages of --posthoc_ema {flags['posthoc_ema']} with the shares: leave one out"
        )
    batch_size = parallel.batch_size(flags["batch_size"], world_size)
    if "batch_size" in given and batch_size != flags["batch_size"]:
        raise UserError(
            f"--batch_size {flags['batch_size']} contradicts --global_batch "
            f"{parallel.global_batch}, which is {batch_size} for each of {world_size} processes: "
            "leave --batch_size out"
        )
    return {**flags, "batch_size": batch_size}


def _with_checkpoint(flags: Flags, given: set[str]) -> Flags:
    """Fill in what the checkpoint to go on from settles.

    The run folder's own newest checkpoint wins over one named outside of it, if the run began
    there; one named in the run folder wins over later ones.

    :return: the flags; ``resume_checkpoint`` is a model file or empty, ``began_from`` what was
        given, now or when the run began.
    """
    folder = os.environ.get("DIFFUSION_BLOB_LOGDIR") or flags["log_dir"]
    named, own = _absolute(flags["resume_checkpoint"]), checkpoint.find_newest_model(folder)
    stored = stored_flags.load_config(folder) if own else {}
    began_from = stored.get("began_from", "")
    continued = own
    if named and began_from == named:
        log.info(f"this run began from {named} and goes on from {own}")
    elif named:
        began_from = named
        continued = checkpoint.locate(flags["resume_checkpoint"])
        if own and os.path.dirname(_absolute(continued)) != _absolute(folder):
            raise UserError(
                f"--resume_checkpoint {flags['resume_checkpoint']}: '{folder}' holds another run "
                f"already, at {os.path.basename(own)}: leave the flag out to go on with that one, "
                "or name another --log_dir"
            )
    if continued:
        flags = inherit(flags, given, *stored_flags.flags_of(continued))
    if own:  # the flags stored there must go on fitting what lies there
        inherit(flags, set(flags), folder)
        _tell_changes(flags, stored)
    if not named and os.path.dirname(began_from) == _absolute(folder):
        began_from = ""  # having gone on without the flag, the run may go back there again
    return {**flags, "resume_checkpoint": continued or "", "began_from": began_from}


def _for_diffusion_model(flags: Flags, given: set[str]) -> Flags:
    """Fill in what the diffusion model settles that a classifier is for, if one is named.

    A run that goes on knows it already, so that the diffusion model may be gone.

    :raises ValueError: if the run would go on from a diffusion model; see :func:`.classifier_for`.
    """
    flags = {**flags, "classifier_use_fp16": flags["use_fp16"]}
    path, own = _absolute(flags["classifier_for"]), flags["resume_checkpoint"]
    flags["classifier_for"] = path
    stored = stored_flags.flags_of(own)[1] if own else {}
    if stored and not is_of_classifier(stored):
        raise UserError(
            f"checkpoint '{own}' is that of a diffusion model, not of a classifier: name it by "
            "--classifier_for, and another --log_dir"
        )
    if not path or path == stored.get("classifier_for"):
        return flags
    merged = classifier_for(flags, given)
    if stored:
        _check_same_model(path, stored, merged)
    return merged


def _check_same_model(path: str, stored: Flags, flags: Flags) -> None:
    """Refuse to go on with a classifier for a diffusion model that it was not trained for.

    :param stored: of the classifier's run.
    :param flags: with those of the diffusion model.
    """
    known = as_stored({name: value for name, value in flags.items() if name in stored})
    names = [name for name in SETTLED_BY_DIFFUSION if name in known]
    theirs, ours = differences(*({n: side[n] for n in names} for side in (stored, known)))
    if theirs:
        raise UserError(
            f"--classifier_for {path} has {ours}, but the classifier in this folder was trained "
            f"for {theirs}: name another --log_dir, to begin anew"
        )


def _absolute(path: str) -> str:
    """A path that does not depend on the working directory; '' and addresses of blobs stay."""
    return os.path.abspath(path) if path and "://" not in path else path


def _tell_changes(flags: Flags, stored: Flags) -> None:
    """Say which flags of training differ from those of the last sitting."""
    names = {field.name for cls in TRAINING_OPTIONS for field in dataclasses.fields(cls)}
    names = (names | {"seed", "noised"}) - {"resume_checkpoint"}
    names -= {"batch_size"} if flags["global_batch"] else set()
    changed = [
        f"--{name} {flags[name]} (was {stored[name]})"
        for name in sorted(names & stored.keys() & flags.keys())
        if flags[name] != stored[name]
    ]
    if changed:
        log.info(f"flags that changed since the last sitting: {', '.join(changed)}")


def train(
    model: nn.Module,
    objective: Objective,
    data: TrainingData,
    flags: Flags,
) -> None:
    """Open the run folder and train in it."""
    make_loop(model, objective, data, flags).run_loop()
    logger.log(f"training complete; checkpoints are in {get_blob_logdir()}")


def make_loop(
    model: nn.Module,
    objective: Objective,
    data: TrainingData,
    flags: Flags,
) -> TrainLoop:
    """Open the run folder and make what trains in it, ready for its first step."""
    liveness.doing("making the training loop", starting=True)
    options = pick(TrainOptions, flags)
    if options.resume_checkpoint:  # fails before anything is written
        _check_fit(model, options.resume_checkpoint)
    logger.configure(dir=flags["log_dir"])
    compile_if_asked(pick(CompileOptions, flags), model)
    parallel = pick(ParallelOptions, flags)
    if not parallel.sharded:  # the whole of it may not fit
        model.to(dist_util.dev())
    arguments = dataclasses.asdict(options)
    arguments["schedule_sampler"] = create_named_schedule_sampler(
        options.schedule_sampler, objective
    )
    loop = TrainLoop(
        model=model,
        diffusion=objective,
        data=data.stream,
        seed=flags["seed"],
        bounds=pick(Bounds, flags),
        optimization=pick(OptimizationOptions, flags),
        saving=pick(SavingOptions, flags),
        parallel=parallel,
        class_dropout=flags.get("class_dropout", 0.0),
        watchers=_watchers(objective, data, flags),
        flags=flags,
        **arguments,
    )
    store_flags(get_blob_logdir(), {**flags, "resume_checkpoint": ""}, stored_flags.CONFIG)
    announce(flags)
    _describe(loop, data, flags)
    return loop


def _check_fit(model: nn.Module, path: str) -> None:
    """Refuse a checkpoint that does not fit the model, before anything is written."""
    if checkpoint.is_sharded(path):
        name = checkpoint.model_name(checkpoint.parse_resume_step_from_filename(path))
        state_dicts.check_shapes(model, sharded.ShardedCheckpoint(path).shapes(name), path)
    else:
        state_dicts.load_model(model, path)


def _describe(loop: TrainLoop, data: TrainingData, flags: Flags) -> None:
    """The first lines of a run: what is trained on what, and for how long."""
    parameters = sum(param.numel() for param in loop.model.parameters())
    classes = f", {len(flags['class_names'])} classes" if flags["class_cond"] else ""
    held_out = f", {len(data.validation.paths):,} for validation" if data.validation else ""
    precision = flags["precision"] or ("fp16" if flags["use_fp16"] else "fp32")
    images = f"{len(data.training.paths):,} images"
    if isinstance(data.stream, ShardStream):
        images = f"the images of {len(data.stream.shards):,} tar shards"
    logger.log(f"{parameters:,} parameters in {precision}, {images}{classes}{held_out}")
    world, parts = dist_util.get_world_size(), -(-loop.batch_size // loop.microbatch)
    last = f" (the last: {loop.batch_size % loop.microbatch})"
    logger.log(
        f"{world} process{'es' if world > 1 else ''} x {parts} microbatch"
        f"{'es' if parts > 1 else ''} x {min(loop.batch_size, loop.microbatch)}"
        f"{last if loop.batch_size % loop.microbatch else ''} = global batch of "
        f"{loop.global_batch}; {loop.bounds.describe(loop.total_steps)}"
    )
    if loop.parallel.sharded:
        share = loop.parallel.shard_processes or world
        copies = f", {world // share} copies in all" if share < world else ""
        logger.log(
            f"fully sharded: each process holds 1/{share} of weights, gradients, averages and "
            f"optimiser{copies}"
        )
    if data.validation:
        _warn_of_validation(loop, flags["val_interval"])
    if flags["diffusion_steps"] > MANY_DIFFUSION_STEPS:
        logger.warn(
            f"--diffusion_steps {flags['diffusion_steps']} is the number of noising steps; the "
            "length of training is --train_steps or --lr_anneal_steps"
        )


def _warn_of_validation(loop: TrainLoop, interval: int) -> None:
    """Say if what is measured on validation images will not all be in the log."""
    if (loop.total_steps or math.inf) <= interval:
        logger.warn(
            f"--val_interval {interval}: the run ends before validation images are measured"
        )
    elif interval % loop.log_interval:
        logger.warn(
            f"--val_interval {interval} is no multiple of --log_interval {loop.log_interval}: a "
            "row of the log holds the last measurement before it, and those after the last row "
            "are lost"
        )


def _watchers(objective: Objective, data: TrainingData, flags: Flags) -> list[Watcher]:
    """What looks at the run on the way."""
    watch = pick(WatchOptions, flags)
    watchers: list[Watcher] = []
    if data.validation:
        chosen = spread_out(data.validation, watch.val_images)
        batches = load_shares(chosen, data, flags)  # once; they are the same each time
        terms = objective.terms if isinstance(objective, ClassifierLoss) else ("loss",)
        validation = Validation(objective, lambda: batches, len(chosen.paths), terms)
        watchers.append(ValidationWatcher(validation, watch.val_interval))
        if flags.get("value_range") and not is_of_classifier(flags):
            logger.log(f"val_bpd is in {bits_of_a_range(flags['value_range'])}")
    if watch.sample_interval:
        reference, shown = (load_some(data, flags, n) for n in (REFERENCE_IMAGES, PREVIEW_IMAGES))
        previews = _previews(reference, shown, flags)
        watchers.append(PreviewWatcher(previews, watch.sample_interval))
    return watchers


def _previews(reference: FixedBatch, shown: FixedBatch, flags: Flags) -> Previews:
    """Previews under the conditions of images of the training set, classes in turn."""
    options = SuperResOptions if "large_size" in flags else ModelAndDiffusionOptions
    steps = str(min(PREVIEW_STEPS, flags["diffusion_steps"]))
    diffusion = pick(options, {**flags, "timestep_respacing": steps}).diffusion()
    images, (_, cond, indices) = reference[0], shown
    if cond.keys() == {"y"}:  # low-resolution images keep the classes they are of
        cond["y"] = torch.arange(len(indices)) % flags["num_classes"]
    return Previews(diffusion, images.shape[1:], cond, images, len(indices), flags["batch_size"])
