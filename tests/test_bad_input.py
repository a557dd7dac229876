"""A user's mistake is one line on stderr and exit code 2, and nothing is left of it."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from launchers import ends, start_by_hand
from PIL import Image
from script_runner import (
    TINY,
    TINY_SUPER_RES,
    command_line,
    error_of,
    script_environment,
    script_path,
    start_script,
    succeed,
    tree,
)


class RunsCode:
    """An object that runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch code_was_run",)


class Plain:
    """An object that runs nothing."""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, trained, digits_dir):
    """A folder with all that is wrong, and what is right beside it."""
    folder = tmp_path_factory.mktemp("workplace").resolve()
    run, bad = folder / "run", folder / "bad"
    run.mkdir()
    for name in ("config.json", "model000008.pt", "opt000008.pt", "ema_0.9_000008.pt"):
        shutil.copy(trained.folder / name, run)
    bad.mkdir()
    shutil.copy(run / "config.json", bad)
    weights = torch.load(run / "model000008.pt", weights_only=True)
    content = (run / "model000008.pt").read_bytes()
    torch.save({**weights, "more": RunsCode()}, bad / "code.pt")
    torch.save({**weights, "more": Plain()}, bad / "object.pt")
    torch.save({"more": Plain()}, bad / "old.pt", _use_new_zipfile_serialization=False)
    (bad / "pickle.pt").write_bytes(pickle.dumps({**weights, "more": RunsCode()}))
    (bad / "half.pt").write_bytes(content[: len(content) // 2])
    (bad / "start.pt").write_bytes(content[:50])
    (bad / "empty.pt").write_bytes(b"")
    (bad / "text.pt").write_text("no checkpoint\n")
    torch.save([1, 2], bad / "list.pt")
    shutil.copy(run / "opt000008.pt", bad)  # without the model
    torch.save({key: weights[key] for key in list(weights)[:-1]}, bad / "less.pt")
    (folder / "bare").mkdir()  # without flags
    shutil.copy(run / "model000008.pt", folder / "bare")
    for name in ("whole", "cut", "broken"):
        (folder / name).mkdir()
        for path in [*trained.folder.glob("*000008.*"), trained.folder / "config.json"]:
            shutil.copy(path, folder / name)
    (folder / "cut" / "checkpoint000008.json").unlink()
    ema = bytearray((folder / "broken" / "ema_0.9_000008.pt").read_bytes())
    ema[len(ema) // 2] ^= 1
    (folder / "broken" / "ema_0.9_000008.pt").write_bytes(ema)
    (folder / "damaged").mkdir()
    shutil.copy(run / "model000008.pt", folder / "damaged")
    (folder / "damaged" / "config.json").write_text('{"image_size": 8,')

    (folder / "empty").mkdir()
    (folder / "empty" / "notes.txt").write_text("no image")
    (folder / "few").mkdir()
    for name in ("1_0001.png", "1_0011.png", "3_0003.png"):
        shutil.copy(digits_dir / name, folder / "few")
    np.savez(folder / "base.npz", np.zeros((2, 4, 4, 1), np.uint8), np.array([1, 2]))
    np.savez(folder / "unlabelled.npz", np.zeros((2, 4, 4, 1), np.uint8))
    np.savez(folder / "large.npz", np.zeros((2, 8, 8, 1), np.uint8), np.array([1, 2]))
    np.savez(folder / "none.npz", np.zeros((0, 4, 4, 1), np.uint8), np.zeros(0, int))
    np.savez(folder / "few.npz", np.zeros((3, 4, 4, 1), np.uint8), np.array([1, 2]))
    np.savez(folder / "classes.npz", np.zeros((2, 4, 4, 1), np.uint8), np.array([1, 12]))
    return folder


@pytest.fixture(scope="module")
def upsampler(workplace, digits_dir, run_script):
    """A class-conditional super-resolution model in the workplace."""
    flags = {**TINY_SUPER_RES, "data_dir": digits_dir, "class_cond": True, "batch_size": 4}
    flags |= {"lr_anneal_steps": 1, "log_dir": "upsampler", "ema_rate": 0.5}
    succeed(run_script("super_res_train", flags, cwd=workplace))
    return workplace / "upsampler"


def listing(folder):
    """What lies in a folder and when it was last written."""
    return {
        path: (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() or not any(path.iterdir())
    }


@pytest.fixture
def refused(workplace, run_script):
    """Run a script that must end in one line and leave nothing; the line."""

    def run(name, *parts, start=run_script, env=None, **flags):
        before = listing(workplace)
        done = start(name, *parts, cwd=workplace, env=env, **flags)
        after = listing(workplace)
        for path in after.keys() - before.keys():  # keep a failure from spreading
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.rmtree(workplace / "out", ignore_errors=True)
        line = error_of(done)
        assert after == before
        return line

    return run


@pytest.fixture
def train(refused, digits_dir):
    def run(*parts, script="image_train", sizes=TINY, **flags):
        own = {**sizes, "data_dir": digits_dir, "log_dir": "out", "lr_anneal_steps": 1}
        return refused(script, own, *parts, **flags)

    return run


@pytest.fixture
def sample(refused):
    def run(*parts, model_path="run/ema_0.9_000008.pt", **flags):
        own = {"model_path": model_path, "log_dir": "out", "num_samples": 2}
        return refused("image_sample", own, *parts, **flags)

    return run


@pytest.fixture
def evaluate(refused, digits_dir):
    def run(*parts, **flags):
        own = {"model_path": "run/model000008.pt", "data_dir": digits_dir, "log_dir": "out"}
        return refused("image_nll", {**own, "num_samples": 2}, *parts, **flags)

    return run


@pytest.fixture
def upsample(refused, upsampler):
    def run(*parts, base_samples="base.npz", **flags):
        own = {"model_path": "upsampler/model000000.pt", "log_dir": "out"}
        return refused("super_res_sample", own, {"base_samples": base_samples}, *parts, **flags)

    return run


def assert_names(line, *words):
    for word in words:
        assert word in line, line


# -- each kind of error once by a Python of its own


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        ("image_train", {}, ["--data_dir is missing"]),
        ("image_sample", {"model_path": "bad/pickle.pt"}, ["bad/pickle.pt"]),
        ("image_nll", {"model_pth": "x"}, ["--model_pth", "did you mean --model_path?"]),
        ("super_res_sample", {"eta": 2}, ["--eta"]),
    ],
)
def test_mistake_in_a_process_of_its_own(refused, script, flags, words):
    assert_names(refused(script, {"log_dir": "out"}, flags, start=start_script), *words)


def test_default_run_folder_is_not_made_either(refused, workplace):
    refused("image_train", TINY, data_dir="empty")
    refused("image_train", TINY, data_dir="empty", env={"OPENAI_LOGDIR": "out"})
    assert not (workplace / "runs").exists()


# -- data


@pytest.mark.parametrize("script", ["image_train", "super_res_train"])
def test_missing_data_dir(refused, script):
    assert_names(refused(script, {"log_dir": "out"}), "--data_dir is missing")


@pytest.mark.parametrize("data_dir", ["", "no/such/folder", "empty", "base.npz", "empty/notes.txt"])
def test_data_dir_without_images(train, evaluate, data_dir):
    for line in (train(data_dir=data_dir), evaluate(data_dir=data_dir)):
        assert_names(line, "--data_dir", data_dir)


def test_fewer_images_than_a_batch(train):
    assert_names(train(batch_size=61), "60 images", "batch of 61", "--batch_size")


def test_more_classes_than_the_model(train):
    line = train(class_cond=True, num_classes=9)
    assert_names(line, "10 classes", "--num_classes 9")


def test_every_image_a_class_of_its_own(train, workplace):
    """Names without classes, read as if they had them."""
    names = [f"{i}.png" for i in range(3)]
    (workplace / "nameless").mkdir()
    for name in names:
        shutil.copy(workplace / "few" / "1_0001.png", workplace / "nameless" / name)
    line = train(data_dir="nameless", class_cond=True)
    assert_names(line, "--class_cond True", "3 images", "--labels_from folder")


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("script", ["image_train", "image_nll"])
def test_broken_image_is_named(run_script, trained, digits_dir, tmp_path, script, num_workers):
    """It is found when it is its turn: then the run folder exists already."""
    shutil.copytree(digits_dir, tmp_path / "data")
    broken = tmp_path / "data" / "0_0000.png"
    broken.write_bytes(broken.read_bytes()[:60])
    flags = {"data_dir": "data", "log_dir": "out", "num_workers": num_workers}
    if script == "image_train":
        flags |= {**TINY, "batch_size": 60, "lr_anneal_steps": 1}
    else:
        flags |= {"model_path": trained.path, "batch_size": 2, "timestep_respacing": 1}
    done = run_script(script, flags, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    *progress, line = filter(None, done.stderr.splitlines())
    assert line.startswith("error: '")
    assert "data/0_0000.png' cannot be read as an image: " in line
    assert all("image/s" in text for text in progress)
    assert progress == [] or script == "image_nll"
    assert not list((tmp_path / "out").glob("*.pt")) + list((tmp_path / "out").glob("*.npz"))


def test_data_of_other_classes_than_the_runs(train):
    line = train(data_dir="few", log_dir="run", class_cond=True, lr_anneal_steps=20)
    assert_names(line, "2 classes", "10", "0, 2, 4")


# -- flags


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        # cannot be read
        ("batch_size", "many", ["'many'"]),
        ("batch_size", "1.5", ["'1.5'"]),
        ("lr", "fast", ["'fast'"]),
        ("class_cond", "maybe", ["'maybe'", "True or False"]),
        ("image_size", "8y8", ["'8y8'", "48x64"]),
        ("image_size", "8x8x8", ["'8x8x8'"]),
        ("ema_rate", "0.9,high", ["0.9,high"]),
        ("attention_resolutions", "4,big", ["4,big"]),
        ("channel_mult", "1;2", ["1;2"]),
        # out of range
        ("lr", "0", ["above 0"]),
        ("lr", "nan", []),
        ("lr", "inf", []),
        ("weight_decay", "-1", []),
        ("batch_size", "0", ["at least 1"]),
        ("microbatch", "0", ["-1"]),
        ("log_interval", "0", []),
        ("save_interval", "0", []),
        ("lr_anneal_steps", "-1", []),
        ("ema_rate", "1", ["(0, 1)"]),
        ("ema_rate", "", ["(0, 1)"]),
        ("num_workers", "-1", []),
        ("seed", "-1", []),
        ("dropout", "1", ["[0, 1)"]),
        ("image_size", "0", []),
        ("num_channels", "0", []),
        ("num_res_blocks", "0", []),
        ("channels", "0", []),
        ("diffusion_steps", "0", []),
        ("num_heads_upsample", "0", ["-1"]),
        ("log_dir", "gs://bucket/x", ["$DIFFUSION_BLOB_LOGDIR"]),
        # no such choice
        ("schedule_sampler", "best", ["uniform", "loss-second-moment", "stratified"]),
        ("betas", "no/such/file.npy", ["no such file"]),
        ("betas", "0.1,1.5", ["number 1", "(0, 1]"]),
        ("betas", "0.1,1,0.1", ["does not fall at step 2"]),
        ("labels_from", "disk", ["filename", "folder"]),
    ],
)
def test_wrong_value_names_flag_and_value(train, flag, value, words):
    assert_names(train({flag: value}), f"--{flag}", value, *words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"noise_schedule": "wavy"}, ["'wavy'", "linear", "cosine"]),
        ({"noise_schedule": "linear", "diffusion_steps": 20}, ["linear", "21", "20", "cosine"]),
        ({"noise_schedule": "linear", "betas": "0.1,0.2"}, ["--betas", "2", "30"]),
        ({"betas": "0.1"}, ["--betas", "--noise_schedule cosine"]),
        ({"predict": "x"}, ["--predict x", "eps, xstart, v, flow"]),
        ({"predict": "v", "predict_xstart": True}, ["--predict v", "--predict_xstart True"]),
        ({"predict": "flow"}, ["--predict flow", "--noise_schedule cosine"]),
        ({"zero_terminal_snr": True}, ["--zero_terminal_snr True", "--predict xstart", "flow"]),
        ({"noise_schedule": "linear_path"}, ["linear_path", "--predict xstart", "v"]),
        ({"loss_weight": "snrs"}, ["--loss_weight snrs", "min_snr"]),
        ({"loss_weight": "snr", "use_kl": True}, ["--loss_weight snr", "--use_kl True"]),
        (
            {"noise_schedule": "linear", "betas": ",".join(["0.999"] * 30), "loss_weight": "edm"},
            ["--loss_weight edm is infinite", "eps", "choose one of none, min_snr, snr"],
        ),
        ({"image_size": 9}, ["--image_size 9", "8 and 10"]),
        ({"image_size": "8x9"}, ["--image_size 8x9", "8 and 8x10"]),
        ({"num_channels": 40}, ["num_channels", "40", "32", "64"]),
        ({"num_heads": 5}, ["num_heads 5", "64", "4"]),
        ({"channels": 5}, ["--channels 5"]),
        ({"timestep_respacing": "ddim29"}, ["ddim29", "ddim15 and ddim30"]),
        ({"timestep_respacing": "31"}, ["31", "30"]),
        ({"timestep_respacing": "often"}, ["'often'"]),
    ],
)
def test_impossible_model_or_process_says_what_is_possible(train, flags, words):
    assert_names(train(flags), *words)


