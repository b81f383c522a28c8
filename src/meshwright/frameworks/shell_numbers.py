"""The shell's integer arithmetic, ``$((NODES * 8))``, and the tests of its conditions."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

_TOKEN = re.compile(
    r"\s*(\d{1,20}|[A-Za-z_]\w{0,255}|\$\{?(?:[A-Za-z_]\w{0,255}|\d{1,4})\}?|[-+*/%()])"
)
_MAX_CHARACTERS = 2000
_MAX_DEPTH = 30


def evaluate(text: str, variables: Mapping[str, str]) -> int | None:
    """Return the value of an integer expression; None where it cannot be known.

    ``+ - * / %``, brackets, signs and variables; division truncates towards zero, as in C.
    """
    tokens: list[str] = []
    at = 0
    text = text.strip()
    while at < len(text) and len(text) <= _MAX_CHARACTERS:
        match = _TOKEN.match(text, at)
        if match is None:
            return None
        tokens.append(match.group(1))
        at = match.end()
    try:
        value, end = _sum(tokens, 0, variables, 0)
    except (IndexError, KeyError, ValueError, ZeroDivisionError):
        return None
    return value if end == len(tokens) and abs(value) < 2**63 else None


def _sum(tokens: list[str], at: int, known: Mapping[str, str], depth: int) -> tuple[int, int]:
    value, at = _product(tokens, at, known, depth)
    while at < len(tokens) and tokens[at] in "+-":
        right, end = _product(tokens, at + 1, known, depth)
        value = value + right if tokens[at] == "+" else value - right
        at = end
    return _bounded(value), at


def _product(tokens: list[str], at: int, known: Mapping[str, str], depth: int) -> tuple[int, int]:
    value, at = _atom(tokens, at, known, depth)
    while at < len(tokens) and tokens[at] in "*/%":
        right, end = _atom(tokens, at + 1, known, depth)
        if tokens[at] == "*":
            value = value * right
        else:
            quotient = abs(value) // abs(right) * (1 if (value < 0) == (right < 0) else -1)
            value = quotient if tokens[at] == "/" else value - quotient * right
        value, at = _bounded(value), end
    return value, at


def _atom(tokens: list[str], at: int, known: Mapping[str, str], depth: int) -> tuple[int, int]:
    token = tokens[at]
    if depth > _MAX_DEPTH:
        raise ValueError("too deep")
    if token in "+-":
        value, at = _atom(tokens, at + 1, known, depth + 1)
        return (-value if token == "-" else value), at
    if token == "(":
        value, at = _sum(tokens, at + 1, known, depth + 1)
        if tokens[at] != ")":
            raise ValueError("a bracket is not closed")
        return value, at + 1
    if token[0].isdigit():
        return _bounded(int(token)), at + 1
    return _bounded(int(known[token.strip("${}")][:20])), at + 1


def _bounded(value: int) -> int:
    if abs(value) >= 2**63:
        raise ValueError("too large")
    return value


_NUMBERS: dict[str, Callable[[int, int], bool]] = {
    "-eq": lambda a, b: a == b,
    "-ne": lambda a, b: a != b,
    "-lt": lambda a, b: a < b,
    "-le": lambda a, b: a <= b,
    "-gt": lambda a, b: a > b,
    "-ge": lambda a, b: a >= b,
}


def matches(text: str, pattern: str) -> bool:
    """Say whether ``text`` matches a pattern with ``*`` and ``?``; long patterns are compared."""
    return fnmatchcase(text, pattern) if len(pattern) < 200 > len(text) else text == pattern


def condition(words: Sequence[str]) -> bool | None:
    """Return what ``[ ... ]`` or ``[[ ... ]]`` says; None where it cannot be known.

    Comparisons of numbers and texts, ``-z``, ``-n``, ``!`` and one-word tests.
    """
    inner = [w for w in words[1:] if w not in ("]", "]]")]
    if inner and inner[0] == "!":
        result = condition(["[", *inner[1:]]) if inner[1:2] != ["!"] else None
        return None if result is None else not result
    match inner:
        case ["-z", text]:
            return not text
        case ["-n", text] | [text]:
            return bool(text)
        case [left, "=" | "==", right]:
            return matches(left, right) if words[0] == "[[" else left == right
        case [left, "!=", right]:
            return not (matches(left, right) if words[0] == "[[" else left == right)
        case [left, operator, right] if operator in _NUMBERS:
            if re.fullmatch(r"-?\d{1,18}", left) and re.fullmatch(r"-?\d{1,18}", right):
                return _NUMBERS[operator](int(left), int(right))
            return None
        case _:
            return None
