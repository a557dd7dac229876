"""From flags to networks and processes: defaults, sizes of images, and what is refused."""

import argparse
import dataclasses
import inspect
import re

import numpy as np
import pytest
import torch
from golden_data import load_json

from improved_diffusion import script_util
from improved_diffusion.errors import UserError
from improved_diffusion.flags import height_width, image_size
from improved_diffusion.gaussian_diffusion import LossType, ModelMeanType, ModelVarType
from improved_diffusion.loss_weights import LOSS_WEIGHTS
from improved_diffusion.predictions import PREDICTIONS
from improved_diffusion.schedules import (
    NAMED_SCHEDULES,
    betas_flag,
    get_named_beta_schedule,
    zero_terminal_snr,
)
from improved_diffusion.script_util import (
    NUM_CLASSES,
    ModelAndDiffusionOptions,
    SuperResOptions,
    add_dict_to_argparser,
    args_to_dict,
    check_sizes,
    create_gaussian_diffusion,
    create_model,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
    sr_create_model,
    sr_create_model_and_diffusion,
    sr_model_and_diffusion_defaults,
)
from improved_diffusion.unet import SuperResModel, UNetModel

FLAGS = load_json("flags")
DEFAULTS = {  # script -> the defaults that its flags of the model come from
    "image_train.py": model_and_diffusion_defaults,
    "image_sample.py": model_and_diffusion_defaults,
    "image_nll.py": model_and_diffusion_defaults,
    "super_res_train.py": sr_model_and_diffusion_defaults,
    "super_res_sample.py": sr_model_and_diffusion_defaults,
}
FACTORIES = {
    create_model_and_diffusion: model_and_diffusion_defaults,
    sr_create_model_and_diffusion: sr_model_and_diffusion_defaults,
}
SMALL = {"num_channels": 32, "num_res_blocks": 1, "attention_resolutions": ""}


def model(**changes):
    """A small network without memory behind its weights."""
    names = inspect.signature(create_model).parameters
    options = {**model_and_diffusion_defaults(), **SMALL, **changes}
    with torch.device("meta"):
        return create_model(**args_to_dict(options, names))


def sr_model(**changes):
    names = inspect.signature(sr_create_model).parameters
    options = {**sr_model_and_diffusion_defaults(), **SMALL, **changes}
    with torch.device("meta"):
        return sr_create_model(**args_to_dict(options, names))


def output_shape(network, size):
    """The shape of the network's output for two images, by shapes alone."""
    x = torch.zeros(2, network.in_channels, *height_width(size), device="meta")
    return network(x, torch.zeros(2, device="meta")).shape


# -- defaults -------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", sorted(DEFAULTS))
def test_defaults_are_the_recorded_ones_of_the_flags(script):
    """The scripts' other flags come from elsewhere."""
    values = DEFAULTS[script]()
    recorded = {flag.removeprefix("--"): entry for flag, entry in FLAGS[script].items()}
    start = "large_size" if script.startswith("super_res") else "image_size"
    assert start in recorded.keys() & values.keys()
    assert {"num_channels", "use_scale_shift_norm"} <= recorded.keys() & values.keys()
    for name in recorded.keys() & values.keys():
        assert values[name] == recorded[name]["default"], name
        assert type(values[name]).__name__ == recorded[name]["type"], name


@pytest.mark.parametrize("script", sorted(DEFAULTS))
def test_no_recorded_flag_of_the_model_is_missing_in_the_defaults(script):
    names = inspect.signature(
        sr_create_model_and_diffusion if "super" in script else create_model_and_diffusion
    ).parameters
    recorded = {flag.removeprefix("--") for flag in FLAGS[script]}
    assert recorded & names.keys() <= DEFAULTS[script]().keys()


@pytest.mark.parametrize("factory", FACTORIES, ids=lambda factory: factory.__name__)
def test_defaults_are_exactly_the_arguments_of_the_factory(factory):
    assert FACTORIES[factory]().keys() == inspect.signature(factory).parameters.keys()


@pytest.mark.parametrize("factory", FACTORIES, ids=lambda factory: factory.__name__)
def test_changed_defaults_do_not_reach_the_next_caller(factory):
    FACTORIES[factory]()["num_channels"] = 7
    assert FACTORIES[factory]()["num_channels"] == 128


