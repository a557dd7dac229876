"""Classes of samples, their collection from all processes, and the files they end in."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from script_runner import names, samples

from improved_diffusion import dist_util, sample_util
from improved_diffusion.errors import UserError
from improved_diffusion.pixels import normalize, read_image
from improved_diffusion.sample_util import (
    check_png,
    class_labels,
    collect_samples,
    grid,
    parse_classes,
    store_type,
    to_uint8,
    to_values,
    write_samples,
)

GAP = sample_util.GRID_GAP


# -- uint8


def test_levels_are_truncated_not_rounded():
    """``((x + 1) * 127.5).clamp(0, 255)`` as uint8: 0.999 levels above k is k."""
    wanted = [[0, 0], [0.4, 0], [0.999, 0], [1.001, 1], [100.9, 100], [254.99, 254], [255, 255]]
    exact, expected = torch.tensor(wanted, dtype=torch.float64).T
    levels = to_uint8((exact / 127.5 - 1).view(1, 1, 1, -1))
    assert levels.dtype == torch.uint8
    assert levels.flatten().tolist() == expected.tolist()


def test_levels_out_of_range_are_clamped():
    x = torch.tensor([-3.0, -1.0001, 1.0001, 2.0, 1e9]).view(1, 1, 1, -1)
    assert to_uint8(x).flatten().tolist() == [0, 0, 255, 255, 255]


def test_every_level_of_the_data_comes_back():
    """What is read from a file, k / 127.5 - 1 in float32, becomes k, or k - 1 by truncation."""
    levels = np.arange(256, dtype=np.uint8)
    data = torch.from_numpy(levels.astype(np.float32) / 127.5 - 1).view(1, 1, 1, -1)
    difference = levels - to_uint8(data).flatten().numpy().astype(int)
    assert set(difference.tolist()) <= {0, 1}


def test_channels_come_last():
    x = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5) / 127.5 - 1 + 1e-4
    levels = to_uint8(x)
    assert levels.shape == (2, 4, 5, 3)
    assert levels.is_contiguous()
    assert levels[1, 2, 3, 1] == 60 + 20 + 2 * 5 + 3


# -- classes


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ("", []),
        ("all", [0, 1, 2, 3]),
        ("3", [3]),
        ("2,0,2", [2, 0, 2]),
        (" 1 , 3 ", [1, 3]),
        ("owl", [2]),
        ("owl,0,ant", [2, 0, 0]),
    ],
)
def test_classes_are_numbers_names_or_all(text, classes):
    assert parse_classes(text, 4, ["ant", "bee", "owl", "yak"]) == classes


def test_a_name_wins_over_a_number():
    """Where classes are named by numbers, 3 is the class of that name, not that of index 3."""
    assert parse_classes("3", 4, ["1", "2", "3", "7"]) == [2]
    assert parse_classes("7,1", 4, ["1", "2", "3", "7"]) == [3, 0]
    assert parse_classes("0", 4, ["1", "2", "3", "7"]) == [0]


def test_classes_without_names():
    assert parse_classes("all", 3, []) == [0, 1, 2]
    assert parse_classes("1,2", 3, []) == [1, 2]


@pytest.mark.parametrize("text", ["4", "0,4", "-1", "1.5", "cat", "0,,1", ",", "0-2", "ALL"])
def test_unknown_class_is_an_error_that_lists_the_classes(text):
    with pytest.raises(
        UserError, match=r"--classes .*choose among 0 \.\.\. 3 or ant, bee"
    ) as error:
        parse_classes(text, 4, ["ant", "bee", "owl", "yak"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["all", "0"])
def test_an_unconditional_model_has_no_classes(text):
    with pytest.raises(UserError, match=f"--classes {text}: .*not class-conditional"):
        parse_classes(text, None, [])
    assert parse_classes("", None, []) == []


def test_labels_go_through_the_classes_in_turn():
    labels = class_labels([0, 1, 2, 3, 4], [7, 3], num_classes=10, seed=0)
    assert labels.dtype == torch.int64
    assert labels.tolist() == [7, 3, 7, 3, 7]
    assert class_labels([1, 4], [7, 3], num_classes=10, seed=0).tolist() == [3, 7]


def test_random_labels_depend_on_seed_and_index_alone():
    together = class_labels(range(40), [], num_classes=10, seed=5)
    torch.manual_seed(1)
    np.random.seed(1)
    split = [class_labels(part, [], 10, seed=5) for part in (range(7), range(7, 29), range(29, 40))]
    assert together.dtype == torch.int64
    assert torch.equal(torch.cat(split), together)
    assert class_labels([31, 2], [], 10, seed=5).tolist() == together[[31, 2]].tolist()
    assert not torch.equal(class_labels(range(40), [], 10, seed=6), together)


def test_random_labels_are_uniform():
    counts = torch.bincount(class_labels(range(3000), [], num_classes=3, seed=0), minlength=3)
    assert len(counts) == 3
    assert (counts - 1000).abs().max() < 5 * np.sqrt(3000 * 2 / 9)  # five standard deviations


# -- collecting


def make_numbered(calls, labels=True):
    """Images and labels that tell their index; what was asked for is kept in ``calls``."""

    def make(indices):
        calls.append(indices)
        numbers = torch.tensor(indices)
        images = numbers.to(torch.uint8).view(-1, 1, 1, 1).repeat(1, 2, 3, 1)
        return images, 10 * numbers if labels else None

    return make


@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
def test_samples_are_collected_in_the_order_of_their_indices(batch_size):
    calls = []
    images, labels = collect_samples(make_numbered(calls), 8, batch_size)
    assert images.dtype == np.uint8
    assert images.shape == (8, 2, 3, 1)
    assert images[:, 0, 0, 0].tolist() == list(range(8))
    assert labels.tolist() == list(range(0, 80, 10))
    assert labels.dtype == np.int64
    assert sum(calls, []) == list(range(8))  # noqa: RUF017
    assert max(map(len, calls)) == min(8, batch_size)


def test_samples_without_labels():
    images, labels = collect_samples(make_numbered([], labels=False), 5, 2)
    assert len(images) == 5
    assert labels is None


def test_progress_is_shown_on_stderr(capsys):
    collect_samples(make_numbered([]), 8, 3)
    out, err = capsys.readouterr()
    assert out == ""
    assert "8/8" in err


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(("num_samples", "batch_size"), [(10, 4), (7, 2), (1, 5), (12, 3)])
def test_processes_make_all_samples_between_them(monkeypatch, world_size, num_samples, batch_size):
    """Each is run alone, and gathers with its own rows those that the others would have made."""
    calls = []

    def gather(rows, gathered=None):
        step = len(rows) * (10 if rows.ndim == 1 else 1)  # labels are ten times the index
        for rank, part in enumerate(gathered or []):
            part.copy_(rows + step * rank)

    monkeypatch.setattr(dist_util, "get_world_size", lambda: world_size)
    monkeypatch.setattr(torch.distributed, "gather", gather)
    for rank in reversed(range(world_size)):
        calls.insert(0, [])
        monkeypatch.setattr(dist_util, "get_rank", lambda rank=rank: rank)
        result = collect_samples(make_numbered(calls[0]), num_samples, batch_size)
        assert (result is None) == (rank > 0)
    images, labels = result
    assert images[:, 0, 0, 0].tolist() == list(range(num_samples))
    assert labels.tolist() == list(range(0, 10 * num_samples, 10))

    rounds = list(zip(*calls, strict=True))  # as many for each: no gathering waits for ever
    assert all(len({len(share) for share in shares}) == 1 for shares in rounds)
    assert all(len(share) <= batch_size for shares in rounds for share in shares)
    indices = [i for shares in rounds for share in shares for i in share]
    assert indices[:num_samples] == list(range(num_samples))
    assert len(indices) - num_samples < world_size


# -- the grid


def cell(picture, row, column, height, width):
    top, left = row * (height + GAP) + GAP, column * (width + GAP) + GAP
    return picture[top : top + height, left : left + width]


def test_grid_puts_images_row_by_row():
    images = np.random.randint(0, 256, (5, 64, 60, 3), dtype=np.uint8)
    picture = grid(images, columns=3)
    assert picture.dtype == np.uint8
    assert picture.shape == (2 * (64 + GAP) + GAP, 3 * (60 + GAP) + GAP, 3)
    for i, image in enumerate(images):
        np.testing.assert_array_equal(cell(picture, i // 3, i % 3, 64, 60), image)
    background = cell(picture, 1, 2, 64, 60)
    assert (background == background[0, 0]).all()
    for i in range(5):  # nothing but images and background
        cell(picture, i // 3, i % 3, 64, 60)[:] = background[0, 0]
    assert (picture == background[0, 0]).all()


def test_small_images_are_enlarged_by_a_whole_factor():
    images = np.random.randint(0, 256, (4, 8, 4, 1), dtype=np.uint8)
    picture = grid(images)
    height = (picture.shape[0] - GAP) // 2 - GAP
    factor = height // 8
    assert factor >= 2
    assert picture.shape == (2 * (8 * factor + GAP) + GAP, 2 * (4 * factor + GAP) + GAP, 1)
    for i, image in enumerate(images):
        shown = cell(picture, i // 2, i % 2, 8 * factor, 4 * factor)
        np.testing.assert_array_equal(shown, image.repeat(factor, 0).repeat(factor, 1))


def test_large_images_are_shown_as_they_are():
    assert grid(np.zeros((1, 100, 200, 3), dtype=np.uint8)).shape == (
        100 + 2 * GAP,
        200 + 2 * GAP,
        3,
    )


@pytest.mark.parametrize(
    ("count", "columns", "rows_columns"),
    [(1, 0, (1, 1)), (4, 0, (2, 2)), (5, 0, (2, 3)), (500, 0, (10, 10)), (500, 20, (5, 20)),
     (3, 10, (1, 3)), (100, 10, (10, 10))],
)  # fmt: skip
def test_grid_shows_at_most_100_images(count, columns, rows_columns):
    picture = grid(np.zeros((count, 50, 50, 1), dtype=np.uint8), columns)
    rows, columns = rows_columns
    assert picture.shape == (rows * (50 + GAP) + GAP, columns * (50 + GAP) + GAP, 1)


# -- files


IMAGES = np.arange(6 * 4 * 5 * 3, dtype=np.int64).astype(np.uint8).reshape(6, 4, 5, 3)
LABELS = np.array([2, 0, 1, 2, 0, 1])


def test_npz_holds_images_and_labels(tmp_path):
    path = write_samples(str(tmp_path), IMAGES, LABELS)
    assert path == str(tmp_path / "samples_6x4x5x3.npz")
    assert names(tmp_path) == ["grid.png", "samples_6x4x5x3.npz"]
    images, labels = samples(tmp_path)
    assert (images.dtype, labels.dtype) == (np.uint8, np.int64)
    np.testing.assert_array_equal(images, IMAGES)
    np.testing.assert_array_equal(labels, LABELS)


def test_npz_without_labels_has_no_arr_1(tmp_path):
    with np.load(write_samples(str(tmp_path), IMAGES, None), allow_pickle=False) as arrays:
        assert arrays.files == ["arr_0"]


def test_written_grid_has_one_column_per_class(tmp_path):
    for classes, columns in [([2, 0], 2), (range(6), 6), ([2], 0), ([], 0), (range(21), 0)]:
        write_samples(str(tmp_path), IMAGES, LABELS, classes=classes)
        shown = np.array(Image.open(tmp_path / "grid.png"))
        np.testing.assert_array_equal(shown, grid(IMAGES, columns))


@pytest.mark.parametrize(
    ("labels", "class_names", "expected"),
    [
        (LABELS, ["ant", "bee", "owl"], ["000000_owl.png", "000001_ant.png", "000002_bee.png"]),
        (LABELS, [], ["000000_2.png", "000001_0.png", "000002_1.png"]),
        (LABELS, ["ant"], ["000000_2.png", "000001_ant.png", "000002_1.png"]),
        (None, [], ["000000.png", "000001.png", "000002.png"]),
    ],
)
def test_png_files_are_named_by_index_and_class(tmp_path, labels, class_names, expected):
    write_samples(str(tmp_path), IMAGES, labels, class_names=class_names, save_png=True)
    assert names(tmp_path / "png")[:3] == expected
    assert len(os.listdir(tmp_path / "png")) == 6
    for name, image in zip(names(tmp_path / "png"), IMAGES, strict=True):
        np.testing.assert_array_equal(np.array(Image.open(tmp_path / "png" / name)), image)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
def test_pictures_have_the_channels_of_the_samples(tmp_path, channels, mode):
    images = np.random.randint(0, 256, (2, 8, 8, channels), dtype=np.uint8)
    write_samples(str(tmp_path), images, None, save_png=True)
    picture = Image.open(tmp_path / "png" / "000001.png")
    assert picture.mode == Image.open(tmp_path / "grid.png").mode == mode
    np.testing.assert_array_equal(np.array(picture).reshape(8, 8, channels), images[1])


def test_samples_of_many_channels_are_an_npz_alone(tmp_path):
    images = np.zeros((2, 8, 8, 5), dtype=np.uint8)
    write_samples(str(tmp_path), images, None)
    assert names(tmp_path) == ["samples_2x8x8x5.npz"]


def test_pictures_of_many_channels_are_refused_before_sampling():
    with pytest.raises(UserError, match=r"--save_png True: .* 1 to 4 channels, not 5"):
        check_png(True, 5)
    check_png(False, 5)
    for channels in (1, 2, 3, 4):
        check_png(True, channels)


# -- value ranges

DEEP, KELVIN = (0.0, 65535.0), (200.5, 310.0)


def test_without_a_range_values_are_levels():
    x = torch.linspace(-1.2, 1.2, 24).view(1, 2, 3, 4)
    assert torch.equal(to_values(x, None), to_uint8(x))
    assert store_type(None) == np.uint8


@pytest.mark.parametrize(
    ("value_range", "dtype"),
    [
        (DEEP, "uint16"),
        ((0, 255), "uint16"),
        ((100.0, 4095.0), "uint16"),
        ((-1.0, 4095.0), "float32"),
        ((0.0, 65536.0), "float32"),
        ((0.0, 1.5), "float32"),
    ],
)
def test_whole_numbers_of_16_bits_are_stored_as_such(value_range, dtype):
    assert store_type(value_range) == dtype


def test_values_of_whole_numbers_are_rounded_and_clamped():
    exact = torch.tensor([-5.0, 0, 0.4, 0.6, 1000.49, 65534.6, 65535, 70000])
    values = to_values((exact / 65535 * 2 - 1).double().view(1, 1, 1, -1), DEEP)
    assert values.dtype == torch.float32
    assert values.flatten().tolist() == [0, 0, 0, 1, 1000, 65535, 65535, 65535]


def test_every_value_of_16_bits_comes_back():
    stored = np.arange(65536, dtype=np.uint16).reshape(1, 256, 256, 1)
    back = to_values(normalize(torch.from_numpy(stored), DEEP), DEEP).numpy()
    np.testing.assert_array_equal(back, stored)


def test_floats_stay_in_their_range():
    x = torch.tensor([-3.0, -1, 0, 0.5, 1, 3]).view(1, 1, 1, -1)
    values = to_values(x, KELVIN).flatten().tolist()
    assert values == pytest.approx([200.5, 200.5, 255.25, 282.625, 310, 310])


@pytest.mark.parametrize(("channels", "kind"), [(1, "png"), (3, "npy"), (7, "npy")])
def test_samples_of_16_bits_are_written_whole(tmp_path, channels, kind):
    images = np.random.randint(0, 65536, (2, 8, 8, channels)).astype(np.float32)
    check_png(True, channels, DEEP)
    path = write_samples(str(tmp_path), images, None, save_png=True, value_range=DEEP)
    stored, _ = samples(tmp_path)
    assert path.endswith(f"samples_2x8x8x{channels}.npz")
    assert stored.dtype == np.uint16
    np.testing.assert_array_equal(stored, images)
    assert ("grid.png" in names(tmp_path)) == (channels <= 4)
    single = tmp_path / kind / f"000001.{kind}"
    read = read_image(str(single), 8, channels, value_range=DEEP)
    np.testing.assert_array_equal(read, images[1])


def test_samples_of_floats_are_written_whole(tmp_path):
    images = np.random.uniform(200.5, 310, (2, 8, 8, 1)).astype(np.float32)
    labels = np.array([1, 0])
    options = {"class_names": ["ant", "owl"], "save_png": True, "value_range": KELVIN}
    write_samples(str(tmp_path), images, labels, **options)
    stored, _ = samples(tmp_path)
    assert stored.dtype == np.float32
    np.testing.assert_array_equal(stored, images)
    assert names(tmp_path / "npy") == ["000000_owl.npy", "000001_ant.npy"]


def test_grid_shows_the_range_as_8_bits(tmp_path):
    images = np.array([200.5, 255.25, 310]).reshape(3, 1, 1, 1).repeat(48, 1).repeat(48, 2)
    write_samples(str(tmp_path), images.astype(np.float32), None, value_range=KELVIN)
    with Image.open(tmp_path / "grid.png") as picture:
        pixels = np.array(picture)
    cell = 48 + GAP
    levels = [
        pixels[row * cell + 20, column * cell + 20] for row, column in [(0, 0), (0, 1), (1, 0)]
    ]
    assert levels == [0, 127, 255]
