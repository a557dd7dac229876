"""Weights of noise levels: those of the papers, and one objective whatever the network predicts."""

import itertools

import numpy as np
import pytest
import torch
from golden_data import make_diffusion

from improved_diffusion.errors import UserError
from improved_diffusion.gaussian_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
)
from improved_diffusion.loss_weights import LOSS_WEIGHTS, loss_weight_table
from improved_diffusion.respace import SpacedDiffusion
from improved_diffusion.schedules import get_named_beta_schedule, zero_terminal_snr

STEPS = 12
LOOKED_AT = (0, 4, 7, 10)  # at the last step of cosine float32 tables tell little of x_start
KINDS = [kind.name for kind in ModelMeanType]
PAIRS = list(itertools.combinations(KINDS, 2))
# as the papers write them, for the squared error of x_start
OF_XSTART = {
    "snr": lambda snr: snr,
    "truncated_snr": lambda snr: np.maximum(snr, 1),
    "min_snr": lambda snr: np.minimum(snr, 5),
    "p2": lambda snr: snr / (1 + snr),
    "edm": lambda snr: snr + 1 / 0.5**2,
    "sigmoid": lambda snr: snr / (1 + np.exp(np.log(snr) + 1)),  # sigmoid(-1 - log SNR)
}


def process(kind, weight="none", cls=GaussianDiffusion, **changes):
    arguments = {
        "betas": get_named_beta_schedule("cosine", STEPS),
        "model_mean_type": ModelMeanType[kind],
        "model_var_type": ModelVarType.FIXED_SMALL,
        "loss_type": LossType.MSE,
        "loss_weight": weight,
    }
    return cls(**{**arguments, **changes})


def snr_of(diffusion):
    return diffusion.alphas_cumprod / (1 - diffusion.alphas_cumprod)


class Says:
    """A model that predicts, in the terms of a process, a given estimate of x_start."""

    def __init__(self, diffusion, estimate, x_t):
        self.diffusion, self.estimate, self.x_t = diffusion, estimate, x_t

    def __call__(self, x, t):
        d, x_t, estimate = self.diffusion, self.x_t, self.estimate
        (i,) = set(t.tolist())
        a, s = np.sqrt(d.alphas_cumprod[i]), np.sqrt(1 - d.alphas_cumprod[i])
        eps = (x_t - a * estimate) / s
        return {
            "EPSILON": lambda: eps,
            "START_X": lambda: estimate,
            "V": lambda: a * eps - s * estimate,
            "FLOW": lambda: eps - estimate,
            "PREVIOUS_X": lambda: (
                d.posterior_mean_coef1[i] * estimate + d.posterior_mean_coef2[i] * x_t
            ),
        }[d.model_mean_type.name]()


def loss_and_gradient(diffusion, i):
    """The loss of one estimate of x_start at one x_t, and its gradient by the estimate."""
    generator = torch.Generator().manual_seed(i)
    x_start, noise, error = torch.randn(3, 2, 1, 3, 3, generator=generator, dtype=torch.float64)
    t = torch.full((2,), i)
    estimate = (x_start + 0.3 * error).requires_grad_()
    model = Says(diffusion, estimate, diffusion.q_sample(x_start, t, noise))
    terms = diffusion.training_losses(model, x_start, t, noise=noise)
    terms["loss"].sum().backward()
    return terms["loss"].detach(), estimate.grad, terms["mse"].detach(), 0.09 * error.square()


