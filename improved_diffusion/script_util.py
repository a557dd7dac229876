"""Flags to options to model and diffusion."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from .errors import UserError
from .flags import (
    ImageSize,
    defaults,
    flag_type,
    height_width,
    numbers,
    option,
    require,
    require_at_least,
    size_text,
    str2bool,
)
from .flags import (
    image_size as read_image_size,
)
from .loss_weights import LOSS_WEIGHTS, NO_WEIGHT
from .pixels import parse_value_range, value_range_flag
from .predictions import PREDICTIONS
from .process import DEFAULT_SCHEDULE, create_gaussian_diffusion
from .respace import SpacedDiffusion
from .schedules import NAMED_SCHEDULES, betas_flag
from .unet import SuperResModel, UNetModel

__all__ = [
    "NUM_CLASSES",
    "ModelAndDiffusionOptions",
    "SuperResOptions",
    "add_dict_to_argparser",
    "args_to_dict",
    "create_gaussian_diffusion",
    "create_model",
    "create_model_and_diffusion",
    "model_and_diffusion_defaults",
    "sr_create_model",
    "sr_create_model_and_diffusion",
    "sr_model_and_diffusion_defaults",
    "str2bool",
]

log = logging.getLogger(__name__)

NUM_CLASSES = 1000  # where neither the data nor the caller tells

# Width of each level in multiples of num_channels, by the longer side of the image
# (IDDPM appendix A; 128 as in arXiv 2105.05233)
CHANNEL_MULTS = {
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
}
SMALLEST_LEVEL = 4  # pixels: images below 32 get fewer levels than the table says


@dataclass(frozen=True)
class _SharedOptions:
    """The options of both kinds of model."""

    num_channels: int = option(128, "width of the first level; a multiple of 32")
    num_res_blocks: int = option(2, "residual blocks per level")
    num_heads: int = option(4, "attention heads")
    num_heads_upsample: int = option(-1, "attention heads on the way up; -1: as --num_heads")
    attention_resolutions: str = option(
        "16,8", "sizes in pixels (of the longer side) of the levels that attend"
    )
    dropout: float = option(0.0, "probability of dropping a feature in training")
    learn_sigma: bool = option(False, "learn the variance of each step beside its mean")
    sigma_small: bool = option(False, "fixed variance: the posterior's (beta-tilde), not beta")
    class_cond: bool = option(False, "condition on the class of the image")
    diffusion_steps: int = option(1000, "noising steps T of the process; not the training's length")
    noise_schedule: str = option(DEFAULT_SCHEDULE, f"{', '.join(NAMED_SCHEDULES)}")
    timestep_respacing: str = option(
        "", "steps to sample with: '250', 'ddim50', '10,15,20' per section; '' for all"
    )
    use_kl: bool = option(False, "train on the variational bound")
    predict_xstart: bool = option(False, "the network predicts the image, not the noise")
    rescale_timesteps: bool = option(True, "the network sees timesteps scaled to 0 ... 1000")
    rescale_learned_sigmas: bool = option(
        True, "with --learn_sigma: weigh the bound's term by T / 1000"
    )
    use_checkpoint: bool = option(False, "recompute activations in training, to save memory")
    use_scale_shift_norm: bool = option(
        True, "the timestep scales and shifts the features rather than being added"
    )
    channel_mult: str = option(
        "", "width of each level in multiples of --num_channels: '1,2,2'; '' by image size"
    )
    channels: int = option(
        3, "colour channels: 1 grey, 3 RGB, 4 RGB and alpha; with --value_range any number"
    )
    num_classes: int = option(
        0, f"with --class_cond: number of classes; 0: counted from the data, else {NUM_CLASSES}"
    )
    value_range: str = option(
        "",
        "LOW,HIGH: the data's values become -1 ... 1, and samples have them again; reads 16-bit "
        "PNG, TIFF and .npy as they are; '': 8-bit pictures",
        value_range_flag,
    )
    predict: str = option(
        "",
        f"what the network predicts: {', '.join(PREDICTIONS)} (the velocity of the linear path); "
        "'': as --predict_xstart says",
    )
    loss_weight: str = option(
        NO_WEIGHT, f"weight of each noise level in the loss: {', '.join(LOSS_WEIGHTS)}"
    )
    betas: str = option(
        "",
        "noise levels of your own instead of --noise_schedule: an .npy file, a text file with one "
        "number per line, or the numbers themselves",
        betas_flag,
    )
    zero_terminal_snr: bool = option(
        False, "rescale the noise levels so that the last leaves no signal; not with eps"
    )

    _size_flag: ClassVar[str]  # the option that holds the size of the images made

    def __post_init__(self) -> None:
        require_at_least(
            1, self, ["num_channels", "num_res_blocks", "num_heads", "diffusion_steps", "channels"]
        )
        require_at_least(0, self, ["num_classes"])
        parse_value_range(self.value_range)
        heads = self.num_heads_upsample
        require(heads == -1 or heads >= 1, "num_heads_upsample", heads, "-1 or at least 1")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")

    def _network(self, network: type[UNetModel]) -> UNetModel:
        """Build the network for images of the size that the option ``_size_flag`` holds."""
        size = getattr(self, self._size_flag)
        mult = _channel_mult(self._size_flag, size, self.channel_mult)
        return network(
            in_channels=self.channels,
            model_channels=self.num_channels,
            out_channels=2 * self.channels if self.learn_sigma else self.channels,
            num_res_blocks=self.num_res_blocks,
            attention_resolutions=_attention_factors(self.attention_resolutions, size, len(mult)),
            dropout=self.dropout,
            channel_mult=mult,
            num_classes=(self.num_classes or NUM_CLASSES) if self.class_cond else None,
            use_checkpoint=self.use_checkpoint,
            num_heads=self.num_heads,
            num_heads_upsample=self.num_heads_upsample,
            use_scale_shift_norm=self.use_scale_shift_norm,
        )

    def diffusion(self) -> SpacedDiffusion:
        """The diffusion process of these options."""
        return create_gaussian_diffusion(
            steps=self.diffusion_steps,
            learn_sigma=self.learn_sigma,
            sigma_small=self.sigma_small,
            noise_schedule=self.noise_schedule,
            use_kl=self.use_kl,
            predict_xstart=self.predict_xstart,
            rescale_timesteps=self.rescale_timesteps,
            rescale_learned_sigmas=self.rescale_learned_sigmas,
            timestep_respacing=self.timestep_respacing,
            predict=self.predict,
            loss_weight=self.loss_weight,
            betas=self.betas,
            zero_terminal_snr=self.zero_terminal_snr,
            image_size=getattr(self, self._size_flag),
        )


@dataclass(frozen=True)
class ModelAndDiffusionOptions(_SharedOptions):
    """The arguments of :func:`create_model_and_diffusion`, checked."""

    image_size: ImageSize = option(64, "size of the images: 64, or HxW: 48x64", read_image_size)

    _size_flag: ClassVar[str] = "image_size"

    def model(self) -> UNetModel:
        """The network of these options."""
        return self._network(UNetModel)


@dataclass(frozen=True)
class SuperResOptions(_SharedOptions):
    """The arguments of :func:`sr_create_model_and_diffusion`, checked."""

    large_size: ImageSize = option(256, "size of the images made: 256, or HxW", read_image_size)
    small_size: ImageSize = option(64, "size of the images given: 64, or HxW", read_image_size)

    _size_flag: ClassVar[str] = "large_size"

    def model(self) -> SuperResModel:
        """The network of these options; it upsamples images of any size that it is given."""
        network = self._network(SuperResModel)
        assert isinstance(network, SuperResModel)
        return network


def check_sizes(small_size: ImageSize, large_size: ImageSize) -> None:
    """Check the sizes of a super-resolution data set.

    :raises ValueError: if the images to upsample are larger than those to make.
    """
    small, large = height_width(small_size), height_width(large_size)
    if small[0] > large[0] or small[1] > large[1]:
        raise UserError(
            f"--small_size {size_text(small)} is larger than --large_size {size_text(large)}"
        )


# What training settles for good: sampling with another value cannot work
FIXED_BY_TRAINING = frozenset(
    [
        "image_size",
        "large_size",
        "small_size",
        "num_channels",
        "num_res_blocks",
        "num_heads",
        "num_heads_upsample",
        "attention_resolutions",
        "learn_sigma",
        "class_cond",
        "diffusion_steps",
        "noise_schedule",
        "predict_xstart",
        "rescale_timesteps",
        "use_scale_shift_norm",
        "channel_mult",
        "channels",
        "num_classes",
        "value_range",
        "predict",
        "betas",
        "zero_terminal_snr",
    ]
)


def model_and_diffusion_defaults() -> dict[str, Any]:
    """Defaults of the arguments of :func:`create_model_and_diffusion`."""
    return defaults(ModelAndDiffusionOptions)


def sr_model_and_diffusion_defaults() -> dict[str, Any]:
    """Defaults of the arguments of :func:`sr_create_model_and_diffusion`."""
    return defaults(SuperResOptions)


def create_model_and_diffusion(
    image_size: ImageSize,
    class_cond: bool,
    learn_sigma: bool,
    sigma_small: bool,
    num_channels: int,
    num_res_blocks: int,
    num_heads: int,
    num_heads_upsample: int,
    attention_resolutions: str,
    dropout: float,
    diffusion_steps: int,
    noise_schedule: str,
    timestep_respacing: str,
    use_kl: bool,
    predict_xstart: bool,
    rescale_timesteps: bool,
    rescale_learned_sigmas: bool,
    use_checkpoint: bool,
    use_scale_shift_norm: bool,
    channel_mult: str = "",
    channels: int = 3,
    num_classes: int = 0,
    value_range: str = "",
    predict: str = "",
    loss_weight: str = NO_WEIGHT,
    betas: str = "",
    zero_terminal_snr: bool = False,
) -> tuple[UNetModel, SpacedDiffusion]:
    """A U-Net and its diffusion process; the arguments are the flags of the scripts.

    :raises ValueError: naming the flag and the values that work, for one that cannot.
    """
    options = ModelAndDiffusionOptions(**locals())
    return options.model(), options.diffusion()


def create_model(
    image_size: ImageSize,
    num_channels: int,
    num_res_blocks: int,
    learn_sigma: bool,
    class_cond: bool,
    use_checkpoint: bool,
    attention_resolutions: str,
    num_heads: int,
    num_heads_upsample: int,
    use_scale_shift_norm: bool,
    dropout: float,
    channel_mult: str = "",
    channels: int = 3,
    num_classes: int = 0,
) -> UNetModel:
    """A U-Net for [N, C, H, W] images; the arguments are the flags of the scripts.

    :raises ValueError: naming the flag and the values that work, for one that cannot.
    """
    return ModelAndDiffusionOptions(**locals()).model()


def sr_create_model_and_diffusion(
    large_size: ImageSize,
    small_size: ImageSize,
    class_cond: bool,
    learn_sigma: bool,
    num_channels: int,
    num_res_blocks: int,
    num_heads: int,
    num_heads_upsample: int,
    attention_resolutions: str,
    dropout: float,
    diffusion_steps: int,
    noise_schedule: str,
    timestep_respacing: str,
    use_kl: bool,
    predict_xstart: bool,
    rescale_timesteps: bool,
    rescale_learned_sigmas: bool,
    use_checkpoint: bool,
    use_scale_shift_norm: bool,
    sigma_small: bool = False,
    channel_mult: str = "",
    channels: int = 3,
    num_classes: int = 0,
    value_range: str = "",
    predict: str = "",
    loss_weight: str = NO_WEIGHT,
    betas: str = "",
    zero_terminal_snr: bool = False,
) -> tuple[SuperResModel, SpacedDiffusion]:
    """A super-resolution U-Net and its diffusion process; the arguments are the scripts' flags.

    :raises ValueError: naming the flag and the values that work, for one that cannot.
    """
    options = SuperResOptions(**locals())
    return options.model(), options.diffusion()


def sr_create_model(
    large_size: ImageSize,
    small_size: ImageSize,
    num_channels: int,
    num_res_blocks: int,
    learn_sigma: bool,
    class_cond: bool,
    use_checkpoint: bool,
    attention_resolutions: str,
    num_heads: int,
    num_heads_upsample: int,
    use_scale_shift_norm: bool,
    dropout: float,
    channel_mult: str = "",
    channels: int = 3,
    num_classes: int = 0,
) -> SuperResModel:
    """A U-Net from [N, C, h, w] to [N, C, H, W] images; the arguments are the scripts' flags.

    :raises ValueError: naming the flag and the values that work, for one that cannot.
    """
    return SuperResOptions(**locals()).model()


def _channel_mult(flag: str, size: ImageSize, text: str) -> tuple[float, ...]:
    """The width of each level: as asked for, or by the size of the image.

    :raises ValueError: if the image cannot be halved that often, with the nearest sizes that can.
    """
    sides = height_width(size)
    mult = _mult_for(sides, text)
    if _to_halvable(sides, text, up=True) != sides:
        near = [_to_halvable(sides, text, up) for up in (False, True)]
        raise UserError(
            f"--{flag} {size_text(size)} cannot be halved {len(mult) - 1} times, as the "
            f"{len(mult)} levels of --channel_mult {','.join(f'{m:g}' for m in mult)} need: the "
            f"nearest sizes are {' and '.join(size_text(s) for s in near if min(s) > 0)}; or give "
            "a shorter --channel_mult"
        )
    return tuple(int(m) if float(m).is_integer() else m for m in mult)


def _mult_for(sides: tuple[int, int], text: str) -> Sequence[float]:
    """``--channel_mult``, or the table's for images of that height and width."""
    if text:
        mult = numbers("channel_mult", text, float)
        positive = bool(mult) and all(0 < m < math.inf for m in mult)
        require(positive, "channel_mult", text, "numbers above 0")
        return mult
    fitting = [key for key in CHANNEL_MULTS if key <= max(sides)]
    table = CHANNEL_MULTS[max(fitting, default=min(CHANNEL_MULTS))]
    levels = len(table)
    while levels > 1 and min(sides) < SMALLEST_LEVEL * 2 ** (levels - 1):
        levels -= 1
    return table[:levels]


