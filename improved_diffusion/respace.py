"""Sampling with a subset of the timesteps: IDDPM section 4 (arXiv 2102.09672)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from .errors import UserError
from .gaussian_diffusion import GaussianDiffusion, Model
from .tables import mapped, read_only, scaled


def space_timesteps(num_timesteps: int, section_counts: str | Sequence[int]) -> set[int]:
    """Choose which of T timesteps to keep.

    :param num_timesteps: T of the original process.
    :param section_counts: how many to keep of each equal section, as a list or as a string
        "10,15,20"; "ddimN" keeps N steps at DDIM's whole-number stride.
    :return: the kept timesteps, in 0 ... T - 1.
    :raises ValueError: if a section is shorter than its count, if no whole-number stride gives N
        steps, or if the string cannot be read.
    """
    if isinstance(section_counts, str):
        if section_counts.startswith("ddim"):
            return _ddim_timesteps(num_timesteps, section_counts)
        try:
            section_counts = [int(count) for count in section_counts.split(",")]
        except ValueError:
            raise UserError(
                f"cannot read timestep respacing '{section_counts}'; write '250', '10,15,20' or "
                "'ddim50'"
            ) from None
    if not any(section_counts):
        raise UserError(f"timestep respacing {section_counts} keeps no timestep; ask for 1 or more")
    short, longer = divmod(num_timesteps, len(section_counts))
    start, kept = 0, []
    for i, count in enumerate(section_counts):
        size = short + (1 if i < longer else 0)
        if not 0 <= count <= size:
            raise UserError(
                f"timestep respacing asks for {count} steps out of a section of {size} (section "
                f"{i + 1} of {len(section_counts)} over {num_timesteps} diffusion steps); the "
                f"nearest that works is {size if count > size else 0}"
            )
        # the section's first and last step, and evenly spaced ones between them
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        offset = 0.0
        for _ in range(count):  # summed, not multiplied: rounding of halves depends on it
            kept.append(start + round(offset))
            offset += stride
        start += size
    return set(kept)


def _ddim_timesteps(num_timesteps: int, spec: str) -> set[int]:
    """Every stride-th timestep from 0, for the smallest stride that gives exactly N of them."""
    try:
        wanted = int(spec[len("ddim") :])
    except ValueError:
        raise UserError(
            f"cannot read timestep respacing '{spec}'; write ddimN, such as ddim50"
        ) from None
    strided = {len(kept): kept for kept in _strided(num_timesteps)}
    if wanted in strided:
        return set(strided[wanted])
    nearest = sorted(sorted(strided, key=lambda n: abs(n - wanted))[:2])
    raise UserError(
        f"timestep respacing '{spec}': no whole-number stride takes {wanted} of {num_timesteps} "
        f"diffusion steps; the nearest that work are {' and '.join(f'ddim{n}' for n in nearest)}, "
        f"or '{max(1, min(wanted, num_timesteps))}' without ddim, which spaces any number evenly"
    )


def _strided(num_timesteps: int) -> list[range]:
    """Every stride-th timestep from 0, the largest stride first; two or more where T > 1."""
    longest = max(num_timesteps - 1, 1)
    return [range(0, num_timesteps, stride) for stride in range(longest, 0, -1)]


class SpacedDiffusion(GaussianDiffusion):
    """A diffusion process that skips steps of a base process.

    alpha_bar at the kept steps is that of the base process (IDDPM eq. 19 gives the betas). The
    model still sees the timesteps of the base process.

    :param use_timesteps: the timesteps of the base process to keep.
    :param kwargs: the arguments of the base process.
    """

    def __init__(self, use_timesteps: Collection[int], **kwargs: Any) -> None:
        self.use_timesteps = set(use_timesteps)
        self.original_num_steps = len(kwargs["betas"])
        base = GaussianDiffusion(**kwargs)
        self.timestep_map = sorted(self.use_timesteps & set(range(self.original_num_steps)))
        self._timestep_map = read_only(np.array(self.timestep_map, dtype=np.int64))
        self.original_alphas_cumprod = base.alphas_cumprod
        alpha_bar = base.alphas_cumprod[self.timestep_map]
        kwargs["betas"] = 1 - alpha_bar / np.append(1.0, alpha_bar[:-1])  # IDDPM eq. 19
        super().__init__(**kwargs)

    def p_mean_variance(self, model: Model, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """As in :class:`GaussianDiffusion`; the model gets the base process's timesteps."""
        return super().p_mean_variance(self._wrap_model(model), *args, **kwargs)

    def condition_mean(self, cond_fn: Model, *args: Any, **kwargs: Any) -> Tensor:
        """As in :class:`GaussianDiffusion`; ``cond_fn`` gets the base process's timesteps."""
        return super().condition_mean(self._wrap_model(cond_fn), *args, **kwargs)

    def condition_score(self, cond_fn: Model, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """As in :class:`GaussianDiffusion`; ``cond_fn`` gets the base process's timesteps."""
        return super().condition_score(self._wrap_model(cond_fn), *args, **kwargs)

    def training_losses(self, model: Model, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """As in :class:`GaussianDiffusion`; the model gets the base process's timesteps."""
        return super().training_losses(self._wrap_model(model), *args, **kwargs)

    def _wrap_model(self, model: Model) -> _WrappedModel:
        if isinstance(model, _WrappedModel):
            return model
        return _WrappedModel(
            model, self._timestep_map, self.rescale_timesteps, self.original_num_steps
        )

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        return t  # _WrappedModel scales, after mapping back


def original_alphas_cumprod(diffusion: GaussianDiffusion) -> np.ndarray:
    """alpha_bar of all the steps that the model was trained at, float64 [T]."""
    if isinstance(diffusion, SpacedDiffusion):
        return diffusion.original_alphas_cumprod
    return diffusion.alphas_cumprod


def respaced(diffusion: GaussianDiffusion, timesteps: Collection[int]) -> SpacedDiffusion:
    """The same process over other timesteps.

    :param diffusion: respaced already, or not.
    :param timesteps: of those that the model was trained at.
    """
    alpha_bar = original_alphas_cumprod(diffusion)
    kind = type(diffusion) if isinstance(diffusion, SpacedDiffusion) else SpacedDiffusion
    return kind(
        use_timesteps=timesteps,
        betas=1 - alpha_bar / np.append(1.0, alpha_bar[:-1]),
        model_mean_type=diffusion.model_mean_type,
        model_var_type=diffusion.model_var_type,
        loss_type=diffusion.loss_type,
        rescale_timesteps=diffusion.rescale_timesteps,
        loss_weight=diffusion.loss_weight,
    )


class _WrappedModel:
    """A model that is handed respaced timesteps and passes on the original ones."""

    def __init__(
        self,
        model: Model,
        timestep_map: Sequence[int] | np.ndarray,
        rescale_timesteps: bool,
        original_num_steps: int,
    ) -> None:
        self.model = model
        self.timestep_map = np.asarray(timestep_map)
        self.rescale_timesteps = rescale_timesteps
        self.original_num_steps = original_num_steps

    def __call__(self, x: Tensor, ts: Tensor, **kwargs: Any) -> Tensor:
        """Call the model with the original timesteps.

        :param x: [N, C, ...] input of the model.
        :param ts: [N] indices into the kept timesteps.
        """
        original = mapped(ts, self.timestep_map)
        if self.rescale_timesteps:
            original = scaled(original, 1000.0 / self.original_num_steps)
        return self.model(x, original, **kwargs)
