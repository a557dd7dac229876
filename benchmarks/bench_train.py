"""A whole training step, data included: images per second, the time not in the network, memory.

Our TrainLoop in float32 and bfloat16 against the plain rendering of network and step
(plain_unet.py, plain_training.py), with the same weights and the same pictures from the same
loader, in turns with the passes through our network alone; and against the peers' own training
steps (peers.py), which need `make peers` and are left out without. Then the parts: the losses
outside of the network, and the update with gradient norm and averages.

    python benchmarks/bench_train.py --configs small --rounds 7

prints tables and writes benchmarks/results/train.json. On a GPU (results/train_CARD.json) also with
TF32, and each of ours compiled.
"""

import argparse
import contextlib
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from configurations import CONFIGURATIONS, Configuration, chosen
from measuring import added_memory, in_a_fresh_process, paired, speedup
from peer_tasks import count_operations
from peers import missing, training_candidates
from PIL import Image
from plain_training import PlainProcess, PlainTraining
from plain_unet import plain
from records import at_least, output_file, result_path, table, write_result
from torch import Tensor, nn
from variants import BF16, FP32, compiled_if_named, precision_of, switched, variants

from improved_diffusion import logger
from improved_diffusion.dist_util import run_main
from improved_diffusion.image_datasets import ImageStream, load_data
from improved_diffusion.optimization import OptimizationOptions
from improved_diffusion.train_util import TrainLoop

REFERENCE = "plain fp32"
OURS, HALF, CHECKPOINTING = "ours fp32", "ours bf16", "ours fp32, checkpointing"
LOSS_SHAPE = (16, 3, 32, 32)
LOSSES_AT_ONCE = 64  # calls per round, each of which is short


