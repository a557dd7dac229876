"""doctor.py tries what training needs, says what is wrong, and foretells what training takes."""

import dataclasses
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from launchers import start
from PIL import Image
from script_runner import (
    ROOT,
    TINY,
    TINY_SUPER_RES,
    command_line,
    error_of,
    run_folder,
    script_environment,
    script_path,
    succeed,
    tree,
)

from improved_diffusion import doctor, memory
from improved_diffusion.examination import Examined
from improved_diffusion.forecast import (
    Look,
    Measured,
    Plan,
    duration_text,
    forecast,
    saved_steps,
    size_text,
)
from improved_diffusion.report import Report
from improved_diffusion.saving import SavingOptions

QUICK = {"doctor_seconds": 0.2, "batch_size": 4, "num_workers": 0}
TOPICS = ["environment", "processes", "all-reduce", "data", "step", "speed", "save", "load"]
TOPICS += ["forecast", "memory", "time", "disk"]

measured = Measured(
    start_seconds=10.0,
    step_seconds=0.5,
    save_seconds=2.0,
    last_save_seconds=5.0,
    checkpoint_bytes=1000,
    posthoc_bytes=100,
    pending_bytes=3,
    row_bytes=7,
    folder_bytes=50,
)


def make_plan(first_step=0, total_steps=100, save_interval=40, **changes):
    saving = SavingOptions(
        **{name: changes.pop(name) for name in list(changes) if name in vars(SavingOptions())}
    )
    own = {"seconds_left": None, "log_interval": 10, "saving": saving, **changes}
    return Plan(first_step=first_step, total_steps=total_steps, save_interval=save_interval, **own)


# -- arithmetic -------------------------------------------------------------------------------


def saves_of_a_loop(first, end, save_interval, log_interval, gap):
    """Step by step, what the loop saves, with the steps whose losses it has not logged."""
    saves, last, pending = [], first, first % log_interval
    for step in range(first, end):
        pending = 0 if step % log_interval == 0 else pending + 1
        if step % save_interval == 0 or step - last >= gap:
            saves.append((step, pending))
            last = step
    if end > first and (end - 1) % save_interval:
        saves.append((end, pending))
    return saves


def test_saves_are_those_of_the_loop():
    cases = itertools.product((0, 1, 6, 12), (1, 7, 12, 13, 25), (1, 4, 12, 100), (1, 5), (0, 3, 9))
    for first, more, save_interval, log_interval, gap in cases:
        plan = make_plan(
            first,
            first + more,
            save_interval,
            log_interval=log_interval,
            save_minutes=gap / 60 / 2,  # at half a second, so many steps
        )
        if first % log_interval:  # such a loop has rows to write of before
            first -= first % log_interval
            plan = dataclasses.replace(plan, first_step=first)
        end = plan.end(0.5)
        found = list(saved_steps(plan, end, 1 / 60 * 30))
        expected = saves_of_a_loop(first, end, save_interval, log_interval, gap or float("inf"))
        assert found == expected, (plan, gap)


@pytest.mark.parametrize(
    ("plan", "end"),
    [
        (make_plan(), 100),
        (make_plan(30), 100),
        (make_plan(130), 130),  # past its end
        (make_plan(30, None), 1030),
        (make_plan(30, None, seconds_left=11.2), 53),
        (make_plan(30, 40, seconds_left=11.2), 40),
        (make_plan(30, None, seconds_left=-1.0), 30),
    ],
)
def test_the_first_bound_ends_training(plan, end):
    assert plan.end(0.5) == end
    assert forecast(plan, measured).steps == end - plan.first_step


def test_time_is_the_sum_of_its_parts():
    looks = (Look("validation", 30, 4.0, 0), Look("preview", 99, 1.0, 11))
    result = forecast(make_plan(), dataclasses.replace(measured, looks=looks))
    assert (result.start_seconds, result.step_seconds) == (10.0, 50.0)
    assert result.save_seconds == 3 * 2.0 + 5.0  # 0, 40, 80; and 100, for which the end waits
    assert result.look_seconds == 3 * 4.0 + 1.0  # 30, 60, 90; 99
    assert result.seconds == 10 + 50 + 11 + 13
    assert forecast(make_plan(0, 81), measured).save_seconds == 3 * 2.0  # 80 is the last step


