"""Make averages of the weights, of lengths chosen after training, from a run's snapshots."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from improved_diffusion import checkpoint, sharded
from improved_diffusion.dist_util import run_main
from improved_diffusion.errors import UserError
from improved_diffusion.files import write_tensors
from improved_diffusion.flags import ArgumentParser, make_parser, option, pick, require
from improved_diffusion.posthoc_ema import (
    Snapshot,
    gamma_of,
    parse_sigma_rels,
    read_snapshots,
    relative_error,
    solve_weights,
    weighted_sum,
)

BAD_FIT = 0.05  # relative error of the profile above which to warn


@dataclass(frozen=True)
class ReconstructOptions:
    """Which averages to make, and where they go."""

    run: str = option("", "run folder with the posthoc_*.pt files of --posthoc_ema")
    sigma_rel: str = option("0.1", "relative widths of the averages to make, separated by commas")
    step: int = option(-1, "number of updates at which they end; -1: the newest snapshot's")
    out: str = option("", "file for a single average; '': RUN/ema_posthocWIDTH_UPDATES.pt")

    def __post_init__(self) -> None:
        widths = parse_sigma_rels(self.sigma_rel, "sigma_rel")
        require(bool(widths), "sigma_rel", f"'{self.sigma_rel}'", "at least one width, such as 0.1")
        require(self.step == -1 or self.step >= 1, "step", self.step, "at least 1, or -1")
        if not self.run:
            raise UserError("--run is missing: name a run folder with posthoc_*.pt files")
        if self.out and len(widths) > 1:
            raise UserError(
                f"--out {self.out} is one file, but --sigma_rel {self.sigma_rel} makes "
                f"{len(widths)}: leave --out out"
            )

    @property
    def widths(self) -> list[float]:
        return parse_sigma_rels(self.sigma_rel, "sigma_rel")


def main() -> None:
    options = pick(ReconstructOptions, vars(create_argparser().parse_args()))
    check_places(options)
    snapshots = find_snapshots(options.run)
    updates = end_of_average(options.step, snapshots)
    used = [snapshot for snapshot in snapshots if snapshot.updates <= updates]
    for sigma_rel in options.widths:
        make_average(used, updates, sigma_rel, options)


def check_places(options: ReconstructOptions) -> None:
    """Refuse a run folder that is none, and a place that no file can be written to."""
    import blobfile as bf

    if not bf.isdir(options.run):
        raise UserError(f"--run {options.run} does not exist or is no folder")
    folder = os.path.dirname(options.out)
    if options.out and "://" not in options.out and folder and not os.path.isdir(folder):
        raise UserError(f"--out {options.out}: the folder {folder} does not exist")
    if options.out and bf.isdir(options.out):
        raise UserError(f"--out {options.out} is a folder: name a file")


def find_snapshots(folder: str) -> list[Snapshot]:
    """The snapshots of a run folder that average anything, oldest first."""
    snapshots = read_snapshots(checkpoint.find_posthoc(folder))
    _refuse_shares(folder)
    if not snapshots:
        raise UserError(
            f"--run {folder} holds no snapshots posthoc_*.pt: train with --posthoc_ema 0.05,0.1"
        )
    return snapshots


def _refuse_shares(folder: str) -> None:
    """Refuse a folder of which some snapshots could not be seen."""
    import blobfile as bf

    unseen = [
        name
        for path in checkpoint.find_shares(folder)
        for name in sharded.ShardedCheckpoint(path).names
        if name.startswith("posthoc") and not bf.exists(bf.join(folder, name))
    ]
    if unseen:
        raise UserError(
            f"--run {folder}: {len(unseen)} snapshots, such as {unseen[0]}, are still in shares: "
            f"python scripts/merge_checkpoint.py --checkpoint {folder} --all True"
        )


def end_of_average(step: int, snapshots: Sequence[Snapshot]) -> int:
    """The number of updates at which the averages end."""
    oldest, newest = snapshots[0].updates, snapshots[-1].updates
    if step > newest:
        raise UserError(f"--step {step} is beyond the newest snapshot, which ends at {newest}")
    if 0 < step < oldest:
        raise UserError(f"--step {step} is before the oldest snapshot, which ends at {oldest}")
    return newest if step == -1 else step


def make_average(
    snapshots: Sequence[Snapshot], updates: int, sigma_rel: float, options: ReconstructOptions
) -> None:
    """Write one average, and say what it was made from and how well."""
    import blobfile as bf

    gamma = gamma_of(sigma_rel)
    stored = [s.updates for s in snapshots], [s.gamma for s in snapshots]
    weights = solve_weights(*stored, updates, gamma)
    error = relative_error(weights, *stored, updates, gamma)
    path = options.out or bf.join(options.run, f"ema_posthoc{sigma_rel}_{updates:06d}.pt")
    write_tensors(path, weighted_sum(snapshots, weights))

    used = [s for s, weight in zip(snapshots, weights, strict=True) if weight != 0]
    print(f"sigma_rel {sigma_rel}, {updates} updates: {describe(used)}")
    print(f"relative error of the fitted profile: {error:.2%}")
    if error > BAD_FIT:
        print(
            f"WARNING: a poor fit: the snapshots are too few, too far apart or of other widths "
            f"than {sigma_rel} needs, or none lies near the end; train with more snapshots"
        )
    print(f"wrote {path}")


def describe(snapshots: Sequence[Snapshot]) -> str:
    """Which snapshots an average was made from."""
    names = [os.path.basename(snapshot.path) for snapshot in snapshots]
    if len(names) == 1:
        return f"stored as {names[0]}"
    widths = ", ".join(str(width) for width in sorted({s.sigma_rel for s in snapshots}))
    return f"{len(names)} snapshots of widths {widths}, from {names[0]} to {names[-1]}"


def create_argparser() -> ArgumentParser:
    return make_parser("Reconstruct averages of the weights after training.", ReconstructOptions)


if __name__ == "__main__":
    run_main(main)
