"""What a network can predict: each prediction is the others in other words, also at SNR 0."""

import itertools

import numpy as np
import pytest
import torch
from golden_data import formula_model
from test_closed_form import MU, GaussianData, S

from improved_diffusion import gaussian_sampling
from improved_diffusion.errors import UserError
from improved_diffusion.gaussian_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
)
from improved_diffusion.predictions import (
    PREDICTIONS,
    coefficients,
    loss_factor,
    named_prediction,
    path_scale,
    to_x_start,
)
from improved_diffusion.respace import SpacedDiffusion, space_timesteps
from improved_diffusion.schedules import get_named_beta_schedule, zero_terminal_snr

STEPS = 30
ALPHA_BAR = np.linspace(0.98, 0.02, STEPS)
KINDS = list(PREDICTIONS.values())
PAIRS = list(itertools.permutations(KINDS, 2))
AT_ZERO_SNR = [kind for kind in KINDS if kind != ModelMeanType.EPSILON]


def names(kinds):
    return [
        "-".join(k.name for k in kind) if isinstance(kind, tuple) else kind.name for kind in kinds
    ]


def process(
    kind, respacing="", betas=None, var=ModelVarType.FIXED_SMALL, loss=LossType.MSE, steps=STEPS
):
    betas = zero_terminal_snr(get_named_beta_schedule("cosine", steps)) if betas is None else betas
    return SpacedDiffusion(
        use_timesteps=space_timesteps(len(betas), respacing or [len(betas)]),
        betas=betas,
        model_mean_type=kind,
        model_var_type=var,
        loss_type=loss,
    )


# -- one plane, many coordinates


def test_names_of_predictions():
    assert named_prediction("v") is ModelMeanType.V
    with pytest.raises(UserError, match="--predict score: choose one of eps, xstart, v, flow"):
        named_prediction("score")
    with pytest.raises(UserError, match="PREVIOUS_X"):
        coefficients(ModelMeanType.PREVIOUS_X, ALPHA_BAR)


def test_predictions_are_those_of_the_papers():
    a, s = np.sqrt(ALPHA_BAR), np.sqrt(1 - ALPHA_BAR)
    x_start, eps = np.random.default_rng(0).normal(size=(2, STEPS))
    p, q = coefficients(ModelMeanType.V, ALPHA_BAR)
    np.testing.assert_allclose(p * x_start + q * eps, a * eps - s * x_start)
    p, q = coefficients(ModelMeanType.FLOW, ALPHA_BAR)
    tau = s / (a + s)

    def at(tau):
        return (1 - tau) * x_start + tau * eps

    np.testing.assert_allclose(path_scale(ALPHA_BAR) * (a * x_start + s * eps), at(tau))
    velocity = (at(tau + 1e-4) - at(tau - 1e-4)) / 2e-4
    np.testing.assert_allclose(p * x_start + q * eps, velocity, rtol=1e-8)


@pytest.mark.parametrize(("one", "other"), PAIRS, ids=names(PAIRS))
def test_target_of_one_prediction_gives_that_of_every_other(one, other):
    """By the process's own methods: x_start from one's target, and the other's target of it."""
    betas = 1 - ALPHA_BAR / np.append(1.0, ALPHA_BAR[:-1])
    ours, theirs = (process(kind, betas=betas) for kind in (one, other))
    x_start, noise = torch.randn(2, STEPS, 1, 4, dtype=torch.float64)
    t = torch.arange(STEPS)
    x_t = ours.q_sample(x_start, t, noise)
    found = ours._predict_xstart(x_t, t, ours._target(x_start, x_t, t, noise))
    torch.testing.assert_close(found, x_start, rtol=1e-4, atol=1e-4)
    eps = ours._predict_eps_from_xstart(x_t, t, found)
    torch.testing.assert_close(
        theirs._target(found, x_t, t, eps),
        theirs._target(x_start, x_t, t, noise),
        rtol=1e-4,
        atol=1e-3,  # float32 tables, and little noise at the first steps
    )


