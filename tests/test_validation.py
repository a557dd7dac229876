"""Fixed images, noise and timesteps: closed forms, and the same numbers in whatever run."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from golden_data import FormulaModel, make_diffusion
from toy import make_model

from improved_diffusion import dist_util
from improved_diffusion.errors import UserError
from improved_diffusion.image_datasets import ImageList, load_once
from improved_diffusion.likelihood import estimate_bound
from improved_diffusion.rng import sample_generators
from improved_diffusion.validation import (
    BOUND_STRATA,
    Validation,
    bound_strata,
    evaluating,
    hold_out,
    spread_out,
)

COUNT = 11
SPLITS = {"one by one": [1] * 11, "uneven": [3, 1, 7], "whole": [11], "gaps": [4, 0, 7, 0]}


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setattr(dist_util, "dev", lambda: torch.device("cpu"))


class Network(torch.nn.Module):
    """A function as a network."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, t, **kwargs):
        return self.function(x, t, **kwargs)


def make_images(count=COUNT):
    """[count, 1, 8, 8] in [-0.5, 0.5], where nothing is clamped."""
    return torch.rand(count, 1, 8, 8) - 0.5


def split(images, sizes, **cond):
    """(images, cond, indices) in batches of the given sizes."""
    start = 0
    for size in sizes:
        part = slice(start, start + size)
        kwargs = {key: value[part] for key, value in cond.items()}
        yield images[part], kwargs, list(range(len(images)))[part]
        start += size


def measure(model, diffusion, images, sizes=None, **cond):
    sizes = sizes or [len(images)]
    validation = Validation(diffusion, lambda: split(images, sizes, **cond), len(images))
    return validation.measure(model)


def knowing(offset):
    """Predicts the image, which it is told, plus a function of the share t / T."""
    return Network(lambda x, t, known: known + offset(t).view(-1, 1, 1, 1))


# -- the loss


@pytest.mark.parametrize("count", [4, 10, 40, 97])
def test_loss_of_a_known_error_is_its_mean_over_evenly_spaced_timesteps(count):
    """The error at t is t / 40, so the loss is the mean of its square over the midpoints."""
    diffusion = make_diffusion(40, mean="START_X", var="FIXED_SMALL")
    images = make_images(count)
    result = measure(knowing(lambda t: t / 40), diffusion, images, known=images)
    t = np.floor((np.arange(count) + 0.5) * 40 / count)
    assert result["loss"] == pytest.approx(np.square(t / 40).mean(), rel=1e-5)
    for quarter in range(4):
        part = t[(t >= 10 * quarter) & (t < 10 * quarter + 10)]
        assert result[f"loss_q{quarter}"] == pytest.approx(np.square(part / 40).mean(), rel=1e-5)


def test_noise_is_that_of_the_image_index():
    """A network that predicts no noise at all has its mean square as the loss."""
    diffusion = make_diffusion(40, var="FIXED_SMALL")
    result = measure(Network(lambda x, t: 0 * x), diffusion, make_images())
    noise = [
        torch.randn(1, 8, 8, generator=g) for g in sample_generators(0, range(COUNT), "validation")
    ]
    assert result["loss"] == pytest.approx(torch.stack(noise).square().mean().item(), rel=1e-5)


def test_quarters_without_images_are_left_out():
    diffusion = make_diffusion(40)
    assert set(measure(FormulaModel(), diffusion, make_images(1))) == {"loss", "loss_q2", "bpd"}
    two = measure(FormulaModel(), diffusion, make_images(2))
    assert set(two) == {"loss", "loss_q1", "loss_q3", "bpd"}
    assert two["loss"] == pytest.approx((two["loss_q1"] + two["loss_q3"]) / 2)


def test_neighbours_see_all_quarters():
    """Any few images in a row, such as those of one class, are spread over the timesteps."""
    seen = []

    def keep(x, t):
        seen.append(t)
        return 0 * x

    diffusion = make_diffusion(1000, var="FIXED_SMALL")
    measure(Network(keep), diffusion, torch.zeros(100, 1, 2, 2))
    quarters = 4 * seen[0] // 1000
    for start in range(93):
        assert set(quarters[start : start + 8].tolist()) == {0, 1, 2, 3}


# -- the bound


def bound_of_offset(diffusion, images, offset):
    """:func:`estimate_bound` of a prediction that is off by a constant: no noise is in it."""
    model = knowing(lambda t: torch.full(t.shape, offset))
    batches = [(images, {"known": images}, list(range(len(images))))]
    with torch.no_grad():
        (whole,) = estimate_bound(model, diffusion, batches)
    return measure(model, diffusion, images, known=images)["bpd"], whole.bpd


@pytest.mark.parametrize("steps", [1, 2, 5, BOUND_STRATA + 1])
@pytest.mark.parametrize("count", [1, 3, COUNT])
def test_bound_of_few_timesteps_is_the_whole(steps, count):
    diffusion = make_diffusion(100, respacing=str(steps), mean="START_X", var="FIXED_SMALL")
    estimate, whole = bound_of_offset(diffusion, make_images(count), 0.1)
    assert estimate == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("steps", [10, 40, 1000])
