"""Bits per dimension of images by the probability-flow ODE.

Score SDEs: arXiv 2011.13456, appendix D.2. FFJORD: arXiv 1810.01367.

A model makes an image of noise by an ODE, which can be walked back. In x = x_start + sigma noise
and time u = log sigma it is dx/du = x - D(x, sigma), EDM eq. 1 (arXiv 2206.00364). This module
walks DDPM's scaling z = x / sqrt(1 + sigma^2), which does not grow with sigma:

    dz/du = f(z, u) = z / (1 + sigma^2) - D(x, sigma) / sqrt(1 + sigma^2),

and with it the divergence of f, by which the log-density changes (arXiv 2011.13456 eq. 39). In u
nothing is stiff: the slopes of f lie between about -1 and 1 at all levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .denoiser import Denoiser
from .errors import UserError
from .flags import option, require, require_at_least
from .gaussian_diffusion import GaussianDiffusion, Model
from .nll_results import Measured
from .ode import Unsolved, solve_each
from .rng import sample_generators

BIN = 2 / 255  # width of an 8-bit level, as in losses.discretized_gaussian_log_likelihood

# (x [n, C, ...], sigma [n], which images these are [n]) -> D(x, sigma) [n, C, ...]
Denoise = Callable[[Tensor, Tensor, list[int]], Tensor]


@dataclass(frozen=True)
class FlowOptions:
    """How the ODE is solved, and what is drawn for it."""

    ode_tolerance: float = option(
        1e-4, "of --method ode: relative error that a step of the ODE's solver may make"
    )
    hutchinson_probes: int = option(
        1, "of --method ode: random vectors that estimate the trace, per draw of the image"
    )
    dequantisations: int = option(
        1, "of --method ode: draws of the noise that fills the gaps between 8-bit levels, per image"
    )
    ode_batch: int = option(
        1,
        "of --method ode: images, at most --batch_size, that the network sees at once; above 1 is "
        "faster on a GPU, and what shares a batch changes a result within the tolerance",
    )

    def __post_init__(self) -> None:
        require(1e-9 <= self.ode_tolerance < 1, "ode_tolerance", self.ode_tolerance, "in [1e-9, 1)")
        require_at_least(1, self, ["hutchinson_probes", "dequantisations", "ode_batch"])


@dataclass(frozen=True)
class FlowBits:
    """Of each image: ``bpd`` float64 [N], and ``evaluations`` int64 [N] of the network."""

    bpd: Tensor
    evaluations: Tensor


def flow_bpd(
    denoise: Denoise,
    x_start: Tensor,
    levels: tuple[float, float],
    options: FlowOptions,
    generators: Sequence[torch.Generator],
) -> FlowBits:
    """Bits/dim of 8-bit levels under the density of the ODE: a bound, by uniform dequantisation.

    The density is that of what the ODE makes of N(0, 1 + sigma_max^2), the prior that samples start
    from, when it stops at sigma_min: the last denoising step, from there to 0, has no density of
    its own and is left out. Images count as they are, without noise of sigma_min; for data that
    varies by s at least this is worth about (sigma_min / s)^4 / 4 nats per dimension.

    The probability of a level is the density's integral over a bin 2 / 255 wide, and its logarithm
    at least the mean of the log-density there (arXiv 1511.01844, section 3.1) plus log(2 / 255):
    up to the errors of the solver, the result does not fall short of the true bits in expectation.

    All bins have one width, while the bound's outermost reach to infinity: of data with many black
    or white pixels this counts more bits, up to about one for each of them where sigma_min is as
    wide as a bin.

    :param denoise: D of some of the images at a level each; gradients flow.
    :param x_start: [N, C, ...] data in [-1, 1].
    :param levels: sigma_min and sigma_max.
    :param generators: one for each image, of all its draws.
    """
    bits, evaluations = [], []
    for _ in range(options.dequantisations):
        uniform = _draw(x_start, generators, torch.rand)
        probes = torch.stack(
            [_draw(x_start, generators, _signs) for _ in range(options.hutchinson_probes)]
        )
        start = x_start.double() + BIN * (uniform.double() - 0.5)
        log_density, count = _log_density(
            denoise, start, levels, probes.to(x_start), options.ode_tolerance
        )
        nats = -log_density / x_start[0].numel() - math.log(BIN)
        bits.append(nats / math.log(2))
        evaluations.append(count)
    return FlowBits(torch.stack(bits).mean(dim=0), torch.stack(evaluations).sum(dim=0))


def _draw(
    like: Tensor,
    generators: Sequence[torch.Generator],
    kind: Callable[..., Tensor],
) -> Tensor:
    """Random numbers for each image from its generator, of the shape and device of ``like``."""
    rows = [kind(*like.shape[1:], generator=g, device=g.device) for g in generators]
    return torch.stack(rows).to(like.device)


def _signs(*shape: int, **kwargs: torch.Generator | torch.device) -> Tensor:
    """Rademacher's +-1, which estimate a trace with less variance than normal numbers."""
    return torch.randint(0, 2, shape, **kwargs) * 2 - 1  # type: ignore[call-overload]


