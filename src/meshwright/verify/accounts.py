"""What the runtime holds and sends against what the cost model says, rank by rank, in bytes.

A step of a small model runs under the layout while every message is counted below the runtime
(``traffic``). What the cost model prices of the same model and layout stands beside it
(``priced``), and so does what the runtime knowingly does otherwise.
"""

# torch annotates some functions only in part.
# pyright: reportUnknownMemberType=false
from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from meshwright.parallel.layout import Layout, Zero
from meshwright.runtime.engine import Engine, Settings
from meshwright.runtime.groups import Groups
from meshwright.runtime.launch import run_ranks
from meshwright.runtime.shape import ModelShape
from meshwright.verify.described import described
from meshwright.verify.priced import differences, priced, runtime_job
from meshwright.verify.traffic import Ledger, Ranks


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of a rank's account: what is sent along an axis in a step, or held.

    ``priced_bytes`` is the cost model's number, ``different_bytes`` what the runtime is known to do
    beyond it (negative: less). Axes whose groups are the same ranks share a line.
    """

    rank: int
    what: str
    runtime_bytes: float
    priced_bytes: float
    different_bytes: float

    @property
    def unexplained_bytes(self) -> float:
        """What neither the price nor a known difference accounts for."""
        return self.runtime_bytes - self.priced_bytes - self.different_bytes


@dataclass(frozen=True, kw_only=True)
class _Measured:
    """What one rank sent to each group, the groups of each axis, and what it holds."""

    pp_rank: int
    sent: dict[Ranks, float]
    axes: dict[str, list[Ranks]]
    held: dict[str, float]


def accounts(
    x: Layout[int], shape: ModelShape, *, seq_len: int, gbs: int, timeout_s: float = 120.0
) -> list[Entry]:
    """Run one step in float32 and return every rank's account.

    Collectives are those of the library (``Settings.direct`` off), as on GPUs. Routing decides what
    experts are sent: bytes are equal where it is balanced, as the cost model assumes.

    Raises ``LaunchError`` when a rank fails.
    """
    # Entering a dispatch mode imports it, 1.3 s: once here, not in every rank.
    importlib.import_module("torch._dynamo")
    measured = run_ranks(x.world_size, _run_rank, x, shape, seq_len, gbs, timeout_s=timeout_s)
    model, job = described(shape), runtime_job(seq_len, gbs, "fp32")
    said, other = priced(model, job, x), differences(model, job, x)
    found: list[Entry] = []
    for rank, one in enumerate(cast("list[_Measured]", measured)):
        sent, beyond = said.sent[one.pp_rank], other[one.pp_rank]
        for axes, ranks in _lines(one.axes):
            found.append(
                Entry(
                    rank=rank,
                    what=f"sent along {', '.join(axes)}",
                    runtime_bytes=sum(one.sent.get(r, 0.0) for r in ranks),
                    priced_bytes=sum(sent.get(axis, 0.0) for axis in axes),
                    different_bytes=sum(beyond.get(axis, 0.0) for axis in axes),
                )
            )
        for term, size in one.held.items():
            found.append(
                Entry(
                    rank=rank,
                    what=term,
                    runtime_bytes=size,
                    priced_bytes=said.held[one.pp_rank][term],
                    different_bytes=0.0,
                )
            )
    return found


def _run_rank(rank: int, x: Layout[int], shape: ModelShape, seq_len: int, gbs: int) -> _Measured:
    engine = Engine(shape, x, Settings(seq_len=seq_len, gbs=gbs, direct=False), rank=rank)
    generator = torch.Generator().manual_seed(0)
    batch = torch.randint(0, shape.vocab_size, (gbs, seq_len + 1), generator=generator)
    with Ledger() as ledger:
        engine.step(engine.own_rows(batch))
    groups = engine.context.groups
    return _Measured(
        pp_rank=groups.pp.index,
        sent=ledger.sent_bytes(),
        axes=_axes(groups),
        held=_held(engine),
    )


def _axes(g: Groups) -> dict[str, list[Ranks]]:
    """Return the groups that each axis of the cost model talks in."""
    axes = {
        "tp": (g.tp,),
        "cp": (g.cp_inner, g.cp_outer),
        "ep": (g.etp_ep,),
        "pp": (g.pp,),
        "dp": (g.shard, g.replicate),
        "edp": (g.expert_shard, g.expert_replicate),
        "tied": (g.tied,),
    }
    return {
        name: [frozenset(group.ranks) for group in held if group.size > 1]
        for name, held in axes.items()
    }


def _lines(axes: dict[str, list[Ranks]]) -> list[tuple[list[str], set[Ranks]]]:
    """Join axes that share a group: what travels in it cannot be told apart by its ranks."""
    lines: list[tuple[list[str], set[Ranks]]] = []
    for name, groups in axes.items():
        names, ranks = [name], set(groups)
        for line in [line for line in lines if line[1] & ranks]:
            lines.remove(line)
            names, ranks = [*line[0], *names], ranks | line[1]
        lines.append((names, ranks))
    return [line for line in lines if line[1]]


def _held(engine: Engine) -> dict[str, float]:
    """Return the bytes of the storages that live from step to step, each counted once."""
    buffers = engine.dp.buffers
    sharded = engine.dp.zero == Zero.optim_grads_params
    trained = [b for b in buffers if b.trainable]
    # Sharded float32 weights are their own master weights.
    weights = [b.master if sharded else b.data for b in buffers]
    grads = [b.grad_range for b in trained] + [b.grad for b in trained if b.grad is not None]
    masters = [b.master for b in trained if not (b.aliased or sharded)]
    moments = [
        m for moment in engine.optimizer.moments for m in (moment.exp_avg, moment.exp_avg_sq)
    ]
    return {
        "weights_bytes": _storage_bytes(weights),
        "grads_bytes": _storage_bytes(grads),
        "optimizer_bytes": _storage_bytes([*masters, *moments]),
    }


def _storage_bytes(tensors: Iterable[Tensor]) -> float:
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
    return float(sum(storages.values()))
