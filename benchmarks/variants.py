"""In which ways a network is measured, by name: "ours fp32", "diffusers bf16, compiled"."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from measuring import matmul
from torch import nn

from improved_diffusion.compiling import compile_network

FP32, TF32, BF16 = "fp32", "tf32", "bf16"  # without TF32, with it, by autocast
COMPILED = ", compiled"


def precisions(device: torch.device) -> tuple[str, ...]:
    """Those that are measured on a device."""
    return (FP32, BF16) if device.type == "cpu" else (FP32, TF32, BF16)


def variants(device: torch.device, compiled: bool = False, whose: str = "ours") -> list[str]:
    """The names of all that are measured on a device.

    :param compiled: each of them compiled too; on a GPU always.
    """
    forms = ("", COMPILED) if compiled or device.type == "cuda" else ("",)
    return [f"{whose} {precision}{form}" for form in forms for precision in precisions(device)]


def precision_of(name: str) -> str:
    """That of a candidate such as "ours bf16, compiled"; one without, "diffusers", has fp32."""
    last = name.split(",")[0].split()[-1]
    return last if last in (TF32, BF16) else FP32


def is_compiled(name: str) -> bool:
    """Whether a candidate of that name is compiled."""
    return name.endswith(COMPILED)


def compiled_if_named(network: nn.Module, name: str) -> nn.Module:
    """Our network, compiled if the name says so."""
    return compile_network(network) if is_compiled(name) else network


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether a GPU computes float32 products and convolutions in TF32; nothing on a CPU."""
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = allowed
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


def switched(run: Callable[[], Any], name: str) -> Callable[[], Any]:
    """A candidate of that name, which computes in TF32 if that is its precision, else without."""

    def with_the_switch() -> Any:
        with tf32(precision_of(name) == TF32):
            return run()

    return with_the_switch


def autocast(name: str, device: torch.device) -> contextlib.AbstractContextManager:
    """bfloat16 by autocast where that is a candidate's precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision_of(name) == BF16)


def peaks(device: torch.device) -> dict[str, Callable[[], float]]:
    """The machine's peak as candidates, "product of matrices, fp32"; see :func:`.matmul`."""
    found = {}
    for precision in precisions(device):
        with tf32(precision == TF32):
            product = matmul(torch.bfloat16 if precision == BF16 else torch.float32, device)
        found[peak_of(precision)] = switched(product, precision)
    return found


def peak_of(name: str) -> str:
    """The name of the peak in a candidate's precision."""
    return f"product of matrices, {precision_of(name)}"
