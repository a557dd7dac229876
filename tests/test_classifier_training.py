"""What a classifier's training minimises, measures, and is told by its flags."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from script_runner import command_line, load_module

from improved_diffusion import dist_util, logger, runs, stored_flags
from improved_diffusion.classifier_options import ClassifierOptions
from improved_diffusion.classifier_training import ClassifierLoss, top_k_hits, training_flags
from improved_diffusion.errors import UserError
from improved_diffusion.flags import defaults, given_flags, pick
from improved_diffusion.gaussian_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
)
from improved_diffusion.process import create_gaussian_diffusion
from improved_diffusion.rng import sample_generators
from improved_diffusion.schedules import get_named_beta_schedule
from improved_diffusion.script_util import ModelAndDiffusionOptions
from improved_diffusion.train_util import log_loss_dict
from improved_diffusion.unet import EncoderUNetModel
from improved_diffusion.validation import Validation

STEPS = 40
CLASSES = 7


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setattr(dist_util, "dev", lambda: torch.device("cpu"))


def make_process(**changes):
    return create_gaussian_diffusion(**{"steps": STEPS, "noise_schedule": "cosine", **changes})


class Seen(torch.nn.Module):
    """Logits are a fixed function of image and timestep; keeps what it was given."""

    def __init__(self, classes=CLASSES):
        super().__init__()
        self.calls = []
        generator = torch.Generator().manual_seed(3)
        self.register_buffer("weight", torch.randn(classes, 16, generator=generator))

    def forward(self, x, t):
        self.calls.append((x, t))
        return x.flatten(1) @ self.weight.T + 0.01 * t.float().view(-1, 1) * self.weight[:, 0]


def make_images(count=6):
    return torch.rand(count, 1, 4, 4) * 2 - 1, torch.arange(count) % CLASSES


# -- the loss


def test_loss_is_the_cross_entropy_at_x_t():
    process, (x_start, y), model = make_process(), make_images(), Seen()
    t, noise = torch.tensor([0, 5, 11, 23, 38, 39]), torch.randn(6, 1, 4, 4)
    losses = ClassifierLoss(process).training_losses(model, x_start, t, {"y": y}, noise=noise)
    alpha_bar = torch.tensor(process.alphas_cumprod)[t].view(-1, 1, 1, 1).float()
    x_t = alpha_bar.sqrt() * x_start + (1 - alpha_bar).sqrt() * noise
    torch.testing.assert_close(model.calls[0][0], x_t)
    log_p = model(x_t, t).log_softmax(dim=1)
    torch.testing.assert_close(losses["loss"], -log_p[torch.arange(6), y])
    assert set(losses) == set(ClassifierLoss.terms) == {"loss", "acc@1", "acc@5"}
    assert all(values.shape == (6,) for values in losses.values())


def test_noise_is_drawn_if_none_is_given():
    (x_start, y), model = make_images(), Seen()
    loss, t = ClassifierLoss(make_process()), torch.full((6,), 20)
    for _ in range(2):
        loss.training_losses(model, x_start, t, {"y": y})
    (first, _), (second, _) = model.calls
    assert not torch.equal(first, second)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("respacing", ["", "10", "5,3"])
def test_timesteps_are_those_that_the_diffusion_model_sees(respacing, rescale):
    process = make_process(timestep_respacing=respacing, rescale_timesteps=rescale)
    seen_by_diffusion = []

    def keep(x, t):
        seen_by_diffusion.append(t)
        return x

    loss, (x_start, y), model = ClassifierLoss(process), make_images(), Seen()
    assert loss.num_timesteps == process.num_timesteps
    t = torch.tensor([0, 1, 2, 3, 4, process.num_timesteps - 1])
    process.training_losses(keep, x_start, t)
    loss.training_losses(model, x_start, t, {"y": y})
    assert torch.equal(model.calls[0][1], seen_by_diffusion[0])


def test_process_that_is_not_respaced_scales_timesteps_itself():
    process = GaussianDiffusion(
        betas=get_named_beta_schedule("cosine", STEPS),
        model_mean_type=ModelMeanType.EPSILON,
        model_var_type=ModelVarType.FIXED_LARGE,
        loss_type=LossType.MSE,
        rescale_timesteps=True,
    )
    (x_start, y), model = make_images(), Seen()
    ClassifierLoss(process).training_losses(model, x_start, torch.full((6,), 8), {"y": y})
    assert model.calls[0][1].tolist() == [200.0] * 6


def test_flow_is_classified_at_x_t_of_the_process():
    """As the gradient is taken with respect to it, not at the linear path's point."""
    process, (x_start, y), model = (
        make_process(predict="flow", noise_schedule="linear"),
        make_images(),
        Seen(),
    )
    t, noise = torch.full((6,), 25), torch.randn(6, 1, 4, 4)
    ClassifierLoss(process).training_losses(model, x_start, t, {"y": y}, noise=noise)
    torch.testing.assert_close(model.calls[0][0], process.q_sample(x_start, t, noise=noise))


