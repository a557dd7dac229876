"""Forward and training pass of the U-Net: time, operations, share of the machine's peak, memory.

Ours in float32 and bfloat16 against the plain rendering of the published architecture
(plain_unet.py) and against diffusers' UNet2DModel, all three with the same weights and the same
batch; and against denoising-diffusion-pytorch's Unet of the same width and depth, which does other
operations. All take turns. The peers (peers.py) need `make peers`, and are left out without.

    python benchmarks/bench_unet.py --configs small --rounds 5

prints a table and writes benchmarks/results/unet.json. On a GPU (results/unet_CARD.json) also with
TF32, and each of ours compiled.
"""

import argparse
import contextlib
import statistics
from collections.abc import Callable
from dataclasses import replace

import torch
from configurations import CONFIGURATIONS, Configuration, chosen
from measuring import added_memory, in_a_fresh_process, paired, speedup
from peer_tasks import count_operations
from peers import missing, unet_candidates
from plain_unet import plain
from records import at_least, output_file, result_path, table, write_result
from torch import nn
from variants import autocast, compiled_if_named, peak_of, peaks, switched, variants

from improved_diffusion.dist_util import run_main

REFERENCE = "plain fp32"
OURS, HALF, CHECKPOINTING = "ours fp32", "ours bf16", "ours fp32, checkpointing"


def main(argv: list[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    configurations = chosen(args.configs)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(args.threads or torch.get_num_threads())
    if args.memory_of:
        (configuration,) = configurations.values()
        print(memory_of(configuration, args.memory_of, device))
        return
    found = {
        name: measure(name, configuration, args.rounds, device, args.compile)
        for name, configuration in configurations.items()
    }
    result = {"left_out": missing(), "configs": found}
    print(report(result))
    write_result(args.out, result)


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configs", default=",".join(CONFIGURATIONS), help="separated by commas")
    parser.add_argument("--rounds", type=at_least(1), default=5)
    parser.add_argument("--threads", type=at_least(0), default=0, help="0: torch's choice")
    parser.add_argument("--out", type=output_file, default=result_path("unet"), help="result file")
    parser.add_argument("--compile", action="store_true", help="ours also compiled; takes minutes")
    # what a process of its own is started with, to measure its memory
    parser.add_argument("--memory_of", default="", help=argparse.SUPPRESS)
    return parser


def make_network(configuration: Configuration, key: str, device: torch.device) -> nn.Module:
    """A network that is compared; all have the same weights."""
    if key == CHECKPOINTING:
        recomputing = replace(configuration.options, use_checkpoint=True)
        configuration = replace(configuration, options=recomputing)
    network = configuration.network(device)
    return plain(network) if key == REFERENCE else compiled_if_named(network, key)


def passes(
    model: nn.Module, configuration: Configuration, key: str, device: torch.device
) -> dict[str, Callable[[], object]]:
    """A forward pass without gradients, and a forward and backward pass, of one network.

    :param key: the candidate's name, which ends with its precision.
    """
    size, images = configuration.options.image_size, configuration.images(device)
    x = torch.randn(images, 3, size, size, device=device)
    t = torch.arange(images, device=device) * 10.0

    def forward() -> None:
        with torch.no_grad(), autocast(key, device):
            model(x, t)

    def training() -> None:
        model.zero_grad()
        with autocast(key, device):
            loss = model(x, t).float().square().mean()
        loss.backward()

    return {"forward": switched(forward, key), "training": switched(training, key)}


def measure(
    name: str,
    configuration: Configuration,
    rounds: int,
    device: torch.device,
    compiled: bool = False,
) -> dict:
    """Times, operations, shares of the peak and memory of one configuration.

    :param compiled: also of our network compiled by torch.compile, which a GPU's has anyway.
    """
    keys = [REFERENCE, *variants(device, compiled), CHECKPOINTING]
    compared = {key: make_network(configuration, key, device) for key in keys}
    found: dict = {
        "images": configuration.images(device),
        "parameters": sum(p.numel() for p in compared[OURS].parameters()),
    }
    runs = {key: passes(network, configuration, key, device) for key, network in compared.items()}
    products = peaks(device)
    with contextlib.ExitStack() as stack:
        peers = stack.enter_context(unet_candidates(configuration, device))
        for kind in ("forward", "training"):
            of_kind: dict = {key: own[kind] for key, own in {**runs, **peers}.items()}
            if kind == "forward":
                del of_kind[CHECKPOINTING]  # recomputes in the backward pass alone
            operations = dict.fromkeys(runs, count_operations(of_kind[REFERENCE]))
            operations |= {key: own[kind].facts["operations"] for key, own in peers.items()}
            seconds = paired({**of_kind, **products}, rounds * configuration.turns)
            found[kind] = {key: facts(seconds, key, operations) for key in of_kind}
        found["peak_operations_per_second"] = {
            name: 1 / statistics.median(seconds[name]) for name in products
        }
        found["peers"] = {name: own["forward"].peer.versions for name, own in peers.items()}
    for key in (REFERENCE, OURS, HALF, CHECKPOINTING):
        found["training"][key]["peak_memory_bytes"] = memory_in_a_process(name, key)
    return found


def facts(seconds: dict[str, list[float]], key: str, operations: dict[str, int]) -> dict:
    """What is reported of a candidate; its speed-ups are ratios of times, and of operations/s."""
    median = statistics.median(seconds[key])
    peak = seconds[peak_of(key)]  # of an operation
    shares = [operations[key] * p / s for p, s in zip(peak, seconds[key], strict=True)]
    times_plain = speedup(seconds, of=key, against=REFERENCE)
    work = operations[key] / operations[REFERENCE]
    return {
        "seconds": median,
        "operations": operations[key],
        "speedup": times_plain,
        "speedup_per_operation": {name: work * ratio for name, ratio in times_plain.items()},
        "share_of_peak": statistics.median(shares),
        "rounds_seconds": seconds[key],
    }


def memory_in_a_process(name: str, key: str) -> int:
    """Bytes that a training pass adds to a fresh process, with as many threads as here."""
    words = [__file__, "--configs", name, "--memory_of", key]
    return in_a_fresh_process([*words, "--threads", str(torch.get_num_threads())])


def memory_of(configuration: Configuration, key: str, device: torch.device) -> int:
    """Bytes at the peak of a training pass of one network, above those before it."""
    network = make_network(configuration, key, device)
    return added_memory(passes(network, configuration, key, device)["training"])


def report(result: dict) -> str:
    """The table that is printed."""
    header = ["config", "pass", "network", "ms", "GFLOP", "times plain", "per operation"]
    rows = []
    for name, found in result["configs"].items():
        for kind in ("forward", "training"):
            for key, one in found[kind].items():
                memory = one.get("peak_memory_bytes")
                rows.append(
                    [
                        name,
                        kind,
                        key,
                        f"{one['seconds'] * 1e3:.1f}",
                        f"{one['operations'] / 1e9:.1f}",
                        f"{one['speedup']['median']:.2f}",
                        f"{one['speedup_per_operation']['median']:.2f}",
                        f"{one['share_of_peak']:.0%}",
                        "" if memory is None else f"{memory / 1e6:.0f}",
                    ]
                )
    text = table([*header, "of the peak", "memory (MB)"], rows)
    return f"{text}\n{result['left_out']}".rstrip()


if __name__ == "__main__":
    run_main(main)
