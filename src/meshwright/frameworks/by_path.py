"""Frameworks whose settings are paths: from paths into Megatron Core's words, and back."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from meshwright.describe.model import Model
from meshwright.findings import Finding, Severity
from meshwright.frameworks.launch import Reading, Setting
from meshwright.frameworks.overrides import Override, by_path
from meshwright.frameworks.site import site_of
from meshwright.frameworks.words_model import find_model

_VISION: Final = r"(?i)[-_]VL\b|[-_]vision\b|llava|internvl|qwen3[._]5\b"
"""Names of models that read images; Qwen3.5 does so in all its sizes."""

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
        env: Mapping[str, object] | None = None,
    ) -> None:
        self._found, self._reading, self._defaults = found, reading, defaults
        self.gpus = gpus
        self.site = site_of(env)

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
    def model(self) -> Model | None:
        """The model that the launch names, when it is a known one."""
        name = self.word("model")
        return find_model(name) if isinstance(name, str) else None

    @property
    def sees_images(self) -> bool:
        """Whether the name of the model is that of one that reads images."""
        return bool(re.search(_VISION, str(self.word("model") or "")[:1000]))

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


Breach = Callable[[Facts], object]
"""Returns something true when a rule is broken: numbers for its texts, or True."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One rule of a framework on its own settings; its texts are templates."""

    id: str
    field: str
    broken: Breach
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


def when(applies: Breach, broken: Breach) -> Breach:
    """Return a breach that counts only where ``applies`` is true."""
    return lambda f: applies(f) and broken(f)


def below(path: str, least: int = 1) -> Breach:
    """Return the breach of a whole number that must be at least ``least`` where it is known."""

    def broken(f: Facts) -> object:
        value = f.whole(path)
        return value is not None and value < least

    return broken


def world(f: Facts) -> object:
    """Return what is wrong when the GPUs hold no whole number of replicas of TP*CP*PP ranks."""
    return f.gpus is not None and _rest(f.gpus, f.model_parallel)


def expert_world(f: Facts) -> object:
    """Return what is wrong when the GPUs are no multiple of PP*EP*ETP."""
    split = f.degree("expert_model_parallel_size") * f.degree("expert_tensor_parallel_size")
    unit = split * f.degree("pipeline_model_parallel_size")
    return f.gpus is not None and split > 1 and _rest(f.gpus, unit)


def _rest(gpus: int, unit: int) -> object:
    return gpus % unit and {"gpus": gpus, "unit": unit, "near": near_multiples(gpus, unit)}


def rollout_experts(ep: str, *parts: str) -> Breach:
    """Return the breach of an engine whose experts do not split over exactly its ranks.

    ``parts`` are the paths of the degrees that multiply to those ranks.
    """

    def broken(f: Facts) -> object:
        have = math.prod(f.whole(part) or 1 for part in parts)
        wanted = f.whole(ep) or 1
        return wanted > 1 and wanted != have and {"have": have}

    return broken


def near_multiples(value: int, unit: int) -> str:
    """Return the positive multiples of ``unit`` around ``value`` as text."""
    below, above = value // unit * unit, (value // unit + 1) * unit
    return f"{below} or {above}" if below > 0 else f"{above}"


__all__ = [
    "Breach",
    "Facts",
    "Names",
    "Rule",
    "below",
    "by_path",
    "expert_world",
    "judge",
    "near_multiples",
    "overrides_of",
    "rollout_experts",
    "take",
    "when",
    "world",
]
