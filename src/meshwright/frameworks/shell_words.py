"""Words of a shell script: cut from the text with their quotes, and expanded without running.

What only a running shell could know (a command's output, a variable set elsewhere) stays as it is
written and is named in ``Word.unknown``. Work is bounded by a budget of characters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from meshwright.errors import DocumentError
from meshwright.frameworks.shell_numbers import evaluate

MAX_BYTES = 2 * 2**20
MAX_EXPANDED = 8 * 2**20
MAX_DEPTH = 20

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,255}")
_ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_]{0,255})(\+?)=")
_PARAMETER = re.compile(
    r"([A-Za-z_][A-Za-z0-9_]{0,255}|[0-9]{1,4}|[@*#?$!-])(\[[^]]{0,64}\])?(:?[-=+?]|)(.*)",
    re.DOTALL,
)
_SLICE = re.compile(r":\s?(\d{1,5})(?::(\d{1,5}))?")
_OPERATORS = ("&&", "||", ";;", "<<<", "<<", ">>", "&>", ">&", "<&")
_STOPS = " \t\r\n;&|()<>"


@dataclass(frozen=True, slots=True)
class Token:
    """A piece of a script as written: a word with its quotes, an operator, or an array."""

    kind: Literal["word", "operator", "array", "document"]
    text: str
    line: int
    items: tuple[Token, ...] = ()


@dataclass(frozen=True, slots=True)
class Word:
    """A word after expansion.

    ``variables`` are the names it was read through, ``unknown`` what only a running shell knows:
    where it is not empty, ``text`` still holds that part as it is written.
    """

    text: str
    line: int
    variables: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


POSITIONAL = "@"
"""The array under which ``Variables`` keeps ``$1 $2 ...``."""
OWN_ARGUMENTS = Word("$@", 0, (), ("$@",))
"""The arguments of the script itself: any number of words that only a running shell knows."""


def any_number(words: list[Word]) -> bool:
    """Say whether one of the words stands for arguments of the script, so for any number."""
    return any("$@" in word.unknown for word in words)


def shifted(parameters: list[Word], by: int) -> list[Word]:
    """Return the parameters after ``shift``: unknown ones are never used up."""
    while by > 0 and parameters and not any_number([parameters[0]]):
        parameters, by = parameters[1:], by - 1
    return parameters


def tokens(text: str, line: int = 1) -> list[Token]:
    """Cut a script into words, operators, arrays and here-documents; it begins on ``line``."""
    return _Lexer(text, line=line).tokens()


@dataclass
class _Lexer:
    text: str
    at: int = 0
    line: int = 1
    found: list[Token] = field(default_factory=list[Token])
    pending: list[tuple[str, bool]] = field(default_factory=list[tuple[str, bool]])
    in_array: bool = False

    def tokens(self) -> list[Token]:
        while self.at < len(self.text):
            self._next()
        return self.found

    def _next(self) -> None:
        text, at = self.text, self.at
        char = text[at]
        if char in " \t\r":
            self.at += 1
        elif text.startswith("\\\n", at) or text.startswith("\\\r\n", at):
            self.at = text.index("\n", at) + 1
            self.line += 1
        elif char == "\n":
            self._add("operator", "\n", 1)
            self.line += 1
            self._documents()
        elif char == "#":
            end = text.find("\n", at)
            self.at = len(text) if end < 0 else end
        elif char in ";&|()<>":
            self._operator()
        else:
            self._word()

    def _add(self, kind: Literal["word", "operator"], text: str, length: int) -> None:
        self.found.append(Token(kind, text, self.line))
        self.at += length

    def _operator(self) -> None:
        known = next((o for o in _OPERATORS if self.text.startswith(o, self.at)), None)
        operator = known or self.text[self.at]
        self._add("operator", operator, len(operator))
        if operator == "<<":
            dash = self.text.startswith("-", self.at)
            self.at += dash
            while self.text[self.at : self.at + 1] in (" ", "\t"):
                self.at += 1
            end = end_of_word(self.text, self.at)
            delimiter = self.text[self.at : end].strip("'\"\\")
            self.at = end
            if delimiter:
                self.pending.append((delimiter, dash))

    def _documents(self) -> None:
        for delimiter, dash in self.pending:
            start, first = self.at, self.line
            while self.at < len(self.text):
                end = self.text.find("\n", self.at)
                end = len(self.text) if end < 0 else end
                line = self.text[self.at : end].rstrip("\r")
                here, self.at = self.at, min(end + 1, len(self.text))
                self.line += 1
                if (line.lstrip("\t") if dash else line) == delimiter:
                    self.found.append(Token("document", self.text[start:here], first))
                    break
        self.pending = []

    def _word(self) -> None:
        text, at = self.text, self.at
        end = end_of_word(text, at)
        raw = text[at:end]
        assigned = _ASSIGNMENT.fullmatch(raw)
        if assigned and text.startswith("(", end) and not self.in_array:
            self._array(raw, end + 1)
            return
        if raw.isdigit() and text[end : end + 1] in ("<", ">"):
            self.at = end
            return
        self._add("word", raw, end - at)
        self.line += raw.count("\n")

    def _array(self, name: str, at: int) -> None:
        """Read ``NAME=( words )`` as one token; a missing bracket takes the rest of the text."""
        line, outer = self.line, self.found
        self.found, self.at, self.in_array = [], at, True
        while self.at < len(self.text) and self.text[self.at] != ")":
            if self.text[self.at] == "(":
                self.at += 1
            else:
                self._next()
        self.at += 1
        self.in_array = False
        items = tuple(t for t in self.found if t.kind == "word")
        self.found = outer
        outer.append(Token("array", name, line, items))


def end_of_word(text: str, at: int) -> int:
    """Return where the word that begins at ``at`` ends: quotes and substitutions are whole."""
    closers: list[str] = []
    while at < len(text):
        char = text[at]
        top = closers[-1] if closers else ""
        if char == "\\":
            at += 2
        elif char == "'" and top != '"':
            end = text.find("'", at + 1)
            at = len(text) if end < 0 else end + 1
        elif char == top and top:
            closers.pop()
            at += 1
        elif char in '"`':
            closers.append(char)
            at += 1
        elif char == "$" and text[at + 1 : at + 2] in ("(", "{"):
            closers.append(")" if text[at + 1] == "(" else "}")
            at += 2
        elif char == "(" and top == ")":
            closers.append(")")
            at += 1
        elif not closers and char in _STOPS:
            break
        else:
            at += 1
    return min(at, len(text))


@dataclass
class Variables:
    """What is known while a script is read: variables, arrays, what expanding may still cost."""

    scalars: dict[str, Word] = field(default_factory=dict[str, Word])
    arrays: dict[str, list[Word]] = field(default_factory=dict[str, list[Word]])
    budget: int = MAX_EXPANDED

    def spend(self, characters: int) -> None:
        """Raise ``DocumentError`` once a script has expanded to more than any real one does."""
        self.budget -= characters + 1
        if self.budget < 0:
            raise DocumentError(
                "script",
                "...",
                f"It expands to more than {MAX_EXPANDED} characters.",
                "Give the command line itself.",
            )

    def __getitem__(self, name: str) -> Word | None:
        """Return a variable's value, the first element of an array, or None when it is not set."""
        if name[:1].isdecimal():
            return self._positional(int(name))
        if name in self.arrays:
            items = self.arrays[name]
            return items[0] if items else None
        return self.scalars.get(name)

    def _positional(self, number: int) -> Word | None:
        """Return ``$1``, ``$2``...: empty behind the last, None where it is the script's own."""
        items = self.arrays.get(POSITIONAL, [OWN_ARGUMENTS])
        if number == 0 or any_number(items[:number]):
            return None
        return items[number - 1] if number <= len(items) else Word("", 0)

    def integers(self) -> Mapping[str, str]:
        """Return the variables as text, for arithmetic."""
        return _Texts(self)


