"""Finding, reading, labelling, shuffling and sharding images."""

import gc
import itertools
import logging
import multiprocessing
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from golden_data import GOLDEN, load_json, npz
from launchers import environment
from PIL import Image

from improved_diffusion import dist_util, image_stream
from improved_diffusion import pixels as pixels_module
from improved_diffusion.errors import UserError
from improved_diffusion.image_datasets import (
    DataOptions,
    GlobalBatchSampler,
    ImageDataset,
    ImageList,
    Seekable,
    list_images,
    load_data,
    load_once,
    open_dataset,
)
from improved_diffusion.image_stream import raw_batches
from improved_diffusion.pixels import read_image

IMAGES = GOLDEN / "images"
JPEG_TOLERANCE = 2  # levels: decoders differ


def save(path, pixels=None, mode=None):
    """Write an image file, by default of random 8 x 8 RGB pixels, and return its pixels."""
    if pixels is None:
        pixels = np.random.randint(0, 256, (8, 8, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path)
    return pixels


def levels(batch):
    """The 0 ... 255 that a batch in [-1, 1] was made of."""
    return ((batch + 1) * 127.5).round().to(torch.int64).numpy()


@pytest.fixture
def place(monkeypatch):
    """Pretend to be one of several processes: ``place(rank, world_size)``."""

    def pretend(rank, world_size):
        monkeypatch.setattr(dist_util, "get_rank", lambda: rank)
        monkeypatch.setattr(dist_util, "get_world_size", lambda: world_size)

    return pretend


@pytest.fixture
def numbered(tmp_path):
    """Ten 4 x 4 grey images whose level is their index."""
    for i in range(10):
        save(tmp_path / f"{i % 3}_{i}.png", np.full((4, 4), i, dtype=np.uint8))
    found = list_images(str(tmp_path), class_cond=True)
    return found, [read_image(path, 4, 1)[0, 0, 0] for path in found.paths]


# -- recorded numbers


@pytest.mark.parametrize("size", [32, 12])
def test_pixels_are_the_recorded_ones(size):
    batch, cond = next(
        load_data(
            data_dir=str(IMAGES),
            batch_size=6,
            image_size=size,
            class_cond=True,
            deterministic=True,
        )
    )
    recorded = npz("images")[f"size{size}"].astype(np.int64)
    assert batch.dtype == torch.float32
    assert batch.shape == recorded.shape == (6, 3, size, size)
    for image, expected, name in zip(
        levels(batch), recorded, load_json("images")["order"], strict=True
    ):
        tolerance = JPEG_TOLERANCE if name.lower().endswith(("jpg", "jpeg")) else 0
        assert np.abs(image - expected).max() <= tolerance, name
    torch.testing.assert_close(
        batch, torch.tensor(levels(batch) / 127.5 - 1).float(), atol=1e-6, rtol=0
    )
    assert cond["y"].dtype == torch.int64
    assert cond["y"].tolist() == load_json("images")["labels"]


def test_order_labels_and_classes_are_the_recorded_ones():
    found = list_images(str(IMAGES), class_cond=True)
    recorded = load_json("images")
    assert [path.removeprefix(f"{IMAGES}/") for path in found.paths] == recorded["order"]
    assert found.classes == recorded["labels"]
    assert list(found.class_names) == recorded["classes"]


# -- finding files


def test_every_kind_of_image_is_found_in_any_case(tmp_path):
    kinds = ["a.jpg", "b.jpeg", "c.png", "d.gif", "e.webp", "f.bmp", "g.JPG", "h.JpEg", "i.PNG"]
    for name in kinds:
        save(tmp_path / name)
    for name in ["j.txt", "k.npz", "png", "l.png.part", "m_png"]:
        (tmp_path / name).write_bytes(b"")
    found = list_images(str(tmp_path))
    assert found.paths == [str(tmp_path / name) for name in kinds]
    assert (found.classes, found.class_names) == (None, ())
    assert all(read_image(path, 8).shape == (8, 8, 3) for path in found.paths)


def test_hidden_files_and_folders_are_passed_over(tmp_path):
    for name in [".a.png", "._b.png", ".cache/c.png", "d/.e.png", "d/f.png"]:
        save(tmp_path / name)
    assert list_images(str(tmp_path)).paths == [str(tmp_path / "d" / "f.png")]


def test_a_folder_named_like_an_image_is_a_folder(tmp_path):
    (tmp_path / "x.png").mkdir()
    save(tmp_path / "y.png" / "a.png")
    assert list_images(str(tmp_path)).paths == [str(tmp_path / "y.png" / "a.png")]


def test_nested_folders_are_sorted_level_by_level(tmp_path):
    names = ["a/b/2.png", "a/b.png", "a/c/1.png", "b.png", "c/z/y/x.png"]
    for name in reversed(names):
        save(tmp_path / name)
    assert list_images(str(tmp_path)).paths == [str(tmp_path / name) for name in names]


def test_a_slash_after_the_folder_changes_nothing():
    with_slash = list_images(f"{IMAGES}/", class_cond=True)
    without = list_images(str(IMAGES), class_cond=True)
    assert with_slash.classes == without.classes
    assert len(with_slash.paths) == 6


@pytest.mark.parametrize("make", ["missing", "empty", "file", "no images"])
def test_a_folder_without_images_is_an_error_that_names_it(tmp_path, make):
    folder = tmp_path / "data"
    if make == "file":
        save(tmp_path / "data.png")
        folder = tmp_path / "data.png"
    elif make != "missing":
        folder.mkdir()
    if make == "no images":
        (folder / "notes.txt").write_text("no image")
    with pytest.raises(UserError, match="--data_dir") as error:
        list_images(str(folder))
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_an_error_names_the_flag_that_named_the_folder(tmp_path):
    for folder in (tmp_path, tmp_path / "gone"):
        with pytest.raises(UserError, match="--base_samples"):
            list_images(str(folder), flag="base_samples")


def test_no_folder_at_all_is_an_error():
    with pytest.raises(UserError, match="--data_dir"):
        list_images("")


# -- labels


def test_labels_from_names_end_at_the_first_underscore(tmp_path):
    for name in ["dog_1_a.png", "sub/cat_2.png", "dog_b_9.png", "ant.png"]:
        save(tmp_path / name)
    found = list_images(str(tmp_path), class_cond=True)
    # a name without _ is a class of its own
    assert found.class_names == ("ant.png", "cat", "dog")
    assert found.classes == [0, 2, 2, 1]


def test_labels_from_folders_are_the_folder_that_holds_the_image(tmp_path):
    names = ["train/dog/x_1.png", "train/cat/dog_2.png", "val/dog/3.png", "loose.png"]
    for name in names:
        save(tmp_path / "data" / name)
    found = list_images(str(tmp_path / "data"), class_cond=True, labels_from="folder")
    assert found.class_names == ("cat", "data", "dog")
    by_path = dict(zip(found.paths, found.classes, strict=True))
    assert [by_path[str(tmp_path / "data" / name)] for name in names] == [2, 0, 2, 1]


def test_labels_from_folders_reach_the_batches(tmp_path):
    for name in ["b/0.png", "a/1.png", "b/2.png"]:
        save(tmp_path / name)
    _, cond = next(
        load_data(
            data_dir=str(tmp_path),
            batch_size=3,
            image_size=8,
            class_cond=True,
            deterministic=True,
            labels_from="folder",
            num_workers=0,
        )
    )
    assert cond["y"].tolist() == [0, 1, 1]


def test_without_class_cond_there_are_no_labels():
    data = load_data(data_dir=str(IMAGES), batch_size=2, image_size=8, num_workers=0)
    assert next(data)[1] == {}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data_dir": ""}, "--data_dir is missing"),
        ({"num_workers": -1}, "--num_workers -1"),
        ({"labels_from": "disk"}, "--labels_from disk: must be filename or folder"),
    ],
)
def test_impossible_options_are_named(changes, named):
    with pytest.raises(UserError, match=named):
        DataOptions(**{"data_dir": "x", **changes})


