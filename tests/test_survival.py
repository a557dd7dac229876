"""Runs that are stopped, killed or hindered at any moment, and go on as if they had not been."""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from launchers import mpiexec, start
from script_runner import (
    TINY,
    command_line,
    error_of,
    names,
    script_environment,
    script_path,
    start_script,
    succeed,
    tree,
)

from improved_diffusion import checkpoint

SCRIPT = "image_train"
AGAIN = 75  # the exit code that asks for the same command again
FLAGS = {
    **TINY,
    "log_dir": "run",
    "class_cond": True,
    "dropout": 0.1,
    "batch_size": 4,
    "lr": 1e-3,
    "ema_rate": "0.9,0.99",
    "train_steps": 12,
    "save_interval": 3,
    "log_interval": 2,
}
LONG = {"train_steps": 60, "save_interval": 20}  # long enough for a signal from outside
FILES = ("state", "opt", "ema_0.9_", "ema_0.99_", "model")  # in the order of their writing


def launch(launcher, name, *parts, cwd, env=None, **flags):
    """Run to the end; on two processes if there is a launcher."""
    words = command_line(*parts, flags)
    return start(launcher, script_path(name), *words, cwd=cwd, env=script_environment(env))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, digits_dir):
    """The run folder of a run with some flags that nothing disturbed; each is made once."""
    made = {}

    def folder(launcher="single", **flags):
        key = (launcher, *sorted(flags.items()))
        if key not in made:
            place = tmp_path_factory.mktemp("uninterrupted")
            flags = {**FLAGS, **flags, "data_dir": digits_dir}
            succeed(launch(launcher, SCRIPT, flags, cwd=place))
            made[key] = place / "run"
        return made[key]

    return folder


def same(value, other):
    """Whether nested values are equal and their tensors equal bit for bit."""
    if isinstance(value, torch.Tensor):
        return value.dtype == other.dtype and value.numpy().tobytes() == other.numpy().tobytes()
    if isinstance(value, dict):
        return value.keys() == other.keys() and all(same(value[k], other[k]) for k in value)
    if isinstance(value, list | tuple):
        return len(value) == len(other) and all(map(same, value, other))
    return value == other


def newest_step(folder):
    return max(checkpoint._steps(names(folder), checkpoint._MANIFEST))


def assert_same_end(folder, reference, logs=("progress.csv", "progress.json")):
    """Weights, averages and optimiser of the last step, and the logs, are equal bit for bit."""
    step = newest_step(reference)
    assert newest_step(folder) == step
    last = [n for n in names(reference) if n.endswith(f"{step:06d}.pt") and n[:5] != "state"]
    assert len(last) == 4, last
    for name in last:
        ours, theirs = (torch.load(Path(f) / name) for f in (folder, reference))
        assert same(ours, theirs), name
    for name in logs:
        assert (folder / name).read_bytes() == (reference / name).read_bytes(), name
    assert not checkpoint._problem(str(folder), step)
    assert not [name for name in names(folder) if name.endswith(".tmp")]


