"""Does a checkpoint fit a network; if not, which flags differ."""

import pytest
import torch
from golden_data import load_json

from improved_diffusion.errors import UserError
from improved_diffusion.files import write_tensors
from improved_diffusion.script_util import create_model, sr_create_model
from improved_diffusion.state_dicts import LABELS, check_fit, describe_network, load_model

PUBLISHED = load_json("state_dicts")
OPTIONS = {
    "image_size": 16,
    "num_channels": 32,
    "num_res_blocks": 1,
    "learn_sigma": False,
    "class_cond": False,
    "use_checkpoint": False,
    "attention_resolutions": "8",
    "num_heads": 4,
    "num_heads_upsample": -1,
    "use_scale_shift_norm": True,
    "dropout": 0.0,
}


def network(**changes):
    """A small network without memory behind its weights."""
    with torch.device("meta"):
        return create_model(**{**OPTIONS, **changes})


def message_of(call, *args, **kwargs):
    """The one line with which a call refuses its arguments."""
    with pytest.raises(UserError) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# -- does a checkpoint fit? -----------------------------------------------------------------------


def fit(here, there):
    check_fit(here, there.state_dict(), "runs/x/model.pt")


def test_checkpoint_that_fits_passes():
    fit(network(), network())
    fit(network(), network(dropout=0.5, num_heads=2, use_checkpoint=True))


MISFITS = [
    ({"num_channels": 64}, ["--num_channels 32 here, 64 in the checkpoint"]),
    ({"num_res_blocks": 2}, ["--num_res_blocks 1 here, 2 in the checkpoint"]),
    ({"channel_mult": "1,1,2"}, ["--channel_mult 1,2,2 here, 1,1,2 in the checkpoint"]),
    ({"channel_mult": "1,2"}, ["--channel_mult 1,2,2 here, 1,2 in the checkpoint"]),
    ({"class_cond": True}, ["--class_cond False here, True in the checkpoint"]),
    ({"use_scale_shift_norm": False}, ["--use_scale_shift_norm True here, False in the"]),
    ({"learn_sigma": True}, ["--learn_sigma) 3 here, 6 in the checkpoint"]),
    ({"attention_resolutions": ""}, ["--attention_resolutions) [1] here, [] in the checkpoint"]),
    ({"attention_resolutions": "8,4"}, ["--attention_resolutions) [1] here, [1, 2] in the"]),
    ({"channels": 1}, ["--channels, ", " 3 here, 1 in the checkpoint"]),
    (
        {"num_channels": 64, "class_cond": True, "num_res_blocks": 2},
        ["--num_channels 32 here, 64", "--class_cond False here, True", "--num_res_blocks 1 here"],
    ),
]


@pytest.mark.parametrize(("changes", "parts"), MISFITS, ids=[str(c[0]) for c in MISFITS])
def test_misfit_names_the_flags_and_both_values(changes, parts):
    message = message_of(fit, network(), network(**changes))
    assert "runs/x/model.pt" in message
    for part in parts:
        assert part in message
    unconcerned = ["num_channels", "num_res_blocks", "channel_mult", "class_cond", "use_scale"]
    for name in unconcerned:
        if not any(key.startswith(name) for key in changes):
            assert f"--{name}" not in message


def test_misfit_in_the_number_of_classes_names_both():
    message = message_of(
        fit, network(class_cond=True, num_classes=10), network(class_cond=True, num_classes=7)
    )
    assert f"{LABELS} 10 here, 7 in the checkpoint" in message
    assert "--class_cond" not in message


def test_super_resolution_checkpoint_in_a_plain_model_is_a_misfit():
    options = {**OPTIONS, "large_size": OPTIONS["image_size"], "small_size": 8}
    del options["image_size"]
    with torch.device("meta"):
        large = sr_create_model(**options)
    assert "super-resolution) 3 here, 6 in the checkpoint" in message_of(fit, network(), large)


