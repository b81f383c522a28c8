"""A plan document where a launch is expected: recognised, and judged by the layout's own rules."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from meshwright.errors import DocumentError
from meshwright.frameworks.launch import Launch, Setting
from meshwright.frameworks.read import read_text
from meshwright.frameworks.words import job_words, layout_words

if TYPE_CHECKING:
    from meshwright.plan_document import Saved

PLAN = "meshwright"
"""What stands for the framework of a plan document."""


def load_saved(source: str | Path | Sequence[str]) -> Saved | None:
    """Return the plan that ``source`` holds, or None when it is no plan document.

    Raises ``MeshwrightError`` when it is one that cannot be used.
    """
    if not isinstance(source, str | Path) or Path(source).suffix.lower() != ".toml":
        return None
    from meshwright.frameworks.overrides import load_toml

    text = read_text(Path(source))
    try:
        document = load_toml(text, str(source))
    except DocumentError:
        return None
    if not {"model", "cluster", "layout"} <= document.keys():
        return None
    from meshwright.plan_document import from_document

    return from_document(document, str(source))


def launch_of(saved: Saved, origin: str) -> Launch:
    """Return a plan in Megatron Core's words, as a launch is read."""
    words = {**layout_words(saved.layout), **job_words(saved.job, saved.layout)}
    return Launch(
        framework=PLAN,
        settings={word: Setting(value=value, origin=origin) for word, value in words.items()},
        gpus=saved.layout.world_size,
    )
