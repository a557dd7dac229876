"""Packed sets: the pixels of the folder, found whole or not taken."""

import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from documents import run_blocks
from golden_data import GOLDEN
from launchers import environment, start
from PIL import Image
from script_runner import (
    ROOT,
    TINY,
    command_line,
    error_of,
    load_module,
    script_environment,
    script_path,
    succeed,
    tree,
)

from improved_diffusion import packed, runs
from improved_diffusion.base_samples import load_base_samples
from improved_diffusion.errors import UserError
from improved_diffusion.image_datasets import (
    ImageDataset,
    PackedDataset,
    list_images,
    load_data,
    load_once,
    open_dataset,
)
from improved_diffusion.validation import hold_out, spread_out


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def pack(folder, out, **flags):
    """What datasets/pack.py makes of a folder."""
    words = command_line(folder, out, {"num_workers": 0, **flags})
    load_module("datasets", "pack").main(words)
    return out


def pack_by_itself(*words):
    return subprocess.run(
        [sys.executable, str(ROOT / "datasets" / "pack.py"), *map(str, words)],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(),
    )


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Pictures of all kinds and colour modes, larger and smaller than packed."""
    folder = tmp_path_factory.mktemp("pictures") / "data"
    shutil.copytree(GOLDEN / "images", folder)
    rng = np.random.default_rng(3)
    for mode, name in [
        ("RGB", "ant_1.jpg"),
        ("CMYK", "ant_2.jpeg"),
        ("P", "sub/bee_1.gif"),
        ("RGBA", "sub/bee_2.png"),
        ("LA", "sub/deep/bee_3.png"),
        ("L", "ant_4.bmp"),
        ("RGB", "cow_5.webp"),
    ]:
        pixels = rng.integers(0, 256, (rng.integers(10, 60), 37, 4), dtype=np.uint8)
        image = Image.fromarray(pixels)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (image if mode == "RGBA" else image.convert("RGB").convert(mode)).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def digits_pack(tmp_path_factory, digits_dir):
    """The digits, packed; do not write to it."""
    return pack(digits_dir, tmp_path_factory.mktemp("packed") / "set", image_size=8, channels=1)


@pytest.fixture
def digits_copy(digits_pack, tmp_path):
    shutil.copytree(digits_pack, tmp_path / "set")
    (tmp_path / "set" / packed.VERIFIED).unlink(missing_ok=True)
    return tmp_path / "set"


def pixels_of(folder, size, channels=3, **changes):
    images = list_images(str(folder), **changes)
    dataset = open_dataset(images, size, channels=channels)
    return dataset.read(range(len(dataset)))


def batches_of(folder, count, **changes):
    """The first batches of the digits in a folder or packed set."""
    options = {"batch_size": 7, "image_size": 8, "channels": 1, "num_workers": 0, "seed": 3}
    data = load_data(data_dir=str(folder), **{**options, **changes})
    return [next(data) for _ in range(count)]


def assert_same(ours, theirs):
    for (images, cond), (expected, expected_cond) in zip(ours, theirs, strict=True):
        assert torch.equal(images, expected)
        assert cond.keys() == expected_cond.keys()
        assert all(torch.equal(cond[name], expected_cond[name]) for name in cond)


# -- pixels


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("size", ["16", "24x8"])
def test_pixels_are_those_of_the_folder_to_the_bit(pictures, tmp_path, size, channels):
    out = pack(pictures, tmp_path / "out", image_size=size, channels=channels)
    size = tuple(map(int, size.split("x"))) if "x" in size else int(size)
    expected = pixels_of(pictures, size, channels)
    assert expected.std() > 10
    found = pixels_of(out, size, channels)
    assert found.dtype == expected.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)


def test_shards_are_plain_arrays_in_the_order_of_the_files(pictures, tmp_path):
    out = pack(pictures, tmp_path / "out", image_size=8)
    paths = list_images(str(pictures)).paths
    shard = np.load(out / "packed_00000.npy", allow_pickle=False)
    np.testing.assert_array_equal(shard, ImageDataset(8, paths).read(range(len(paths))))
    names = json.loads((out / packed.NAMES).read_text())
    assert names == [os.path.relpath(path, pictures) for path in paths]


@pytest.mark.parametrize("value_range", ["0,4095", "-5.5,7"])
def test_values_are_those_of_the_folder_to_the_bit(tmp_path, value_range):
    low, high = map(float, value_range.split(","))
    (tmp_path / "data").mkdir()
    rng = np.random.default_rng(0)
    for i in range(5):
        values = rng.uniform(low, high, (9, 14, 2))
        values = values.astype(np.uint16 if low == 0 else np.float32)
        np.save(tmp_path / "data" / f"{i % 2}_{i}.npy", values)
    flags = {"image_size": 8, "channels": 2, "value_range": (low, high), "num_workers": 0}
    out = tmp_path / "out"
    load_module("datasets", "pack").main(
        [
            *command_line(tmp_path / "data", out, {"image_size": 8, "channels": 2}),
            f"--value_range={value_range}",
        ]
    )
    ours, theirs = (
        next(load_data(data_dir=str(folder), batch_size=5, class_cond=True, seed=1, **flags))
        for folder in (out, tmp_path / "data")
    )
    assert_same([ours], [theirs])
    shard = np.load(out / "packed_00000.npy")
    assert shard.dtype == (np.uint16 if low == 0 else np.float32)


def test_types_that_do_not_fit_together_are_named(tmp_path):
    (tmp_path / "data").mkdir()
    np.save(tmp_path / "data" / "a.npy", np.zeros((8, 8), np.uint16))
    np.save(tmp_path / "data" / "b.npy", np.full((8, 8), 0.5, np.float32))
    with pytest.raises(UserError, match=r"'b\.npy' holds float32, but 'a\.npy' uint16"):
        pack(tmp_path / "data", tmp_path / "o", image_size=8, channels=1, value_range="0,1")


@pytest.mark.parametrize("shard_bytes", [1, 64, 65, 300, 10**9])
def test_any_rows_of_any_shards_come_in_the_order_asked_for(tmp_path, shard_bytes):
    pixels = np.random.randint(0, 256, (23, 4, 8, 2), dtype=np.uint8)  # 64 bytes each
    names = [f"{i:02d}.png" for i in range(23)]
    parts = [pixels[:5], pixels[5:6], pixels[6:]]
    made = packed.write_packed(str(tmp_path / "o"), parts, names, root="x", shard_bytes=shard_bytes)
    shards = len(list((tmp_path / "o").glob("packed_0*.npy")))
    assert shards == {1: 23, 64: 23, 65: 23, 300: 6, 10**9: 1}[shard_bytes]
    opened = packed.PackedPixels(packed.open_packed(str(tmp_path / "o")))
    assert opened.packed == made
    for rows in ([0], [22], list(range(23)), [22, 0, 11, 11, 4, 5, 3], [7, 6]):
        np.testing.assert_array_equal(opened.read(rows), pixels[rows])


def test_the_most_shards_are_not_exceeded(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "MOST_SHARDS", 4)
    pixels = np.zeros((23, 4, 4, 1), dtype=np.uint8)
    names = [f"{i}.png" for i in range(23)]
    made = packed.write_packed(str(tmp_path / "o"), [pixels], names, root="x", shard_bytes=1)
    assert made.index.shards == (6, 6, 6, 5)


# -- in place of the folder


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_are_those_of_the_folder(digits_dir, digits_pack, num_workers):
    flags = {"class_cond": True, "num_workers": num_workers, "random_flip": True}
    ours, theirs = (batches_of(folder, 20, **flags) for folder in (digits_pack, digits_dir))
    assert ours[0][0].dtype == torch.float32
    assert_same(ours, theirs)


def test_seeking_goes_on_as_the_folder_does(digits_dir, digits_pack):
    whole = batches_of(digits_dir, 12, random_flip=True)
    data = load_data(
        data_dir=str(digits_pack),
        batch_size=7,
        image_size=8,
        channels=1,
        seed=3,
        random_flip=True,
        start=21,
    )
    assert_same([next(data) for _ in range(2)], whole[3:5])
    data.seek(63)
    assert_same([next(data) for _ in range(3)], whole[9:])
    names = [os.path.basename(path) for path in list_images(str(digits_dir)).paths]
    assert set(data.files(0, 60)) == set(names)


def test_items_are_those_of_the_folder(digits_dir, digits_pack):
    ours, theirs = (
        open_dataset(list_images(str(folder), class_cond=True), 8, channels=1)
        for folder in (digits_pack, digits_dir)
    )
    assert isinstance(ours, PackedDataset)
    assert len(ours) == len(theirs) == 60
    image, cond = ours[17]
    expected, expected_cond = theirs[17]
    assert (image.dtype, image.shape) == (np.float32, (1, 8, 8))
    np.testing.assert_array_equal(image, expected)
    assert cond == expected_cond
    assert cond["y"].dtype == np.int64


@pytest.mark.parametrize("world_size", [1, 2])
def test_once_and_held_out_images_are_those_of_the_folder(digits_dir, digits_pack, world_size):
    lists = [list_images(str(f), class_cond=True) for f in (digits_pack, digits_dir)]
    held = [[hold_out(images, 0.3)[part] for images in lists] for part in (0, 1)]
    for ours, theirs in [lists, *held, [spread_out(images, 9) for images in lists]]:
        assert [os.path.basename(path) for path in theirs.paths] == ours.paths
        assert (ours.classes, ours.class_names) == (theirs.classes, theirs.class_names)
        rounds = [list(load_once(i, 50, 4, 8, channels=1, num_workers=0)) for i in (ours, theirs)]
        assert [indices for *_, indices in rounds[0]] == [indices for *_, indices in rounds[1]]
        assert_same([r[:2] for r in rounds[0]], [r[:2] for r in rounds[1]])


def test_pickled_data_sets_are_small_and_whole(digits_pack):
    """They go to the workers where processes are spawned."""
    dataset = open_dataset(list_images(str(digits_pack)), 8, channels=1)
    before = dataset.read([3, 59])
    content = pickle.dumps(dataset)
    assert len(content) < 4000  # 60 images have 3840 bytes and as many in names
    np.testing.assert_array_equal(pickle.loads(content).read([3, 59]), before)


def test_base_samples_are_those_of_the_folder(digits_dir, digits_pack):
    ours, theirs = (
        load_base_samples(
            str(folder), 8, 1, want_labels=True, class_names="0123456789", num_classes=10
        )
        for folder in (digits_pack, digits_dir)
    )
    assert torch.equal(ours.images, theirs.images)
    assert torch.equal(ours.labels, theirs.labels)


# -- labels


@pytest.mark.parametrize("asked", ["filename", "folder"])
@pytest.mark.parametrize("packed_with", ["filename", "folder"])
def test_labels_are_those_of_the_folder_whatever_it_was_packed_with(
    pictures, tmp_path, packed_with, asked
):
    out = pack(pictures, tmp_path / "out", image_size=8, labels_from=packed_with)
    ours, theirs = (list_images(str(f), True, asked) for f in (out, pictures))
    assert (ours.classes, ours.class_names) == (theirs.classes, theirs.class_names)
    assert len(ours.class_names) > 2


def test_names_without_classes_pack_without_labels(digits_dir, tmp_path):
    (tmp_path / "data").mkdir()
    for i, name in enumerate(sorted(os.listdir(digits_dir))[:4]):
        shutil.copy(digits_dir / name, tmp_path / "data" / f"{i}.png")
    out = pack(tmp_path / "data", tmp_path / "out", image_size=8)
    assert not (out / packed.LABELS).exists()
    assert packed.open_packed(str(out)).index.class_names == ()
    ours, theirs = (list_images(str(f), True) for f in (out, tmp_path / "data"))
    assert (ours.classes, ours.class_names) == (theirs.classes, theirs.class_names)


def test_classes_of_a_checkpoint_are_compared_and_applied(digits_pack):
    images = list_images(str(digits_pack), class_cond=True)
    with pytest.raises(UserError, match="10 classes are not the 11"):
        runs.check_class_names(
            {"class_names": [*images.class_names, "x"], "num_classes": 11}, images
        )
    relabelled = runs.relabel(images, ["x", *images.class_names])
    _, cond = next(
        load_data(
            data_dir="-", images=relabelled, batch_size=60, image_size=8, channels=1, num_workers=0
        )
    )
    assert sorted(cond["y"].tolist()) == sorted(label + 1 for label in images.classes)


# -- other pixels than asked for


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": 16}, ["at size 8", "--image_size 16", "--image_size 8"]),
        ({"image_size": (8, 16)}, ["at size 8", "--image_size 8x16"]),
        ({"image_size": 16, "size_flag": "large_size"}, ["--large_size 16", "--large_size 8"]),
        ({"channels": 3}, ["--channels 1", "--channels 3"]),
        ({"value_range": (0.0, 65535.0)}, ["--value_range ''", "--value_range 0,65535"]),
        ({"random_crop": True}, ["--random_crop True", "final pixels"]),
    ],
)
def test_a_set_of_other_pixels_is_named_with_both_values(digits_pack, changes, words):
    with pytest.raises(UserError) as error:
        batches_of(digits_pack, 1, **changes)
    for word in [str(digits_pack), *words]:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


# -- damage


def flip_byte(path, where=-1):
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)


def edit_index(folder, **changes):
    stored = json.loads((folder / packed.INDEX).read_text())
    (folder / packed.INDEX).write_text(json.dumps({**stored, **changes}))


def damage(folder, how):
    """Damage a packed set; the name of the file that the error must tell, and words."""
    shard, index = folder / "packed_00000.npy", folder / packed.INDEX
    if how == "byte":
        flip_byte(shard, 2000)
    elif how == "header":
        flip_byte(shard, 20)
    elif how == "label":
        flip_byte(folder / packed.LABELS)
    elif how == "name":
        flip_byte(folder / packed.NAMES, 5)
    elif how == "cut shard":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif how == "no shard":
        shard.unlink()
    elif how == "no names":
        (folder / packed.NAMES).unlink()
    elif how == "no index":
        index.unlink()
    elif how == "cut index":
        index.write_bytes(index.read_bytes()[:-20])
    elif how == "empty index":
        index.write_bytes(b"")
    elif how == "index":
        index.write_text(
            index.read_text().replace('"image_size": [\n   8', '"image_size": [\n   9')
        )
    elif how == "other index":
        index.write_text("[]")
    elif how == "newer":
        edit_index(folder, version=99)


DAMAGES = {
    "byte": ["packed_00000.npy", "checksum"],
    "header": ["packed_00000.npy", "checksum"],
    "label": ["packed_labels.npy", "checksum"],
    "name": ["packed_names.json", "checksum"],
    "cut shard": ["packed_00000.npy", "3,967 bytes instead of 3,968"],
    "no shard": ["packed_00000.npy", "missing"],
    "no names": ["packed_names.json", "missing"],
    "no index": ["packed_index.json", "cut off", "pack.py"],
    "cut index": ["packed_index.json", "damaged"],
    "empty index": ["packed_index.json", "damaged"],
    "index": ["packed_index.json", "damaged"],
    "other index": ["packed_index.json", "damaged"],
    "newer": ["packed_index.json", "version 99", "update"],
}


@pytest.mark.parametrize("used_before", [False, True])
@pytest.mark.parametrize("how", DAMAGES)
def test_damage_is_found_before_the_first_batch(digits_copy, how, used_before):
    if used_before:
        list_images(str(digits_copy))
        assert (digits_copy / packed.VERIFIED).exists()
    damage(digits_copy, how)
    with pytest.raises(UserError) as error:
        load_data(data_dir=str(digits_copy), batch_size=2, image_size=8, channels=1)
    for word in DAMAGES[how]:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_a_set_that_is_whole_is_hashed_once(digits_copy, monkeypatch):
    hashed = []
    sha256 = packed._sha256
    monkeypatch.setattr(packed, "_sha256", lambda path: hashed.append(path) or sha256(path))
    list_images(str(digits_copy))
    assert len(hashed) == 3
    list_images(str(digits_copy))
    assert len(hashed) == 3
    os.utime(digits_copy / packed.NAMES)
    list_images(str(digits_copy))
    assert [os.path.basename(path) for path in hashed[3:]] == [packed.NAMES]
    shutil.copytree(digits_copy, digits_copy.parent / "copy")  # keeps the times of writing
    list_images(str(digits_copy.parent / "copy"))
    assert len(hashed) == 7


def test_where_the_set_cannot_be_written_to_the_cache_notes_it(digits_copy, monkeypatch):
    hashed = []
    sha256, write_file = packed._sha256, packed.write_file

    def refuse(path, data):
        if path.startswith(str(digits_copy)):
            raise PermissionError(13, "Permission denied", path)
        write_file(path, data)

    monkeypatch.setattr(packed, "_sha256", lambda path: hashed.append(path) or sha256(path))
    monkeypatch.setattr(packed, "write_file", refuse)
    list_images(str(digits_copy))
    list_images(str(digits_copy))
    assert len(hashed) == 3
    assert not (digits_copy / packed.VERIFIED).exists()


def test_damage_that_leaves_no_trace_is_found_by_check(digits_copy):
    """As of a disk that goes bad: neither size nor times change."""
    list_images(str(digits_copy))
    notes = json.loads((digits_copy / packed.VERIFIED).read_text())
    flip_byte(digits_copy / "packed_00000.npy")
    stat = os.stat(digits_copy / "packed_00000.npy")
    notes["packed_00000.npy"][2:] = [stat.st_mtime_ns, stat.st_ctime_ns]
    (digits_copy / packed.VERIFIED).write_text(json.dumps(notes))
    list_images(str(digits_copy))
    done = pack_by_itself("--check", digits_copy)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "packed_00000.npy' is damaged" in done.stderr


def test_a_process_that_does_not_see_the_set_names_the_file(digits_copy):
    """The first process checks the set; on another machine it may be missing."""
    images = list_images(str(digits_copy))
    (digits_copy / "packed_00000.npy").unlink()
    with pytest.raises(UserError, match=r"packed_00000\.npy' is missing"):
        open_dataset(images, 8, channels=1)


# -- packing


@pytest.mark.slow
def test_the_script_tells_what_it_did(digits_dir, tmp_path):
    done = pack_by_itself(digits_dir, tmp_path / "out", "--image_size", 8, "--channels", 1)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"packed 60 images of 10 classes in {tmp_path / 'out'}\n"
    assert "60/60" in done.stderr
    done = pack_by_itself("--check", tmp_path / "out")
    assert "60 images" in done.stdout
    assert "all checksums are right" in done.stdout


def test_packing_again_gives_the_same_bytes(digits_dir, digits_pack, tmp_path):
    out = pack(digits_dir, tmp_path / "out", image_size=8, channels=1, num_workers=2)
    (digits_pack / packed.VERIFIED).unlink(missing_ok=True)
    assert tree(out) == tree(digits_pack)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_picture_is_named_and_leaves_no_set(digits_dir, tmp_path, num_workers):
    shutil.copytree(digits_dir, tmp_path / "data")
    broken = sorted((tmp_path / "data").iterdir())[-1]
    broken.write_bytes(b"no picture")
    words = [tmp_path / "data", tmp_path / "out", "--image_size", 8, "--channels", 1]
    done = pack_by_itself(*words, "--num_workers", num_workers)
    assert done.returncode == 2
    assert f"'{broken}' cannot be read as an image" in done.stderr.splitlines()[-1]
    with pytest.raises(UserError, match="no images"):
        list_images(str(tmp_path / "out"))
    broken.unlink()
    done = pack_by_itself(*words)  # the same command again
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(
        pixels_of(tmp_path / "out", 8, 1), pixels_of(tmp_path / "data", 8, 1)
    )


KILLED = """
import os, signal, sys
import numpy as np
from improved_diffusion import packed

