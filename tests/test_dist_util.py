"""Real processes under each launcher; one process without any."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from launchers import TESTS, environment, start
from toy import TimestepByImage, batches, calm, make_diffusion, make_model

from improved_diffusion import dist_util, logger
from improved_diffusion.rendezvous import _first_slurm_host, _launcher, _place_from_environment
from improved_diffusion.train_util import TrainLoop

WORKERS = TESTS / "workers"


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What one process learns from the whole batches."""
    with logger.scoped_configure(str(tmp_path_factory.mktemp("one")), format_strs=[]):
        loop = TrainLoop(
            model=make_model(seed=0),
            diffusion=make_diffusion(),
            data=batches(),
            schedule_sampler=TimestepByImage(),
            batch_size=4,
            microbatch=-1,
            lr=1e-3,
            ema_rate="0.9",
            log_interval=10,
            save_interval=100,
            resume_checkpoint="",
            lr_anneal_steps=4,
        )
        calm(loop).run_loop()
    return {"params": loop.model_params, "ema": loop.ema_params[0], "start": make_model(seed=0)}


@pytest.mark.parametrize(
    ("launcher", "microbatch", "checkpointing"),
    [
        ("torchrun", -1, "plain"),
        pytest.param("torchrun", 1, "checkpoint", marks=pytest.mark.slow),
        ("mpiexec", 1, "checkpoint"),
        pytest.param("srun", -1, "plain", marks=pytest.mark.slow),
        pytest.param("single", 1, "checkpoint", marks=pytest.mark.slow),
    ],
)
def test_ranks_end_equal_to_one_process_on_the_whole_batch(
    tmp_path, expected, launcher, microbatch, checkpointing
):
    done = start(launcher, WORKERS / "train_worker.py", tmp_path, microbatch, checkpointing)
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(path, weights_only=True) for path in sorted(tmp_path.glob("rank*.pt"))]
    assert [rank["world_size"] for rank in ranks] == [len(ranks)] * len(ranks)
    assert len(ranks) == (1 if launcher == "single" else 2)
    assert ranks[0]["backend"] == ("solo" if launcher == "single" else "gloo")
    for kind in ("params", "ema"):
        for values in zip(*(rank[kind] for rank in ranks), strict=True):
            assert all(torch.equal(values[0], value) for value in values)
        for ours, theirs in zip(ranks[0][kind], expected[kind], strict=True):
            torch.testing.assert_close(ours, theirs.detach(), rtol=1e-4, atol=1e-6)
    moved = [
        (after - before).abs().max().item()
        for after, before in zip(ranks[0]["params"], expected["start"].parameters(), strict=True)
    ]
    assert sum(change > 1e-4 for change in moved) > len(moved) / 2  # far more than the tolerance


@pytest.mark.parametrize(
    "launcher",
    [
        "torchrun",
        pytest.param("mpiexec", marks=pytest.mark.slow),
        pytest.param("srun", marks=pytest.mark.slow),
    ],
)
def test_group_serves_all_uses(tmp_path, launcher, digits_dir):
    torch.save({"w": torch.arange(5000.0)}, tmp_path / "file.pt")
    done = start(launcher, WORKERS / "group_worker.py", tmp_path, tmp_path / "file.pt", digits_dir)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"report{r}.json").read_text()) for r in (0, 1))
    own, others = first.pop("images"), second.pop("images")
    assert first == second
    assert first["sum"] == 3
    assert first["synced"] == [0, 0, 0]
    assert first["loaded"] == torch.arange(5000.0).sum().item()
    assert "no/such/file.pt" in first["missing"]
    # rank 0 sends timesteps 0 1, rank 1 sends 0 1 2 3 4 with losses one higher
    assert first["counts"] == [2, 2, 1, 1, 1]
    assert [row[:2] for row in first["history"]] == [[0, 1], [1, 2], [3, 0], [4, 0], [5, 0]]
    seen = [value for batch in own + others for value in batch]
    assert len(seen) == 32
    assert len(set(seen)) == len(seen)  # one epoch: no image twice across ranks


