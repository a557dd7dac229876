"""The peer denoising-diffusion-pytorch: its ``Unet`` and ``LearnedGaussianDiffusion``.

Its network is another one: of the same base width, multiples and image size, with two blocks in
each level and linear attention in all but the smallest. So its parameters and operations differ.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib import metadata
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from ema_pytorch import EMA
from peer_tasks import Settings, Steps
from torch import Tensor, nn

if importlib.util.find_spec("torchvision") is None:
    # The package imports torchvision, to read pictures for a trainer that is not used here. Where
    # there is none for the machine an empty one will do.
    stand_in = ModuleType("torchvision")
    stand_in.__spec__ = ModuleSpec("torchvision", None)
    stand_in.transforms = stand_in.utils = None  # type: ignore[attr-defined]
    sys.modules["torchvision"] = stand_in

from denoising_diffusion_pytorch import GaussianDiffusion, LearnedGaussianDiffusion, Unet

VERSION = f"denoising-diffusion-pytorch {metadata.version('denoising-diffusion-pytorch')}"


class FixedOutput(nn.Module):
    """In place of a network: the same output [N, C or 2 C, H, W] always."""

    self_condition = False

    def __init__(self, output: Tensor, channels: int) -> None:
        super().__init__()
        self.output, self.channels, self.out_dim = output, channels, output.shape[1]

    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        return self.output


class WithoutVariance(nn.Module):
    """A network without its outputs for the variance, which its DDIM does not work with."""

    self_condition = False

    def __init__(self, network: nn.Module, channels: int) -> None:
        super().__init__()
        self.network = network
        self.channels = self.out_dim = channels

    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        return self.network(x, t)[:, : self.channels]


def make_network(settings: Settings, device: torch.device) -> nn.Module:
    """The network of ``settings["unet"]``, with weights of its own."""
    return Unet(**settings["unet"]).to(device)


def describe(network: nn.Module) -> dict[str, str]:
    return {"attention": "linear, and by its formula in the smallest level"}


def training_step(
    network: nn.Module, settings: Settings, images: Tensor
) -> Callable[[Callable[..., Any]], object]:
    """A step as its trainer takes them: Adam, and the average brought up to date every ten."""
    learned = settings["unet"]["learned_variance"]
    kind = LearnedGaussianDiffusion if learned else GaussianDiffusion
    process = kind(network, **_process(settings)).to(images.device)
    optimizer = torch.optim.Adam(process.parameters(), lr=1e-4, betas=(0.9, 0.99))
    average = EMA(process, beta=0.995, update_every=10, update_after_step=0)
    pictures = images / 2 + 0.5  # it takes 0 ... 1

    def step(precision: Callable[..., Any]) -> float:
        with precision():
            loss = process(pictures)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(process.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update()
        return loss.item()

    return step


def sampling_steps(settings: Settings, device: torch.device) -> Steps:
    """All steps of its sampler with one output at every step."""
    images, channels, *size = settings["shape"]
    outputs = channels * (2 if settings["unet"]["learned_variance"] else 1)
    output = torch.randn(images, outputs, *size, device=device)
    return sampling(FixedOutput(output, channels), settings, device)


def sampling(network: nn.Module, settings: Settings, device: torch.device) -> Steps:
    """Its own loops: DDPM over a process of as many steps, DDIM over some of a thousand."""
    images, channels, *_ = settings["shape"]
    steps, sampler = settings["steps"], settings["sampler"]
    if sampler == "ddim":
        process = GaussianDiffusion(
            WithoutVariance(network, channels), **_process(settings), sampling_timesteps=steps
        )
    elif sampler == "ddpm":
        learned = settings["unet"]["learned_variance"]
        kind = LearnedGaussianDiffusion if learned else GaussianDiffusion
        process = kind(network, **{**_process(settings), "timesteps": steps})
    else:
        raise ValueError(f"it has no sampler {sampler}, but ddpm and ddim")
    process.to(device)
    return lambda: process.sample(images), steps


def _process(settings: Settings) -> dict[str, Any]:
    return {
        "image_size": tuple(settings["shape"][2:]),
        "timesteps": 1000,
        "objective": "pred_noise",
        "beta_schedule": "cosine",  # its linear one has betas above 1 where steps are few
    }
