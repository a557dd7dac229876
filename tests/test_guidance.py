"""Guidance: against recorded numbers, and on mixtures of which everything is known exactly."""

import itertools
import math

import numpy as np
import pytest
import torch
from analytic import Mixture, as_network
from golden_data import assert_rel, group, make_diffusion
from torch import nn
from toy import make_model as make_toy_model

from improved_diffusion import dist_util, logger
from improved_diffusion.denoiser import Denoiser
from improved_diffusion.errors import UserError
from improved_diffusion.gaussian_diffusion import GaussianDiffusion
from improved_diffusion.guidance import (
    Autoguidance,
    ClassifierFree,
    ClassifierGuidance,
    GuidanceOptions,
    Unlabelled,
    classifier_gradient,
    guided_model,
    parse_interval,
    rescaled,
)
from improved_diffusion.noise_levels import NoiseLevels, noise_levels
from improved_diffusion.process import create_gaussian_diffusion
from improved_diffusion.respace import SpacedDiffusion
from improved_diffusion.rng import StepDraws, sample_generators
from improved_diffusion.solvers import SOLVERS
from improved_diffusion.train_util import TrainLoop, check_class_dropout

PREDICTED = ["eps", "xstart", "v", "flow"]
STEPS = 200
SHAPE = (1, 2, 2)
LEVELS = [0.05, 0.4, 1.0, 3.0, 20.0]

# two classes, the second of two lumps; the data of both together is what an unlabelled model knows
MEANS = torch.tensor([-0.5, 0.7, 0.2])[:, None, None, None] * torch.tensor([[[1.0, 0.6], [-1, 1]]])
WEIGHTS = [0.5, 0.25, 0.25]
STDS = [0.2, 0.1, 0.25]
ALL = Mixture(WEIGHTS, MEANS, STDS)
CLASSES = [Mixture([1.0], MEANS[:1], STDS[:1]), Mixture([0.5, 0.5], MEANS[1:], STDS[1:])]
SHARES = [0.5, 0.5]
NULL = 2


def process(predict="eps", respacing="", rescale=False, **options):
    return create_gaussian_diffusion(
        steps=STEPS,
        noise_schedule="linear" if predict == "flow" else "cosine",
        predict=predict,
        timestep_respacing=respacing,
        rescale_timesteps=rescale,
        **options,
    )


def exact_classifier(diffusion):
    """(x_t, t) -> log p(y | x_t), up to what does not depend on y; t as the network sees it."""
    levels = NoiseLevels(diffusion)

    def classifier(x_t, t):
        t = t.double() * (STEPS / 1000 if diffusion.rescale_timesteps else 1)
        sigma = torch.from_numpy(levels.sigma_of_t(t.numpy()))
        x = x_t.double() * torch.sqrt(1 + sigma**2).view(-1, 1, 1, 1)
        logs = [
            math.log(share) + data.log_density(x, sigma)
            for share, data in zip(SHARES, CLASSES, strict=True)
        ]
        return torch.stack(logs, dim=1)

    return classifier


class OfClasses:
    """The best network of each class, and of all data for the label NULL; keeps what it is asked.

    :ivar calls: the labels of each call.
    """

    def __init__(self, diffusion, learned=False):
        self.networks = [as_network(diffusion, data) for data in (*CLASSES, ALL)]
        self.learned = learned
        self.calls = []

    def __call__(self, x, t, y):
        assert len(x) == len(t) == len(y)
        self.calls.append(y.tolist())
        outputs = torch.stack([network(x, t) for network in self.networks])  # [3, N, C, ...]
        prediction = outputs[y, torch.arange(len(x))]
        if not self.learned:
            return prediction
        values = (y.view(-1, 1, 1, 1) + 0.1 * x).to(x)
        return torch.cat([prediction, values], dim=1)


def noised(count=6, seed=1):
    """x = x_start + sigma noise at various levels: x float64 [N, ...], sigma [N], labels [N]."""
    sigma = torch.tensor(list(itertools.islice(itertools.cycle(LEVELS), count)))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, *SHAPE, generator=generator, dtype=torch.float64)
    x = ALL.sample(count, seed=seed) + sigma.view(-1, 1, 1, 1) * noise
    return x, sigma.double(), torch.arange(count) % 2


