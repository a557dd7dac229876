"""Images as batches: in which order, on which process, read by whom."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import warnings
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from . import dist_util
from .augment import Augmentation, Place
from .errors import UserError
from .pixels import ValueRange, normalize
from .rng import derive_seed
from .stopping import ignore_stop_signals

log = logging.getLogger(__name__)

PREFETCH = 4  # batches that each worker reads ahead; as uint8 they take as much as one of float32

Batch = tuple[Tensor, dict[str, Tensor]]


class Images(Protocol):
    """What batches are made of: images of one size and their labels."""

    local_images: Sequence[str]
    value_range: ValueRange | None

    def __len__(self) -> int:
        """The number of images."""

    def read(
        self, indices: Sequence[int], crops: Sequence[np.random.Generator] | None = None
    ) -> np.ndarray:
        """The pixels of some images as they are stored, [N, H, W, C]."""

    def labels(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """{"y": int64 [N]} or {}."""


# -- order ------------------------------------------------------------------------------------


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
                f"give at most --batch_size {size // world_size}, or --global_batch "
                f"{size // world_size * world_size}"
                if size >= world_size
                else "start fewer processes"
            )
            raise UserError(
                f"{size} images are fewer than one global batch of {batch_size * world_size} "
                f"({processes} x --batch_size {batch_size}): {advice}, or add images"
            )

    def __iter__(self) -> Iterator[list[int]]:
        for places in self.places():
            yield [index for index, _ in places]

    def places(self) -> Iterator[list[Place]]:
        """The batches with the epoch beside each index."""
        first = self.start + self.rank * self.batch_size
        while True:
            yield self._places(first, self.batch_size)
            first += self.batch_size * self.world_size

    def indices(self, first: int, count: int) -> list[int]:
        """The indices at ``count`` positions of the stream from ``first`` on."""
        return [index for index, _ in self._places(first, count)]

    def _places(self, first: int, count: int) -> list[Place]:
        found = []
        for position in range(first, first + count):
            epoch, place = divmod(position, self.size)
            if epoch != self._epoch:
                self._epoch, self._epoch_order = epoch, self._order(epoch)
            found.append((int(self._epoch_order[place]), epoch))
        return found

    def _order(self, epoch: int) -> np.ndarray:
        if self.seed is None:
            return np.arange(self.size)
        seed = derive_seed(self.seed, "data order", epoch)
        return np.random.default_rng(seed).permutation(self.size)


# -- reading ----------------------------------------------------------------------------------


class RawBatches(Dataset):
    """What workers send: the pixels of whole batches as they are stored, and their labels.

    Bytes are a quarter of float32, so normalising is left to the training process's device.

    :param images: the images.
    :param augmentation: how to vary them; None for not at all.
    """

    def __init__(self, images: Images, augmentation: Augmentation | None = None) -> None:
        super().__init__()
        self.images = images
        self.augmentation = augmentation

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: Place) -> Batch:
        return self.__getitems__([place])

    def __getitems__(self, places: Sequence[Place]) -> Batch:
        """A batch, in one go; DataLoader asks for it so.

        :return: [N, H, W, C], and {"y": int64 [N]} or {}.
        """
        indices = [index for index, _ in places]
        if self.augmentation is None:
            pixels = self.images.read(indices)
        else:
            pixels = self.images.read(indices, self.augmentation.crops(places))
            pixels = self.augmentation.flipped(pixels, places)
        cond = {name: torch.from_numpy(v) for name, v in self.images.labels(indices).items()}
        return torch.from_numpy(pixels), cond


def _as_it_is(batch: Any) -> Any:
    return batch


def raw_batches(
    images: Images,
    places: Iterable[list[Place]],
    num_workers: int,
    augmentation: Augmentation | None = None,
    worker_init: Callable[[int], None] | None = None,
) -> Generator[Batch, None, None]:
    """Read batches, by other processes if ``num_workers`` is above 0.

    The workers start with the first batch and last until ``places`` end or the generator is
    closed.

    :param places: the images of each batch.
    :return: pairs of [N, H, W, C] as stored and labels, in pinned memory if there is a GPU.
    :raises ValueError: naming the file, for one that is no image, whoever reads it.
    """
    with _own_warning(num_workers):
        loader: DataLoader = DataLoader(
            RawBatches(images, augmentation),
            batch_sampler=places,
            num_workers=num_workers,
            collate_fn=_as_it_is,
            prefetch_factor=PREFETCH if num_workers else None,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=worker_init,
        )
    yield from read_all(loader)


def read_all(loader: DataLoader) -> Generator[Batch, None, None]:
    """The batches of a loader, whose workers end with them or when the generator is closed.

    :raises ValueError: with one line, whoever reads: in this process or in a worker.
    """
    with _own_warning(loader.num_workers):
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


@contextlib.contextmanager
def _own_warning(num_workers: int) -> Iterator[None]:
    """Say in a line of ours, and once, what torch says in three of more workers than CPUs."""
    _warn_of_workers(num_workers)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")
        yield


@functools.lru_cache  # once in each process
def _warn_of_workers(num_workers: int) -> None:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if cpus and num_workers > cpus:
        log.warning(
            f"--num_workers {num_workers}: the process has {cpus} CPU{'s' * (cpus > 1)}; more "
            "workers than that only take memory, unless the files come from a slow disk"
        )


def in_order(size: int, batch_size: int) -> Iterator[list[Place]]:
    """Each of the images 0 ... size - 1 once."""
    for first in range(0, size, batch_size):
        yield [(index, 0) for index in range(first, min(first + batch_size, size))]


def on_device(
    batch: Batch, value_range: ValueRange | None, device: torch.device | str | None
) -> Batch:
    """Bring a batch to a device as it is stored, and normalise it there.

    :param batch: [N, H, W, C] as stored, and labels.
    :param device: None for where it is.
    :return: float32 [N, C, H, W] in [-1, 1], and labels.
    """
    pixels, cond = batch
    if device is not None:
        pixels = pixels.to(device, non_blocking=True)
        cond = {name: value.to(device, non_blocking=True) for name, value in cond.items()}
    return normalize(pixels, value_range), cond


# -- streams ----------------------------------------------------------------------------------


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
    :param num_workers: processes that read images; they last as long as the stream, or until it
        seeks.
    :param augmentation: how to vary the images; None for not at all.
    :param device: where batches are normalised and stay; None for the CPU.
    """

    def __init__(
        self,
        dataset: Images,
        batch_size: int,
        seed: int | None,
        num_workers: int,
        augmentation: Augmentation | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.augmentation = augmentation
        self.device = device
        self.transform: Callable[[Batch], Batch] = _as_it_is
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
            self._batches = raw_batches(
                self.dataset,
                self._sampler.places(),
                self.num_workers,
                self.augmentation,
                ignore_stop_signals,
            )
            # Workers that ignore SIGTERM must end before Python waits for them at its exit
            weakref.finalize(self, self._batches.close)
        batch = on_device(next(self._batches), self.dataset.value_range, self.device)
        return self.transform(batch)