def test_impossible_sizes_of_super_resolution(train):
    line = train(script="super_res_train", sizes=TINY_SUPER_RES, large_size=9)
    assert_names(line, "--large_size 9", "8 and 10")


def test_a_warning_does_not_come_before_the_error(train):
    """The default levels of attention are none of a small model's, which is warned of."""
    assert_names(train(attention_resolutions="16,8", num_heads=3), "num_heads 3")


@pytest.mark.parametrize(
    "script",
    ["image_train", "image_sample", "image_nll", "super_res_train", "super_res_sample"],
)
def test_unknown_flag_names_the_nearest(refused, script):
    assert_names(refused(script, "--num_chanels", "32"), "--num_chanels", "--num_channels?")
    assert_names(refused(script, "stray"), "stray")
    assert_names(refused(script, "--seed"), "--seed")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"num_samples": 0}, ["--num_samples 0"]),
        ({"batch_size": 0}, ["--batch_size 0"]),
        ({"eta": 0.5}, ["--eta 0.5", "--use_ddim True"]),
        ({"eta": 1.5, "use_ddim": True}, ["--eta 1.5", "[0, 1]"]),
        ({"clip_denoised": "2"}, ["--clip_denoised", "'2'"]),
        ({"classes": "3,10"}, ["--classes 10", "0 ... 9"]),
        ({"classes": "seven"}, ["--classes seven", "0 ... 9"]),
        ({"classes": "-1"}, ["--classes -1", "0 ... 9"]),
        ({"timestep_respacing": "ddim29"}, ["ddim29", "ddim15 and ddim30"]),
        ({"timestep_respacing": "ddim0"}, ["ddim0", "ddim2"]),
        ({"timestep_respacing": "10,20,0"}, ["20", "10"]),
        ({"timestep_respacing": "0"}, ["keeps no timestep"]),
    ],
)
def test_impossible_sampling_says_what_is_possible(sample, flags, words):
    assert_names(sample(flags), *words)


