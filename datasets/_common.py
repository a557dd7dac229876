"""What the data set scripts share: writing images, and one line for a user's mistake.

The scripts run as files (``python datasets/digits.py ...``), so they import this module plainly.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from improved_diffusion.errors import UserError


def run(main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> None:
    """Run a script's ``main``; a user's mistake becomes one line on stderr and exit code 2."""
    try:
        main(argv)
    except (UserError, OSError) as error:
        line = " ".join(str(error).split())
        print(f"{Path(sys.argv[0]).name}: error: {line}", file=sys.stderr)
        sys.exit(2)


def missing_extra(module: str, extra: str) -> UserError:
    """The error for an optional dependency that is not installed."""
    return UserError(
        f'{module} is not installed; install it with: pip install "improved-diffusion[{extra}]" '
        f"(in a checkout of the repository: pip install '.[{extra}]')"
    )


def write_png(path: Path, image: Image.Image) -> None:
    """Write a PNG that exists under its name only when it is complete."""
    part = path.with_name(f".{path.name}.part")  # the image loader skips names that begin with "."
    try:
        image.save(part, format="PNG")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_images(folder: Path, images: Iterable[tuple[str, Image.Image]], total: int) -> None:
    """Write images into a folder, with a progress bar on stderr and a closing line on stdout.

    Files of the same name are replaced; others stay, and a line on stderr says how many.

    :param images: pairs of file name and image; a name's part before the first ``_`` is its class.
    :param total: how many images there are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    with tqdm(images, total=total, desc=folder.name, unit="image", file=sys.stderr) as bar:
        for name, image in bar:
            write_png(folder / name, image)
            count += 1
    others = sum(not entry.name.startswith(".") for entry in os.scandir(folder)) - count
    if others > 0:
        print(f"note: {folder} also holds {others} files that were there before", file=sys.stderr)
    print(f"wrote {count} images to {folder.resolve()}")