@pytest.mark.parametrize(
    ("launcher", "kind"),
    [
        ("mpiexec", "user"),
        pytest.param("mpiexec", "defect", marks=pytest.mark.slow),
        pytest.param("mpiexec", "all", marks=pytest.mark.slow),
        pytest.param("torchrun", "user", marks=pytest.mark.slow),
        pytest.param("torchrun", "defect", marks=pytest.mark.slow),
        pytest.param("torchrun", "all", marks=pytest.mark.slow),
    ],
)
def test_failure_of_a_rank_ends_all(launcher, kind):
    began = time.monotonic()
    done = start(launcher, WORKERS / "failing_worker.py", kind, timeout=100)
    assert done.returncode != 0
    assert time.monotonic() - began < 60
    if launcher == "mpiexec":
        assert done.returncode == (1 if kind == "defect" else 2)
    wanted = {
        "user": "error: --flag 3: one rank dislikes it",
        "all": "error: --flag 3: every rank dislikes it",
        "defect": "RuntimeError: a defect of ours",
    }[kind]
    assert wanted in done.stderr
    assert ("Traceback" in done.stderr.split(wanted)[0]) == (kind == "defect")


def test_one_process_opens_no_port_and_needs_no_network(tmp_path):
    script = tmp_path / "solo.py"
    script.write_text(
        "import os, sys, torch, torch.distributed as dist\n"
        "from improved_diffusion import dist_util\n"
        "dist_util.setup_dist(); dist_util.setup_dist()\n"
        "fds = [os.readlink(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd')\n"
        "       if os.path.islink(f'/proc/self/fd/{n}')]\n"
        "assert not any('socket' in fd for fd in fds), fds\n"
        "assert 'mpi4py' not in sys.modules\n"
        "x = torch.ones(3); dist.all_reduce(x); dist.broadcast(x, 0); dist.barrier()\n"
        "out = [torch.zeros(3)]; dist.all_gather(out, x); assert out[0].tolist() == [1, 1, 1]\n"
        "flat = torch.zeros(3); dist.all_gather_into_tensor(flat, x); assert flat.sum() == 3\n"
        "box = [None]; dist.all_gather_object(box, {'a': 1}); assert box == [{'a': 1}]\n"
        "box = [7]; dist.broadcast_object_list(box, 0); assert box == [7]\n"
        "net = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 1))\n"
        "net(torch.ones(1, 2)).sum().backward()\n"
        "assert net.module.weight.grad.tolist() == [[1, 1]]\n"
        "print('world', dist.get_world_size(), dist_util.dev())\n"
    )
    command = [sys.executable, "-W", "ignore", str(script)]
    isolated = ["unshare", "--net", *command]
    allowed = subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode == 0
    done = subprocess.run(
        isolated if allowed else command, capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("world 1 c")


@pytest.mark.parametrize(
    ("env", "launcher"),
    [
        ({}, "single"),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "torchrun"),
        ({"WORLD_SIZE": "8"}, "single"),  # some clusters set it for every job
        ({"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALNRANKS": "2"}, "mpiexec"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpiexec"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}, "srun"),
        # srun --mpi=pmi2 also speaks PMI
        ({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "PMI_SIZE": "2"}, "srun"),
        # mpiexec inside a Slurm job starts its daemons by srun
        ({"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "MPI_LOCALNRANKS": "2"}, "mpiexec"),
        # a batch script itself is no task of srun's
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, "single"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_ID": "4294967291"}, "single"),
    ],
)
def test_launcher_is_told_by_its_variables(env, launcher):
    assert _launcher(env) == launcher


def test_gpu_comes_from_the_local_rank():
    env = {"SLURM_PROCID": "11", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "16", "SLURM_LOCALID": "3"}
    place = _place_from_environment("srun", env, 8)
    assert (place.rank, place.world_size, place.local_rank) == (11, 16, 3)
    env = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1"}
    assert _place_from_environment("torchrun", env, 8).local_rank == 1


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[003-006,9],login1", "gpu003"),
        ("node1,node2", "node1"),
        ("a-b-[7,9]", "a-b-7"),
        ("rack[1-2]n", "rack1n"),
        ("localhost", "localhost"),
    ],
)
def test_first_host_of_a_slurm_node_list(nodes, first):
    assert _first_slurm_host({"SLURM_STEP_NODELIST": nodes}) == first


def test_mpiexec_without_mpi4py_says_what_to_do(tmp_path):
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py" / "__init__.py").write_text("raise ImportError('no libmpi here')")
    script = tmp_path / "s.py"
    script.write_text("from improved_diffusion.dist_util import *\nrun_main(setup_dist)\n")
    env = environment(PMI_RANK="0", PMI_SIZE="2", MPI_LOCALNRANKS="2")
    env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), env["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=env, timeout=60
    )
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "torchrun" in done.stderr
    assert "no libmpi here" in done.stderr


def test_without_a_group_everything_works_alone():
    param = torch.nn.Parameter(torch.ones(2))
    dist_util.sync_params([param])
    dist_util.barrier()
    assert (dist_util.get_rank(), dist_util.get_world_size()) == (0, 1)
    assert dist_util.broadcast_object("x") == "x"
