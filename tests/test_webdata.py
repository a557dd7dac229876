"""Tar shards as a stream: the pixels of a folder, each shard in one place, errors by name."""

import collections
import functools
import http.server
import io
import itertools
import json
import shutil
import sys
import tarfile
import threading

import numpy as np
import pytest
import torch
from launchers import start
from PIL import Image
from script_runner import TINY, TINY_SUPER_RES, error_of, names, samples, script_path, succeed

from improved_diffusion import dist_util, webdata
from improved_diffusion.errors import UserError
from improved_diffusion.image_datasets import Seekable
from improved_diffusion.pixels import normalize, read_image
from improved_diffusion.webdata import (
    Reshuffled,
    ShardBatches,
    ShardFormat,
    ShardStream,
    check_first,
    find_shards,
    images_of,
    read_shard,
    workers_of,
)

SHARDS = 5
DIGITS = tuple("0123456789")


def write_tar(path, files):
    """A tar file of named contents."""
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return str(path)


def encoded(pixels, kind="PNG"):
    buffer = io.BytesIO()
    if kind == "npy":
        np.save(buffer, pixels)
    else:
        Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


def level(value, size=8):
    """A picture of one grey level."""
    return encoded(np.full((size, size), value, dtype=np.uint8))


@pytest.fixture(scope="module")
def shards(tmp_path_factory, digits_dir):
    """A folder of 5 shards of 12 digits each, labelled by .cls files; do not write to it."""
    folder = tmp_path_factory.mktemp("shards")
    paths = sorted(digits_dir.glob("*.png"))
    for i in range(SHARDS):
        files = []
        for path in paths[i::SHARDS]:
            label = path.name.split("_")[0].encode()
            files += [(path.name, path.read_bytes()), (f"{path.stem}.cls", label)]
            files += [(f"{path.stem}.json", b"{}")]  # of no interest
        write_tar(folder / f"digits-{i:03}.tar", files)
    return folder


@pytest.fixture
def levels(tmp_path):
    """Make shards whose every picture has a grey level of its own: 10 * shard + number."""

    def make(num_shards=4, count=6):
        return [
            write_tar(
                tmp_path / f"{i}.tar", [(f"{k}.png", level(10 * i + k)) for k in range(count)]
            )
            for i in range(num_shards)
        ]

    return make


FORM = ShardFormat(8, channels=1)


