"""The recorded numbers, how to compare with them, and the model and process that they describe."""

import functools
import json
from pathlib import Path

import numpy as np
import torch

from improved_diffusion.gaussian_diffusion import LossType, ModelMeanType, ModelVarType
from improved_diffusion.respace import SpacedDiffusion, space_timesteps
from improved_diffusion.schedules import get_named_beta_schedule

GOLDEN = Path(__file__).parent / "golden"
MEANS = ["PREVIOUS_X", "START_X", "EPSILON"]  # of which numbers are recorded
VARIANCES = [kind.name for kind in ModelVarType]
LOSSES = [kind.name for kind in LossType]


@functools.cache
def npz(name):
    """The arrays of golden/NAME.npz by key."""
    with np.load((GOLDEN / name).with_suffix(".npz"), allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


@functools.cache
def load_json(name):
    """The content of golden/NAME.json."""
    return json.loads((GOLDEN / name).with_suffix(".json").read_text())


def group(name, prefix):
    """The arrays of golden/NAME.npz whose keys start with PREFIX/, by the rest of the key."""
    return {
        key.removeprefix(prefix + "/"): value
        for key, value in npz(name).items()
        if key.startswith(prefix + "/")
    }


def as_array(a):
    return a.detach().cpu().numpy() if isinstance(a, torch.Tensor) else np.asarray(a)


def assert_rel(a, b, tol):
    """Same shape and |a - b| <= tol * max(|b|, 0.1) everywhere; NaN fails."""
    a, b = as_array(a), as_array(b)
    assert a.shape == b.shape
    a, b = a.astype(np.float64), b.astype(np.float64)
    excess = np.abs(a - b) / np.maximum(np.abs(b), 0.1)
    assert np.all(excess <= tol), f"relative difference {np.max(excess)} exceeds {tol}"


class FormulaModel(torch.nn.Module):
    """The stand-in for a network: ``a x + 0.1 cos(0.01 t)``, then ``tanh(c (x + 0.002 t))`` if
    the variance is learned. It keeps the timesteps it was given in ``seen``."""

    def __init__(self, learns_variance=True):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(0.3))
        self.c = torch.nn.Parameter(torch.tensor(1.0))
        self.learns_variance = learns_variance
        self.seen = []

    def forward(self, x, t, y=None):
        self.seen.append(t)
        t = t.float().view(-1, *[1] * (x.ndim - 1))
        mean = self.a * x + 0.1 * torch.cos(0.01 * t)
        if y is not None:
            mean = mean + 0.05 * y.view(t.shape)
        if not self.learns_variance:
            return mean
        return torch.cat([mean, torch.tanh(self.c * (x + 0.002 * t))], dim=1)


def formula_model(var):
    """The formula model with the channels that a variance type needs."""
    return FormulaModel(learns_variance=var in ("LEARNED", "LEARNED_RANGE"))


def make_diffusion(
    steps=50,
    *,
    schedule="linear",
    respacing="",
    mean="EPSILON",
    var="LEARNED_RANGE",
    loss="MSE",
    rescale_timesteps=False,
    cls=SpacedDiffusion,
):
    """A process from names; ``respacing=""`` keeps every step. A class that takes no
    ``use_timesteps`` gets none."""
    spaced = issubclass(cls, SpacedDiffusion)
    return cls(
        **({"use_timesteps": space_timesteps(steps, respacing or [steps])} if spaced else {}),
        betas=get_named_beta_schedule(schedule, steps),
        model_mean_type=ModelMeanType[mean],
        model_var_type=ModelVarType[var],
        loss_type=LossType[loss],
        rescale_timesteps=rescale_timesteps,
    )
