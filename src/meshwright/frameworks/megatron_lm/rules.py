"""The rule engine: what a launch must satisfy, in the order in which the software asks.

A rule is one entry: ``error``, ``warning`` or ``note`` with an id, the place where the software
asks it (``stage:line`` of the August 2026 snapshot, which is also the order), the setting it is
about, a test that returns what is broken, the rule and the remedy. ``change`` is a silent repair of
the software, ``derive`` a value it fills in.

Texts are templates: ``{name}`` is a setting or a fact that the test returned in a dict, and
``{write[name=value]}`` is how this framework spells that setting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard

from meshwright.errors import nearest_divisors
from meshwright.findings import Finding, Severity
from meshwright.frameworks.site import Site


def is_list(value: object) -> TypeGuard[list[Any]]:
    """Say whether ``value`` holds several values."""
    return isinstance(value, list | tuple)


class Settings:
    """The settings of one launch by name, as the software sees them at that moment.

    ``given`` holds the names that the user set.
    """

    def __init__(
        self, values: Mapping[str, Any], *, site: Site, world_size: int, given: Iterable[str] = ()
    ) -> None:
        self.__dict__.update(values)
        self.site = site
        self.world_size = world_size
        self.given = frozenset(given)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Any setting, by its name."""

    def values(self) -> dict[str, Any]:
        """Return every setting by name."""
        values = dict(self.__dict__)
        for about in ("site", "world_size", "given"):
            del values[about]
        return values

    @property
    def tp(self) -> int:
        """Tensor parallel size."""
        return self.tensor_model_parallel_size

    @property
    def pp(self) -> int:
        """Pipeline parallel size."""
        return self.pipeline_model_parallel_size

    @property
    def cp(self) -> int:
        """Context parallel size."""
        return self.context_parallel_size

    @property
    def ep(self) -> int:
        """Expert parallel size."""
        return self.expert_model_parallel_size

    @property
    def etp(self) -> int:
        """Expert tensor parallel size."""
        return self.expert_tensor_parallel_size

    @property
    def vpp(self) -> int | None:
        """Virtual pipeline stages a rank; None without interleaving."""
        return self.virtual_pipeline_model_parallel_size

    @property
    def dp(self) -> int:
        """Data parallel size."""
        return self.data_parallel_size

    @property
    def gtp(self) -> int:
        """Ranks that share the weights of one tensor parallel rank."""
        return self.gtp_weight_remat_size

    @property
    def has_experts(self) -> bool:
        """Whether the model has experts."""
        return self.num_experts is not None

    @property
    def uneven(self) -> bool:
        """Whether the first or the last pipeline rank has its own number of layers."""
        first, last = self.decoder_first_pipeline_num_layers, self.decoder_last_pipeline_num_layers
        return first is not None or last is not None

    @property
    def counted_layers(self) -> int:
        """Layers, with embedding and loss when they count as one each."""
        counted = bool(self.account_for_embedding_in_pipeline_split)
        return self.num_layers + counted + bool(self.account_for_loss_in_pipeline_split)


class Spelling(Protocol):
    """How a framework writes a setting."""

    def name(self, setting: str) -> str:
        """Return the name that a user gives, for a finding's ``field``."""
        ...

    def write(self, setting: str, value: str | None) -> str:
        """Return the setting as a user writes it, with ``value`` or alone."""
        ...


Test = Callable[[Settings], object]
"""Returns something true when the rule is broken; a dict gives facts to the texts."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One rule, silent change or derived value. ``final`` rules end the examination."""

    id: str
    stage: str
    line: float
    field: str
    severity: Severity | None
    test: Test
    rule: str = ""
    remedy: str = ""
    final: bool = False
    changes: bool = False
    repeats: tuple[str, ...] = ()


def _place(at: str) -> dict[str, Any]:
    stage, _, line = at.partition(":")
    return {"stage": stage, "line": float(line)}


def error(
    id: str,
    at: str,
    field: str,
    test: Test,
    rule: str,
    remedy: str = "",
    *,
    final: bool = False,
    repeats: tuple[str, ...] = (),
) -> Rule:
    """Return a rule whose breach stops the launch.

    ``final``: nothing can be said after it. ``repeats``: ids of rules that say the same earlier.
    """
    return Rule(
        id=id,
        **_place(at),
        field=field,
        severity="error",
        test=test,
        rule=rule,
        remedy=remedy,
        final=final,
        repeats=repeats,
    )


def warning(id: str, at: str, field: str, test: Test, rule: str, remedy: str = "") -> Rule:
    """Return a rule whose breach lets the launch pass, at a price."""
    return Rule(
        id=id,
        **_place(at),
        field=field,
        severity="warning",
        test=test,
        rule=rule,
        remedy=remedy,
    )