@pytest.mark.parametrize("weight", OF_XSTART)
@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_every_pair_of_predictions_trains_on_the_same_objective(one, other, weight):
    for i in LOOKED_AT:
        ours, theirs = (loss_and_gradient(process(kind, weight), i) for kind in (one, other))
        torch.testing.assert_close(ours[0], theirs[0], rtol=2e-4, atol=0)
        torch.testing.assert_close(ours[1], theirs[1], rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("weight", OF_XSTART)
@pytest.mark.parametrize("kind", KINDS)
def test_objective_is_the_papers_weight_times_the_error_of_x_start(kind, weight):
    diffusion = process(kind, weight)
    expected = OF_XSTART[weight](snr_of(diffusion))
    for i in LOOKED_AT:
        loss, _, _, squares = loss_and_gradient(diffusion, i)
        torch.testing.assert_close(
            loss, expected[i] * squares.mean(dim=(1, 2, 3)), rtol=2e-4, atol=0
        )


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_weight_the_predictions_have_objectives_of_their_own(kind):
    """SNR, 1, SNR + 1, (sqrt(SNR) + 1)^2, and the posterior's coefficient, squared."""
    diffusion = process(kind)
    snr = snr_of(diffusion)
    expected = {
        "EPSILON": snr,
        "START_X": np.ones(STEPS),
        "V": snr + 1,
        "FLOW": (np.sqrt(snr) + 1) ** 2,
        "PREVIOUS_X": diffusion.posterior_mean_coef1**2,
    }[kind]
    for i in LOOKED_AT:
        loss, _, mse, squares = loss_and_gradient(diffusion, i)
        assert torch.equal(loss, mse)
        torch.testing.assert_close(
            loss, expected[i] * squares.mean(dim=(1, 2, 3)), rtol=2e-4, atol=0
        )


def test_snr_and_truncated_snr_are_plain_errors_of_eps_and_of_the_worse():
    """Salimans & Ho, section 4: SNR is the plain error of eps, max(SNR, 1) the larger of two."""
    np.testing.assert_allclose(process("EPSILON", "snr")._loss_weights, 1, rtol=1e-12)
    snr = snr_of(process("START_X"))
    truncated = process("START_X", "truncated_snr")._loss_weights
    np.testing.assert_allclose(truncated, np.where(snr > 1, snr, 1), rtol=1e-12)
    np.testing.assert_allclose(
        process("V", "min_snr")._loss_weights, np.minimum(snr, 5) / (snr + 1), rtol=1e-12
    )


@pytest.mark.parametrize("weight", OF_XSTART)
def test_mse_stays_unweighted_and_the_variance_keeps_its_own_term(weight):
    arguments = {"steps": STEPS, "schedule": "cosine", "mean": "V", "var": "LEARNED_RANGE"}
    plain = make_diffusion(**arguments)
    weighted = SpacedDiffusion(
        use_timesteps=range(STEPS),
        betas=plain.betas,
        model_mean_type=plain.model_mean_type,
        model_var_type=plain.model_var_type,
        loss_type=plain.loss_type,
        loss_weight=weight,
    )
    x_start, noise = torch.randn(2, 4, 1, 3, 3)
    t = torch.tensor([0, 3, 6, 9])
    one, other = (
        d.training_losses(lambda x, t: torch.cat([x, x], dim=1), x_start, t, noise=noise)
        for d in (plain, weighted)
    )
    assert torch.equal(one["mse"], other["mse"])
    assert torch.equal(one["vb"], other["vb"])
    factor = torch.tensor(weighted._loss_weights)[t].float()
    assert not torch.isclose(factor, torch.ones(4)).all()
    torch.testing.assert_close(other["loss"], factor * other["mse"] + other["vb"])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "PREVIOUS_X"])
def test_respacing_keeps_the_weights_of_the_steps_it_keeps(kind):
    kept = [0, 3, 4, 9]
    whole = process(kind, "min_snr")
    spaced = process(kind, "min_snr", cls=SpacedDiffusion, use_timesteps=kept)
    np.testing.assert_allclose(spaced._loss_weights, whole._loss_weights[kept], rtol=1e-9)


# -- where no signal is left


def at_zero_snr(kind, weight):
    betas = zero_terminal_snr(get_named_beta_schedule("cosine", STEPS))
    return process(kind, weight, betas=betas)


@pytest.mark.parametrize("weight", OF_XSTART)
@pytest.mark.parametrize("kind", ["START_X", "V", "FLOW"])
def test_last_weight_without_signal_is_the_papers_limit(kind, weight):
    last = at_zero_snr(kind, weight)._loss_weights[-1]  # all three factors are 1 there
    assert last == pytest.approx({"truncated_snr": 1, "edm": 4}.get(weight, 0), abs=1e-30)


@pytest.mark.parametrize("weight", ["snr", "min_snr", "p2", "sigmoid"])
def test_weights_of_eps_without_signal_are_one_where_they_have_a_limit(weight):
    assert at_zero_snr("EPSILON", weight)._loss_weights[-1] == pytest.approx(1)


@pytest.mark.parametrize("weight", ["truncated_snr", "edm"])
def test_infinite_weight_names_those_that_are_not(weight):
    with pytest.raises(UserError) as error:
        at_zero_snr("EPSILON", weight)
    line = str(error.value)
    assert f"--loss_weight {weight} is infinite somewhere" in line
    assert "predicts eps" in line
    assert line.endswith("choose one of none, min_snr, snr, p2, sigmoid")


def test_weight_that_is_zero_everywhere_names_those_that_are_not():
    with pytest.raises(UserError, match=r"snr is zero everywhere .* none, truncated_snr, edm$"):
        process("START_X", "snr", betas=[1.0])


def test_weight_beyond_float32_is_infinite():
    betas = np.full(20, 0.999)
    assert np.prod(1 - betas) > 0
    with pytest.raises(UserError, match="edm is infinite"):
        process("EPSILON", "edm", betas=betas)
    process("V", "edm", betas=betas)


def test_weight_where_no_noise_is_left_is_refused():
    ones = np.ones(3)
    with pytest.raises(UserError, match=r"snr is infinite .* choose one of none$"):
        loss_weight_table("snr", ModelMeanType.START_X, ones, ones)


# -- choices


def test_unknown_weight_lists_the_choices():
    with pytest.raises(UserError, match="--loss_weight snrr") as error:
        process("V", "snrr")
    for name in LOSS_WEIGHTS:
        assert name in str(error.value)


@pytest.mark.parametrize("loss", [LossType.KL, LossType.RESCALED_KL])
def test_bound_has_weights_of_its_own(loss):
    with pytest.raises(UserError, match="--loss_weight p2 with --use_kl True"):
        process("EPSILON", "p2", loss_type=loss)
    process("EPSILON", loss_type=loss)
