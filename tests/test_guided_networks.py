"""The networks of guided diffusion: recorded keys, shapes and numbers; see golden/guided_*.

Every published model's state dict, and small networks with every new option, both computed by
another implementation.
"""

import gzip
import json

import pytest
import torch
from golden_data import GOLDEN, assert_rel, group, load_json

from improved_diffusion.blocks import AttentionBlock, AttentionPool2d
from improved_diffusion.errors import UserError
from improved_diffusion.flags import make_parser, pick
from improved_diffusion.script_util import (
    ClassifierOptions,
    ModelAndDiffusionOptions,
    SuperResOptions,
    classifier_and_diffusion_defaults,
    classifier_defaults,
    create_classifier,
    create_classifier_and_diffusion,
)
from improved_diffusion.state_dicts import check_shapes, describe_network, kind_of
from improved_diffusion.unet import POOLS, EncoderUNetModel, UNetModel

PUBLISHED = json.loads(gzip.decompress((GOLDEN / "guided_manifests.json.gz").read_bytes()))
SMALL = load_json("guided_networks")
OPTIONS = {
    "diffusion": ModelAndDiffusionOptions,
    "upsampler": SuperResOptions,
    "classifier": ClassifierOptions,
}


def network_of(kind, flags):
    """The network of a command line."""
    options = OPTIONS[kind]
    return pick(options, vars(make_parser("", options).parse_args(flags.split()))).model()


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def set_weights(model):
    """The weights of the recorded networks."""
    with torch.no_grad():
        for i, (key, tensor) in enumerate(model.state_dict().items()):
            value = 0.05 * draw(7000 + i, *tensor.shape)
            tensor.copy_(value + 1 if key.endswith("weight") and tensor.ndim == 1 else value)
    return model.eval()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoint_fits_the_network_of_its_flags(name):
    entry = PUBLISHED[name]
    with torch.device("meta"):
        network = network_of(entry["kind"], entry["flags"])
    state = [[key, list(value.shape)] for key, value in network.state_dict().items()]
    assert state == entry["state"]
    assert sum(p.numel() for p in network.parameters()) == entry["parameters"]


@pytest.mark.parametrize("name", group("guided_networks", "unet"))
def test_unet_computes_the_recorded_numbers(name):
    case = name.removesuffix("/out")
    model = set_weights(network_of("diffusion", SMALL[f"unet/{case}"]))
    with torch.no_grad():
        out = model(draw(11, 2, 3, 64, 64), torch.tensor([3.0, 871.0]), y=torch.tensor([5, 999]))
    assert_rel(out, group("guided_networks", "unet")[name], 1e-4)


@pytest.mark.parametrize("pool", POOLS)
def test_classifier_computes_the_recorded_numbers(pool):
    model = set_weights(network_of("classifier", SMALL[f"classifier/{pool}"]))
    with torch.no_grad():
        logits = model(draw(12, 2, 3, 64, 64), torch.tensor([3.0, 871.0]))
    assert_rel(logits, group("guided_networks", f"classifier/{pool}")["logits"], 1e-4)


# -- what the options do --------------------------------------------------------------------------


def test_defaults_of_the_factories_are_those_of_guided_diffusion():
    assert {
        "image_size": 64,
        "classifier_use_fp16": False,
        "classifier_width": 128,
        "classifier_depth": 2,
        "classifier_attention_resolutions": "32,16,8",
        "classifier_use_scale_shift_norm": True,
        "classifier_resblock_updown": True,
        "classifier_pool": "attention",
    }.items() <= classifier_defaults().items()
    with torch.device("meta"):
        assert isinstance(create_classifier(**classifier_defaults()), EncoderUNetModel)
        classifier, diffusion = create_classifier_and_diffusion(
            **{**classifier_and_diffusion_defaults(), "timestep_respacing": "10"}
        )
    assert (classifier.num_classes, diffusion.num_timesteps) == (1000, 10)


def unet(**changes):
    options = {"in_channels": 3, "model_channels": 32, "out_channels": 3, "num_res_blocks": 1}
    options |= {"attention_resolutions": (2,), "channel_mult": (1, 2)}
    return UNetModel(**{**options, **changes})


def classifier(**changes):
    options = {"image_size": 16, "in_channels": 3, "model_channels": 32, "out_channels": 5}
    options |= {"num_res_blocks": 1, "attention_resolutions": (2,), "channel_mult": (1, 2)}
    return EncoderUNetModel(**{**options, **changes})


