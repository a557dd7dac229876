"""Samples that depend on seed and index alone, by any sampler; the flags that choose it."""

import itertools

import numpy as np
import pytest
import torch
from analytic import as_network, gaussian
from golden_data import FormulaModel, make_diffusion
from launchers import start
from script_runner import (
    TINY_SUPER_RES,
    command_line,
    error_of,
    samples,
    script_environment,
    script_path,
    succeed,
)
from toy import make_model

from improved_diffusion import dist_util
from improved_diffusion.denoiser import Denoiser
from improved_diffusion.errors import UserError
from improved_diffusion.noise_levels import SPACINGS, noise_levels, spaced_timesteps
from improved_diffusion.respace import SpacedDiffusion, space_timesteps
from improved_diffusion.sampling import (
    BY_TIMESTEP,
    DEFAULT_SPACING,
    OF_THE_PROCESS,
    SAMPLERS,
    SampleOptions,
    check_sampler,
    describe_sampler,
    draw_samples,
    sampling_levels,
)
from improved_diffusion.script_util import create_gaussian_diffusion
from improved_diffusion.solvers import SOLVERS

STOCHASTIC = ("ddpm", "dpmpp_2m_sde", "sde", "ancestral")


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setattr(dist_util, "dev", lambda: torch.device("cpu"))


def process(respacing="", **options):
    """40 steps, or some of them."""
    options = {"schedule": "cosine", "rescale_timesteps": True, **options}
    return make_diffusion(40, respacing=respacing, **options)


def draw(indices, *, model=None, diffusion=None, seed=3, kwargs=None, **options):
    """Samples [N, 1, 8, 8] by 6 of 40 steps."""
    if diffusion is None:
        diffusion = process("" if options.get("steps") else "6")
    options = SampleOptions(**options)
    with torch.no_grad():
        return draw_samples(
            model or FormulaModel(),
            diffusion,
            list(indices),
            (1, 8, 8),
            options,
            seed,
            kwargs or {},
        )


def by_steps(sampler, steps=6):
    """Flags of a sampler with a number of steps, or for the one that takes none, few of them."""
    return {
        "sampler": sampler,
        **({"ode_tolerance": 0.5} if sampler == "ode" else {"steps": steps}),
    }


def differ(a, b, least=1e-2):
    assert a.shape == b.shape
    assert (a - b).abs().max() > least


# -- options


def test_every_solver_but_the_inversion_is_a_sampler():
    assert {*SOLVERS, *OF_THE_PROCESS} - set(SAMPLERS) == {"ddim_inversion"}
    assert set(SAMPLERS) <= {*SOLVERS, *OF_THE_PROCESS}
    assert all(spacing in ("", *SPACINGS) for spacing in DEFAULT_SPACING.values())
    assert all(DEFAULT_SPACING[sampler] in BY_TIMESTEP for sampler in OF_THE_PROCESS)