def by_class(x, sigma, y):
    """D(x, sigma) of the class of each sample."""
    estimates = torch.stack([data(x, sigma) for data in (*CLASSES, ALL)])
    return estimates[y, torch.arange(len(x))]


# -- recorded numbers ------------------------------------------------------------------------------


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fake_model(x, t, y=None):
    s = (t / 1000).view(-1, 1, 1, 1)
    return torch.cat([0.3 * x + 0.1 * s, torch.tanh(x - s)], dim=1)


def fake_gradient(x, t, y=None):
    return -0.7 * x + 0.05 * (t / 1000).view(-1, 1, 1, 1)


RECORDED = {"all": "", "ddim20": "ddim20", "10,5": "10,5"}


def recorded_process(name):
    return create_gaussian_diffusion(
        steps=100, learn_sigma=True, noise_schedule="cosine", timestep_respacing=RECORDED[name]
    )


@pytest.mark.parametrize("name", RECORDED)
def test_conditions_are_the_recorded_ones(name):
    diffusion, recorded = recorded_process(name), group("guided_guidance", f"guide/{name}")
    x, t = draw(13, 3, 3, 4, 4), torch.tensor([0, 4, 9])
    out = diffusion.p_mean_variance(fake_model, x, t)
    before = {key: value.clone() for key, value in out.items()}
    mean = diffusion.condition_mean(fake_gradient, out, x, t, model_kwargs={})
    assert_rel(mean, recorded["condition_mean"], 1e-5)
    score = diffusion.condition_score(fake_gradient, out, x, t, model_kwargs={})
    assert_rel(score["pred_xstart"], recorded["condition_score_pred_xstart"], 1e-5)
    assert_rel(score["mean"], recorded["condition_score_mean"], 1e-5)
    for key in ("variance", "log_variance"):
        assert torch.equal(score[key], before[key])
    for key, value in out.items():
        assert torch.equal(value, before[key]), "what was given has changed"


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
@pytest.mark.parametrize("name", RECORDED)
def test_guided_samples_are_the_recorded_ones(name, loop):
    torch.manual_seed(21)
    samples = getattr(recorded_process(name), loop)(
        fake_model,
        (2, 3, 4, 4),
        noise=draw(14, 2, 3, 4, 4),
        cond_fn=fake_gradient,
        model_kwargs={},
        device="cpu",
    )
    assert_rel(samples, group("guided_guidance", f"guide/{name}")[loop], 1e-5)


# -- guidance by a classifier: closed form ---------------------------------------------------------


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("predict", PREDICTED)
def test_exact_classifier_makes_the_exact_conditional_of_any_prediction(predict, rescale):
    diffusion = process(predict, rescale=rescale)
    x, sigma, y = noised(10)
    gradient = classifier_gradient(exact_classifier(diffusion))
    guided = ClassifierGuidance(Unlabelled(as_network(diffusion, ALL)), diffusion, gradient)
    found = Denoiser(guided, diffusion, {"y": y})(x, sigma)
    exact = by_class(x, sigma, y)
    assert torch.allclose(found, exact, atol=1e-4 * exact.abs().max().item())
    assert not torch.allclose(ALL(x, sigma), exact, atol=0.05)


def test_twice_the_gradient_moves_the_score_twice_as_far():
    diffusion = process("v")
    x, sigma, y = noised()
    network = Unlabelled(as_network(diffusion, ALL))
    scores = [
        Denoiser(model, diffusion, {"y": y}).score(x, sigma)
        for model in (
            network,
            *(
                ClassifierGuidance(
                    network, diffusion, classifier_gradient(exact_classifier(diffusion), scale)
                )
                for scale in (1.0, 2.0)
            ),
        )
    ]
    assert torch.allclose(scores[2] - scores[0], 2 * (scores[1] - scores[0]), atol=1e-6)


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "unipc", "dpmpp_2m_sde", "ancestral"])
@pytest.mark.parametrize("predict", ["eps", "v"])
def test_solvers_draw_the_same_by_exact_classifier_as_by_exact_class(predict, name):
    diffusion = process(predict)
    sigmas = noise_levels(diffusion, 15, "log_snr")
    y = torch.arange(8) % 2
    gradient = classifier_gradient(exact_classifier(diffusion))
    guided = ClassifierGuidance(Unlabelled(as_network(diffusion, ALL)), diffusion, gradient)

    def solve(model):
        denoise = Denoiser(model, diffusion, {"y": y})
        generators = sample_generators(0, range(8))
        noise = torch.stack([torch.randn(SHAPE, generator=g) for g in generators]).double()
        own = {"posterior": denoise.posterior} if name == "ancestral" else {}
        x = denoise.initial(noise, float(sigmas[0]))
        return SOLVERS[name](denoise, x, sigmas, generator=generators, **own)

    assert torch.allclose(solve(guided), solve(OfClasses(diffusion)), atol=2e-3)


