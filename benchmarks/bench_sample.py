"""Sampling: images per second, and the cost of a step outside the network.

DDPM in 250 steps, DDIM in 50, DPM-Solver++ in 15: ours against the plain rendering of the published
architecture and samplers (plain_unet.py, plain_sampling.py), with the same weights and noise, and
against the peers (peers.py), in turns. A few steps are timed and their mean taken for all, as each
costs the same. Outside the network: the same loops over 16 images of 3 x 32 x 32 with a model that
returns a fixed tensor; what drawing the noise costs is told apart, as nobody can save it.

    python benchmarks/bench_sample.py --configs small --rounds 5

prints tables and writes benchmarks/results/sample.json. On a GPU (results/sample_CARD.json) all
configurations, also with TF32 and in bfloat16, and each of ours compiled.
"""

import argparse
import contextlib
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from configurations import CONFIGURATIONS, Configuration, chosen
from measuring import paired, speedup, warm
from peers import missing, sampling_candidates
from plain_sampling import PlainSampling
from plain_unet import plain
from records import at_least, output_file, result_path, table, write_result
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from variants import autocast, compiled_if_named, switched, variants

from improved_diffusion.denoiser import Denoiser
from improved_diffusion.dist_util import run_main
from improved_diffusion.noise_levels import noise_levels
from improved_diffusion.respace import SpacedDiffusion
from improved_diffusion.script_util import ModelAndDiffusionOptions
from improved_diffusion.solvers import sample_dpmpp_2m

STEPS = {"ddpm": 250, "ddim": 50, "dpmpp_2m": 15}
OURS, PLAIN = "ours", "plain"
REFERENCE = "plain fp32"
# of the step outside the network: the network's size does not matter
OUTSIDE = Configuration(
    ModelAndDiffusionOptions(
        image_size=32, num_channels=32, num_res_blocks=1, attention_resolutions="", learn_sigma=True
    ),
    batch=16,
    batch_on_gpu=16,
)
LARGEST_PIECE = 30 << 20  # bytes


