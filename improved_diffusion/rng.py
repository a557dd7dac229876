"""Random draws that depend on (seed, purpose, index) and on nothing else.

Sampling with a seed gives every sample a generator of its own, so that sample 137 of seed 0 is
the same image whatever the batch size, the number of processes or the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

Generator = torch.Generator | Sequence[torch.Generator] | None

_GOLDEN_RATIO_32 = 2654435769  # odd, so that i -> i * this is one-to-one modulo 2**32


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Mix a seed with what it is used for.

    :param seed: the user's seed, >= 0.
    :param purpose: words and numbers that name the use, such as ("noise",) or ("epoch", 3).
    :return: an integer in [0, 2**32), fit for torch, NumPy and :mod:`random`.
    """
    entropy = [seed]
    for part in purpose:
        entropy += list(part.encode()) if isinstance(part, str) else [part]
        entropy.append(len(entropy))  # keeps ("a", 1) and ("a1",) apart
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def seed_everything(seed: int, *purpose: str | int) -> None:
    """Seed torch's and NumPy's global generators for a purpose."""
    torch.manual_seed(derive_seed(seed, *purpose, "torch"))
    np.random.seed(derive_seed(seed, *purpose, "numpy"))


def sample_generators(
    seed: int,
    indices: Iterable[int],
    *purpose: str | int,
    device: torch.device | str = "cpu",
) -> list[torch.Generator]:
    """One generator per sample; distinct for 2**32 consecutive indices.

    :param seed: the user's seed, >= 0.
    :param indices: the global index of each sample.
    :param purpose: what is drawn, so that two uses of one seed are independent; "sample" if
        nothing is given.
    :param device: where the generators draw. The CPU's numbers are the same on every machine.
    """
    start = derive_seed(seed, *(purpose or ("sample",)))
    # torch's CPU generator keeps 32 bits of its seed: a hash of the index would collide within
    # 50,000 samples about once in four runs, a one-to-one map never does.
    return [
        torch.Generator(device).manual_seed((start + int(index) * _GOLDEN_RATIO_32) % 2**32)
        for index in indices
    ]


class StepDraws:
    """The random draws of one training step, by (seed, purpose, step, index in the global batch).

    :param seed: the user's seed, >= 0.
    :param step: the step, over all sittings of a run.
    :param first: index of this process's first image in the global batch.
    :param total: images in the global batch, for :meth:`stratified`.
    """

    def __init__(self, seed: int, step: int, first: int, total: int = 0) -> None:
        self.seed = seed
        self.step = step
        self.first = first
        self.total = total

    def uniforms(self, part: slice) -> np.ndarray:
        """Numbers in [0, 1) for the images ``part`` of this process's batch, float64 [N]."""
        start, stop = self.first + part.start, self.first + part.stop
        # one stream for the step: its beginning does not depend on how much of it is drawn
        stream = np.random.default_rng(derive_seed(self.seed, "timesteps", self.step))
        return stream.random(stop)[start:]

    def stratified(self, part: slice) -> np.ndarray:
        """Numbers in [0, 1), float64 [N]; a global batch of B images has one in each B-th of it.

        Alone, each of them is uniform.

        :raises ValueError: for images beyond the global batch.
        """
        if self.first + part.stop > self.total:
            raise ValueError(
                f"image {self.first + part.stop - 1} of a global batch of {self.total}: the batch "
                "is larger than batch_size"
            )
        stream = np.random.default_rng(derive_seed(self.seed, "strata", self.step))
        strata = stream.permutation(self.total)[self.first + part.start : self.first + part.stop]
        return jittered(strata, self.uniforms(part), self.total)

    def chosen(self, share: float, part: slice, purpose: str) -> np.ndarray:
        """Which of the images ``part`` of this process's batch are chosen, bool [N].

        :param share: 0 ... 1, the probability of each.
        :param purpose: what for: each purpose chooses for itself.
        """
        start, stop = self.first + part.start, self.first + part.stop
        stream = np.random.default_rng(derive_seed(self.seed, purpose, self.step))
        return stream.random(stop)[start:] < share

    def noise_like(self, x: Tensor, part: slice) -> Tensor:
        """Standard normal noise for the images ``x`` = [N, ...], ``part`` of the batch."""
        indices = range(self.first + part.start, self.first + part.stop)
        generators = sample_generators(
            self.seed, indices, "training noise", self.step, device=x.device
        )
        return randn_like(x, generators)


def jittered(strata: np.ndarray, uniforms: np.ndarray, total: int) -> np.ndarray:
    """A number in each of the given strata of [0, 1).

    :param strata: int [N] in 0 ... total - 1.
    :param uniforms: float64 [N] in [0, 1): where in its stratum each is.
    :return: float64 [N] in [0, 1).
    """
    return np.minimum((strata + uniforms) / total, np.nextafter(1, 0))  # the sum may round up


def randn(
    shape: Sequence[int], generator: Generator = None, device: torch.device | str | None = None
) -> Tensor:
    """Standard normal noise of ``shape`` = [N, ...] on ``device``.

    :param generator: None for torch's global generator; one generator; or N of them, in which
        case row i comes from ``generator[i]``, drawn on that generator's device.
    """
    if isinstance(generator, Sequence):
        if len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators given for a batch of {shape[0]}")
        rows = [torch.randn(*shape[1:], generator=g, device=g.device) for g in generator]
        return torch.stack(rows).to(device)
    if generator is not None:
        return torch.randn(*shape, generator=generator, device=generator.device).to(device)
    return torch.randn(*shape, device=device)


def randn_like(x: Tensor, generator: Generator = None) -> Tensor:
    """Standard normal noise of the shape, type and device of ``x``; see :func:`randn`."""
    if generator is None:
        return torch.randn_like(x)
    return randn(x.shape, generator, x.device).to(x.dtype)
