import functools

import numpy as np
import pytest
import torch
from golden_data import FormulaModel, formula_model, group, make_diffusion, npz

from improved_diffusion.gaussian_diffusion import GaussianDiffusion
from improved_diffusion.respace import SpacedDiffusion
from improved_diffusion.rng import sample_generators

SHAPE = (2, 3, 4, 4)
RESPACINGS = {"all": "", "10": "10", "ddim10": "ddim10", "5,3,2": "5,3,2"}
ETAS = ("0.0", "0.5", "1.0")
SAMPLERS = ("ddpm", *(f"ddim-eta{eta}" for eta in ETAS))
PREFIXES = [
    *(f"{sampler}/{respacing}/" for sampler in SAMPLERS for respacing in RESPACINGS),
    "timesteps/",
    "ddpm-cosine-xstart-FIXED_SMALL/8/",
    "ddpm-cosine-xstart-FIXED_LARGE/8/",
    "reverse/ddim10/",
    "given-noise/",
]


def assert_close(a, b, tol=1e-4):
    """|a - b| <= tol * (1 + |b|)."""
    np.testing.assert_allclose(np.asarray(a.detach()), b, rtol=tol, atol=tol)


def progressive(diffusion, sampler):
    """A sampler's loop that yields each step, by the name that the record has for it."""
    if sampler == "ddpm":
        return diffusion.p_sample_loop_progressive
    eta = float(sampler.removeprefix("ddim-eta"))
    return functools.partial(diffusion.ddim_sample_loop_progressive, eta=eta)


def final(diffusion, sampler):
    """The same sampler's loop that returns the last sample."""
    if sampler == "ddpm":
        return diffusion.p_sample_loop
    eta = float(sampler.removeprefix("ddim-eta"))
    return functools.partial(diffusion.ddim_sample_loop, eta=eta)


# -- recorded numbers ------------------------------------------------------------------------------


def test_every_recorded_number_is_compared():
    assert [key for key in npz("samplers") if not key.startswith(tuple(PREFIXES))] == []