def wait_for_steps(folder, count, process, seconds=60):
    """Until a run has written ``count`` rows of its log."""
    rows = folder / "progress.json"
    end = time.monotonic() + seconds
    while not (rows.exists() and rows.read_bytes().count(b"\n") >= count):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def popen(command, cwd, env=None):
    """A process in a session of its own."""
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=script_environment(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def torchrun_words():
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def processes_of(folder, script):
    """The processes that run a script in a folder, but for those that load its data, by rank."""
    found = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
            if (
                script.encode() in words[1:3]  # python [-u] SCRIPT
                and os.readlink(entry / "cwd") == str(folder)
            ):
                env = (entry / "environ").read_bytes().decode().split("\0")
                env = dict(pair.split("=", 1) for pair in env if "=" in pair)
                rank = int(env.get("RANK", env.get("PMI_RANK", 0)))
                found.setdefault(rank, []).append(int(entry.name))
    # data workers are forks of their rank, and younger
    return {rank: min(pids) for rank, pids in found.items()}


# -- signals ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_signal_to_the_process_group(tmp_path, digits_dir, uninterrupted, name):
    """As Slurm and a terminal send it: to the processes that load images, too."""
    flags = {**FLAGS, **LONG, "data_dir": digits_dir, "num_workers": 1}
    process = popen([sys.executable, script_path(SCRIPT), *command_line(flags)], tmp_path)
    wait_for_steps(tmp_path / "run", 4, process)
    os.killpg(process.pid, signal.Signals[name])
    out, err = process.communicate(timeout=60)
    assert process.returncode == AGAIN, (out, err)
    assert f"stopped by {name} after step" in err
    assert "Traceback" not in err
    step = newest_step(tmp_path / "run")
    assert 6 <= step < 59
    assert f"after step {step}, which is saved" in err
    assert not checkpoint._problem(str(tmp_path / "run"), step)
    succeed(start_script(SCRIPT, flags, cwd=tmp_path))
    assert_same_end(tmp_path / "run", uninterrupted(**LONG))


@pytest.mark.parametrize("step", [0, 2, 3, 11])
def test_signal_at_any_step(tmp_path, digits_dir, run_script, uninterrupted, step):
    """Also in the first step, where a save is due anyway, and in the last."""
    flags = {**FLAGS, "data_dir": digits_dir}
    env = {"FAULT": f"SIGTERM step {step}"}
    done = run_script("faulty_train", flags, cwd=tmp_path, env=env)
    assert done.returncode == AGAIN, done.stderr
    assert newest_step(tmp_path / "run") == step
    succeed(run_script(SCRIPT, flags, cwd=tmp_path))
    assert_same_end(tmp_path / "run", uninterrupted())


EXIT_CODES = {"torchrun": 1, "mpiexec": AGAIN}  # torchrun has one code for whatever goes wrong


def launcher_words(launcher):
    return torchrun_words() if launcher == "torchrun" else [mpiexec(), "-n", "2", sys.executable]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "mpiexec"])
