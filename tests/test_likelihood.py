"""The streamed estimate of the bound against the whole, and against closed forms."""

import math

import numpy as np
import pytest
import torch
from golden_data import FormulaModel, make_diffusion
from toy import make_model

from improved_diffusion import dist_util
from improved_diffusion.errors import UserError
from improved_diffusion.image_datasets import ImageList, load_once
from improved_diffusion.likelihood import (
    TERMS,
    BoundLikelihood,
    BoundOptions,
    bound_strata,
    estimate_bound,
)
from improved_diffusion.losses import approx_standard_normal_cdf
from improved_diffusion.nll_results import Measured
from improved_diffusion.rng import sample_generators

COUNT = 7
SPLITS = {"one by one": [1] * 7, "uneven": [3, 1, 3], "whole": [7], "gaps": [4, 0, 3, 0]}


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setattr(dist_util, "dev", lambda: torch.device("cpu"))


@pytest.fixture
def images():
    return torch.rand(COUNT, 1, 8, 8) * 2 - 1


@pytest.fixture
def diffusion():
    return make_diffusion(40, schedule="cosine", respacing="5", rescale_timesteps=True)


def split(images, sizes, **cond):
    """(images, cond, indices) in batches of the given sizes."""
    start = 0
    for size in sizes:
        part = slice(start, start + size)
        kwargs = {key: value[part] for key, value in cond.items()}
        yield images[part], kwargs, list(range(len(images)))[part]
        start += size


def estimates(model, diffusion, batches, **options):
    with torch.no_grad():
        return list(estimate_bound(model, diffusion, batches, **options))


def whole(model, diffusion, images, seed=0, **kwargs):
    """``calc_bpd_loop`` of all images at once, each with the noise of its index."""
    with torch.no_grad():
        generators = sample_generators(seed, range(len(images)), "nll")
        return diffusion.calc_bpd_loop(model, images, generator=generators, **kwargs)


@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("network", [FormulaModel, make_model])
def test_any_split_gives_the_mean_of_the_whole(images, diffusion, sizes, network):
    model = network().eval()
    expected = whole(model, diffusion, images)
    *_, last = estimates(model, diffusion, split(images, sizes))
    total = expected["total_bpd"].double()
    assert last.count == COUNT
    assert last.bpd == pytest.approx(total.mean().item(), rel=1e-5)
    assert last.standard_error == pytest.approx(total.std().item() / math.sqrt(COUNT), rel=1e-3)
    assert list(last.terms) == list(TERMS)
    for name in TERMS:
        assert last.terms[name].dtype == torch.float64
        torch.testing.assert_close(
            last.terms[name], expected[name].double().mean(dim=0), rtol=1e-4, atol=1e-5
        )


def test_each_round_is_an_estimate_of_what_was_seen(images, diffusion):
    rounds = estimates(FormulaModel(), diffusion, split(images, [2, 4, 1]))
    assert [estimate.count for estimate in rounds] == [2, 6, 7]
    total = whole(FormulaModel(), diffusion, images)["total_bpd"].double()
    for estimate in rounds:
        seen = total[: estimate.count]
        assert estimate.bpd == pytest.approx(seen.mean().item(), rel=1e-5)
        error = seen.std().item() / math.sqrt(len(seen))
        assert estimate.standard_error == pytest.approx(error, rel=1e-3)


def test_estimates_already_given_do_not_change(images, diffusion):
    stream = estimate_bound(FormulaModel(), diffusion, split(images, [3, 4]))
    with torch.no_grad():
        first = next(stream)
        before = (first.count, first.bpd, first.terms["vb"].clone())
        next(stream)
    assert (first.count, first.bpd) == before[:2]
    assert torch.equal(first.terms["vb"], before[2])


def test_one_image_tells_nothing_of_the_spread(images, diffusion):
    (estimate,) = estimates(FormulaModel(), diffusion, split(images[:1], [1]))
    assert estimate.standard_error == math.inf


def test_equal_images_with_equal_noise_have_no_error(images, diffusion):
    batches = [(images[:1], {}, [0])] * 4
    last = estimates(FormulaModel(), diffusion, batches)[-1]
    assert last.count == 4
    assert last.standard_error == pytest.approx(0, abs=1e-6)


def test_noise_depends_on_seed_and_index(images, diffusion):
    def bpd(indices, seed):
        (estimate,) = estimates(FormulaModel(), diffusion, [(images[:2], {}, indices)], seed=seed)
        return estimate.bpd

    torch.manual_seed(5)
    assert bpd([0, 1], seed=1) == bpd([0, 1], seed=1)
    assert bpd([0, 1], seed=1) != bpd([0, 1], seed=2)
    assert bpd([0, 1], seed=1) != bpd([2, 3], seed=1)