@pytest.mark.parametrize("kind", KINDS, ids=names(KINDS))
def test_coefficients_and_loss_factor_belong_together(kind):
    p, q = coefficients(kind, ALPHA_BAR)
    a, s = np.sqrt(ALPHA_BAR), np.sqrt(1 - ALPHA_BAR)
    of_x_t, of_output = to_x_start(kind, ALPHA_BAR)
    x_start, eps, error = np.random.default_rng(1).normal(size=(3, STEPS))
    x_t = a * x_start + s * eps

    def predict(estimate):
        return p * estimate + q * (x_t - a * estimate) / s

    np.testing.assert_allclose(of_x_t * x_t + of_output * predict(x_start), x_start, rtol=1e-9)
    squares = (predict(x_start + error) - predict(x_start)) ** 2
    np.testing.assert_allclose(squares, loss_factor(kind, ALPHA_BAR) * error**2, rtol=1e-8)


def test_network_of_the_flow_sees_the_linear_path():
    diffusion = process(ModelMeanType.FLOW, betas=get_named_beta_schedule("linear_path", 4))
    x_start, noise = torch.randn(2, 4, 1, 3)
    t, seen = torch.arange(4), []

    def model(x, t):
        seen.append(x)
        return noise - x_start

    terms = diffusion.training_losses(model, x_start, t, noise=noise)
    tau = ((t + 1) / 4).view(-1, 1, 1)
    torch.testing.assert_close(seen[0], (1 - tau) * x_start + tau * noise)
    assert terms["loss"].abs().max() < 1e-10


def test_flow_of_one_step_takes_the_whole_way():
    diffusion = process(ModelMeanType.FLOW, betas=get_named_beta_schedule("linear_path", 1))
    noise = torch.randn(3, 1, 2)
    out = diffusion.p_sample_loop(
        lambda x, t: 0.5 * x, noise.shape, noise=noise, device="cpu", clip_denoised=False
    )
    torch.testing.assert_close(out, 0.5 * noise)  # x_start = eps - velocity


# -- no signal at the last step

NO_SIGNAL = {
    "cosine": lambda: zero_terminal_snr(get_named_beta_schedule("cosine", 100)),
    "linear": lambda: zero_terminal_snr(get_named_beta_schedule("linear", 100)),
    "linear_path": lambda: get_named_beta_schedule("linear_path", 100),
}
SAMPLERS = {
    "ddpm": (GaussianDiffusion.p_sample_loop, {}),
    **{f"ddim{eta}": (GaussianDiffusion.ddim_sample_loop, {"eta": eta}) for eta in (0.0, 0.5, 1.0)},
}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    ("schedule", "respacing"),
    [("cosine", ""), ("cosine", "40"), ("linear", ""), ("linear_path", "")],
)
@pytest.mark.parametrize("kind", AT_ZERO_SNR, ids=names(AT_ZERO_SNR))
def test_samplers_meet_the_data_from_pure_noise(kind, schedule, respacing, sampler):
    """The mean of the data comes out exactly: x_T does not hold any of it, as sampling assumes."""
    diffusion = process(kind, respacing, NO_SIGNAL[schedule]())
    assert diffusion.alphas_cumprod[-1] == 0
    data = GaussianData(diffusion)
    loop, options = SAMPLERS[sampler]
    noise = torch.randn(2000, 1, dtype=torch.float64)
    noise = (noise - noise.mean()) / noise.std()
    samples = loop(
        diffusion,
        data.model,
        noise.shape,
        noise=noise,
        device="cpu",
        clip_denoised=False,
        **options,
    )
    assert samples.mean().item() == pytest.approx(MU, abs=0.03)
    assert samples.std().item() == pytest.approx(S, rel=0.15)  # of finite steps
    if options.get("eta") == 0:
        assert samples.mean().item() == pytest.approx(MU, abs=1e-4)


