"""Other libraries as candidates of the benchmarks, each in a worker process of its own.

The workers (peer_worker.py) run in the peers' environment, which `make peers` makes from
peers-requirements.txt, and time themselves; so their packages and ours need not agree, and nothing
of one library changes how the other runs. What can be prepared, with the settings of
:func:`diffusers_settings` or :func:`denoising_diffusion_settings`:

    forward        a pass without gradients
    training       a forward and backward pass of a mean squared error
    training_step  a step with the loss, optimiser and average of the library's own training
    sampling_step  a step of a sampler outside the network, with a fixed output (sampler, steps)
    sample         images by a sampler and the network (sampler, steps)

each with precision "fp32" (without TF32), "tf32" or "bf16" (autocast), and compile True or False.
As candidates, by the names of variants.py:

    with unet_candidates(CONFIGURATIONS["small"], device) as peers:
        seconds = paired({"ours": ours, "diffusers": peers["diffusers fp32"]["forward"]})
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from configurations import Configuration
from torch import Tensor, nn
from variants import is_compiled, precision_of, variants

from improved_diffusion.blocks import AttentionBlock
from improved_diffusion.diffusers_format import layout_of, scheduler_config, unet_config
from improved_diffusion.diffusers_weights import to_diffusers
from improved_diffusion.errors import UserError
from improved_diffusion.script_util import ModelAndDiffusionOptions

BENCHMARKS = Path(__file__).parent
PYTHON = BENCHMARKS.parent / ".venv-peers" / "bin" / "python"  # made by `make peers`
WORKER = BENCHMARKS / "peer_worker.py"
KINDS = ("diffusers", "denoising_diffusion")
SAMPLERS = {"diffusers": ("ddpm", "ddim", "dpmpp_2m"), "denoising_diffusion": ("ddpm", "ddim")}
PASSES = ("forward", "training")
PATIENCE = 5.0  # seconds that a worker has to end

Settings = dict[str, Any]


def missing() -> str:
    """Why there are no peers here, and what to do; "" if there are."""
    made = PYTHON.parent.parent / ".made"
    return "" if made.exists() else "without peers: they need an environment, `make peers`"


# -- a worker -------------------------------------------------------------------------------------


class Peer:
    """A library in a process of its own, from ``with`` on.

    :param kind: one of KINDS.
    :param device: that it computes on.
    :param python: of an environment that has the library; None: the peers' environment.
    :raises ValueError: from ``with`` on, in one line, if it cannot do what it is asked.
    """

    def __init__(self, kind: str, device: torch.device, python: str | None = None) -> None:
        if kind not in KINDS:
            raise UserError(f"no peer '{kind}': choose among {', '.join(KINDS)}")
        if python is None and missing():
            raise UserError(missing())
        self.kind = kind
        self.device = device
        self.python = python or str(PYTHON)
        self.versions: dict[str, Any] = {}

    def __enter__(self) -> Peer:
        words = ["--threads", str(torch.get_num_threads()), "--device", self.device.type]
        self._messages = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [self.python, str(WORKER), self.kind, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            text=True,
        )
        try:
            self.versions = self._answer()["versions"]
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()  # which tells it to end
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._messages.close()

    def prepare(self, what: str, settings: Mapping[str, Any], **more: Any) -> Prepared:
        """Make something ready to be timed.

        :param what: see the head of this module.
        :param more: settings beside those of ``settings``, such as precision.
        """
        answer = self._ask({"prepare": what, "settings": {**settings, **more}})
        return Prepared(self, answer["number"], answer["facts"])

    def run(self, number: int) -> float:
        """Seconds that one step of what was prepared took, as the worker measured them."""
        return self._ask({"run": number})["seconds"]

    def _ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):  # no answer will come, which tells more
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise UserError(f"peer {self.kind}: {self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise UserError(f"peer {self.kind}: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        code = self._process.wait()
        self._messages.seek(0)
        lines = self._messages.read().strip().splitlines() or ["no message"]
        return f"its process ended with code {code}: {lines[-1]}"


@dataclass(frozen=True)
class Prepared:
    """A candidate: a call is one run in the worker and returns its seconds, by the worker's clock.

    ``facts`` are numbers and texts, such as "parameters", "operations" (floating-point operations
    of a run, by torch's counter) and "shape".
    """

    peer: Peer
    number: int
    facts: dict[str, Any]

    def __call__(self) -> float:
        return self.peer.run(self.number)


# -- settings -------------------------------------------------------------------------------------


def diffusers_settings(
    options: ModelAndDiffusionOptions, shape: tuple[int, ...], network: nn.Module, folder: str
) -> Settings:
    """Settings of a ``UNet2DModel`` that computes what a network of ours does.

    :param shape: [N, C, H, W] of a batch.
    :param network: of ``options``, whose weights it gets.
    :param folder: for a file with them.
    :raises ValueError: if an option has no counterpart there.
    """
    # There all heads have the same width, here there may be as many in each level. So the converter
    # sees a network with one head, and the number that the worker sets goes beside.
    plain = {"num_heads": 1, "num_heads_upsample": -1, "num_head_channels": -1}
    told = dataclasses.replace(options, **plain, use_new_attention_order=True)
    with torch.device("meta"):
        there = told.model()
    weights = to_diffusers(_in_new_order(network), layout_of(there))
    path = os.path.join(folder, "weights_of_peer.pt")
    torch.save({key: value.cpu().clone() for key, value in weights.items()}, path)
    betas = dataclasses.replace(options, timestep_respacing="").diffusion().betas
    return {
        "shape": list(shape),
        "config": unet_config(there, options.image_size),
        "heads": _heads(network),
        "weights": path,
        "scheduler": scheduler_config(dataclasses.asdict(options), betas),
    }


def _attention_blocks(network: nn.Module) -> dict[str, AttentionBlock]:
    return {n: m for n, m in network.named_modules() if isinstance(m, AttentionBlock)}


def _heads(network: nn.Module) -> dict[int, int]:
    """Attention heads by the width of a level.

    :raises ValueError: if two blocks of one width have another number.
    """
    pairs = {(block.channels, block.num_heads) for block in _attention_blocks(network).values()}
    if len(dict(pairs)) < len(pairs):
        raise UserError("--num_heads_upsample has no counterpart in the peer")
    return dict(pairs)


def _in_new_order(network: nn.Module) -> dict[str, Tensor]:
    """The weights with all queries, all keys, all values in a row, whatever the heads."""
    state = dict(network.state_dict())
    for name, block in _attention_blocks(network).items():
        if not block.use_new_attention_order:
            for kind in ("weight", "bias"):
                packed = state[f"{name}.qkv.{kind}"].unflatten(0, (block.num_heads, 3, -1))
                state[f"{name}.qkv.{kind}"] = packed.transpose(0, 1).flatten(0, 2)
    return state


def denoising_diffusion_settings(
    options: ModelAndDiffusionOptions, shape: tuple[int, ...], network: nn.Module
) -> Settings:
    """Settings of a ``Unet`` of the same base width and multiples, whose operations differ."""
    return {
        "shape": list(shape),
        "unet": {
            "dim": options.num_channels,
            "dim_mults": [int(multiple) for multiple in network.channel_mult],
            "channels": shape[1],
            "learned_variance": options.learn_sigma,
        },
    }


# -- candidates -----------------------------------------------------------------------------------


@contextlib.contextmanager
def workers(
    configuration: Configuration, device: torch.device, python: str | None = None
) -> Iterator[dict[str, tuple[Peer, Settings]]]:
    """All peers, each with the settings of a configuration; none if their environment is missing.

    The network of diffusers has the weights of ``configuration.network(device)``.
    """
    options, network = configuration.options, configuration.network(device)
    size = options.image_size
    shape = (configuration.images(device), options.channels, size, size)
    with contextlib.ExitStack() as stack:
        found = {}
        if python or not missing():
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            settings = {
                "diffusers": diffusers_settings(options, shape, network, folder),
                "denoising_diffusion": denoising_diffusion_settings(options, shape, network),
            }
            del network
            for kind in KINDS:
                peer = stack.enter_context(Peer(kind, device, python))
                found[kind] = (peer, settings[kind])
        yield found


@contextlib.contextmanager
def unet_candidates(
    configuration: Configuration, device: torch.device
) -> Iterator[dict[str, dict[str, Prepared]]]:
    """What bench_unet.py compares with: "diffusers fp32" -> "forward" -> a candidate."""
    with workers(configuration, device) as peers:
        yield _prepare(peers, PASSES, device)


@contextlib.contextmanager
def training_candidates(
    configuration: Configuration, device: torch.device
) -> Iterator[dict[str, Prepared]]:
    """What bench_train.py compares with: "diffusers fp32" -> a training step."""
    with workers(configuration, device) as peers:
        found = _prepare(peers, ("training_step",), device)
        yield {name: of["training_step"] for name, of in found.items()}


def _prepare(
    peers: Mapping[str, tuple[Peer, Settings]],
    tasks: tuple[str, ...],
    device: torch.device,
) -> dict[str, dict[str, Prepared]]:
    return {
        name: {what: peer.prepare(what, settings, **_how(name)) for what in tasks}
        for kind, (peer, settings) in peers.items()
        for name in variants(device, whose=kind)
    }


def _how(name: str) -> Settings:
    return {"precision": precision_of(name), "compile": is_compiled(name)}


@contextlib.contextmanager
def sampling_candidates(
    configuration: Configuration,
    device: torch.device,
    what: str,
    steps: Mapping[str, int],
) -> Iterator[dict[str, Prepared]]:
    """What bench_sample.py compares with: "diffusers ddim" or "diffusers fp32 ddim" -> a candidate.

    :param what: "sampling_step", a step outside the network with a fixed output; or "sample",
        a batch of images, in each precision.
    :param steps: "ddpm", "ddim" or "dpmpp_2m" -> sampling steps; a peer without one leaves it out.
    """
    with workers(configuration, device) as peers:
        yield {
            f"{name} {sampler}": peer.prepare(
                what, settings, sampler=sampler, steps=count, **_how(name)
            )
            for kind, (peer, settings) in peers.items()
            for name in (variants(device, whose=kind) if what == "sample" else [kind])
            for sampler, count in steps.items()
            if sampler in SAMPLERS[kind]
        }
