"""The training loop in one process; test_dist_util.py has several."""

import csv
import dataclasses
import itertools
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_data import load_json
from torch.utils._python_dispatch import TorchDispatchMode
from toy import STEPS, TimestepByImage, batches, calm, make_batch, make_diffusion, make_model

from improved_diffusion import checkpoint, logger, stored_flags
from improved_diffusion.denoiser import Denoiser
from improved_diffusion.errors import UserError
from improved_diffusion.noise_levels import noise_levels
from improved_diffusion.optimization import PRECISIONS, OptimizationOptions
from improved_diffusion.posthoc_ema import gamma_of
from improved_diffusion.resample import (
    SCHEDULE_SAMPLERS,
    LossSecondMomentResampler,
    create_named_schedule_sampler,
)
from improved_diffusion.respace import SpacedDiffusion
from improved_diffusion.script_util import create_gaussian_diffusion
from improved_diffusion.stopping import Bounds
from improved_diffusion.train_util import (
    TrainLoop,
    TrainOptions,
    find_ema_checkpoint,
    find_resume_checkpoint,
    get_blob_logdir,
    log_loss_dict,
)


@pytest.fixture
def run_dir(tmp_path):
    with logger.scoped_configure(str(tmp_path / "run"), format_strs=["log", "csv"]):
        yield tmp_path / "run"


def make_loop(**changes):
    arguments = {
        "model": changes.pop("model", None) or make_model(),
        "diffusion": make_diffusion(),
        "data": batches(),
        "schedule_sampler": TimestepByImage(),
        "batch_size": 4,
        "microbatch": -1,
        "lr": 1e-3,
        "ema_rate": "0.9,0.99",
        "log_interval": 1,
        "save_interval": 2,
        "resume_checkpoint": "",
        "lr_anneal_steps": 5,
    }
    return TrainLoop(**{**arguments, **changes})


def files(folder):
    """The checkpoints' files, but for those that improved-diffusion has not."""
    return sorted(path.name for path in folder.glob("*.pt") if not path.name.startswith("state"))


def load(path):
    return torch.load(path, weights_only=True)


def log_text(folder):
    return (folder / "log.txt").read_text()


def rows(folder):
    with open(folder / "progress.csv", newline="") as file:
        return list(csv.DictReader(file))


# -- recorded runs --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["five", "four", "fp16"])
def test_files_columns_and_optimiser_are_the_recorded_ones(run_dir, name):
    recorded = load_json("training.json")[name]
    keys = ("lr_anneal_steps", "save_interval", "use_fp16", "ema_rate")
    loop = make_loop(
        model=make_model(wake=False),
        diffusion=make_diffusion(SpacedDiffusion),
        schedule_sampler=None,
        **{key: recorded[key] for key in keys},
    )
    loop.run_loop()
    assert files(run_dir) == recorded["files"]

    columns = set(rows(run_dir)[0])
    plain = {column for column in columns if not re.search(r"_q\d$", column)}
    assert plain == {c for c in recorded["progress_columns"] if not re.search(r"_q\d$", c)} | {"vb"}
    quartiles = columns - plain
    assert quartiles
    assert all(re.fullmatch(r"(loss|mse|vb)_q[0-3]", column) for column in quartiles)

    for file, updates in recorded["updates_in_opt_file"].items():
        state = load(run_dir / file)
        assert {float(entry["step"]) for entry in state["state"].values()} == {updates}
        assert state["param_groups"][0]["lr"] == pytest.approx(recorded["lr_in_opt_file"][file])
        assert sorted(state["state"][0]) == sorted(recorded["opt_state_keys"])
        tensors = len(list(loop.model.parameters()))
        assert len(state["state"]) == (1 if recorded["use_fp16"] else tensors)
    for file in files(run_dir):
        if not file.startswith("opt"):
            state = load(run_dir / file)
            assert list(state) == list(make_model().state_dict())
            assert {value.dtype for value in state.values()} == {torch.float32}


# -- arithmetic -----------------------------------------------------------------------------------


@pytest.mark.parametrize("microbatch", [1, 2, 3, 4, 7])
def test_gradient_is_that_of_the_whole_batch_whatever_the_microbatch(run_dir, microbatch):
    loop = make_loop(microbatch=microbatch)
    batch = make_batch(0)
    loop.forward_backward(batch, {})
    t, weights = TimestepByImage().sample(4, "cpu")
    model = make_model()
    losses = make_diffusion().training_losses(model, batch, t)["loss"]
    (losses * weights).mean().backward()
    for ours, theirs in zip(loop.model_params, model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_conditions_are_split_with_the_images(run_dir):
    model = make_model(num_classes=4)
    seen = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0].shape[0], kwargs["y"].tolist())),
        with_kwargs=True,
    )
    loop = make_loop(model=model, microbatch=3)
    loop.forward_backward(make_batch(0), {"y": torch.tensor([3, 2, 1, 0])})
    assert seen == [(3, [3, 2, 1]), (1, [0])]


