"""Flags to options to model and diffusion."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from .architecture import (
    CHANNEL_MULTS,
    SUPER_RES_MULTS,
    Widths,
    attention_factors,
    channel_mult,
)
from .classifier_options import (
    NUM_CLASSES,
    ClassifierOptions,
    classifier_and_diffusion_defaults,
    classifier_defaults,
    create_classifier,
    create_classifier_and_diffusion,
    diffusion_defaults,
)
from .errors import UserError
from .flags import (
    ImageSize,
    defaults,
    flag_type,
    height_width,
    option,
    require,
    require_at_least,
    size_text,
    str2bool,
)
from .flags import (
    image_size as read_image_size,
)
from .loss_weights import NO_WEIGHT
from .pixels import parse_value_range, value_range_flag
from .process import DiffusionOptions, create_gaussian_diffusion
from .respace import SpacedDiffusion
from .unet import SuperResModel, UNetModel

__all__ = [
    "NUM_CLASSES",
    "ClassifierOptions",
    "ModelAndDiffusionOptions",
    "SuperResOptions",
    "add_dict_to_argparser",
    "args_to_dict",
    "classifier_and_diffusion_defaults",
    "classifier_defaults",
    "create_classifier",
    "create_classifier_and_diffusion",
    "create_gaussian_diffusion",
    "create_model",
    "create_model_and_diffusion",
    "diffusion_defaults",
    "model_and_diffusion_defaults",
    "sr_create_model",
    "sr_create_model_and_diffusion",
    "sr_model_and_diffusion_defaults",
    "str2bool",
]


@dataclass(frozen=True)
class _NetworkOptions:
    """The options of both kinds of U-Net."""

    num_channels: int = option(128, "width of the first level; a multiple of 32")
    num_res_blocks: int = option(2, "residual blocks per level")
    num_heads: int = option(4, "attention heads")
    num_heads_upsample: int = option(-1, "attention heads on the way up; -1: as --num_heads")
    num_head_channels: int = option(
        -1, "channels of each attention head, at every level; -1: as --num_heads says"
    )
    attention_resolutions: str = option(
        "16,8", "sizes in pixels (of the longer side) of the levels that attend"
    )
    dropout: float = option(0.0, "probability of dropping a feature in training")
    class_cond: bool = option(False, "condition on the class of the image")
    class_dropout: float = option(
        0.0,
        "with --class_cond: share of the labels hidden in training, so that --guidance_scale can "
        "guide the samples; 0: none",
    )
    use_checkpoint: bool = option(False, "recompute activations in training, to save memory")
    use_scale_shift_norm: bool = option(
        True, "the timestep scales and shifts the features rather than being added"
    )
    resblock_updown: bool = option(False, "resample by residual blocks")
    use_new_attention_order: bool = option(
        False, "the order of heads that some checkpoints were trained with; not for its own sake"
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

    def check(self) -> None:
        """Refuse what no network can be made of."""
        names = ["num_channels", "num_res_blocks", "num_heads", "channels"]
        require_at_least(1, self, names)
        require_at_least(0, self, ["num_classes"])
        parse_value_range(self.value_range)
        for name in ("num_heads_upsample", "num_head_channels"):
            value = getattr(self, name)
            require(value == -1 or value >= 1, name, value, "-1 or at least 1")
        for name in ("dropout", "class_dropout"):
            value = getattr(self, name)
            require(0 <= value < 1, name, value, "in [0, 1)")
        if self.class_dropout and not self.class_cond:
            raise UserError(
                f"--class_dropout {self.class_dropout} needs --class_cond True: it hides labels"
            )


@dataclass(frozen=True)
class _UNetOptions(DiffusionOptions, _NetworkOptions):
    """The options of both kinds of U-Net and of its process."""

    _widths: ClassVar[Widths] = CHANNEL_MULTS

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check()

    def _network(self, network: type[UNetModel]) -> UNetModel:
        """Build the network for images of the size that the option ``_size_flag`` holds."""
        size = getattr(self, self._size_flag)
        mult = channel_mult(self._size_flag, size, self.channel_mult, self._widths)
        return network(
            in_channels=self.channels,
            model_channels=self.num_channels,
            out_channels=2 * self.channels if self.learn_sigma else self.channels,
            num_res_blocks=self.num_res_blocks,
            attention_resolutions=attention_factors(self.attention_resolutions, size, len(mult)),
            dropout=self.dropout,
            channel_mult=mult,
            num_classes=(self.num_classes or NUM_CLASSES) if self.class_cond else None,
            use_checkpoint=self.use_checkpoint,
            num_heads=self.num_heads,
            num_heads_upsample=self.num_heads_upsample,
            use_scale_shift_norm=self.use_scale_shift_norm,
            num_head_channels=self.num_head_channels,
            resblock_updown=self.resblock_updown,
            use_new_attention_order=self.use_new_attention_order,
            null_class=self.class_dropout > 0,
        )


@dataclass(frozen=True)
class ModelAndDiffusionOptions(_UNetOptions):
    """The arguments of :func:`create_model_and_diffusion`, checked."""

    image_size: ImageSize = option(64, "size of the images: 64, or HxW: 48x64", read_image_size)

    _size_flag: ClassVar[str] = "image_size"

    def model(self) -> UNetModel:
        """The network of these options."""
        return self._network(UNetModel)


@dataclass(frozen=True)
class SuperResOptions(_UNetOptions):
    """The arguments of :func:`sr_create_model_and_diffusion`, checked."""

    large_size: ImageSize = option(256, "size of the images made: 256, or HxW", read_image_size)
    small_size: ImageSize = option(64, "size of the images given: 64, or HxW", read_image_size)

    _size_flag: ClassVar[str] = "large_size"
    _widths: ClassVar[Widths] = SUPER_RES_MULTS

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
        "num_head_channels",
        "resblock_updown",
        "use_new_attention_order",
        "classifier_width",
        "classifier_depth",
        "classifier_attention_resolutions",
        "classifier_use_scale_shift_norm",
        "classifier_resblock_updown",
        "classifier_pool",
        "classifier_num_head_channels",
        "classifier_channel_mult",
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
    num_head_channels: int = -1,
    resblock_updown: bool = False,
    use_new_attention_order: bool = False,
    class_dropout: float = 0.0,
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
    num_head_channels: int = -1,
    resblock_updown: bool = False,
    use_new_attention_order: bool = False,
    class_dropout: float = 0.0,
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
    num_head_channels: int = -1,
    resblock_updown: bool = False,
    use_new_attention_order: bool = False,
    class_dropout: float = 0.0,
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
    num_head_channels: int = -1,
    resblock_updown: bool = False,
    use_new_attention_order: bool = False,
    class_dropout: float = 0.0,
) -> SuperResModel:
    """A U-Net from [N, C, h, w] to [N, C, H, W] images; the arguments are the scripts' flags.

    :raises ValueError: naming the flag and the values that work, for one that cannot.
    """
    return SuperResOptions(**locals()).model()


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