WRONG = [
    ({"num_samples": 0}, "--num_samples 0"),
    ({"batch_size": -1}, "--batch_size -1"),
    ({"eta": -0.1, "use_ddim": True}, "--eta -0.1"),
    ({"eta": 1.1, "use_ddim": True}, "--eta 1.1"),
    ({"eta": float("nan"), "use_ddim": True}, "--eta nan"),
    ({"eta": 0.5}, "--eta 0.5 needs --use_ddim True"),
    ({"eta": 0.5, "sampler": "heun"}, "--eta 0.5 needs --use_ddim True or --sampler ddim: heun"),
    ({"sampler": "best"}, "--sampler best: must be one of ddpm, ddim, euler, heun, dpmpp_2m, "),
    ({"sampler": "ddim_inversion"}, "--sampler ddim_inversion: must be one of"),
    ({"spacing": "even", "steps": 5}, "--spacing even: must be one of respacing, leading, "),
    ({"steps": -1}, "--steps -1: must be 1 or more"),
    ({"use_ddim": True, "sampler": "heun"}, "--use_ddim True contradicts --sampler heun"),
    ({"use_ddim": True, "sampler": "ddpm"}, "--use_ddim True contradicts --sampler ddpm"),
    ({"churn": 1.0}, "--churn 1.0 needs --sampler heun"),
    ({"churn": 1.0, "sampler": "euler"}, "--churn 1.0 needs --sampler heun: euler"),
    ({"churn": -1.0, "sampler": "heun"}, "--churn -1.0: must be at least 0"),
    ({"churn": float("inf"), "sampler": "heun"}, "--churn inf"),
    ({"rho": 5.0}, "--rho 5.0 needs --steps and --spacing karras"),
    ({"rho": 5.0, "sampler": "heun"}, "--rho 5.0 needs --steps and --spacing karras"),
    ({"rho": 5.0, "sampler": "unipc", "steps": 4, "spacing": "log_snr"}, "--rho 5.0 needs"),
    ({"rho": 0.0, "sampler": "heun", "steps": 4}, "--rho 0.0: must be above 0"),
    ({"stochasticity": 0.5, "sampler": "heun"}, "--stochasticity 0.5 needs --sampler sde"),
    ({"stochasticity": 1.5, "sampler": "sde"}, r"--stochasticity 1.5: must be in \[0, 1\]"),
    ({"ode_tolerance": 0.1, "sampler": "heun"}, "--ode_tolerance 0.1 needs --sampler ode"),
    ({"ode_tolerance": 0.0, "sampler": "ode"}, "--ode_tolerance 0.0: must be in"),
    ({"steps": 5, "sampler": "ode"}, "--steps 5 contradicts --sampler ode, which chooses its own"),
    ({"spacing": "karras"}, "--spacing karras needs --steps"),
    ({"spacing": "karras", "sampler": "ode"}, "--spacing karras needs --steps"),
    *(
        (
            {"sampler": sampler, "steps": 5, "spacing": spacing},
            f"--spacing {spacing} contradicts --sampler {sampler}.*respacing, leading, linspace, "
            "trailing",
        )
        for sampler in OF_THE_PROCESS
        for spacing in ("karras", "log_snr")
    ),
]


@pytest.mark.parametrize(("options", "named"), WRONG)
def test_impossible_options_are_named(options, named):
    with pytest.raises(UserError, match=named) as error:
        SampleOptions(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {"eta": 1.0, "use_ddim": True},
        {"eta": 1.0, "sampler": "ddim"},
        {"eta": 0.0},
        {"use_ddim": True, "sampler": "ddim"},
        {"sampler": "heun", "steps": 4, "spacing": "karras", "rho": 5.0},
        {"sampler": "euler", "steps": 4, "rho": 5.0, "spacing": "karras"},
        {"stochasticity": 0.0, "sampler": "sde"},
    ],
)
def test_what_goes_together_is_possible(options):
    SampleOptions(**options)


def test_names_and_spacings_that_are_left_out():
    assert SampleOptions().resolved() == {"sampler": "ddpm", "spacing": ""}
    assert SampleOptions(use_ddim=True).resolved() == {"sampler": "ddim", "spacing": ""}
    for sampler, spacing in DEFAULT_SPACING.items():
        chosen = SampleOptions(**by_steps(sampler)).resolved()
        assert chosen == {"sampler": sampler, "spacing": spacing}
    options = SampleOptions(sampler="euler", steps=3, spacing="karras")
    assert options.resolved() == {"sampler": "euler", "spacing": "karras"}


# -- options and the process


@pytest.mark.parametrize("steps", [1, 2, 39, 40])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_any_number_of_steps_up_to_all(sampler, steps):
    if sampler == "ode":
        return
    for spacing in SPACINGS if sampler not in OF_THE_PROCESS else BY_TIMESTEP:
        options = {"sampler": sampler, "steps": steps, "spacing": spacing}
        check_sampler(FormulaModel(), process(), SampleOptions(**options))
        assert draw([0], **options).isfinite().all()


