"""Sampling loops never wait for their device, nor copy to it once they run.

Tensors on the device "meta" have no values: whoever asks for one, by ``.item()``, ``.cpu()`` or an
``if``, fails, as on a GPU they would wait. What comes from the host is counted as it is copied.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from improved_diffusion.denoiser import Denoiser
from improved_diffusion.guidance import (
    Autoguidance,
    ClassifierFree,
    ClassifierGuidance,
    Unlabelled,
    classifier_gradient,
)
from improved_diffusion.noise_levels import NoiseLevels, noise_levels
from improved_diffusion.process import create_gaussian_diffusion
from improved_diffusion.rng import sample_generators
from improved_diffusion.solvers import get_solver

META = torch.device("meta")
SHAPE = (2, 3, 4, 4)
SOLVERS = ["euler", "heun", "dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "unipc", "sde", "ancestral"]


class Uploads(TorchDispatchMode):
    """Counts the tensors that are copied from the host to the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given, made = (
            {leaf.device.type for leaf in tree_leaves(part) if isinstance(leaf, torch.Tensor)}
            for part in ((args, kwargs), out)
        )
        self.count += "cpu" in given and "meta" in made
        return out


class Model(torch.nn.Module):
    """Notes before each of its calls how much has come from the host until then."""

    def __init__(self, uploads, channels=6):
        super().__init__()
        self.uploads, self.channels, self.seen = uploads, channels, []

    def forward(self, x, t, y=None):
        assert x.device == t.device == META
        self.seen.append(self.uploads.count)
        return torch.empty(len(x), self.channels, *x.shape[2:], device=META) * t.view(-1, 1, 1, 1)


def process(predict="eps", respacing="5", rescale=True):
    return create_gaussian_diffusion(
        steps=50,
        learn_sigma=True,
        timestep_respacing=respacing,
        predict=predict,
        rescale_timesteps=rescale,
    )


def guided(kind, model, diffusion):
    levels = NoiseLevels(diffusion)
    how = {"interval": (float(levels.sigma_of_t(8)), float(levels.sigma_of_t(40))), "rescale": 0.5}
    if kind == "classifier-free":
        return ClassifierFree(model, diffusion, 2.0, 9, **how)
    if kind == "autoguidance":
        return Autoguidance(model, model, diffusion, 2.0, **how)
    if kind == "classifier":
        return ClassifierGuidance(Unlabelled(model), diffusion, gradient())
    return model


def gradient():
    return classifier_gradient(lambda x, t: x.flatten(1)[:, :10] * t.view(-1, 1))


def run(name, model, diffusion, **more):
    """Sample by a loop on the device."""
    kwargs = {"y": torch.zeros(SHAPE[0], dtype=torch.long, device=META)}
    if name == "ddpm":
        return diffusion.p_sample_loop(model, SHAPE, device=META, model_kwargs=kwargs, **more)
    if name.startswith("ddim"):
        eta = {"eta": 1.0} if name == "ddim eta" else {}
        more = {**eta, **more}
        return diffusion.ddim_sample_loop(model, SHAPE, device=META, model_kwargs=kwargs, **more)
    denoise = Denoiser(model, diffusion, kwargs, clip_denoised=True)
    own = {"posterior": denoise.posterior} if name == "ancestral" else {}
    sigmas = noise_levels(diffusion, 5, "trailing")
    return get_solver(name)(denoise, torch.empty(SHAPE, device=META), sigmas, **own, **more)


def uploads_between_calls(name, kind="", **more):
    """How much came from the host between the first call of the model and the end."""
    diffusion = process(
        **{k: more.pop(k) for k in ("predict", "respacing", "rescale") & more.keys()}
    )
    with Uploads() as uploads:
        model = Model(uploads)
        run(name, guided(kind, model, diffusion), diffusion, **more)
    assert len(model.seen) >= 5
    return uploads.count, model.seen


def steady(name, kind="", **more):
    """Whether nothing comes from the host after the second call of the model.

    By then all tables are on the device: those of a step are looked up around the first call.
    """
    count, seen = uploads_between_calls(name, kind, **more)
    return count == seen[2]


@pytest.mark.parametrize("kind", ["", "classifier-free", "autoguidance", "classifier"])
@pytest.mark.parametrize("name", ["ddpm", "ddim", "ddim eta", *SOLVERS])
def test_loop_neither_waits_for_the_device_nor_copies_to_it(name, kind):
    assert steady(name, kind)


@pytest.mark.parametrize("predict", ["xstart", "v", "flow"])
@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpmpp_2m"])
def test_other_predictions_neither(name, predict):
    assert steady(name, "classifier", predict=predict)
    assert steady(name, "classifier-free", predict=predict, rescale=False, respacing="")


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_gradient_of_a_classifier_neither(name):
    assert steady(name, cond_fn=gradient())


def test_generators_of_the_host_bring_noise_in_each_step_that_needs_it():
    diffusion = process()
    generators = sample_generators(0, range(SHAPE[0]))
    for name, steps_with_noise in (("ddpm", 5), ("ddim eta", 5), ("ddim", 0)):
        run(name, Model(Uploads()), diffusion)  # brings the tables
        with Uploads() as uploads:
            run(name, Model(uploads), diffusion, generator=generators)
        assert uploads.count == steps_with_noise + 1, name  # and the noise that it begins with


def test_who_asks_a_device_is_found():
    """The test itself can fail: a model that asks for a value, one that brings a tensor."""

    class Asks(Model):
        def forward(self, x, t, y=None):
            return super().forward(x, t, y) * t[0].item()

    class Brings(Model):
        def forward(self, x, t, y=None):
            return super().forward(x, t, y) * torch.ones(1, 6, 1, 1).to(x.device)

    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        run("ddim", Asks(Uploads()), process())
    with Uploads() as uploads:
        model = Brings(uploads)
        run("ddim", model, process())
    assert uploads.count > model.seen[2]
