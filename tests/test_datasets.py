"""The scripts of datasets/: the folders of images that they write, and how they fail."""

import hashlib
import http.server
import importlib
import io
import os
import pickle
import re
import shlex
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

DATASETS = Path(__file__).parents[1] / "datasets"
SCRIPTS = ["cifar10", "digits", "imagenet64", "lsun_bedroom", "pack"]


@pytest.fixture(autouse=True)
def _scripts_folder_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(DATASETS))  # as when a script is run as a file


def script(name):
    return importlib.import_module(name)


def run_script(name, *args):
    """Run a script as users do; its exit code, stdout and stderr."""
    done = subprocess.run(
        [sys.executable, DATASETS / f"{name}.py", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


def error_of(capsys, name, *args):
    """The one line with which a script ends, by import: exit code 2, nothing on stdout."""
    with pytest.raises(SystemExit) as stopped:
        script("_common").run(script(name).main, [str(arg) for arg in args])
    out, err = capsys.readouterr()
    assert stopped.value.code == 2
    assert out == ""
    lines = re.split(r"[\r\n]+", err.strip())
    assert [": error: " in line for line in lines] == [False] * (len(lines) - 1) + [True]
    return lines[-1]


def read(path):
    return np.asarray(Image.open(path))


def names(folder):
    return sorted(os.listdir(folder))


# --- digits


@pytest.fixture(scope="module")
def digits_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "a" / "b"
    code, out, _ = run_script("digits", folder)
    assert (code, out) == (0, f"wrote 1797 images to {folder.resolve()}\n")
    return folder


def test_digits_writes_every_digit_of_scikit_learn_exactly(digits_folder):
    from sklearn import datasets

    levels, labels = datasets.load_digits(return_X_y=True)
    files = [digits_folder / f"{label}_{index:04d}.png" for index, label in enumerate(labels)]
    assert names(digits_folder) == sorted(file.name for file in files)
    assert len(files) == 1797
    assert {Image.open(file).mode for file in files} == {"L"}
    greys = np.stack([read(file) for file in files])
    assert greys.shape == (1797, 8, 8)
    np.testing.assert_array_equal(np.round(greys * (16 / 255)), levels.reshape(-1, 8, 8))


def test_digits_spreads_the_levels_over_0_to_255(digits_folder):
    values = {value for file in digits_folder.iterdir() for value in read(file).flat}
    assert values == {round(level * 255 / 16) for level in range(17)}


def test_digits_are_what_the_image_loader_reads(digits_folder):
    from improved_diffusion.image_datasets import load_data

    batches = load_data(
        data_dir=str(digits_folder),
        batch_size=1797,
        image_size=8,
        class_cond=True,
        deterministic=True,
        channels=1,
        num_workers=0,
    )
    images, cond = next(batches)
    files = names(digits_folder)
    assert cond["y"].tolist() == [int(name.split("_")[0]) for name in files]
    assert images[7, 0].numpy() == pytest.approx(read(digits_folder / files[7]) / 127.5 - 1)


def test_digits_resizes_by_bicubic_interpolation(tmp_path, digits_folder):
    script("digits").main([str(tmp_path), "--size", "20"])
    small = Image.open(digits_folder / "3_0003.png")
    expected = small.resize((20, 20), Image.Resampling.BICUBIC)
    assert len(names(tmp_path)) == 1797
    np.testing.assert_array_equal(read(tmp_path / "3_0003.png"), np.asarray(expected))


def test_digits_refuses_a_size_below_1(tmp_path, capsys):
    assert "--size 0" in error_of(capsys, "digits", tmp_path, "--size", 0)


@pytest.mark.parametrize(
    ("name", "module", "extra", "args"),
    [("digits", "sklearn", "demo", ["out"]), ("lsun_bedroom", "lmdb", "lsun", [".", "out"])],
)
def test_a_missing_extra_is_named(tmp_path, monkeypatch, capsys, name, module, extra, args):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)  # what an import of it finds missing
    line = error_of(capsys, name, *args)
    assert f'pip install "improved-diffusion[{extra}]"' in line
    assert f"pip install '.[{extra}]'" in line
    assert names(tmp_path) == []


# --- CIFAR-10

CIFAR_CLASSES = dict(
    enumerate(
        ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    )
)


class Python2Pickler(pickle._Pickler):
    """Pickles as Python 2 did, like the published batches: native byte strings, old NumPy."""

    def save_bytes(self, obj):
        if len(obj) < 256:
            self.write(pickle.SHORT_BINSTRING + bytes([len(obj)]) + obj)
        else:
            self.write(pickle.BINSTRING + len(obj).to_bytes(4, "little") + obj)
        self.memoize(obj)

    def save_str(self, obj):
        self.save_bytes(obj.encode("latin1"))

    def save_global(self, obj, name=None):
        module = {"_reconstruct": "numpy.core.multiarray"}.get(obj.__name__, "numpy")
        self.write(pickle.GLOBAL + f"{module}\n{obj.__name__}\n".encode())
        self.memoize(obj)

    dispatch = pickle._Pickler.dispatch | {bytes: save_bytes, str: save_str, type: save_global}


def python2_pickle(obj):
    buffer = io.BytesIO()
    Python2Pickler(buffer, protocol=2).dump(obj)
    return buffer.getvalue()


def cifar_batches(per_batch=3):
    """Random batches by member name, as Python objects."""
    random = np.random.default_rng(5)
    members = [f"data_batch_{i}" for i in (4, 3, 2, 5, 1)] + ["test_batch"]  # not in order
    return {
        f"cifar-10-batches-py/{member}": {
            b"data": random.integers(0, 256, (per_batch, 3072), dtype=np.uint8),
            b"labels": random.integers(0, 10, per_batch).tolist(),
            b"batch_label": member.encode(),
            b"filenames": [b"x.png"] * per_batch,
        }
        for member in members
    }


def write_archive(path, members):
    """Write a gzipped tar of (name -> bytes); its MD5 sum."""
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return md5_of(path)


def md5_of(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def cifar(tmp_path):
    """A small archive built like the published one: its batches, path and MD5 sum."""
    batches = cifar_batches()
    path = tmp_path / "small.tar.gz"
    md5 = write_archive(path, {name: python2_pickle(batch) for name, batch in batches.items()})
    return batches, path, md5


def assert_holds_cifar(out_dir, batches):
    for split, members in {
        "cifar_train": [f"data_batch_{i}" for i in (1, 2, 3, 4, 5)],
        "cifar_test": ["test_batch"],
    }.items():
        parts = [batches[f"cifar-10-batches-py/{member}"] for member in members]
        data = np.concatenate([part[b"data"] for part in parts])
        labels = [label for part in parts for label in part[b"labels"]]
        files = [f"{CIFAR_CLASSES[label]}_{index:05d}.png" for index, label in enumerate(labels)]
        assert names(out_dir / split) == sorted(files)
        for file, row in zip(files, data, strict=True):
            pixels = read(out_dir / split / file)
            assert pixels.shape == (32, 32, 3)
            for channel in range(3):  # the row holds the red plane, then green, then blue
                plane = row[1024 * channel : 1024 * (channel + 1)].reshape(32, 32)
                np.testing.assert_array_equal(pixels[:, :, channel], plane)


def test_the_test_archive_is_pickled_like_the_published_one(cifar):
    import pickletools

    with tarfile.open(cifar[1]) as archive:
        data = archive.extractfile("cifar-10-batches-py/data_batch_1").read()
    operations = [(operation.name, arg) for operation, arg, _ in pickletools.genops(data)]
    called = {arg for name, arg in operations if name == "GLOBAL"}
    assert called == {"numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype"}
    assert not any("UNICODE" in name for name, _ in operations)


def test_cifar10_writes_both_splits_in_the_order_of_the_batches(tmp_path, cifar):
    batches, path, md5 = cifar
    code, out, _ = run_script("cifar10", tmp_path / "out", "--archive", path, "--md5", md5)
    assert code == 0
    assert out.splitlines() == [
        f"wrote 15 images to {(tmp_path / 'out' / 'cifar_train').resolve()}",
        f"wrote 3 images to {(tmp_path / 'out' / 'cifar_test').resolve()}",
    ]
    assert_holds_cifar(tmp_path / "out", batches)


def test_cifar10_refuses_an_archive_of_another_checksum_unopened(tmp_path, cifar):
    _, path, md5 = cifar
    code, out, err = run_script("cifar10", tmp_path / "out", "--archive", path)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert str(path) in err
    assert md5 in err
    assert "c58f30108f718f92721af3b95e74349a" in err
    assert not (tmp_path / "out").exists()


class Malice:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_cifar10_refuses_a_malicious_pickle_and_runs_nothing_of_it(tmp_path, capsys, protocol):
    members = {name: python2_pickle(batch) for name, batch in cifar_batches().items()}
    hostile = pickle.dumps({"data": Malice(tmp_path / "owned")}, protocol)
    members["cifar-10-batches-py/test_batch"] = hostile
    md5 = write_archive(tmp_path / "evil.tar.gz", members)
    line = error_of(
        capsys, "cifar10", tmp_path, "--archive", tmp_path / "evil.tar.gz", "--md5", md5
    )
    assert f"{os.mkdir.__module__}.mkdir, which is refused" in line
    assert "test_batch" in line
    assert names(tmp_path) == ["evil.tar.gz"]
    pickle.loads(hostile)  # the pickle is a real one: an ordinary reader runs it
    assert (tmp_path / "owned").is_dir()


@pytest.mark.parametrize(
    "named",
    [
        b"cbuiltins\neval\n",
        b"cnumpy\nload\n",
        b"cnumpy.core.multiarray\nfromfile\n",
        b"cnumpy.core.multiarray\nndarray.tofile\n",
        b"c_codecs\nencode\n",
    ],
)
def test_the_unpickler_refuses_every_other_name(named):
    with pytest.raises(pickle.UnpicklingError, match="refused"):
        script("cifar10").BatchUnpickler(b"\x80\x02" + named + b".").load()


def test_cifar10_refuses_a_truncated_archive_and_writes_nothing(tmp_path, cifar, capsys):
    _, path, _ = cifar
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 2000):
        path.write_bytes(whole[:size])
        line = error_of(capsys, "cifar10", tmp_path, "--archive", path, "--md5", md5_of(path))
        assert f"{path}: cannot read cifar-10-batches-py/" in line
    assert names(tmp_path) == [path.name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({b"labels": [0, 1, 10]}, "labels in 0..9"),
        ({b"labels": [0, 1]}, "N labels"),
        ({b"labels": [0, 1, b"2"]}, "N labels"),
        ({b"data": np.zeros((3, 3071), np.uint8)}, "uint8 data [N, 3072]"),
        ({b"data": np.zeros((3, 3072), np.int8)}, "uint8 data [N, 3072]"),
        ({b"data": None}, "uint8 data [N, 3072]"),
    ],
)
def test_cifar10_refuses_a_batch_of_another_content(tmp_path, capsys, change, message):
    batches = cifar_batches()
    batches["cifar-10-batches-py/data_batch_3"].update(change)
    path = tmp_path / "odd.tar.gz"
    md5 = write_archive(path, {name: python2_pickle(batch) for name, batch in batches.items()})
    line = error_of(capsys, "cifar10", tmp_path, "--archive", path, "--md5", md5)
    assert message in line
    assert "data_batch_3" in line