def main(argv: list[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    configurations = chosen(args.configs or default_configurations(device))
    torch.set_num_threads(args.threads or torch.get_num_threads())
    if args.memory_of:
        (configuration,) = configurations.values()
        print(memory_of(configuration, args.memory_of, device))
        return
    result: dict = {
        "losses": measure_losses(args.rounds, device),
        "left_out": missing(),
        "configs": {},
    }
    for name, configuration in configurations.items():
        found = measure(configuration, args.rounds, args.num_workers, device, args.compile)
        found["peak_memory_bytes"] = {
            key: memory_in_a_process(name, key, args.threads)
            for key in (REFERENCE, OURS, HALF, CHECKPOINTING)
        }
        result["configs"][name] = found
    print(report(result))
    write_result(args.out, result)


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--configs", help=f"of {', '.join(CONFIGURATIONS)}, separated by commas; all on a GPU"
    )
    parser.add_argument("--rounds", type=at_least(1), default=5)
    parser.add_argument("--threads", type=at_least(0), default=0, help="0: torch's choice")
    parser.add_argument("--num_workers", type=at_least(0), default=1, help="that read pictures")
    parser.add_argument("--out", type=output_file, default=result_path("train"), help="result file")
    parser.add_argument("--compile", action="store_true", help="ours also compiled; takes minutes")
    # what a process of its own is started with, to measure its memory
    parser.add_argument("--memory_of", default="", help=argparse.SUPPRESS)
    return parser


def default_configurations(device: torch.device) -> str:
    """Those that are measured unless it is said which: imagenet64, with its peers, does not
    fit in 24 GB."""
    return "small,cifar10" if device.type == "cpu" else ",".join(CONFIGURATIONS)


# -- the steps --------------------------------------------------------------------------------


def pictures(folder: str, size: int, images: int, num_workers: int) -> ImageStream:
    """Batches of generated pictures by the loader of the scripts."""
    draws = np.random.default_rng(0)
    for i in range(images):
        pixels = draws.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(Path(folder) / f"{i}.png")
    return load_data(
        data_dir=folder, batch_size=images, image_size=size, num_workers=num_workers, seed=0
    )


def make_loop(
    model: nn.Module, configuration: Configuration, data: ImageStream, name: str
) -> TrainLoop:
    """Our training of a model, with the scripts' defaults and the precision of a candidate."""
    return TrainLoop(
        model=model,
        diffusion=configuration.options.diffusion(),
        data=data,
        batch_size=data.batch_size,
        microbatch=-1,
        lr=1e-4,
        ema_rate="0.9999",
        log_interval=10,
        save_interval=10**9,
        resume_checkpoint="",
        seed=0,
        optimization=OptimizationOptions(precision=BF16 if precision_of(name) == BF16 else FP32),
    )


def our_step(loop: TrainLoop) -> Callable[[], object]:
    """One step of :meth:`.TrainLoop.run_loop`."""
    progress = loop._progress()

    def step() -> None:
        with progress.waiting():
            batch, cond = next(loop.data)
        loop.run_step(batch, cond)
        progress.step()
        loop._write_log(progress)
        loop.step += 1

    return step


def plain_step(training: PlainTraining, data: ImageStream) -> Callable[[], object]:
    """One step of the plain rendering, with timesteps by NumPy."""
    draws = np.random.default_rng(0)

    def step() -> None:
        batch, cond = next(data)
        t = draws.integers(0, training.num_timesteps, len(batch))
        training.step(batch, cond, torch.from_numpy(t))

    return step


def network_pass(loop: TrainLoop, size: int) -> Callable[[], object]:
    """The network alone, forward and backward, in the precision of a loop."""
    x = torch.randn(loop.batch_size, 3, size, size, device=loop.device)
    t = torch.arange(loop.batch_size, device=loop.device)
    return lambda: loop._network(x, t).square().mean().backward()


# -- what is measured -------------------------------------------------------------------------


def measure(
    configuration: Configuration,
    rounds: int,
    num_workers: int,
    device: torch.device,
    compiled: bool = False,
) -> dict:
    """Steps and their parts of one configuration.

    :param compiled: also of our network compiled by torch.compile, which a GPU's has anyway.
    """
    ours = variants(device, compiled)
    rounds *= configuration.turns
    size, images = configuration.options.image_size, configuration.images(device)
    network = configuration.network(device)
    training = PlainTraining(plain(network), configuration.options.diffusion())
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(logger.scoped_configure(f"{folder}/run", ["csv"]))
        streams = [pictures(folder, size, images, num_workers) for _ in range(len(ours) + 1)]
        candidates = {REFERENCE: switched(plain_step(training, streams.pop()), REFERENCE)}
        loops = {}
        for name in ours:
            model = compiled_if_named(configuration.network(device), name)
            loops[name] = make_loop(model, configuration, streams.pop(), name)
            candidates[name] = switched(our_step(loops[name]), name)
            candidates[alone(name)] = switched(network_pass(loops[name], size), name)
        seconds = paired(candidates, rounds)
        # apart: who comes after another process's turn finds threads asleep and caches cold
        peers = stack.enter_context(training_candidates(configuration, device))
        beside = paired({name: candidates[name] for name in ours} | peers, rounds)
        updates = {
            "plain": training.update,
            "ours": loops[OURS]._update_weights,
        }
        update_seconds = paired(updates, rounds)
        operations = dict.fromkeys(candidates, count_operations(candidates[alone(OURS)]))
        operations |= {name: peer.facts["operations"] for name, peer in peers.items()}
    found: dict = {
        "images": images,
        "parameters": sum(p.numel() for p in network.parameters()),
        "updates": compared(update_seconds),
        "steps": {
            name: step_facts(beside if name in peers else seconds, name, images, operations)
            for name in (REFERENCE, *ours, *peers)
        },
    }
    found["peers"] = {name: candidate.peer.versions for name, candidate in peers.items()}
    for name in ours:
        found["steps"][name]["share_outside_the_network"] = statistics.median(
            1 - inside / whole
            for whole, inside in zip(seconds[name], seconds[alone(name)], strict=True)
        )
    return found


def alone(name: str) -> str:
    """The network of a candidate, as a candidate of its own."""
    return f"{name}, the network alone"


def step_facts(
    seconds: dict[str, list[float]], name: str, images: int, operations: dict[str, int]
) -> dict:
    """What is reported of a candidate; "ours_per_operation" is of operations per second."""
    median = statistics.median(seconds[name])
    found = {
        "seconds": median,
        "images_per_second": images / median,
        "operations": operations[name],
        "rounds_seconds": seconds[name],
    }
    if REFERENCE in seconds:
        found["speedup"] = speedup(seconds, of=name, against=REFERENCE)
    library = name.split()[0]
    ours = speedup(seconds, of=name.replace(library, "ours"), against=name)
    share = operations[OURS] / operations[name]
    found["ours_per_operation"] = {key: share * ratio for key, ratio in ours.items()}
    return found


def compared(seconds: dict[str, list[float]]) -> dict:
    """What is reported of "ours" and "plain"."""
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {"seconds": medians, "speedup": speedup(seconds, of="ours", against="plain")}


def losses_outside_the_network(device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
    """Forward and backward through the losses of a model that costs nothing.

    :return: "ours" and "plain": from timesteps [16] to the gradient by the model's output.
    """
    diffusion = CONFIGURATIONS["cifar10"].options.diffusion()
    torch.manual_seed(0)
    images, noise = (torch.randn(LOSS_SHAPE, device=device).clamp(-1, 1) for _ in range(2))
    n, channels, *sides = LOSS_SHAPE
    output = torch.randn(n, 2 * channels, *sides, device=device, requires_grad=True)

    def gradient(process: object) -> Callable[[Tensor], Tensor]:
        def run(t: Tensor) -> Tensor:
            losses = process.training_losses(lambda x, t: output, images, t, {}, noise=noise)
            return torch.autograd.grad(losses["loss"].mean(), output)[0]

        return run

    return {"plain": gradient(PlainProcess(diffusion)), "ours": gradient(diffusion)}


def measure_losses(rounds: int, device: torch.device) -> dict:
    """Seconds of a call with learned sigma; t is 0 in one of 64 batches, as often as by chance."""
    steps = CONFIGURATIONS["cifar10"].options.diffusion_steps
    draws = torch.Generator().manual_seed(0)
    sizes = (LOSSES_AT_ONCE, LOSS_SHAPE[0])
    timesteps = torch.randint(1, steps, sizes, generator=draws)
    timesteps[0, 0] = 0
    timesteps = timesteps.to(device)

    def all_of(run: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def calls() -> None:
            for t in timesteps:
                run(t)

        return calls

    candidates = {name: all_of(run) for name, run in losses_outside_the_network(device).items()}
    seconds = paired(candidates, 4 * rounds, warm_up=2)
    return compared({name: [s / len(timesteps) for s in own] for name, own in seconds.items()})


def memory_in_a_process(name: str, key: str, threads: int) -> int:
    """Bytes that training adds to a fresh process."""
    words = [__file__, "--configs", name, "--memory_of", key, "--threads", str(threads)]
    return in_a_fresh_process(words)


def memory_of(configuration: Configuration, key: str, device: torch.device) -> int:
    """Bytes at the peak of two training steps, above those of weights and averages.

    Two, as the optimiser's moments come with the first.
    """
    size, images = configuration.options.image_size, configuration.images(device)
    if key == CHECKPOINTING:
        recomputing = replace(configuration.options, use_checkpoint=True)
        configuration = replace(configuration, options=recomputing)
    network = configuration.network(device)
    with tempfile.TemporaryDirectory() as folder, logger.scoped_configure(f"{folder}/run", ["csv"]):
        data = pictures(folder, size, images, num_workers=0)
        if key == REFERENCE:
            network = plain(network)
            step = plain_step(PlainTraining(network, configuration.options.diffusion()), data)
        else:
            step = our_step(make_loop(network, configuration, data, key))
        return added_memory(lambda: (step(), step()))


# -- what is printed --------------------------------------------------------------------------


def report(result: dict) -> str:
    """The tables."""
    steps, parts = [], [_part("losses, learned sigma, 16x3x32x32", result["losses"])]
    for name, found in result["configs"].items():
        parts.append(_part(f"{name}: norm, update, average", found["updates"]))
        memory = found["peak_memory_bytes"]
        for key, one in found["steps"].items():
            outside = one.get("share_outside_the_network")
            cells = [
                f"{one['seconds'] * 1e3:.1f}",
                f"{one['images_per_second']:.1f}",
                _with_quartiles(one["speedup"]) if "speedup" in one else "",
                _with_quartiles(one["ours_per_operation"]),
                "" if outside is None else f"{outside:.1%}",
            ]
            steps.append([name, key, *cells, *_memory(memory, key)])
        steps.append([name, CHECKPOINTING, *[""] * 5, *_memory(memory, CHECKPOINTING)])
    header = ["config", "step", "ms", "images/s", "times plain", "ours per operation"]
    header += ["outside the network", "memory (MB)", "of plain's"]
    tables = [
        table(header, steps),
        table(["part", "plain (ms)", "ours (ms)", "times plain"], parts),
        result["left_out"],
    ]
    return "\n\n".join(tables).rstrip()


def _with_quartiles(ratio: dict[str, float]) -> str:
    if ratio["low"] == ratio["high"]:
        return f"{ratio['median']:.2f}"
    return "{median:.2f} ({low:.2f} to {high:.2f})".format(**ratio)


def _memory(memory: dict[str, int], key: str) -> list[str]:
    if key not in memory:
        return ["", ""]
    return [f"{memory[key] / 1e6:.0f}", f"{memory[key] / memory[REFERENCE]:.0%}"]


def _part(name: str, found: dict) -> list[str]:
    times = [f"{found['seconds'][key] * 1e3:.3f}" for key in ("plain", "ours")]
    return [name, *times, f"{found['speedup']['median']:.2f}"]


if __name__ == "__main__":
    run_main(main)
