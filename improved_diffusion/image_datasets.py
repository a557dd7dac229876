"""Folders of images as batches: finding, labelling, resizing, shuffling, sharding."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from . import dist_util
from .errors import UserError
from .flags import ImageSize, height_width, option, require, require_at_least
from .pixels import PIL_MODES, read_image
from .rng import derive_seed
from .stopping import ignore_stop_signals

EXTENSIONS = ("jpg", "jpeg", "png", "gif", "webp", "bmp")
LABEL_SOURCES = ("filename", "folder")


@dataclass(frozen=True)
class DataOptions:
    """Where the images are and how they are read."""

    data_dir: str = option("", "folder of images, searched recursively; any path blobfile reads")
    num_workers: int = option(1, "processes that read images; 0 reads in the training process")
    labels_from: str = option(
        "filename",
        "a class is 'filename': the name up to the first _, or 'folder': the folder it lies in",
    )

    def __post_init__(self) -> None:
        if not self.data_dir:
            raise UserError("--data_dir is missing: name a folder of images")
        require_at_least(0, self, ["num_workers"])
        require(
            self.labels_from in LABEL_SOURCES,
            "labels_from",
            self.labels_from,
            " or ".join(LABEL_SOURCES),
        )


@dataclass(frozen=True)
class ImageList:
    """The images of a folder.

    ``paths`` are sorted; ``classes`` are indices into the sorted ``class_names``, or None.
    """

    paths: list[str]
    classes: list[int] | None = None
    class_names: tuple[str, ...] = ()


def list_images(
    data_dir: str,
    class_cond: bool = False,
    labels_from: str = "filename",
    flag: str = "data_dir",
) -> ImageList:
    """Find the images below a folder, and their classes. The first process looks, for all.

    Hidden files and folders are passed over.

    :param data_dir: any folder that blobfile reads.
    :param class_cond: whether to label the images.
    :param labels_from: "filename" for the name up to the first ``_``, "folder" for the name of
        the folder that holds the image.
    :param flag: the flag that named the folder, for the errors.
    :raises ValueError: on every process, if there is no such folder, or no image in it.
    """
    import blobfile as bf

    def find() -> list[str]:
        if not data_dir or not bf.isdir(data_dir):
            raise UserError(f"--{flag} '{data_dir}' is no folder")
        return _list_recursively(data_dir)

    paths = dist_util.on_first_rank(find)
    if not paths:
        raise UserError(f"--{flag} '{data_dir}' holds no images ({', '.join(EXTENSIONS)})")
    if not class_cond:
        return ImageList(paths)
    if labels_from == "folder":
        names = [bf.basename(bf.dirname(path)) for path in paths]
    else:
        names = [bf.basename(path).split("_")[0] for path in paths]
    class_names = sorted(set(names))
    index = {name: i for i, name in enumerate(class_names)}
    return ImageList(paths, [index[name] for name in names], tuple(class_names))


def _list_recursively(folder: str) -> list[str]:
    import blobfile as bf

    found = []
    for entry in sorted(bf.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir:
            found += _list_recursively(entry.path)
        elif "." in entry.name and entry.name.rsplit(".", 1)[1].lower() in EXTENSIONS:
            found.append(entry.path)
    return found


class ImageDataset(Dataset):
    """Images of one size with their labels.

    :param resolution: H = W, or (H, W).
    :param image_paths: files.
    :param classes: a label for each file, or None.
    :param shard: which of ``num_shards`` interleaved parts of the files to keep.
    :param channels: 1 grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha.
    """

    def __init__(
        self,
        resolution: ImageSize,
        image_paths: Sequence[str],
        classes: Sequence[int] | None = None,
        shard: int = 0,
        num_shards: int = 1,
        channels: int = 3,
    ) -> None:
        super().__init__()
        if channels not in PIL_MODES:
            raise UserError(
                f"--channels {channels}: image files have 1, 2, 3 or 4; for other data, pass "
                "TrainLoop your own iterator of batches"
            )
        self.resolution = resolution
        self.local_images = image_paths[shard::num_shards]
        self.local_classes = None if classes is None else classes[shard::num_shards]
        self.channels = channels

    def __len__(self) -> int:
        return len(self.local_images)

    def __getitem__(self, idx: int) -> tuple[np.ndarray, dict[str, Any]]:
        """
        :return: float32 [C, H, W] in [-1, 1], and {"y": int64 label} or {}.
        :raises ValueError: naming the file, if it is no image.
        """
        pixels = read_image(self.local_images[idx], self.resolution, self.channels)
        image = pixels.astype(np.float32) / 127.5 - 1
        cond = {}
        if self.local_classes is not None:
            cond["y"] = np.array(self.local_classes[idx], dtype=np.int64)
        return np.transpose(image, [2, 0, 1]), cond


class GlobalBatchSampler:
    """An endless series of one process's batches of indices.

    All images of an epoch come in one order, which depends on (seed, epoch) alone, epoch after
    epoch in one stream; each global batch is the next piece of the stream, and each process takes
    its part of it. So a position in the stream, counted in images, says what comes next, whatever
    the batch size and the number of processes. A batch may reach into the next epoch.

    :param size: number of images.
    :param batch_size: of one process.
    :param seed: None for the order of the files, the same in every epoch.
    :param rank: this process.
    :param world_size: number of processes.
    :param start: how many images of the stream to pass over, as a continued run does.
    :raises ValueError: if the images do not fill one global batch.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int | None,
        rank: int,
        world_size: int,
        start: int = 0,
    ) -> None:
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start = start
        self._epoch = -1
        self._epoch_order = np.arange(0)
        if size < batch_size * world_size:
            processes = f"{world_size} process{'es' if world_size > 1 else ''}"
            advice = (
                f"lower --batch_size to {size // world_size} or less"
                if size >= world_size
                else "start fewer processes"
            )
            raise UserError(
                f"{size} images are fewer than one global batch of {batch_size * world_size} "
                f"({processes} x --batch_size {batch_size}): {advice}, or add images"
            )

    def __iter__(self) -> Iterator[list[int]]:
        first = self.start + self.rank * self.batch_size
        while True:
            yield self.indices(first, self.batch_size)
            first += self.batch_size * self.world_size

    def indices(self, first: int, count: int) -> list[int]:
        """The indices at ``count`` positions of the stream from ``first`` on."""
        found = []
        for position in range(first, first + count):
            epoch, place = divmod(position, self.size)
            if epoch != self._epoch:
                self._epoch, self._epoch_order = epoch, self._order(epoch)
            found.append(int(self._epoch_order[place]))
        return found

    def _order(self, epoch: int) -> np.ndarray:
        if self.seed is None:
            return np.arange(self.size)
        seed = derive_seed(self.seed, "data order", epoch)
        return np.random.default_rng(seed).permutation(self.size)


