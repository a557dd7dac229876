"""Files of a run: their names, when a write counts, and what is refused in loading them."""

import io
import json
import os
import pickle

import numpy as np
import pytest
import torch
from golden_data import load_json

from improved_diffusion import checkpoint, dist_util, train_util
from improved_diffusion.checkpoint import (
    find_beside,
    find_newest_model,
    load_config,
    merge_flags,
    save_config,
    write_file,
    write_tensors,
)
from improved_diffusion.errors import UserError
from improved_diffusion.script_util import FIXED_BY_TRAINING

STEPS = load_json("training")["parse_resume_step_from_filename"]
RUNS = {name: run for name, run in load_json("training").items() if "files" in run}


def message_of(call, *args, **kwargs):
    """The one line with which a call refuses its arguments."""
    with pytest.raises(UserError) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def touch(folder, *names):
    for name in names:
        (folder / name).write_bytes(b"")


# -- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", sorted(RUNS))
def test_names_are_those_of_the_recorded_files(run):
    steps = {int(name[-9:-3]) for name in RUNS[run]["files"]}
    ours = []
    for step in steps:
        ours += [checkpoint.model_name(step), checkpoint.opt_name(step)]
        ours += [checkpoint.ema_name(rate, step) for rate in RUNS[run]["ema_rate"].split(",")]
    assert sorted(ours) == sorted(RUNS[run]["files"])


def test_a_rate_is_named_alike_as_number_and_as_text():
    assert checkpoint.ema_name(0.9999, 500) == checkpoint.ema_name("0.9999", 500)
    assert checkpoint.ema_name("0.9999", 500) == "ema_0.9999_000500.pt"


def test_step_of_seven_digits_is_not_cut():
    assert checkpoint.model_name(1234567) == "model1234567.pt"


@pytest.mark.parametrize(("name", "step"), STEPS.items())
def test_recorded_step_of_a_file_name(name, step):
    assert checkpoint.parse_resume_step_from_filename(name) == step
    assert train_util.parse_resume_step_from_filename(name) == step


@pytest.mark.parametrize("step", [0, 1, 999999, 1000000, 12345678])
def test_step_is_read_back_from_the_name(step):
    path = f"gs://bucket/model7/{checkpoint.model_name(step)}"
    assert checkpoint.parse_resume_step_from_filename(path) == step


@pytest.mark.parametrize(
    "name",
    [
        "opt000500.pt",
        "runs/model000500/x.pt",
        "model000500.d/x.pt",
        "model.pt",
        "model000500_old.pt",
        "",
    ],
)
def test_other_names_have_step_0(name):
    assert checkpoint.parse_resume_step_from_filename(name) == 0


# -- finding --------------------------------------------------------------------------------------


def test_newest_model_is_that_of_the_highest_step(tmp_path):
    touch(tmp_path, "model000010.pt", "model000200.pt", "model000090.pt")
    assert find_newest_model(str(tmp_path)) == str(tmp_path / "model000200.pt")


def test_newest_model_may_have_seven_digits(tmp_path):
    touch(tmp_path, "model999999.pt", "model1000000.pt", "model200000.pt")
    assert find_newest_model(str(tmp_path)) == str(tmp_path / "model1000000.pt")


def test_first_model_is_found_too(tmp_path):
    touch(tmp_path, "model000000.pt")
    assert find_newest_model(str(tmp_path)) == str(tmp_path / "model000000.pt")


STRAY = [
    "model000900.pt.tmp",
    "model000901.pt.bak",
    "model000902.txt",
    "mymodel000903.pt",
    "model_old.pt",
    "model999.pt",
    "model-00904.pt",
    "ema_0.9_000905.pt",
    "opt000906.pt",
    "config.json",
]


def test_stray_files_are_no_models(tmp_path):
    touch(tmp_path, *STRAY)
    assert find_newest_model(str(tmp_path)) is None
    touch(tmp_path, "model000010.pt")
    assert find_newest_model(str(tmp_path)) == str(tmp_path / "model000010.pt")


