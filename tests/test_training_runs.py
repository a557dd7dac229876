"""From the flags of a training to its data, its checks and the checkpoint it goes on from."""

import logging
import os
import shutil

import pytest
import torch

from improved_diffusion import (
    checkpoint,
    dist_util,
    runs,
    stored_flags,
    training_data,
    training_runs,
)
from improved_diffusion.errors import UserError
from improved_diffusion.flags import make_parser
from improved_diffusion.safetensors_format import write_safetensors
from improved_diffusion.script_util import ModelAndDiffusionOptions


def make_flags(**changes):
    parser = make_parser(
        "", *training_runs.TRAINING_OPTIONS, ModelAndDiffusionOptions, runs.RunOptions
    )
    return {**vars(parser.parse_args([])), **changes}


@pytest.fixture
def run_dir(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def prepare(run_dir, monkeypatch, digits_dir):
    """Prepare a training in a folder by some flags; all flags and the data."""
    monkeypatch.setattr(training_runs, "set_up", lambda flags: str(run_dir))
    monkeypatch.delenv("DIFFUSION_BLOB_LOGDIR", raising=False)
    source = {"data_dir": str(digits_dir), "num_workers": 0, "channels": 1, "image_size": 8}

    def run(**given):
        flags = make_flags(**{**source, **given})
        return training_runs.prepare_training(flags, set(given), "image_size")

    return run


def write_checkpoint(folder, *steps, **flags):
    """Whole checkpoints, as the loop writes them, and the flags beside them."""
    for step in steps:
        files = {name(step): {} for name in (checkpoint.state_name, checkpoint.model_name)}
        folder.mkdir(exist_ok=True)
        checkpoint.write_checkpoint(str(folder), step, files)
    own = {"channels": 1, "image_size": 8, "class_names": [], "began_from": ""}
    stored_flags.save_config(str(folder), {**make_flags(), **own, **flags})
    return folder / checkpoint.model_name(steps[-1])


def message_of(call, **arguments):
    """The one line with which a call refuses its arguments."""
    with pytest.raises(UserError) as error:
        call(**arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


# -- data


def test_loader_is_asked_for_what_the_flags_say(prepare, digits_dir, monkeypatch):
    asked = {}
    monkeypatch.setattr(training_data, "load_data", lambda **arguments: asked.update(arguments))
    flags, data = prepare(
        seed=4,
        batch_size=6,
        image_size=(8, 12),
        channels=2,
        num_workers=3,
        class_cond=True,
        random_flip=True,
    )
    images = asked.pop("images")
    assert images == data.training
    assert len(images.paths) == 60
    assert images.class_names == tuple("0123456789")
    assert (flags["num_classes"], flags["class_names"]) == (10, list("0123456789"))
    expected = {
        "data_dir": str(digits_dir),
        "batch_size": 6,
        "image_size": (8, 12),
        "class_cond": True,
        "channels": 2,
        "value_range": None,
        "num_workers": 3,
        "seed": 4,
        "random_flip": True,
        "random_crop": False,
        "device": dist_util.dev(),
        "size_flag": "image_size",
    }
    assert asked == expected  # where to start is the loop's to say
    assert data.validation is None
    assert data.size_flag == "image_size"


def test_data_start_at_the_first_image_until_the_loop_seeks(prepare, run_dir):
    _, fresh = prepare(batch_size=4)
    write_checkpoint(run_dir, 4)
    _, data = prepare(batch_size=4)
    assert torch.equal(next(data.stream)[0], next(fresh.stream)[0])


def test_preparing_seeds_the_initial_weights(prepare):
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(99)
        prepare(seed=seed)
        draws.append(torch.rand(3).tolist())
    assert draws[0] == draws[1] != draws[2]


def test_images_held_out_are_not_trained_on(prepare, run_dir):
    _, data = prepare(val_fraction=0.25, class_cond=True)
    assert len(data.validation.paths) == 15
    assert len(data.training.paths) == 45
    assert set(data.validation.paths).isdisjoint(data.training.paths)
    assert data.stream.dataset.local_images == data.training.paths


def test_validation_images_of_a_folder_have_the_labels_of_training(prepare, digits_dir, tmp_path):
    (tmp_path / "val").mkdir()
    for name in ("3_0003.png", "7_0007.png"):
        shutil.copy(digits_dir / name, tmp_path / "val")
    _, data = prepare(val_data_dir=str(tmp_path / "val"), class_cond=True)
    assert data.validation.classes == [3, 7]
    assert len(data.training.paths) == 60


def test_validation_folder_without_images_is_named(prepare, tmp_path, run_dir):
    (tmp_path / "val").mkdir()
    assert "--val_data_dir" in message_of(prepare, val_data_dir=str(tmp_path / "val"))
    assert "--val_data_dir" in message_of(prepare, val_data_dir=str(tmp_path / "gone"))
    assert not run_dir.exists()


def test_validation_classes_that_training_lacks_are_named(prepare, digits_dir, tmp_path):
    for folder, name in [("train", "3_0003.png"), ("train", "3_0013.png"), ("val", "7_0007.png")]:
        (tmp_path / folder).mkdir(exist_ok=True)
        shutil.copy(digits_dir / name, tmp_path / folder)
    folders = {"data_dir": str(tmp_path / "train"), "val_data_dir": str(tmp_path / "val")}
    assert "7" in message_of(prepare, class_cond=True, **folders)


# -- what contradicts is refused before anything is written


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"train_steps": 10, "train_images": 8}, ["--train_steps 10", "--train_images 8"]),
        ({"train_steps": 10, "lr_anneal_steps": 5}, ["--train_steps 10", "--lr_anneal_steps 5"]),
        ({"precision": "fp8"}, ["--precision", "fp8", "bf16"]),
        ({"precision": "bf16", "use_fp16": True}, ["--use_fp16 True", "--precision bf16"]),
        ({"lr_schedule": "cosine"}, ["--lr_schedule cosine", "--train_steps"]),
        ({"lr_schedule": "constant", "lr_anneal_steps": 5}, ["constant", "--lr_anneal_steps 5"]),
        ({"lr_schedule": "inverse_sqrt"}, ["--lr_schedule inverse_sqrt", "--lr_warmup_steps"]),
        ({"keep_every": 5}, ["--keep_every 5", "--keep_checkpoints"]),
        ({"posthoc_ema": "0.1,x"}, ["--posthoc_ema"]),
        ({"val_fraction": 0.1, "val_data_dir": "x"}, ["--val_fraction 0.1", "--val_data_dir x"]),
        ({"train_hours": -1.0}, ["--train_hours -1"]),
    ],
)
def test_contradictions_are_named_and_leave_no_run_folder(prepare, run_dir, flags, words):
    message = message_of(prepare, **flags)
    for word in words:
        assert word in message
    assert not run_dir.exists()


