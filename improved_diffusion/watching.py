"""What a training run shows on the way: preview pictures, and losses on images held out."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from . import dist_util, logger
from .errors import UserError
from .files import write_file
from .flags import option, require, require_at_least
from .pixels import PIL_MODES
from .previews import Previews, picture, statistics
from .sample_util import png
from .validation import Validation

MOST_WARNINGS = 4  # lines per preview


@dataclass(frozen=True)
class WatchOptions:
    """What to look at during training, and how often."""

    sample_interval: int = option(0, "steps between preview grids; 0: none")
    val_data_dir: str = option("", "folder of images to measure the loss on; see also val_fraction")
    val_fraction: float = option(
        0.0, "share of --data_dir held out from training, to measure the loss on; 0: none"
    )
    val_interval: int = option(1000, "steps between measurements on the validation images")
    val_images: int = option(256, "at most so many of the validation images are measured")

    def __post_init__(self) -> None:
        require_at_least(0, self, ["sample_interval"])
        require_at_least(1, self, ["val_interval", "val_images"])
        require(0 <= self.val_fraction < 1, "val_fraction", self.val_fraction, "in [0, 1)")
        if self.val_data_dir and self.val_fraction:
            raise UserError(
                f"--val_data_dir {self.val_data_dir} and --val_fraction {self.val_fraction}: "
                "validation images come from a folder of their own or from --data_dir, not both"
            )


class Watched(Protocol):
    """What a watcher needs of :class:`.TrainLoop`."""

    @property
    def model(self) -> nn.Module:
        """The network with the weights as trained."""

    @property
    def global_step(self) -> int:
        """The number of the step, counted over all sittings of the run."""

    def averaged_model(self) -> AbstractContextManager[nn.Module]:
        """The network with the first EMA's weights inside a ``with`` block."""


class ValidationWatcher:
    """Logs ``val_loss``, ``val_bpd``, ... and, of the averaged weights, ``val_ema_loss``, ...

    :param validation: the images and how to measure.
    :param interval: steps between measurements, for the loop.
    """

    def __init__(self, validation: Validation, interval: int) -> None:
        self.validation = validation
        self.interval = interval

    def __call__(self, loop: Watched) -> None:
        """Measure; every process must call this at the same step."""
        with keep_random_state():
            raw = self.validation.measure(loop.model)
            with loop.averaged_model() as model:
                averaged = self.validation.measure(model)
        logger.logkvs({f"val_{name}": value for name, value in raw.items()})
        logger.logkvs({f"val_ema_{name}": value for name, value in averaged.items()})


class PreviewWatcher:
    """Draws previews; writes the picture, logs the channels' statistics, warns of drift.

    The picture ``preview_NNNNNN.png`` in the run folder has the raw weights' samples on the left
    and the averaged weights' on the right; there is none for more than 4 channels.

    :param previews: what to draw.
    :param interval: steps between previews, for the loop.
    """

    def __init__(self, previews: Previews, interval: int) -> None:
        self.previews = previews
        self.interval = interval

    def __call__(self, loop: Watched) -> None:
        """Draw; every process must call this at the same step, the first writes."""
        with keep_random_state():
            raw = self.previews.draw(loop.model)
            with loop.averaged_model() as model:
                averaged = self.previews.draw(model)
        if raw is None or averaged is None:  # not on the first process
            return
        if raw.shape[1] in PIL_MODES:
            self._show(picture(raw, averaged), loop.global_step)
        _log_statistics("preview", raw)
        _log_statistics("preview_ema", averaged)
        self._warn(raw, averaged)

    def _show(self, pixels: np.ndarray, step: int) -> None:
        path = os.path.join(logger.get_dir() or ".", f"preview_{step:06d}.png")
        write_file(path, png(pixels))
        logger.logimage("preview", pixels, step)

    def _warn(self, raw: Tensor, averaged: Tensor) -> None:
        """Warn of the averaged weights, which samples are made with; else of the raw ones."""
        raw_lines = self.previews.drift(raw, "the raw weights")
        averaged_lines = self.previews.drift(averaged)
        lines = averaged_lines or raw_lines
        for line in lines[:MOST_WARNINGS]:
            logger.warn(line)
        if len(lines) > MOST_WARNINGS:
            logger.warn(f"and {len(lines) - MOST_WARNINGS} more like these")
        if averaged_lines and not raw_lines:
            logger.warn(
                "those of the raw weights are like the data: the average may still hold initial "
                "weights, see --ema_rate"
            )


def _log_statistics(prefix: str, samples: Tensor) -> None:
    for name, values in statistics(samples).items():
        for channel, value in enumerate(values.tolist()):
            logger.logkv(f"{prefix}_{name}_c{channel}", value)


@contextlib.contextmanager
def keep_random_state() -> Iterator[None]:
    """Put torch's and NumPy's global generators back after a ``with`` block.

    Training must not depend on watching; starting a pass of a DataLoader draws from torch's.
    """
    numpy_state = np.random.get_state()
    device = dist_util.dev()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        np.random.set_state(numpy_state)