def test_defaults_make_a_network_and_a_process():
    with torch.device("meta"):
        network, diffusion = create_model_and_diffusion(**model_and_diffusion_defaults())
    assert type(network) is UNetModel
    assert network.model_channels == 128
    assert output_shape(network, 64) == (2, 3, 64, 64)
    assert diffusion.num_timesteps == 1000
    assert diffusion.rescale_timesteps


def test_super_resolution_defaults_make_a_network_and_a_process():
    options = {**sr_model_and_diffusion_defaults(), **SMALL, "large_size": 32, "small_size": 8}
    with torch.device("meta"):
        network, diffusion = sr_create_model_and_diffusion(**options)
    assert type(network) is SuperResModel
    x, low_res = (torch.zeros(2, 3, size, size, device="meta") for size in (32, 8))
    assert network(x, torch.zeros(2, device="meta"), low_res=low_res).shape == x.shape
    assert diffusion.num_timesteps == 1000
    assert diffusion.model_var_type is ModelVarType.FIXED_LARGE


# -- the process ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("use_kl", "rescale_learned_sigmas", "loss"),
    [
        (False, False, LossType.MSE),
        (False, True, LossType.RESCALED_MSE),
        (True, False, LossType.RESCALED_KL),
        (True, True, LossType.RESCALED_KL),
    ],
)
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_choice_of_the_loss(use_kl, rescale_learned_sigmas, loss, learn_sigma):
    diffusion = create_gaussian_diffusion(
        steps=50,
        learn_sigma=learn_sigma,
        use_kl=use_kl,
        rescale_learned_sigmas=rescale_learned_sigmas,
    )
    assert diffusion.loss_type is loss


@pytest.mark.parametrize(
    ("learn_sigma", "sigma_small", "variance"),
    [
        (False, False, ModelVarType.FIXED_LARGE),
        (False, True, ModelVarType.FIXED_SMALL),
        (True, False, ModelVarType.LEARNED_RANGE),
        (True, True, ModelVarType.LEARNED_RANGE),
    ],
)
def test_choice_of_the_variance(learn_sigma, sigma_small, variance):
    diffusion = create_gaussian_diffusion(
        steps=50, learn_sigma=learn_sigma, sigma_small=sigma_small
    )
    assert diffusion.model_var_type is variance


@pytest.mark.parametrize(
    ("predict_xstart", "mean"), [(False, ModelMeanType.EPSILON), (True, ModelMeanType.START_X)]
)
def test_choice_of_the_mean(predict_xstart, mean):
    diffusion = create_gaussian_diffusion(steps=50, predict_xstart=predict_xstart)
    assert diffusion.model_mean_type is mean


def test_process_without_arguments():
    """These differ from the flags' defaults in whether timesteps and learned sigmas are scaled."""
    diffusion = create_gaussian_diffusion()
    assert diffusion.num_timesteps == 1000
    assert diffusion.betas[[0, -1]] == pytest.approx([1e-4, 0.02])  # DDPM's linear schedule
    assert diffusion.loss_type is LossType.MSE
    assert diffusion.model_mean_type is ModelMeanType.EPSILON
    assert diffusion.model_var_type is ModelVarType.FIXED_LARGE
    assert not diffusion.rescale_timesteps


@pytest.mark.parametrize(
    ("respacing", "kept"), [("", 50), ([], 50), ("10", 10), ("ddim10", 10), ([5, 3], 8), ("5,3", 8)]
)
def test_respacing_keeps_a_subset_of_the_steps(respacing, kept):
    diffusion = create_gaussian_diffusion(steps=50, timestep_respacing=respacing)
    assert diffusion.num_timesteps == kept
    assert diffusion.original_num_steps == 50


@pytest.mark.parametrize("cls", [ModelAndDiffusionOptions, SuperResOptions])
def test_every_flag_of_the_process_reaches_it(cls):
    plain = cls(rescale_timesteps=False, rescale_learned_sigmas=False).diffusion()
    assert (plain.rescale_timesteps, plain.loss_type) == (False, LossType.MSE)
    other = cls(
        diffusion_steps=40,
        noise_schedule="cosine",
        timestep_respacing="8",
        sigma_small=True,
        predict_xstart=True,
        use_kl=True,
    ).diffusion()
    same = create_gaussian_diffusion(steps=40, noise_schedule="cosine", timestep_respacing="8")
    assert list(other.betas) == list(same.betas)
    assert other.original_num_steps == 40
    assert other.rescale_timesteps
    assert other.loss_type is LossType.RESCALED_KL
    assert other.model_mean_type is ModelMeanType.START_X
    assert other.model_var_type is ModelVarType.FIXED_SMALL
    learned = cls(learn_sigma=True, rescale_learned_sigmas=True).diffusion()
    assert learned.loss_type is LossType.RESCALED_MSE
    assert learned.model_var_type is ModelVarType.LEARNED_RANGE


