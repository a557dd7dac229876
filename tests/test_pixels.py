"""Files as arrays: values as they are, sizes, random crops, the way to [-1, 1]."""

import io
import sys

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from improved_diffusion import pixels as pixels_module
from improved_diffusion.errors import UserError
from improved_diffusion.pixels import (
    check_files,
    decode_image,
    normalize,
    parse_value_range,
    range_text,
    read_image,
)

DEEP = (0.0, 65535.0)
HOUNSFIELD = (-1024.0, 3071.0)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def save(tmp_path):
    """Write an array as the kind of file that its name says; the path."""

    def write(name, values):
        path = str(tmp_path / name)
        if name.endswith(".npy"):
            np.save(path, values)
        elif name.endswith(".png") and values.ndim == 3 and values.dtype == np.uint16:
            (tmp_path / name).write_bytes(imagecodecs.png_encode(values))
        elif name.endswith((".tif", ".tiff")):
            tifffile.imwrite(path, values, compression=None)
        else:
            Image.fromarray(values).save(path)
        return path

    return write


def message(function, *args, **kwargs):
    """The one line of the error."""
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# -- what files hold


def test_deep_grey_png_keeps_its_values(save, rng):
    values = rng.integers(0, 65536, (8, 10), dtype=np.uint16)
    read = read_image(save("a.png", values), (8, 10), 1, value_range=DEEP)
    assert read.dtype == np.uint16
    np.testing.assert_array_equal(read[..., 0], values)


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_deep_colour_png_keeps_its_values(save, rng, channels):
    values = rng.integers(0, 65536, (8, 10, channels), dtype=np.uint16)
    read = read_image(save("a.png", values), (8, 10), channels, value_range=DEEP)
    assert read.dtype == np.uint16
    np.testing.assert_array_equal(read, values)


def test_pictures_of_8_bits_keep_their_values(save, rng):
    values = rng.integers(0, 256, (8, 10, 3), dtype=np.uint8)
    read = read_image(save("a.png", values), (8, 10), 3, value_range=(0, 255))
    assert read.dtype == np.uint16
    np.testing.assert_array_equal(read, values)


def test_palettes_are_read_as_colours(tmp_path, rng):
    image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).quantize(16)
    image.save(tmp_path / "a.png")
    read = read_image(str(tmp_path / "a.png"), 8, 3, value_range=(0, 255))
    np.testing.assert_array_equal(read, np.array(image.convert("RGB")))


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        ("bool", "uint16"),
        ("uint8", "uint16"),
        ("uint16", "uint16"),
        (">u2", "uint16"),
        ("int16", "float32"),
        ("int32", "float32"),
        ("float16", "float32"),
        ("float32", "float32"),
        ("float64", "float32"),
    ],
)
@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 1), (6, 8, 7)])
def test_arrays_keep_their_values(save, rng, dtype, kept, shape):
    values = rng.integers(0, 2 if dtype == "bool" else 200, shape).astype(dtype)
    channels = shape[2] if len(shape) == 3 else 1
    read = read_image(save("a.npy", values), (6, 8), channels, value_range=(0, 200))
    assert read.dtype == kept
    np.testing.assert_array_equal(read, values.reshape(6, 8, channels))


def test_floats_of_negative_values_come_out_bit_for_bit(save, rng):
    values = rng.uniform(-1024, 3071, (8, 8, 2)).astype(np.float32)
    read = read_image(save("a.npy", values), 8, 2, value_range=HOUNSFIELD)
    np.testing.assert_array_equal(read, values)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize("photometric", ["minisblack", "rgb"])
def test_tiff_keeps_its_values(tmp_path, rng, dtype, photometric):
    shape = (6, 8, 3) if photometric == "rgb" else (6, 8)
    values = rng.integers(0, 200, shape).astype(dtype)
    path = str(tmp_path / "a.tif")
    tifffile.imwrite(path, values, photometric=photometric)
    channels = 3 if photometric == "rgb" else 1
    read = read_image(path, (6, 8), channels, value_range=(0, 200))
    np.testing.assert_array_equal(read, values.reshape(6, 8, channels))


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_channels_of_tiff_may_lie_either_way(tmp_path, rng, planar):
    values = rng.integers(0, 4096, (6, 8, 5), dtype=np.uint16)
    stored = values if planar == "contig" else np.moveaxis(values, -1, 0)
    path = str(tmp_path / "a.tiff")
    tifffile.imwrite(path, stored, photometric="minisblack", planarconfig=planar)
    np.testing.assert_array_equal(read_image(path, (6, 8), 5, value_range=(0, 4095)), values)


