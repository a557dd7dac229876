"""The benchmark of training: the plain step computes what ours does, and the record is complete."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from golden_data import make_diffusion
from script_runner import ROOT, load_module
from test_unet import small_unet

from improved_diffusion import logger
from improved_diffusion.script_util import ModelAndDiffusionOptions
from improved_diffusion.train_util import TrainLoop

TIMESTEPS = [0, 7, 0, 31]


@pytest.fixture(scope="module")
def bench():
    return load_module("benchmarks", "bench_train")


@pytest.fixture(scope="module")
def training():
    return load_module("benchmarks", "plain_training")


@pytest.fixture
def tiny(bench, monkeypatch, tmp_path):
    """A configuration of a second instead of minutes, under the name "small", without peers."""
    monkeypatch.setattr(load_module("benchmarks", "peers"), "PYTHON", tmp_path / "none")
    configurations = load_module("benchmarks", "configurations")
    options = ModelAndDiffusionOptions(
        image_size=8, num_channels=32, num_res_blocks=1, attention_resolutions="4", learn_sigma=True
    )
    configuration = configurations.Configuration(options, batch=2, batch_on_gpu=2)
    monkeypatch.setitem(configurations.CONFIGURATIONS, "small", configuration)
    return configuration


def data():
    torch.manual_seed(5)
    return torch.rand(4, 3, 8, 8) * 2 - 1, torch.randn(4, 3, 8, 8), torch.tensor(TIMESTEPS)


# -- the plain rendering


def test_tables_are_looked_up_as_ours_are():
    look_up = load_module("benchmarks", "plain_tables").look_up
    table, t = np.linspace(0.1, 0.9, 50), torch.tensor(TIMESTEPS)
    found = look_up(table, t, (4, 3, 8, 8))
    assert (found.shape, found.dtype) == ((4, 3, 8, 8), torch.float32)
    assert torch.equal(found[:, 0, 0, 0], torch.from_numpy(table[TIMESTEPS]).float())
    table.flags.writeable = False  # as ours are; torch warns of those
    assert torch.equal(look_up(table, t, (4, 3, 8, 8)), found)


@pytest.mark.parametrize("loss", ["MSE", "RESCALED_MSE"])
@pytest.mark.parametrize("var", ["LEARNED", "LEARNED_RANGE", "FIXED_LARGE"])
@pytest.mark.parametrize("rescale_timesteps", [False, True])
def test_plain_losses_and_gradients_are_ours(training, loss, var, rescale_timesteps):
    diffusion = make_diffusion(var=var, loss=loss, rescale_timesteps=rescale_timesteps)
    images, noise, t = data()
    seen, found = [], []
    for process in (diffusion, training.PlainProcess(diffusion)):
        torch.manual_seed(0)
        output = torch.randn(4, 3 if var == "FIXED_LARGE" else 6, 8, 8, requires_grad=True)

        def model(x, t, output=output):
            seen.append((x, t))
            return output

        losses = process.training_losses(model, images, t, {}, noise=noise)
        losses["loss"].mean().backward()
        found.append({**losses, "gradient": output.grad})
    torch.testing.assert_close(seen[0], seen[1])
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-7, msg=name)


def test_plain_process_of_something_else_is_refused(training):
    with pytest.raises(ValueError, match="squared errors of the noise only"):
        training.PlainProcess(make_diffusion(loss="KL"))
    with pytest.raises(ValueError, match="squared errors of the noise only"):
        training.PlainProcess(make_diffusion(mean="START_X"))


def test_plain_steps_are_those_of_the_training_loop(training, tmp_path):
    """The log, the weights and the averages after steps from the same weights and draws."""
    plain = load_module("benchmarks", "plain_unet").plain
    diffusion, network = make_diffusion(), small_unet(out_channels=6)
    images, _, _ = data()
    theirs = training.PlainTraining(plain(network), diffusion, lr=1e-3, ema_rates=[0.9])
    with logger.scoped_configure(str(tmp_path), format_strs=[]):
        loop = TrainLoop(
            model=network,
            diffusion=diffusion,
            data=iter([]),
            batch_size=4,
            microbatch=-1,
            lr=1e-3,
            ema_rate="0.9",
            log_interval=1,
            save_interval=100,
            resume_checkpoint="",
            seed=3,
        )
        for opt in (loop.opt, theirs.opt):
            opt.param_groups[0]["eps"] = 1e-2  # or noise becomes steps where no gradient is
        for step in range(3):
            part = slice(0, 4)
            t, _ = loop._sample_timesteps(4, part)
            noise = loop._draws.noise_like(images, part)
            loop.run_step(images, {})
            loop._flush_losses()
            log = theirs.step(images, {}, t, noise)
            ours = {k: float(v) for k, v in logger.dumpkvs().items()}
            names = {"loss", "mse", "vb", "grad_norm"}
            assert names <= log.keys() <= ours.keys()
            for name in names:
                assert log[name] == pytest.approx(ours[name], rel=1e-4), (step, name)
            loop.step += 1
    for a, b in zip(loop.model_params, theirs.params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for a, b in zip(loop.ema_params[0], theirs.ema_params[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# -- the benchmark


def test_losses_outside_the_network_give_the_same_gradients(bench):
    runs = bench.losses_outside_the_network(torch.device("cpu"))
    t = torch.arange(16) * 60  # 0 among them
    ours, theirs = (runs[name](t) for name in ("ours", "plain"))
    assert ours.abs().sum() > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-8)


def test_record_has_steps_parts_and_memory(bench, tiny, tmp_path, monkeypatch, capsys):
    memory = {"plain fp32": 100, "ours fp32": 80, "ours bf16": 60, "ours fp32, checkpointing": 40}
    monkeypatch.setattr(bench, "memory_in_a_process", lambda name, key, threads: memory[key])
    out = tmp_path / "train.json"
    words = ["--configs", "small", "--rounds", "1", "--num_workers", "0", "--out", str(out)]
    bench.main([*words, "--threads", str(torch.get_num_threads())])
    found = json.loads(out.read_text())
    small = found["configs"]["small"]
    assert small["images"] == 2
    assert small["peak_memory_bytes"] == memory
    assert set(small["steps"]) == {"plain fp32", "ours fp32", "ours bf16"}
    for name, step in small["steps"].items():
        assert step["images_per_second"] == pytest.approx(2 / step["seconds"])
        assert ("share_outside_the_network" in step) == name.startswith("ours")
        assert step["operations"] > 1e6
    assert "make peers" in found["left_out"]
    assert small["steps"]["ours fp32"]["ours_per_operation"]["median"] == 1
    for part in (found["losses"], small["updates"]):
        assert part["seconds"].keys() == {"ours", "plain"}
        assert part["speedup"]["median"] > 0
    text = capsys.readouterr().out
    assert "| small  | ours fp32, checkpointing |" in text
    assert "40%" in text


def test_record_of_a_gpu_has_all_variants(bench, tiny, as_on_a_gpu):
    found = bench.measure(tiny, 1, 0, torch.device("cpu"), compiled=True)
    names = [f"ours {precision}" for precision in ("fp32", "tf32", "bf16")]
    names += [f"{name}, compiled" for name in names]
    assert list(found["steps"]) == ["plain fp32", *names]
    assert bench.default_configurations(torch.device("cuda")) == "small,cifar10,imagenet64"
    for name in names:
        step = found["steps"][name]
        assert step["share_outside_the_network"] < 1
        assert step["ours_per_operation"]["median"] == 1


@pytest.mark.parametrize("key", ["plain fp32", "ours fp32, checkpointing"])
def test_memory_of_a_step_is_counted(bench, tiny, key):
    bytes_added = bench.memory_of(tiny, key, torch.device("cpu"))
    assert isinstance(bytes_added, int)
    assert bytes_added >= 0  # in a process that has had more in use before, there may be no peak


def test_unknown_configuration_is_named():
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "bench_train.py"), "--configs", "huge"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "--configs huge: choose among small, cifar10" in done.stderr
