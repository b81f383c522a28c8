"""A layout as ``key=value`` text and as the JSON object of the command line; both read back."""

from __future__ import annotations

import re
from typing import Any

from meshwright.errors import LayoutError, did_you_mean
from meshwright.parallel.layout.choices import (
    CHOICES,
    CP_COMM_TEXT,
    SCHEDULE_TEXT,
    CpComm,
    Pipeline,
    Zero,
    recompute_from_text,
    recompute_to_text,
)
from meshwright.parallel.layout.fields import Layout
from meshwright.parallel.layout.make import layout
from meshwright.parallel.layout.values import whole_number


def to_dict(x: Layout[int]) -> dict[str, Any]:
    """Return the layout as the JSON object of the command line; fields left at "none" are absent.

    Printed as ``key=value`` text it is accepted by ``from_text`` and gives the same layout.
    """
    out: dict[str, Any] = {k: getattr(x, k) for k in ("tp", "pp", "vpp", "cp", "dp", "ep", "etp")}
    out["edp"] = x.edp
    out["mbs"] = x.mbs
    out["sp"] = bool(x.sp)
    out["zero"] = Zero(x.zero).name
    out["dp_replicate"] = x.dp_replicate
    out["recompute"] = recompute_to_text(x.recompute, x.recompute_num_layers)
    out["schedule"] = SCHEDULE_TEXT[Pipeline(x.schedule)]
    out["cp_comm"] = CP_COMM_TEXT[CpComm(x.cp_comm)]
    out["order"] = x.order
    for name in ("first", "last", "microbatch_group_size"):
        if getattr(x, name):
            out[name] = getattr(x, name)
    for name in ("account_for_embedding", "account_for_loss"):
        if getattr(x, name):
            out[name] = True
    if x.pipeline_layout is not None:
        out["pipeline_layout"] = x.pipeline_layout
    if x.hierarchical_cp is not None:
        out["hierarchical_cp"] = "x".join(map(str, x.hierarchical_cp))
    return out


def to_text(x: Layout[int]) -> str:
    """Return the layout as ``key=value`` text that ``from_text`` reads back."""
    shown = {k: str(v).lower() if isinstance(v, bool) else v for k, v in to_dict(x).items()}
    return " ".join(f"{k}={v}" for k, v in shown.items())


_BETWEEN_ITEMS = re.compile(r"[,\s]+(?=\w+=)|\s+")
"""A comma parts two items only before a key: pipeline layouts may hold commas."""


def from_text(text: str, gpus: int | None = None) -> Layout[int]:
    """Read space- or comma-separated ``key=value`` text, e.g. ``"tp=4 pp=4 vpp=5"``.

    ``gpus`` gives the world when ``dp`` is left out. A stated ``edp`` must agree with the rest.

    Raises ``LayoutError`` naming the key, its value, the rule and the nearest legal spelling.
    """
    values = read_fields(text)
    edp = values.pop("edp", None)
    if "recompute" in values:
        values["recompute"], values["recompute_num_layers"] = values["recompute"]
    made = layout(**values, gpus=gpus)
    if edp is not None and edp != made.edp:
        raise LayoutError(
            "layout.edp",
            edp,
            f"edp is derived: tp*cp*dp/(ep*etp) = {made.edp}.",
            f"Leave edp out, or use edp={made.edp}.",
        )
    return made


def read_fields(text: str) -> dict[str, Any]:
    """Return the keys of layout text and their values, read. Raises ``LayoutError`` on any other.

    The values may contradict each other: no layout is made of them.
    """
    return {key: _read_value(key, value) for key, value in layout_fields(text).items()}


def layout_fields(text: str) -> dict[str, str]:
    """Return the keys of layout text and their values as written.

    Raises ``LayoutError`` when an item is no pair or a key stands twice.
    """
    pairs: dict[str, str] = {}
    for item in _BETWEEN_ITEMS.split(text.strip(", ")) if text.strip(", ") else ():
        key, sign, value = item.partition("=")
        if not sign:
            raise LayoutError(
                "layout", item, "A layout is written as key=value pairs.", 'Write "tp=4 pp=2".'
            )
        if key in pairs:
            raise LayoutError(f"layout.{key}", value, "It is given twice.", "Give it once.")
        pairs[key] = value
    return pairs


_INTEGERS = (
    *("tp", "cp", "dp", "pp", "vpp", "ep", "etp", "edp", "mbs", "dp_replicate"),
    *("first", "last", "microbatch_group_size"),
)
_BOOLEANS = ("sp", "account_for_embedding", "account_for_loss")
KEYS = (
    *_INTEGERS,
    *_BOOLEANS,
    *CHOICES,
    "recompute",
    "order",
    "pipeline_layout",
    "hierarchical_cp",
)
"""Every key of the text form."""


def _read_value(key: str, value: str) -> Any:
    if key in _INTEGERS:
        return _read_integer(key, value)
    if key in _BOOLEANS:
        if value.lower() not in ("true", "false"):
            raise LayoutError(f"layout.{key}", value, "It is true or false.", f"Use {key}=true.")
        return value.lower() == "true"
    if key in CHOICES:
        if value.lower() not in CHOICES[key]:
            raise LayoutError(
                f"layout.{key}", value, "Unknown choice.", did_you_mean(value, CHOICES[key])
            )
        return CHOICES[key][value.lower()]
    if key == "recompute":
        return recompute_from_text(value)
    if key == "hierarchical_cp":
        if not re.fullmatch(r"\d+(x\d+)*", value, re.ASCII):
            rule = "It is the sizes of the levels, innermost first."
            raise LayoutError(f"layout.{key}", value, rule, f"Write {key}=2x2.")
        return tuple(_read_integer(key, v) for v in value.split("x"))
    if key in ("order", "pipeline_layout"):
        return value
    raise LayoutError(f"layout.{key}", value, "Unknown layout key.", did_you_mean(key, KEYS))


def _read_integer(key: str, value: str) -> int:
    low = 0 if key in ("first", "last", "microbatch_group_size") else 1
    try:
        number = int(value)
    except ValueError:
        raise LayoutError(
            f"layout.{key}", value, "It is a whole number.", f"Write {key}={max(low, 1)}."
        ) from None
    return whole_number(f"layout.{key}", number, low)