def batches():
    for i in range(30):
        if i == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        yield np.full((1, 4, 4, 1), i, np.uint8)

names = [f"{i}.png" for i in range(30)]
packed.write_packed(sys.argv[1], batches(), names, root="", shard_bytes=64)
"""


def test_a_set_whose_packing_was_killed_is_none(tmp_path):
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, str(out)], env=environment())
    assert done.returncode == -9
    assert (out / "packed_00000.npy").exists()
    with pytest.raises(UserError, match="cut off"):
        list_images(str(out))
    pixels = np.zeros((2, 4, 4, 1), np.uint8)
    packed.write_packed(str(out), [pixels], ["a.png", "b.png"], root="")
    assert sorted(os.listdir(out)) == [packed.FIRST_SHARD, packed.INDEX, packed.NAMES]
    assert list_images(str(out)).paths == ["a.png", "b.png"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["DATA"], "OUT is missing"),
        (["DATA", "OUT"], "--image_size is missing"),
        (["DATA", "OUT", "--image_size", "8", "--num_workers", "-1"], "--num_workers -1"),
        (["DATA", "OUT", "--image_size", "8", "--channels", "5"], "--channels 5"),
        (["DATA", "OUT", "--image_size", "8", "--value_range", "3"], "--value_range 3"),
        (["GONE", "OUT", "--image_size", "8"], "GONE' is no folder"),
        (["SET", "OUT", "--image_size", "8"], "is a packed set already"),
        (["DATA", "SET", "--image_size", "8"], "holds a packed set already"),
        (["DATA", "DATA", "--image_size", "8"], "holds other files"),
        (["--check", "GONE"], "GONE' is no folder"),
        (["--check", "DATA"], "packed_index.json"),
    ],
)
def test_mistakes_in_packing_are_one_line(digits_dir, digits_pack, tmp_path, capsys, words, named):
    places = {"DATA": digits_dir, "SET": digits_pack, "OUT": tmp_path / "OUT"}
    places["GONE"] = tmp_path / "GONE"
    script = load_module("datasets", "pack")
    with pytest.raises(SystemExit) as stopped:
        load_module("datasets", "_common").run(script.main, [str(places.get(w, w)) for w in words])
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert named in err
    assert not (tmp_path / "OUT").exists()


def test_a_folder_with_a_file_of_the_same_kind_of_name_stays_a_folder(digits_dir, tmp_path):
    shutil.copytree(digits_dir, tmp_path / "data")
    (tmp_path / "data" / "index.json").write_text("{}")
    assert list_images(str(tmp_path / "data")).packed is None


# -- through the scripts


TRAINING = {**TINY, "batch_size": 4, "class_cond": True, "save_interval": 2, "log_interval": 1}


def losses(folder):
    with open(folder / "progress.json") as file:
        rows = [json.loads(line) for line in file]
    return [(row["loss"], row.get("val_loss")) for row in rows]


@pytest.mark.slow
def test_training_on_a_packed_set_is_training_on_the_folder(
    digits_dir, digits_copy, tmp_path, run_script
):
    """With validation, previews and flips; stopped and continued."""
    flags = {**TRAINING, "random_flip": True, "val_fraction": 0.2, "val_interval": 2}
    flags |= {"sample_interval": 3, "ema_rate": 0.9, "save_interval": 10}
    for name, data_dir in (("ours", digits_copy), ("theirs", digits_dir)):
        for steps in (2, 4) if name == "ours" else (4,):
            here = {"data_dir": data_dir, "log_dir": name, "train_steps": steps}
            done = succeed(run_script("image_train", flags, here, cwd=tmp_path))
    assert "12 for validation" in done.stdout
    assert losses(tmp_path / "ours") == losses(tmp_path / "theirs")
    weights = [
        torch.load(tmp_path / name / "model000004.pt", weights_only=True)
        for name in ("ours", "theirs")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert (tmp_path / "ours" / "preview_000003.png").read_bytes() == (
        tmp_path / "theirs" / "preview_000003.png"
    ).read_bytes()


def test_the_bound_of_a_packed_set_is_that_of_the_folder(
    digits_dir, digits_pack, tmp_path, run_script, trained
):
    flags = {"model_path": trained.path, "num_samples": 5, "batch_size": 2}
    flags |= {"timestep_respacing": "3"}
    lines = [
        succeed(
            run_script("image_nll", flags, data_dir=folder, log_dir=name, cwd=tmp_path)
        ).stdout.splitlines()[-1]
        for name, folder in (("a", digits_dir), ("b", digits_pack))
    ]
    assert "bpd=" in lines[0]
    assert lines[0] == lines[1]


def test_super_resolution_trains_on_a_packed_set(digits_pack, tmp_path, run_script):
    flags = {name: value for name, value in TRAINING.items() if name != "image_size"}
    flags |= {"large_size": 8, "small_size": 4, "lr_anneal_steps": 1, "log_dir": "run"}
    flags |= {"sample_interval": 1, "val_fraction": 0.2, "val_interval": 1}
    succeed(run_script("super_res_train", flags, data_dir=digits_pack, cwd=tmp_path))


@pytest.mark.parametrize("script", ["image_train", "image_nll", "super_res_train"])
@pytest.mark.parametrize("how", ["byte", "size"])
def test_mistakes_with_packed_sets_leave_no_run(
    digits_copy, tmp_path, run_script, trained, script, how
):
    if how == "byte":
        damage(digits_copy, "byte")
    flags = {"data_dir": "set", "log_dir": "run"}
    size = 16 if how == "size" else 8
    if script == "image_train":
        flags |= {**TINY, "image_size": size}
    elif script == "super_res_train":
        flags |= {**TINY, "large_size": size, "small_size": 4}
        del flags["image_size"]
    else:
        flags |= {"model_path": trained.path}
        if how == "size":
            shutil.rmtree(digits_copy)
            data = tmp_path / "large"
            data.mkdir()
            Image.new("L", (16, 16)).save(data / "0_0.png")
            pack(data, digits_copy, image_size=16, channels=1)
    line = error_of(run_script(script, flags, cwd=tmp_path))
    assert "set" in line
    assert ("checksum" if how == "byte" else "is packed at size") in line
    assert not (tmp_path / "run").exists()


def test_classes_that_changed_since_the_checkpoint(digits_dir, trained, tmp_path, run_script):
    (tmp_path / "few").mkdir()
    for name in ("1_0001.png", "1_0011.png", "3_0003.png"):
        shutil.copy(digits_dir / name, tmp_path / "few")
    pack(tmp_path / "few", tmp_path / "set", image_size=8, channels=1)
    shutil.copytree(trained.folder, tmp_path / "run")
    flags = {**TINY, "data_dir": "set", "log_dir": "run", "class_cond": True, "train_steps": 20}
    line = error_of(run_script("image_train", flags, cwd=tmp_path))
    assert "the data's 2 classes are not the 10 that the checkpoint was trained on" in line


def test_validation_on_a_packed_set_of_another_size(digits_dir, digits_pack, tmp_path, run_script):
    flags = {**TINY, "image_size": 16, "data_dir": digits_dir, "log_dir": "run"}
    flags |= {"val_data_dir": digits_pack}
    line = error_of(run_script("image_train", flags, cwd=tmp_path))
    assert "at size 8, which --image_size 16 contradicts" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_commands_of_the_page_run(tmp_path):
    page = (ROOT / "docs" / "data.md").read_text()
    section = page.split("## Packed sets")[1].split("\n## ")[0]
    done = run_blocks(section, tmp_path, ["sh", "sh"])
    assert "all checksums are right" in done[-1].stdout
    assert (tmp_path / "runs" / "packed" / "model000002.pt").exists()


def on_two(launcher, cwd, **flags):
    words = command_line({**TRAINING, "log_dir": "run", **flags})
    return start(launcher, script_path("image_train"), *words, cwd=cwd, env=script_environment())


@pytest.mark.parametrize("launcher", [pytest.param("torchrun", marks=pytest.mark.slow), "mpiexec"])
def test_damage_is_told_by_every_rank_in_one_line(digits_copy, tmp_path, launcher):
    damage(digits_copy, "byte")
    done = on_two(launcher, tmp_path, data_dir="set")
    assert done.returncode == (2 if launcher == "mpiexec" else 1)  # torchrun's own code is 1
    assert done.stderr.count("packed_00000.npy' is damaged (its checksum is wrong)") == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "mpiexec"])
def test_two_processes_train_on_a_packed_set_as_on_the_folder(
    digits_dir, digits_copy, tmp_path, launcher
):
    flags = {"random_flip": True, "train_steps": 4, "num_workers": 2}
    for name, data_dir in (("ours", digits_copy), ("theirs", digits_dir)):
        succeed(on_two(launcher, tmp_path, data_dir=data_dir, log_dir=name, **flags))
    assert losses(tmp_path / "ours") == losses(tmp_path / "theirs")
