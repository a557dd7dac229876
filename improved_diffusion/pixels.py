"""Pictures as arrays: reading a file, bringing it to one size."""

from __future__ import annotations

import functools
import logging

import numpy as np

from .errors import UserError
from .flags import ImageSize, height_width

log = logging.getLogger(__name__)

PIL_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def read_image(path: str, resolution: ImageSize, channels: int = 3) -> np.ndarray:
    """Read a file, resize it so that it covers the target, and cut out the centre.

    Halves with a box filter while twice the target fits, then goes to its exact size with a
    bicubic one. Colours are converted after resizing.

    :param path: any file that blobfile reads.
    :param resolution: H = W, or (H, W).
    :param channels: 1, 2, 3 or 4.
    :return: uint8 [H, W, C].
    :raises ValueError: naming the file, if it is no image.
    """
    import blobfile as bf
    from PIL import Image, UnidentifiedImageError

    height, width = height_width(resolution)
    try:
        with bf.BlobFile(path, "rb") as file:
            image: Image.Image = Image.open(file)
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, UnidentifiedImageError):
            reason = "no format that Pillow knows"
        raise UserError(f"'{path}' cannot be read as an image: {reason}") from None
    if image.mode.startswith(("I", "F")):
        _warn_of_depth(image.mode)
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    image = image.resize(
        (round(image.width * scale), round(image.height * scale)),
        resample=Image.Resampling.BICUBIC,
    )
    pixels = np.array(image.convert(PIL_MODES[channels])).reshape(image.height, image.width, -1)
    top, left = (image.height - height) // 2, (image.width - width) // 2
    return pixels[top : top + height, left : left + width]


@functools.lru_cache  # once in each process
def _warn_of_depth(mode: str) -> None:
    log.warning(
        f"images of more than 8 bits (Pillow's mode {mode}) are clipped to 8 bits, most of them to "
        "white: convert them first"
    )
