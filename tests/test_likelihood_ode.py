"""The density of the ODE against those of Gaussian data and mixtures, which are known."""

import math

import numpy as np
import pytest
import torch
from analytic import Mixture, as_network, gaussian
from golden_data import FormulaModel, make_diffusion
from toy import make_model

from improved_diffusion.errors import UserError
from improved_diffusion.likelihood import BoundLikelihood, BoundOptions
from improved_diffusion.likelihood_ode import (
    BIN,
    FlowLikelihood,
    FlowOptions,
    _slope_and_divergence,
    flow_bpd,
)
from improved_diffusion.nll_results import Results, measure_all
from improved_diffusion.rng import sample_generators

MU, S = 0.2, 0.15
SHAPE = (1, 12, 12)
LEVELS = (0.01, 2000.0)


def to_bits(log_density, dim):
    """Bits/dim of 8-bit levels, of a log-density in nats."""
    return -log_density / dim / math.log(2) - math.log2(BIN)


def flow(data, x, levels=LEVELS, indices=None, seed=0, **options):
    generators = sample_generators(seed, indices or range(len(x)), "test")
    options = FlowOptions(**{"ode_tolerance": 1e-5, **options})
    return flow_bpd(lambda x, sigma, rows: data(x, sigma), x, levels, options, generators)


def filled(x, seed=0):
    """The images between their levels, by the first draw of each one's generator."""
    draws = [torch.rand(*x.shape[1:], generator=g) for g in generators_of(x, seed)]
    return x.double() + (torch.stack(draws).double() - 0.5) * 2 / 255


def generators_of(x, seed):
    return sample_generators(seed, range(len(x)), "test")


# -- known densities -------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [LEVELS, (0.3, 2000.0)])
def test_each_image_of_gaussian_data_has_the_exact_density(levels):
    """The Jacobian of D is diagonal: one probe is enough. What is left is the solver's error and
    the prior's, about mu / sigma_max."""
    data = gaussian(torch.full(SHAPE, MU), S)
    x = data.sample(6)
    exact = to_bits(data.log_density(filled(x), levels[0]), x[0].numel())
    bits = flow(data, x, levels).bpd
    assert bits.dtype == torch.float64
    torch.testing.assert_close(bits, exact, rtol=0, atol=2e-4)
    assert exact.std() > 0.01


def test_the_prior_is_that_of_the_samples():
    """Where the process ends early, log p is that of N(0, 1 + sigma_max^2) walked back."""
    data, levels = gaussian(torch.full(SHAPE, MU), S), (0.01, 1.0)
    x = filled(data.sample(4))
    slope = math.sqrt((S**2 + levels[1] ** 2) / (S**2 + levels[0] ** 2))  # keeps the quantile
    end = MU + slope * (x - MU)
    log_prior = torch.distributions.Normal(0, math.sqrt(1 + levels[1] ** 2)).log_prob(end)
    exact = log_prior.flatten(1).sum(dim=1) + x[0].numel() * math.log(slope)
    bits = flow(data, data.sample(4), levels).bpd
    torch.testing.assert_close(bits, to_bits(exact, x[0].numel()), rtol=0, atol=2e-4)


def make_mixture():
    generator = torch.Generator().manual_seed(3)
    means = torch.randn(3, 1, 2, 3, generator=generator, dtype=torch.float64) * 0.4
    return Mixture([0.5, 0.3, 0.2], means, [0.1, 0.2, 0.3])


def test_images_of_a_mixture_have_its_density_in_the_mean_over_probes():
    """Its Jacobians are far from diagonal where components meet."""
    data = make_mixture()
    x = data.sample(4).repeat_interleave(60, dim=0)
    error = flow(data, x).bpd - to_bits(data.log_density(filled(x), LEVELS[0]), 6)
    means = error.view(4, 60).mean(dim=1)
    spread = error.view(4, 60).std(dim=1) / math.sqrt(60)
    assert (means.abs() < 4 * spread + 1e-3).all()
    assert spread.max() < 0.06
    assert error.std() > 0.02  # the probes matter


def test_more_probes_and_more_draws_are_less_noisy():
    data = make_mixture()
    x = data.sample(1).repeat(60, 1, 1, 1)
    exact = to_bits(data.log_density(filled(x), LEVELS[0]), 6)
    once, often = (
        flow(data, x, hutchinson_probes=probes, ode_tolerance=1e-3).bpd - exact for probes in (1, 9)
    )
    assert often.std() < 0.6 * once.std()
    narrow = gaussian(torch.zeros(SHAPE), 0.005)  # which falls steeply within a bin
    x = torch.zeros(40, *SHAPE)
    once, often = (flow(narrow, x, dequantisations=draws, ode_tolerance=1e-3) for draws in (1, 8))
    assert often.bpd.std() < 0.6 * once.bpd.std()
    assert often.evaluations.sum() > 6 * once.evaluations.sum()


