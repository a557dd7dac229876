"""The data of a training run: from the flags to a stream, and to images that stay the same."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from . import dist_util, liveness
from .augment import AugmentOptions
from .errors import UserError
from .flags import pick
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
from .pixels import check_files, parse_value_range
from .runs import Flags, check_class_names, is_of_classifier, relabel
from .validation import hold_out, spread_out
from .watching import WatchOptions, keep_random_state
from .webdata import ShardFormat, ShardStream, check_first, find_shards, workers_of

log = logging.getLogger(__name__)


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


def open_data(flags: Flags, size_flag: str) -> tuple[Flags, TrainingData]:
    """Find and check the images that the flags name, and open the stream to train on.

    :param size_flag: the flag that holds the size of the images to load.
    :return: the flags with the classes filled in, and the data.
    :raises ValueError: on every process, for data that is missing or does not fit the flags.
    """
    source = pick(DataOptions, flags)
    liveness.doing(f"listing the images of {source.data_dir}", starting=True)
    shards = find_shards(source.data_dir)
    if shards:
        flags = _with_numbered_classes(flags)
        _refuse_to_split(flags)
        images = ImageList([])  # they are not counted
    else:
        images = _list(flags, "data_dir")
        flags = _with_classes(flags, images)
    if is_of_classifier(flags) and len(flags["class_names"]) < 2:
        raise UserError(
            f"--data_dir {source.data_dir} has one class, {flags['class_names'][0]}: a classifier "
            "tells two or more apart; --labels_from says what names make the classes"
        )
    training, validation = _split(images, flags, size_flag)
    if shards:
        return flags, TrainingData(
            _open_shards(shards, flags, size_flag), training, validation, size_flag
        )
    augment = pick(AugmentOptions, flags)
    stream = load_data(
        data_dir=source.data_dir,
        batch_size=flags["batch_size"],
        image_size=flags[size_flag],
        class_cond=flags["class_cond"],
        images=training,
        num_workers=source.num_workers,
        seed=flags["seed"],
        random_flip=augment.random_flip,
        random_crop=augment.random_crop,
        device=dist_util.dev(),
        size_flag=size_flag,
        **_kind_of_pixels(flags),
    )
    return flags, TrainingData(stream, training, validation, size_flag)


def _kind_of_pixels(flags: Flags) -> dict[str, Any]:
    """How the pixels of images are read."""
    value_range = parse_value_range(flags["value_range"])
    return {"channels": flags["channels"], "value_range": value_range}


def _list(flags: Flags, flag: str) -> ImageList:
    """The images of a folder or packed set that a flag names; a few of them are checked."""
    value_range = parse_value_range(flags["value_range"])
    images = list_images(flags[flag], flags["class_cond"], flags["labels_from"], flag, value_range)
    if value_range is not None and images.packed is None:
        check_files(images.paths, flags["channels"], value_range)
    return images


def _split(images: ImageList, flags: Flags, size_flag: str) -> tuple[ImageList, ImageList | None]:
    """Images for training, and for validation if the flags ask for it."""
    watch = pick(WatchOptions, flags)
    if watch.val_fraction:
        return hold_out(images, watch.val_fraction)
    if not watch.val_data_dir:
        return images, None
    validation = relabel(_list(flags, "val_data_dir"), flags.get("class_names", []))
    # refuses a packed set of another kind
    open_dataset(validation, flags[size_flag], size_flag=size_flag, **_kind_of_pixels(flags))
    return images, validation


def _refuse_to_split(flags: Flags) -> None:
    if flags["val_fraction"]:
        raise UserError(
            f"--val_fraction {flags['val_fraction']}: tar shards cannot be split: put images for "
            "validation into a folder and give --val_data_dir"
        )


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
            f"{_asked(flags)}: each of the {len(found)} images would be a class of its own; name "
            "files CLASS_anything, or put each class into a folder and give --labels_from folder"
        )
    if flags.get("class_names"):
        check_class_names(flags, images)
    if len(found) > wanted:
        raise UserError(
            f"the data has {len(found)} classes ({', '.join(found[:5])}, ...), more than "
            f"--num_classes {wanted}"
        )
    check_class_names(flags, images)
    return {**flags, "num_classes": wanted, "class_names": found}


def _asked(flags: Flags) -> str:
    """What asks for classes."""
    return "a classifier learns classes" if is_of_classifier(flags) else "--class_cond True"


def _with_numbered_classes(flags: Flags) -> Flags:
    """The class names of tar shards: numbers, unless the run to go on from knows better."""
    if not flags["class_cond"]:
        return flags
    if not flags["num_classes"]:
        raise UserError(
            f"{_asked(flags)}: the classes in tar shards are not counted: give --num_classes"
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


# -- images that stay the same ----------------------------------------------------------------

FixedBatch = tuple[Tensor, dict[str, Tensor], list[int]]


def load_shares(images: ImageList, data: TrainingData, flags: Flags) -> list[FixedBatch]:
    """This process's share of some images, as batches with the images' indices.

    In place of an empty share comes an image without an index, so that all processes have equally
    many batches to compute on.
    """
    size, kind = flags[data.size_flag], _kind_of_pixels(flags)
    with keep_random_state():
        count, batch_size = len(images.paths), flags["batch_size"]
        loaded = list(load_once(images, count, batch_size, size, num_workers=0, **kind))
        if any(not indices for _, _, indices in loaded):
            first, cond, _ = load_all(open_dataset(spread_out(images, 1), size, **kind))
            loaded = [batch if batch[2] else (first, cond, []) for batch in loaded]
        change = data.stream.transform
        return [(*change((batch, cond)), indices) for batch, cond, indices in loaded]


def load_some(data: TrainingData, flags: Flags, count: int) -> FixedBatch:
    """At most so many images to train on, evenly spaced, on every process alike.

    Of tar shards they are the first ones.
    """
    with keep_random_state():
        if isinstance(data.stream, ShardStream):
            batch, indices = data.stream.first(count)
        else:
            chosen = spread_out(data.training, count)
            dataset = open_dataset(chosen, flags[data.size_flag], **_kind_of_pixels(flags))
            images, cond, indices = load_all(dataset)
            batch = images, cond
        return (*data.stream.transform(batch), indices)
