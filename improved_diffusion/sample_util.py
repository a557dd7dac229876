"""Many samples: their classes, their sharing among processes, the files they end in."""

from __future__ import annotations

import io
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from . import dist_util
from .errors import UserError
from .files import open_whole, write_file
from .pixels import PIL_MODES, ValueRange
from .rng import derive_seed
from .sample_parts import SampleParts

log = logging.getLogger(__name__)

GRID_SAMPLES = 100  # at most, in grid.png
GRID_CELL = 48  # pixels: smaller images are enlarged by a whole factor
GRID_GAP = 2  # pixels between images
GRID_GREY = 96  # level of the gap


def check_png(save_png: bool, channels: int, value_range: ValueRange | None = None) -> None:
    """Check before sampling that what is asked for can be written.

    :param value_range: of the data; with one, what PNG cannot hold is written as .npy.
    :raises ValueError: if PNG files are wanted of images that PNG cannot hold.
    """
    if save_png and channels not in PIL_MODES and value_range is None:
        raise UserError(f"--save_png True: PNG holds 1 to 4 channels, not {channels}")


def parse_classes(text: str, num_classes: int | None, class_names: Sequence[str]) -> list[int]:
    """Read ``--classes``.

    :param text: "", "all", or numbers and names separated by commas.
    :param num_classes: of the model; None for an unconditional one.
    :param class_names: names by class index, if they are known.
    :return: the classes to go through in turn; empty for random ones.
    :raises ValueError: naming the classes there are, for an unknown one; or if the model has none.
    """
    if not text:
        return []
    if num_classes is None:
        raise UserError(f"--classes {text}: this model is not class-conditional")
    if text == "all":
        return list(range(num_classes))
    classes = []
    for part in [part.strip() for part in text.split(",")]:
        index = int(part) if part.isdecimal() else -1
        if part in class_names:  # a name wins over a number: classes may be named by numbers
            index = list(class_names).index(part)
        if not 0 <= index < num_classes:
            more = ", ..." if len(class_names) > 5 else ""
            names = f" or {', '.join(class_names[:5])}{more}" if class_names else ""
            raise UserError(
                f"--classes {part or text}: choose among 0 ... {num_classes - 1}{names}"
            )
        classes.append(index)
    return classes


def class_labels(
    indices: Sequence[int], classes: Sequence[int], num_classes: int, seed: int
) -> Tensor:
    """The class of each sample, which depends on its index and the seed alone.

    :param indices: global indices of the samples.
    :param classes: classes to go through in turn; empty for uniformly random ones.
    :return: int64 [N].
    """
    if classes:
        return torch.tensor([classes[i % len(classes)] for i in indices])
    draws = [np.random.default_rng(derive_seed(seed, "class", i)) for i in indices]
    return torch.tensor([int(draw.integers(num_classes)) for draw in draws])


def to_uint8(samples: Tensor) -> Tensor:
    """[N, C, H, W] in [-1, 1] as uint8 [N, H, W, C], truncated as ever rather than rounded."""
    levels = ((samples + 1) * 127.5).clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous()


def to_values(samples: Tensor, value_range: ValueRange | None) -> Tensor:
    """Samples as values of the data; see :func:`store_type` for their type in a file.

    :param samples: float [N, C, H, W], mostly in [-1, 1].
    :param value_range: of the data; None for pictures, see :func:`to_uint8`.
    :return: [N, H, W, C]: uint8, or with a value range float32 in it, rounded if whole numbers
        are stored.
    """
    if value_range is None:
        return to_uint8(samples)
    low, high = value_range
    values = ((samples.float() + 1) / 2 * (high - low) + low).clamp(low, high)
    if store_type(value_range) == np.uint16:
        values = values.round()
    return values.permute(0, 2, 3, 1).contiguous()


def store_type(value_range: ValueRange | None) -> np.dtype:
    """The type of samples in files.

    :return: uint8 without a value range; uint16 if LOW and HIGH are whole numbers from 0 to 65535;
        else float32.
    """
    if value_range is None:
        return np.dtype(np.uint8)
    whole = all(value.is_integer() and 0 <= value <= 65535 for value in map(float, value_range))
    return np.dtype(np.uint16 if whole else np.float32)


