"""Options as frozen dataclasses, and command-line flags made from them."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from .errors import UserError

ImageSize = int | tuple[int, int]


def option(default: Any, help: str, type: Callable[[str], Any] | None = None) -> Any:
    """A dataclass field that becomes the flag ``--NAME``.

    :param default: the flag's default; its type is the flag's unless ``type`` is given.
    :param help: one line for ``--help``.
    :param type: turns the flag's text into its value.
    """
    return dataclasses.field(default=default, metadata={"help": help, "type": type})


def defaults(options: type) -> dict[str, Any]:
    """The options of a dataclass and their defaults, in order."""
    return {field.name: field.default for field in dataclasses.fields(options)}


def pick(options: type, values: dict[str, Any]) -> Any:
    """Make (and so validate) an options dataclass from those of ``values`` that it names."""
    return options(**{name: values[name] for name in defaults(options)})


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose errors are one line, with the nearest flag for a misspelt one."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Read ``--flag -1,2`` as ``--flag=-1,2``: argparse takes single numbers alone."""
        words: list[str] = []
        for word in sys.argv[1:] if args is None else args:
            if words and re.match(r"--\w+$", words[-1]) and re.match(r"-\.?\d", word):
                words[-1] += f"={word}"
            else:
                words.append(word)
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
        if unknown:
            known = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(unknown.group(1), known, n=1)
            message += f" (did you mean {near[0]}?)" if near else " (--help lists the flags)"
        sys.stderr.write(f"error: {message}\n")
        sys.exit(2)


def make_parser(description: str, *options: type, **own_defaults: Any) -> ArgumentParser:
    """A parser with a flag for every option.

    :param description: the first line of ``--help``.
    :param options: options dataclasses; where two share a name, the first wins.
    :param own_defaults: defaults that this script changes.
    """
    parser = ArgumentParser(
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    seen: set[str] = set()
    for cls in options:
        for field in dataclasses.fields(cls):
            if field.name not in seen:
                seen.add(field.name)
                parser.add_argument(
                    f"--{field.name}",
                    default=field.default,
                    type=field.metadata["type"] or flag_type(field.default),
                    help=field.metadata["help"],
                )
    parser.set_defaults(**own_defaults)
    return parser


def given_flags(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> set[str]:
    """The names of the flags that the command line itself gives."""
    absent = object()  # argparse leaves what a namespace already holds, unless a flag is given
    blank = argparse.Namespace(**dict.fromkeys(vars(parser.parse_args(argv)), absent))
    return {
        name for name, value in vars(parser.parse_args(argv, blank)).items() if value is not absent
    }


def flag_type(default: Any) -> Callable[[str], Any]:
    """How to read a flag with such a default: bool flags take a word, None means a string."""
    if isinstance(default, bool):
        return str2bool
    return str if default is None else type(default)


def str2bool(v: str | bool) -> bool:
    """Read a yes or no.

    :param v: yes, true, t, y, 1 or no, false, f, n, 0, in any case.
    :raises argparse.ArgumentTypeError: for anything else.
    """
    if isinstance(v, bool):
        return v
    words = {"yes": True, "true": True, "t": True, "y": True, "1": True}
    words |= {"no": False, "false": False, "f": False, "n": False, "0": False}
    if v.lower() not in words:
        raise argparse.ArgumentTypeError(f"'{v}' is neither yes nor no: write True or False")
    return words[v.lower()]


def image_size(text: str | int | Sequence[int]) -> ImageSize:
    """Read an image size: "64" for a square, "48x64" for height x width.

    :return: 64, or (48, 64).
    :raises argparse.ArgumentTypeError: for anything else.
    """
    parts = str(text).lower().split("x") if isinstance(text, str | int) else list(text)
    try:
        sizes = [int(part) for part in parts]
    except ValueError:
        sizes = []
    if len(sizes) not in (1, 2) or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no image size: write 64 or 48x64 (HxW)")
    return sizes[0] if len(set(sizes)) == 1 else (sizes[0], sizes[1])


def height_width(size: ImageSize | Sequence[int]) -> tuple[int, int]:
    """Height and width of an image size."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def size_text(size: ImageSize | Sequence[int]) -> str:
    """An image size as it is written on the command line."""
    height, width = height_width(size)
    return str(height) if height == width else f"{height}x{width}"


def numbers(flag: str, text: str, kind: Callable[[str], Any] = int) -> list[Any]:
    """Read a comma-separated list; an empty text is an empty list.

    :raises ValueError: naming the flag, if a part is no number.
    """
    try:
        return [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UserError(f"--{flag} '{text}' is no comma-separated list of numbers") from None


def require(condition: bool, flag: str, value: Any, expected: str) -> None:
    """Refuse a flag's value unless a condition holds.

    :raises ValueError: "--flag value: must be expected".
    """
    if not condition:
        raise UserError(f"--{flag} {value}: must be {expected}")


def require_at_least(least: float, options: object, names: Iterable[str]) -> None:
    """Refuse options below a limit.

    :raises ValueError: naming the first of ``names`` that is below ``least``.
    """
    for name in names:
        value = getattr(options, name)
        require(least <= value < math.inf, name, value, f"at least {least}")
