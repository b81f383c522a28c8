"""The layout: how training is split over ranks. One layout, or a table with a column per field.

``Layout[int]`` is one layout; ``Layout[Ints]`` (``Layouts``) is a table of them, every field a
column of int64. Degree arithmetic is written once and serves both. A layout knows no cost and no
model.
"""

from __future__ import annotations

import math
import operator
import re
from dataclasses import dataclass, fields, replace
from enum import IntEnum, IntFlag
from typing import Any, Generic, SupportsIndex, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import LayoutError, did_you_mean, nearest_divisors
from meshwright.parallel.pipeline_layout import read_pipeline_layout

Ints = NDArray[np.int64]
Int = TypeVar("Int", int, Ints)

DEFAULT_ORDER = "tp-cp-ep-dp-pp"
"""Megatron's default order of ranks, innermost (fastest) first. Our notation throughout."""


class Zero(IntEnum):
    """What data parallelism shards (Rajbhandari et al., arXiv:1910.02054), in Megatron's words."""

    no_shard = 0
    optim = 1
    optim_grads = 2
    optim_grads_params = 3


class Recompute(IntFlag):
    """What is dropped in the forward pass and computed again in the backward pass.

    The module names are Megatron's ``--recompute-modules``. ``full`` drops whole layers; with
    ``uniform`` every ``recompute_num_layers`` layers share one kept input, with ``block`` the first
    ``recompute_num_layers`` layers of each stage are recomputed and the rest keep everything.
    """

    none = 0
    core_attn = 1
    layernorm = 2
    mlp = 4
    moe_act = 8
    moe = 16
    shared_experts = 32
    mla_up_proj = 64
    full = 128
    block = 256


class CpComm(IntEnum):
    """How context parallelism exchanges keys and values."""

    p2p = 0
    all_gather = 1
    a2a = 2
    a2a_p2p = 3


class Pipeline(IntEnum):
    """Pipeline schedules, by the names of their files in ``parallel/schedules``."""

    gpipe = 0
    one_f_one_b = 1
    interleaved = 2
    zb_h1 = 3
    zb_v = 4


