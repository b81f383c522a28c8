"""Megatron-LM's command line: every argument, its type, choices and default.

``arguments.csv`` holds one row an argument: facts of the software as of August 2026. Reading
follows argparse with abbreviations off, as in Megatron-LM; argparse itself would spend most of a
check looping over the 800 arguments that are not given.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import takewhile
from typing import Any, Literal

from meshwright.errors import did_you_mean
from meshwright.parallel.pipeline_layout import MOST_LAYERS

Action = Literal["store", "on", "off", "on_off"]

_ACTIONS: dict[str, Action] = {"store": "store", "on": "on", "off": "off", "on_off": "on_off"}

MOST_BRACKETS = 100
"""Layer patterns with more brackets are not read."""


@dataclass(frozen=True, kw_only=True)
class Argument:
    """One argument: ``name`` is the attribute it fills, ``flags`` its spellings.

    ``action``: ``store`` takes a value of ``type`` (several when ``nargs`` is ``+``, ``*`` or a
    number); ``on`` and ``off`` are switches that set true and false; ``on_off`` has both forms.
    """

    name: str
    flags: tuple[str, ...]
    action: Action
    type: str
    nargs: str
    choices: tuple[str, ...]
    default: Any


class UnusableArgument(ValueError):
    """What argparse refused: ``flag``, ``value``, the ``rule`` and the ``remedy``."""

    def __init__(self, flag: str, value: object, rule: str, remedy: str) -> None:
        super().__init__(rule)
        self.flag, self.value, self.rule, self.remedy = flag, value, rule, remedy


@cache
def arguments() -> dict[str, Argument]:
    """Return every argument by each of its flags."""
    text = (
        files("meshwright.frameworks.megatron_lm")
        .joinpath("arguments.csv")
        .read_text(encoding="ascii")
    )
    table: dict[str, Argument] = {}
    for row in csv.DictReader(text.splitlines()):
        argument = Argument(
            name=row["name"],
            flags=tuple(row["flags"].split()),
            action=_ACTIONS[row["action"]],
            type=row["type"],
            nargs=row["nargs"],
            choices=tuple(row["choices"].split()),
            default=json.loads(row["default"]),
        )
        table.update(dict.fromkeys(argument.flags, argument))
    return table


@cache
def by_name() -> dict[str, Argument]:
    """Return every argument by the name of the attribute it fills."""
    return {a.name: a for a in reversed(arguments().values())}


def defaults() -> dict[str, Any]:
    """Return every setting at its default; lists are fresh."""
    values, lists = _defaults()
    return values | {name: list(values[name]) for name in lists}


@cache
def _defaults() -> tuple[dict[str, Any], tuple[str, ...]]:
    values = {a.name: a.default for a in by_name().values()}
    return values, tuple(n for n, v in values.items() if isinstance(v, list))


def parse(argv: Sequence[str]) -> dict[str, Any]:
    """Return the settings that ``argv`` gives, by name; defaults are not filled in.

    As argparse with abbreviations off: ``--flag value``, ``--flag=value``, lists until the next
    flag, and a later flag wins.

    Raises ``UnusableArgument`` where argparse would refuse the command line.
    """
    given: dict[str, Any] = {}
    at = 0
    while at < len(argv):
        flag, sign, value = argv[at].partition("=")
        argument = arguments().get(argv[at])
        if argument is not None:
            flag, sign = argv[at], ""
        argument = argument or arguments().get(flag)
        if argument is None:
            raise _unknown(argv[at])
        at += 1
        if argument.action != "store":
            if sign:
                raise UnusableArgument(flag, value, f"{flag} takes no value.", "Drop the value.")
            given[argument.name] = _switched(argument, flag)
            continue
        if sign and argument.nargs.isdigit() and int(argument.nargs) != 1:
            rule = f"{flag} expects {argument.nargs} values."
            raise UnusableArgument(flag, value, rule, _how(argument))
        values = [value] if sign else _values(argument, flag, argv[at:])
        at += 0 if sign else len(values)
        typed = [_typed(argument, flag, v) for v in values]
        given[argument.name] = typed if argument.nargs else typed[0]
    return given


def _unknown(token: str) -> UnusableArgument:
    flag = token.partition("=")[0][:80]
    if not flag.startswith("-"):
        return UnusableArgument(flag, token, f"No flag takes the value {flag!r}.", "Leave it out.")
    rule = f"There is no argument {flag}; abbreviations are off."
    return UnusableArgument(flag, token, rule, did_you_mean(flag, arguments()))


def _switched(argument: Argument, flag: str) -> bool:
    if argument.action == "on_off":
        return not flag.startswith("--no-")
    return argument.action == "on"


_NEGATIVE = re.compile(r"-\d+|-\d*\.\d+")


def _is_value(token: str) -> bool:
    if not token.startswith("-") or token == "-" or _NEGATIVE.fullmatch(token):
        return True
    known = token in arguments() or token.partition("=")[0] in arguments()
    return " " in token and not known


def _values(argument: Argument, flag: str, rest: Sequence[str]) -> list[str]:
    """Return the values that follow ``flag``: one, a number of them, or all until a flag."""
    most = {"": 1, "+": len(rest), "*": len(rest)}.get(argument.nargs)
    count = int(argument.nargs) if most is None else most
    values = list(takewhile(_is_value, rest[:count]))
    least = count if most is None else int(argument.nargs != "*")
    if len(values) < least:
        rule = f"{flag} expects {'a value' if least == 1 else f'{least} values'}."
        raise UnusableArgument(flag, values, rule, _how(argument))
    return values


def _typed(argument: Argument, flag: str, text: str) -> Any:
    try:
        value = _READERS[argument.type](text)
    except ValueError:
        shown = text[:80]
        rule = f"{flag} takes {_KINDS[argument.type]}, not {shown!r}."
        raise UnusableArgument(flag, text, rule, _how(argument)) from None
    if argument.choices and text not in argument.choices:
        rule = f"{flag} takes no {text[:80]!r}."
        raise UnusableArgument(flag, text, rule, _how(argument))
    return value


def _how(argument: Argument) -> str:
    if argument.choices:
        return "Choose from " + ", ".join(argument.choices) + "."
    return f"Give {_KINDS[argument.type]}."


def pattern(text: str) -> int | list[int]:
    """Read how often something repeats: ``2``, or a list like ``([0]*1+[1]*31)``.

    Lists of whole numbers, ``+``, ``*`` by a number, and brackets; nothing else.
    """
    if "[" not in text:
        return _whole_number(text)
    if text.count("(") + text.count("[") > MOST_BRACKETS:
        raise ValueError(f"more than {MOST_BRACKETS} brackets")
    tokens = re.findall(r"\d+|[][()+*,]", text)
    if "".join(tokens) != text.replace(" ", "") or " " in text:
        raise ValueError(f"{text!r} is not a layer pattern")
    value, end = _sum(tokens, 0)
    if end != len(tokens) or not isinstance(value, list):
        raise ValueError(f"{text!r} is not a layer pattern")
    return value


Part = int | list[int]


def _sum(tokens: list[str], at: int) -> tuple[Part, int]:
    value, at = _product(tokens, at)
    while at < len(tokens) and tokens[at] == "+":
        right, at = _product(tokens, at + 1)
        value = _bounded(_added(value, right))
    return value, at


def _added(left: Part, right: Part) -> Part:
    if isinstance(left, list) and isinstance(right, list):
        return left + right
    if isinstance(left, int) and isinstance(right, int):
        return left + right
    raise ValueError("a list and a number cannot be added")


def _product(tokens: list[str], at: int) -> tuple[Part, int]:
    value, at = _atom(tokens, at)
    while at < len(tokens) and tokens[at] == "*":
        right, at = _atom(tokens, at + 1)
        value = _bounded(_multiplied(value, right))
    return value, at


def _multiplied(left: Part, right: Part) -> Part:
    if isinstance(left, int) and isinstance(right, int):
        return left * right
    if isinstance(left, list) and isinstance(right, list):
        raise ValueError("a list is repeated by a number")
    items, count = (left, right) if isinstance(left, list) else (right, left)
    if not isinstance(items, list) or not isinstance(count, int):
        raise ValueError("a list is repeated by a number")
    if count * len(items) > MOST_LAYERS:
        raise ValueError(f"more than {MOST_LAYERS} layers")
    return items * count


def _atom(tokens: list[str], at: int) -> tuple[Part, int]:
    token = tokens[at] if at < len(tokens) else ""
    if token.isdigit():
        return _whole_number(token), at + 1
    if token == "(":
        value, at = _sum(tokens, at + 1)
        if at >= len(tokens) or tokens[at] != ")":
            raise ValueError("a bracket is not closed")
        return value, at + 1
    if token != "[":
        raise ValueError("a number or a list is missing")
    items: list[int] = []
    at += 1
    while at < len(tokens) and tokens[at] != "]":
        value, at = _sum(tokens, at)
        if isinstance(value, list):
            raise ValueError("a list holds numbers")
        items.append(value)
        if at < len(tokens) and tokens[at] == ",":
            at += 1
    if at >= len(tokens):
        raise ValueError("a bracket is not closed")
    return items, at + 1


def _bounded(value: Part) -> Part:
    if isinstance(value, list) and len(value) > MOST_LAYERS:
        raise ValueError(f"more than {MOST_LAYERS} layers")
    if isinstance(value, int) and value >= 2**63:
        raise ValueError("too large for a 64-bit integer")
    return value


def _whole_number(text: str) -> int:
    number = int(text)
    if abs(number) >= 2**63:
        raise ValueError("too large for a 64-bit integer")
    return number


def _ints(text: str) -> tuple[int, ...]:
    return tuple(_whole_number(i) for i in text.strip("()").split(","))


_READERS: dict[str, Callable[[str], Any]] = {
    "int": _whole_number,
    "float": float,
    "str": str,
    "bool": bool,
    "ints": _ints,
    "pattern": pattern,
}
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "bool": "a text",
    "ints": "whole numbers joined by commas",
    "pattern": "a whole number or a list such as ([0]*1+[1]*31)",
}
