"""docs/formulas.md: every formula on its line, with its test, and none left out."""

import ast
import io
import re
import tokenize

import pytest
from update_formulas import DOCUMENT, ROOT, Outdated, Row, line_of, rows, updated

from improved_diffusion.loss_weights import LOSS_WEIGHTS
from improved_diffusion.noise_levels import SPACINGS
from improved_diffusion.predictions import PREDICTIONS
from improved_diffusion.resample import SCHEDULE_SAMPLERS
from improved_diffusion.sampling import OF_THE_PROCESS
from improved_diffusion.schedules import NAMED_SCHEDULES
from improved_diffusion.solvers import SOLVERS

TEXT = DOCUMENT.read_text()
ROWS = rows(TEXT)
NAMES = {  # under which heading each name has a row
    "Noise schedules": NAMED_SCHEDULES,
    "Predictions": PREDICTIONS,
    "Loss weights": LOSS_WEIGHTS,
    "Samplers of the process": OF_THE_PROCESS,
    "Solvers": SOLVERS,
    "Noise levels": SPACINGS,
    "Timestep densities": SCHEDULE_SAMPLERS,
}
MODULES = (
    *("gaussian_process", "gaussian_sampling", "gaussian_diffusion", "respace", "losses"),
    *("schedules", "predictions", "loss_weights"),
    *("denoiser", "noise_levels", "solvers", "solvers_multistep", "solver_steps", "sampling"),
    *("likelihood", "likelihood_ode", "ode", "nll_results", "resample", "guidance", "editing"),
)
ARXIV = r"\d{4}\.\d{5}"
NUMBERED = re.compile(
    rf"(?P<paper>{ARXIV}|[\w+-]+),? (?P<kind>eqs?\.|[Aa]lg\.|[Aa]lgorithms?|theorem) "
    r"(?P<numbers>\d+(?:\.\d+)?(?:(?: and |, )\d+)*)"
)
NOT_OF_PAPERS = ("here", "textbook")


def papers():
    """arXiv number -> name, by the document's last table."""
    table = re.findall(r"^\| ([^|]+) \| (\[.+) \|$", TEXT.split("## Papers")[1], flags=re.MULTILINE)
    return {number: name for name, cell in table for number in re.findall(r"\[([\d.]+)\]", cell)}


def citations(text):
    """What a text cites by number: {(last word of the paper's name, kind, number)}."""
    found = set()
    for match in NUMBERED.finditer(" ".join(text.split())):
        name = papers().get(match["paper"], match["paper"]).split()[-1]
        kind = {"e": "eq", "a": "alg", "t": "theorem"}[match["kind"][0].lower()]
        numbers = re.split(r" and |, ", match["numbers"])
        found |= {(name, kind, number) for number in numbers}
    return found


def cited_in_code(module):
    """The citations in a module's comments, and in the docstrings of its functions and classes."""
    source = (ROOT / "improved_diffusion" / f"{module}.py").read_text()
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    texts = [token.string for token in tokens if token.type == tokenize.COMMENT]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            texts.append(ast.get_docstring(node) or "")
    known = {name.split()[-1] for name in papers().values()}
    return {
        cited
        for text in texts
        for cited in citations(text)
        if cited[0] in known or re.fullmatch(ARXIV, cited[0])
    }


def test_formulas_stand_on_their_lines():
    try:
        right = updated(TEXT)
    except Outdated as error:
        pytest.fail(f"docs/formulas.md: mend these by hand: {error}")
    moved = [
        f"{row.cited['file']}:{row.cited['line']}"
        for row, new in zip(ROWS, rows(right), strict=True)
        if row != new
    ]
    assert not moved, f"run python tests/update_formulas.py: no longer on its line: {moved}"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.formula)
def test_every_row_has_a_source_and_a_test_that_exists(row):
    assert row.formula
    known = (*papers().values(), *NOT_OF_PAPERS)
    assert row.source.removeprefix("from ").startswith(known), row.source
    path, name = re.fullmatch(r"`(tests/test_\w+\.py)::(test_\w+)`", row.test).groups()
    functions = [
        node.name
        for node in ast.parse((ROOT / path).read_text()).body
        if isinstance(node, ast.FunctionDef)
    ]
    assert name in functions


