"""Folders of images and packed sets: finding, labelling, resizing, sharding; as batches.

:mod:`.image_stream` has the order of the batches, :mod:`.packed` the files of a packed set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from . import dist_util, packed
from .augment import Augmentation
from .errors import UserError
from .flags import ImageSize, height_width, option, require, require_at_least
from .image_stream import Batch as Batch
from .image_stream import GlobalBatchSampler as GlobalBatchSampler
from .image_stream import ImageStream as ImageStream
from .image_stream import Seekable as Seekable
from .image_stream import in_order, on_device, raw_batches
from .packed import PackedPixels, PackedSet
from .pixels import PIL_MODES, ValueRange, normalize, read_image

EXTENSIONS = ("jpg", "jpeg", "png", "gif", "webp", "bmp")
VALUE_EXTENSIONS = ("npy", "tif", "tiff")  # of data with a value range, beside the others
LABEL_SOURCES = ("filename", "folder")


@dataclass(frozen=True)
class DataOptions:
    """Where the images are and how they are read."""

    data_dir: str = option(
        "",
        "folder of images, searched recursively, any path blobfile reads; or a packed set, as "
        "datasets/pack.py writes it; or, for training, tar shards such as 'shards/{000..010}.tar'",
    )
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


# -- finding ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageList:
    """The images of a folder, or some of them.

    ``paths`` are sorted; ``classes`` are indices into the sorted ``class_names``, or None. Images
    of a packed set lie in its ``rows``, and their paths are relative to the folder that was
    packed.
    """

    paths: list[str]
    classes: list[int] | None = None
    class_names: tuple[str, ...] = ()
    packed: PackedSet | None = None
    rows: list[int] | None = None

    def pick(self, indices: Sequence[int]) -> ImageList:
        """Some of the images; all classes are known."""
        rows = self.rows if self.rows is not None else range(len(self.paths))
        return dataclasses.replace(
            self,
            paths=[self.paths[i] for i in indices],
            classes=self.classes and [self.classes[i] for i in indices],
            rows=[rows[i] for i in indices] if self.packed else None,
        )


def list_images(
    data_dir: str,
    class_cond: bool = False,
    labels_from: str = "filename",
    flag: str = "data_dir",
    value_range: ValueRange | None = None,
) -> ImageList:
    """Find the images below a folder, and their classes. The first process looks, for all.

    Hidden files and folders are passed over. A packed set is checked against its checksums; see
    :func:`.packed.open_packed`.

    :param data_dir: any folder that blobfile reads.
    :param class_cond: whether to label the images.
    :param labels_from: "filename" for the name up to the first ``_``, "folder" for the name of
        the folder that holds the image.
    :param flag: the flag that named the folder, for the errors.
    :param value_range: of data that may lie in arrays and TIFF files too.
    :raises ValueError: on every process, if there is no such folder, or no image in it, or a
        packed set is damaged.
    """
    import blobfile as bf

    def find() -> tuple[list[str], PackedSet | None]:
        if not data_dir or not bf.isdir(data_dir):
            only = ": tar shards are for training alone" if data_dir.endswith(".tar") else ""
            raise UserError(f"--{flag} '{data_dir}' is no folder{only}")
        if packed.is_packed(data_dir):
            found = packed.open_packed(data_dir)
            return found.names(), found
        return _list_files(data_dir, flag, value_range), None

    paths, found = dist_util.on_first_rank(find)
    if not class_cond:
        return ImageList(paths, packed=found)
    if found is not None and labels_from == found.index.labels_from and found.index.class_names:
        labels = found.labels()
        assert labels is not None
        return ImageList(paths, labels.tolist(), found.index.class_names, found)
    classes, class_names = label(paths, labels_from, found.index.folder if found else "")
    return ImageList(paths, classes, class_names, found)


def label(
    paths: Sequence[str], labels_from: str, root: str = ""
) -> tuple[list[int], tuple[str, ...]]:
    """The classes that the names of files tell.

    :param labels_from: see :func:`list_images`.
    :param root: the name of the folder that relative paths begin in.
    :return: an index into the class names for each path, and the sorted class names.
    """
    import blobfile as bf

    if labels_from == "folder":
        names = [bf.basename(bf.dirname(path)) or root for path in paths]
    else:
        names = [bf.basename(path).split("_")[0] for path in paths]
    class_names = sorted(set(names))
    index = {name: i for i, name in enumerate(class_names)}
    return [index[name] for name in names], tuple(class_names)


def _list_files(data_dir: str, flag: str, value_range: ValueRange | None) -> list[str]:
    import blobfile as bf

    found = _list_recursively(data_dir, EXTENSIONS + VALUE_EXTENSIONS)
    pictures = [path for path in found if _extension(path) in EXTENSIONS]
    if value_range is None and found and not pictures:
        raise UserError(
            f"--{flag} '{data_dir}' holds .{_extension(found[0])} files, which need "
            "--value_range LOW,HIGH: the values that become -1 and 1"
        )
    paths = found if value_range is not None else pictures
    if not paths:
        wanted = EXTENSIONS + VALUE_EXTENSIONS if value_range is not None else EXTENSIONS
        tars = any(name.endswith(".tar") for name in bf.listdir(data_dir))
        only = "; tar shards are for training alone" if tars else ""
        raise UserError(f"--{flag} '{data_dir}' holds no images ({', '.join(wanted)}){only}")
    return paths


def _extension(path: str) -> str:
    return path.rsplit(".", 1)[-1].lower()


def _list_recursively(folder: str, extensions: Sequence[str] = EXTENSIONS) -> list[str]:
    import blobfile as bf

    found = []
    for entry in sorted(bf.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir:
            found += _list_recursively(entry.path, extensions)
        elif "." in entry.name and _extension(entry.name) in extensions:
            found.append(entry.path)
    return found


# -- reading ----------------------------------------------------------------------------------


class ImageDataset(Dataset):
    """Images of one size with their labels.

    :param resolution: H = W, or (H, W).
    :param image_paths: files.
    :param classes: a label for each file, or None.
    :param shard: which of ``num_shards`` interleaved parts of the files to keep.
    :param channels: 1 grey, 2 grey and alpha, 3 RGB, 4 RGB and alpha; any number with a value
        range.
    :param value_range: LOW, HIGH of the data; None for 8-bit pictures.
    """

    def __init__(
        self,
        resolution: ImageSize,
        image_paths: Sequence[str],
        classes: Sequence[int] | None = None,
        shard: int = 0,
        num_shards: int = 1,
        channels: int = 3,
        value_range: ValueRange | None = None,
    ) -> None:
        super().__init__()
        if channels not in PIL_MODES and value_range is None:
            raise UserError(
                f"--channels {channels}: image files have 1, 2, 3 or 4; for other data, give its "
                "--value_range, or pass TrainLoop your own iterator of batches"
            )
        self.value_range = value_range
        self.example = image_paths[0] if image_paths else None
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
        image = normalize(torch.from_numpy(self.read([idx])), self.value_range)[0].numpy()
        return image, {name: np.array(values[0]) for name, values in self.labels([idx]).items()}

    def read(
        self, indices: Sequence[int], crops: Sequence[np.random.Generator] | None = None
    ) -> np.ndarray:
        """The pixels of some images as they are stored.

        :param crops: what to draw a random crop of each from; None for the centre.
        :return: [N, H, W, C], see :func:`.read_image`.
        :raises ValueError: naming the file, if one is no image.
        """
        images = [
            read_image(
                self.local_images[index],
                self.resolution,
                self.channels,
                value_range=self.value_range,
                crop=crops[i] if crops else None,
                like=self.example,
            )
            for i, index in enumerate(indices)
        ]
        return np.stack(images)

    def labels(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """{"y": int64 [N]} or {}."""
        if self.local_classes is None:
            return {}
        return {"y": np.array([self.local_classes[i] for i in indices], dtype=np.int64)}


class PackedDataset(ImageDataset):
    """Images of a packed set, as :class:`ImageDataset` gives those of a folder.

    :param images: of a packed set.
    :raises ValueError: naming the file, if this process does not see the set whole.
    """

    def __init__(self, images: ImageList) -> None:
        assert images.packed is not None
        index = images.packed.index
        super().__init__(
            index.image_size,
            images.paths,
            images.classes,
            channels=index.channels,
            value_range=index.value_range,
        )
        rows = range(len(images.paths)) if images.rows is None else images.rows
        self.rows = np.array(rows, dtype=np.int64)
        self.pixels = PackedPixels(images.packed)

    def __len__(self) -> int:
        return len(self.rows)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "local_images": []}  # millions of names are of no use to workers

    def read(
        self, indices: Sequence[int], crops: Sequence[np.random.Generator] | None = None
    ) -> np.ndarray:
        """The pixels of some images as they are stored, [N, H, W, C]."""
        assert crops is None, "a packed set holds the final pixels only"
        return self.pixels.read(self.rows[list(indices)])


def open_dataset(
    images: ImageList,
    image_size: ImageSize,
    *,
    channels: int = 3,
    value_range: ValueRange | None = None,
    random_crop: bool = False,
    size_flag: str = "image_size",
) -> ImageDataset:
    """The pixels and labels of a list of images, wherever they are.

    :param random_crop: whether random crops will be asked for.
    :param size_flag: the flag that holds the size, for the errors.
    :raises ValueError: naming both values, if a packed set holds other pixels than asked for.
    """
    if images.packed is None:
        return ImageDataset(
            image_size, images.paths, images.classes, channels=channels, value_range=value_range
        )
    images.packed.check(image_size, channels, value_range, size_flag)
    if random_crop:
        raise UserError(
            f"--random_crop True: '{images.packed.folder}' is a packed set, which holds the final "
            "pixels only: give the folder of images, or leave the flag out"
        )
    return PackedDataset(images)


# -- batches ----------------------------------------------------------------------------------


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
    value_range: ValueRange | None = None,
    random_flip: bool = False,
    random_crop: bool = False,
    device: torch.device | str | None = None,
    size_flag: str = "image_size",
) -> ImageStream:
    """An endless iterator of batches of images and their labels.

    Under a process group every process gets its own images.

    :param data_dir: folder of images, searched recursively, or a packed set.
    :param batch_size: N, of this process.
    :param image_size: H = W, or (H, W).
    :param class_cond: label the images under "y".
    :param deterministic: the order of the sorted file names rather than a shuffled one.
    :param images: the result of :func:`list_images`, if it is known already.
    :param channels: C: 1, 2, 3 or 4; any number with a value range.
    :param labels_from: see :func:`list_images`.
    :param num_workers: processes that read images.
    :param seed: of the shuffled order, flips and crops; None draws one from torch's global
        generator.
    :param start: how many images to pass over, as a continued run does.
    :param value_range: LOW, HIGH of the data; None for 8-bit pictures.
    :param random_flip: mirror half of the images, others in each epoch.
    :param random_crop: cut out random places; see :func:`.read_image`.
    :param device: where batches are normalised and stay; None for the CPU.
    :param size_flag: the flag that holds the size, for errors.
    :return: pairs of float32 [N, C, H, W] in [-1, 1], and {"y": int64 [N]} or {}.
    :raises ValueError: if the folder is missing or empty, or holds less than a global batch, or a
        packed set holds other pixels; and later, naming the file, for one that is no image.
    """
    images = images or list_images(data_dir, class_cond, labels_from, value_range=value_range)
    dataset = open_dataset(
        images,
        image_size,
        channels=channels,
        value_range=value_range,
        random_crop=random_crop,
        size_flag=size_flag,
    )
    augmentation = None
    if not deterministic or random_flip or random_crop:
        if seed is None:
            seed = int(torch.randint(2**31, ()))
        seed = dist_util.broadcast_object(seed)  # one order for all processes
        assert seed is not None
        if random_flip or random_crop:
            augmentation = Augmentation(seed, len(dataset), random_flip, random_crop)
    order = None if deterministic else seed
    stream = ImageStream(dataset, batch_size, order, num_workers, augmentation, device)
    stream.seek(start)
    return stream


def load_all(dataset: ImageDataset) -> tuple[Tensor, dict[str, Tensor], list[int]]:
    """All images as one batch.

    :return: float32 [N, C, H, W] in [-1, 1], {"y": int64 [N]} or {}, and 0 ... N - 1.
    """
    indices = list(range(len(dataset)))
    images = normalize(torch.from_numpy(dataset.read(indices)), dataset.value_range)
    cond = {name: torch.from_numpy(value) for name, value in dataset.labels(indices).items()}
    return images, cond, indices


def load_once(
    images: ImageList,
    num_images: int,
    batch_size: int,
    image_size: ImageSize,
    *,
    channels: int = 3,
    num_workers: int = 1,
    value_range: ValueRange | None = None,
    device: torch.device | str | None = None,
    size_flag: str = "image_size",
) -> Iterator[tuple[Tensor, dict[str, Tensor], list[int]]]:
    """Batches of the first images in the order of the files, each image once and as it is.

    Every process of a group gets equally many batches, of which the last may be empty.

    :param device: where batches are normalised and stay; None for the CPU.
    :return: triples of float32 [N, C, H, W] in [-1, 1], {"y": int64 [N]} or {}, and the indices
        of the images.
    :raises ValueError: at once, if a packed set holds other pixels than asked for; and later,
        naming the file, for one that is no image.
    """
    dataset = open_dataset(
        images, image_size, channels=channels, value_range=value_range, size_flag=size_flag
    )
    rank, world_size = dist_util.get_rank(), dist_util.get_world_size()
    stop = min(num_images, len(images.paths))
    shares = [
        list(
            range(min(stop, start + rank * batch_size), min(stop, start + (rank + 1) * batch_size))
        )
        for start in range(0, stop, batch_size * world_size)
    ]
    return _load_shares(dataset, shares, num_workers, device)


def _load_shares(
    dataset: ImageDataset,
    shares: list[list[int]],
    num_workers: int,
    device: torch.device | str | None,
) -> Iterator[tuple[Tensor, dict[str, Tensor], list[int]]]:
    places = [[(index, 0) for index in share] for share in shares if share]
    batches = raw_batches(dataset, places, num_workers)
    nothing = torch.zeros(0, dataset.channels, *height_width(dataset.resolution), device=device)
    for share in shares:
        if share:
            yield *on_device(next(batches), dataset.value_range, device), share
        else:
            yield nothing, {}, share


def load_pixels(dataset: ImageDataset, batch_size: int, num_workers: int) -> Iterator[np.ndarray]:
    """The pixels of all images as they are stored, in order, as [N, H, W, C]."""
    for pixels, _ in raw_batches(dataset, in_order(len(dataset), batch_size), num_workers):
        yield pixels.numpy()
