"""Turn the published CIFAR-10 archive into two folders of PNGs, ``cifar_train`` and ``cifar_test``.

The archive's checksum is verified before it is opened. Its batches are pickles; they are read by
an unpickler that can make NumPy arrays and Python's own containers, and nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import io
import os
import pickle
import sys
import tarfile
import urllib.request
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from _common import run, write_images
from PIL import Image
from tqdm import tqdm

from improved_diffusion.errors import UserError

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
MD5 = "c58f30108f718f92721af3b95e74349a"
SPLITS = {
    "cifar_train": [f"cifar-10-batches-py/data_batch_{i}" for i in range(1, 6)],
    "cifar_test": ["cifar-10-batches-py/test_batch"],
}
# The classes of the labels 0..9.
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CHUNK = 1 << 20  # bytes

# What a pickled NumPy array names; NumPy 2 moved the function, and pickles keep the old place.
_RECONSTRUCT = np.empty(0, np.uint8).__reduce__()[0]
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


def main(argv: Sequence[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    out_dir = Path(args.out_dir)
    archive = find_archive(args.archive, Path(args.download_dir or out_dir), args.url, args.md5)
    for split, (images, labels) in read_archive(archive).items():
        write_images(out_dir / split, named_images(images, labels), total=len(labels))


def find_archive(archive: str | None, download_dir: Path, url: str, md5: str) -> Path:
    """The path of an archive with the right checksum, downloaded if there is none.

    :param archive: the user's own file; None: the one in ``download_dir``, now or after the
        download.
    :raises UserError: the file does not exist, or its checksum is wrong.
    """
    path = Path(archive) if archive is not None else download_dir / "cifar-10-python.tar.gz"
    if path.is_file():
        verify_md5(path, md5)
    elif archive is not None:
        raise UserError(f"--archive {path}: no such file; without the flag it is downloaded")
    else:
        download(url, path, md5)
    return path


def verify_md5(path: Path, expected: str, source: str | None = None) -> None:
    """Compare a file's MD5 sum, in hexadecimal, with the expected one.

    :param source: the address that the file has just come from, for the error.
    :raises UserError: they differ.
    """
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != expected.lower():
        remedy = "delete it and" if source is None else "try again, or"
        raise UserError(
            f"{source or path}: its MD5 sum is {digest.hexdigest()}, not {expected}: the file is "
            f"damaged, incomplete or another one; {remedy} get it anew from {URL}"
        )


def download(url: str, path: Path, md5: str) -> None:
    """Fetch a file; it gets its name when it is complete and its checksum is right."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        _fetch(url, part)
        verify_md5(part, md5, source=url)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _fetch(url: str, path: Path) -> None:
    try:
        response = urllib.request.urlopen(url, timeout=60)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise _failed(url, error) from error
    total = int(response.headers.get("Content-Length") or 0) or None
    bar = tqdm(total=total, desc=url, unit="B", unit_scale=True, file=sys.stderr)
    with response, bar, open(path, "wb") as file:
        while chunk := _read(response, url):
            file.write(chunk)
            bar.update(len(chunk))
        file.flush()
        os.fsync(file.fileno())


def _read(response: IO[bytes], url: str) -> bytes:
    try:
        return response.read(CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _failed(url, error) from error


def _failed(url: str, error: Exception) -> UserError:
    return UserError(
        f"{url}: the download failed ({str(error) or type(error).__name__}); try again, "
        "or fetch the file by other means and name it with --archive"
    )


def read_archive(path: Path) -> dict[str, tuple[np.ndarray, list[int]]]:
    """Read all images of the archive, the batches of a split in their published order.

    :return: for each split uint8 images [N, 32, 32, 3] and N labels in 0..9.
    :raises UserError: a batch is missing, incomplete or not what CIFAR-10 holds.
    """
    splits = {}
    for split, members in SPLITS.items():
        batches = [read_batch(path, _member_bytes(path, member), member) for member in members]
        images = np.concatenate([images for images, _ in batches])
        splits[split] = images, [label for _, labels in batches for label in labels]
    return splits


def _member_bytes(path: Path, member: str) -> bytes:
    try:
        with tarfile.open(path, "r:gz") as archive:
            file = archive.extractfile(member)
            if file is None:
                raise KeyError(f"{member} is not a file")
            return file.read()
    except (tarfile.TarError, zlib.error, EOFError, KeyError, OSError) as error:
        raise UserError(
            f"{path}: cannot read {member} ({error}); it must be a complete "
            "cifar-10-python.tar.gz, so download it again"
        ) from error


def read_batch(path: Path, data: bytes, member: str) -> tuple[np.ndarray, list[int]]:
    """Read the pickle of one batch.

    :param path: the archive, and :param member: the batch's name in it, for the errors.
    :param data: the pickle: a dict with ``data``, uint8 [N, 3072], planes of 32 x 32 red, green
        and blue, and ``labels``, a list of N ints.
    :return: uint8 images [N, 32, 32, 3] and their labels.
    """
    try:
        batch = BatchUnpickler(data).load()
        pixels, labels = batch[b"data"], batch[b"labels"]
    except Exception as error:  # damaged or hostile bytes can fail in any way
        raise UserError(
            f"{path}: {member} is no batch of CIFAR-10 ({error}); use the published archive"
        ) from error
    if not (
        isinstance(pixels, np.ndarray)
        and pixels.dtype == np.uint8
        and isinstance(labels, list)
        and pixels.shape == (len(labels), 3 * 32 * 32)
        and all(type(label) is int and 0 <= label < len(NAMES) for label in labels)
    ):
        raise UserError(
            f"{path}: {member} must hold uint8 data [N, 3072] and N labels in 0..9; "
            "use the published archive"
        )
    return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


class BatchUnpickler(pickle.Unpickler):
    """Reads pickled arrays inside dicts, lists, numbers and bytes; refuses everything else."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="bytes")  # Python 2 wrote the published ones

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"its pickle asks for {module}.{name}, which is refused")
        return _ALLOWED[module, name]


def named_images(images: np.ndarray, labels: list[int]) -> Iterator[tuple[str, Image.Image]]:
    """File names and pictures, numbered in the order of the archive."""
    for index, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        image = Image.fromarray(np.ascontiguousarray(pixels))  # [32, 32, 3]
        yield f"{NAMES[label]}_{index:05d}.png", image


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Turn the CIFAR-10 archive into the folders cifar_train and cifar_test.",
    )
    parser.add_argument(
        "out_dir",
        nargs="?",
        default=".",
        help="folder in which cifar_train and cifar_test are made (default: the current one)",
    )
    parser.add_argument(
        "--archive",
        help="a cifar-10-python.tar.gz on this machine; without the flag it is downloaded",
    )
    parser.add_argument(
        "--download_dir",
        help="folder for the download; an archive already there is used (default: OUT_DIR)",
    )
    parser.add_argument("--url", default=URL, help="where to download from (default: %(default)s)")
    parser.add_argument(
        "--md5", default=MD5, help="MD5 sum that the archive must have (default: %(default)s)"
    )
    return parser


if __name__ == "__main__":
    run(main)
