"""A small deterministic training problem: a network, a process without random draws, batches."""

import numpy as np
import torch

from improved_diffusion.gaussian_diffusion import LossType, ModelMeanType, ModelVarType
from improved_diffusion.resample import ScheduleSampler
from improved_diffusion.respace import SpacedDiffusion
from improved_diffusion.schedules import get_named_beta_schedule
from improved_diffusion.unet import UNetModel

STEPS = 40  # of the process


class FixedNoiseDiffusion(SpacedDiffusion):
    """Training noise is a function of the image: the same however a batch is split."""

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        noise = torch.sin(37 * x_start + 1) * 1.4
        return super().training_losses(model, x_start, t, model_kwargs, noise=noise)


class TimestepByImage(ScheduleSampler):
    """Timesteps in turn within each call; weights that differ, to show if they are dropped."""

    def __init__(self, num_timesteps=STEPS):
        self.num_timesteps = num_timesteps

    def weights(self):
        return np.ones(self.num_timesteps)

    def sample(self, batch_size, device):
        return torch.full((batch_size,), 17, device=device), torch.full((batch_size,), 1.5)


def make_diffusion(cls=FixedNoiseDiffusion):
    return cls(
        use_timesteps=range(STEPS),
        betas=get_named_beta_schedule("cosine", STEPS),
        model_mean_type=ModelMeanType.EPSILON,
        model_var_type=ModelVarType.LEARNED_RANGE,
        loss_type=LossType.RESCALED_MSE,
        rescale_timesteps=True,
    )


def make_model(seed=0, wake=True, **arguments):
    """A network of two levels; its zero-initialised layers are woken, so that all learn."""
    torch.manual_seed(seed)
    model = UNetModel(
        in_channels=1,
        model_channels=32,
        out_channels=2,
        num_res_blocks=1,
        attention_resolutions=(2,),
        channel_mult=(1, 2),
        num_heads=2,
        use_scale_shift_norm=True,
        **arguments,
    )
    with torch.no_grad():
        for param in model.parameters() if wake else ():
            param.add_(0.02 * torch.randn_like(param))
    return model


def make_batch(step, size=4):
    """Batch number ``step``: the same images for everyone, [size, 1, 8, 8]."""
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.rand(size, 1, 8, 8, generator=generator) * 2 - 1


def batches(rank=0, world_size=1, size=4, first=0):
    """Endless batches; each process gets its rows of the common ones."""
    step = first
    while True:
        yield make_batch(step, size)[rank::world_size].contiguous(), {}
        step += 1


def calm(loop):
    """Keep Adam from turning rounding noise into steps, where the true gradient is zero."""
    for group in loop.opt.param_groups:
        group["eps"] = 1e-2
    return loop