class _Rows:
    """Images and labels by index, in arrays that are made when the first come."""

    def __init__(self, num_samples: int) -> None:
        self.missing = np.ones(num_samples, dtype=bool)
        self.images: np.ndarray | None = None
        self.labels: np.ndarray | None = None

    def put(self, start: int, images: np.ndarray, labels: np.ndarray | None) -> None:
        """Take the rows of the indices from ``start`` on."""
        total = len(self.missing)
        if self.images is None:
            self.images = np.empty((total, *images.shape[1:]), images.dtype)
            self.labels = None if labels is None else np.empty(total, labels.dtype)
        rows = slice(start, start + len(images))
        self.images[rows] = images
        if labels is not None and self.labels is not None:
            self.labels[rows] = labels
        self.missing[rows] = False

    def gaps(self) -> list[tuple[int, int]]:
        """The runs of missing indices, [start, stop) each."""
        edges = np.flatnonzero(np.diff(self.missing, prepend=False, append=False)).tolist()
        return list(zip(edges[::2], edges[1::2], strict=True))


def collect_samples(
    make: Callable[[list[int]], tuple[Tensor, Tensor | None]],
    num_samples: int,
    batch_size: int,
    progress: bool = True,
    parts: SampleParts | None = None,
) -> tuple[np.ndarray, np.ndarray | None] | None:
    """Make samples on all processes and bring them together, with a progress bar.

    :param make: from global indices to uint8 [N, H, W, C] images (or other rows [N, ...]) and
        int64 [N] labels or None. Indices may reach past those that are missing; those are dropped.
    :param batch_size: the most samples that one call makes.
    :param progress: show the bar.
    :param parts: samples made before, which are not made again; what each round adds goes there.
    :return: on the first process uint8 [num_samples, H, W, C] and int64 [num_samples] or None,
        in the order of the indices; None on other processes.
    """
    from tqdm.auto import tqdm

    rows = _Rows(num_samples)
    gaps = rows.gaps()
    if parts is not None:
        gaps = dist_util.on_first_rank(lambda: _recall(parts, rows))
    first = dist_util.get_rank() == 0
    there = num_samples - sum(stop - start for start, stop in gaps)
    hidden = not progress or not first
    with tqdm(total=num_samples, initial=there, unit="image", disable=hidden) as bar:
        for stop, shares in _rounds(gaps, batch_size, dist_util.get_world_size()):
            made, classes = make(shares[dist_util.get_rank()])
            start = shares[0][0]
            images = _gather(made)[: stop - start]
            labels = None if classes is None else _gather(classes.to(made.device))[: stop - start]
            if first:
                rows.put(start, images, labels)
                if parts is not None:
                    parts.write(start, images, labels)
            bar.update(len(images))
    if not first:
        return None
    assert rows.images is not None
    return rows.images, rows.labels


def _recall(parts: SampleParts, rows: _Rows) -> list[tuple[int, int]]:
    """Take the samples that are there, and say how many; the runs of indices that are not."""
    for start, images, labels in parts.read(len(rows.missing)):
        rows.put(start, images, labels)
    there = len(rows.missing) - int(rows.missing.sum())
    if there:
        log.info(f"going on: {there} of {len(rows.missing)} samples are in {parts.folder}")
    return rows.gaps()


def _rounds(
    gaps: Sequence[tuple[int, int]], batch_size: int, world_size: int
) -> Iterator[tuple[int, list[list[int]]]]:
    """Split runs of indices into rounds, and rounds into equal shares, one for each process.

    :return: of each round the end of its run, which the shares of the last round of a run may
        reach past, to be equal; and the shares.
    """
    for start, stop in gaps:
        while start < stop:
            size = min(batch_size, math.ceil((stop - start) / world_size))
            starts = range(start, start + size * world_size, size)
            yield stop, [list(range(first, first + size)) for first in starts]
            start += size * world_size


def _gather(rows: Tensor) -> np.ndarray:
    """The rows of all processes on the first, in the order of their ranks; none on the others."""
    if dist_util.get_world_size() == 1:
        return rows.cpu().numpy()
    gathered = None
    if dist_util.get_rank() == 0:
        gathered = [torch.empty_like(rows) for _ in range(dist_util.get_world_size())]
    dist.gather(rows.contiguous(), gathered)
    return torch.cat(gathered or [rows[:0]]).cpu().numpy()


# -- files ------------------------------------------------------------------------------------


