"""Start a script under each launcher, as a user would."""

import os
import shutil
import socket
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


def start_by_hand(script, *args, ranks=range(2), processes=2, port=None, cwd=None, env=None):
    """Start processes that meet by torchrun's variables and that no launcher ends.

    :param ranks: those that are started; one with a word of its own is a pair (rank, [words]).
    :return: a Popen for each.
    """
    port = port or free_port()
    started = []
    for rank in ranks:
        rank, words = rank if isinstance(rank, tuple) else (rank, [])
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        own = {**meeting, "RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank)}
        started.append(
            subprocess.Popen(
                [sys.executable, str(script), *map(str, args), *map(str, words)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=cwd,
                env={**(env or environment()), **own},
            )
        )
    return started


def ends(processes, timeout=60):
    """Wait for processes; none is left when this returns or fails.

    :return: a CompletedProcess for each.
    """
    try:
        texts = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *text)
        for process, text in zip(processes, texts, strict=True)
    ]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
