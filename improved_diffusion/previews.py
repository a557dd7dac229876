"""A few samples from the same noise each time, and how their colours compare with the data's.

DDIM: arXiv 2010.02502.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from . import dist_util
from .gaussian_diffusion import GaussianDiffusion
from .rng import sample_generators
from .sample_util import GRID_GREY, collect_samples, grid, to_uint8
from .validation import evaluating

PREVIEW_GAP = 20  # pixels between the two grids of a picture
STANDARD_ERRORS = 4.0  # a difference from the data below this many may be chance
LEAST_DRIFT = 0.05  # of the range -1 ... 1: six grey levels. Smaller differences are nobody's worry
WORDS = {
    "mean": ("are too bright", "are too dark"),
    "std": ("have too much contrast", "have too little contrast"),
}
NAMES = {"mean": "mean", "std": "standard deviation"}


class Previews:
    """Samples by DDIM, deterministic but for their noise, which depends on their index alone.

    The pictures are the same whatever the run's seed and the number of processes, up to rounding.

    :param diffusion: a process that is respaced to few steps, such as 50.
    :param image_shape: (C, H, W).
    :param cond: arguments of the model, such as class labels "y", [num, ...] each.
    :param reference: float [M, C, H, W] images of the data in [-1, 1], to compare with.
    :param num: number of pictures; by default as many as ``cond`` has rows.
    :param batch_size: the most pictures that a process draws at a time.
    :raises ValueError: if the number of pictures is not told or ``cond`` contradicts itself, or
        the reference is not of the pictures' channels.
    """

    def __init__(
        self,
        diffusion: GaussianDiffusion,
        image_shape: Sequence[int],
        cond: dict[str, Tensor],
        reference: Tensor,
        num: int | None = None,
        batch_size: int = 16,
    ) -> None:
        rows = {len(value) for value in cond.values()} | ({num} if num is not None else set())
        if len(rows) != 1 or min(rows) < 1:
            raise ValueError(
                f"previews need one number of pictures, at least 1, not {sorted(rows)}"
            )
        if reference.ndim != 4 or not len(reference) or reference.shape[1] != image_shape[0]:
            raise ValueError(
                f"reference of shape {list(reference.shape)}: must be [M, {image_shape[0]}, H, W]"
            )
        self.diffusion = diffusion
        self.image_shape = tuple(image_shape)
        self.cond = cond
        self.num = rows.pop()
        self.batch_size = batch_size
        reference = reference.cpu()  # where the pictures are gathered
        self.data = statistics(reference)
        spread = _per_image(reference, self.data["mean"])
        # with one image there is no spread to be seen
        self._spread = {
            name: values.std(dim=0, correction=int(len(reference) > 1))
            for name, values in spread.items()
        }
        self._num_reference = len(reference)

    @torch.no_grad()
    def draw(self, model: nn.Module) -> Tensor | None:
        """Draw the pictures; every process must call this, and draws its share.

        :param model: see :class:`.GaussianDiffusion`; in evaluation mode for the time being.
        :return: float32 [num, C, H, W] on the CPU of the first process; None on the others.
        """
        device = dist_util.dev()

        def make(indices: list[int]) -> tuple[Tensor, None]:
            rows = [i % self.num for i in indices]  # what reaches past the last is dropped
            samples = self.diffusion.ddim_sample_loop(
                model,
                (len(indices), *self.image_shape),
                clip_denoised=True,
                model_kwargs={key: value[rows].to(device) for key, value in self.cond.items()},
                device=device,
                generator=sample_generators(0, indices, "preview"),
            )
            return samples, None

        with evaluating(model):
            result = collect_samples(make, self.num, self.batch_size, progress=False)
        return None if result is None else torch.from_numpy(result[0])

    def drift(self, samples: Tensor, weights: str = "the averaged weights") -> list[str]:
        """What in the channels of samples is further from the data than chance explains.

        The standard error of a channel's mean is that of the mean of N pictures, by the spread
        of the means of single images of the data; and that of the M images themselves. The
        variance likewise is a mean over images, of their squared distance from the data's mean.

        :param samples: float [N, C, H, W], mostly in [-1, 1].
        :param weights: what they were drawn with, for the text.
        :return: a line for each mean or standard deviation that is off; empty if none is.
        """
        found = statistics(samples)
        relative = (1 / len(samples) + 1 / self._num_reference) ** 0.5
        error = {name: spread * relative for name, spread in self._spread.items()}
        error["std"] = error["std"] / (2 * self.data["std"].clamp(min=LEAST_DRIFT))  # d sqrt(v)
        lines = []
        for name in WORDS:
            allowed = (STANDARD_ERRORS * error[name]).clamp(min=LEAST_DRIFT)
            fine = (found[name] - self.data[name]).abs() <= allowed  # False for NaN
            for channel in (~fine).nonzero().flatten().tolist():
                value, data = found[name][channel].item(), self.data[name][channel].item()
                lines.append(
                    f"previews of {weights} {_how(name, value, data)} in channel {channel}: "
                    f"{NAMES[name]} {value:.2f}, data {data:.2f}"
                )
        return lines


def _how(name: str, value: float, data: float) -> str:
    return WORDS[name][int(value < data)] if math.isfinite(value) else "are not finite"


def statistics(images: Tensor) -> dict[str, Tensor]:
    """Mean and standard deviation of each channel over all images and pixels.

    :param images: float [N, C, H, W] in [-1, 1], or uint8 [N, H, W, C] as of :func:`.to_uint8`.
    :return: "mean" and "std", float64 [C], in units of [-1, 1].
    """
    if images.dtype == torch.uint8:
        images = images.permute(0, 3, 1, 2) / 127.5 - 1
    values = images.double().transpose(0, 1).flatten(1)  # [C, N H W]
    return {"mean": values.mean(dim=1), "std": values.std(dim=1, correction=0)}


def _per_image(images: Tensor, center: Tensor) -> dict[str, Tensor]:
    """What is averaged over images, [N, C] each: for "std" the squares round ``center`` [C]."""
    values = images.double().flatten(2)  # [N, C, H W]
    squares = (values - center[:, None]).square()
    return {"mean": values.mean(dim=2), "std": squares.mean(dim=2)}


def picture(raw: Tensor, averaged: Tensor) -> np.ndarray:
    """Two grids side by side: samples of the raw weights, samples of the averaged ones.

    :param raw: float [N, C, H, W] in [-1, 1], 1 to 4 channels.
    :param averaged: alike.
    :return: uint8 [H', W', C].
    """
    left, right = (grid(to_uint8(samples).numpy()) for samples in (raw, averaged))
    gap = np.full((len(left), PREVIEW_GAP, left.shape[2]), GRID_GREY, dtype=np.uint8)
    return np.concatenate([left, gap, right], axis=1)