@pytest.mark.parametrize("where", ["missing", "file.txt"])
def test_no_folder_has_no_newest_model(tmp_path, where):
    touch(tmp_path, "file.txt", "model000001.pt")
    assert find_newest_model(str(tmp_path / where)) is None


def test_file_beside_a_checkpoint(tmp_path):
    touch(tmp_path, "model000001.pt", "opt000001.pt")
    model = str(tmp_path / "model000001.pt")
    assert find_beside(model, "opt000001.pt") == str(tmp_path / "opt000001.pt")
    assert find_beside(model, "opt000002.pt") is None


def test_checkpoint_named_without_a_folder_lies_in_the_working_directory(tmp_path, monkeypatch):
    touch(tmp_path, "model000001.pt", "opt000001.pt")
    save_config(str(tmp_path), {"num_channels": 64})
    monkeypatch.chdir(tmp_path)
    assert find_beside("model000001.pt", "opt000001.pt") == "opt000001.pt"
    assert load_config(os.path.dirname("model000001.pt")) == {"num_channels": 64}


# -- writing --------------------------------------------------------------------------------------


def fail(*args):
    raise OSError("disk full")


def test_file_is_written_and_overwritten(tmp_path):
    path = tmp_path / "a.bin"
    for data in (b"first", b"", b"second\r\n\x00"):
        write_file(str(path), data)
        assert path.read_bytes() == data
        assert os.listdir(tmp_path) == ["a.bin"]


def test_file_is_complete_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """Otherwise a power cut may leave a named file without its content."""
    path, events = tmp_path / "a.bin", []
    path.write_bytes(b"old")
    fsync, replace = os.fsync, os.replace

    def noted_fsync(fd):
        events.append(("fsync", os.fstat(fd).st_size, path.read_bytes()))
        fsync(fd)

    def noted_replace(source, target):
        events.append(("replace", os.path.getsize(source), path.read_bytes()))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write_file(str(path), b"12345")
    assert events[:2] == [("fsync", 5, b"old"), ("replace", 5, b"old")]
    assert path.read_bytes() == b"12345"


@pytest.mark.parametrize("broken", ["fsync", "replace"])
@pytest.mark.parametrize("name", ["model000005.pt", "config.json"])
def test_write_that_fails_leaves_no_file_under_the_name(tmp_path, monkeypatch, broken, name):
    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError, match="disk full"):
        write_file(str(tmp_path / name), b"12345")
    assert not (tmp_path / name).exists()
    assert find_newest_model(str(tmp_path)) is None


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_write_that_fails_keeps_the_old_file(tmp_path, monkeypatch, broken):
    path = tmp_path / "model000005.pt"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError, match="disk full"):
        write_file(str(path), b"12345")
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_write_that_fails_leaves_no_partial_file(tmp_path, monkeypatch, broken):
    """On a full disk what is left behind would stand in the way of the next save."""
    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError, match="disk full"):
        write_file(str(tmp_path / "model000005.pt"), b"12345")
    assert os.listdir(tmp_path) == []


