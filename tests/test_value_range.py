"""Data with a value range, through the scripts: the flag travels, and samples have the range."""

import json
import shutil

import numpy as np
import pytest
import tifffile
from launchers import start
from PIL import Image
from script_runner import TINY, TINY_SUPER_RES, error_of, names, samples, script_path, succeed

from improved_diffusion.pixels import read_image

HOUNSFIELD = "-1024,3071"
BANDS = 6  # more than a picture has


@pytest.fixture(scope="module")
def scans(tmp_path_factory, digits_dir):
    """Digits as int16 [H, W, 6] in Hounsfield units, LABEL_INDEX.npy and some .tif."""
    folder = tmp_path_factory.mktemp("scans")
    for i, path in enumerate(sorted(digits_dir.glob("*.png"))[:24]):
        grey = np.array(Image.open(path).convert("L")).astype(float) / 255  # [8, 8]
        bands = np.stack([grey * 4095 / (1 + band) - 1024 for band in range(BANDS)], axis=-1)
        values = np.clip(bands, -1024, 3071).astype(np.int16)
        if i % 2:
            np.save(folder / f"{path.stem}.npy", values)
        else:
            tifffile.imwrite(folder / f"{path.stem}.tif", np.moveaxis(values, -1, 0))
    return folder


@pytest.fixture(scope="module")
def deep(tmp_path_factory, digits_dir):
    """Digits as 16-bit grey PNG."""
    folder = tmp_path_factory.mktemp("deep")
    for path in sorted(digits_dir.glob("*.png"))[:24]:
        grey = np.array(Image.open(path).convert("L")).astype(np.uint16)
        Image.fromarray(grey * 257).save(folder / path.name)
    return folder


def train_flags(data_dir, **changes):
    own = {"data_dir": data_dir, "log_dir": "run", "batch_size": 4, "ema_rate": 0.5}
    return {**TINY, **own, "lr_anneal_steps": 2, "log_interval": 1, **changes}


@pytest.fixture(scope="module")
def trained_on_scans(tmp_path_factory, scans, run_script):
    """The working directory of a short run on the scans, with previews and validation."""
    folder = tmp_path_factory.mktemp("trained_on_scans")
    flags = train_flags(scans, channels=BANDS, value_range=HOUNSFIELD, sample_interval=1)
    flags |= {"val_fraction": 0.25, "val_interval": 1}
    done = succeed(run_script("image_train", flags, cwd=folder))
    assert "val_bpd is in bits/dim of 256 levels of the range -1024,3071" in done.stdout
    return folder


@pytest.fixture(scope="module")
def trained_on_deep(tmp_path_factory, deep, run_script):
    folder = tmp_path_factory.mktemp("trained_on_deep")
    flags = train_flags(deep, value_range="0,65535", sample_interval=1, class_cond=True)
    succeed(run_script("image_train", flags, cwd=folder))
    return folder


SAMPLE = {"num_samples": 3, "log_dir": "out", "timestep_respacing": "5", "save_png": True}
MODEL = "run/ema_0.5_000002.pt"


# -- there and back


def test_range_is_stored_with_the_run(trained_on_scans):
    flags = json.loads((trained_on_scans / "run" / "config.json").read_text())
    assert (flags["value_range"], flags["channels"]) == (HOUNSFIELD, BANDS)


def test_samples_of_floats_have_the_range_of_the_data(trained_on_scans, run_script):
    succeed(run_script("image_sample", SAMPLE, model_path=MODEL, cwd=trained_on_scans))
    out = trained_on_scans / "out"
    images, labels = samples(out)
    assert labels is None
    assert images.dtype == np.float32
    assert images.shape == (3, 8, 8, BANDS)
    assert -1024 <= images.min() < -100  # noise of an untrained model fills the range
    assert 1000 < images.max() <= 3071
    assert "grid.png" not in names(out)  # no picture of six channels
    assert names(out / "npy") == ["000000.npy", "000001.npy", "000002.npy"]
    read = read_image(str(out / "npy" / "000001.npy"), 8, BANDS, value_range=(-1024, 3071))
    np.testing.assert_array_equal(read, images[1])


def test_samples_of_16_bits_are_16_bit_files(trained_on_deep, run_script):
    own = {**SAMPLE, "classes": "1,2"}
    succeed(run_script("image_sample", own, model_path=MODEL, cwd=trained_on_deep))
    out = trained_on_deep / "out"
    images, labels = samples(out)
    assert images.dtype == np.uint16
    assert images.max() > 255  # of the whole range, not of 8 bits
    assert labels.tolist() == [1, 2, 1]
    assert names(out / "png") == ["000000_1.png", "000001_2.png", "000002_1.png"]
    for name, image in zip(names(out / "png"), images, strict=True):
        with Image.open(out / "png" / name) as picture:
            assert picture.mode == "I;16"
            np.testing.assert_array_equal(np.array(picture), image[..., 0])
    with Image.open(out / "grid.png") as picture:
        assert picture.mode == "L"


def test_previews_are_pictures_of_8_bits(trained_on_deep, trained_on_scans):
    with Image.open(trained_on_deep / "run" / "preview_000001.png") as picture:
        assert picture.mode == "L"
    assert not list((trained_on_scans / "run").glob("preview_*.png"))  # six channels


def test_bound_says_what_its_bits_are_of(trained_on_scans, scans, run_script):
    flags = {"model_path": MODEL, "data_dir": scans, "log_dir": "nll", "num_samples": 2}
    done = succeed(run_script("image_nll", flags, timestep_respacing="4", cwd=trained_on_scans))
    assert "the bound is in bits/dim of 256 levels of the range -1024,3071" in done.stdout
    assert "done 2 of 24 images" in done.stdout