@pytest.mark.parametrize("respacing", RESPACINGS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_seeded_sampling_equals_the_recorded_one(sampler, respacing):
    diffusion = make_diffusion(respacing=RESPACINGS[respacing], rescale_timesteps=True)
    model = FormulaModel()
    torch.manual_seed(424)
    steps = list(progressive(diffusion, sampler)(model, SHAPE))
    next_rand = torch.rand(2)
    recorded = group("samplers", f"{sampler}/{respacing}")
    assert set(recorded) <= {"sample", "pred_xstart", "next_rand"}
    assert_close(next_rand, recorded.pop("next_rand"), 1e-6)
    for key, values in recorded.items():
        assert_close(torch.stack([step[key] for step in steps]), values)
    seen = [timesteps[0] for timesteps in model.seen]
    assert all((timesteps == timesteps[0]).all() for timesteps in model.seen)
    assert {timesteps.dtype for timesteps in model.seen} == {torch.float32}
    assert_close(torch.stack(seen), npz("samplers")[f"timesteps/{respacing}"], 1e-6)

    torch.manual_seed(424)
    assert_close(final(diffusion, sampler)(model, SHAPE), recorded["sample"][-1])


@pytest.mark.parametrize("var", ["FIXED_SMALL", "FIXED_LARGE"])
def test_seeded_sampling_with_fixed_variance_equals_the_recorded_one(var):
    diffusion = make_diffusion(schedule="cosine", respacing="8", mean="START_X", var=var)
    torch.manual_seed(425)
    sample = diffusion.p_sample_loop(formula_model(var), SHAPE)
    assert_close(sample, npz("samplers")[f"ddpm-cosine-xstart-{var}/8/sample"])


def test_reverse_ddim_equals_the_recorded_one():
    recorded = group("samplers", "reverse/ddim10")
    diffusion, model = make_diffusion(respacing="ddim10"), FormulaModel()
    x = torch.tensor(recorded["in"])
    for i in range(10):
        x = diffusion.ddim_reverse_sample(model, x, torch.tensor([i, i]))["sample"]
        assert_close(x, recorded[f"sample{i}"])


def test_sampling_from_given_noise_equals_the_recorded_one():
    recorded = group("samplers", "given-noise")
    noise = torch.tensor(recorded["in"])
    torch.manual_seed(429)
    sample = make_diffusion(respacing="ddim10").p_sample_loop(
        FormulaModel(), SHAPE, noise=noise, clip_denoised=False
    )
    assert_close(sample, recorded["ddpm-unclipped/sample"])
    assert np.array_equal(noise, recorded["in"])  # and the caller's tensor is as it was


# -- random draws ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("given", [False, True])
def test_each_step_draws_once_from_the_global_generator_and_the_start_once(sampler, given):
    diffusion = make_diffusion(respacing="6")
    torch.manual_seed(3)
    final(diffusion, sampler)(FormulaModel(), SHAPE, noise=torch.zeros(SHAPE) if given else None)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    for _ in range(6 if given else 7):
        torch.randn(*SHAPE)
    assert torch.equal(torch.get_rng_state(), after)


def test_ddpm_loop_is_algorithm_2_with_the_draws_in_order():
    diffusion, model = make_diffusion(respacing="6"), FormulaModel()
    torch.manual_seed(3)
    sample = diffusion.p_sample_loop(model, SHAPE)
    torch.manual_seed(3)
    x = torch.randn(*SHAPE)
    for i in reversed(range(6)):
        out = diffusion.p_mean_variance(model, x, torch.tensor([i, i]))
        noise = torch.randn_like(x)
        x = out["mean"] + (out["variance"].sqrt() * noise if i > 0 else 0)
    torch.testing.assert_close(sample, x)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sample_depends_on_its_generator_and_not_on_the_batch(sampler):
    diffusion, model = make_diffusion(respacing="6"), FormulaModel()

    def sample(*indices):
        generators = sample_generators(0, indices)
        return final(diffusion, sampler)(model, (len(indices), 3, 4, 4), generator=generators)

    together = sample(0, 1, 2, 3)
    for split in ([[0, 1], [2, 3]], [[0], [1, 2, 3]], [[0], [1], [2], [3]]):
        parts = torch.cat([sample(*indices) for indices in split])
        torch.testing.assert_close(parts, together, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sample(2, 0)[1], together[0], rtol=1e-6, atol=1e-6)
    for i in range(3):  # and the samples are different ones
        assert not torch.isclose(together[i], together[3], atol=1e-3).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_given_generators_leave_the_global_one_alone(sampler):
    diffusion, model = make_diffusion(respacing="6"), FormulaModel()
    before = torch.get_rng_state()
    for generator in (torch.Generator().manual_seed(1), sample_generators(0, range(2))):
        final(diffusion, sampler)(model, SHAPE, generator=generator)
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_generator_draws_what_the_global_one_would(sampler):
    diffusion, model = make_diffusion(respacing="6"), FormulaModel()
    torch.manual_seed(11)
    expected = final(diffusion, sampler)(model, SHAPE)
    generator = torch.Generator().manual_seed(11)
    torch.testing.assert_close(
        final(diffusion, sampler)(model, SHAPE, generator=generator), expected
    )


def test_single_steps_take_generators_too():
    diffusion, model = make_diffusion(respacing="6"), FormulaModel()
    x, t = torch.randn(SHAPE), torch.tensor([4, 4])
    for step in (diffusion.p_sample, functools.partial(diffusion.ddim_sample, eta=1.0)):
        whole = step(model, x, t, generator=sample_generators(5, range(2)))["sample"]
        second = step(model, x[1:], t[1:], generator=sample_generators(5, [1]))["sample"]
        torch.testing.assert_close(second, whole[1:])


def test_wrong_number_of_generators_is_an_error():
    with pytest.raises(ValueError, match=r"3 generators.* 2"):
        make_diffusion(respacing="6").p_sample_loop(
            FormulaModel(), SHAPE, generator=sample_generators(0, range(3))
        )


def test_deterministic_ddim_depends_on_the_start_alone():
    diffusion, model, noise = make_diffusion(respacing="6"), FormulaModel(), torch.randn(SHAPE)
    samples = [diffusion.ddim_sample_loop(model, SHAPE, noise=noise) for _ in range(2)]
    assert torch.equal(*samples)
    noisy = [diffusion.ddim_sample_loop(model, SHAPE, noise=noise, eta=0.5) for _ in range(2)]
    assert not torch.isclose(*noisy).all()


def test_steps_at_different_timesteps_in_one_batch_are_each_their_own():
    """In particular the mask of the last step's noise goes by image."""
    diffusion, model = make_diffusion(), FormulaModel()
    x, t = torch.randn(4, 3, 4, 4), torch.tensor([0, 20, 0, 1])
    for step in (diffusion.p_sample, functools.partial(diffusion.ddim_sample, eta=1.0)):
        whole = step(model, x, t, generator=sample_generators(0, range(4)))["sample"]
        other = step(model, x, t, generator=sample_generators(1, range(4)))["sample"]
        noisy = (whole != other).flatten(1).any(dim=1)
        assert noisy.tolist() == [False, True, False, True]
        for i in range(4):
            alone = step(model, x[i : i + 1], t[i : i + 1], generator=sample_generators(0, [i]))[
                "sample"
            ]
            torch.testing.assert_close(whole[i : i + 1], alone)


# -- loops -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_loop_hands_its_arguments_to_every_step(sampler):
    diffusion = make_diffusion(respacing="4")
    model, labelled, seen = FormulaModel(), [], []

    def spy(x, t, y):
        labelled.append(y)
        return model(x, t, y)

    def denoised_fn(x_start):
        seen.append(x_start)
        return 0 * x_start + 3.0

    y = torch.tensor([1.0, 2.0])
    for clip, x_start in ((True, 1.0), (False, 3.0)):
        steps = progressive(diffusion, sampler)(
            spy,
            SHAPE,
            clip_denoised=clip,
            denoised_fn=denoised_fn,
            model_kwargs={"y": y},
            device="cpu",
        )
        for step in steps:
            assert torch.equal(step["pred_xstart"], torch.full(SHAPE, x_start))
    assert len(seen) == len(labelled) == 8
    assert all(labels is y for labels in labelled)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_progress_bar_counts_the_steps_and_changes_nothing(sampler, capsys):
    diffusion, model, noise = make_diffusion(respacing="6"), FormulaModel(), torch.randn(SHAPE)
    torch.manual_seed(1)
    quiet = final(diffusion, sampler)(model, SHAPE, noise=noise)
    assert capsys.readouterr().err == ""
    torch.manual_seed(1)
    shown = final(diffusion, sampler)(model, SHAPE, noise=noise, progress=True)
    assert torch.equal(quiet, shown)
    assert "6/6" in capsys.readouterr().err


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampling_keeps_no_graph(sampler):
    for step in progressive(make_diffusion(respacing="3"), sampler)(FormulaModel(), SHAPE):
        assert not step["sample"].requires_grad
    assert torch.is_grad_enabled()


def test_progressive_loop_can_be_stopped_and_leaves_gradients_enabled():
    steps = make_diffusion(respacing="5").p_sample_loop_progressive(FormulaModel(), SHAPE)
    next(steps)
    assert torch.is_grad_enabled()
    steps.close()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("shape", [(2, 3), (2, 1, 7), (1, 2, 3, 4, 5)])
def test_samples_may_have_any_number_of_dimensions(sampler, shape):
    sample = final(make_diffusion(respacing="4"), sampler)(FormulaModel(), shape)
    assert sample.shape == shape
    assert torch.isfinite(sample).all()


def test_double_precision_noise_gives_double_precision_samples():
    noise = torch.randn(SHAPE, dtype=torch.float64)
    diffusion, model = make_diffusion(respacing="4"), FormulaModel().double()
    for sampler in SAMPLERS:
        assert final(diffusion, sampler)(model, SHAPE, noise=noise).dtype == torch.float64


# -- relations between the samplers ----------------------------------------------------------------


@pytest.mark.parametrize("clip", [True, False])
def test_ddim_with_eta_1_is_ddpm_with_the_posterior_variance(clip):
    """DDIM section 4.1; to rounding, as the two write the mean differently."""
    diffusion = make_diffusion(var="FIXED_SMALL")
    model = FormulaModel(learns_variance=False)
    x = torch.randn(50, 1, 4, 4, dtype=torch.float64)
    t = torch.arange(50)
    torch.manual_seed(2)
    ddpm = diffusion.p_sample(model, x, t, clip_denoised=clip)["sample"]
    torch.manual_seed(2)
    ddim = diffusion.ddim_sample(model, x, t, clip_denoised=clip, eta=1.0)["sample"]
    torch.testing.assert_close(ddim, ddpm, rtol=1e-5, atol=1e-5)


def test_deterministic_ddim_forward_undoes_its_reverse_when_the_noise_estimate_is_constant():
    """x_0 and eps are then the same all along the path, so each step is exact both ways."""
    diffusion = make_diffusion(respacing="10")
    eps = torch.randn(SHAPE, dtype=torch.float64)

    def model(x, t):
        return torch.cat([eps, eps], dim=1)

    x = start = torch.randn(SHAPE, dtype=torch.float64)
    for i in range(9):
        x = diffusion.ddim_reverse_sample(model, x, torch.tensor([i, i]), clip_denoised=False)[
            "sample"
        ]
    assert (x - start).abs().mean() > 0.1
    for i in range(9, 0, -1):
        x = diffusion.ddim_sample(model, x, torch.tensor([i, i]), clip_denoised=False)["sample"]
    torch.testing.assert_close(x, start, rtol=1e-4, atol=1e-4)


def test_reverse_ddim_follows_only_the_deterministic_path():
    with pytest.raises(ValueError, match=r"not 0\.5"):
        make_diffusion().ddim_reverse_sample(
            FormulaModel(), torch.zeros(SHAPE), torch.tensor([0, 0]), eta=0.5
        )


def test_first_reverse_step_past_the_last_timestep_is_pure_noise():
    diffusion, model = make_diffusion(var="FIXED_SMALL"), FormulaModel(learns_variance=False)
    x, t = torch.randn(SHAPE), torch.tensor([49, 49])
    out = diffusion.ddim_reverse_sample(model, x, t)
    eps = diffusion._predict_eps_from_xstart(x, t, out["pred_xstart"])
    torch.testing.assert_close(out["sample"], eps)


# -- subclasses ------------------------------------------------------------------------------------


class OldStyle(SpacedDiffusion):
    """Steps overridden with the signatures that predate ``generator``."""

    def p_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
        out = super().p_sample(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        return {**out, "sample": out["sample"] + 1}

    def ddim_sample(
        self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None, eta=0.0
    ):
        out = super().ddim_sample(model, x, t, clip_denoised, denoised_fn, model_kwargs, eta)
        return {**out, "sample": out["sample"] + 1}


class OldStyleLoops(SpacedDiffusion):
    """Progressive loops overridden with the signatures that predate ``generator``."""

    def p_sample_loop_progressive(
        self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, model_kwargs=None,
        device=None, progress=False,
    ):  # fmt: skip
        for out in super().p_sample_loop_progressive(
            model, shape, noise, clip_denoised, denoised_fn, model_kwargs, device, progress
        ):
            yield {**out, "sample": out["sample"] + 1}

    def ddim_sample_loop_progressive(
        self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, model_kwargs=None,
        device=None, progress=False, eta=0.0,
    ):  # fmt: skip
        for out in super().ddim_sample_loop_progressive(
            model, shape, noise, clip_denoised, denoised_fn, model_kwargs, device, progress, eta
        ):
            yield {**out, "sample": out["sample"] + 1}


@pytest.mark.parametrize("cls", [OldStyle, OldStyleLoops])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_steps_and_loops_overridden_without_a_generator_argument_still_work(sampler, cls):
    noise = torch.randn(SHAPE)
    model = FormulaModel()
    torch.manual_seed(6)
    plain = final(make_diffusion(respacing="1"), sampler)(model, SHAPE, noise=noise)
    torch.manual_seed(6)
    shifted = final(make_diffusion(respacing="1", cls=cls), sampler)(model, SHAPE, noise=noise)
    torch.testing.assert_close(shifted, plain + 1)


def test_step_that_cannot_take_a_generator_is_not_given_one_silently():
    with pytest.raises(TypeError, match="generator"):
        make_diffusion(respacing="3", cls=OldStyle).p_sample_loop(
            FormulaModel(), SHAPE, generator=sample_generators(0, range(2))
        )


@pytest.mark.parametrize("base", [GaussianDiffusion, SpacedDiffusion])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_loops_use_an_overridden_p_mean_variance(sampler, base):
    class Zero(base):
        def p_mean_variance(self, *args, **kwargs):
            out = super().p_mean_variance(*args, **kwargs)
            return {name: torch.zeros_like(value) for name, value in out.items()}

    diffusion = make_diffusion(25, cls=Zero)
    assert torch.equal(final(diffusion, sampler)(FormulaModel(), SHAPE), torch.zeros(SHAPE))
