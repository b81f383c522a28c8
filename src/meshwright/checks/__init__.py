"""Whether a layout is legal and wise: one function per rule, over whole tables of layouts.

A rule is a function of a ``Case`` that returns a mask over the rows, True where the rule fires.
Its docstring is what people read: the first paragraph says what must hold, the second what to
write instead, both with ``{placeholders}``. The search filters with the mask, a report formats the
docstring, ``list checks`` prints it, so a rule exists once.

The files of this package are the topics. A new rule is a function with ``@check`` in one of them.
Identifiers that start with MLM or MB are those of Megatron-LM's and Megatron-Bridge's own rules.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meshwright import registry
from meshwright.describe.cluster import Cluster
from meshwright.describe.job import Job
from meshwright.describe.model import Model
from meshwright.findings import Finding, Severity
from meshwright.parallel.layout import COLUMNS, Ints, Layout, Layouts, num_rows, row, take, to_dict

if sys.flags.optimize >= 2:
    raise ImportError(
        "meshwright.checks takes its messages from docstrings, which python -OO removes. "
        "Run python without -OO."
    )

Mask = NDArray[np.bool_]
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Case:
    """What the rules judge: a table of layouts of one job.

    Without ``cluster``, ``peak_bytes`` [N] or ``capacity_bytes`` the rules that need them are
    silent.
    """

    model: Model
    job: Job
    x: Layouts
    cluster: Cluster | None = None
    peak_bytes: Floats | None = None
    capacity_bytes: float | None = None

    @cached_property
    def nowhere(self) -> Mask:
        """The mask of a rule that cannot fire in this case."""
        mask = np.zeros(num_rows(self.x), dtype=np.bool_)
        mask.flags.writeable = False
        return mask

    @cached_property
    def num_microbatches(self) -> Ints:
        """Micro-batches of one step per pipeline, GBS / (MBS*DP), rounded down; shape [N]."""
        return self.job.gbs // np.maximum(self.x.mbs * self.x.dp, 1)


Rule = Callable[[Case], Mask]
Values = Callable[[Case, Layout[int]], Mapping[str, object]]
"""Computes further placeholders, such as nearest legal values, from a case of one row on which the
rule fired."""


@dataclass(frozen=True)
class Check:
    """One rule: its public ``id``, how bad it is, the field it is about, and the rule itself.

    ``rule`` and ``remedy`` are templates for people.
    """

    id: str
    name: str
    topic: str
    severity: Severity
    field: str
    rule: str
    remedy: str
    fires: Rule
    values: Values
    library: str = ""
    """Who refuses where the framework does not: a library beneath it, as its version decides."""

    def finding(self, case: Case, index: int) -> Finding:
        """Return the finding for row ``index`` of ``case``, on which the rule fired."""
        alone, at = _alone(case, index), row(case.x, index)
        shown = _facts(alone, at) | dict(self.values(alone, at))
        field = self.field.format_map(shown)
        value = shown["value"] if "value" in shown else _value(field, shown)
        rule, remedy = self.rule.format_map(shown), self.remedy.format_map(shown)
        text = str(value).lower() if isinstance(value, bool) else str(value)
        return Finding(
            id=self.id,
            severity=self.severity,
            field=field,
            value=value,
            rule=rule,
            remedy=remedy,
            message=f"{field} = {text}: {rule} {remedy}".rstrip(),
        )


def _nothing_more(case: Case, at: Layout[int]) -> Mapping[str, object]:
    del case, at
    return {}


def check(
    severity: Severity,
    *,
    field: str,
    id: str = "",
    values: Values = _nothing_more,
    library: str = "",
) -> Callable[[Rule], Check]:
    """Make the rule below it a ``Check``.

    ``id`` is the rule's name in the list of Megatron-LM's rules; without it the function's name.
    ``values`` computes further placeholders of the docstring; ``library`` names who refuses where
    the framework itself lets it pass.
    """

    def made(rule: Rule) -> Check:
        name = rule.__name__
        text, _, remedy = inspect.cleandoc(rule.__doc__ or "").partition("\n\n")
        return Check(
            id=id or name,
            name=name,
            topic=rule.__module__.rpartition(".")[2],
            severity=severity,
            field=field,
            rule=" ".join(text.split()),
            remedy=" ".join(remedy.split()),
            fires=rule,
            values=values,
            library=library,
        )

    return made


_SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@cache
def all_checks() -> list[Check]:
    """Return every check of every topic: errors first, then by id."""
    modules = [import_module(f"{__name__}.{topic}") for topic in registry.names(__name__)]
    found = [c for module in modules for c in vars(module).values() if isinstance(c, Check)]
    return sorted(found, key=lambda c: (_SEVERITIES.index(c.severity), c.id, c.name))


def illegal(case: Case) -> Mask:
    """Return [N]: True for a layout on which any error fires."""
    fires = case.nowhere.copy()
    for mask in _masks(case, (c for c in all_checks() if c.severity == "error")).values():
        fires |= mask
    return fires


def judge(case: Case) -> list[list[Finding]]:
    """Return, for every row, all its findings, errors first.

    Of a row with a degree below 1 only that is said.
    """
    fired = _masks(case, all_checks())
    found: list[list[Finding]] = [[] for _ in range(num_rows(case.x))]
    impossible = _below_one(case)
    for one, mask in fired.items():
        said = mask if one.name == "degrees_at_least_one" else mask & ~impossible
        for index in np.flatnonzero(said).tolist():
            found[index].append(one.finding(case, index))
    return found


def judge_one(case: Case) -> list[Finding]:
    """Return the findings of a table of one row."""
    (findings,) = judge(case)
    return findings


def _masks(case: Case, checks: Iterable[Check]) -> dict[Check, Mask]:
    # A degree of 0 has its own rule; that others divide by it says nothing.
    with np.errstate(divide="ignore", invalid="ignore"):
        return {one: one.fires(case) for one in checks}


def _below_one(case: Case) -> Mask:
    return np.logical_or.reduce([getattr(case.x, name) < 1 for name in DEGREES])


DEGREES = ("tp", "cp", "dp", "pp", "vpp", "ep", "etp", "mbs", "dp_replicate")


def _alone(case: Case, index: int) -> Case:
    """Return the case of one row."""
    peak = None if case.peak_bytes is None else case.peak_bytes[index : index + 1]
    return replace(case, x=take(case.x, np.array([index])), peak_bytes=peak)


def _facts(case: Case, at: Layout[int]) -> dict[str, Any]:
    """Return what every docstring may name: columns, the texts of choices, model, job, cluster."""
    shown: dict[str, Any] = {name: getattr(at, name) for name in COLUMNS}
    shown |= {"pipeline_layout": at.pipeline_layout, "hierarchical_cp": at.hierarchical_cp}
    if all(shown[name] >= 1 for name in DEGREES):
        shown |= to_dict(at)
    shown |= {"world_size": at.world_size, "num_microbatches": int(case.num_microbatches[0])}
    return shown | {"model": case.model, "job": case.job, "cluster": case.cluster}


def _value(field: str, shown: Mapping[str, Any]) -> object:
    root, _, name = field.partition(".")
    return shown[name] if root in ("layout", "memory") else getattr(shown[root], name)


def either(values: Sequence[int]) -> str:
    """Return ``values`` as words: "2", "2 or 4", "2, 3 or 4"."""
    words = [str(v) for v in values]
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def nearest(values: Iterable[int], wanted: int, most: int = 2) -> str:
    """Return the ``most`` values nearest to ``wanted`` as words, ascending."""
    return either(sorted(sorted(values, key=lambda v: (abs(v - wanted), v))[:most]))
