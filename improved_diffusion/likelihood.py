"""Bits per dimension of images by the variational bound.

DDPM: arXiv 2006.11239. :mod:`.likelihood_ode` has the other way, by the ODE.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import dist_util
from .errors import UserError
from .flags import option, require_at_least
from .gaussian_diffusion import GaussianDiffusion, Model, ModelKwargs
from .nll_results import Batches, Measured, Results, measure_all
from .rng import Generator, randn_like, sample_generators

TERMS = ("vb", "mse", "xstart_mse")
BOUND_STRATA = 8  # timesteps per image for a quick bound, besides t = 0


@dataclass(frozen=True)
class BoundOptions:
    """How the bound is taken."""

    clip_denoised: bool = option(True, "clamp each estimate of the image to the range of images")
    vlb_timesteps: int = option(
        0,
        "timesteps of the bound per image: t = 0, and one at random of each of N - 1 parts of the "
        "others; 0: all",
    )

    def __post_init__(self) -> None:
        require_at_least(0, self, ["vlb_timesteps"])


class BoundLikelihood:
    """Bits/dim by the variational bound, DDPM eq. 5: L_T + L_{T-1} + ... + L_0.

    All its terms, or an unbiased estimate: L_T and L_0 of every image, and of each stratum of
    1 ... T - 1 the term of one t, uniformly at random, times the stratum's width. So the spread of
    the images' results holds the error of both draws, of images and of timesteps. The strata widen
    with t as the terms fall.

    :param model: see :class:`.GaussianDiffusion`.
    :param seed: with the index of an image it determines all that is drawn for it.
    :raises ValueError: if the process has fewer timesteps than asked for.
    """

    def __init__(
        self,
        model: Model,
        diffusion: GaussianDiffusion,
        options: BoundOptions = BoundOptions(),
        seed: int = 0,
    ) -> None:
        count, steps = options.vlb_timesteps, diffusion.num_timesteps
        if count and not min(2, steps) <= count <= steps:
            raise UserError(
                f"--vlb_timesteps {count}: must be 0, for all, or in {min(2, steps)} ... {steps}, "
                "the timesteps of the process"
            )
        self.model = model
        self.diffusion = diffusion
        self.options = options
        self.seed = seed
        self.strata = bound_strata(steps, count - 1) if count else []

    def measure(
        self, images: Tensor, model_kwargs: Mapping[str, Tensor], indices: Sequence[int]
    ) -> Measured:
        """See :class:`.Likelihood`. With all timesteps the sums are those of TERMS, float64 [T],
        the last timestep first."""
        generators = sample_generators(self.seed, indices, "nll")
        if self.strata:
            timesteps = [
                torch.cat([torch.randint(*stratum, (1,), generator=g) for g in generators])
                for stratum in self.strata
            ]
            bound = stratified_bound(
                self.model,
                self.diffusion,
                images,
                self.strata,
                [t.to(images.device) for t in timesteps],
                generators,
                clip_denoised=self.options.clip_denoised,
                model_kwargs=dict(model_kwargs),
            )
            return Measured(bound.cpu().numpy(), {})
        metrics = self.diffusion.calc_bpd_loop(
            self.model,
            images,
            clip_denoised=self.options.clip_denoised,
            model_kwargs=dict(model_kwargs),
            generator=generators,
        )
        sums = {name: metrics[name].double().sum(dim=0).cpu().numpy() for name in TERMS}
        return Measured(metrics["total_bpd"].double().cpu().numpy(), sums)

    def protocol(self) -> dict[str, Any]:
        """See :class:`.Likelihood`."""
        steps = self.diffusion.num_timesteps
        return {
            "timesteps": steps,
            "timesteps_per_image": len(self.strata) or steps,
            "clip_denoised": self.options.clip_denoised,
        }


def bound_strata(num_timesteps: int, count: int = BOUND_STRATA) -> list[tuple[int, int]]:
    """The parts of 0 ... T - 1 of which an image sees one timestep each.

    :return: (first, stop) of t = 0 alone, and of ``count`` parts of 1 ... T - 1 in geometric
        progression, as far as whole numbers go; of single timesteps if T <= count + 1.
    """
    edges = np.arange(1, num_timesteps + 1)
    if num_timesteps > count + 1:
        order = np.arange(count + 1)
        edges = np.geomspace(1, num_timesteps, count + 1).round().astype(int)
        edges = np.maximum.accumulate(edges - order) + order  # a step in each part at least
    return list(itertools.pairwise([0, *edges.tolist()]))


@torch.no_grad()
def stratified_bound(
    model: Model,
    diffusion: GaussianDiffusion,
    x_start: Tensor,
    strata: Sequence[tuple[int, int]],
    timesteps: Sequence[Tensor],
    generator: Generator,
    *,
    clip_denoised: bool = True,
    model_kwargs: ModelKwargs = None,
) -> Tensor:
    """The bound from one term of each stratum, times the stratum's width.

    :param x_start: [N, C, ...] data in [-1, 1].
    :param strata: (first, stop) of each; see :func:`bound_strata`.
    :param timesteps: for each stratum the t in it that each image takes, int64 [N].
    :param generator: of the noise, drawn for one stratum after another.
    :return: float64 [N] in bits/dim.
    """
    bound = diffusion._prior_bpd(x_start).double()
    for (first, stop), t in zip(strata, timesteps, strict=True):
        x_t = diffusion.q_sample(x_start, t, randn_like(x_start, generator))
        term = diffusion._vb_terms_bpd(
            model, x_start, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs
        )["output"]
        bound += (stop - first) * term
    return bound


@dataclass
class BoundEstimate:
    """The variational bound over the images seen so far by all processes.

    ``terms`` holds the mean of each of TERMS per timestep, float64 [T], the last timestep first;
    none of a bound from some of the timesteps.
    """

    count: int
    bpd: float  # bits/dim
    standard_error: float  # of bpd as an estimate of the data's mean
    terms: dict[str, Tensor]


def estimate_bound(
    model: Model,
    diffusion: GaussianDiffusion,
    batches: Batches,
    *,
    clip_denoised: bool = True,
    seed: int = 0,
    vlb_timesteps: int = 0,
) -> Iterator[BoundEstimate]:
    """Stream the bound over batches; every process must bring equally many, some maybe empty.

    :param model: see :class:`.GaussianDiffusion`.
    :param batches: (float [N, C, ...] in [-1, 1], arguments of the model [N], indices of the
        images, on which with the seed the noise depends).
    :param vlb_timesteps: how many timesteps each image sees; 0 for all.
    :return: the estimate so far, after each round of batches.
    """
    options = BoundOptions(clip_denoised=clip_denoised, vlb_timesteps=vlb_timesteps)
    bound = BoundLikelihood(model, diffusion, options, seed)
    for results in measure_all({"vlb": bound}, _on_device(batches), Results(["vlb"])):
        estimate = results.estimate("vlb")
        terms = {name: torch.from_numpy(mean) for name, mean in results.means("vlb").items()}
        yield BoundEstimate(estimate.count, estimate.bpd, estimate.standard_error, terms)


def _on_device(batches: Batches) -> Batches:
    device = dist_util.dev()
    for images, cond, indices in batches:
        yield images.to(device), {key: value.to(device) for key, value in cond.items()}, indices


def bits_of_a_range(value_range: str) -> str:
    """What bits/dim mean for data with a value range.

    Both ways count bins as wide as 8-bit levels are, (HIGH - LOW) / 255, whatever the steps of the
    data: their numbers compare models of the same data and range, not ranges or data.
    """
    return f"bits/dim of 256 levels of the range {value_range}, however fine the data is"