def test_interrupted_write_does_not_hinder_the_next(tmp_path, monkeypatch):
    path = tmp_path / "model000005.pt"

    def interrupted(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_file(str(path), b"a long text that was never named")
    write_file(str(path), b"short")
    assert path.read_bytes() == b"short"
    assert os.listdir(tmp_path) == [path.name]


def test_tensors_are_read_back(tmp_path):
    path = str(tmp_path / "a.pt")
    write_tensors(path, {"w": torch.arange(6.0).view(2, 3), "n": torch.tensor(3)})
    state = dist_util.load_state_dict(path, map_location="cpu")
    assert list(state) == ["w", "n"]
    assert torch.equal(state["w"], torch.arange(6.0).view(2, 3))
    assert torch.equal(state["n"], torch.tensor(3))


def test_tensors_that_cannot_be_saved_leave_the_old_file(tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(b"old")
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        write_tensors(str(path), {"f": lambda: None})
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.pt"]


# -- flags beside checkpoints ---------------------------------------------------------------------


def test_flags_are_read_back(tmp_path):
    flags = {"lr": 1e-4, "class_cond": True, "data_dir": "ü", "class_names": ["a", "b"]}
    save_config(str(tmp_path), flags)
    assert load_config(str(tmp_path)) == flags
    assert json.loads((tmp_path / "config.json").read_text()) == flags


def test_flags_under_another_name_are_not_those_of_the_run(tmp_path):
    save_config(str(tmp_path), {"eta": 1.0}, "image_sample.json")
    assert load_config(str(tmp_path)) == {}
    assert json.loads((tmp_path / "image_sample.json").read_text()) == {"eta": 1.0}


@pytest.mark.parametrize("where", ["", "missing"])
def test_folder_without_flags_has_none(tmp_path, where):
    assert load_config(str(tmp_path / where)) == {}


@pytest.mark.parametrize(
    "content", [b"", b'{"lr": 1e-4,', b"[1, 2]", b"3", b"null", b"\xff\xfe\x00", b'{"a": 1} x']
)
def test_damaged_flags_are_an_error_that_names_the_file(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    assert f"'{tmp_path / 'config.json'}' is damaged" in message_of(load_config, str(tmp_path))


FLAGS = {"num_channels": 128, "image_size": 64, "dropout": 0.0, "lr": 1e-4}


def merge(stored, given=(), **flags):
    fixed, inherited = {"num_channels", "image_size"}, {"num_channels", "image_size", "dropout"}
    return merge_flags({**FLAGS, **flags}, set(given), stored, fixed, inherited, "runs/x")


def test_flag_not_given_is_that_of_the_checkpoint():
    assert merge({"num_channels": 64, "dropout": 0.1}) == {
        **FLAGS,
        "num_channels": 64,
        "dropout": 0.1,
    }


def test_flag_that_training_does_not_settle_is_that_of_the_command_line():
    assert merge({"dropout": 0.1}, ["dropout"], dropout=0.3)["dropout"] == 0.3


def test_flag_that_is_not_inherited_stays():
    assert merge({"lr": 1.0, "unheard_of": 1}) == FLAGS


def test_flag_that_is_not_stored_stays():
    assert merge({}) == FLAGS
    assert merge({}, ["num_channels"], num_channels=32)["num_channels"] == 32


def test_given_flag_that_agrees_is_no_contradiction():
    assert merge({"num_channels": 64}, ["num_channels"], num_channels=64)["num_channels"] == 64


def test_merged_flags_leave_the_arguments_alone():
    flags, stored = dict(FLAGS), {"num_channels": 64}
    merge_flags(flags, set(), stored, set(), {"num_channels"}, "runs/x")
    assert flags == FLAGS
    assert stored == {"num_channels": 64}


def test_contradiction_names_flag_both_values_and_file():
    message = message_of(merge, {"num_channels": 64}, ["num_channels"], num_channels=32)
    assert "--num_channels 32 " in message
    assert "--num_channels 64 " in message
    assert "runs/x/config.json" in message


def test_contradiction_is_seen_even_if_the_given_value_is_the_default():
    message = message_of(merge, {"num_channels": 64}, ["num_channels"])
    assert "--num_channels 128 " in message
    assert "--num_channels 64 " in message


def test_size_stored_as_a_list_is_the_pair_on_the_command_line(tmp_path):
    save_config(str(tmp_path), {"image_size": (48, 64)})
    stored = load_config(str(tmp_path))
    assert merge(stored)["image_size"] == (48, 64)
    assert merge(stored, ["image_size"], image_size=(48, 64))["image_size"] == (48, 64)


@pytest.mark.parametrize(("ours", "theirs"), [(64, [48, 64]), ((48, 64), 64)])
def test_contradicting_sizes_are_named_as_one_writes_them(ours, theirs):
    message = message_of(merge, {"image_size": theirs}, ["image_size"], image_size=ours)
    assert "--image_size 64 " in message
    assert "--image_size 48x64 " in message


def test_training_settles_what_the_shapes_and_the_process_depend_on():
    """Sampling may still choose its steps, its variance and how much memory it takes."""
    assert {"num_channels", "class_cond", "learn_sigma", "noise_schedule"} <= FIXED_BY_TRAINING
    free = {"timestep_respacing", "sigma_small", "use_checkpoint", "dropout", "use_kl"}
    assert not free & FIXED_BY_TRAINING


# -- files that are no checkpoints ----------------------------------------------------------------


def load_error(path):
    """The line that refuses a file, which names it."""
    message = message_of(dist_util.load_state_dict, str(path), map_location="cpu")
    assert f"'{path}'" in message
    return message


def saved(value, **kwargs):
    buffer = io.BytesIO()
    torch.save(value, buffer, **kwargs)
    return buffer.getvalue()


def npz_bytes():
    buffer = io.BytesIO()
    np.savez(buffer, arr_0=np.zeros(3))
    return buffer.getvalue()


class Thing:
    """An object that is no tensor."""


class Trap:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize(
    "value", [Thing(), {"w": Thing()}, torch.nn.Linear(2, 2), {"f": print}], ids=type
)
def test_other_content_than_tensors_is_refused(tmp_path, value):
    path = tmp_path / "a.pt"
    path.write_bytes(saved(value))
    assert "other than tensors" in load_error(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_object_does_not_run_its_code(tmp_path, zipped):
    path, made = tmp_path / "a.pt", tmp_path / "made"
    data = saved({"w": torch.zeros(2), "t": Trap(made)}, _use_new_zipfile_serialization=zipped)
    path.write_bytes(data)
    load_error(path)
    assert not made.exists()
    torch.load(path, weights_only=False)
    assert made.exists()  # the trap works


def test_caller_cannot_ask_for_more_than_tensors(tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(saved({"t": Thing()}))
    message = message_of(dist_util.load_state_dict, str(path), weights_only=False)
    assert "other than tensors" in message


ZIPPED = saved({"w": torch.arange(100.0)})
LEGACY = saved({"w": torch.arange(100.0)}, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("zipped", [True, False])
def test_both_formats_of_torch_load(tmp_path, zipped):
    path = tmp_path / "a.pt"
    path.write_bytes(ZIPPED if zipped else LEGACY)
    state = dist_util.load_state_dict(str(path), map_location="cpu")
    assert torch.equal(state["w"], torch.arange(100.0))


@pytest.mark.parametrize("data", [ZIPPED, LEGACY], ids=["zipped", "legacy"])
def test_truncated_file_is_refused(tmp_path, data):
    path, wrong = tmp_path / "a.pt", {}
    for length in [0, 1, 2, 10, 30, 100, 200, len(data) // 2, len(data) - 100, len(data) - 1]:
        path.write_bytes(data[:length])
        try:
            assert "damaged" in load_error(path)
        except Exception as error:
            wrong[length] = repr(error)
    assert wrong == {}


@pytest.mark.parametrize(
    "text",
    [
        "not a checkpoint\n",
        "step,loss\n1,0.5\n",
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
        "<!DOCTYPE html>\n",
        '{"image_size": 64}\n',
        "\n",
        "runs/a\n",
        "job 1\n",
        "ü\n",
    ],
)
def test_text_file_is_refused(tmp_path, text):
    path = tmp_path / "a.pt"
    path.write_text(text, encoding="utf-8")
    assert "no checkpoint" in load_error(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("data", [npz_bytes(), pickle.dumps([1, 2]), bytes(100)], ids=range(3))
def test_binary_file_of_another_kind_is_refused(tmp_path, data):
    path = tmp_path / "a.pt"
    path.write_bytes(data)
    assert "no checkpoint" in load_error(path)


@pytest.mark.parametrize("where", ["missing.pt", "", "file/model.pt"])
def test_missing_file_and_folder_are_refused(tmp_path, where):
    touch(tmp_path, "file")
    assert "does not exist or is no file" in load_error(tmp_path / where)


def test_empty_path_is_refused():
    assert "does not exist" in load_error("")
