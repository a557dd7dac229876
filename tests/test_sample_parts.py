"""A sampling job that is cut off at any moment goes on where it stopped."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import launchers
import numpy as np
import pytest
import torch
from script_runner import (
    TINY,
    TINY_SUPER_RES,
    command_line,
    error_of,
    names,
    samples,
    script_environment,
    script_path,
    succeed,
    tree,
)

from improved_diffusion import dist_util
from improved_diffusion.errors import UserError
from improved_diffusion.same_job import deciding_flags, fingerprint
from improved_diffusion.sample_parts import SampleParts
from improved_diffusion.sample_util import collect_samples

FLAGS = {"seed": 0, "sampler": "ddim", "image_size": (8, 12), "classes": ""}


def rows(start, stop):
    """Images and labels that tell their index."""
    numbers = np.arange(start, stop)
    return numbers.astype(np.uint8).reshape(-1, 1, 1, 1).repeat(2, 1).repeat(3, 2), 10 * numbers


def read(parts, num_samples=100):
    return [
        (start, images[:, 0, 0, 0].tolist(), None if labels is None else labels.tolist())
        for start, images, labels in parts.read(num_samples)
    ]


# -- what decides the images


def test_fingerprint_tells_values_types_and_shapes():
    x = torch.arange(6.0)
    others = [x + 1, x.double(), x.view(2, 3), x[:5], x.flip(0), -x]
    prints = {fingerprint([tensor]) for tensor in [x, *others]}
    assert len(prints) == 7
    assert fingerprint([x.clone()]) == fingerprint([x])
    assert fingerprint([x.view(2, 3).T.contiguous().T]) == fingerprint([x.view(2, 3)])
    assert fingerprint([x[:3], x[3:]]) != fingerprint([x])
    assert len(fingerprint([torch.tensor(1.0), torch.ones(2, dtype=torch.bfloat16)])) == 64


def test_what_leaves_the_images_alone_does_not_decide():
    neutral = {"num_samples": 5, "batch_size": 2, "log_dir": "x", "save_png": True, "dropout": 0.1}
    flags = {**FLAGS, **neutral, "model_path": "a.pt"}
    deciding = deciding_flags(flags, model_path=[torch.ones(2)])
    files = {"path": "a.pt", "sha256": fingerprint([torch.ones(2)])}
    assert deciding == {**FLAGS, "model_path": files}


# -- parts


def test_parts_come_back_as_they_were(tmp_path):
    run = str(tmp_path / "run")
    parts = SampleParts(run, FLAGS)
    assert read(parts) == []
    assert not (tmp_path / "run").exists()
    parts.write(4, *rows(4, 6))
    parts.write(0, *rows(0, 3))
    assert names(tmp_path / "run" / "partial") == [
        "000000-000003.npz",
        "000004-000006.npz",
        "flags.json",
    ]
    again = SampleParts(run, FLAGS)
    assert read(again) == [(0, [0, 1, 2], [0, 10, 20]), (4, [4, 5], [40, 50])]
    assert read(again, 5) == [(0, [0, 1, 2], [0, 10, 20]), (4, [4], [40])]
    assert read(again, 4) == [(0, [0, 1, 2], [0, 10, 20])]
    again.remove()
    assert names(tmp_path / "run") == []


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_parts_keep_the_type_and_may_lack_labels(tmp_path, dtype):
    images = np.random.randn(3, 2, 4, 5).astype(dtype)
    parts = SampleParts(str(tmp_path), FLAGS)
    parts.write(7, images, None)
    ((start, back, labels),) = parts.read(100)
    assert (start, labels, back.dtype) == (7, None, dtype)
    np.testing.assert_array_equal(back, images)


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    data = bytearray(path.read_bytes())
    place = data.index(bytes([4] * 6))  # the first image of the part
    data[place] ^= 1
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


def shorten(path):
    images, labels = rows(4, 5)
    np.savez(path, images=images, labels=labels)


def drop_labels(path):
    np.savez(path, images=rows(4, 6)[0], labels=rows(4, 5)[1])


def pickle(path):
    np.savez(path, images=np.array([None, None]), labels=np.arange(2))


@pytest.mark.parametrize("damage", [halve, flip, empty, shorten, drop_labels, pickle])
def test_damaged_part_is_passed_over_and_said(tmp_path, caplog, damage):
    parts = SampleParts(str(tmp_path), FLAGS)
    for start in (0, 4, 8):
        parts.write(start, *rows(start, start + 2))
    damage(tmp_path / "partial" / "000004-000006.npz")
    assert [start for start, *_ in read(parts)] == [0, 8]
    assert "000004-000006.npz is damaged: its samples are made again" in caplog.text


def test_what_is_no_part_is_left_alone(tmp_path):
    parts = SampleParts(str(tmp_path), FLAGS)
    parts.write(0, *rows(0, 2))
    for name in ("notes.txt", "000004-000006.npz.tmp", "x000002-000004.npz"):
        (tmp_path / "partial" / name).write_text("")
    assert [start for start, *_ in read(parts)] == [0]
    parts.remove()
    assert names(tmp_path / "partial") == ["notes.txt", "x000002-000004.npz"]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"seed": 1}, "made with --seed 0, not --seed 1:"),
        ({"image_size": 8}, "made with --image_size 8x12, not --image_size 8:"),
        ({"classes": "3,7"}, "made with --classes '', not --classes 3,7:"),
        (
            {"sampler": "heun", "seed": 2},
            "made with --seed 0 --sampler ddim, not --seed 2 --sampler heun:",
        ),
        ({"new": 3}, "made with no --new, not --new 3:"),
        ({"new": "0.1," * 999}, f"made with no --new, not --new {'0.1,' * 25}...:"),
    ],
)
def test_parts_made_with_other_flags_are_refused_and_kept(tmp_path, other, said):
    SampleParts(str(tmp_path), FLAGS).write(0, *rows(0, 2))
    before = tree(tmp_path)
    with pytest.raises(UserError) as error:
        SampleParts(str(tmp_path), {**FLAGS, **other})
    line = str(error.value)
    assert said in line
    assert f"finish it with the same flags, delete {tmp_path}/partial, or name another" in line
    assert "\n" not in line
    assert tree(tmp_path) == before


def test_files_are_known_by_what_they_hold(tmp_path):
    def parts(path, value):
        flags = {**FLAGS, "model_path": path}
        return SampleParts(str(tmp_path), deciding_flags(flags, model_path=[torch.tensor(value)]))

    parts("a.pt", 1.0).write(0, *rows(0, 2))
    assert read(parts("moved/a.pt", 1.0)) == [(0, [0, 1], [0, 10])]
    with pytest.raises(UserError, match=r"--model_path a.pt \(sha256 .*--model_path a.pt \(sha256"):
        parts("a.pt", 2.0)


@pytest.mark.parametrize("content", [None, "", "[1]", '{"seed": 0'])
def test_parts_without_their_flags_are_refused(tmp_path, content):
    SampleParts(str(tmp_path), FLAGS).write(0, *rows(0, 2))
    path = tmp_path / "partial" / "flags.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UserError, match=r"flags.json' is missing or damaged.*delete "):
        SampleParts(str(tmp_path), FLAGS)


def test_flags_that_were_left_without_parts_do_not_matter(tmp_path):
    """As after a kill before the first part, or while the last one was removed."""
    SampleParts(str(tmp_path), {"seed": 1}).write(0, *rows(0, 2))
    (tmp_path / "partial" / "000000-000002.npz").unlink()
    SampleParts(str(tmp_path), FLAGS).write(0, *rows(0, 2))
    assert read(SampleParts(str(tmp_path), FLAGS)) == [(0, [0, 1], [0, 10])]
    with pytest.raises(UserError, match="--seed"):
        SampleParts(str(tmp_path), {"seed": 1})


# -- collecting


def make_rows(calls):
    def make(indices):
        calls.append(indices)
        images, _ = rows(0, 256)
        return torch.from_numpy(images[indices]), 10 * torch.tensor(indices)

    return make


@pytest.mark.parametrize("batch_size", [1, 2, 3, 20])
@pytest.mark.parametrize(
    ("there", "missing"),
    [
        ([(0, 3)], [(3, 10)]),
        ([(0, 2), (4, 5), (7, 10)], [(2, 4), (5, 7)]),
        ([(3, 10)], [(0, 3)]),
        ([(0, 4), (2, 12)], []),
        ([], [(0, 10)]),
    ],
)
def test_only_what_is_missing_is_made(tmp_path, there, missing, batch_size, caplog):
    caplog.set_level("INFO", "improved_diffusion")
    parts = SampleParts(str(tmp_path), FLAGS)
    for start, stop in there:
        parts.write(start, *rows(start, stop))
    calls = []
    images, labels = collect_samples(make_rows(calls), 10, batch_size, parts=parts)
    assert sum(calls, []) == [i for start, stop in missing for i in range(start, stop)]  # noqa: RUF017
    assert all(len(call) <= batch_size for call in calls)
    np.testing.assert_array_equal(images, rows(0, 10)[0])
    assert labels.tolist() == list(range(0, 100, 10))
    count = 10 - sum(stop - start for start, stop in missing)
    assert (f"going on: {count} of 10 samples are in {tmp_path}/partial" in caplog.text) == (
        count > 0
    )
    again = []
    collect_samples(make_rows(again), 10, batch_size, parts=SampleParts(str(tmp_path), FLAGS))
    assert again == []  # every round has been kept


def test_progress_counts_what_is_there(tmp_path, capsys):
    parts = SampleParts(str(tmp_path), FLAGS)
    parts.write(0, *rows(0, 4))
    collect_samples(make_rows([]), 6, 1, parts=parts)
    assert "4/6" in capsys.readouterr().err


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_what_is_missing(tmp_path, monkeypatch, world_size):
    """The first is told what is there by its own files; the others by the first."""
    told = []

    def gather(part, gathered=None):
        step = len(part) * (10 if part.ndim == 1 else 1)
        for rank, place in enumerate(gathered or []):
            place.copy_(part + step * rank)

    def broadcast(value):
        if dist_util.get_rank() == 0:
            told.append(value)
            return value
        return told[-1]

    parts = SampleParts(str(tmp_path), FLAGS)
    parts.write(2, *rows(2, 4))
    monkeypatch.setattr(dist_util, "get_world_size", lambda: world_size)
    monkeypatch.setattr(dist_util, "broadcast_object", broadcast)
    monkeypatch.setattr(torch.distributed, "gather", gather)
    calls = {}
    for rank in range(world_size):
        monkeypatch.setattr(dist_util, "get_rank", lambda rank=rank: rank)
        calls[rank] = []
        result = collect_samples(make_rows(calls[rank]), 9, 2, parts=parts)
        if rank == 0:
            images, labels = result
    assert images[:, 0, 0, 0].tolist() == list(range(9))
    assert labels.tolist() == list(range(0, 90, 10))
    assert len({len(made) for made in calls.values()}) == 1
    made = {i for rank in calls for call in calls[rank] for i in call}
    assert {0, 1, 4, 5, 6, 7, 8} <= made
    assert {i for _, images, _ in read(parts) for i in images} == set(range(9))


# -- image_sample.py ------------------------------------------------------------------------------

JOB = {"num_samples": 7, "batch_size": 2, "timestep_respacing": 3, "log_dir": "out"}
PARTS = ["000000-000002.npz", "000002-000004.npz", "000004-000006.npz", "000006-000007.npz"]


@pytest.fixture(scope="module")
def whole(trained, run_script, tmp_path_factory):
    """Images and labels of a job that nothing cut off, and its folder."""
    cwd = tmp_path_factory.mktemp("whole")
    flags = {**JOB, "model_path": trained.path}
    succeed(run_script("image_sample", flags, cwd=cwd, save_png=True))
    return cwd / "out"


def assert_same_job(folder, reference):
    """The same files as the undisturbed job, no parts, and the same images up to rounding."""
    assert names(folder) == names(reference)
    assert "partial" not in names(folder)
    (images, labels), (their_images, their_labels) = samples(folder), samples(reference)
    assert np.abs(images.astype(int) - their_images.astype(int)).max() <= 1
    np.testing.assert_array_equal(labels, their_labels)


def killed(done):
    assert done.returncode == -signal.SIGKILL, (done.stdout, done.stderr)


def test_a_job_leaves_no_parts(whole):
    files = ["grid.png", "image_sample.json", "log.txt", "png", "samples_7x8x8x1.npz"]
    assert names(whole) == files


def test_killed_again_and_again_it_goes_on(tmp_path, trained, run_script, whole):
    """At every kind of moment: in a write, at its end, while making, at the very end."""
    flags = {**JOB, "model_path": trained.path, "save_png": True}
    moments = [
        ("make 1", 0),
        ("half flags.json", 0),
        ("before 000000-000002.npz", 0),
        ("half 000000-000002.npz", 0),
        ("after 000000-000002.npz", 0),
        ("make 2", 2),
        ("half 000004-000006.npz", 2),
        ("after 000004-000006.npz", 4),
        ("after 000006-000007.npz", 6),
        ("half samples_7x8x8x1.npz", 7),
        ("before grid.png", 7),
        ("unlink 000002-000004.npz", 7),
    ]
    for fault, there in moments:
        done = run_script("faulty_sample", flags, cwd=tmp_path, env={"FAULT": fault})
        killed(done)
        said = f"going on: {there} of 7 samples are in {tmp_path}/out/partial"
        assert (said in done.stdout) == (there > 0), (fault, done.stdout)
        assert "damaged" not in done.stdout
    done = succeed(run_script("image_sample", flags, cwd=tmp_path))
    assert f"going on: 5 of 7 samples are in {tmp_path}/out/partial" in done.stdout
    assert "5/7" in done.stderr
    assert_same_job(tmp_path / "out", whole)


@pytest.fixture
def cut_off(tmp_path, trained, run_script):
    """A folder with a job of which four of seven samples are there."""
    flags = {**JOB, "model_path": trained.path}
    killed(run_script("faulty_sample", flags, cwd=tmp_path, env={"FAULT": f"after {PARTS[1]}"}))
    assert names(tmp_path / "out" / "partial") == [*PARTS[:2], "flags.json"]
    return tmp_path


def go_on(run_script, trained, cwd, **flags):
    """Give the command again, with some other flags."""
    return run_script("image_sample", {**JOB, "model_path": trained.path, **flags}, cwd=cwd)


@pytest.mark.parametrize(
    ("flags", "there"),
    [({"batch_size": 5}, 4), ({"batch_size": 1, "save_png": True}, 4), ({"dropout": 0.3}, 4)],
)
def test_it_goes_on_with_another_batch_size(cut_off, trained, run_script, whole, flags, there):
    done = succeed(go_on(run_script, trained, cut_off, **flags))
    assert f"going on: {there} of 7 samples" in done.stdout
    if flags.get("save_png"):
        assert len(names(cut_off / "out" / "png")) == 7
        shutil.rmtree(cut_off / "out" / "png")
    (cut_off / "out" / "png").mkdir()
    assert_same_job(cut_off / "out", whole)


@pytest.mark.parametrize("num_samples", [3, 9])
def test_it_goes_on_to_another_number(cut_off, trained, run_script, whole, num_samples):
    done = succeed(go_on(run_script, trained, cut_off, num_samples=num_samples))
    assert f"going on: {min(4, num_samples)} of {num_samples} samples" in done.stdout
    images, labels = samples(cut_off / "out")
    reference, their_labels = samples(whole)
    count = min(7, num_samples)
    assert len(images) == len(labels) == num_samples
    assert np.abs(images[:count].astype(int) - reference[:count].astype(int)).max() <= 1
    assert labels[:count].tolist() == their_labels[:count].tolist()
    assert "partial" not in names(cut_off / "out")


def test_a_copy_of_the_checkpoint_and_other_words_for_a_sampler_go_on(
    cut_off, trained, run_script, whole
):
    shutil.copytree(trained.folder, cut_off / "copy")
    path = cut_off / "copy" / trained.path.name
    done = succeed(go_on(run_script, trained, cut_off, model_path=path, sampler="ddpm"))
    assert "going on: 4 of 7" in done.stdout


def test_a_damaged_part_is_made_again(cut_off, trained, run_script, whole):
    halve(cut_off / "out" / "partial" / PARTS[0])
    done = succeed(go_on(run_script, trained, cut_off, save_png=True))
    assert f"out/partial/{PARTS[0]} is damaged: its samples are made again" in done.stdout
    assert "going on: 2 of 7" in done.stdout
    assert_same_job(cut_off / "out", whole)


def test_parts_are_what_was_made_and_not_made_again(cut_off, trained, run_script, whole):
    """What lies in a part goes into the result as it is."""
    path = cut_off / "out" / "partial" / PARTS[0]
    with np.load(path) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    np.savez(path, images=255 - images, labels=labels)
    succeed(go_on(run_script, trained, cut_off))
    made, reference = samples(cut_off / "out")[0], samples(whole)[0]
    np.testing.assert_array_equal(made[:2], 255 - images)
    assert np.abs(made[2:].astype(int) - reference[2:].astype(int)).max() <= 1


def test_other_flags_are_refused_in_one_line_and_nothing_is_lost(cut_off, trained, run_script):
    before = tree(cut_off)
    for flags, words in [
        ({"seed": 3}, ["--seed 0", "--seed 3"]),
        ({"timestep_respacing": 4}, ["--timestep_respacing 3", "--timestep_respacing 4"]),
        ({"use_ddim": True}, ["--sampler ddpm", "--sampler ddim"]),
        ({"classes": "3"}, ["--classes ''", "--classes 3"]),
        ({"clip_denoised": False}, ["--clip_denoised True", "--clip_denoised False"]),
        ({"sigma_small": True}, ["--sigma_small False", "--sigma_small True"]),
        (
            {"model_path": trained.folder / "model000008.pt"},
            [f"--model_path {trained.path} (", f"--model_path {trained.folder}/model000008.pt ("],
        ),
    ]:
        line = error_of(go_on(run_script, trained, cut_off, **flags))
        for word in [*words, f"delete {cut_off}/out/partial", "another --log_dir"]:
            assert word in line, line
        assert tree(cut_off) == before
    succeed(go_on(run_script, trained, cut_off))


def test_super_resolution_goes_on_from_the_same_images_alone(tmp_path, digits_dir, run_script):
    training = {**TINY_SUPER_RES, "data_dir": digits_dir, "batch_size": 4, "lr_anneal_steps": 1}
    succeed(run_script("super_res_train", training, cwd=tmp_path, log_dir="run", ema_rate=0.5))
    pixels = np.random.randint(0, 256, (3, 4, 4, 1), dtype=np.uint8)
    np.savez(tmp_path / "base.npz", pixels)
    flags = {**JOB, "model_path": "run/model000000.pt", "base_samples": "base.npz"}
    succeed(run_script("super_res_sample", flags, cwd=tmp_path, log_dir="whole"))
    own = {"FAULT": f"after {PARTS[2]}", "SCRIPT": "super_res_sample"}
    killed(run_script("faulty_sample", flags, cwd=tmp_path, env=own))

    np.savez(tmp_path / "base.npz", 255 - pixels)
    before = tree(tmp_path)
    line = error_of(run_script("super_res_sample", flags, cwd=tmp_path))
    assert line.count("--base_samples base.npz (sha256 ") == 2
    assert tree(tmp_path) == before

    np.savez(tmp_path / "moved.npz", pixels)
    flags["base_samples"] = "moved.npz"
    done = succeed(run_script("super_res_sample", flags, cwd=tmp_path))
    assert "going on: 6 of 7 samples" in done.stdout
    assert_same_job(tmp_path / "out", tmp_path / "whole")


# -- several processes ----------------------------------------------------------------------------


def launch(launcher, name, flags, cwd, **env):
    words = command_line(flags)
    return launchers.start(
        launcher, script_path(name), *words, cwd=cwd, env=script_environment(env)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "there"),
    [("make 6 1", 4), ("half 000004-000007.npz 0", 4), ("after 000000-000004.npz 0", 4)],
)
@pytest.mark.parametrize("then", ["torchrun", "single"])
def test_one_of_two_processes_killed(tmp_path, trained, whole, fault, there, then):
    flags = {**JOB, "model_path": trained.path, "save_png": True}
    done = launch("torchrun", "faulty_sample", flags, tmp_path, FAULT=fault)
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr
    done = succeed(launch(then, "image_sample", flags, tmp_path))
    assert f"going on: {there} of 7 samples" in done.stdout
    (tmp_path / "out" / "log-rank001.txt").unlink(missing_ok=True)
    assert_same_job(tmp_path / "out", whole)


@pytest.mark.slow
def test_two_processes_go_on_from_one_and_refuse_other_flags(cut_off, trained, whole):
    flags = {**JOB, "model_path": trained.path, "save_png": True}
    done = launch("torchrun", "image_sample", {**flags, "seed": 1}, cut_off)
    assert done.stderr.count("made with --seed 0, not --seed 1: finish it") == 2
    assert "Traceback" not in done.stderr.split("error: ")[0]
    done = succeed(launch("torchrun", "image_sample", flags, cut_off))
    assert "going on: 4 of 7 samples" in done.stdout
    (cut_off / "out" / "log-rank001.txt").unlink(missing_ok=True)
    assert_same_job(cut_off / "out", whole)


@pytest.mark.slow
def test_killed_from_outside_at_any_moment(tmp_path, trained, run_script):
    flags = {"model_path": trained.path, "num_samples": 60, "batch_size": 1, "log_dir": "out"}
    flags |= {"timestep_respacing": 5}
    succeed(run_script("image_sample", {**flags, "batch_size": 16}, cwd=tmp_path, log_dir="whole"))
    words = [sys.executable, script_path("image_sample"), *command_line(flags)]
    for goal in (1, 9, 25):
        process = subprocess.Popen(
            words, cwd=tmp_path, env=script_environment(), stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        end = time.monotonic() + 60
        while len(list((tmp_path / "out").glob("partial/*.npz"))) < goal:
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    stored = json.loads((tmp_path / "out" / "partial" / "flags.json").read_text())
    assert stored["image_size"] == TINY["image_size"]
    done = succeed(run_script("image_sample", {**flags, "batch_size": 16}, cwd=tmp_path))
    assert "damaged" not in done.stdout
    assert_same_job(tmp_path / "out", tmp_path / "whole")
