"""Turn the published npz batches of the downsampled ImageNet 64x64 into a folder of PNGs.

The data set is that of "A Downsampled Variant of ImageNet" (arXiv 1707.08819). The file names are
``<label>_<batch>_<index>.png`` with the published label, 0001 to 1000, so that several calls, one
for each part of the download, can write into the same folder.
"""

from __future__ import annotations

import argparse
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from _common import run, write_images
from PIL import Image

from improved_diffusion.errors import UserError

SIZE = 64
NUM_CLASSES = 1000
UNREADABLE = (  # what numpy.load raises for a file that is no npz, incomplete or holds pickles
    *(OSError, EOFError, ValueError, TypeError, KeyError),
    *(zipfile.BadZipFile, zlib.error, NotImplementedError),
)


def main(argv: Sequence[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    batches = [Path(batch) for batch in args.batches]
    check_names(batches)
    total = sum(len(read_labels(batch)) for batch in batches)
    write_images(Path(args.out_dir), named_images(batches), total=total)


def check_names(batches: Sequence[Path]) -> None:
    """:raises UserError: two batches have the same name, so that their images would, too."""
    seen: dict[str, Path] = {}
    for batch in batches:
        if batch.stem in seen:
            raise UserError(
                f"{seen[batch.stem]} and {batch}: the names of the batches become part of the "
                "images' names, so they must differ; rename one"
            )
        seen[batch.stem] = batch


def named_images(batches: Sequence[Path]) -> Iterator[tuple[str, Image.Image]]:
    """File names and pictures of the batches, one batch in memory at a time."""
    for batch in batches:
        labels = read_labels(batch)
        images = read_images(batch, len(labels))
        for index, (pixels, label) in enumerate(zip(images, labels, strict=True)):
            image = Image.fromarray(np.ascontiguousarray(pixels))  # [64, 64, 3]
            yield f"{label:04d}_{batch.stem}_{index:06d}.png", image


def read_labels(batch: Path) -> np.ndarray:
    """The labels of a batch as published: integers [N] in 1..1000."""
    labels = _read_array(batch, "labels")
    if (
        labels.ndim != 1
        or labels.dtype.kind not in "iu"
        or not ((labels >= 1) & (labels <= NUM_CLASSES)).all()
    ):
        raise UserError(
            f"{batch}: its labels must be integers [N] in 1..{NUM_CLASSES}, not {labels.dtype} "
            f"{list(labels.shape)} or other values; use the published npz files"
        )
    return labels


def read_images(batch: Path, count: int) -> np.ndarray:
    """The images of a batch, stored as red, green and blue planes: uint8 [count, 64, 64, 3]."""
    data = _read_array(batch, "data")
    expected = (count, 3 * SIZE * SIZE)
    if data.dtype != np.uint8 or data.shape != expected:
        raise UserError(
            f"{batch}: its data must be uint8 {list(expected)}, one row for each label, not "
            f"{data.dtype} {list(data.shape)}; use the published npz files for 64x64"
        )
    return data.reshape(-1, 3, SIZE, SIZE).transpose(0, 2, 3, 1)


def _read_array(batch: Path, key: str) -> np.ndarray:
    if not batch.is_file():
        raise UserError(f"{batch}: no such file; unpack the published zip and name its npz files")
    try:
        with np.load(batch, allow_pickle=False) as arrays:
            array = arrays[key]
    except UNREADABLE as error:
        raise UserError(
            f"{batch}: cannot read its array {key!r} ({error}); use the published npz files, and "
            "unpack or download this one again"
        ) from error
    return array


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Turn the npz batches of the downsampled ImageNet into a folder of images.",
    )
    parser.add_argument("out_dir", help="folder for the images; made where it does not exist")
    parser.add_argument(
        "batches",
        nargs="+",
        help="the npz files: train_data_batch_1.npz and so on, or val_data.npz",
    )
    return parser


if __name__ == "__main__":
    run(main)
