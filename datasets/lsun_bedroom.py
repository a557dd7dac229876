"""Turn an LSUN lmdb database, such as ``bedroom_train_lmdb``, into a folder of square PNGs.

Each image is cropped to the square in its centre, halved by a box filter while it is at least
twice as large as wanted, and brought to its size by bicubic interpolation.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from _common import missing_extra, run, write_images
from PIL import Image, UnidentifiedImageError

from improved_diffusion.errors import UserError


def main(argv: Sequence[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    check_flags(args.image_size, args.prefix, args.max_images)
    total = count_images(args.lmdb_path)
    if args.max_images is not None:
        total = min(total, args.max_images)
    images = read_images(args.lmdb_path, args.image_size, total)
    named = ((f"{args.prefix}_{index:07d}.png", image) for index, image in enumerate(images))
    write_images(Path(args.out_dir), named, total=total)


def check_flags(image_size: int, prefix: str, max_images: int | None) -> None:
    """:raises UserError: a flag cannot work."""
    if image_size < 1:
        raise UserError(f"--image_size {image_size}: must be at least 1 pixel")
    if not prefix or prefix.startswith(".") or any(sign in prefix for sign in "_/\\"):
        raise UserError(
            f"--prefix {prefix!r}: it names the class, so it must not be empty, begin with a dot "
            "or hold _ / or \\; use letters, digits and -"
        )
    if max_images is not None and max_images < 1:
        raise UserError(f"--max_images {max_images}: must be at least 1; without it, all are read")


def open_lmdb(path: str) -> Any:
    """Open a database, a folder or a single file, for reading.

    :raises UserError: lmdb is not installed, or the path is no database.
    """
    try:
        import lmdb
    except ModuleNotFoundError:
        raise missing_extra("lmdb", "lsun") from None
    folder = Path(path).is_dir()
    try:
        return lmdb.open(path, subdir=folder, readonly=True, lock=False, readahead=False)
    except lmdb.Error as error:
        raise UserError(
            f"{path}: cannot be opened as an lmdb database ({error}); give the folder that holds "
            "data.mdb, unpacked from the published zip"
        ) from error


def count_images(lmdb_path: str) -> int:
    """The number of records in a database."""
    with open_lmdb(lmdb_path) as database:
        return int(database.stat()["entries"])


def read_images(
    lmdb_path: str, image_size: int, max_images: int | None = None
) -> Iterator[Image.Image]:
    """Decode and resize the records of a database, in the order of their keys.

    :param max_images: stop after so many; None: read all.
    :return: RGB images of image_size x image_size.
    :raises UserError: a record is not an image; the error names it.
    """
    with open_lmdb(lmdb_path) as database, database.begin() as transaction:
        for index, (key, value) in enumerate(islice(transaction.cursor(), max_images)):
            try:
                image = decode(value)
            except ValueError as error:
                raise UserError(
                    f"{lmdb_path}: record {index}, key {key.decode(errors='replace')!r}, {error}; "
                    "get the database anew, or stop before this record with --max_images"
                ) from error
            yield resize_square(image, image_size)


def decode(value: bytes) -> Image.Image:
    """Decode a webp, JPEG or other image to RGB.

    :raises ValueError: the bytes are no complete image.
    """
    try:
        return Image.open(io.BytesIO(value)).convert("RGB")
    except UnidentifiedImageError:
        raise ValueError("is in no image format that Pillow knows") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"is a damaged image ({error})") from error


def resize_square(image: Image.Image, size: int) -> Image.Image:
    """Crop an image to the square in its centre and bring it to size x size pixels."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    while side >= 2 * size:  # a box filter uses every pixel, so that nothing aliases
        side //= 2
        image = image.resize((side, side), Image.Resampling.BOX)
    return image.resize((size, size), Image.Resampling.BICUBIC)


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Turn an LSUN lmdb database into a folder of square images.",
    )
    parser.add_argument("lmdb_path", help="the database: a folder such as bedroom_train_lmdb")
    parser.add_argument("out_dir", help="folder for the images; made where it does not exist")
    parser.add_argument(
        "--image_size",
        "--image-size",
        type=int,
        default=256,
        help="width and height of the images in pixels (default: %(default)s)",
    )
    parser.add_argument(
        "--prefix",
        default="bedroom",
        help="class name with which the file names begin (default: %(default)s)",
    )
    parser.add_argument(
        "--max_images", type=int, help="stop after so many images (default: all of them)"
    )
    return parser


if __name__ == "__main__":
    run(main)
