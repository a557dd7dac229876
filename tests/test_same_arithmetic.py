"""The loop of today does the arithmetic of release 0.1.0: the same losses for 50 steps.

``golden/loop.json`` was recorded by that release, with torch's and NumPy's global generators.
"""

import json

import numpy as np
import pytest
import torch
from golden_data import load_json
from toy import batches, make_diffusion, make_model

from improved_diffusion import logger
from improved_diffusion.resample import create_named_schedule_sampler
from improved_diffusion.respace import SpacedDiffusion
from improved_diffusion.train_util import TrainLoop

CASES = {
    "fp32_uniform": {},
    "fp32_importance": {"schedule_sampler": "loss-second-moment", "microbatch": 2},
    "fp16_uniform": {"use_fp16": True},
    "fp32_annealed": {"lr_anneal_steps": 50, "weight_decay": 0.01},
}


def losses_of(folder, schedule_sampler="uniform", **flags):
    """The log's losses and gradient norms of 50 steps."""
    torch.manual_seed(11)
    np.random.seed(11)
    diffusion = make_diffusion(SpacedDiffusion)
    arguments = {
        "model": make_model(dropout=0.1),
        "diffusion": diffusion,
        "data": batches(),
        "schedule_sampler": create_named_schedule_sampler(schedule_sampler, diffusion),
        "batch_size": 4,
        "microbatch": -1,
        "lr": 1e-3,
        "ema_rate": "0.9",
        "log_interval": 1,
        "save_interval": 1000,
        "resume_checkpoint": "",
    }
    torch.manual_seed(12)
    with logger.scoped_configure(str(folder), format_strs=["json"]):
        loop = TrainLoop(**{**arguments, **flags})
        rows = []
        for batch, cond in (next(loop.data) for _ in range(50)):
            loop.run_step(batch, cond)
            loop._flush_losses()
            row = logger.dumpkvs()
            rows.append([row["loss"], row["grad_norm"]])
            loop.step += 1
    ema = sum(param.double().abs().sum().item() for param in loop.ema_params[0])
    return {"rows": rows, "ema_abs_sum": ema}


@pytest.mark.parametrize("name", CASES)
def test_losses_are_those_of_the_first_release(tmp_path, name):
    recorded = load_json("loop.json")[name]
    found = losses_of(tmp_path, **CASES[name])
    assert len(found["rows"]) == len(recorded["rows"]) == 50
    assert np.isfinite([loss for loss, _ in recorded["rows"]]).all()
    # Equal on the machine of the recording; another CPU's kernels round otherwise
    np.testing.assert_allclose(found["rows"], recorded["rows"], rtol=RTOL[name[:4]])
    np.testing.assert_allclose(
        found["ema_abs_sum"], recorded["ema_abs_sum"], rtol=EMA_RTOL[name[:4]]
    )


RTOL = {"fp32": 1e-3, "fp16": 5e-2}
EMA_RTOL = {"fp32": 1e-5, "fp16": 5e-5}  # the order of additions alone moves the latter by 1e-5

if __name__ == "__main__":
    import sys
    import tempfile

    with open(sys.argv[1], "w") as file:
        json.dump({name: losses_of(tempfile.mkdtemp(), **CASES[name]) for name in CASES}, file)
