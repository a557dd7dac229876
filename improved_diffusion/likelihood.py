"""Bits per dimension of images by the variational bound."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from . import dist_util
from .gaussian_diffusion import GaussianDiffusion, Model
from .rng import sample_generators

TERMS = ("vb", "mse", "xstart_mse")


@dataclass
class BoundEstimate:
    """The variational bound over the images seen so far by all processes.

    ``terms`` holds the mean of each of TERMS per timestep, float64 [T], the last timestep first.
    """

    count: int
    bpd: float  # bits/dim
    standard_error: float  # of bpd as an estimate of the data's mean
    terms: dict[str, Tensor]


def estimate_bound(
    model: Model,
    diffusion: GaussianDiffusion,
    batches: Iterable[tuple[Tensor, dict[str, Tensor], list[int]]],
    *,
    clip_denoised: bool = True,
    seed: int = 0,
) -> Iterator[BoundEstimate]:
    """Stream the bound over batches; every process must bring equally many, some maybe empty.

    :param model: see :class:`.GaussianDiffusion`.
    :param batches: (float [N, C, ...] in [-1, 1], arguments of the model [N], indices of the
        images, on which with the seed the noise depends).
    :return: the estimate so far, after each round of batches.
    """
    device = dist_util.dev()
    steps = diffusion.num_timesteps
    # float64: sums over many images. Count, sum, sum of squares, then TERMS per timestep
    sums = torch.zeros(3 + len(TERMS) * steps, dtype=torch.float64, device=device)
    for images, cond, indices in batches:
        local = torch.zeros_like(sums)
        if len(images):
            metrics = diffusion.calc_bpd_loop(
                model,
                images.to(device),
                clip_denoised=clip_denoised,
                model_kwargs={key: value.to(device) for key, value in cond.items()},
                generator=sample_generators(seed, indices, "nll"),
            )
            total = metrics["total_bpd"].double()
            local[:3] = torch.stack(
                [total.new_tensor(len(total)), total.sum(), total.square().sum()]
            )
            local[3:] = torch.cat([metrics[name].double().sum(dim=0) for name in TERMS])
        if dist_util.get_world_size() > 1:
            dist.all_reduce(local)
        sums += local
        yield _estimate(sums.cpu(), steps)


def bits_of_a_range(value_range: str) -> str:
    """What bits/dim mean for data with a value range.

    The bound counts bins as wide as 8-bit levels are, (HIGH - LOW) / 255, whatever the steps of
    the data: its numbers compare models of the same data and range, not ranges or data.
    """
    return f"bits/dim of 256 levels of the range {value_range}, however fine the data is"


def _estimate(sums: Tensor, steps: int) -> BoundEstimate:
    count, total, squares = sums[:3].tolist()
    mean = total / count
    variance = max(0.0, squares / count - mean**2) * count / max(1, count - 1)
    means = (sums[3:] / count).split(steps)
    return BoundEstimate(
        count=int(count),
        bpd=mean,
        standard_error=math.sqrt(variance / count) if count > 1 else math.inf,
        terms=dict(zip(TERMS, means, strict=True)),
    )
