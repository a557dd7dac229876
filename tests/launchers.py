"""Start a script under each launcher, as a user would."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SCRIPTS = sysconfig.get_path("scripts")  # of the environment that runs the tests
# what launchers set, as prefixes: none of it may leak from the tests' own environment
SET_BY_LAUNCHERS = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "PMI", "MPI_", "OMPI_", "SLURM")


def environment(**more):
    env = {k: v for k, v in os.environ.items() if not k.startswith(SET_BY_LAUNCHERS)}
    paths = [str(TESTS), *filter(None, [env.get("PYTHONPATH")])]
    return {**env, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), **more}


def mpiexec():
    path = shutil.which("mpiexec", path=SCRIPTS)
    if path is None:
        pytest.skip("needs the extra 'mpi': no mpiexec in the environment")
    return path


def start(launcher, script, *args, processes=2, timeout=180, cwd=None, env=None):
    """Run ``script`` under "single", "torchrun", "mpiexec" or "srun" (see start_like_srun)."""
    if launcher == "srun":
        return start_like_srun(script, *args, processes=processes, timeout=timeout, cwd=cwd)
    command = {
        "single": [sys.executable],
        "torchrun": [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={processes}",
        ],
        "mpiexec": [mpiexec(), "-n", str(processes), sys.executable]
        if launcher == "mpiexec"
        else [],
    }[launcher]
    return subprocess.run(
        [*command, str(script), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env=env or environment(),
    )


def start_like_srun(script, *args, processes=2, timeout=180, cwd=None):
    """Slurm is not here: start the tasks with the variables that srun sets for each."""
    tasks = []
    for rank in range(processes):
        env = environment(
            SLURM_JOB_ID=str(os.getpid()),
            SLURM_STEP_ID="0",
            SLURM_STEP_NUM_TASKS=str(processes),
            SLURM_NTASKS=str(processes),
            SLURM_PROCID=str(rank),
            SLURM_LOCALID=str(rank),
            SLURM_STEP_NODELIST="localhost",
        )
        tasks.append(
            subprocess.Popen(
                [sys.executable, str(script), *map(str, args)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=cwd,
                env=env,
            )
        )
    outputs = [task.communicate(timeout=timeout) for task in tasks]
    return subprocess.CompletedProcess(
        "srun",
        max(task.returncode for task in tasks),
        "".join(out for out, _ in outputs),
        "".join(err for _, err in outputs),
    )
