"""From the command line to a run folder, and back from a checkpoint."""

import json

import pytest
import torch
from toy import make_model

from improved_diffusion import dist_util, runs, stored_flags
from improved_diffusion.errors import UserError
from improved_diffusion.flags import make_parser, pick
from improved_diffusion.image_datasets import ImageList
from improved_diffusion.script_util import ModelAndDiffusionOptions
from improved_diffusion.train_util import TrainOptions


def make_flags(**changes):
    parser = make_parser("", TrainOptions, ModelAndDiffusionOptions, runs.RunOptions)
    return {**vars(parser.parse_args([])), **changes}


@pytest.fixture
def stored(tmp_path):
    """A run folder whose flags are not the defaults."""
    flags = make_flags(
        image_size=(8, 12),
        num_channels=32,
        class_cond=True,
        num_classes=3,
        timestep_respacing="50",
        dropout=0.3,
        lr=0.5,
        batch_size=7,
        seed=9,
    )
    stored_flags.save_config(str(tmp_path), {**flags, "class_names": ["a", "b", "c"]})
    return str(tmp_path)


# -- options


@pytest.mark.parametrize(
    ("options", "named"),
    [({"seed": -1}, "--seed -1"), ({"log_dir": "gs://bucket/x"}, "--log_dir gs://bucket/x")],
)
def test_impossible_options_are_named(options, named):
    with pytest.raises(UserError, match=named):
        runs.RunOptions(**options)


def test_parse_tells_flags_that_were_given_from_defaults():
    parser = make_parser("", TrainOptions)
    flags, given = runs.parse(parser, ["--lr", "1e-4", "--batch_size", "3"])
    assert flags["lr"] == 1e-4  # the default, but given
    assert flags["batch_size"] == 3
    assert flags["save_interval"] == 10000
    assert given == {"lr", "batch_size"}


# -- flags of a checkpoint


def test_flags_of_the_model_are_inherited(stored):
    merged = runs.inherit(make_flags(), set(), stored)
    assert merged["image_size"] == (8, 12)
    assert merged["num_channels"] == 32
    assert merged["class_cond"] is True
    assert merged["num_classes"] == 3
    assert merged["timestep_respacing"] == "50"
    assert merged["dropout"] == 0.3
    assert merged["class_names"] == ["a", "b", "c"]


def test_flags_of_the_training_are_not_inherited(stored):
    merged = runs.inherit(make_flags(), set(), stored)
    for name in ("lr", "batch_size", "seed", "log_dir", "data_dir"):
        assert merged.get(name) == make_flags().get(name)


def test_given_flags_win_where_training_has_not_settled_them(stored):
    flags = make_flags(timestep_respacing="", dropout=0.0)
    merged = runs.inherit(flags, {"timestep_respacing", "dropout"}, stored)
    assert (merged["timestep_respacing"], merged["dropout"]) == ("", 0.0)


@pytest.mark.parametrize("value", [128, 64])
def test_given_flag_that_contradicts_is_an_error_with_both_values(stored, value):
    with pytest.raises(UserError, match=f"--num_channels {value} .* --num_channels 32"):
        runs.inherit(make_flags(num_channels=value), {"num_channels"}, stored)


def test_folder_without_flags_changes_nothing(tmp_path):
    flags = make_flags(num_channels=32)
    merged = runs.inherit(flags, {"num_channels"}, str(tmp_path))
    assert merged == {**flags, "class_names": []}


def test_flags_survive_the_file(tmp_path):
    """Sizes come back as pairs, and what is written is plain JSON."""
    flags = make_flags(image_size=(8, 12))
    stored_flags.save_config(str(tmp_path), flags)
    json.loads((tmp_path / "config.json").read_text())
    merged = runs.inherit(make_flags(), set(), str(tmp_path))
    assert merged == {**flags, "class_names": []}


# -- the process of a checkpoint


OWN = ",".join(["0.001"] * 100)


def inherit_from(folder, config, **given):
    """The merged flags of a command line over a checkpoint's."""
    stored_flags.save_config(str(folder), config)
    return runs.inherit(make_flags(**given), set(given), str(folder))


@pytest.mark.parametrize(
    ("trained", "given"),
    [
        ({}, {"predict": "eps"}),
        ({}, {"predict": "", "betas": "", "zero_terminal_snr": False}),
        ({"predict_xstart": True}, {"predict": "xstart"}),
        ({"predict": "xstart"}, {"predict_xstart": True}),
        ({"predict": "v", "zero_terminal_snr": True}, {"predict": "v", "zero_terminal_snr": True}),
        ({"predict": "flow"}, {"predict": "flow", "noise_schedule": "linear_path"}),
        ({"betas": OWN, "diffusion_steps": 100}, {"betas": OWN}),
    ],
)
def test_flags_that_say_what_was_trained_in_other_words_pass(tmp_path, trained, given):
    merged = inherit_from(tmp_path, make_flags(**trained), **given)
    expected = pick(ModelAndDiffusionOptions, make_flags(**trained)).diffusion()
    diffusion = pick(ModelAndDiffusionOptions, merged).diffusion()
    assert diffusion.model_mean_type is expected.model_mean_type
    assert list(diffusion.betas) == list(expected.betas)
    runs.inherit(merged, set(merged) & set(make_flags()), str(tmp_path))  # fits once more


