"""The scripts as processes, on small real images: checkpoints, samples, bits/dim."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
import torch
from golden_data import GOLDEN
from PIL import Image
from script_runner import (
    NUM_DIGITS,
    TINY,
    TINY_SUPER_RES,
    load_module,
    names,
    run_folder,
    samples,
    start_script,
    succeed,
)

from improved_diffusion.sample_util import grid

STEPS = ("000000", "000004")
CHECKPOINTS = [
    *(f"{kind}{step}.pt" for kind in ("ema_0.9_", "model", "opt", "state") for step in STEPS),
    *(f"checkpoint{step}.json" for step in STEPS),
]
LOGS = ["config.json", "log.txt", "progress.csv", "progress.json"]


def load(path):
    return torch.load(path, weights_only=True)


def read_csv(folder):
    with open(folder / "progress.csv", newline="") as file:
        return list(csv.DictReader(file))


def assert_same_images(a, b):
    """Equal but for truncation of what rounding moved across a level."""
    assert a.shape == b.shape
    assert np.abs(a.astype(int) - b.astype(int)).max() <= 1


def assert_other_images(a, b):
    assert a.shape == b.shape
    assert np.abs(a.astype(int) - b.astype(int)).max() > 20


# -- image_train


def test_first_line_is_the_absolute_run_folder(trained):
    for done in (trained.stopped, trained.continued, trained.again):
        assert run_folder(done) == trained.folder
    assert trained.folder.is_absolute()
    assert trained.stopped.stderr == ""


def test_training_test_stops_after_the_first_save_past_step_0(trained):
    assert trained.files_when_stopped == sorted(CHECKPOINTS + LOGS)
    assert trained.stopped.stdout.endswith(f"checkpoints are in {trained.folder}\n")


def test_same_command_continues(trained):
    said = trained.continued.stdout
    for thing, name in [
        ("model", "model"),
        ("EMA 0.9", "ema_0.9_"),
        ("optimiser", "opt"),
        ("counters and loss scale", "state"),
    ]:
        assert f"resume: {thing} restored from {trained.folder}/{name}000004.pt" in said
    assert "resume: data restored, goes on after 40 images" in said
    assert "cold" not in said
    last = [name.replace("000004", "000008") for name in CHECKPOINTS]
    assert names(trained.folder) == sorted({*CHECKPOINTS, *last, *LOGS})


def test_steps_are_logged_once_across_a_resume(trained):
    rows = read_csv(trained.folder)
    assert [int(row["step"]) for row in rows] == [0, 2, 4, 6]
    assert [int(row["samples"]) for row in rows] == [8, 24, 40, 56]
    for row in rows:
        assert 0 < float(row["loss"]) < 10
        assert float(row["loss"]) == float(row["mse"])
        assert float(row["grad_norm"]) > 0
        assert any(row.get(f"loss_q{quartile}") for quartile in range(4))
    with open(trained.folder / "progress.json") as file:
        lines = [json.loads(line) for line in file]
    assert [line["step"] for line in lines] == [0, 2, 4, 6]
    assert [line["loss"] for line in lines] == [float(row["loss"]) for row in rows]


def test_updates_are_counted_across_a_resume(trained):
    state = load(trained.folder / "opt000008.pt")["state"]
    assert {int(entry["step"]) for entry in state.values()} == {8}


def test_finished_run_has_nothing_to_do(trained):
    assert "nothing to do: 8 of 8 steps done" in trained.again.stdout
    assert trained.checkpoint_times() == trained.times


def test_what_is_printed_is_also_in_the_log(trained):
    log = (trained.folder / "log.txt").read_text()
    assert log == trained.stopped.stdout + trained.continued.stdout + trained.again.stdout


def test_start_says_what_is_trained_on_what(trained, digits_dir):
    said = trained.stopped.stdout
    parameters = sum(value.numel() for value in load(trained.path).values())
    assert f"{parameters:,} parameters in fp32, {NUM_DIGITS} images, 10 classes\n" in said
    assert "1 process x 1 microbatch x 8 = global batch of 8; 8 steps\n" in said
    assert "1 process on CPU, seed 0\n" in said


def test_flags_are_stored_beside_the_checkpoints(trained, digits_dir):
    flags = json.loads((trained.folder / "config.json").read_text())
    given = {**TINY, "attention_resolutions": "4", "ema_rate": "0.9", "data_dir": str(digits_dir)}
    assert {name: flags[name] for name in given} == given
    assert flags["log_dir"] == str(trained.folder)
    assert flags["num_res_blocks"] == 1
    assert flags["use_scale_shift_norm"] is True  # a default
    assert flags["num_classes"] == 10  # counted
    assert flags["class_names"] == list("0123456789")
    assert flags["began_from"] == flags["resume_checkpoint"] == ""


def test_checkpoints_hold_weights_averages_and_the_optimiser(trained):
    model, ema = (load(trained.folder / f"{name}000008.pt") for name in ("model", "ema_0.9_"))
    assert list(model) == list(ema)
    assert all(value.dtype == torch.float32 for value in model.values())
    assert model["label_emb.weight"].shape == (10, 128)
    assert not torch.equal(model["input_blocks.0.0.weight"], ema["input_blocks.0.0.weight"])
    optimiser = load(trained.folder / "opt000008.pt")
    assert len(optimiser["state"]) == len(model)


def test_a_seed_gives_the_same_weights_and_another_seed_others(
    tmp_path, run_script, digits_dir, trained
):
    """The first three checkpoints of the run in ``trained`` were written by another process."""

    def weights(seed, folder):
        flags = {"class_cond": True, "lr": 1e-2, "batch_size": 8, "lr_anneal_steps": 1}
        command = [TINY, flags, {"data_dir": digits_dir, "seed": seed, "log_dir": folder}]
        succeed(run_script("image_train", *command, cwd=tmp_path))
        return load(tmp_path / folder / "model000000.pt")["input_blocks.0.0.weight"]

    first = load(trained.folder / "model000000.pt")["input_blocks.0.0.weight"]
    assert torch.equal(weights(0, "same"), first)
    assert not torch.allclose(weights(1, "other"), first)


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory, digits_dir, run_script):
    """A run without classes whose checkpoints go to a folder of their own, in two sittings.

    The flags of the model come from the checkpoint the second time.
    """
    folder = tmp_path_factory.mktemp("blob").resolve()
    flags = {"data_dir": digits_dir, "log_dir": "logs", "ema_rate": 0.5, "batch_size": 4}
    env = {"DIFFUSION_BLOB_LOGDIR": str(folder / "blob")}
    said = [
        succeed(run_script("image_train", flags, more, cwd=folder, env=env)).stdout
        for more in ({**TINY, "lr_anneal_steps": 1}, {"lr_anneal_steps": 2})
    ]
    return folder, said


def test_checkpoints_and_their_flags_go_to_the_blob_folder(unconditional):
    folder, said = unconditional
    kinds = ["config.json", "ema_0.5_000000.pt", "model000000.pt", "opt000000.pt"]
    assert set(kinds) <= set(names(folder / "blob"))
    assert names(folder / "logs") == ["log.txt", "progress.csv", "progress.json"]
    assert f"resume: model restored from {folder}/blob/model000000.pt" in said[1]
    assert json.loads((folder / "blob" / "config.json").read_text())["lr_anneal_steps"] == 2


@pytest.fixture(scope="module")
def oblong(tmp_path_factory, run_script):
    """A run with most options: 8 x 12 RGB pictures, labels by folder, learned sigma, ..."""
    folder = tmp_path_factory.mktemp("oblong").resolve()
    flags = {
        **TINY,
        "data_dir": GOLDEN / "images",
        "log_dir": "run",
        "image_size": "8x12",
        "channels": 3,
        "attention_resolutions": 6,
        "class_cond": True,
        "labels_from": "folder",
        "learn_sigma": True,
        "schedule_sampler": "loss-second-moment",
        "batch_size": 4,
        "microbatch": 3,
        "num_workers": 2,
        "ema_rate": "0.5,0.9",
        "lr_anneal_steps": 2,
        "save_interval": 2,
    }
    succeed(run_script("image_train", flags, cwd=folder))
    return folder / "run"


def test_oblong_colour_pictures_with_labels_by_folder(oblong):
    flags = json.loads((oblong / "config.json").read_text())
    assert flags["class_names"] == ["images", "more"]
    assert flags["image_size"] == [8, 12]
    for name in ("ema_0.5_000002.pt", "ema_0.9_000002.pt", "model000002.pt", "opt000002.pt"):
        assert (oblong / name).exists()
    assert load(oblong / "model000002.pt")["out.2.bias"].shape == (6,)  # mean and variance
    assert "vb" in read_csv(oblong)[0]


def test_samples_have_the_size_and_channels_of_the_run(tmp_path, run_script, oblong):
    succeed(
        run_script(
            "image_sample", model_path=oblong / "ema_0.9_000002.pt", num_samples=4,
            classes="more,images", timestep_respacing=2, log_dir=".", save_png=True, cwd=tmp_path,
        )
    )  # fmt: skip
    images, labels = samples(tmp_path)
    assert images.shape == (4, 8, 12, 3)
    assert labels.tolist() == [1, 0, 1, 0]
    assert names(tmp_path / "png")[:2] == ["000000_more.png", "000001_images.png"]
    assert Image.open(tmp_path / "png" / "000000_more.png").size == (12, 8)


@pytest.fixture(scope="module")
def without_signal(tmp_path_factory, digits_dir, run_script):
    """A run that predicts v, whose last step has no signal, by betas from a file that is gone."""
    folder = tmp_path_factory.mktemp("without_signal").resolve()
    betas = np.linspace(0.01, 0.4, 30)
    np.save(folder / "betas.npy", betas)
    flags = {
        **TINY,
        "noise_schedule": "linear",
        "betas": "betas.npy",
        "predict": "v",
        "zero_terminal_snr": True,
        "loss_weight": "min_snr",
        "schedule_sampler": "stratified",
        "data_dir": digits_dir,
        "log_dir": "run",
        "batch_size": 8,
        "ema_rate": 0.5,
        "lr": 1e-3,
        "lr_anneal_steps": 30,
        "log_interval": 10,
        "sample_interval": 20,
        "val_fraction": 0.2,
        "val_interval": 20,
    }
    succeed(run_script("image_train", {**flags, "lr_anneal_steps": 20}, cwd=folder))
    (folder / "betas.npy").unlink()
    succeed(run_script("image_train", flags, cwd=folder))  # the run has the numbers
    return folder, betas


def test_v_trains_to_no_signal_with_previews_and_the_bound(without_signal):
    folder, betas = without_signal
    flags = json.loads((folder / "run" / "config.json").read_text())
    assert [float(beta) for beta in flags["betas"].split(",")] == betas.tolist()
    assert flags["predict"] == "v"
    log = read_csv(folder / "run")
    assert float(log[-1]["loss"]) < 0.8 * float(log[0]["loss"])
    for row in log:  # weights below 1, of v's factor
        assert float(row["loss"]) < float(row["mse"])
    assert np.isfinite(float(log[-1]["val_bpd"]))
    assert (folder / "run" / "preview_000020.png").exists()


def test_samplers_and_the_bound_survive_no_signal(without_signal, digits_dir, run_script):
    folder, _ = without_signal
    made = []
    for name, how in [("ddim", {"use_ddim": True, "eta": 1}), ("ddpm", {}), ("all", {})]:
        own = {"model_path": "run/ema_0.5_000030.pt", "num_samples": 3, "log_dir": name}
        respacing = {} if name == "all" else {"timestep_respacing": 5}
        succeed(run_script("image_sample", own, how, respacing, cwd=folder))
        made.append(samples(folder / name)[0])
        assert made[-1].std() > 10
    assert_other_images(made[0], made[1])
    own = {"model_path": "run/ema_0.5_000030.pt", "num_samples": 2, "log_dir": "nll"}
    done = succeed(run_script("image_nll", own, data_dir=digits_dir, cwd=folder))
    assert re.search(r"bpd=\d", done.stdout)


def test_flow_trains_and_samples_by_the_scripts(tmp_path, digits_dir, run_script):
    flags = {**TINY, "noise_schedule": "linear", "predict": "flow", "learn_sigma": True}
    flags |= {"data_dir": digits_dir, "log_dir": "run", "batch_size": 8, "ema_rate": 0.5}
    flags |= {"schedule_sampler": "logit_normal", "lr_anneal_steps": 30, "log_interval": 10}
    succeed(run_script("image_train", flags, lr=1e-3, cwd=tmp_path))
    log = read_csv(tmp_path / "run")
    assert float(log[-1]["mse"]) < 0.8 * float(log[0]["mse"])
    own = {"model_path": "run/ema_0.5_000030.pt", "num_samples": 2, "timestep_respacing": 5}
    succeed(run_script("image_sample", own, use_ddim=True, log_dir="out", cwd=tmp_path))
    images, _ = samples(tmp_path / "out")
    assert images.std() > 10
    given = {"noise_schedule": "linear_path", "predict": "flow"}
    succeed(run_script("image_sample", own, given, use_ddim=True, log_dir="same", cwd=tmp_path))
    assert_same_images(samples(tmp_path / "same")[0], images)


# -- image_sample


@pytest.fixture
def sample(run_script, trained, tmp_path):
    """Sample from the trained model into a folder by name; its images and labels."""

    def run(name, **flags):
        own = {"model_path": trained.path, "num_samples": 5, "timestep_respacing": 5}
        succeed(run_script("image_sample", {**own, "log_dir": name, **flags}, cwd=tmp_path))
        return samples(tmp_path / name)

    return run


@pytest.fixture(scope="module")
def alone(trained, run_script, tmp_path_factory):
    """image_sample.py with nothing but a checkpoint and how many."""
    cwd = tmp_path_factory.mktemp("alone").resolve()
    done = start_script("image_sample", model_path=trained.path, num_samples=5, cwd=cwd)
    return cwd, succeed(done)


def test_a_checkpoint_alone_is_enough(alone, trained):
    _, done = alone
    folder = run_folder(done)
    images, labels = samples(folder)
    assert (images.dtype, images.shape) == (np.uint8, (5, 8, 8, 1))
    assert images.std() > 20  # neither black nor grey
    assert labels.dtype == np.int64
    assert labels.shape == (5,)
    assert set(labels.tolist()) <= set(range(10))
    assert f"{trained.path}: weights averaged at rate 0.9; WARNING: 43% of them" in done.stdout
    assert done.stdout.endswith(f"sampling complete: {folder}/samples_5x8x8x1.npz\n")
    assert "5/5" in done.stderr  # the progress bar


def test_run_folder_is_made_below_runs_by_default(alone):
    cwd, done = alone
    folder = run_folder(done)
    assert names(cwd) == ["runs"]
    assert folder.parent == cwd / "runs"
    assert re.fullmatch(r"image_sample-\d{4}(-\d\d){5}-\d{6}", folder.name)
    files = ["grid.png", "image_sample.json", "log.txt", "samples_5x8x8x1.npz"]
    assert names(folder) == files


def test_flags_of_the_sampling_are_stored(alone, trained):
    _, done = alone
    flags = json.loads((run_folder(done) / "image_sample.json").read_text())
    assert flags["model_path"] == str(trained.path)
    assert flags["num_samples"] == 5
    assert flags["num_channels"] == 32  # the checkpoint's


def test_flags_by_hand_do_what_stored_ones_do(alone, trained, run_script, tmp_path):
    """A checkpoint without config.json, as the published ones are; the path is relative."""
    shutil.copy(trained.path, tmp_path / "weights.pt")
    by_hand = {**TINY, "class_cond": True, "num_classes": 10, "model_path": "weights.pt"}
    succeed(run_script("image_sample", by_hand, num_samples=5, log_dir="out", cwd=tmp_path))
    for ours, theirs in zip(samples(tmp_path / "out"), samples(run_folder(alone[1])), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_relative_checkpoint_is_found_with_its_flags(trained, run_script, tmp_path):
    """Also where the path names no folder: the flags lie in the working directory."""
    shutil.copy(trained.path, tmp_path / "weights.pt")
    shutil.copy(trained.folder / "config.json", tmp_path)
    flags = {"model_path": "weights.pt", "num_samples": 2, "timestep_respacing": 2}
    succeed(run_script("image_sample", flags, log_dir="out", cwd=tmp_path))
    assert samples(tmp_path / "out")[0].shape == (2, 8, 8, 1)


def test_a_seed_gives_the_same_samples_in_any_batch(sample):
    images, labels = sample("one")
    for name, flags in [("two", {}), ("three", {"batch_size": 2}), ("four", {"num_samples": 3})]:
        again, their_labels = sample(name, **flags)
        assert_same_images(images[: len(again)], again)
        assert labels[: len(again)].tolist() == their_labels.tolist()
    assert sample("five", seed=1)[1].tolist() != labels.tolist()
    one, other = (sample(f"seed{seed}", classes=1, seed=seed)[0] for seed in (0, 1))
    assert_other_images(one, other)


def test_samplers_differ(sample):
    made = [
        sample(str(i), classes=1, **flags)[0]
        for i, flags in enumerate(
            [{}, {"use_ddim": True}, {"use_ddim": True, "eta": 0.8}, {"clip_denoised": False}]
        )
    ]
    ddim_again = sample("again", classes=1, use_ddim="yes", eta=0, batch_size=1)[0]
    assert_same_images(made[1], ddim_again)
    for i, images in enumerate(made):
        for other in made[:i]:
            assert_other_images(images, other)


def test_number_of_ddim_steps_changes_the_image(sample):
    flags = {"use_ddim": True, "classes": 1}
    ddim10, ddim15 = (sample(n, timestep_respacing=n, **flags)[0] for n in ("ddim10", "ddim15"))
    assert_other_images(ddim10, ddim15)


def test_classes_are_made_in_turn_with_pictures(sample, tmp_path):
    images, labels = sample("out", classes="3,7", save_png=True)
    assert labels.tolist() == [3, 7, 3, 7, 3]
    pictures = [f"00000{i}_{label}.png" for i, label in enumerate(labels)]
    assert names(tmp_path / "out" / "png") == pictures
    for name, image in zip(pictures, images, strict=True):
        picture = Image.open(tmp_path / "out" / "png" / name)
        assert picture.mode == "L"
        np.testing.assert_array_equal(np.array(picture), image[..., 0])
    shown = np.array(Image.open(tmp_path / "out" / "grid.png"))
    np.testing.assert_array_equal(shown, grid(images, columns=2)[..., 0])


def test_all_classes_are_made_in_turn(sample, tmp_path):
    images, labels = sample("out", classes="all", num_samples=12)
    assert labels.tolist() == [*range(10), 0, 1]
    shown = np.array(Image.open(tmp_path / "out" / "grid.png"))
    np.testing.assert_array_equal(shown, grid(images, columns=10)[..., 0])


def test_the_class_changes_the_image(sample, trained):
    """The noise of a sample is that of its index; only the class is another."""
    path = trained.folder / "model000008.pt"
    one, two = (sample(str(label), classes=label, model_path=path)[0] for label in (1, 2))
    assert_other_images(one, two)


def test_samples_of_an_unconditional_model_have_no_labels(unconditional, run_script, tmp_path):
    flags = {"num_samples": 2, "timestep_respacing": 2, "log_dir": "out", "save_png": True}
    path = unconditional[0] / "blob" / "ema_0.5_000000.pt"
    succeed(run_script("image_sample", flags, model_path=path, cwd=tmp_path))
    images, labels = samples(tmp_path / "out")
    assert labels is None
    assert images.shape == (2, 8, 8, 1)
    assert names(tmp_path / "out" / "png") == ["000000.png", "000001.png"]


def test_sampling_into_a_training_run_leaves_its_flags_alone(trained, run_script, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for path in (trained.path, trained.folder / "config.json"):
        shutil.copy(path, run)
    before = (run / "config.json").read_bytes()
    flags = {"num_samples": 2, "timestep_respacing": 2, "log_dir": run}
    succeed(run_script("image_sample", flags, model_path=run / trained.path.name, cwd=tmp_path))
    assert (run / "config.json").read_bytes() == before
    assert {"image_sample.json", "samples_2x8x8x1.npz"} <= set(names(run))


def test_log_dir_comes_before_the_variable_and_the_variable_before_the_default(
    trained, run_script, tmp_path
):
    env = {"OPENAI_LOGDIR": str(tmp_path / "variable")}
    flags = {"model_path": trained.path, "num_samples": 1, "timestep_respacing": 1}
    by_variable = succeed(run_script("image_sample", flags, cwd=tmp_path, env=env))
    assert run_folder(by_variable) == tmp_path / "variable"
    by_flag = succeed(run_script("image_sample", flags, log_dir="a/b", cwd=tmp_path, env=env))
    assert run_folder(by_flag) == tmp_path / "a" / "b"
    assert names(tmp_path) == ["a", "variable"]
    for folder in ("a/b", "variable"):
        assert samples(tmp_path / folder)[0].shape == (1, 8, 8, 1)


# -- image_nll


@pytest.fixture
def evaluate(run_script, trained, digits_dir, tmp_path):
    """Bits/dim of the trained model, its standard error, and the process."""

    def run(**flags):
        own = {"model_path": trained.path, "data_dir": digits_dir, "timestep_respacing": 3}
        done = succeed(run_script("image_nll", {**own, "log_dir": "out", **flags}, cwd=tmp_path))
        found = re.search(r"bpd=(\S+) \+- (\S+)", done.stdout)
        return float(found[1]), float(found[2]), done

    return run


def test_evaluation_stops_at_the_end_of_the_data_and_says_so(evaluate, tmp_path):
    bpd, error, done = evaluate(num_samples=100, batch_size=16)
    assert f"done {NUM_DIGITS} of {NUM_DIGITS} images" in done.stdout
    assert "the data ended before --num_samples 100" in done.stdout
    assert "60/60" in done.stderr
    assert 1 < bpd < 20
    assert 0 < error < 1
    assert (tmp_path / "out" / "image_nll.json").exists()
    terms = {}
    for name in ("vb", "mse", "xstart_mse"):
        with np.load(tmp_path / "out" / f"{name}_terms.npz", allow_pickle=False) as arrays:
            (terms[name],) = arrays.values()
            assert arrays.files == ["arr_0"]
        assert terms[name].shape == (3,)
        assert np.isfinite(terms[name]).all()
    prior = bpd - terms["vb"].sum()
    assert -1e-4 < prior < 0.01  # cosine: hardly anything of the image is left
    assert terms["xstart_mse"][0] > terms["xstart_mse"][-1]  # the last timestep comes first


def test_evaluation_of_a_part_does_not_depend_on_the_batch(evaluate):
    bpd, error, done = evaluate(num_samples=5, batch_size=2)
    assert f"done 5 of {NUM_DIGITS} images" in done.stdout
    assert "ended before" not in done.stdout
    again, error_again, _ = evaluate(num_samples=5, batch_size=5, num_workers=0, log_dir="again")
    assert again == pytest.approx(bpd, rel=1e-4)
    assert error_again == pytest.approx(error, rel=0.05)
    assert evaluate(num_samples=5, batch_size=5, seed=1, log_dir="seed")[0] != again
    assert evaluate(num_samples=6, batch_size=5, log_dir="more")[0] != again
    assert evaluate(num_samples=5, batch_size=5, clip_denoised=False, log_dir="wide")[0] != again


# -- super-resolution


@pytest.fixture(scope="module")
def upsampler(tmp_path_factory, digits_dir, run_script):
    """A class-conditional run of super_res_train.py from 4 x 4 to 8 x 8, by $OPENAI_LOGDIR."""
    folder = tmp_path_factory.mktemp("upsampler").resolve()
    flags = {
        **TINY_SUPER_RES,
        "data_dir": digits_dir,
        "class_cond": True,
        "lr": 1e-2,
        "batch_size": 8,
        "ema_rate": 0.5,
        "lr_anneal_steps": 4,
        "save_interval": 4,
        "log_interval": 2,
    }
    env = {"OPENAI_LOGDIR": str(folder / "run")}
    done = succeed(run_script("super_res_train", flags, cwd=folder, env=env))
    again = succeed(run_script("super_res_train", flags, cwd=folder, env=env))
    return folder / "run", done, again


@pytest.fixture
def upsample(run_script, upsampler, tmp_path):
    """Run super_res_sample.py into a folder by name; its images and labels."""

    def run(name, base, **flags):
        own = {"model_path": upsampler[0] / "ema_0.5_000004.pt", "timestep_respacing": 3}
        command = {**own, "log_dir": name, "base_samples": base, **flags}
        done = succeed(run_script("super_res_sample", command, cwd=tmp_path))
        assert run_folder(done) == tmp_path / name
        return samples(tmp_path / name)

    return run


@pytest.fixture(scope="module")
def small_digits(digits_dir, tmp_path_factory):
    """An npz file as image_sample.py writes: three real digits at 4 x 4."""
    files = sorted(digits_dir.iterdir())[::20]
    pixels = np.stack([np.array(Image.open(file).reduce(2))[..., None] for file in files])
    labels = np.array([int(file.name[0]) for file in files])
    path = tmp_path_factory.mktemp("small") / "samples_3x4x4x1.npz"
    np.savez(path, pixels, labels)
    return path, pixels, labels


def test_super_resolution_is_trained_and_continued(upsampler):
    folder, done, again = upsampler
    assert run_folder(done) == run_folder(again) == folder
    assert [int(row["step"]) for row in read_csv(folder)] == [0, 2]
    flags = json.loads((folder / "config.json").read_text())
    assert (flags["large_size"], flags["small_size"]) == (8, 4)
    assert load(folder / "model000004.pt")["input_blocks.0.0.weight"].shape == (32, 2, 3, 3)
    assert "nothing to do: 4 of 4 steps done" in again.stdout


def test_small_images_are_averages_of_the_large(digits_dir):
    script = load_module("scripts", "super_res_train")
    large, y = torch.rand(3, 1, 8, 12), torch.arange(3)
    given = {"y": y}
    same, cond = script.add_low_res((large, given), (4, 6))
    assert torch.equal(same, large)
    assert given.keys() == {"y"}  # a batch that is used again stays as it is
    assert set(cond) == {"y", "low_res"}
    expected = large.reshape(3, 1, 4, 2, 6, 2).mean(dim=(3, 5))
    torch.testing.assert_close(cond["low_res"], expected)


def test_samples_of_an_npz_are_upsampled_in_turn(upsample, small_digits):
    path, _, labels = small_digits
    images, their_labels = upsample("out", path, num_samples=5)
    assert (images.dtype, images.shape) == (np.uint8, (5, 8, 8, 1))
    assert their_labels.tolist() == [*labels, *labels[:2]]
    assert_other_images(images[:2], images[3:])  # the same digits, another noise


def test_super_resolution_honours_use_ddim(upsample, small_digits):
    path, _, _ = small_digits
    ddpm, again = (upsample(name, path, num_samples=3)[0] for name in ("ddpm", "again"))
    ddim = upsample("ddim", path, num_samples=3, use_ddim=True)[0]
    noisy = upsample("eta", path, num_samples=3, use_ddim=True, eta=1)[0]
    one_by_one = upsample("one", path, num_samples=3, use_ddim=True, batch_size=1)[0]
    assert_same_images(ddpm, again)
    assert_other_images(ddpm, ddim)
    assert_other_images(noisy, ddim)
    assert_same_images(one_by_one, ddim)


def test_super_resolution_depends_on_the_small_image(upsample, small_digits, tmp_path):
    _, pixels, labels = small_digits
    for name, content in [("as-it-is", pixels), ("inverted", 255 - pixels)]:
        np.savez(tmp_path / f"{name}.npz", content, labels)
    one, two = (
        upsample(name, tmp_path / f"{name}.npz", num_samples=3)[0]
        for name in ("as-it-is", "inverted")
    )
    assert_other_images(one, two)


def test_a_folder_is_upsampled_one_sample_each(upsample, digits_dir, tmp_path):
    for name in ("3_0003.png", "1_0001.png"):
        (tmp_path / "base").mkdir(exist_ok=True)
        shutil.copy(digits_dir / name, tmp_path / "base")
    images, labels = upsample("out", "base", save_png=True)
    assert images.shape == (2, 8, 8, 1)
    assert labels.tolist() == [1, 3]
    assert names(tmp_path / "out" / "png") == ["000000_1.png", "000001_3.png"]
    images, labels = upsample("other", "base", classes="5")
    assert labels.tolist() == [5, 5]
    assert upsample("more", "base", num_samples=3)[1].tolist() == [1, 3, 1]


def test_a_picture_is_upsampled(upsample, digits_dir):
    images, labels = upsample("out", digits_dir / "3_0003.png", classes="3")
    assert images.shape == (1, 8, 8, 1)
    assert labels.tolist() == [3]
    images, labels = upsample("more", digits_dir / "3_0003.png", classes="3,4", num_samples=3)
    assert labels.tolist() == [3, 4, 3]
