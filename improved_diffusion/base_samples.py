"""The small images that super-resolution starts from: an npz file, a folder or one picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .errors import UserError
from .flags import ImageSize, height_width, size_text
from .image_datasets import list_images, load_all, open_dataset
from .pixels import ValueRange, check_values, normalize, range_text, read_image


@dataclass(frozen=True)
class BaseSamples:
    """``images`` are float32 [N, C, h, w] in [-1, 1]; ``labels`` int64 [N], or None."""

    images: Tensor
    labels: Tensor | None = None


def load_base_samples(
    path: str,
    small_size: ImageSize,
    channels: int,
    *,
    want_labels: bool = False,
    class_names: Sequence[str] = (),
    num_classes: int = 0,
    value_range: ValueRange | None = None,
) -> BaseSamples:
    """Read the images to upsample.

    :param path: an npz file with uint8 [N, h, w, C] under ``arr_0`` and labels under ``arr_1``; or
        a folder of images; or one image. Pictures are resized to ``small_size``.
    :param small_size: the size that the model was trained to upsample.
    :param want_labels: whether the model needs them.
    :param class_names: of the model by index, to read a folder's labels from the file names.
    :param num_classes: of the model; 0 accepts any label.
    :param value_range: of the data; with one, the npz file may hold integers or floats in it, and
        a folder what :func:`.read_image` reads.
    :raises ValueError: naming the file and both values, if size, channels or labels do not fit.
    """
    import blobfile as bf

    if path.endswith(".npz"):
        return _from_npz(path, small_size, channels, want_labels, num_classes, value_range)
    if bf.isdir(path):
        found = list_images(
            path, class_cond=want_labels, flag="base_samples", value_range=value_range
        )
        dataset = open_dataset(
            found, small_size, channels=channels, value_range=value_range, size_flag="small_size"
        )
        labels = _known_labels(path, found.classes, found.class_names, class_names)
        return BaseSamples(load_all(dataset)[0], labels)
    if not bf.exists(path):
        raise UserError(f"--base_samples '{path}' does not exist")
    if want_labels:
        raise UserError(f"--base_samples '{path}' is one picture: give its class by --classes")
    picture = read_image(path, small_size, channels, value_range=value_range)
    return BaseSamples(normalize(torch.from_numpy(picture[None]), value_range))


def _from_npz(
    path: str,
    small_size: ImageSize,
    channels: int,
    want_labels: bool,
    num_classes: int,
    value_range: ValueRange | None,
) -> BaseSamples:
    import blobfile as bf

    if not bf.exists(path):
        raise UserError(f"--base_samples '{path}' does not exist")
    try:
        with bf.BlobFile(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
            pixels = arrays["arr_0"]
            labels = arrays.get("arr_1")
    except Exception:  # whatever a damaged archive makes zipfile or NumPy raise
        raise UserError(f"--base_samples '{path}' is damaged, or holds no arr_0") from None
    images = _checked_images(pixels, path, small_size, channels, value_range)
    if not want_labels:
        return BaseSamples(images)
    if labels is None:
        raise UserError(
            f"--base_samples '{path}' has no labels (arr_1), which the class-conditional model "
            "needs: give them by --classes"
        )
    if labels.shape != (len(pixels),):
        raise UserError(
            f"--base_samples '{path}' holds {len(pixels)} images, but labels {list(labels.shape)}"
        )
    if labels.min() < 0 or (num_classes and labels.max() >= num_classes):
        raise UserError(
            f"--base_samples '{path}' holds labels from {labels.min()} to {labels.max()}, but the "
            f"model has {num_classes} classes"
        )
    return BaseSamples(images, torch.from_numpy(labels.astype(np.int64)))


def _checked_images(
    pixels: np.ndarray,
    path: str,
    small_size: ImageSize,
    channels: int,
    value_range: ValueRange | None,
) -> Tensor:
    """The array of an npz file as images for the model, float32 [N, C, h, w]."""
    expected = (*height_width(small_size), channels)
    if value_range is None:
        fits, wanted = pixels.dtype == np.uint8, "uint8"
    else:
        fits, wanted = pixels.dtype.kind in "uif", f"values of {range_text(value_range)}"
    if not fits or pixels.ndim != 4 or pixels.shape[1:] != expected or not len(pixels):
        raise UserError(
            f"--base_samples '{path}' holds {pixels.dtype} {list(pixels.shape)}, but the model "
            f"upsamples {wanted} [N, {', '.join(map(str, expected))}] (--small_size "
            f"{size_text(small_size)}, --channels {channels})"
        )
    if value_range is not None:
        pixels = pixels.astype(np.float32)
        if not np.isfinite(pixels).all():
            raise UserError(f"--base_samples '{path}' holds NaN or infinite values")
        check_values(pixels, path, value_range)
    return normalize(torch.from_numpy(pixels), value_range)


def _known_labels(
    path: str,
    classes: Sequence[int] | None,
    found: Sequence[str],
    class_names: Sequence[str],
) -> Tensor | None:
    """Labels of a folder's images by the model's class names."""
    if classes is None:
        return None
    names = list(class_names) or list(found)
    unknown = sorted(set(found) - set(names))
    if unknown:
        raise UserError(
            f"--base_samples '{path}' has classes that the model does not know: "
            f"{', '.join(unknown[:5])}; give the classes by --classes"
        )
    return torch.tensor([names.index(found[index]) for index in classes])