def test_tests_named_in_sentences_exist():
    for path, name in re.findall(r"`(tests/test_\w+\.py)::(test_\w+)`", TEXT):
        assert f"def {name}(" in (ROOT / path).read_text(), name


@pytest.mark.parametrize("heading", NAMES)
def test_every_name_has_a_row(heading):
    named = {
        re.match(r"`([\w-]+)`:", row.formula)[1]
        for row in ROWS
        if row.heading == heading and re.match(r"`(?!--)", row.formula)
    }
    assert named == set(NAMES[heading])


@pytest.mark.parametrize("module", MODULES)
def test_every_equation_that_the_code_cites_has_a_row(module):
    listed = {
        cited
        for row in ROWS
        if row.cited["file"] == f"{module}.py"
        for cited in citations(row.source)
    }
    missing = cited_in_code(module) - listed
    assert not missing, f"docs/formulas.md has no row of {module}.py for {sorted(missing)}"


def test_papers_are_those_that_are_cited():
    for name in papers().values():
        cited = [row for row in ROWS if row.source.removeprefix("from ").startswith(name)]
        assert cited or name in TEXT.split("## Papers")[0], name


# -- the tools of the test


CODE = """
def first():
    return 1 + 1

class Some:
    def first(self):
        return 1 + 2

    def second(self):
        x = 1 + 1
        return x + 1.25 + 2
"""


def test_a_line_is_found_by_its_fragment():
    assert line_of(CODE, "1 + 2") == 7
    assert line_of(CODE, "1 + 1", "Some") == 10
    assert line_of(CODE, "return", "Some.first") == 7


@pytest.mark.parametrize(
    ("fragment", "owner", "words"),
    [
        ("1 + 3", None, "on 0 lines"),
        ("1 + 1", None, "on 2 lines"),
        ("x + 1", None, "on 0 lines"),
        ("eturn", "Some.second", "on 0 lines in Some.second"),
        ("1 + 1", "Some.first", "on 0 lines in Some.first"),
        ("1 + 2", "first", "2 functions or classes are named first"),
        ("1 + 2", "third", "0 functions or classes are named third"),
    ],
)
def test_what_is_on_no_line_or_on_several_is_refused(fragment, owner, words):
    with pytest.raises(Outdated, match=words):
        line_of(CODE, fragment, owner)


def test_lines_are_renumbered_and_nothing_else():
    path = "../improved_diffusion/solver_steps.py"
    fragment = "`torch.lerp(x_start, x, sigma_next / sigma)` in `ddim_step`"
    row = f"| `a` | b | [solver_steps.py:1]({path}#L1) {fragment} | c |\n"
    number = line_of(
        (ROOT / "docs" / path).read_text(), "torch.lerp(x_start, x, sigma_next / sigma)"
    )
    right = row.replace(":1]", f":{number}]").replace("#L1)", f"#L{number})")
    assert updated(row) == right
    assert updated(right) == right
    with pytest.raises(Outdated, match=r"solver_steps\.py: on 0 lines: `no such`"):
        updated(row.replace(fragment, "`no such`"))


def test_citations_are_understood():
    assert citations("x  # DDPM eqs. 6 and 7") == {("DDPM", "eq", "6"), ("DDPM", "eq", "7")}
    assert citations("see arXiv 2305.08891, algorithm 1") == {("SNR", "alg", "1")}
    assert citations("DPM-Solver++ Alg. 2: e^-h") == {("DPM-Solver++", "alg", "2")}
    assert citations("from EDM eqs. 1, 3") == {("EDM", "eq", "1"), ("EDM", "eq", "3")}
    assert citations("DDIM section 4.3") == set()


def test_rows_are_read():
    link = "[a.py:3](../improved_diffusion/a.py#L3) `x = 1`"
    (row,) = rows(f"# Head\n| formula | source | line | test |\n|---|\n| f | s | {link} | t |\n")
    assert row == Row("Head", "f", "s", link, "t")
    assert row.cited.groupdict() == {
        "file": "a.py",
        "line": "3",
        "fragment": "x = 1",
        "owner": None,
    }
