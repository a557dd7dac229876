"""Stands in for Slurm's srun: two tasks on this machine, with the variables that srun sets."""

import os
import subprocess
import sys

TASKS = 2


def main():
    command = sys.argv[1:]
    while command[0].startswith("-"):
        command.pop(0)
    step = {
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": str(TASKS),
        "SLURM_NTASKS": str(TASKS),
        "SLURM_STEP_NODELIST": "localhost",
    }
    tasks = [
        subprocess.Popen(
            command,
            env={**os.environ, **step, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
        )
        for rank in range(TASKS)
    ]
    sys.exit(max(task.wait() for task in tasks))


if __name__ == "__main__":
    main()
