"""Our options as those of diffusers' ``UNet2DModel`` and ``DDPMScheduler``, and back.

Where one side can say what the other cannot, that is an error which names the option.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .diffusers_weights import Layout
from .errors import UserError
from .flags import ImageSize, height_width
from .nn import NUM_GROUPS
from .process import prediction_name
from .schedules import NAMED_SCHEDULES, betas_text, get_named_beta_schedule, zero_terminal_snr
from .unet import UNetModel

Config = dict[str, Any]
Flags = dict[str, Any]

NORM_EPS = 1e-5  # of nn.GroupNorm
EMBEDDING_STEPS = 1000  # with --rescale_timesteps the network sees t in 0 ... 1000
PREDICTIONS = {"eps": "epsilon", "xstart": "sample", "v": "v_prediction"}

# What our network always has: option there -> values that mean it
FIXED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "freq_shift": (0,),
    "flip_sin_to_cos": (True,),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "downsample_padding": (1,),
    "act_fn": ("silu", "swish"),
    "norm_num_groups": (NUM_GROUPS,),
    "norm_eps": (NORM_EPS,),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "add_attention": (True,),
    "class_embed_type": (None,),
}
# Block there -> does it attend, does it resample by residual blocks; None: as *sample_type says
DOWN_BLOCKS: dict[str, tuple[bool, bool | None]] = {
    "DownBlock2D": (False, False),
    "ResnetDownsampleBlock2D": (False, True),
    "AttnDownBlock2D": (True, None),
}
UP_BLOCKS: dict[str, tuple[bool, bool | None]] = {
    "UpBlock2D": (False, False),
    "ResnetUpsampleBlock2D": (False, True),
    "AttnUpBlock2D": (True, None),
}


def no_counterpart(option: str, reason: str) -> UserError:
    """The error for an option of ours that diffusers cannot say."""
    return UserError(f"{option} has no counterpart in diffusers: {reason}")


# -- ours to theirs: the network ------------------------------------------------------------------


def layout_of(network: UNetModel) -> Layout:
    """What the names of a network's layers depend on.

    :raises ValueError: naming the flag, if its attention has no counterpart.
    """
    return Layout(
        num_res_blocks=network.num_res_blocks,
        attends=_attends(network),
        resblock_updown=network.resblock_updown,
        head_width=_head_width(network),
        new_order=network.use_new_attention_order,
    )


def unet_config(network: UNetModel, image_size: ImageSize) -> Config:
    """The arguments of the ``UNet2DModel`` that computes what a network of ours does.

    :param image_size: in pixels, or (height, width).
    :raises ValueError: naming the flag and its value, for one without a counterpart.
    """
    if network.channel_mult[0] != 1:
        mult = ",".join(f"{m:g}" for m in network.channel_mult)
        raise no_counterpart(
            f"--channel_mult {mult}",
            "its time embedding is as wide as the first level, which must be 1",
        )
    attends, updown = _attends(network), network.resblock_updown
    embedding = getattr(network, "label_emb", None)
    return {
        "sample_size": image_size if isinstance(image_size, int) else list(image_size),
        "in_channels": network.in_channels,
        "out_channels": network.out[2].out_channels,
        "block_out_channels": _widths(network),
        "layers_per_block": network.num_res_blocks,
        "down_block_types": [_block(DOWN_BLOCKS, attending, updown) for attending in attends],
        "up_block_types": [_block(UP_BLOCKS, attending, updown) for attending in attends[::-1]],
        "downsample_type": "resnet" if updown else "conv",
        "upsample_type": "resnet" if updown else "conv",
        "dropout": network.dropout,
        "attention_head_dim": _head_width(network),
        "norm_num_groups": NUM_GROUPS,
        "attn_norm_num_groups": NUM_GROUPS,
        "norm_eps": NORM_EPS,
        "resnet_time_scale_shift": "scale_shift" if network.use_scale_shift_norm else "default",
        "num_class_embeds": None if embedding is None else embedding.num_embeddings,
    }


def _widths(network: UNetModel) -> list[int]:
    return [int(mult * network.model_channels) for mult in network.channel_mult]


def _attends(network: UNetModel) -> tuple[bool, ...]:
    levels = range(len(network.channel_mult))
    return tuple(2**level in network.attention_resolutions for level in levels)


def _block(kinds: Mapping[str, tuple[bool, bool | None]], attends: bool, updown: bool) -> str:
    wanted = (attends, None if attends else updown)
    return next(name for name, kind in kinds.items() if kind == wanted)


def _head_width(network: UNetModel) -> int | None:
    """The channels of each attention head, of which diffusers knows one number; None: all."""
    if network.num_head_channels != -1:
        return network.num_head_channels
    widths, attends = _widths(network), _attends(network)
    up = [width for width, attending in zip(widths, attends, strict=True) if attending]
    down = [*up, widths[-1]]  # the middle attends always
    if network.num_heads == 1 and (not up or network.num_heads_upsample == 1):
        return None
    heads = sorted({width // network.num_heads for width in down})
    if len(heads) > 1:
        raise no_counterpart(
            f"--num_heads {network.num_heads}",
            f"a head has {' or '.join(map(str, heads))} channels, by the level's width; there all "
            "heads have the same number (here --num_head_channels)",
        )
    if any(width // network.num_heads_upsample != heads[0] for width in up):
        raise no_counterpart(
            f"--num_heads_upsample {network.num_heads_upsample}",
            f"it has as many heads on the way up as on the way down (--num_heads "
            f"{network.num_heads})",
        )
    return heads[0]


# -- ours to theirs: the process ------------------------------------------------------------------


def scheduler_config(flags: Flags, betas: np.ndarray) -> Config:
    """The arguments of the ``DDPMScheduler`` that has the process of our flags.

    :param betas: float64 [T], what the flags say of them.
    :raises ValueError: naming the flag and its value, for one without a counterpart.
    """
    prediction = prediction_name(flags["predict"], flags["predict_xstart"])
    if prediction not in PREDICTIONS:
        raise no_counterpart(
            f"--predict {prediction}",
            f"DDPMScheduler takes networks that predict {', '.join(PREDICTIONS)}",
        )
    steps = flags["diffusion_steps"]
    if flags["rescale_timesteps"] and steps != EMBEDDING_STEPS:
        raise no_counterpart(
            f"--rescale_timesteps True with --diffusion_steps {steps}",
            f"its networks see the timesteps 0 ... {steps - 1} as they are",
        )
    fixed = "fixed_small" if flags["sigma_small"] else "fixed_large"
    return {
        "num_train_timesteps": steps,
        "trained_betas": betas.tolist(),
        "prediction_type": PREDICTIONS[prediction],
        "variance_type": "learned_range" if flags["learn_sigma"] else fixed,
        "clip_sample": True,
        "clip_sample_range": 1.0,
        # without signal at the end, solvers need to be told, and steps to begin there: 2305.08891
        "rescale_betas_zero_snr": bool(betas[-1] == 1),
        "timestep_spacing": "trailing" if betas[-1] == 1 else "leading",
    }


# -- theirs to ours: the network ------------------------------------------------------------------


def unet_flags(config: Mapping[str, Any], image_size: ImageSize | None = None) -> Flags:
    """Our flags of the network that a ``UNet2DModel`` is.

    :param config: all its arguments.
    :param image_size: of the images, if the network does not say.
    :raises ValueError: naming the options of diffusers that have no counterpart.
    """
    _check_fixed(config)
    attends, updown = _blocks(config)
    widths = list(config["block_out_channels"])
    size = _image_size(config["sample_size"] or image_size)
    labels = config["num_class_embeds"]
    return {
        "image_size": size,
        "channels": config["in_channels"],
        "num_channels": widths[0],
        "channel_mult": ",".join(_multiple(width, widths[0]) for width in widths),
        "num_res_blocks": config["layers_per_block"],
        "attention_resolutions": ",".join(
            str(max(height_width(size)) // 2**level)
            for level, attending in enumerate(attends)
            if attending
        ),
        "resblock_updown": updown,
        "dropout": config["dropout"],
        "use_scale_shift_norm": config["resnet_time_scale_shift"] == "scale_shift",
        "learn_sigma": _learns_variance(config),
        "class_cond": labels is not None,
        "num_classes": labels or 0,
        **_heads(config, [w for w, attending in zip(widths, attends, strict=True) if attending]),
    }


def _check_fixed(config: Mapping[str, Any]) -> None:
    """Check the options that one value of theirs alone has a counterpart for."""
    widths, shift = config["block_out_channels"], config["resnet_time_scale_shift"]
    allowed = {
        **FIXED,
        "time_embedding_dim": (None, 4 * widths[0]),
        # without it the middle's attention normalises nothing where the features are scaled
        "attn_norm_num_groups": (NUM_GROUPS,) if shift == "scale_shift" else (None, NUM_GROUPS),
    }
    odd = [
        f"{name} {config[name]} (here {' or '.join(map(str, values))})"
        for name, values in allowed.items()
        if config[name] not in values
    ]
    if odd:
        verb = "has" if len(odd) == 1 else "have"
        raise UserError(f"diffusers' {', '.join(odd)} {verb} no counterpart here")


def _blocks(config: Mapping[str, Any]) -> tuple[list[bool], bool]:
    """Which levels attend, and whether residual blocks resample, by the types of the blocks."""
    types = {
        "down_block_types": (config["down_block_types"], DOWN_BLOCKS, "downsample_type"),
        "up_block_types": (config["up_block_types"][::-1], UP_BLOCKS, "upsample_type"),
    }
    attends: list[list[bool]] = []
    updown = set()
    for option, (names, kinds, by) in types.items():
        names = [name.removeprefix("UNetRes") for name in names]
        unknown = [name for name in names if name not in kinds]
        if unknown:
            raise UserError(f"diffusers' {option} {unknown[0]} has no counterpart here")
        attends.append([kinds[name][0] for name in names])
        for name in names[:-1]:  # the smallest images are resampled no more
            own = kinds[name][1]
            updown.add(own if own is not None else config[by] == "resnet")
    if attends[0] != attends[1]:
        raise UserError(
            f"diffusers' up_block_types {', '.join(config['up_block_types'])} has no counterpart "
            "here: the levels that attend must be those of down_block_types, "
            f"{', '.join(config['down_block_types'])}"
        )
    if len(updown) > 1:
        raise UserError(
            "diffusers' down_block_types and up_block_types have no counterpart here: all levels "
            "must resample by residual blocks (downsample_type and upsample_type resnet), or none"
        )
    return attends[0], updown == {True}


def _heads(config: Mapping[str, Any], attending: Sequence[int]) -> Flags:
    """The flags of the attention heads; ``attending`` are the widths of the levels that attend."""
    width = config["attention_head_dim"]
    if width is None:
        return {"num_heads": 1, "num_heads_upsample": -1, "num_head_channels": -1}
    for channels in (*attending, config["block_out_channels"][-1]):
        if channels % width:
            raise UserError(
                f"diffusers' attention_head_dim {width} has no counterpart here: it does not "
                f"divide a level of {channels} channels"
            )
    return {"num_heads": 1, "num_heads_upsample": -1, "num_head_channels": width}


def _learns_variance(config: Mapping[str, Any]) -> bool:
    channels, outputs = config["in_channels"], config["out_channels"]
    if outputs not in (channels, 2 * channels):
        raise UserError(
            f"diffusers' out_channels {outputs} with in_channels {channels} has no counterpart "
            "here: as many channels come out as go in, or twice as many with a learned variance"
        )
    return outputs == 2 * channels


def _image_size(size: Any) -> ImageSize:
    if size is None:
        raise UserError("diffusers' sample_size is None: give --image_size")
    height, width = height_width(size)
    return height if height == width else (height, width)


def _multiple(width: int, first: int) -> str:
    """The ratio of two widths as a text from which comes the width again."""
    ratio = width / first
    while int(ratio * first) < width:  # by rounding
        ratio = math.nextafter(ratio, math.inf)
    return f"{ratio:g}" if int(float(f"{ratio:g}") * first) == width else repr(ratio)


# -- theirs to ours: the process ------------------------------------------------------------------


def scheduler_flags(config: Mapping[str, Any], betas: np.ndarray, network: Flags) -> Flags:
    """Our flags of the process that a scheduler has.

    :param config: its arguments, those of ``DDPMScheduler`` or of one with the same schedule.
    :param betas: float64 [T], what it makes of them without ``rescale_betas_zero_snr``.
    :param network: our flags of its network.
    :raises ValueError: naming the options of diffusers that have no counterpart.
    """
    predictions = {theirs: ours for ours, theirs in PREDICTIONS.items()}
    kind = config.get("prediction_type", "epsilon")
    # those that know no such option take DDPMScheduler's default, or what the network shows
    missing = "learned_range" if network["learn_sigma"] else "fixed_small"
    variance = config.get("variance_type") or missing
    for name, value, choices in (
        ("prediction_type", kind, predictions),
        ("variance_type", variance, VARIANCES),
    ):
        if value not in choices:
            raise UserError(
                f"diffusers' {name} {value} has no counterpart here: ours are {', '.join(choices)}"
            )
    if (variance == "learned_range") != network["learn_sigma"]:
        outputs = 2 if network["learn_sigma"] else 1
        raise UserError(
            f"diffusers' variance_type {variance} has no counterpart here for a network of "
            f"out_channels {outputs} times in_channels: learned_range alone needs twice as many"
        )
    steps = len(betas)
    rescaled = bool(config.get("rescale_betas_zero_snr", False))
    return {
        "diffusion_steps": steps,
        "predict": predictions[kind],
        "predict_xstart": False,
        "sigma_small": VARIANCES[variance],
        **({} if steps == EMBEDDING_STEPS else {"rescale_timesteps": False}),
        **_schedule(betas, rescaled, network["image_size"]),
    }


# variance_type -> --sigma_small
VARIANCES = {
    "fixed_small": True,
    "fixed_small_log": True,
    "fixed_large": False,
    "learned_range": False,
}


def _schedule(betas: np.ndarray, rescaled: bool, size: ImageSize) -> Flags:
    """The flags of a schedule: by its name if it is one of ours, else its numbers."""
    for name in NAMED_SCHEDULES:
        try:
            ours = get_named_beta_schedule(name, len(betas), size)
            ends = {False: ours, True: zero_terminal_snr(ours)}
        except UserError:  # too few steps for it
            continue
        for zero, levels in ends.items():
            # theirs are float32
            if ours[-1] < 1 and np.allclose(levels, betas, rtol=1e-5, atol=1e-7):
                return {"noise_schedule": name, "betas": "", "zero_terminal_snr": zero or rescaled}
    return {"noise_schedule": "linear", "betas": betas_text(betas), "zero_terminal_snr": rescaled}
