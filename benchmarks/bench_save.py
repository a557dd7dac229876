"""How long training stands still for a checkpoint, and how much its writing slows the steps after.

A real TrainLoop takes a step without a save, one with a save that a thread writes, as many as the
writing takes, another without, and one with a save in the foreground, which stands for the
original; and again. What counts is the time in ``TrainLoop.save``; the excess of the step with the
save over the one before it shows what else it costs.

    python benchmarks/bench_save.py --configs small --rounds 5

prints a table and writes benchmarks/results/save.json. The target is under 5% of a step's time per
GB of checkpoint.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from configurations import Configuration, chosen
from measuring import synchronise
from records import at_least, output_file, result_path, table, write_result

from improved_diffusion import logger
from improved_diffusion.dist_util import run_main
from improved_diffusion.saving import Saver, SavingOptions
from improved_diffusion.script_util import create_gaussian_diffusion
from improved_diffusion.train_util import TrainLoop

CONFIGS = "small,cifar10"
WARM_UP = 2  # steps
BACKGROUND, FOREGROUND = "background", "foreground"
TARGET = 0.05  # of a step's time, per GB


def main(argv: list[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    configurations = chosen(args.configs)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {name: measure(c, args.rounds, device) for name, c in configurations.items()}
    result = {"target": TARGET, "configs": found}
    print(report(result))
    write_result(args.out, result)


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configs", default=CONFIGS, help="separated by commas")
    parser.add_argument("--rounds", type=at_least(1), default=5)
    parser.add_argument("--threads", type=at_least(0), default=0, help="0: torch's choice")
    parser.add_argument("--out", type=output_file, default=result_path("save"), help="result file")
    return parser


def measure(configuration: Configuration, rounds: int, device: torch.device) -> dict[str, Any]:
    """Medians over the rounds of one configuration.

    :return: as of :func:`summary`, with "first_still_seconds": those of the first save in the
        background, whose copies take fresh memory.
    """
    with tempfile.TemporaryDirectory() as folder, logger.scoped_configure(folder, format_strs=[]):
        timeline = Timeline(make_loop(configuration, device), random_batch(configuration, device))
        with timeline.loop.saver:
            for _ in range(WARM_UP):
                timeline.step()
            first = timeline.step(save=BACKGROUND)
            timeline.until_written()
            found = [one_round(timeline) for _ in range(rounds * configuration.turns)]
        size = checkpoint_bytes(folder)
    return {
        "images": configuration.images(device),
        "checkpoint_bytes": size,
        "first_still_seconds": first.still,
        **summary(found, size / 1e9),
    }


@dataclass
class Step:
    """Seconds of a step, with the save that fell in it, and of the call that saved."""

    seconds: float
    still: float = 0.0


@dataclass
class Round:
    """What :func:`one_round` measures; steps without a save are in pairs with those after."""

    before: Step
    background: Step
    meanwhile: list[Step]
    writing: float  # seconds
    before_foreground: Step
    foreground: Step


def one_round(timeline: Timeline) -> Round:
    """A save in the background and one in the foreground, each after a step without."""
    before, background = timeline.step(), timeline.step(save=BACKGROUND)
    meanwhile = timeline.until_written()
    writing = timeline.loop.saver.seconds
    return Round(
        before=before,
        background=background,
        meanwhile=meanwhile,
        writing=writing,
        before_foreground=timeline.step(),
        foreground=timeline.step(save=FOREGROUND),
    )


def summary(rounds: list[Round], gigabytes: float) -> dict[str, Any]:
    """Medians over the rounds.

    :return: "step_seconds" without a save, and for each way of saving: "still_seconds", the time
        in the call, "share_per_gb", of a step's time, and "excess_seconds" of the step with the
        save over the one before; in the background also "writing_seconds" of the thread, and
        "slowing_seconds", by which the steps meanwhile take longer together.
    """
    step = median(s.seconds for r in rounds for s in (r.before, r.before_foreground))

    def of(pairs: list[tuple[Step, Step]]) -> dict[str, float]:
        still = median(saved.still for _, saved in pairs)
        return {
            "still_seconds": still,
            "share_per_gb": still / step / gigabytes,
            "excess_seconds": median(saved.seconds - rest.seconds for rest, saved in pairs),
        }

    slowing = (sum(s.seconds - r.before.seconds for s in r.meanwhile) for r in rounds)
    return {
        "step_seconds": step,
        BACKGROUND: {
            **of([(r.before, r.background) for r in rounds]),
            "writing_seconds": median(r.writing for r in rounds),
            "slowing_seconds": median(slowing),
        },
        FOREGROUND: of([(r.before_foreground, r.foreground) for r in rounds]),
    }


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


# -- the loop ---------------------------------------------------------------------------------


class Timeline:
    """A loop and its batch; takes steps, as ``run_loop`` does, and times them."""

    def __init__(self, loop: SwitchedLoop, batch: torch.Tensor) -> None:
        self.loop = loop
        self.batch = batch

    def step(self, save: str = "") -> Step:
        """One step, and a save after it if a way is given."""
        synchronise()
        started = time.perf_counter()
        self.loop.run_step(self.batch, {})
        synchronise()
        computed = time.perf_counter()
        if save:
            self.loop.saver.in_foreground = save == FOREGROUND
            self.loop.save()
        ended = time.perf_counter()
        self.loop.step += 1
        return Step(ended - started, ended - computed if save else 0.0)

    def until_written(self) -> list[Step]:
        """The steps that are taken while the thread writes."""
        taken = []
        while not self.loop.saver.written:
            taken.append(self.step())
            self.loop.saver.check()
        return taken


class SwitchedSaver(Saver):
    """Writes in the foreground, too, when told so, and takes the time that writing takes."""

    in_foreground = False
    seconds = 0.0
    written = True

    def save(self, folder: str, step: int, files: Mapping[str, Any]) -> None:
        self.wait()
        self.written = False
        if self.in_foreground:
            self._write(folder, step, files)
        else:
            super().save(folder, step, files)

    def _write(self, folder: str, step: int, files: Mapping[str, Any]) -> None:
        started = time.perf_counter()
        super()._write(folder, step, files)
        self.seconds, self.written = time.perf_counter() - started, True


class SwitchedLoop(TrainLoop):
    """A loop with such a saver, which keeps the newest checkpoint only."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._saver = self.saver = SwitchedSaver(SavingOptions(keep_checkpoints=1))