def test_updates_are_adamw_with_a_falling_rate_and_ema_follows(run_dir):
    loop = make_loop(lr_anneal_steps=3, save_interval=100, weight_decay=0.1)
    assert loop.opt.defaults["eps"] == 1e-8
    calm(loop)  # the fused update rounds otherwise than the one below
    model = make_model()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, eps=1e-2)
    averages = {rate: [p.detach().clone() for p in model.parameters()] for rate in (0.9, 0.99)}
    for step in range(3):
        optimiser.zero_grad()
        t, weights = TimestepByImage().sample(4, "cpu")
        losses = make_diffusion().training_losses(model, make_batch(step), t)["loss"]
        (losses * weights).mean().backward()
        optimiser.param_groups[0]["lr"] = 1e-3 * (1 - step / 3)
        optimiser.step()
        for rate, average in averages.items():
            for a, p in zip(average, model.parameters(), strict=True):
                a.copy_(rate * a + (1 - rate) * p.detach())
    loop.run_loop()
    for ours, theirs in zip(loop.model_params, model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    for params, average in zip(loop.ema_params, averages.values(), strict=True):
        for ours, theirs in zip(params, average, strict=True):
            torch.testing.assert_close(ours.detach(), theirs, rtol=1e-5, atol=1e-7)
    saved = load(run_dir / "ema_0.99_000003.pt")
    torch.testing.assert_close(list(saved.values()), averages[0.99], rtol=1e-5, atol=1e-7)


def test_float16_follows_float32(run_dir):
    half, full = make_loop(use_fp16=True, lr=1e-4), make_loop(lr=1e-4)
    assert half.model.inner_dtype == torch.float16
    half.lg_loss_scale = 10.0  # the woken network overflows at the default
    half.run_loop()
    full.run_loop()
    ours = list(half.state_dict_of(half.master_params).values())
    start, theirs = list(make_model().parameters()), full.model_params
    moved = sum((b - a).abs().sum() for a, b in zip(start, theirs, strict=True))
    apart = sum((b - a).abs().sum() for a, b in zip(ours, theirs, strict=True))
    assert apart < 0.25 * moved
    assert half.lg_loss_scale == pytest.approx(10 + 5 * 1e-3)


def test_overflow_lowers_the_scale_and_skips_only_the_update(run_dir):
    loop = make_loop(use_fp16=True, lr_anneal_steps=0)
    loop.lr_anneal_steps = 10
    loop.lg_loss_scale, loop.step = 60.0, 4
    before = [p.detach().clone() for p in loop.master_params]
    loop.run_step(make_batch(0), {})
    assert loop.lg_loss_scale == 59
    assert all(torch.equal(a, b) for a, b in zip(before, loop.master_params, strict=True))
    assert loop.opt.param_groups[0]["lr"] == pytest.approx(1e-3 * 0.6)  # annealed all the same
    assert "grad_norm" in logger.getkvs()
    assert "59" in log_text(run_dir)


def test_importance_sampler_learns_from_the_losses(run_dir):
    sampler = LossSecondMomentResampler(make_diffusion(), history_per_term=12)
    make_loop(schedule_sampler=sampler, microbatch=2, lr_anneal_steps=3).run_loop()
    assert sampler._loss_counts.sum() == 3 * 4


class _Synchronisations(TorchDispatchMode):
    """Counts reads of a tensor's value by the host."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_one_value_is_read_between_log_intervals(run_dir):
    loop = make_loop(lr_anneal_steps=0)
    loop.run_step(make_batch(0), {})  # makes the optimiser's state
    with _Synchronisations() as reads:
        loop.run_step(make_batch(1), {})
        # torch's AdamW keeps its step counts on the host and reads those
        steps = len(loop.model_params)
        assert reads.count <= steps + 1  # is the step finite?
        loop._flush_losses()
        assert reads.count > 0


# -- flow matching --------------------------------------------------------------------------------


class Pixelwise(torch.nn.Module):
    """The velocity of one value at a time, from the value and the time."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        layers = [torch.nn.Linear(2, 48), torch.nn.SiLU(), torch.nn.Linear(48, 1)]
        self.layers = torch.nn.Sequential(*layers)

    def forward(self, x, t):
        tau = (t.view(-1, 1, 1, 1) / 500 - 1).expand(x.shape)  # t of 0 ... 1000
        return self.layers(torch.stack([x, tau], dim=-1)).squeeze(-1)


MEAN, SPREAD = 0.4, 0.5


def normal_batches():
    generator = torch.Generator().manual_seed(0)
    while True:
        yield MEAN + SPREAD * torch.randn(256, 1, 4, 4, generator=generator), {}


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    """A model of the linear path's velocity, trained by the loop, and its process."""
    diffusion = create_gaussian_diffusion(steps=200, predict="flow", rescale_timesteps=True)
    with logger.scoped_configure(str(tmp_path_factory.mktemp("flow")), format_strs=["csv"]):
        loop = make_loop(
            model=Pixelwise(),
            diffusion=diffusion,
            data=normal_batches(),
            schedule_sampler=create_named_schedule_sampler("stratified", diffusion),
            batch_size=256,
            lr=2e-2,
            lr_anneal_steps=250,
            log_interval=50,
            save_interval=1000,
            seed=0,
        )
        loop.run_loop()
        folder = logger.get_dir()
    return loop.model, diffusion, rows(Path(folder))


def test_flow_matching_trains_in_the_loop(flow):
    _, _, log = flow
    losses = [float(row["loss"]) for row in log]
    best = SPREAD * np.pi / 2  # the mean over tau of SPREAD^2 / ((1 - tau)^2 SPREAD^2 + tau^2)
    assert losses[0] > 1.3 * best
    assert losses[-1] == pytest.approx(best, rel=0.05)


def integrate(velocity, x, taus, second_order):
    """Euler's or Heun's method along the linear path: dx_tau / dtau = velocity."""
    for tau, tau_next in itertools.pairwise(taus):
        slope = velocity(x, tau)
        x_next = x + (tau_next - tau) * slope
        if second_order and tau_next > 0:
            slope = (slope + velocity(x_next, tau_next)) / 2
        x = x + (tau_next - tau) * slope
    return x


@pytest.mark.parametrize(("second_order", "steps"), [(False, 40), (True, 10)])
def test_flow_samples_the_data_by_euler_and_heun(flow, second_order, steps):
    model, diffusion, _ = flow
    denoise = Denoiser(model, diffusion)
    sigmas = noise_levels(diffusion, steps, "trailing")
    noise = torch.randn(500, 1, 4, 4, generator=torch.Generator().manual_seed(1))

    def velocity(x_tau, tau):
        return denoise.velocity(x_tau / (1 - tau), tau / (1 - tau))

    with torch.no_grad():
        samples = integrate(velocity, noise, (sigmas / (1 + sigmas)).tolist(), second_order)
    assert denoise.evaluations == (2 * steps - 1 if second_order else steps)
    assert samples.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert samples.std().item() == pytest.approx(SPREAD, rel=0.06)


# -- the log --------------------------------------------------------------------------------------


def test_log_has_means_by_quartile_and_absolute_counts(run_dir):
    ts = torch.tensor([0, 9, 10, 39, 38])
    log_loss_dict(make_diffusion(), ts, {"loss": torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0])})
    values = logger.dumpkvs()
    assert values == {"loss": 5, "loss_q0": 2, "loss_q1": 5, "loss_q3": 8}


