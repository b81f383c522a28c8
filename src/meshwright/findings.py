"""A finding: one rule that fired, told with its arithmetic and its remedy."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One rule that fired on a launch, a layout or a plan.

    ``id`` is the rule's public name, ``field`` what it is about, ``value`` what was given, ``rule``
    what must hold, ``remedy`` what to write instead and ``message`` all of it in one sentence.
    """

    id: str
    severity: Severity
    field: str
    value: object
    rule: str
    remedy: str
    message: str

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as the JSON object of the command line."""
        return asdict(self)