@pytest.mark.parametrize("sampler", set(SAMPLERS) - {"ode"})
def test_more_steps_than_the_process_has(sampler):
    options = SampleOptions(**by_steps(sampler, 41))
    with pytest.raises(UserError, match=r"--steps 41: must be in 1 \.\.\. 40"):
        check_sampler(FormulaModel(), process(), options)
    with pytest.raises(UserError, match=r"--steps 41: must be in 1 \.\.\. 40"):
        draw([0], diffusion=process(), sampler=sampler, steps=41)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"steps": 4}, "--steps 4 contradicts --timestep_respacing 6"),
        ({"steps": 4, "sampler": "heun"}, "--steps 4 contradicts --timestep_respacing 6"),
        ({"sampler": "ode"}, "--sampler ode contradicts --timestep_respacing 6"),
    ],
)
def test_two_flags_that_choose_the_steps(options, named):
    with pytest.raises(UserError, match=named):
        check_sampler(FormulaModel(), process("6"), SampleOptions(**options), "6")
    check_sampler(FormulaModel(), process("6"), SampleOptions(sampler="heun"), "6")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_model_of_the_previous_x_is_for_the_process_alone(sampler):
    options = SampleOptions(**by_steps(sampler))
    diffusion = process(mean="PREVIOUS_X")
    if sampler in OF_THE_PROCESS:
        check_sampler(FormulaModel(), diffusion, options)
        assert draw([0], diffusion=diffusion, **by_steps(sampler)).isfinite().all()
        return
    named = f"--sampler {sampler} cannot serve .* PREVIOUS_X: choose one of ddpm, ddim"
    with pytest.raises(UserError, match=named):
        check_sampler(FormulaModel(), diffusion, options)


def test_a_model_that_the_denoiser_refuses_is_refused_before_sampling(monkeypatch):
    def refuse(*args):
        raise UserError("no")

    monkeypatch.setattr("improved_diffusion.sampling.Denoiser", refuse)
    with pytest.raises(UserError, match="--sampler unipc: no"):
        check_sampler(FormulaModel(), process(), SampleOptions(sampler="unipc"))
    check_sampler(FormulaModel(), process(), SampleOptions(sampler="ddpm"))


def test_what_is_done_is_said_in_words():
    said = [
        describe_sampler(process("6"), SampleOptions(**options))
        for options in ({}, {"use_ddim": True}, {"sampler": "ode", "ode_tolerance": 1e-3})
    ]
    assert said == [
        "sampler ddpm, 6 of 40 steps",
        "sampler ddim, 6 of 40 steps",
        "sampler ode, steps to a tolerance of 0.001",
    ]
    options = SampleOptions(sampler="heun", steps=5, spacing="linspace")
    assert describe_sampler(process(), options) == "sampler heun, 5 of 40 steps, spaced by linspace"


# -- levels


@pytest.mark.parametrize("sampler", set(SAMPLERS) - {*OF_THE_PROCESS})
def test_levels_of_the_process_where_no_steps_are_given(sampler):
    for respacing in ("", "6", "ddim5", "2,3"):
        diffusion = process(respacing)
        levels = sampling_levels(diffusion, SampleOptions(sampler=sampler))
        alpha_bar = diffusion.alphas_cumprod[::-1].copy()
        assert levels[-1] == 0
        np.testing.assert_allclose(levels[:-1], np.sqrt((1 - alpha_bar) / alpha_bar), rtol=1e-9)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_levels_of_each_spacing(spacing):
    levels = sampling_levels(process(), SampleOptions(sampler="unipc", steps=5, spacing=spacing))
    diffusion = process("5") if spacing == "respacing" else process()
    torch.testing.assert_close(levels, noise_levels(diffusion, 5, spacing))


def test_rho_of_karras():
    options = {"sampler": "unipc", "steps": 5, "spacing": "karras"}
    levels = [sampling_levels(process(), SampleOptions(**options, rho=rho)) for rho in (1.0, 7.0)]
    torch.testing.assert_close(levels[0], noise_levels(process(), 5, "karras", 1.0))
    assert not torch.allclose(levels[0], levels[1])


# -- drawing

WAYS = {
    **{sampler: by_steps(sampler) for sampler in SAMPLERS},
    "ddpm by respacing": {},
    "ddim by respacing": {"use_ddim": True},
    "ddim-eta": {"use_ddim": True, "eta": 0.7},
    "heun-churn": {**by_steps("heun"), "churn": 3.0},
}


def all_ways(network):
    """Every way with a network; of those with a real one the quick suite has some."""
    slow = {*WAYS} - {"ddpm", "dpmpp_2m", "sde"} if network is make_model else set()
    return [
        pytest.param(way, network, marks=[pytest.mark.slow] if way in slow else []) for way in WAYS
    ]