def test_log_rows_come_at_the_interval(run_dir):
    make_loop(log_interval=2).run_loop()
    assert [row["step"] for row in rows(run_dir)] == ["0", "2", "4"]
    assert [row["samples"] for row in rows(run_dir)] == ["4", "12", "20"]
    assert all(float(row["grad_norm"]) > 0 for row in rows(run_dir))


def test_logged_loss_is_the_mean_over_the_interval(run_dir):
    losses = []
    diffusion = make_diffusion()
    training_losses = diffusion.training_losses

    def recording(*args, **kwargs):
        terms = training_losses(*args, **kwargs)
        losses.append(terms["loss"].detach() * 1.5)
        return terms

    diffusion.training_losses = recording
    make_loop(diffusion=diffusion, log_interval=2, lr_anneal_steps=3, microbatch=3).run_loop()
    expected = torch.cat(losses[2:6]).mean().item()  # steps 1 and 2, two parts each
    assert float(rows(run_dir)[1]["loss"]) == pytest.approx(expected, rel=1e-5)


# -- ending ---------------------------------------------------------------------------------------


def test_last_step_is_saved_after_the_loop(run_dir):
    make_loop(lr_anneal_steps=4, save_interval=2).run_loop()
    assert [f for f in files(run_dir) if f.startswith("model")] == [
        "model000000.pt", "model000002.pt", "model000004.pt",
    ]  # fmt: skip
    state = load(run_dir / "opt000004.pt")
    assert {float(entry["step"]) for entry in state["state"].values()} == {4}


def test_training_test_variable_ends_after_a_save(run_dir, monkeypatch):
    monkeypatch.setenv("DIFFUSION_TRAINING_TEST", "1")
    make_loop(lr_anneal_steps=0, save_interval=2).run_loop()
    assert [f for f in files(run_dir) if f.startswith("model")] == [
        "model000000.pt", "model000002.pt",
    ]  # fmt: skip


def test_checkpoints_go_to_the_blob_folder(run_dir, tmp_path, monkeypatch):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    monkeypatch.setenv("DIFFUSION_BLOB_LOGDIR", str(blobs))
    assert get_blob_logdir() == str(blobs)
    make_loop(lr_anneal_steps=1).run_loop()
    assert "model000000.pt" in files(blobs)
    assert files(run_dir) == []