def write_samples(
    folder: str,
    images: np.ndarray,
    labels: np.ndarray | None,
    *,
    classes: Sequence[int] = (),
    class_names: Sequence[str] = (),
    save_png: bool = False,
    value_range: ValueRange | None = None,
) -> str:
    """Write samples as an npz file, a grid and, if asked, one PNG each.

    :param images: uint8 [N, H, W, C]; with a value range as :func:`to_values` makes them.
    :param labels: int64 [N], or None.
    :param classes: the classes that the samples go through in turn, one column of the grid each.
    :param class_names: names by class index, for the names of the PNG files.
    :param save_png: also write ``png/INDEX_CLASS.png``; see :func:`check_png`. With a value range
        these have 16 bits; of more than one channel, or of float32, ``npy/INDEX_CLASS.npy``.
    :param value_range: of the data; the grid shows it as 8 bits.
    :return: the path of ``samples_NxHxWxC.npz``: ``arr_0`` holds the images in the type of
        :func:`store_type`, ``arr_1`` the labels.
    """
    check_png(save_png, images.shape[-1], value_range)
    if value_range is not None:
        images = images.astype(store_type(value_range), copy=False)
    path = os.path.join(folder, f"samples_{'x'.join(map(str, images.shape))}.npz")
    with open_whole(path) as file:
        np.savez(file, images, *([] if labels is None else [labels]))
    if images.shape[-1] in PIL_MODES:
        columns = len(classes) if 2 <= len(classes) <= 20 else 0
        shown = _as_picture(images[:GRID_SAMPLES], value_range)
        write_file(os.path.join(folder, "grid.png"), png(grid(shown, columns)))
    if save_png:
        _write_singly(folder, images, labels, class_names)
    return path


def _as_picture(images: np.ndarray, value_range: ValueRange | None) -> np.ndarray:
    """An 8-bit view of the range, uint8 [N, H, W, C]."""
    if value_range is None:
        return images
    low, high = value_range
    return ((images.astype(np.float64) - low) / (high - low) * 255).clip(0, 255).astype(np.uint8)


def grid(images: np.ndarray, columns: int = 0) -> np.ndarray:
    """Images side by side, row by row, with a gap round each.

    :param images: uint8 [N, H, W, C]; the first 100 are shown.
    :param columns: images in a row; 0 for a square.
    :return: uint8 [rows (H' + 2) + 2, columns (W' + 2) + 2, C]; the larger of H' and W' is at
        least 48, by a whole factor.
    """
    shown = images[:GRID_SAMPLES]
    factor = max(1, math.ceil(GRID_CELL / max(shown.shape[1:3])))
    shown = shown.repeat(factor, axis=1).repeat(factor, axis=2)
    count, height, width, channels = shown.shape
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    rows = math.ceil(count / columns)
    down, across = height + GRID_GAP, width + GRID_GAP
    picture = np.full(
        (rows * down + GRID_GAP, columns * across + GRID_GAP, channels), GRID_GREY, dtype=np.uint8
    )
    for i, image in enumerate(shown):
        top, left = i // columns * down + GRID_GAP, i % columns * across + GRID_GAP
        picture[top : top + height, left : left + width] = image
    return picture


def png(pixels: np.ndarray) -> bytes:
    """A PNG file of uint8 [H, W, C] with 1 to 4 channels, or of uint16 [H, W, 1]."""
    from PIL import Image

    buffer = io.BytesIO()
    single = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    Image.fromarray(single).save(buffer, format="PNG")
    return buffer.getvalue()


def _write_singly(
    folder: str, images: np.ndarray, labels: np.ndarray | None, class_names: Sequence[str]
) -> None:
    """One file for each image, of the simplest kind that holds it whole."""
    kind = "png" if images.dtype == np.uint8 or _is_deep_grey(images) else "npy"
    os.makedirs(os.path.join(folder, kind), exist_ok=True)
    for i, image in enumerate(images):
        name = f"{i:06d}"
        if labels is not None:
            label = int(labels[i])
            name += f"_{class_names[label] if label < len(class_names) else label}"
        with open(os.path.join(folder, kind, f"{name}.{kind}"), "wb") as file:
            if kind == "png":
                file.write(png(image))
            else:
                np.save(file, image)


def _is_deep_grey(images: np.ndarray) -> bool:
    return images.dtype == np.uint16 and images.shape[-1] == 1