def heads(model):
    return [m.num_heads for m in model.modules() if isinstance(m, AttentionBlock)]


def test_heads_of_so_many_channels_are_more_at_wider_levels():
    model = unet(channel_mult=(1, 2), attention_resolutions=(1, 2), num_head_channels=16)
    assert heads(model) == [2, 4, 4, 4, 4, 2, 2]  # down, middle, up


def test_heads_of_so_many_channels_must_divide_every_level():
    with pytest.raises(UserError) as error:
        unet(attention_resolutions=(1,), num_head_channels=48)
    assert str(error.value).startswith("num_head_channels 48 does not divide a level of 32")


@pytest.mark.parametrize("updown", [False, True])
def test_residual_blocks_that_resample_keep_the_size_of_the_output(updown):
    model = set_weights(unet(resblock_updown=updown))
    x = draw(1, 2, 3, 8, 12)
    assert model(x, torch.tensor([1, 2])).shape == x.shape
    shapes = [f.shape[2:] for f in model.get_feature_vectors(x, torch.tensor([1, 2]))["down"]]
    assert shapes == [(8, 12), (8, 12), (4, 6), (4, 6)]


def test_orders_of_attention_are_a_permutation_of_the_same_weights():
    old, new = (AttentionBlock(64, 4, use_new_attention_order=order) for order in (False, True))
    set_weights(old)
    state = old.state_dict()
    for key in ("qkv.weight", "qkv.bias"):  # by head: q, k, v -> by q, k, v: head
        by_head = state[key].unflatten(0, (4, 3, 16))
        state[key] = by_head.transpose(0, 1).flatten(0, 2)
    new.load_state_dict(state)
    x = draw(2, 2, 64, 4, 4)
    torch.testing.assert_close(new(x), old(x))
    assert not torch.allclose(set_weights(new)(x), old(x), atol=1e-3)


def test_null_class_is_one_label_more():
    model = set_weights(unet(num_classes=3, null_class=True))
    assert (model.num_classes, model.null_class) == (3, 3)
    assert model.label_emb.weight.shape[0] == 4
    x, t = draw(3, 1, 3, 8, 8), torch.tensor([5])
    outputs = [model(x, t, y=torch.tensor([label])) for label in range(4)]
    assert not any(torch.allclose(outputs[3], other) for other in outputs[:3])
    assert unet(num_classes=3).null_class is None


def test_null_class_without_classes_is_refused():
    with pytest.raises(UserError, match="null_class needs num_classes"):
        unet(null_class=True)


def test_class_dropout_makes_the_null_class():
    flags = "--image_size 8 --num_channels 32 --num_res_blocks 1 --attention_resolutions 4"
    flags += " --class_cond True --num_classes 4"
    assert network_of("diffusion", flags).null_class is None
    assert network_of("diffusion", flags + " --class_dropout 0.1").null_class == 4
    with pytest.raises(UserError, match=r"--class_dropout 0\.1 needs --class_cond True"):
        network_of("diffusion", "--class_dropout 0.1")
    with pytest.raises(UserError, match=r"--class_dropout 1\.0: must be in"):
        network_of("diffusion", flags + " --class_dropout 1")


def test_fractional_first_level_has_narrow_blocks():
    with torch.device("meta"):
        network = network_of("diffusion", "--image_size 512 --num_channels 64")
    assert network.input_blocks[0][0].out_channels == 32
    assert network.out[-1].in_channels == 32


# -- classifiers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", POOLS)
def test_classifier_gives_a_number_per_class_and_gradients_to_the_image(pool):
    model = set_weights(classifier(pool=pool, num_head_channels=32))
    x = draw(4, 2, 3, 16, 16).requires_grad_()
    logits = model(x, torch.tensor([1, 500]))
    assert logits.shape == (2, 5)
    (gradient,) = torch.autograd.grad(logits.logsumexp(dim=1).sum(), x)
    assert gradient.abs().amax() > 0


@pytest.mark.parametrize("pool", POOLS)
def test_classifier_of_images_that_are_not_square(pool):
    model = set_weights(classifier(image_size=(8, 16), pool=pool, num_head_channels=32))
    assert model(draw(5, 2, 3, 8, 16), torch.tensor([1, 2])).shape == (2, 5)