class _Texts(Mapping[str, str]):
    def __init__(self, variables: Variables) -> None:
        self._variables = variables

    def __getitem__(self, name: str) -> str:
        word = self._variables[name]
        if word is None or word.unknown:
            raise KeyError(name)
        return word.text

    def __iter__(self) -> Iterator[str]:
        return iter(self._variables.scalars)

    def __len__(self) -> int:
        return len(self._variables.scalars)


def expand(raw: str, line: int, known: Variables, depth: int = 0) -> list[Word]:
    """Return the words that ``raw`` becomes: none, one, or several where it is split."""
    return _Expansion(raw, line, known, depth).words()


def expand_one(raw: str, line: int, known: Variables, depth: int = 0) -> Word:
    """Return ``raw`` expanded as one word, as in an assignment."""
    return _Expansion(raw, line, known, depth, split=False).words()[0]


class _Expansion:
    def __init__(
        self, raw: str, line: int, known: Variables, depth: int, split: bool = True
    ) -> None:
        self.raw, self.line, self.known, self.depth = raw, line, known, depth
        self.split = split
        self.done: list[Word] = []
        self.parts: list[str] = []
        self.started = not split
        self.vanishes = False
        self.variables: dict[str, None] = {}
        self.unknown: dict[str, None] = {}

    def words(self) -> list[Word]:
        at, quoted, raw = 0, False, self.raw
        while at < len(raw):
            char = raw[at]
            if char == "\\":
                at = self._escape(at, quoted)
            elif char == '"':
                quoted, self.started = not quoted, not (quoted and self.vanishes and not self.parts)
                self.vanishes = False
                at += 1
            elif char == "'" and not quoted:
                end = raw.find("'", at + 1)
                end = len(raw) if end < 0 else end
                self._put(raw[at + 1 : end])
                at = end + 1
            elif char in "$`":
                at = self._dollar(at, quoted)
            else:
                end = at + 1
                while end < len(raw) and raw[end] not in "\\\"'$`":
                    end += 1
                self._put(raw[at:end])
                at = end
        self._end_word()
        return self.done

    def _put(self, text: str) -> None:
        self.known.spend(len(text))
        self.parts.append(text)
        self.started = True

    def _end_word(self) -> None:
        if self.started:
            word = Word("".join(self.parts), self.line, tuple(self.variables), tuple(self.unknown))
            self.done.append(word)
        self.parts, self.started = [], False
        self.variables, self.unknown = {}, {}

    def _escape(self, at: int, quoted: bool) -> int:
        following = self.raw[at + 1 : at + 2]
        if following == "\n":
            return at + 2
        keep = quoted and following not in ('"', "\\", "$", "`")
        self._put("\\" + following if keep else following)
        return at + 2

    def _dollar(self, at: int, quoted: bool) -> int:
        raw = self.raw
        if raw[at] == "`" or raw.startswith("$(", at) or raw.startswith("${", at):
            return self._bracketed(at, quoted)
        name = NAME.match(raw, at + 1)
        if name:
            self._value(name.group(), raw[at : name.end()], quoted)
            return name.end()
        if raw[at + 1 : at + 2] and raw[at + 1] in "0123456789@*#?$!-":
            self._special(raw[at + 1], raw[at : at + 2], quoted)
            return at + 2
        self._put("$")
        return at + 1

    def _special(self, name: str, written: str, quoted: bool) -> None:
        """Put a positional parameter, all of them, or their number, where a function has them."""
        if name in "@*":
            self._array(name, written, quoted, joined=quoted and name == "*")
        elif name == "#":
            self._length("@", written)
        elif name.isdecimal():
            self._value(name, written, quoted)
        else:
            self._leave(written, written)

    def _bracketed(self, at: int, quoted: bool) -> int:
        raw = self.raw
        end = _end_of_bracket(raw, at)
        whole = raw[at:end]
        if whole.startswith("${"):
            self._parameter(whole[2:].removesuffix("}"), whole, quoted)
        elif whole.startswith("$((") and whole.endswith("))"):
            number = evaluate(whole[3:-2], self.known.integers())
            for name in NAME.findall(whole):
                self.variables[name] = None
            if number is None:
                self._leave(whole, whole[:80])
            else:
                self._put(str(number))
        else:
            self._leave(whole, whole[:80])
        return end

    def _leave(self, text: str, name: str) -> None:
        self._put(text)
        self.unknown[name] = None

    def _value(self, name: str, written: str, quoted: bool) -> None:
        word = self.known[name]
        self.variables[f"${name}" if name.isdecimal() else name] = None
        if word is None:
            self._leave(written, f"${name}")
        else:
            self._insert(word, quoted)

    def _insert(self, word: Word, quoted: bool) -> None:
        pieces = word.text.split() if self.split and not quoted else [word.text]
        padded = self.split and not quoted and word.text[:1].isspace()
        if padded and self.started:
            self._carry()
        for number, piece in enumerate(pieces):
            if number:
                self._carry()
            self.unknown.update(dict.fromkeys(word.unknown))
            self.variables.update(dict.fromkeys(word.variables))
            self._put(piece)
        if pieces and self.split and not quoted and word.text[-1:].isspace():
            self._carry()

    def _carry(self) -> None:
        """End a word; the variable it was split from is named on the next one as well."""
        names = dict(self.variables)
        self._end_word()
        self.variables = names

    def _parameter(self, inner: str, written: str, quoted: bool) -> None:
        if inner.startswith("#"):
            self._length(inner[1:], written)
            return
        match = _PARAMETER.fullmatch(inner)
        if match is None:
            self._leave(written, written[:80])
            return
        name, index, operator, rest = match.groups()
        part = _SLICE.fullmatch(rest) if not operator else None
        if (index in ("[@]", "[*]") or name in "@*") and not operator and (part or not rest):
            self._array(name, written, quoted, quoted and "*" in (name, (index or "")[1:2]), part)
        elif rest and not operator:
            self._leave(written, written[:80])
        else:
            self._with_default(name, index, operator, rest, written, quoted)

    def _length(self, inner: str, written: str) -> None:
        name = inner.removesuffix("[@]").removesuffix("[*]")
        items = self.known.arrays.get(POSITIONAL if name in "@*" else name)
        if items is not None and not any_number(items):
            self._put(str(len(items)))
        else:
            self._leave(written, written[:80])

    def _array(
        self,
        name: str,
        written: str,
        quoted: bool,
        joined: bool,
        part: re.Match[str] | None = None,
    ) -> None:
        items = self.known.arrays.get(POSITIONAL if name == "*" else name)
        if items is None:
            if self.known[name] is None:
                self._leave(written, f"${name}")
            else:
                self._value(name, written, quoted=True)
            return
        if part is not None:
            items = _slice_of(items, int(part[1]) - (name in "@*"), part[2])
        self.vanishes = quoted and not (items or joined or self.parts)
        for number, item in enumerate(items):
            if number and joined:
                self._put(" ")
            elif number:
                self._end_word()
            if name not in "@*":
                self.variables[name] = None
            self.line = self.line if joined or not item.line else item.line
            self._insert(item, quoted)

    def _with_default(
        self, name: str, index: str | None, operator: str, rest: str, written: str, quoted: bool
    ) -> None:
        numbered = name.isdecimal()
        word = self.known[name] if numbered or NAME.fullmatch(name) else None
        if index and name in self.known.arrays:
            at = int(index[1:-1]) if index[1:-1].isdecimal() and len(index) < 8 else -1
            items = self.known.arrays[name]
            word = items[at] if 0 <= at < len(items) else None
        is_set = word is not None and (bool(word.text) or not (numbered or ":" in operator))
        self.variables[f"${name}" if numbered else name] = None
        use_rest = operator.endswith("+") == is_set and operator[-1:] in ("-", "=", "+")
        if use_rest and self.depth < MAX_DEPTH:
            value = expand_one(rest, self.line, self.known, self.depth + 1)
            if operator.endswith("="):
                self.known.scalars[name] = value
            self._insert(value, quoted)
        elif operator.endswith("+") and not is_set:
            self.started = self.started or quoted
        elif word is not None:
            self._insert(word, quoted)
        else:
            self._leave(written, f"${name}")


def _slice_of(items: list[Word], start: int, length: str | None) -> list[Word]:
    items = shifted(items, start)
    return items if length is None or any_number(items) else items[: int(length)]


def _end_of_bracket(raw: str, at: int) -> int:
    """Return the end of ``${..}``, ``$(..)`` or `` `..` `` that begins at ``at``."""
    closers = ["`"] if raw[at] == "`" else [")" if raw[at + 1] == "(" else "}"]
    at += 1 if raw[at] == "`" else 2
    while at < len(raw) and closers:
        char = raw[at]
        if char == "\\":
            at += 1
        elif char == closers[-1]:
            closers.pop()
        elif char == "'" and closers[-1] != '"':
            end = raw.find("'", at + 1)
            at = len(raw) if end < 0 else end
        elif char in '"`':
            closers.append(char)
        elif char == "(" and closers[-1] == ")":
            closers.append(")")
        elif char == "$" and raw[at + 1 : at + 2] in ("(", "{"):
            closers.append(")" if raw[at + 1] == "(" else "}")
            at += 1
        at += 1
    return min(at, len(raw))