# -- resuming -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("explicit", "use_fp16"), [(False, False), (True, False), (False, True)])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, explicit, use_fp16):
    changes = {"lr_anneal_steps": 6, "save_interval": 2, "use_fp16": use_fp16}
    changes["fp16_scale_growth"] = 0.0  # the scale is not in the files
    with logger.scoped_configure(str(tmp_path / "whole"), format_strs=[]):
        whole_loop = make_loop(**changes)
        whole_loop.lg_loss_scale = 10.0  # the woken network overflows at the default
        whole_loop.run_loop()

    with logger.scoped_configure(str(tmp_path / "part"), format_strs=["log"]):
        first = make_loop(**changes)
        first.lg_loss_scale = 10.0
        for _ in range(4):  # saves steps 0 and 2, and dies in step 4
            first.run_step(*next(first.data))
            if first.step % 2 == 0:
                first.save()
            first.step += 1
        newest = str(tmp_path / "part" / "model000002.pt")
        assert find_resume_checkpoint() == newest
        second = make_loop(
            model=make_model(seed=99),
            data=batches(first=3),
            resume_checkpoint=newest if explicit else "",
            **changes,
        )
        assert second.resume_step == 2
        second.lg_loss_scale = 10.0
        second.run_loop()
    text = log_text(tmp_path / "part")
    for thing in ("model restored", "EMA 0.9 restored", "EMA 0.99 restored", "optimiser restored"):
        assert thing in text
    for name in ("model000006.pt", "ema_0.9_000006.pt", "ema_0.99_000006.pt"):
        whole, part = load(tmp_path / "whole" / name), load(tmp_path / "part" / name)
        assert all(torch.equal(whole[key], part[key]) for key in whole), name


def test_resume_says_what_is_cold(run_dir, tmp_path):
    torch.save(make_model(seed=5).state_dict(), tmp_path / "odd_name.pt")
    loop = make_loop(resume_checkpoint=str(tmp_path / "odd_name.pt"))
    assert (loop.resume_step, loop.step) == (0, 0)
    text = log_text(run_dir)
    assert "model restored" in text
    assert "EMA 0.9 cold" in text
    assert "optimiser cold" in text
    for params in loop.ema_params:
        assert torch.equal(params[0], loop.model_params[0])


@pytest.mark.parametrize("name", ["best.pt", "ema_0.9_000007.pt"])
def test_files_of_step_zero_are_not_taken_for_those_of_another_name(run_dir, name):
    make_loop(lr_anneal_steps=3).run_loop()  # leaves opt000000.pt and ema_0.9_000000.pt
    torch.save(load(run_dir / "model000002.pt"), run_dir / name)
    make_loop(resume_checkpoint=str(run_dir / name))
    text = log_text(run_dir)
    assert "optimiser cold" in text
    assert "EMA 0.9 cold" in text
    assert "optimiser restored" not in text


def test_step_zero_is_resumed_in_full(run_dir):
    make_loop(lr_anneal_steps=1).run_loop()
    loop = make_loop(resume_checkpoint=str(run_dir / "model000000.pt"))
    assert loop.step == 1
    assert "optimiser restored" in log_text(run_dir)
    assert "EMA 0.9 restored" in log_text(run_dir)


def test_learning_rate_flag_wins_over_the_file(run_dir):
    make_loop(lr_anneal_steps=0, lr=1e-3).save()
    loop = make_loop(lr_anneal_steps=0, lr=5e-4, resume_checkpoint=str(run_dir / "model000000.pt"))
    loop.run_step(make_batch(0), {})
    assert loop.opt.param_groups[0]["lr"] == 5e-4
    assert "learning rate 0.0005, was 0.001" in log_text(run_dir)


def test_optimiser_of_an_older_version_goes_on_in_one_operation(run_dir, tmp_path):
    make_loop(lr_anneal_steps=0).save()
    state = load(run_dir / "opt000000.pt")
    assert state["param_groups"][0]["fused"] is None  # as an older version stores it
    state["param_groups"][0]["fused"] = False
    torch.save(state, tmp_path / "opt000000.pt")
    shutil.copy(run_dir / "model000000.pt", tmp_path)
    path = str(tmp_path / "model000000.pt")
    loop = make_loop(lr_anneal_steps=0, resume_checkpoint=path)
    assert "optimiser restored" in log_text(run_dir)
    assert loop.opt.param_groups[0]["fused"] is True


def test_finished_run_has_nothing_to_do(run_dir):
    make_loop(lr_anneal_steps=3).run_loop()
    before = {name: (run_dir / name).stat().st_mtime_ns for name in files(run_dir)}
    make_loop(lr_anneal_steps=3).run_loop()
    assert "nothing to do: 3 of 3 steps done" in log_text(run_dir)
    assert before == {name: (run_dir / name).stat().st_mtime_ns for name in files(run_dir)}


