"""The public names are those that other people's code imports, with the parameters it passes."""

import importlib
import inspect
import json
import subprocess
import sys
from inspect import Parameter

import pytest
from golden_data import load_json

import improved_diffusion

NAMES = load_json("names")
ENTRIES = [(module, name, entry) for module in NAMES for name, entry in NAMES[module].items()]
FUNCTIONS = [(m, name, entry) for m, name, entry in ENTRIES if isinstance(entry, str)]
CLASSES = [(m, name, entry) for m, name, entry in ENTRIES if isinstance(entry, dict)]
CONSTANTS = [(m, name, entry) for m, name, entry in ENTRIES if isinstance(entry, int | float)]
METHODS = [
    (m, name, method, parameters)
    for m, name, entry in CLASSES
    for method, parameters in entry["methods"].items()
]
MEMBERS = [(m, name, entry["members"]) for m, name, entry in CLASSES if "members" in entry]
PROPERTIES = [(m, name, prop) for m, name, entry in CLASSES for prop in entry["properties"]]


def ids(cases, parts=2):
    return [".".join(case[:parts]) for case in cases]


def public(module, name):
    return getattr(importlib.import_module(f"improved_diffusion.{module}"), name)


# -- the rule: what is recorded comes first and unchanged, what is new is optional ----------------


def of_kind(parameters, *kinds):
    return [parameter for parameter in parameters if parameter.kind in kinds]


def spelled(parameters):
    """Kind, name and default; repr tells 0 from False, and every recorded default is a literal."""
    return [(p.kind, p.name, None if p.default is p.empty else repr(p.default)) for p in parameters]


def recorded_parameters(text):
    return list(inspect.signature(eval(f"lambda {text[1:-1]}: None")).parameters.values())


def own_parameters(function, is_method=False):
    return list(inspect.signature(function).parameters.values())[is_method:]