def test_pages_of_tiff_are_channels(tmp_path, rng):
    values = rng.integers(0, 4096, (7, 6, 8), dtype=np.uint16)
    path = str(tmp_path / "a.tif")
    tifffile.imwrite(path, values, photometric="minisblack")
    read = read_image(path, (6, 8), 7, value_range=(0, 4095))
    np.testing.assert_array_equal(read, np.moveaxis(values, 0, -1))


@pytest.mark.parametrize("compression", ["lzw", "zlib"])
def test_tiff_may_be_compressed(tmp_path, rng, compression):
    values = rng.integers(0, 4096, (6, 8), dtype=np.uint16)
    path = str(tmp_path / "a.tif")
    tifffile.imwrite(path, values, compression=compression)
    read = read_image(path, (6, 8), 1, value_range=(0, 4095))
    np.testing.assert_array_equal(read[..., 0], values)


def test_contents_of_a_file_are_read_like_the_file(save, rng):
    path = save("a.npy", rng.uniform(0, 1, (20, 30, 2)))
    with open(path, "rb") as file:
        data = file.read()
    options = {"value_range": (0, 1)}
    np.testing.assert_array_equal(
        decode_image(data, "x/a.npy", 8, 2, **options), read_image(path, 8, 2, **options)
    )
    picture = save("a.png", rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    with open(picture, "rb") as file:
        np.testing.assert_array_equal(decode_image(file.read(), "a.png", 8), read_image(picture, 8))


# -- what is refused


def test_values_beyond_the_range_are_named(save):
    values = np.array([[-5.0, 0], [7, 12.5]])
    path = save("a.npy", values)
    for value_range in [(0, 12.5), (-5, 12)]:
        line = message(read_image, path, 2, 1, value_range=value_range)
        assert f"'{path}' holds values from -5 to 12.5" in line
        assert f"--value_range {range_text(value_range)}" in line
    assert read_image(path, 2, 1, value_range=(-5, 12.5)).shape == (2, 2, 1)


def test_rounding_of_the_ends_of_the_range_is_no_mistake(save):
    path = save("a.npy", np.array([[0.1, 0.7]]))  # neither is a float32
    assert read_image(path, (1, 2), 1, value_range=(0.1, 0.7)).shape == (1, 2, 1)


def test_channels_that_differ_between_files_are_named_with_two_files(save, rng):
    three = save("a.npy", rng.uniform(size=(4, 4, 3)))
    four = save("b.npy", rng.uniform(size=(4, 4, 4)))
    line = message(read_image, four, 4, 3, value_range=(0, 1), like=three)
    assert line.startswith(f"'{four}' has 4 channels, but '{three}' has 3")


def test_channels_of_the_flag_that_differ_are_named_with_the_flag(save, rng):
    three = save("a.npy", rng.uniform(size=(4, 4, 3)))
    other = save("b.npy", rng.uniform(size=(4, 4, 3)))
    for like in (None, three, other):
        line = message(read_image, three, 4, 1, value_range=(0, 1), like=like)
        assert line == f"'{three}' has 3 channels: give --channels 3"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(save, value):
    path = save("a.npy", np.array([[0, value]]))
    assert f"'{path}' holds NaN or infinite values" in message(
        read_image, path, (1, 2), 1, value_range=(0, 1)
    )


@pytest.mark.parametrize(
    "values", [np.zeros(3), np.zeros((2, 2, 2, 2)), np.zeros((2, 2), complex), np.zeros((0, 2))]
)
def test_arrays_that_are_no_images_are_refused(save, values):
    path = save("a.npy", values)
    line = message(read_image, path, 2, 1, value_range=(0, 1))
    assert path in line
    assert "[H, W]" in line


@pytest.mark.parametrize("name", ["a.npy", "a.tif", "a.png"])
@pytest.mark.parametrize("content", [b"", b"no image", b"\x93NUMPY\x01", b"II*\0\x08\0"])
def test_damaged_files_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    line = message(read_image, str(tmp_path / name), 8, 1, value_range=(0, 1))
    assert f"{name}' cannot be read as an image: " in line


def test_arrays_of_objects_are_not_unpickled(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{}], dtype=object), allow_pickle=True)
    line = message(read_image, str(tmp_path / "a.npy"), 8, 1, value_range=(0, 1))
    assert "cannot be read" in line


def test_tiff_of_several_kinds_of_images_is_refused(tmp_path):
    path = str(tmp_path / "a.tif")
    with tifffile.TiffWriter(path) as file:
        file.write(np.zeros((4, 4), np.uint16))
        file.write(np.zeros((8, 8), np.uint16))
    assert "2 images" in message(read_image, path, 4, 1, value_range=(0, 1))


