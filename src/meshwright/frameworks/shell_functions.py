"""Functions of a shell script: where their bodies lie, and what they are called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from meshwright.frameworks.shell_words import Token

_BEFORE_COMMANDS: Final = frozenset(
    {"\n", ";", "&", "&&", "||", "|", ";;", "(", ")", "{", "then", "do", "else", "elif", "!"}
)


@dataclass(frozen=True, slots=True)
class Function:
    """A function as it is written, and where the text after it begins."""

    name: str
    body: list[Token]
    end: int


def function_at(found: list[Token], at: int) -> Function | None:
    """Return the function that is defined at ``at``, or None when it is something else.

    ``name() { ... }``, ``name() ( ... )`` and ``function name { ... }``. One that is not closed
    takes the rest of the script.
    """
    start = at
    if found[at].text == "function":
        start = at + 1
    if start >= len(found) or found[start].kind != "word":
        return None
    opening = start + 1
    brackets = [t.text for t in found[opening : opening + 2]] == ["(", ")"]
    if not brackets and start == at:
        return None
    opening += 2 * brackets
    while opening < len(found) and found[opening].text == "\n":
        opening += 1
    if opening >= len(found) or found[opening].text not in ("{", "("):
        return Function(found[start].text, [], opening) if brackets else None
    end = _end_of_body(found, opening)
    return Function(found[start].text, found[opening + 1 : end], min(end + 1, len(found)))


def _end_of_body(found: list[Token], opening: int) -> int:
    """Return where the bracket at ``opening`` is closed; braces count where commands begin."""
    opens, closes = ("{", "}") if found[opening].text == "{" else ("(", ")")
    kind = found[opening].kind
    depth = 0
    for at in range(opening, len(found)):
        token = found[at]
        if token.kind != kind or token.text not in (opens, closes):
            continue
        if kind == "word" and at > opening and found[at - 1].text not in _BEFORE_COMMANDS:
            continue
        depth += 1 if token.text == opens else -1
        if depth == 0:
            return at
    return len(found)