def test_divergence_of_a_linear_denoiser_is_the_probes_quadratic_form():
    """D(x) = A x with entries of both signs: each probe gives v' A v, whose mean is tr A."""
    matrix = torch.tensor([[0.5, -0.8, 0.1], [-0.3, -0.2, 0.7], [0.4, -0.6, 0.3]]).double()
    probes = torch.tensor([[[1, -1, 1], [1, 1, -1]], [[-1, -1, 1], [1, 1, 1]]]).double()
    sigma = torch.tensor([0.5, 2.0]).double()
    z = torch.randn(2, 3, dtype=torch.float64)
    _, divergence = _slope_and_divergence(lambda x, _: x @ matrix.T, z, sigma, probes)
    forms = torch.einsum("pni,ij,pnj->pn", probes, matrix, probes).mean(dim=0)
    torch.testing.assert_close(divergence, 3 / (1 + sigma**2) - forms)


def test_one_probe_is_exact_where_the_jacobian_is_diagonal():
    """Rademacher's probes: whatever is drawn, the trace is the same."""

    def diagonal(x, sigma):
        return torch.tanh(x) / (1 + sigma.view(-1, 1, 1, 1))

    x = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    bits = [flow(diagonal, x, hutchinson_probes=probes).bpd for probes in (1, 7)]
    torch.testing.assert_close(*bits, rtol=1e-9, atol=1e-9)


def test_a_smaller_tolerance_is_a_smaller_error_at_more_evaluations():
    data = gaussian(torch.full(SHAPE, MU), S)
    x = data.sample(3)
    exact = to_bits(data.log_density(filled(x), LEVELS[0]), x[0].numel())
    found = [flow(data, x, ode_tolerance=tolerance) for tolerance in (1e-2, 1e-4, 1e-6)]
    errors = [(one.bpd - exact).abs().max().item() for one in found]
    assert errors[1] < errors[0] / 3
    assert errors[2] < 1e-4
    counts = [one.evaluations.double().mean().item() for one in found]
    assert counts == sorted(counts)
    assert counts[0] < counts[2] / 2


# -- what the draws depend on ----------------------------------------------------------------------


def test_an_image_does_not_depend_on_its_company():
    data = make_mixture()
    x = data.sample(5)
    together = flow(data, x)
    for i in range(5):
        alone = flow(data, x[i : i + 1], indices=[i])
        torch.testing.assert_close(alone.bpd[0], together.bpd[i], rtol=1e-9, atol=1e-9)
        assert alone.evaluations[0] == together.evaluations[i]
    assert (flow(data, x, seed=1).bpd - together.bpd).abs().min() > 1e-5


@pytest.mark.parametrize("network", [FormulaModel, make_model])
def test_batches_of_a_network_make_no_difference(network):
    model = network().eval()
    diffusion = make_diffusion(40, schedule="cosine", rescale_timesteps=True)
    x = torch.rand(3, 1, 8, 8) * 2 - 1
    own = FlowLikelihood(model, diffusion, FlowOptions(ode_tolerance=0.2), seed=3)
    whole = own.measure(x, {}, [5, 6, 7])
    parts = [own.measure(x[:1], {}, [5]), own.measure(x[1:], {}, [6, 7])]
    assert np.concatenate([part.bpd for part in parts]).tolist() == whole.bpd.tolist()
    assert sum(part.sums["evaluations"] for part in parts) == whole.sums["evaluations"]
    assert own.measure(x[:1], {}, [6]).bpd[0] != whole.bpd[0]


def test_images_may_share_evaluations():
    """The model here is the same to the bit in any batch."""
    x = torch.rand(5, 1, 4, 4) * 2 - 1
    diffusion = make_diffusion(40, schedule="cosine", rescale_timesteps=True)
    found, sizes = [], []
    for ode_batch in (1, 3):
        model = FormulaModel().eval()
        own = FlowLikelihood(model, diffusion, FlowOptions(ode_batch=ode_batch))
        found.append(own.measure(x, {}, range(5)))
        sizes.append({len(t) for t in model.seen})
    np.testing.assert_allclose(found[0].bpd, found[1].bpd, rtol=1e-5)
    assert sizes[0] == {1}
    assert max(sizes[1]) == 3


