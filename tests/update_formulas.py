"""Rewrite the line numbers in docs/formulas.md from the code that stands there.

    python tests/update_formulas.py

A row names its line by a fragment of it, which must be on one line of the file only, or of the
function or class that the row names as well: ``[solvers.py:281](...) `fragment` in `sample_sde` ``.
"""

import ast
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "formulas.md"

CITED_LINE = re.compile(
    r"\[(?P<file>\w+\.py):(?P<line>\d+)\]\(\.\./improved_diffusion/(?P=file)#L(?P=line)\)"
    r" `(?P<fragment>[^`]+)`(?: in `(?P<owner>[\w.]+)`)?"
)


class Outdated(Exception):
    """A fragment that is on no line, or on several."""


@dataclass(frozen=True)
class Row:
    """A row of a table: its four cells, and the heading that it stands under."""

    heading: str
    formula: str
    source: str
    code: str
    test: str

    @property
    def cited(self):
        """The match of CITED_LINE, whose groups are file, line, fragment and owner."""
        match = CITED_LINE.fullmatch(self.code)
        assert match, f"not a link, a fragment and perhaps an owner: {self.code}"
        return match


def rows(text):
    """The rows of all tables that say where a formula is."""
    found, heading = [], ""
    for line in text.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("|") and "](../improved_diffusion/" in line:
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            assert len(cells) == 4, f"four cells are expected: {line}"
            found.append(Row(heading, *cells))
    return found


def extent(source, owner):
    """The first and the last line of a function or class: ``name``, or ``Class.method``."""
    nodes = [ast.parse(source)]
    for name in owner.split("."):
        nodes = [
            node
            for parent in nodes
            for node in ast.walk(parent)
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name
        ]
    if len(nodes) != 1:
        raise Outdated(f"{len(nodes)} functions or classes are named {owner}")
    return nodes[0].lineno, nodes[0].end_lineno


def line_of(source, fragment, owner=None):
    """The number of the only line, from 1, with a fragment.

    :raises Outdated: if there is none, or more than one.
    """
    first, last = extent(source, owner) if owner else (1, len(source.splitlines()))
    whole = re.compile(rf"(?<![\w.]){re.escape(fragment)}(?![\w.])")  # not 2 of 20 or 2.5
    lines = [
        number
        for number, line in enumerate(source.splitlines(), 1)
        if whole.search(line) and first <= number <= last
    ]
    if len(lines) != 1:
        where = f" in {owner}" if owner else ""
        raise Outdated(f"on {len(lines)} lines{where}: `{fragment}`")
    return lines[0]


def updated(text):
    """The document with the numbers of the lines as they are.

    :raises Outdated: naming each row whose fragment is not on one line.
    """
    wrong = []

    def renumbered(match):
        file, fragment, owner = match["file"], match["fragment"], match["owner"]
        path = ROOT / "improved_diffusion" / file
        try:
            number = line_of(path.read_text(), fragment, owner)
        except (Outdated, FileNotFoundError) as error:
            wrong.append(f"{file}: {error}")
            return match[0]
        rest = match[0][match[0].index(" `") :]
        return f"[{file}:{number}](../improved_diffusion/{file}#L{number}){rest}"

    text = CITED_LINE.sub(renumbered, text)
    if wrong:
        raise Outdated("; ".join(wrong))
    return text


if __name__ == "__main__":
    try:
        DOCUMENT.write_text(updated(DOCUMENT.read_text()))
    except Outdated as error:
        sys.exit(f"{DOCUMENT.name}: mend these by hand: {error}")
