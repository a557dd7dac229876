"""Make ordinary files of a checkpoint that several processes wrote in shares."""

import os
from dataclasses import dataclass

from improved_diffusion import checkpoint, sharded, stored_flags
from improved_diffusion.dist_util import run_main
from improved_diffusion.errors import UserError
from improved_diffusion.flags import ArgumentParser, make_parser, option, pick


@dataclass(frozen=True)
class MergeOptions:
    """What to merge, and where the files go."""

    checkpoint: str = option("", "folder shardedNNNNNN, or a run folder for its newest checkpoint")
    all: bool = option(False, "merge every checkpoint in shares of a run folder")
    out_dir: str = option("", "folder for the files, which may be new; '': beside the shares")

    def __post_init__(self) -> None:
        if not self.checkpoint:
            raise UserError("--checkpoint is missing: name a folder shardedNNNNNN or a run folder")
        if os.path.isfile(self.out_dir):
            raise UserError(f"--out_dir {self.out_dir} is a file: name a folder, which may be new")


def main() -> None:
    options = pick(MergeOptions, vars(create_argparser().parse_args()))
    paths = find_all(options.checkpoint) if options.all else [find_one(options.checkpoint)]
    run = os.path.dirname(paths[0]) or "."
    out_dir = options.out_dir or run
    os.makedirs(out_dir, exist_ok=True)
    for path in paths:
        sharded.merge(path, out_dir, report=lambda file: print(f"wrote {file}", flush=True))
    if not options.out_dir and stored_flags.load_config(run).get("keep_checkpoints"):
        print("the run's --keep_checkpoints will remove these files, too, when their step is old")


def find_all(run: str) -> list[str]:
    """The folders of shares of all whole checkpoints of a run folder.

    :raises ValueError: if there is none, or one is damaged.
    """
    if not os.path.isdir(run):
        raise UserError(f"--checkpoint {run} does not exist or is no folder")
    shares = checkpoint.find_shares(run)
    if not shares:
        raise UserError(f"--checkpoint {run} holds no checkpoint in shares: nothing to merge")
    return [find_one(path) for path in shares]


def find_one(path: str) -> str:
    """The folder of shares of a whole checkpoint.

    :raises ValueError: if there is none, it is damaged, or it is an ordinary one.
    """
    path = path.rstrip("/")
    if not os.path.isdir(path):
        raise UserError(f"--checkpoint {path} does not exist or is no folder")
    found = checkpoint.locate(path, "checkpoint")
    step = checkpoint.parse_resume_step_from_filename(found)
    shares = os.path.join(os.path.dirname(found) or ".", checkpoint.sharded_name(step))
    if shares not in checkpoint.find_shares(os.path.dirname(shares)):
        raise UserError(f"--checkpoint {path}: {found} is an ordinary file, nothing to merge")
    return shares


def create_argparser() -> ArgumentParser:
    return make_parser("Make ordinary files of a checkpoint in shares.", MergeOptions)


if __name__ == "__main__":
    run_main(main)