# -- which checkpoint a run goes on from


def test_new_run_has_none(prepare):
    flags, _ = prepare()
    assert (flags["resume_checkpoint"], flags["began_from"]) == ("", "")


def test_same_command_goes_on_from_the_newest_of_the_run_folder(prepare, run_dir):
    write_checkpoint(run_dir, 0, 4, num_channels=32)
    flags, _ = prepare()
    assert flags["resume_checkpoint"] == str(run_dir / "model000004.pt")
    assert flags["num_channels"] == 32
    assert flags["began_from"] == ""


def test_checkpoints_in_the_blob_folder_are_the_runs(prepare, tmp_path, monkeypatch):
    path = write_checkpoint(tmp_path / "blob", 4)
    monkeypatch.setenv("DIFFUSION_BLOB_LOGDIR", str(tmp_path / "blob"))
    flags, _ = prepare()
    assert flags["resume_checkpoint"] == str(path)


@pytest.mark.parametrize("named", ["model000007.pt", "state000007.pt", ""])
def test_named_checkpoint_gives_the_flags(prepare, tmp_path, named):
    """By any file of it, or by its folder."""
    path = write_checkpoint(tmp_path / "other", 7, num_channels=64)
    name = os.path.join(tmp_path, "other", named)
    flags, _ = prepare(resume_checkpoint=name)
    assert flags["resume_checkpoint"] == str(path)
    assert flags["num_channels"] == 64
    assert flags["began_from"] == os.path.abspath(name)


def test_named_safetensors_file_gives_its_own_flags(prepare, tmp_path):
    """Whatever lies beside it."""
    pytest.importorskip("safetensors")
    stored_flags.save_config(str(tmp_path), {"num_channels": 96})
    path, own = str(tmp_path / "a.safetensors"), {"channels": 1, "image_size": 8}
    write_safetensors(path, {"weight": torch.ones(1)}, {**make_flags(), **own, "num_channels": 64})
    flags, _ = prepare(resume_checkpoint=path)
    assert (flags["resume_checkpoint"], flags["num_channels"]) == (path, 64)
    message = message_of(prepare, resume_checkpoint=path, num_channels=32)
    assert f"--num_channels 64 ({path})" in message


