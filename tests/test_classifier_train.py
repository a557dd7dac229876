"""classifier_train.py: what it writes, goes on from, takes from a diffusion model and refuses."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from launchers import start
from script_runner import (
    command_line,
    error_of,
    names,
    script_environment,
    script_path,
    start_script,
    succeed,
    tree,
    write_digits,
)

from improved_diffusion import stored_flags
from improved_diffusion.classifier_options import ClassifierOptions
from improved_diffusion.flags import pick

SCRIPT = "classifier_train"
TINY = {
    "image_size": 8,
    "channels": 1,
    "diffusion_steps": 30,
    "noise_schedule": "cosine",
    "classifier_width": 32,
    "classifier_depth": 1,
    "classifier_attention_resolutions": 4,
}
OF_THE_DIFFUSION_MODEL = ("image_size", "channels", "diffusion_steps", "noise_schedule")
NETWORK = {name: TINY[name] for name in TINY if name not in OF_THE_DIFFUSION_MODEL}
FLAGS = {
    **TINY,
    "log_dir": "run",
    "classifier_dropout": 0.1,
    "batch_size": 6,
    "lr": 1e-3,
    "ema_rate": 0.9,
    "iterations": 8,
    "anneal_lr": True,
    "log_interval": 2,
    "save_interval": 4,
    "val_fraction": 0.2,
    "eval_interval": 4,
    "random_flip": True,
    "random_crop": True,
    "microbatch": 4,
}
WEIGHTS = ("ema_0.9_000008.pt", "model000008.pt", "opt000008.pt")


def config(folder):
    return json.loads((Path(folder) / "config.json").read_text())


def rows(folder):
    with open(folder / "progress.csv", newline="") as file:
        return list(csv.DictReader(file))


def unlike(folder, other, file_names):
    """Which of the files differ between two folders."""
    return [n for n in file_names if (folder / n).read_bytes() != (other / n).read_bytes()]


@pytest.fixture(scope="module")
def run(tmp_path_factory, digits_dir, run_script):
    """The folder of a run of 8 steps that nothing disturbed; do not write to it."""
    folder = tmp_path_factory.mktemp("classifier").resolve()
    succeed(run_script(SCRIPT, FLAGS, data_dir=digits_dir, cwd=folder))
    return folder / "run"


@pytest.fixture
def train(tmp_path, digits_dir, run_script):
    """Train in ``tmp_path``/run by some flags; the folder."""

    def train(*parts, env=None, **flags):
        flags = {"log_dir": "run", "data_dir": digits_dir, "iterations": 2, **flags}
        succeed(run_script(SCRIPT, *parts, cwd=tmp_path, env=env, **flags))
        return tmp_path / "run"

    return train


# -- what is written


def test_files_are_those_of_every_training(run):
    kinds = ("checkpoint{}.json", "ema_0.9_{}.pt", "model{}.pt", "opt{}.pt", "state{}.pt")
    files = {kind.format(f"{step:06d}") for kind in kinds for step in (0, 4, 8)}
    assert set(names(run)) == files | {"config.json", "log.txt", "progress.csv", "progress.json"}


def test_log_has_loss_and_accuracies_by_quarter(run):
    *_, row = rows(run)
    terms = {"loss", "acc@1", "acc@5"}
    quarters = {f"{term}_q{quarter}" for term in terms for quarter in range(4)}
    measured = {f"{prefix}{name}" for prefix in ("val_", "val_ema_") for name in terms | quarters}
    assert set(row) == terms | quarters | measured | {"grad_norm", "step", "samples"}
    measured_at = [row["step"] for row in rows(run) if row["val_loss"]]
    assert measured_at == ["4"]  # of the steps 0 ... 7
    assert 0 <= float(rows(run)[2]["val_acc@1"]) <= float(rows(run)[2]["val_acc@5"]) <= 1


def test_flags_are_stored_with_the_classes(run, digits_dir):
    stored = config(run)
    assert stored["class_names"] == list("0123456789")
    assert stored["num_classes"] == 10
    assert stored["classifier_for"] == ""
    assert stored["noised"] is True
    assert {name: stored[name] for name in TINY} == {
        **TINY,
        "classifier_attention_resolutions": "4",
    }


def test_checkpoint_is_that_of_the_network_of_the_flags(run):
    model = pick(ClassifierOptions, config(run)).model()
    for name in WEIGHTS[:2]:
        model.load_state_dict(torch.load(run / name, weights_only=True))
    assert model(torch.zeros(2, 1, 8, 8), torch.zeros(2)).shape == (2, 10)


# -- stopping and going on


def test_run_that_was_stopped_ends_as_one_that_was_not(run, tmp_path, digits_dir, run_script):
    """Bit for bit: weights, average, optimiser and the log."""
    stop = {"DIFFUSION_TRAINING_TEST": "1"}
    for env in (stop, None):
        succeed(run_script(SCRIPT, FLAGS, data_dir=digits_dir, cwd=tmp_path, env=env))
        assert (tmp_path / "run" / "model000008.pt").exists() == (env is None)
    assert not unlike(tmp_path / "run", run, (*WEIGHTS, "progress.csv", "progress.json"))


def test_microbatches_change_nothing(train, tmp_path):
    """Without dropout, which is drawn for each microbatch."""
    weights = []
    for folder, microbatch in (("parts", 4), ("whole", -1)):
        own = {"log_dir": folder, "microbatch": microbatch, "classifier_dropout": 0}
        train(FLAGS, **own, iterations=1)
        state = torch.load(tmp_path / folder / "opt000000.pt", weights_only=True)["state"]
        weights.append(torch.cat([entry["exp_avg"].flatten() for entry in state.values()]))
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-6)
    assert weights[0].abs().max() > 1e-3


def test_network_that_is_gone_on_with_keeps_its_flags(run, tmp_path, digits_dir, run_script):
    """Another size of it is refused, naming both."""
    shutil.copytree(run, tmp_path / "run")
    flags = {"data_dir": digits_dir, "log_dir": "run"}
    before = tree(tmp_path)
    done = run_script(SCRIPT, flags, classifier_width=64, classifier_pool="spatial", cwd=tmp_path)
    message = error_of(done)
    for word in ("--classifier_width 64", "--classifier_width 32", "--classifier_pool attention"):
        assert word in message
    assert tree(tmp_path) == before


# -- command lines of guided-diffusion

GUIDED = {
    "iterations": 2,
    "anneal_lr": True,
    "lr": 3e-4,
    "save_interval": 10000,
    "weight_decay": 0.05,
    "image_size": 16,
    "classifier_attention_resolutions": "8,4",
    "classifier_depth": 1,
    "classifier_width": 32,
    "classifier_pool": "attention",
    "classifier_resblock_updown": True,
    "classifier_use_scale_shift_norm": True,
    "learn_sigma": True,
    "use_kl": True,
    "predict_xstart": True,
    "rescale_timesteps": False,
    "rescale_learned_sigmas": False,
}


def test_guided_diffusions_command_line_trains(train):
    folder = train(GUIDED, batch_size=2)
    stored = config(folder)
    assert (stored["train_steps"], stored["lr_schedule"]) == (2, "linear")
    assert "--learn_sigma True and --use_kl True: without effect" in (
        (folder / "log.txt").read_text()
    )
    assert torch.load(folder / "opt000002.pt")["param_groups"][0]["lr"] == 3e-4 / 2  # (1 - 1/2)


def test_clean_images_have_one_timestep(train):
    options = {"noised": False, "val_fraction": 0.2, "eval_interval": 1, "log_interval": 1}
    columns = rows(train(TINY, **options))[-1].keys()
    assert {"loss_q0", "val_acc@1_q0"} <= columns
    assert not {"loss_q1", "loss_q3", "val_loss_q2"} & columns


@pytest.mark.parametrize(
    ("interval", "told"), [(1, "no multiple of --log_interval 2"), (2, ""), (4, "the run ends")]
)
def test_measurements_that_no_row_of_the_log_would_hold_are_warned_of(
    tmp_path, digits_dir, run_script, interval, told
):
    flags = {**NETWORK, **TINY, "data_dir": digits_dir, "log_dir": "run", "val_fraction": 0.2}
    flags |= {"iterations": 4, "log_interval": 2, "eval_interval": interval, "batch_size": 4}
    done = succeed(run_script(SCRIPT, flags, cwd=tmp_path))
    warnings = [line for line in done.stdout.splitlines() if line.startswith("--val_interval")]
    assert len(warnings) == bool(told), done.stdout
    assert not told or told in warnings[0]


def test_half_precision_is_that_of_every_training(train):
    folder = train(TINY, classifier_use_fp16=True)
    stored = config(folder)
    assert stored["use_fp16"] is stored["classifier_use_fp16"] is True
    assert "lg_loss_scale" in rows(folder)[0]
    state = torch.load(folder / "model000002.pt", weights_only=True)
    assert {value.dtype for value in state.values()} == {torch.float32}


# -- for a diffusion model


@pytest.fixture
def diffusion_run(tmp_path, trained):
    """A class-conditional diffusion model's run, which a test may change."""
    folder = tmp_path / "diffusion"
    folder.mkdir()
    for name in ("config.json", "model000008.pt", "ema_0.9_000008.pt"):
        shutil.copy(trained.folder / name, folder)
    return folder


