import copy
import gc
import itertools
import math

import numpy as np
import pytest
import torch
from golden_data import (
    LOSSES,
    MEANS,
    VARIANCES,
    FormulaModel,
    assert_rel,
    formula_model,
    group,
    make_diffusion,
    npz,
)

from improved_diffusion import tables
from improved_diffusion.gaussian_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
)
from improved_diffusion.losses import (
    discretized_gaussian_log_likelihood,
    mean_flat,
    normal_kl,
)
from improved_diffusion.process import create_gaussian_diffusion
from improved_diffusion.respace import SpacedDiffusion
from improved_diffusion.rng import sample_generators
from improved_diffusion.tables import _extract_into_tensor

STEPS = 50
LEARNED = ("LEARNED", "LEARNED_RANGE")
PREFIXES = {
    "process": [
        "in",
        "q",
        *(f"p/{m}-{v}-clip{c}" for m in MEANS for v in VARIANCES for c in (0, 1)),
        "p/EPSILON-LEARNED_RANGE-denoised_fn",
        "p/EPSILON-LEARNED_RANGE-y",
    ],
    "losses": [
        *(f"{loss}-{m}-{v}" for loss in LOSSES for m in MEANS for v in VARIANCES),
        "spaced10-rescaled-RESCALED_MSE-EPSILON-LEARNED_RANGE",
        "seed77-MSE-EPSILON-LEARNED_RANGE",
        "bpd-EPSILON-LEARNED_RANGE-clip1",
        "bpd-START_X-FIXED_LARGE-clip0",
    ],
}


def recorded_input(name):
    return torch.tensor(npz("process")[f"in/{name}"])


@pytest.fixture
def x_start():
    return recorded_input("x_start")


@pytest.fixture
def noise():
    return recorded_input("noise")


@pytest.fixture
def t():
    return recorded_input("t")


@pytest.fixture
def x_t():
    return torch.tensor(npz("process")["q/q_sample"])


def broadcast_moments(moments, like):
    names = ("mean", "variance", "log_variance")
    return {name: value.expand(like.shape) for name, value in zip(names, moments, strict=True)}


def assert_equals_recorded(out, file, prefix, tol):
    recorded = group(file, prefix)
    assert set(out) == set(recorded)
    for name, value in recorded.items():
        assert_rel(out[name], value, tol)


# -- recorded numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize("file", PREFIXES)
def test_every_recorded_number_is_compared(file):
    tested = tuple(prefix + "/" for prefix in PREFIXES[file])
    assert [key for key in npz(file) if not key.startswith(tested)] == []


def test_q_sample_equals_the_recorded_one(x_start, noise, t, x_t):
    assert_rel(make_diffusion().q_sample(x_start, t, noise=noise), x_t, 1e-5)


def test_q_moments_equal_the_recorded_ones(x_start, t):
    out = broadcast_moments(make_diffusion().q_mean_variance(x_start, t), x_start)
    assert_equals_recorded(out, "process", "q/q_mean_variance", 1e-5)


def test_posterior_moments_equal_the_recorded_ones(x_start, x_t, t):
    moments = make_diffusion().q_posterior_mean_variance(x_start, x_t, t)
    out = broadcast_moments(moments, x_start)
    assert_equals_recorded(out, "process", "q/q_posterior", 1e-5)


