"""Gradients of a compiled network under DistributedDataParallel; prints how far they are off."""

import contextlib

import torch
from toy import make_model

from improved_diffusion import dist_util
from improved_diffusion.compiling import compile_network
from improved_diffusion.optimization import autocast
from improved_diffusion.parallel import no_sync, replicate

PARTS = (3, 2)  # images of each microbatch


def gradients(compiled):
    model = make_model(use_checkpoint=True)
    if compiled:
        compile_network(model, backend="aot_eager", fullgraph=True)
    wrapped = replicate(model, torch.device("cpu"), accumulate=True)
    network = autocast(wrapped, torch.bfloat16, "cpu")
    torch.manual_seed(dist_util.get_rank())
    for last, count in enumerate(PARTS):
        with contextlib.nullcontext() if last else no_sync(wrapped):
            network(torch.randn(count, 1, 8, 8), torch.arange(count)).square().mean().backward()
    return torch.cat([param.grad.flatten() for param in model.parameters()])


def main():
    dist_util.setup_dist()
    plain, compiled = gradients(False), gradients(True)
    error = ((compiled - plain).norm() / plain.norm()).item()
    print(f"relative error {error:.3g}", flush=True)


if __name__ == "__main__":
    dist_util.run_main(main)