def change(
    id: str,
    at: str,
    field: str,
    test: Test,
    rule: str,
    remedy: str = "",
    *,
    severity: Severity = "warning",
) -> Rule:
    """Return a silent change: ``test`` returns the settings that the software overwrites."""
    return Rule(
        id=id,
        **_place(at),
        field=field,
        severity=severity,
        test=test,
        rule=rule,
        remedy=remedy,
        changes=True,
    )


def derive(at: str, test: Test) -> Rule:
    """Return a value that the software fills in: ``test`` returns the settings it sets."""
    return Rule(id="", **_place(at), field="", severity=None, test=test, changes=True)


@dataclass(kw_only=True)
class Examination:
    """What the rules found: the findings, errors first, and every setting that changed."""

    findings: list[Finding] = field(default_factory=list[Finding])
    changes: dict[str, tuple[object, object]] = field(
        default_factory=dict[str, tuple[object, object]]
    )
    sources: dict[str, str] = field(default_factory=dict[str, str])
    """Setting -> the id of the rule that changed it, or ``derived``."""


def in_order(stages: Sequence[str], *tables: Iterable[Rule]) -> tuple[Rule, ...]:
    """Return the rules of ``stages``, in the order in which the software asks them."""
    rank = {stage: i for i, stage in enumerate(stages)}
    asked = (rule for table in tables for rule in table if rule.stage in rank)
    return tuple(sorted(asked, key=lambda rule: (rank[rule.stage], rule.line)))


def examine(rules: Iterable[Rule], settings: Settings, spelling: Spelling) -> Examination:
    """Ask every rule in turn, applying the software's own changes on the way.

    Findings are errors in the software's order, so the first is the one it would stop at, then
    warnings, then notes.
    """
    seen = Examination()
    broken: set[str] = set()
    for rule in rules:
        outcome = rule.test(settings)
        if not outcome:
            continue
        if rule.changes:
            _apply(rule, outcome, settings, spelling, seen)
            continue
        if broken.intersection(rule.repeats):
            continue
        broken.add(rule.id)
        seen.findings.append(_finding(rule, outcome, settings, spelling))
        if rule.final:
            break
    rank = {"error": 0, "warning": 1, "note": 2}
    seen.findings.sort(key=lambda f: rank[f.severity])
    return seen


def _apply(
    rule: Rule, outcome: Any, settings: Settings, spelling: Spelling, seen: Examination
) -> None:
    values = settings.__dict__
    new = {k: v for k, v in outcome.items() if k not in values or values[k] != v}
    if not new:
        return
    for name, value in new.items():
        before = seen.changes[name][0] if name in seen.changes else values.get(name)
        seen.changes[name] = (before, value)
        seen.sources[name] = rule.id or "derived"
    if rule.severity is not None:
        seen.findings.append(_finding(rule, new, settings, spelling))
    values.update(new)


def _finding(rule: Rule, outcome: object, settings: Settings, spelling: Spelling) -> Finding:
    facts: dict[str, Any] = {}
    if isinstance(outcome, Mapping):
        facts.update(outcome)  # pyright: ignore[reportUnknownArgumentType]
    name = str(facts.get("field", rule.field))
    shown = spelling.name(name)
    value: object = settings.__dict__.get(name)
    texts = _Texts(settings, facts, spelling)
    text = rule.rule.format_map(texts)
    remedy = rule.remedy.format_map(texts)
    message = f"{shown}: {text} {remedy}".rstrip()
    return Finding(
        id=rule.id,
        severity=rule.severity or "note",
        field=shown,
        value=value,
        rule=text,
        remedy=remedy,
        message=message,
    )


class _Texts(dict[str, Any]):
    """What a text template can name: facts first, then settings, then how to write a setting."""

    def __init__(self, settings: Settings, facts: Mapping[str, object], spelling: Spelling) -> None:
        super().__init__(facts)
        self._settings = settings
        self._spelling = spelling

    def __missing__(self, key: str) -> Any:
        if key == "write":
            return _Writer(self._spelling)
        return getattr(self._settings, key)


class _Writer:
    def __init__(self, spelling: Spelling) -> None:
        self._spelling = spelling

    def __getitem__(self, wanted: str) -> str:
        setting, sign, value = wanted.partition("=")
        return self._spelling.write(setting, value if sign else None)


def multiples_near(value: int, unit: int) -> str:
    """Return the positive multiples of ``unit`` around ``value``, as text."""
    below, above = value // unit * unit, (value // unit + 1) * unit
    return f"{below} or {above}" if below > 0 else f"{above}"


def indivisible(value: int, *units: int) -> bool:
    """Say whether ``value`` is no multiple of the product of ``units``, or that is 0."""
    product = 1
    for unit in units:
        product *= unit
    return product == 0 or value % product != 0


def divisors_near(number: int, wanted: int) -> str:
    """Return the divisors of ``number`` nearest to ``wanted``, as text."""
    if not 0 < number <= _MOST_FACTORED:
        return f"the divisors of {number}"
    return " or ".join(map(str, nearest_divisors(number, wanted)))


_MOST_FACTORED = 10**8
