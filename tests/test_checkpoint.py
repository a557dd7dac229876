"""Files of a run: their names, which of them count, and what is refused in loading them."""

import hashlib
import io
import json
import logging
import os
import pickle
import re

import numpy as np
import pytest
import torch
from golden_data import load_json

from improved_diffusion import checkpoint, dist_util, train_util
from improved_diffusion.checkpoint import (
    find_beside,
    find_newest_model,
    locate,
    prune,
    remove_partial_files,
    set_aside_newer,
    step_of,
    write_checkpoint,
    write_tensors,
)
from improved_diffusion.errors import UserError
from improved_diffusion.script_util import FIXED_BY_TRAINING
from improved_diffusion.stored_flags import load_config, merge_flags, save_config

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


# -- whole checkpoints ----------------------------------------------------------------------------

KINDS = ["state{}.pt", "opt{}.pt", "ema_0.9_{}.pt", "model{}.pt"]
MANIFEST = "checkpoint{}.json"


def name_of(kind, step):
    return kind.format(f"{step:06d}")


def write(folder, *steps):
    """Whole checkpoints as the loop writes them; their tensors tell the step."""
    for step in steps:
        files = {name_of(kind, step): {"w": torch.full((50,), float(step))} for kind in KINDS}
        write_checkpoint(str(folder), step, files)


def write_foreign(folder, *steps):
    """Files as the original improved-diffusion writes them."""
    for step in steps:
        touch(folder, *(name_of(kind, step) for kind in KINDS[1:]))


@pytest.mark.parametrize("step", [0, 7, 999999, 1000000])
def test_step_is_told_by_any_file_of_a_checkpoint(step):
    for kind in [*KINDS, MANIFEST, "ema_1e-05_{}.pt"]:
        assert step_of(f"gs://bucket/model000001.pt/{name_of(kind, step)}") == step
        assert step_of(f"runs\\x\\{name_of(kind, step)}") == step
    assert step_of(checkpoint.state_name(step)) == step
    assert step_of(checkpoint.manifest_name(step)) == step


@pytest.mark.parametrize("name", [*STRAY, "state000001.pt.tmp", "checkpoint000001.json.set_aside"])
def test_other_names_have_no_step(name):
    known = step_of(name) is not None
    assert known == name.startswith(("ema_0.9", "opt"))  # those are of a checkpoint, but no model
    assert step_of(f"{name}x") is None


def test_manifest_holds_names_sizes_and_checksums(tmp_path):
    write(tmp_path, 12)
    manifest = json.loads((tmp_path / "checkpoint000012.json").read_text())
    assert manifest["step"] == 12
    assert sorted(manifest["files"]) == sorted(name_of(kind, 12) for kind in KINDS)
    for name, entry in manifest["files"].items():
        data = (tmp_path / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        assert torch.equal(load(tmp_path / name)["w"], torch.full((50,), 12.0))


def load(path):
    return dist_util.load_state_dict(str(path), map_location="cpu")


def test_manifest_is_written_last_and_removed_first(tmp_path, monkeypatch):
    """So there is no moment at which a manifest speaks for files that are not there yet."""
    write(tmp_path, 3)
    seen, write_one = [], checkpoint.write_tensors

    def noted(path, value):
        seen.append((tmp_path / "checkpoint000003.json").exists())
        return write_one(path, value)

    monkeypatch.setattr(checkpoint, "write_tensors", noted)
    write(tmp_path, 3)
    assert seen == [False] * 4
    assert find_newest_model(str(tmp_path)) == str(tmp_path / "model000003.pt")


@pytest.mark.parametrize("done", range(5))
def test_save_that_is_cut_off_is_no_checkpoint(tmp_path, monkeypatch, done):
    """After any number of its files, of which the model is one."""

    class Killed(BaseException):
        pass

    write(tmp_path, 3)
    write_one, count = checkpoint.write_file, iter(range(100))

    def dying(path, data):
        raise Killed

    def counted(path, value):
        if next(count) == done:
            raise Killed
        return write_tensors(path, value)

    monkeypatch.setattr(checkpoint, "write_tensors", counted)
    monkeypatch.setattr(checkpoint, "write_file", dying)
    for step in (3, 5):
        with pytest.raises(Killed):
            write(tmp_path, step)
        count = iter(range(100))
        if step == 3:
            assert find_newest_model(str(tmp_path)) is None
            monkeypatch.setattr(checkpoint, "write_tensors", write_tensors)
            monkeypatch.setattr(checkpoint, "write_file", write_one)
            write(tmp_path, 3)
            monkeypatch.setattr(checkpoint, "write_tensors", counted)
            monkeypatch.setattr(checkpoint, "write_file", dying)
    assert len(list(tmp_path.glob("*000005.pt"))) == done
    assert find_newest_model(str(tmp_path)) == str(tmp_path / "model000003.pt")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"x")


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def remove(path):
    path.unlink()