def test_checkpoint_of_another_network_is_refused(run_dir, tmp_path):
    torch.save(make_model(num_classes=3).state_dict(), tmp_path / "model000001.pt")
    with pytest.raises(UserError, match=r"--class_cond False here, True in the checkpoint"):
        make_loop(resume_checkpoint=str(tmp_path / "model000001.pt"))


def test_optimiser_of_another_precision_is_refused(run_dir):
    make_loop(lr_anneal_steps=1, use_fp16=True).run_loop()
    with pytest.raises(UserError, match=r"opt000000.pt' does not fit.*--use_fp16"):
        make_loop(resume_checkpoint=str(run_dir / "model000000.pt"))


def test_crash_in_a_save_leaves_no_checkpoint(run_dir, monkeypatch):
    loop = make_loop(lr_anneal_steps=0)
    loop.save()
    loop.step = 1

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        loop.save()
    assert checkpoint.find_newest_model(str(run_dir)) == str(run_dir / "model000000.pt")


def test_ema_file_is_found_beside_the_model(tmp_path):
    (tmp_path / "ema_0.999_000012.pt").touch()
    model = str(tmp_path / "model000012.pt")
    assert find_ema_checkpoint(model, 12, 0.999) == str(tmp_path / "ema_0.999_000012.pt")
    assert find_ema_checkpoint(model, 12, "0.99") is None
    assert find_ema_checkpoint("", 12, "0.99") is None


# -- a seed, and what a run needs to go on exactly ------------------------------------------------


class Data:
    """Images of which a position in the stream says which come next; may end in an accident."""

    def __init__(self, die_at=None, size=4):
        self.position, self.die_at, self.size = 0, die_at, size

    def __iter__(self):
        return self

    def __next__(self):
        if self.position == self.die_at:
            raise ConnectionError("killed")
        self.position += self.size
        return make_batch(self.position, self.size), {}

    def seek(self, images):
        self.position = images

    def files(self, first, count):
        return [f"{index}.png" for index in range(first, first + count)]


def seeded_loop(importance=False, die_at=None, seed=3, **changes):
    """A loop with random noise, timesteps and dropout."""
    diffusion = make_diffusion(SpacedDiffusion)
    sampler = LossSecondMomentResampler(diffusion, history_per_term=1) if importance else None
    arguments = {
        "model": make_model(dropout=0.1),
        "diffusion": diffusion,
        "data": Data(die_at),
        "schedule_sampler": sampler,
        "seed": seed,
    }
    return make_loop(**{**arguments, **changes})


def parameters(loop):
    return [param.detach().clone() for param in loop.master_params]


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_seed_gives_the_same_run_whatever_the_global_generators(tmp_path):
    results = []
    for i, seed in enumerate((3, 3, 4)):
        with logger.scoped_configure(str(tmp_path / str(i)), format_strs=[]):
            loop = seeded_loop(seed=seed, lr_anneal_steps=2)
            torch.manual_seed(i)
            np.random.seed(i)
            loop.run_loop()
            results.append(parameters(loop))
    assert_equal(results[0], results[1])
    assert not torch.equal(results[0][0], results[2][0])


