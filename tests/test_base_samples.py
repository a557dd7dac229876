"""What super-resolution starts from: an npz file, a folder, a picture."""

import numpy as np
import pytest
import torch
from PIL import Image

from improved_diffusion.base_samples import load_base_samples
from improved_diffusion.errors import UserError
from improved_diffusion.pixels import read_image
from improved_diffusion.sample_util import write_samples

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
LABELS = np.array([1, 0, 2, 2, 1])


def as_images(pixels):
    return torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)


@pytest.fixture
def npz(tmp_path):
    """An npz file as image_sample.py writes it."""
    return write_samples(str(tmp_path), PIXELS, LABELS)


@pytest.fixture
def folder(tmp_path):
    """Pictures of 4 x 6 in a folder, the files of two classes."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, pixels in zip(["owl_1", "ant_2", "owl_3"], PIXELS, strict=False):
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


def message(*args, **kwargs):
    """The one line of the error."""
    with pytest.raises(UserError) as error:
        load_base_samples(*args, **kwargs)
    assert "\n" not in str(error.value)
    assert "--base_samples" in str(error.value)
    return str(error.value)


# -- npz


def test_npz_of_samples_is_read(npz):
    base = load_base_samples(npz, (4, 6), 3, want_labels=True)
    assert base.images.dtype == torch.float32
    torch.testing.assert_close(base.images, as_images(PIXELS))
    assert base.labels.dtype == torch.int64
    assert base.labels.tolist() == LABELS.tolist()


def test_labels_are_left_where_they_are_not_wanted(npz):
    assert load_base_samples(npz, (4, 6), 3).labels is None


@pytest.mark.parametrize(
    ("small_size", "channels", "named"),
    [
        (4, 3, ["[5, 4, 6, 3]", "[N, 4, 4, 3]", "--small_size 4,"]),
        ((6, 4), 3, ["[5, 4, 6, 3]", "[N, 6, 4, 3]", "--small_size 6x4,"]),
        ((4, 6), 1, ["[5, 4, 6, 3]", "[N, 4, 6, 1]", "--channels 1"]),
    ],
)
def test_npz_of_another_size_is_an_error_with_both_sizes(npz, small_size, channels, named):
    line = message(npz, small_size, channels)
    assert all(part in line for part in [npz, *named])


@pytest.mark.parametrize(
    "arrays",
    [
        {"arr_0": PIXELS.astype(np.float32)},
        {"arr_0": PIXELS[0]},
        {"pixels": PIXELS},
        {"arr_0": np.array([{"a": 1}], dtype=object)},
    ],
    ids=["float", "one image", "other name", "pickled"],
)
def test_npz_of_another_content_is_an_error(tmp_path, arrays):
    path = str(tmp_path / "x.npz")
    np.savez(path, **arrays)
    assert path in message(path, (4, 6), 3)


def test_npz_without_labels_is_an_error_where_they_are_needed(tmp_path):
    path = write_samples(str(tmp_path), PIXELS, None)
    line = message(path, (4, 6), 3, want_labels=True)
    assert "arr_1" in line
    assert "--classes" in line
    assert load_base_samples(path, (4, 6), 3).images.shape == (5, 3, 4, 6)


@pytest.mark.parametrize("content", [b"", b"no archive", None], ids=["empty", "text", "cut"])
def test_damaged_npz_is_an_error(tmp_path, npz, content):
    path = tmp_path / "damaged.npz"
    with open(npz, "rb") as file:
        whole = file.read()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    line = message(str(path), (4, 6), 3)
    assert str(path) in line
    assert "damaged" in line


@pytest.mark.parametrize("name", ["gone.npz", "gone", "gone.png"])
def test_what_does_not_exist_is_an_error(tmp_path, name):
    assert f"'{tmp_path / name}' does not exist" in message(str(tmp_path / name), 4, 3)


# -- pictures


def test_folder_of_pictures_is_read_in_order(folder):
    base = load_base_samples(str(folder), (4, 6), 3)
    torch.testing.assert_close(base.images, as_images(PIXELS[[1, 0, 2]]))  # ant_2, owl_1, owl_3
    assert base.labels is None


def test_pictures_are_resized_as_for_training(folder):
    base = load_base_samples(str(folder), 2, 1)
    expected = np.stack([read_image(str(folder / "ant_2.png"), 2, 1)])
    torch.testing.assert_close(base.images[:1], as_images(expected))
    assert base.images.shape == (3, 1, 2, 2)


def test_labels_of_a_folder_are_those_of_the_model(folder):
    names = ["ant", "bee", "cat", "owl"]
    base = load_base_samples(str(folder), 4, 3, want_labels=True, class_names=names)
    assert base.labels.dtype == torch.int64
    assert base.labels.tolist() == [0, 3, 3]


def test_labels_of_a_folder_are_counted_where_the_model_names_none(folder):
    assert load_base_samples(str(folder), 4, 3, want_labels=True).labels.tolist() == [0, 1, 1]


def test_class_that_the_model_does_not_know_is_named(folder):
    line = message(str(folder), 4, 3, want_labels=True, class_names=["ant", "bee"])
    assert ": owl" in line
    assert "--classes" in line


def test_one_picture_is_read(folder):
    base = load_base_samples(str(folder / "owl_1.png"), (4, 6), 3)
    torch.testing.assert_close(base.images, as_images(PIXELS[:1]))
    assert base.labels is None


def test_one_picture_has_no_label(folder):
    path = str(folder / "owl_1.png")
    assert path in message(path, 4, 3, want_labels=True)


@pytest.mark.parametrize("where", ["folder", "file"])
def test_broken_picture_is_named(folder, where):
    broken = folder / "broken_0.png"
    broken.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"broken_0\.png' cannot be read as an image"):
        load_base_samples(str(folder if where == "folder" else broken), 4, 3)


def test_empty_folder_is_an_error_of_this_flag(tmp_path):
    assert str(tmp_path) in message(str(tmp_path), 4, 3)


# -- value ranges


def in_range(pixels, low, high):
    values = (pixels.astype(np.float32) - low) / (high - low) * 2 - 1
    return torch.from_numpy(values).permute(0, 3, 1, 2)


@pytest.mark.parametrize("value_range", [(0.0, 65535.0), (-50.5, 300.0)])
def test_npz_of_a_range_is_read_back(tmp_path, value_range):
    values = np.random.default_rng(1).uniform(0, 300, (3, 4, 6, 5)).round().astype(np.float32)
    path = write_samples(str(tmp_path), values, None, value_range=value_range)
    base = load_base_samples(path, (4, 6), 5, value_range=value_range)
    assert base.images.dtype == torch.float32
    torch.testing.assert_close(base.images, in_range(values, *value_range))


def test_folder_and_file_of_a_range_are_read(tmp_path):
    values = np.random.default_rng(1).uniform(-7, 9, (2, 4, 6, 2)).astype(np.float32)
    for name, image in zip(["owl_1", "ant_2"], values, strict=True):
        np.save(tmp_path / f"{name}.npy", image)
    options = {"value_range": (-7.0, 9.0), "want_labels": True, "class_names": ["owl", "ant"]}
    base = load_base_samples(str(tmp_path), (4, 6), 2, **options)
    assert base.labels.tolist() == [1, 0]
    torch.testing.assert_close(base.images, in_range(values[::-1], -7, 9))
    one = load_base_samples(str(tmp_path / "owl_1.npy"), (4, 6), 2, value_range=(-7.0, 9.0))
    torch.testing.assert_close(one.images, in_range(values[:1], -7, 9))


def test_npz_beyond_the_range_is_an_error(tmp_path):
    path = str(tmp_path / "a.npz")
    np.savez(path, np.array([-1.0, 2]).reshape(1, 1, 2, 1))
    with pytest.raises(UserError, match=r"a\.npz' holds values from -1 to 2, .*--value_range 0,1"):
        load_base_samples(path, (1, 2), 1, value_range=(0.0, 1.0))
    np.savez(path, np.array([0, np.nan]).reshape(1, 1, 2, 1))
    assert "NaN" in message(path, (1, 2), 1, value_range=(0.0, 1.0))
    np.savez(path, np.zeros((1, 1, 2, 3)))
    line = message(path, (1, 2), 1, value_range=(0.0, 1.0))
    assert "values of 0,1 [N, 1, 2, 1]" in line
