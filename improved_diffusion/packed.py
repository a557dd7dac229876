"""Packed data sets: the final pixels of a folder of images in a few files that are mapped.

A packed set is a local folder that holds

- ``packed_00000.npy``, ...: the shards, [n, H, W, C] in the order of the folder's files;
- ``packed_names.json``: the names of those files, relative to their folder;
- ``packed_labels.npy``: int64 [N], if the names tell classes;
- ``packed_index.json``: everything else, with size and SHA-256 of each of the other files, and
  with its own. It is written last: without it there is no packed set.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import UserError
from .files import open_whole, write_file
from .flags import ImageSize, height_width, size_text
from .pixels import ValueRange, range_text

log = logging.getLogger(__name__)

FORMAT, VERSION = "improved_diffusion packed images", 1
INDEX, NAMES, LABELS = "packed_index.json", "packed_names.json", "packed_labels.npy"
FIRST_SHARD = "packed_00000.npy"
VERIFIED = "packed_verified.json"  # which files had the right checksum, and when they were written
SHARD_BYTES = 2**30
MOST_SHARDS = 256  # each is an open file of every process that reads
HASHING_THREADS = 4
LARGE = 2**33  # bytes, from which on checking them is announced

PREPROCESSING = {
    "resize": "halved by a box filter while twice the target fits, then bicubic",
    "crop": "centre",
}


@dataclass(frozen=True)
class PackedIndex:
    """What ``packed_index.json`` tells of a packed set."""

    image_size: tuple[int, int]  # H, W
    channels: int
    dtype: str
    value_range: ValueRange | None
    num_images: int
    folder: str  # name of the folder that was packed: the class of files in no other
    labels_from: str
    class_names: tuple[str, ...]  # empty: the names tell no classes
    shards: tuple[int, ...]  # how many images each shard holds
    files: dict[str, dict[str, Any]]  # name -> {"bytes": ..., "sha256": ...}
    preprocessing: dict[str, str]


@dataclass(frozen=True)
class PackedSet:
    """A packed set that was found whole."""

    folder: str
    index: PackedIndex

    def check(
        self,
        image_size: ImageSize,
        channels: int,
        value_range: ValueRange | None,
        size_flag: str = "image_size",
    ) -> None:
        """Check that the set holds what is asked for.

        :raises ValueError: naming the set, its value and the flag.
        """
        index, again = self.index, "or pack the images again"
        if height_width(image_size) != index.image_size:
            packed, asked = size_text(index.image_size), size_text(image_size)
            raise UserError(
                f"'{self.folder}' is packed at size {packed}, which --{size_flag} {asked} "
                f"contradicts: give --{size_flag} {packed}, {again} with --image_size {asked}"
            )
        if channels != index.channels:
            raise UserError(
                f"'{self.folder}' is packed with --channels {index.channels}, which --channels "
                f"{channels} contradicts: give --channels {index.channels}, {again}"
            )
        if value_range != index.value_range:
            ours, theirs = (
                f"--value_range {range_text(limits) if limits else repr('')}"
                for limits in (value_range, index.value_range)
            )
            raise UserError(
                f"'{self.folder}' is packed with {theirs}, which {ours} contradicts: give "
                f"{theirs}, {again}"
            )

    def labels(self) -> np.ndarray | None:
        """int64 [N] in the order of the images, or None."""
        if LABELS not in self.index.files:
            return None
        return np.load(os.path.join(self.folder, LABELS), allow_pickle=False)

    def names(self) -> list[str]:
        """The names of the files that were packed, relative to their folder."""
        with open(os.path.join(self.folder, NAMES), "rb") as file:
            return json.loads(file.read())


class PackedPixels:
    """The pixels of a packed set; shards are mapped into memory where they are first read.

    A pickled one holds no pixels.

    :raises ValueError: naming the file, if this process does not see a shard whole.
    """

    def __init__(self, packed: PackedSet) -> None:
        self.packed = packed
        self._ends = np.cumsum(packed.index.shards)
        self._maps: dict[int, np.ndarray] = {}
        _check_sizes(packed.folder, packed.index)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def read(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Copy some images.

        :param rows: N of 0 ... num_images - 1, in any order.
        :return: [N, H, W, C] as stored.
        """
        index, rows = self.packed.index, np.asarray(rows, dtype=np.int64)
        shards = np.searchsorted(self._ends, rows, side="right")
        numbers = np.unique(shards)
        if len(numbers) == 1:
            return self._shard(int(numbers[0]))[rows - self._start(int(numbers[0]))]
        pixels = np.empty((len(rows), *index.image_size, index.channels), index.dtype)
        for number in map(int, numbers):
            here = shards == number
            pixels[here] = self._shard(number)[rows[here] - self._start(number)]
        return pixels

    def _start(self, number: int) -> int:
        return int(self._ends[number]) - self.packed.index.shards[number]

    def _shard(self, number: int) -> np.ndarray:
        if number not in self._maps:
            path = os.path.join(self.packed.folder, shard_name(number))
            try:
                mapped = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise UserError(f"'{path}' cannot be read: {error}") from None
            self._maps[number] = mapped.view(np.ndarray)  # np.memmap is slow to index
        return self._maps[number]