def _log_density(
    denoise: Denoise,
    x: Tensor,
    levels: tuple[float, float],
    probes: Tensor,
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    """Walk from sigma_min to sigma_max: arXiv 2011.13456 eqs. 39 and 40.

    :param x: float64 [N, C, ...].
    :param probes: [P, N, C, ...], the same for the whole way.
    :return: log p(x) in nats, float64 [N]; evaluations of the network, int64 [N].
    """
    shape, dim = x.shape[1:], x[0].numel()
    first, last = levels
    # The state is z and what the log-density changed by. The latter is one number among many for
    # the solver, which watches the root mean square of all errors: counted in nats per dimension,
    # times this, it weighs as much as all of z.
    weight = math.sqrt(dim) / dim

    def field(u: np.ndarray, states: np.ndarray, rows: list[int]) -> np.ndarray:
        z = torch.from_numpy(states[:, :dim]).view(-1, *shape)
        slope, divergence = _slope_and_divergence(
            lambda x, sigma: denoise(x, sigma, rows),
            z.to(x.device),
            torch.from_numpy(np.exp(u)).to(x.device),
            probes[:, rows],
        )
        both = torch.cat([slope.flatten(1), weight * divergence[:, None]], dim=1)
        return both.cpu().numpy()

    z = (x / math.sqrt(1 + first**2)).flatten(1).cpu().numpy()
    states = np.concatenate([z, np.zeros((len(z), 1))], axis=1)
    solution = solve_each(field, states, (math.log(first), math.log(last)), tolerance)
    z, change = solution.states[:, :dim], solution.states[:, dim] / weight
    prior = -0.5 * (z**2).sum(axis=1) - 0.5 * dim * math.log(2 * math.pi)
    log_density = prior + change - 0.5 * dim * math.log1p(first**2)  # of x, not z
    return torch.from_numpy(log_density), torch.from_numpy(solution.evaluations)


def _slope_and_divergence(
    denoise: Callable[[Tensor, Tensor], Tensor], z: Tensor, sigma: Tensor, probes: Tensor
) -> tuple[Tensor, Tensor]:
    """f(z, u), and its divergence by Hutchinson's estimator: FFJORD section 3.1.

    :param z: float64 [n, C, ...].
    :param sigma: float64 [n].
    :param probes: [P, n, C, ...], in whose type the network is called.
    :return: float64 [n, C, ...] and float64 [n].
    """
    growth = torch.sqrt(1 + sigma**2)
    column = growth.view(-1, *[1] * (z.ndim - 1))
    with torch.enable_grad():
        x = (column * z).to(probes.dtype).requires_grad_()
        x_start = denoise(x, sigma)
        traces = []
        for i, probe in enumerate(probes):
            more = i + 1 < len(probes)
            (product,) = torch.autograd.grad(x_start, x, probe, retain_graph=more)
            traces.append((product * probe).double().flatten(1).sum(dim=1))
    trace = torch.stack(traces).mean(dim=0)
    slope = z / column**2 - x_start.detach().double() / column
    return slope, z[0].numel() / growth**2 - trace


class FlowLikelihood:
    """Bits/dim of a model by its ODE; see :func:`flow_bpd`.

    x_start is not clamped: where it is, the flow would have no slope and the density no meaning.

    :param model: see :class:`.GaussianDiffusion`.
    :param diffusion: the process it was trained with; its own steps are of no concern here.
    :param seed: with the index of an image it determines all that is drawn for it.
    """

    def __init__(
        self, model: Model, diffusion: GaussianDiffusion, options: FlowOptions, seed: int = 0
    ) -> None:
        self.model = model
        self.diffusion = diffusion
        self.options = options
        self.seed = seed
        levels = Denoiser(model, diffusion).levels
        self.sigma_min, self.sigma_max = float(levels.sigma_min), float(levels.sigma_max)

    def measure(
        self, images: Tensor, model_kwargs: Mapping[str, Tensor], indices: Sequence[int]
    ) -> Measured:
        """See :class:`.Likelihood`. The sum is that of the network's evaluations.

        Every image is evaluated alone unless ``ode_batch`` says otherwise. A network rounds
        differently in another batch, and the solver, whose steps follow the errors of rough
        functions, makes of a difference of 1e-7 one as large as its tolerance.
        """
        size = self.options.ode_batch
        parts = [slice(start, start + size) for start in range(0, len(images), size)]
        found = [
            self._bits(
                images[part],
                {key: value[part] for key, value in model_kwargs.items()},
                indices[part],
            )
            for part in parts
        ]
        bpd = torch.cat([bits.bpd for bits in found]).numpy()
        evaluations = torch.stack([bits.evaluations.sum() for bits in found]).sum().numpy()
        return Measured(bpd, {"evaluations": evaluations})

    def _bits(
        self, images: Tensor, model_kwargs: Mapping[str, Tensor], indices: Sequence[int]
    ) -> FlowBits:
        def denoise(x: Tensor, sigma: Tensor, rows: list[int]) -> Tensor:
            kwargs = {key: value[rows] for key, value in model_kwargs.items()}
            return Denoiser(self.model, self.diffusion, kwargs)(x, sigma)

        generators = sample_generators(self.seed, indices, "nll flow")
        levels = (self.sigma_min, self.sigma_max)
        try:
            return flow_bpd(denoise, images, levels, self.options, generators)
        except Unsolved as unsolved:
            raise UserError(
                f"image {indices[unsolved.sample]}: the ODE's solver gave up ({unsolved}): try a "
                f"larger --ode_tolerance than {self.options.ode_tolerance}"
            ) from None

    def protocol(self) -> dict[str, Any]:
        """See :class:`.Likelihood`."""
        return {
            "tolerance": self.options.ode_tolerance,
            "hutchinson_probes": self.options.hutchinson_probes,
            "dequantisations": self.options.dequantisations,
            "ode_batch": self.options.ode_batch,
            "sigma_min": self.sigma_min,
            "sigma_max": self.sigma_max,
        }
