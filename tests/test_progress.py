"""The live line of a run: what it says, and that it survives messages on the same terminal."""

import io
import logging
import os
import struct
import subprocess
import sys
import time

import pytest
import torch

from improved_diffusion.progress import Progress


class Clock:
    """A clock that is set by hand."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    """Claims to be a terminal."""

    def isatty(self):
        return True


class Run:
    """A progress with a clock, and what it logged."""

    def __init__(self, caplog, **settings):
        self.clock, self.caplog = Clock(), caplog
        defaults = {"first_step": 0, "total_steps": None, "seconds_left": None, "global_batch": 1}
        self.progress = Progress(**{**defaults, "enabled": True, **settings}, clock=self.clock)

    def train(self, steps, seconds, loss=None, waiting=0.0):
        """Some steps within so many seconds, and what a report then says."""
        with self.progress.waiting():
            self.clock.now += waiting
        for _ in range(steps):
            self.progress.step()
        self.clock.now += seconds - waiting
        self.progress.report(loss)
        return self.caplog.messages[-1]


@pytest.fixture
def run(caplog, monkeypatch):
    """Makes runs that have no GPU, and no terminal unless the test sets one."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    caplog.set_level(logging.INFO, logger="improved_diffusion")

    def make(**settings):
        if not isinstance(sys.stdout, Terminal):
            monkeypatch.setattr(sys, "stdout", io.StringIO())
        return Run(caplog, **settings)

    return make


# -- plain lines ----------------------------------------------------------------------------------


def test_plain_line_is_as_documented(run, caplog):
    a_run = run(total_steps=1500, global_batch=60)
    line = a_run.train(120, 120 * 60 / 812, loss=0.12341, waiting=0.26)
    assert line == "step 120/1500, 812 images/s, 0:01:42 left, loss 0.1234, 3% waiting for data"
    assert line in Progress.__doc__
    assert [(r.name, r.levelname) for r in caplog.records] == [
        ("improved_diffusion.progress", "INFO")
    ]
    assert sys.stdout.getvalue() == ""


def test_run_without_an_end_has_no_time_left(run):
    line = run(first_step=100, global_batch=8).train(10, 5.0)
    assert line == "step 110, 16 images/s, 0% waiting for data"


def test_speed_and_waiting_are_those_since_the_last_report(run):
    a_run = run(global_batch=10)
    assert "1 images/s, 50% waiting" in a_run.train(1, 10, waiting=5)
    assert "100 images/s, 25% waiting" in a_run.train(40, 4, waiting=1)
    assert "20 images/s, 0% waiting" in a_run.train(2, 1)


def test_loss_is_that_of_the_report(run):
    a_run = run()
    assert ", loss 12.35, " in a_run.train(1, 1, loss=12.3456)
    assert ", loss nan, " in a_run.train(1, 1, loss=float("nan"))
    assert "loss" not in a_run.train(1, 1)


def test_waiting_counts_if_it_fails(run):
    a_run = run()

    def fail():
        with a_run.progress.waiting():
            a_run.clock.now += 3
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        fail()
    assert a_run.train(1, 1).endswith("75% waiting for data")


@pytest.mark.parametrize(
    ("steps_per_second", "shown"),
    [
        (12345678.4, "12345678"),
        (812.2, "812"),
        (99.96, "100"),
        (4.5678, "4.57"),
        (0.01234, "0.0123"),
    ],
)
def test_speed_has_three_digits_at_least(run, steps_per_second, shown):
    assert f", {shown} images/s," in run(global_batch=10**6).train(1, 10**6 / steps_per_second)


def test_other_processes_show_nothing(run, caplog, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    a_run = run(enabled=False, total_steps=3)
    with a_run.progress as progress, progress.waiting():
        progress.step()
        progress.report(0.5)
    assert caplog.messages == []
    assert sys.stdout.getvalue() == ""


# -- time left ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total_steps", "seconds_left", "left"),
    [
        (150, None, "0:01:10"),  # 140 steps at 2 per second
        (150, 60, "0:00:55"),  # 5 seconds have passed
        (150, 90, "0:01:10"),
        (None, 3605, "1:00:00"),
        (10, None, "0:00:00"),
        (9, None, "0:00:00"),
        (150, 2, "0:00:00"),
        (2_000_000 + 10, None, "277:46:40"),
        (10**12, None, "138888888:53:15"),
        (None, 10**9, "277777:46:35"),
    ],
)
def test_time_left_is_to_the_end_that_comes_first(run, total_steps, seconds_left, left):
    line = run(total_steps=total_steps, seconds_left=seconds_left).train(10, 5.0)
    assert f", {left} left, " in line


def test_steps_before_the_run_was_resumed_do_not_count_as_speed(run):
    line = run(first_step=1000, total_steps=1030).train(10, 5.0)
    assert line == "step 1010/1030, 2 images/s, 0:00:10 left, 0% waiting for data"


def test_endless_time_is_no_end(run):
    assert "left" not in run(seconds_left=float("inf")).train(1, 1.0)


def test_what_is_not_known_is_left_out(run):
    """Nothing is divided by zero: no step, or no time, since the last report."""
    a_run = run(total_steps=10)
    assert a_run.train(0, 0.0, loss=1.0) == "step 0/10, loss 1"
    assert a_run.train(1, 0.0) == "step 1/10"
    assert a_run.train(0, 1.0) == "step 1/10, 0% waiting for data"
    assert run(seconds_left=60).train(0, 0.0) == "step 0, 0:01:00 left"


# -- memory ---------------------------------------------------------------------------------------