@pytest.mark.parametrize(
    "changes", [{"noise_schedule": "cosin"}, {"timestep_respacing": "ddim999"}]
)
def test_impossible_process_names_the_value(changes):
    with pytest.raises(UserError) as error:
        ModelAndDiffusionOptions(**changes).diffusion()
    (value,) = changes.values()
    assert f"'{value}'" in str(error.value)
    assert "\n" not in str(error.value)


# -- sizes of images ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "mult"),
    [
        (256, (1, 1, 2, 2, 4, 4)),
        (128, (1, 1, 2, 3, 4)),
        (64, (1, 2, 3, 4)),
        (32, (1, 2, 2, 2)),
        (512, (0.5, 1, 1, 2, 2, 4, 4)),
        (96, (1, 2, 3, 4)),
        (28, (1, 2, 2)),
        (8, (1, 2)),
        (4, (1,)),
        ((48, 64), (1, 2, 3, 4)),
        ((64, 48), (1, 2, 3, 4)),
    ],
)
def test_levels_by_the_size_of_the_image(size, mult):
    network = model(image_size=size, num_channels=64)
    assert tuple(network.channel_mult) == mult
    assert output_shape(network, size) == (2, 3, *height_width(size))


@pytest.mark.parametrize("size", ["28", "8", "12x20"])
def test_network_of_an_unusual_size_computes(size):
    options = {**model_and_diffusion_defaults(), **SMALL, "image_size": image_size(size)}
    network, diffusion = create_model_and_diffusion(**options)
    x = torch.randn(2, 3, *height_width(image_size(size)))
    loss = diffusion.training_losses(network, x, torch.tensor([1, 999]))["loss"]
    assert loss.shape == (2,)
    assert loss.isfinite().all()


@pytest.mark.parametrize(
    "size", ["9", "15", "30", "63", "100", "250", "30x64", "60x48", "62x255", "15x17", "250x130"]
)
def test_nearest_sizes_of_an_impossible_one_work(size):
    with pytest.raises(UserError, match=f"^--image_size {size} cannot be halved") as error:
        model(image_size=image_size(size))
    near = re.search(r"the nearest sizes are (\S+) and (\S+);", str(error.value)).groups()
    sides = [height_width(image_size(text)) for text in (near[0], size, near[1])]
    assert all(low <= wanted <= high for low, wanted, high in zip(*sides, strict=True))
    for text in near:
        assert output_shape(model(image_size=image_size(text)), image_size(text))[:2] == (2, 3)


def test_size_30_lies_between_28_and_32():
    with pytest.raises(UserError, match="the nearest sizes are 28 and 32;"):
        model(image_size=30)


def test_size_too_small_for_the_levels_names_the_smallest_that_works():
    with pytest.raises(UserError, match=r"nearest sizes? (is|are) 8;"):
        model(image_size=4, channel_mult="1,1,1,1")
    assert output_shape(model(image_size=8, channel_mult="1,1,1,1"), 8) == (2, 3, 8, 8)


def test_shorter_channel_mult_is_a_way_out_too():
    assert output_shape(model(image_size=30, channel_mult="1,2"), 30) == (2, 3, 30, 30)


def test_impossible_size_of_super_resolution_names_its_flag():
    with pytest.raises(UserError, match=r"^--large_size 250 cannot be halved"):
        sr_model(large_size=250)


@pytest.mark.parametrize("small", [16, 24, (8, 16)])
def test_super_resolution_takes_any_small_size(small):
    network = sr_model(large_size=(32, 64), small_size=small)
    x = torch.zeros(2, 3, 32, 64, device="meta")
    low_res = torch.zeros(2, 3, *height_width(small), device="meta")
    assert network(x, torch.zeros(2, device="meta"), low_res=low_res).shape == x.shape