def test_prior_bpd_equals_the_recorded_one(x_start):
    out = make_diffusion()._prior_bpd(x_start)
    np.testing.assert_allclose(out, npz("process")["q/prior_bpd"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("clip", [0, 1])
@pytest.mark.parametrize("var", VARIANCES)
@pytest.mark.parametrize("mean", MEANS)
def test_p_moments_equal_the_recorded_ones(mean, var, clip, x_t, t):
    diffusion = make_diffusion(mean=mean, var=var)
    out = diffusion.p_mean_variance(formula_model(var), x_t, t, clip_denoised=bool(clip))
    assert_equals_recorded(out, "process", f"p/{mean}-{var}-clip{clip}", 1e-5)


def test_p_moments_with_a_denoised_fn_equal_the_recorded_ones(x_t, t):
    out = make_diffusion().p_mean_variance(
        FormulaModel(), x_t, t, denoised_fn=lambda v: 0.9 * v - 0.05
    )
    assert_equals_recorded(out, "process", "p/EPSILON-LEARNED_RANGE-denoised_fn", 1e-5)


def test_p_moments_with_labels_equal_the_recorded_ones(x_t, t):
    out = make_diffusion().p_mean_variance(
        FormulaModel(), x_t, t, model_kwargs={"y": torch.arange(4)}
    )
    assert_equals_recorded(out, "process", "p/EPSILON-LEARNED_RANGE-y", 1e-5)


@pytest.mark.parametrize("var", VARIANCES)
@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("loss", LOSSES)
def test_training_losses_and_gradients_equal_the_recorded_ones(loss, mean, var, x_start, noise, t):
    model = formula_model(var)
    diffusion = make_diffusion(mean=mean, var=var, loss=loss)
    out = diffusion.training_losses(model, x_start, t, noise=noise)
    out["loss"].sum().backward()
    gradients = {
        f"d_{name}": torch.tensor(0.0) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }
    tol = 1e-4 if loss == "RESCALED_KL" else 1e-5
    assert_equals_recorded({**out, **gradients}, "losses", f"{loss}-{mean}-{var}", tol)


def test_training_losses_of_a_respaced_process_equal_the_recorded_ones(x_start, noise):
    diffusion = make_diffusion(respacing="10", loss="RESCALED_MSE", rescale_timesteps=True)
    out = diffusion.training_losses(
        FormulaModel(), x_start, torch.tensor([0, 9, 4, 7]), noise=noise
    )
    prefix = "spaced10-rescaled-RESCALED_MSE-EPSILON-LEARNED_RANGE"
    assert_equals_recorded(out, "losses", prefix, 1e-5)


def test_training_noise_is_the_one_draw_from_the_global_generator(x_start, t):
    torch.manual_seed(77)
    out = make_diffusion().training_losses(FormulaModel(), x_start, t)
    after = torch.get_rng_state()
    assert_rel(out["loss"], npz("losses")["seed77-MSE-EPSILON-LEARNED_RANGE/loss"], 1e-5)
    torch.manual_seed(77)
    torch.randn_like(x_start)
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize(
    ("mean", "var", "clip"), [("EPSILON", "LEARNED_RANGE", 1), ("START_X", "FIXED_LARGE", 0)]
)
def test_bits_per_dimension_equal_the_recorded_ones(mean, var, clip, x_start):
    diffusion = make_diffusion(respacing="10", mean=mean, var=var)
    torch.manual_seed(78)
    out = diffusion.calc_bpd_loop(formula_model(var), x_start, clip_denoised=bool(clip))
    prefix = f"bpd-{mean}-{var}-clip{clip}"
    prior = group("losses", prefix)["prior_bpd"]
    np.testing.assert_allclose(out["prior_bpd"], prior, rtol=0, atol=1e-6)
    assert_equals_recorded(out, "losses", prefix, 1e-5)


# -- the forward process and its inverse -----------------------------------------------------------


@pytest.fixture(params=["linear", "cosine"])
def diffusion(request):
    return make_diffusion(schedule=request.param, cls=GaussianDiffusion)


def test_x_start_is_recovered_from_x_t_and_its_noise(diffusion):
    t = torch.arange(STEPS)
    x_start, noise = torch.randn(2, STEPS, 1, 3, 3, dtype=torch.float64)
    x_t = diffusion.q_sample(x_start, t, noise=noise)
    # the tables are looked up in float32, and dividing by sqrt(alpha_bar) magnifies that
    scale = torch.tensor(diffusion.sqrt_recip_alphas_cumprod).view(-1, 1, 1, 1)
    error = diffusion._predict_xstart_from_eps(x_t, t, noise) - x_start
    assert (error.abs() / scale).max() < 1e-6


def test_noise_and_x_start_predictions_are_inverse(diffusion):
    t = torch.arange(STEPS)
    x_t, eps = torch.randn(2, STEPS, 1, 3, 3, dtype=torch.float64)
    x_start = diffusion._predict_xstart_from_eps(x_t, t, eps)
    torch.testing.assert_close(
        diffusion._predict_eps_from_xstart(x_t, t, x_start), eps, rtol=1e-9, atol=1e-9
    )


def test_x_start_is_recovered_from_the_posterior_mean(diffusion):
    t = torch.arange(STEPS)
    x_start, x_t = torch.randn(2, STEPS, 1, 3, 3, dtype=torch.float64)
    mean, _, _ = diffusion.q_posterior_mean_variance(x_start, x_t, t)
    torch.testing.assert_close(
        diffusion._predict_xstart_from_xprev(x_t, t, mean), x_start, rtol=1e-9, atol=1e-9
    )


def test_posterior_follows_from_bayes_rule(diffusion):
    """q(x_{t-1} | x_t, x_0) is q(x_t | x_{t-1}) q(x_{t-1} | x_0), both Gaussian, normalised:
    precisions add, and the mean is weighted by them."""
    betas = diffusion.betas[1:]
    alpha_bar_prev = np.cumprod(1 - diffusion.betas)[:-1]
    variance = 1 / ((1 - betas) / betas + 1 / (1 - alpha_bar_prev))
    np.testing.assert_allclose(diffusion.posterior_variance[1:], variance, rtol=1e-10)

    x_start, x_t = torch.randn(2, STEPS, 2, dtype=torch.float64)
    mean, var, log_var = diffusion.q_posterior_mean_variance(x_start, x_t, torch.arange(STEPS))
    weight_start = variance * np.sqrt(alpha_bar_prev) / (1 - alpha_bar_prev)
    weight_t = variance * np.sqrt(1 - betas) / betas
    by_hand = weight_start[:, None] * x_start[1:].numpy() + weight_t[:, None] * x_t[1:].numpy()
    np.testing.assert_allclose(mean[1:], by_hand, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(var[1:, 0], variance, rtol=1e-6)
    np.testing.assert_allclose(log_var[1:, 0], np.log(variance), rtol=1e-6)


def test_posterior_before_the_first_step_is_x_start_itself(diffusion):
    x_start, x_t = torch.randn(2, 4, 3)
    mean, variance, log_variance = diffusion.q_posterior_mean_variance(
        x_start, x_t, torch.zeros(4, dtype=torch.long)
    )
    torch.testing.assert_close(mean, x_start)
    assert torch.equal(variance, torch.zeros(4, 3))
    first = np.log(diffusion.posterior_variance[1])  # that of t = 1, as 0 has no logarithm
    torch.testing.assert_close(log_variance, torch.full((4, 3), first, dtype=torch.float32))


def test_posterior_averaged_over_x_t_gives_the_previous_marginal(diffusion):
    """E over q(x_t | x_0) of q(x_{t-1} | x_t, x_0) is q(x_{t-1} | x_0)."""
    d = diffusion
    mean = d.posterior_mean_coef1 + d.posterior_mean_coef2 * d.sqrt_alphas_cumprod
    np.testing.assert_allclose(mean, np.sqrt(d.alphas_cumprod_prev), rtol=1e-10)
    variance = d.posterior_variance + d.posterior_mean_coef2**2 * (1 - d.alphas_cumprod)
    np.testing.assert_allclose(variance, 1 - d.alphas_cumprod_prev, atol=1e-12)


def test_noising_step_by_step_gives_the_moments_of_q(diffusion):
    x_start = torch.tensor([0.7], dtype=torch.float64)
    mean, variance = 0.7, 0.0
    for i, beta in enumerate(diffusion.betas):
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        ours = diffusion.q_mean_variance(x_start, torch.tensor([i]))
        assert ours[0].item() == pytest.approx(mean, rel=1e-6)
        assert ours[1].item() == pytest.approx(variance, rel=1e-6)
        assert ours[2].item() == pytest.approx(math.log(variance), rel=1e-6, abs=1e-9)


def test_q_sample_draws_with_the_moments_of_q(diffusion):
    x_start = torch.full((1, 40_000), 0.7)
    for i in (0, 20, STEPS - 1):
        t = torch.tensor([i])
        x_t = diffusion.q_sample(x_start, t)
        mean, variance, _ = diffusion.q_mean_variance(x_start, t)
        sigma = math.sqrt(variance[0, 0])
        assert x_t.mean().item() == pytest.approx(mean[0, 0].item(), abs=0.025 * sigma)
        assert x_t.std().item() == pytest.approx(sigma, rel=0.02)


# -- the reverse process ---------------------------------------------------------------------------


def fixed_log_variance(var, x, t):
    return make_diffusion(var=var).p_mean_variance(FormulaModel(False), x, t)["log_variance"]


@pytest.mark.parametrize(("end", "fixed"), [(-1.0, "FIXED_SMALL"), (1.0, "FIXED_LARGE")])
def test_learned_range_ends_at_the_fixed_variances(end, fixed):
    diffusion = make_diffusion(var="LEARNED_RANGE")
    t = torch.arange(1, STEPS)
    x = torch.randn(len(t), 1, 2, 2)

    def model(x, t):
        return torch.cat([x, torch.full_like(x, end)], dim=1)

    out = diffusion.p_mean_variance(model, x, t)
    torch.testing.assert_close(out["log_variance"], fixed_log_variance(fixed, x, t))
    torch.testing.assert_close(out["variance"], out["log_variance"].exp())


def test_learned_range_is_linear_in_the_logarithm():
    diffusion = make_diffusion(var="LEARNED_RANGE")
    x, t = torch.randn(3, 1, 2, 2), torch.full((3,), 7)
    v = torch.tensor([0.0, 0.5, 3.0]).view(3, 1, 1, 1)  # 3 lies outside, and is not clamped
    out = diffusion.p_mean_variance(lambda x, t: torch.cat([x, v.expand_as(x)], dim=1), x, t)
    small, large = (fixed_log_variance(var, x, t) for var in ("FIXED_SMALL", "FIXED_LARGE"))
    torch.testing.assert_close(out["log_variance"], small + (v + 1) / 2 * (large - small))


def test_clipping_bounds_the_estimate_of_x_start_after_the_denoised_fn():
    x, t = 5 * torch.randn(8, 1, 4, 4), torch.full((8,), 3)
    diffusion = make_diffusion(mean="START_X", var="FIXED_SMALL")
    seen = []

    def denoised_fn(x_start):
        seen.append(x_start)
        return 2 * x_start

    out = diffusion.p_mean_variance(lambda x, t: x, x, t, denoised_fn=denoised_fn)
    assert torch.equal(seen[0], x)
    assert torch.equal(out["pred_xstart"], (2 * x).clamp(-1, 1))
    assert (2 * x).abs().max() > 1
    free = diffusion.p_mean_variance(lambda x, t: x, x, t, clip_denoised=False)
    assert torch.equal(free["pred_xstart"], x)


def test_clipping_leaves_the_mean_of_a_previous_x_model_alone():
    x, t = 5 * torch.randn(8, 1, 4, 4), torch.full((8,), 3)
    diffusion = make_diffusion(mean="PREVIOUS_X", var="FIXED_SMALL")
    out = diffusion.p_mean_variance(lambda x, t: 0.9 * x, x, t, clip_denoised=True)
    assert torch.equal(out["mean"], 0.9 * x)
    assert out["pred_xstart"].abs().max() <= 1


# -- losses ----------------------------------------------------------------------------------------


class Output:
    """A model whose output is a leaf tensor, so that gradients by mean and variance show."""

    def __init__(self, like):
        self.value = torch.randn(len(like), 2 * like.shape[1], *like.shape[2:], requires_grad=True)

    def __call__(self, x, t):
        return self.value

    def gradients(self, loss):
        (gradient,) = torch.autograd.grad(loss.sum(), self.value)
        return gradient.chunk(2, dim=1)


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("var", LEARNED)
@pytest.mark.parametrize("loss", ["MSE", "RESCALED_MSE"])
def test_bound_in_the_hybrid_loss_trains_the_variance_and_not_the_mean(
    loss, var, mean, x_start, noise, t
):
    diffusion = make_diffusion(mean=mean, var=var, loss=loss)
    model = Output(x_start)
    terms = diffusion.training_losses(model, x_start, t, noise=noise)
    torch.testing.assert_close(terms["loss"], terms["mse"] + terms["vb"])
    by_mean, by_variance = model.gradients(terms["vb"])
    assert not by_mean.any()
    assert all(image.any() for image in by_variance)
    terms = diffusion.training_losses(model, x_start, t, noise=noise)
    by_mean, by_variance = model.gradients(terms["mse"])
    assert all(image.any() for image in by_mean)
    assert not by_variance.any()


@pytest.mark.parametrize("var", LEARNED)
@pytest.mark.parametrize("loss", ["KL", "RESCALED_KL"])
def test_bound_as_the_loss_trains_mean_and_variance(loss, var, x_start, noise):
    model = Output(x_start)
    t = torch.tensor([1, 5, 24, 49])
    terms = make_diffusion(var=var, loss=loss).training_losses(model, x_start, t, noise=noise)
    for gradient in model.gradients(terms["loss"]):
        assert all(image.any() for image in gradient)


@pytest.mark.parametrize("steps", [[0, 7, 0, 31], [5, 7, 1, 31], [0, 0, 0, 0]])
@pytest.mark.parametrize("loss", ["KL", "MSE"])
def test_bound_is_the_decoders_at_0_and_a_divergence_elsewhere(loss, steps, x_start, noise):
    """Values and gradients, though only what is needed of either is computed."""
    diffusion = make_diffusion(var="LEARNED_RANGE", loss=loss)
    model, t = Output(x_start), torch.tensor(steps)
    terms = diffusion.training_losses(model, x_start, t, noise=noise)
    found = terms["loss"] if loss == "KL" else terms["vb"]

    output, x_t = model.value, diffusion.q_sample(x_start, t, noise)
    if loss == "MSE":  # the bound trains the variance alone
        mean, values = output.chunk(2, dim=1)
        output = torch.cat([mean.detach(), values], dim=1)
    p = diffusion.p_mean_variance(lambda *_: output, x_t, t, clip_denoised=False)
    mean, _, log_variance = diffusion.q_posterior_mean_variance(x_start, x_t, t)
    kl = normal_kl(mean, log_variance, p["mean"], p["log_variance"])
    nll = -discretized_gaussian_log_likelihood(
        x_start, means=p["mean"], log_scales=0.5 * p["log_variance"]
    )
    expected = torch.where(t == 0, mean_flat(nll), mean_flat(kl)) / math.log(2)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    for ours, theirs in zip(model.gradients(found), model.gradients(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_bound_reads_no_timesteps_of_a_device(x_start, noise, t):
    """A read would raise, as there are no values on the device meta."""
    diffusion = make_diffusion(var="LEARNED_RANGE")
    x_start, noise, t = (tensor.to("meta") for tensor in (x_start, noise, t))
    output = torch.cat([noise, noise], dim=1).requires_grad_()
    terms = diffusion.training_losses(lambda x, t: output, x_start, t, noise=noise)
    terms["loss"].sum().backward()
    assert terms["vb"].shape == (len(x_start),)
    assert output.grad.shape == output.shape


@pytest.mark.parametrize("steps", [50, 400])
@pytest.mark.parametrize("var", LEARNED)
def test_rescaled_mse_scales_the_bound_by_the_steps_per_thousand(var, steps, x_start, noise, t):
    plain, rescaled = (
        make_diffusion(steps, var=var, loss=loss).training_losses(
            FormulaModel(), x_start, t, noise=noise
        )
        for loss in ("MSE", "RESCALED_MSE")
    )
    torch.testing.assert_close(rescaled["vb"], plain["vb"] * steps / 1000)
    torch.testing.assert_close(rescaled["mse"], plain["mse"])


def test_rescaled_kl_is_the_bounds_term_times_the_number_of_steps(x_start, noise, t):
    plain, rescaled = (
        make_diffusion(30, respacing="20", loss=loss).training_losses(
            FormulaModel(), x_start, t.clamp(max=19), noise=noise
        )
        for loss in ("KL", "RESCALED_KL")
    )
    torch.testing.assert_close(rescaled["loss"], 20 * plain["loss"])


@pytest.mark.parametrize(
    ("mean", "target"),
    [
        ("EPSILON", lambda d, x_start, x_t, t, noise: noise),
        ("START_X", lambda d, x_start, x_t, t, noise: x_start),
        (
            "PREVIOUS_X",
            lambda d, x_start, x_t, t, noise: d.q_posterior_mean_variance(x_start, x_t, t)[0],
        ),
    ],
    ids=["EPSILON", "START_X", "PREVIOUS_X"],
)
def test_model_that_hits_the_target_has_no_squared_error(mean, target, x_start, noise, t):
    diffusion = make_diffusion(mean=mean, var="FIXED_SMALL")
    x_t = diffusion.q_sample(x_start, t, noise=noise)
    right = target(diffusion, x_start, x_t, t, noise)
    perfect = diffusion.training_losses(lambda x, t: right, x_start, t, noise=noise)
    assert torch.equal(perfect["loss"], torch.zeros(4))
    off = diffusion.training_losses(lambda x, t: right + 0.5, x_start, t, noise=noise)
    torch.testing.assert_close(off["mse"], torch.full((4,), 0.25))


def test_labels_reach_the_model_in_every_loss(x_start, noise, t):
    for loss, var in itertools.product(LOSSES, VARIANCES):
        diffusion = make_diffusion(loss=loss, var=var)
        plain, labelled = (
            diffusion.training_losses(
                formula_model(var), x_start, t, noise=noise, model_kwargs={"y": y}
            )["loss"]
            for y in (torch.zeros(4), torch.arange(4.0))
        )
        assert plain[0] == labelled[0]
        assert not torch.isclose(plain[1:], labelled[1:]).any()


def test_bits_per_dimension_pass_labels_on_and_keep_no_graph(x_start):
    diffusion, model = make_diffusion(respacing="3"), FormulaModel()
    torch.manual_seed(5)
    plain = diffusion.calc_bpd_loop(model, x_start)
    torch.manual_seed(5)
    labelled = diffusion.calc_bpd_loop(model, x_start, model_kwargs={"y": torch.arange(4.0)})
    assert not any(values.requires_grad for values in plain.values())
    assert torch.equal(labelled["vb"][0], plain["vb"][0])  # label 0 adds nothing
    assert not torch.isclose(labelled["vb"][1:], plain["vb"][1:]).any()


def test_bits_of_an_image_depend_on_its_generator_and_not_on_the_batch(x_start):
    diffusion, model = make_diffusion(respacing="5"), FormulaModel()
    before = torch.get_rng_state()
    whole, *parts = (
        diffusion.calc_bpd_loop(
            model, x_start[images], generator=sample_generators(0, range(4)[images])
        )
        for images in (slice(0, 4), slice(0, 1), slice(1, 4))
    )
    assert torch.equal(torch.get_rng_state(), before)
    for name, values in whole.items():
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), values)
    torch.manual_seed(8)
    expected = diffusion.calc_bpd_loop(model, x_start)["total_bpd"]
    one = diffusion.calc_bpd_loop(model, x_start, generator=torch.Generator().manual_seed(8))
    torch.testing.assert_close(one["total_bpd"], expected)


# -- processes of one step -------------------------------------------------------------------------


def one_step_process(kind, **options):
    if kind == "respaced to 1":
        return make_diffusion(STEPS, respacing="1", **options)
    return make_diffusion(1, schedule="cosine", cls=GaussianDiffusion, **options)


@pytest.mark.parametrize("kind", ["respaced to 1", "T = 1"])
@pytest.mark.parametrize("var", VARIANCES)
@pytest.mark.parametrize("mean", MEANS)
def test_process_of_one_step_trains_and_samples_with_finite_numbers(mean, var, kind):
    shape = (3, 2, 4, 4)
    x_start, t = torch.rand(shape) * 2 - 1, torch.zeros(3, dtype=torch.long)
    for loss in LOSSES:
        diffusion = one_step_process(kind, mean=mean, var=var, loss=loss)
        assert diffusion.num_timesteps == 1
        model = formula_model(var)
        terms = diffusion.training_losses(model, x_start, t)
        terms["loss"].sum().backward()
        assert all(torch.isfinite(term).all() for term in terms.values())
        assert torch.isfinite(model.a.grad)

    diffusion = one_step_process(kind, mean=mean, var=var)
    model = formula_model(var)
    outputs = [
        diffusion.p_sample_loop(model, shape),
        diffusion.ddim_sample_loop(model, shape),
        diffusion.ddim_sample_loop(model, shape, eta=1.0),
        *diffusion.ddim_reverse_sample(model, x_start, t).values(),
        *diffusion.calc_bpd_loop(model, x_start).values(),
        *diffusion.p_mean_variance(model, x_start, t).values(),
        *diffusion.q_mean_variance(x_start, t),
        *diffusion.q_posterior_mean_variance(x_start, x_start, t),
    ]
    assert all(torch.isfinite(output).all() for output in outputs)


def test_process_of_one_step_samples_the_models_estimate_of_x_start():
    for kind in ("respaced to 1", "T = 1"):
        diffusion = one_step_process(kind, mean="START_X", var="FIXED_LARGE")
        noise = torch.randn(3, 1, 4, 4)
        model = FormulaModel(learns_variance=False)
        for sample in (diffusion.p_sample_loop, diffusion.ddim_sample_loop):
            out = sample(model, noise.shape, noise=noise)
            expected = model(noise, torch.zeros(3)).clamp(-1, 1)
            torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_log_variances_of_a_one_step_process_are_those_of_its_beta():
    diffusion = one_step_process("T = 1")
    np.testing.assert_allclose(diffusion.posterior_log_variance_clipped, np.log(diffusion.betas))


# -- subclasses ------------------------------------------------------------------------------------


def test_overridden_p_mean_variance_is_used_everywhere(x_start, t):
    class Shifted(SpacedDiffusion):
        def p_mean_variance(
            self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None
        ):
            out = super().p_mean_variance(
                model, x, t, clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs
            )
            self.calls += 1
            return {**out, "mean": torch.full_like(x, 0.25), "pred_xstart": torch.zeros_like(x)}

    diffusion = make_diffusion(respacing="5", cls=Shifted)
    model, shape = FormulaModel(), tuple(x_start.shape)
    calls = []
    for use in (
        lambda: diffusion.p_sample_loop(model, shape),
        lambda: diffusion.ddim_sample_loop(model, shape),
        lambda: diffusion.calc_bpd_loop(model, x_start)["xstart_mse"][:, 0],
        lambda: diffusion.training_losses(model, x_start, t % 5)["vb"],
    ):
        diffusion.calls = 0
        calls.append((use(), diffusion.calls))
    assert [count for _, count in calls] == [5, 5, 5, 1]
    assert torch.equal(calls[0][0], torch.full(shape, 0.25))
    torch.testing.assert_close(calls[1][0], torch.zeros(shape))
    torch.testing.assert_close(calls[2][0], x_start.square().flatten(1).mean(dim=1))


def test_overridden_q_sample_is_used_in_training(x_start, t):
    class Still(GaussianDiffusion):
        def q_sample(self, x_start, t, noise=None):
            return x_start

    model = FormulaModel(learns_variance=False)
    diffusion = make_diffusion(cls=Still, mean="START_X", var="FIXED_SMALL")
    out = diffusion.training_losses(model, x_start, t)
    expected = (model(x_start, t) - x_start).square().flatten(1).mean(dim=1)
    torch.testing.assert_close(out["mse"], expected)


# -- tables ----------------------------------------------------------------------------------------

TABLES = sorted({key.split("/")[1] for key in npz("schedules")})


@pytest.mark.parametrize("cls", [GaussianDiffusion, SpacedDiffusion])
@pytest.mark.parametrize("table", TABLES)
def test_tables_are_read_only(table, cls):
    values = getattr(make_diffusion(cls=cls), table)
    assert values.shape == (STEPS,)
    with pytest.raises(ValueError, match="read-only"):
        values[0] = 0.5


def test_betas_of_the_caller_stay_theirs():
    betas = np.linspace(0.01, 0.2, 10)
    options = {
        "model_mean_type": ModelMeanType.EPSILON,
        "model_var_type": ModelVarType.FIXED_SMALL,
        "loss_type": LossType.MSE,
    }
    plain = GaussianDiffusion(betas=betas, **options)
    spaced = SpacedDiffusion(use_timesteps=range(10), betas=betas, **options)
    before = plain.betas.copy(), spaced.betas.copy()
    betas[:] = 0.5
    assert np.array_equal(plain.betas, before[0])
    assert np.array_equal(spaced.betas, before[1])


def test_lookups_are_float32_of_the_shape_asked_for_and_stay_the_same():
    diffusion = make_diffusion()
    t = torch.tensor([3, 0, 49])
    first = _extract_into_tensor(diffusion.posterior_variance, t, (3, 2, 4, 4))
    assert first.dtype == torch.float32
    assert first.shape == (3, 2, 4, 4)
    expected = torch.tensor(diffusion.posterior_variance[[3, 0, 49]], dtype=torch.float32)
    assert torch.equal(first[:, 1, 2, 3], expected)
    for _ in range(100):
        again = _extract_into_tensor(diffusion.posterior_variance, t, (3, 2, 4, 4))
        assert torch.equal(first, again)


def test_results_do_not_depend_on_what_was_computed_before(x_start, x_t, t):
    diffusion = make_diffusion()
    model = FormulaModel()
    fresh = diffusion.p_mean_variance(model, x_t, t)
    for _ in range(3):
        diffusion.p_sample_loop(model, (2, 3, 4, 4))
        diffusion.training_losses(model, x_start, t)["loss"].sum().backward()
        diffusion.calc_bpd_loop(model, x_start)
    again = diffusion.p_mean_variance(model, x_t, t)
    assert all(torch.equal(fresh[key], again[key]) for key in fresh)


def test_processes_that_come_and_go_do_not_get_each_others_tables(x_start):
    """Arrays reuse the addresses of dead ones; what is kept for a device must not."""
    t = torch.full((4,), 5)
    for steps in range(21, 60):
        diffusion = make_diffusion(steps)
        mean, _, _ = diffusion.q_mean_variance(x_start, t)
        expected = x_start * np.float32(np.sqrt(np.cumprod(1 - diffusion.betas)[5]))
        torch.testing.assert_close(mean, expected)


def test_device_copies_of_tables_die_with_their_process(x_start, t):
    gc.collect()
    before = len(tables._on_device)
    diffusion = make_diffusion()
    diffusion.training_losses(FormulaModel(), x_start, t)
    assert len(tables._on_device) > before
    del diffusion
    gc.collect()
    assert len(tables._on_device) == before


def test_a_table_that_a_user_puts_in_its_place_is_used_and_may_change(x_t, t):
    diffusion = make_diffusion(var="FIXED_SMALL")
    model = FormulaModel(learns_variance=False)
    diffusion.p_mean_variance(model, x_t, t)
    mine = np.full(STEPS, 0.125)
    diffusion.posterior_variance = mine
    out = diffusion.p_mean_variance(model, x_t, t)["variance"]
    assert torch.equal(out, torch.full_like(out, 0.125))
    mine[:] = 0.5
    out = diffusion.p_mean_variance(model, x_t, t)["variance"]
    assert torch.equal(out, torch.full_like(out, 0.5))


def test_copy_of_a_process_computes_the_same(x_t, t):
    diffusion = make_diffusion(respacing="10")
    t = t.clamp(max=9)
    out = diffusion.p_mean_variance(FormulaModel(), x_t, t)
    again = copy.deepcopy(diffusion).p_mean_variance(FormulaModel(), x_t, t)
    assert all(torch.equal(out[key], again[key]) for key in out)


def test_device_copies_are_kept_for_each_type():
    table = make_diffusion().betas
    for dtype in (torch.float32, torch.float64, torch.float32):
        copy_of_table = tables.device_table(table, torch.device("cpu"), dtype)
        assert torch.equal(copy_of_table, torch.tensor(table, dtype=dtype))
        assert copy_of_table.dtype == dtype
        assert tables.device_table(table, torch.device("cpu"), dtype) is copy_of_table


def test_device_copy_made_in_inference_mode_takes_part_in_gradients_later():
    table = make_diffusion().betas
    with torch.inference_mode():
        tables.device_table(table, torch.device("cpu"), torch.float32)
    weight = torch.ones(STEPS, requires_grad=True)
    (tables.device_table(table, torch.device("cpu"), torch.float32) * weight).sum().backward()
    torch.testing.assert_close(weight.grad, torch.tensor(table, dtype=torch.float32))


@pytest.mark.parametrize("respacing", ["", "10"])
def test_sampling_in_inference_mode_first_does_not_break_training(respacing, x_start):
    diffusion = make_diffusion(respacing=respacing, loss="RESCALED_MSE")
    model = FormulaModel()
    t = torch.tensor([0, 1, 5, 9])
    with torch.inference_mode():
        diffusion.p_sample_loop(model, (2, 3, 4, 4))
        diffusion.ddim_sample_loop(model, (2, 3, 4, 4))
        diffusion.calc_bpd_loop(model, x_start)
    x_start = x_start.clone().requires_grad_()
    diffusion.training_losses(model, x_start, t)["loss"].sum().backward()
    diffusion.p_mean_variance(model, x_start, t)["mean"].sum().backward()
    assert torch.isfinite(x_start.grad).all()
    assert model.a.grad != 0


# -- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "betas", [[], [[0.1, 0.2]], [0.1, 0.0], [0.1, -0.2], [0.1, 1.5], [0.1, float("nan")]]
)
def test_betas_that_are_no_noise_levels_are_an_error(betas):
    with pytest.raises(ValueError, match="betas"):
        GaussianDiffusion(
            betas=betas,
            model_mean_type=ModelMeanType.EPSILON,
            model_var_type=ModelVarType.FIXED_SMALL,
            loss_type=LossType.MSE,
        )


def test_only_the_kl_losses_are_the_variational_bound():
    assert [loss.name for loss in LossType if loss.is_vb()] == ["KL", "RESCALED_KL"]


def test_overrides_with_parameters_of_their_own_get_each_argument_under_its_name():
    seen = []

    class Guided(SpacedDiffusion):
        def p_sample(self, model, x, t, cond_fn=None, model_kwargs=None, **kwargs):
            seen.append(("ddpm", cond_fn, model_kwargs))
            return super().p_sample(model, x, t, model_kwargs=model_kwargs, **kwargs)

        def ddim_sample(self, model, x, t, cond_fn=None, model_kwargs=None, **kwargs):
            seen.append(("ddim", cond_fn, model_kwargs))
            return super().ddim_sample(model, x, t, model_kwargs=model_kwargs, **kwargs)

        def p_mean_variance(self, model, x, t, **kwargs):
            assert kwargs["model_kwargs"] == {"y": labels}
            return super().p_mean_variance(model, x, t, **kwargs)

    labels = torch.tensor([1, 2])
    diffusion = make_diffusion(10, schedule="cosine", var="FIXED_LARGE", cls=Guided)
    model = formula_model("FIXED_LARGE")
    arguments = {"model_kwargs": {"y": labels}, "device": "cpu"}
    diffusion.p_sample_loop(model, (2, 3, 4, 4), **arguments)
    diffusion.ddim_sample_loop(model, (2, 3, 4, 4), **arguments)
    diffusion.calc_bpd_loop(model, torch.zeros(2, 3, 4, 4), model_kwargs={"y": labels})
    assert seen == [("ddpm", None, {"y": labels})] * 10 + [("ddim", None, {"y": labels})] * 10


def test_learned_variance_has_gradients_per_sample():
    """By torch.func.vmap, under which no value of t is known: as one by one."""
    diffusion = create_gaussian_diffusion(steps=8, learn_sigma=True, noise_schedule="cosine")
    torch.manual_seed(0)
    x, noise, output = (torch.randn(3, c, 2, 2) for c in (1, 1, 2))
    t = torch.tensor([0, 3, 0])

    def loss(output, x, t, noise):
        losses = diffusion.training_losses(
            lambda *_: output[None], x[None], t[None], noise=noise[None]
        )
        return losses["loss"].sum()

    together = torch.func.vmap(torch.func.grad(loss))(output, x, t, noise)
    for row in range(3):
        one = output[row].clone().requires_grad_()
        (alone,) = torch.autograd.grad(loss(one, x[row], t[row], noise[row]), one)
        torch.testing.assert_close(together[row], alone)
