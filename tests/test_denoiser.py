"""One model seen as D(x, sigma), eps, x_start, v, score and velocity, at any level."""

import math

import numpy as np
import pytest
import torch

from improved_diffusion.denoiser import VIEWS, Denoiser, convert
from improved_diffusion.errors import UserError
from improved_diffusion.gaussian_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
)
from improved_diffusion.predictions import PREDICTIONS
from improved_diffusion.respace import SpacedDiffusion, space_timesteps
from improved_diffusion.schedules import get_named_beta_schedule
from improved_diffusion.unet import SuperResModel, UNetModel

STEPS = 50
ALL_VIEWS = [*VIEWS, "score"]
SIGMAS = [0.02, 0.7, 30.0]


def process(mean="EPSILON", var="FIXED_LARGE", respacing="", rescale=False, betas=None):
    arguments = {
        "model_mean_type": ModelMeanType[mean],
        "model_var_type": ModelVarType[var],
        "loss_type": LossType.MSE,
        "rescale_timesteps": rescale,
    }
    if betas is not None:
        return GaussianDiffusion(betas=betas, **arguments)
    kept = space_timesteps(STEPS, respacing or [STEPS])
    betas = get_named_beta_schedule("linear", STEPS)
    return SpacedDiffusion(use_timesteps=kept, betas=betas, **arguments)


def without_signal():
    betas = get_named_beta_schedule("linear", STEPS)
    return np.append(betas[:-1], 1.0)


class Recorder:
    """A model that keeps its inputs and says the same whatever they are."""

    def __init__(self, output):
        self.output = output

    def __call__(self, x, t, **kwargs):
        self.x, self.t, self.kwargs = x, t, kwargs
        return self.output.expand(len(x), *self.output.shape[1:]).to(x)


def noised(sigma, dtype=torch.float64):
    torch.manual_seed(3)
    x_start = torch.rand(4, 2, 3, 3, dtype=dtype) * 2 - 1
    noise = torch.randn_like(x_start)
    return x_start, noise, x_start + sigma * noise


def exact_views(x_start, noise, sigma):
    """Every view from its definition."""
    a, s = 1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma)
    return {
        "x_start": x_start,
        "eps": noise,
        "v": a * noise - s * x_start,
        "velocity": noise - x_start,
        "score": -noise / sigma,
    }


