"""What an edit leaves: a file for each picture, and a grid with the given ones beside them."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from . import dist_util, logger
from .editing import psnr
from .editing_options import EditOptions
from .editing_pictures import Pictures
from .editing_tasks import Given
from .errors import UserError
from .files import write_file
from .pixels import PIL_MODES, ValueRange
from .same_job import as_stored, differences
from .sample_util import GRID_SAMPLES, grid, png

FLAGS = "image_edit.json"
WITHOUT_EFFECT = ("log_dir", "batch_size", "compile")  # beyond rounding
FOLDER = "edited"  # of the pictures, in the run folder
HOLE = (214, 96, 77)  # how the grid shows what a mask hides: no grey, which might be a picture's


def check_folder(log_dir: str, given: Given, flags: Mapping[str, Any]) -> None:
    """Refuse to write where the given pictures lie, or the results of another edit.

    :param log_dir: the run folder.
    :param flags: of the script; the same ones may be run again.
    :raises ValueError: on every process, naming the first picture that lies among the results, or
        the flags that differ.
    """
    dist_util.on_first_rank(lambda: _check_results(log_dir, flags))
    folder = os.path.realpath(os.path.join(log_dir, FOLDER))
    for path in [*given.pictures.paths, *(given.others.paths if given.others else [])]:
        if "://" not in path and os.path.realpath(path).startswith(folder + os.sep):
            raise UserError(
                f"'{path}' lies where results are written, {folder}: give another --log_dir"
            )


def _check_results(log_dir: str, flags: Mapping[str, Any]) -> None:
    """Refuse a folder of results that were made with other flags."""
    folder = os.path.join(log_dir, FOLDER)
    if not (os.path.isdir(folder) and os.listdir(folder)):
        return
    stored: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError), open(os.path.join(log_dir, FLAGS)) as file:
        stored = json.load(file)
    names = [name for name in as_stored(flags) if name not in WITHOUT_EFFECT]
    sides = [{n: side.get(n) for n in names} for side in (stored, as_stored(flags))]
    theirs, ours = differences(*sides)
    if theirs:
        raise UserError(
            f"{folder} holds pictures made with {theirs}, not {ours}: name another --log_dir, or "
            f"delete {folder}"
        )


def write_results(log_dir: str, options: EditOptions, given: Given, samples: np.ndarray) -> None:
    """Write what was made, as values of the kind that the files given hold; and a grid.

    What a mask keeps is the given picture's own, value by value.

    :param log_dir: the run folder.
    :param samples: the rows of :meth:`.Editor.make`, [R, C, H, W] or [R, K, C, H, W].
    """
    pictures = given.pictures
    values = pictures.stored(samples)
    results = values.reshape(len(pictures), -1, *values.shape[-3:])  # [N, V or K, H, W, C]
    if given.masks is not None:
        results = np.where(given.masks[:, None, ..., None], results, pictures.pixels[:, None])
    for i, made in enumerate(results):
        name = pictures.names[i]
        if given.others is not None:
            name += f"-{os.path.basename(given.others.names[i])}"
        for k, pixels in enumerate(made):
            suffix = f"_{k:03d}" if len(made) > 1 else ""
            write_picture(os.path.join(log_dir, FOLDER), f"{name}{suffix}", pixels)
    if results.shape[-1] in PIL_MODES:
        write_file(os.path.join(log_dir, "grid.png"), edit_grid(given, results))
    if options.task == "reconstruct":
        tell_psnr(pictures, results[:, 0])
    count = results.shape[0] * results.shape[1]
    logger.log(f"editing complete: {count} pictures in {os.path.join(log_dir, FOLDER)}")


def tell_psnr(pictures: Pictures, results: np.ndarray) -> None:
    """Log how near the results [N, H, W, C] are to the pictures, each and in the mean."""
    low, high = pictures.limits
    pairs = [torch.from_numpy(side.astype(np.float64)) for side in (pictures.pixels, results)]
    ratios = psnr(pairs[0], pairs[1], peak=high - low)
    for name, ratio in zip(pictures.names, ratios.tolist(), strict=True):
        logger.log(f"{name}: PSNR {ratio:.2f} dB")
    logger.log(f"mean PSNR {ratios.mean():.2f} dB of {len(ratios)} pictures")


def write_picture(folder: str, name: str, pixels: np.ndarray) -> str:
    """Write a picture as PNG, of 8 or 16 bits, or as .npy if PNG cannot hold it.

    :param name: without extension; may begin with folders.
    :param pixels: [H, W, C]: uint8, uint16 or float32.
    :return: the path.
    """
    kinds = {"uint8": PIL_MODES, "uint16": {1: "I;16"}}
    is_png = pixels.shape[-1] in kinds.get(pixels.dtype.name, {})
    path = os.path.join(folder, f"{name}.{'png' if is_png else 'npy'}")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if is_png:
        write_file(path, png(pixels))
    else:
        buffer = io.BytesIO()
        np.save(buffer, pixels)
        write_file(path, buffer.getvalue())
    return path


def edit_grid(given: Given, results: np.ndarray) -> bytes:
    """A PNG file with a row for each picture: it, its mask, what was made, and the other end.

    As many rows as fit are shown, and of a row what fits.

    :param results: [N, V, H, W, C] with one to four channels.
    """
    pictures = given.pictures
    shown = [as_colours(pictures.pixels, pictures.limits)[:, None]]  # [N, 1, H, W, 3] each
    if given.masks is not None:
        shown.append(np.where(given.masks[:, None, ..., None], np.array(HOLE, np.uint8), shown[0]))
    shown.append(as_colours(results, pictures.limits))
    if given.others is not None:
        shown.append(as_colours(given.others.pixels, pictures.limits)[:, None])
    cells = np.concatenate(shown, axis=1)[:, :GRID_SAMPLES]
    columns = cells.shape[1]
    cells = cells[: GRID_SAMPLES // columns]
    return png(grid(cells.reshape(-1, *cells.shape[2:]), columns))


def as_colours(pixels: np.ndarray, limits: ValueRange) -> np.ndarray:
    """An 8-bit colour view of pictures of one to four channels.

    :param pixels: [..., H, W, C].
    :param limits: the values that are shown black and white.
    :return: uint8 [..., H, W, 3]; alpha is left out.
    """
    low, high = limits
    levels = (pixels.astype(np.float64) - low) / (high - low) * 255
    channels = [0, 0, 0] if pixels.shape[-1] < 3 else [0, 1, 2]
    return levels.clip(0, 255).astype(np.uint8)[..., channels]
