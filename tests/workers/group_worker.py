"""Uses the process group in the ways that the library and research code do; writes a report."""

import json
import sys

import numpy as np
import torch
import torch.distributed as dist

from improved_diffusion import dist_util
from improved_diffusion.errors import UserError
from improved_diffusion.image_datasets import load_data
from improved_diffusion.resample import LossSecondMomentResampler


class FiveSteps:
    num_timesteps = 5


def main():
    out, checkpoint, data_dir = sys.argv[1:4]
    dist_util.setup_dist()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    report = {"world_size": world_size, "device": str(dist_util.dev())}

    total = torch.tensor([float(rank + 1)])
    dist.all_reduce(total)
    report["sum"] = total.item()

    leaf = torch.nn.Parameter(torch.full((3,), float(rank)))
    dist_util.sync_params([leaf])
    report["synced"] = leaf.tolist()

    dist_util.BROADCAST_CHUNK = 1000  # several messages for one small file
    path = checkpoint if rank == 0 else "/read/by/the/first/process/only.pt"
    state = dist_util.load_state_dict(path, map_location="cpu")
    report["loaded"] = state["w"].sum().item()

    try:
        dist_util.load_state_dict("no/such/file.pt")
    except UserError as error:
        report["missing"] = str(error)

    sampler = LossSecondMomentResampler(FiveSteps(), history_per_term=3)
    ts = torch.arange(2 + 3 * rank) % 5  # unequal batches
    sampler.update_with_local_losses(ts, ts.float() + rank)
    report["history"] = sampler._loss_history.tolist()
    report["counts"] = sampler._loss_counts.tolist()

    torch.manual_seed(rank)  # the order must come from one process all the same
    data = load_data(data_dir=data_dir, batch_size=4, image_size=8, channels=1, num_workers=0)
    mixing = torch.arange(1.0, 65.0).sqrt()  # tells images apart
    report["images"] = [(next(data)[0].flatten(1) @ mixing).tolist() for _ in range(4)]
    with open(f"{out}/report{rank}.json", "w") as file:
        json.dump(report, file)
    assert np.isfinite(report["loaded"])


if __name__ == "__main__":
    dist_util.run_main(main)
