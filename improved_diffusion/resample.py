"""Which timesteps a training batch gets: uniform, stratified, by a density or by importance.

Importance: IDDPM section 3.3 (arXiv 2102.09672). Logit-normal density: arXiv 2403.03206.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .errors import UserError
from .objectives import Objective
from .rng import jittered


class ScheduleSampler(ABC):
    """A distribution over timesteps.

    Losses are reweighted by the inverse probability, so that their mean stays unbiased whatever
    the distribution; its choice only changes their variance. A density that is itself the weighting
    overrides :meth:`sample`.
    """

    # whether the uniforms of a global batch should be one from each of as many equal strata
    stratified = False

    @abstractmethod
    def weights(self) -> np.ndarray:
        """Positive weights of the timesteps, float64 [T]; they need not sum to one."""

    def sample(
        self, batch_size: int, device: torch.device | str, uniforms: np.ndarray | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw timesteps.

        :param uniforms: float64 [N] in [0, 1), which decide the timesteps; None draws them from
            NumPy's global generator.
        :return: timesteps, int64 [N], and the weights 1 / (T p_t) of their losses, float32 [N].
        """
        w = self.weights()
        p = w / np.sum(w)
        if uniforms is None:
            indices = np.random.choice(len(p), size=(batch_size,), p=p)
        else:
            cdf = np.cumsum(p)  # inverse transform sampling, as choice does it
            indices = np.searchsorted(cdf / cdf[-1], uniforms, side="right")
        weights = 1 / (len(p) * p[indices])
        return (
            _upload(torch.from_numpy(indices).long(), device),
            _upload(torch.from_numpy(weights).float(), device),
        )


def _upload(values: Tensor, device: torch.device | str) -> Tensor:
    """Copy to a device; the host does not wait for a GPU."""
    if torch.device(device).type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


class UniformSampler(ScheduleSampler):
    """Every timestep alike."""

    def __init__(self, diffusion: Objective) -> None:
        self.diffusion = diffusion
        self._weights = np.ones([diffusion.num_timesteps])

    def weights(self) -> np.ndarray:
        """Ones, [T]."""
        return self._weights


