"""Forward and training pass of the U-Net: time, operations, share of the machine's peak, memory.

Ours in float32 and bfloat16 against the plain rendering of the published architecture
(plain_unet.py), with the same weights and the same batch, and against the peers (peers.py) with
networks of the same shape, in turns.

    python benchmarks/bench_unet.py --configs small --rounds 5

prints a table and writes benchmarks/results/unet.json.
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from configurations import CONFIGURATIONS, Configuration, chosen
from measuring import added_memory, matmul_peak, paired, speedup
from plain_unet import plain
from records import result_path, table, write_result
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

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
    peaks = {str(d): matmul_peak(d, device) for d in (torch.float32, torch.bfloat16)}
    found = {n: measure(n, c, args.rounds, device, peaks) for n, c in configurations.items()}
    result = {"peaks": peaks, "configs": found}
    print(report(result))
    write_result(args.out, result)


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configs", default=",".join(CONFIGURATIONS), help="separated by commas")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    parser.add_argument("--out", default=result_path("unet"), help="result file")
    # what a process of its own is started with, to measure its memory
    parser.add_argument("--memory_of", default="", help=argparse.SUPPRESS)
    return parser


def networks(configuration: Configuration, device: torch.device) -> dict[str, nn.Module]:
    """The networks that are compared, with the same weights."""
    ours = configuration.network(device)
    recomputing = replace(configuration.options, use_checkpoint=True).model().to(device)
    recomputing.load_state_dict(ours.state_dict())
    return {REFERENCE: plain(ours), OURS: ours, HALF: ours, CHECKPOINTING: recomputing}


def passes(
    model: nn.Module, configuration: Configuration, half: bool, device: torch.device
) -> dict[str, Callable[[], object]]:
    """A forward pass without gradients, and a forward and backward pass, of one network."""
    size, images = configuration.options.image_size, configuration.images(device)
    x = torch.randn(images, 3, size, size, device=device)
    t = torch.arange(images, device=device) * 10.0
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=half)

    def forward() -> None:
        with torch.no_grad(), autocast:
            model(x, t)

    def training() -> None:
        model.zero_grad()
        with autocast:
            loss = model(x, t).float().square().mean()
        loss.backward()

    return {"forward": forward, "training": training}


def measure(
    name: str,
    configuration: Configuration,
    rounds: int,
    device: torch.device,
    peaks: dict[str, float],
) -> dict:
    """Times, operations, shares of the peak and memory of one configuration."""
    compared = networks(configuration, device)
    found: dict = {
        "images": configuration.images(device),
        "parameters": sum(p.numel() for p in compared[OURS].parameters()),
    }
    runs = {
        key: passes(network, configuration, key == HALF, device)
        for key, network in compared.items()
    }
    for kind in ("forward", "training"):
        of_kind = {key: own[kind] for key, own in runs.items()}
        if kind == "forward":
            del of_kind[CHECKPOINTING]  # recomputes in the backward pass alone
        operations = count_operations(of_kind[REFERENCE])
        seconds = paired(of_kind, rounds)
        found[kind] = {"operations": operations}
        for key, times in seconds.items():
            peak = peaks[str(torch.bfloat16 if key == HALF else torch.float32)]
            found[kind][key] = {
                "seconds": statistics.median(times),
                "speedup": speedup(seconds, of=key, against=REFERENCE),
                "share_of_peak": operations / statistics.median(times) / peak,
            }
    for key in compared:
        found["training"][key]["peak_memory_bytes"] = memory_in_a_process(name, key)
    return found


def count_operations(run: Callable[[], object]) -> int:
    """Floating-point operations of a call, by torch's counter.

    It does not know all fused attention kernels: to be asked of the plain rendering.
    """
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def memory_in_a_process(name: str, key: str) -> int:
    """Bytes that a training pass adds to a fresh process."""
    words = [sys.executable, __file__, "--configs", name, "--memory_of", key]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def memory_of(configuration: Configuration, key: str, device: torch.device) -> int:
    """Bytes at the peak of a training pass of one network, above those before it."""
    network = networks(configuration, device)[key]
    return added_memory(passes(network, configuration, key == HALF, device)["training"])


def report(result: dict) -> str:
    """The table that is printed."""
    header = ["config", "pass", "network", "ms", "times plain", "of the peak", "memory (MB)"]
    rows = []
    for name, found in result["configs"].items():
        for kind in ("forward", "training"):
            for key in (REFERENCE, OURS, HALF, CHECKPOINTING):
                if key not in found[kind]:
                    continue
                one = found[kind][key]
                memory = f"{one['peak_memory_bytes'] / 1e6:.0f}" if kind == "training" else ""
                times = [f"{one['seconds'] * 1e3:.1f}", f"{one['speedup']['median']:.2f}"]
                rows.append([name, kind, key, *times, f"{one['share_of_peak']:.0%}", memory])
    return table(header, rows)


if __name__ == "__main__":
    run_main(main)
