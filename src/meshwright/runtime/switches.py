"""The planner's switches as text: which communication runs beside compute."""

from __future__ import annotations

from dataclasses import replace

from meshwright.describe.job import Execution
from meshwright.errors import JobError, did_you_mean

SWITCHES = (
    "overlap_grad_reduce",
    "overlap_param_gather",
    "overlap_tp_comm",
    "overlap_cp_comm",
    "overlap_pp_comm",
)
"""Fields of ``Execution`` that the runtime obeys."""

_VALUES = {"true": True, "false": False}


def execution_from_text(text: str) -> Execution:
    """Return the switches of ``key=value`` text, by spaces or commas; the others stay as planned.

    Raises ``JobError`` for a switch or a value that the runtime does not know.
    """
    given: dict[str, bool] = {}
    for entry in text.replace(",", " ").split():
        name, _, value = entry.partition("=")
        if name not in SWITCHES:
            rule = f"The runtime has the switches {', '.join(SWITCHES)}."
            raise JobError(f"job.{name}", value, rule, did_you_mean(name, SWITCHES))
        if value not in _VALUES:
            raise JobError(f"job.{name}", value, "It is true or false.", f"Write {name}=false.")
        given[name] = _VALUES[value]
    return replace(Execution(), **given)
