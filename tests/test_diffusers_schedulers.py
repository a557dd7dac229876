"""Our samplers step by step as diffusers' schedulers, on the same network from the same noise.

Where the two differ by an option, the test sets that option; what each one changes by itself is
measured too, so that docs/differences.md does not tell what is no longer so.
"""

import numpy as np
import pytest
import torch
from analytic import Mixture, as_network

from improved_diffusion.denoiser import Denoiser
from improved_diffusion.noise_levels import NoiseLevels, noise_levels
from improved_diffusion.process import create_gaussian_diffusion
from improved_diffusion.respace import respaced
from improved_diffusion.solvers import SOLVERS

diffusers = pytest.importorskip("diffusers")

T = 200
NAMES = {"eps": "epsilon", "xstart": "sample", "v": "v_prediction"}
CLOSE = 5e-5  # their tables are float32; of images in [-1, 1]
MEANS = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)).sign()
DATA = Mixture([0.5, 0.25, 0.25], MEANS, [0.05, 0.2, 0.1])  # clamping matters
CLAMPED = {"thresholding": True, "sample_max_value": 1.0}  # of a solver: as clip_denoised


def process(predict="eps", schedule="linear", **flags):
    return create_gaussian_diffusion(
        steps=T, predict=predict, noise_schedule=schedule, rescale_timesteps=False, **flags
    )


def network(diffusion):
    """The best network for DATA, with a learned variance that varies if there is one."""
    best = as_network(process(diffusion_name(diffusion)), DATA)
    if not diffusion._learns_variance:
        return best
    return lambda x, t: torch.cat([best(x, t), torch.tanh(3 * x)], dim=1)


def diffusion_name(diffusion):
    return {"EPSILON": "eps", "START_X": "xstart", "V": "v"}[diffusion.model_mean_type.name]


def scheduler(kind, diffusion, **options):
    """A scheduler with the noise levels and the prediction of a process of ours."""
    return kind(
        num_train_timesteps=T,
        trained_betas=diffusion.betas.tolist(),
        prediction_type=NAMES[diffusion_name(diffusion)],
        **options,
    )


def noise():
    return torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(1))


def generator():
    return torch.Generator().manual_seed(2)


def by_diffusers(their, model, **arguments):
    """The samples of a scheduler whose timesteps are set."""
    x = noise() * their.init_noise_sigma
    for t in their.timesteps:
        output = model(x, torch.full((len(x),), int(t)))
        x = their.step(output, t, x, **arguments).prev_sample
    return x


def by_solver(name, diffusion, model, timesteps, clip=True):
    """The samples of a solver of ours, through the levels of their timesteps and to 0."""
    sigmas = np.append(NoiseLevels(diffusion).sigma_of_t(timesteps), 0.0)
    denoise = Denoiser(model, diffusion, clip_denoised=clip)
    return SOLVERS[name](denoise, denoise.initial(noise(), sigmas[0]), sigmas)


def difference(ours, theirs):
    """The largest difference; samples of DATA are about 1."""
    assert ours.abs().max() > 0.5
    return (ours - theirs).abs().max().item()


# -- DDPM -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("predict", ["eps", "xstart", "v"])
@pytest.mark.parametrize(
    ("variance", "flags"),
    [
        ("fixed_large", {}),
        ("fixed_small", {"sigma_small": True}),
        ("fixed_small_log", {"sigma_small": True}),
        ("learned_range", {"learn_sigma": True}),
    ],
)
def test_ddpm(predict, variance, flags):
    diffusion = process(predict, **flags)
    their = scheduler(diffusers.DDPMScheduler, diffusion, variance_type=variance)
    their.set_timesteps(40)  # every 5th, from 0
    diffusion = respaced(diffusion, their.timesteps.tolist())
    model = network(diffusion)
    theirs = by_diffusers(their, model, generator=generator())
    ours = diffusion.p_sample_loop(
        model, noise().shape, noise(), device="cpu", generator=generator()
    )
    assert difference(ours, theirs) < CLOSE


def test_ddpm_by_all_steps_of_the_cosine_schedule():
    diffusion = process(schedule="cosine")
    model = network(diffusion)
    their = scheduler(diffusers.DDPMScheduler, diffusion, variance_type="fixed_large")
    their.set_timesteps(T)
    theirs = by_diffusers(their, model, generator=generator())
    ours = diffusion.p_sample_loop(
        model, noise().shape, noise(), device="cpu", generator=generator()
    )
    assert difference(ours, theirs) < CLOSE