def test_clipping_and_labels_reach_the_process(images, diffusion):
    labels = torch.arange(COUNT).float()

    def bpd(**options):
        cond = {"y": labels} if options.pop("labelled", False) else {}
        return estimates(FormulaModel(), diffusion, split(images, [3, 4], **cond), **options)[
            -1
        ].bpd

    def expected(**kwargs):
        return whole(FormulaModel(), diffusion, images, **kwargs)["total_bpd"].mean().item()

    assert bpd(labelled=True) == pytest.approx(expected(model_kwargs={"y": labels}), rel=1e-5)
    assert bpd(clip_denoised=False) == pytest.approx(expected(clip_denoised=False), rel=1e-5)
    assert (
        len({round(value, 4) for value in (bpd(), bpd(labelled=True), bpd(clip_denoised=False))})
        == 3
    )


@pytest.mark.parametrize("respacing", ["", "10,0,0,0"])  # the latter stops early: a large prior
def test_bound_of_a_model_that_knows_each_image_is_known(images, respacing):
    """Of a perfect prediction only the prior and the decoder are left.

    The model gets the image itself as an argument, so that each step's mean is the posterior's and
    its divergence 0. The prior's is that of N(sqrt(alpha_bar) x, 1 - alpha_bar) from N(0, 1). The
    decoder is a Gaussian round the very pixel, of the clipped posterior's variance at t = 0.
    """
    diffusion = make_diffusion(
        40, schedule="cosine", respacing=respacing, mean="START_X", var="FIXED_SMALL"
    )
    levels = torch.randint(1, 255, images.shape)  # 0 and 255 have open intervals
    images = levels / 127.5 - 1

    def model(x, t, known):
        return known

    *_, last = estimates(model, diffusion, split(images, [2, 5], known=images))

    pixels = images.double().flatten(1)
    left = diffusion.alphas_cumprod[-1]
    prior = 0.5 * (-math.log(1 - left) - left + left * pixels.square()) / math.log(2)
    scale = math.exp(-0.5 * diffusion.posterior_log_variance_clipped[0])
    half = torch.tensor(scale / 255, dtype=torch.float64)
    mass = approx_standard_normal_cdf(half) - approx_standard_normal_cdf(-half)
    decoder = -math.log2(mass)
    total = prior.mean(dim=1) + decoder
    assert last.bpd == pytest.approx(total.mean().item(), rel=1e-4, abs=1e-5)
    assert last.standard_error == pytest.approx(
        total.std().item() / math.sqrt(COUNT), rel=0.05, abs=1e-6
    )
    terms = last.terms["vb"]
    assert terms[-1].item() == pytest.approx(decoder, rel=1e-4, abs=1e-5)  # t = 0 comes last
    assert terms[:-1].abs().max() < 1e-4
    assert last.terms["xstart_mse"].abs().max() < 1e-9


def test_many_batches_lose_no_precision(images, diffusion):
    """Sums are float64: the mean of 100 like batches is that of one."""
    rounds = estimates(FormulaModel(), diffusion, [(images, {}, list(range(COUNT)))] * 100)
    assert rounds[-1].count == 100 * COUNT
    assert rounds[-1].bpd == pytest.approx(rounds[0].bpd, rel=1e-12)


def test_images_of_a_folder_are_estimated_once_each(digits_dir, diffusion):
    paths = sorted(map(str, digits_dir.iterdir()))[:5]
    batches = load_once(ImageList(paths), 99, 2, 8, channels=1, num_workers=0)
    rounds = estimates(FormulaModel(), diffusion, batches)
    assert [estimate.count for estimate in rounds] == [2, 4, 5]
    assert np.isfinite(rounds[-1].bpd)


def test_processes_together_see_what_one_sees(images, diffusion, monkeypatch):
    """Three of them, of which the last has run out of images."""
    shares, sent = [[0, 2, 5, 6], [1, 3, 4], []], []

    def estimate(share, gather):
        monkeypatch.setattr(dist_util, "gather_objects", gather)
        return estimates(FormulaModel(), diffusion, [(images[share], {}, share)])[-1]

    # so that a process without images has something to divide by
    some = ([0], {"vlb": Measured(np.zeros(1), {})})
    for share in shares[1:]:
        estimate(share, lambda mine: sent.append(mine) or [some, mine])
        assert (sent[-1][1] == {}) == (not share)
    together = estimate(shares[0], lambda mine: [mine, *sent])
    total = whole(FormulaModel(), diffusion, images)["total_bpd"].double()
    assert together.count == COUNT
    assert together.bpd == pytest.approx(total.mean().item(), rel=1e-5)


# -- from some of the timesteps ------------------------------------------------------------------


def strata_of(steps, count):
    return bound_strata(steps, count - 1)


@pytest.mark.parametrize("steps", [2, 9, 10, 30, 100, 1000, 4000])
def test_there_are_as_many_strata_as_asked_for(steps):
    for count in {2, 3, 9, 10, 50, steps - 1, steps} & set(range(2, steps + 1)):
        strata = strata_of(steps, count)
        assert len(strata) == count
        assert strata[0] == (0, 1)
        assert [t for first, stop in strata for t in range(first, stop)] == list(range(steps))
        widths = [stop - first for first, stop in strata]
        assert min(widths) >= 1
        assert widths[-1] == max(widths)


