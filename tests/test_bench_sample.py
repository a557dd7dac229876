"""The benchmark of sampling: both candidates draw the same samples, and the table is complete."""

import json

import pytest
import torch
from script_runner import load_module

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench():
    return load_module("benchmarks", "bench_sample")


@pytest.fixture
def tiny(bench, monkeypatch):
    """The smallest network, as a configuration of its own; and no peers, which need a while."""
    configurations = load_module("benchmarks", "configurations")
    options = bench.ModelAndDiffusionOptions(
        image_size=8,
        num_channels=32,
        num_res_blocks=1,
        attention_resolutions="",
        learn_sigma=True,
    )
    configuration = configurations.Configuration(options, batch=2, batch_on_gpu=2)
    monkeypatch.setitem(configurations.CONFIGURATIONS, "small", configuration)
    monkeypatch.setattr(bench, "missing", lambda: "without peers")
    monkeypatch.setattr(bench, "OUTSIDE", configuration)
    return configuration


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m"])
def test_ours_and_the_plain_rendering_draw_the_same_samples(bench, sampler):
    sampling = bench.Sampling.of(bench.OUTSIDE, CPU, 12)
    model = sampling.fixed()
    torch.manual_seed(1)
    ours = sampling.ours(sampler, model)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    plain = sampling.plain(sampler, model)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-4)  # dpmpp_2m begins at sigma 157
    assert ours.std() > 0.1
    assert torch.equal(state, torch.get_rng_state())  # the same noise was drawn


def test_plain_rendering_knows_fixed_variances_and_eta(bench):
    for small in (False, True):
        options = bench.ModelAndDiffusionOptions(
            image_size=8, sigma_small=small, timestep_respacing="5"
        )
        diffusion, x = options.diffusion(), torch.randn(2, 3, 8, 8)
        plain = bench.PlainSampling(diffusion)
        output = torch.randn(2, 3, 8, 8)
        for sampler, own, eta in (
            ("ddpm", diffusion.p_sample_loop, {}),
            ("ddim", diffusion.ddim_sample_loop, {"eta": 1.0}),
        ):
            torch.manual_seed(0)
            ours = own(lambda x, t, output=output: output, x.shape, noise=x, device="cpu", **eta)
            torch.manual_seed(0)
            theirs = plain.sample(sampler, lambda x, t, output=output: output, x, **eta)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_networks_are_measured_with_all_samplers(bench, tiny, tmp_path, capsys):
    out = tmp_path / "sample.json"
    words = ["--rounds", "1", "--measured_steps", "2", "--outside_steps", "2", "--out", str(out)]
    bench.main([*words, "--threads", "1"])
    result = json.loads(out.read_text())
    of_small = result["configs"]["small"]
    assert of_small["images"] == 2
    for sampler, steps in (("ddpm", 250), ("ddim", 50), ("dpmpp_2m", 15)):
        one = of_small[sampler]["ours fp32"]
        assert of_small[sampler]["steps"] == steps
        rate = 2 / (one["seconds_per_step"] * steps)
        assert one["images_per_second"] == pytest.approx(rate)
        assert set(result["outside"][sampler]) == {"ours", "plain", "noise"}
    printed = capsys.readouterr().out
    assert printed.count("| dpmpp_2m") == 6
    assert "without peers" in printed


def test_images_of_a_gpu_are_drawn_in_all_variants(bench, tiny, as_on_a_gpu):
    found = bench.measure_images(tiny, CPU, 2, 1, compiled=True)
    names = [f"ours {precision}" for precision in ("fp32", "tf32", "bf16")]
    for sampler in bench.STEPS:
        expected = {"steps", "plain fp32", *names, *(f"{name}, compiled" for name in names)}
        assert set(found[sampler]) == expected
    assert bench.default_configurations(torch.device("cuda")) == "small,cifar10,imagenet64"


def test_step_outside_the_network_is_a_few_operations(bench):
    """A count, where a time would depend on the machine: table look-ups and passes over images."""
    sampling = bench.Sampling.of(bench.OUTSIDE, CPU, 8)
    model = sampling.fixed()
    for sampler, most in (("ddpm", 28), ("ddim", 36), ("dpmpp_2m", 10)):
        ours = bench.count_operations(lambda s=sampler: sampling.ours(s, model)) / 8
        plain = bench.count_operations(lambda s=sampler: sampling.plain(s, model)) / 8
        assert ours <= most
        assert ours < 0.7 * plain