@pytest.mark.parametrize("predict", PREDICTED)
@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_loops_draw_the_class_by_the_exact_classifier(loop, predict):
    diffusion = process(predict)
    gradient = classifier_gradient(exact_classifier(diffusion))
    y = torch.arange(1600) % 2
    samples = getattr(diffusion, loop)(
        Unlabelled(as_network(diffusion, ALL)),
        (len(y), *SHAPE),
        clip_denoised=False,
        model_kwargs={"y": y},
        device="cpu",
        cond_fn=gradient,
    )
    for label, data in enumerate(CLASSES):
        of_class = samples[y == label].double().flatten(1)
        assert (of_class.mean(dim=0) - data.mean()).abs().max() < 0.05
        covariance = torch.cov(of_class.T)
        assert (covariance - data.covariance()).abs().max() < 0.02


def test_a_learned_variance_stays_under_the_gradient():
    diffusion = process(learn_sigma=True)
    model = OfClasses(process(), learned=True)
    x, t, y = torch.randn(4, *SHAPE), torch.tensor([3, 50, 120, 199]), torch.tensor([0, 1, 1, 0])
    guided = ClassifierGuidance(model, diffusion, lambda x, t, y: torch.ones_like(x))
    plain, values = model(x, t, y).chunk(2, dim=1)
    prediction, kept = guided(x, t, y=y).chunk(2, dim=1)
    assert torch.equal(kept, values)
    s = torch.from_numpy(diffusion.sqrt_one_minus_alphas_cumprod[t])
    moved = (plain - prediction).double()
    assert torch.allclose(moved, s.view(-1, 1, 1, 1).expand_as(moved), atol=1e-5)


def test_labels_go_to_the_classifier_alone_where_the_model_has_none():
    seen = []
    model = Unlabelled(lambda x, t, **kwargs: seen.append(kwargs) or x)
    model(torch.zeros(2, 1), torch.zeros(2), y=torch.tensor([0, 1]), low_res=3)
    assert seen == [{"low_res": 3}]


def test_gradient_of_a_classifier_by_hand():
    weight = torch.tensor([[1.0, -2.0], [0.5, 3.0], [0.0, 1.0]])  # logits [N, 3] of x [N, 2]
    x, y = torch.tensor([[0.3, -0.1], [1.0, 2.0]]), torch.tensor([2, 0])
    expected = weight[y] - torch.softmax(x @ weight.T, dim=1) @ weight
    with torch.no_grad():
        found = classifier_gradient(lambda x, t: x @ weight.T, 3.0)(x, torch.zeros(2), y=y)
    assert torch.allclose(found, 3 * expected, atol=1e-6)
    assert not found.requires_grad
    half = classifier_gradient(lambda x, t: (x @ weight.T).half())(x, torch.zeros(2), y=y)
    assert half.dtype == torch.float32
    with pytest.raises(UserError, match="labels"):
        classifier_gradient(lambda x, t: x)(x, torch.zeros(2))


