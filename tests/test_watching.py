"""The watchers of a run: what they log, write and warn of; training must not notice them."""

import contextlib
import json
import os
import random

import numpy as np
import pytest
import torch
from golden_data import FormulaModel, make_diffusion
from launchers import TESTS, environment, start
from PIL import Image
from toy import make_model

from improved_diffusion import dist_util, logger
from improved_diffusion.errors import UserError
from improved_diffusion.flags import defaults
from improved_diffusion.image_datasets import ImageList, load_once
from improved_diffusion.previews import Previews, picture, statistics
from improved_diffusion.validation import Validation
from improved_diffusion.watching import (
    MOST_WARNINGS,
    PreviewWatcher,
    ValidationWatcher,
    WatchOptions,
    keep_random_state,
)


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setattr(dist_util, "dev", lambda: torch.device("cpu"))


class Messages(logger.KVWriter, logger.SeqWriter):
    """An output that keeps what it is given."""

    def __init__(self):
        self.lines, self.images = [], []

    def writeseq(self, seq):
        self.lines.append(" ".join(map(str, seq)))

    def writeimage(self, key, image, step):
        self.images.append((key, image, step))


@pytest.fixture
def messages(tmp_path, monkeypatch):
    output = Messages()
    monkeypatch.setattr(logger.Logger, "CURRENT", logger.Logger(str(tmp_path), [output]))
    return output


class Loop:
    """What a watcher needs of a TrainLoop: its average has other weights, inside the block."""

    global_step = 1234

    def __init__(self, model, other):
        self.model = model
        self.raw = {name: value.clone() for name, value in model.state_dict().items()}
        self.averaged = other.state_dict()

    @contextlib.contextmanager
    def averaged_model(self):
        self.model.load_state_dict(self.averaged)
        try:
            yield self.model
        finally:
            self.model.load_state_dict(self.raw)


def formula_loop():
    """The averaged weights differ from the raw ones."""
    averaged = FormulaModel()
    with torch.no_grad():
        averaged.a.fill_(0.7)
    return Loop(FormulaModel(), averaged)


def make_previews(channels=1, num=4, reference=None):
    diffusion = make_diffusion(40, schedule="cosine", respacing="4", rescale_timesteps=True)
    shape = (channels, 8, 8)
    reference = torch.rand(9, *shape) * 2 - 1 if reference is None else reference
    return Previews(diffusion, shape, {}, reference, num=num)


def make_validation(digits_dir):
    images = ImageList(sorted(map(str, digits_dir.iterdir()))[:6])
    return Validation(
        make_diffusion(40, schedule="cosine", rescale_timesteps=True),
        lambda: load_once(images, 6, 4, 8, channels=1, num_workers=0),
        6,
    )


# -- options


def test_nothing_is_watched_unless_asked_for():
    options = WatchOptions()
    assert options.sample_interval == 0
    assert not options.val_data_dir
    assert options.val_fraction == 0
    assert defaults(WatchOptions)["val_interval"] == 1000
    assert defaults(WatchOptions)["val_images"] == 256


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"sample_interval": -1}, "--sample_interval -1"),
        ({"val_interval": 0}, "--val_interval 0"),
        ({"val_images": 0}, "--val_images 0"),
        ({"val_fraction": -0.1}, "--val_fraction -0.1"),
        ({"val_fraction": 1.0}, "--val_fraction 1.0"),
        ({"val_fraction": float("nan")}, "--val_fraction nan"),
        (
            {"val_fraction": 0.1, "val_data_dir": "some/where"},
            "--val_data_dir some/where and --val_fraction 0.1",
        ),
    ],
)
def test_impossible_options_are_named(options, named):
    with pytest.raises(UserError, match=named):
        WatchOptions(**options)


@pytest.mark.parametrize("options", [{"val_fraction": 0.999}, {"val_data_dir": "x"}])
def test_possible_options(options):
    WatchOptions(**options)


# -- validation


def test_raw_and_averaged_weights_are_measured(messages, digits_dir):
    loop, validation = formula_loop(), make_validation(digits_dir)
    raw = validation.measure(loop.model)
    with loop.averaged_model() as model:
        averaged = validation.measure(model)
    assert raw != averaged
    watcher = ValidationWatcher(validation, interval=5)
    watcher(loop)
    assert watcher.interval == 5
    expected = {f"val_{name}": value for name, value in raw.items()}
    expected |= {f"val_ema_{name}": value for name, value in averaged.items()}
    assert logger.getkvs() == expected
    assert {"val_loss", "val_loss_q0", "val_bpd", "val_ema_loss", "val_ema_bpd"} <= set(expected)
    assert loop.model.a.item() == pytest.approx(0.3)


# -- previews


def test_picture_is_written_and_shown(messages, tmp_path):
    loop, previews = formula_loop(), make_previews(num=5)
    watcher = PreviewWatcher(previews, interval=7)
    watcher(loop)
    assert watcher.interval == 7
    raw = previews.draw(loop.model)
    with loop.averaged_model() as model:
        averaged = previews.draw(model)
    assert not torch.equal(raw, averaged)
    expected = picture(raw, averaged)
    assert os.listdir(tmp_path) == ["preview_001234.png"]
    with Image.open(tmp_path / "preview_001234.png") as image:
        np.testing.assert_array_equal(np.array(image), expected[..., 0])
    ((key, shown, step),) = messages.images
    assert (key, step) == ("preview", 1234)
    np.testing.assert_array_equal(shown, expected)
    kvs = logger.getkvs()
    for prefix, samples in (("preview", raw), ("preview_ema", averaged)):
        for name, values in statistics(samples).items():
            assert kvs.pop(f"{prefix}_{name}_c0") == pytest.approx(values.item())
    assert not kvs


