"""Checkpoints in shares: written together, read by any number of processes, merged."""

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from launchers import mpiexec, start
from script_runner import (
    TINY,
    command_line,
    error_of,
    script_environment,
    script_path,
    start_script,
    succeed,
)
from test_parallel import FSDP, difference, train

from improved_diffusion import checkpoint, sharded, stored_flags
from improved_diffusion.errors import UserError

STEP = 20
# Of the tests' network: the last norm has one channel a group and takes these biases away again,
# so their gradients are rounding alone, which Adam makes whole steps of
IDLE = {"output_blocks.3.0.out_layers.3.bias", "output_blocks.3.0.skip_connection.bias"}


@pytest.fixture
def group():
    """A process group of this process alone."""
    assert not dist.is_initialized()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def files_of(step=STEP, value=1.0):
    """What a loop stores, in small."""
    weights = {"a.weight": torch.full((3, 2), value), "a.bias": torch.arange(3.0)}
    moments = {"step": torch.tensor(7.0), "exp_avg": torch.randn(3, 2)}
    groups = [{"lr": 1e-3, "betas": (0.9, 0.999), "foreach": None, "params": [0, 1]}]
    return {
        checkpoint.state_name(step): {"step": step, "pending": [(torch.ones(2), {"loss": 1.5})]},
        checkpoint.opt_name(step): {"state": {0: moments, 1: {}}, "param_groups": groups},
        checkpoint.ema_name("0.9", step): {key: 2 * w for key, w in weights.items()},
        checkpoint.posthoc_name(0.1, step): {
            "updates": step,
            "sigma_rel": 0.1,
            "weights": dict(weights),
        },
        checkpoint.model_name(step): weights,
    }


def same(value, other):
    if isinstance(value, torch.Tensor):
        return value.dtype == other.dtype and torch.equal(value, other)
    if isinstance(value, dict):
        return list(value) == list(other) and all(same(value[k], other[k]) for k in value)
    return value == other


@pytest.fixture
def run(tmp_path, group):
    """A run folder with a checkpoint in shares, and what was stored."""
    files = files_of()
    sharded.write_checkpoint(str(tmp_path), STEP, files, group)
    return tmp_path, files


def test_every_file_is_read_as_it_was(run):
    folder, files = run
    stored = sharded.ShardedCheckpoint(str(folder / "sharded000020"))
    assert set(stored.names) == set(files) - {"state000020.pt"}
    assert all(same(stored.read(name), files[name]) for name in stored.names)
    assert stored.shapes("model000020.pt") == {"a.weight": (3, 2), "a.bias": (3,)}


def test_merging_gives_the_files_of_one_process(run):
    folder, files = run
    written = sharded.merge(str(folder / "sharded000020"), str(folder))
    assert {os.path.basename(path) for path in written} == set(files) - {"state000020.pt"}
    for name, value in files.items():
        loaded = torch.load(folder / name, weights_only=True)
        assert name.startswith("state") or same(loaded, value)
    assert checkpoint.find_newest_model(str(folder)) == str(folder / "model000020.pt")
    assert not checkpoint._problem(str(folder), STEP)
    assert any("sharded" in name for name in checkpoint.read_manifest(str(folder), STEP))


def test_merging_into_another_folder_makes_a_run_folder(run, tmp_path_factory):
    folder, files = run
    stored_flags.save_config(str(folder), {"num_channels": 32})
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    out = tmp_path_factory.mktemp("out")
    sharded.merge(str(folder / "sharded000020"), str(out))
    assert {path.name for path in out.iterdir()} == {*files, "config.json", "checkpoint000020.json"}
    assert checkpoint.find_newest_model(str(out)) == str(out / "model000020.pt")
    assert stored_flags.load_config(str(out)) == {"num_channels": 32}
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_shares_are_a_checkpoint_of_the_run(run, group):
    folder, _ = run
    shares = str(folder / "sharded000020")
    assert checkpoint.find_newest_model(str(folder)) == shares
    for name in ("sharded000020", "sharded000020/", "state000020.pt", "checkpoint000020.json", ""):
        assert checkpoint.locate(str(folder / name) + "/" * name.endswith("/")) == shares
    assert checkpoint.parse_resume_step_from_filename(shares) == checkpoint.step_of(shares) == STEP
    sharded.write_checkpoint(str(folder), 30, files_of(30), group)
    checkpoint.prune(str(folder), lambda steps: steps[-1:])
    assert {path.name for path in folder.iterdir()} == {
        "sharded000030",
        "state000030.pt",
        "checkpoint000030.json",
    }