def test_mean_and_score_form_agree_in_small_steps():
    """The mean moves by beta g in the one, by beta / sqrt(1 - beta) g in the other."""
    diffusion = create_gaussian_diffusion(steps=1000, noise_schedule="cosine")
    t = torch.tensor([10, 300, 700, 900])
    x = torch.randn(4, *SHAPE)

    def model(x, t):
        return 0.5 * x

    def gradient(x, t):
        return 1 + 0.1 * x

    out = diffusion.p_mean_variance(model, x, t, clip_denoised=False)
    by_mean = diffusion.condition_mean(gradient, out, x, t) - out["mean"]
    by_score = diffusion.condition_score(gradient, out, x, t)["mean"] - out["mean"]
    beta = torch.from_numpy(diffusion.betas[t]).float().view(-1, 1, 1, 1)
    assert torch.allclose(by_score / by_mean, (1 / (1 - beta).sqrt()).expand_as(x), rtol=2e-3)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_gradient_is_taken_at_the_timesteps_that_the_model_sees(loop, rescale):
    diffusion = process(respacing="7", rescale=rescale)
    seen = {"model": [], "gradient": []}

    def recorded(name):
        return lambda x, t, y: seen[name].append((t, y)) or 0.1 * x

    getattr(diffusion, loop)(
        recorded("model"),
        (2, *SHAPE),
        model_kwargs={"y": "labels"},
        device="cpu",
        cond_fn=recorded("gradient"),
    )
    expected = np.array(diffusion.timestep_map[::-1]) * (1000 / STEPS if rescale else 1)
    for calls in seen.values():
        assert [t.tolist() for t, _ in calls] == [[step, step] for step in expected]
        assert {y for _, y in calls} == {"labels"}


def test_base_process_rescales_for_the_gradient_too():
    diffusion = make_diffusion(50, cls=GaussianDiffusion, rescale_timesteps=True, var="FIXED_LARGE")
    seen = []
    diffusion.p_sample(
        lambda x, t: x,
        torch.zeros(1, 1),
        torch.tensor([7]),
        cond_fn=lambda x, t: seen.append(t.item()) or x,
    )
    assert seen == [7 * 20]


@pytest.mark.parametrize("predict", ["v", "xstart", "flow"])
def test_without_signal_there_is_nothing_to_guide_by(predict):
    diffusion = process(predict, zero_terminal_snr=predict != "flow")
    x, t = torch.randn(2, *SHAPE), torch.tensor([STEPS - 1, STEPS - 40])

    def model(x, t):
        return 0.3 * x

    def gradient(x, t):
        return torch.ones_like(x)

    out = diffusion.p_mean_variance(model, x, t, clip_denoised=False)
    guided = diffusion.condition_score(gradient, out, x, t)
    wrapped = ClassifierGuidance(model, diffusion, gradient)(x, t)
    mean = diffusion.condition_mean(gradient, out, x, t)
    pairs = [(guided["pred_xstart"], out["pred_xstart"]), (wrapped, model(x, t))]
    for found, plain in (*pairs, (mean, out["mean"])):
        assert torch.equal(found[0], plain[0])
        assert found[1].isfinite().all()
        assert not torch.allclose(found[1], plain[1], atol=1e-3)


class Old(SpacedDiffusion):
    """A user's process, from before there was guidance."""

    def p_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
        return super().p_sample(model, x, t, clip_denoised, denoised_fn, model_kwargs)

    def ddim_sample(
        self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None, eta=0.0
    ):
        return super().ddim_sample(model, x, t, clip_denoised, denoised_fn, model_kwargs, eta)


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_without_a_gradient_nothing_changes(loop):
    def samples(cls=SpacedDiffusion, **options):
        torch.manual_seed(5)
        diffusion = make_diffusion(25, cls=cls, var="FIXED_LARGE")
        return getattr(diffusion, loop)(lambda x, t: 0.2 * x, (2, *SHAPE), device="cpu", **options)

    plain = samples()
    assert torch.equal(samples(Old), plain)
    assert torch.equal(samples(cond_fn=None), plain)
    if loop == "p_sample_loop":  # whose mean moves by 0; DDIM's x_0 comes back by way of eps
        assert torch.equal(samples(cond_fn=lambda x, t: torch.zeros_like(x)), plain)


# -- extrapolation: classifier-free guidance and autoguidance --------------------------------------


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("predict", PREDICTED)
def test_classifier_free_extrapolates_the_exact_estimate(predict, scale):
    diffusion = process(predict)
    x, sigma, y = noised()
    guided = ClassifierFree(OfClasses(diffusion), diffusion, scale, NULL)
    found = Denoiser(guided, diffusion, {"y": y})(x, sigma)
    without = ALL(x, sigma)
    exact = without + scale * (by_class(x, sigma, y) - without)
    assert torch.allclose(found, exact, atol=1e-4 * max(1, exact.abs().max().item()))