# -- widths, channels, classes, attention ---------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "widths"),
    [("1,2", [32, 64]), ("2,1,3", [64, 32, 96]), ("1", [32]), (" 1 , 2 ", [32, 64])],
)
def test_channel_mult_sets_the_width_of_each_level(text, widths):
    network = model(image_size=32, channel_mult=text)
    assert [int(m * 32) for m in network.channel_mult] == widths
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    blocks = [f"input_blocks.{i}.0.in_layers.2.bias" for i in range(1, len(network.input_blocks))]
    found = [shapes[key][0] for key in blocks if key in shapes]  # others downsample
    assert found == widths
    assert output_shape(network, 32) == (2, 3, 32, 32)


def test_channel_mult_may_be_a_fraction():
    network = model(image_size=32, num_channels=64, channel_mult="1,1.5,0.5")
    assert output_shape(network, 32) == (2, 3, 32, 32)
    assert [int(m * 64) for m in network.channel_mult] == [64, 96, 32]


@pytest.mark.parametrize("text", ["a", "1,b", "0,1", "1,-1", ",", "nan", "1,inf", "1;2"])
def test_channel_mult_that_is_no_list_of_widths_names_the_flag(text):
    with pytest.raises(UserError, match=f"--channel_mult '?{text}"):
        model(image_size=32, channel_mult=text)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_network_has_the_channels_of_the_images(channels, learn_sigma):
    network = model(image_size=8, channels=channels, learn_sigma=learn_sigma)
    assert network.in_channels == channels
    outputs = 2 * channels if learn_sigma else channels
    assert output_shape(network, 8) == (2, outputs, 8, 8)


@pytest.mark.parametrize("channels", [1, 4])
def test_super_resolution_sees_noised_and_small_image(channels):
    network = sr_model(large_size=16, channels=channels)
    assert network.in_channels == 2 * channels
    x, low_res = (torch.zeros(2, channels, size, size, device="meta") for size in (16, 8))
    out = network(x, torch.zeros(2, device="meta"), low_res=low_res)
    assert out.shape == (2, channels, 16, 16)


@pytest.mark.parametrize(
    ("class_cond", "num_classes", "expected"),
    [(True, 0, NUM_CLASSES), (True, 10, 10), (True, 1, 1), (False, 0, None), (False, 10, None)],
)
@pytest.mark.parametrize(("make", "size"), [(model, "image_size"), (sr_model, "large_size")])
def test_number_of_classes(make, size, class_cond, num_classes, expected):
    network = make(**{size: 8}, class_cond=class_cond, num_classes=num_classes)
    assert network.num_classes == expected
    embeddings = [p.shape[0] for k, p in network.state_dict().items() if "label_emb" in k]
    assert embeddings == ([] if expected is None else [expected])


@pytest.mark.parametrize(
    ("size", "text", "factors"),
    [
        (64, "16,8", {4, 8}),
        (64, "64", {1}),
        (32, "", set()),
        (28, "14,7", {2, 4}),
        ((48, 64), "16", {4}),
        ((64, 48), "16", {4}),
    ],
)
def test_attention_is_at_the_levels_of_the_sizes_given(caplog, size, text, factors):
    network = model(image_size=size, attention_resolutions=text)
    assert set(network.attention_resolutions) == factors
    assert caplog.records == []


@pytest.mark.parametrize(
    ("size", "text", "factors", "absent", "levels"),
    [
        (28, "16,8", set(), "16, 8", "28, 14, 7"),
        (32, "16,12", {2}, "12", "32, 16, 8, 4"),
        (96, "16,48", {2}, "16", "96, 48, 24, 12"),
        ((48, 64), "24,32", {2}, "24", "64, 32, 16, 8"),
        (8, "2", set(), "2", "8, 4"),
    ],
)
def test_attention_size_that_is_no_level_is_a_warning_that_lists_the_levels(
    caplog, size, text, factors, absent, levels
):
    network = model(image_size=size, attention_resolutions=text)
    assert set(network.attention_resolutions) == factors
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.name.startswith("improved_diffusion")
    assert f"--attention_resolutions {text}" in record.getMessage()
    assert f"size {absent};" in record.getMessage()
    assert record.getMessage().endswith(f"levels are {levels}")