def test_cifar10_names_a_missing_batch_or_archive(tmp_path, capsys):
    members = {name: python2_pickle(batch) for name, batch in cifar_batches().items()}
    del members["cifar-10-batches-py/data_batch_5"]
    md5 = write_archive(tmp_path / "few.tar.gz", members)
    args = ["--archive", tmp_path / "few.tar.gz", "--md5", md5]
    assert "data_batch_5" in error_of(capsys, "cifar10", tmp_path, *args)
    line = error_of(capsys, "cifar10", tmp_path, "--archive", tmp_path / "none.tar.gz")
    assert f"--archive {tmp_path / 'none.tar.gz'}: no such file" in line


@pytest.fixture
def server(tmp_path):
    """Serves files by HTTP; ``.short`` breaks off early. The address and the paths asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            file = tmp_path / self.path.strip("/").removesuffix(".short")
            if not file.is_file():
                return self.send_error(404)
            data = file.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if self.path.endswith(".short") else data)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}", asked
        httpd.shutdown()
        thread.join()


def test_cifar10_downloads_the_archive_once(tmp_path, cifar, server, capsys):
    batches, path, md5 = cifar
    address, asked = server
    flags = ["--url", f"{address}/{path.name}", "--md5", md5, "--download_dir", str(tmp_path / "d")]
    for out in ("first", "second"):
        script("cifar10").main([str(tmp_path / out), *flags])
        assert_holds_cifar(tmp_path / out, batches)
    assert asked == [f"/{path.name}"]
    assert names(tmp_path / "d") == ["cifar-10-python.tar.gz"]
    assert "100%" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["", ".short", ".missing"])
def test_a_download_that_fails_leaves_nothing(tmp_path, cifar, server, capsys, ending):
    """Another file than the published one, a connection that breaks, and no file at all."""
    url = f"{server[0]}/{cifar[1].name}{ending}"
    md5 = cifar[2] if ending else script("cifar10").MD5
    line = error_of(capsys, "cifar10", tmp_path / "out", "--url", url, "--md5", md5)
    assert url in line
    assert ("download failed" if ending == ".missing" else md5) in line
    assert names(tmp_path / "out") == []


def test_a_damaged_earlier_download_is_refused(tmp_path, capsys):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"half")
    line = error_of(capsys, "cifar10", tmp_path)
    sums = f"{hashlib.md5(b'half').hexdigest()}, not c58f30108f718f92721af3b95e74349a"
    assert f"{tmp_path / 'cifar-10-python.tar.gz'}: its MD5 sum is {sums}" in line
    assert "delete it" in line


# --- LSUN


def encoded(pixels, image_format, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=image_format, **options)
    return buffer.getvalue()


def smooth(width, height):
    """A picture without sharp edges, which lossy formats keep within a few levels."""
    y, x = np.mgrid[:height, :width]
    planes = [60 + 2 * x, 40 + 3 * y, 200 - x - y]
    return np.stack(planes, axis=-1).clip(0, 255).astype(np.uint8)


def write_lmdb(path, records, **options):
    import lmdb

    database = lmdb.open(str(path), map_size=1 << 22, **options)
    with database, database.begin(write=True) as transaction:
        for key, value in records:
            transaction.put(key, value)


@pytest.fixture
def bedrooms(tmp_path):
    """A database of 48x32, 32x48 and 40x40 images, and its path."""
    pictures = [smooth(48, 32), smooth(32, 48), smooth(40, 40)]
    records = [
        (b"0a", encoded(pictures[0], "WEBP", lossless=True)),
        (b"2c", encoded(pictures[2], "PNG")),
        (b"1b", encoded(pictures[1], "JPEG", quality=98)),
    ]
    write_lmdb(tmp_path / "train_lmdb", records)
    return pictures, tmp_path / "train_lmdb"


def test_lsun_writes_numbered_squares_in_the_order_of_the_keys(tmp_path, bedrooms):
    pictures, path = bedrooms
    out_dir = tmp_path / "out"
    code, out, _ = run_script("lsun_bedroom", path, out_dir, "--image_size", 32)
    assert (code, out) == (0, f"wrote 3 images to {out_dir.resolve()}\n")
    assert names(out_dir) == [f"bedroom_000000{i}.png" for i in range(3)]
    squares = [pictures[0][:, 8:40], pictures[1][8:40, :]]  # the centre; nothing to scale
    np.testing.assert_array_equal(read(out_dir / "bedroom_0000000.png"), squares[0])
    assert read(out_dir / "bedroom_0000001.png") == pytest.approx(squares[1], abs=6)  # JPEG
    scaled = Image.fromarray(pictures[2]).resize((32, 32), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(read(out_dir / "bedroom_0000002.png"), np.asarray(scaled))


def test_lsun_keeps_the_database_as_it_is(tmp_path, bedrooms):
    before = {name: md5_of(bedrooms[1] / name) for name in names(bedrooms[1])}
    script("lsun_bedroom").main([str(bedrooms[1]), str(tmp_path / "out"), "--image_size", "8"])
    assert {name: md5_of(bedrooms[1] / name) for name in names(bedrooms[1])} == before


def test_lsun_makes_256_pixels_by_default(tmp_path, bedrooms):
    script("lsun_bedroom").main([str(bedrooms[1]), str(tmp_path)])
    assert read(tmp_path / "bedroom_0000001.png").shape == (256, 256, 3)


def test_lsun_takes_a_prefix_and_stops_after_max_images(tmp_path, bedrooms):
    flags = ["--prefix", "tower", "--max_images", "2", "--image_size", "8"]
    script("lsun_bedroom").main([str(bedrooms[1]), str(tmp_path / "out"), *flags])
    assert names(tmp_path / "out") == ["tower_0000000.png", "tower_0000001.png"]


def test_lsun_reads_a_database_in_a_single_file(tmp_path):
    write_lmdb(tmp_path / "one.mdb", [(b"k", encoded(smooth(8, 8), "PNG"))], subdir=False)
    assert script("lsun_bedroom").count_images(str(tmp_path / "one.mdb")) == 1


def box_halved(pixels):
    """The means of 2 x 2 pixels: of neighbours in a row, then in a column, each rounded half up."""
    pixels = pixels.astype(int)
    pixels = (pixels[:, 0::2] + pixels[:, 1::2] + 1) // 2
    return ((pixels[0::2] + pixels[1::2] + 1) // 2).astype(np.uint8)


@pytest.mark.parametrize(("side", "halvings"), [(15, 0), (16, 1), (30, 1), (32, 2), (64, 3)])
def test_lsun_halves_while_twice_the_size_then_goes_bicubic(side, halvings):
    pixels = np.random.default_rng(1).integers(0, 256, (side, side, 3), dtype=np.uint8)
    made = script("lsun_bedroom").resize_square(Image.fromarray(pixels), 8)
    for _ in range(halvings):
        pixels = box_halved(pixels)
    expected = Image.fromarray(pixels).resize((8, 8), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(np.asarray(made), np.asarray(expected))


def test_lsun_names_a_record_that_cannot_be_decoded(tmp_path, capsys):
    whole = encoded(smooth(40, 40), "JPEG")
    for value, reason in [(b"no image", "no image format"), (whole[:300], "damaged image")]:
        path = tmp_path / reason.split()[0]
        write_lmdb(path, [(b"good", whole), (b"poor", value)])
        line = error_of(capsys, "lsun_bedroom", path, tmp_path / "out", "--image_size", 16)
        assert f"{path}: record 1, key 'poor', " in line
        assert reason in line
        assert names(tmp_path / "out") == ["bedroom_0000000.png"]


def test_lsun_refuses_what_is_no_database(tmp_path, capsys):
    (tmp_path / "file").write_text("text" * 5000)
    for path in (tmp_path, tmp_path / "file", tmp_path / "none"):
        line = error_of(capsys, "lsun_bedroom", path, tmp_path / "out")
        assert f"{path}: cannot be opened as an lmdb database" in line
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--image_size", 0],
        ["--max_images", 0],
        ["--prefix", "living_room"],
        ["--prefix", "a/b"],
        ["--prefix", ".hidden"],
    ],
)
def test_lsun_refuses_flags_that_cannot_work(tmp_path, bedrooms, capsys, flags):
    line = error_of(capsys, "lsun_bedroom", bedrooms[1], tmp_path / "out", *flags)
    assert flags[0] in line
    assert str(flags[1]) in line
    assert not (tmp_path / "out").exists()


# --- ImageNet 64x64


def imagenet_batch(path, published, **change):
    """Write a batch of random images with these labels, or with other arrays; its data."""
    random = np.random.default_rng(len(published))
    data = random.integers(0, 256, (len(published), 12288), dtype=np.uint8)
    arrays = {"data": data, "labels": np.array(published), "mean": data.mean(axis=0)} | change
    path.parent.mkdir(exist_ok=True)
    np.savez(path, **{key: array for key, array in arrays.items() if array is not None})
    return data


def test_imagenet64_writes_all_batches_with_label_batch_and_index(tmp_path, capsys):
    first, second = tmp_path / "1" / "train_data_batch_1.npz", tmp_path / "2" / "val_data.npz"
    data = np.concatenate([imagenet_batch(first, [1, 1000, 37]), imagenet_batch(second, [1, 2])])
    out_dir = tmp_path / "out"
    script("imagenet64").main([str(out_dir), str(first), str(second)])
    files = [
        "0001_train_data_batch_1_000000.png",
        "1000_train_data_batch_1_000001.png",
        "0037_train_data_batch_1_000002.png",
        "0001_val_data_000000.png",
        "0002_val_data_000001.png",
    ]
    assert names(out_dir) == sorted(files)
    for file, row in zip(files, data, strict=True):
        pixels = read(out_dir / file)
        assert pixels.shape == (64, 64, 3)
        for channel in range(3):  # the row holds the red plane, then green, then blue
            plane = row[4096 * channel : 4096 * (channel + 1)].reshape(64, 64)
            np.testing.assert_array_equal(pixels[:, :, channel], plane)


def test_the_class_of_the_loader_is_the_imagenet64_label_less_one(tmp_path):
    from improved_diffusion.image_datasets import list_images

    labels = [1000, *range(1, 1000)]
    blank = np.zeros((1000, 12288), np.uint8)
    imagenet_batch(tmp_path / "train_data_batch_2.npz", labels, data=blank)
    script("imagenet64").main([str(tmp_path / "out"), str(tmp_path / "train_data_batch_2.npz")])
    images = list_images(str(tmp_path / "out"), class_cond=True)
    assert len(images.paths) == 1000
    for path, number in zip(images.paths, images.classes, strict=True):
        assert labels[int(path[-len("000000.png") : -len(".png")])] == number + 1


def test_imagenet64_parts_of_separate_calls_share_a_folder(tmp_path, capsys):
    for part in (1, 6):
        batch = tmp_path / f"train_data_batch_{part}.npz"
        imagenet_batch(batch, [5, 6])
        script("imagenet64").main([str(tmp_path / "out"), str(batch)])
    assert len(names(tmp_path / "out")) == 4
    assert "also holds 2 files that were there before" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.array([0, 1])}, "in 1..1000"),
        ({"labels": np.array([1001, 1])}, "in 1..1000"),
        ({"labels": np.array([1.0, 2.0])}, "must be integers"),
        ({"labels": np.array([[1, 2]])}, "must be integers"),
        ({"labels": np.array([1, 2, 3])}, "one row for each label"),
        ({"data": np.zeros((2, 3072), np.uint8)}, "uint8 [2, 12288]"),
        ({"data": np.zeros((2, 12288))}, "not float64 [2, 12288]"),
        ({"labels": None}, "cannot read its array 'labels'"),
        ({"data": None}, "cannot read its array 'data'"),
        ({"data": np.array([{}, {}])}, "cannot read its array 'data'"),
    ],
)
def test_imagenet64_refuses_a_batch_of_another_content(tmp_path, capsys, change, message):
    imagenet_batch(tmp_path / "batch.npz", [1, 2], **change)
    line = error_of(capsys, "imagenet64", tmp_path / "out", tmp_path / "batch.npz")
    assert message in line
    assert str(tmp_path / "batch.npz") in line


def test_imagenet64_refuses_a_pickle_and_runs_nothing_of_it(tmp_path, capsys):
    hostile = np.array([Malice(tmp_path / "owned")], dtype=object)
    imagenet_batch(tmp_path / "batch.npz", [1], labels=hostile)
    (tmp_path / "bare.npz").write_bytes(pickle.dumps(Malice(tmp_path / "owned")))
    for file in ("batch.npz", "bare.npz"):
        line = error_of(capsys, "imagenet64", tmp_path / "out", tmp_path / file)
        assert f"{file}: cannot read its array 'labels'" in line
    assert names(tmp_path) == ["bare.npz", "batch.npz"]


def test_imagenet64_refuses_what_is_no_complete_npz(tmp_path, capsys):
    imagenet_batch(tmp_path / "whole.npz", [1, 2])
    np.save(tmp_path / "array.npy", np.zeros(3))
    contents = {
        "empty": b"",
        "text": b"text",
        "array": (tmp_path / "array.npy").read_bytes(),
        "half": (tmp_path / "whole.npz").read_bytes()[:12000],
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        line = error_of(capsys, "imagenet64", tmp_path / "out", tmp_path / name)
        assert f"{tmp_path / name}: cannot read its array" in line
    assert not (tmp_path / "out").exists()


def test_imagenet64_wants_all_batches_there_and_of_different_names(tmp_path, capsys):
    for folder in ("a", "b"):
        imagenet_batch(tmp_path / folder / "x.npz", [1])
    out_dir, first, second = tmp_path / "out", tmp_path / "a" / "x.npz", tmp_path / "b" / "x.npz"
    line = error_of(capsys, "imagenet64", out_dir, first, second)
    assert f"{first} and {second}" in line
    line = error_of(capsys, "imagenet64", out_dir, first, tmp_path / "none.npz")
    assert f"{tmp_path / 'none.npz'}: no such file" in line
    assert not out_dir.exists()


# --- what they share


def test_a_write_that_fails_keeps_the_old_file_and_leaves_nothing_else(tmp_path, monkeypatch):
    common = script("_common")
    common.write_png(tmp_path / "a.png", Image.new("L", (4, 4), 7))

    def save_half(image, file, **options):
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", save_half)
    with pytest.raises(OSError, match="disk full"):
        common.write_png(tmp_path / "a.png", Image.new("L", (4, 4), 9))
    assert names(tmp_path) == ["a.png"]
    assert (read(tmp_path / "a.png") == 7).all()


def test_running_again_writes_the_same_files(tmp_path, capsys):
    sums = []
    for _ in range(2):
        script("digits").main([str(tmp_path)])
        sums.append({name: md5_of(tmp_path / name) for name in names(tmp_path)})
    assert sums[0] == sums[1]
    assert "note" not in capsys.readouterr().err


def test_an_output_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    code, out, err = run_script("digits", tmp_path / "file")
    assert (code, out) == (2, "")
    assert re.fullmatch(r"digits\.py: error: .*file'\n", err)


def test_a_mistake_of_our_own_keeps_its_traceback():
    def broken(argv):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        script("_common").run(broken)


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path):
    code, _, err = run_script("digits", tmp_path, "--size", 0)
    assert code == 2
    assert re.fullmatch(r"digits\.py: error: --size 0: .*\n", err)


def test_the_scripts_raise_the_error_of_the_package():
    from improved_diffusion.errors import UserError

    assert script("_common").UserError is UserError


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_has_help(name):
    parser = script(name).create_argparser()
    assert parser.description
    assert all(action.help for action in parser._actions)
    parser.format_help()


def test_the_readme_shows_commands_that_parse_for_every_script():
    text = (DATASETS / "README.md").read_text()
    commands = re.findall(r"^python datasets/(\w+)\.py (.*)$", text, flags=re.MULTILINE)
    assert sorted({name for name, _ in commands}) == SCRIPTS
    for name, arguments in commands:
        script(name).create_argparser().parse_args(shlex.split(arguments))


def test_the_readme_names_every_script_and_its_sections():
    text = (DATASETS / "README.md").read_text()
    assert set(re.findall(r"`(\w+\.py)`", text)) == {f"{name}.py" for name in SCRIPTS}
    titles = [title.lower() for title in re.findall(r"^## (.*)$", text, flags=re.MULTILINE)]
    anchors = {re.sub(r"[^\w -]", "", title).replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([^)]*)\)", text)) <= anchors