Batch = tuple[Tensor, dict[str, Tensor]]


@runtime_checkable
class Seekable(Protocol):
    """Data that goes on from any position, as :class:`ImageStream` does."""

    def seek(self, images: int) -> None:
        """Go on as if all processes had taken so many images together."""

    def files(self, first: int, count: int) -> list[str]:
        """The files of the images at ``count`` positions."""


class ImageStream(Iterator[Batch]):
    """The endless batches of one process, which can go on from any position.

    :param dataset: the images.
    :param batch_size: of one process.
    :param seed: see :class:`GlobalBatchSampler`.
    :param num_workers: processes that read images.
    """

    def __init__(
        self, dataset: ImageDataset, batch_size: int, seed: int | None, num_workers: int
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.transform: Callable[[Batch], Batch] = lambda batch: batch
        self._batches: Generator[Batch, None, None] | None = None
        self.seek(0)

    def seek(self, images: int) -> None:
        """Go on as if all processes had taken so many images together."""
        rank, world_size = dist_util.get_rank(), dist_util.get_world_size()
        self._sampler = GlobalBatchSampler(
            len(self.dataset), self.batch_size, self.seed, rank, world_size, images
        )
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def map(self, transform: Callable[[Batch], Batch]) -> ImageStream:
        """Change every batch from now on by a function, in the training process."""
        self.transform = transform
        return self

    def files(self, first: int, count: int) -> list[str]:
        """The files of the images at ``count`` positions of the common stream."""
        return [self.dataset.local_images[i] for i in self._sampler.indices(first, count)]

    def __next__(self) -> Batch:
        if self._batches is None:
            loader = _loader(self.dataset, self._sampler, self.num_workers, ignore_stop_signals)
            self._batches = _batches(loader)
            # Workers that ignore SIGTERM must end before Python waits for them at its exit
            weakref.finalize(self, self._batches.close)
        return self.transform(next(self._batches))


def _loader(
    dataset: Dataset,
    batches: Iterable[list[int]],
    num_workers: int,
    worker_init: Callable[[int], None] | None = None,
) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=worker_init,
    )