@pytest.mark.parametrize(
    ("trained", "given", "words"),
    [
        ({"predict": "v"}, {"predict": "eps"}, ["--predict eps", "--predict v"]),
        ({"predict": "v"}, {"predict_xstart": True}, ["--predict_xstart True"]),
        ({"predict_xstart": True}, {"predict": "v"}, ["--predict v", "--predict xstart"]),
        ({}, {"predict": "v"}, ["--predict v", "--predict eps"]),
        ({}, {"zero_terminal_snr": True}, ["--zero_terminal_snr True", "False"]),
        ({"predict": "flow"}, {"noise_schedule": "cosine"}, ["--noise_schedule cosine"]),
        ({"betas": OWN}, {"betas": "0.5"}, ["--betas 0.5", "--betas 0.001,", "(100 in all)"]),
        ({}, {"betas": OWN}, ["--betas 0.001,", "(100 in all)", "--betas ''"]),
    ],
)
@pytest.mark.parametrize("older", [False, True])
def test_another_process_than_the_trained_one_is_refused(tmp_path, trained, given, words, older):
    config = make_flags(**trained)
    for name in {"predict", "betas", "zero_terminal_snr"} - trained.keys():
        if older:  # a run from before there were these flags
            del config[name]
    with pytest.raises(UserError) as error:
        inherit_from(tmp_path, config, **given)
    for word in ["contradicts the checkpoint", "config.json", *words]:
        assert word in str(error.value)
    assert len(str(error.value)) < 300


def test_older_checkpoint_has_the_process_of_its_other_flags(tmp_path):
    config = make_flags(predict_xstart=True)
    for name in ("predict", "betas", "zero_terminal_snr", "loss_weight"):
        del config[name]
    merged = inherit_from(tmp_path, config)
    assert (merged["predict"], merged["betas"], merged["zero_terminal_snr"]) == ("", "", False)
    assert pick(ModelAndDiffusionOptions, merged).diffusion().model_mean_type.name == "START_X"


# -- classes


def images(*names):
    return ImageList([f"{name}_1.png" for name in names], list(range(len(names))), tuple(names))


@pytest.mark.parametrize(
    ("trained", "found"), [(["a", "b"], ["a", "b"]), ([], ["a"]), (None, ["a"]), (["a"], [])]
)
def test_classes_that_agree_or_are_unknown_pass(trained, found):
    flags = make_flags(class_cond=True, class_names=trained)
    runs.check_class_names(flags, images(*found))


@pytest.mark.parametrize(
    ("found", "odd"),
    [
        (["a", "b"], "only in the checkpoint: c"),
        (["a", "b", "c", "d"], "only in the data: d"),
        (["a", "b", "x"], "only in the data: x; only in the checkpoint: c"),
        (["a", "b", "c", *"123456"], r"only in the data: 1, 2, 3, 4, 5, \.\.\."),
    ],
)
def test_other_classes_than_the_checkpoints_are_named(found, odd):
    flags = make_flags(class_cond=True, class_names=["a", "b", "c"])
    with pytest.raises(UserError, match=f"{len(found)} classes .* 3 .*: {odd}$"):
        runs.check_class_names(flags, images(*found))


def test_more_classes_than_the_model_are_an_error():
    flags = make_flags(class_cond=True, num_classes=2)
    runs.check_class_names(flags, images("a", "b"))
    with pytest.raises(UserError, match="3 classes, more than the model's 2"):
        runs.check_class_names(flags, images("a", "b", "c"))


def test_labels_are_mapped_to_the_checkpoints_classes_by_name():
    found = ImageList(["d_1.png", "b_1.png"], [1, 0], ("b", "d"))
    mapped = runs.relabel(found, ["a", "b", "c", "d"])
    assert mapped.classes == [3, 1]
    assert mapped.class_names == ("a", "b", "c", "d")
    with pytest.raises(UserError, match="not trained on: d"):
        runs.relabel(found, ["a", "b"])
    assert runs.relabel(ImageList(["x.png"]), ["a"]).classes is None


# -- weights


def test_model_for_evaluation_has_the_weights_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(dist_util, "dev", lambda: torch.device("cpu"))
    path = str(tmp_path / "model000001.pt")
    torch.save(make_model(seed=1).state_dict(), path)
    model = runs.load_for_evaluation(make_model(seed=2), path)
    assert not model.training
    for ours, theirs in zip(model.parameters(), make_model(seed=1).parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_weights_that_are_not_finite_are_not_sampled(tmp_path):
    model = torch.nn.Linear(2, 1)
    state = {**model.state_dict(), "bias": torch.tensor([float("nan")])}
    torch.save(state, tmp_path / "model000001.pt")
    with pytest.raises(UserError, match=r"model000001.pt' holds non-finite weights"):
        runs.load_for_evaluation(model, str(tmp_path / "model000001.pt"))
