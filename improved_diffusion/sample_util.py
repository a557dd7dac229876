"""Many samples from one model: seeded by index, shared among processes, written as files."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from . import dist_util
from .errors import UserError
from .files import open_whole, write_file
from .flags import option, require, require_at_least
from .gaussian_diffusion import GaussianDiffusion, Model
from .pixels import PIL_MODES, ValueRange
from .rng import derive_seed, sample_generators

GRID_SAMPLES = 100  # at most, in grid.png
GRID_CELL = 48  # pixels: smaller images are enlarged by a whole factor
GRID_GAP = 2  # pixels between images
GRID_GREY = 96  # level of the gap


@dataclass(frozen=True)
class SampleOptions:
    """How many samples to draw, and how."""

    clip_denoised: bool = option(True, "clamp each estimate of the image to the range of images")
    num_samples: int = option(10000, "how many images to make")
    batch_size: int = option(16, "images at a time and process; does not change the images")
    use_ddim: bool = option(False, "sample by DDIM rather than DDPM")
    model_path: str = option("", "checkpoint; its flags are read from the folder it lies in")
    eta: float = option(0.0, "with --use_ddim: randomness from 0, none, to 1, like DDPM")
    classes: str = option(
        "", "classes to make in turn: numbers or names such as '3,7', or 'all'; '': at random"
    )
    save_png: bool = option(
        False,
        "also write each image as a PNG file; with --value_range as 16-bit grey PNG or .npy",
    )

    def __post_init__(self) -> None:
        require_at_least(1, self, ["num_samples", "batch_size"])
        require(0 <= self.eta <= 1, "eta", self.eta, "in [0, 1]")
        if self.eta and not self.use_ddim:
            raise UserError(f"--eta {self.eta} needs --use_ddim True: DDPM has no eta")


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
            names = f" or {', '.join(class_names[:5])}, ..." if class_names else ""
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


def draw_samples(
    model: Model,
    diffusion: GaussianDiffusion,
    indices: Sequence[int],
    image_shape: Sequence[int],
    options: SampleOptions,
    seed: int,
    model_kwargs: dict[str, Any],
) -> Tensor:
    """Draw the samples of the given indices by DDPM or DDIM.

    :param image_shape: (C, H, W).
    :param model_kwargs: for the model, with N = len(indices) rows each.
    :return: float32 [N, C, H, W], mostly in [-1, 1].
    """
    arguments: dict[str, Any] = {
        "clip_denoised": options.clip_denoised,
        "model_kwargs": model_kwargs,
        "device": dist_util.dev(),
        "generator": sample_generators(seed, indices),
    }
    shape = (len(indices), *image_shape)
    if options.use_ddim:
        return diffusion.ddim_sample_loop(model, shape, eta=options.eta, **arguments)
    return diffusion.p_sample_loop(model, shape, **arguments)


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


def collect_samples(
    make: Callable[[list[int]], tuple[Tensor, Tensor | None]],
    num_samples: int,
    batch_size: int,
    progress: bool = True,
) -> tuple[np.ndarray, np.ndarray | None] | None:
    """Make samples on all processes and bring them together, with a progress bar.

    :param make: from global indices to uint8 [N, H, W, C] images (or other rows [N, ...]) and
        int64 [N] labels or None. Indices may reach past ``num_samples``; those are dropped.
    :param batch_size: the most samples that one call makes.
    :param progress: show the bar.
    :return: on the first process uint8 [num_samples, H, W, C] and int64 [num_samples] or None,
        in the order of the indices; None on other processes.
    """
    from tqdm.auto import tqdm

    images: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    hidden = not progress or dist_util.get_rank() != 0
    with tqdm(total=num_samples, unit="image", disable=hidden) as bar:
        for shares in _rounds(num_samples, batch_size, dist_util.get_world_size()):
            made, classes = make(shares[dist_util.get_rank()])
            images.append(_gather(made))
            if classes is not None:
                labels.append(_gather(classes.to(made.device)))
            done = min(num_samples, bar.n + sum(map(len, shares)))
            bar.update(done - bar.n)
    if dist_util.get_rank() != 0:
        return None
    together = np.concatenate(images)[:num_samples]
    return together, np.concatenate(labels)[:num_samples] if labels else None


def _rounds(num_samples: int, batch_size: int, world_size: int) -> Iterator[list[list[int]]]:
    """Split indices into rounds, and rounds into equal shares, one for each process.

    The shares of the last round may reach past ``num_samples``, to be equal.
    """
    start = 0
    while start < num_samples:
        size = min(batch_size, math.ceil((num_samples - start) / world_size))
        starts = range(start, start + size * world_size, size)
        yield [list(range(first, first + size)) for first in starts]
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