DAMAGES = {
    truncate: "{} has [0-9,]+ bytes instead of [0-9,]+",
    lengthen: "{} has [0-9,]+ bytes instead of [0-9,]+",
    flip_a_bit: r"{} is damaged \(its checksum is wrong\)",
    remove: "{} is missing",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_newest_checkpoint_is_passed_over_loudly(tmp_path, caplog, damage, kind):
    write(tmp_path, 2, 4, 6)
    for step in (4, 6):
        damage(tmp_path / name_of(kind, step))
    with caplog.at_level(logging.WARNING, logger="improved_diffusion"):
        assert find_newest_model(str(tmp_path)) == str(tmp_path / "model000002.pt")
    newest, middle, back = [record.getMessage() for record in caplog.records]
    for step, line in ((6, newest), (4, middle)):
        problem = DAMAGES[damage].format(name_of(kind, step))
        assert re.search(f"checkpoint of step {step} is passed over: {problem}", line)
    assert "going back to the checkpoint of step 2" in back


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[]", b'{"files": 3}', b'{"files": {"a": {"bytes": 1}}}', b"\xff"],
)
def test_damaged_manifest_is_passed_over_too(tmp_path, caplog, content):
    write(tmp_path, 2, 4)
    (tmp_path / "checkpoint000004.json").write_bytes(content)
    with caplog.at_level(logging.WARNING, logger="improved_diffusion"):
        assert find_newest_model(str(tmp_path)) == str(tmp_path / "model000002.pt")
    assert "checkpoint000004.json is damaged" in caplog.text


def test_whole_checkpoint_is_taken_in_silence(tmp_path, caplog):
    write(tmp_path, 2, 4)
    with caplog.at_level(logging.WARNING, logger="improved_diffusion"):
        assert find_newest_model(str(tmp_path)) == str(tmp_path / "model000004.pt")
    assert not caplog.records


def test_damage_of_all_checkpoints_is_an_error_rather_than_a_new_start(tmp_path):
    write(tmp_path, 2, 4)
    truncate(tmp_path / "opt000002.pt")
    remove(tmp_path / "model000004.pt")
    message = message_of(find_newest_model, str(tmp_path))
    assert f"'{tmp_path}' holds no whole checkpoint: model000004.pt is missing" in message
    assert "--log_dir" in message


def test_folder_of_the_original_is_found_without_manifests(tmp_path):
    write_foreign(tmp_path, 10, 30, 20)
    assert find_newest_model(str(tmp_path)) == str(tmp_path / "model000030.pt")


def test_save_that_was_cut_off_is_not_taken_for_one_of_the_original(tmp_path):
    write(tmp_path, 30)
    (tmp_path / "checkpoint000030.json").unlink()
    assert find_newest_model(str(tmp_path)) is None
    write_foreign(tmp_path, 20)
    assert find_newest_model(str(tmp_path)) == str(tmp_path / "model000020.pt")


