"""The demo of the README's first screen, whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from launchers import environment

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_demo_samples_are_the_digits_asked_for(tmp_path):
    env = environment()
    del env["OMP_NUM_THREADS"]  # the demo has the machine to itself
    stamp = os.path.join(sys.prefix, ".demo")  # this environment has the extra already
    done = subprocess.run(
        ["make", "demo", f"VENV={sys.prefix}", f"RUNS={tmp_path}", "-o", stamp],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    samples = tmp_path / "demo" / "samples"
    with np.load(samples / "samples_500x8x8x1.npz", allow_pickle=False) as arrays:
        assert arrays["arr_0"].dtype == np.uint8
        assert np.bincount(arrays["arr_1"]).tolist() == [50] * 10
    assert (samples / "grid.png").is_file()
    quality = json.loads((samples / "quality.json").read_text())
    assert quality["recognised"] >= 0.95
    assert quality["real"] > 0.97  # the judge itself can tell digits
    assert f"{quality['recognised']:.1%} of 500 samples" in done.stdout