SCHEDULE_TEXT = {
    Pipeline.gpipe: "gpipe",
    Pipeline.one_f_one_b: "1f1b",
    Pipeline.interleaved: "interleaved",
    Pipeline.zb_h1: "zb_h1",
    Pipeline.zb_v: "zb_v",
}
CP_COMM_TEXT = {
    CpComm.p2p: "p2p",
    CpComm.all_gather: "all_gather",
    CpComm.a2a: "a2a",
    CpComm.a2a_p2p: "a2a+p2p",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout(Generic[Int]):
    """Degrees and choices of one layout (``Layout[int]``) or of a table (``Layout[Ints]``).

    Degrees count ranks (or, for ``vpp``, model chunks per pipeline rank); ``mbs`` counts sequences.
    ``dp`` is dense data parallelism; its groups times ``cp`` shard what ``zero`` shards, in
    ``dp_replicate`` copies (1: shard over all of them; > 1: hybrid sharding).
    ``recompute_num_layers`` 0 means every layer. ``first``/``last`` are the layers of the first and
    last pipeline stage, 0 meaning "as the others". ``microbatch_group_size`` 0 means ``pp``.
    ``order``, ``pipeline_layout`` and ``hierarchical_cp`` (innermost first) hold for a whole table.
    """

    tp: Int
    cp: Int
    dp: Int
    pp: Int
    vpp: Int
    ep: Int
    etp: Int
    mbs: Int
    dp_replicate: Int
    sp: Int
    zero: Int
    recompute: Int
    recompute_num_layers: Int
    schedule: Int
    cp_comm: Int
    first: Int
    last: Int
    account_for_embedding: Int
    account_for_loss: Int
    microbatch_group_size: Int
    order: str = DEFAULT_ORDER
    pipeline_layout: str | None = None
    hierarchical_cp: tuple[int, ...] | None = None

    @property
    def edp(self) -> Int:
        """Expert data parallelism: DP*CP*TP = EDP*EP*ETP (arXiv:2504.14960)."""
        return self.tp * self.cp * self.dp // (self.ep * self.etp)

    @property
    def world_size(self) -> Int:
        """Number of ranks."""
        return self.tp * self.cp * self.dp * self.pp

    @property
    def dp_shard(self) -> Int:
        """Ranks that share one copy of what ``zero`` shards, context parallelism included."""
        return self.dp * self.cp // self.dp_replicate


Layouts = Layout[Ints]

COLUMNS: tuple[str, ...] = tuple(
    f.name for f in fields(Layout) if f.name not in ("order", "pipeline_layout", "hierarchical_cp")
)
"""The fields that are columns of a table, in order."""


def layout(
    *,
    tp: int = 1,
    cp: int = 1,
    pp: int = 1,
    vpp: int | None = None,
    ep: int = 1,
    etp: int = 1,
    dp: int | None = None,
    gpus: int | None = None,
    mbs: int = 1,
    sp: bool | None = None,
    zero: Zero = Zero.optim,
    dp_replicate: int = 1,
    recompute: Recompute = Recompute.none,
    recompute_num_layers: int = 0,
    schedule: Pipeline | None = None,
    cp_comm: CpComm = CpComm.p2p,
    first: int = 0,
    last: int = 0,
    account_for_embedding: bool = False,
    account_for_loss: bool = False,
    microbatch_group_size: int = 0,
    order: str = DEFAULT_ORDER,
    pipeline_layout: str | None = None,
    hierarchical_cp: tuple[int, ...] | None = None,
) -> Layout[int]:
    """Make one layout, deriving what is left out.

    ``dp`` comes from ``gpus``, or is the smallest that both meshes allow when neither is given.
    ``vpp`` is what ``pipeline_layout`` spells out, 2 for ``zb_v``, else 1.
    ``sp`` is on when ``tp > 1``. ``schedule`` is ``interleaved`` when ``vpp > 1``, else ``1f1b``.

    Raises ``LayoutError`` when a degree is below 1 or the world does not hold both meshes.
    """
    degrees = {"tp": tp, "cp": cp, "pp": pp, "ep": ep, "etp": etp, "mbs": mbs}
    derived = {"vpp": vpp, "dp": dp, "gpus": gpus}
    stated = {name: value for name, value in derived.items() if value is not None}
    for name, value in {**degrees, "dp_replicate": dp_replicate, **stated}.items():
        whole_number(f"layout.{name}", value)
    if vpp is None:
        vpp = _chunks(pp, pipeline_layout, schedule)
    if dp is None:
        unit = tp * cp * pp
        dp = (gpus or minimum_world_size(tp, cp, pp, ep, etp)) // unit
        if gpus is not None:
            check_world_size(gpus, tp=tp, cp=cp, pp=pp, ep=ep, etp=etp)
    world = tp * cp * dp * pp
    if gpus is not None and gpus != world:
        raise LayoutError(
            "layout.dp",
            dp,
            f"tp*cp*dp*pp = {tp}*{cp}*{dp}*{pp} = {world} is not the {gpus} GPUs given.",
            f"Leave dp out, or use dp={gpus // (tp * cp * pp)}." if gpus >= tp * cp * pp else "",
        )
    check_world_size(world, tp=tp, cp=cp, pp=pp, ep=ep, etp=etp)
    if (dp * cp) % dp_replicate:
        raise LayoutError(
            "layout.dp_replicate",
            dp_replicate,
            f"It must divide dp*cp = {dp * cp}.",
            f"Choose from the divisors of {dp * cp}.",
        )
    if schedule is None:
        schedule = Pipeline.interleaved if vpp > 1 else Pipeline.one_f_one_b
    if recompute == Recompute.full and recompute_num_layers == 1:
        recompute_num_layers = 0
    return Layout[int](
        tp=tp,
        cp=cp,
        dp=dp,
        pp=pp,
        vpp=vpp,
        ep=ep,
        etp=etp,
        mbs=mbs,
        dp_replicate=dp_replicate,
        sp=int(tp > 1 if sp is None else sp),
        zero=int(zero),
        recompute=int(recompute),
        recompute_num_layers=recompute_num_layers,
        schedule=int(schedule),
        cp_comm=int(cp_comm),
        first=first,
        last=last,
        account_for_embedding=int(account_for_embedding),
        account_for_loss=int(account_for_loss),
        microbatch_group_size=microbatch_group_size,
        order=order,
        pipeline_layout=pipeline_layout,
        hierarchical_cp=hierarchical_cp,
    )


def _chunks(pp: int, pipeline_layout: str | None, schedule: Pipeline | None) -> int:
    if pipeline_layout is not None:
        return max(1, len(read_pipeline_layout(pipeline_layout)) // pp)
    return 2 if schedule == Pipeline.zb_v else 1


def whole_number(field: str, value: object, low: int = 1, high: int = 2**31 - 1) -> int:
    """Return ``value`` as an int. Raises ``LayoutError`` unless it is one, from low to high."""
    try:
        number = operator.index(cast("SupportsIndex", value))
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise LayoutError(field, value, "It is a whole number.", f"Use {low} or more.")
    if not low <= number <= high:
        rule = f"It lies between {low} and {high}."
        raise LayoutError(field, number, rule, f"Use {low if number < low else high}.")
    return number


def written(field: str, value: object) -> str:
    """Return ``value``. Raises ``LayoutError`` unless it is text."""
    if not isinstance(value, str):
        raise LayoutError(field, value, "It is text.", "Write it in quotes.")
    return value


def minimum_world_size(tp: int, cp: int, pp: int, ep: int, etp: int) -> int:
    """Return the smallest world that holds both meshes: PP * lcm(TP*CP, EP*ETP).

    The maximum of the two instead of their least common multiple suffices only when one divides
    the other.
    """
    return pp * math.lcm(tp * cp, ep * etp)


def check_world_size(gpus: int, *, tp: int, cp: int, pp: int, ep: int, etp: int) -> None:
    """Raise ``LayoutError`` unless ``gpus`` is a multiple of PP*lcm(TP*CP, EP*ETP).

    A degree that alone does not divide the GPUs is the one that is named.
    """
    unit = minimum_world_size(tp, cp, pp, ep, etp)
    if gpus % unit == 0:
        return
    nearest = sorted({max(unit, gpus // unit * unit), (gpus // unit + 1) * unit})
    worlds = " or ".join(map(str, nearest))
    for name, degree in (("tp", tp), ("cp", cp), ("pp", pp), ("ep", ep), ("etp", etp)):
        if gpus % degree and degree < gpus:
            near = " or ".join(f"{name}={d}" for d in nearest_divisors(gpus, degree))
            raise LayoutError(
                f"layout.{name}",
                degree,
                f"Groups of {name} have equal size, so it must divide the {gpus} GPUs.",
                f"Use {near}; or {worlds} GPUs.",
            )
    raise LayoutError(
        "layout.world_size",
        gpus,
        f"GPUs must be a multiple of pp*lcm(tp*cp, ep*etp) = {pp}*lcm({tp * cp}, {ep * etp})"
        f" = {unit}, so that the dense and the expert mesh both cover every rank.",
        f"Use {worlds} GPUs, or other degrees.",
    )


def table(rows: list[Layout[int]]) -> Layouts:
    """Return the rows as one table. They must share ``order`` and the other table-wide fields."""
    shared = {(r.order, r.pipeline_layout, r.hierarchical_cp) for r in rows}
    if len(shared) != 1:
        raise LayoutError(
            "layout.order",
            len(shared),
            "The rows of a table share order, pipeline_layout and hierarchical_cp.",
            "Make one table for each.",
        )
    order, pipeline_layout, hierarchical_cp = shared.pop()
    columns = {c: _column([getattr(r, c) for r in rows]) for c in COLUMNS}
    return Layout[Ints](
        **columns, order=order, pipeline_layout=pipeline_layout, hierarchical_cp=hierarchical_cp
    )


def _column(values: Any) -> Ints:
    column = np.ascontiguousarray(values, dtype=np.int64)
    column.flags.writeable = False
    return column


def num_rows(x: Layouts) -> int:
    """Return the number of layouts in a table."""
    return len(x.tp)


def take(x: Layouts, index: NDArray[Any]) -> Layouts:
    """Return the rows that ``index`` (row numbers or a mask) selects."""
    return replace(x, **{c: _column(getattr(x, c)[index]) for c in COLUMNS})


def row(x: Layouts, index: int) -> Layout[int]:
    """Return one row of a table as a layout."""
    values: dict[str, Any] = {c: int(getattr(x, c)[index]) for c in COLUMNS}
    return Layout[int](
        **values,
        order=x.order,
        pipeline_layout=x.pipeline_layout,
        hierarchical_cp=x.hierarchical_cp,
    )


def concatenate(tables: list[Layouts]) -> Layouts:
    """Return the rows of all tables, in order, as one table."""
    columns = {c: _column(np.concatenate([getattr(t, c) for t in tables])) for c in COLUMNS}
    return replace(tables[0], **columns)


def recompute_to_text(recompute: int, num_layers: int) -> str:
    """Return the text form: ``none``, ``core_attn+mlp``, ``full``, ``full:uniform:2``."""
    if recompute & Recompute.full:
        if recompute & Recompute.block:
            return f"full:block:{num_layers}"
        return f"full:uniform:{num_layers}" if num_layers > 1 else "full"
    names = [str(m.name) for m in Recompute if m & recompute and m < Recompute.full]
    return "+".join(names) or "none"


def recompute_from_text(text: str) -> tuple[Recompute, int]:
    """Read ``none``, modules joined by ``+``, ``full``, ``full:uniform:N`` or ``full:block:N``.

    ``full`` is the short form of ``full:uniform:1``: both read as the same layout.
    """
    head, *rest = text.split(":")
    if head == "full":
        if not rest:
            return Recompute.full, 0
        if (
            len(rest) == 2
            and rest[0] in ("uniform", "block")
            and rest[1].isdecimal()
            and rest[1].isascii()
            and 0 < int(rest[1][:12]) < 10**6
        ):
            if rest == ["uniform", "1"]:
                return Recompute.full, 0
            method = Recompute.block if rest[0] == "block" else Recompute.none
            return Recompute.full | method, int(rest[1])
        raise LayoutError(
            "layout.recompute",
            text,
            "Full recomputation takes a method and a number of layers.",
            "Write full, full:uniform:1 or full:block:1.",
        )
    flags = Recompute.none
    for name in () if text == "none" else text.split("+"):
        if name not in _MODULES:
            raise LayoutError(
                "layout.recompute",
                text,
                f"There is no module {name!r} to recompute.",
                did_you_mean(name, ["none", "full", *_MODULES]),
            )
        flags |= Recompute[name]
    return flags, 0


_MODULES = [str(m.name) for m in Recompute if 0 < m < Recompute.full]


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
    values = {key: _read_value(key, value) for key, value in layout_fields(text).items()}
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
CHOICES: dict[str, dict[str, IntEnum]] = {
    "zero": {z.name: z for z in Zero},
    "schedule": {**{t: s for s, t in SCHEDULE_TEXT.items()}, "one_f_one_b": Pipeline.one_f_one_b},
    "cp_comm": {**{t: c for c, t in CP_COMM_TEXT.items()}, "a2a_p2p": CpComm.a2a_p2p},
}
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


def with_columns(x: Layouts, **columns: Any) -> Layouts:
    """Return the table with some columns replaced (broadcast to its length)."""
    n = num_rows(x)
    return replace(
        x, **cast("dict[str, Any]", {k: _column(np.broadcast_to(v, n)) for k, v in columns.items()})
    )