@pytest.mark.parametrize("predict", PREDICTED)
def test_autoguidance_extrapolates_the_exact_estimate(predict):
    diffusion = process(predict)
    x, sigma, _ = noised()
    blurred = Mixture(WEIGHTS, MEANS, [2 * std for std in STDS])
    guided = Autoguidance(
        as_network(diffusion, ALL), as_network(diffusion, blurred), diffusion, 2.5
    )
    found = Denoiser(guided, diffusion)(x, sigma)
    exact = blurred(x, sigma) + 2.5 * (ALL(x, sigma) - blurred(x, sigma))
    assert torch.allclose(found, exact, atol=1e-4 * max(1, exact.abs().max().item()))


def test_guided_samples_have_less_variance_round_the_class():
    diffusion = process("v", respacing="25")
    y = torch.zeros(400, dtype=torch.long)
    spread = [
        diffusion.ddim_sample_loop(
            ClassifierFree(OfClasses(diffusion), diffusion, scale, NULL),
            (len(y), *SHAPE),
            clip_denoised=False,
            model_kwargs={"y": y},
            device="cpu",
        )
        for scale in (1.0, 4.0)
    ]
    away = [samples.mean(dim=0) - CLASSES[0].mean().view(SHAPE) for samples in spread]
    assert away[0].abs().max() < 0.05
    assert spread[1].std(dim=0).mean() < 0.9 * spread[0].std(dim=0).mean()
    other = CLASSES[1].mean() - CLASSES[0].mean()
    assert (away[1].double().flatten() @ other) / other.norm() < -0.02  # away from the other class


def test_both_passes_are_one_call_with_a_batch_of_two():
    calls = []

    def model(x, t, **kwargs):
        calls.append((x, t, kwargs))
        return x

    x, t, y = torch.randn(3, *SHAPE), torch.tensor([1, 2, 3]), torch.tensor([1, 0, 1])
    low_res = torch.randn(3, *SHAPE)
    wrapper = ClassifierFree(model, process(), 2.0, NULL)
    wrapper(x, t, y=y, low_res=low_res, other="text")
    ((both_x, both_t, kwargs),) = calls
    assert torch.equal(both_x, torch.cat([x, x]))
    assert both_t.tolist() == [1, 2, 3, 1, 2, 3]
    assert kwargs["y"].tolist() == [1, 0, 1, NULL, NULL, NULL]
    assert torch.equal(kwargs["low_res"], torch.cat([low_res, low_res]))
    assert kwargs["other"] == "text"


def test_scale_1_is_the_model_alone():
    model, weak = OfClasses(process()), OfClasses(process())
    x, t, y = torch.randn(2, *SHAPE), torch.tensor([3, 150]), torch.tensor([0, 1])
    for wrapper in (
        ClassifierFree(model, process(), 1.0, NULL, rescale=1.0),
        Autoguidance(model, weak, process(), 1.0),
    ):
        model.calls.clear()
        assert torch.equal(wrapper(x, t, y=y), model(x, t, y))
        assert model.calls == [[0, 1], [0, 1]]
    assert not weak.calls


@pytest.mark.parametrize("weak_learns", [False, True])
def test_a_learned_variance_is_the_models_own(weak_learns):
    diffusion = process()
    model = OfClasses(diffusion, learned=True)
    x, t, y = torch.randn(4, *SHAPE), torch.tensor([3, 50, 120, 199]), torch.tensor([0, 1, 1, 0])
    null = torch.full_like(y, NULL)
    _, values = model(x, t, y).chunk(2, dim=1)
    weak = OfClasses(diffusion, learned=weak_learns)
    for wrapper in (
        ClassifierFree(model, diffusion, 3.0, NULL, rescale=0.5),
        Autoguidance(model, lambda x, t, y: weak(x, t, null), diffusion, 3.0),
    ):
        out = wrapper(x, t, y=y)
        assert out.shape == (4, 2, 2, 2)
        assert torch.equal(out.chunk(2, dim=1)[1], values)
    without_class = ClassifierFree(model, diffusion, 0.0, NULL)(x, t, y=y)
    assert torch.allclose(without_class, model(x, t, null), atol=1e-6)