@pytest.mark.parametrize(
    ("saving", "kept", "left", "most"),
    [
        # steps 0, 40, 80 have nothing pending, 100 has the nine steps from 91 to 99
        ({}, 4, 4 * 1000 + 27, 0),
        ({"keep_checkpoints": 1}, 1, 1000 + 27 + 3 * 100, 1027),
        ({"keep_checkpoints": 1, "keep_every": 80}, 3, 3 * 1000 + 27 + 100, 1027),
    ],
)
def test_disk_is_what_stays_and_what_a_save_needs(saving, kept, left, most):
    look = Look("preview", 50, 1.0, 11)
    result = forecast(make_plan(**saving), dataclasses.replace(measured, looks=(look,)))
    logs = 10 * 7 + 50 + 11
    assert (result.saves, result.kept) == (4, kept)
    assert result.bytes == left + logs
    assert result.most_bytes == left + logs + most


def test_texts():
    assert [size_text(n) for n in (0, 1023, 1024, 1.5 * 2**30, 2**60)] == [
        "0 bytes",
        "1023 bytes",
        "1.0 KiB",
        "1.50 GiB",
        "1048576.00 TiB",
    ]
    seconds = (0.0005, 0.25, 1, 59.94, 60, 3723, 86400, 200000)
    assert [duration_text(s) for s in seconds] == [
        "0.5 ms",
        "250 ms",
        "1.0 s",
        "59.9 s",
        "0:01:00",
        "1:02:03",
        "1 day 0:00:00",
        "2 days 7:33:20",
    ]


def test_warnings_tell_what_does_not_fit(capsys):
    examined = Examined(make_plan(), measured, 4, memory.host_bytes() + 1, (), free_bytes=4000)
    doctor.tell_forecast(Report(), examined)
    lines = capsys.readouterr().out.splitlines()
    warnings = [line for line in lines if line.startswith("WARNING: ")]
    assert [line.split(": ")[1] for line in warnings] == ["memory", "disk"]
    assert "--keep_checkpoints" in warnings[1]
    fits = dataclasses.replace(examined, memory=1, free_bytes=5000)
    doctor.tell_forecast(Report(), fits)
    assert "WARNING" not in capsys.readouterr().out


def test_peak_of_memory_begins_again():
    block = bytearray(200 * 2**20)
    peak = memory.peak_bytes()
    del block
    memory.forget_peak()
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system does not forget peaks")
    assert peak - memory.peak_bytes() > 150 * 2**20
    assert 0 < memory.own_bytes(os.getpid()) < memory.peak_bytes() < memory.host_bytes()


@pytest.mark.parametrize("exists", [True, False])
def test_the_workplace_lies_beside_the_run_and_goes_whatever_happens(tmp_path, monkeypatch, exists):
    monkeypatch.setenv("DIFFUSION_BLOB_LOGDIR", "")
    run = tmp_path / "run" if exists else tmp_path / "not" / "yet" / "run"
    if exists:
        run.mkdir()
    before = signal.getsignal(signal.SIGTERM)

    def work():
        with doctor.workplace(str(run)) as folder:
            assert os.path.dirname(folder) == str(tmp_path)
            assert os.environ["DIFFUSION_BLOB_LOGDIR"] == folder
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)  # the signal ends it

    with pytest.raises(KeyboardInterrupt):
        work()
    assert os.listdir(tmp_path) == (["run"] if exists else [])
    assert signal.getsignal(signal.SIGTERM) is before
    assert os.environ["DIFFUSION_BLOB_LOGDIR"] == ""


# -- the script -------------------------------------------------------------------------------


def number(pattern, text):
    return float(re.search(pattern, text).group(1).replace(",", ""))


def topics(done):
    """What the lines are about; the table and warnings aside."""
    lines = [line for line in done.stdout.splitlines() if not line.startswith((" ", "WARNING"))]
    return [line.split(":")[0] for line in lines]


@pytest.fixture
def examine(tmp_path, digits_dir, run_script):
    """Run doctor.py, which must end well and leave nothing; the process."""

    def run(*parts, name="doctor", start=run_script, env=None, sizes=TINY, **flags):
        before = sorted(os.listdir(tmp_path))
        own = {**sizes, **QUICK, "data_dir": digits_dir, "log_dir": "run"}
        done = succeed(start(name, own, *parts, cwd=tmp_path, env=env, **flags))
        assert sorted(os.listdir(tmp_path)) == before
        return done

    return run


def test_every_part_is_tried_and_nothing_is_left(examine):
    done = examine(lr_anneal_steps=8, log_interval=2, class_cond=True)
    assert done.stderr == ""
    assert topics(done) == TOPICS
    assert "float32 [4, 1, 8, 8] in [-1, 1] with y [4]" in done.stdout
    assert "every tensor is back as it was saved" in done.stdout
    assert re.search(r"time: .* for 8 steps: .* to start, .* for 2 saves\n", done.stdout)
    assert "2 checkpoints" in done.stdout


