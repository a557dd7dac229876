"""The comparison of samplers runs and its numbers mean what they say."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from launchers import environment
from PIL import Image

from improved_diffusion.sampling import SAMPLERS

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from demo_quality import frechet  # noqa: E402


def test_frechet_distance_of_known_gaussians():
    """|m1 - m2|^2 + tr(C1 + C2 - 2 sqrt(C1 C2)); for diagonal C the sum of (s1 - s2)^2."""
    rng = np.random.default_rng(0)
    points = rng.standard_normal((50_000, 3))
    spread, shift = np.array([1.0, 2.0, 0.5]), np.array([0.0, 1.0, -2.0])
    expected = 1 + 4 + ((spread - 1) ** 2).sum()
    assert frechet(points, points) == pytest.approx(0, abs=1e-9)
    assert frechet(points * spread + shift, points) == pytest.approx(expected, rel=0.02)
    dead = points * [1, 0, 1]  # a pixel that is always the same
    assert frechet(dead, points) == pytest.approx(1, rel=0.02)


@pytest.mark.slow
def test_all_samplers_are_compared_on_the_mixture(tmp_path):
    words = [sys.executable, str(BENCHMARKS / "solver_frontier.py"), "--mixture_samples", "250"]
    words += ["--out", str(tmp_path / "frontier.json"), "--picture", str(tmp_path / "frontier.png")]
    subprocess.run(words, check=True, env=environment(), capture_output=True, timeout=600)
    points = json.loads((tmp_path / "frontier.json").read_text())["mixture"]
    assert {point["sampler"] for point in points} == {*SAMPLERS, "data"}
    path = {(p["sampler"], p.get("steps")): p["path"] for p in points if "path" in p}
    assert path["euler", 50] < path["euler", 10] / 3
    assert path["dpmpp_3m", 50] < path["dpmpp_3m", 10] / 10
    assert path["dpmpp_2m", 20] < path["ddim", 20]
    # of 5 steps: the first, from 20,000 to 3, and the last are Euler's
    assert next(p["evaluations"] for p in points if p["sampler"] == "heun") == 8
    with Image.open(tmp_path / "frontier.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10
