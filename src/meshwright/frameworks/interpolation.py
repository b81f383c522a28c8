"""Interpolations of OmegaConf, ``${oc.env:TP,2}`` and ``${trainer.nnodes}``, followed as text.

A reference takes what is set at its path, ``oc.env`` what the launch exports or else its default.
What only a running program knows is named in ``Override.unknown`` and stays as it is written.
Ref: OmegaConf 2.3, "Variable interpolation" and "Custom resolvers".
Left out: relative paths (``${.name}``), other resolvers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from meshwright.frameworks.overrides import Override, by_path, value_of
from meshwright.frameworks.overrides_text import text_of

_INNERMOST: Final = re.compile(r"\$\{([^${}]{1,400})\}")
_MOST_STEPS: Final = 32
_MOST_CHARACTERS: Final = 2000


def resolved(found: Sequence[Override], env: Mapping[str, object]) -> list[Override]:
    """Return the overrides with their interpolations replaced by what they stand for."""
    if not any(isinstance(o.value, str) and "${" in o.value for o in found):
        return list(found)
    known = by_path(found)
    return [_resolved(o, known, env) for o in found]


def _resolved(
    override: Override, known: Mapping[str, Override], env: Mapping[str, object]
) -> Override:
    text = override.value
    if override.unknown or not isinstance(text, str) or "${" not in text:
        return override
    lost = replace(override, unknown=(text[:80],))
    for _ in range(_MOST_STEPS):
        match = _INNERMOST.search(text)
        if match is None or len(text) > _MOST_CHARACTERS:
            break
        value, is_known = _value(match[1].strip(), known, env)
        if not is_known:
            return lost
        text = text[: match.start()] + text_of(value) + text[match.end() :]
    if "${" in text or len(text) > _MOST_CHARACTERS:
        return lost
    origin = f"{override.origin}, from {override.value[:80]}"
    return replace(override, value=value_of(text), origin=origin)


def _value(
    inner: str, known: Mapping[str, Override], env: Mapping[str, object]
) -> tuple[Any, bool]:
    """Return what the inside of one interpolation stands for, and whether that is known."""
    resolver, colon, rest = inner.partition(":")
    if not colon:
        return _referred(inner, known)
    if resolver == "oc.decode":
        return rest.strip(), True
    if resolver != "oc.env":
        return None, False
    name, comma, default = (part.strip() for part in rest.partition(","))
    if name in env:
        return env[name], True
    return (default.strip("'\""), True) if comma else (None, False)


def _referred(path: str, known: Mapping[str, Override]) -> tuple[Any, bool]:
    found = known.get(path)
    return (None, False) if found is None or found.unknown else (found.value, True)