def test_labels_follow_their_images():
    """Though images that are done leave the batch, at different times."""

    def model(x, t, y):
        return torch.sin(y.view(-1, 1, 1, 1) * x)

    diffusion = make_diffusion(40, var="FIXED_SMALL")
    x = torch.rand(3, 1, 4, 4) * 2 - 1
    y = torch.tensor([0.1, 5.0, 1.0])
    own = FlowLikelihood(model, diffusion, FlowOptions(ode_batch=3, ode_tolerance=1e-3))
    together = own.measure(x, {"y": y}, [0, 1, 2])
    alone = [own.measure(x[i : i + 1], {"y": y[i : i + 1]}, [i]) for i in range(3)]
    np.testing.assert_allclose([one.bpd[0] for one in alone], together.bpd, rtol=1e-3)
    assert len({int(one.sums["evaluations"]) for one in alone}) == 3
    assert abs(own.measure(x, {"y": y.flip(0)}, [0, 1, 2]).bpd - together.bpd)[0] > 0.1


def test_checkpointing_of_activations_and_no_grad_make_no_difference():
    diffusion = make_diffusion(40, schedule="cosine", rescale_timesteps=True)
    x = torch.rand(1, 1, 8, 8) * 2 - 1
    found = []
    for use_checkpoint in (False, True):
        model = make_model(use_checkpoint=use_checkpoint).eval()
        own = FlowLikelihood(model, diffusion, FlowOptions(ode_tolerance=0.2))
        with torch.no_grad():
            found.append(own.measure(x, {}, [0]).bpd[0])
        assert all(param.grad is None for param in model.parameters())
    assert found[0] == pytest.approx(found[1], rel=1e-5)


# -- both ways on one checkpoint -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "mean", "var"),
    [
        ("linear", "EPSILON", "LEARNED_RANGE"),
        ("cosine", "V", "LEARNED"),
        pytest.param("linear", "START_X", "LEARNED_RANGE", marks=pytest.mark.slow),
        pytest.param("linear", "FLOW", "LEARNED", marks=pytest.mark.slow),
    ],
)
def test_both_ways_meet_the_entropy_of_gaussian_data(schedule, mean, var):
    """By networks that are exact in mean and variance, so that the bound is tight."""
    steps, count = 100, 40
    diffusion = make_diffusion(steps, schedule=schedule, mean=mean, var=var)
    data = gaussian(torch.full(SHAPE, MU), S)
    network = as_network(diffusion, data)
    x = data.sample(count).float()
    bound = BoundOptions(clip_denoised=False, vlb_timesteps=40)
    methods = {
        "vlb": BoundLikelihood(network, diffusion, bound),
        "ode": FlowLikelihood(network, diffusion, FlowOptions(ode_batch=count)),
    }
    *_, results = measure_all(methods, [(x, {}, list(range(count)))], Results(methods))
    entropy = to_bits(-0.5 * math.log(2 * math.pi * math.e * S**2), 1)
    for name in methods:
        estimate = results.estimate(name)
        assert estimate.standard_error < 0.05
        assert estimate.bpd == pytest.approx(entropy, abs=3 * estimate.standard_error)
    # against the images' own densities the draw of the images does not count
    own = to_bits(data.log_density(x), x[0].numel()).numpy()
    for name, limit in (("vlb", 0.05), ("ode", 0.004)):
        difference = results.bpd[name] - own
        error = difference.std(ddof=1) / math.sqrt(count)
        assert error < limit
        assert difference.mean() == pytest.approx(0, abs=3 * error + 0.003), name


def test_steps_of_the_process_do_not_matter_to_the_ode():
    x = torch.rand(1, 1, 4, 4) * 2 - 1
    bits = []
    for respacing in ("", "5"):
        diffusion = make_diffusion(40, respacing=respacing, rescale_timesteps=True)
        own = FlowLikelihood(FormulaModel().eval(), diffusion, FlowOptions())
        bits.append(own.measure(x, {}, [0]).bpd[0])
    assert bits[0] == bits[1]


# -- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ode_tolerance": 0.0}, "--ode_tolerance 0.0"),
        ({"ode_tolerance": 1.0}, "--ode_tolerance 1.0"),
        ({"ode_tolerance": math.nan}, "--ode_tolerance nan"),
        ({"hutchinson_probes": 0}, "--hutchinson_probes 0"),
        ({"dequantisations": 0}, "--dequantisations 0"),
        ({"ode_batch": 0}, "--ode_batch 0"),
    ],
)
def test_impossible_options(options, words):
    with pytest.raises(UserError, match=words):
        FlowOptions(**options)


def test_image_that_has_no_solution_is_named():
    def model(x, t):
        return torch.full_like(x, math.nan)

    diffusion = make_diffusion(40, var="FIXED_SMALL")
    own = FlowLikelihood(model, diffusion, FlowOptions(ode_tolerance=1e-3))
    with pytest.raises(UserError, match=r"image 17: .*larger --ode_tolerance than 0.001"):
        own.measure(torch.zeros(1, 1, 2, 2), {}, [17])


def test_a_model_of_the_previous_x_has_no_ode():
    with pytest.raises(UserError):
        FlowLikelihood(None, make_diffusion(40, mean="PREVIOUS_X"), FlowOptions())