@pytest.mark.parametrize(("name", "library"), [("a.tif", "tifffile"), ("a.png", "imagecodecs")])
def test_missing_libraries_are_named_with_their_extra(save, rng, monkeypatch, name, library):
    path = save(name, rng.integers(0, 65536, (8, 10, 3), dtype=np.uint16))
    monkeypatch.setitem(sys.modules, library, None)
    line = message(read_image, path, (8, 10), 3, value_range=DEEP)
    assert path in line
    assert "pip install 'improved-diffusion[scientific]'" in line


def test_a_few_files_are_checked_before_anything_begins(save, rng):
    paths = [save(f"{i}.npy", rng.uniform(size=(4, 4, 3))) for i in range(20)]
    check_files(paths, 3, (0, 1))
    check_files(paths[:1], 3, (0, 1))
    assert "--channels 3" in message(check_files, paths, 1, (0, 1))
    assert "--value_range 0,0.25" in message(check_files, paths, 3, (0, 0.25))
    odd = save("18.npy", rng.uniform(size=(4, 4, 2)))
    line = message(check_files, paths, 3, (0, 1))
    assert line.startswith(f"'{odd}' has 2 channels, but '{paths[0]}' has 3")


# -- sizes


def reference_resize(plane, size):
    """Box halving, then bicubic, in float32 by Pillow."""
    image = Image.fromarray(plane.astype(np.float32))
    while image.width >= 2 * size and image.height >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return np.array(image.resize((size, size), Image.Resampling.BICUBIC))


def test_channels_are_resized_one_by_one(save, rng):
    values = rng.uniform(-1000, 3000, (50, 50, 6)).astype(np.float32)
    read = read_image(save("a.npy", values), 12, 6, value_range=HOUNSFIELD)
    assert read.shape == (12, 12, 6)
    for channel in range(6):
        np.testing.assert_array_equal(
            read[..., channel], reference_resize(values[..., channel], 12)
        )


def test_integers_are_rounded_after_resizing(save, rng):
    values = rng.integers(1000, 60000, (50, 50), dtype=np.uint16)
    read = read_image(save("a.npy", values), 12, 1, value_range=DEEP)
    assert read.dtype == np.uint16
    np.testing.assert_array_equal(read[..., 0], reference_resize(values, 12).round())


def test_resizing_goes_not_beyond_the_values_of_the_channel(save):
    values = np.zeros((9, 9, 2), dtype=np.uint16)
    values[:, 5:, 0] = 65535  # an edge that a bicubic filter overshoots
    values[:, 5:, 1] = 1000
    values[:, :5, 1] = 20
    assert reference_resize(values[..., 0], 16).max() > 65535
    read = read_image(save("a.npy", values), 16, 2, value_range=DEEP)
    assert (read[..., 0].min(), read[..., 0].max()) == (0, 65535)
    assert (read[..., 1].min(), read[..., 1].max()) == (20, 1000)


def test_resizing_of_values_is_that_of_pictures(tmp_path, rng):
    """Pictures are rounded at each stage, which is all the difference."""
    values = np.array(
        Image.fromarray(rng.integers(60, 200, (9, 7), dtype=np.uint8)).resize((90, 70))
    )
    Image.fromarray(values).save(tmp_path / "a.png")
    as_picture = read_image(str(tmp_path / "a.png"), (16, 24), 1).astype(int)
    as_values = read_image(str(tmp_path / "a.png"), (16, 24), 1, value_range=(0, 255))
    assert abs(as_picture - as_values).max() <= 2


# -- random crops


def position_image(height, width):
    """A picture whose colour says where a pixel was: rows in red, columns in green, 0 ... 250."""
    rows, columns = np.mgrid[:height, :width]
    planes = [250 * rows / (height - 1), 250 * columns / (width - 1), np.zeros((height, width))]
    return np.stack(planes, axis=-1).round().astype(np.uint8)


@pytest.mark.parametrize("shape", [(80, 80), (200, 90), (31, 500)])
@pytest.mark.parametrize("size", [(16, 16), (8, 24), (24, 10)])
def test_crops_show_80_to_100_percent_of_what_covers_the_target(tmp_path, shape, size):
    path = str(tmp_path / "a.png")
    Image.fromarray(position_image(*shape)).save(path)
    scale = max(size[0] / shape[0], size[1] / shape[1])
    shown = []
    for seed in range(40):
        crop = read_image(path, size, crop=np.random.default_rng(seed)).astype(float)
        assert crop.shape == (*size, 3)
        # how much of the image's height lies between the first and the last row of the crop
        spans = [
            (crop[-1, :, 0] - crop[0, :, 0]).mean() / 250 / (size[0] - 1) * size[0],
            (crop[:, -1, 1] - crop[:, 0, 1]).mean() / 250 / (size[1] - 1) * size[1],
        ]
        whole = [size[0] / (shape[0] * scale), size[1] / (shape[1] * scale)]
        shown.append(max(span / full for span, full in zip(spans, whole, strict=True)))
    assert min(shown) > 0.70  # rounding to pixels at the edges
    assert max(shown) < 1.12
    assert max(shown) - min(shown) > 0.1