def shard_name(number: int) -> str:
    """File of a shard."""
    return f"packed_{number:05d}.npy"


# -- opening ----------------------------------------------------------------------------------


def is_packed(folder: str) -> bool:
    """Whether a folder is a packed set.

    :raises ValueError: if it was going to be one, but packing was cut off.
    """
    import blobfile as bf

    if bf.exists(bf.join(folder, INDEX)):
        if "://" in folder:
            raise UserError(f"'{folder}' is a packed set: copy it to a local disk to use it")
        return True
    if bf.exists(bf.join(folder, FIRST_SHARD)):
        raise UserError(
            f"'{folder}' holds {FIRST_SHARD}, but no {INDEX}: packing was cut off; start "
            "datasets/pack.py again"
        )
    return False


def open_packed(folder: str, thorough: bool = False) -> PackedSet:
    """Read the index of a packed set and check the other files against it.

    Sizes are compared each time. Checksums are, for files that were not found right before or
    have been written since then, which :data:`VERIFIED` notes beside them, or in the user's cache
    folder where the set cannot be written to.

    :param thorough: compare all checksums.
    :raises ValueError: naming the file, if one is missing, damaged, or of a newer version.
    """
    path = os.path.join(folder, INDEX)
    if not os.path.exists(path):
        raise UserError(f"'{folder}' is no packed set: it holds no {INDEX}")
    index, checksum = _read_index(path)
    _check_sizes(folder, index)
    _check_checksums(folder, index, checksum, thorough)
    return PackedSet(os.path.abspath(folder), index)


def _read_index(path: str) -> tuple[PackedIndex, str]:
    """The index, and its checksum."""
    damaged = UserError(f"'{path}' is damaged: copy the packed set again, or pack it again")
    try:
        with open(path, "rb") as file:
            stored = json.loads(file.read())
        if stored["format"] != FORMAT or not isinstance(stored["version"], int):
            raise damaged
        if stored["version"] > VERSION:
            raise UserError(
                f"'{path}' is of version {stored['version']}, newer than {VERSION}, which this "
                "release reads: update improved_diffusion, or pack the images again"
            )
        if stored["sha256"] != _digest_of(stored["index"]):
            raise damaged
        values: dict[str, Any] = {  # JSON has lists, which a frozen dataclass should not
            name: tuple(value) if isinstance(value, list) else value
            for name, value in stored["index"].items()
        }
        return PackedIndex(**values), stored["sha256"]
    except UserError:
        raise
    except (ValueError, KeyError, TypeError):
        raise damaged from None