def test_other_flags_of_the_network_reach_it():
    network = model(
        image_size=32,
        num_channels=64,
        num_res_blocks=3,
        num_heads=2,
        num_heads_upsample=4,
        dropout=0.25,
        use_checkpoint=True,
        use_scale_shift_norm=False,
        attention_resolutions="16",
    )
    assert network.model_channels == 64
    assert network.num_res_blocks == 3
    assert (network.num_heads, network.num_heads_upsample) == (2, 4)
    assert network.dropout == 0.25
    assert network.use_checkpoint
    modules = list(network.modules())
    assert {m.p for m in modules if isinstance(m, torch.nn.Dropout)} == {0.25}
    assert {m.num_heads for m in modules if hasattr(m, "qkv")} == {2, 4}
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    assert shapes["input_blocks.1.0.emb_layers.1.bias"] == (64,)  # added: no scale beside the shift
    scaled = model(image_size=32, num_channels=64, use_scale_shift_norm=True).state_dict()
    assert scaled["input_blocks.1.0.emb_layers.1.bias"].shape == (128,)


# -- what is refused ------------------------------------------------------------------------------

REFUSED = [
    ("num_channels", 0),
    ("num_channels", -32),
    ("num_channels", 48),
    ("num_res_blocks", 0),
    ("num_heads", 0),
    ("num_heads", 3),
    ("num_heads_upsample", 0),
    ("num_heads_upsample", -2),
    ("num_heads_upsample", 3),
    ("attention_resolutions", "16;8"),
    ("dropout", 1.0),
    ("dropout", -0.1),
    ("diffusion_steps", 0),
    ("channels", 0),
    ("num_classes", -1),
]


@pytest.mark.parametrize(("flag", "value"), REFUSED)
@pytest.mark.parametrize("factory", FACTORIES, ids=lambda factory: factory.__name__)
def test_option_that_cannot_work_is_one_line_that_names_flag_and_value(factory, flag, value):
    attends = {"attention_resolutions": "8"}
    sizes = {"large_size": 32, "small_size": 8} if "sr_" in factory.__name__ else {"image_size": 32}
    options = {**FACTORIES[factory](), **SMALL, **attends, **sizes, flag: value}
    with pytest.raises(UserError) as error, torch.device("meta"):
        factory(**options)
    assert flag in str(error.value)
    assert str(value) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flag", "value"),
    [("num_heads_upsample", -1), ("dropout", 0.0), ("dropout", 0.99), ("num_classes", 0)],
)
def test_value_at_the_bound_works(flag, value):
    assert output_shape(model(**{"image_size": 8, flag: value}), 8) == (2, 3, 8, 8)


# -- flags by hand --------------------------------------------------------------------------------


def parse(defaults, *argv):
    parser = argparse.ArgumentParser()
    add_dict_to_argparser(parser, defaults)
    return parser.parse_args(argv)


@pytest.mark.parametrize(
    ("default", "text", "value"),
    [
        (False, "Yes", True),
        (True, "0", False),
        (3, "4", 4),
        (0.5, "1", 1.0),
        ("a", "4", "4"),
        (None, "4", "4"),
    ],
)
def test_entry_becomes_a_flag_of_the_type_of_its_default(default, text, value):
    assert parse({"thing": default}).thing is default
    read = parse({"thing": default}, "--thing", text).thing
    assert read == value
    assert type(read) is type(value)


def test_bool_flag_refuses_other_words(capsys):
    with pytest.raises(SystemExit):
        parse({"thing": False}, "--thing", "maybe")
    assert "--thing" in capsys.readouterr().err


def test_sizes_of_images_may_be_height_x_width():
    defaults = {**model_and_diffusion_defaults(), **sr_model_and_diffusion_defaults()}
    for name in ("image_size", "large_size", "small_size"):
        assert vars(parse(defaults, f"--{name}", "48x64"))[name] == (48, 64)
        assert vars(parse(defaults, f"--{name}", "64"))[name] == 64


def test_other_sizes_are_numbers():
    assert parse({"batch_size": 8}, "--batch_size", "4").batch_size == 4
    with pytest.raises(SystemExit):
        parse({"batch_size": 8}, "--batch_size", "4x4")


def test_flags_by_hand_make_a_network():
    argv = ["--image_size", "16x8", "--num_channels", "32", "--attention_resolutions", "8"]
    args = parse(model_and_diffusion_defaults(), *argv)
    with torch.device("meta"):
        network, _ = create_model_and_diffusion(
            **args_to_dict(args, model_and_diffusion_defaults())
        )
    assert output_shape(network, (16, 8)) == (2, 3, 16, 8)