@pytest.mark.parametrize("flags", [{"num_samples": 0}, {"batch_size": -3}])
def test_impossible_evaluation(evaluate, flags):
    ((name, value),) = flags.items()
    assert_names(evaluate(flags), f"--{name} {value}")


def test_run_folder_that_is_a_file(train, sample):
    for line in (train(log_dir="base.npz"), sample(log_dir="base.npz/x")):
        assert_names(line, "base.npz")


# -- flags against those of the checkpoint


@pytest.mark.parametrize(
    ("flag", "value", "theirs"),
    [
        ("image_size", 16, 8),
        ("num_channels", 64, 32),
        ("class_cond", False, True),
        ("learn_sigma", True, False),
        ("noise_schedule", "linear", "cosine"),
        ("predict", "v", "eps"),
        ("zero_terminal_snr", True, False),
        ("diffusion_steps", 1000, 30),
        ("num_classes", 5, 10),
    ],
)
def test_flag_that_contradicts_the_checkpoint_names_both_values(
    train, sample, evaluate, flag, value, theirs
):
    both = [f"--{flag} {value}", f"--{flag} {theirs}"]
    assert_names(sample({flag: value}), *both, "run/config.json")
    assert_names(evaluate({flag: value}), *both)
    assert_names(train({"log_dir": "run", "lr_anneal_steps": 20, flag: value}), *both)