# -- views -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("target", ALL_VIEWS)
@pytest.mark.parametrize("source", ALL_VIEWS)
def test_each_view_becomes_each_other_and_comes_back(source, target, sigma):
    x_start, noise, x = noised(sigma)
    views = exact_views(x_start, noise, sigma)
    there = convert(views[source], x, sigma, source, target)
    torch.testing.assert_close(there, views[target], rtol=1e-9, atol=1e-9)
    back = convert(there, x, sigma, target, source)
    torch.testing.assert_close(back, views[source], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("target", ALL_VIEWS)
@pytest.mark.parametrize("source", ALL_VIEWS)
def test_round_trips_hold_in_single_precision(source, target):
    x_start, noise, x = noised(1.3, torch.float32)
    y = exact_views(x_start, noise, 1.3)[source]
    there = convert(y, x, 1.3, source, target)
    assert there.dtype == torch.float32
    torch.testing.assert_close(convert(there, x, 1.3, target, source), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", list(PREDICTIONS))
@pytest.mark.parametrize("sigma", SIGMAS)
def test_a_network_of_any_prediction_gives_all_views(name, sigma):
    x_start, noise, x = noised(sigma)
    views = exact_views(x_start, noise, sigma)
    output = views[{"xstart": "x_start", "flow": "velocity"}.get(name, name)]
    denoiser = Denoiser(lambda *_: output, process(PREDICTIONS[name].name))
    found = {
        "x_start": denoiser.x_start(x, sigma),
        "eps": denoiser.eps(x, sigma),
        "v": denoiser.v(x, sigma),
        "velocity": denoiser.velocity(x, sigma),
        "score": denoiser.score(x, sigma),
    }
    for view, value in found.items():
        torch.testing.assert_close(value, views[view], rtol=1e-8, atol=1e-8)
    assert torch.equal(denoiser(x, sigma), found["x_start"])
    assert denoiser.evaluations == 6


def test_levels_may_differ_from_sample_to_sample():
    sigmas = torch.tensor([0.1, 0.5, 2.0, 7.0])
    x_start, noise, _ = noised(1.0)
    x = x_start + sigmas.double().view(-1, 1, 1, 1) * noise
    model = Recorder(torch.full((1, 2, 3, 3), 0.3))
    together = Denoiser(model, process("V"))(x, sigmas)
    seen = model.t
    for i, sigma in enumerate(sigmas.tolist()):
        alone = Denoiser(model, process("V"))(x[i : i + 1], sigma)
        torch.testing.assert_close(together[i : i + 1], alone)
        assert seen[i].item() == pytest.approx(model.t.item())


# -- what the network sees -------------------------------------------------------------------------


@pytest.mark.parametrize("mean", ["EPSILON", "FLOW"])
def test_the_network_sees_its_own_scaling_and_time(mean):
    diffusion = process(mean)
    model = Recorder(torch.zeros(1, 2, 3, 3))
    x_start, noise, _ = noised(1.0)
    t = 20
    alpha_bar = diffusion.alphas_cumprod[t]
    sigma = math.sqrt((1 - alpha_bar) / alpha_bar)
    Denoiser(model, diffusion, {"y": torch.arange(4)})(x_start + sigma * noise, sigma)
    if mean == "FLOW":
        tau = sigma / (1 + sigma)
        expected = (1 - tau) * x_start + tau * noise
    else:
        expected = math.sqrt(alpha_bar) * x_start + math.sqrt(1 - alpha_bar) * noise
    torch.testing.assert_close(model.x, expected)
    assert model.t.tolist() == [t] * 4
    assert model.kwargs["y"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("respacing", ["", "7"])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("mean", ["EPSILON", "START_X", "V", "FLOW"])
def test_at_the_process_own_steps_it_is_p_mean_variance(mean, rescale, respacing):
    """With a real network, whose timestep matters."""
    torch.manual_seed(0)
    model = UNetModel(1, 32, 1, 1, (), channel_mult=(1,))
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.05 * torch.randn_like(param))
    diffusion = process(mean, respacing=respacing, rescale=rescale)
    denoiser = Denoiser(model, diffusion)
    x_t = torch.randn(2, 1, 8, 8)
    for t in range(0, diffusion.num_timesteps, 3):
        alpha_bar = diffusion.alphas_cumprod[t]
        with torch.no_grad():
            expected = diffusion.p_mean_variance(
                model, x_t, torch.full((2,), t), clip_denoised=False
            )["pred_xstart"]
            found = denoiser(x_t / math.sqrt(alpha_bar), math.sqrt(1 / alpha_bar - 1))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_between_the_steps_t_is_interpolated_or_rounded():
    diffusion = process()
    model = Recorder(torch.zeros(1, 2, 3, 3))
    levels = Denoiser(model, diffusion).levels
    sigma = float(levels.sigma_of_t(20.3))
    _, _, x = noised(sigma)
    Denoiser(model, diffusion)(x, sigma)
    assert model.t[0].item() == pytest.approx(20.3, abs=1e-5)
    Denoiser(model, diffusion, discrete=True)(x, sigma)
    assert model.t.dtype == torch.int64
    assert model.t[0].item() == 20
    Denoiser(model, process(rescale=True))(x, sigma)
    assert model.t[0].item() == pytest.approx(20.3 * 1000 / STEPS, rel=1e-5)


def test_conditions_of_super_resolution_are_passed_on():
    torch.manual_seed(0)
    model = SuperResModel(in_channels=1, model_channels=32, out_channels=1, num_res_blocks=1,
                          attention_resolutions=(), channel_mult=(1,))  # fmt: skip
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.05 * torch.randn_like(param))
    x = torch.randn(2, 1, 8, 8)
    answers = [
        Denoiser(model, process(), {"low_res": torch.full((2, 1, 4, 4), level)})(x, 0.8)
        for level in (0.0, 1.0)
    ]
    assert (answers[0] - answers[1]).abs().max() > 1e-3


def test_estimates_are_clamped_and_changed_on_demand():
    model = Recorder(torch.full((1, 2, 3, 3), 3.0))
    _, _, x = noised(1.0)
    assert Denoiser(model, process("START_X"))(x, 1.0).unique().item() == 3
    clipped = Denoiser(model, process("START_X"), clip_denoised=True)
    assert clipped(x, 1.0).unique().item() == 1
    torch.testing.assert_close(clipped.eps(x, 1.0), x - 1)  # the views agree with it
    halved = Denoiser(model, process("START_X"), denoised_fn=lambda x_start: x_start / 10)
    assert halved(x, 1.0).unique().item() == pytest.approx(0.3)


# -- the learned variance --------------------------------------------------------------------------


@pytest.mark.parametrize("respacing", ["", "7"])
@pytest.mark.parametrize("var", [kind.name for kind in ModelVarType])
def test_the_posterior_is_the_process_own(var, respacing):
    """p_mean_variance at every step but the last, in the other scaling."""
    diffusion = process("V", var, respacing)
    width = 4 if var.startswith("LEARNED") else 2
    model = Recorder(torch.linspace(-1, 1, width * 9).view(1, width, 3, 3).double())
    x_t = torch.randn(3, 2, 3, 3, dtype=torch.float64)
    denoiser = Denoiser(model, diffusion)
    for t in range(1, diffusion.num_timesteps):
        expected = diffusion.p_mean_variance(model, x_t, torch.full((3,), t), clip_denoised=False)
        here, there = diffusion.alphas_cumprod[t], diffusion.alphas_cumprod[t - 1]
        found = denoiser.posterior(
            x_t / math.sqrt(here), math.sqrt(1 / here - 1), math.sqrt(1 / there - 1)
        )
        scale = math.sqrt(there)
        torch.testing.assert_close(found.mean * scale, expected["mean"], rtol=1e-5, atol=1e-5)
        variance = expected["variance"].double()
        torch.testing.assert_close(found.variance * there, variance, rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(found.x_start, expected["pred_xstart"], rtol=1e-5, atol=1e-5)


def test_the_raw_values_of_the_variance_are_offered():
    model = Recorder(torch.cat([torch.zeros(1, 2, 3, 3), torch.full((1, 2, 3, 3), 0.4)], dim=1))
    prediction = Denoiser(model, process(var="LEARNED_RANGE")).predict(noised(1.0)[2], 1.0)
    assert prediction.values.unique().item() == pytest.approx(0.4)
    fixed = Denoiser(Recorder(torch.zeros(1, 2, 3, 3)), process())
    assert fixed.predict(noised(1.0)[2], 1.0).values is None


def test_the_last_step_has_no_variance():
    model = Recorder(torch.full((1, 2, 3, 3), 0.3))
    posterior = Denoiser(model, process("START_X")).posterior(noised(0.1)[2], 0.1, 0.0)
    assert posterior.variance.abs().max() == 0
    torch.testing.assert_close(posterior.mean, posterior.x_start)


def test_sampling_begins_with_the_process_own_noise():
    noise = torch.randn(2, 1, 4, 4)
    denoiser = Denoiser(Recorder(noise), process())
    torch.testing.assert_close(denoiser.initial(noise, 3.0), noise * math.sqrt(10))


# -- what cannot be --------------------------------------------------------------------------------


def test_a_process_without_signal_at_its_end_begins_there():
    denoiser = Denoiser(
        Recorder(torch.full((1, 2, 3, 3), 0.3)), process("V", betas=without_signal())
    )
    sigma = denoiser.levels.sigma_max
    assert 1e3 < sigma < 1e5
    x = denoiser.initial(torch.randn(2, 2, 3, 3), sigma)
    torch.testing.assert_close(
        denoiser(x, sigma), torch.full((2, 2, 3, 3), -0.3), atol=1e-3, rtol=0
    )
    assert denoiser.model.t.tolist() == [STEPS - 1] * 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"mean": "PREVIOUS_X"}, "PREVIOUS_X .*eps, xstart, v, flow"),
        ({"betas": without_signal()}, "eps cannot begin .*xstart, v, flow"),
        ({"mean": "V", "betas": [0.1] * 20 + [1.0] + [0.1] * 29}, "not fall at step 21 of 50"),
        ({"mean": "V", "betas": [0.1] * 20 + [1e-20] + [0.1] * 29}, "not fall at step 20 of 50"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_has_no_views_is_refused(arguments, words):
    with pytest.raises(UserError, match=words):
        Denoiser(Recorder(torch.zeros(1)), process(**arguments))


@pytest.mark.parametrize("level", [np.float64(0.7), np.array(0.7), np.array([0.7, 0.7]), 0.7])
def test_levels_may_be_numpys(level):
    x, y = torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    expected = convert(y, x, torch.tensor(0.7, dtype=torch.float64), "x_start", "eps")
    torch.testing.assert_close(convert(y, x, level, "x_start", "eps"), expected)


def test_unknown_views_are_refused():
    with pytest.raises(UserError, match="unknown view 'noise'; choose one of x_start, eps, v"):
        convert(torch.zeros(1), torch.zeros(1), 1.0, "noise", "v")
