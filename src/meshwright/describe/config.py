"""A Hugging Face ``config.json`` as typed facts: every key is read once, checked and named.

A key that is left out takes the default that the family gives, which is ``transformers``' own, and
is listed in ``assumed``. A shape key without a default is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from meshwright.describe.facts import MAX_SIZE
from meshwright.errors import ModelError, did_you_mean, nearest_divisors

MAX_LAYERS = 65_536
MAX_DEPTHS = 64


class Config:
    """Reads the keys of one config; ``assumed`` collects what was left out.

    ``root`` begins the field names of errors.
    """

    def __init__(self, values: Mapping[str, Any], root: str = "config") -> None:
        self.values = values
        self.root = root
        self.assumed: list[str] = []
        self.defaults: Mapping[str, Any] = {}

    def with_defaults(self, **defaults: Any) -> Config:
        """Return the config with the defaults of a family; ``assumed`` is shared."""
        made = Config(self.values, self.root)
        made.assumed, made.defaults = self.assumed, defaults
        return made

    def size(self, key: str, default: int | None = None, *, low: int = 1, also: str = "") -> int:
        """Return a whole number from ``low`` to 2^31-1; null counts as left out.

        ``also`` is a second spelling of the key.
        """
        key = also if also and self.given(also) and not self.given(key) else key
        value = self._value(key, default)
        if value is None:
            raise self._missing(key)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ModelError(self.name(key), value, "It is a whole number.", f"Use {low} or more.")
        if not low <= value <= MAX_SIZE:
            rule = f"It lies between {low} and {MAX_SIZE}."
            raise ModelError(self.name(key), value, rule, f"Use {low} or more.")
        return value

    def nullable_size(self, key: str, default: int | None = None) -> int:
        """Return a whole number, or 0 where the key stands there as null (or as 0)."""
        if self.is_null(key):
            return 0
        return self.size(key, default, low=0)

    def optional_size(self, key: str) -> int:
        """Return a whole number, or 0 where the key is left out without default, null or 0."""
        return self.nullable_size(key) if key in self.values or key in self.defaults else 0

    def layers(
        self, key: str = "num_hidden_layers", default: int | None = None, *, also: str = ""
    ) -> int:
        """Return the number of decoder layers."""
        value = self.size(key, default, also=also)
        if value > MAX_LAYERS:
            rule = f"A model has at most {MAX_LAYERS} layers."
            raise ModelError(self.name(key), value, rule, f"Use {MAX_LAYERS} or less.")
        return value

    def depths(self, key: str = "num_nextn_predict_layers") -> int:
        """Return the number of multi-token-prediction depths, 0 where it is left out."""
        value = self.optional_size(key)
        if value > MAX_DEPTHS:
            rule = f"A model predicts at most {MAX_DEPTHS} tokens ahead."
            raise ModelError(self.name(key), value, rule, f"Use {MAX_DEPTHS} or less.")
        return value

    def flag(self, key: str, default: bool | None = None) -> bool:
        """Return true or false."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise ModelError(self.name(key), value, "It is true or false.", "Use true or false.")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """Return text."""
        value = self._value(key, default)
        if not isinstance(value, str):
            raise ModelError(self.name(key), value, "It is text.", "Write it in quotes.")
        return value

    def fraction(self, key: str, default: float | None = None) -> float:
        """Return a number from 0 to 1."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ModelError(self.name(key), value, "It lies between 0 and 1.", "Use 0.")
        return float(value)

    def items(self, key: str) -> list[Any] | None:
        """Return a list, or None when it is left out."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, list | tuple):
            raise ModelError(self.name(key), value, "It is a list.", "Write [...].")
        return list(cast("list[Any]", value))

    def choices(self, key: str, allowed: Iterable[str], length: int) -> list[str] | None:
        """Return a list of ``length`` words out of ``allowed``, or None when it is left out."""
        found = self.items(key)
        if found is None:
            return None
        names = sorted(allowed)
        for value in found:
            if value not in names:
                remedy = did_you_mean(str(value), names)
                raise ModelError(self.name(key), value, "There is no such layer type.", remedy)
        if len(found) != length:
            raise ModelError(
                self.name(key),
                len(found),
                f"It has one entry for each of the {length} layers.",
                f"Write {length} entries, or leave it out.",
            )
        return [str(value) for value in found]

    def indices(self, key: str, length: int) -> frozenset[int] | None:
        """Return a list of layer numbers below ``length``, or None when it is left out."""
        found = self.items(key)
        for value in found or ():
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < length:
                rule = f"It lists layers from 0 to {length - 1}."
                raise ModelError(self.name(key), value, rule, "Leave that layer out.")
        return None if found is None else frozenset(found)

    def is_null(self, key: str) -> bool:
        """Whether the key stands in the config with the value null."""
        return key in self.values and self.values[key] is None

    def given(self, key: str) -> bool:
        """Whether the key stands in the config and is not null."""
        return self.values.get(key) is not None

    def head_dim(self, hidden_size: int, num_heads: int, key: str = "head_dim") -> int:
        """Return the size of a head, by default hidden size / heads, which must then divide.

        ``key`` "" is for families that know no other size.
        """
        if self.given(key) or (key in self.defaults and not self.is_null(key)):
            return self.size(key)
        if hidden_size % num_heads:
            near = nearest_divisors(hidden_size, num_heads)
            rule = f"It divides hidden_size = {hidden_size}"
            rule += f" unless {key} is given." if key else "."
            remedy = f"Use {' or '.join(map(str, near))} heads"
            remedy += f", or give {key}." if key else "."
            raise ModelError(self.name("num_attention_heads"), num_heads, rule, remedy)
        return hidden_size // num_heads

    def nested(self, key: str) -> Config:
        """Return the object under ``key``, which shares ``assumed``."""
        value = self.values[key]
        if not isinstance(value, Mapping):
            raise ModelError(self.name(key), value, "It is an object.", "Write {...}.")
        inner = Config(cast("Mapping[str, Any]", value), self.name(key))
        inner.assumed = self.assumed
        return inner

    def name(self, key: str) -> str:
        """Return the key as errors call it."""
        return f"{self.root}.{key}"

    def _value(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        default = self.defaults.get(key) if default is None else default
        if value is None and default is not None:
            self.assumed.append(f"{key} = {default} (left out; the default of the model type)")
            return default
        return value

    def _missing(self, key: str) -> ModelError:
        return ModelError(
            self.name(key),
            None,
            "The shape of the model needs it.",
            f"Give {key} a whole number.",
        )