def test_args_to_dict_takes_the_named_ones_in_order():
    args = argparse.Namespace(a=1, b=2, c=3)
    assert list(args_to_dict(args, ["c", "a"]).items()) == [("c", 3), ("a", 1)]
    assert list(args_to_dict(vars(args), ["c", "a"]).items()) == [("c", 3), ("a", 1)]
    assert args_to_dict(args, {"b": None}.keys()) == {"b": 2}


def test_args_to_dict_needs_all_names():
    with pytest.raises((KeyError, AttributeError), match="d"):
        args_to_dict(argparse.Namespace(a=1), ["a", "d"])


@pytest.mark.parametrize("name", script_util.__all__)
def test_public_name_exists(name):
    assert hasattr(script_util, name)


def test_small_images_must_not_be_larger_than_the_large():
    with pytest.raises(UserError, match="--small_size 64x16 is larger than --large_size 32"):
        check_sizes((64, 16), 32)
    check_sizes(32, 32)


# -- predictions, loss weights and noise levels ---------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "kind"),
    [
        ({}, "EPSILON"),
        ({"predict": "eps"}, "EPSILON"),
        ({"predict_xstart": True}, "START_X"),
        ({"predict": "xstart"}, "START_X"),
        ({"predict": "xstart", "predict_xstart": True}, "START_X"),
        ({"predict": "v"}, "V"),
        ({"predict": "flow"}, "FLOW"),
    ],
)
@pytest.mark.parametrize("cls", [ModelAndDiffusionOptions, SuperResOptions])
def test_prediction_by_name(cls, flags, kind):
    assert cls(**flags).diffusion().model_mean_type is ModelMeanType[kind]


@pytest.mark.parametrize("flags", [{}, {"noise_schedule": "linear_path"}])
@pytest.mark.parametrize("steps", [1, 7, 1000])
def test_flow_follows_the_linear_path(flags, steps):
    diffusion = create_gaussian_diffusion(steps=steps, predict="flow", **flags)
    np.testing.assert_array_equal(diffusion.betas, get_named_beta_schedule("linear_path", steps))


@pytest.mark.parametrize("name", NAMED_SCHEDULES)
@pytest.mark.parametrize(
    ("cls", "sizes", "size"),
    [
        (ModelAndDiffusionOptions, {"image_size": (32, 128)}, (32, 128)),
        (SuperResOptions, {"large_size": 256, "small_size": 16}, 256),
    ],
)
def test_every_schedule_can_be_chosen_for_the_size_of_the_images(cls, sizes, size, name):
    diffusion = cls(noise_schedule=name, predict="v", diffusion_steps=50, **sizes).diffusion()
    expected = get_named_beta_schedule(name, 50, image_size=size)
    np.testing.assert_allclose(diffusion.betas, expected, rtol=1e-12)
    assert name in dict(_help(cls))["noise_schedule"]


def _help(cls):
    return [(field.name, field.metadata["help"]) for field in dataclasses.fields(cls)]


@pytest.mark.parametrize("name", LOSS_WEIGHTS)
@pytest.mark.parametrize("cls", [ModelAndDiffusionOptions, SuperResOptions])
def test_loss_weight_reaches_the_process(cls, name):
    diffusion = cls(loss_weight=name, predict="v", timestep_respacing="5").diffusion()
    assert diffusion.loss_weight == name
    assert hasattr(diffusion, "_loss_weights") is (name != "none")
    assert name in dict(_help(cls))["loss_weight"]


@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize("use_kl", [False, True])
@pytest.mark.parametrize("predict", PREDICTIONS)
def test_every_prediction_combines_with_learned_variance_and_the_bound(
    predict, use_kl, learn_sigma
):
    options = ModelAndDiffusionOptions(
        predict=predict, use_kl=use_kl, learn_sigma=learn_sigma, image_size=8, **SMALL
    )
    diffusion, network = options.diffusion(), options.model()
    terms = diffusion.training_losses(network, torch.rand(2, 3, 8, 8), torch.tensor([3, 999]))
    assert ("vb" in terms) is (learn_sigma and not use_kl)
    terms["loss"].mean().backward()
    assert network.out[2].weight.grad.isfinite().all()
    assert network.out[2].weight.grad.abs().max() > 0


