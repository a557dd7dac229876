"""Write scikit-learn's 1,797 handwritten digits as a folder of grey 8-bit PNGs.

Nothing is downloaded: the 8x8 pictures come with scikit-learn. The file names are
``<digit>_<index>.png``, so that the loader takes the digit as the class.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from _common import missing_extra, run, write_images
from PIL import Image

from improved_diffusion.errors import UserError

MAX_LEVEL = 16  # the pictures have the grey levels 0..16


def main(argv: Sequence[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    if args.size < 1:
        raise UserError(f"--size {args.size}: must be at least 1 pixel; the pictures have 8")
    images, labels = load_digits()
    write_images(Path(args.out_dir), named_images(images, labels, args.size), total=len(labels))


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """The digits as 8-bit pictures.

    :return: uint8 grey values [1797, 8, 8], 0 the empty paper, and int labels [1797] in 0..9.
    """
    try:
        from sklearn import datasets
    except ModuleNotFoundError:
        raise missing_extra("scikit-learn", "demo") from None
    levels, labels = datasets.load_digits(return_X_y=True)
    greys = np.round(levels * 255 / MAX_LEVEL).astype(np.uint8)
    return greys.reshape(-1, 8, 8), labels


def named_images(
    images: np.ndarray, labels: np.ndarray, size: int
) -> Iterator[tuple[str, Image.Image]]:
    """File names and pictures, resized by bicubic interpolation where ``size`` is not 8."""
    for index, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        image = Image.fromarray(pixels)
        if size != image.width:
            image = image.resize((size, size), Image.Resampling.BICUBIC)
        yield f"{label}_{index:04d}.png", image


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Write scikit-learn's handwritten digits as a folder of images.",
    )
    parser.add_argument("out_dir", help="folder for the images; made where it does not exist")
    parser.add_argument(
        "--size",
        type=int,
        default=8,
        help="width and height of the images in pixels; other than %(default)s, they are resized "
        "by bicubic interpolation (default: %(default)s)",
    )
    return parser


if __name__ == "__main__":
    run(main)
