"""Small changes to the text of a launch: a number, a switch, a flag put in or taken out.

Each function yields the changed files one after the other; which of them says what is wanted is
found by reading them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Final

Files = Mapping[str, str]
"""Text by file name; the launch itself comes first."""

MOST_PLACES: Final = 400
_NUMBER: Final = re.compile(r"(?<![\w.])\d{1,7}(?![\w.])|(?<=\s-[NnG])\d{1,7}\b")
_SWITCH: Final = re.compile(r"(?<![\w.])([Tt]rue|[Ff]alse)(?![\w.])")
_ASSIGNED: Final = re.compile(r"\s*((export|local|readonly)\s+)?\w+=\S*\s*$")
_OPPOSITE: Final = {"true": "false", "false": "true", "True": "False", "False": "True"}
_VALUE: Final = r"(\"[^\"]*\"|'[^']*'|[^\s\\,]+)"


def line_of(text: str, at: int) -> tuple[int, int]:
    """Return where the line that holds a position starts and ends, its newline left out."""
    end = text.find("\n", at)
    return text.rfind("\n", 0, at) + 1, len(text) if end < 0 else end


def _matches(files: Files, pattern: re.Pattern[str]) -> Iterator[tuple[str, re.Match[str]]]:
    """Yield what stands outside of comments, ``MOST_PLACES`` at most; batch options are none."""
    for name, text in files.items():
        for match in islice(pattern.finditer(text), MOST_PLACES):
            start, _ = line_of(text, match.start())
            before = text[start : match.start()]
            if before.startswith("#SBATCH") or not re.search(r"(^|\s)#", before):
                yield name, match


def _with(files: Files, name: str, start: int, end: int, text: str) -> dict[str, str]:
    whole = files[name]
    return {**files, name: whole[:start] + text + whole[end:]}


def numbers(files: Files, value: Callable[[int], int | None]) -> Iterator[dict[str, str]]:
    """Replace one number by ``value`` of it; those of assignments by themselves come first."""

    def is_argument(found: tuple[str, re.Match[str]]) -> bool:
        start, end = line_of(files[found[0]], found[1].start())
        return _ASSIGNED.match(files[found[0]][start:end]) is None

    for name, match in sorted(_matches(files, _NUMBER), key=is_argument):
        made = value(int(match.group()))
        if made is not None and str(made) != match.group():
            yield _with(files, name, match.start(), match.end(), str(made))


def switches(files: Files) -> Iterator[dict[str, str]]:
    """Turn one true into false, or the other way round."""
    for name, match in _matches(files, _SWITCH):
        yield _with(files, name, match.start(), match.end(), _OPPOSITE[match.group()])


def inserted(files: Files, beside: str, key: str, value: str) -> Iterator[dict[str, str]]:
    """Give ``key`` a value next to the argument ``beside``: on a line of its own, or before it.

    An empty value is a flag by itself.
    """
    pattern = re.compile(rf"(?<![\w.+-])([\w.+-]*\.)?{re.escape(beside)}(\s*[=:]\s*|\s+){_VALUE}")
    for name, match in _matches(files, pattern):
        text = files[name]
        start, end = line_of(text, match.start())
        sign = match[2] if value else ""
        new = f"{match[1] or ''}{key}{sign}{value}"
        alone = re.fullmatch(r"\s*", text[start : match.start()])
        rest = text[match.end() : end]
        if alone and re.fullmatch(r"[\s,\\]*(\s#.*)?", rest):
            tail = re.match(r"[\s,\\]*", rest)
            line = text[start : match.start()] + new + (tail[0].rstrip(" ") if tail else "")
            yield _with(files, name, start, start, line + "\n")
        elif not name.endswith((".yaml", ".yml", ".toml")):
            comma = ", " if name.endswith(".py") else " "
            yield _with(files, name, match.start(), match.start(), new + comma)


def removed(files: Files, keys: Iterable[str]) -> Iterator[dict[str, str]]:
    """Take an argument out, with its line where it stands alone on it."""
    for key in keys:
        spelled = re.escape(key).replace("_", "[-_]")
        pattern = re.compile(rf"(?<![\w.+-])[\w.+-]*{spelled}(\s*[=:]\s*|\s+){_VALUE}[ ,]*")
        for name, match in _matches(files, pattern):
            text = files[name]
            start, end = line_of(text, match.start())
            rest = text[start : match.start()] + text[match.end() : end]
            alone = re.fullmatch(r"\s*\\?\s*", rest) and ("\\" in rest or name != next(iter(files)))
            if alone or (re.fullmatch(r"\s*", rest) and not _continues(text, start)):
                yield _with(files, name, start, min(end + 1, len(text)), "")
            else:
                yield _with(files, name, match.start(), match.end(), "")


def _continues(text: str, start: int) -> bool:
    """Say whether the line before goes on here."""
    return text[:start].rstrip("\r\n").endswith("\\")


def batch_options(text: str, old: tuple[int, int], new: tuple[int, int]) -> str:
    """Return a script whose ``#SBATCH`` lines ask for other nodes and GPUs a node.

    ``old`` and ``new`` are both; a number that is not the old one in its role stays.
    """
    tasks = {old[0]: new[0], old[0] * old[1]: new[0] * new[1]}
    roles = {
        r"--nodes|-N": {old[0]: new[0]},
        r"--gpus-per-node|--gres|--ntasks-per-node": {old[1]: new[1]},
        r"--ntasks|-n": tasks,
        r"--gpus|-G": {old[0] * old[1]: new[0] * new[1]},
    }

    def line(match: re.Match[str]) -> str:
        out = match.group()
        for names, values in roles.items():
            out = _role(out, names, values)
        return out

    return re.sub(r"(?m)^#SBATCH.*$", line, text)


def _role(line: str, names: str, values: Mapping[int, int]) -> str:
    pattern = rf"(\s(?:{names})(?:=|\s+|(?<=\s-\w))(?:[A-Za-z][\w-]*:)*)(\d+)(?![\w-])"
    return re.sub(pattern, lambda m: m[1] + str(values.get(int(m[2]), m[2])), line)
