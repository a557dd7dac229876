"""Previews: the same pictures each time, and warnings where their colours leave the data's."""

import numpy as np
import pytest
import torch
from golden_data import FormulaModel, make_diffusion
from toy import make_model

from improved_diffusion import dist_util
from improved_diffusion.image_datasets import ImageList, load_once
from improved_diffusion.previews import LEAST_DRIFT, PREVIEW_GAP, Previews, picture, statistics
from improved_diffusion.rng import sample_generators
from improved_diffusion.sample_util import GRID_GAP, GRID_GREY, grid, to_uint8

SHAPE = (1, 8, 8)
LABELS = torch.arange(7).float()


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setattr(dist_util, "dev", lambda: torch.device("cpu"))


@pytest.fixture
def diffusion():
    return make_diffusion(40, schedule="cosine", respacing="6", rescale_timesteps=True)


def make_previews(diffusion, **arguments):
    reference = torch.rand(5, *SHAPE) * 2 - 1
    cond = {"y": LABELS}
    return Previews(
        diffusion, **{"image_shape": SHAPE, "cond": cond, "reference": reference, **arguments}
    )


class Labelled(torch.nn.Module):
    """A network of the toy problem that takes labels and lets them matter a little."""

    def __init__(self, **arguments):
        super().__init__()
        self.network = make_model(**arguments)

    def forward(self, x, t, y):
        return self.network(x + 0.05 * y.view(-1, 1, 1, 1), t)


# -- drawing


@pytest.mark.parametrize("network", [FormulaModel, Labelled])
def test_pictures_are_ddim_samples_of_fixed_noise(diffusion, network):
    model = network().eval()
    expected = diffusion.ddim_sample_loop(
        model,
        (7, *SHAPE),
        clip_denoised=True,
        model_kwargs={"y": LABELS},
        device="cpu",
        generator=sample_generators(0, range(7), "preview"),
    )
    torch.manual_seed(31)
    for size in (1, 3, 7, 16):
        samples = make_previews(diffusion, batch_size=size).draw(model)
        assert samples.dtype == torch.float32
        torch.testing.assert_close(samples, expected, atol=1e-5, rtol=1e-5)
    assert torch.pdist(expected.flatten(1)).min() > 0.1


def test_pictures_without_conditions(diffusion):
    samples = make_previews(diffusion, cond={}, num=4).draw(FormulaModel())
    assert samples.shape == (4, *SHAPE)
    labelled = make_previews(diffusion).draw(FormulaModel())
    torch.testing.assert_close(samples[0], labelled[0])  # its label is 0
    assert (samples[3] - labelled[3]).abs().max() > 1e-2


def test_number_of_pictures_does_not_change_them(diffusion):
    few = make_previews(diffusion, cond={}, num=3).draw(FormulaModel())
    many = make_previews(diffusion, cond={}, num=20).draw(FormulaModel())
    torch.testing.assert_close(few, many[:3], atol=1e-5, rtol=1e-5)


def test_dropout_is_off_and_modes_come_back(diffusion):
    model = Labelled(dropout=0.5)
    expected = make_previews(diffusion).draw(Labelled(dropout=0.0))
    model.train()
    model.network.out.eval()
    modes = [module.training for module in model.modules()]
    torch.testing.assert_close(make_previews(diffusion).draw(model), expected)
    assert [module.training for module in model.modules()] == modes


def test_drawing_is_silent_and_leaves_nothing_behind(diffusion, capsys):
    model, previews = FormulaModel(), make_previews(diffusion)
    before = torch.get_rng_state()
    samples = previews.draw(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert not samples.requires_grad
    assert model.a.grad is None
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("world_size", [2, 3, 10])
def test_processes_share_the_pictures(diffusion, monkeypatch, world_size):
    """Each is run alone; the first gathers what the others gave."""
    model, given = FormulaModel(), []
    expected = make_previews(diffusion).draw(model)

    def gather(rows, gathered=None):
        given[-1].append(rows)
        for rank, part in enumerate(gathered or []):
            part.copy_(given[world_size - 1 - rank][len(given[-1]) - 1])

    monkeypatch.setattr(dist_util, "get_world_size", lambda: world_size)
    monkeypatch.setattr(torch.distributed, "gather", gather)
    for rank in reversed(range(world_size)):
        given.append([])
        monkeypatch.setattr(dist_util, "get_rank", lambda rank=rank: rank)
        samples = make_previews(diffusion, batch_size=2).draw(model)
        assert (samples is None) == (rank > 0)
    torch.testing.assert_close(samples, expected, atol=1e-5, rtol=1e-5)
    drawn = sum(len(rows) for process in given for rows in process)
    assert drawn - len(LABELS) < world_size  # shared, not repeated


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"cond": {}}, r"one number of pictures, at least 1, not \[\]"),
        ({"cond": {}, "num": 0}, r"not \[0\]"),
        ({"num": 8}, r"not \[7, 8\]"),
        ({"cond": {"y": LABELS, "low_res": torch.zeros(6, *SHAPE)}}, r"not \[6, 7\]"),
        ({"reference": torch.zeros(5, 3, 8, 8)}, r"\[5, 3, 8, 8\]: must be \[M, 1, H, W\]"),
        ({"reference": torch.zeros(0, *SHAPE)}, r"\[0, 1, 8, 8\]: must be"),
        ({"reference": torch.zeros(SHAPE)}, r"\[1, 8, 8\]: must be"),
    ],
)
def test_contradictions_are_named(diffusion, arguments, problem):
    with pytest.raises(ValueError, match=problem):
        make_previews(diffusion, **arguments)


# -- statistics


