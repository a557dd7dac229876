"""The levels of a network by the size of its images: their widths, and which attend.

IDDPM: arXiv 2102.09672, appendix A. Guided diffusion: arXiv 2105.05233, appendix H.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence

from .errors import UserError
from .flags import ImageSize, height_width, numbers, require, size_text

log = logging.getLogger(__name__)

Widths = Mapping[int, Sequence[float]]

# Width of each level in multiples of the first, by the longer side of the image
CHANNEL_MULTS: Widths = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
}
# Super-resolution has no narrow level of 512 pixels
SUPER_RES_MULTS: Widths = {**CHANNEL_MULTS, 512: CHANNEL_MULTS[256]}
SMALLEST_LEVEL = 4  # pixels: images below 32 get fewer levels than the table says


def channel_mult(
    flag: str,
    size: ImageSize,
    text: str,
    table: Widths = CHANNEL_MULTS,
    mult_flag: str = "channel_mult",
) -> tuple[float, ...]:
    """The width of each level: as asked for, or by the size of the image.

    :param flag: what ``size`` is called.
    :param text: numbers separated by commas; empty for those of the table.
    :param mult_flag: what ``text`` is called.
    :return: multiples of the network's width.
    :raises ValueError: if the image cannot be halved that often, with the nearest sizes that can.
    """
    sides = height_width(size)
    asked = numbers(mult_flag, text, float)
    positive = all(0 < m < math.inf for m in asked) and bool(asked) == bool(text)
    require(positive, mult_flag, text, "numbers above 0")
    mult = asked or _widths_for(sides, table)

    def nearest(up: bool) -> tuple[int, int]:
        return _to_halvable(sides, up, lambda size: asked or _widths_for(size, table))

    if nearest(up=True) != sides:
        near = [size_text(size) for size in map(nearest, (False, True)) if min(size) > 0]
        raise UserError(
            f"--{flag} {size_text(size)} cannot be halved {len(mult) - 1} times, as the "
            f"{len(mult)} levels of --{mult_flag} {','.join(f'{m:g}' for m in mult)} need: the "
            f"nearest sizes are {' and '.join(near)}; or give a shorter --{mult_flag}"
        )
    return tuple(int(m) if float(m).is_integer() else m for m in mult)


def _widths_for(sides: tuple[int, int], table: Widths) -> Sequence[float]:
    """The table's widths for images of that height and width."""
    fitting = [key for key in table if key <= max(sides)]
    widths = table[max(fitting, default=min(table))]
    levels = len(widths)
    while levels > 1 and min(sides) < SMALLEST_LEVEL * 2 ** (levels - 1):
        levels -= 1
    return widths[:levels]


def _to_halvable(
    sides: tuple[int, int], up: bool, widths: Callable[[tuple[int, int]], Sequence[float]]
) -> tuple[int, int]:
    """Round height and width to what the levels can halve; a larger image may have more levels."""
    while True:
        factor = 2 ** (len(widths(sides)) - 1)
        height, width = (-(-s // factor) * factor if up else s // factor * factor for s in sides)
        if (height, width) == sides or min(height, width) == 0:
            return height, width
        sides = height, width


def attention_factors(
    resolutions: str, size: ImageSize, num_levels: int, flag: str = "attention_resolutions"
) -> tuple[int, ...]:
    """Sizes in pixels as downsampling factors; says which sizes are no level of the network.

    :param resolutions: sizes of the longer side, separated by commas.
    :param flag: what they are called.
    """
    longer = max(height_width(size))
    levels = {longer // 2**level: 2**level for level in range(num_levels)}
    wanted = numbers(flag, resolutions)
    absent = [str(resolution) for resolution in wanted if resolution not in levels]
    if absent:
        log.warning(
            f"--{flag} {resolutions}: no level of size {', '.join(absent)}; the levels are "
            f"{', '.join(map(str, levels))}"
        )
    return tuple(levels[resolution] for resolution in wanted if resolution in levels)