def test_damaged_flags_are_named(train, sample):
    assert_names(sample(model_path="damaged/model000008.pt"), "damaged/config.json")
    assert_names(train(log_dir="damaged"), "damaged/config.json")


# -- checkpoints


@pytest.mark.parametrize("script", ["image_sample", "image_nll", "super_res_sample"])
def test_checkpoint_that_is_not_given(refused, script):
    flags = {"data_dir": "few"} if script == "image_nll" else {}
    flags = {"base_samples": "base.npz"} if script == "super_res_sample" else flags
    assert_names(refused(script, flags, log_dir="out"), "--model_path is missing")


@pytest.mark.parametrize("path", ["run/model000009.pt", "gone.pt", "no/folder/x.pt"])
def test_checkpoint_that_does_not_exist(sample, evaluate, path):
    for line in (sample(model_path=path), evaluate(model_path=path)):
        assert_names(line, f"'{path}'", "does not exist")


@pytest.mark.parametrize("path", ["run", "run/"])
def test_folder_in_place_of_a_checkpoint(sample, evaluate, path):
    for line in (sample(model_path=path), evaluate(model_path=path)):
        assert_names(line, f"--model_path {path} is a folder", "run/ema_0.9_000008.pt")


@pytest.mark.parametrize("name", ["code", "object", "old"])
def test_checkpoint_with_an_object_is_refused_for_that(sample, workplace, name):
    assert_names(sample(model_path=f"bad/{name}.pt"), f"bad/{name}.pt", "tensors")
    assert not (workplace / "code_was_run").exists()