@pytest.mark.parametrize("kind", AT_ZERO_SNR, ids=names(AT_ZERO_SNR))
def test_ddim_forward_and_back_returns_from_no_signal(kind):
    diffusion = process(kind, betas=NO_SIGNAL["cosine"]())
    data = GaussianData(diffusion)
    x = start = MU + S * torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    for i in range(diffusion.num_timesteps):
        x = diffusion.ddim_reverse_sample(data.model, x, torch.full((9,), i), clip_denoised=False)[
            "sample"
        ]
    assert x.isfinite().all()
    assert x.std() > 2 * start.std()  # noise of variance 1, not 0.09
    back = diffusion.ddim_sample_loop(
        data.model, x.shape, noise=x, device="cpu", clip_denoised=False
    )
    torch.testing.assert_close(back, start, rtol=0.05, atol=0.03)


@pytest.mark.parametrize("var", list(ModelVarType), ids=lambda var: var.name)
@pytest.mark.parametrize("loss", list(LossType), ids=lambda loss: loss.name)
@pytest.mark.parametrize("kind", AT_ZERO_SNR, ids=names(AT_ZERO_SNR))
def test_losses_without_signal_are_finite_and_have_gradients(kind, loss, var):
    diffusion = process(kind, var=var, loss=loss)
    model = formula_model(var.name)
    t = torch.arange(STEPS)
    terms = diffusion.training_losses(model, torch.rand(STEPS, 1, 4) * 2 - 1, t)
    assert all(values.isfinite().all() for values in terms.values())
    terms["loss"].sum().backward()
    assert all(
        param.grad.isfinite().all() for param in model.parameters() if param.grad is not None
    )
    assert model.a.grad != 0


@pytest.mark.parametrize("kind", AT_ZERO_SNR, ids=names(AT_ZERO_SNR))
def test_loss_of_the_best_model_is_the_variance_that_is_left(kind):
    """E (y - E[y | x_t])^2 is Var[x_start | x_t] times the prediction's factor, also at SNR 0."""
    diffusion = process(kind)
    data = GaussianData(diffusion)
    expected = data.x_start_variance * loss_factor(kind, diffusion.alphas_cumprod)
    for i in (0, STEPS // 2, STEPS - 2, STEPS - 1):
        t = torch.full((30_000,), i)
        x_start = MU + S * torch.randn(30_000, 1, dtype=torch.float64)
        mse = diffusion.training_losses(data.model, x_start, t)["mse"].mean().item()
        assert mse == pytest.approx(expected[i], rel=0.05)
    assert expected[-1] == pytest.approx(S**2)


@pytest.mark.parametrize("var", list(ModelVarType), ids=lambda var: var.name)
@pytest.mark.parametrize("kind", AT_ZERO_SNR, ids=names(AT_ZERO_SNR))
def test_bound_without_signal_is_finite_and_has_no_prior_term(kind, var):
    diffusion = process(kind, var=var)
    bound = diffusion.calc_bpd_loop(formula_model(var.name), torch.rand(2, 1, 4) * 2 - 1)
    assert all(values.isfinite().all() for values in bound.values())
    assert bound["prior_bpd"].abs().max() == 0
    step = process(kind, var=var, betas=get_named_beta_schedule("cosine", STEPS))
    prior = step.calc_bpd_loop(formula_model(var.name), torch.rand(2, 1, 4) * 2 - 1)["prior_bpd"]
    assert prior.min() > 0


def test_eta_of_one_leaves_nothing_from_no_signal(monkeypatch):
    """The variance of x_{t-1} is all fresh noise; rounding must not make the rest negative."""
    monkeypatch.setattr(gaussian_sampling, "randn_like", lambda x, generator: torch.ones_like(x))
    for steps in range(2, 60):
        diffusion = process(ModelMeanType.V, steps=steps)
        t = torch.full((1,), steps - 1)
        x = torch.randn(1, 1)
        out = diffusion.ddim_sample(
            lambda x, t: torch.zeros_like(x), x, t, clip_denoised=False, eta=1.0
        )
        left = np.sqrt(1 - diffusion.alphas_cumprod_prev[-1])
        torch.testing.assert_close(
            out["sample"], torch.full((1, 1), left).float(), atol=2e-3, rtol=0
        )