@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("SIGTERM", "launcher"),
        ("SIGTERM", "rank 0"),
        ("SIGTERM", "rank 1"),
        ("SIGUSR1", "all ranks"),
    ],
)
def test_signal_under_a_launcher(tmp_path, digits_dir, uninterrupted, launcher, name, target):
    flags = {**FLAGS, **LONG, "data_dir": digits_dir, "num_workers": 1}
    words = [*launcher_words(launcher), script_path(SCRIPT), *command_line(flags)]
    process = popen(words, tmp_path)
    ranks = {}
    try:
        wait_for_steps(tmp_path / "run", 4, process)
        ranks = processes_of(tmp_path, script_path(SCRIPT))
        assert sorted(ranks) == [0, 1]
        targets = {"launcher": [process.pid], "all ranks": [ranks[0], ranks[1]]}
        for pid in targets.get(target) or [ranks[int(target[-1])]]:
            os.kill(pid, signal.Signals[name])
        _, err = process.communicate(timeout=60)
    finally:
        for pid in (process.pid, *ranks.values()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    print(f"EXITCODE {launcher} {name} to {target}: {process.returncode}\n{err}")
    assert "stopped by" in err
    assert process.returncode == EXIT_CODES[launcher]
    step = newest_step(tmp_path / "run")
    assert 6 <= step < 59
    assert f"after step {step}, which is saved" in err
    succeed(launch(launcher, SCRIPT, flags, cwd=tmp_path))
    assert_same_end(tmp_path / "run", uninterrupted(launcher, **LONG))


# -- kill -9 ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_at_20_random_moments(tmp_path, digits_dir, run_script, uninterrupted):
    """Moments of a clock that starts with training; many hit a save, which is most of the time."""
    flags = {**FLAGS, "data_dir": digits_dir, "train_steps": 24}
    reference = uninterrupted(train_steps=24)
    times = [(reference / name).stat().st_mtime for name in ("config.json", "model000024.pt")]
    duration = times[1] - times[0]
    moments = random.Random(0)
    killed = []
    while len(killed) < 20:
        fault = f"SIGKILL after {moments.uniform(0.1, 0.6) * duration:.3f}"
        done = run_script("faulty_train", flags, cwd=tmp_path, env={"FAULT": fault})
        if done.returncode == 0:  # it was faster: from the start again
            assert_same_end(tmp_path / "run", reference)
            shutil.rmtree(tmp_path / "run")
            continue
        assert done.returncode == -signal.SIGKILL, done.stderr
        manifests = checkpoint._steps(names(tmp_path / "run"), checkpoint._MANIFEST)
        killed.append(max(manifests, default=-1))
    print("newest checkpoints after each kill:", killed)
    assert len(set(killed)) > 3
    done = succeed(run_script(SCRIPT, flags, cwd=tmp_path))
    assert "passed over" not in done.stdout  # nothing half-written ever counted
    assert_same_end(tmp_path / "run", reference)


@pytest.mark.slow
def test_killed_at_every_boundary_of_a_save(tmp_path, digits_dir, run_script, uninterrupted):
    flags = {**FLAGS, "data_dir": digits_dir}
    written = [f"{name}000003.pt" for name in FILES] + ["checkpoint000003.json"]
    for name in written:
        for place in ("half", "before", "after"):
            env = {"FAULT": f"SIGKILL {place} {name}"}
            done = run_script("faulty_train", flags, cwd=tmp_path, env=env)
            assert done.returncode == -signal.SIGKILL, (place, name, done.stderr)
            counts = name.endswith("json") and place == "after"
            assert newest_step(tmp_path / "run") == (3 if counts else 0)
    succeed(run_script(SCRIPT, flags, cwd=tmp_path))
    assert_same_end(tmp_path / "run", uninterrupted())


COMBINATIONS = [
    pytest.param(sampler, fp16, id=f"{sampler}-{'fp16' if fp16 else 'fp32'}")
    for sampler in ("uniform", "loss-second-moment")
    for fp16 in (False, True)
]


def combination(sampler, fp16):
    """Flags; few timesteps and many images, so that the loss-aware one has left its warm-up."""
    return {
        "schedule_sampler": sampler,
        "use_fp16": fp16,
        "diffusion_steps": 3,
        "batch_size": 8,
        "train_steps": 14,
    }


@pytest.mark.slow
@pytest.mark.parametrize(("sampler", "fp16"), COMBINATIONS)
def test_killed_with_any_sampler_and_precision(
    tmp_path, digits_dir, run_script, uninterrupted, sampler, fp16
):
    flags = {**FLAGS, **combination(sampler, fp16), "data_dir": digits_dir}
    env = {"FAULT": "SIGKILL step 11"}
    done = run_script("faulty_train", flags, cwd=tmp_path, env=env)
    assert done.returncode == -signal.SIGKILL, done.stderr
    succeed(run_script(SCRIPT, flags, cwd=tmp_path))
    assert_same_end(tmp_path / "run", uninterrupted(**combination(sampler, fp16)))


@pytest.mark.slow
@pytest.mark.parametrize(("sampler", "fp16"), COMBINATIONS)
def test_one_of_two_processes_killed(tmp_path, digits_dir, uninterrupted, sampler, fp16):
    flags = {**FLAGS, **combination(sampler, fp16), "data_dir": digits_dir}
    for fault in ("SIGKILL step 5 0", "SIGKILL step 11 1"):
        env = {"FAULT": fault}
        done = launch("torchrun", "faulty_train", flags, cwd=tmp_path, env=env)
        assert done.returncode != 0, fault
        assert "SIGKILL" in done.stderr
    succeed(launch("torchrun", SCRIPT, flags, cwd=tmp_path))
    assert_same_end(tmp_path / "run", uninterrupted("torchrun", **combination(sampler, fp16)))


# -- disks ------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A folder that holds two checkpoints and a half; ``grow()`` makes room."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("needs mount")
    words = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")

    def grow():
        words = ["mount", "-o", "remount,size=400m", str(folder)]
        subprocess.run(words, check=True)

    yield folder, grow
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_full_disk(small_disk, digits_dir, run_script, uninterrupted):
    disk, grow = small_disk
    flags = {**FLAGS, "data_dir": digits_dir}
    faults = ["", "SIGTERM step 7", "SIGKILL step 7"]
    for fault in faults:
        done = run_script("faulty_train", flags, cwd=disk, env={"FAULT": fault})
        if fault.startswith("SIGKILL") and done.returncode == -signal.SIGKILL:
            continue  # before it noticed
        assert done.returncode == 2, (fault, done)
        assert re.fullmatch(r"error: .*No space left on device: '.*000006\..*'\n", done.stderr)
        assert newest_step(disk / "run") == 3
        assert not checkpoint._problem(str(disk / "run"), 3)
    grow()
    succeed(run_script(SCRIPT, flags, cwd=disk))
    assert_same_end(disk / "run", uninterrupted())


def truncate(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def cut_off(tmp_path_factory, digits_dir):
    """The run folder of a run that was killed after the checkpoint of step 9."""
    place = tmp_path_factory.mktemp("cut_off")
    flags = {**FLAGS, "data_dir": digits_dir}
    fault = {"FAULT": "SIGKILL after checkpoint000009.json"}
    done = start_script("faulty_train", flags, cwd=place, env=fault)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert newest_step(place / "run") == 9
    return place / "run"


@pytest.mark.slow
@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
@pytest.mark.parametrize("kind", ["model", "ema_0.9_", "opt", "state", "checkpoint"])
def test_damaged_checkpoint_is_passed_over(
    tmp_path, digits_dir, run_script, uninterrupted, cut_off, kind, damage
):
    name = f"{kind}000009.{'json' if kind == 'checkpoint' else 'pt'}"
    folder = tmp_path / "run"
    shutil.copytree(cut_off, folder)
    damage(folder / name)
    flags = {**FLAGS, "data_dir": digits_dir}
    if damage is not Path.unlink or kind not in ("checkpoint", "state"):
        before = tree(tmp_path)
        named = folder / (name if damage is not Path.unlink else "model000009.pt")
        if named.exists():
            done = run_script(SCRIPT, flags, cwd=tmp_path, resume_checkpoint=named)
            line = error_of(done)
            assert str(named) in line
            assert "damaged" in line
            assert name in line or kind == "checkpoint"
        assert tree(tmp_path) == before
    done = succeed(run_script(SCRIPT, flags, cwd=tmp_path))
    if (kind, damage) != ("checkpoint", Path.unlink):  # then it is a save that was cut off
        text = done.stdout + done.stderr
        assert re.search(rf"the checkpoint of step 9 is passed over: .*({name}|\.pt)", text), text
        assert kind == "checkpoint" or f"passed over: {name}" in text
        assert "going back to the checkpoint of step 6" in text
    assert f"model restored from {folder}/model000006.pt" in done.stdout
    assert_same_end(folder, uninterrupted())


# -- another number of processes --------------------------------------------------------------


def recorded(path, processes, batch_size):
    """The images of each step in the order of the global batch."""
    steps = {}
    for rank in range(processes):
        for line in Path(f"{path}.{rank}").read_text().splitlines():
            step, *sums = line.split()
            steps.setdefault(int(step), {})[rank] = sums
    assert all(len(part) == batch_size for step in steps.values() for part in step.values())
    return {
        step: [image for rank in range(processes) for image in by_rank[rank]]
        for step, by_rank in steps.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("first", ["torchrun", "single"])
def test_another_number_of_processes_sees_the_same_images(tmp_path, digits_dir, first):
    flags = {**FLAGS, "data_dir": digits_dir, "dropout": 0.0, "lr": 1e-4}
    sizes = {"torchrun": (2, 4), "single": (1, 8)}
    then = "single" if first == "torchrun" else "torchrun"
    done = launch(
        first,
        "faulty_train",
        flags,
        cwd=tmp_path,
        batch_size=sizes[first][1],
        env={"FAULT": "SIGTERM step 5", "RECORD": str(tmp_path / "first")},
    )
    assert "stopped by SIGTERM" in done.stderr, done.stderr
    done = launch(
        then,
        "faulty_train",
        flags,
        cwd=tmp_path,
        batch_size=sizes[then][1],
        microbatch=2,
        env={"RECORD": str(tmp_path / "then")},
    )
    succeed(done)
    done = launch(
        "single",
        "faulty_train",
        flags,
        cwd=tmp_path,
        batch_size=8,
        log_dir="whole",
        env={"RECORD": str(tmp_path / "whole_run")},
    )
    succeed(done)
    seen = recorded(tmp_path / "first", *sizes[first])
    assert sorted(seen) == list(range(6))
    seen |= recorded(tmp_path / "then", *sizes[then])
    assert seen == recorded(tmp_path / "whole_run", 1, 8)
    assert len({image for images in list(seen.values())[:7] for image in images}) > 50
    for kind in ("model", "ema_0.9_"):
        ours, theirs = (
            torch.load(tmp_path / folder / f"{kind}000012.pt") for folder in ("run", "whole")
        )
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-5)


# -- bounds and intervals ---------------------------------------------------------------------


def steps_saved(folder):
    return sorted(checkpoint._steps(names(folder), checkpoint._MANIFEST))


def test_train_images(tmp_path, digits_dir, run_script):
    flags = {**FLAGS, "data_dir": digits_dir, "train_steps": 0}
    done = succeed(run_script(SCRIPT, flags, cwd=tmp_path, train_images=30))
    assert steps_saved(tmp_path / "run") == [0, 3, 6, 8]  # 8 x 4 images are the first above 30
    done = succeed(run_script(SCRIPT, flags, cwd=tmp_path, train_images=30))
    assert "nothing to do: 8 of 8 steps done" in done.stdout
    # Another batch size: so many images are left
    done = succeed(run_script(SCRIPT, flags, cwd=tmp_path, train_images=40, batch_size=2))
    assert steps_saved(tmp_path / "run")[-1] == 12


def test_train_hours(tmp_path, digits_dir, run_script):
    flags = {**FLAGS, "data_dir": digits_dir, "train_steps": 0, "train_hours": 0.5 / 3600}
    succeed(run_script(SCRIPT, flags, cwd=tmp_path))
    last = steps_saved(tmp_path / "run")[-1]
    assert last >= 1
    done = succeed(run_script(SCRIPT, flags, cwd=tmp_path))
    assert "nothing to do" in done.stdout
    assert steps_saved(tmp_path / "run")[-1] == last
    succeed(run_script(SCRIPT, {**flags, "train_hours": 1.0 / 3600}, cwd=tmp_path))
    assert steps_saved(tmp_path / "run")[-1] > last


@pytest.mark.slow
def test_save_minutes(tmp_path, digits_dir, run_script, uninterrupted):
    """Saves by the clock change nothing but the number of checkpoints."""
    flags = {**FLAGS, "data_dir": digits_dir, "save_interval": 100}
    succeed(run_script(SCRIPT, flags, cwd=tmp_path, save_minutes=1e-6))
    assert len(steps_saved(tmp_path / "run")) > 8
    assert_same_end(tmp_path / "run", uninterrupted(save_interval=100))


@pytest.mark.slow
def test_kept_checkpoints(tmp_path, digits_dir, run_script, uninterrupted):
    flags = {**FLAGS, "data_dir": digits_dir, "save_interval": 1}
    succeed(run_script(SCRIPT, flags, cwd=tmp_path, keep_checkpoints=2, keep_every=4))
    assert steps_saved(tmp_path / "run") == [0, 4, 8, 10, 11]
    files = [name for name in names(tmp_path / "run") if name.endswith(".pt")]
    assert len(files) == 5 * len(FILES)
    assert_same_end(tmp_path / "run", uninterrupted(save_interval=1))


@pytest.mark.slow
def test_killed_while_removing_old_checkpoints(tmp_path, digits_dir, run_script, uninterrupted):
    flags = {**FLAGS, "data_dir": digits_dir, "save_interval": 1, "keep_checkpoints": 1}
    for moment in (0.05, 0.1, 0.15, 0.2, 0.25, 0.3):
        env = {"FAULT": f"SIGKILL after {moment}"}
        run_script("faulty_train", flags, cwd=tmp_path, env=env)
        if steps := steps_saved(tmp_path / "run"):
            assert not checkpoint._problem(str(tmp_path / "run"), steps[-1])
    succeed(run_script(SCRIPT, flags, cwd=tmp_path))
    assert steps_saved(tmp_path / "run") == [11]
    assert_same_end(tmp_path / "run", uninterrupted(save_interval=1))