# -- DDIM -----------------------------------------------------------------------------------------


def by_ddim(predict, eta, clip, **options):
    """The samples of 20 steps, ours and theirs; ``options`` of their step."""
    diffusion = process(predict)
    their = scheduler(diffusers.DDIMScheduler, diffusion, clip_sample=clip)
    their.set_timesteps(20)  # every 10th, from 0
    model = network(diffusion)
    seeds = {"generator": generator()} if eta else {}
    theirs = by_diffusers(their, model, eta=eta, **seeds, **options)
    ours = respaced(diffusion, their.timesteps.tolist()).ddim_sample_loop(
        model,
        noise().shape,
        noise(),
        clip_denoised=clip,
        device="cpu",
        eta=eta,
        generator=generator(),
    )
    return ours, theirs


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("predict", ["eps", "xstart", "v"])
def test_ddim(predict, eta):
    assert difference(*by_ddim(predict, eta, True, use_clipped_model_output=True)) < CLOSE
    assert difference(*by_ddim(predict, eta, False)) < CLOSE


@pytest.mark.parametrize("clamped_noise", [True, False])
def test_their_ddim_keeps_the_noise_of_before_clamping_by_itself(clamped_noise):
    diffusion = process()
    their = scheduler(diffusers.DDIMScheduler, diffusion)
    their.set_timesteps(10)
    t = int(their.timesteps[2])
    output = 0.9 * noise()  # of a network that leaves x_start beyond [-1, 1]
    theirs = their.step(output, t, noise(), use_clipped_model_output=clamped_noise).prev_sample
    diffusion = respaced(diffusion, their.timesteps.tolist())
    index = torch.full((6,), diffusion.timestep_map.index(t))
    ours = diffusion.ddim_sample(lambda x, t: output, noise(), index)["sample"]
    if clamped_noise:
        assert difference(ours, theirs) < CLOSE
    else:
        assert difference(ours, theirs) > 0.1


# -- solvers --------------------------------------------------------------------------------------

SOLVER_NAMES = {
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
}
every_solver = pytest.mark.parametrize("name", SOLVER_NAMES)


def solve(name, diffusion, steps, clip, **options):
    """The samples of a solver, ours and theirs, through their timesteps."""
    model = network(diffusion)
    their = scheduler(SOLVER_NAMES[name], diffusion, **options)
    their.set_timesteps(steps)
    theirs = by_diffusers(their, model)
    return by_solver(name, diffusion, model, their.timesteps.numpy(), clip), theirs


@every_solver
@pytest.mark.parametrize("predict", ["eps", "xstart", "v"])
@pytest.mark.parametrize(("steps", "schedule"), [(5, "linear"), (20, "linear"), (20, "cosine")])
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_solvers(name, predict, steps, schedule):
    diffusion = process(predict, schedule)
    assert difference(*solve(name, diffusion, steps, False)) < CLOSE
    assert difference(*solve(name, diffusion, steps, True, **CLAMPED)) < CLOSE


@every_solver
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_their_solvers_do_not_clamp_by_themselves(name):
    assert difference(*solve(name, process(), 20, True)) > 100 * CLOSE


@every_solver
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_their_solvers_leave_out_timestep_0(name):
    their = scheduler(SOLVER_NAMES[name], process(), timestep_spacing="linspace")
    their.set_timesteps(20)
    ours = noise_levels(process(), 20, "linspace")
    assert their.timesteps[0] == T - 1
    assert their.timesteps[-1] == 10
    assert ours[0].item() == pytest.approx(their.sigmas[0].item(), rel=1e-5)
    assert ours[-2].item() == NoiseLevels(process()).sigma_min


@every_solver
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_without_signal_their_sigma_is_4096(name):
    diffusion = process("v", zero_terminal_snr=True)
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    their = scheduler(SOLVER_NAMES[name], diffusion, **options)
    their.set_timesteps(20)
    assert their.sigmas[0] == pytest.approx(4096, rel=1e-3)
    assert noise_levels(diffusion, 20, "trailing")[0] > 9999
    assert difference(*solve(name, diffusion, 20, False, **options)) < CLOSE