def test_without_noise_images_are_seen_as_they_are_at_timestep_0():
    loss, (x_start, y), model = ClassifierLoss(make_process(), noised=False), make_images(), Seen()
    assert loss.num_timesteps == 1
    t = torch.zeros(6, dtype=torch.int64)
    losses = loss.training_losses(model, x_start, t, {"y": y}, noise=torch.randn(6, 1, 4, 4))
    assert torch.equal(model.calls[0][0], x_start)
    assert model.calls[0][1].tolist() == [0] * 6
    expected = F.cross_entropy(model(x_start, t), y, reduction="none")
    torch.testing.assert_close(losses["loss"], expected)


@pytest.mark.parametrize("kwargs", [None, {}, {"low_res": torch.zeros(6)}])
def test_images_without_labels_are_refused(kwargs):
    x_start, _ = make_images()
    with pytest.raises(UserError, match="labels y"):
        ClassifierLoss(make_process()).training_losses(
            Seen(), x_start, torch.zeros(6, dtype=torch.int64), kwargs
        )


@pytest.mark.parametrize("pool", ["adaptive", "attention", "spatial", "spatial_v2"])
def test_network_learns_from_every_pool(pool):
    """Each weight but those of the embedding of an unused path has a gradient."""
    model = EncoderUNetModel(
        8, 1, 32, CLASSES, 1, (2,), channel_mult=(1, 2), num_head_channels=32, pool=pool
    )
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.02 * torch.randn_like(param))
    x_start, y = torch.rand(6, 1, 8, 8) * 2 - 1, torch.arange(6) % CLASSES
    t = torch.arange(6) * 6
    losses = ClassifierLoss(make_process()).training_losses(model, x_start, t, {"y": y})
    losses["loss"].mean().backward()
    assert not losses["acc@1"].requires_grad
    assert all(param.grad is not None for param in model.parameters())


# -- accuracies


def test_top_k_hits_count_better_classes():
    logits = torch.tensor([[5.0, 4, 3, 2, 1, 0]] * 6)
    labels = torch.arange(6)
    assert top_k_hits(logits, labels, 1).tolist() == [1, 0, 0, 0, 0, 0]
    assert top_k_hits(logits, labels, 5).tolist() == [1, 1, 1, 1, 1, 0]


def test_fewer_classes_than_k_are_always_hit():
    assert top_k_hits(torch.randn(4, 3), torch.tensor([0, 1, 2, 0]), 5).tolist() == [1] * 4


def test_untrained_network_is_not_called_right():
    """Equal logits hit k of K classes, not all."""
    logits, labels = torch.zeros(CLASSES, CLASSES), torch.arange(CLASSES)
    assert top_k_hits(logits, labels, 1).sum() == 1
    assert top_k_hits(logits, labels, 5).sum() == 5


# -- in the log and on validation images


def test_log_has_all_terms_by_quarter(tmp_path, monkeypatch):
    monkeypatch.setattr(logger.Logger, "CURRENT", logger.Logger(str(tmp_path), []))
    t = torch.tensor([0, 12, 25, 39])
    losses = {"loss": torch.tensor([0.0, 1, 2, 3]), "acc@1": torch.tensor([1.0, 1, 0, 0])}
    log_loss_dict(ClassifierLoss(make_process()), t, losses)
    expected = {"loss": 1.5, "loss_q0": 0, "loss_q1": 1, "loss_q2": 2, "loss_q3": 3}
    expected |= {"acc@1": 0.5, "acc@1_q0": 1, "acc@1_q1": 1, "acc@1_q2": 0, "acc@1_q3": 0}
    assert logger.getkvs() == expected


