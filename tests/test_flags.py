"""Flags: those of the scripts are the recorded ones, and a mistake in one is a single line."""

import argparse
import dataclasses
import functools
import importlib.util
import re
from pathlib import Path

import pytest
from golden_data import load_json

from improved_diffusion.errors import UserError
from improved_diffusion.flags import (
    ArgumentParser,
    defaults,
    flag_type,
    given_flags,
    height_width,
    image_size,
    make_parser,
    numbers,
    option,
    pick,
    require,
    require_at_least,
    size_text,
    str2bool,
)
from improved_diffusion.schedules import read_betas

RECORDED = load_json("flags")
SCRIPTS = sorted(RECORDED)
FLAGS = [(script, flag) for script in SCRIPTS for flag in RECORDED[script]]
WORDS = {True: ["yes", "true", "t", "y", "1"], False: ["no", "false", "f", "n", "0"]}
EXAMPLES = {  # type -> text on the command line, the value it stands for
    "int": [("7", 7), ("-3", -3)],
    "float": [("0.25", 0.25), ("1e-3", 0.001), ("2", 2.0)],
    "str": [("some/path,1", "some/path,1"), ("", ""), ("12", "12")],
    "bool": [(w, value) for value, words in WORDS.items() for w in words]
    + [(w, value) for value, words in WORDS.items() for w in (words[0].upper(), words[1].title())],
}
SIZES = ["--image_size", "--large_size", "--small_size"]