def test_super_resolution_without_an_end(examine):
    done = examine(sizes=TINY_SUPER_RES, save_interval=100)
    assert topics(done) == TOPICS
    assert "with low_res [4, 1, 4, 4]" in done.stdout
    assert "for each 1,000 steps, and it trains until it is stopped" in done.stdout
    assert "after 1,000 steps for 11 checkpoints" in done.stdout  # 0, 100 ... 900, and 1000


@pytest.mark.slow
def test_other_places_and_precisions(examine, tmp_path):
    env = {"DIFFUSION_BLOB_LOGDIR": str(tmp_path / "elsewhere" / "blobs")}
    done = examine(
        env=env, num_workers=1, use_fp16=True, microbatch=3, schedule_sampler="loss-second-moment"
    )
    assert topics(done) == TOPICS
    assert "for each of its 1 data workers" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        # many losses are pending when it saves
        {"keep_checkpoints": 2, "posthoc_ema": "0.1", "log_interval": 100, "microbatch": 1},
        pytest.param(
            {"sample_interval": 4, "val_fraction": 0.2, "val_interval": 5, "microbatch": 2},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_leaves_on_the_disk_what_was_forecast(
    examine, tmp_path, digits_dir, run_script, flags
):
    flags = {**flags, "lr_anneal_steps": 11, "save_interval": 4, "batch_size": 4}
    done = examine(flags)
    foretold = number(r"disk: .*\(([\d,]+) bytes\)", done.stdout)
    if "sample_interval" in flags:
        assert topics(done) == [*TOPICS[:6], "validation", "preview", *TOPICS[6:]]
        assert re.search(r"for validation and preview\n", done.stdout)
    own = {**TINY, "data_dir": digits_dir, "log_dir": "run"}
    succeed(run_script("image_train", own, flags, cwd=tmp_path))
    left = sum(path.stat().st_size for path in (tmp_path / "run").iterdir())
    assert foretold == pytest.approx(left, rel=0.001)


@pytest.mark.slow
def test_a_run_is_read_and_not_touched(examine, tmp_path, trained):
    run = tmp_path / "run"
    shutil.copytree(trained.folder, run)
    (run / "model000012.pt.tmp").write_bytes(b"of a crash")
    before = tree(run), {p: p.stat().st_mtime_ns for p in [run, *run.iterdir()]}
    done = examine(class_cond=True, ema_rate=0.9, batch_size=8, lr_anneal_steps=20)
    assert (tree(run), {p: p.stat().st_mtime_ns for p in [run, *run.iterdir()]}) == before
    assert "for 12 steps" in done.stdout  # it goes on from step 8
    done = examine(class_cond=True, ema_rate=0.9, batch_size=8, lr_anneal_steps=8)
    assert "time: nothing is left to do: 8 steps are done" in done.stdout
    assert tree(run) == before[0]


@pytest.mark.parametrize(
    "flags",
    [
        {"data_dir": "gone"},
        {"batch_size": 61},
        {"num_channels": 100},
        {"log_dir": "file"},
        {"train_steps": 3, "lr_anneal_steps": 1},
        {"parallel": "fsdp"},
        {"resume_checkpoint": "gone.pt"},
    ],
)
def test_mistakes_are_told_as_in_training(tmp_path, digits_dir, run_script, flags):
    (tmp_path / "file").touch()
    own = {**TINY, "data_dir": digits_dir, "log_dir": "run"}
    lines = [
        error_of(run_script(name, own, flags, cwd=tmp_path)) for name in ("doctor", "image_train")
    ]
    assert lines[0] == lines[1]
    assert os.listdir(tmp_path) == ["file"]


def failure_of(done):
    """The error of an examination that had begun."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    (line,) = done.stderr.splitlines()
    return line.removeprefix("error: ")


@pytest.mark.slow
def test_failures_name_what_was_tried(tmp_path, digits_dir, run_script):
    def fail(name="doctor", env=None, **flags):
        own = {**TINY, **QUICK, "data_dir": digits_dir, "log_dir": "run", **flags}
        line = failure_of(run_script(name, own, cwd=tmp_path, env=env))
        assert [path for path in os.listdir(tmp_path) if path != "images"] == []
        return line

    assert fail("faulty_doctor", {"FAULT": "disk"}) == (
        "load: tensors that were loaded differ from those that were saved"
    )
    assert re.match(r"(speed|step): losses or gradients are not finite in any step", fail(lr=1e30))
    images = tmp_path / "images"
    images.mkdir()
    for i in range(6):
        Image.new("L", (8, 8), 40 * i).save(images / f"{i}.png")
    (images / "3.png").write_bytes(b"no picture")
    assert re.match(r"data: .*3\.png", fail(data_dir="images"))


def test_impossible_thoroughness(tmp_path, run_script):
    line = error_of(run_script("doctor", TINY, cwd=tmp_path, data_dir="x", doctor_seconds=0))
    assert "--doctor_seconds 0" in line


@pytest.mark.slow
def test_stopped_in_the_middle_it_leaves_nothing(tmp_path, digits_dir):
    own = {**TINY, **QUICK, "data_dir": digits_dir, "log_dir": "run", "doctor_seconds": 600}
    process = subprocess.Popen(
        [sys.executable, script_path("doctor"), *command_line(own)],
        cwd=tmp_path,
        env=script_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("step: "):
            break
    assert os.listdir(tmp_path)[0].startswith(".doctor-")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors == "stopped by a signal before the forecast was made\n"
    assert os.listdir(tmp_path) == []


# -- several processes ------------------------------------------------------------------------


def launch(launcher, name, *parts, cwd, env=None, **flags):
    words = command_line(*parts, flags)
    return start(launcher, script_path(name), *words, cwd=cwd, env=script_environment(env))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "parallel", "compare"),
    [
        ("torchrun", "ddp", False),
        pytest.param("torchrun", "fsdp", True, marks=pytest.mark.slow),
        pytest.param("mpiexec", "ddp", True, marks=pytest.mark.slow),
    ],
)
def test_two_processes(tmp_path, digits_dir, launcher, parallel, compare):
    flags = {**TINY, **QUICK, "data_dir": digits_dir, "log_dir": "run", "parallel": parallel}
    done = succeed(launch(launcher, "doctor", flags, cwd=tmp_path, lr_anneal_steps=9))
    assert topics(done) == TOPICS
    assert f"started by {launcher}, backend gloo" in done.stdout
    ranks = re.findall(r"^  (\d) +\S+ +CPU +[\d.]+ GiB +(\d)", done.stdout, flags=re.MULTILINE)
    assert ranks == [("0", "0"), ("1", "1")]
    assert re.search(r"all-reduce: right over 2 processes; .* for 64\.0 MiB, .*/s\n", done.stdout)
    assert os.listdir(tmp_path) == []
    if not compare:
        return
    foretold = number(r"disk: .*\(([\d,]+) bytes\)", done.stdout)
    flags = {name: value for name, value in flags.items() if name != "doctor_seconds"}
    done = succeed(launch(launcher, "image_train", flags, cwd=tmp_path, lr_anneal_steps=9))
    paths = [path for path in run_folder(done).rglob("*") if path.is_file()]
    assert foretold == pytest.approx(sum(path.stat().st_size for path in paths), rel=0.01)


@pytest.mark.slow
def test_a_network_that_damages_data_is_found(tmp_path, digits_dir):
    flags = {**TINY, **QUICK, "data_dir": digits_dir, "log_dir": "run"}
    done = launch("torchrun", "faulty_doctor", flags, cwd=tmp_path, env={"FAULT": "network"})
    assert done.returncode != 0
    assert "error: all-reduce: the sum over 2 processes is wrong" in done.stderr
    assert os.listdir(tmp_path) == []


# -- the demo ---------------------------------------------------------------------------------


def demo_flags():
    """The flags that `make demo` trains with."""
    text = (ROOT / "Makefile").read_text()
    words = (
        re.search(r"image_train\.py ((?:.*\\\n)*.*)", text).group(1).replace("\\\n", " ").split()
    )
    names = (word.removeprefix("--") for word in words[::2])
    return dict(zip(names, words[1::2], strict=True))


PEAK_OF = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_memory_of_the_demo_is_foretold(tmp_path):
    words = [sys.executable, str(ROOT / "datasets" / "digits.py"), "digits"]
    subprocess.run(words, cwd=tmp_path, check=True, capture_output=True)
    flags = {**demo_flags(), "data_dir": "digits", "log_dir": "run"}
    words = [sys.executable, script_path("doctor"), *command_line(flags)]
    foretold = subprocess.run(
        words, cwd=tmp_path, env=script_environment(), check=True, capture_output=True, text=True
    ).stdout
    began = time.monotonic()
    words = [sys.executable, script_path("image_train"), *command_line(flags)]
    # by a small process between: a child's peak begins with the memory of what started it
    train = subprocess.run(
        [sys.executable, "-c", PEAK_OF, *words],
        cwd=tmp_path,
        env=script_environment(),
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    peak = int(train.stdout.splitlines()[-1]) * 1024
    print(foretold, f"took {duration_text(time.monotonic() - began)}")  # of no certain length
    held = number(r"memory: ([\d.]+) MiB per process", foretold) * 2**20
    assert held == pytest.approx(peak, rel=0.2)
    left = sum(path.stat().st_size for path in (tmp_path / "run").iterdir())
    assert number(r"disk: .*\(([\d,]+) bytes\)", foretold) == pytest.approx(left, rel=0.01)