def test_writing_again_leaves_nothing_of_the_last_time(run, group):
    folder, _ = run
    (folder / "sharded000020" / "__7_0.distcp").write_bytes(b"the share of a process that is gone")
    files = files_of(value=5.0)
    sharded.write_checkpoint(str(folder), STEP, files, group)
    assert not (folder / "sharded000020" / "__7_0.distcp").exists()
    stored = sharded.ShardedCheckpoint(str(folder / "sharded000020"))
    assert same(stored.read("model000020.pt"), files["model000020.pt"])


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "structure.pt"])
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_damage_is_found(run, name, damage):
    folder, _ = run
    path = folder / "sharded000020" / name
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    with pytest.raises(UserError, match=f"holds no whole checkpoint: sharded000020/{name}"):
        checkpoint.find_newest_model(str(folder))


def test_metadata_cannot_run_code(run, tmp_path):
    folder, _ = run

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    for evil in (Evil(), {"state_dict_metadata": Evil()}):
        (folder / "sharded000020" / ".metadata").write_bytes(pickle.dumps(evil))
        with pytest.raises(UserError, match=r"posix.mkdir, which could run code"):
            sharded.ShardedCheckpoint(str(folder / "sharded000020"))
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("content", [b"", b"nonsense", pickle.dumps({"a": 1})])
def test_metadata_that_is_none(run, content):
    folder, _ = run
    (folder / "sharded000020" / ".metadata").write_bytes(content)
    with pytest.raises(UserError, match=r"\.metadata' is damaged or no checkpoint") as error:
        sharded.ShardedCheckpoint(str(folder / "sharded000020"))
    assert "\n" not in str(error.value)


def test_a_folder_that_cannot_be_written_is_named(tmp_path, group):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(OSError, match="says process 0") as error:
        sharded.write_checkpoint(str(tmp_path / "run"), STEP, files_of(), group)
    assert error.value.filename == str(tmp_path / "run" / "sharded000020")


# -- several processes


@pytest.fixture(scope="module")
def half_way(tmp_path_factory):
    """A run of two processes that share a model, and one of a single process, saved at step 10."""
    folder = tmp_path_factory.mktemp("half_way")
    arguments = {"save_interval": 10, "posthoc_ema": "0.1"}
    shared = train(folder, "shared", 2, **FSDP, **arguments)
    alone = train(folder, "alone", 1, **arguments)
    assert difference(shared, alone) < 1e-5
    return folder, alone


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "processes", "given"),
    [
        ("shared/sharded000010", 2, FSDP),
        ("shared/sharded000010", 4, {**FSDP, "shard_processes": 2}),
        ("shared/sharded000010", 3 - 1, {}),
        ("shared/sharded000010", 1, {}),
        ("alone/model000010.pt", 2, FSDP),
    ],
    ids=str,
)
def test_any_processes_go_on_from_any_checkpoint(tmp_path, half_way, source, processes, given):
    folder, reference = half_way
    given = {**given, "resume_checkpoint": str(folder / source), "posthoc_ema": "0.1"}
    result = train(tmp_path, "on", processes, **given)
    log = (tmp_path / "on" / "log.txt").read_text()
    assert log.count("restored from") == 5
    assert "cold" not in log
    assert difference(result, reference) < 1e-5


@pytest.mark.slow
def test_merged_files_are_those_of_one_process(tmp_path, half_way):
    folder, _ = half_way
    shutil.copytree(folder / "shared", tmp_path / "run")
    sharded.merge(str(tmp_path / "run" / "sharded000010"), str(tmp_path / "run"))
    for path in (folder / "alone").glob("*000010.pt"):
        if not path.name.startswith("state"):
            ours, theirs = (
                torch.load(place / path.name) for place in (tmp_path / "run", path.parent)
            )
            assert close(ours, theirs), path.name


