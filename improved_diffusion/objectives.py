"""What a training run minimises: the loss of a diffusion process, or of a classifier."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from .gaussian_diffusion import Model


class Objective(Protocol):
    """What training needs of :class:`.GaussianDiffusion` or :class:`.ClassifierLoss`."""

    @property
    def num_timesteps(self) -> int:
        """T: losses are taken at the timesteps 0 ... T - 1."""

    def training_losses(
        self,
        model: Model,
        x_start: Tensor,
        t: Tensor,
        model_kwargs: dict[str, Any] | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss at one timestep per image.

        :param x_start: [N, C, ...] data in [-1, 1].
        :param t: [N] timesteps.
        :param model_kwargs: what belongs to the images, each [N, ...].
        :param noise: [N, C, ...] standard normal noise, drawn if None.
        :return: name -> [N]; "loss" is what is minimised.
        """