def test_plain_pickle_is_refused_unread(sample, workplace):
    assert_names(sample(model_path="bad/pickle.pt"), "bad/pickle.pt")
    assert not (workplace / "code_was_run").exists()


@pytest.mark.parametrize("name", ["half", "start", "empty", "text"])
def test_truncated_checkpoint_is_damaged(sample, name):
    assert_names(sample(model_path=f"bad/{name}.pt"), f"bad/{name}.pt", "damaged")


@pytest.mark.parametrize(("name", "words"), [("list", ["state dict"]), ("less", ["out.2.bias"])])
def test_checkpoint_of_another_content(sample, name, words):
    assert_names(sample(model_path=f"bad/{name}.pt"), f"bad/{name}.pt", *words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"num_res_blocks": 2}, ["--num_res_blocks 2 here, 1 in the checkpoint"]),
        ({"class_cond": False}, ["--class_cond False here, True in the checkpoint"]),
        ({"num_classes": 5}, ["--num_classes", "5 here, 10 in the checkpoint"]),
        ({"channels": 3}, ["--channels", "3 here, 1 in the checkpoint"]),
        ({"learn_sigma": True}, ["--learn_sigma", "2 here, 1 in the checkpoint"]),
        ({"num_channels": 64}, ["--num_channels 64 here, 32 in the checkpoint"]),
        ({"attention_resolutions": "8,4"}, ["--attention_resolutions"]),
        ({"use_scale_shift_norm": False}, ["--use_scale_shift_norm False here, True in"]),
    ],
)
def test_checkpoint_that_does_not_fit_names_the_flag(sample, flags, words):
    """Without stored flags the shapes tell."""
    by_hand = {**TINY, "class_cond": True, "num_classes": 10, **flags}
    line = sample(by_hand, model_path="bare/model000008.pt")
    assert_names(line, "bare/model000008.pt", *words)