class Formula5(torch.nn.Module):
    """For five channels."""

    def forward(self, x, t):
        return torch.cat([0.3 * x, 0 * x], dim=1)


def test_many_channels_have_statistics_alone(messages, tmp_path):
    loop = Loop(Formula5(), Formula5())
    PreviewWatcher(make_previews(channels=5), 1)(loop)
    assert os.listdir(tmp_path) == []
    assert messages.images == []
    assert len(logger.getkvs()) == 2 * 2 * 5
    assert "preview_ema_std_c4" in logger.getkvs()


def test_other_processes_write_nothing(messages, tmp_path, monkeypatch):
    previews = make_previews()
    monkeypatch.setattr(Previews, "draw", lambda self, model: None)
    PreviewWatcher(previews, 1)(formula_loop())
    assert os.listdir(tmp_path) == []
    assert not logger.getkvs()
    assert messages.lines == []


class Drawn:
    """Previews whose pictures are given: first the raw weights', then the averaged ones'."""

    def __init__(self, raw, averaged, channels=1):
        reference = 0.1 * torch.randn(200, channels, 8, 8)
        self.pictures = [torch.randn(9, channels, 8, 8) * 0.1 + shift for shift in (raw, averaged)]
        self.drift = make_previews(channels, reference=reference).drift

    def draw(self, model):
        return self.pictures.pop(0)


@pytest.mark.parametrize(
    ("raw", "averaged", "expected"),
    [
        (0, 0, []),
        (0.5, 0.5, ["previews of the averaged weights are too bright"]),
        (-0.5, 0, ["previews of the raw weights are too dark"]),
        (
            0,
            0.5,
            [
                "previews of the averaged weights are too bright",
                "those of the raw weights are like the data.* --ema_rate",
            ],
        ),
    ],
)
def test_drift_is_told_of_the_weights_that_matter(messages, raw, averaged, expected):
    PreviewWatcher(Drawn(raw, averaged), 1)(formula_loop())
    assert len(messages.lines) == len(expected)
    for line, pattern in zip(messages.lines, expected, strict=True):
        assert line.startswith(pattern.split(".*")[0])
        assert line.endswith("--ema_rate") == pattern.endswith("--ema_rate")


def test_many_channels_do_not_flood_the_log(messages):
    PreviewWatcher(Drawn(0.5, 0.5, channels=7), 1)(formula_loop())
    assert len(messages.lines) == MOST_WARNINGS + 1
    assert messages.lines[-1] == f"and {7 - MOST_WARNINGS} more like these"


def test_pictures_of_a_diverged_model_are_written_and_told(messages, tmp_path):
    loop = formula_loop()
    loop.averaged["a"] = torch.tensor(float("nan"))
    PreviewWatcher(make_previews(), 1)(loop)
    assert any("are not finite" in line for line in messages.lines)
    assert os.listdir(tmp_path) == ["preview_001234.png"]


# -- training does not notice


def random_states():
    return [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()]


def test_random_state_is_kept(messages, digits_dir):
    loop = Loop(make_model(dropout=0.5).train(), make_model(seed=1, dropout=0.5))
    validation, previews = make_validation(digits_dir), make_previews()
    before = random_states()
    ValidationWatcher(validation, 1)(loop)
    assert random_states() == before
    PreviewWatcher(previews, 1)(loop)
    assert random_states() == before
    assert all(module.training for module in loop.model.modules())
    validation.measure(loop.model)  # of itself a pass over the images draws a seed
    assert random_states() != before


def test_random_state_is_kept_after_an_error():
    before = random_states()

    def fail():
        with keep_random_state():
            torch.rand(3)
            np.random.rand(3)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert random_states() == before


# -- real processes


@pytest.mark.slow
def test_processes_see_what_one_sees(tmp_path, digits_dir):
    reports, pictures = {}, {}
    for processes in (1, 2, 3):
        out = tmp_path / str(processes)
        out.mkdir()
        result = start(
            "single" if processes == 1 else "torchrun",
            TESTS / "workers" / "watch_worker.py",
            out,
            digits_dir,
            processes=processes,
            env=environment(CUDA_VISIBLE_DEVICES=""),
        )
        assert result.returncode == 0, result.stderr
        reports[processes] = [
            json.loads((out / f"report{rank}.json").read_text()) for rank in range(processes)
        ]
        with Image.open(out / "run" / "preview_000012.png") as image:
            pictures[processes] = np.array(image).astype(int)
    (alone,) = reports[1]
    assert {"val_bpd", "val_ema_loss_q3", "preview_ema_std_c0"} <= set(alone["kvs"])
    for processes in (2, 3):
        for rank, report in enumerate(reports[processes]):
            assert report["world_size"] == processes
            assert report["random_state_kept"]
            names = {name for name in alone["kvs"] if rank == 0 or name.startswith("val_")}
            expected = {name: alone["kvs"][name] for name in names}
            assert report["kvs"] == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert (
            np.abs(pictures[processes] - pictures[1]).max() <= 1
        )  # a level, where it is truncated
