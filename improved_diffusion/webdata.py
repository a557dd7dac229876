"""Tar shards as an endless stream of batches, for data that fits no disk.

The package webdataset (an extra) groups the files of a shard into samples and shuffles them.
"""

from __future__ import annotations

import itertools
import random
import re
import tarfile
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from . import dist_util
from .errors import UserError
from .flags import ImageSize, height_width
from .image_datasets import EXTENSIONS, VALUE_EXTENSIONS
from .image_stream import PREFETCH, Batch, on_device, read_all
from .pixels import PIL_MODES, ValueRange, decode_image
from .rng import derive_seed
from .stopping import ignore_stop_signals

if TYPE_CHECKING:
    from typing_extensions import Self

SHUFFLED_IMAGES = 1000  # of each worker, from which the next one is drawn
SHUFFLED_BYTES = 2**28  # at most, for large images


# -- finding ----------------------------------------------------------------------------------


def find_shards(data_dir: str, flag: str = "data_dir") -> list[str]:
    """The tar shards that ``--data_dir`` names. The first process looks, for all.

    :param data_dir: a folder that holds nothing but .tar files; or one or more of them, separated
        by commas, where braces stand for several: ``shards/{000..010}.tar``.
    :return: their paths, in order; empty if it names something else.
    :raises ValueError: on every process, if a shard is missing or webdataset is not installed.
    """
    import blobfile as bf

    def find() -> list[str]:
        try:
            return _find(data_dir, flag)
        except bf.Error as error:  # a kind of address that blobfile does not know
            raise UserError(f"--{flag} '{data_dir}': {error}") from None

    return dist_util.on_first_rank(find)


def _find(data_dir: str, flag: str) -> list[str]:
    import blobfile as bf

    if data_dir and not _is_web_address(data_dir) and bf.isdir(data_dir):
        return _tars_of(data_dir)
    if not re.search(r"\.tar\}?$", data_dir):
        return []
    _webdataset()
    from webdataset.shardlists import expand_urls

    try:
        parts = re.split(r",(?![^{}]*\})", data_dir)  # commas outside of braces
        shards = [url for part in parts for url in expand_urls(part)]
    except (ValueError, AssertionError) as error:
        raise UserError(f"--{flag} '{data_dir}' is no pattern of .tar files: {error}") from None
    for shard in shards:
        if not _is_web_address(shard) and not bf.exists(shard):
            raise UserError(f"--{flag} '{data_dir}': '{shard}' does not exist")
    return shards


