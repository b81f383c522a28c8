"""The letters that spell where every layer of a pipeline sits: ``Et*3|(tt|)*4,m|L``."""

from __future__ import annotations

import re
from functools import lru_cache

from meshwright.errors import LayoutError

MOST_LAYERS = 100_000
"""The deepest model that is placed layer by layer; also the most letters of a pipeline layout."""

_REPEATED = (re.compile(r"\(([^)]+)\)\*(\d{1,6})"), re.compile(r"(.)\*(\d{1,6})"))


@lru_cache
def read_pipeline_layout(text: str) -> tuple[str, ...]:
    """Return the stages of a pipeline layout, each a string of the letters E, t, m and L.

    ``E`` is the embedding, ``t`` a layer, ``m`` a multi-token prediction layer, ``L`` the loss;
    ``|`` ends a stage, ``x*n`` and ``(...)*n`` repeat, commas are for the eye.

    Raises ``LayoutError`` on anything else. Ref: Megatron-LM, ``PipelineParallelLayerLayout``.
    """
    letters = text.replace(",", "")
    for pattern in _REPEATED:
        size = sum(len(m[1]) * int(m[2]) for m in pattern.finditer(letters))
        if size > MOST_LAYERS:
            rule = f"Written out it has more than {MOST_LAYERS} letters."
            raise LayoutError("layout.pipeline_layout", text[:80], rule, "Repeat less often.")
        letters = pattern.sub(lambda m: m[1] * int(m[2]), letters)
    unknown = sorted(set(letters) - set("EtmL|"))
    if unknown:
        raise LayoutError(
            "layout.pipeline_layout",
            text,
            f"{unknown[0]!r} has no meaning there.",
            "Use E, t, m, L, '|' between stages, and x*n or (...)*n to repeat.",
        )
    return tuple(letters.split("|"))
