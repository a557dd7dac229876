"""What a peer's worker measures: passes of its network, training steps, steps of its samplers.

Everything is made ahead, so that what is timed computes and nothing else. The libraries, here
:class:`Library`, are modules of their own: peer_diffusers.py and peer_denoising_diffusion.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

Settings = Mapping[str, Any]  # see peers.py, which makes them
Steps = tuple[Callable[[], object], int]  # what takes some steps, and how many


class Library(Protocol):
    """What is asked of a library; all that it makes is on ``device``."""

    def make_network(self, settings: Settings, device: torch.device) -> nn.Module:
        """The network, (x [N, C, H, W], t [N]) -> [N, C or 2 C, H, W], in training mode."""

    def describe(self, network: nn.Module) -> dict[str, str]:
        """What there is to say of a network."""

    def training_step(
        self, network: nn.Module, settings: Settings, images: Tensor
    ) -> Callable[[Callable[..., Any]], object]:
        """A training step on images [N, C, H, W], as the library's own training takes them.

        :return: it takes a function that calls another under the chosen precision.
        """

    def sampling_steps(self, settings: Settings, device: torch.device) -> Steps:
        """A sampler with a fixed output in place of the network's."""

    def sampling(self, network: nn.Module, settings: Settings, device: torch.device) -> Steps:
        """A sampler with a network."""


@dataclass(frozen=True)
class Task:
    """Something to be timed: its facts, and how many steps it takes, of which one counts."""

    run: Callable[[], object]
    facts: dict[str, Any]
    steps: int = 1


def prepare(library: Library, what: str, settings: Settings, device: torch.device) -> Task:
    """Make something that can be timed.

    :param what: one of TASKS.
    """
    return TASKS[what](library, settings, device)


# -- the tasks ------------------------------------------------------------------------------------


def forward(library: Library, settings: Settings, device: torch.device) -> Task:
    """A pass without gradients; writes what it computes to ``settings["output"]``, if given."""
    network = library.make_network(settings, device).eval()
    x, t = inputs(settings, device)
    called = _compiled(network, settings)

    def run() -> Tensor:
        with torch.no_grad(), precision(settings, device):
            return called(x, t)

    with torch.no_grad():
        operations = count_operations(lambda: network(x, t))
        if settings.get("output"):
            found = {"x": x, "t": t, "output": network(x, t)}
            torch.save({key: value.cpu() for key, value in found.items()}, settings["output"])
    return Task(run, _facts(library, network, settings, operations))


def training(library: Library, settings: Settings, device: torch.device) -> Task:
    """A forward and backward pass of a mean squared error, without an optimiser."""
    network = library.make_network(settings, device)
    x, t = inputs(settings, device)
    called = _compiled(network, settings)

    def run(called: nn.Module = called) -> None:
        network.zero_grad()
        with precision(settings, device):
            loss = called(x, t).float().square().mean()
        loss.backward()

    operations = count_operations(lambda: run(network))
    return Task(run, _facts(library, network, settings, operations))


def training_step(library: Library, settings: Settings, device: torch.device) -> Task:
    """A step with the loss, optimiser and average of the library's own training."""
    facts = training(library, {**settings, "compile": False}, device).facts
    network = library.make_network(settings, device)
    images, _ = inputs(settings, device)
    step = library.training_step(_compiled(network, settings), settings, images.clamp(-1, 1))

    def run() -> None:
        step(lambda: precision(settings, device))

    return Task(run, facts)


def sampling_step(library: Library, settings: Settings, device: torch.device) -> Task:
    """A step outside the network: with a fixed output; the mean of all steps of a sampler."""
    run, steps = library.sampling_steps(settings, device)
    return Task(run, {"steps": steps, "shape": list(settings["shape"])}, steps)


def sample(library: Library, settings: Settings, device: torch.device) -> Task:
    """Images by a sampler and the network, all steps."""
    network = library.make_network(settings, device).eval()
    x, t = inputs(settings, device)
    with torch.no_grad():
        operations = count_operations(lambda: network(x, t))
    draw, steps = library.sampling(_compiled(network, settings), settings, device)

    def run() -> None:
        with precision(settings, device):
            draw()

    return Task(run, {**_facts(library, network, settings, steps * operations), "steps": steps})


TASKS: dict[str, Callable[[Library, Settings, torch.device], Task]] = {
    "forward": forward,
    "training": training,
    "training_step": training_step,
    "sampling_step": sampling_step,
    "sample": sample,
}


# -- what they share ------------------------------------------------------------------------------


def inputs(settings: Settings, device: torch.device) -> tuple[Tensor, Tensor]:
    """Noise [N, C, H, W] of ``settings["shape"]``, and timesteps [N] of 0 ... 1000."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(settings["shape"], generator=generator)
    return x.to(device), torch.arange(len(x), device=device) * 10 % 1000


@contextlib.contextmanager
def precision(settings: Settings, device: torch.device) -> Iterator[None]:
    """``settings["precision"]``: "fp32" (default), "tf32" on a GPU, or "bf16" by autocast."""
    for switch in (torch.backends.cuda.matmul, torch.backends.cudnn):
        switch.allow_tf32 = settings.get("precision") == "tf32"
    half = settings.get("precision") == "bf16"
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        yield


def count_operations(run: Callable[[], object]) -> int:
    """Floating-point operations of a call, by torch's counter.

    Attention by its formula, for the counter does not know all kernels that fuse it.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def _compiled(network: nn.Module, settings: Settings) -> Any:
    return torch.compile(network) if settings.get("compile") else network


def _facts(
    library: Library, network: nn.Module, settings: Settings, operations: int
) -> dict[str, Any]:
    return {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "operations": operations,
        "shape": list(settings["shape"]),
        "precision": settings.get("precision", "fp32"),
        **library.describe(network),
    }