def main(argv: list[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    configurations = chosen(args.configs or default_configurations(device))
    torch.set_num_threads(args.threads or torch.get_num_threads())
    found = {
        name: measure_images(configuration, device, args.measured_steps, args.rounds, args.compile)
        for name, configuration in configurations.items()
    }
    outside = measure_outside(device, args.outside_steps, args.rounds)
    result = {"configs": found, "outside": outside, "left_out": missing()}
    print(report(result))
    write_result(args.out, result)


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--configs", help=f"of {', '.join(CONFIGURATIONS)}, separated by commas; all on a GPU"
    )
    parser.add_argument("--rounds", type=at_least(1), default=5)
    parser.add_argument("--measured_steps", type=at_least(1), default=4, help="timed of each")
    parser.add_argument("--outside_steps", type=at_least(1), default=20, help="outside the network")
    parser.add_argument("--threads", type=at_least(0), default=0, help="0: torch's choice")
    parser.add_argument(
        "--out", type=output_file, default=result_path("sample"), help="result file"
    )
    parser.add_argument("--compile", action="store_true", help="ours also compiled; takes minutes")
    return parser


def default_configurations(device: torch.device) -> str:
    """Those that are measured unless it is said which."""
    return "small" if device.type == "cpu" else ",".join(CONFIGURATIONS)


# -- the samplers ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """A process respaced to some steps, and the noise that sampling starts from, [N, C, H, W]."""

    diffusion: SpacedDiffusion
    x: Tensor

    @classmethod
    def of(cls, configuration: Configuration, device: torch.device, steps: int) -> "Sampling":
        """That of a configuration, over evenly spaced steps."""
        options = configuration.options
        settings: dict[str, Any] = {**vars(options), "timestep_respacing": str(steps)}
        size = options.image_size
        shape = (configuration.images(device), options.channels, size, size)
        return cls(type(options)(**settings).diffusion(), torch.randn(shape, device=device))

    def ours(self, sampler: str, model: Callable[..., Tensor]) -> Tensor:
        """Samples by our loops."""
        given = {"noise": self.x, "device": self.x.device}
        if sampler == "ddpm":
            return self.diffusion.p_sample_loop(model, self.x.shape, **given)
        if sampler == "ddim":
            return self.diffusion.ddim_sample_loop(model, self.x.shape, **given)
        denoise = Denoiser(model, self.diffusion, clip_denoised=True)
        sigmas = noise_levels(self.diffusion, 0, "respacing")
        return sample_dpmpp_2m(denoise, denoise.initial(self.x, float(sigmas[0])), sigmas)

    def plain(self, sampler: str, model: Callable[..., Tensor]) -> Tensor:
        """The same samples by textbook operations."""
        return PlainSampling(self.diffusion).sample(sampler, model, self.x)

    def fixed(self) -> Callable[..., Tensor]:
        """A model that returns a fixed tensor, noise and variance."""
        output = 0.5 * torch.randn_like(torch.cat([self.x, self.x], dim=1))
        return lambda x, t: output


# -- images per second ----------------------------------------------------------------------------


def measure_images(
    configuration: Configuration,
    device: torch.device,
    measured: int,
    rounds: int,
    compiled: bool = False,
) -> dict:
    """Images per second by each sampler, from the time of ``measured`` steps.

    :param compiled: also of our network compiled by torch.compile, which a GPU's has anyway.
    :return: by sampler and network.
    """
    names = variants(device, compiled)
    networks: dict[str, nn.Module] = {
        name: compiled_if_named(configuration.network(device).eval(), name) for name in names
    }
    networks[REFERENCE] = plain(configuration.network(device).eval())
    sampling = Sampling.of(configuration, device, measured)
    few = dict.fromkeys(STEPS, measured)
    found: dict = {"images": len(sampling.x), "measured_steps": measured}
    with _peers(configuration, device, "sample", few) as peers:
        for sampler, steps in STEPS.items():
            candidates = {
                name: switched(_drawing(sampling, sampler, name, network), name)
                for name, network in networks.items()
            } | _of_sampler(peers, sampler)
            seconds = paired(candidates, rounds * configuration.turns)
            found[sampler] = {"steps": steps}
            for name, times in seconds.items():
                of_step = statistics.median(times) / measured
                found[sampler][name] = {
                    "seconds_per_step": of_step,
                    "images_per_second": len(sampling.x) / (of_step * steps),
                    "speedup": speedup(seconds, of=name, against=REFERENCE),
                }
    return found


def _drawing(sampling: Sampling, sampler: str, name: str, network: nn.Module) -> Callable[[], None]:
    """A candidate: samples by a network, in the precision of its name."""
    sample = sampling.plain if name == REFERENCE else sampling.ours

    def run() -> None:
        with autocast(name, sampling.x.device):
            sample(sampler, network)

    return run


def _run(sample: Callable[..., Tensor], sampler: str, model: Callable[..., Tensor]) -> None:
    sample(sampler, model)  # a candidate returns nothing: a number would be its time


@contextlib.contextmanager
def _peers(
    configuration: Configuration, device: torch.device, what: str, steps: Mapping[str, int]
) -> Iterator[Mapping[str, Callable[[], float]]]:
    """The peers' candidates; none without their environment."""
    if missing():
        yield {}
        return
    with sampling_candidates(configuration, device, what, steps) as candidates:
        yield candidates


def _of_sampler(
    candidates: Mapping[str, Callable[[], float]], sampler: str
) -> dict[str, Callable[[], float]]:
    """A sampler's candidates, without its name: "diffusers fp32" of "diffusers fp32 ddim"."""
    split = {name: name.rsplit(" ", 1) for name in candidates}
    return {split[name][0]: run for name, run in candidates.items() if split[name][1] == sampler}


# -- outside the network --------------------------------------------------------------------------


def measure_outside(device: torch.device, steps: int, rounds: int) -> dict:
    """Seconds of a step outside the network, and how many operations it hands to the device.

    :return: by sampler: for each candidate "seconds_per_step", "share" of the plain rendering's
        (median and quartiles), and for ours and the plain one "operations"; and of those that draw
        noise "share_without_noise", once the time of that is taken from both.
    """
    sampling = Sampling.of(OUTSIDE, device, steps)
    model = sampling.fixed()
    # as a network would: the allocator learns to keep pieces of that size, rather than to hand each
    # back to the system, after which all that is timed is the system's clearing of pages
    torch.empty(LARGEST_PIECE, dtype=torch.uint8).fill_(1)
    found: dict = {"images": len(sampling.x), "measured_steps": steps}
    with _peers(OUTSIDE, device, "sampling_step", dict.fromkeys(STEPS, steps)) as peers:
        for sampler in STEPS:
            own = {
                OURS: lambda s=sampler: _run(sampling.ours, s, model),
                PLAIN: lambda s=sampler: _run(sampling.plain, s, model),
            }
            # a peer tells the seconds of a step, the mean of all
            of_peers = {
                name: lambda run=run: run() * steps
                for name, run in _of_sampler(peers, sampler).items()
            }
            noise = {"noise": lambda: _draw(sampling.x, steps)}
            candidates = {**own, **of_peers, **noise}
            seconds = paired({name: warm(run) for name, run in candidates.items()}, 4 * rounds)
            found[sampler] = _outside(seconds, steps, draws=sampler != "dpmpp_2m")
            for name, run in own.items():
                found[sampler][name]["operations"] = count_operations(run) / steps
    return found


def _draw(x: Tensor, steps: int) -> None:
    for _ in range(steps):
        torch.randn_like(x)


def _outside(seconds: Mapping[str, list[float]], steps: int, draws: bool) -> dict:
    found: dict = {}
    for name, times in seconds.items():
        share = speedup(seconds, of=PLAIN, against=name)
        found[name] = {"seconds_per_step": statistics.median(times) / steps, "share": share}
        if draws and name in (OURS, PLAIN):
            rounds = zip(times, seconds[PLAIN], seconds["noise"], strict=True)
            shares = [(own - noise) / (plain - noise) for own, plain, noise in rounds]
            found[name]["share_without_noise"] = statistics.median(shares)
    return found


class Operations(TorchDispatchMode):
    """Counts the operations that compute or copy; a new view of the same memory is none."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += not (func.is_view or func._schema.name in ("aten::empty", "aten::detach"))
        return func(*args, **(kwargs or {}))


def count_operations(run: Callable[[], object]) -> int:
    """The operations that a call hands to the device: kernels, more or less."""
    with Operations() as counter:
        run()
    return counter.count


# -- the tables -----------------------------------------------------------------------------------


def report(result: dict) -> str:
    """The tables that are printed."""
    rows = [
        [name, sampler, of[sampler]["steps"], key, *_image_cells(of[sampler][key])]
        for name, of in result["configs"].items()
        for sampler in STEPS
        for key in of[sampler]
        if key != "steps"
    ]
    header = ["config", "sampler", "steps", "by", "ms per step", "images/s", "times plain"]
    tables = [table(header, rows)]
    rows = [
        [sampler, key, *_outside_cells(one)]
        for sampler in STEPS
        for key, one in result["outside"][sampler].items()
    ]
    header = ["outside", "by", "us per step", "of plain", "without noise", "operations"]
    return "\n\n".join([*tables, table(header, rows), result["left_out"]]).rstrip()


def _image_cells(one: dict) -> list[str]:
    return [
        f"{one['seconds_per_step'] * 1e3:.1f}",
        f"{one['images_per_second']:.2f}",
        f"{one['speedup']['median']:.2f}",
    ]


def _outside_cells(one: dict) -> list[str]:
    quiet, operations = one.get("share_without_noise"), one.get("operations")
    return [
        f"{one['seconds_per_step'] * 1e6:.0f}",
        f"{one['share']['median']:.2f}",
        "" if quiet is None else f"{quiet:.2f}",
        "" if operations is None else f"{operations:.1f}",
    ]


if __name__ == "__main__":
    run_main(main)
