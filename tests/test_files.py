"""Files are there whole or not at all, whatever goes wrong in writing them."""

import hashlib
import os
import pickle

import pytest
import torch

from improved_diffusion import dist_util
from improved_diffusion.checkpoint import find_newest_model
from improved_diffusion.files import file_entry, write_file, write_tensors


def fail(*args):
    raise OSError("disk full")


def test_file_is_written_and_overwritten(tmp_path):
    path = tmp_path / "a.bin"
    for data in (b"first", b"", b"second\r\n\x00"):
        write_file(str(path), data)
        assert path.read_bytes() == data
        assert os.listdir(tmp_path) == ["a.bin"]


def test_file_is_complete_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """Otherwise a power cut may leave a named file without its content."""
    path, events = tmp_path / "a.bin", []
    path.write_bytes(b"old")
    fsync, replace = os.fsync, os.replace

    def noted_fsync(fd):
        events.append(("fsync", os.fstat(fd).st_size, path.read_bytes()))
        fsync(fd)

    def noted_replace(source, target):
        events.append(("replace", os.path.getsize(source), path.read_bytes()))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write_file(str(path), b"12345")
    assert events[:2] == [("fsync", 5, b"old"), ("replace", 5, b"old")]
    assert path.read_bytes() == b"12345"


@pytest.mark.parametrize("broken", ["fsync", "replace"])
@pytest.mark.parametrize("name", ["model000005.pt", "config.json"])
def test_write_that_fails_leaves_no_file_under_the_name(tmp_path, monkeypatch, broken, name):
    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError, match="disk full"):
        write_file(str(tmp_path / name), b"12345")
    assert not (tmp_path / name).exists()
    assert find_newest_model(str(tmp_path)) is None


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_write_that_fails_keeps_the_old_file(tmp_path, monkeypatch, broken):
    path = tmp_path / "model000005.pt"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError, match="disk full"):
        write_file(str(path), b"12345")
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_write_that_fails_leaves_no_partial_file(tmp_path, monkeypatch, broken):
    """On a full disk what is left behind would stand in the way of the next save."""
    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError, match="disk full"):
        write_file(str(tmp_path / "model000005.pt"), b"12345")
    assert os.listdir(tmp_path) == []


def test_interrupted_write_does_not_hinder_the_next(tmp_path, monkeypatch):
    path = tmp_path / "model000005.pt"

    def interrupted(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_file(str(path), b"a long text that was never named")
    write_file(str(path), b"short")
    assert path.read_bytes() == b"short"
    assert os.listdir(tmp_path) == [path.name]


def test_tensors_are_read_back(tmp_path):
    path = str(tmp_path / "a.pt")
    write_tensors(path, {"w": torch.arange(6.0).view(2, 3), "n": torch.tensor(3)})
    state = dist_util.load_state_dict(path, map_location="cpu")
    assert list(state) == ["w", "n"]
    assert torch.equal(state["w"], torch.arange(6.0).view(2, 3))
    assert torch.equal(state["n"], torch.tensor(3))


def test_tensors_that_cannot_be_saved_leave_the_old_file(tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(b"old")
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        write_tensors(str(path), {"f": lambda: None})
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.pt"]


def test_size_and_checksum_are_those_of_the_file(tmp_path):
    path = str(tmp_path / "a.pt")
    entry = write_tensors(path, {"w": torch.randn(100)})
    data = (tmp_path / "a.pt").read_bytes()
    assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert file_entry(path) == entry
