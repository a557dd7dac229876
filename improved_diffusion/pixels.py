"""Pictures as arrays: reading a file, bringing it to one size, and to [-1, 1].

Two kinds of data come through here. Pictures have 8 bits and 1 to 4 channels, and are converted to
the channels that are wanted. Data with a *value range* LOW, HIGH keep the type, the values and the
channels that their files hold: 16-bit PNG, TIFF, arrays of NumPy.
"""

from __future__ import annotations

import argparse
import functools
import io
import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import dist_util
from .errors import UserError
from .flags import ImageSize, height_width

log = logging.getLogger(__name__)

PIL_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
ValueRange = tuple[float, float]
CHECKED_FILES = 8  # at most, before a run begins


# -- reading ----------------------------------------------------------------------------------


def read_image(
    path: str,
    resolution: ImageSize,
    channels: int = 3,
    *,
    value_range: ValueRange | None = None,
    crop: np.random.Generator | None = None,
    like: str | tuple[str, int] | None = None,
) -> np.ndarray:
    """Read a file, resize it so that it covers the target, and cut out the centre.

    Halves with a box filter while twice the target fits, then goes to its exact size with a
    bicubic one. Colours are converted after resizing.

    :param path: any file that blobfile reads.
    :param resolution: H = W, or (H, W).
    :param channels: 1, 2, 3 or 4; any number with a value range.
    :param value_range: LOW, HIGH of data that is more than an 8-bit picture; it is read as it is.
    :param crop: cut out a random place instead, of an image whose short side is longer than the
        target's by a random factor of up to 1 / 0.8; see :func:`_random_cover`.
    :param like: another file of the data, for the error about a file whose channels differ; or
        its name and channels.
    :return: [H, W, C]: uint8; with a value range uint16 for integers without sign of up to 16
        bits, float32 for all others.
    :raises ValueError: naming the file, if it is no image, or does not fit the range or the
        channels.
    """
    return decode_image(
        _read_bytes(path), path, resolution, channels, value_range=value_range, crop=crop, like=like
    )