def rewrite(folder, **flags):
    """Change the flags that are stored in a folder."""
    stored_flags.save_config(str(folder), {**config(folder), **flags}, "config.json")


def test_classifier_takes_what_the_diffusion_model_has_settled(train, diffusion_run):
    """And goes on without it."""
    flags = {**NETWORK, "classifier_for": diffusion_run / "ema_0.9_000008.pt"}
    stored, theirs = config(train(flags)), config(diffusion_run)
    same = (*OF_THE_DIFFUSION_MODEL, "value_range", "num_classes", "class_names")
    assert {name: stored[name] for name in same} == {name: theirs[name] for name in same}
    assert stored["classifier_for"] == str(flags["classifier_for"])
    shutil.rmtree(diffusion_run)
    folder = train(flags, iterations=3)
    assert (folder / "model000003.pt").exists()
    assert config(folder) == {**stored, "iterations": 3, "train_steps": 3}


# -- what is refused


@pytest.fixture
def refused(tmp_path, digits_dir, run_script):
    """Run by flags that must end in one line and leave nothing; the line."""

    def run(*parts, start=run_script, **flags):
        before = tree(tmp_path)
        flags = {"log_dir": "out", "data_dir": digits_dir, "iterations": 1, **flags}
        line = error_of(start(SCRIPT, *parts, cwd=tmp_path, **flags))
        assert tree(tmp_path) == before
        return line

    return run


