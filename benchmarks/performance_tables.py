"""Fills the tables of docs/performance.md from the results, the targets beside what was measured.

    python benchmarks/performance_tables.py

A table stands between <!-- table: NAME --> and <!-- end -->: what the benchmark prints of
results/NAME.json; "targets" is made of all of them.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_import
import bench_loader
import bench_sample
import bench_save
import bench_scaling
import bench_train
import bench_unet
import torch
from records import RESULTS, ROOT, table

from improved_diffusion.dist_util import run_main
from improved_diffusion.errors import UserError

DOCUMENT = ROOT / "docs" / "performance.md"
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
REPORTS: dict[str, Callable[[dict], str]] = {
    "unet": bench_unet.report,
    "train": bench_train.report,
    "sample": bench_sample.report,
    "loader": bench_loader.report,
    "save": bench_save.report,
    "import": bench_import.report,
    "scaling_one_host": bench_scaling.report,
}
Results = dict[str, dict[str, Any]]


def main(argv: list[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args(argv)
    if torch.cuda.is_available():
        raise UserError(
            "the tables are those of a CPU: hide the GPUs (CUDA_VISIBLE_DEVICES=), or read "
            "benchmarks/results"
        )
    DOCUMENT.write_text(filled(DOCUMENT.read_text(), read_results(RESULTS)))
    print(f"wrote {DOCUMENT}")


def read_results(folder: Path) -> Results:
    """The results by name.

    :raises ValueError: naming the benchmark to run, if one is missing.
    """
    results = {}
    for name in REPORTS:
        path = folder / f"{name}.json"
        if not path.exists():
            raise UserError(f"'{path}' is missing: run `make bench`")
        results[name] = json.loads(path.read_text())
    return results


def filled(text: str, results: Results) -> str:
    """The document with the tables of these results."""

    def block(match: re.Match) -> str:
        name = match[2]
        content = targets(results) if name == "targets" else REPORTS[name](results[name])
        return f"{match[1]}\n{content}\n\n{match[3]}"

    return BLOCK.sub(block, text)


# -- the targets ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """What is aimed at, and what was measured: by name, such as that of a configuration.

    ``limit`` is the least of ``measured`` that will do; the most, if ``at_most``.
    """

    what: str
    limit: float
    measured: dict[str, float]
    at_most: bool = False
    form: str = "{:.2f}"

    def met_by(self, value: float) -> bool:
        """Whether a measured value will do."""
        return value <= self.limit if self.at_most else value >= self.limit

    @property
    def row(self) -> list[str]:
        """Of the table: with the names that meet it, if only some do."""
        cells = [
            f"{name} {self.form.format(value)}".strip() for name, value in self.measured.items()
        ]
        met = [name for name, value in self.measured.items() if self.met_by(value)]
        answer = ", ".join(met) or "no"
        bound = "at most" if self.at_most else "at least"
        return [
            self.what,
            f"{bound} {self.form.format(self.limit)}",
            ", ".join(cells),
            "yes" if len(met) == len(self.measured) else answer,
        ]


def targets(results: Results) -> str:
    """The table of targets."""
    rows = [target.row for target in all_targets(results) if target.measured]
    return table(["", "target", "measured", "met"], rows)


def all_targets(results: Results) -> Iterable[Target]:
    """What was aimed at, on two CPU cores."""
    train, unet = (results[name]["configs"] for name in ("train", "unet"))

    def of_steps(name: str, key: str) -> dict[str, float]:
        found = {config: one["steps"].get(name) for config, one in train.items()}
        return {config: one[key]["median"] for config, one in found.items() if one}

    def of_peak(kind: str) -> dict[str, float]:
        return {name: one[kind]["ours fp32"]["share_of_peak"] for name, one in unet.items()}

    def of_memory(key: str) -> dict[str, float]:
        memory = {name: one["peak_memory_bytes"] for name, one in train.items()}
        return {name: one[key] / one["plain fp32"] for name, one in memory.items()}

    outside = {name: results["sample"]["outside"][name]["ours"] for name in bench_sample.STEPS}
    losses = {"": 1 / results["train"]["losses"]["speedup"]["median"]}
    save = {
        name: one["background"]["share_per_gb"] for name, one in results["save"]["configs"].items()
    }
    imported = results["import"]["above_torch_seconds"]
    share = {"at_most": True, "form": "{:.0%}"}
    return [
        Target(
            "training step, fp32, times the plain rendering's speed",
            1.4,
            of_steps("ours fp32", "speedup"),
        ),
        Target(
            "training step, bf16, times the plain rendering's speed in fp32",
            2.2,
            of_steps("ours bf16", "speedup"),
        ),
        Target(
            "training step, fp32, times diffusers' speed per operation",
            1.15,
            of_steps("diffusers fp32", "ours_per_operation"),
        ),
        Target(
            "forward pass, fp32, of the matrix-multiply peak",
            0.9,
            of_peak("forward"),
            form="{:.0%}",
        ),
        Target("training pass, fp32, of that peak", 0.75, of_peak("training"), form="{:.0%}"),
        Target(
            "a sampling step outside the network, of the plain rendering's time",
            0.25,
            {name: one["share"]["median"] for name, one in outside.items()},
            at_most=True,
        ),
        Target(
            "`training_losses` outside the network, learned sigma, of the plain rendering's time",
            1 / 3,
            losses,
            at_most=True,
        ),
        Target(
            "peak memory of a training step, of the plain rendering's",
            1.0,
            of_memory("ours fp32"),
            **share,
        ),
        Target(
            "the same with `--use_checkpoint True`",
            0.6,
            of_memory("ours fp32, checkpointing"),
            **share,
        ),
        Target(
            "stand-still for a checkpoint, of a step, per GB",
            0.05,
            save,
            at_most=True,
            form="{:.1%}",
        ),
        Target("seconds to import a module, above torch", 0.2, imported, at_most=True),
    ]


if __name__ == "__main__":
    run_main(main)