# -- reading one image


def test_a_wide_picture_is_cut_at_both_sides(tmp_path):
    pixels = save(tmp_path / "a.png", np.random.randint(0, 256, (8, 14, 3), dtype=np.uint8))
    np.testing.assert_array_equal(read_image(str(tmp_path / "a.png"), 8), pixels[:, 3:11])


def test_a_tall_picture_is_cut_above_and_below(tmp_path):
    pixels = save(tmp_path / "a.png", np.random.randint(0, 256, (13, 8, 3), dtype=np.uint8))
    np.testing.assert_array_equal(read_image(str(tmp_path / "a.png"), 8), pixels[2:10])


def test_height_comes_before_width(tmp_path):
    pixels = save(tmp_path / "a.png", np.random.randint(0, 256, (6, 11, 3), dtype=np.uint8))
    np.testing.assert_array_equal(read_image(str(tmp_path / "a.png"), (6, 10)), pixels[:, :10])
    assert read_image(str(tmp_path / "a.png"), (10, 6)).shape == (10, 6, 3)


@pytest.mark.parametrize("shape", [(40, 40), (33, 90), (90, 33), (5, 5), (16, 7)])
@pytest.mark.parametrize("size", [(8, 8), (8, 16), (12, 5)])
def test_a_plain_picture_covers_any_size(tmp_path, shape, size):
    """No black bar: every pixel of the result comes from the picture."""
    save(tmp_path / "a.png", np.full((*shape, 3), 77, dtype=np.uint8))
    pixels = read_image(str(tmp_path / "a.png"), size)
    assert pixels.shape == (*size, 3)
    assert (pixels == 77).all()