def test_own_checkpoint_comes_before_files_of_the_original(tmp_path):
    """The run went on from there, or back before it."""
    write_foreign(tmp_path, 20, 40)
    write(tmp_path, 30)
    assert find_newest_model(str(tmp_path)) == str(tmp_path / "model000030.pt")


# -- what a user names ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, MANIFEST])
def test_any_file_of_a_checkpoint_names_it(tmp_path, monkeypatch, kind):
    write(tmp_path, 2, 4)
    name = name_of(kind, 2)
    assert locate(str(tmp_path / name)) == str(tmp_path / "model000002.pt")
    monkeypatch.chdir(tmp_path)
    assert locate(name) == "model000002.pt"


@pytest.mark.parametrize("kind", KINDS[1:])
def test_any_file_of_the_original_names_its_checkpoint(tmp_path, kind):
    write_foreign(tmp_path, 2, 4)
    assert locate(str(tmp_path / name_of(kind, 2))) == str(tmp_path / "model000002.pt")


@pytest.mark.parametrize("end", ["", "/"])
def test_folder_names_its_newest_checkpoint(tmp_path, end):
    write(tmp_path, 2, 4)
    assert locate(f"{tmp_path}{end}") == str(tmp_path / "model000004.pt")


@pytest.mark.parametrize("name", ["best.pt", "model999.pt", "model000004_old.pt", "imagenet64.pt"])
def test_file_of_another_name_is_taken_as_it_is(tmp_path, name):
    write(tmp_path, 4)
    touch(tmp_path, name)
    assert locate(str(tmp_path / name)) == str(tmp_path / name)


def test_average_without_the_rest_of_its_checkpoint_is_taken_as_it_is(tmp_path):
    touch(tmp_path, "ema_0.9999_000004.pt")
    path = str(tmp_path / "ema_0.9999_000004.pt")
    assert locate(path) == path


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[1], MANIFEST])
def test_other_files_without_the_model_are_refused(tmp_path, kind):
    (tmp_path / name_of(kind, 4)).write_text("{}")
    path = str(tmp_path / name_of(kind, 4))
    message = message_of(locate, path)
    assert f"--resume_checkpoint '{path}'" in message
    words = {KINDS[0]: "incomplete", KINDS[1]: "model000004.pt is missing", MANIFEST: "damaged"}
    assert words[kind] in message


@pytest.mark.parametrize("where", ["gone.pt", "gone/model000001.pt", "model000002.pt", "file/x.pt"])
def test_what_does_not_exist_is_named(tmp_path, where):
    touch(tmp_path, "file", "opt000002.pt")
    path = str(tmp_path / where)
    assert f"--resume_checkpoint '{path}' does not exist" in message_of(locate, path)


def test_folder_without_checkpoints_is_named(tmp_path):
    touch(tmp_path, *STRAY)
    message = message_of(locate, str(tmp_path))
    assert f"--resume_checkpoint '{tmp_path}': the folder holds no checkpoint" in message


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_named_checkpoint_that_is_damaged_is_refused_rather_than_replaced(tmp_path, damage, kind):
    write(tmp_path, 2, 4)
    damage(tmp_path / name_of(kind, 4))
    named = str(tmp_path / name_of(MANIFEST, 4))
    message = message_of(locate, named)
    assert f"'{named}': the checkpoint is damaged: " in message
    assert re.search(DAMAGES[damage].format(name_of(kind, 4)), message)


@pytest.mark.parametrize("kind", KINDS)
def test_named_checkpoint_that_is_incomplete_is_refused(tmp_path, kind):
    write(tmp_path, 2, 4)
    (tmp_path / "checkpoint000004.json").unlink()
    message = message_of(locate, str(tmp_path / name_of(kind, 4)))
    assert "incomplete" in message
    assert "checkpoint000004.json is missing" in message


# -- going back, and tidying up -------------------------------------------------------------------


