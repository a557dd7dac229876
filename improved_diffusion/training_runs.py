"""What the training scripts share: from the flags to data, checks, watchers and the loop."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import checkpoint, dist_util, liveness, logger, sharded, state_dicts
from .augment import AugmentOptions
from .errors import UserError
from .flags import pick
from .gaussian_diffusion import GaussianDiffusion
from .image_datasets import (
    Batch,
    DataOptions,
    ImageList,
    ImageStream,
    list_images,
    load_all,
    load_data,
    load_once,
    open_dataset,
)
from .likelihood import bits_of_a_range
from .optimization import OptimizationOptions, check_precision
from .parallel import ParallelOptions
from .pixels import check_files, parse_value_range
from .previews import Previews
from .resample import create_named_schedule_sampler
from .rng import seed_everything
from .runs import Flags, announce, check_class_names, inherit, relabel, set_up, store_flags
from .saving import SavingOptions
from .script_util import ModelAndDiffusionOptions, SuperResOptions
from .stopping import Bounds
from .train_util import TrainLoop, TrainOptions, Watcher, get_blob_logdir
from .validation import Validation, hold_out, spread_out
from .watching import PreviewWatcher, ValidationWatcher, WatchOptions, keep_random_state
from .webdata import ShardFormat, ShardStream, check_first, find_shards, workers_of

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
    ParallelOptions,
    SavingOptions,
    WatchOptions,
)


@dataclass(frozen=True)
class TrainingData:
    """The images of a run: an endless stream to train on, and those to look at on the way."""

    stream: ImageStream | ShardStream
    training: ImageList
    validation: ImageList | None
    size_flag: str

    def map(self, transform: Callable[[Batch], Batch]) -> TrainingData:
        """Change every batch, of training and of validation, by a function."""
        self.stream.map(transform)
        return self


def prepare_training(flags: Flags, given: set[str], size_flag: str) -> tuple[Flags, TrainingData]:
    """Check everything that can be checked before the run folder is made; then seed the weights.

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
    train, source, watch = (pick(o, flags) for o in (TrainOptions, DataOptions, WatchOptions))
    value_range = parse_value_range(flags["value_range"])
    liveness.doing(f"listing the images of {source.data_dir}", starting=True)
    shards = find_shards(source.data_dir)
    if shards:
        images = ImageList([])  # they are not counted
        flags = _with_numbered_classes(flags)
    else:
        images = list_images(
            source.data_dir, flags["class_cond"], source.labels_from, value_range=value_range
        )
        if value_range is not None and images.packed is None:
            check_files(images.paths, flags["channels"], value_range)
        flags = _with_classes(flags, images)
    training, validation = images, None
    if watch.val_fraction and shards:
        raise UserError(
            f"--val_fraction {watch.val_fraction}: tar shards cannot be split: put images for "
            "validation into a folder and give --val_data_dir"
        )
    if watch.val_fraction:
        training, validation = hold_out(images, watch.val_fraction)
    elif watch.val_data_dir:
        validation = list_images(
            watch.val_data_dir,
            flags["class_cond"],
            source.labels_from,
            "val_data_dir",
            value_range,
        )
        validation = relabel(validation, flags.get("class_names", []))
        open_dataset(
            validation,
            flags[size_flag],
            channels=flags["channels"],
            value_range=value_range,
            size_flag=size_flag,
        )
    augment = pick(AugmentOptions, flags)
    stream: ImageStream | ShardStream
    if shards:
        stream = _open_shards(shards, flags, size_flag)
    else:
        stream = load_data(
            data_dir=source.data_dir,
            batch_size=train.batch_size,
            image_size=flags[size_flag],
            class_cond=flags["class_cond"],
            images=training,
            channels=flags["channels"],
            num_workers=source.num_workers,
            seed=flags["seed"],
            value_range=value_range,
            random_flip=augment.random_flip,
            random_crop=augment.random_crop,
            device=dist_util.dev(),
            size_flag=size_flag,
        )
    check_precision(pick(OptimizationOptions, flags), train.use_fp16, dist_util.dev())
    total = pick(Bounds, flags).total_steps(
        train.lr_anneal_steps, train.batch_size * dist_util.get_world_size()
    )
    pick(OptimizationOptions, flags).lr_factor(0, train.lr_anneal_steps, total)
    liveness.doing("making the network", starting=True)
    seed_everything(flags["seed"], "initial weights")
    return flags, TrainingData(stream, training, validation, size_flag)