@pytest.mark.parametrize(
    ("shape", "size"), [((32, 32), (8, 8)), ((32, 64), (8, 16)), ((64, 16), (16, 4))]
)
def test_halving_averages_blocks(tmp_path, shape, size):
    """Twice halved by a box filter, and nothing left for the bicubic one."""
    pixels = np.random.randint(0, 256, (*shape, 3), dtype=np.uint8)
    save(tmp_path / "a.png", pixels)
    height, width = size
    expected = pixels.reshape(height, 4, width, 4, 3).mean(axis=(1, 3))
    result = read_image(str(tmp_path / "a.png"), size).astype(float)
    assert np.abs(result - expected).max() <= 2  # rounded up four times, by half a level at most


def test_grey_and_alpha_channels_come_of_any_picture(tmp_path):
    rgba = np.random.randint(0, 256, (8, 8, 4), dtype=np.uint8)
    save(tmp_path / "rgba.png", rgba)
    save(tmp_path / "rgb.png", rgba[..., :3].copy())
    save(tmp_path / "grey.png", rgba[..., 0].copy())

    def read(name, channels):
        return read_image(str(tmp_path / name), 8, channels)

    luma = np.array(Image.fromarray(rgba[..., :3].copy()).convert("L"))
    np.testing.assert_array_equal(read("rgb.png", 1)[..., 0], luma)
    np.testing.assert_array_equal(read("rgb.png", 3), rgba[..., :3])
    np.testing.assert_array_equal(read("rgb.png", 4)[..., :3], rgba[..., :3])
    assert (read("rgb.png", 4)[..., 3] == 255).all()
    np.testing.assert_array_equal(read("rgba.png", 4), rgba)
    np.testing.assert_array_equal(read("rgba.png", 3), rgba[..., :3])
    np.testing.assert_array_equal(read("rgba.png", 2)[..., 1], rgba[..., 3])
    np.testing.assert_array_equal(read("grey.png", 1), rgba[..., :1])
    np.testing.assert_array_equal(read("grey.png", 3), rgba[..., :1].repeat(3, axis=-1))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_batches_have_as_many_channels_as_asked_for(channels):
    data = load_data(
        data_dir=str(IMAGES), batch_size=3, image_size=(8, 12), channels=channels, num_workers=0
    )
    batch, _ = next(data)
    assert batch.shape == (3, channels, 8, 12)
    assert -1 <= batch.min() < batch.max() <= 1


@pytest.mark.parametrize("channels", [0, 5])
def test_other_numbers_of_channels_are_an_error(channels):
    with pytest.raises(UserError, match=f"--channels {channels}"):
        ImageDataset(8, ["a.png"], channels=channels)


def test_black_is_minus_one_and_white_is_one(tmp_path):
    save(tmp_path / "a.png", np.array([[0, 255]] * 2, dtype=np.uint8))
    image, cond = ImageDataset(2, [str(tmp_path / "a.png")], channels=1)[0]
    assert image.dtype == np.float32
    assert image.tolist() == [[[-1, 1], [-1, 1]]]
    assert cond == {}


