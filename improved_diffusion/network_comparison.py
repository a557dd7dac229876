"""Do two networks, of ours or of diffusers, compute the same? Told by running both."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from .diffusers_format import layout_of
from .diffusers_weights import Layout, from_diffusers, to_diffusers
from .flags import ImageSize, height_width
from .unet import UNetModel

if TYPE_CHECKING:
    from .interchange import Checkpoint

log = logging.getLogger(__name__)

PROBES = 4  # inputs that both networks are run on


class Comparison(NamedTuple):
    """How the outputs of two networks differ: the largest difference, and the largest output.

    ``of_noise``: the outputs are 0; the numbers are of the networks with noise for their zeros.
    """

    difference: float
    largest: float
    of_noise: bool = False

    @property
    def relative(self) -> float:
        """The largest difference, relative to the largest output."""
        if not self.difference:
            return 0.0
        return self.difference / self.largest if self.largest else math.inf


@torch.no_grad()
def compare(first: Checkpoint, second: Checkpoint) -> Comparison:
    """Run two networks on the same input: noise of a fixed seed, at timesteps from 0 to T - 1.

    Where all outputs are 0 they would be so with any weights before the last ones: then the outputs
    are compared with noise in place of every weight that is 0.
    """
    found = _compare(first, first.evaluate, second.evaluate)
    if found.largest or found.difference:
        return found
    log.warning(
        "the network's outputs are 0 everywhere, as before training: compared are the outputs with "
        "noise in place of the weights that are 0"
    )
    return _compare(first, *_with_noise(first, second))._replace(of_noise=True)


def _compare(
    source: Checkpoint, first: Callable[..., Tensor], second: Callable[..., Tensor]
) -> Comparison:
    """Run both on the input of a checkpoint."""
    differences, outputs = [], []
    for arguments in probes(source):  # one at a time: large networks need the memory
        ours, theirs = first(**arguments), second(**arguments)
        differences.append((ours - theirs).abs().max().item())
        outputs.append(ours.abs().max().item())
    return Comparison(torch.tensor(differences).max().item(), torch.tensor(outputs).max().item())


def _with_noise(
    first: Checkpoint, second: Checkpoint
) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Copies of two networks, with noise for the zeros of the first and its weights in the second.

    The weights go from one to the other as the conversion takes them.
    """
    network, evaluate = copy.deepcopy(first.network), first.evaluate
    if first.there is None:
        evaluate = _fill_zeros(network)
    else:
        unet = _fill_zeros(copy.deepcopy(first.there.unet))
        network.load_state_dict(from_diffusers(unet.state_dict(), _layout(network)))
        evaluate = dataclasses.replace(first.there, unet=unet).evaluate
    if second.there is None:
        written = copy.deepcopy(second.network)
        written.load_state_dict(network.state_dict())
        return evaluate, written
    unet = copy.deepcopy(second.there.unet)
    unet.load_state_dict(to_diffusers(network.state_dict(), _layout(second.network)))
    return evaluate, dataclasses.replace(second.there, unet=unet).evaluate


def _fill_zeros(network: nn.Module) -> nn.Module:
    """Draw the parameters that are 0, so that features keep their size; from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if not parameter.any():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.normal_(0, scale, generator=generator)
    return network


def probes(source: Checkpoint) -> Iterator[dict[str, Tensor]]:
    """Arguments for a network: one image of noise, a timestep, and what else it takes."""
    flags = source.flags
    generator = torch.Generator().manual_seed(0)
    steps, rows = flags["diffusion_steps"], _labels(source.network)
    scale = 1000 / steps if flags["rescale_timesteps"] else 1
    for i in range(PROBES):

        def noise(size: ImageSize) -> Tensor:
            return torch.randn(1, flags["channels"], *height_width(size), generator=generator)

        share = i / (PROBES - 1)
        arguments = {
            "x": noise(flags["large_size" if "large_size" in flags else "image_size"]),
            "timesteps": torch.tensor([scale * round(share * (steps - 1))]),
        }
        if rows:
            arguments["y"] = torch.tensor([round(share * (rows - 1))])
        if "small_size" in flags:
            arguments["low_res"] = noise(flags["small_size"])
        yield arguments


def _labels(network: nn.Module) -> int:
    """How many labels a network takes, with the one that stands for none; 0 for no labels."""
    embedding = getattr(network, "label_emb", None)
    return embedding.num_embeddings if embedding is not None else 0


def _layout(network: nn.Module) -> Layout:
    assert isinstance(network, UNetModel)  # no other has a counterpart
    return layout_of(network)
