"""Settings by path that no framework could take: numbers that are none, mistyped names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Final

from meshwright.findings import Finding
from meshwright.frameworks.by_path import Names, Rule
from meshwright.frameworks.overrides import Override
from meshwright.frameworks.words import DEGREES

_WHOLE: Final = frozenset(DEGREES.values())
_SHORTEST: Final = 6
_LONGEST: Final = 64
_ALIKE: Final = 0.86
"""How alike a name and its misspelling are: one or two letters of a name of this length."""


def misread(
    known: Mapping[str, Override],
    names: Names,
    defaults: Mapping[str, Any],
    rules: Sequence[Rule],
) -> list[Finding]:
    """Return what is wrong with settings as they are written, before any rule of the framework.

    ``names``, ``defaults`` and the fields of ``rules`` are the paths that are known of it. A path
    that differs from one of them by a letter or two in one part is a warning, since no list of a
    framework's names is whole.
    """
    whole = {path for word, path in names.items() if word in _WHOLE}
    whole |= {p for p, v in defaults.items() if isinstance(v, int) and not isinstance(v, bool)}
    wrong = [_no_number(o) for path, o in known.items() if path in whole and not _is_whole(o.value)]
    return wrong + _misspelt(known, {*names.values(), *defaults, *(rule.field for rule in rules)})


def _is_whole(value: object) -> bool:
    if isinstance(value, float):
        return value.is_integer()
    return value is None or (isinstance(value, int) and not isinstance(value, bool))


def _no_number(override: Override) -> Finding:
    value, path = override.value, override.path
    numbers = value if isinstance(value, list) else [value]  # pyright: ignore[reportUnknownVariableType]
    first = next((str(v) for v in numbers if str(v).isdecimal()), "1")  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    return _finding(
        f"unusable.{path.rpartition('.')[2]}",
        override,
        "It is a whole number.",
        f"Write {path}={first[:20]}.",
    )


def _misspelt(known: Mapping[str, Override], names: Iterable[str]) -> list[Finding]:
    names = frozenset(names)
    unknown = {p: o for p, o in known.items() if p not in names and p.count(".") < 12}
    if not unknown:
        return []
    beside: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        for masked, part in _masked(name):
            beside.setdefault(masked, []).append(part)
    found: list[Finding] = []
    for path, override in unknown.items():
        meant = _meant(path, beside)
        if meant is not None and meant not in known:
            rule = f"No setting of that name is known; {meant} is."
            found.append(_finding("unknown_name", override, rule, f"Write {meant}.", "warning"))
    return found


def _masked(path: str) -> Iterable[tuple[tuple[str, ...], str]]:
    """Return the path without one of its parts, and that part, for each of them."""
    parts = tuple(path.split("."))
    for at, part in enumerate(parts):
        yield (*parts[:at], "", *parts[at + 1 :]), part


def _meant(path: str, beside: Mapping[tuple[str, ...], list[str]]) -> str | None:
    for masked, part in _masked(path):
        if masked in beside and _SHORTEST <= len(part) <= _LONGEST:
            near = get_close_matches(part, beside[masked], n=1, cutoff=_ALIKE)
            if near and not _is_longer(part, near[0]):
                at = masked.index("")
                return ".".join((*masked[:at], near[0], *masked[at + 1 :]))
    return None


def _is_longer(part: str, near: str) -> bool:
    """Say whether one of two names is the other with a word added: both may exist."""
    return part.startswith(f"{near}_") or near.startswith(f"{part}_")


def _finding(
    id: str, override: Override, rule: str, remedy: str, severity: Any = "error"
) -> Finding:
    return Finding(
        id=id,
        severity=severity,
        field=override.path,
        value=override.value,
        rule=rule,
        remedy=remedy,
        message=f"{override.path} = {str(override.value)[:80]}: {rule} {remedy}",
    )