def test_checkpoint_of_another_script(sample, evaluate, upsample, upsampler):
    path = "upsampler/model000000.pt"
    assert_names(sample(model_path=path), path)
    assert_names(evaluate(model_path=path), path)
    assert_names(upsample(model_path="run/model000008.pt"), "run/model000008.pt")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("gone/model000001.pt", ["does not exist"]),
        ("run/model000009.pt", ["does not exist"]),
        ("bad/opt000008.pt", ["model000008.pt is missing"]),
        ("bad", ["bad", "holds no checkpoint"]),
        ("cut/model000008.pt", ["incomplete", "checkpoint000008.json"]),
        ("cut/opt000008.pt", ["incomplete", "checkpoint000008.json"]),
        ("broken/model000008.pt", ["ema_0.9_000008.pt is damaged"]),
        ("broken", ["no whole checkpoint", "ema_0.9_000008.pt is damaged"]),
        ("bad/half.pt", ["damaged"]),
        ("bad/object.pt", ["tensors"]),
        ("bare/model000008.pt", ["--class_cond False here, True in the checkpoint"]),
    ],
)
def test_checkpoint_that_cannot_be_resumed_leaves_no_run_folder(train, path, words):
    assert_names(train(resume_checkpoint=path), path, *words)


def test_run_whose_only_checkpoint_is_damaged_is_left_alone(train):
    assert_names(train(log_dir="broken", class_cond=True), "broken", "ema_0.9_000008.pt is damaged")


def test_checkpoint_of_another_run_does_not_replace_that_of_the_run_folder(train):
    line = train(log_dir="whole", resume_checkpoint="run/model000008.pt", class_cond=True)
    assert_names(line, "--resume_checkpoint run/model000008.pt", "another run", "--log_dir")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"train_steps": 3, "train_images": 7}, ["--train_steps 3", "--train_images 7"]),
        ({"train_steps": 3}, ["--train_steps 3", "--lr_anneal_steps 1"]),
        ({"precision": "fp8"}, ["--precision", "fp8", "bf16"]),
        ({"precision": "bf16", "use_fp16": True}, ["--precision bf16", "--use_fp16 True"]),
        ({"lr_schedule": "square"}, ["--lr_schedule", "square", "cosine"]),
        ({"lr_schedule": "cosine", "lr_anneal_steps": 0}, ["--lr_schedule cosine", "end"]),
        ({"lr_schedule": "inverse_sqrt"}, ["--lr_warmup_steps"]),
        ({"keep_every": 2}, ["--keep_every 2", "--keep_checkpoints"]),
        ({"posthoc_ema": "0.9"}, ["--posthoc_ema"]),
        ({"val_data_dir": "empty"}, ["--val_data_dir", "empty", "no images"]),
        ({"val_data_dir": "gone"}, ["--val_data_dir", "gone", "no folder"]),
        ({"val_fraction": 1.0}, ["--val_fraction 1"]),
        ({"val_fraction": 0.5, "val_data_dir": "few"}, ["--val_fraction 0.5", "--val_data_dir"]),
        ({"train_hours": -1}, ["--train_hours -1"]),
        ({"grad_clip": -1}, ["--grad_clip -1"]),
        ({"save_minutes": "nan"}, ["--save_minutes"]),
    ],
)
def test_contradicting_training_says_what_is_wrong(train, flags, words):
    assert_names(train(flags), *words)


# -- what to upsample


@pytest.mark.parametrize(
    ("base_samples", "words"),
    [
        ("", ["is missing"]),
        ("gone.npz", ["gone.npz", "does not exist"]),
        ("gone", ["gone", "does not exist"]),
        ("large.npz", ["[2, 8, 8, 1]", "[N, 4, 4, 1]", "--small_size 4"]),
        ("unlabelled.npz", ["arr_1", "--classes"]),
        ("few.npz", ["few.npz", "3", "2"]),
        ("none.npz", ["none.npz"]),
        ("classes.npz", ["classes.npz", "12", "10"]),
        ("empty", ["empty", "no images"]),
        ("few/1_0001.png", ["1_0001.png", "--classes"]),
        ("empty/notes.txt", ["empty/notes.txt"]),
    ],
)
def test_base_samples_that_cannot_be_upsampled(upsample, base_samples, words):
    line = upsample(base_samples=base_samples, num_samples=3)
    assert_names(line, *words)