def measure(loss, model, x_start, y, sizes):
    def batches():
        start = 0
        for size in sizes:
            part = slice(start, start + size)
            yield x_start[part], {"y": y[part]}, list(range(len(y)))[part]
            start += size

    return Validation(loss, batches, len(y), loss.terms).measure(model)


@pytest.mark.parametrize("sizes", [[20], [1] * 20, [3, 0, 17]])
def test_validation_measures_loss_and_accuracies_by_quarter(sizes):
    """By the noise and the timesteps of the images' indices; a classifier has no bound."""
    loss, (x_start, y), model = ClassifierLoss(make_process()), make_images(20), Seen()
    result = measure(loss, model, x_start, y, sizes)
    turns = np.argsort(np.argsort(np.arange(20) * (math.sqrt(5) - 1) / 2 % 1))
    t = torch.from_numpy((2 * turns + 1) * STEPS // 40)
    generators = sample_generators(0, range(20), "validation")
    noise = torch.stack([torch.randn(1, 4, 4, generator=g) for g in generators])
    losses = loss.training_losses(model, x_start, t, {"y": y}, noise=noise)
    expected = {}
    for name, values in losses.items():
        expected[name] = values.mean().item()
        for quarter in range(4):
            expected[f"{name}_q{quarter}"] = values[4 * t // STEPS == quarter].mean().item()
    assert result == pytest.approx(expected, rel=1e-5)
    assert 0 < result["acc@1"] < result["acc@5"] < 1


def test_validation_without_noise_has_one_timestep():
    loss, (x_start, y) = ClassifierLoss(make_process(), noised=False), make_images(20)
    result = measure(loss, Seen(), x_start, y, [20])
    t = torch.zeros(20, dtype=torch.int64)
    losses = loss.training_losses(Seen(), x_start, t, {"y": y})
    expected = {name: values.mean().item() for name, values in losses.items()}
    assert result == pytest.approx({**expected, **{f"{k}_q0": v for k, v in expected.items()}})


# -- flags


def flags_of(*words, **flags):
    """The flags of a training by those of a command line."""
    parser = load_module("scripts", "classifier_train").create_argparser()
    line = command_line(*words, flags)
    return training_flags(vars(parser.parse_args(line)), given_flags(parser, line))


def test_defaults_are_those_of_guided_diffusion():
    flags = flags_of()
    expected = {
        "noised": True,
        "train_steps": 150000,
        "lr": 3e-4,
        "weight_decay": 0.0,
        "batch_size": 4,
        "microbatch": -1,
        "schedule_sampler": "uniform",
        "log_interval": 10,
        "save_interval": 10000,
        "lr_schedule": "",
        "class_cond": True,
        "use_fp16": False,
    }
    assert {name: flags[name] for name in expected} == expected
    assert flags["val_interval"] == 1000


GUIDED = (
    "--data_dir D --iterations 300000 --anneal_lr True --batch_size 256 --lr 3e-4 "
    "--save_interval 10000 --weight_decay 0.05 --image_size 128 "
    "--classifier_attention_resolutions 32,16,8 --classifier_depth 2 --classifier_width 128 "
    "--classifier_pool attention --classifier_resblock_updown True "
    "--classifier_use_scale_shift_norm True"
)


@pytest.mark.parametrize("more", ["", "--learn_sigma True --use_kl True --predict_xstart True"])
def test_command_lines_of_guided_diffusion_say_what_they_said(more):
    flags = flags_of(*GUIDED.split(), *more.split())
    assert flags["train_steps"] == 300000
    assert flags["lr_schedule"] == "linear"
    assert flags["weight_decay"] == 0.05
    assert flags["image_size"] == 128


@pytest.mark.parametrize(
    ("given", "train_steps"),
    [
        ({"iterations": 7}, 7),
        ({"iterations": 0}, 0),
        ({"train_steps": 9}, 9),
        ({"iterations": 9, "train_steps": 9}, 9),
        ({"iterations": 0, "train_steps": 9}, 9),
        ({"train_images": 9}, 0),
        ({"lr_anneal_steps": 9}, 0),
        ({"train_hours": 1}, 0),
        ({"train_hours": 1, "iterations": 7}, 7),
        ({"train_hours": 1, "anneal_lr": True}, 150000),
    ],
)
def test_iterations_are_the_bound_unless_another_is_given(given, train_steps):
    assert flags_of(given)["train_steps"] == train_steps


@pytest.mark.parametrize(
    ("given", "schedule"),
    [
        ({"anneal_lr": False}, ""),
        ({"anneal_lr": True}, "linear"),
        ({"anneal_lr": True, "lr_schedule": "linear"}, "linear"),
        ({"anneal_lr": True, "lr_anneal_steps": 5}, "linear"),
        ({"lr_schedule": "cosine"}, "cosine"),
        ({"anneal_lr": False, "lr_schedule": "cosine"}, "cosine"),
        ({"lr_anneal_steps": 5}, ""),
    ],
)
def test_course_of_the_learning_rate(given, schedule):
    assert flags_of(given)["lr_schedule"] == schedule


def test_eval_interval_is_another_name():
    assert flags_of(eval_interval=5)["val_interval"] == 5
    assert flags_of(eval_interval=5, val_interval=5)["val_interval"] == 5
    assert flags_of(val_interval=7)["val_interval"] == 7


def test_half_precision_has_two_names():
    for name in ("use_fp16", "classifier_use_fp16"):
        flags = flags_of({name: True})
        assert flags["use_fp16"] is flags["classifier_use_fp16"] is True


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"iterations": 5, "train_steps": 6}, ["--iterations 5", "--train_steps 6"]),
        ({"iterations": 5, "train_images": 5}, ["--iterations 5", "--train_images 5"]),
        ({"iterations": 5, "lr_anneal_steps": 6}, ["--iterations 5", "--lr_anneal_steps 6"]),
        ({"anneal_lr": True, "lr_schedule": "cosine"}, ["--anneal_lr True", "cosine"]),
        ({"anneal_lr": False, "lr_anneal_steps": 5}, ["--anneal_lr False", "--lr_anneal_steps 5"]),
        ({"anneal_lr": False, "lr_schedule": "linear"}, ["--anneal_lr False", "linear"]),
        ({"anneal_lr": True, "iterations": 0}, ["--anneal_lr True", "--iterations"]),
        ({"eval_interval": 5, "val_interval": 6}, ["--eval_interval 5", "--val_interval 6"]),
        ({"use_fp16": False, "classifier_use_fp16": True}, ["--use_fp16 False", "fp16 True"]),
        ({"classifier_use_fp16": True, "precision": "bf16"}, ["classifier_use_fp16", "bf16"]),
        ({"classifier_use_fp16": True, "parallel": "fsdp"}, ["classifier_use_fp16", "fsdp"]),
        ({"sample_interval": 5}, ["--sample_interval 5", "--val_data_dir"]),
        ({"loss_weight": "min_snr"}, ["--loss_weight min_snr"]),
        ({"sigma_small": True}, ["--sigma_small True"]),
        ({"iterations": -1}, ["--iterations -1"]),
        ({"eval_interval": -1}, ["--eval_interval -1"]),
    ],
)
def test_flags_that_contradict_or_make_no_sense_are_named(given, words):
    with pytest.raises(UserError) as error:
        flags_of(given)
    for word in words:
        assert word in str(error.value)