def make_loop(configuration: Configuration, device: torch.device) -> SwitchedLoop:
    return SwitchedLoop(
        model=configuration.network(device),
        diffusion=create_gaussian_diffusion(learn_sigma=True),
        data=iter(()),
        batch_size=configuration.images(device),
        microbatch=-1,
        lr=1e-4,
        ema_rate="0.9999",
        log_interval=10**9,
        save_interval=10**9,
        resume_checkpoint="",
    )


def random_batch(configuration: Configuration, device: torch.device) -> torch.Tensor:
    """Images [N, 3, H, W] in [-1, 1]."""
    size = configuration.options.image_size
    return torch.rand(configuration.images(device), 3, size, size) * 2 - 1


def checkpoint_bytes(folder: str) -> int:
    """Bytes of the files of the one checkpoint in a run folder."""
    files = [path for path in Path(folder).iterdir() if path.suffix == ".pt"]
    return sum(path.stat().st_size for path in files)


# -- the table --------------------------------------------------------------------------------


def report(result: dict[str, Any]) -> str:
    """The table that is printed."""
    header = ["config", "saving", "step (s)", "GB", "stands still (ms)", "of a step, per GB"]
    header += ["the step's excess (ms)", "writing (s)", "later steps' excess (s)"]
    rows = []
    for name, found in result["configs"].items():
        size, first = found["checkpoint_bytes"] / 1e9, found["first_still_seconds"] * 1e3
        about = [name, f"{found['step_seconds']:.3f}", f"{size:.3f}"]
        rows.append([*about[:1], f"{BACKGROUND}, the first", *about[1:], f"{first:.1f}", *[""] * 4])
        for way in (BACKGROUND, FOREGROUND):
            one = found[way]
            row = [name, way, *about[1:], f"{one['still_seconds'] * 1e3:.1f}"]
            row += [f"{one['share_per_gb']:.1%}", f"{one['excess_seconds'] * 1e3:.1f}"]
            keys = ("writing_seconds", "slowing_seconds")
            rows.append([*row, *(f"{one[key]:.2f}" if key in one else "" for key in keys)])
    return table(header, rows)


if __name__ == "__main__":
    run_main(main)