def test_guidance_outside_of_its_interval_is_off():
    diffusion = process(rescale=True)
    levels = NoiseLevels(diffusion)
    t = torch.tensor([40.0, 60.0, 100.0, 130.0])
    sigma = levels.sigma_of_t(t.numpy())
    interval = (float(sigma[0]), float(sigma[2]))  # open below: the first is outside
    x, y = torch.randn(4, *SHAPE), torch.tensor([0, 1, 1, 0])
    seen = t * (1000 / STEPS)
    model = OfClasses(diffusion)
    plain = model(x, seen, y)
    wrapper = ClassifierFree(model, diffusion, 3.0, NULL, interval=interval)
    everywhere = ClassifierFree(model, diffusion, 3.0, NULL)(x, seen, y=y)
    found = wrapper(x, seen, y=y)
    for i, inside in enumerate([False, True, True, False]):
        assert torch.equal(found[i], (everywhere if inside else plain)[i])
        assert not torch.allclose(everywhere[i], plain[i], atol=1e-3)

    model.calls.clear()
    wrapper(x[:1], seen[:1], y=y[:1])
    wrapper(x[1:2], seen[1:2], y=y[1:2])
    assert model.calls == [[0], [1, NULL]]  # one pass outside


def test_interval_of_a_respaced_process_is_that_of_its_levels():
    diffusion = process(respacing="10")
    model = OfClasses(diffusion)
    sigma = np.sqrt((1 - diffusion.alphas_cumprod) / diffusion.alphas_cumprod)
    wrapper = ClassifierFree(
        model, diffusion, 2.0, NULL, interval=(sigma[3] * 1.01, sigma[6] * 1.01)
    )
    diffusion.p_sample_loop(
        wrapper, (1, *SHAPE), model_kwargs={"y": torch.tensor([0])}, device="cpu"
    )
    assert [len(call) for call in model.calls] == [1, 1, 1, 2, 2, 2, 1, 1, 1, 1]  # from t = 9


def test_rescaling_keeps_the_standard_deviation_of_each_image():
    guided, plain = 5 + 3 * torch.randn(4, *SHAPE), torch.randn(4, *SHAPE)
    spread = [y.flatten(1).std(dim=1) for y in (plain, rescaled(guided, plain, 1.0))]
    assert torch.allclose(*spread)
    half = rescaled(guided, plain, 0.5)
    assert torch.allclose(half, (guided + rescaled(guided, plain, 1.0)) / 2)
    assert torch.equal(rescaled(guided, plain, 0.0), guided)
    zeros = torch.zeros_like(plain)  # of a network that has not learned
    assert torch.equal(rescaled(zeros, zeros, 0.7), zeros)


def test_rescaling_is_of_the_networks_output():
    diffusion = process("v")
    model = OfClasses(diffusion)
    x, t, y = torch.randn(4, *SHAPE), torch.tensor([3, 50, 120, 199]), torch.tensor([0, 1, 1, 0])
    plain = model(x, t, y)
    guided = ClassifierFree(model, diffusion, 5.0, NULL)(x, t, y=y)
    found = ClassifierFree(model, diffusion, 5.0, NULL, rescale=0.7)(x, t, y=y)
    assert torch.allclose(found, rescaled(guided, plain, 0.7))


def test_wrappers_are_modules_that_samplers_take():
    model = make_toy_model(num_classes=3, null_class=True)
    weak = make_toy_model(seed=1, num_classes=3, null_class=True)
    diffusion = make_diffusion(4, schedule="cosine", var="FIXED_LARGE")
    two_channels = make_diffusion(4, schedule="cosine")  # the toy network learns its variance
    y = torch.tensor([0, 2])
    gradient = classifier_gradient(lambda x, t: x.flatten(1)[:, :3])
    for wrapper in (
        ClassifierFree(model, diffusion, 2.0, model.null_class),
        Autoguidance(model, weak, diffusion, 2.0),
        ClassifierGuidance(model, diffusion, gradient),
    ):
        assert isinstance(wrapper, nn.Module)
        assert len(list(wrapper.parameters())) >= len(list(model.parameters()))
        samples = two_channels.p_sample_loop(wrapper, (2, 1, 8, 8), model_kwargs={"y": y})
        assert samples.shape == (2, 1, 8, 8)
        assert samples.isfinite().all()