def test_palette_pictures_are_resized_without_mixing_colours(tmp_path):
    """The published numbers depend on it: conversion to RGB comes after resizing."""
    image = Image.fromarray(np.array([[0, 1] * 8] * 16, dtype=np.uint8), mode=None)
    image = image.convert("L")
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode == "P"
    pixels = read_image(str(tmp_path / "a.png"), 8)
    assert {tuple(pixel) for pixel in pixels.reshape(-1, 3).tolist()} <= {(255, 0, 0), (0, 0, 255)}


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK"])
def test_every_colour_mode_can_be_resized_to_any_channels(tmp_path, mode):
    pixels = np.random.randint(0, 256, (40, 50, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image = image.convert("I").convert(mode) if mode == "I;16" else image.convert(mode)
    path = str(tmp_path / ("a.jpg" if mode == "CMYK" else "a.png"))
    image.save(path)
    for channels in (1, 2, 3, 4):
        result = read_image(path, 8, channels)
        assert (result.dtype, result.shape) == (np.uint8, (8, 8, channels))
        assert result.std() > 0


def test_rotation_in_exif_is_ignored(tmp_path):
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    pixels[:8] = 255
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees for display
    image.save(tmp_path / "a.jpg", exif=exif, quality=100)
    result = read_image(str(tmp_path / "a.jpg"), 16).astype(int)
    assert np.abs(result - pixels).max() <= 2 * JPEG_TOLERANCE


def test_shards_of_a_data_set_share_the_files():
    paths, classes = [f"{i}.png" for i in range(7)], list(range(7))
    shards = [ImageDataset(8, paths, classes, shard, num_shards=3) for shard in range(3)]
    assert [shard.local_images for shard in shards] == [paths[0::3], paths[1::3], paths[2::3]]
    assert [shard.local_classes for shard in shards] == [[0, 3, 6], [1, 4], [2, 5]]
    assert [len(shard) for shard in shards] == [3, 2, 2]


# -- files that are no images


def break_file(path, how):
    save(path)
    content = path.read_bytes()
    path.write_bytes(
        {
            "text": b"this is no image\nat all\n",
            "empty": b"",
            "cut": content[: len(content) // 2],
            "header": content[:20],
            "garbled": content[:60] + bytes(40) + content[100:],
        }[how]
    )


@pytest.fixture
def impatient(monkeypatch):
    """torch waits 5 s for a worker that reported an error, when its loader is thrown away."""
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1, raising=False)
    yield
    gc.collect()


@pytest.mark.parametrize("how", ["text", "empty", "cut", "header", "garbled"])
def test_a_broken_image_is_one_line_that_names_it(tmp_path, how):
    path = tmp_path / "bad_1.png"
    break_file(path, how)
    with pytest.raises(UserError) as error:
        read_image(str(path), 8)
    assert f"'{path}' cannot be read as an image" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_image_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.png' cannot be read"):
        read_image(str(tmp_path / "gone.png"), 8)


def test_a_picture_of_monstrous_size_is_named(tmp_path, monkeypatch):
    save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(UserError, match=r"bomb\.png' cannot be read"):
        read_image(str(tmp_path / "bomb.png"), 4)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_image_among_good_ones_is_named_whoever_reads_it(tmp_path, impatient, num_workers):
    shutil.copytree(IMAGES, tmp_path / "data")
    bad = tmp_path / "data" / "more" / "bat_9.png"
    break_file(bad, "cut")
    data = load_data(
        data_dir=str(tmp_path / "data"), batch_size=7, image_size=8, num_workers=num_workers
    )
    with pytest.raises(UserError) as error:
        next(data)
    assert str(error.value).startswith(f"'{bad}' cannot be read as an image: ")
    assert "\n" not in str(error.value)


# -- more than 8 bits


@pytest.fixture
def fresh_warning():
    pixels_module._warn_of_depth.cache_clear()
    yield
    pixels_module._warn_of_depth.cache_clear()


def test_16_bits_are_warned_of_once(tmp_path, caplog, fresh_warning):
    for name in ["a.png", "b.png"]:
        save(tmp_path / name, np.full((8, 8), 3000, dtype=np.uint16))
    with caplog.at_level(logging.WARNING, logger="improved_diffusion"):
        first = read_image(str(tmp_path / "a.png"), 8, 1)
        read_image(str(tmp_path / "b.png"), 8, 1)
    assert (first == 255).all()  # clipped to white, which is why
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "8 bits" in record.getMessage()


def test_8_bits_are_not_warned_of(tmp_path, caplog, fresh_warning):
    pixels = np.zeros((8, 8), dtype=np.uint8)
    for mode in ["1", "L", "LA", "P", "RGB", "RGBA"]:
        save(tmp_path / f"{mode}.png", pixels, mode=mode)
        read_image(str(tmp_path / f"{mode}.png"), 8)
    assert not caplog.records


# -- the order of batches


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def take(sampler, count):
    return list(itertools.islice(iter(sampler), count))


def stream(size, batch_size, seed, world_size, count):
    """The first ``count`` images of all processes together, global batch by global batch."""
    rounds = -(-count // (batch_size * world_size))
    by_rank = [
        take(GlobalBatchSampler(size, batch_size, seed, rank, world_size), rounds)
        for rank in range(world_size)
    ]
    return flat(flat(parts) for parts in zip(*by_rank, strict=True))[:count]


@pytest.mark.parametrize(("size", "batch_size", "world_size"), [(24, 3, 4), (23, 2, 3), (7, 7, 1)])
def test_each_image_comes_once_in_each_epoch_across_processes(size, batch_size, world_size):
    """Also where the images are no multiple of the global batch, which then straddles epochs."""
    images = stream(size, batch_size, 5, world_size, 5 * size)
    epochs = [images[start : start + size] for start in range(0, 5 * size, size)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(size))
    assert len({tuple(epoch) for epoch in epochs}) == 5


def test_epochs_and_processes_differ():
    ranks = [take(GlobalBatchSampler(64, 4, 1, rank, 2), 16) for rank in range(2)]
    (first, again), (second, _) = [(flat(rank[:8]), flat(rank[8:])) for rank in ranks]
    assert set(first).isdisjoint(second)
    assert first != again
    assert set(first) != set(again)  # not the same share in another order
    assert first != sorted(first)


def test_order_depends_on_the_seed_alone():
    first, same, other = (take(GlobalBatchSampler(20, 4, seed, 0, 1), 10) for seed in (3, 3, 4))
    np.random.seed(99)
    torch.manual_seed(99)
    assert first == same == take(GlobalBatchSampler(20, 4, 3, 0, 1), 10)
    assert first != other


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("world_size", [2, 4])
def test_global_batches_are_the_same_for_any_number_of_processes(seed, world_size):
    alone = take(GlobalBatchSampler(27, 8, seed, 0, 1), 9)
    ranks = [
        take(GlobalBatchSampler(27, 8 // world_size, seed, rank, world_size), 9)
        for rank in range(world_size)
    ]
    assert [flat(parts) for parts in zip(*ranks, strict=True)] == alone


@pytest.mark.parametrize("start", [0, 1, 4, 12, 13, 14, 40])
@pytest.mark.parametrize(("batch_size", "world_size"), [(3, 1), (3, 2), (2, 4), (13, 1)])
def test_start_passes_over_images_whatever_batch_and_processes(start, batch_size, world_size):
    """Also into the middle of a batch, and of a later epoch; there are 13 images."""
    whole = stream(13, 3, 5, 1, 90)
    parts = [
        take(GlobalBatchSampler(13, batch_size, 5, rank, world_size, start), 3)
        for rank in range(world_size)
    ]
    found = flat(flat(shares) for shares in zip(*parts, strict=True))
    assert found == whole[start : start + len(found)]


@pytest.mark.parametrize("seed", [None, 5])
def test_indices_at_a_position_are_those_of_the_batches(seed):
    """In any order of asking, as a report of an earlier batch does."""
    whole = stream(13, 4, seed, 1, 60)
    sampler = GlobalBatchSampler(13, 4, seed, 0, 1, 20)
    for first, count in [(0, 4), (30, 20), (11, 5), (12, 1), (0, 60), (7, 0)]:
        assert sampler.indices(first, count) == whole[first : first + count]


def test_without_a_seed_the_order_is_that_of_the_files():
    assert take(GlobalBatchSampler(5, 2, None, 0, 1), 4) == [[0, 1], [2, 3], [4, 0], [1, 2]]


@pytest.mark.parametrize(
    ("size", "batch_size", "world_size", "numbers"),
    [(9, 10, 1, ("9", "10")), (15, 4, 4, ("15", "16")), (3, 1, 4, ("3", "4"))],
)
def test_fewer_images_than_a_global_batch_is_an_error_with_both_numbers(
    size, batch_size, world_size, numbers
):
    with pytest.raises(UserError) as error:
        GlobalBatchSampler(size, batch_size, 0, 0, world_size)
    ours, needed = numbers
    assert f"{ours} images" in str(error.value)
    assert f"global batch of {needed}" in str(error.value)


def test_suggested_batch_size_works():
    with pytest.raises(UserError, match="--batch_size 3, or --global_batch 12"):
        GlobalBatchSampler(15, 4, 0, 0, 4)
    GlobalBatchSampler(15, 3, 0, 0, 4)


def test_images_that_fill_one_global_batch_exactly_are_enough():
    assert sorted(stream(16, 4, 0, 4, 16)) == list(range(16))


# -- batches


def test_batches_never_end(numbered):
    found, values = numbered
    data = load_data(
        data_dir="-",
        images=found,
        batch_size=4,
        image_size=4,
        class_cond=True,
        deterministic=True,
        channels=1,
        num_workers=0,
    )
    batches = list(itertools.islice(data, 7))
    for number, (batch, cond) in enumerate(batches):
        places = [place % 10 for place in range(4 * number, 4 * number + 4)]
        assert levels(batch)[:, 0, 0, 0].tolist() == [values[place] for place in places]
        assert cond["y"].tolist() == [found.classes[place] for place in places]


def numbers_seen(found, count, **arguments):
    data = load_data(
        data_dir="-",
        **{"images": found, "batch_size": 5, "image_size": 4, "channels": 1, "num_workers": 0}
        | arguments,
    )
    return [levels(batch)[:, 0, 0, 0].tolist() for batch, _ in itertools.islice(data, count)]


def test_order_is_shuffled_by_the_seed(numbered):
    found, values = numbered
    first, again = (numbers_seen(found, 4, seed=7) for _ in range(2))
    assert first == again
    assert first != numbers_seen(found, 4, seed=8)
    assert sorted(first[0] + first[1]) == sorted(first[2] + first[3]) == sorted(values)
    assert first[:2] != first[2:]
    assert first != numbers_seen(found, 4, deterministic=True)


def test_worker_processes_do_not_change_the_batches(numbered):
    found, _ = numbered
    assert numbers_seen(found, 5, seed=7) == numbers_seen(found, 5, seed=7, num_workers=2)


def test_without_a_seed_the_order_comes_from_torchs_global_generator(numbered):
    orders = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        orders.append(numbers_seen(numbered[0], 4))
    assert orders[0] == orders[1] != orders[2]


def test_each_process_gets_its_part_of_the_global_batch(numbered, place, monkeypatch):
    monkeypatch.setattr(dist_util, "broadcast_object", lambda value: value)
    alone = numbers_seen(numbered[0], 4, seed=7, batch_size=4)
    parts = []
    for rank in range(2):
        place(rank, 2)
        parts.append(numbers_seen(numbered[0], 4, seed=7, batch_size=2))
    assert [a + b for a, b in zip(*parts, strict=True)] == alone


def test_processes_agree_on_the_first_ones_seed(numbered, place, monkeypatch):
    """Each draws a seed of its own where none is given; all use one."""
    monkeypatch.setattr(dist_util, "broadcast_object", lambda value: 7)
    seen = []
    for rank in range(2):
        place(rank, 2)
        torch.manual_seed(rank)
        seen += numbers_seen(numbered[0], 1)[0]
    assert sorted(seen) == sorted(numbered[1])


def test_load_data_refuses_less_than_a_global_batch_before_reading(tmp_path, place):
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(b"")
    found = list_images(str(tmp_path))
    place(1, 3)
    with pytest.raises(UserError, match=r"5 images .* global batch of 6"):
        load_data(data_dir="", images=found, batch_size=2, image_size=8, deterministic=True)


# -- going on from any position


def make_stream(found, start=0, **changes):
    options = {"batch_size": 3, "image_size": 4, "channels": 1, "num_workers": 0, "seed": 7}
    return load_data(data_dir="-", images=found, start=start, **{**options, **changes})


def seen_in(data, count):
    return [levels(batch)[:, 0, 0, 0].tolist() for batch, _ in itertools.islice(data, count)]


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("batches", [0, 2, 3, 8])
def test_seeking_is_skipping(numbered, batches, num_workers):
    found, _ = numbered
    whole = make_stream(found)
    expected = seen_in(whole, 12)[batches : batches + 4]
    data = make_stream(found, num_workers=num_workers)
    next(data)
    data.seek(3 * batches)
    assert seen_in(data, 4) == expected
    assert seen_in(make_stream(found, start=3 * batches, num_workers=num_workers), 4) == expected


def test_seeking_back_ends_the_processes_that_read_ahead(numbered):
    data = make_stream(numbered[0], num_workers=1)
    for _ in range(3):
        first = seen_in(data, 1)
        assert len(multiprocessing.active_children()) == 1
        data.seek(0)
    assert multiprocessing.active_children() == []
    assert seen_in(data, 1) == first


def test_another_number_of_processes_continues_the_same_stream(numbered, place, monkeypatch):
    """Four batches of 2 on two processes, then batches of 3 on one, then of 1 on three."""
    monkeypatch.setattr(dist_util, "broadcast_object", lambda value: value)
    found, _ = numbered
    whole = flat(seen_in(make_stream(found, batch_size=1), 40))
    continued = []
    for world_size, batch_size, rounds in [(2, 2, 4), (1, 3, 3), (3, 1, 2)]:
        ranks = []
        for rank in range(world_size):
            place(rank, world_size)
            data = make_stream(found, batch_size=batch_size)
            data.seek(len(continued))
            ranks.append(seen_in(data, rounds))
        continued += flat(flat(parts) for parts in zip(*ranks, strict=True))
    assert continued == whole[: 16 + 9 + 6]


def test_files_at_a_position_are_those_of_the_batches(numbered, place, monkeypatch):
    monkeypatch.setattr(dist_util, "broadcast_object", lambda value: value)
    found, values = numbered
    place(1, 2)
    data = make_stream(found)
    batches = seen_in(data, 4)
    for number, batch in enumerate(batches):
        files = data.files(6 * number + 3, 3)  # of the second process
        assert [values[found.paths.index(file)] for file in files] == batch
    assert seen_in(data, 1)[0] != batches[-1]  # asking for files does not move the stream


def test_batches_are_changed_by_a_function_from_now_on(numbered):
    found, _ = numbered
    plain = make_stream(found)
    expected = [next(plain) for _ in range(3)]
    data = make_stream(found)
    assert torch.equal(next(data)[0], expected[0][0])
    assert data.map(lambda batch: (-batch[0], {**batch[1], "extra": 1})) is data
    batch, cond = next(data)
    assert torch.equal(batch, -expected[1][0])
    assert cond["extra"] == 1
    data.seek(6)
    assert torch.equal(next(data)[0], -expected[2][0])  # also after a seek


def test_streams_are_seekable_and_generators_are_not(numbered):
    assert isinstance(make_stream(numbered[0]), Seekable)
    assert not isinstance(iter([]), Seekable)


READING = """
import os, signal, sys
from improved_diffusion.dist_util import run_main
from improved_diffusion.image_datasets import load_data

def main():
    data = load_data(
        data_dir=sys.argv[1], batch_size=5, image_size=4, channels=1, deterministic=True
    )
    next(data)
    if sys.argv[2] == "signal":  # sent to all processes, as Slurm does
        signal.signal(signal.SIGTERM, lambda *_: None)
        os.killpg(0, signal.SIGTERM)
        for _ in range(10):
            next(data)
    elif sys.argv[2] == "error":
        raise RuntimeError("a defect of ours")
    elif sys.argv[2] == "broken":
        for _ in range(10):
            next(data)
    print("done", flush=True)

run_main(main)
"""


@pytest.mark.parametrize(
    ("how", "code"), [("plain", 0), ("signal", 0), ("error", 1), ("broken", 2)]
)
def test_readers_outlive_signals_but_not_the_run(numbered, tmp_path, how, code):
    if how == "broken":
        break_file(tmp_path / "2_8.png", "text")
    done = subprocess.run(
        [sys.executable, "-c", READING, str(tmp_path), how],
        capture_output=True,
        text=True,
        timeout=60,
        start_new_session=True,
        env=environment(),
    )
    assert done.returncode == code, done.stderr
    assert (done.stdout == "done\n") == (code == 0)


# -- what crosses from the workers to the training process


@pytest.mark.parametrize("num_workers", [0, 1])
def test_workers_send_bytes(numbered, num_workers):
    dataset = open_dataset(numbered[0], 4, channels=1)
    ((pixels, cond),) = raw_batches(dataset, [[(3, 0), (1, 0)]], num_workers)
    assert (pixels.dtype, pixels.shape) == (torch.uint8, (2, 4, 4, 1))
    assert pixels[:, 0, 0, 0].tolist() == [numbered[1][3], numbered[1][1]]
    assert cond["y"].tolist() == [numbered[0].classes[3], numbered[0].classes[1]]


@pytest.mark.parametrize("device", [None, "cpu", torch.device("cpu")])
def test_batches_are_normalised_as_ever_to_the_bit(device):
    """By the same operations in the same order as in the first release."""
    flags = {"batch_size": 6, "image_size": (8, 12), "deterministic": True, "num_workers": 0}
    batch, _ = next(load_data(data_dir=str(IMAGES), device=device, **flags))
    pixels = [read_image(path, (8, 12)) for path in list_images(str(IMAGES)).paths]
    expected = np.stack([p.astype(np.float32) / 127.5 - 1 for p in pixels]).transpose(0, 3, 1, 2)
    assert batch.is_contiguous()
    assert batch.numpy().tobytes() == np.ascontiguousarray(expected).tobytes()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_are_normalised_on_the_device_to_the_bit():
    flags = {"batch_size": 6, "image_size": (8, 12), "deterministic": True, "class_cond": True}
    ours, cond = next(load_data(data_dir=str(IMAGES), device="cuda", **flags))
    theirs, expected = next(load_data(data_dir=str(IMAGES), **flags))
    assert ours.device.type == cond["y"].device.type == "cuda"
    assert torch.equal(ours.cpu(), theirs)
    assert torch.equal(cond["y"].cpu(), expected["y"])


def test_more_workers_than_cpus_are_warned_of_in_one_line(numbered, caplog, monkeypatch, recwarn):
    image_stream._warn_of_workers.cache_clear()
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    with caplog.at_level(logging.WARNING, logger="improved_diffusion"):
        for num_workers in (1, 2, 2):
            next(make_stream(numbered[0], num_workers=num_workers))
    (record,) = caplog.records
    assert record.getMessage().startswith("--num_workers 2: the process has 1 CPU")
    assert not recwarn.list


def test_a_plain_loader_of_the_data_set_gives_its_items(numbered):
    """Research code wraps it in a DataLoader of its own."""
    dataset = ImageDataset(4, numbered[0].paths, numbered[0].classes, channels=1)
    batch, cond = next(iter(torch.utils.data.DataLoader(dataset, batch_size=5)))
    assert (batch.dtype, batch.shape) == (torch.float32, (5, 1, 4, 4))
    assert levels(batch)[:, 0, 0, 0].tolist() == numbered[1][:5]
    assert cond["y"].tolist() == numbered[0].classes[:5]


# -- each image once


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(("num_images", "batch_size"), [(10, 2), (7, 3), (99, 4), (1, 5)])
def test_each_image_comes_once(numbered, place, world_size, num_images, batch_size):
    found, values = numbered
    by_rank = []
    for rank in range(world_size):
        place(rank, world_size)
        rounds = list(load_once(found, num_images, batch_size, 4, channels=1, num_workers=0))
        for batch, cond, indices in rounds:
            assert batch.shape == (len(indices), 1, 4, 4)
            assert len(indices) <= batch_size
            assert levels(batch)[:, 0, 0, 0].tolist() == [values[i] for i in indices]
            if indices:
                assert cond["y"].tolist() == [found.classes[i] for i in indices]
        by_rank.append([indices for _, _, indices in rounds])
    assert len({len(rounds) for rounds in by_rank}) == 1  # so that no collective waits for ever
    seen = [i for rounds in zip(*by_rank, strict=True) for share in rounds for i in share]
    assert seen == list(range(min(num_images, 10)))


def test_a_process_without_a_share_gets_an_empty_batch(numbered, place):
    place(2, 3)
    ((batch, cond, indices),) = load_once(numbered[0], 4, 2, (4, 4), channels=1, num_workers=0)
    assert (batch.shape, cond, indices) == ((0, 1, 4, 4), {}, [])


def test_load_once_works_with_workers_and_without_labels(numbered):
    found = ImageList(numbered[0].paths)
    rounds = list(load_once(found, 5, 3, 4, channels=1, num_workers=1))
    assert [indices for _, _, indices in rounds] == [[0, 1, 2], [3, 4]]
    assert [cond for _, cond, _ in rounds] == [{}, {}]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_load_once_names_a_broken_image(numbered, tmp_path, impatient, num_workers):
    broken = tmp_path / "2_5.png"
    break_file(broken, "text")
    with pytest.raises(UserError) as error:
        list(load_once(numbered[0], 10, 3, 4, channels=1, num_workers=num_workers))
    assert str(error.value).startswith(f"'{broken}' cannot be read as an image: ")
