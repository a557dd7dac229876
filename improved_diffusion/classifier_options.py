"""Flags to options to a classifier of noised images, as guided diffusion needs it.

Guided diffusion: arXiv 2105.05233, section 4 and appendix H.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from .architecture import attention_factors, channel_mult
from .errors import UserError
from .flags import ImageSize, defaults, option, require, require_at_least
from .flags import image_size as read_image_size
from .loss_weights import NO_WEIGHT
from .nn import NUM_GROUPS
from .pixels import parse_value_range, value_range_flag
from .process import DiffusionOptions
from .respace import SpacedDiffusion
from .unet import POOLS, EncoderUNetModel

NUM_CLASSES = 1000  # where neither the data nor the caller tells


@dataclass(frozen=True)
class ClassifierNetworkOptions:
    """The options of the network alone."""

    image_size: ImageSize = option(64, "size of the images: 64, or HxW: 48x64", read_image_size)
    classifier_use_fp16: bool = option(False, "compute in float16")
    classifier_width: int = option(128, "width of the first level; a multiple of 32")
    classifier_depth: int = option(2, "residual blocks per level")
    classifier_attention_resolutions: str = option(
        "32,16,8", "sizes in pixels (of the longer side) of the levels that attend"
    )
    classifier_use_scale_shift_norm: bool = option(
        True, "the timestep scales and shifts the features rather than being added"
    )
    classifier_resblock_updown: bool = option(True, "resample by residual blocks")
    classifier_pool: str = option(
        "attention", f"how features become one number for each class: {', '.join(POOLS)}"
    )
    classifier_num_head_channels: int = option(64, "channels of each attention head")
    classifier_channel_mult: str = option(
        "", "width of each level in multiples of --classifier_width: '1,2,2'; '' by image size"
    )
    classifier_dropout: float = option(0.0, "probability of dropping a feature in training")
    channels: int = option(
        3, "colour channels: 1 grey, 3 RGB, 4 RGB and alpha; with --value_range any number"
    )
    num_classes: int = option(0, f"number of classes; 0: counted from the data, else {NUM_CLASSES}")
    value_range: str = option(
        "",
        "LOW,HIGH: the data's values become -1 ... 1; reads 16-bit PNG, TIFF and .npy as they are; "
        "'': 8-bit pictures",
        value_range_flag,
    )

    def check(self) -> None:
        """Refuse what no network can be made of."""
        names = ["classifier_width", "classifier_depth", "classifier_num_head_channels", "channels"]
        require_at_least(1, self, names)
        require_at_least(0, self, ["num_classes"])
        parse_value_range(self.value_range)
        pool, dropout = self.classifier_pool, self.classifier_dropout
        require(pool in POOLS, "classifier_pool", pool, f"one of {', '.join(POOLS)}")
        require(0 <= dropout < 1, "classifier_dropout", dropout, "in [0, 1)")


@dataclass(frozen=True)
class ClassifierOptions(DiffusionOptions, ClassifierNetworkOptions):
    """The arguments of :func:`create_classifier_and_diffusion`, checked."""

    _size_flag: ClassVar[str] = "image_size"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check()

    def model(self) -> EncoderUNetModel:
        """The network of these options."""
        mult = channel_mult(
            "image_size",
            self.image_size,
            self.classifier_channel_mult,
            mult_flag="classifier_channel_mult",
        )
        factors = attention_factors(
            self.classifier_attention_resolutions,
            self.image_size,
            len(mult),
            "classifier_attention_resolutions",
        )
        self._check_widths(mult, factors)
        return EncoderUNetModel(
            image_size=self.image_size,
            in_channels=self.channels,
            model_channels=self.classifier_width,
            out_channels=self.num_classes or NUM_CLASSES,
            num_res_blocks=self.classifier_depth,
            attention_resolutions=factors,
            dropout=self.classifier_dropout,
            channel_mult=mult,
            num_head_channels=self.classifier_num_head_channels,
            use_scale_shift_norm=self.classifier_use_scale_shift_norm,
            resblock_updown=self.classifier_resblock_updown,
            pool=self.classifier_pool,
        )

    def _check_widths(self, mult: Sequence[float], factors: Sequence[int]) -> None:
        """Refuse levels that groups or heads do not divide, by the names of the flags here."""
        flag, head = "--classifier_num_head_channels", self.classifier_num_head_channels
        for level, width in enumerate(int(m * self.classifier_width) for m in mult):
            where = f"a level of {width} channels (--classifier_width {self.classifier_width})"
            if width < 1 or width % NUM_GROUPS:
                raise UserError(
                    f"{where} is no multiple of the {NUM_GROUPS} groups of the normalisation: give "
                    f"a --classifier_width whose levels are"
                )
            attends = 2**level in factors or level == len(mult) - 1  # the middle does
            if attends and width % head:
                fits = max(n for n in range(1, min(head, width) + 1) if width % n == 0)
                raise UserError(f"{flag} {head} does not divide {where}: give {flag} {fits}")


def diffusion_defaults() -> dict[str, Any]:
    """Defaults of the process's arguments of the factories."""
    return defaults(DiffusionOptions)


def classifier_defaults() -> dict[str, Any]:
    """Defaults of the arguments of :func:`create_classifier`."""
    return defaults(ClassifierNetworkOptions)


def classifier_and_diffusion_defaults() -> dict[str, Any]:
    """Defaults of the arguments of :func:`create_classifier_and_diffusion`."""
    return defaults(ClassifierOptions)


def create_classifier(
    image_size: ImageSize,
    classifier_use_fp16: bool,
    classifier_width: int,
    classifier_depth: int,
    classifier_attention_resolutions: str,
    classifier_use_scale_shift_norm: bool,
    classifier_resblock_updown: bool,
    classifier_pool: str,
    classifier_num_head_channels: int = 64,
    classifier_channel_mult: str = "",
    classifier_dropout: float = 0.0,
    channels: int = 3,
    num_classes: int = 0,
    value_range: str = "",
) -> EncoderUNetModel:
    """A classifier of noised images; the arguments are the flags of ``classifier_train.py``.

    :param classifier_use_fp16: for the scripts, which convert the network by its
        ``convert_to_fp16``.
    :raises ValueError: naming the flag and the values that work, for one that cannot.
    """
    return ClassifierOptions(**locals()).model()


def create_classifier_and_diffusion(
    image_size: ImageSize,
    classifier_use_fp16: bool,
    classifier_width: int,
    classifier_depth: int,
    classifier_attention_resolutions: str,
    classifier_use_scale_shift_norm: bool,
    classifier_resblock_updown: bool,
    classifier_pool: str,
    learn_sigma: bool,
    diffusion_steps: int,
    noise_schedule: str,
    timestep_respacing: str,
    use_kl: bool,
    predict_xstart: bool,
    rescale_timesteps: bool,
    rescale_learned_sigmas: bool,
    classifier_num_head_channels: int = 64,
    classifier_channel_mult: str = "",
    classifier_dropout: float = 0.0,
    channels: int = 3,
    num_classes: int = 0,
    value_range: str = "",
    sigma_small: bool = False,
    predict: str = "",
    loss_weight: str = NO_WEIGHT,
    betas: str = "",
    zero_terminal_snr: bool = False,
) -> tuple[EncoderUNetModel, SpacedDiffusion]:
    """A classifier and the process whose images it classifies; the arguments are the flags of
    ``classifier_train.py``.

    :raises ValueError: naming the flag and the values that work, for one that cannot.
    """
    options = ClassifierOptions(**locals())
    return options.model(), options.diffusion()