def _read_bytes(path: str) -> bytes:
    import blobfile as bf

    try:
        with bf.BlobFile(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise _unreadable(path, error) from None


def decode_image(
    data: bytes,
    name: str,
    resolution: ImageSize,
    channels: int = 3,
    *,
    value_range: ValueRange | None = None,
    crop: np.random.Generator | None = None,
    like: str | tuple[str, int] | None = None,
) -> np.ndarray:
    """The same as :func:`read_image` for the contents of a file.

    :param data: the contents.
    :param name: of the file, for errors; its extension tells arrays and TIFF from pictures.
    """
    if value_range is not None:
        values = _own_values(data, name, channels, value_range, like)
        return _fit_values(values, resolution, crop)
    image = _open_picture(data, name)
    if image.mode.startswith(("I", "F")):
        _warn_of_depth(image.mode)
    size = height_width(resolution)
    image = _cover(image, _random_cover(size, crop) if crop else size)
    pixels = np.array(image.convert(PIL_MODES[channels])).reshape(image.height, image.width, -1)
    return _cut(pixels, size, crop)


def _open_picture(data: bytes, name: str) -> Any:
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _unreadable(name, error) from None
    return image


def _unreadable(name: str, error: Exception) -> UserError:
    from PIL import UnidentifiedImageError

    reason = (str(error).splitlines() or [type(error).__name__])[0]
    if isinstance(error, UnidentifiedImageError):
        reason = "no format that Pillow knows"
    return UserError(f"'{name}' cannot be read as an image: {reason}")


@functools.lru_cache  # once in each process
def _warn_of_depth(mode: str) -> None:
    log.warning(
        f"images of more than 8 bits (Pillow's mode {mode}) are clipped to 8 bits, most of them to "
        "white: give their --value_range, such as 0,65535, or convert them first"
    )


# -- size -------------------------------------------------------------------------------------


def _random_cover(size: tuple[int, int], crop: np.random.Generator) -> tuple[int, int]:
    """A height and width to cover, of which the target is 80 to 100 %, as classifiers train."""
    short = min(size)
    covered = int(crop.integers(short, short * 5 // 4, endpoint=True))
    height, width = (-(-side * covered // short) for side in size)  # rounded up
    return height, width


def _cover(image: Any, size: tuple[int, int]) -> Any:
    """Resize a Pillow image so that it just covers height and width."""
    from PIL import Image

    height, width = size
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    return image.resize(
        (round(image.width * scale), round(image.height * scale)),
        resample=Image.Resampling.BICUBIC,
    )


def _cut(pixels: np.ndarray, size: tuple[int, int], crop: np.random.Generator | None) -> np.ndarray:
    """Cut the centre, or a random place, out of [H', W', C]."""
    height, width = size
    down, across = pixels.shape[0] - height, pixels.shape[1] - width
    top, left = down // 2, across // 2
    if crop:
        top, left = (int(crop.integers(room, endpoint=True)) for room in (down, across))
    return pixels[top : top + height, left : left + width]


def _fit_values(
    values: np.ndarray, resolution: ImageSize, crop: np.random.Generator | None
) -> np.ndarray:
    """Resize and cut [H', W', C] values, channel by channel in float32.

    What the bicubic filter adds beyond a channel's own minimum and maximum is clipped. An image
    of the target size already comes out as it is.
    """
    from PIL import Image

    size = height_width(resolution)
    cover = _random_cover(size, crop) if crop else size
    planes = []
    for plane in np.moveaxis(values, -1, 0):
        low, high = plane.min(), plane.max()
        image = Image.fromarray(np.ascontiguousarray(plane, dtype=np.float32))
        planes.append(np.clip(np.array(_cover(image, cover)), low, high))
    resized = np.stack(planes, axis=-1)
    if values.dtype == np.uint16:
        resized = resized.round().astype(np.uint16)
    return _cut(resized, size, crop)


# -- values -----------------------------------------------------------------------------------


def decode_values(data: bytes, name: str) -> np.ndarray:
    """The values that a file holds, in its own type and channels.

    :param data: the contents of the file.
    :param name: of the file, for errors; its extension tells arrays and TIFF from pictures.
    :return: [H, W, C]: uint16 for integers without sign of up to 16 bits, float32 for others.
    :raises ValueError: naming the file, if it cannot be read, or holds NaN or infinities.
    """
    extension = name.rsplit(".", 1)[-1].lower()
    try:
        if extension == "npy":
            values = np.load(io.BytesIO(data), allow_pickle=False)
        elif extension in ("tif", "tiff"):
            values = _decode_tiff(data, name)
        else:
            values = _decode_picture(data, name)
    except UserError:
        raise
    except Exception as error:  # whatever damaged files make the decoders raise
        raise _unreadable(name, error) from None
    if values.ndim == 2:
        values = values[..., None]
    if values.ndim != 3 or not values.size or values.dtype.kind not in "buif":
        raise UserError(
            f"'{name}' holds {values.dtype} {list(values.shape)}: must be numbers [H, W] or "
            "[H, W, C]"
        )
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise UserError(f"'{name}' holds NaN or infinite values: fill them, or leave the file out")
    whole = values.dtype.kind in "bu" and values.dtype.itemsize <= 2
    return values.astype(np.uint16 if whole else np.float32)


def _decode_picture(data: bytes, name: str) -> np.ndarray:
    if _is_deep_colour_png(data):
        return _extra("imagecodecs", name, "16-bit colour PNG").png_decode(data)
    image = _open_picture(data, name)
    if image.mode == "P":  # an index into colours is no value
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    pixels = np.array(image)
    if image.format == "PNG" and image.mode == "I":  # older Pillow's way to hold 16 bits
        pixels = pixels.astype(np.uint16)
    return pixels


def _is_deep_colour_png(data: bytes) -> bool:
    """Whether a PNG has 16 bits and several channels: Pillow would cut them to 8 bits."""
    is_png = data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR"
    return is_png and data[24] == 16 and data[25] != 0  # bit depth, colour type (0: grey)


def _decode_tiff(data: bytes, name: str) -> np.ndarray:
    """All channels and pages of a TIFF file, [H, W, C]."""
    tifffile = _extra("tifffile", name, "TIFF")
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        if len(file.series) != 1:
            raise UserError(
                f"'{name}' holds {len(file.series)} images of different kinds: must be one, of any "
                "number of channels or pages"
            )
        series = file.series[0]
        try:
            values, axes = series.asarray(), series.axes
        except ValueError as error:
            if "imagecodecs" in str(error):
                _extra("imagecodecs", name, "this compression of TIFF")
            raise
    rows, columns = axes.index("Y"), axes.index("X")
    values = np.moveaxis(values, (rows, columns), (0, 1))
    return values.reshape(*values.shape[:2], -1)


def check_values(values: np.ndarray, name: str, value_range: ValueRange) -> None:
    """Refuse values beyond the range; float32 ones may differ from it by rounding.

    :raises ValueError: naming the file, its minimum and maximum, and the flag.
    """
    low, high = float(values.min()), float(values.max())
    if low < np.float32(value_range[0]) or high > np.float32(value_range[1]):
        raise UserError(
            f"'{name}' holds values from {low:.9g} to {high:.9g}, beyond --value_range "
            f"{range_text(value_range)}: give the range of all the data"
        )


def check_files(paths: Sequence[str], channels: int, value_range: ValueRange) -> None:
    """Check a few files, evenly spaced, before anything begins. The first process does, for all.

    Every file is checked again when it is read.

    :param paths: all files of the data.
    :raises ValueError: on every process, naming the files, if they do not fit the channels or the
        range.
    """

    def check() -> None:
        for path in paths[:: -(-len(paths) // CHECKED_FILES)]:
            _own_values(_read_bytes(path), path, channels, value_range, like=paths[0])

    dist_util.on_first_rank(check)


def _own_values(
    data: bytes,
    name: str,
    channels: int,
    value_range: ValueRange,
    like: str | tuple[str, int] | None,
) -> np.ndarray:
    """The values of a file, of which range and channels are checked."""
    values = decode_values(data, name)
    if values.shape[2] != channels:
        raise _wrong_channels(name, values.shape[2], like)
    check_values(values, name, value_range)
    return values


def _extra(library: str, name: str, what: str) -> Any:
    """A library of the extra that reads scientific files."""
    try:
        if library == "tifffile":
            import tifffile

            return tifffile
        import imagecodecs

        return imagecodecs
    except ImportError:
        raise UserError(
            f"'{name}': {what} needs {library}: pip install 'improved-diffusion[scientific]'"
        ) from None


def _wrong_channels(path: str, found: int, like: str | tuple[str, int] | None) -> UserError:
    """The error about a file with other channels than wanted: is it the file, or the flag?"""
    if isinstance(like, str) and like != path:
        like = like, decode_values(_read_bytes(like), like).shape[2]
    if isinstance(like, tuple) and like[1] != found:
        return UserError(
            f"'{path}' has {found} channel{'s' * (found > 1)}, but '{like[0]}' has {like[1]}: all "
            "files must have the same"
        )
    return UserError(f"'{path}' has {found} channel{'s' * (found > 1)}: give --channels {found}")


# -- range ------------------------------------------------------------------------------------


def parse_value_range(text: str) -> ValueRange | None:
    """Read ``--value_range``.

    :param text: "LOW,HIGH", or "" for 8-bit pictures.
    :return: (LOW, HIGH), or None.
    :raises ValueError: naming the flag, for anything else.
    """
    if not text:
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        low, high = math.inf, math.inf
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(
            f"--value_range {text}: must be two numbers LOW,HIGH with LOW below HIGH, such as "
            "0,65535"
        )
    return low, high


def range_text(value_range: ValueRange) -> str:
    """A value range as it is written on the command line."""
    return ",".join(
        str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
        for value in map(float, value_range)
    )


def value_range_flag(text: str) -> str:
    """The text of ``--value_range`` in one spelling, so that two runs' can be compared.

    :raises argparse.ArgumentTypeError: for anything but "" and LOW,HIGH.
    """
    try:
        value_range = parse_value_range(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return range_text(value_range) if value_range else ""


def normalize(pixels: Tensor, value_range: ValueRange | None = None) -> Tensor:
    """Map pixels to [-1, 1], on the device where they are.

    :param pixels: [N, H, W, C] as :func:`read_image` returns them.
    :param value_range: what becomes -1 and 1; None for 0 and 255.
    :return: float32 [N, C, H, W] in [-1, 1].
    """
    values = pixels.permute(0, 3, 1, 2).to(torch.float32).contiguous()
    if value_range is None:
        # a divisor on the device: by a number, CUDA would multiply with its reciprocal, which
        # rounds differently
        return values / torch.tensor(127.5, device=values.device) - 1
    low, high = value_range
    return ((values - low) / (high - low) * 2 - 1).clamp(-1, 1)