def problem(text, ours):
    """What breaks a caller of the recorded ``text``, such as "(x, t=None)"; empty if nothing."""
    theirs = recorded_parameters(text)
    if spelled(of_kind(theirs, Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)) != spelled(
        of_kind(ours, Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    ):
        return "*args or **kwargs differ"
    by_position = [Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD]
    for kinds in (by_position, [Parameter.KEYWORD_ONLY]):
        old, new = of_kind(theirs, *kinds), of_kind(ours, *kinds)
        if spelled(old) != spelled(new[: len(old)]):
            return f"{spelled(new[: len(old)])} is not {spelled(old)}"
        extra = new[len(old) :]
        if any(p.default is p.empty for p in extra):
            return f"{extra} are new and required"
        if extra and kinds is by_position and of_kind(theirs, Parameter.VAR_POSITIONAL):
            return f"{extra} take what *args had"
    return ""


@pytest.mark.parametrize(
    ("recorded", "ours"),
    [
        ("(a, b=1)", lambda a, b=1: None),
        ("(a, b=1)", lambda a, b=1, c=2: None),
        ("(a, b=1)", lambda a, b=1, *, c=2: None),
        ("(*, a, b=1)", lambda *, a, b=1, c=None: None),
        ("(a, *args, **kwargs)", lambda a, *args, c=2, **kwargs: None),
    ],
)
def test_new_optional_parameters_may_follow(recorded, ours):
    assert problem(recorded, own_parameters(ours)) == ""


@pytest.mark.parametrize(
    ("recorded", "ours"),
    [
        ("(a, b)", lambda b, a: None),
        ("(a, b=1)", lambda a: None),
        ("(a, b=1)", lambda a, c=1: None),
        ("(a, b=1)", lambda a, b: None),
        ("(a, b=1)", lambda a, b=2: None),
        ("(a, b=0)", lambda a, b=False: None),
        ("(a, b)", lambda a, b=None: None),
        ("(a, b=1)", lambda a, c=2, b=1: None),
        ("(a)", lambda a, b: None),
        ("(a)", lambda a, *, b: None),
        ("(a)", lambda *, a: None),
        ("(a)", lambda a, /: None),
        ("(*, a)", lambda a: None),
        ("(a, *args)", lambda a, b=1, *args: None),
        ("(a, *args, **kwargs)", lambda a, *args: None),
    ],
)
def test_whatever_breaks_a_caller_is_noticed(recorded, ours):
    assert problem(recorded, own_parameters(ours)) != ""


# -- the names ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("module", "name", "parameters"), FUNCTIONS, ids=ids(FUNCTIONS))
def test_function_takes_the_recorded_parameters(module, name, parameters):
    assert problem(parameters, own_parameters(public(module, name))) == ""


@pytest.mark.parametrize(("module", "name", "entry"), CLASSES, ids=ids(CLASSES))
def test_class_has_the_recorded_bases(module, name, entry):
    ancestors = {base.__name__ for base in public(module, name).__mro__[1:]}
    assert ancestors >= set(entry["bases"] or ["object"])


@pytest.mark.parametrize(("module", "name", "method", "parameters"), METHODS, ids=ids(METHODS, 3))
def test_method_takes_the_recorded_parameters(module, name, method, parameters):
    cls = public(module, name)
    takes_self = not isinstance(inspect.getattr_static(cls, method), staticmethod | classmethod)
    assert problem(parameters, own_parameters(getattr(cls, method), takes_self)) == ""


@pytest.mark.parametrize(("module", "name", "members"), MEMBERS, ids=ids(MEMBERS))
def test_enum_begins_with_the_recorded_members(module, name, members):
    assert [member.name for member in public(module, name)][: len(members)] == members


@pytest.mark.parametrize(("module", "name", "prop"), PROPERTIES, ids=ids(PROPERTIES, 3))
def test_property_is_a_property(module, name, prop):
    assert isinstance(inspect.getattr_static(public(module, name), prop), property)


@pytest.mark.parametrize(("module", "name", "value"), CONSTANTS, ids=ids(CONSTANTS))
def test_constant_has_the_recorded_value(module, name, value):
    assert repr(public(module, name)) == repr(value)


def test_every_recorded_name_is_checked():
    kinds = [FUNCTIONS, CLASSES, CONSTANTS]
    assert sum(map(len, kinds)) == len(ENTRIES)
    assert all(kinds)
    assert MEMBERS
    assert PROPERTIES


# -- the package ----------------------------------------------------------------------------------


def test_names_of_the_package_exist_once():
    names = improved_diffusion.__all__
    assert len(set(names)) == len(names)
    assert [name for name in names if not hasattr(improved_diffusion, name)] == []


OTHERS = ["PIL", "blobfile", "mpi4py", "tqdm", "tensorboard"]  # not needed for an import


def in_fresh_interpreter(code):
    """The JSON that a new process prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


SLOW_TO_LOAD = ["torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint"]


@pytest.fixture(scope="module")
def loaded_modules():
    """What importing the main modules loads, less what torch and NumPy load by themselves."""
    return in_fresh_interpreter(
        "import json, sys\n"
        "import numpy, torch\n"
        "before = set(sys.modules)\n"
        "import improved_diffusion, improved_diffusion.sampling, improved_diffusion.train_util\n"
        "print(json.dumps(sorted(sys.modules.keys() - before)))"
    )


@pytest.mark.parametrize("name", OTHERS + SLOW_TO_LOAD)
def test_import_does_not_load(loaded_modules, name):
    assert "improved_diffusion.gaussian_diffusion" in loaded_modules
    assert [m for m in loaded_modules if m == name or m.startswith(f"{name}.")] == []


def test_import_needs_torch_and_numpy_only():
    """Everything else is missing: None in sys.modules makes an import fail."""
    version = in_fresh_interpreter(
        "import json, sys\n"
        f"sys.modules.update(dict.fromkeys({OTHERS}))\n"
        "import improved_diffusion, improved_diffusion.sampling, improved_diffusion.train_util\n"
        "print(json.dumps(improved_diffusion.__version__))"
    )
    assert version == improved_diffusion.__version__
