"""Every test starts from the same state of the global random generators.

Also what several test modules share and what takes a while to make: real images, a trained model.
"""

import os

import numpy as np
import pytest
import torch
from script_runner import (
    TINY,
    ForkingServer,
    load_module,
    start_script,
    succeed,
    write_digits,
)

from improved_diffusion.compiling import compile_network


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory):
    """A folder of 60 handwritten digits as LABEL_INDEX.png, 8 x 8 grey; do not write to it."""
    return write_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="session")
def run_script(tmp_path_factory):
    """Run a script as a process; see :func:`script_runner.start_script` for the arguments."""
    if not hasattr(os, "fork"):
        yield start_script
        return
    server = ForkingServer(tmp_path_factory.mktemp("outputs"))
    yield server.run
    server.close()


class TrainedModel:
    """A run of image_train.py to step 8 in three sittings by one command; do not write to it.

    :ivar stopped: the process that was stopped by $DIFFUSION_TRAINING_TEST after step 4.
    :ivar continued: the process that went on to step 8.
    :ivar again: the process that found nothing to do.
    """

    def __init__(self, folder, data_dir, run_script):
        self.folder = folder / "run"
        self.path = self.folder / "ema_0.9_000008.pt"
        flags = {
            **TINY,
            "data_dir": data_dir,
            "log_dir": "run",  # relative to the working directory
            "class_cond": True,
            "lr": 1e-2,
            "batch_size": 8,
            "ema_rate": 0.9,
            "lr_anneal_steps": 8,
            "log_interval": 2,
            "save_interval": 4,
        }
        stop = {"DIFFUSION_TRAINING_TEST": "1"}
        self.stopped = succeed(start_script("image_train", flags, cwd=folder, env=stop))
        self.files_when_stopped = sorted(os.listdir(self.folder))
        self.continued = succeed(run_script("image_train", flags, cwd=folder))
        self.times = self.checkpoint_times()
        self.again = succeed(run_script("image_train", flags, cwd=folder))

    def checkpoint_times(self):
        return {path.name: path.stat().st_mtime_ns for path in self.folder.glob("*.pt")}


@pytest.fixture(scope="session")
def trained(tmp_path_factory, digits_dir, run_script):
    return TrainedModel(tmp_path_factory.mktemp("trained").resolve(), digits_dir, run_script)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The benchmarks measure in a GPU's precisions; what they compile needs no compiler."""
    variants = load_module("benchmarks", "variants")
    monkeypatch.setattr(variants, "precisions", lambda device: ("fp32", "tf32", "bf16"))
    monkeypatch.setattr(
        variants, "compile_network", lambda network: compile_network(network, "aot_eager")
    )