# -- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"guidance_scale": -1.0}, "--guidance_scale -1.0"),
        ({"guidance_scale": math.inf}, "--guidance_scale inf"),
        ({"guidance_scale": math.nan}, "--guidance_scale nan"),
        ({"guidance_scale": 2.0, "guidance_rescale": 1.5}, "--guidance_rescale 1.5"),
        ({"guidance_rescale": 0.5}, "--guidance_rescale 0.5 needs --guidance_scale"),
        ({"guidance_interval": "0.1,2"}, "--guidance_interval 0.1,2 needs --guidance_scale"),
        ({"guide_path": "weak.pt"}, "--guide_path weak.pt needs --guidance_scale"),
        ({"guidance_scale": 2.0, "guidance_interval": "a,b"}, "--guidance_interval 'a,b'"),
        ({"guidance_scale": 2.0, "guidance_interval": "1"}, "--guidance_interval 1: must be"),
        ({"guidance_scale": 2.0, "guidance_interval": "2,1"}, "--guidance_interval 2,1: must"),
        ({"guidance_scale": 2.0, "guidance_interval": "-1,1"}, "--guidance_interval -1,1: must"),
        ({"guidance_scale": 2.0, "guidance_interval": "nan,1"}, "--guidance_interval nan,1: m"),
    ],
)
def test_wrong_options_are_named(options, error):
    with pytest.raises(UserError) as caught:
        GuidanceOptions(**options)
    assert str(caught.value).startswith(error)
    assert "\n" not in str(caught.value)


def test_intervals_are_read():
    assert parse_interval("") is None
    assert parse_interval("0.3, 5") == (0.3, 5.0)
    assert parse_interval("0,inf") == (0.0, math.inf)


def test_options_choose_the_kind_of_guidance():
    diffusion = process()
    model, weak = make_toy_model(num_classes=3, null_class=True), make_toy_model(num_classes=3)
    assert guided_model(model, diffusion, GuidanceOptions()) is model
    options = GuidanceOptions(guidance_scale=3.0, guidance_interval="0.2,4", guidance_rescale=0.7)
    guided = guided_model(model, diffusion, options)
    assert isinstance(guided, ClassifierFree)
    assert (guided.scale, guided.null_class) == (3.0, 3)
    assert (guided.interval, guided.rescale) == ((0.2, 4.0), 0.7)
    options = GuidanceOptions(guidance_scale=2.0, guide_path="weak.pt")
    led = guided_model(model, diffusion, options, weak)
    assert isinstance(led, Autoguidance)
    assert led.weak is weak
    with pytest.raises(ValueError, match="must be given"):
        guided_model(model, diffusion, options)


@pytest.mark.parametrize(
    ("arguments", "reason"), [({"num_classes": 3}, "--class_dropout"), ({}, "without classes")]
)
def test_guidance_of_a_model_without_a_null_class_is_refused(arguments, reason):
    with pytest.raises(UserError, match="^--guidance_scale 3: .*" + reason):
        guided_model(make_toy_model(**arguments), process(), GuidanceOptions(guidance_scale=3.0))


def test_classifier_free_guidance_needs_labels():
    with pytest.raises(UserError, match="labels"):
        ClassifierFree(lambda x, t: x, process(), 2.0, NULL)(torch.zeros(1, 1), torch.zeros(1))


def test_a_mean_of_fixed_steps_has_no_score():
    diffusion = make_diffusion(25, mean="PREVIOUS_X")
    with pytest.raises(UserError, match="PREVIOUS_X"):
        ClassifierGuidance(lambda x, t: x, diffusion, lambda x, t: x)


# -- class dropout ---------------------------------------------------------------------------------


