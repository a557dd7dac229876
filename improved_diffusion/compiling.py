"""Compiling a network by torch.compile: its small operations become few larger ones.

TorchDynamo and TorchInductor: "PyTorch 2", ASPLOS 2024, doi 10.1145/3620665.3640366.
"""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import dist_util, liveness
from .errors import UserError
from .flags import option

log = logging.getLogger(__name__)

Network = TypeVar("Network", bound=nn.Module)

# Dropout draws the numbers that it draws without compiling: a run may change between the two. Not
# so where activations are recomputed: there inductor draws others, the same in both passes
INDUCTOR_OPTIONS = {"fallback_random": True}
NOTICE = "compiling the network; the first steps take minutes, or less if it was compiled before"


@dataclass(frozen=True)
class CompileOptions:
    """Whether the network is compiled; see :func:`compile_network`."""

    compile: bool = option(
        False,
        "compile the network, for speed: its first calls take minutes; needs a C++ compiler, on a "
        "GPU also Triton",
    )


def compile_network(model: Network, backend: str | Any = "inductor", **how: Any) -> Network:
    """Let calls of a network run a compiled form of it; return the same network.

    It is compiled when it is called, once for the first batch size and once for all others (and
    once more for a single image); again with and without gradients. Weights may change in place
    between calls, state dicts have the same keys, DistributedDataParallel may wrap it. Results
    change by rounding; with checkpointing and dropout, other features are dropped. Copies and
    pickles of it are not compiled.

    :param backend: of :func:`torch.compile`: "aot_eager" needs no compiler. ("eager" neither, but
        with checkpointing and dropout its gradients are wrong.)
    :param how: further arguments of :func:`torch.compile`.
    """
    if backend == "inductor" and "mode" not in how:  # which excludes options
        how["options"] = {**INDUCTOR_OPTIONS, **how.get("options", {})}
    model.compile(backend=backend, **how)
    return model


def compile_if_asked(options: CompileOptions, *networks: nn.Module | None) -> None:
    """Compile networks in place, but for None, and say so, if the options ask for it."""
    if options.compile:
        log.info(NOTICE)
        for network in filter(None, networks):
            compile_network(network)


def not_compiled() -> AbstractContextManager[Any]:
    """Inside a ``with`` block, compiled networks run as if they were not: hooks are called."""
    return torch.compiler.set_stance("force_eager")


def check_compiler(options: CompileOptions, parallel: str = "ddp") -> None:
    """Try to compile, on the device; every process must call this.

    :param parallel: how training is spread over processes; see :class:`.ParallelOptions`.
    :raises ValueError: on every process, if one of them cannot compile.
    """
    if not options.compile:
        return
    if parallel == "fsdp":
        raise UserError(
            "--compile True does not work with --parallel fsdp, which gathers the weights block by "
            "block between the calls that would be compiled as one: leave one of them out"
        )
    liveness.doing("trying the compiler", starting=True)
    for rank, reason in enumerate(dist_util.gather_objects(_why_not(dist_util.dev()))):
        if reason:
            raise UserError(
                f"--compile True: process {rank} could not compile ({reason}); it needs a C++ "
                "compiler such as g++ or $CXX, on a GPU also Triton, and a folder "
                "$TORCHINDUCTOR_CACHE_DIR to write to: mend that, or leave the flag out"
            )


def _why_not(device: torch.device) -> str:
    """Why nothing can be compiled for a device, in a line; '' if it can."""

    if os.environ.get("TORCHDYNAMO_DISABLE", "0") not in ("", "0"):
        return "$TORCHDYNAMO_DISABLE is set"

    def try_it(x: Tensor) -> Tensor:
        return x.sin() + 1

    try:
        torch.compile(try_it, backend="inductor")(torch.zeros(64, device=device))
    except Exception as error:  # of the compiler, of Triton, of the system: all are reasons
        return str(error).strip().split("\n")[0] or type(error).__name__
    return ""
