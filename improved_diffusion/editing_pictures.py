"""The pictures and masks of an edit, read and checked."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import dist_util, packed
from .errors import UserError
from .flags import ImageSize, height_width, size_text
from .image_datasets import list_images
from .pixels import PIL_MODES, ValueRange, decode_image, decode_values, normalize

log = logging.getLogger(__name__)

WHITE = 128  # the least level of a mask that is made anew


@dataclass(frozen=True)
class Pictures:
    """Pictures of one size.

    ``pixels`` are [N, H, W, C], see :func:`.read_image`; ``names`` are the paths inside the folder
    without their extensions; ``sizes`` are the heights and widths of the files.
    """

    paths: list[str]
    names: list[str]
    pixels: np.ndarray
    sizes: list[tuple[int, int]]
    value_range: ValueRange | None = None

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def limits(self) -> ValueRange:
        """The values that are -1 and 1 to the model."""
        return self.value_range or (0, 255)

    def images(self) -> Tensor:
        """For the model, float32 [N, C, H, W] in [-1, 1]."""
        return normalize(torch.from_numpy(self.pixels), self.value_range)

    def stored(self, samples: np.ndarray) -> np.ndarray:
        """Samples as values of the kind that the files hold.

        :param samples: [..., C, H, W], mostly in [-1, 1].
        :return: [..., H, W, C] of the type of ``pixels``, rounded if it is one of integers.
        """
        low, high = self.limits
        values = ((samples.astype(np.float64) + 1) / 2 * (high - low) + low).clip(low, high)
        values = np.moveaxis(values, -3, -1)
        whole = self.pixels.dtype.kind == "u"
        return (values.round() if whole else values).astype(self.pixels.dtype)


# -- reading --------------------------------------------------------------------------------------


def load_pictures(
    path: str,
    size: ImageSize,
    channels: int,
    value_range: ValueRange | None = None,
    flag: str = "image",
) -> Pictures:
    """Read one picture, or those below a folder in the order of their names.

    A picture of another size is resized and cut as in training, which a line of the log tells. The
    first process reads, for all.

    :param size: that of the model.
    :param channels: likewise.
    :param value_range: of the data; None for 8-bit pictures.
    :param flag: what named the path, for the errors.
    :raises ValueError: on every process, naming the flag or the file, if there is no such path, or
        a file is no picture or does not fit the channels or the range.
    """
    import blobfile as bf

    if channels not in PIL_MODES and value_range is None:
        raise UserError(f"--channels {channels}: picture files have 1, 2, 3 or 4")
    if not path:
        raise UserError(f"--{flag} is missing: name a picture, or a folder of them")
    paths, root = [path], bf.dirname(path)
    if dist_util.on_first_rank(lambda: bf.isdir(path)):
        if dist_util.on_first_rank(lambda: packed.is_packed(path)):
            raise UserError(f"--{flag} '{path}' is a packed set: name the folder of its pictures")
        paths, root = list_images(path, flag=flag, value_range=value_range).paths, path

    def read() -> tuple[np.ndarray, list[tuple[int, int]]]:
        found = [
            _read(one, size, channels, value_range, flag, like=paths[0] if value_range else None)
            for one in paths
        ]
        return np.stack([pixels for pixels, _ in found]), [shape for _, shape in found]

    pixels, sizes = dist_util.on_first_rank(read)
    names = [os.path.splitext(os.path.relpath(one, root or "."))[0] for one in paths]
    _check_names(paths, names, flag)
    pictures = Pictures(paths, names, pixels, sizes, value_range)
    _tell_resized(pictures, size)
    return pictures


def _read(
    path: str,
    size: ImageSize,
    channels: int,
    value_range: ValueRange | None,
    flag: str,
    like: str | None = None,
) -> tuple[np.ndarray, tuple[int, int]]:
    """A file's pixels [H, W, C] at the model's size; and its own height and width."""
    import blobfile as bf

    if not bf.exists(path):
        raise UserError(f"--{flag} '{path}' does not exist")
    with bf.BlobFile(path, "rb") as file:
        data = file.read()
    pixels = decode_image(data, path, size, channels, value_range=value_range, like=like)
    if value_range is not None:
        height, width = decode_values(data, path).shape[:2]
        return pixels, (height, width)
    from PIL import Image

    width, height = Image.open(io.BytesIO(data)).size
    return pixels, (height, width)


def _check_names(paths: Sequence[str], names: Sequence[str], flag: str) -> None:
    """Refuse pictures that would be written to the same file."""
    seen: dict[str, str] = {}
    for path, name in zip(paths, names, strict=True):
        if name in seen:
            raise UserError(
                f"--{flag}: '{seen[name]}' and '{path}' differ in their extensions alone, so that "
                "their results would have the same name: rename one"
            )
        seen[name] = path


def _tell_resized(pictures: Pictures, size: ImageSize) -> None:
    wanted = height_width(size)
    others = [i for i, found in enumerate(pictures.sizes) if found != wanted]
    if others:
        first = others[0]
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        log.warning(
            f"'{pictures.paths[first]}' ({size_text(pictures.sizes[first])}){more}: resized and "
            f"cut to the model's {size_text(size)}, as in training"
        )


def load_masks(path: str, pictures: Pictures) -> np.ndarray:
    """Read the mask of each picture; see :func:`load_pictures` for who reads.

    :param path: one picture for all, or a folder that holds one of the name of each. White, 128 of
        255 or more, is what is to be made anew. It goes through the same resizing as its picture.
    :return: bool [N, H, W], True where to make anew.
    :raises ValueError: on every process, naming the file, if it is no picture, has another size
        than its picture, or hides nothing.
    """
    import blobfile as bf

    if not path:
        raise UserError(
            "--mask is missing: name a picture, as large as --image, that is white where to make "
            "anew"
        )

    def read() -> np.ndarray:
        paths = [path] * len(pictures)
        if bf.isdir(path):
            found = list_images(path, flag="mask").paths
            of_name = {os.path.splitext(os.path.relpath(one, path))[0]: one for one in found}
            for name in pictures.names:
                if name not in of_name:
                    raise UserError(f"--mask '{path}' holds no mask for the picture '{name}'")
            paths = [of_name[name] for name in pictures.names]
        return np.stack([_read_mask(one, pictures, i) for i, one in enumerate(paths)])

    masks = dist_util.on_first_rank(read)
    if masks.all():
        log.warning(f"--mask '{path}' is white all over: nothing of the pictures is kept")
    return masks


def _read_mask(path: str, pictures: Pictures, index: int) -> np.ndarray:
    """The mask of a picture, bool [H, W]."""
    height, width = pictures.pixels.shape[1:3]
    levels, found = _read(path, (height, width), 1, None, "mask")
    wanted = pictures.sizes[index]
    if found != wanted:
        raise UserError(
            f"--mask '{path}' is {found[0]}x{found[1]}, but '{pictures.paths[index]}' is "
            f"{wanted[0]}x{wanted[1]}: make them of one size"
        )
    mask = levels[..., 0] >= WHITE
    if not mask.any():
        raise UserError(
            f"--mask '{path}' hides nothing: its largest level is {levels.max()} of 255, and white "
            f"({WHITE} or more, transparent or not) is what is made anew"
        )
    return mask
