"""The settings of a measured run: cells of its row and the words of ``other_settings``.

``other_settings`` is JSON, nested or flat (``model.*``, ``ddp.*``, ``optimizer.*``, ``args.*``);
what stands under ``cli_overrides`` wins. Words are one however they are spelled: capitals, hyphens
and leading dashes do not count. Only settings are read: measured values and notes that the object
also holds are dropped here, so that no prediction can see them.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from meshwright.errors import DocumentError

SECTIONS = (
    "cli_overrides",
    "comm_overlap",
    "mixed_precision",
    "ddp",
    "optimizer",
    "model",
    "peft",
    "env_vars",
    "args",
)
"""Where a word is looked for first to last, before the top level and then any other section."""

MEASURED = re.compile(
    r"mfu|hfu|tflops|peak_|_gib|_gb$|_pct|predicted|published|earlier_publication|_ms$|_s$"
    r"|nearest_recipe|mem_allocated|memory_|activation_memory|case$|step_time|tokens_per_s"
)
"""Words of measured values and of notes about how a row was found."""

NOT_STATED = ("", "-", "--", "?", "n/a", "na", "nan", "none", "null", "nil", "unknown", "auto")
"""What a cell of a number holds where there is none."""

YES = ("true", "1", "1.0", "yes", "y", "on", "t", "enabled", "enable")
NO = ("false", "0", "0.0", "no", "n", "none", "off", "f", "disabled", "disable", "null", "nan", "")

MULTIPLES = {"": 1, "k": 1024, "m": 1024**2}
"""What a letter behind a whole number means for sequences and GPUs: 8K tokens are 8,192."""

NUMBER = re.compile(r"(\d+(?:[,_]\d{3})*|\d+)(\.\d+)?(e\d)?\s*([km]?)(?:\s*[a-z]+s?)?", re.I)

CELL_WORDS = {
    "tp": ("tensor_model_parallel_size", "tensor_parallel_degree", "tensor_parallel_size"),
    "pp": ("pipeline_model_parallel_size", "pipeline_parallel_degree", "pipeline_parallel_size"),
    "cp": ("context_parallel_size", "context_parallel_degree"),
    "ep": ("expert_model_parallel_size", "expert_parallel_degree", "expert_parallel_size"),
    "etp": ("expert_tensor_parallel_size", "expert_tensor_parallel_degree"),
    "vpp": (
        "virtual_pipeline_model_parallel_size",
        "num_virtual_stages_per_pipeline_rank",
    ),
    "mbs": (
        "micro_batch_size",
        "train_micro_batch_size_per_gpu",
        "device_train_microbatch_size",
        "per_device_train_batch_size",
    ),
    "gbs": ("global_batch_size", "global_train_batch_size", "train_batch_size"),
    "seq_len": ("seq_length", "sequence_length", "max_seq_len", "encoder_seq_length"),
    "n_gpus": ("num_gpus", "world_size"),
    "gpus_per_node": ("num_gpus_per_node", "nproc_per_node"),
}
"""What frameworks call the cells that hold numbers: read where a cell is empty."""

Setting = bool | int | float | str | list[Any] | None


@dataclass
class Settings:
    """Cells and further settings of one row; ``assumed`` collects what had to be supplied."""

    cells: Mapping[str, str]
    words: Mapping[str, Setting]
    assumed: list[str] = field(default_factory=list[str])
    _keys: dict[str, list[str]] = field(init=False, default_factory=dict[str, list[str]])

    def __post_init__(self) -> None:
        for key in sorted(self.words, key=_rank):
            names = key.split(".")
            for name in dict.fromkeys((names[-1], ".".join(names[-2:]))):
                self._keys.setdefault(name, []).append(key)

    def cell(self, name: str) -> str:
        """Return the text of a cell, empty where the row does not state it."""
        return str(self.cells.get(name) or "").strip()

    @property
    def task(self) -> str:
        """Return the task in lower case: pretrain, sft, lora or module; pretrain if not stated."""
        text = self.cell("task").lower()
        return "pretrain" if text in NOT_STATED else text

    @property
    def is_module(self) -> bool:
        """Whether one layer ran alone: with Megatron's defaults, which fuse nothing, and without an
        optimizer."""
        return self.task == "module"

    def number(self, name: str) -> int | None:
        """Return the whole number in a cell, or None where the row does not state it.

        ``1,024``, ``8K`` and ``4096 tokens`` are numbers. An empty cell is looked for among the
        settings, under the names that frameworks give it.
        """
        text = self.cell(name)
        if text.lower() in NOT_STATED:
            found = self.whole(*CELL_WORDS.get(name, ()), default=0)
            return found if found > 0 else None
        value = whole_number(text)
        if value is None:
            self._told(f"{name} = {text!r} is not a number and is read as not stated")
        return value

    def switch(self, name: str, *words: str, default: bool) -> bool:
        """Return a switch that stands in a cell or, where that is empty, among the settings."""
        text = self.cell(name).lower()
        if text in YES or (text in NO and text not in NOT_STATED):
            return text in YES
        if text not in NOT_STATED:
            self._told(f"{name} = {text!r} is no yes or no and is read as not stated")
        return self.flag(*words, default=default)

    def find(self, *names: str) -> Setting:
        """Return the first of ``names`` that is set, in the order of ``SECTIONS``; else None."""
        for name in names:
            for key in self._keys.get(name.lower(), ()):
                if self.words[key] is not None:
                    return self.words[key]
        return None

    def flag(self, *names: str, default: bool) -> bool:
        """Return a switch; words other than those of ``NO`` count as set."""
        value = self.find(*names)
        if value is None:
            return default
        if isinstance(value, str):
            return value.strip().lower() not in NO
        return bool(value)

    def text(self, *names: str, default: str = "") -> str:
        """Return a word in lower case."""
        value = self.find(*names)
        return default if value is None else str(value).strip().lower()

    def whole(self, *names: str, default: int = 0) -> int:
        """Return a whole number, ``default`` where none is set."""
        value = self.find(*names)
        if value is None or isinstance(value, list):
            return default
        if isinstance(value, str):
            if value.strip().lower() in NOT_STATED:
                return default
            number = whole_number(value)
        else:
            number = int(value) if math.isfinite(value) else None
        if number is None:
            self._told(f"{names[0]} = {value!r} is not a number and is not used")
        return default if number is None else number

    def items(self, *names: str) -> list[str]:
        """Return a list of words: a JSON list, or text such as ``[a b]`` or ``a+b``."""
        value = self.find(*names)
        if isinstance(value, list):
            return [str(v).lower() for v in value]
        return re.findall(r"[a-z0-9_]+", str(value).lower()) if value is not None else []

    def section(self, name: str) -> bool:
        """Return whether any setting of a section is given."""
        return any(key.startswith(f"{name}.") for key in self.words)

    def _told(self, text: str) -> None:
        if text not in self.assumed:
            self.assumed.append(text)


def _rank(key: str) -> int:
    """Return where a word stands among those of its name: the lower, the sooner it is found."""
    first, dot, rest = key.partition(".")
    if not dot:
        return len(SECTIONS)
    if first == SECTIONS[0] or (first in SECTIONS and "." not in rest):
        return SECTIONS.index(first)
    return len(SECTIONS) + 1


def whole_number(text: str) -> int | None:
    """Return the whole number that a text states (``1,024``, ``8K``, ``4096 tokens``), or None."""
    plain = text.strip()
    sign = -1 if plain.startswith("-") else 1
    match = NUMBER.fullmatch(plain.lstrip("+-"))
    if match is None:
        return None
    digits, decimals, power, letter = match.groups()
    value = float(re.sub("[,_]", "", digits) + (decimals or "") + (power or ""))
    value *= MULTIPLES[letter.lower()]
    return sign * int(value) if value == int(value) else None


def read_settings(row: Mapping[str, str]) -> Settings:
    """Return the settings of a row. Raises ``DocumentError`` where they are no JSON object."""
    text = (row.get("other_settings") or "").strip()
    try:
        nested: Any = {} if text.lower() in NOT_STATED else json.loads(text)
    except json.JSONDecodeError as error:
        nested = _python_dict(text)
        if nested is None:
            rule = f"It is a JSON object ({error.msg})."
            raise DocumentError("other_settings", text[:60], rule, "Write it as JSON.") from None
    except (RecursionError, ValueError):
        rule = "It is a JSON object of settings, not thousands of levels or digits."
        raise DocumentError("other_settings", text[:60], rule, "Write {}.") from None
    if not isinstance(nested, dict):
        raise DocumentError("other_settings", text[:60], "It is a JSON object.", "Write {}.")
    flat = _flat(cast("dict[str, Any]", nested), "")
    words = {_unwrapped(k): v for k, v in flat if not MEASURED.search(k)}
    return Settings(cells=row, words=words)


def _python_dict(text: str) -> Any:
    """Return the dict that a text is in Python's words (``{'a': True}``), None where it is none."""
    try:
        found: Any = ast.literal_eval(text) if text.startswith("{") else None
        return json.loads(json.dumps(found))
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None


def _unwrapped(key: str) -> str:
    """Return a key from its first known section on: ``cfg.model.x`` is ``model.x``."""
    names = key.split(".")
    known = next((i for i, name in enumerate(names[:-1]) if name in SECTIONS), 0)
    return ".".join(names[known:])


def _flat(nested: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Setting]]:
    for key, value in nested.items():
        word = key.strip().lstrip("+-").replace("-", "_")
        path = prefix + word.lower()
        if isinstance(value, dict):
            yield from _flat(cast("dict[str, Any]", value), f"{path}.")
        else:
            yield path, value.strip() if isinstance(value, str) else value