def _with_numbered_classes(flags: Flags) -> Flags:
    """The class names of tar shards: numbers, unless the run to go on from knows better."""
    if not flags["class_cond"]:
        return flags
    if not flags["num_classes"]:
        raise UserError(
            "--class_cond True: the classes in tar shards are not counted: give --num_classes"
        )
    known = flags.get("class_names") or [str(i) for i in range(flags["num_classes"])]
    return {**flags, "class_names": known}


def _open_shards(shards: list[str], flags: Flags, size_flag: str) -> ShardStream:
    """The stream of a run on tar shards, of which the first image is checked."""
    source, augment = pick(DataOptions, flags), pick(AugmentOptions, flags)
    workers = workers_of(len(shards), source.num_workers)
    if workers < source.num_workers:
        log.warning(
            f"--num_workers {source.num_workers}: {len(shards)} tar shards are enough for "
            f"{workers} in each process; more shards let more workers read"
        )
    form = ShardFormat(
        flags[size_flag],
        flags["channels"],
        parse_value_range(flags["value_range"]),
        tuple(flags["class_names"]) if flags["class_cond"] else (),
        source.labels_from,
    )
    form = dataclasses.replace(form, like=check_first(shards[0], form))
    return ShardStream(
        shards,
        form,
        flags["batch_size"],
        flags["seed"],
        workers,
        dist_util.dev(),
        flip=augment.random_flip,
        crop=augment.random_crop,
    )


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
    stored = checkpoint.load_config(folder) if own else {}
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
        flags = inherit(flags, given, os.path.dirname(continued))
    if own:  # the flags stored there must go on fitting what lies there
        inherit(flags, set(flags), folder)
        _tell_changes(flags, stored)
    if not named and os.path.dirname(began_from) == _absolute(folder):
        began_from = ""  # having gone on without the flag, the run may go back there again
    return {**flags, "resume_checkpoint": continued or "", "began_from": began_from}


def _absolute(path: str) -> str:
    """A path that does not depend on the working directory; '' and addresses of blobs stay."""
    return os.path.abspath(path) if path and "://" not in path else path


def _tell_changes(flags: Flags, stored: Flags) -> None:
    """Say which flags of training differ from those of the last sitting."""
    names = {field.name for cls in TRAINING_OPTIONS for field in dataclasses.fields(cls)}
    names = (names | {"seed"}) - {"resume_checkpoint"}
    names -= {"batch_size"} if flags["global_batch"] else set()
    changed = [
        f"--{name} {flags[name]} (was {stored[name]})"
        for name in sorted(names & stored.keys())
        if flags[name] != stored[name]
    ]
    if changed:
        log.info(f"flags that changed since the last sitting: {', '.join(changed)}")


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


def train(
    model: nn.Module,
    diffusion: GaussianDiffusion,
    data: TrainingData,
    flags: Flags,
) -> None:
    """Open the run folder and train in it."""
    make_loop(model, diffusion, data, flags).run_loop()
    logger.log(f"training complete; checkpoints are in {get_blob_logdir()}")


def make_loop(
    model: nn.Module,
    diffusion: GaussianDiffusion,
    data: TrainingData,
    flags: Flags,
) -> TrainLoop:
    """Open the run folder and make what trains in it, ready for its first step."""
    liveness.doing("making the training loop", starting=True)
    options = pick(TrainOptions, flags)
    if options.resume_checkpoint:  # fails before anything is written
        _check_fit(model, options.resume_checkpoint)
    logger.configure(dir=flags["log_dir"])
    parallel = pick(ParallelOptions, flags)
    if not parallel.sharded:  # the whole of it may not fit
        model.to(dist_util.dev())
    arguments = dataclasses.asdict(options)
    arguments["schedule_sampler"] = create_named_schedule_sampler(
        options.schedule_sampler, diffusion
    )
    loop = TrainLoop(
        model=model,
        diffusion=diffusion,
        data=data.stream,
        seed=flags["seed"],
        bounds=pick(Bounds, flags),
        optimization=pick(OptimizationOptions, flags),
        saving=pick(SavingOptions, flags),
        parallel=parallel,
        watchers=_watchers(diffusion, data, flags),
        flags=flags,
        **arguments,
    )
    store_flags(get_blob_logdir(), {**flags, "resume_checkpoint": ""}, checkpoint.CONFIG)
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
    if flags["diffusion_steps"] > MANY_DIFFUSION_STEPS:
        logger.warn(
            f"--diffusion_steps {flags['diffusion_steps']} is the number of noising steps; the "
            "length of training is --train_steps or --lr_anneal_steps"
        )