class Labels:
    """A process that keeps the labels that training asks about."""

    num_timesteps = 40

    def __init__(self):
        self.seen = []

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        self.seen.append(model_kwargs["y"].clone())
        prediction = model(x_start, t, **model_kwargs)
        return {"loss": prediction.square().mean(dim=(1, 2, 3))}


@pytest.fixture
def labels_seen(tmp_path, monkeypatch):
    """The labels that one process of several saw in each of its steps, [steps, N]."""

    def run(rank=0, batch_size=8, microbatch=-1, seed=3, steps=2, share=0.4):
        objective = Labels()
        own = OF_IMAGES[rank * batch_size : (rank + 1) * batch_size].clone()
        batch = torch.zeros(batch_size, 1, 8, 8), {"y": own}
        loop = TrainLoop(
            model=make_toy_model(num_classes=3, null_class=True),
            diffusion=objective,
            data=itertools.repeat(batch),
            batch_size=batch_size,
            microbatch=microbatch,
            lr=1e-3,
            ema_rate="0.9",
            log_interval=100,
            save_interval=100,
            resume_checkpoint="",
            seed=seed,
            class_dropout=share,
        )
        with monkeypatch.context() as patch:
            patch.setattr(dist_util, "get_rank", lambda: rank)
            for _ in range(steps):
                loop.forward_backward(*batch)
                loop.step += 1
        assert torch.equal(own, OF_IMAGES[rank * batch_size :][:batch_size])
        return torch.cat(objective.seen).view(steps, -1)

    with logger.scoped_configure(str(tmp_path / "run"), format_strs=[]):
        yield run


OF_IMAGES = torch.arange(8) % 3


def test_same_labels_are_dropped_however_the_batch_is_spread(labels_seen):
    whole = labels_seen()
    dropped = whole == 3
    assert dropped.any()
    assert torch.equal(whole[~dropped], OF_IMAGES.expand(2, 8)[~dropped])
    assert not torch.equal(dropped[0], dropped[1])
    assert torch.equal(labels_seen(microbatch=3), whole)
    ranks = [labels_seen(rank=rank, batch_size=4, microbatch=3) for rank in range(2)]
    assert torch.equal(torch.cat(ranks, dim=1), whole)
    assert not torch.equal(labels_seen(seed=4), whole)


def test_without_dropout_labels_are_the_data_s(labels_seen):
    assert torch.equal(labels_seen(share=0.0), OF_IMAGES.expand(2, 8))


def test_without_a_seed_labels_are_dropped_by_the_global_generator(labels_seen):
    torch.manual_seed(1)
    first = labels_seen(seed=None, share=0.5, steps=4)
    torch.manual_seed(1)
    assert torch.equal(labels_seen(seed=None, share=0.5, steps=4), first)
    assert 0 < (first == 3).float().mean() < 1


def test_share_of_dropped_labels_is_the_one_asked_for():
    chosen = np.stack(
        [StepDraws(0, step, 0).chosen(0.1, slice(0, 50), "class dropout") for step in range(400)]
    )
    assert abs(chosen.mean() - 0.1) < 4 * math.sqrt(0.09 / chosen.size)
    assert abs(np.corrcoef(chosen[:, :-1].ravel(), chosen[:, 1:].ravel())[0, 1]) < 0.03
    assert not StepDraws(0, 0, 0).chosen(0.0, slice(0, 50), "class dropout").any()
    uniforms = np.stack([StepDraws(0, step, 0).uniforms(slice(0, 50)) for step in range(400)])
    assert abs(np.corrcoef(chosen.ravel(), uniforms.ravel())[0, 1]) < 0.03  # nor of the timesteps


@pytest.mark.parametrize("arguments", [{"num_classes": 3}, {}])
def test_class_dropout_needs_a_null_class(arguments):
    with pytest.raises(UserError, match=r"--class_dropout 0\.1 needs"):
        check_class_dropout(make_toy_model(**arguments), 0.1)
    check_class_dropout(make_toy_model(**arguments), 0.0)


@pytest.mark.parametrize("share", [-0.1, 1.0, math.nan])
def test_share_of_labels_is_below_1(share):
    with pytest.raises(UserError, match="--class_dropout"):
        check_class_dropout(make_toy_model(num_classes=3, null_class=True), share)