def test_each_image_sees_one_timestep_of_each_stratum(images):
    diffusion = make_diffusion(100, var="LEARNED_RANGE")
    seen = {}
    for seed in range(30):
        model = FormulaModel()
        estimates(model, diffusion, split(images, [3, 4]), seed=seed, vlb_timesteps=5)
        rows = torch.cat([torch.stack(model.seen[:5]), torch.stack(model.seen[5:])], dim=1)
        for stratum, timesteps in zip(strata_of(100, 5), rows.tolist(), strict=True):
            seen.setdefault(stratum, []).extend(timesteps)
    for (first, stop), timesteps in seen.items():
        assert set(timesteps) <= set(range(first, stop))
        middle = (first + stop - 1) / 2
        error = (stop - first) / math.sqrt(12 * len(timesteps))
        assert abs(np.mean(timesteps) - middle) <= 4 * error
        assert len(set(timesteps)) > min(stop - first, len(timesteps)) / 2
    widest = seen[strata_of(100, 5)[-1]]
    assert len(set(widest[:COUNT])) > 2  # neighbours do not share theirs


def test_all_strata_of_one_timestep_are_the_whole_bound(images):
    """Of a model that knows the images, and is off by a constant, no noise is left."""
    diffusion = make_diffusion(100, respacing="12", mean="START_X", var="FIXED_SMALL")

    def model(x, t, known):
        return known + 0.05

    batches = list(split(images, [7], known=images))
    (whole,) = estimates(model, diffusion, batches)
    (every,) = estimates(model, diffusion, batches, vlb_timesteps=12)
    assert every.bpd == pytest.approx(whole.bpd, rel=1e-5)
    assert every.standard_error == pytest.approx(whole.standard_error, rel=1e-3)
    assert every.terms == {}


def test_clipping_labels_and_the_seed_reach_the_terms_of_a_subset(images):
    diffusion = make_diffusion(40)
    labels = torch.arange(COUNT).float()

    def bpd(sizes=(3, 4), cond=None, **options):
        batches = split(images, sizes, **(cond or {}))
        return estimates(FormulaModel(), diffusion, batches, vlb_timesteps=6, **options)[-1].bpd

    assert bpd((7,)) == pytest.approx(bpd(), rel=1e-6)
    assert bpd((1, 6)) == pytest.approx(bpd(), rel=1e-6)
    others = [bpd(cond={"y": labels}), bpd(clip_denoised=False), bpd(seed=1)]
    assert len({round(value, 5) for value in (bpd(), *others)}) == 4


def test_bound_from_some_timesteps_is_unbiased_and_its_error_honest():
    """Over many draws of images, noise and timesteps."""
    diffusion = make_diffusion(20, schedule="cosine", rescale_timesteps=True)
    model, count, repeats = FormulaModel(), 12, 150

    def draws(**options):
        found = []
        for seed in range(repeats):
            torch.manual_seed(seed)
            drawn = torch.rand(count, 1, 3, 3).mul(2).sub(1) * torch.rand(count, 1, 1, 1)
            batch = (drawn, {}, list(range(count)))
            found += estimates(model, diffusion, [batch], seed=seed, **options)
        return np.array([[one.bpd, one.standard_error] for one in found]).T

    bpd, error = draws(vlb_timesteps=3)
    whole, _ = draws()
    spread = bpd.std(ddof=1)
    assert spread > 2 * whole.std(ddof=1)  # the timesteps matter, or this would show nothing
    assert bpd.mean() == pytest.approx(whole.mean(), abs=4 * (bpd - whole).std() / repeats**0.5)
    # the mean of 150 squared errors, each from 12 images
    assert math.sqrt((error**2).mean()) == pytest.approx(spread, rel=0.15)


@pytest.mark.parametrize(("steps", "count"), [(30, 1), (30, 31), (1, 2)])
def test_number_of_timesteps_out_of_range(steps, count):
    diffusion, options = make_diffusion(steps, schedule="cosine"), BoundOptions(vlb_timesteps=count)
    with pytest.raises(UserError, match=rf"--vlb_timesteps {count}.*{steps}, the timesteps"):
        BoundLikelihood(None, diffusion, options)
    with pytest.raises(UserError, match="--vlb_timesteps -1"):
        BoundOptions(vlb_timesteps=-1)


def test_a_process_of_one_step_has_one_timestep(images):
    diffusion = make_diffusion(1, schedule="cosine", mean="START_X", var="FIXED_SMALL")
    batch = (images, {"known": images}, list(range(COUNT)))
    one, whole = (
        estimates(lambda x, t, known: known, diffusion, [batch], vlb_timesteps=count)[0]
        for count in (1, 0)
    )
    assert one.bpd == pytest.approx(whole.bpd, rel=1e-6)
