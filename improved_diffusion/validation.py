"""Loss and bound on fixed images with fixed noise and timesteps, to compare runs point by point.

DDPM: arXiv 2006.11239.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import dist_util
from .errors import UserError
from .gaussian_diffusion import GaussianDiffusion
from .image_datasets import ImageList
from .likelihood import BOUND_STRATA as BOUND_STRATA
from .likelihood import bound_strata as bound_strata
from .likelihood import stratified_bound
from .objectives import Objective
from .rng import randn_like, sample_generators

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2  # its multiples modulo 1 spread any stretch of them evenly

Batches = Iterable[tuple[Tensor, dict[str, Tensor], list[int]]]


class Validation:
    """The training loss and the variational bound of the same images in the same way each time.

    A classifier's loss and accuracies likewise; there is no bound of it.

    Noise and timesteps depend on the index of an image and on the number of images; not on the
    run's seed, the batch size or the number of processes.

    *The loss* is taken at one timestep per image. The n timesteps are the midpoints of n equal
    parts of 0 ... T - 1, given out so that neighbouring images, which often show one class, lie
    far apart.

    *The bound*, DDPM eq. 5, is the prior's term + L_0 + the sum of L_t over t = 1 ... T - 1. The
    first two are evaluated for every image. The sum is estimated from one t of each of 8 strata
    times the stratum's width, which grows with t as the terms fall. The images take the timesteps
    of a stratum in turn, so that together they cover it. From the bound of the same images at
    every timestep, :func:`.estimate_bound`, this differs by the error of that quadrature (about
    0.01 bits/dim for 256 images of 8x8 and T = 1000, at a hundredth of the cost) and by the draw
    of the noise. For T <= 9 every timestep is used, and the noise alone differs.

    :param diffusion: gives the losses; and terms of the bound, if it is a diffusion process.
    :param batches: starts a pass over this process's share of the images; see
        :func:`.load_once`: (float [N, C, ...] in [-1, 1], arguments of the model [N, ...], indices
        of the images among those of all processes; none for a single image that does not count, as
        processes that share a model must compute equally often).
    :param num_images: n, of all processes together; indices are below it.
    :param terms: which of the training losses to measure.
    """

    def __init__(
        self,
        diffusion: Objective,
        batches: Callable[[], Batches],
        num_images: int,
        terms: Sequence[str] = ("loss",),
    ) -> None:
        if num_images < 1:
            raise ValueError(f"validation needs at least 1 image, not {num_images}")
        self.diffusion = diffusion
        self.batches = batches
        self.num_images = num_images
        self.terms = terms
        self.strata = bound_strata(diffusion.num_timesteps)
        # image -> its turn: a permutation of 0 ... n - 1
        self._turns = np.argsort(np.argsort(np.arange(num_images) * GOLDEN_RATIO % 1))

    @torch.no_grad()
    def measure(self, model: nn.Module) -> dict[str, float]:
        """Evaluate a model; every process must call this, and gets the result of all.

        :param model: see :class:`.GaussianDiffusion`; in evaluation mode for the time being.
        :return: "loss", its means "loss_q0" ... "loss_q3" over the quarters of the timesteps
            (without those that no image falls into), other terms likewise; and "bpd", the bound in
            bits/dim, of a diffusion process.
        """
        device = dist_util.dev()
        # float64: sums over many images. Sum and count: each term by quarter, then the bound
        sums = torch.zeros(4 * len(self.terms) + 1, 2, dtype=torch.float64, device=device)
        with evaluating(model):
            for images, cond, indices in self.batches():
                if len(images):
                    kwargs = {key: value.to(device) for key, value in cond.items()}
                    counted = sums if indices else torch.zeros_like(sums)
                    self._add(counted, model, images.to(device), kwargs, indices or [0])
        if dist_util.get_world_size() > 1:
            dist.all_reduce(sums)
        *rows, (bound, bounds) = sums.tolist()
        results = {}
        for i, term in enumerate(self.terms):
            quarters = rows[4 * i : 4 * i + 4]
            results[term] = sum(value for value, _ in quarters) / sum(n for _, n in quarters)
            parts = {f"{term}_q{q}": value / n for q, (value, n) in enumerate(quarters) if n}
            results.update(parts)
        return {**results, "bpd": bound / bounds} if bounds else results

    def _add(
        self,
        sums: Tensor,
        model: nn.Module,
        x_start: Tensor,
        model_kwargs: dict[str, Tensor],
        indices: list[int],
    ) -> None:
        """Add a batch [N, C, ...] of this process to the sums [4 K + 1, 2] of K terms, in place."""
        generators = sample_generators(0, indices, "validation")
        turns = torch.from_numpy(self._turns[indices]).to(x_start.device)  # [N]
        t = self._spread(turns, 0, self.diffusion.num_timesteps)
        noise = randn_like(x_start, generators)
        losses = self.diffusion.training_losses(
            model, x_start, t, model_kwargs=model_kwargs, noise=noise
        )
        for i, term in enumerate(self.terms):
            _add_rows(sums, 4 * i + 4 * t // self.diffusion.num_timesteps, losses[term])
        if not isinstance(self.diffusion, GaussianDiffusion):
            return
        # each stratum starts elsewhere: no image is early in all of them
        shifts = [i * self.num_images // len(self.strata) for i in range(len(self.strata))]
        timesteps = [
            self._spread((turns + shift) % self.num_images, *stratum)
            for shift, stratum in zip(shifts, self.strata, strict=True)
        ]
        bound = stratified_bound(
            model,
            self.diffusion,
            x_start,
            self.strata,
            timesteps,
            generators,
            model_kwargs=model_kwargs,
        )
        _add_rows(sums, torch.full_like(t, len(sums) - 1), bound)

    def _spread(self, turns: Tensor, first: int, stop: int) -> Tensor:
        """The midpoints of n equal parts of first ... stop - 1, by turn, [N]."""
        return first + (2 * turns + 1) * (stop - first) // (2 * self.num_images)


def _add_rows(sums: Tensor, rows: Tensor, values: Tensor) -> None:
    """Add values [N], and that each is one, to the given rows [N] of the sums, in place."""
    values = values.double()
    sums.index_add_(0, rows, torch.stack([values, torch.ones_like(values)], dim=1))


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside a ``with`` block; afterwards each module has the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


# -- which images -----------------------------------------------------------------------------


def hold_out(images: ImageList, fraction: float) -> tuple[ImageList, ImageList]:
    """Split off images for validation, the same ones whatever the seed.

    They lie evenly spaced in the sorted list, so that every class gives its share.

    :param fraction: share of the images to split off.
    :return: images for training, and for validation; both know all classes.
    :raises ValueError: if either would be empty.
    """
    total = len(images.paths)
    count = round(fraction * total)
    if not 0 < count < total:
        side = "training" if count else "validation"
        raise UserError(f"--val_fraction {fraction} of {total} images leaves none for {side}")
    held = spaced(total, count)
    return images.pick(sorted(set(range(total)) - set(held))), images.pick(held)


def spread_out(images: ImageList, count: int) -> ImageList:
    """At most ``count`` of the images, evenly spaced in the sorted list; all classes are known."""
    return images.pick(spaced(len(images.paths), min(count, len(images.paths))))


def spaced(total: int, count: int) -> list[int]:
    """``count`` evenly spaced ones of the numbers 0 ... total - 1: midpoints of equal parts."""
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]