def test_attention_pool_refuses_images_of_another_size():
    model = classifier(pool="attention", num_head_channels=32)
    with pytest.raises(UserError) as error:
        model(draw(6, 1, 3, 32, 32), torch.tensor([1]))
    assert "is for images of 16 pixels, not 32x32" in str(error.value)


def test_unknown_pool_names_those_there_are():
    with pytest.raises(UserError) as error:
        classifier(pool="max")
    assert str(error.value) == (
        "pool 'max': choose one of adaptive, attention, spatial, spatial_v2"
    )


def test_classifier_computes_in_half_precision_and_back():
    model = set_weights(classifier(pool="adaptive"))
    x, t = draw(7, 2, 3, 16, 16), torch.tensor([1, 2])
    full = model(x, t)
    model.convert_to_fp16()
    assert model.inner_dtype == torch.float16
    half = model(x, t)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0.05, atol=0.02)
    model.convert_to_fp32()
    assert model.inner_dtype == torch.float32


def test_attention_pool_attends_from_the_mean_position():
    pool = AttentionPool2d(2, 32, 16, 7)
    with torch.no_grad():
        pool.qkv_proj.weight.zero_()
        pool.qkv_proj.weight[64:] = torch.eye(32)[..., None]  # values as they are; equal shares
        pool.qkv_proj.bias.zero_()
        pool.positional_embedding.zero_()
    x = draw(8, 3, 32, 2, 2)
    mean = x.mean(dim=(2, 3))  # of the four and of their mean: the mean again
    expected = mean @ pool.c_proj.weight[..., 0].T + pool.c_proj.bias
    torch.testing.assert_close(pool(x), expected)


# -- what a state dict tells ----------------------------------------------------------------------


def shapes(model):
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_state_dict_tells_its_flags(name):
    entry = PUBLISHED[name]
    words = entry["flags"].split()
    flags = dict(zip(words[::2], words[1::2], strict=True))
    about = describe_network({key: tuple(shape) for key, shape in entry["state"]})
    if entry["kind"] == "classifier":
        assert kind_of(dict(entry["state"])) == "classifier"
        assert about["--classifier_width"] == int(flags["--classifier_width"])
        assert about["--classifier_pool"] == flags["--classifier_pool"]
        assert about["--num_classes"] == 1000
    else:
        assert about["--num_channels"] == int(flags["--num_channels"])
        assert about["--num_res_blocks"] == int(flags["--num_res_blocks"])
        assert str(about["--resblock_updown"]) == flags["--resblock_updown"]
        assert str(about["--class_cond"]) == flags["--class_cond"]


def refusal(here, there):
    with pytest.raises(UserError) as error:
        check_shapes(here, shapes(there), "x.pt")
    return str(error.value)


def test_misfit_names_the_new_flags():
    assert refusal(unet(), unet(resblock_updown=True)).endswith(
        "does not fit the flags: --resblock_updown False here, True in the checkpoint"
    )
    message = refusal(unet(num_classes=3), unet(num_classes=3, null_class=True))
    assert "--num_classes (one more with --class_dropout) 3 here, 4 in the" in message


def test_misfit_of_classifiers_names_the_flag():
    message = refusal(classifier(pool="adaptive"), classifier(pool="spatial"))
    assert "--classifier_pool adaptive here, spatial in the checkpoint" in message
    message = refusal(classifier(out_channels=3), classifier())
    assert message.endswith("--num_classes 3 here, 5 in the checkpoint")
    message = refusal(classifier(), classifier(resblock_updown=True))
    assert message.endswith("--classifier_resblock_updown False here, True in the checkpoint")
    message = refusal(classifier(), classifier(attention_resolutions=()))
    assert message.endswith("(--classifier_attention_resolutions) [3] here, [] in the checkpoint")
    attention = {"pool": "attention", "num_head_channels": 32}
    message = refusal(classifier(**attention), classifier(image_size=32, **attention))
    assert "(--image_size) 64 here, 256 in the checkpoint" in message


def test_networks_of_another_kind_are_told_apart():
    assert refusal(unet(), classifier()) == (
        "checkpoint 'x.pt' is that of a classifier, not of a diffusion model"
    )
    assert refusal(classifier(), unet()) == (
        "checkpoint 'x.pt' is that of a diffusion model, not of a classifier"
    )