@functools.cache
def parser_of(script):
    """What ``create_argparser()`` of a script returns."""
    path = Path(__file__).parent.parent / "scripts" / script
    spec = importlib.util.spec_from_file_location(f"flags_of_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.create_argparser()


def parse(script, *argv):
    return vars(parser_of(script).parse_args(argv))


def error_line(capsys, parser, *argv):
    """The one line on stderr with which a parser refuses a command line."""
    with pytest.raises(SystemExit) as exit:
        parser.parse_args(argv)
    captured = capsys.readouterr()
    assert exit.value.code == 2
    assert captured.out == ""
    assert captured.err.endswith("\n")
    assert captured.err.count("\n") == 1
    return captured.err


# -- the scripts' flags ---------------------------------------------------------------------------


@pytest.mark.parametrize(("script", "flag"), FLAGS)
def test_flag_has_the_recorded_default(script, flag):
    value, recorded = parse(script)[flag.removeprefix("--")], RECORDED[script][flag]
    assert value == recorded["default"]
    assert type(value).__name__ == recorded["type"]


@pytest.mark.parametrize(("script", "flag"), FLAGS)
def test_flag_reads_the_recorded_type(script, flag):
    kind = RECORDED[script][flag]["type"]
    for text, expected in EXAMPLES[kind]:
        if flag in SIZES and expected < 1:
            continue
        value = parse(script, f"{flag}={text}")[flag.removeprefix("--")]
        assert value == expected
        assert type(value).__name__ == kind


@pytest.mark.parametrize(("script", "flag"), [case for case in FLAGS if case[1] in SIZES])
def test_size_flag_also_reads_height_x_width(script, flag):
    assert parse(script, flag, "48x64")[flag.removeprefix("--")] == (48, 64)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_a_help_text_and_shows_its_default(monkeypatch, script):
    monkeypatch.setenv("COLUMNS", "1000")  # a line per flag: nothing is broken at a hyphen
    parser = parser_of(script)
    assert [action.dest for action in parser._actions if not (action.help or "").strip()] == []
    shown = " ".join(parser.format_help().split())
    for action in parser._actions:
        if action.dest != "help":
            wanted = f"{action.help} (default: {action.default})"
            assert " ".join(wanted.split()) in shown


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("misspelt", ["--num_chanels", "--num_channel", "--num-channels"])
@pytest.mark.parametrize("form", ["two words", "equals sign"])
def test_unknown_flag_is_an_error_that_names_the_nearest(capsys, script, misspelt, form):
    argv = [misspelt, "64"] if form == "two words" else [f"{misspelt}=64"]
    line = error_line(capsys, parser_of(script), *argv)
    assert misspelt in line
    assert "did you mean --num_channels?" in line


@pytest.mark.parametrize(
    ("misspelt", "nearest"),
    [
        ("--bach_size", "--batch_size"),
        ("--timestep_respace", "--timestep_respacing"),
        ("--class_conditional", "--class_cond"),
        ("--log_dirs", "--log_dir"),
    ],
)
def test_nearest_flag_is_found_among_all(capsys, misspelt, nearest):
    line = error_line(capsys, parser_of("image_sample.py"), misspelt, "1")
    assert f"did you mean {nearest}?" in line


def test_nearest_flag_does_not_depend_on_the_value(capsys):
    argv = ["--modelpath=runs/a/long/way/down/from/here/ema_0.9999_010000.pt"]
    line = error_line(capsys, parser_of("image_sample.py"), *argv)
    assert "did you mean --model_path?" in line


def test_flag_far_from_any_other_points_to_the_help(capsys):
    line = error_line(capsys, parser_of("image_train.py"), "--zzzqqq", "1")
    assert "--zzzqqq" in line
    assert "--help" in line


def test_stray_word_is_an_error_that_names_it(capsys):
    assert "stray" in error_line(capsys, parser_of("image_train.py"), "stray")


def test_beginning_of_a_flag_is_not_the_flag(capsys):
    """An abbreviation that works today would mean another flag when one is added."""
    line = error_line(capsys, parser_of("image_train.py"), "--num_chan", "32")
    assert "did you mean --num_channels?" in line


@pytest.mark.parametrize(
    ("flag", "text"),
    [
        ("--num_channels", "many"),
        ("--num_res_blocks", "2.5"),
        ("--lr", "fast"),
        ("--class_cond", "maybe"),
        ("--class_cond", ""),
        ("--image_size", "64x"),
        ("--image_size", "0"),
        ("--image_size", "-8"),
    ],
)
def test_unreadable_value_is_an_error_that_names_flag_and_value(capsys, flag, text):
    line = error_line(capsys, parser_of("image_train.py"), f"{flag}={text}")
    assert flag in line
    assert f"'{text}'" in line


def test_flag_without_its_value_is_an_error_that_names_it(capsys):
    assert "--lr" in error_line(capsys, parser_of("image_train.py"), "--lr")


def test_betas_flag_reads_a_file_and_keeps_the_numbers(tmp_path):
    (tmp_path / "own.txt").write_text("0.1\n0.25\n")
    for script in SCRIPTS:
        assert parse(script, "--betas", str(tmp_path / "own.txt"))["betas"] == "0.1,0.25"
        assert parse(script, "--betas", "0.1, 0.25")["betas"] == "0.1,0.25"
        assert parse(script, "--betas", "")["betas"] == ""


@pytest.mark.parametrize("text", ["0.1,2", "0.5,0", "0.1,1,0.1"])
def test_betas_flag_refuses_what_is_no_schedule(capsys, text):
    line = error_line(capsys, parser_of("image_train.py"), "--betas", text)
    assert f"--betas: {text}: " in line


@pytest.mark.parametrize("text", ["nowhere.npy", "0.5,abc"])
def test_betas_flag_leaves_the_name_of_a_file_that_is_gone(text):
    assert parse("image_train.py", "--betas", text)["betas"] == text
    with pytest.raises(UserError, match=f"--betas {re.escape(text)}: no such file"):
        read_betas(text)


# -- flags given and not given --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Fruit:
    apples: int = option(3, "how many apples")
    ripe: bool = option(False, "whether they are ripe")
    kind: str = option("", "which kind")
    weight: float = option(0.5, "in kilograms")
    box: object = option(8, "size of the box", image_size)

    def __post_init__(self):
        require_at_least(0, self, ["apples", "weight"])


@dataclasses.dataclass(frozen=True)
class Basket:
    kind: str = option("willow", "which basket")
    handles: int = option(2, "how many handles")


@pytest.mark.parametrize(
    ("argv", "given"),
    [
        ([], set()),
        (["--apples", "3"], {"apples"}),
        (["--apples=3"], {"apples"}),
        (["--apples", "4"], {"apples"}),
        (["--ripe", "False", "--kind", ""], {"ripe", "kind"}),
        (["--ripe=no", "--weight", "0.5", "--box", "8"], {"ripe", "weight", "box"}),
        (["--apples", "4", "--apples", "3"], {"apples"}),
    ],
)
def test_given_flags_are_told_from_defaults_even_if_equal(argv, given):
    assert given_flags(make_parser("", Fruit), argv) == given


def test_given_flags_reads_the_command_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["script.py", "--weight", "0.5"])
    assert given_flags(make_parser("", Fruit), None) == {"weight"}


def test_given_flags_knows_defaults_that_the_script_changed():
    parser = make_parser("", Fruit, apples=5)
    assert given_flags(parser, []) == set()
    assert given_flags(parser, ["--apples", "5"]) == {"apples"}


# -- from options to flags and back ---------------------------------------------------------------


def test_parser_has_a_flag_of_the_right_type_for_each_option():
    parser = make_parser("", Fruit)
    assert vars(parser.parse_args([])) == defaults(Fruit)
    argv = ["--apples", "4", "--ripe", "Y", "--kind", "7", "--weight", "2", "--box", "4x6"]
    values = vars(parser.parse_args(argv))
    assert values == {"apples": 4, "ripe": True, "kind": "7", "weight": 2.0, "box": (4, 6)}
    assert [type(values[name]) for name in ("ripe", "kind", "weight")] == [bool, str, float]


def test_first_of_two_options_with_one_name_makes_the_flag():
    values = vars(make_parser("", Basket, Fruit).parse_args([]))
    assert values["kind"] == "willow"
    assert values.keys() == {"kind", "handles", "apples", "ripe", "weight", "box"}
    assert vars(make_parser("", Fruit, Basket).parse_args([]))["kind"] == ""


def test_script_changes_the_default_of_a_flag():
    parser = make_parser("", Fruit, apples=5)
    assert parser.parse_args([]).apples == 5
    assert parser.parse_args(["--apples", "3"]).apples == 3