# -- for a diffusion model


@pytest.fixture
def take(tmp_path):
    """A classifier's flags by those that lie beside a diffusion checkpoint."""

    def take(stored, given=None, named="model000008.pt", settled=(), **more):
        (tmp_path / "model000008.pt").touch()
        if stored is not None:
            stored_flags.save_config(str(tmp_path), stored, "config.json")
        given = given or {}
        flags = {**defaults(ClassifierOptions), "labels_from": "filename", **given, **more}
        flags["classifier_for"] = str(tmp_path / named)
        return runs.classifier_for(flags, {*given, *settled})

    return take


DIFFUSION = {
    **defaults(ModelAndDiffusionOptions),
    "image_size": [8, 12],
    "channels": 1,
    "value_range": "0,65535",
    "diffusion_steps": 30,
    "noise_schedule": "cosine",
    "rescale_timesteps": False,
    "learn_sigma": True,
    "class_cond": True,
    "num_classes": 2,
    "class_names": ["cat", "dog"],
    "labels_from": "folder",
}


@pytest.mark.parametrize("named", ["model000008.pt", ""])
def test_noise_levels_size_and_classes_are_those_of_the_diffusion_model(take, named):
    flags = take(DIFFUSION, named=named)
    names = set(DIFFUSION) - {"image_size", "learn_sigma", "class_cond"}
    expected = {name: DIFFUSION[name] for name in names & flags.keys()}
    assert {name: flags[name] for name in expected} == expected
    assert {"value_range", "labels_from", "class_names", "rescale_timesteps"} <= set(expected)
    assert flags["image_size"] == (8, 12)
    assert flags["learn_sigma"] is False  # the classifier has no use for it