def _digest_of(index: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def _check_sizes(folder: str, index: PackedIndex) -> None:
    for name, entry in index.files.items():
        path = os.path.join(folder, name)
        try:
            size = os.stat(path).st_size
        except OSError as error:
            reason = "is missing" if isinstance(error, FileNotFoundError) else str(error.strerror)
            raise UserError(
                f"packed set: '{path}' {reason}: copy the set again, or pack it again"
            ) from None
        if size != entry["bytes"]:
            raise UserError(
                f"packed set: '{path}' has {size:,} bytes instead of {entry['bytes']:,}: copy the "
                "set again, or pack it again"
            )


def _check_checksums(folder: str, index: PackedIndex, checksum: str, thorough: bool) -> None:
    places = [os.path.join(folder, VERIFIED), _cache_path(checksum)]
    known = {} if thorough else _read_notes(places)
    notes = {name: _note(os.path.join(folder, name), index, name) for name in index.files}
    doubtful = [name for name in index.files if known.get(name) != notes[name]]
    if not doubtful:
        return
    total = sum(index.files[name]["bytes"] for name in doubtful)
    if total >= LARGE:
        log.warning(
            f"comparing the checksums of '{folder}', {total / 1e9:.0f} GB; later starts will not"
        )
    paths = [os.path.join(folder, name) for name in doubtful]
    with ThreadPoolExecutor(HASHING_THREADS) as pool:  # hashing releases the interpreter
        for name, path, found in zip(doubtful, paths, pool.map(_sha256, paths), strict=True):
            if found != index.files[name]["sha256"]:
                raise UserError(
                    f"packed set: '{path}' is damaged (its checksum is wrong): copy the set "
                    "again, or pack it again"
                )
    _write_notes(places, notes)


def _note(path: str, index: PackedIndex, name: str) -> list[Any]:
    """What changes when a file does; ctime also for a copy that keeps the time of writing."""
    stat = os.stat(path)
    return [index.files[name]["sha256"], stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _cache_path(checksum: str) -> str:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(cache, "improved_diffusion", f"{checksum}.json")


def _read_notes(places: Iterable[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in places:
        with contextlib.suppress(OSError, ValueError, TypeError), open(path, "rb") as file:
            found |= json.loads(file.read())
    return found


def _write_notes(places: Iterable[str], notes: dict[str, Any]) -> None:
    """Write the notes to the first place that lets us; if none does, all is checked next time."""
    for path in places:
        with contextlib.suppress(OSError):
            if os.path.basename(path) != VERIFIED:
                os.makedirs(os.path.dirname(path), exist_ok=True)
            write_file(path, (json.dumps(notes, indent=1) + "\n").encode())
            return


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


# -- writing ----------------------------------------------------------------------------------


def write_packed(
    folder: str,
    batches: Iterable[np.ndarray],
    names: Sequence[str],
    *,
    root: str,
    labels: Sequence[int] | None = None,
    class_names: Sequence[str] = (),
    labels_from: str = "filename",
    value_range: ValueRange | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> PackedSet:
    """Write a packed set.

    :param folder: new, empty, or left behind by packing that was cut off.
    :param batches: [n, H, W, C] pixels, all of one type, of N images in the order of the names.
    :param names: N names relative to their folder.
    :param root: the name of that folder.
    :param labels: N indices into ``class_names``, or None.
    :param shard_bytes: about how large a shard may be.
    :raises ValueError: if the folder holds anything else, or the types of the pixels differ.
    """
    _clear(folder)
    images = (image for batch in batches for image in batch)
    first = next(images)  # [H, W, C]
    per_shard = max(shard_bytes // first.nbytes, -(-len(names) // MOST_SHARDS), 1)
    counts = [min(per_shard, len(names) - start) for start in range(0, len(names), per_shard)]
    pixels, files = _chained(first, images, names), {}
    for number, count in enumerate(counts):
        path = os.path.join(folder, shard_name(number))
        files[shard_name(number)] = _write_shard(path, pixels, count, first)
    assert next(pixels, None) is None, "more images than names"
    files[NAMES] = _write_bytes(os.path.join(folder, NAMES), json.dumps(list(names)).encode())
    if labels is not None:
        array = io.BytesIO()
        np.save(array, np.asarray(labels, dtype=np.int64))
        files[LABELS] = _write_bytes(os.path.join(folder, LABELS), array.getvalue())
    index = PackedIndex(
        image_size=first.shape[:2],
        channels=first.shape[2],
        dtype=first.dtype.name,
        value_range=value_range,
        num_images=len(names),
        folder=root,
        labels_from=labels_from,
        class_names=tuple(class_names) if labels is not None else (),
        shards=tuple(counts),
        files=files,
        preprocessing={**PREPROCESSING, **_versions()},
    )
    _write_index(folder, index)
    return PackedSet(os.path.abspath(folder), index)


def _versions() -> dict[str, str]:
    import PIL

    from ._version import __version__

    return {"improved_diffusion": __version__, "pillow": PIL.__version__}


def _clear(folder: str) -> None:
    """Make the folder; remove what packing left behind that was cut off."""
    os.makedirs(folder, exist_ok=True)
    found = os.listdir(folder)
    if INDEX in found:
        raise UserError(f"'{folder}' holds a packed set already: delete it, or name another folder")
    others = [name for name in found if not name.startswith("packed_")]
    if others:
        raise UserError(
            f"'{folder}' holds other files, such as {others[0]}: name a folder that is new or empty"
        )
    for name in found:
        os.unlink(os.path.join(folder, name))


def _chained(
    first: np.ndarray, rest: Iterator[np.ndarray], names: Sequence[str]
) -> Iterator[np.ndarray]:
    yield first
    for number, image in enumerate(rest, start=1):
        if not np.can_cast(image.dtype, first.dtype):
            raise UserError(
                f"'{names[number]}' holds {image.dtype.name}, but '{names[0]}' {first.dtype.name}: "
                "a packed set has one type; pack them into two, or use the folder as it is"
            )
        yield image.astype(first.dtype, copy=False)


def _write_shard(
    path: str, images: Iterator[np.ndarray], count: int, like: np.ndarray
) -> dict[str, Any]:
    """Write ``count`` images as an array of NumPy's; its entry in the index."""
    header = io.BytesIO()
    description = np.lib.format.dtype_to_descr(like.dtype)
    shape = (count, *like.shape)
    np.lib.format.write_array_header_1_0(
        header, {"descr": description, "fortran_order": False, "shape": shape}
    )
    digest, size = hashlib.sha256(header.getvalue()), len(header.getvalue())
    with open_whole(path) as file:
        file.write(header.getvalue())
        for _ in range(count):
            data = next(images).tobytes()
            digest.update(data)
            size += len(data)
            file.write(data)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _write_bytes(path: str, data: bytes) -> dict[str, Any]:
    write_file(path, data)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _write_index(folder: str, index: PackedIndex) -> None:
    plain = json.loads(json.dumps(dataclasses.asdict(index)))
    stored = {"format": FORMAT, "version": VERSION, "sha256": _digest_of(plain), "index": plain}
    write_file(os.path.join(folder, INDEX), (json.dumps(stored, indent=1) + "\n").encode())
