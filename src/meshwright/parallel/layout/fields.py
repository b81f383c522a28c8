"""The fields of a layout, and what follows from them alone."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Int = TypeVar("Int", int, Ints)

DEFAULT_ORDER = "tp-cp-ep-dp-pp"
"""Megatron's default order of ranks, innermost (fastest) first. Our notation throughout."""


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
