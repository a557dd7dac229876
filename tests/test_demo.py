"""The demo of the README's first screen, whole; and killed in the middle and run again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from launchers import environment

ROOT = Path(__file__).parents[1]
KILLED_AFTER = "checkpoint000500.json"  # of 1,500 steps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def start_demo(folder):
    env = environment()
    del env["OMP_NUM_THREADS"]  # the demo sets its own
    stamp = os.path.join(sys.prefix, ".demo")  # this environment has the extra already
    return subprocess.Popen(
        ["make", "demo", f"VENV={sys.prefix}", f"RUNS={folder}", "-o", stamp],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a process group to kill
    )


def finish_demo(folder):
    """Everything that the demo printed."""
    demo = start_demo(folder)
    output, _ = demo.communicate()
    assert demo.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder / "demo", finish_demo(folder)


def test_demo_samples_are_the_digits_asked_for(demo):
    folder, output = demo
    samples = folder / "samples"
    with np.load(samples / "samples_500x8x8x1.npz", allow_pickle=False) as arrays:
        assert arrays["arr_0"].dtype == np.uint8
        assert np.bincount(arrays["arr_1"]).tolist() == [50] * 10
    assert (samples / "grid.png").is_file()
    quality = json.loads((samples / "quality.json").read_text())
    assert quality["recognised"] >= 0.95
    assert quality["real"] > 0.97  # the judge itself can tell digits
    assert f"{quality['recognised']:.1%} of 500 samples" in output


def test_demo_killed_in_the_middle_and_run_again_makes_the_same_picture(demo, tmp_path):
    killed = start_demo(tmp_path)
    train = tmp_path / "demo" / "train"
    deadline = time.monotonic() + 600
    while not (train / KILLED_AFTER).exists():
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(2)  # on to steps that are not saved
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "demo" / "samples").exists()

    output = finish_demo(tmp_path)
    assert "resume: optimiser restored" in output
    for name in ("train/progress.csv", "samples/grid.png"):
        ours, theirs = (path / name for path in (tmp_path / "demo", demo[0]))
        assert ours.read_bytes() == theirs.read_bytes(), name