def test_statistics_of_known_images():
    images = torch.zeros(2, 2, 1, 2)
    images[:, 0] = torch.tensor([[[0.0, 1.0]], [[0.0, -1.0]]])  # mean 0, mean square 1/2
    images[:, 1] = 0.25
    found = statistics(images)
    assert found["mean"].tolist() == pytest.approx([0, 0.25])
    assert found["std"].tolist() == pytest.approx([0.5**0.5, 0])


def test_statistics_of_levels_are_those_of_the_images():
    images = torch.rand(3, 2, 4, 5) * 2 - 1
    exact, levels = statistics(images), statistics(to_uint8(images))
    assert levels["mean"].shape == (2,)
    for name in exact:
        torch.testing.assert_close(levels[name], exact[name], atol=1.5 / 127.5, rtol=0)


# -- drift


def colourful(count, offset=0.0, scale=1.0):
    """Images of three channels, each of a brightness of its own: about 0.3 N(0, 1) each."""
    brightness = 0.3 * torch.randn(count, 3, 1, 1)
    texture = 0.3 * torch.randn(count, 3, 8, 8)
    return scale * (brightness + texture) + offset


def colour_previews(diffusion, count=500):
    return Previews(diffusion, (3, 8, 8), {}, colourful(count), num=8)


@pytest.mark.parametrize("count", [1, 2, 8, 64])
def test_data_itself_does_not_drift(diffusion, count):
    """Six statistics in each of 100 draws, each within four standard errors."""
    previews = colour_previews(diffusion)
    alarms = sum(bool(previews.drift(colourful(count))) for _ in range(100))
    assert alarms <= 3


def test_real_images_do_not_drift(diffusion, digits_dir):
    images = ImageList(sorted(map(str, digits_dir.iterdir())))
    (batch,) = (batch for batch, _, _ in load_once(images, 60, 60, 8, channels=1, num_workers=0))
    order = torch.randperm(60)
    previews = Previews(diffusion, SHAPE, {}, batch[order[:40]], num=20)
    assert previews.drift(batch[order[40:]]) == []
    (line,) = previews.drift(batch[order[40:]] + 0.4)
    assert "too bright in channel 0" in line


@pytest.mark.parametrize(
    ("offset", "scale", "how"),
    [
        (0.5, 1.0, "are too bright"),
        (-0.5, 1.0, "are too dark"),
        (0.0, 2.0, "have too much contrast"),
        (0.0, 0.4, "have too little contrast"),
    ],
)
def test_drift_names_channel_direction_and_numbers(diffusion, offset, scale, how):
    previews = colour_previews(diffusion)
    samples = colourful(200)
    samples[:, 1] = samples[:, 1] * scale + offset
    (line,) = previews.drift(samples)
    name = "mean" if offset else "std"
    found, data = statistics(samples)[name][1].item(), previews.data[name][1].item()
    assert line.startswith(f"previews of the averaged weights {how} in channel 1: ")
    assert line.endswith(f" {found:.2f}, data {data:.2f}")
    (line,) = previews.drift(samples, "the raw weights")
    assert line.startswith(f"previews of the raw weights {how}")


def test_what_may_be_chance_depends_on_the_number_of_pictures(diffusion):
    """A shift of 0.25 is less than one standard deviation of an image's brightness."""
    previews = colour_previews(diffusion)
    data = previews.data["mean"].view(3, 1, 1)

    def exactly_shifted(count):
        samples = colourful(count)
        return samples - samples.mean(dim=(0, 2, 3), keepdim=True) + data + 0.25

    assert not any("bright" in line for line in previews.drift(exactly_shifted(4)))
    assert sum("bright" in line for line in previews.drift(exactly_shifted(100))) == 3


def test_few_images_of_the_data_tell_less(diffusion):
    """Of four images the mean is known as badly as that of four pictures."""
    few, many = colourful(4), colourful(500)
    samples = colourful(500)
    for reference, found in ((few, False), (many, True)):
        previews = Previews(diffusion, (3, 8, 8), {}, reference, num=8)
        level = previews.data["mean"].view(3, 1, 1) + 0.2
        shifted = samples - samples.mean(dim=(0, 2, 3), keepdim=True) + level
        assert any("bright" in line for line in previews.drift(shifted)) == found


def test_one_image_or_a_constant_channel_allow_little(diffusion):
    image = torch.full((1, *SHAPE), 0.5)
    for reference in (image, image.expand(9, *SHAPE)):
        previews = Previews(diffusion, SHAPE, {}, reference, num=8)
        assert previews.drift(image + 0.9 * LEAST_DRIFT) == []
        assert len(previews.drift(image + 1.1 * LEAST_DRIFT)) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pictures_of_a_diverged_model_drift(diffusion, value):
    samples = colourful(200)
    samples[3, 2, 1, 1] = value
    lines = colour_previews(diffusion).drift(samples)
    assert len(lines) == 2  # mean and deviation
    assert all("are not finite in channel 2" in line for line in lines)


# -- the picture


@pytest.mark.parametrize("channels", [1, 3])
def test_raw_is_left_and_averaged_right(channels):
    raw, averaged = (torch.rand(5, channels, 8, 8) * 2 - 1 for _ in range(2))
    pixels = picture(raw, averaged)
    left, right = (grid(to_uint8(samples).numpy()) for samples in (raw, averaged))
    width = left.shape[1]
    assert pixels.dtype == np.uint8
    assert pixels.shape == (left.shape[0], 2 * width + PREVIEW_GAP, channels)
    np.testing.assert_array_equal(pixels[:, :width], left)
    np.testing.assert_array_equal(pixels[:, -width:], right)
    assert (pixels[:, width:-width] == GRID_GREY).all()
    assert PREVIEW_GAP > 2 * GRID_GAP