def state_of(name):
    shapes = PUBLISHED[name]["keys"]
    return {key: torch.empty(shape, device="meta") for key, shape in shapes}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_flags_of_a_published_checkpoint_are_told_from_its_shapes(name):
    arguments = PUBLISHED[name]["arguments"]
    shapes = {key: tuple(shape) for key, shape in PUBLISHED[name]["keys"]}
    about = describe_network(shapes)
    for flag in ("num_channels", "num_res_blocks", "use_scale_shift_norm", "class_cond"):
        assert about[f"--{flag}"] == arguments[flag]
    assert about.get(LABELS) == (1000 if arguments["class_cond"] else None)
    size = arguments.get("image_size") or arguments["large_size"]
    mults = {32: "1,2,2,2", 64: "1,2,3,4", 256: "1,1,2,2,4,4"}
    assert about["--channel_mult"] == mults[size]
    wanted = [int(text) for text in arguments["attention_resolutions"].split(",")]
    levels = sorted(level for level in range(6) if size >> level in wanted)
    (attention,) = [value for key, value in about.items() if "--attention_resolutions" in key]
    assert attention == levels
    inputs = 6 if PUBLISHED[name]["class"] == "SuperResModel" else 3
    assert [value for key, value in about.items() if "channels (" in key] == [inputs, 6]


def test_published_checkpoint_with_the_default_flags_says_which_are_wrong():
    with torch.device("meta"):
        here = create_model(**{**OPTIONS, "image_size": 64, "num_channels": 128})
    message = message_of(check_fit, here, state_of("imagenet64_uncond_100M"), "x.pt")
    assert "--num_res_blocks 1 here, 3 in the checkpoint" in message
    assert "--learn_sigma" in message
    assert "--num_channels " not in message


def test_any_missing_key_is_an_error_that_names_the_file():
    here = network(class_cond=True, num_classes=5)
    whole = here.state_dict()
    wrong = {}
    for key in whole:
        try:
            check_fit(here, {k: v for k, v in whole.items() if k != key}, "x.pt")
            wrong[key] = "no error"
        except UserError as error:
            if "x.pt" not in str(error) or "\n" in str(error):
                wrong[key] = str(error)
        except Exception as error:
            wrong[key] = repr(error)
    assert wrong == {}


def test_missing_and_unknown_keys_are_counted_and_shown():
    here = network()
    state = here.state_dict()
    del state["out.2.weight"]
    state["extra.weight"] = torch.zeros(3)
    message = message_of(check_fit, here, state, "x.pt")
    assert "2 keys" in message
    assert "extra.weight, out.2.weight" in message


def test_key_of_another_shape_is_shown():
    here = network()
    state = {**here.state_dict(), "time_embed.2.bias": torch.zeros(3)}
    message = message_of(check_fit, here, state, "x.pt")
    assert "time_embed.2.bias" in message


def test_network_of_another_kind_is_told_by_its_keys():
    message = message_of(check_fit, torch.nn.Linear(2, 2), {"weight": torch.zeros(2, 2)}, "x.pt")
    assert "bias" in message
    assert describe_network({"weight": (2, 2)}) == {}


@pytest.mark.parametrize(
    "state", [torch.zeros(3), [torch.zeros(3)], {"state": {}, "param_groups": []}, {"a": 1}, None]
)
def test_what_is_no_state_dict_of_a_model_is_refused(state):
    message = message_of(check_fit, torch.nn.Linear(2, 2), state, "runs/x/opt000001.pt")
    assert "'runs/x/opt000001.pt'" in message
    assert "no state dict" in message


def test_model_is_loaded(tmp_path):
    torch.manual_seed(1)
    saved, model = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    write_tensors(str(tmp_path / "a.pt"), saved.state_dict())
    load_model(model, str(tmp_path / "a.pt"))
    assert torch.equal(model.weight, saved.weight)
    assert torch.equal(model.bias, saved.bias)


def test_model_that_does_not_fit_is_left_alone(tmp_path):
    model = torch.nn.Linear(2, 3)
    before = model.weight.clone()
    write_tensors(str(tmp_path / "a.pt"), {"weight": torch.zeros(3, 2)})
    assert str(tmp_path / "a.pt") in message_of(load_model, model, str(tmp_path / "a.pt"))
    assert torch.equal(model.weight, before)
