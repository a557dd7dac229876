"""Watches a made-up run on real images; each rank writes what it logged, the first its pictures."""

import contextlib
import json
import sys

import torch
from golden_data import make_diffusion
from toy import make_model

from improved_diffusion import dist_util, logger
from improved_diffusion.image_datasets import list_images, load_once
from improved_diffusion.previews import Previews
from improved_diffusion.validation import Validation, spread_out
from improved_diffusion.watching import PreviewWatcher, ValidationWatcher


class Loop:
    """What a watcher needs of a TrainLoop."""

    global_step = 12

    def __init__(self):
        self.model = make_model(dropout=0.3).train()

    @contextlib.contextmanager
    def averaged_model(self):
        yield make_model(seed=1, dropout=0.3).train()


def main():
    out, data_dir = sys.argv[1:3]
    dist_util.setup_dist()
    rank = dist_util.get_rank()
    logger.configure(dir=f"{out}/run", format_strs=[])
    torch.manual_seed(rank)  # must not matter
    images = spread_out(list_images(data_dir), 7)  # two processes have batches of 2 2 2 1, and 0
    diffusion = make_diffusion(40, schedule="cosine", rescale_timesteps=True)
    validation = Validation(
        diffusion, lambda: load_once(images, 7, 2, 8, channels=1, num_workers=0), 7
    )
    few = make_diffusion(40, schedule="cosine", respacing="4", rescale_timesteps=True)
    reference = torch.zeros(4, 1, 8, 8)
    previews = Previews(few, (1, 8, 8), {}, reference, num=5, batch_size=2)
    loop = Loop()
    before = torch.get_rng_state()
    ValidationWatcher(validation, 1)(loop)
    PreviewWatcher(previews, 1)(loop)
    report = {
        "world_size": dist_util.get_world_size(),
        "kvs": dict(logger.getkvs()),
        "random_state_kept": torch.equal(torch.get_rng_state(), before),
    }
    with open(f"{out}/report{rank}.json", "w") as file:
        json.dump(report, file)


if __name__ == "__main__":
    dist_util.run_main(main)
