"""The benchmark of scaling fits slopes, counts operations and lets real processes train."""

import json
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from script_runner import load_module

TINY = {"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "images": 1}


@pytest.fixture
def bench(monkeypatch):
    bench = load_module("benchmarks", "bench_scaling")
    monkeypatch.setattr(bench, "BASE", TINY)
    monkeypatch.setattr(bench, "AXES", {"images": [1, 2]})
    return bench


@pytest.mark.parametrize(("power", "factor"), [(2, 3.0), (0.5, 1e-3), (0, 7.0)])
def test_slope_is_the_power(bench, power, factor):
    sizes = [1, 2, 5, 30]
    assert bench.slope(sizes, [factor * x**power for x in sizes]) == pytest.approx(power, abs=1e-9)


def test_operations_grow_with_the_images_and_their_area(bench):
    def count(**sizes):
        return bench.SizedPass({**TINY, **sizes}, torch.device("cpu")).count_operations()

    assert count(images=2) == pytest.approx(2 * count(), rel=0.01)
    assert count(image_size=16) == pytest.approx(4 * count(), rel=0.1)
    assert count(num_res_blocks=2) > 1.2 * count()


def test_table_has_the_sizes_and_the_processes(bench, monkeypatch, tmp_path, capsys):
    row = {"images_each": 2, "seconds": 0.5, "share": 0.25, "expected_share": 0.1, "cores": 2}
    rows = {count: [{**row, "processes": count}] for count in (2, 4)}
    monkeypatch.setattr(bench, "measure_processes", lambda count, rounds: rows[count])
    out = tmp_path / "scaling.json"
    bench.main(["--rounds", "2", "--processes", "2,4", "--out", str(out)])
    result = json.loads(out.read_text())
    images = result["axes"]["images"]
    assert images["sizes"] == [1, 2]
    assert images["expected_slope"] == pytest.approx(1, rel=0.01)
    text = capsys.readouterr().out
    assert "| images | 1, 2 " in text
    assert "| 2         | 2         | 2 " in text
    assert "| 4         | 2, shared | 2           | 500.0       | 16.0     | 25% " in text


def test_share_expected_is_that_of_the_bytes_at_the_speed_of_the_probe(bench):
    """The gradients are twice the probe, which takes 1 s; a step without them takes 6."""
    parameters = bench.describe("", bench.SPREAD).parameters
    probe = parameters / 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "PROBE", probe)
        found = bench.shares({"step": [10.0], "alone": [6.0], "probe": [1.0]}, processes=4)
    assert found["share"] == pytest.approx(0.4)
    assert found["expected_share"] == pytest.approx(2 / 8)
    assert found["sent_bytes"] == pytest.approx(2 * 3 / 4 * 4 * parameters)


@pytest.mark.parametrize("text", ["0", "2,9", "x"])
def test_numbers_of_processes_that_cannot_be_are_refused_at_once(bench, text):
    with pytest.raises(ValueError, match=f"--processes '?{text}"):
        bench.main(["--processes", text])


def test_processes_end_with_an_interruption_of_the_one_above(tmp_path):
    """Also where it alone is interrupted, as by a kill of its process."""
    hosts = load_module("benchmarks", "pretend_hosts")
    script = tmp_path / "worker.py"
    script.write_text(f"import os, time\nopen(f'{tmp_path}/{{os.getpid()}}', 'w')\ntime.sleep(60)")

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 5)
    try:
        with pytest.raises(KeyboardInterrupt):
            hosts.run([sys.executable, str(script)], 2)
    finally:
        signal.signal(signal.SIGALRM, before)
    workers = [path.name for path in tmp_path.iterdir() if path.name.isdecimal()]
    assert len(workers) == 2
    deadline = time.monotonic() + 30
    while any(Path("/proc", worker, "exe").exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_two_real_processes_give_a_row_for_each_batch(bench):
    each, together = bench.measure_processes(2, rounds=1)
    assert (each["processes"], each["images_each"], together["images_each"]) == (2, 8, 4)
    assert each["sent_bytes"] == 4 * bench.describe("", bench.SPREAD).parameters
    assert each["share"] < 1