def test_bound_of_many_timesteps_is_close_to_the_whole(steps):
    """The terms fall by orders of magnitude from t = 1 to T - 1."""
    diffusion = make_diffusion(steps, schedule="cosine", mean="START_X", var="FIXED_SMALL")
    estimate, whole = bound_of_offset(diffusion, make_images(64), 0.05)
    assert estimate == pytest.approx(whole, rel=0.01)


def test_term_of_a_stratum_is_weighed_by_its_width():
    """By hand: the prior, the decoder, and KL = (coef1 0.1)^2 / (2 variance ln 2) at each t."""
    diffusion = make_diffusion(40, mean="START_X", var="FIXED_SMALL")
    images = make_images(1)
    estimate, _ = bound_of_offset(diffusion, images, 0.1)
    (first, *rest) = bound_strata(40)
    assert first == (0, 1)
    assert len(rest) < 39
    t = [(low + high) // 2 for low, high in rest]  # one image takes the middle of each
    width = np.array([high - low for low, high in rest])
    kl = (0.1 * diffusion.posterior_mean_coef1[t]) ** 2 / (2 * diffusion.posterior_variance[t])
    with torch.no_grad():
        bounds = diffusion.calc_bpd_loop(Network(lambda x, t: images + 0.1), images)
    ends = bounds["vb"][0, -1].item() + bounds["prior_bpd"].item()
    assert estimate == pytest.approx(ends + (width * kl).sum() / math.log(2), rel=1e-4)


@pytest.mark.parametrize("count", [37, 300])
def test_images_take_the_timesteps_of_a_stratum_in_turn(count):
    seen = []

    def keep(x, t):
        seen.append(t.tolist())
        return 0 * x

    measure(Network(keep), make_diffusion(100, var="FIXED_SMALL"), torch.zeros(count, 1, 2, 2))
    assert len(seen) == 1 + len(bound_strata(100))
    for (first, stop), timesteps in zip(bound_strata(100), seen[1:], strict=True):
        counts = Counter(timesteps)
        assert set(counts) <= set(range(first, stop))
        times = [counts[t] for t in range(first, stop)]
        assert max(times) - min(times) <= 1
    images = list(zip(*seen[1:], strict=True))
    first, stop = bound_strata(100)[-1]
    early = [image[-1] < (first + stop) / 2 for image in images]
    before = [image[-3] < sum(bound_strata(100)[-3]) / 2 for image in images]
    assert 0.2 < np.mean(np.equal(early, before)) < 0.8  # not early in all strata


@pytest.mark.parametrize("steps", [*range(1, 40), 100, 1000, 4000])
def test_strata_are_a_partition(steps):
    strata = bound_strata(steps)
    covered = [t for first, stop in strata for t in range(first, stop)]
    assert covered == list(range(steps))
    assert strata[0] == (0, 1)
    assert len(strata) <= BOUND_STRATA + 1
    assert len(strata) == steps or steps > BOUND_STRATA + 1
    widths = [stop - first for first, stop in strata]
    assert steps <= 40 or widths[1:] == sorted(widths[1:])


@pytest.mark.parametrize("network", [FormulaModel, make_model])
def test_bound_of_a_network_is_close_to_the_whole(network):
    model = network().eval()
    images = make_images(48)
    diffusion = make_diffusion(60, schedule="cosine", rescale_timesteps=True)
    with torch.no_grad():
        (whole,) = estimate_bound(model, diffusion, split(images, [48]))
    assert measure(model, diffusion, images)["bpd"] == pytest.approx(whole.bpd, rel=0.05)


# -- the same in every run


@pytest.fixture
def diffusion():
    return make_diffusion(40, schedule="cosine", respacing="20", rescale_timesteps=True)


@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("network", [FormulaModel, make_model])
def test_numbers_do_not_depend_on_batches_or_seed(diffusion, sizes, network):
    model, images = network(), make_images()
    expected = measure(model, diffusion, images)
    assert set(expected) == {"loss", "loss_q0", "loss_q1", "loss_q2", "loss_q3", "bpd"}
    torch.manual_seed(77)
    assert measure(model, diffusion, images, sizes) == pytest.approx(expected, rel=1e-6)


def test_another_pass_gives_the_same(diffusion):
    images = make_images()
    validation = Validation(diffusion, lambda: split(images, [4, 7]), COUNT)
    assert validation.measure(FormulaModel()) == validation.measure(FormulaModel())


def test_images_change_the_numbers(diffusion):
    first, second = make_images(), make_images()
    assert measure(FormulaModel(), diffusion, first) != measure(FormulaModel(), diffusion, second)


def test_labels_reach_the_model(diffusion):
    images, labels = make_images(), torch.arange(COUNT).float()
    plain = measure(FormulaModel(), diffusion, images)
    labelled = measure(FormulaModel(), diffusion, images, [4, 7], y=labels)
    assert labelled["loss"] != pytest.approx(plain["loss"], rel=1e-3)
    assert labelled["bpd"] != pytest.approx(plain["bpd"], rel=1e-3)
    whole = measure(FormulaModel(), diffusion, images, y=labels)
    assert labelled == pytest.approx(whole, rel=1e-6)


def test_dropout_is_off_and_modes_come_back(diffusion):
    images = make_images()
    model = make_model(dropout=0.5)
    expected = measure(make_model(dropout=0.0), diffusion, images)
    model.train()
    model.out.eval()  # someone froze a part
    modes = [module.training for module in model.modules()]
    assert measure(model, diffusion, images) == pytest.approx(expected, rel=1e-6)
    assert [module.training for module in model.modules()] == modes
    assert True in modes
    assert False in modes


def test_modes_come_back_after_an_error():
    model = make_model(dropout=0.5).train()

    def fail():
        with evaluating(model):
            assert not model.training
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert all(module.training for module in model.modules())


def test_nothing_is_left_for_training(diffusion):
    model = make_model()
    result = measure(model, diffusion, make_images())
    assert all(type(value) is float for value in result.values())
    assert all(param.grad is None for param in model.parameters())


def test_processes_together_see_what_one_sees(diffusion, monkeypatch):
    """Three of them, of which the last has no image; the first adds up all sums."""
    images, shares, sums = make_images(), [[0, 2, 5, 6, 10], [1, 3, 4, 7, 8, 9], []], []
    expected = measure(FormulaModel(), diffusion, images)

    def run(share, all_reduce):
        monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
        batches = [(images[share], {}, share)]
        return Validation(diffusion, lambda: batches, COUNT).measure(FormulaModel())

    monkeypatch.setattr(dist_util, "get_world_size", lambda: 3)
    for share in shares[1:]:
        run(share, lambda local: (sums.append(local.clone()), local.add_(1)))
    together = run(shares[0], lambda local: local.add_(sum(sums)))
    assert together == pytest.approx(expected, rel=1e-6)
    assert sums[-1].abs().max() == 0


def test_validation_needs_images(diffusion):
    with pytest.raises(ValueError, match="at least 1 image, not 0"):
        Validation(diffusion, list, 0)


# -- which images


def make_list(sizes):
    """Sorted images of classes of the given sizes."""
    classes = [label for label, size in enumerate(sizes) for _ in range(size)]
    paths = [f"{label}_{i:04d}.png" for i, label in enumerate(classes)]
    return ImageList(paths, classes, tuple(map(str, range(len(sizes)))))


@pytest.mark.parametrize(("sizes", "fraction"), [([30, 60, 90], 0.1), ([50] * 4, 0.5), ([9], 0.9)])
def test_every_class_gives_its_share(sizes, fraction):
    images = make_list(sizes)
    training, validation = hold_out(images, fraction)
    assert sorted(training.paths + validation.paths) == images.paths
    assert training.paths == sorted(training.paths)
    assert len(validation.paths) == round(fraction * sum(sizes))
    for label, size in enumerate(sizes):
        assert abs(validation.classes.count(label) - fraction * size) <= 1
    for part in (training, validation):
        assert part.class_names == images.class_names
        assert part.classes == [int(path.split("_")[0]) for path in part.paths]


def test_holding_out_does_not_depend_on_a_seed():
    images = make_list([20, 20])
    first = hold_out(images, 0.25)
    torch.manual_seed(9)
    np.random.seed(9)
    assert hold_out(images, 0.25) == first


def test_images_without_classes_are_held_out():
    training, validation = hold_out(ImageList([str(i) for i in range(10)]), 0.3)
    assert (len(training.paths), len(validation.paths)) == (7, 3)
    assert training.classes is None
    assert validation.classes is None


@pytest.mark.parametrize(
    ("fraction", "side"), [(0.01, "validation"), (0.0, "validation"), (0.99, "training")]
)
def test_holding_out_leaves_images_on_both_sides(fraction, side):
    with pytest.raises(UserError, match=f"--val_fraction {fraction} of 10 .*none for {side}"):
        hold_out(make_list([10]), fraction)


def test_few_of_many_images_are_of_all_classes():
    few = spread_out(make_list([40, 40, 40]), 9)
    assert few.classes == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert few.class_names == ("0", "1", "2")
    assert spread_out(few, 9) == few
    assert spread_out(few, 1000) == few


def test_images_of_a_folder_are_measured(digits_dir, diffusion):
    images = spread_out(ImageList(sorted(map(str, digits_dir.iterdir()))), 6)

    def batches(size):
        return lambda: load_once(images, 6, size, 8, channels=1, num_workers=0)

    results = [Validation(diffusion, batches(n), 6).measure(FormulaModel()) for n in (1, 4, 100)]
    for result in results[1:]:
        assert result == pytest.approx(results[0], rel=1e-6)
