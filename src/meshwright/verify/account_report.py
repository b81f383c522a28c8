"""The account of a layout, short: priced, held and sent bytes of every kind of rank."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from meshwright.errors import MeshwrightError
from meshwright.parallel.layout import Layout, Recompute
from meshwright.runtime.flat_buffer import ALIGNMENT
from meshwright.runtime.groups import cp_levels
from meshwright.runtime.legality import check_runnable
from meshwright.runtime.shape import ModelShape
from meshwright.verify.accounts import Entry, accounts
from meshwright.verify.numerics import prepare
from meshwright.verify.small import Case

WORD_ROWS = 128
"""Vocabularies are priced as Megatron pads them: to a multiple of this on every TP rank."""
MOST_HIDDEN = 1024
"""Above, the sizes that need no padding are too large to try beside a verification."""
KNOWN = (
    "under sp a region keeps its gathered input, which is priced as gathered again (less)",
    "gradients of weights that every TP rank holds whole are summed over TP once a step (more)",
    "gradients of a table on several pipeline ranks are summed once a step (more)",
    "prediction depths computed before the stage of the loss travel to it (more)",
)
"""What the runtime does otherwise than it is priced, as ``priced.differences`` counts it."""
LEAST_BYTES = 0.5
"""Prices are floats: less than half a byte is rounding."""


@dataclass(frozen=True, kw_only=True)
class AccountRow:
    """One line of the account, the same for all its ``ranks``."""

    ranks: tuple[int, ...]
    entry: Entry

    def to_dict(self) -> dict[str, Any]:
        """Return the line as a JSON object."""
        return {
            "ranks": list(self.ranks),
            "what": self.entry.what,
            "runtime_bytes": self.entry.runtime_bytes,
            "priced_bytes": self.entry.priced_bytes,
            "different_bytes": self.entry.different_bytes,
            "unexplained_bytes": self.entry.unexplained_bytes,
        }


@dataclass(frozen=True, kw_only=True)
class AccountReport:
    """What was held and sent against what was priced, or ``why_not`` it could not be compared."""

    rows: tuple[AccountRow, ...] = ()
    why_not: str = ""

    @property
    def equal(self) -> bool | None:
        """Whether every byte is priced or a known difference; ``None`` if not compared."""
        if self.why_not:
            return None
        return all(abs(row.entry.unexplained_bytes) < LEAST_BYTES for row in self.rows)

    @property
    def differs(self) -> bool:
        """Whether a known difference plays a part."""
        return any(row.entry.different_bytes for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Return the account as a JSON object."""
        return {
            "equal": self.equal,
            "rows": [row.to_dict() for row in self.rows],
            "differences": list(KNOWN) if self.differs else [],
            "why_not": self.why_not or None,
        }


def account_report(
    x: Layout[int], model: ModelShape | None = None, timeout_s: float = 120.0
) -> AccountReport:
    """Run one step of a model of even sizes, without recomputation, and return its account.

    Even: nothing is padded, every rank has KV heads of its own, and every token every expert, as
    balanced routing is priced. Left out, as a few numbers that are not priced or pad a buffer:
    counts of auxiliary losses, sums of norms over all heads, biases of routers, attention sinks.

    Raises ``LaunchError`` when a rank fails.
    """
    x = replace(x, recompute=Recompute.none, recompute_num_layers=0)
    try:
        case = even_case(x, model)
    except MeshwrightError as error:
        return AccountReport(why_not=f"no model of even sizes can be made: {error.rule}")
    if case.shape.hidden_size > MOST_HIDDEN:
        return AccountReport(why_not="sizes that need no padding would be too large")
    found = accounts(x, case.shape, seq_len=case.seq_len, gbs=case.gbs, timeout_s=timeout_s)
    return AccountReport(rows=_rows(found))


def even_case(x: Layout[int], model: ModelShape | None = None) -> Case:
    """Return the small model that ``verify`` runs, in sizes at which no buffer is padded.

    Raises a ``MeshwrightError`` when the layout cannot run it.
    """
    case = prepare(x, model)
    small = case.shape
    shards = math.lcm(x.dp * x.cp, x.edp)
    unit = ALIGNMENT * shards
    # Biases and norms of single heads are as wide as heads.
    head_dim = unit if small.qk_norm or small.qkv_bias else ALIGNMENT
    mla, moe = small.mla, small.moe
    shared = small.num_kv_heads % (x.tp * cp_levels(x)[0]) != 0
    shape = replace(
        small,
        num_kv_heads=small.num_heads if shared else small.num_kv_heads,
        sinks=False,
        qk_norm="" if small.qk_norm == "whole" else small.qk_norm,
        hidden_size=unit * math.ceil(small.hidden_size / unit),
        head_dim=head_dim,
        ffn_hidden_size=unit * x.tp,
        vocab_size=WORD_ROWS * x.tp,
        lora_rank=0,
        mla=None
        if mla is None
        else replace(mla, q_lora_rank=unit if mla.q_lora_rank else 0, kv_lora_rank=unit),
        moe=None
        if moe is None
        else replace(
            moe,
            topk=moe.num_experts,
            num_groups=1,
            topk_groups=1,
            capacity_factor=0.0,
            aux_loss_coef=0.0,
            correction_bias=False,
            router_bias=False,
            ffn_hidden_size=unit * x.etp,
            shared_ffn_hidden_size=unit * x.tp if moe.shared_ffn_hidden_size else 0,
        ),
    )
    check_runnable(shape, x, seq_len=case.seq_len, gbs=case.gbs)
    return replace(case, shape=shape)


def _rows(entries: list[Entry]) -> tuple[AccountRow, ...]:
    """Join the lines of ranks that hold and send the same."""
    together: dict[Entry, list[int]] = {}
    for entry in entries:
        together.setdefault(replace(entry, rank=0), []).append(entry.rank)
    rows = [AccountRow(ranks=tuple(ranks), entry=entry) for entry, ranks in together.items()]
    return tuple(sorted(rows, key=lambda row: row.ranks))