def load_data(
    *,
    data_dir: str,
    batch_size: int,
    image_size: ImageSize,
    class_cond: bool = False,
    deterministic: bool = False,
    images: ImageList | None = None,
    channels: int = 3,
    labels_from: str = "filename",
    num_workers: int = 1,
    seed: int | None = None,
    start: int = 0,
) -> ImageStream:
    """An endless iterator of batches of images and their labels.

    Under a process group every process gets its own images.

    :param data_dir: folder of images, searched recursively.
    :param batch_size: N, of this process.
    :param image_size: H = W, or (H, W).
    :param class_cond: label the images under "y".
    :param deterministic: the order of the sorted file names rather than a shuffled one.
    :param images: the result of :func:`list_images`, if it is known already.
    :param channels: C: 1, 2, 3 or 4.
    :param labels_from: see :func:`list_images`.
    :param num_workers: processes that read images.
    :param seed: of the shuffled order; None draws one from torch's global generator.
    :param start: how many images to pass over, as a continued run does.
    :return: pairs of float32 [N, C, H, W] in [-1, 1], and {"y": int64 [N]} or {}.
    :raises ValueError: if the folder is missing or empty, or holds less than a global batch; and
        later, naming the file, for one that is no image.
    """
    images = images or list_images(data_dir, class_cond, labels_from)
    if not deterministic:
        if seed is None:
            seed = int(torch.randint(2**31, ()))
        seed = dist_util.broadcast_object(seed)  # one order for all processes
    dataset = ImageDataset(image_size, images.paths, images.classes, channels=channels)
    stream = ImageStream(dataset, batch_size, None if deterministic else seed, num_workers)
    stream.seek(start)
    return stream


def _batches(loader: DataLoader) -> Generator[Batch, None, None]:
    batches = iter(loader)
    try:
        yield from batches
    except UserError as error:
        # a worker's error arrives with its traceback in the message: keep its last line
        line = str(error).strip().splitlines()[-1]
        raise UserError(line.split(f"{UserError.__name__}: ", 1)[-1]) from None
    finally:  # a traceback may keep the iterator, and with it its workers
        if loader.num_workers:
            batches._shutdown_workers()  # type: ignore[attr-defined]


def load_once(
    images: ImageList,
    num_images: int,
    batch_size: int,
    image_size: ImageSize,
    *,
    channels: int = 3,
    num_workers: int = 1,
) -> Iterator[tuple[Tensor, dict[str, Tensor], list[int]]]:
    """Batches of the first images in the order of the files, each image once.

    Every process of a group gets equally many batches, of which the last may be empty.

    :return: triples of float32 [N, C, H, W] in [-1, 1], {"y": int64 [N]} or {}, and the indices
        of the images.
    """
    rank, world_size = dist_util.get_rank(), dist_util.get_world_size()
    stop = min(num_images, len(images.paths))
    shares = [
        list(
            range(min(stop, start + rank * batch_size), min(stop, start + (rank + 1) * batch_size))
        )
        for start in range(0, stop, batch_size * world_size)
    ]
    dataset = ImageDataset(image_size, images.paths, images.classes, channels=channels)
    batches = _batches(_loader(dataset, [share for share in shares if share], num_workers))
    height, width = height_width(image_size)
    nothing = torch.zeros(0, channels, height, width)
    for share in shares:
        batch, cond = next(batches) if share else (nothing, {})
        yield batch, cond, share