class StratifiedSampler(UniformSampler):
    """Every timestep alike, and a global batch of B images has one from each of B equal strata.

    The mean loss of a batch varies less than with independent timesteps; its expectation is the
    same. VDM's sampler (arXiv 2107.00630) is alike, with one jitter for all strata.
    """

    stratified = True

    def sample(
        self, batch_size: int, device: torch.device | str, uniforms: np.ndarray | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw timesteps; see :meth:`ScheduleSampler.sample`.

        :param uniforms: of :meth:`.StepDraws.stratified`. None draws one from each of N x W strata,
            of which each of W processes takes every W-th, from NumPy's global generator.
        """
        if uniforms is None:
            rank, world_size = 0, 1
            if dist.is_initialized():
                rank, world_size = dist.get_rank(), dist.get_world_size()
            strata = np.random.permutation(batch_size) * world_size + rank
            uniforms = jittered(strata, np.random.random(batch_size), batch_size * world_size)
        return super().sample(batch_size, device, uniforms)


class LogitNormalSampler(ScheduleSampler):
    """Timesteps of medium noise more often: the logit of (t + 0.5) / T is normal, N(0, 1).

    The density is the weighting: losses are not divided by it. arXiv 2403.03206, section 3.1.
    """

    def __init__(self, diffusion: Objective) -> None:
        tau = (np.arange(diffusion.num_timesteps) + 0.5) / diffusion.num_timesteps
        logit = np.log(tau / (1 - tau))
        self._weights = np.exp(-0.5 * logit**2) / (tau * (1 - tau))

    def weights(self) -> np.ndarray:
        """The density at each timestep up to a factor, [T]."""
        return self._weights

    def sample(
        self, batch_size: int, device: torch.device | str, uniforms: np.ndarray | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw timesteps; see :meth:`ScheduleSampler.sample`. All losses weigh 1."""
        t, weights = super().sample(batch_size, device, uniforms)
        return t, torch.ones_like(weights)


class LossAwareSampler(ScheduleSampler):
    """A distribution that follows the losses seen in training, alike on every process."""

    def update_with_local_losses(self, local_ts: Tensor, local_losses: Tensor) -> None:
        """Gather the losses of all processes, then call :meth:`update_with_all_losses`.

        Every process of the group must call it equally often; the batches may differ in size.

        :param local_ts: int64 [N] timesteps of this process.
        :param local_losses: [N] their losses.
        """
        if not dist.is_initialized() or dist.get_world_size() == 1:
            self.update_with_all_losses(local_ts.tolist(), local_losses.tolist())
            return
        world_size = dist.get_world_size()
        size = torch.tensor([len(local_ts)], device=local_ts.device)
        sizes = [torch.zeros_like(size) for _ in range(world_size)]
        dist.all_gather(sizes, size)
        largest = max(int(n) for n in sizes)

        # all_gather wants equal shapes: pad, and cut after; float64 holds timesteps exactly
        rows = torch.zeros(2, largest, dtype=torch.float64, device=local_ts.device)
        rows[0, : len(local_ts)] = local_ts
        rows[1, : len(local_ts)] = local_losses
        gathered = [torch.zeros_like(rows) for _ in range(world_size)]
        dist.all_gather(gathered, rows)
        pairs = torch.cat([g[:, : int(n)] for g, n in zip(gathered, sizes, strict=True)], dim=1)
        self.update_with_all_losses([int(t) for t in pairs[0].tolist()], pairs[1].tolist())

    def state_dict(self) -> dict[str, Tensor]:
        """What has been learned so far, to be stored with a checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` gave.

        :raises ValueError: if it belongs to another sampler.
        """

    @abstractmethod
    def update_with_all_losses(self, ts: Sequence[int], losses: Sequence[float]) -> None:
        """Take note of losses; deterministic, as every process does it on its own.

        :param ts: timesteps.
        :param losses: the loss at each.
        """


class LossSecondMomentResampler(LossAwareSampler):
    """Timesteps in proportion to the root of their mean squared loss: IDDPM eq. 18.

    :param history_per_term: how many losses of each timestep to remember; uniform until each
        timestep has as many.
    :param uniform_prob: the share of uniform sampling mixed in.
    """

    def __init__(
        self,
        diffusion: Objective,
        history_per_term: int = 10,
        uniform_prob: float = 0.001,
    ) -> None:
        self.diffusion = diffusion
        self.history_per_term = history_per_term
        self.uniform_prob = uniform_prob
        self._loss_history = np.zeros([diffusion.num_timesteps, history_per_term])
        self._loss_counts = np.zeros([diffusion.num_timesteps], dtype=np.int64)

    def weights(self) -> np.ndarray:
        """Ones until every timestep's history is full, then probabilities, [T]."""
        if not self._warmed_up():
            return np.ones_like(self._loss_counts, dtype=np.float64)
        weights = np.sqrt(np.mean(self._loss_history**2, axis=-1))
        weights /= np.sum(weights)
        return weights * (1 - self.uniform_prob) + self.uniform_prob / len(weights)

    def update_with_all_losses(self, ts: Sequence[int], losses: Sequence[float]) -> None:
        """Append each finite loss to its timestep's history, dropping the oldest when full."""
        for t, loss in zip(ts, losses, strict=True):
            if not math.isfinite(loss):
                continue  # one of them would spoil all probabilities
            count = self._loss_counts[t]
            if count == self.history_per_term:
                self._loss_history[t] = np.append(self._loss_history[t, 1:], loss)
            else:
                self._loss_history[t, count] = loss
                self._loss_counts[t] += 1

    def state_dict(self) -> dict[str, Tensor]:
        """The last losses of every timestep, and how many there are."""
        return {
            "loss_history": torch.from_numpy(self._loss_history.copy()),
            "loss_counts": torch.from_numpy(self._loss_counts.copy()),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over the losses of another sampler of as many timesteps and terms."""
        history = state.get("loss_history")
        if history is None or tuple(history.shape) != self._loss_history.shape:
            there = "none" if history is None else tuple(history.shape)
            raise UserError(f"loss history of shape {self._loss_history.shape} here, {there} there")
        self._loss_history = history.numpy().copy()
        self._loss_counts = state["loss_counts"].numpy().copy()

    def _warmed_up(self) -> bool:
        return bool((self._loss_counts == self.history_per_term).all())


SCHEDULE_SAMPLERS: dict[str, Callable[[Objective], ScheduleSampler]] = {
    "uniform": UniformSampler,
    "loss-second-moment": LossSecondMomentResampler,
    "logit_normal": LogitNormalSampler,
    "stratified": StratifiedSampler,
}


def create_named_schedule_sampler(name: str, diffusion: Objective) -> ScheduleSampler:
    """A schedule sampler by name.

    :param name: a key of SCHEDULE_SAMPLERS.
    :raises ValueError: for an unknown name.
    """
    if name not in SCHEDULE_SAMPLERS:
        raise UserError(
            f"unknown schedule sampler '{name}'; choose one of {', '.join(SCHEDULE_SAMPLERS)}"
        )
    return SCHEDULE_SAMPLERS[name](diffusion)
