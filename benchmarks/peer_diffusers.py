"""The peer diffusers: ``UNet2DModel`` and its schedulers, used as its own pipelines use them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.training_utils import EMAModel
from peer_tasks import Settings, Steps
from torch import Tensor, nn

diffusers.utils.logging.set_verbosity_error()

VERSION = f"diffusers {diffusers.__version__}"
SCHEDULERS = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler, "dpmpp_2m": DPMSolverMultistepScheduler}


class Network(nn.Module):
    """A ``UNet2DModel`` that returns its output as it is."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.unet = UNet2DModel(**settings["config"])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.unet(x, t, return_dict=False)[0]


def make_network(settings: Settings, device: torch.device) -> nn.Module:
    """The network of ``settings["config"]`` with the weights of the file ``settings["weights"]``.

    ``settings["heads"]`` are the attention heads by the width of a level: its own option knows
    heads of one width in all levels alone, and the network computes with as many as it is told.
    """
    network = Network(settings)
    for module in network.modules():
        if isinstance(module, Attention):
            module.heads = settings["heads"][str(module.inner_dim)]
            module.scale = (module.inner_dim // module.heads) ** -0.5
    if settings.get("weights"):
        network.unet.load_state_dict(torch.load(settings["weights"], weights_only=True))
    return network.to(device)


def describe(network: nn.Module) -> dict[str, str]:
    """How its attention computes: by default with torch's fused attention, ``AttnProcessor2_0``."""
    attention = [module for module in network.modules() if isinstance(module, Attention)]
    return {"attention": ", ".join(sorted({type(a.processor).__name__ for a in attention}))}


def training_step(
    network: nn.Module, settings: Settings, images: Tensor
) -> Callable[[Callable[..., Any]], object]:
    """A step as in diffusers' example of unconditional training, with its average of weights.

    The library has no loss for a learned variance: the outputs for it get no gradient. A step is
    noise, the squared error, gradients clipped by their norm, AdamW, the average and the loss's
    value.
    """
    scheduler = DDPMScheduler(**settings["scheduler"])
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    average = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True)
    average.to(images.device)

    def step(precision: Callable[..., Any]) -> float:
        noise = torch.randn_like(images)
        t = torch.randint(0, len(scheduler.betas), (len(images),), device=images.device)
        noisy = scheduler.add_noise(images, noise, t)
        with precision():
            output = network(noisy, t)[:, : images.shape[1]]
            loss = nn.functional.mse_loss(output.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(network.parameters())
        return loss.detach().item()

    return step


def sampling_steps(settings: Settings, device: torch.device) -> Steps:
    """All steps of a scheduler with one output [N, 2 C, H, W] at every step."""
    x = torch.randn(settings["shape"], device=device)
    output = torch.randn_like(torch.cat([x, x], dim=1))
    if settings["scheduler"]["variance_type"] != "learned_range":
        output = output[:, : x.shape[1]]
    scheduler = _scheduler(settings)
    return lambda: _denoise(lambda x, t: output, scheduler, x, settings), settings["steps"]


def sampling(network: nn.Module, settings: Settings, device: torch.device) -> Steps:
    """A loop as in its pipelines."""
    scheduler = _scheduler(settings)

    def draw() -> Tensor:
        x = torch.randn(settings["shape"], device=device)
        return _denoise(network, scheduler, x, settings)

    return draw, settings["steps"]


def _scheduler(settings: Settings) -> Any:
    return SCHEDULERS[settings["sampler"]].from_config(settings["scheduler"])


@torch.no_grad()
def _denoise(network: Callable[..., Tensor], scheduler: Any, x: Tensor, settings: Settings) -> Any:
    """A pipeline's loop; DDIM's scheduler does not know of outputs for a learned variance."""
    scheduler.set_timesteps(settings["steps"])
    channels = x.shape[1] if settings["sampler"] == "ddim" else None
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t)[:, :channels], t, x).prev_sample
    return x