def test_flag_that_contradicts_the_diffusion_model_is_named(refused, diffusion_run):
    message = refused(NETWORK, noise_schedule="linear", classifier_for=diffusion_run)
    for word in ("--noise_schedule linear", "--noise_schedule cosine", "leave the flag out"):
        assert word in message


def test_checkpoint_of_a_classifier_is_no_diffusion_model(refused, run):
    message = refused(NETWORK, classifier_for=run / "model000008.pt")
    assert "model000008.pt is a classifier" in message


def test_classes_that_are_not_the_diffusion_models_are_named(refused, diffusion_run):
    rewrite(diffusion_run, num_classes=11, class_names=[*"0123456789", "x"])
    assert "only in the checkpoint: x" in refused(NETWORK, classifier_for=diffusion_run)


def test_run_does_not_go_on_for_another_diffusion_model(refused, train, diffusion_run, tmp_path):
    train(NETWORK, classifier_for=diffusion_run)
    other = tmp_path / "other"
    shutil.copytree(diffusion_run, other)
    rewrite(other, diffusion_steps=50)
    message = refused(NETWORK, classifier_for=other, log_dir="run")
    for word in ("--diffusion_steps 30", "--diffusion_steps 50", str(other), "--log_dir"):
        assert word in message
    assert "leave the flag" not in message  # none was given