@pytest.mark.parametrize(
    "process",
    [
        {"predict": "v", "zero_terminal_snr": True},
        {"predict": "flow", "noise_schedule": "linear"},
        {"predict_xstart": True, "zero_terminal_snr": True},
        {"betas": "0.1,0.2,0.3", "diffusion_steps": 3, "noise_schedule": "linear"},
    ],
)
def test_classifier_sees_the_noise_levels_of_the_diffusion_model(take, process):
    theirs = {**DIFFUSION, **process}
    expected = pick(ModelAndDiffusionOptions, {**theirs, "image_size": (8, 12)}).diffusion()
    ours = pick(ClassifierOptions, take(theirs)).diffusion()
    np.testing.assert_array_equal(ours.alphas_cumprod, expected.alphas_cumprod)


def test_model_without_classes_leaves_them_to_the_data(take):
    flags = take({**DIFFUSION, "class_cond": False, "num_classes": 0, "class_names": []})
    assert (flags["num_classes"], flags["labels_from"], flags["class_names"]) == (0, "filename", [])


@pytest.mark.parametrize("given", [{"noise_schedule": "cosine"}, {"num_classes": 0}])
def test_given_flags_that_agree_are_taken(take, given):
    assert take(DIFFUSION, given)["num_classes"] == 2


def refusal(take, *args, **kwargs):
    with pytest.raises(UserError) as error:
        take(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("given", "theirs"),
    [
        ({"image_size": 16}, "--image_size 8x12"),
        ({"noise_schedule": "linear"}, "--noise_schedule cosine"),
        ({"diffusion_steps": 40}, "--diffusion_steps 30"),
        ({"channels": 3}, "--channels 1"),
        ({"num_classes": 5}, "--num_classes 2"),
        ({"rescale_timesteps": True}, "--rescale_timesteps False"),
        ({"value_range": "0,255"}, "--value_range 0,65535"),
        ({"betas": "0.1,0.2"}, "--betas ''"),
        ({"predict_xstart": True}, "--predict_xstart False"),
        ({"zero_terminal_snr": True}, "--zero_terminal_snr False"),
    ],
)
def test_flag_that_contradicts_the_diffusion_model_is_named(take, tmp_path, given, theirs):
    message = refusal(take, DIFFUSION, given)
    ((name, value),) = given.items()
    for word in (f"--{name} {value}", theirs, f"{tmp_path}/config.json", "leave the flag out"):
        assert word in message


def test_classes_of_the_classifier_so_far_must_be_those(take):
    kwargs = {"settled": ["num_classes"], "num_classes": 2, "class_names": ["cat", "fox"]}
    assert "--log_dir" in refusal(take, DIFFUSION, **kwargs)


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        (None, ["no config.json", "--noise_schedule"]),
        ({"classifier_width": 32, "image_size": 8}, ["is a classifier"]),
        ({"large_size": 8, "small_size": 4}, ["is a super-resolution model"]),
        ({"hello": 1}, ["is no model of image_train.py"]),
    ],
)
def test_checkpoint_that_is_of_no_diffusion_model_is_refused(take, stored, words):
    message = refusal(take, stored)
    for word in (*words, "--classifier_for", "model000008.pt"):
        assert word in message


def test_checkpoint_that_is_not_there_is_refused(take):
    assert "does not exist" in refusal(take, DIFFUSION, named="model000009.pt")