@pytest.mark.parametrize("microbatch", [1, 2, 3])
def test_microbatches_of_a_seeded_run_are_the_whole_batch(tmp_path, microbatch):
    """The same timesteps and noise for each image; only rounding differs."""
    loops = []
    for i, size in enumerate((-1, microbatch)):
        with logger.scoped_configure(str(tmp_path / str(i)), format_strs=[]):
            loop = seeded_loop(model=make_model(), microbatch=size, lr_anneal_steps=4)
            calm(loop).run_loop()
            loops.append(loop)
    start = list(make_model().parameters())
    moved = max((a - b).abs().max() for a, b in zip(parameters(loops[0]), start, strict=True))
    assert moved > 1e-4
    for ours, theirs in zip(*map(parameters, loops), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_without_a_seed_draws_come_from_the_global_generators(run_dir):
    torch.manual_seed(5)
    np.random.seed(5)
    loop = seeded_loop(seed=None, model=make_model())
    torch.manual_seed(5)
    np.random.seed(5)
    batch = make_batch(0)
    loop.forward_backward(batch, {})
    after = torch.get_rng_state()
    np.random.seed(5)
    torch.manual_seed(5)
    p = np.full(STEPS, 1 / STEPS)
    assert loop.timesteps[0].tolist() == np.random.choice(STEPS, 4, p=p).tolist()
    torch.randn_like(batch)
    assert torch.equal(torch.get_rng_state(), after)


STABLE = OptimizationOptions(precision="fp16", grad_clip=0.1, ema_warmup=True)


@pytest.mark.parametrize(
    ("die_at", "changes"),
    [
        (0, {}),
        (3, {}),
        (4, {}),
        (7, {}),
        (4, {"importance": True, "microbatch": 3}),
        (5, {"use_fp16": True}),
        (4, {"optimization": STABLE}),
        (5, {"posthoc_ema": "0.05,0.1", "log_interval": 4}),
    ],
    ids=["first", "middle", "saved", "last", "importance", "use_fp16", "autocast", "posthoc"],
)
def test_run_that_dies_at_any_step_ends_as_the_uninterrupted_one(tmp_path, changes, die_at):
    """Weights, averages, optimiser, counters and log, bit for bit."""
    options = {"lr_anneal_steps": 8, "save_interval": 2, "log_interval": 3, **changes}
    with logger.scoped_configure(str(tmp_path / "whole"), format_strs=["csv"]):
        seeded_loop(**options).run_loop()
    with (
        logger.scoped_configure(str(tmp_path / "part"), format_strs=["csv"]),
        pytest.raises(ConnectionError),
    ):
        seeded_loop(**options, die_at=4 * die_at).run_loop()
    with logger.scoped_configure(str(tmp_path / "part"), format_strs=["csv", "log"]):
        seeded_loop(**options).run_loop()
    if die_at:
        assert "cold" not in log_text(tmp_path / "part")
        assert "resume: data restored, goes on after" in log_text(tmp_path / "part")
    assert rows(tmp_path / "part") == rows(tmp_path / "whole")
    for name in sorted(path.name for path in (tmp_path / "whole").glob("*000008.pt")):
        whole, part = load(tmp_path / "whole" / name), load(tmp_path / "part" / name)
        for state in (whole, part):
            state.pop("seconds", None)
        assert_same(whole, part, name)


def assert_same(a, b, where):
    """Dicts, lists, numbers and tensors, equal bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}: {key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def test_loss_scale_sampler_and_pending_rows_are_restored(run_dir):
    loop = seeded_loop(
        importance=True, use_fp16=True, log_interval=100, lr_anneal_steps=0, microbatch=3
    )
    for _ in range(3):
        loop.run_step(*next(loop.data))
        loop.step += 1
    loop.lg_loss_scale, loop.seconds = 7.25, 12.5
    loop.save()
    logged = dict(logger.getkvs())
    again = seeded_loop(importance=True, use_fp16=True, log_interval=100, lr_anneal_steps=0)
    assert (again.lg_loss_scale, again.seconds, again.global_step) == (7.25, 12.5, 3)
    assert (again.images, again.data.position) == (12, 12)
    np.testing.assert_array_equal(
        again.schedule_sampler._loss_history, loop.schedule_sampler._loss_history
    )
    assert again.schedule_sampler._loss_counts.sum() > 0
    assert_same(again.pending_losses, loop.pending_losses, "pending")
    assert len(again.pending_losses) == 6  # steps x microbatches
    assert {key: float(value) for key, value in logger.getkvs().items()} == pytest.approx(
        {key: float(value) for key, value in logged.items()}
    )
    assert "history of the schedule sampler restored" in log_text(run_dir)


def test_folder_of_the_original_still_resumes(tmp_path):
    """Model, averages and optimiser are all it has; the step is told by the optimiser."""
    changes = {"lr_anneal_steps": 6, "save_interval": 2}
    with logger.scoped_configure(str(tmp_path / "whole"), format_strs=[]):
        make_loop(**changes).run_loop()
    (tmp_path / "part").mkdir()
    for path in (tmp_path / "whole").glob("*000002.pt"):
        if not path.name.startswith("state"):
            shutil.copy(path, tmp_path / "part")
    with logger.scoped_configure(str(tmp_path / "part"), format_strs=["log"]):
        loop = make_loop(data=batches(first=3), model=make_model(seed=9), **changes)
        assert (loop.resume_step, loop.step, loop.images) == (2, 1, 12)
        loop.run_loop()
    text = log_text(tmp_path / "part")
    assert "optimiser restored" in text
    assert "loss scale and counters cold, no file state000002.pt" in text
    assert "data cold" in text
    for name in ("model000006.pt", "ema_0.9_000006.pt", "opt000006.pt"):
        assert_same(load(tmp_path / "whole" / name), load(tmp_path / "part" / name), name)


def test_going_back_sets_later_checkpoints_aside(run_dir):
    make_loop(lr_anneal_steps=6, save_interval=2).run_loop()
    loop = make_loop(resume_checkpoint=str(run_dir / "opt000002.pt"), lr_anneal_steps=6)
    assert loop.global_step == 3
    assert "later checkpoints count no more: those of steps [4, 6]" in log_text(run_dir)
    assert find_resume_checkpoint() == str(run_dir / "model000002.pt")


# -- precision and stability ----------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_loss_falls_in_every_precision(run_dir, precision):
    loop = make_loop(
        optimization=OptimizationOptions(precision=precision), lr=1e-3, lr_anneal_steps=0
    )
    inside = set()
    loop.model.input_blocks[1].register_forward_hook(lambda m, a, out: inside.add(out.dtype))
    losses, batch = [], make_batch(0)
    for _ in range(30):
        loop.run_step(batch, {})
        losses.append(loop.pending_losses[-1][1]["loss"].mean().item())
        loop.step += 1
    assert inside == {PRECISIONS[precision] or torch.float32}
    assert np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    assert {param.dtype for param in loop.model_params} == {torch.float32}
    assert (loop.skipped > 0) <= (precision == "fp16")  # while its scale is too high


def test_loss_scale_of_autocast_moves_and_is_restored(run_dir):
    options = {"optimization": OptimizationOptions(precision="fp16"), "lr_anneal_steps": 0}
    loop = make_loop(**options, fp16_scale_growth=0.25)
    loop.lg_loss_scale = 60.0
    for step, expected in enumerate([59.0, 58.0]):
        loop.run_step(make_batch(step), {})
        assert loop.lg_loss_scale == expected
        loop.step += 1
    assert loop.skipped == loop.skipped_in_row == 2
    loop.lg_loss_scale = 8.0
    for step, expected in enumerate([8.25, 8.5]):
        loop.run_step(make_batch(step), {})
        assert loop.lg_loss_scale == expected
        loop.step += 1
    assert (loop.skipped, loop.skipped_in_row) == (2, 0)
    assert logger.getkvs()["skipped_steps"] == 2
    loop.save()
    again = make_loop(**options)
    assert (again.lg_loss_scale, again.skipped) == (8.5, 2)


def test_gradient_does_not_depend_on_the_loss_scale(run_dir):
    """A power of two changes no digit, as long as nothing over- or underflows."""
    norms = []
    for scale in (0.0, 8.0):
        loop = make_loop(optimization=OptimizationOptions(precision="fp16"))
        loop.lg_loss_scale = scale
        loop.run_step(make_batch(0), {})
        norms.append(float(logger.dumpkvs()["grad_norm"]))
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


@pytest.mark.parametrize("use_fp16", [False, True])
@pytest.mark.parametrize("grad_clip", [0.01, 1e6])
def test_gradient_of_an_update_is_clipped(run_dir, grad_clip, use_fp16):
    loop = make_loop(optimization=OptimizationOptions(grad_clip=grad_clip), use_fp16=use_fp16)
    loop.lg_loss_scale = 8.0
    used = []
    loop.opt.register_step_pre_hook(
        lambda *_: used.append(torch.nn.utils.get_total_norm(loop._gradients()).item())
    )
    loop.run_step(make_batch(0), {})
    logged = float(logger.getkvs()["grad_norm"])
    assert logged > 0.1  # of the gradient as it was
    assert used == [pytest.approx(min(logged, grad_clip), rel=1e-3)]


def test_loss_that_is_not_finite_skips_the_update_alone(run_dir):
    loop = make_loop(lr_anneal_steps=0)
    loop.run_step(make_batch(0), {})
    loop.step += 1
    before, averages = parameters(loop), [p.clone() for p in loop.ema_params[0]]
    loop.run_step(torch.full((4, 1, 8, 8), float("nan")), {})
    loop.step += 1
    assert_equal(parameters(loop), before)
    assert_equal(loop.ema_params[0], averages)
    assert (loop.skipped, loop.steps_done, loop.images) == (1, 2, 8)
    assert "non-finite loss or gradient: step 1 is skipped" in log_text(run_dir)
    loop.run_step(make_batch(1), {})
    assert not torch.equal(loop.master_params[0], before[0])
    assert loop.skipped_in_row == 0


def test_course_of_the_rate_is_that_of_the_schedule(run_dir):
    options = OptimizationOptions(lr_schedule="cosine", lr_warmup_steps=2)
    loop = make_loop(
        lr_anneal_steps=0, lr=0.5, optimization=options, bounds=Bounds(train_images=16)
    )
    assert loop.total_steps == 4
    rates = []
    for step in range(4):
        loop.run_step(make_batch(step), {})
        rates.append(loop.opt.param_groups[0]["lr"])
        loop.step += 1
    cosine = [(1 + np.cos(np.pi * step / 4)) / 2 for step in range(4)]
    assert rates == pytest.approx(
        [0.5 * a * b for a, b in zip([0.5, 1, 1, 1], cosine, strict=True)]
    )


# -- averages -------------------------------------------------------------------------------------


def recorded_weights(loop, steps):
    """Train; the weights at the start and after each step."""
    weights = [parameters(loop)]
    for step in range(steps):
        loop.run_step(make_batch(step), {})
        loop.step += 1
        weights.append(parameters(loop))
    return weights


def averaged(weights, rates):
    average = weights[0]
    for new, rate in zip(weights[1:], rates, strict=True):
        average = [rate * a + (1 - rate) * p for a, p in zip(average, new, strict=True)]
    return average


@pytest.mark.parametrize("warmup", [False, True])
def test_averages_warm_up(run_dir, warmup):
    loop = make_loop(optimization=OptimizationOptions(ema_warmup=warmup), lr=1e-2)
    weights = recorded_weights(loop, 4)
    for rate, params in zip((0.9, 0.99), loop.ema_params, strict=True):
        rates = [min(rate, (1 + n) / (10 + n)) if warmup else rate for n in range(4)]
        for ours, theirs in zip(params, averaged(weights, rates), strict=True):
            torch.testing.assert_close(ours.detach(), theirs, rtol=1e-5, atol=1e-7)


def test_power_function_averages_count_updates_and_are_restored(run_dir):
    """Weight of the n-th update in proportion to n**gamma, skipped steps left out."""
    options = {"posthoc_ema": "0.05,0.15", "lr": 1e-2, "lr_anneal_steps": 0}
    loop = make_loop(**options)
    weights = recorded_weights(loop, 2)
    loop.run_step(torch.full((4, 1, 8, 8), float("nan")), {})
    loop.step += 1
    loop.run_step(make_batch(3), {})
    weights.append(parameters(loop))
    loop.save()
    loop.step += 1
    for width, params in zip((0.05, 0.15), loop.posthoc_params, strict=True):
        gamma = gamma_of(width)
        rates = [(1 - 1 / n) ** (gamma + 1) for n in (1, 2, 3)]
        for ours, theirs in zip(params, averaged(weights, rates), strict=True):
            torch.testing.assert_close(ours.detach(), theirs, rtol=1e-5, atol=1e-7)
        state = load(run_dir / f"posthoc_{width}_000003.pt")
        assert (state["updates"], state["sigma_rel"]) == (3, width)
        assert_equal(state["weights"].values(), params)
    manifest = json.loads((run_dir / "checkpoint000003.json").read_text())
    assert {"posthoc_0.05_000003.pt", "posthoc_0.15_000003.pt"} <= manifest["files"].keys()
    again = make_loop(model=make_model(seed=9), **options)
    assert "post-hoc EMA 0.15 restored" in log_text(run_dir)
    for ours, theirs in zip(again.posthoc_params, loop.posthoc_params, strict=True):
        assert_equal(ours, theirs)
    for run in (loop, again):
        run.run_step(make_batch(4), {})
    for ours, theirs in zip(again.posthoc_params, loop.posthoc_params, strict=True):
        assert_equal(ours, theirs)
    again.save()
    assert load(run_dir / "posthoc_0.05_000004.pt")["updates"] == 4


def test_average_that_was_not_kept_before_starts_cold(run_dir):
    make_loop(lr_anneal_steps=1).run_loop()
    loop = make_loop(posthoc_ema="0.1", ema_rate="0.9,0.95")
    text = log_text(run_dir)
    assert "post-hoc EMA 0.1 cold" in text
    assert "EMA 0.95 cold" in text
    assert "EMA 0.9 restored" in text
    assert_equal(loop.posthoc_params[0], loop.master_params)
    assert_equal(loop.ema_params[1], loop.master_params)


def test_averaged_model_is_put_back(run_dir):
    loop = make_loop()
    recorded_weights(loop, 2)
    before = parameters(loop)

    def look():
        with loop.averaged_model() as model:
            assert_equal(model.parameters(), loop.ema_params[0])
            raise KeyError

    with pytest.raises(KeyError):
        look()
    assert_equal(loop.model.parameters(), before)


# -- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("lr", 0.0),
        ("lr", -1e-3),
        ("batch_size", 0),
        ("microbatch", 0),
        ("microbatch", -2),
        ("log_interval", 0),
        ("save_interval", 0),
        ("lr_anneal_steps", -1),
        ("ema_rate", "1.0"),
        ("ema_rate", "0.9,x"),
        ("ema_rate", ""),
        ("schedule_sampler", "unifrom"),
    ],
)
def test_bad_options_are_named(flag, value):
    with pytest.raises(UserError, match=f"--{flag} '?{value}"):
        TrainOptions(**{flag: value})


@pytest.mark.parametrize("name", SCHEDULE_SAMPLERS)
def test_schedule_samplers_are_named_in_the_help(name):
    assert TrainOptions(schedule_sampler=name).schedule_sampler == name
    (field,) = (f for f in dataclasses.fields(TrainOptions) if f.name == "schedule_sampler")
    assert name in field.metadata["help"]


def test_ema_rate_may_be_a_number(run_dir):
    assert make_loop(ema_rate=0.95).ema_rate == [0.95]


def test_flags_of_a_run_are_json(tmp_path):
    stored_flags.save_config(str(tmp_path), {"lr": 1e-4, "image_size": (8, 16)})
    assert json.loads((tmp_path / "config.json").read_text()) == {"lr": 1e-4, "image_size": [8, 16]}
    assert stored_flags.load_config(str(tmp_path))["lr"] == 1e-4
    assert np.prod(stored_flags.load_config(str(tmp_path))["image_size"]) == 128
    assert make_diffusion().num_timesteps == STEPS
