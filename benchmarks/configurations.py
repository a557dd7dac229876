"""The networks that the benchmarks measure, and how many images they get at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from improved_diffusion.errors import UserError
from improved_diffusion.script_util import ModelAndDiffusionOptions


@dataclass(frozen=True)
class Configuration:
    """A network and its process, by the flags of the scripts; images per batch on a CPU and GPU.

    :ivar turns: rounds measured for each that is asked for; more where a pass is short, which takes
        little time and steadies the median.
    """

    options: ModelAndDiffusionOptions
    batch: int
    batch_on_gpu: int
    turns: int = 1

    def images(self, device: torch.device) -> int:
        """Images per batch on a device."""
        return self.batch if device.type == "cpu" else self.batch_on_gpu

    def network(self, device: torch.device, seed: int = 0) -> nn.Module:
        """The network with weights of a seed, of which none are zero: every layer computes."""
        torch.manual_seed(seed)
        network = self.options.model().to(device)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        return network


CONFIGURATIONS = {
    "small": Configuration(
        ModelAndDiffusionOptions(
            image_size=16, num_channels=64, num_res_blocks=2, learn_sigma=True
        ),
        batch=16,
        batch_on_gpu=256,
        turns=4,
    ),
    "cifar10": Configuration(
        ModelAndDiffusionOptions(
            image_size=32, num_channels=128, num_res_blocks=3, learn_sigma=True
        ),
        batch=8,
        batch_on_gpu=128,
    ),
    "imagenet64": Configuration(
        ModelAndDiffusionOptions(
            image_size=64, num_channels=128, num_res_blocks=3, learn_sigma=True
        ),
        batch=2,
        batch_on_gpu=64,
    ),
}


def chosen(names: str) -> dict[str, Configuration]:
    """The configurations of a text of names, separated by commas.

    :raises ValueError: for one that is not there, naming those that are.
    """
    for name in names.split(","):
        if name not in CONFIGURATIONS:
            raise UserError(f"--configs {name}: choose among {', '.join(CONFIGURATIONS)}")
    return {name: CONFIGURATIONS[name] for name in names.split(",")}
