"""From flags to networks and processes: defaults, sizes of images, and what is refused."""

import argparse
import inspect
import re

import pytest
import torch
from golden_data import load_json

from improved_diffusion import script_util
from improved_diffusion.errors import UserError
from improved_diffusion.flags import height_width, image_size
from improved_diffusion.gaussian_diffusion import LossType, ModelMeanType, ModelVarType
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
        (512, (1, 1, 2, 2, 4, 4)),
        (96, (1, 2, 3, 4)),
        (28, (1, 2, 2)),
        (8, (1, 2)),
        (4, (1,)),
        ((48, 64), (1, 2, 3, 4)),
        ((64, 48), (1, 2, 3, 4)),
    ],
)
def test_levels_by_the_size_of_the_image(size, mult):
    network = model(image_size=size)
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
