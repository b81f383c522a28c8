"""Frameworks whose settings are paths: from paths into Megatron Core's words, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from meshwright.findings import Finding, Severity
from meshwright.frameworks.launch import Reading, Setting
from meshwright.frameworks.overrides import Override, by_path

Names = Mapping[str, str]
"""Megatron Core's word -> the path that sets it."""


def take(reading: Reading, found: Mapping[str, Override], names: Names) -> None:
    """Fill in the words whose paths are set; a null leaves a word unset."""
    for word, path in names.items():
        override = found.get(path)
        if override is not None and override.value is not None:
            reading.settings[word] = Setting(value=override.value, origin=override.origin)


def overrides_of(words: Mapping[str, Any], names: Names) -> dict[str, Any]:
    """Return the paths that set the words which have one."""
    return {names[word]: value for word, value in words.items() if word in names}


class Facts:
    """The settings of a launch by path, and by Megatron Core's word, for a rule to ask.

    ``f["trainer.train_batch_size"]`` is what was set there, else the framework's default, else
    None. Numbers that are not numbers are None, too: their type is another rule's concern.
    """

    def __init__(
        self,
        found: Mapping[str, Override],
        reading: Reading,
        defaults: Mapping[str, Any],
        gpus: int | None,
    ) -> None:
        self._found, self._reading, self._defaults = found, reading, defaults
        self.gpus = gpus

    def __getitem__(self, path: str) -> Any:
        if path in self._found:
            return self._found[path].value
        return self._defaults.get(path)

    def given(self, path: str) -> bool:
        """Say whether a path is set to something."""
        return path in self._found and self._found[path].value is not None

    def has(self, path: str) -> bool:
        """Say whether a path is set, be it to null."""
        return path in self._found

    def whole(self, path: str) -> int | None:
        """Return a whole number, or None when it is not set or no number."""
        value = self[path]
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def word(self, name: str) -> Any:
        """Return a setting in Megatron Core's words."""
        setting = self._reading.settings.get(name)
        return None if setting is None else setting.value

    def degree(self, name: str) -> int:
        """Return a degree of at least 1."""
        value = self.word(name)
        return value if isinstance(value, int) and value >= 1 else 1

    @property
    def model_parallel(self) -> int:
        """TP*CP*PP, the ranks of one replica."""
        return (
            self.degree("tensor_model_parallel_size")
            * self.degree("context_parallel_size")
            * self.degree("pipeline_model_parallel_size")
        )

    @property
    def dp(self) -> int | None:
        """Data parallel ranks, when the world holds whole replicas."""
        if self.gpus is None or self.gpus % self.model_parallel:
            return None
        return self.gpus // self.model_parallel


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One rule of a framework on its own settings.

    ``broken`` returns something true when it is broken: numbers for the texts, which are templates.
    """

    id: str
    field: str
    broken: Callable[[Facts], object]
    rule: str
    remedy: str = ""
    severity: Severity = "error"


def judge(rules: Sequence[Rule], facts: Facts) -> list[Finding]:
    """Return what the rules find, in their order."""
    found: list[Finding] = []
    for rule in rules:
        outcome = rule.broken(facts)
        if not outcome:
            continue
        numbers: dict[str, Any] = {}
        if isinstance(outcome, Mapping):
            numbers.update(outcome)  # pyright: ignore[reportUnknownArgumentType]
        text, remedy = rule.rule.format_map(numbers), rule.remedy.format_map(numbers)
        value = facts[rule.field]
        shown = "" if value is None else f" = {value}"
        found.append(
            Finding(
                id=rule.id,
                severity=rule.severity,
                field=rule.field,
                value=value,
                rule=text,
                remedy=remedy,
                message=f"{rule.field}{shown}: {text} {remedy}".rstrip(),
            )
        )
    return found


def near_multiples(value: int, unit: int) -> str:
    """Return the positive multiples of ``unit`` around ``value`` as text."""
    below, above = value // unit * unit, (value // unit + 1) * unit
    return f"{below} or {above}" if below > 0 else f"{above}"


__all__ = ["Facts", "Names", "Rule", "by_path", "judge", "near_multiples", "overrides_of", "take"]