def _tars_of(folder: str) -> list[str]:
    import blobfile as bf

    found = []
    for entry in bf.scandir(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir or not entry.name.endswith(".tar"):
            return []
        found.append(entry.path)
    if found:
        _webdataset()
    return sorted(found)


def _webdataset() -> Any:
    try:
        import webdataset
    except ImportError:
        raise UserError(
            "tar shards need webdataset: pip install 'improved-diffusion[webdataset]'"
        ) from None
    return webdataset


def _is_web_address(shard: str) -> bool:
    return shard.startswith(("http://", "https://")) and ".blob.core.windows.net/" not in shard


# -- reading ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardFormat:
    """What is made of the files in a shard.

    :param image_size: H = W, or (H, W).
    :param channels: C.
    :param value_range: see :func:`.read_image`.
    :param class_names: names by class index; empty for no labels.
    :param labels_from: where a sample without a ``.cls`` file has its class: "filename" for its
        name up to the first ``_``, "folder" for the folder in the shard.
    :param like: the name of a sample that has these channels, for errors.
    """

    image_size: ImageSize
    channels: int = 3
    value_range: ValueRange | None = None
    class_names: tuple[str, ...] = ()
    labels_from: str = "filename"
    like: str = ""

    def decode(self, sample: dict[str, Any], crop: np.random.Generator | None) -> Any:
        """A sample's pixels and label.

        :return: [H, W, C] and int or None; None for a sample without an image.
        :raises ValueError: naming the shard and the file in it.
        """
        extensions = EXTENSIONS + (VALUE_EXTENSIONS if self.value_range is not None else ())
        place = f"{sample['__url__']}/{sample['__key__']}"
        found = [key for key in sample if key.rsplit(".", 1)[-1] in extensions and key[0] != "_"]
        if not found:
            return None
        if len(found) > 1:
            raise UserError(
                f"'{place}' has several images ({', '.join(sorted(found)[:5])}): files of one name "
                "up to the first dot are one sample, which must have one image"
            )
        pixels = decode_image(
            sample[found[0]],
            f"{place}.{found[0]}",
            self.image_size,
            self.channels,
            value_range=self.value_range,
            crop=crop,
            like=(self.like, self.channels) if self.like else None,
        )
        return pixels, self._label(sample, place) if self.class_names else None

    def _label(self, sample: dict[str, Any], place: str) -> int:
        if "cls" in sample:
            name, where = sample["cls"].decode(errors="replace").strip(), ".cls"
        elif self.labels_from == "folder":
            name, where = place.rsplit("/", 2)[-2], "folder"
        else:
            name, where = place.rsplit("/", 1)[-1].split("_")[0], "name"
        if name in self.class_names:
            return self.class_names.index(name)
        if name.isdecimal() and int(name) < len(self.class_names):
            return int(name)
        raise UserError(
            f"'{place}' has the class '{name[:40]}' by its {where}: must be a number below "
            f"--num_classes {len(self.class_names)}, as a .cls file holds it"
        )


class _Header(tarfile.TarInfo):
    """A header in a tar file that must be whole: tarfile takes a damaged one for the end."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the zeros at the end
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"damaged, or cut short ({error})") from None


def read_shard(shard: str) -> Iterator[dict[str, Any]]:
    """The samples of a shard: contents by extension, ``__key__`` and ``__url__``.

    :raises ValueError: naming the shard, if it is missing, damaged or cut short.
    """
    from webdataset.tariterators import group_by_keys

    def files() -> Iterator[dict[str, Any]]:
        with (
            _open(shard) as stream,
            tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Header) as archive,
        ):
            for member in archive:
                content = archive.extractfile(member) if member.isreg() else None
                if content is not None:
                    yield {"fname": member.name, "data": content.read(), "__url__": shard}
                archive.members = []  # type: ignore[attr-defined]  # else they pile up

    try:
        yield from group_by_keys(files())
    except UserError:
        raise
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        reason = (str(error.args[0] if error.args else error).splitlines() or [""])[0]
        raise UserError(
            f"'{shard}' cannot be read as a tar file: {reason or type(error).__name__}"
        ) from None


def _open(shard: str) -> Any:
    import blobfile as bf

    return _webdataset().gopen(shard) if _is_web_address(shard) else bf.BlobFile(shard, "rb")


class ShardBatches(IterableDataset):
    """The endless batches of one process, read by its workers; each makes whole batches.

    All shards come in one order, which depends on (seed, start, epoch) alone, epoch after epoch in
    one stream, of which the workers of all processes take every shard in turn. What a worker reads
    is shuffled in a buffer.

    :param shards: tar files.
    :param form: what is made of them.
    :param batch_size: of this process.
    :param seed: of the order, flips and crops.
    :param start: another number, another order.
    :param flip: mirror half of the images.
    :param crop: cut out random places.
    """

    def __init__(
        self,
        shards: Sequence[str],
        form: ShardFormat,
        batch_size: int,
        seed: int,
        start: int = 0,
        flip: bool = False,
        crop: bool = False,
    ) -> None:
        self.shards = shards
        self.form = form
        self.batch_size = batch_size
        self.seed = derive_seed(seed, "tar shards", start)
        self.flip = flip
        self.crop = crop
        self.rank, self.world_size = dist_util.get_rank(), dist_util.get_world_size()

    def __iter__(self) -> Iterator[Batch]:
        """
        :return: pairs of [N, H, W, C] as stored, and {"y": int64 [N]} or {}.
        """
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        reader = self.rank * workers + worker
        images = self._images(reader, self.world_size * workers)
        rng = random.Random(derive_seed(self.seed, "shuffle", reader))
        height, width = height_width(self.form.image_size)
        size = height * width * self.form.channels * (1 if self.form.value_range is None else 4)
        buffer = max(1, min(SHUFFLED_IMAGES, SHUFFLED_BYTES // size))
        shuffled = _webdataset().shuffle(buffer, initial=min(buffer, 100), rng=rng)(images)
        while True:
            pixels, labels = zip(*itertools.islice(shuffled, self.batch_size), strict=True)
            cond = {"y": torch.tensor(labels)} if self.form.class_names else {}
            yield torch.from_numpy(np.stack(pixels)), cond

    def _images(self, reader: int, readers: int) -> Iterator[tuple[np.ndarray, int | None]]:
        """Images and labels of one worker, shard after shard."""
        for position in itertools.count(reader, readers):
            epoch, place = divmod(position, len(self.shards))
            order = np.random.default_rng(derive_seed(self.seed, "order", epoch))
            shard = self.shards[order.permutation(len(self.shards))[place]]
            for number, image in enumerate(images_of(shard, self.form, self._crops(position))):
                pixels, label = image
                if self.flip:
                    draw = np.random.default_rng(derive_seed(self.seed, "flip", position, number))
                    pixels = pixels[:, ::-1] if draw.random() < 0.5 else pixels
                yield pixels, label

    def _crops(self, position: int) -> Callable[[int], np.random.Generator] | None:
        if not self.crop:
            return None
        return lambda number: np.random.default_rng(
            derive_seed(self.seed, "crop", position, number)
        )


def images_of(
    shard: str, form: ShardFormat, crops: Callable[[int], np.random.Generator] | None = None
) -> Iterator[tuple[np.ndarray, int | None]]:
    """The images of a shard, in order, with their labels.

    :param crops: from the number of a sample to what its crop is drawn from.
    :raises ValueError: naming shard or sample, if it does not fit, or the shard holds no image.
    """
    count = 0
    for number, sample in enumerate(read_shard(shard)):
        image = form.decode(sample, crops(number) if crops else None)
        if image is not None:
            count += 1
            yield image
    if not count:
        raise UserError(f"'{shard}' holds no images ({', '.join(EXTENSIONS)})")


# -- streams ----------------------------------------------------------------------------------


@runtime_checkable
class Reshuffled(Protocol):
    """Data that goes on in another order, as :class:`ShardStream` does."""

    def reshuffle(self, images: int) -> None:
        """Draw another order, for a run that has seen so many images."""


class ShardStream(Iterator[Batch]):
    """The endless batches of one process; like :class:`.ImageStream`, but without positions.

    :param shards: tar files, at least one for each process.
    :param form: what is made of them.
    :param batch_size: of one process.
    :param seed: of the order, flips and crops.
    :param num_workers: processes that read shards.
    :param device: where batches are normalised and stay; None for the CPU.
    :param flip: mirror half of the images.
    :param crop: cut out random places.
    """

    def __init__(
        self,
        shards: Sequence[str],
        form: ShardFormat,
        batch_size: int,
        seed: int,
        num_workers: int = 0,
        device: torch.device | str | None = None,
        flip: bool = False,
        crop: bool = False,
    ) -> None:
        self.shards = shards
        self.form = form
        self.num_workers = num_workers
        self.device = device
        self.options: dict[str, Any] = {
            "batch_size": batch_size,
            "seed": seed,
            "flip": flip,
            "crop": crop,
        }
        self.transform: Callable[[Batch], Batch] = lambda batch: batch
        self._batches: Generator[Batch, None, None] | None = None
        self._start = 0

    def reshuffle(self, images: int) -> None:
        """Go on in another order, drawn from the seed and a number of images seen."""
        self._start = images
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def map(self, transform: Callable[[Batch], Batch]) -> ShardStream:
        """Change every batch from now on by a function, in the training process."""
        self.transform = transform
        return self

    def first(self, count: int) -> tuple[Batch, list[int]]:
        """The first images of the first shards, without augmentation, and their indices."""
        images = itertools.chain.from_iterable(images_of(s, self.form) for s in self.shards)
        pixels, labels = zip(*itertools.islice(images, count), strict=True)
        cond = {"y": torch.tensor(labels)} if self.form.class_names else {}
        batch = on_device(
            (torch.from_numpy(np.stack(pixels)), cond), self.form.value_range, self.device
        )
        return batch, list(range(len(pixels)))

    def __next__(self) -> Batch:
        if self._batches is None:
            dataset = ShardBatches(self.shards, self.form, start=self._start, **self.options)
            loader: DataLoader = DataLoader(
                dataset,
                batch_size=None,
                num_workers=self.num_workers,
                prefetch_factor=PREFETCH if self.num_workers else None,
                pin_memory=torch.cuda.is_available(),
                worker_init_fn=ignore_stop_signals,
            )
            self._batches = read_all(loader)
            # Workers that ignore SIGTERM must end before Python waits for them at its exit
            weakref.finalize(self, self._batches.close)
        return self.transform(on_device(next(self._batches), self.form.value_range, self.device))


def workers_of(num_shards: int, num_workers: int) -> int:
    """How many workers of each process have shards to read.

    :raises ValueError: if there are fewer shards than processes.
    """
    world_size = dist_util.get_world_size()
    if num_shards < world_size:
        raise UserError(
            f"{num_shards} tar shards are fewer than {world_size} processes: start fewer, or write "
            "more shards"
        )
    return min(num_workers, num_shards // world_size)


def check_first(shard: str, form: ShardFormat) -> str:
    """Check the first image of a shard before anything begins. The first process does, for all.

    :return: its name, for :attr:`ShardFormat.like`.
    :raises ValueError: on every process, naming shard or sample.
    """

    def check() -> str:
        if form.channels not in PIL_MODES and form.value_range is None:
            raise UserError(
                f"--channels {form.channels}: image files have 1, 2, 3 or 4; for other data, give "
                "its --value_range"
            )
        for sample in read_shard(shard):
            if form.decode(sample, None) is not None:
                return f"{shard}/{sample['__key__']}"
        raise UserError(f"'{shard}' holds no images ({', '.join(EXTENSIONS)})")

    return dist_util.on_first_rank(check)