def test_crops_reach_all_edges(tmp_path):
    path = str(tmp_path / "a.png")
    Image.fromarray(position_image(40, 60)).save(path)
    crops = [read_image(path, 16, crop=np.random.default_rng(i)) for i in range(200)]
    assert min(int(crop[0, 0, 0]) for crop in crops) < 8
    assert max(int(crop[-1, 0, 0]) for crop in crops) > 242
    assert min(int(crop[0, 0, 1]) for crop in crops) < 8
    assert max(int(crop[0, -1, 1]) for crop in crops) > 242


def test_crops_depend_on_their_generator_alone(save, rng):
    path = save("a.npy", rng.uniform(size=(60, 40, 5)))
    options = {"value_range": (0, 1)}
    first, again, other = (
        read_image(path, 16, 5, crop=np.random.default_rng(seed), **options) for seed in (1, 1, 2)
    )
    assert first.shape == (16, 16, 5)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_crops_of_values_and_pictures_lie_in_one_place(save, rng):
    path = save("a.png", position_image(70, 90))
    as_picture = read_image(path, 16, crop=np.random.default_rng(3)).astype(int)
    as_values = read_image(path, 16, value_range=(0, 255), crop=np.random.default_rng(3)).astype(
        int
    )
    assert abs(as_picture - as_values).max() <= 2


def test_small_images_are_enlarged_before_the_crop(save, rng):
    path = save("a.png", rng.integers(0, 256, (5, 9), dtype=np.uint8))
    assert read_image(path, (16, 8), 1, crop=np.random.default_rng(0)).shape == (16, 8, 1)


# -- to [-1, 1]


def test_pictures_are_normalised_as_ever():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    expected = levels.astype(np.float32) / 127.5 - 1
    found = normalize(torch.from_numpy(levels))
    assert found.dtype == torch.float32
    assert found.shape == (1, 1, 16, 16)
    np.testing.assert_array_equal(found[:, 0].numpy(), expected[..., 0])


@pytest.mark.parametrize("value_range", [DEEP, HOUNSFIELD, (200.5, 310.25), (-1e-3, 1e-3)])
def test_ends_of_the_range_become_minus_one_and_one(value_range):
    low, high = value_range
    values = torch.tensor([low, (low + high) / 2, high]).reshape(1, 1, 3, 1)
    found = normalize(values, value_range).flatten().tolist()
    assert found == pytest.approx([-1, 0, 1], abs=2e-6)
    assert max(map(abs, found)) <= 1


def test_channels_come_first():
    values = torch.from_numpy(np.arange(24, dtype=np.uint16).reshape(1, 2, 3, 4))
    found = normalize(values, (0, 23))
    assert found.shape == (1, 4, 2, 3)
    assert found[0, 1, 1, 2].item() == pytest.approx(21 / 23 * 2 - 1)


# -- the flag


@pytest.mark.parametrize(
    ("text", "value_range"),
    [("", None), ("0,65535", DEEP), ("-1024, 3071", HOUNSFIELD), ("-.5,1e3", (-0.5, 1000))],
)
def test_range_of_the_flag(text, value_range):
    assert parse_value_range(text) == value_range
    if value_range:
        assert parse_value_range(range_text(value_range)) == value_range


@pytest.mark.parametrize("text", ["1", "1,2,3", "a,b", "5,5", "5,2", "0,inf", "nan,1", ","])
def test_range_that_is_none_is_refused(text):
    line = message(parse_value_range, text)
    assert f"--value_range {text}: " in line
    assert "LOW,HIGH" in line


def test_one_spelling_of_a_range():
    assert pixels_module.value_range_flag("0.0, 65535.0") == "0,65535"
    assert pixels_module.value_range_flag("-1.5,1e-3") == "-1.5,0.001"
    assert pixels_module.value_range_flag("") == ""


def test_decoding_takes_bytes_that_are_no_file():
    buffer = io.BytesIO()
    Image.new("L", (8, 8), 7).save(buffer, format="PNG")
    assert (decode_image(buffer.getvalue(), "shard.tar/a.png", 4, 1) == 7).all()