def test_flags_of_the_checkpoint_are_left_as_they_were(workplace, trained, sample):
    """None of all this has touched the run; last in the file."""
    ours = json.loads((workplace / "run" / "config.json").read_text())
    assert ours == json.loads((trained.folder / "config.json").read_text())
    assert Image.open(workplace / "few" / "1_0001.png").size == (8, 8)


@pytest.mark.parametrize("named", [True, False])
def test_a_failed_start_leaves_a_run_alone(tmp_path, trained, digits_dir, run_script, named):
    run = tmp_path / "run"
    shutil.copytree(trained.folder, run)
    shutil.copy(trained.path, tmp_path / "lone.pt")
    before = tree(run)
    flags = {**TINY, "data_dir": digits_dir, "log_dir": "run"}
    flags |= {"class_cond": True, "num_channels": 64, "batch_size": 8}
    flags |= {"resume_checkpoint": "lone.pt"} if named else {}
    line = error_of(run_script("image_train", flags, cwd=tmp_path))
    assert_names(line, "--resume_checkpoint lone.pt" if named else "--num_channels 64")
    assert tree(run) == before


def test_a_failed_start_from_elsewhere_makes_no_run(tmp_path, trained, digits_dir, run_script):
    """The flags of the checkpoint are not known, and what is given does not fit it."""
    shutil.copy(trained.path, tmp_path / "lone.pt")
    flags = {**TINY, "data_dir": digits_dir, "log_dir": "run", "resume_checkpoint": "lone.pt"}
    flags |= {"class_cond": True, "num_channels": 64, "batch_size": 8}
    line = error_of(run_script("image_train", flags, cwd=tmp_path))
    assert_names(line, "lone.pt", "--num_channels 64")
    assert not (tmp_path / "run").exists()


# -- several processes ------------------------------------------------------------------------


def train_by_hand(cwd, digits_dir, *own):
    """image_train.py on a process for each of ``own``, which are flags of its own."""
    words = command_line(TINY, {"data_dir": digits_dir, "train_steps": 1, "log_dir": "run"})
    ranks = [(rank, command_line(flags)) for rank, flags in enumerate(own)]
    script, env = script_path("image_train"), script_environment()
    started = start_by_hand(
        script, *words, ranks=ranks, processes=len(own), cwd=cwd, env={**env, "PYTHONPATH": ""}
    )
    return ends(started, timeout=90)


@pytest.mark.parametrize(
    ("own", "line"),
    [
        (
            [{"lr": 0.2, "seed": 1}, {"lr": 0.1}],
            "process 1 was started with --lr 0.1 --seed 0, process 0 with --lr 0.2 --seed 1: give "
            "all the same flags",
        ),
        pytest.param(
            [{}, {}, {"log_dir": "elsewhere"}],
            "process 2 was started with --log_dir elsewhere, process 0 with --log_dir run: give "
            "all the same flags",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_process_with_other_flags_ends_all_with_one_line(tmp_path, digits_dir, own, line):
    for done in train_by_hand(tmp_path, digits_dir, *own):
        assert error_of(done) == line
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "line", "word"),
    [
        ({"lr": -1}, "--lr -1.0: must be above 0", "error: --lr -1.0: must be above 0"),
        ({"lrr": 1}, "unrecognized arguments: --lrr 1 (did you mean --lr?)", "exit code 2"),
    ],
)
def test_a_process_with_a_wrong_flag_ends_all_with_one_line(
    tmp_path, digits_dir, wrong, line, word
):
    first, second = train_by_hand(tmp_path, digits_dir, {}, wrong)
    assert error_of(second) == line
    assert f") ended with: {word}" in error_of(first)
    assert error_of(first).startswith("process 1 of 2 (host ")
    assert not list(tmp_path.iterdir())