def test_data_without_classes_are_refused(refused, tmp_path, digits_dir):
    pictures = sorted(digits_dir.iterdir())[:3]
    for folder in ("unnamed", "one"):
        (tmp_path / folder).mkdir()
    for i, path in enumerate(pictures):
        shutil.copy(path, tmp_path / "unnamed" / f"{i}.png")
        shutil.copy(path, tmp_path / "one" / f"cat_{i}.png")
    unnamed = refused(TINY, data_dir="unnamed")
    assert "each of the 3 images would be a class of its own" in unnamed
    assert "--labels_from folder" in unnamed
    assert "--class_cond" not in unnamed  # there is no such flag
    one = refused(TINY, data_dir="one")
    assert "has one class, cat" in one
    assert "--labels_from" in one


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"classifier_pool": "max"}, ["--classifier_pool max", "attention"]),
        ({"train_steps": 6}, ["--iterations 1", "--train_steps 6"]),
        ({"sample_interval": 1}, ["--sample_interval 1"]),
        ({"class_dropout": 0.1}, ["--class_dropout"]),
        ({"num_classes": 4}, ["10 classes", "--num_classes 4"]),
        ({"classifier_width": 40}, ["a level of 40 channels (--classifier_width 40)", "32"]),
        (
            {"classifier_width": 32, "classifier_attention_resolutions": 8},
            ["--classifier_num_head_channels 64", "32 channels", "num_head_channels 32"],
        ),
    ],
)
def test_mistakes_end_in_one_line_and_leave_nothing(refused, flags, words):
    message = refused(TINY, flags)
    for word in words:
        assert word in message


def test_diffusion_model_is_not_gone_on_with(refused, diffusion_run):
    rewrite(diffusion_run, class_cond=False, class_names=[], num_classes=0)
    message = refused(TINY, resume_checkpoint=diffusion_run / "model000008.pt")
    for word in ("model000008.pt", "not of a classifier", "--classifier_for"):
        assert word in message


# -- does it learn; on several processes


@pytest.fixture(scope="module")
def many_digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("many_digits"), 1797)


@pytest.mark.slow
def test_digits_are_told_apart_at_low_noise(tmp_path, many_digits):
    """Measured, with the averaged weights: 98%, 89%, 42% and 24% by quarter of the timesteps."""
    flags = {**TINY, "diffusion_steps": 1000, "batch_size": 32, "lr": 2e-3, "iterations": 201}
    flags |= {"val_fraction": 0.1, "val_interval": 200, "val_images": 180, "ema_rate": 0.95}
    succeed(start_script(SCRIPT, flags, data_dir=many_digits, log_dir="run", cwd=tmp_path))
    *_, row = rows(tmp_path / "run")
    accuracies = [float(row[f"val_ema_acc@1_q{quarter}"]) for quarter in range(4)]
    assert accuracies[0] > 0.8
    assert accuracies[0] > accuracies[2] > accuracies[3]
    assert float(row["val_ema_acc@5_q0"]) > 0.95


@pytest.mark.slow
def test_sharded_run_in_bfloat16_learns_from_all_processes(tmp_path, digits_dir, run_script):
    """The same gradients as one process on the whole batch, up to the precision."""
    flags = {**TINY, "data_dir": digits_dir, "iterations": 3, "save_interval": 100, "lr": 1e-3}
    flags |= {"val_fraction": 0.2, "val_interval": 2, "log_interval": 1, "ema_rate": 0.9}
    alone = {**flags, "batch_size": 8, "log_dir": "alone"}
    succeed(run_script(SCRIPT, alone, cwd=tmp_path))
    shared = {"batch_size": 4, "parallel": "fsdp", "precision": "bf16", "log_dir": "shared"}
    done = start(
        "torchrun",
        script_path(SCRIPT),
        *command_line(flags, shared),
        cwd=tmp_path,
        env=script_environment(),
    )
    succeed(done)
    assert (tmp_path / "shared" / "sharded000003").is_dir()
    assert "fully sharded: each process holds 1/2" in done.stdout
    ours, theirs = (rows(tmp_path / name) for name in ("shared", "alone"))
    for row, expected in zip(ours, theirs, strict=True):  # losses are those of the first process
        for name in ("grad_norm", "val_loss", "val_ema_loss"):
            if expected[name]:
                assert float(row[name]) == pytest.approx(float(expected[name]), rel=2e-2)
    assert ours[-1]["val_ema_loss"]
