"""Edits of given images: against data whose conditional and whose noise are known exactly."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from analytic import Mixture, as_network, gaussian
from golden_data import make_diffusion

from improved_diffusion.denoiser import Denoiser
from improved_diffusion.editing import (
    decode,
    encode,
    image_to_image,
    inpaint,
    interpolate,
    levels_from,
    psnr,
    repaint_walk,
    slerp,
    start_of_strength,
)
from improved_diffusion.noise_levels import NoiseLevels, noise_levels
from improved_diffusion.rng import randn, sample_generators
from improved_diffusion.solvers import SOLVERS

GAUSSIAN = gaussian([[[0.3, -0.2]]], 0.4)  # over [1, 1, 2]
COSINE = make_diffusion(1000, schedule="cosine")
LEVELS = [40.0, 10.0, 4.0, 2.0, 1.0, 0.5, 0.2, 0.05, 0.0]
RIGHT = torch.tensor([False, True])  # a mask: make the second coordinate anew


def noise(count, sigma, shape=(1, 1, 2)):
    return sigma * torch.randn(count, *shape, dtype=torch.float64)


# -- inpainting


def test_walk_jumps_back_from_every_jth_level():
    assert repaint_walk(3, 1, 1) == [0, 1, 2, 3]
    assert repaint_walk(3, 1, 2) == [0, 1, 0, 1, 2, 1, 2, 3]
    assert repaint_walk(6, 2, 3) == [0, 1, 2, 3, 1, 2, 3, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6]
    assert repaint_walk(1, 10, 1) == [0, 1]


@pytest.mark.parametrize(("steps", "length", "samples"), [(50, 2, 10), (250, 10, 10), (7, 3, 4)])
def test_walk_goes_down_one_by_one_and_never_jumps_from_the_image(steps, length, samples):
    walk = np.array(repaint_walk(steps, length, samples))
    moves = np.diff(walk)
    assert set(moves) == {1, -length}
    assert walk[0] == 0
    assert walk[-1] == steps
    jumps = walk[:-1][moves < 0]
    assert max(jumps) == steps - 1  # the last level above 0
    places, counts = np.unique(jumps, return_counts=True)
    assert set(counts) == {samples - 1}
    assert set(np.diff(places)) <= {length}


def test_known_part_comes_out_exactly():
    known = torch.randn(5, 1, 1, 2)
    known[..., 1] = 1e30  # what is hidden does not matter
    out = inpaint(GAUSSIAN, noise(5, 40.0).float(), LEVELS, known=known, mask=RIGHT, jump_length=2)
    assert out.dtype == torch.float32
    assert torch.equal(out[..., 0], known[..., 0])
    assert out[..., 1].abs().max() < 5
    nothing = torch.zeros(5, 1, 1, 2, dtype=torch.bool)
    out = inpaint(GAUSSIAN, noise(5, 40.0), LEVELS, known=known, mask=nothing, jump_samples=1)
    assert torch.equal(out.float(), known)


def test_every_level_has_the_noise_that_belongs_to_it():
    known = torch.tensor([[[[0.7, 0.0]]]], dtype=torch.float64).expand(20_000, -1, -1, -1)
    levels = [*np.geomspace(40, 0.05, 40), 0.0]
    seen = []

    def check(i, *, x, x_start, sigma):
        reached = levels[levels.index(sigma) + 1]
        off = x[..., 0] - 0.7
        assert off.std().item() == pytest.approx(reached, rel=0.03)
        assert off.mean().item() == pytest.approx(0, abs=0.03 * reached)
        expected = math.hypot(0.4, reached)  # of what is made anew: the data's, and the noise
        assert (x[..., 1] + 0.2).std().item() == pytest.approx(expected, rel=0.03)
        seen.append(reached)

    own = {"known": known, "mask": RIGHT, "jump_samples": 2, "solver": SOLVERS["heun"]}
    inpaint(GAUSSIAN, noise(20_000, 40.0), levels, callback=check, **own)
    assert len(seen) == 40 + 3 * 10


# Two clusters along the diagonal: what is known makes one of them more probable
DIAGONAL = Mixture([0.5, 0.5], torch.tensor([[[[-0.3, -0.5]]], [[[0.3, 0.5]]]]), [0.2, 0.2])


def share_of_upper_cluster(jump_samples):
    """How often inpainting chooses the upper cluster when the first coordinate is 0.1."""
    known = torch.tensor([[[[0.1, 0.0]]]], dtype=torch.float64).expand(1000, -1, -1, -1)
    sigmas = noise_levels(COSINE, 12, "log_snr")
    x = noise(1000, float(sigmas[0]))
    jumps = {"jump_length": 1, "jump_samples": jump_samples}
    out = inpaint(DIAGONAL, x, sigmas, known=known, mask=RIGHT, **jumps)
    return (out[..., 1] > 0).double().mean().item()


def test_jumps_lead_to_the_exact_conditional():
    odds = math.exp((0.4**2 - 0.2**2) / (2 * 0.2**2))  # of the distances to -0.3 and 0.3
    exact = odds / (1 + odds)
    assert exact == pytest.approx(0.818, abs=1e-3)
    shares = [share_of_upper_cluster(samples) for samples in (1, 10, 40)]
    assert shares[0] < 0.63  # without jumps, the known part hardly counts
    assert shares[0] + 0.05 < shares[1] < shares[2] - 0.05
    assert shares[2] == pytest.approx(exact, abs=0.08)


@pytest.mark.parametrize("mean", ["START_X", "EPSILON", "V", "FLOW"])
@pytest.mark.parametrize(
    ("var", "respacing", "tolerance"),  # beta-tilde is too small a variance for long steps
    [("LEARNED_RANGE", "", 0.06), ("LEARNED_RANGE", "20", 0.06), ("FIXED_SMALL", "", 0.15)],
)
def test_any_model_fills_in_the_data(mean, var, respacing, tolerance):
    schedule = "linear_path" if mean == "FLOW" else "cosine"
    diffusion = make_diffusion(60, schedule=schedule, respacing=respacing, mean=mean, var=var)
    denoise = Denoiser(as_network(diffusion, GAUSSIAN), diffusion)
    sigmas = noise_levels(diffusion, 0, "respacing")
    known = torch.full((2000, 1, 1, 2), 0.1, dtype=torch.float64)
    x = denoise.initial(torch.randn(2000, 1, 1, 2, dtype=torch.float64), float(sigmas[0]))
    out = inpaint(
        denoise, x, sigmas, known=known, mask=RIGHT, posterior=denoise.posterior, jump_samples=2
    )
    made = out[..., 1]
    assert made.mean().item() == pytest.approx(-0.2, abs=0.03)
    assert made.std().item() == pytest.approx(0.4, rel=tolerance)


def test_inpainting_of_a_sample_depends_on_its_generator_alone():
    known = torch.randn(4, 1, 1, 2, dtype=torch.float64)

    def run(rows):
        generators = sample_generators(0, rows)
        x = 40 * randn((len(rows), 1, 1, 2), generators).double()
        own = {"known": known[rows], "mask": RIGHT, "generator": generators, "jump_length": 2}
        return inpaint(GAUSSIAN, x, LEVELS, **own)

    whole = run([0, 1, 2, 3])
    torch.testing.assert_close(torch.cat([run([0]), run([1, 2]), run([3])]), whole)
    assert not torch.allclose(whole[0], whole[1])


def test_inpainting_takes_other_solvers_and_tells_of_its_steps():
    seen = []

    def tell(i, *, x, x_start, sigma):
        seen.append((i, sigma, x.shape, x_start.shape))

    known = torch.zeros(3000, 1, 1, 2, dtype=torch.float64)
    out = inpaint(
        GAUSSIAN,
        noise(3000, 40.0),
        LEVELS,
        known=known,
        mask=RIGHT,
        jump_length=2,
        jump_samples=3,
        solver=SOLVERS["heun"],
        callback=tell,
    )
    assert out[..., 1].std().item() == pytest.approx(0.4, rel=0.1)
    walk = repaint_walk(8, 2, 3)
    down = [i for i in range(len(walk) - 1) if walk[i + 1] > walk[i]]
    assert [i for i, *_ in seen] == down
    assert [sigma for _, sigma, *_ in seen] == [LEVELS[walk[i]] for i in down]
    assert {shapes for *_, shapes, _ in seen} == {(3000, 1, 1, 2)}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"mask": torch.ones(2)}, "float32"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, r"\[3\].*\[4, 1, 1, 2\]"),
        ({"mask": torch.ones(5, 4, 1, 1, 2, dtype=torch.bool)}, r"\[5, 4, 1, 1, 2\]"),
        ({"jump_length": 0}, "jump_length is 0"),
        ({"jump_samples": 0}, "jump_samples is 0"),
        ({"jump_length": 8}, "below the number of steps, 8"),
    ],
)
def test_inpainting_refuses_what_cannot_work(change, word):
    own = {"known": torch.zeros(4, 1, 1, 2), "mask": RIGHT, **change}
    with pytest.raises(ValueError, match=word):
        inpaint(GAUSSIAN, noise(4, 40.0), LEVELS, **own)


# -- image to image


def flow_map(x, sigma_from, sigma_to):
    """Where the probability-flow ODE of GAUSSIAN leads x, exactly."""
    mean = GAUSSIAN.means.view(1, 1, 1, 2)
    scale = math.hypot(0.4, sigma_to) / math.hypot(0.4, sigma_from)
    return mean + scale * (x - mean)


def test_image_to_image_adds_the_noise_of_the_level_and_takes_it_away():
    images = torch.randn(50, 1, 1, 2, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    levels = [*np.geomspace(40, 0.01, 200), 0.0]
    made = image_to_image(
        GAUSSIAN, images, levels, 0.8, generator=generator, solver=SOLVERS["heun"]
    )
    drawn = randn(images.shape, torch.Generator().manual_seed(1)).double()
    expected = flow_map(images + 0.8 * drawn, 0.8, 0)
    torch.testing.assert_close(made, expected, atol=1e-3, rtol=0)


def test_image_to_image_goes_from_the_image_to_a_fresh_sample():
    images = torch.randn(4000, 1, 1, 2, dtype=torch.float64) * 0.05 + 0.8
    sigmas = noise_levels(COSINE, 100, "trailing")
    levels = NoiseLevels(COSINE)

    def make(t, images=images):
        own = {"generator": torch.Generator().manual_seed(0), "solver": SOLVERS["dpmpp_2m"]}
        return image_to_image(GAUSSIAN, images, sigmas, float(levels.sigma_of_t(t)), **own)

    distances = [(make(t) - images).square().mean().sqrt().item() for t in (0, 100, 300, 500, 999)]
    assert distances[0] < 0.01
    assert distances == sorted(distances)
    fresh = make(999)
    assert fresh.mean(dim=0).flatten().tolist() == pytest.approx([0.3, -0.2], abs=0.03)
    assert fresh.std().item() > 0.4
    torch.testing.assert_close(fresh, make(999, -images), atol=1e-3, rtol=0)  # nothing is left


@pytest.mark.parametrize("name", [*set(SOLVERS) - {"ddim_inversion"}])
def test_image_to_image_by_every_solver(name):
    images = GAUSSIAN.sample(100 if name == "ode" else 2000)
    own = {"generator": torch.Generator().manual_seed(0)}
    made = image_to_image(
        GAUSSIAN, images, noise_levels(COSINE, 60, "log_snr"), 1.0, solver=SOLVERS[name], **own
    )
    assert made.mean(dim=0).flatten().tolist() == pytest.approx([0.3, -0.2], abs=0.04)
    correlation = np.corrcoef(images[..., 0].flatten(), made[..., 0].flatten())[0, 1]
    assert 0.05 < correlation < 0.6  # something is kept, something is new


def test_levels_begin_at_the_start_and_no_tiny_step_follows():
    run = [8.0, 4.0, 2.0, 1.0, 0.0]
    assert levels_from(run, 3.0) == [3.0, 2.0, 1.0, 0.0]
    assert levels_from(run, 2.1) == [2.1, 1.0, 0.0]  # 2 would be a tiny step before a long one
    assert levels_from(run, 2.0) == [2.0, 1.0, 0.0]
    assert levels_from(run, 20.0) == [20.0, 8.0, 4.0, 2.0, 1.0, 0.0]
    assert levels_from(run, 1.01) == [1.01, 1.0, 0.0]  # the last level above 0 stays
    assert levels_from(run, 0.3) == [0.3, 0.0]


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.inf, math.nan])
def test_start_must_be_above_the_last_level(sigma):
    with pytest.raises(ValueError, match="sigma_start is"):
        levels_from([2.0, 0.0], sigma)


def test_strength_is_a_share_of_the_timesteps():
    assert [start_of_strength(s, 1000) for s in (1, 0.5, 0.001, 1e-9)] == [999, 499, 0, 0]
    for strength in (0, 1.5, math.nan):
        with pytest.raises(ValueError, match="strength is"):
            start_of_strength(strength, 1000)


# -- encoding


def test_latents_are_those_of_the_exact_ode():
    images = GAUSSIAN.sample(100)
    errors = []
    for steps in (50, 100, 200):
        levels = [*np.geomspace(20, 0.01, steps), 0.0]
        latents = encode(GAUSSIAN, images, levels)
        errors.append((latents - flow_map(images, 0, 20)).abs().max().item() / 20)
    assert errors[0] < 0.2
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)  # of first order
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.1)


def test_round_trip_error_falls_with_the_steps():
    images = DIAGONAL.sample(200)
    ratios = []
    for steps in (25, 50, 100):
        sigmas = noise_levels(COSINE, steps, "log_snr")
        again = decode(DIAGONAL, encode(DIAGONAL, images, sigmas), sigmas)
        ratios.append(psnr(images, again).mean().item())
    assert ratios[0] > 15
    assert all(gain > 4 for gain in np.diff(ratios))  # dB; of first order is 6


def test_psnr_by_hand():
    images = torch.zeros(3, 1, 2, 2)
    others = torch.zeros(3, 1, 2, 2)
    others[1] = 0.2
    others[2, 0, 0, 0] = 2.0
    ratios = psnr(images, others)
    assert ratios.dtype == torch.float64
    assert ratios.tolist() == pytest.approx([math.inf, 20.0, 10 * math.log10(4)])
    assert psnr(images[1:2], others[1:2], peak=0.2).item() == pytest.approx(0, abs=1e-6)


# -- interpolation


def test_slerp_keeps_the_norm_and_goes_evenly():
    first, second = torch.randn(2, 5, 3, 4, 4)
    second = second * (first.flatten(1).norm(dim=1) / second.flatten(1).norm(dim=1)).view(
        -1, 1, 1, 1
    )
    points = [slerp(first, second, share) for share in np.linspace(0, 1, 6)]
    assert torch.equal(points[0], first)
    torch.testing.assert_close(points[-1], second)
    cosine = torch.nn.functional.cosine_similarity
    whole = torch.arccos(cosine(first.flatten(1), second.flatten(1)))
    for before, after in pairwise(points):
        torch.testing.assert_close(after.flatten(1).norm(dim=1), first.flatten(1).norm(dim=1))
        angle = torch.arccos(cosine(before.flatten(1), after.flatten(1)))
        torch.testing.assert_close(angle, whole / 5, atol=1e-3, rtol=0)


def test_slerp_by_hand():
    first, second = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    half = math.sqrt(0.5)
    torch.testing.assert_close(slerp(first, second, 0.5), torch.tensor([[half, 2 * half]]))
    torch.testing.assert_close(slerp(first, 3 * first, 0.5), 2 * first)  # along a line
    assert torch.equal(slerp(0 * first, 0 * first, 0.3), 0 * first)


def test_slerp_refuses_what_has_no_way():
    x = torch.ones(1, 2)
    with pytest.raises(ValueError, match="opposite"):
        slerp(x, -2 * x, 0.5)
    with pytest.raises(ValueError, match="share is"):
        slerp(x, x, 1.5)


def test_ends_of_an_interpolation_are_the_reconstructions():
    first, second = DIAGONAL.sample(6).split(3)
    sigmas = noise_levels(COSINE, 30, "log_snr")
    way = interpolate(DIAGONAL, first, second, sigmas, 5)
    assert way.shape == (5, 3, 1, 1, 2)
    for end, images in ((way[0], first), (way[-1], second)):
        again = decode(DIAGONAL, encode(DIAGONAL, images, sigmas), sigmas)
        torch.testing.assert_close(end, again)
    with pytest.raises(ValueError, match="points is 1"):
        interpolate(DIAGONAL, first, second, sigmas, 1)


def test_interpolation_between_classes_has_the_denoisers_of_both():
    low, high = gaussian([[[-0.5]]], 0.1), gaussian([[[0.5]]], 0.1)
    first, second = low.sample(4), high.sample(4)
    sigmas = noise_levels(COSINE, 200, "log_snr")
    way = interpolate(low, first, second, sigmas, 3, denoise_second=high)
    torch.testing.assert_close(way[0], first, atol=0.02, rtol=0)
    torch.testing.assert_close(way[2], second, atol=0.02, rtol=0)
    assert way[1].abs().max() < 0.3  # the mean of both is a Gaussian round 0


def test_the_nearer_class_counts_more():
    """D is constant here, so that the image is D at the last step."""
    first, second = 0.1 * torch.randn(2, 2, 1, 2, 2)
    sigmas = noise_levels(COSINE, 4, "log_snr")
    low, high = (lambda x, sigma, v=value: torch.full_like(x, v) for value in (-0.8, 0.4))
    way = interpolate(low, first, second, sigmas, 5, denoise_second=high)
    expected = torch.tensor([-0.8, -0.5, -0.2, 0.1, 0.4])
    torch.testing.assert_close(way[:, 0, 0, 0, 0], expected, atol=1e-5, rtol=0)