def test_later_checkpoints_are_set_aside_with_their_manifests(tmp_path):
    write(tmp_path, 2, 4, 6, 8)
    before = (tmp_path / "checkpoint000008.json").read_bytes()
    assert set_aside_newer(str(tmp_path), 4) == [6, 8]
    assert find_newest_model(str(tmp_path)) == str(tmp_path / "model000004.pt")
    assert (tmp_path / "checkpoint000008.json.set_aside").read_bytes() == before
    assert (tmp_path / "model000008.pt").exists()
    assert set_aside_newer(str(tmp_path), 4) == []
    write(tmp_path, 6)
    assert find_newest_model(str(tmp_path)) == str(tmp_path / "model000006.pt")


def test_nothing_newer_is_nothing_to_set_aside(tmp_path):
    write(tmp_path, 2, 4)
    before = sorted(os.listdir(tmp_path))
    assert set_aside_newer(str(tmp_path), 4) == []
    assert sorted(os.listdir(tmp_path)) == before
    assert set_aside_newer(str(tmp_path / "gone"), 4) == []


def test_partial_files_of_checkpoints_go_and_no_others(tmp_path):
    partial = [f"{name_of(kind, 4)}.tmp" for kind in [*KINDS, MANIFEST]]
    write(tmp_path, 4)
    stay = [*os.listdir(tmp_path), "progress.csv.tmp", "config.json.tmp", "mine.tmp", ".tmp"]
    touch(tmp_path, *partial, *stay[-4:])
    remove_partial_files(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == sorted(stay)
    remove_partial_files(str(tmp_path / "gone"))
    remove_partial_files("gs://bucket/folder")


def steps_in(folder):
    """step -> how many files of it there are."""
    steps = [step_of(name) for name in os.listdir(folder)]
    return {step: steps.count(step) for step in set(steps) - {None}}


def test_pruning_removes_what_is_not_kept_and_asks_with_sorted_steps(tmp_path):
    write(tmp_path, 10, 2, 4, 1000000)
    asked = []
    prune(str(tmp_path), lambda steps: asked.append(steps) or {4, 1000000})
    assert asked == [[2, 4, 10, 1000000]]
    assert steps_in(tmp_path) == {4: 5, 1000000: 5}


def test_pruning_leaves_all_other_files(tmp_path):
    write_foreign(tmp_path, 1, 3)
    stay = ["posthoc_0.1_000002.pt", "config.json", "progress.csv", "mymodel000002.pt"]
    touch(tmp_path, *stay)
    write(tmp_path, 2, 4)
    prune(str(tmp_path), lambda steps: steps[-1:])
    assert set(stay) <= set(os.listdir(tmp_path))
    assert steps_in(tmp_path) == {1: 3, 3: 3, 4: 5}


def test_pruning_removes_what_a_cut_off_save_left_but_not_a_save_in_progress(tmp_path):
    write(tmp_path, 2, 4, 6)
    for step in (2, 6):  # 6 is newer than any whole one: it may be being written
        (tmp_path / name_of(MANIFEST, step)).unlink()
    prune(str(tmp_path), lambda steps: steps)
    assert steps_in(tmp_path) == {4: 5, 6: 4}


def test_pruning_that_is_cut_off_leaves_no_half_checkpoint_behind(tmp_path, monkeypatch):
    """What is left is never taken for a checkpoint, and goes the next time."""
    import blobfile

    for removed in range(1, 5):
        write(tmp_path, 2)
        count, really = iter(range(100)), blobfile.remove

        def dying(path):
            if next(count) == removed:  # noqa: B023  used within the iteration
                raise KeyboardInterrupt
            really(path)  # noqa: B023

        with monkeypatch.context() as patch:
            patch.setattr(blobfile, "remove", dying)
            with pytest.raises(KeyboardInterrupt):
                prune(str(tmp_path), lambda steps: [])
        assert find_newest_model(str(tmp_path)) is None
        write(tmp_path, 4)
        prune(str(tmp_path), lambda steps: steps)
        assert steps_in(tmp_path) == {4: 5}
        for path in tmp_path.iterdir():
            path.unlink()


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