@pytest.mark.parametrize("cls", [ModelAndDiffusionOptions, SuperResOptions])
def test_betas_of_ones_own_replace_the_schedule(cls, tmp_path):
    betas = np.linspace(0.01, 0.5, 12)
    np.save(tmp_path / "own.npy", betas)
    for source in (str(tmp_path / "own.npy"), betas_flag(str(tmp_path / "own.npy"))):
        diffusion = cls(betas=source, diffusion_steps=12).diffusion()
        np.testing.assert_allclose(diffusion.betas, betas, rtol=1e-12)
        assert diffusion.original_num_steps == 12
    for source in (betas, betas.tolist()):
        diffusion = create_gaussian_diffusion(steps=12, betas=source)
        np.testing.assert_allclose(diffusion.betas, betas, rtol=1e-12)


@pytest.mark.parametrize("cls", [ModelAndDiffusionOptions, SuperResOptions])
@pytest.mark.parametrize("predict", ["xstart", "v"])
def test_zero_terminal_snr_rescales_the_schedule(cls, predict):
    flags = {"predict": predict, "diffusion_steps": 50}
    plain = cls(**flags).diffusion()
    rescaled = cls(zero_terminal_snr=True, **flags).diffusion()
    np.testing.assert_allclose(rescaled.betas, zero_terminal_snr(plain.betas), rtol=1e-9)
    assert rescaled.alphas_cumprod[-1] == 0
    kept = cls(zero_terminal_snr=True, timestep_respacing="5", **flags).diffusion()
    assert kept.alphas_cumprod[-1] == 0
    own = cls(betas="0.1,0.5,0.9", zero_terminal_snr=True, predict=predict, diffusion_steps=3)
    assert own.diffusion().betas[-1] == 1


CONTRADICTIONS = [
    ({"predict": "score"}, ["--predict score", "eps, xstart, v, flow"]),
    ({"predict": "eps", "predict_xstart": True}, ["--predict eps", "--predict_xstart True"]),
    ({"predict": "v", "predict_xstart": True}, ["--predict v", "--predict_xstart True"]),
    ({"predict": "flow", "noise_schedule": "cosine"}, ["flow", "--noise_schedule cosine"]),
    ({"predict": "flow", "betas": "0.1,1"}, ["--predict flow", "--betas"]),
    ({"predict": "flow", "zero_terminal_snr": True}, ["--predict flow", "--zero_terminal_snr"]),
    ({"betas": "0.1", "noise_schedule": "cosine"}, ["--betas", "--noise_schedule cosine"]),
    ({"betas": "0.1,0.2"}, ["2 numbers", "--diffusion_steps is 1000", "--diffusion_steps 2"]),
    ({"betas": "0.1,1", "diffusion_steps": 2}, ["--betas", "eps", "--predict xstart", "v", "flow"]),
    ({"betas": "0.1,0", "diffusion_steps": 2}, ["--betas 0.1,0", "(0, 1]"]),
    ({"zero_terminal_snr": True}, ["--zero_terminal_snr", "eps", "--predict xstart", "v", "flow"]),
    ({"zero_terminal_snr": True, "predict": "eps"}, ["--zero_terminal_snr", "--predict xstart"]),
    ({"noise_schedule": "linear_path"}, ["linear_path", "eps", "--predict xstart", "v", "flow"]),
    (
        {"zero_terminal_snr": True, "predict": "v", "diffusion_steps": 1, "betas": "0.5"},
        ["--zero_terminal_snr", "at least 2"],
    ),
    ({"loss_weight": "p3"}, ["--loss_weight p3", "p2"]),
    ({"loss_weight": "p2", "use_kl": True}, ["--loss_weight p2", "--use_kl"]),
    (
        {"loss_weight": "edm", "betas": ",".join(["0.999"] * 20), "diffusion_steps": 20},
        ["--loss_weight edm is infinite", "predicts eps", "none, min_snr, snr, p2, sigmoid"],
    ),
    ({"noise_schedule": "scaled_linear", "diffusion_steps": 12}, ["scaled_linear", "13", "12"]),
]


@pytest.mark.parametrize(("flags", "words"), CONTRADICTIONS)
@pytest.mark.parametrize("cls", [ModelAndDiffusionOptions, SuperResOptions])
def test_process_of_contradictory_flags_is_one_line_that_names_them(cls, flags, words):
    with pytest.raises(UserError) as error:
        cls(**flags).diffusion()
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_what_training_settles_grows():
    assert {"predict", "betas", "zero_terminal_snr"} <= script_util.FIXED_BY_TRAINING
    assert "loss_weight" not in script_util.FIXED_BY_TRAINING
