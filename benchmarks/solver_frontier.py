"""How good samples are after how many evaluations of the network, for all samplers.

On a mixture of Gaussians, whose best denoiser is known: how far the deterministic ones end from
the exact solution of the probability-flow ODE, and how far the samples of all are from the data's
distribution. On a checkpoint of the demo: the Frechet distance between samples and real digits, on
pixels, and the share that is recognised as the digit asked for.

    make demo
    python benchmarks/solver_frontier.py --model_path runs/demo/train/ema_0.99_001500.pt

writes benchmarks/results/solver_frontier.json and docs/solver_frontier.png.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from demo_quality import measure
from records import output_file, pyplot, write_result

from improved_diffusion.dist_util import run_main
from improved_diffusion.errors import UserError
from improved_diffusion.noise_levels import NoiseLevels
from improved_diffusion.rng import randn, sample_generators
from improved_diffusion.sample_util import to_uint8
from improved_diffusion.sampling import (
    DEFAULT_SPACING,
    SampleOptions,
    draw_samples,
    sampling_levels,
)
from improved_diffusion.script_util import (
    create_gaussian_diffusion,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)
from improved_diffusion.solvers import sample_heun
from improved_diffusion.state_dicts import load_model
from improved_diffusion.stored_flags import load_config

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from analytic import Mixture, as_network  # noqa: E402

DETERMINISTIC = ("ddim", "euler", "heun", "dpmpp_2m", "dpmpp_3m", "unipc")
STEPS = (5, 10, 15, 20, 50)
MORE_STEPS = (7, 30, 100)  # on the mixture, whose network costs nothing
TOLERANCES = (1e-2, 1e-3)  # of the ODE, in place of steps
DDPM_STEPS = 250  # what the others are to be compared with
FINE = 4000  # steps of the reference solution
DIRECTIONS = 64
SEED = 0


def main(argv: list[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    torch.set_num_threads(1)
    result = {"mixture": on_mixture(args.mixture_samples)}
    if args.model_path:
        result["demo"] = on_demo(args.model_path, args.samples)
    result["samples"] = {"mixture": args.mixture_samples, "demo": args.samples}
    write_result(args.out, result)
    if args.picture:
        plot(result, args.picture)
        print(f"wrote {args.picture}")


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_path", default="", help="checkpoint of the demo; '': mixture only")
    parser.add_argument("--samples", type=int, default=1000, help="of the demo, a setting")
    parser.add_argument("--mixture_samples", type=int, default=20000, help="a setting")
    parser.add_argument(
        "--out", type=output_file, default=str(ROOT / "benchmarks/results/solver_frontier.json")
    )
    parser.add_argument(
        "--picture", default=str(ROOT / "docs/solver_frontier.png"), help="'' for none"
    )
    return parser


def settings(numbers: tuple[int, ...]) -> list[dict]:
    """What is measured: options of a sampler and its steps, with its own default spacing."""
    chosen = [
        {"sampler": sampler, "steps": steps}
        for sampler in DEFAULT_SPACING
        if sampler != "ode"
        for steps in numbers
    ]
    chosen += [{"sampler": "ode", "ode_tolerance": tolerance} for tolerance in TOLERANCES]
    return [*chosen, {"sampler": "ddpm", "steps": DDPM_STEPS}]


class Counted:
    """A model that counts how many samples it has been evaluated on."""

    def __init__(self, model):
        self.model = model
        self.rows = 0

    def __call__(self, x, t, **kwargs):
        self.rows += len(x)
        return self.model(x, t, **kwargs)


# -- the mixture --------------------------------------------------------------------------------


def on_mixture(count: int) -> list[dict]:
    """Errors on five clusters in the plane: "path" (deterministic samplers) and "distribution"."""
    angles = torch.arange(5, dtype=torch.float64) * 2 * np.pi / 5
    means = 0.7 * torch.stack([angles.cos(), angles.sin()], dim=1).view(5, 2, 1, 1)
    data = Mixture([0.2] * 5, means, [0.05, 0.08, 0.11, 0.14, 0.17])
    diffusion = create_gaussian_diffusion(noise_schedule="cosine")
    exact = data.sample(count, seed=SEED).flatten(1)
    references: dict[float, torch.Tensor] = {}  # by the level that a sampler begins at
    floor = sliced_wasserstein(data.sample(count, seed=SEED + 1).flatten(1), exact)
    points = [{"sampler": "data", "distribution": floor}]
    for setting in settings(STEPS + MORE_STEPS):
        few = min(count, 200) if setting["sampler"] == "ode" else count
        samples, evaluations = draw(as_network(diffusion, data), diffusion, setting, few, (2, 1, 1))
        point = {**setting, "evaluations": evaluations}
        if few == count:
            point["distribution"] = sliced_wasserstein(samples.flatten(1).double(), exact)
        if setting["sampler"] in (*DETERMINISTIC, "ode"):
            first = float(sampling_levels(diffusion, SampleOptions(**setting))[0])
            if first not in references:
                references[first] = exact_ends(data, diffusion, first, count)
            error = samples.flatten(1).double() - references[first][:few]
            point["path"] = error.square().mean().sqrt().item()
        points.append(point)
        print(json.dumps(point), flush=True)
    return points


def exact_ends(data: Mixture, diffusion, first: float, count: int) -> torch.Tensor:
    """Where the probability-flow ODE leads the noise of each sample, [N, 2], by many steps.

    :param first: the level to begin at.
    """
    noise = randn((count, 2, 1, 1), sample_generators(SEED, range(count))).double()
    x = noise * np.hypot(1, first)
    sigmas = np.geomspace(first, NoiseLevels(diffusion).sigma_min, FINE)
    return sample_heun(data, x, np.append(sigmas, 0.0)).flatten(1)


def sliced_wasserstein(samples: torch.Tensor, exact: torch.Tensor) -> float:
    """Root mean square over directions of the 2-Wasserstein distance of the projections.

    :param samples: [N, d].
    :param exact: [N, d] draws of the data.
    """
    generator = torch.Generator().manual_seed(SEED)
    directions = torch.randn(samples.shape[1], DIRECTIONS, generator=generator, dtype=torch.float64)
    directions = directions / directions.norm(dim=0)
    ranked = [(points @ directions).sort(dim=0).values for points in (samples, exact)]
    return (ranked[0] - ranked[1]).square().mean().sqrt().item()


# -- the demo -----------------------------------------------------------------------------------


def on_demo(model_path: str, count: int) -> list[dict]:
    """Frechet distance and share of recognised digits of a class-conditional checkpoint."""
    stored = load_config(os.path.dirname(model_path))
    if not stored.get("class_cond") or stored.get("image_size") != 8:
        raise UserError(f"--model_path {model_path}: no checkpoint of the demo, with its flags")
    defaults = model_and_diffusion_defaults()
    flags = {name: stored.get(name, default) for name, default in defaults.items()}
    model, diffusion = create_model_and_diffusion(**flags)
    load_model(model, model_path)
    model.eval()
    labels = torch.arange(count) % 10
    points = []
    for setting in settings(STEPS):
        if setting["sampler"] == "ode":  # one image at a time, too slow for as many
            continue
        samples, evaluations = draw(model, diffusion, setting, count, (1, 8, 8), labels)
        quality = measure(to_uint8(samples).numpy(), labels.numpy())
        point = {**setting, "evaluations": evaluations}
        point |= {key: quality[key] for key in ("frechet", "recognised")}
        points.append(point)
        print(json.dumps(point), flush=True)
    return points


def draw(
    model, diffusion, setting: dict, count: int, shape: tuple, labels=None
) -> tuple[torch.Tensor, float]:
    """Samples [count, C, H, W] as the scripts draw them; and evaluations for each."""
    options, counted, made = SampleOptions(**setting), Counted(model), []
    batch = 500 if labels is not None else count
    for start in range(0, count, batch):
        indices = list(range(start, min(start + batch, count)))
        kwargs = {} if labels is None else {"y": labels[indices]}
        made.append(draw_samples(counted, diffusion, indices, shape, options, SEED, kwargs))
    return torch.cat(made), counted.rows / count


# -- the picture --------------------------------------------------------------------------------


def plot(result: dict, path: str) -> None:
    """Error against evaluations, a line for each sampler."""
    panels = [
        ("mixture", "path", "Mixture: distance to the exact ODE solution"),
        ("mixture", "distribution", "Mixture: distance to the data's distribution"),
        ("demo", "frechet", "Digits: Fréchet distance of pixels"),
    ]
    panels = [panel for panel in panels if panel[0] in result]
    figure, axes = pyplot().subplots(1, len(panels), figsize=(5 * len(panels), 4.6))
    names = list(DEFAULT_SPACING)
    for axis, (problem, key, title) in zip(np.atleast_1d(axes), panels, strict=True):
        for number, name in enumerate(names):
            points = [p for p in result[problem] if p["sampler"] == name and key in p]
            points.sort(key=lambda p: p["evaluations"])
            style = {"color": f"C{number % 10}", "marker": "os^vD"[number % 5], "markersize": 4}
            axis.plot(
                [p["evaluations"] for p in points],
                [p[key] for p in points],
                linestyle="-" if name in (*DETERMINISTIC, "ode") else "--",
                label=name,
                **style,
            )
        floor = [p[key] for p in result[problem] if p["sampler"] == "data" and key in p]
        for value in floor:
            axis.axhline(value, color="grey", linestyle=":", label="other draws of the data")
        axis.set(xscale="log", yscale="log", title=title, xlabel="evaluations of the network")
        axis.title.set_fontsize(10)
        axis.set_xticks([5, 10, 20, 50, 100, 250], ["5", "10", "20", "50", "100", "250"])
        if key == "frechet":  # within one power of ten
            axis.set_yticks([12, 15, 20, 30, 50, 100], ["12", "15", "20", "30", "50", "100"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    handles = {
        label: line
        for axis in figure.axes
        for line, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncol=6, frameon=False)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    run_main(main)