def level_of(batch):
    """The grey level of each image of a stream."""
    return ((batch[0][:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def take(stream, count):
    return list(itertools.chain.from_iterable(level_of(next(stream)) for _ in range(count)))


def message(function, *args, **kwargs):
    with pytest.raises(UserError) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# -- finding


def test_folder_of_tar_files_alone_is_shards(shards, digits_dir, tmp_path):
    expected = [str(shards / f"digits-{i:03}.tar") for i in range(SHARDS)]
    assert find_shards(str(shards)) == expected
    assert find_shards(str(digits_dir)) == []
    assert find_shards(str(tmp_path)) == []  # empty
    assert find_shards("no/such/folder") == []
    for name in ("a.tar", ".hidden", "b.png"):
        (tmp_path / name).write_bytes(b"")
    assert find_shards(str(tmp_path)) == []


def test_braces_and_commas_name_shards(shards):
    def named(*numbers):
        return [str(shards / f"digits-{i:03}.tar") for i in numbers]

    assert find_shards(f"{shards}/digits-{{000..003}}.tar") == named(0, 1, 2, 3)
    assert find_shards(f"{shards}/digits-{{004,001}}.tar") == named(4, 1)
    assert find_shards(f"{shards}/digits-{{004.tar,001.tar}}") == named(4, 1)
    assert find_shards(f"{shards}/digits-002.tar") == named(2)
    both = f"{shards}/digits-002.tar,{shards}/digits-{{000,001}}.tar"
    assert find_shards(both) == named(2, 0, 1)


def test_missing_shard_is_named(shards):
    line = message(find_shards, f"{shards}/digits-{{003..006}}.tar")
    assert "'" + f"{shards}/digits-005.tar' does not exist" in line
    assert "--data_dir" in line


def test_addresses_of_an_unknown_kind_are_refused():
    assert "--data_dir 's3://bucket/0.tar'" in message(find_shards, "s3://bucket/0.tar")


@pytest.fixture
def server(tmp_path):
    """Serves a folder by HTTP; its address."""
    handler = functools.partial(QuietHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset reads the web by curl")
def test_shards_are_read_from_the_web(server, levels, tmp_path):
    levels(2, count=40)
    shards = find_shards(f"{server}/{{0..1}}.tar")
    assert shards == [f"{server}/0.tar", f"{server}/1.tar"]
    assert [int(pixels[0, 0, 0]) for pixels, _ in images_of(shards[1], FORM)][:3] == [10, 11, 12]
    with open(tmp_path / "0.tar", "r+b") as file:
        file.truncate(9000)
    for shard in (shards[0], f"{server}/missing.tar"):
        assert f"'{shard}' cannot be read as a tar file" in message(list, read_shard(shard))


def test_missing_package_is_named_with_its_extra(shards, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    for data_dir in (str(shards), f"{shards}/digits-000.tar"):
        assert "pip install 'improved-diffusion[webdataset]'" in message(find_shards, data_dir)


# -- what is in a shard


def test_pixels_are_those_of_the_folder(shards, digits_dir):
    form = ShardFormat((6, 8), channels=3, class_names=DIGITS)
    for i, shard in enumerate(find_shards(str(shards))):
        paths = sorted(digits_dir.glob("*.png"))[i::SHARDS]
        images = list(images_of(shard, form))
        assert len(images) == len(paths)
        for (pixels, label), path in zip(images, paths, strict=True):
            np.testing.assert_array_equal(pixels, read_image(str(path), (6, 8), 3))
            assert label == int(path.name.split("_")[0])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_kinds_of_pictures(tmp_path, kind):
    content = encoded(np.random.randint(0, 256, (20, 30), dtype=np.uint8), kind)
    name = f"sub/dir/7.{kind.lower()}"
    (tmp_path / f"a.{kind.lower()}").write_bytes(content)
    ((pixels, label),) = images_of(write_tar(tmp_path / "a.tar", [(name, content)]), FORM)
    assert label is None
    expected = read_image(str(tmp_path / f"a.{kind.lower()}"), 8, 1)
    np.testing.assert_array_equal(pixels, expected)


def test_arrays_with_a_range(tmp_path):
    values = np.random.uniform(-5, 5, (8, 8, 6)).astype(np.float32)
    shard = write_tar(tmp_path / "a.tar", [("a.npy", encoded(values, "npy"))])
    form = ShardFormat(8, channels=6, value_range=(-5.0, 5.0))
    ((pixels, _),) = images_of(shard, form)
    np.testing.assert_array_equal(pixels, values)
    stream = ShardStream([shard], form, batch_size=2, seed=0)
    torch.testing.assert_close(
        next(stream)[0][0], normalize(torch.from_numpy(values)[None], (-5.0, 5.0))[0]
    )


@pytest.mark.parametrize(
    ("name", "cls", "labels_from", "label"),
    [
        ("x.png", b" 7\n", "filename", 7),
        ("3_x.png", b"7", "filename", 7),  # the file wins
        ("3_x.png", None, "filename", 3),
        ("003_x.png", None, "filename", 3),
        ("a/4/3_x.png", None, "folder", 4),
    ],
)
def test_labels(tmp_path, name, cls, labels_from, label):
    files = [(name, level(0))] + ([(name.replace("png", "cls"), cls)] if cls else [])
    form = ShardFormat(8, 1, class_names=DIGITS, labels_from=labels_from)
    ((_, found),) = images_of(write_tar(tmp_path / "a.tar", files), form)
    assert found == label


def test_labels_by_the_names_of_a_run(tmp_path):
    shard = write_tar(tmp_path / "a.tar", [("owl_1.png", level(0)), ("ant_1.png", level(0))])
    found = [label for _, label in images_of(shard, ShardFormat(8, 1, class_names=("ant", "owl")))]
    assert found == [1, 0]


@pytest.mark.parametrize(
    ("name", "cls", "words"),
    [
        ("dog_1.png", None, ["a.tar/dog_1'", "'dog' by its name", "--num_classes 10"]),
        ("10_1.png", None, ["'10' by its name"]),
        ("1.png", b"10", ["'10' by its .cls"]),
        ("1.png", b"\xff\xfe", ["by its .cls"]),
    ],
)
def test_classes_that_are_none_are_named(tmp_path, name, cls, words):
    files = [(name, level(0))] + ([(name.replace("png", "cls"), cls)] if cls else [])
    shard = write_tar(tmp_path / "a.tar", files)
    line = message(list, images_of(shard, ShardFormat(8, 1, class_names=DIGITS)))
    for word in words:
        assert word in line


def test_images_of_one_name_are_refused(tmp_path):
    files = [("cat.0.png", level(0)), ("cat.1.png", level(1))]
    line = message(list, images_of(write_tar(tmp_path / "a.tar", files), FORM))
    assert "a.tar/cat' has several images (0.png, 1.png)" in line


def test_shard_without_images_is_refused(tmp_path):
    shard = write_tar(tmp_path / "a.tar", [("a.txt", b"none"), ("b.json", b"{}")])
    assert "a.tar' holds no images" in message(list, images_of(shard, FORM))
    assert "a.tar' holds no images" in message(check_first, shard, FORM)
    empty = write_tar(tmp_path / "b.tar", [])
    assert "b.tar' holds no images" in message(list, images_of(empty, FORM))


def test_channels_that_differ_are_named_with_two_samples(tmp_path):
    files = [
        (f"{name}.npy", encoded(np.zeros((8, 8, count), np.float32), "npy"))
        for name, count in [("a", 2), ("b", 3)]
    ]
    shard = write_tar(tmp_path / "a.tar", files)
    form = ShardFormat(8, 2, value_range=(0.0, 1.0))
    like = check_first(shard, form)
    line = message(list, images_of(shard, ShardFormat(8, 2, (0.0, 1.0), like=like)))
    assert "a.tar/b.npy' has 3 channels, but '" in line
    assert "a.tar/a' has 2" in line
    line = message(check_first, shard, ShardFormat(8, 1, (0.0, 1.0)))
    assert "a.tar/a.npy' has 2 channels: give --channels 2" in line
    assert "--channels 5" in message(check_first, shard, ShardFormat(8, 5))


# -- damage


def test_shard_cut_short_anywhere_is_named(tmp_path, levels):
    (shard,) = levels(1, count=4)
    with open(shard, "rb") as file:
        content = file.read()
    with tarfile.open(shard) as archive:
        starts = [member.offset for member in archive]
        end = archive.offset
    cuts = [0, 100, 600, starts[2], starts[2] + 200, starts[2] + 512, starts[2] + 530, end - 512]
    for cut in cuts:
        (tmp_path / "cut.tar").write_bytes(content[:cut])
        line = message(list, read_shard(str(tmp_path / "cut.tar")))
        assert "cut.tar' cannot be read as a tar file: " in line, cut
    assert len(list(read_shard(shard))) == 4


def test_damaged_header_is_not_taken_for_the_end(tmp_path, levels):
    (shard,) = levels(1, count=4)
    with tarfile.open(shard) as archive:
        place = archive.getmembers()[2].offset
    with open(shard, "r+b") as file:
        file.seek(place + 3)
        file.write(b"\xff")
    assert "0.tar' cannot be read" in message(list, read_shard(shard))


def test_what_is_no_tar_file_is_named(tmp_path):
    (tmp_path / "a.tar").write_text("no tar file" * 100)
    assert "a.tar' cannot be read as a tar file" in message(list, read_shard(f"{tmp_path}/a.tar"))
    assert "b.tar' cannot be read as a tar file" in message(list, read_shard(f"{tmp_path}/b.tar"))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_damaged_picture_is_named(tmp_path, num_workers):
    files = [("a.png", level(0)), ("b.png", level(0)[:40])]
    shards = [write_tar(tmp_path / f"{i}.tar", files) for i in range(2)]
    stream = ShardStream(shards, FORM, batch_size=4, seed=0, num_workers=num_workers)
    line = message(next, stream)
    assert ".tar/b.png' cannot be read as an image: " in line


# -- the stream


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_every_image_comes_once_an_epoch(levels, num_workers, monkeypatch):
    monkeypatch.setattr(webdata, "SHUFFLED_IMAGES", 1)  # no buffer: shard after shard
    stream = ShardStream(levels(), FORM, batch_size=6, seed=0, num_workers=num_workers)
    everything = [10 * i + k for i in range(4) for k in range(6)]
    for _ in range(3):
        assert sorted(take(stream, 4)) == everything


def test_images_of_shards_are_mixed(levels):
    shards = levels(num_shards=4, count=10)
    found = take(ShardStream(shards, FORM, batch_size=10, seed=0), 4)
    assert len({value // 10 for value in found[:10]}) > 1
    assert found != sorted(found)


def test_same_seed_same_stream(levels):
    shards = levels()
    streams = [
        ShardStream(shards, FORM, batch_size=4, seed=seed, num_workers=num_workers)
        for seed, num_workers in [(1, 2), (1, 2), (2, 2)]
    ]
    first, again, other = (take(stream, 8) for stream in streams)
    assert first == again
    assert first != other


def test_order_changes_with_the_epoch(levels, monkeypatch):
    monkeypatch.setattr(webdata, "SHUFFLED_IMAGES", 1)
    stream = ShardStream(levels(num_shards=6, count=1), FORM, batch_size=6, seed=0)
    epochs = [tuple(take(stream, 1)) for _ in range(4)]
    assert len(set(epochs)) > 2


def test_reshuffled_stream_is_another_that_depends_on_the_images_seen(levels):
    shards = levels()

    def after(images, taken=0):
        stream = ShardStream(shards, FORM, batch_size=4, seed=0, num_workers=2)
        take(stream, taken)
        stream.reshuffle(images)
        return take(stream, 6)

    assert after(0) == take(ShardStream(shards, FORM, 4, 0, num_workers=2), 6)
    assert after(24) == after(24, taken=3)
    assert len({tuple(after(images)) for images in (0, 24, 48)}) == 3


def test_stream_cannot_seek_but_says_so():
    stream = ShardStream([], FORM, batch_size=1, seed=0)
    assert not isinstance(stream, Seekable)
    assert isinstance(stream, Reshuffled)


def shares(shards, world_size, num_workers, epochs, monkeypatch):
    """The shards that each worker of each process reads, in order."""
    read = collections.defaultdict(list)
    for rank in range(world_size):
        monkeypatch.setattr(dist_util, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(dist_util, "get_world_size", lambda: world_size)
        batches = ShardBatches(shards, FORM, batch_size=1, seed=0)
        for worker in range(num_workers):
            count = len(shards) * epochs // (world_size * num_workers)
            images = batches._images(rank * num_workers + worker, world_size * num_workers)
            read[rank, worker] = [int(next(images)[0].max()) // 10 for _ in range(count)]
    return read


def test_processes_and_workers_share_the_shards(levels, monkeypatch):
    read = shares(levels(num_shards=8, count=1), 2, 2, 1, monkeypatch)
    assert all(len(own) == 2 for own in read.values())
    assert sorted(itertools.chain.from_iterable(read.values())) == list(range(8))


def test_shards_are_read_equally_often_when_they_do_not_divide(levels, monkeypatch):
    read = shares(levels(num_shards=5, count=1), 2, 1, 4, monkeypatch)
    counts = collections.Counter(itertools.chain.from_iterable(read.values()))
    assert counts == dict.fromkeys(range(5), 4)


def test_fewer_shards_than_workers(monkeypatch):
    monkeypatch.setattr(dist_util, "get_world_size", lambda: 3)
    assert workers_of(12, 4) == 4
    assert workers_of(11, 4) == 3
    assert workers_of(3, 4) == 1
    assert workers_of(9, 0) == 0
    line = message(workers_of, 2, 1)
    assert "2 tar shards are fewer than 3 processes" in line


def test_flips_are_half_and_the_same_again(tmp_path):
    pixels = np.zeros((8, 8), dtype=np.uint8)
    pixels[:, :4] = 200
    shard = write_tar(tmp_path / "a.tar", [(f"{i}.png", encoded(pixels)) for i in range(50)])
    plain = next(ShardStream([shard], FORM, 50, seed=0))[0]
    assert (plain[:, 0, 0, 0] > 0).all()
    mirrored, again = (next(ShardStream([shard], FORM, 200, seed=0, flip=True))[0] for _ in "ab")
    share = (mirrored[:, 0, 0, 0] < 0).float().mean().item()
    assert 0.3 < share < 0.7
    assert torch.equal(mirrored, again)


def test_crops_differ_from_image_to_image(tmp_path):
    pixels = np.add.outer(np.arange(40), np.arange(40) * 3).astype(np.uint8)
    shard = write_tar(tmp_path / "a.tar", [(f"{i}.png", encoded(pixels)) for i in range(20)])
    cropped, again = (
        next(ShardStream([shard], ShardFormat(16, 1), 20, seed=0, crop=True))[0] for _ in "ab"
    )
    assert len({image.numpy().tobytes() for image in cropped}) > 10
    assert torch.equal(cropped, again)


def test_first_images_are_those_of_the_first_shards(levels):
    stream = ShardStream(levels(3, count=4), FORM, batch_size=2, seed=0, flip=True)
    (images, cond), indices = stream.first(6)
    assert level_of((images, cond)) == [0, 1, 2, 3, 10, 11]
    assert indices == list(range(6))
    assert cond == {}
    assert len(stream.first(100)[1]) == 12


# -- scripts


def train_flags(folder, **changes):
    own = {"data_dir": folder, "log_dir": "run", "batch_size": 4, "ema_rate": 0.5}
    own |= {"num_workers": 2, "lr_anneal_steps": 3, "log_interval": 1, "diffusion_steps": 8}
    return {**TINY, **own, **changes}


@pytest.mark.slow
def test_training_on_shards_goes_on_and_samples(tmp_path, shards, digits_dir, run_script):
    flags = train_flags(shards, class_cond=True, num_classes=10, sample_interval=2)
    flags |= {"val_data_dir": digits_dir, "val_images": 8, "random_flip": True}
    flags["val_interval"] = 2
    done = succeed(run_script("image_train", flags, cwd=tmp_path))
    assert "the images of 5 tar shards, 10 classes, 60 for validation" in done.stdout
    assert (tmp_path / "run" / "preview_000002.png").exists()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["num_classes"], config["class_names"]) == (10, list(DIGITS))
    flags |= {"lr_anneal_steps": 5}
    done = succeed(run_script("image_train", flags, cwd=tmp_path))
    assert "resume: data reshuffled after 12 images" in done.stdout
    own = {"model_path": "run/ema_0.5_000005.pt", "num_samples": 2, "log_dir": "out"}
    own |= {"classes": "3,8", "timestep_respacing": 3}
    succeed(run_script("image_sample", own, cwd=tmp_path))
    assert samples(tmp_path / "out")[1].tolist() == [3, 8]


@pytest.mark.slow
def test_super_resolution_trains_on_shards(tmp_path, shards, run_script):
    flags = {**train_flags(shards, sample_interval=1, lr_anneal_steps=2), **TINY_SUPER_RES}
    flags.pop("image_size")
    succeed(run_script("super_res_train", flags, cwd=tmp_path))
    assert (tmp_path / "run" / "preview_000001.png").exists()


@pytest.mark.slow
def test_two_processes_train_on_shards(tmp_path, shards):
    flags = train_flags(f"{shards}/digits-{{000..003}}.tar", log_dir=tmp_path / "run")
    parts = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    done = start("torchrun", script_path("image_train"), *parts, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the images of 4 tar shards" in done.stdout
    assert "global batch of 8" in done.stdout
    assert "--num_workers" not in done.stdout


def test_workers_without_a_shard_are_left_out_and_told(tmp_path, shards, run_script):
    flags = train_flags(f"{shards}/digits-000.tar", lr_anneal_steps=1)
    done = succeed(run_script("image_train", flags, cwd=tmp_path))
    assert "--num_workers 2: 1 tar shards are enough for 1 in each process" in (
        done.stdout + done.stderr
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"class_cond": True}, ["--class_cond True", "give --num_classes"]),
        (
            {"data_dir": "seven.tar", "class_cond": True, "num_classes": 7},
            ["seven.tar/7_x' has the class '7' by its name", "--num_classes 7", ".cls"],
        ),
        ({"val_fraction": 0.1}, ["--val_fraction 0.1", "--val_data_dir"]),
        ({"data_dir": "no/{0..3}.tar"}, ["'no/0.tar' does not exist"]),
        ({"data_dir": "bad.tar"}, ["'bad.tar' cannot be read as a tar file"]),
        ({"data_dir": "empty.tar"}, ["'empty.tar' holds no images"]),
        ({"value_range": "0,10"}, [".png' holds values from", "--value_range 0,10"]),
        ({"channels": 5}, ["--channels 5"]),
    ],
)
def test_mistakes_are_one_line(tmp_path, shards, run_script, changes, words):
    (tmp_path / "bad.tar").write_bytes(b"no tar file" * 99)
    write_tar(tmp_path / "empty.tar", [("a.txt", b"")])
    write_tar(tmp_path / "seven.tar", [("7_x.png", level(0))])
    before = names(tmp_path)
    line = error_of(run_script("image_train", train_flags(shards, **changes), cwd=tmp_path))
    for word in words:
        assert word in line
    assert names(tmp_path) == before


@pytest.mark.slow
def test_damage_on_the_way_ends_both_processes(tmp_path, levels):
    shards = levels(4, count=20)
    for shard in shards[1:]:
        with open(shard, "r+b") as file:
            file.truncate(5000)
    flags = train_flags(",".join(shards), log_dir=tmp_path / "run", lr_anneal_steps=50)
    parts = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    done = start("torchrun", script_path("image_train"), *parts, timeout=120, cwd=tmp_path)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors, done.stderr
    assert any(".tar' cannot be read as a tar file: " in line for line in errors), errors


def test_shards_are_for_training_alone(tmp_path, shards, trained, run_script):
    flags = {"model_path": trained.path, "data_dir": shards / "digits-000.tar", "log_dir": "out"}
    line = error_of(run_script("image_nll", flags, cwd=tmp_path))
    assert "tar shards are for training alone" in line