def _watchers(diffusion: GaussianDiffusion, data: TrainingData, flags: Flags) -> list[Watcher]:
    """What looks at the run on the way."""
    watch = pick(WatchOptions, flags)
    load = functools.partial(_load_fixed, data=data, flags=flags)
    watchers: list[Watcher] = []
    if data.validation:
        chosen = spread_out(data.validation, watch.val_images)
        batches = load(chosen)  # once; they are the same each time
        validation = Validation(diffusion, lambda: batches, len(chosen.paths))
        watchers.append(ValidationWatcher(validation, watch.val_interval))
        if flags.get("value_range"):
            logger.log(f"val_bpd is in {bits_of_a_range(flags['value_range'])}")
    if watch.sample_interval:
        if isinstance(data.stream, ShardStream):
            reference, shown = (
                _load_first(data.stream, count) for count in (REFERENCE_IMAGES, PREVIEW_IMAGES)
            )
        else:
            reference = load(spread_out(data.training, REFERENCE_IMAGES), whole=True)
            shown = load(spread_out(data.training, PREVIEW_IMAGES), whole=True)
        previews = _previews(reference, shown, flags)
        watchers.append(PreviewWatcher(previews, watch.sample_interval))
    return watchers


FixedBatch = tuple[Tensor, dict[str, Tensor], list[int]]


def _load_fixed(
    images: ImageList, data: TrainingData, flags: Flags, whole: bool = False
) -> list[FixedBatch]:
    """This process's share of fixed images, as batches with the images' indices.

    In place of an empty share comes an image without an index.

    :param whole: all images on every process.
    """
    size, channels = flags[data.size_flag], flags["channels"]
    value_range = parse_value_range(flags.get("value_range", ""))
    with keep_random_state():
        how = {"channels": channels, "value_range": value_range}
        if whole:
            loaded = [load_all(open_dataset(images, size, **how))]
        else:
            count, batch_size = len(images.paths), flags["batch_size"]
            loaded = list(load_once(images, count, batch_size, size, num_workers=0, **how))
            if any(not indices for _, _, indices in loaded):
                first, cond, _ = load_all(open_dataset(spread_out(images, 1), size, **how))
                loaded = [entry if entry[2] else (first, cond, []) for entry in loaded]
        change = data.stream.transform
        return [(*change((batch, cond)), indices) for batch, cond, indices in loaded]


def _load_first(stream: ShardStream, count: int) -> list[FixedBatch]:
    """The first images of tar shards, on every process."""
    with keep_random_state():
        batch, indices = stream.first(count)
        return [(*stream.transform(batch), indices)]


def _previews(reference: list[FixedBatch], shown: list[FixedBatch], flags: Flags) -> Previews:
    """Previews under the conditions of images of the training set, classes in turn."""
    options = SuperResOptions if "large_size" in flags else ModelAndDiffusionOptions
    steps = str(min(PREVIEW_STEPS, flags["diffusion_steps"]))
    diffusion = pick(options, {**flags, "timestep_respacing": steps}).diffusion()
    ((images, _, _),) = reference
    ((_, cond, indices),) = shown
    if cond.keys() == {"y"}:  # low-resolution images keep the classes they are of
        cond["y"] = torch.arange(len(indices)) % flags["num_classes"]
    return Previews(diffusion, images.shape[1:], cond, images, len(indices), flags["batch_size"])
