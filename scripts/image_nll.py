"""Evaluate the likelihood of a folder of images under a checkpoint, in bits/dim."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from improved_diffusion import dist_util, logger, runs
from improved_diffusion.compiling import CompileOptions, check_compiler, compile_if_asked
from improved_diffusion.dist_util import run_main
from improved_diffusion.errors import UserError
from improved_diffusion.files import open_whole, write_file
from improved_diffusion.flags import (
    ArgumentParser,
    defaults,
    make_parser,
    option,
    pick,
    require,
    require_at_least,
)
from improved_diffusion.image_datasets import DataOptions, ImageList, list_images, load_once
from improved_diffusion.likelihood import BoundLikelihood, BoundOptions, bits_of_a_range
from improved_diffusion.likelihood_ode import FlowLikelihood, FlowOptions
from improved_diffusion.nll_results import Batches, Likelihood, Results, measure_all, saving
from improved_diffusion.pixels import check_files, parse_value_range
from improved_diffusion.same_job import deciding_flags
from improved_diffusion.script_util import (
    ModelAndDiffusionOptions,
    args_to_dict,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)

METHODS = {"vlb": ("vlb",), "ode": ("ode",), "both": ("vlb", "ode")}
OWN_OPTIONS: dict[str, type] = {"vlb": BoundOptions, "ode": FlowOptions}
RESULTS = "nll_images.npz"  # by image; what continuing goes by, too


@dataclass(frozen=True)
class NLLOptions:
    """How many images to evaluate, and how."""

    method: str = option(
        "vlb", "'vlb': the variational bound, 'ode': by the probability-flow ODE, or 'both'"
    )
    num_samples: int = option(1000, "how many images to evaluate, in the order of their names")
    batch_size: int = option(1, "images at a time and process; does not change the result")
    model_path: str = option("", "checkpoint; its flags are read from the folder it lies in")

    def __post_init__(self) -> None:
        require(self.method in METHODS, "method", self.method, "vlb, ode or both")
        require_at_least(1, self, ["num_samples", "batch_size"])
        if not self.model_path:
            raise UserError("--model_path is missing: name a checkpoint")


def main() -> None:
    flags, given = runs.parse(create_argparser())
    options = pick(NLLOptions, flags)
    check_own_options(options.method, given)
    pick(DataOptions, flags), pick(BoundOptions, flags), pick(FlowOptions, flags)
    flags = runs.prepare_from_checkpoint(flags, given)
    model, diffusion = create_model_and_diffusion(
        **args_to_dict(flags, model_and_diffusion_defaults())
    )
    methods = make_methods(model, diffusion, flags)
    runs.load_for_evaluation(model, options.model_path)
    check_compiler(pick(CompileOptions, flags))
    images = find_images(flags)
    deciding = deciding_flags(
        {name: value for name, value in flags.items() if name != "num_workers"},
        model_path=model.state_dict().values(),
        data_dir=[identity(images, flags["data_dir"])],
    )
    path = os.path.join(flags["log_dir"], RESULTS)
    results = Results(methods)
    results.load(path, deciding)
    batches = missing_batches(images, results, flags)
    runs.open_folder(flags["log_dir"], flags)
    compile_if_asked(pick(CompileOptions, flags), model)

    if flags["value_range"]:
        what = "bound is" if options.method == "vlb" else "results are"
        logger.log(f"the {what} in {bits_of_a_range(flags['value_range'])}")
    wanted = min(options.num_samples, len(images.paths))
    if results.count:
        logger.log(f"going on: {results.count} of {wanted} images are in {path}")
    show(saving(measure_all(methods, batches, results), path, deciding), results, wanted)
    if dist_util.get_rank() == 0:
        write(flags, methods, results, deciding)
        logger.log(f"done {results.count} of {len(images.paths)} images: {summary(results)}")
        if options.num_samples > len(images.paths):
            logger.log(f"the data ended before --num_samples {options.num_samples}")
        elif options.num_samples < results.count:
            logger.log(f"--num_samples {options.num_samples} is less than {RESULTS} held already")


def check_own_options(method: str, given: set[str]) -> None:
    """Refuse flags of a method that is not used."""
    for name, options in OWN_OPTIONS.items():
        odd = sorted(given & set(defaults(options)))
        if odd and name not in METHODS[method]:
            raise UserError(f"--{odd[0]} is of --method {name} or both, not of --method {method}")


def make_methods(
    model: torch.nn.Module, diffusion: Any, flags: dict[str, Any]
) -> dict[str, Likelihood]:
    """The methods to use, by name."""
    wanted, respacing = METHODS[flags["method"]], flags["timestep_respacing"]
    if respacing and wanted == ("ode",):
        raise UserError(
            f"--timestep_respacing {respacing} is of --method vlb or both: the ODE has no steps "
            "but its solver's; give --timestep_respacing '' with --method ode"
        )
    makers: dict[str, Any] = {"vlb": BoundLikelihood, "ode": FlowLikelihood}
    return {
        name: makers[name](model, diffusion, pick(OWN_OPTIONS[name], flags), flags["seed"])
        for name in wanted
    }


def find_images(flags: dict[str, Any]) -> ImageList:
    """The images, with the labels that the checkpoint knows."""
    value_range = parse_value_range(flags["value_range"])
    images = list_images(
        flags["data_dir"], flags["class_cond"], flags["labels_from"], value_range=value_range
    )
    if value_range is not None and images.packed is None:
        check_files(images.paths, flags["channels"], value_range)
    images = runs.relabel(images, flags["class_names"])
    runs.check_class_names(flags, images)
    return images


def identity(images: ImageList, data_dir: str) -> torch.Tensor:
    """What tells one list of images from another: where they lie, their names and classes."""
    folder = data_dir if "://" in data_dir else os.path.abspath(data_dir)
    names = [
        os.path.relpath(path, data_dir) if not images.packed else path for path in images.paths
    ]
    text = json.dumps([folder, names, images.classes])
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def missing_batches(images: ImageList, results: Results, flags: dict[str, Any]) -> Batches:
    """Batches of the images that are not among the results, with their indices."""
    missing = results.missing(min(flags["num_samples"], len(images.paths)))
    batches = load_once(
        images.pick(missing),
        len(missing),
        flags["batch_size"],
        flags["image_size"],
        channels=flags["channels"],
        num_workers=flags["num_workers"],
        value_range=parse_value_range(flags["value_range"]),
        device=dist_util.dev(),
    )
    return ((batch, cond, [missing[i] for i in indices]) for batch, cond, indices in batches)


def show(rounds: Iterable[Results], results: Results, wanted: int) -> None:
    """Measure all images, with the estimate so far and the time left in a bar."""
    first = dist_util.get_rank() == 0
    with tqdm(total=wanted, initial=results.count, unit="image", disable=not first) as bar:
        for _ in rounds:
            texts = {name: results.estimate(name) for name in results.bpd}
            shown = [f"{one.bpd:.4f} +- {one.standard_error:.4f}" for one in texts.values()]
            if list(texts) != ["vlb"]:
                shown = [f"{name} {text}" for name, text in zip(texts, shown, strict=True)]
            bar.set_postfix_str(f"{', '.join(shown)} bits/dim", refresh=False)
            bar.update(results.count - bar.n)


def summary(results: Results) -> str:
    """The result in one line."""
    texts = []
    for name in results.bpd:
        one = results.estimate(name)
        text = f"bpd={one.bpd:.6g} +- {one.standard_error:.2g}"
        texts.append(text if list(results.bpd) == ["vlb"] else f"{name} {text}")
    return ", ".join(texts)


def write(
    flags: dict[str, Any],
    methods: Mapping[str, Likelihood],
    results: Results,
    deciding: Mapping[str, Any],
) -> None:
    """Write the final numbers: ``nll.json``, and of the whole bound its terms by timestep."""
    final = {
        name: {
            **asdict(results.estimate(name)),
            **{key: float(mean) for key, mean in results.means(name).items() if mean.ndim == 0},
            **method.protocol(),
        }
        for name, method in methods.items()
    }
    for values in final.values():
        if math.isinf(values["standard_error"]):
            values["standard_error"] = None  # JSON knows no infinity
    sources = {name: deciding[name] for name in ("model_path", "data_dir", "seed", "value_range")}
    text = json.dumps({**final, **sources}, indent=1) + "\n"
    write_file(os.path.join(flags["log_dir"], "nll.json"), text.encode())
    for name, terms in results.means("vlb").items() if "vlb" in methods else ():
        with open_whole(os.path.join(flags["log_dir"], f"{name}_terms.npz")) as file:
            np.savez(file, terms)


def create_argparser() -> ArgumentParser:
    return make_parser(
        "Evaluate bits/dim by the variational bound, the probability-flow ODE, or both.",
        DataOptions,
        NLLOptions,
        BoundOptions,
        FlowOptions,
        CompileOptions,
        ModelAndDiffusionOptions,
        runs.RunOptions,
    )


if __name__ == "__main__":
    run_main(main)