def test_same_command_with_a_named_checkpoint_goes_on_in_its_own_folder(
    prepare, tmp_path, run_dir, caplog
):
    """Else every sitting would begin again at the foreign checkpoint."""
    named = str(write_checkpoint(tmp_path / "other", 7))
    own = write_checkpoint(run_dir, 9, began_from=named)
    with caplog.at_level(logging.INFO, logger="improved_diffusion"):
        flags, _ = prepare(resume_checkpoint=named)
    assert flags["resume_checkpoint"] == str(own)
    assert flags["began_from"] == named
    assert f"this run began from {named} and goes on from {own}" in caplog.text


def test_named_checkpoint_of_the_run_folder_itself_wins_over_later_ones(prepare, run_dir):
    write_checkpoint(run_dir, 4, 8)
    flags, _ = prepare(resume_checkpoint=str(run_dir / "model000004.pt"))
    assert flags["resume_checkpoint"] == str(run_dir / "model000004.pt")


def test_named_checkpoint_does_not_overwrite_another_run(prepare, tmp_path, run_dir):
    named = str(write_checkpoint(tmp_path / "other", 7))
    write_checkpoint(run_dir, 4, began_from="")
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    message = message_of(prepare, resume_checkpoint=named)
    for word in (f"--resume_checkpoint {named}", str(run_dir), "model000004.pt", "--log_dir"):
        assert word in message
    assert before == {path.name: path.read_bytes() for path in run_dir.iterdir()}


def test_run_folder_of_another_network_is_named_with_the_flags(prepare, run_dir):
    write_checkpoint(run_dir, 4, num_channels=32, num_res_blocks=1)
    message = message_of(prepare, num_channels=64, num_res_blocks=3)
    for word in ("--num_channels 64", "--num_channels 32", "--num_res_blocks 3", "config.json"):
        assert word in message


def test_damaged_newest_checkpoint_is_passed_over(prepare, run_dir, caplog):
    write_checkpoint(run_dir, 4, 8)
    (run_dir / "model000008.pt").write_bytes(b"")
    with caplog.at_level(logging.WARNING, logger="improved_diffusion"):
        flags, _ = prepare()
    assert flags["resume_checkpoint"] == str(run_dir / "model000004.pt")
    assert "step 8 is passed over" in caplog.text


@pytest.mark.parametrize("how", ["damaged", "incomplete", "gone"])
def test_named_checkpoint_that_is_not_whole_is_refused(prepare, tmp_path, run_dir, how):
    path = write_checkpoint(tmp_path / "other", 7)
    if how == "damaged":
        path.write_bytes(b"")
    elif how == "incomplete":
        (tmp_path / "other" / "checkpoint000007.json").unlink()
    else:
        path = tmp_path / "other" / "model000009.pt"
    word = {"gone": "does not exist"}.get(how, how)
    message = message_of(prepare, resume_checkpoint=str(path))
    assert word in message
    assert path.name in message
    assert not run_dir.exists()


def test_flags_of_training_that_changed_are_told(prepare, run_dir, caplog):
    source, _ = prepare(lr=1e-4, batch_size=2)
    write_checkpoint(run_dir, 4, **{**source, "resume_checkpoint": ""})
    with caplog.at_level(logging.INFO, logger="improved_diffusion"):
        prepare(lr=5e-5, batch_size=3)
    (line,) = [record.getMessage() for record in caplog.records if "changed" in record.message]
    assert line == (
        "flags that changed since the last sitting: --batch_size 3 (was 2), --lr 5e-05 (was 0.0001)"
    )


def test_unchanged_flags_are_not_told(prepare, run_dir, caplog):
    source, _ = prepare(lr=3e-4)
    write_checkpoint(run_dir, 4, **{**source, "resume_checkpoint": ""})
    with caplog.at_level(logging.INFO, logger="improved_diffusion"):
        prepare(lr=3e-4)
    assert "changed" not in caplog.text


# -- classes


def test_continued_run_needs_the_classes_of_its_checkpoint(prepare, run_dir):
    flags = {"class_cond": True, "num_classes": 11, "class_names": [*"0123456789", "x"]}
    write_checkpoint(run_dir, 4, **flags)
    assert "only in the checkpoint: x" in message_of(prepare, class_cond=True)


def test_class_that_was_added_since_the_checkpoint_is_named(prepare, run_dir):
    flags = {"class_cond": True, "num_classes": 9, "class_names": [*"012345678"]}
    write_checkpoint(run_dir, 4, **flags)
    assert "only in the data: 9" in message_of(prepare, class_cond=True)


def test_more_classes_than_asked_for_are_an_error(prepare):
    message = message_of(prepare, class_cond=True, num_classes=9)
    assert "10 classes" in message
    assert "--num_classes 9" in message
