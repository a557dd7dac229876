"""Training on two hosts: equal to one process, ended when the cable goes, or by a wrong flag."""

import re
import time

import pytest
import torch
from launchers import start
from script_runner import TINY, command_line, script_environment, script_path, succeed
from two_hosts import end, torchrun, two_hosts, wait_until

from improved_diffusion.heartbeat import BEAT_SECONDS

pytestmark = pytest.mark.slow

FLAGS = {**TINY, "ema_rate": 0.9, "log_interval": 1, "save_interval": 100, "log_dir": "run"}


@pytest.fixture
def hosts():
    with two_hosts() as both:
        yield both


def start_on_both(hosts, cwd, flags, own=({}, {})):
    """The same command on each host, but for its own flags."""
    script = script_path("image_train")
    return [
        host.start(torchrun("alpha", script, *command_line(flags, more)), cwd)
        for host, more in zip(hosts, own, strict=True)
    ]


def test_two_hosts_learn_what_one_process_learns(hosts, tmp_path, digits_dir):
    flags = {**FLAGS, "data_dir": digits_dir, "train_steps": 5}
    started = start_on_both(hosts, tmp_path, {**flags, "batch_size": 4})
    first, _ = [succeed(end(process, timeout=120)) for process in started]
    assert "2 processes on 2 x CPU of 2 machines" in first.stdout
    assert "2 processes x 1 microbatch x 4 = global batch of 8" in first.stdout
    alone = {**flags, "batch_size": 8, "log_dir": "alone"}
    words = command_line(alone)
    env = script_environment()
    succeed(start("single", script_path("image_train"), *words, cwd=tmp_path, env=env))
    for name in ("model000005.pt", "ema_0.9_000005.pt"):
        ours, theirs = (
            torch.load(tmp_path / folder / name, weights_only=True) for folder in ("run", "alone")
        )
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            torch.testing.assert_close(value, theirs[key], rtol=1e-5, atol=1e-5)


def test_a_host_with_other_flags_is_refused_by_both(hosts, tmp_path, digits_dir):
    flags = {**FLAGS, "data_dir": digits_dir, "train_steps": 5}
    started = start_on_both(hosts, tmp_path, flags, own=({"lr": 0.1}, {"lr": 0.2}))
    for process in started:
        done = end(process, timeout=90)
        assert done.returncode == 1  # torchrun's
        assert re.search(
            r"^error: process 1 was started with --lr 0\.[12], process 0 with --lr 0\.[12]: give "
            "all the same flags$",
            done.stderr,
            flags=re.MULTILINE,
        ), done.stderr
        assert re.search(r"exitcode\s*: 2", done.stderr)
    assert not (tmp_path / "run").exists()


def test_a_host_that_vanishes_ends_the_run_on_the_other(hosts, tmp_path, digits_dir):
    flags = {**FLAGS, "data_dir": digits_dir, "train_hours": 1, "num_workers": 0}
    started = start_on_both(hosts, tmp_path, flags)
    log = tmp_path / "run" / "progress.csv"
    wait_until(lambda: log.exists() and len(log.read_text().splitlines()) > 3)
    time.sleep(2 * BEAT_SECONDS)  # each has told what it is doing
    hosts[1].unplug()

    def lines():
        texts = [process.log.with_name(f"{process.log.name}.err") for process in started]
        found = [
            re.search(r"^error: (process \d of 2 .* ends too)$", text.read_text(), re.MULTILINE)
            for text in texts
        ]
        return [match.group(1) for match in found if match]

    wait_until(lambda: len(lines()) == 2, seconds=60)
    hosts_lost = [
        re.search(r"\(host (\w+), pid \d+\) has given no sign of life", line).group(1)
        for line in lines()
    ]
    assert hosts_lost == ["beta", "alpha"]  # each names the other
    assert all("last seen taking step" in line for line in lines())
    # torchrun on the host that is cut off from its store may wait on; its processes have ended
    assert end(started[0], timeout=30).returncode == 1