def test_super_resolution_takes_samples_of_the_range(tmp_path, deep, run_script):
    flags = {**train_flags(deep, value_range="0,65535"), **TINY_SUPER_RES}
    flags.pop("image_size")
    succeed(run_script("super_res_train", flags, cwd=tmp_path))
    base = np.random.default_rng(0).integers(0, 65536, (2, 4, 4, 1), dtype=np.uint16)
    np.savez(tmp_path / "base.npz", base)
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(base):
        Image.fromarray(image[..., 0]).save(tmp_path / "folder" / f"{i}.png")
    made = {}
    for source in ("base.npz", "folder"):
        own = {**SAMPLE, "base_samples": source, "log_dir": source[:4], "num_samples": 2}
        succeed(run_script("super_res_sample", own, model_path=MODEL, cwd=tmp_path))
        made[source], _ = samples(tmp_path / source[:4])
    assert made["base.npz"].dtype == np.uint16
    np.testing.assert_array_equal(made["base.npz"], made["folder"])
    line = error_of(
        run_script(
            "super_res_sample",
            {**own, "value_range": "0,255", "log_dir": "no"},
            model_path=MODEL,
            cwd=tmp_path,
        )
    )
    assert "--value_range 0,255 contradicts" in line
    np.savez(tmp_path / "beyond.npz", base.astype(np.float32) * 4)
    own = {**own, "base_samples": "beyond.npz", "log_dir": "no"}
    line = error_of(run_script("super_res_sample", own, model_path=MODEL, cwd=tmp_path))
    assert "'beyond.npz' holds values from" in line
    assert "--value_range 0,65535" in line
    assert not (tmp_path / "no").exists()


# -- contradictions


@pytest.mark.parametrize(("given", "clashes"), [("-1024.0,3071", False), ("-1000,3071", True)])
def test_range_of_a_continued_run_must_be_the_same(
    trained_on_scans, scans, run_script, given, clashes
):
    flags = train_flags(scans, channels=BANDS, value_range=given, lr_anneal_steps=2)
    done = run_script("image_train", flags, val_fraction=0.25, cwd=trained_on_scans)
    if clashes:
        line = error_of(done)
        assert "--value_range -1000,3071 contradicts the checkpoint" in line
        assert "trained with --value_range -1024,3071" in line
    else:
        succeed(done)


@pytest.mark.parametrize("older", [False, True])
def test_range_is_refused_for_a_model_of_pictures(trained, run_script, tmp_path, older):
    config = json.loads((trained.folder / "config.json").read_text())
    if older:  # a run from before there were value ranges
        del config["value_range"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(trained.path, tmp_path / "model.pt")
    flags = {**SAMPLE, "model_path": "model.pt", "value_range": "0,65535"}
    line = error_of(run_script("image_sample", flags, cwd=tmp_path))
    assert "--value_range 0,65535 contradicts the checkpoint" in line


# -- a user's mistakes


def test_arrays_without_a_range_are_told_of_the_flag(scans, run_script, tmp_path):
    line = error_of(run_script("image_train", train_flags(scans), cwd=tmp_path))
    assert f"--data_dir '{scans}'" in line
    assert "--value_range LOW,HIGH" in line


def test_range_that_is_none(scans, run_script, tmp_path):
    for value_range in ("5", "3,1", "low,high"):
        flags = train_flags(scans, value_range=value_range)
        line = error_of(run_script("image_train", flags, cwd=tmp_path))
        assert f"--value_range {value_range}: must be two numbers LOW,HIGH" in line


def test_data_beyond_the_range(scans, run_script, tmp_path):
    flags = train_flags(scans, channels=BANDS, value_range="-1024,1000")
    line = error_of(run_script("image_train", flags, cwd=tmp_path))
    assert "beyond --value_range -1024,1000" in line
    assert f"'{scans}/" in line
    assert names(tmp_path) == []


def test_other_channels_than_the_flag(scans, run_script, tmp_path):
    flags = train_flags(scans, value_range=HOUNSFIELD)
    line = error_of(run_script("image_train", flags, cwd=tmp_path))
    assert "has 6 channels: give --channels 6" in line
    assert names(tmp_path) == []


@pytest.fixture
def flawed(tmp_path):
    """Many good files, and one which the first look at some of them passes over."""

    def make(values):
        folder = tmp_path / "flawed"
        folder.mkdir()
        for i in range(16):
            np.save(folder / f"{i:02}.npy", np.full((8, 8, 2), 0.5, np.float32))
        np.save(folder / "13.npy", values)
        return folder

    return make


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["single", pytest.param("torchrun", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.zeros((8, 8, 3), np.float32), ["13.npy' has 3 channels, but '", "00.npy' has 2"]),
        (np.full((8, 8, 2), 1.5, np.float32), ["13.npy' holds values from 1.5", "--value_range"]),
    ],
    ids=["channels", "range"],
)
def test_mistake_found_on_the_way_ends_all_processes(flawed, tmp_path, launcher, values, words):
    flags = train_flags(flawed(values), channels=2, value_range="0,1", num_workers=1)
    flags |= {"batch_size": 8, "lr_anneal_steps": 100, "log_dir": tmp_path / "run"}
    parts = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    done = start(launcher, script_path("image_train"), *parts, timeout=120, cwd=tmp_path)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert lines, done.stderr
    assert any(all(word in line for word in words) for line in lines), lines
    assert "Traceback (most recent call last)" not in done.stderr or launcher == "torchrun"
    if launcher == "single":
        assert done.returncode == 2