def close(value, other):
    if isinstance(value, torch.Tensor):
        return value.dtype == other.dtype and torch.allclose(value, other, rtol=0, atol=1e-5)
    if isinstance(value, dict):
        return list(value) == list(other) and all(close(value[k], other[k]) for k in value)
    if isinstance(value, list | tuple):
        return type(value) is type(other) and all(map(close, value, other))
    return value == other


# -- the scripts

FLAGS = {
    **TINY,
    "log_dir": "run",
    "class_cond": True,
    "global_batch": 8,
    "lr": 1e-4,
    "ema_rate": 0.9,
    "train_steps": 12,
    "save_interval": 4,
    "log_interval": 2,
}
CHECKS = {"val_fraction": 0.1, "val_images": 5, "val_interval": 6, "sample_interval": 6}


def launch(launcher, *parts, cwd, processes=2, **flags):
    words = command_line(*parts, flags)
    script = script_path("image_train")
    return start(launcher, script, *words, processes=processes, cwd=cwd, env=script_environment())


def merge(cwd, **flags):
    words = command_line(flags)
    return subprocess.run(
        [sys.executable, script_path("merge_checkpoint"), *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=script_environment(),
    )


def last_of(key, run):
    """The last value of a column of a run's log."""
    rows = map(json.loads, (run / "progress.json").read_text().splitlines())
    return [row[key] for row in rows if key in row][-1]


@pytest.mark.slow
def test_shared_training_stops_goes_on_and_samples(tmp_path, digits_dir, monkeypatch):
    flags = {**FLAGS, **CHECKS, "data_dir": digits_dir}
    monkeypatch.setenv("DIFFUSION_TRAINING_TEST", "1")  # stop after the save of step 4
    succeed(launch("torchrun", flags, cwd=tmp_path, parallel="fsdp"))
    assert (tmp_path / "run" / "sharded000004").is_dir()
    monkeypatch.delenv("DIFFUSION_TRAINING_TEST")
    done = succeed(launch("torchrun", flags, cwd=tmp_path, parallel="fsdp"))
    assert "each process holds 1/2 of weights" in done.stdout
    assert done.stdout.count("restored from run") + done.stdout.count("restored from /") == 4
    succeed(launch("single", flags, cwd=tmp_path, log_dir="alone", processes=1))

    assert "model000012.pt" in succeed(merge(tmp_path, checkpoint="run")).stdout
    for name in ("model000012.pt", "ema_0.9_000012.pt"):
        ours, theirs = (torch.load(tmp_path / run / name) for run in ("run", "alone"))
        far = {k: (ours[k] - theirs[k]).abs().max().item() for k in ours}
        assert all(far[k] < (1e-4 if k in IDLE else 1e-6) for k in ours), name
    bounds = [last_of("val_ema_bpd", tmp_path / run) for run in ("run", "alone")]
    assert bounds[0] == pytest.approx(bounds[1], rel=1e-4)
    assert (tmp_path / "run" / "preview_000006.png").exists()
    sample = {"num_samples": 2, "use_ddim": True, "timestep_respacing": "ddim3"}
    made = start_script(
        "image_sample", {**sample, "model_path": "run/ema_0.9_000012.pt"}, cwd=tmp_path
    )
    succeed(made)


def test_mistakes_are_one_line(tmp_path, digits_dir, run_script):
    flags = {**FLAGS, "data_dir": digits_dir}
    done = run_script("image_train", flags, cwd=tmp_path, parallel="fsdp")
    assert "--parallel fsdp shares the model among processes" in error_of(done)
    done = run_script("image_train", flags, cwd=tmp_path, batch_size=4)
    assert "--batch_size 4 contradicts --global_batch 8" in error_of(done)
    assert not (tmp_path / "run").exists()
    for flags, words in [
        ({}, "--checkpoint is missing"),
        ({"checkpoint": "nowhere"}, "--checkpoint nowhere does not exist"),
        ({"checkpoint": str(digits_dir)}, "the folder holds no checkpoint"),
        ({"checkpoint": ".", "out_dir": __file__}, "is a file: name a folder"),
    ]:
        done = run_script("merge_checkpoint", flags, cwd=tmp_path)
        assert words in error_of(done)


def test_shares_are_no_weights_to_sample_from(run, run_script):
    folder, _ = run
    for path in ("sharded000020", str(folder)):
        done = run_script("image_sample", {"model_path": path}, cwd=folder)
        assert f"merge_checkpoint.py --checkpoint {path} makes model*.pt" in error_of(done)
    assert Path(script_path("merge_checkpoint")).exists()


def test_snapshots_in_shares_are_merged_before_averages_are_made(run, group, run_script):
    folder, _ = run
    sharded.write_checkpoint(str(folder), 30, files_of(30), group)
    done = run_script("ema_reconstruct", {"run": "."}, cwd=folder)
    assert "2 snapshots, such as posthoc_0.1_000020.pt, are still in shares" in error_of(done)
    stored_flags.save_config(str(folder), {"keep_checkpoints": 2})
    done = succeed(run_script("merge_checkpoint", {"checkpoint": ".", "all": True}, cwd=folder))
    assert "--keep_checkpoints will remove these files, too" in done.stdout
    assert {path.name for path in folder.glob("posthoc*")} == {
        "posthoc_0.1_000020.pt",
        "posthoc_0.1_000030.pt",
    }
    succeed(run_script("ema_reconstruct", {"run": "."}, cwd=folder))


def test_shares_of_an_earlier_checkpoint_are_not_merged_over_a_later_one(run, run_script):
    folder, _ = run
    succeed(run_script("merge_checkpoint", {"checkpoint": "sharded000020"}, cwd=folder))
    later = files_of(value=5.0)
    checkpoint.write_checkpoint(str(folder), STEP, later)  # by a run that went back, unshared
    for path in (".", "sharded000020"):
        done = run_script("merge_checkpoint", {"checkpoint": path}, cwd=folder)
        assert "nothing to merge" in error_of(done)
    assert same(torch.load(folder / "model000020.pt"), later["model000020.pt"])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_watched(tmp_path, digits_dir, precision):
    flags = {**FLAGS, **CHECKS, **FSDP, "data_dir": digits_dir, "train_steps": 7}
    succeed(launch("torchrun", flags, cwd=tmp_path, precision=precision))
    assert 0 < last_of("val_ema_bpd", tmp_path / "run") < 50
    assert (tmp_path / "run" / "preview_000006.png").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"global_batch": 7}, "--global_batch 7: 2 processes cannot share it equally"),
        pytest.param(
            {"parallel": "fsdp", "shard_processes": 3},
            "--shard_processes 3: must be a divisor",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"parallel": "fsdp", "use_fp16": True},
            "use --precision fp16 or bf16",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_every_process_says_what_cannot_be_shared(tmp_path, digits_dir, flags, words):
    done = launch("mpiexec", {**FLAGS, "data_dir": digits_dir, **flags}, cwd=tmp_path)
    lines = [line for line in done.stderr.splitlines() if words in line]
    assert (done.returncode, len(lines)) == (2, 2), done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_killed_and_stopped_it_ends_as_if_it_had_not_been(tmp_path, digits_dir):
    flags = {
        **FLAGS,
        "data_dir": digits_dir,
        "parallel": "fsdp",
        "save_interval": 2,
        "dropout": 0.1,
    }
    words = [mpiexec(), "-n", "2", sys.executable, script_path("image_train")]
    random.seed(5)
    codes = []
    for sent in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, None):
        with subprocess.Popen(
            [*words, *command_line(flags)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=tmp_path,
            env=script_environment(),
            start_new_session=True,
        ) as process:
            for line in process.stdout:
                if sent and line.startswith("saving step"):
                    time.sleep(random.uniform(0, 0.5))  # somewhere in the save, or after it
                    kill = os.killpg if sent == signal.SIGKILL else os.kill
                    kill(process.pid, sent)
                    break
            process.stdout.read()
        codes.append(process.returncode)
    assert codes == [-signal.SIGKILL, 75, -signal.SIGKILL, 0]
    succeed(launch("mpiexec", flags, cwd=tmp_path, log_dir="undisturbed"))
    for run in ("run", "undisturbed"):
        succeed(merge(tmp_path, checkpoint=run))
    for name in ("model000012.pt", "ema_0.9_000012.pt", "opt000012.pt"):
        ours, theirs = (torch.load(tmp_path / run / name) for run in ("run", "undisturbed"))
        assert same(ours, theirs), name
