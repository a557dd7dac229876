"""Random flips and crops: drawn by seed, epoch and image alone, for training images alone."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from launchers import environment
from PIL import Image
from script_runner import TINY, error_of, succeed

from improved_diffusion import dist_util
from improved_diffusion.augment import Augmentation
from improved_diffusion.image_datasets import ImageList, list_images, load_data, load_once

COUNT = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of 12 x 10, of which no two, no mirror images and no two crops are alike."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        Image.fromarray(rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)).save(
            folder / f"{i % 3}_{i:02d}.png"
        )
    return folder


@pytest.fixture
def place(monkeypatch):
    """Pretend to be one of several processes: ``place(rank, world_size)``."""
    monkeypatch.setattr(dist_util, "broadcast_object", lambda value: value)

    def pretend(rank, world_size):
        monkeypatch.setattr(dist_util, "get_rank", lambda: rank)
        monkeypatch.setattr(dist_util, "get_world_size", lambda: world_size)

    return pretend


def make(folder, **changes):
    options = {"batch_size": 4, "image_size": 8, "num_workers": 0, "seed": 5, "random_flip": True}
    return load_data(data_dir=str(folder), **{**options, **changes})


def take(data, count):
    """The next images of a stream, one by one."""
    images = itertools.chain.from_iterable(batch for batch, _ in data)
    return list(itertools.islice(images, count))


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def by_file(folder, epochs, **changes):
    """File -> what it looks like in each epoch, float32 [epochs, C, H, W]."""
    data = make(folder, **changes)
    looks = {}
    for name, image in zip(data.files(0, epochs * COUNT), take(data, epochs * COUNT), strict=True):
        looks.setdefault(name, []).append(image)
    return {name: torch.stack(images) for name, images in looks.items()}


BOTH = {"random_flip": True, "random_crop": True}


# -- flips


def test_half_of_the_images_are_mirrored_and_others_in_each_epoch(folder):
    plain = by_file(folder, 1, random_flip=False)
    flipped = by_file(folder, 20)
    mirrored = []
    for name, images in flipped.items():
        (straight,) = plain[name]
        assert not torch.equal(straight, straight.flip(2))
        for image in images:
            assert torch.equal(image, straight) or torch.equal(image, straight.flip(2))
        mirrored.append([not torch.equal(image, straight) for image in images])
    mirrored = np.array(mirrored)  # [COUNT, epochs]
    assert abs(mirrored.mean() - 0.5) < 4 * 0.5 / np.sqrt(mirrored.size)  # four standard errors
    assert len({tuple(epoch) for epoch in mirrored.T}) == 20
    assert 0 < mirrored.mean(axis=1).min() <= mirrored.mean(axis=1).max() < 1


def test_flips_of_many_images_are_fair_and_independent():
    augmentation = Augmentation(1, 100_001, flip=True)
    first, second = (augmentation._flips_of(epoch) for epoch in (0, 1))
    for flips in (first, second, first == second, first[1:] == first[:-1]):
        assert abs(flips.mean() - 0.5) < 0.01
    assert (Augmentation(1, 100_001, flip=True)._flips_of(1) == second).all()
    assert (Augmentation(2, 100_001, flip=True)._flips_of(1) != second).any()


def test_off_by_default(folder):
    data = load_data(
        data_dir=str(folder), batch_size=4, image_size=8, num_workers=0, deterministic=True
    )
    rounds = load_once(list_images(str(folder)), COUNT, 4, 8, num_workers=0)
    assert_same(take(data, COUNT), [image for batch, *_ in rounds for image in batch])


# -- crops


def test_crops_differ_between_images_and_epochs(folder):
    centre = by_file(folder, 1, random_flip=False)
    looks = by_file(folder, 4, random_flip=False, random_crop=True)
    different = [
        len({image.numpy().tobytes() for image in [*images, *centre[name]]})
        for name, images in looks.items()
    ]
    assert np.mean(different) > 4  # of 5
    assert all(images.shape == (4, 3, 8, 8) for images in looks.values())


def test_a_crop_shows_the_picture_and_nothing_else(tmp_path):
    """Brightness rises evenly from left to right: the crop shows 80 % of it or more."""
    ramp = np.tile(np.arange(0, 250, 5, dtype=np.uint8), (50, 1))
    Image.fromarray(ramp).save(tmp_path / "a.png")
    data = make(tmp_path, batch_size=1, random_flip=False, random_crop=True, image_size=16)
    spans, starts = [], []
    for image in take(data, 60):
        row = (image[0, 8] + 1) * 127.5
        assert (row.diff() > 0).all()
        spans.append((row[-1] - row[0]).item() / 245)
        starts.append(row[0].item())
    assert min(spans) > 0.7
    assert max(spans) < 1
    assert np.std(spans) > 0.02
    assert np.std(starts) > 5


# -- what they depend on


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_do_not_change_them(folder, num_workers):
    expected = take(make(folder, **BOTH), 3 * COUNT)
    assert_same(take(make(folder, **BOTH, num_workers=num_workers), 3 * COUNT), expected)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("start", [4, 22, 48, 70])
def test_a_restart_does_not_change_them(folder, start, num_workers):
    whole = take(make(folder, **BOTH), 96)
    data = make(folder, **BOTH, num_workers=num_workers, start=start)
    assert_same(take(data, 12), whole[start : start + 12])
    data.seek(8)
    assert_same(take(data, 12), whole[8:20])


def test_processes_and_batch_size_do_not_change_them(folder, place):
    images = list_images(str(folder))
    whole = take(make("-", images=images, **BOTH), 2 * COUNT)
    parts = []
    for rank in range(2):
        place(rank, 2)
        data = make("-", images=images, **BOTH, batch_size=6)
        parts.append([next(data)[0] for _ in range(4)])
    assert_same([i for pair in zip(*parts, strict=True) for b in pair for i in b], whole)


@pytest.mark.parametrize("which", ["random_flip", "random_crop"])
def test_the_seed_changes_them_and_the_order_does_not_matter(folder, which):
    flags = {"random_flip": False, which: True}
    ours, same, other = (by_file(folder, 2, **flags, seed=seed) for seed in (5, 5, 6))
    in_file_order = by_file(folder, 2, **flags, deterministic=True)
    for name in ours:
        assert torch.equal(ours[name], same[name])
        assert torch.equal(ours[name], in_file_order[name])
    assert any(not torch.equal(ours[name], other[name]) for name in ours)


def test_without_a_seed_they_come_from_torchs_global_generator(folder):
    looks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        looks.append(take(make(folder, seed=None, deterministic=True), 2 * COUNT))
    assert_same(looks[0], looks[1])
    assert any(not torch.equal(a, b) for a, b in zip(looks[0], looks[2], strict=True))


SPAWNING = """
import multiprocessing, sys
import torch
from improved_diffusion.image_datasets import load_data

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    data = load_data(
        data_dir=sys.argv[1], batch_size=4, image_size=8, num_workers=1, seed=5,
        random_flip=True, random_crop=True,
    )
    torch.save([next(data)[0] for _ in range(2)], sys.argv[2])