@pytest.mark.parametrize(("way", "network"), [*all_ways(FormulaModel), *all_ways(make_model)])
def test_sample_is_the_same_image_in_any_batch(way, network):
    model = network().eval()
    options = {"model": model, **WAYS[way]}
    together = draw(range(7), **options)
    assert together.shape == (7, 1, 8, 8)
    torch.manual_seed(11)  # no draw comes from the global generator
    for size in (1, 3):
        parts = [range(start, min(start + size, 7)) for start in range(0, 7, size)]
        split = torch.cat([draw(part, **options) for part in parts])
        torch.testing.assert_close(split, together, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(draw([5, 2], **options), together[[5, 2]], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_samples_of_two_indices_or_seeds_differ(way):
    first, other = (draw(range(3), seed=seed, **WAYS[way]) for seed in (3, 4))
    flat = torch.cat([first, other]).flatten(1)
    assert torch.pdist(flat).min() > 0.1


def test_every_sampler_makes_images_of_its_own():
    made = {way: draw(range(2), **WAYS[way]) for way in WAYS}
    same = [{"ddpm", "ddpm by respacing"}, {"ddim", "ddim by respacing"}]
    for one, other in itertools.combinations(made, 2):
        if {one, other} not in same:
            differ(made[one], made[other], 1e-3)


def test_the_old_flag_and_the_new_mean_the_same():
    for old, new in [({}, "ddpm"), ({"use_ddim": True}, "ddim")]:
        assert torch.equal(draw(range(2), **old), draw(range(2), sampler=new))
    noisy = draw(range(2), sampler="ddim", eta=0.7)
    assert torch.equal(noisy, draw(range(2), use_ddim=True, eta=0.7))


@pytest.mark.parametrize("sampler", OF_THE_PROCESS)
@pytest.mark.parametrize("spacing", ["", *BY_TIMESTEP])
def test_steps_respace_the_process(sampler, spacing):
    base = process()
    kept = space_timesteps(40, "6")
    if spacing not in ("", "respacing"):
        kept = spaced_timesteps(40, 6, spacing)
    kinds = {name: getattr(base, name) for name in ("model_mean_type", "model_var_type")}
    diffusion = SpacedDiffusion(
        kept, betas=base.betas, loss_type=base.loss_type, rescale_timesteps=True, **kinds
    )
    by_hand = draw(range(3), diffusion=diffusion, sampler=sampler)
    ours = draw(range(3), sampler=sampler, steps=6, spacing=spacing)
    torch.testing.assert_close(ours, by_hand, atol=1e-5, rtol=1e-5)


def test_a_process_that_is_respaced_already_is_respaced_anew():
    for options in (by_steps("ddim", 9), by_steps("euler", 9)):
        ours = draw([0], diffusion=process("6"), **options)
        torch.testing.assert_close(ours, draw([0], **options), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("learned", ["LEARNED_RANGE", "FIXED_SMALL", "FIXED_LARGE"])
def test_ancestral_is_ddpm_and_euler_is_ddim(learned):
    """With the same timesteps and noise; the first has the checkpoint's variance."""
    model = FormulaModel(learns_variance=learned == "LEARNED_RANGE")
    own = {"model": model, "diffusion": process("6", var=learned), "clip_denoised": False}
    for name, other in [("ancestral", "ddpm"), ("euler", "ddim")]:
        ours, theirs = (draw(range(3), sampler=sampler, **own) for sampler in (name, other))
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    low = {**own, "diffusion": process(var=learned), "steps": 2, "spacing": "leading"}
    ours, theirs = (draw(range(3), sampler=sampler, **low) for sampler in ("euler", "ddim"))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)  # from a level of some signal


@pytest.mark.parametrize("sampler", set(SAMPLERS) - {"ode"})
def test_steps_and_their_spacing_are_options(sampler):
    differ(draw([0], **by_steps(sampler, 6)), draw([0], **by_steps(sampler, 9)), 1e-3)
    spacings = BY_TIMESTEP if sampler in OF_THE_PROCESS else SPACINGS
    made = [draw([0], **by_steps(sampler, 7), spacing=spacing) for spacing in spacings]
    for one, other in itertools.combinations(made, 2):
        differ(one, other, 1e-4)
    default = draw([0], **by_steps(sampler, 7))
    assert torch.equal(default, made[spacings.index(DEFAULT_SPACING[sampler])])


@pytest.mark.parametrize(
    ("options", "name", "values"),
    [
        (by_steps("heun"), "churn", (0.0, 1.0, 2.0)),
        ({**by_steps("heun"), "spacing": "karras"}, "rho", (3.0, 7.0)),
        (by_steps("sde"), "stochasticity", (0.0, 0.5, 1.0)),
        ({"sampler": "ode"}, "ode_tolerance", (1e-1, 1e-4)),
        (by_steps("ddim"), "eta", (0.0, 0.5, 1.0)),
    ],
)
def test_what_belongs_to_one_sampler_is_an_option(options, name, values):
    made = [draw([0], **options, **{name: value}) for value in values]
    for one, other in itertools.combinations(made, 2):
        differ(one, other, 1e-4)


def test_churn_stays_below_the_highest_level(monkeypatch):
    seen, predict = [], Denoiser.predict

    def recording(self, x, sigma):
        seen.append(float(sigma))
        return predict(self, x, sigma)

    monkeypatch.setattr(Denoiser, "predict", recording)
    options = SampleOptions(**by_steps("heun"), churn=2.0)
    draw([0], **by_steps("heun"), churn=2.0)
    levels = sampling_levels(process(), options).tolist()
    assert max(seen) == levels[0]
    assert len({*seen} - {*levels}) == 5  # all other steps are churned


class Loud(FormulaModel):
    def forward(self, x, t, y=None):
        return super().forward(3 * x, t, y)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_clipping_is_an_option(sampler):
    options = {"model": Loud(), **by_steps(sampler)}
    assert draw([0], **options).abs().max() <= 1 + 1e-5
    assert draw([0], **options, clip_denoised=False).abs().max() > 1.05


@pytest.mark.parametrize("way", WAYS)
def test_global_generator_is_left_alone(way):
    before = torch.get_rng_state()
    draw([0, 1], **WAYS[way])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_arguments_of_the_model_reach_it(sampler):
    labels = torch.tensor([0.0, 8.0])
    plain = draw([0, 1], **by_steps(sampler))
    labelled = draw([0, 1], **by_steps(sampler), kwargs={"y": labels})
    torch.testing.assert_close(plain[0], labelled[0])
    differ(plain[1], labelled[1])


def test_no_gradient_is_kept():
    """Also where the caller does not say so."""
    options = SampleOptions(sampler="euler", steps=3)
    made = draw_samples(make_model(), process(), [0], (1, 8, 8), options, 0, {})
    assert not made.requires_grad


@pytest.mark.parametrize("mean", ["V", "FLOW", "START_X"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_prediction_is_served(sampler, mean):
    diffusion = process(mean=mean)
    check_sampler(FormulaModel(), diffusion, SampleOptions(**by_steps(sampler)))
    assert draw([0], diffusion=diffusion, **by_steps(sampler)).isfinite().all()


WITHOUT_SIGNAL = {
    "flow": {"predict": "flow"},
    "v": {"predict": "v", "zero_terminal_snr": True},
}
# of first order: how far the spread may be from the data's, 0.2, after 100 steps; else 0.01
SPREAD = {"euler": 0.04, "ddim": 0.04, "ddpm": 0.06, "ancestral": 0.06, "sde": 0.03}


def spread_of(sampler, process, steps, spacing):
    """Of samples of Gaussian data N(0.3, 0.2^2), by its best network."""
    data = gaussian(torch.full((1, 2, 2), 0.3), 0.2)
    diffusion = create_gaussian_diffusion(**WITHOUT_SIGNAL[process])
    options = SampleOptions(sampler=sampler, steps=steps, spacing=spacing, clip_denoised=False)
    indices = range(50 if sampler == "ode" else 500)
    network = as_network(diffusion, data)
    samples = draw_samples(network, diffusion, indices, (1, 2, 2), options, 0, {})
    assert samples.mean().item() == pytest.approx(0.3, abs=0.04)
    return samples.std().item()


@pytest.mark.parametrize("process", WITHOUT_SIGNAL)
@pytest.mark.parametrize("sampler", set(SAMPLERS) - {"ode"})
def test_samplers_survive_an_end_without_signal(sampler, process):
    spacings = ["trailing"] if sampler in OF_THE_PROCESS else ["trailing", "karras", "log_snr"]
    for spacing in spacings:
        few, many = (spread_of(sampler, process, steps, spacing) for steps in (10, 100))
        assert 0.08 < few < 0.4, spacing
        assert many == pytest.approx(0.2, abs=SPREAD.get(sampler, 0.01)), spacing


@pytest.mark.parametrize("process", WITHOUT_SIGNAL)
def test_the_ode_survives_an_end_without_signal(process):
    assert spread_of("ode", process, 0, "") == pytest.approx(0.2, abs=0.03)


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
@pytest.mark.parametrize(("spacing", "warned"), [("leading", True), ("trailing", False)])
def test_steps_that_leave_out_the_end_without_signal_are_warned_of(
    caplog, sampler, spacing, warned
):
    options = SampleOptions(sampler=sampler, steps=5, spacing=spacing)
    for process, expected in (({"predict": "flow"}, warned), ({}, False)):
        caplog.clear()
        check_sampler(None, create_gaussian_diffusion(**process), options)
        assert ("leave out the last" in caplog.text) == expected


def test_evaluations_are_those_of_the_solver():
    """One a step but for Heun, two, but one in the last and in a far first step."""
    for sampler, count in [("euler", 6), ("heun", 10), ("dpmpp_2m", 6), ("unipc", 6), ("ddpm", 6)]:
        model = FormulaModel()
        draw([0], model=model, **by_steps(sampler))
        assert len(model.seen) == count, sampler
    assert Denoiser(FormulaModel(), process()).evaluations == 0


# -- the scripts ----------------------------------------------------------------------------------


@pytest.fixture
def sample(run_script, trained, tmp_path):
    """Sample from the trained model of 30 steps into a folder by name; its images."""

    def run(name, **flags):
        own = {"model_path": trained.path, "num_samples": 5, "classes": 1, "log_dir": name}
        done = succeed(run_script("image_sample", {**own, **flags}, cwd=tmp_path))
        steps = "tolerance" if flags.get("sampler") == "ode" else f", {flags.get('steps')} of 30"
        assert f"sampler {flags.get('sampler')}" in done.stdout
        assert steps in done.stdout
        return samples(tmp_path / name)[0]

    return run


def assert_same_images(a, b):
    """Equal but for truncation of what rounding moved across a level."""
    assert a.shape == b.shape
    assert np.abs(a.astype(int) - b.astype(int)).max() <= 1


def assert_other_images(a, b):
    assert a.shape == b.shape
    assert np.abs(a.astype(int) - b.astype(int)).max() > 3


def slow_but(quick):
    """All samplers as parameters, of which the quick suite has some."""
    return [pytest.param(s, marks=[] if s in quick else pytest.mark.slow) for s in SAMPLERS]


@pytest.mark.parametrize("sampler", slow_but(["dpmpp_2m", "ancestral"]))
def test_sampler_of_the_script_makes_the_same_images_in_any_batch(sample, sampler):
    flags = by_steps(sampler, 4)
    images = sample("all", **flags)
    assert images.std() > 10
    for batch_size in (1, 3):
        assert_same_images(sample(f"by-{batch_size}", batch_size=batch_size, **flags), images)
    assert_other_images(sample("other-seed", seed=1, **flags), images)


def test_flags_of_samplers_reach_them(sample):
    """Each makes other images than the same command without it."""
    cases = [
        (by_steps("ddpm", 5), [{"spacing": "leading"}, {"sampler": "ddim", "eta": 0.5}]),
        (by_steps("heun", 4), [{"churn": 2}, {"spacing": "log_snr"}, {"steps": 6}]),
        ({**by_steps("heun", 4), "spacing": "karras"}, [{"rho": 2}]),
        (by_steps("sde", 4), [{"stochasticity": 0.2}, {"clip_denoised": False}]),
        (by_steps("ode"), [{"ode_tolerance": 0.05}]),
    ]
    for flags, others in cases:
        flags = {**flags, "num_samples": 2}
        plain = sample("plain", **flags)
        for other in others:
            assert_other_images(sample("other", **{**flags, **other}), plain)


def test_steps_of_the_script_are_those_of_the_respacing(sample, run_script, trained, tmp_path):
    own = {"model_path": trained.path, "num_samples": 5, "classes": 1}
    for sampler in OF_THE_PROCESS:
        succeed(
            run_script(
                "image_sample", own, cwd=tmp_path, timestep_respacing="5", log_dir="old",
                use_ddim=sampler == "ddim",
            )
        )  # fmt: skip
        new = sample("new", sampler=sampler, steps=5)
        assert_same_images(new, samples(tmp_path / "old")[0])


MISTAKES = [
    ({"sampler": "best"}, ["--sampler best", "ddpm, ddim, euler", "dpmpp_2m"]),
    ({"sampler": "heun", "steps": 31}, ["--steps 31", "1 ... 30"]),
    ({"sampler": "ddpm", "steps": 31}, ["--steps 31", "1 ... 30"]),
    ({"steps": -2}, ["--steps -2", "1 or more"]),
    ({"steps": 5, "spacing": "wide"}, ["--spacing wide", "respacing, leading, linspace"]),
    ({"steps": 5, "timestep_respacing": "ddim5"}, ["--steps 5", "--timestep_respacing ddim5"]),
    ({"sampler": "ode", "timestep_respacing": 5}, ["--sampler ode", "--timestep_respacing 5"]),
    ({"use_ddim": True, "sampler": "heun"}, ["--use_ddim True", "--sampler heun"]),
    ({"steps": 5, "sampler": "ode"}, ["--steps 5", "--sampler ode", "--ode_tolerance"]),
    ({"churn": 1, "sampler": "sde"}, ["--churn 1.0", "--sampler heun"]),
    ({"rho": 3, "sampler": "unipc", "steps": 5}, ["--rho 3.0", "--spacing karras"]),
    ({"stochasticity": 0.5}, ["--stochasticity 0.5", "--sampler sde"]),
    ({"ode_tolerance": 0.5}, ["--ode_tolerance 0.5", "--sampler ode"]),
    ({"eta": 0.5, "sampler": "euler"}, ["--eta 0.5", "--sampler ddim"]),
    ({"steps": 5, "spacing": "karras"}, ["--spacing karras", "--sampler ddpm", "trailing"]),
    ({"spacing": "karras", "sampler": "heun"}, ["--spacing karras", "needs --steps"]),
]


@pytest.mark.parametrize(("flags", "words"), MISTAKES)
def test_mistakes_are_one_line_and_leave_nothing(run_script, trained, tmp_path, flags, words):
    own = {"model_path": trained.path, "num_samples": 2, "log_dir": "out"}
    line = error_of(run_script("image_sample", {**own, **flags}, cwd=tmp_path))
    for word in words:
        assert word in line, line
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def upsampler(tmp_path_factory, digits_dir, run_script):
    """A folder with a run of super-resolution, and images to upsample."""
    folder = tmp_path_factory.mktemp("upsampler")
    flags = {**TINY_SUPER_RES, "data_dir": digits_dir, "batch_size": 8, "log_dir": "run"}
    flags |= {"lr": 1e-2, "ema_rate": 0.5, "lr_anneal_steps": 4}
    succeed(run_script("super_res_train", flags, cwd=folder))
    np.savez(folder / "base.npz", np.random.randint(0, 256, (2, 4, 4, 1), dtype=np.uint8))
    return folder


def test_samplers_upsample(upsampler, run_script):
    flags = {"model_path": "run/ema_0.5_000004.pt", "base_samples": "base.npz", "num_samples": 3}
    made = []
    for sampler in ("ddpm", "dpmpp_2m", "ode"):
        for batch_size in (3, 1):
            own = {**flags, **by_steps(sampler, 4), "batch_size": batch_size, "log_dir": sampler}
            succeed(run_script("super_res_sample", own, cwd=upsampler))
            images = samples(upsampler / sampler)[0]
            if batch_size == 3:
                made.append(images)
            else:
                assert_same_images(images, made[-1])
    for one, other in itertools.combinations(made, 2):
        assert_other_images(one, other)
    for wrong, words in [
        ({"sampler": "heun", "steps": 31}, ["--steps 31", "1 ... 30"]),
        ({"use_ddim": True, "sampler": "unipc"}, ["--use_ddim True", "--sampler unipc"]),
        ({"steps": 5, "timestep_respacing": 4}, ["--steps 5", "--timestep_respacing 4"]),
    ]:
        line = error_of(run_script("super_res_sample", {**flags, **wrong}, cwd=upsampler))
        assert all(word in line for word in words), line


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_2m_sde", "ode"])
def test_two_processes_make_the_images_of_one(tmp_path, trained, sampler):
    made = []
    for launcher, batch_size in (("torchrun", 2), ("single", 7)):
        flags = {**by_steps(sampler, 5), "num_samples": 7, "batch_size": batch_size}
        flags |= {"model_path": trained.path, "log_dir": launcher}
        words = [script_path("image_sample"), *command_line(flags)]
        succeed(start(launcher, *words, cwd=tmp_path, env=script_environment()))
        made.append(samples(tmp_path / launcher))
    assert_same_images(made[0][0], made[1][0])
    assert made[0][1].tolist() == made[1][1].tolist()