def test_memory_is_shown_where_a_gpu_is_used(run, monkeypatch):
    peak = [0]
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak[0])
    a_run = run()
    peak[0] = 5 * 2**30
    assert "GPU" not in a_run.train(1, 1)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert a_run.train(1, 1).endswith(", 0% waiting for data, 5.0 GiB of GPU memory")
    peak[0] = 0
    assert "GPU" not in a_run.train(1, 1)


# -- on a terminal --------------------------------------------------------------------------------


def test_line_on_a_terminal_is_not_logged(run, caplog, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    a_run = run(total_steps=4)
    a_run.progress.step()
    a_run.clock.now += 1
    a_run.progress.report(0.5)
    a_run.progress.step()
    a_run.progress.close()
    a_run.progress.close()
    assert caplog.messages == []
    drawn = sys.stdout.getvalue().split("\r")
    assert "step 1/4, 1 images/s, 0:00:03 left, loss 0.5, 0% waiting for data |" in drawn[-2]
    assert "step 2/4, 1 images/s, 0:00:02 left, loss 0.5, 0% waiting for data |" in drawn[-1]
    assert drawn[-1].endswith("|\n")
    assert sys.stdout.getvalue().count("\n") == 1


def test_step_is_cheap(run, monkeypatch):
    """Many steps between two refreshes are one line, and take microseconds each."""
    monkeypatch.setattr(sys, "stdout", Terminal())
    a_run = run(total_steps=10**6)
    start = time.perf_counter()
    for _ in range(1000):
        a_run.progress.step()
    seconds = time.perf_counter() - start
    a_run.progress.close()
    assert seconds < 1  # 1 ms each, some hundred times what it takes
    assert sys.stdout.getvalue().count("\r") < 3 + seconds / 0.1


PREAMBLE = """
import sys, time
from improved_diffusion import logger
from improved_diffusion.progress import Progress
logger.configure(dir=sys.argv[1], format_strs=["stdout", "log"])
settings = {"first_step": 0, "seconds_left": None, "global_batch": 4, "enabled": True}
"""

TRAINING = """
with Progress(total_steps=4, **settings) as progress:
    for step in range(4):
        with progress.waiting():
            time.sleep(0.12)  # more than tqdm's interval of 0.1 s
        progress.step()
        if step == 1:
            logger.log("saving")
            logger.logkv("a", 1)
            logger.dumpkvs()
            progress.report(0.5)
logger.log("done")
"""


def on_terminal(code, folder, columns, rows=24):
    """All that a script writes to a new terminal, stdout and stderr."""
    pty = pytest.importorskip("pty")
    fcntl = pytest.importorskip("fcntl")
    termios = pytest.importorskip("termios")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    command = [sys.executable, "-c", PREAMBLE + code, str(folder)]
    child = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    written = b""
    try:
        while data := read(ours):
            written += data
    finally:
        os.close(ours)
        child.wait(60)
    return written.decode()


def read(terminal):
    """The next bytes; none when nobody has the terminal open any more."""
    try:
        return os.read(terminal, 65536)
    except OSError:  # Linux says so by an error
        return b""


def screen(written):
    """The lines that stay to be seen; a carriage return starts to overwrite a line."""
    lines = []
    for line in written.removesuffix("\r\n").split("\r\n"):
        seen = ""
        for part in line.split("\r"):
            seen = part + seen[len(part) :]
        lines.append(seen.rstrip())
    return lines


def test_screen_shows_what_was_written_last():
    assert screen("a\r\nabc\rx\r\n\rb\r   \rc\r\n") == ["a", "xbc", "c"]


def test_messages_do_not_garble_the_bar(tmp_path):
    written = on_terminal(TRAINING, tmp_path, columns=100)
    first, *lines, bar, done = screen(written)
    assert first == f"Logging to {tmp_path}"[: len(first)]
    assert lines == ["saving", "---------", "| a | 1 |", "---------"]
    assert bar.startswith("step 4/4, ")
    assert " images/s, 0:00:00 left, loss 0.5, " in bar
    assert bar.endswith("|")
    assert done == "done"
    for step in range(5):
        assert f"\rstep {step}/4" in written  # live
    text = (tmp_path / "log.txt").read_text().splitlines()
    assert text[1:] == [*lines, "done"]


def test_run_without_an_end_has_a_line_too(tmp_path):
    code = TRAINING.replace("total_steps=4", "total_steps=None")
    *_, bar, done = screen(on_terminal(code, tmp_path, columns=100))
    assert bar.startswith("step 4, ")
    assert bar.endswith("% waiting for data")
    assert done == "done"


@pytest.mark.parametrize(("columns", "rows"), [(30, 24), (0, 0)])
@pytest.mark.parametrize("total", ["4", "None"])
def test_bar_never_takes_two_lines(tmp_path, columns, rows, total):
    """Else each refresh would leave a line; a terminal of unknown size has 80 columns."""
    code = TRAINING.replace("total_steps=4", f"total_steps={total}")
    written = on_terminal(code, tmp_path, columns, rows)
    drawn = [part for part in written.split("\r") if part.startswith("step ")]
    assert len(drawn) >= 5
    assert max(map(len, drawn)) < (columns or 80)
    assert screen(written)[-1] == "done"


def test_bar_ends_with_its_line_after_an_error(tmp_path):
    code = "with Progress(total_steps=4, **settings) as progress:\n    progress.step()\n    1 / 0\n"
    lines = screen(on_terminal(code, tmp_path, columns=100))
    traceback = lines.index("Traceback (most recent call last):")
    assert lines[traceback - 1].startswith("step 1/4")
    assert lines[-1].startswith("ZeroDivisionError")
    assert sum(line.startswith("step") for line in lines) == 1