def _to_halvable(sides: tuple[int, int], text: str, up: bool) -> tuple[int, int]:
    """Round height and width to what the levels can halve; a larger image may have more levels."""
    while True:
        factor = 2 ** (len(_mult_for(sides, text)) - 1)
        height, width = (-(-s // factor) * factor if up else s // factor * factor for s in sides)
        if (height, width) == sides or min(height, width) == 0:
            return height, width
        sides = height, width


def _attention_factors(resolutions: str, size: ImageSize, num_levels: int) -> tuple[int, ...]:
    """Sizes in pixels as downsampling factors; says which sizes are no level of the network."""
    longer = max(height_width(size))
    levels = {longer // 2**level: 2**level for level in range(num_levels)}
    wanted = numbers("attention_resolutions", resolutions)
    absent = [str(resolution) for resolution in wanted if resolution not in levels]
    if absent:
        log.warning(
            f"--attention_resolutions {resolutions}: no level of size {', '.join(absent)}; the "
            f"levels are {', '.join(map(str, levels))}"
        )
    return tuple(levels[resolution] for resolution in wanted if resolution in levels)


def add_dict_to_argparser(parser: argparse.ArgumentParser, default_dict: dict[str, Any]) -> None:
    """Add a flag for each entry, of the type of its default; bools take a word, None a string."""
    for name, default in default_dict.items():
        kind = read_image_size if name.endswith("_size") and name in _SIZES else flag_type(default)
        parser.add_argument(f"--{name}", default=default, type=kind)


_SIZES = ("image_size", "large_size", "small_size")


def args_to_dict(
    args: argparse.Namespace | Mapping[str, Any], keys: Iterable[str]
) -> dict[str, Any]:
    """The named attributes of parsed arguments, or entries of a dict of them."""
    values = args if isinstance(args, Mapping) else vars(args)
    return {key: values[key] for key in keys}
