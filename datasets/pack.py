"""Turn a folder of images into a packed data set: the final pixels in a few files to be mapped.

The pixels are those that training on the folder would see, to the bit. `--data_dir` takes the
packed set in place of the folder.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence

import blobfile as bf
import numpy as np
from _common import run
from tqdm import tqdm

from improved_diffusion.errors import UserError
from improved_diffusion.flags import image_size
from improved_diffusion.image_datasets import (
    LABEL_SOURCES,
    ImageList,
    list_images,
    load_pixels,
    open_dataset,
)
from improved_diffusion.packed import open_packed, write_packed
from improved_diffusion.pixels import check_files, parse_value_range

BATCH = 64  # images that a worker hands over at a time


def main(argv: Sequence[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    if args.check:
        check(args.folder)
    else:
        pack(args)


def check(folder: str) -> None:
    """Compare all checksums of a packed set.

    :raises UserError: naming the file, if one is missing or damaged.
    """
    if not os.path.isdir(folder):
        raise UserError(f"'{folder}' is no folder")
    index = open_packed(folder, thorough=True).index
    total = sum(entry["bytes"] for entry in index.files.values())
    print(f"{folder}: {index.num_images:,} images, {total:,} bytes: all checksums are right")


def pack(args: argparse.Namespace) -> None:
    """Read all images of a folder and write them as a packed set."""
    if args.out is None or args.image_size is None:
        missing = "OUT" if args.out is None else "--image_size"
        raise UserError(f"{missing} is missing: pack.py FOLDER OUT --image_size 64")
    if args.num_workers < 0:
        raise UserError(f"--num_workers {args.num_workers}: must be at least 0")
    if not bf.isdir(args.folder):
        raise UserError(f"'{args.folder}' is no folder")
    value_range = parse_value_range(args.value_range)
    images = list_images(args.folder, True, args.labels_from, "folder", value_range)
    if images.packed is not None:
        raise UserError(f"'{args.folder}' is a packed set already: name the folder of images")
    if value_range is not None:
        check_files(images.paths, args.channels, value_range)
    dataset = open_dataset(images, args.image_size, channels=args.channels, value_range=value_range)
    labelled = has_classes(images)
    batch_size = BATCH if value_range is None else 1  # a batch of several types would become one
    packed = write_packed(
        args.out,
        with_progress(load_pixels(dataset, batch_size, args.num_workers), len(dataset)),
        [os.path.relpath(path, args.folder) for path in images.paths],
        root=os.path.basename(args.folder.rstrip("/")),
        labels=images.classes if labelled else None,
        class_names=images.class_names,
        labels_from=args.labels_from,
        value_range=value_range,
    )
    classes = f" of {len(images.class_names)} classes" if labelled else ", without classes"
    print(f"packed {len(dataset)} images{classes} in {packed.folder}")


def has_classes(images: ImageList) -> bool:
    """Whether the names tell classes: not if each image would be one of its own."""
    return not len(images.class_names) == len(images.paths) > 1


def with_progress(batches: Iterator[np.ndarray], total: int) -> Iterator[np.ndarray]:
    """The batches [n, H, W, C], with a progress bar on stderr."""
    with tqdm(total=total, desc="pack", unit="image", file=sys.stderr) as bar:
        for batch in batches:
            bar.update(len(batch))
            yield batch


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Turn a folder of images into a packed data set for --data_dir.",
    )
    parser.add_argument("folder", help="folder of images, as --data_dir takes it")
    parser.add_argument("out", nargs="?", help="folder for the packed set, new or empty")
    parser.add_argument(
        "--image_size",
        "--image-size",
        type=image_size,
        help="size of the images: 64, or HxW: 48x64",
    )
    parser.add_argument(
        "--channels",
        type=int,
        default=3,
        help="1 grey, 3 RGB, 4 RGB and alpha; with --value_range any number (default: %(default)s)",
    )
    parser.add_argument(
        "--labels_from",
        choices=LABEL_SOURCES,
        default="filename",
        help="a class is the name of a file up to the first _, or the folder it lies in "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--value_range",
        default="",
        help="LOW,HIGH of data that is more than 8-bit pictures, as in training",
    )
    parser.add_argument(
        "--num_workers",
        type=int,
        default=1,
        help="processes that read images (default: %(default)s)",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare all checksums of the packed set FOLDER instead",
    )
    return parser


if __name__ == "__main__":
    run(main)
