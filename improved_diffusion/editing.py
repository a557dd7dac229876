"""Edits of given images by a trained model: fill in, make anew from part of the noise, encode.

All work on x = x_start + sigma noise with a denoiser D(x, sigma), see :mod:`.denoiser`, and on the
falling levels of :mod:`.noise_levels`; the steps are those of :mod:`.solvers`.

RePaint: arXiv 2201.09865. SDEdit: arXiv 2108.01073. DDIM: arXiv 2010.02502.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .errors import UserError
from .rng import Generator, randn_like
from .solver_steps import Callback, Denoise, Sigmas, check, check_levels, ignore
from .solvers import sample_ancestral, sample_ddim_inversion, sample_euler

Solver = Callable[..., Tensor]

# -- filling in -----------------------------------------------------------------------------------


@torch.no_grad()
def inpaint(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sigmas,
    *,
    known: Tensor,
    mask: Tensor,
    generator: Generator = None,
    callback: Callback | None = None,
    jump_length: int = 10,
    jump_samples: int = 10,
    solver: Solver = sample_ancestral,
    **own: Any,
) -> Tensor:
    """Fill in a part of images so that it fits the rest: RePaint Algorithm 1.

    After each step down, the known part is put back with fresh noise of the level reached. So that
    the new part can take notice of it, the walk jumps back up from every ``jump_length``-th level,
    by adding noise, and goes down again.

    Differs from the paper: the known part is in place at the first level already, and it has the
    noise of the level that the step leads to.

    :param denoise: D(x, sigma), the estimate of x_start, [N, C, ...] -> [N, C, ...].
    :param x: [N, C, ...] noise of standard deviation sigmas[0].
    :param sigmas: [S + 1] falling noise levels; the last one, as a rule 0, is that of the result.
    :param known: [N, C, ...] the images; what the mask hides may be anything finite.
    :param mask: bool, of a shape that broadcasts to that of ``known``: True where to make anew.
    :param generator: a torch.Generator, or one per sample; None for torch's global one.
    :param callback: see :class:`.Callback`; called after the steps down.
    :param jump_length: j, how many levels to jump back.
    :param jump_samples: r, how often each stretch is gone down; 1 for no jumps.
    :param solver: takes each step down, from (sigma, sigma_next) alone: one that remembers earlier
        steps forgets them.
    :param own: further arguments of the solver, such as ``posterior=denoise.posterior``.
    :return: [N, C, ...]; where the mask is False exactly ``known``, if the last level is 0.
    :raises ValueError: for a mask or jumps that do not fit, and as :func:`.sample_euler` does.
    """
    levels, report = check_levels(sigmas), callback or ignore
    _check_mask(mask, known)
    mask = mask.to(x.device)
    known = known.to(x)
    steps: list[dict[str, Any]] = []  # what the solver reports of its step

    def keep(i: int, **step: Any) -> None:
        steps.append(step)

    def put_back(x: Tensor, sigma: float) -> Tensor:
        noisy = known + sigma * randn_like(known, generator) if sigma > 0 else known
        return torch.where(mask, x, noisy)  # RePaint eq. 8c

    x = put_back(x, levels[0])
    walk = repaint_walk(len(levels) - 1, jump_length, jump_samples)
    for i, (here, there) in enumerate(pairwise(walk)):
        sigma, sigma_next = levels[here], levels[there]
        if there < here:  # up: q(x_{t+j} | x_t), the paper's j steps of Algorithm 1 at once
            x = x + math.sqrt(sigma_next**2 - sigma**2) * randn_like(x, generator)
            continue
        x = solver(denoise, x, (sigma, sigma_next), generator=generator, callback=keep, **own)
        x = put_back(x, sigma_next)
        report(i, x=x, x_start=steps.pop()["x_start"], sigma=sigma)
    return x


def repaint_walk(steps: int, jump_length: int, jump_samples: int) -> list[int]:
    """The levels that RePaint goes through, as indices 0 ... ``steps`` from the noise down.

    The jumps start at the last level above 0 and at every ``jump_length``-th one before it, as far
    as there are levels to jump to.

    :param steps: S, the number of steps without jumps.
    :param jump_length: j, at least 1.
    :param jump_samples: r, how often each stretch is gone down, at least 1.
    :raises ValueError: also if no jump has room, unless there is none to be made.
    """
    check(jump_length >= 1, "jump_length", jump_length, "at least 1")
    check(jump_samples >= 1, "jump_samples", jump_samples, "at least 1")
    room = f"below the number of steps, {steps}; or set jump_samples to 1, which makes no jumps"
    check(jump_samples == 1 or jump_length < steps, "jump_length", jump_length, room)
    starts = range(steps - 1, jump_length - 1, -jump_length)
    walk = [0]
    for level in range(1, steps + 1):
        walk.append(level)
        if level in starts:
            stretch = range(level - jump_length, level + 1)
            walk += [*stretch] * (jump_samples - 1)
    return walk


def _check_mask(mask: Tensor, known: Tensor) -> None:
    """Refuse a mask that is not bool, or whose shape does not broadcast to that of the images."""
    if mask.dtype != torch.bool:
        raise UserError(f"mask is {mask.dtype}: it must be bool, True where to make anew")
    try:
        fits = torch.broadcast_shapes(mask.shape, known.shape) == known.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise UserError(f"mask has the shape {list(mask.shape)}, the images {list(known.shape)}")


# -- from part of the noise -----------------------------------------------------------------------


@torch.no_grad()
def image_to_image(
    denoise: Denoise,
    images: Tensor,
    sigmas: Sigmas,
    sigma_start: float,
    *,
    generator: Generator = None,
    callback: Callback | None = None,
    solver: Solver = sample_euler,
    **own: Any,
) -> Tensor:
    """Add noise up to a level and sample onward from there: SDEdit Algorithm 1.

    The higher the level, the freer the result: what is finer than the noise is made anew.

    :param denoise: D(x, sigma), the estimate of x_start, [N, C, ...] -> [N, C, ...].
    :param images: [N, C, ...] in [-1, 1]: pictures, sketches, or anything near to the data.
    :param sigmas: [S + 1] falling levels of a whole sampling run; those below the start are taken.
    :param sigma_start: the level of the noise, above the last of ``sigmas``;
        :meth:`.NoiseLevels.sigma_of_t` has that of a t.
    :param generator: a torch.Generator, or one per sample; None for torch's global one.
    :param callback: see :class:`.Callback`.
    :param solver: any of :data:`.SOLVERS` that leads down.
    :param own: further arguments of the solver.
    :return: [N, C, ...].
    :raises ValueError: for a start that is not above the last level.
    """
    levels = levels_from(sigmas, sigma_start)
    x = images + levels[0] * randn_like(images, generator)
    return solver(denoise, x, levels, generator=generator, callback=callback, **own)


def levels_from(sigmas: Sigmas, sigma_start: float) -> list[float]:
    """The rest of a sampling run that begins at a level of its own.

    :param sigmas: [S + 1] falling levels of the whole run.
    :param sigma_start: where to begin, above the last of them. A level of the run just below gives
        way, within half of the following step in log sigma: steps that are much shorter than the
        next one do solvers that remember no good.
    :return: the start, and the levels below it.
    :raises ValueError: for a start that is not above the last level.
    """
    levels = check_levels(sigmas)
    lowest = f"above the last noise level, {levels[-1]:g}"
    check(levels[-1] < sigma_start < math.inf, "sigma_start", sigma_start, lowest)
    below = [sigma for sigma in levels if sigma < sigma_start]
    if len(below) > 1 and below[1] > 0 and (sigma_start / below[0]) ** 2 < below[0] / below[1]:
        below = below[1:]
    return [float(sigma_start), *below]


def start_of_strength(strength: float, num_timesteps: int) -> int:
    """The timestep whose noise is a given share of the way from the data to pure noise.

    :param strength: above 0, and at most 1: the last timestep.
    :param num_timesteps: T.
    :return: t in 0 ... T - 1.
    """
    check(0 < strength <= 1, "strength", strength, "above 0 and at most 1")
    return max(round(strength * num_timesteps) - 1, 0)


# -- to the noise and back ------------------------------------------------------------------------


def encode(denoise: Denoise, images: Tensor, sigmas: Sigmas) -> Tensor:
    """The noise that :func:`decode` turns into given images, nearly: DDIM section 4.3.

    :param images: [N, C, ...] in [-1, 1].
    :param sigmas: [S + 1] falling levels, the last one 0; the more, the more exact.
    :return: [N, C, ...] latents, of standard deviation about sigmas[0].
    """
    return sample_ddim_inversion(denoise, images, sigmas)


def decode(denoise: Denoise, latents: Tensor, sigmas: Sigmas) -> Tensor:
    """The images of latents, by DDIM at eta 0.

    :param latents: [N, C, ...] of :func:`encode` by the same levels.
    :param sigmas: [S + 1] falling levels, the last one 0.
    :return: [N, C, ...] images.
    """
    return sample_euler(denoise, latents, sigmas)


def slerp(first: Tensor, second: Tensor, share: float) -> Tensor:
    """A point on the arc between two latents: DDIM appendix D.5.

    Noise in many dimensions lies near a sphere, so what lies on a straight line between two such
    points is too short to be noise.

    :param first: [N, C, ...].
    :param second: the same; each sample has an angle of its own.
    :param share: 0 is ``first``, 1 is ``second``.
    :return: [N, C, ...], of equal norm if both have the same.
    :raises ValueError: for opposite latents, between which there is no shortest arc.
    """
    check(0 <= share <= 1, "share", share, "in 0 ... 1")
    a, b = (latent.flatten(1).double() for latent in (first, second))  # [N, K]
    norms = a.norm(dim=1) * b.norm(dim=1)
    cosine = ((a * b).sum(dim=1) / norms.clamp(min=torch.finfo(a.dtype).tiny)).clamp(-1, 1)
    angle = torch.arccos(cosine)  # [N]
    if (math.pi - angle < 1e-6).any():
        raise UserError("slerp: opposite latents have no shortest arc between them")
    straight = angle < 1e-6  # where the arc is a line, up to rounding
    sine = torch.where(straight, torch.ones_like(angle), torch.sin(angle))
    weights = [
        torch.where(straight, torch.full_like(angle, part), torch.sin(part * angle) / sine)
        for part in (1 - share, share)
    ]
    point = weights[0][:, None] * a + weights[1][:, None] * b
    return point.view(first.shape).to(first)


def interpolate(
    denoise: Denoise,
    first: Tensor,
    second: Tensor,
    sigmas: Sigmas,
    points: int,
    *,
    denoise_second: Denoise | None = None,
) -> Tensor:
    """Images on the way between two, by :func:`slerp` of their latents: DDIM section 5.3.

    :param denoise: D(x, sigma), the estimate of x_start, [N, C, ...] -> [N, C, ...].
    :param first: [N, C, ...] in [-1, 1].
    :param second: the same.
    :param sigmas: [S + 1] falling levels, the last one 0.
    :param points: K, at least 2.
    :param denoise_second: for the second images, if they have another class; on the way, D is the
        weighted mean of both.
    :return: [K, N, C, ...]; the first and the last are the images as they come back from their
        latents.
    """
    check(points >= 2, "points", points, "at least 2")
    denoise_second = denoise_second or denoise
    ends = encode(denoise, first, sigmas), encode(denoise_second, second, sigmas)
    shares = [i / (points - 1) for i in range(points)]
    return torch.stack(
        [
            decode(_between(denoise, denoise_second, share), slerp(*ends, share), sigmas)
            for share in shares
        ]
    )


def _between(first: Denoise, second: Denoise, share: float) -> Denoise:
    """(1 - share) D_1 + share D_2, evaluating what counts alone."""
    if first is second or share == 0:
        return first
    if share == 1:
        return second
    return lambda x, sigma: (1 - share) * first(x, sigma) + share * second(x, sigma)


def psnr(images: Tensor, others: Tensor, peak: float = 2.0) -> Tensor:
    """The peak signal-to-noise ratio 10 log10(peak^2 / mean squared difference), in dB.

    :param images: [N, C, ...].
    :param others: the same.
    :param peak: the width of the range of values; 2 for [-1, 1].
    :return: float64 [N]; infinite where the images are equal.
    """
    error = (images.double() - others.double()).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(peak**2 / error)