def test_parser_says_what_it_is_for():
    assert "Sorts fruit." in make_parser("Sorts fruit.", Fruit).format_help()


def test_defaults_are_in_order():
    assert list(defaults(Fruit).items()) == [
        ("apples", 3),
        ("ripe", False),
        ("kind", ""),
        ("weight", 0.5),
        ("box", 8),
    ]


def test_pick_takes_the_options_of_its_own():
    values = {**defaults(Fruit), "apples": 9, "handles": 1}
    assert pick(Fruit, values) == Fruit(apples=9)
    assert pick(Basket, values) == Basket(kind="", handles=1)


def test_pick_checks_the_options():
    with pytest.raises(UserError, match=r"^--apples -1: must be at least 0$"):
        pick(Fruit, {**defaults(Fruit), "apples": -1})


def test_parser_of_one_flag_names_it_when_misspelt(capsys):
    parser = ArgumentParser()
    parser.add_argument("--apples")
    assert "did you mean --apples?" in error_line(capsys, parser, "--aples", "3")


# -- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64", 64),
        (64, 64),
        ("1", 1),
        ("48x64", (48, 64)),
        ("48X64", (48, 64)),
        ("64x48", (64, 48)),
        ("64x64", 64),
        ((48, 64), (48, 64)),
        ([48, 64], (48, 64)),
        ([64, 64], 64),
    ],
)
def test_image_size_is_a_side_or_height_x_width(text, size):
    assert image_size(text) == size
    assert type(image_size(text)) is type(size)


@pytest.mark.parametrize(
    "text",
    ["", "x", "64x", "x64", "axb", "48x64x3", "6.5", "48,64", "0", "-8", "48x0", 0, [], [1, 2, 3]],
)
def test_what_is_no_image_size_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="48x64") as error:
        image_size(text)
    assert f"'{text}'" in str(error.value)


@pytest.mark.parametrize(("size", "sides"), [(64, (64, 64)), ((48, 64), (48, 64))])
def test_height_comes_before_width(size, sides):
    assert height_width(size) == sides
    assert height_width(list(sides)) == sides


@pytest.mark.parametrize("text", ["64", "48x64", "64x48"])
def test_size_text_is_what_image_size_reads(text):
    assert size_text(image_size(text)) == text


@pytest.mark.parametrize("value", [True, False])
def test_yes_and_no_have_five_words_each(value):
    for word in WORDS[value]:
        for text in (word, word.upper(), word.title()):
            assert str2bool(text) is value
    assert str2bool(value) is value


@pytest.mark.parametrize("word", ["", "maybe", "2", "ye", "none", " "])
def test_other_words_are_neither_yes_nor_no(word):
    with pytest.raises(argparse.ArgumentTypeError, match=f"'{word}'"):
        str2bool(word)


@pytest.mark.parametrize(
    ("default", "text", "value"),
    [(True, "no", False), (1, "2", 2), (0.0, "2", 2.0), ("", "2", "2"), (None, "2", "2")],
)
def test_type_of_a_flag_is_that_of_its_default(default, text, value):
    read = flag_type(default)(text)
    assert read == value
    assert type(read) is type(value)


def test_numbers_reads_a_list():
    assert numbers("sizes", "16,8") == [16, 8]
    assert numbers("sizes", " 16 , 8,") == [16, 8]
    assert numbers("sizes", "") == []
    assert numbers("rates", "0.9,1", float) == [0.9, 1.0]


@pytest.mark.parametrize("text", ["a", "16;8", "1.5"])
def test_list_that_is_none_names_flag_and_text(text):
    with pytest.raises(UserError) as error:
        numbers("sizes", text)
    assert str(error.value).startswith(f"--sizes '{text}' ")


def test_require_names_flag_value_and_what_is_expected():
    require(True, "eta", 1, "in [0, 1]")
    with pytest.raises(UserError, match=r"^--eta 2: must be in \[0, 1\]$"):
        require(False, "eta", 2, "in [0, 1]")


def test_require_at_least_accepts_the_bound_and_names_the_first_below():
    fruit = Fruit(apples=0, weight=0.0)
    require_at_least(0, fruit, ["apples", "weight"])
    with pytest.raises(UserError, match=r"^--weight 0.0: must be at least 0.5$"):
        require_at_least(0.5, dataclasses.replace(fruit, apples=1), ["apples", "weight"])


@pytest.mark.parametrize("value", ["-1024,3071", "-.5,2", "-1", "-1e-3", "0,1"])
@pytest.mark.parametrize("joined", [False, True])
def test_values_may_begin_with_a_minus(value, joined):
    parser = ArgumentParser()
    parser.add_argument("--value_range", default="")
    parser.add_argument("--width", type=int)
    words = [f"--value_range={value}"] if joined else ["--value_range", value]
    for order in ([*words, "--width", "-3"], ["--width", "-3", *words]):
        args = parser.parse_args(order)
        assert (args.value_range, args.width) == (value, -3)
