"""The scripts on two processes do what they do on one."""

import re

import numpy as np
import pytest
from launchers import start
from script_runner import TINY, command_line, script_environment, script_path, succeed


def launch(launcher, name, *parts, cwd, **flags):
    words = command_line(*parts, flags)
    return start(launcher, script_path(name), *words, cwd=cwd, env=script_environment())


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("mpiexec", marks=pytest.mark.slow)])
def test_two_processes_make_the_samples_of_one(tmp_path, trained, launcher):
    flags = {
        "model_path": trained.path,
        "num_samples": 7,
        "use_ddim": True,
        "timestep_respacing": "ddim5",
        "eta": 0.5,
    }
    made = {}
    for how, batch_size in ((launcher, 2), ("single", 7)):
        done = launch(how, "image_sample", flags, cwd=tmp_path, batch_size=batch_size, log_dir=how)
        succeed(done)
        with np.load(tmp_path / how / "samples_7x8x8x1.npz") as arrays:
            made[how] = arrays["arr_0"].astype(int), arrays["arr_1"]
    assert (made[launcher][1] == made["single"][1]).all()
    assert abs(made[launcher][0] - made["single"][0]).max() <= 1  # rounding at a level's edge
    assert made["single"][0].std() > 10


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "mpiexec"])
def test_two_processes_evaluate_the_bound_of_one(tmp_path, trained, digits_dir, launcher):
    flags = {
        "model_path": trained.path,
        "data_dir": digits_dir,
        "num_samples": 7,
        "timestep_respacing": "5",
    }
    results = []
    for how, batch_size in ((launcher, 2), ("single", 3)):
        done = launch(how, "image_nll", flags, cwd=tmp_path, batch_size=batch_size, log_dir=how)
        line = re.search(r"done 7 of 60 images: bpd=(\S+)", succeed(done).stdout)
        results.append(float(line.group(1)))
    assert results[0] == pytest.approx(results[1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "mpiexec", "srun"])
def test_training_runs_and_continues_on_two_processes(tmp_path, digits_dir, launcher):
    flags = {**TINY, "data_dir": digits_dir, "log_dir": "run", "batch_size": 4, "save_interval": 2}
    for steps in (2, 4):
        done = launch(
            launcher, "image_train", flags, cwd=tmp_path, ema_rate=0.9, lr_anneal_steps=steps
        )
        succeed(done)
    assert done.stdout.startswith(f"Logging to {tmp_path / 'run'}\n")
    assert "2 processes x 1 microbatch x 4 = global batch of 8; 4 steps" in done.stdout
    assert "optimiser restored" in done.stdout
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.json", "log.txt", "log-rank001.txt", "model000004.pt"} <= names
    assert {"state000004.pt", "checkpoint000004.json"} <= names
    assert not any(name.endswith(".tmp") for name in names)


@pytest.mark.parametrize("launcher", [pytest.param("torchrun", marks=pytest.mark.slow), "mpiexec"])
def test_a_mistake_is_told_by_every_rank_in_one_line(tmp_path, launcher):
    done = launch(launcher, "image_train", TINY, cwd=tmp_path, data_dir="nowhere", log_dir="run")
    assert done.returncode == (2 if launcher == "mpiexec" else 1)  # torchrun's own code is 1
    assert done.stderr.count("error: --data_dir 'nowhere' is no folder") == 2
    assert "Traceback" not in done.stderr.split("error: --data_dir")[0]
    assert not (tmp_path / "run").exists()
    if launcher == "torchrun":
        assert len(re.findall(r"exitcode\s*: 2", done.stderr)) >= 1