"""


@pytest.mark.slow
def test_spawned_workers_do_not_change_them(folder, tmp_path):
    script = tmp_path / "spawning.py"
    script.write_text(SPAWNING)
    subprocess.run(
        [sys.executable, script, folder, tmp_path / "out.pt"],
        check=True,
        timeout=60,
        env=environment(),
    )
    saved = torch.cat(torch.load(tmp_path / "out.pt", weights_only=True))
    assert_same(list(saved), take(make(folder, **BOTH), 8))


# -- where they are not


@pytest.mark.slow
def test_images_to_measure_on_are_as_they_are(folder, run_script, tmp_path):
    """A run with flips and crops measures the same losses of its first weights as one without."""
    flags = {**TINY, "channels": 3, "data_dir": folder, "val_fraction": 0.3, "val_interval": 1}
    flags |= {"lr": 1e-30, "train_steps": 2, "log_interval": 1, "batch_size": 4}
    flags |= {"predict_xstart": True}  # so that the loss of weights that are 0 tells the images
    for name, more in (("plain", {}), ("varied", BOTH)):
        succeed(run_script("image_train", flags, more, log_dir=name, cwd=tmp_path))
    rows = [
        [line.split(",") for line in (tmp_path / name / "progress.csv").read_text().splitlines()]
        for name in ("plain", "varied")
    ]
    last = [dict(zip(header, values, strict=False)) for header, *_, values in rows]
    assert float(last[0]["val_loss"]) == pytest.approx(float(last[1]["val_loss"]), rel=1e-6)
    assert last[0]["loss"] != last[1]["loss"]


@pytest.mark.parametrize("flag", ["random_flip", "random_crop"])
def test_evaluation_has_no_such_flag(run_script, trained, folder, tmp_path, flag):
    flags = {"model_path": trained.path, "data_dir": folder, flag: True}
    assert f"--{flag}" in error_of(run_script("image_nll", flags, cwd=tmp_path))


def test_a_list_of_files_is_enough(folder):
    images = ImageList(list_images(str(folder)).paths[:4])
    (batch, _) = next(make("-", images=images, **BOTH))
    assert batch.shape == (4, 3, 8, 8)
