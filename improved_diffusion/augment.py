"""Random flips and crops of training images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .flags import option
from .rng import derive_seed

Place = tuple[int, int]  # index of an image, epoch


@dataclass(frozen=True)
class AugmentOptions:
    """How training images are varied; those to measure on never are."""

    random_flip: bool = option(
        False, "mirror each image left to right with probability 1/2, anew in each epoch"
    )
    random_crop: bool = option(
        False,
        "cut a random place out of each image, resized to cover 1 to 1.25 times the size, "
        "rather than the centre of one that just covers it",
    )


class Augmentation:
    """What is drawn for an image depends on (seed, epoch, index of the image) alone.

    So an image looks the same whatever the number of processes and workers, and however often
    the run was continued; in the next epoch it is drawn anew.

    :param seed: the user's seed, >= 0.
    :param size: number of images.
    :param flip: mirror half of the images.
    :param crop: cut out random places.
    """

    def __init__(self, seed: int, size: int, flip: bool = False, crop: bool = False) -> None:
        self.seed = seed
        self.size = size
        self.flip = flip
        self.crop = crop
        self._flips: dict[int, np.ndarray] = {}  # epoch -> bool [size]

    def crops(self, places: Sequence[Place]) -> list[np.random.Generator] | None:
        """What each image's crop is drawn from; None without random crops."""
        if not self.crop:
            return None
        return [
            np.random.default_rng(derive_seed(self.seed, "random crop", epoch, index))
            for index, epoch in places
        ]

    def flipped(self, pixels: np.ndarray, places: Sequence[Place]) -> np.ndarray:
        """The images [N, H, W, C] with some mirrored, in place."""
        if self.flip:
            chosen = [bool(self._flips_of(epoch)[index]) for index, epoch in places]
            pixels[chosen] = pixels[chosen, :, ::-1]
        return pixels

    def _flips_of(self, epoch: int) -> np.ndarray:
        if epoch not in self._flips:
            rng = np.random.default_rng(derive_seed(self.seed, "random flip", epoch))
            bits = np.frombuffer(rng.bytes(-(-self.size // 8)), dtype=np.uint8)
            flips = np.unpackbits(bits, count=self.size).astype(bool)
            self._flips = {  # a batch may straddle two epochs; workers may be one apart
                known: self._flips[known] for known in self._flips if abs(known - epoch) == 1
            }
            self._flips[epoch] = flips
        return self._flips[epoch]
