"""Process groups of one rank, built from the planner's own mesh algebra and passed as arguments."""

# torch annotates some functions only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportIncompatibleMethodOverride=false
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch.distributed as dist

from meshwright.errors import LayoutError
from meshwright.parallel.cp_levels import most_square_level
from meshwright.parallel.layout import CpComm, Layout, Zero
from meshwright.parallel.mesh import dense_mesh, expert_mesh, groups


@dataclass(frozen=True)
class Group:
    """The ranks that communicate over an axis, and where this rank stands among them.

    ``handle`` is ``None`` for a group of one, which never communicates. ``direct``: over gloo,
    where messages between the ranks are cheaper than the library's collectives.
    """

    ranks: tuple[int, ...]
    index: int
    handle: dist.ProcessGroup | None = None
    direct: bool = False

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Every group that one rank belongs to.

    ``shard`` and ``replicate`` split ``dp x cp`` as ZeRO shards it (``expert_*`` split ``edp``).
    ``cp_inner`` and ``cp_outer`` are the levels of hierarchical context parallelism (all-to-all
    inside, ring outside). ``kv`` are the TP ranks that hold the same KV head. ``up`` and ``down``
    are the pipeline group twice: one for messages to higher ranks, one for messages to lower ones,
    so that on NCCL a send never waits behind a receive.
    """

    rank: int
    world: Group
    tp: Group
    cp: Group
    dp: Group
    pp: Group
    up: Group
    down: Group
    dp_cp: Group
    tp_cp: Group
    etp_ep: Group
    edp: Group
    shard: Group
    replicate: Group
    expert_shard: Group
    expert_replicate: Group
    cp_inner: Group
    cp_outer: Group
    kv: Group
    tied: Group
    ep_index: int
    etp_index: int
    etp_ep_places: tuple[tuple[int, int], ...]


class _Maker:
    """Creates process groups, each distinct list of ranks once (``name`` keeps copies apart)."""

    def __init__(self, rank: int, direct: bool) -> None:
        self.rank, self.direct = rank, direct
        self.made: dict[tuple[str, tuple[int, ...]], Group] = {}

    def make(self, lists: Sequence[Sequence[int]], name: str = "") -> Group:
        ranks = tuple(next(ranks for ranks in lists if self.rank in ranks))
        key = (name, tuple(sorted(ranks)))
        if key not in self.made:
            handle = None
            if len(ranks) > 1:
                handle = dist.new_group(
                    list(ranks), use_local_synchronization=True, group_desc=name or None
                )
            assert not isinstance(handle, int)
            direct = self.direct and handle is not None and dist.get_backend(handle) == "gloo"
            self.made[key] = Group(ranks, ranks.index(self.rank), handle, direct)
        return replace(self.made[key], ranks=ranks, index=ranks.index(self.rank))


def build_groups(
    x: Layout[int], rank: int, *, num_kv_heads: int, tied_stages: list[int], direct: bool = True
) -> Groups:
    """Create the groups of ``rank`` in a running world (or none at all in a world of one).

    ``tied_stages`` are the pipeline ranks that hold a copy of the token embedding. ``direct``
    allows collectives over gloo to be messages between the ranks.
    """
    maker = _Maker(rank, direct)
    dense, expert = dense_mesh(x), expert_mesh(x)

    def of(*axes: str) -> list[list[int]]:
        return groups(dense, axes)

    dp_cp, edp, cp = of("dp", "cp"), groups(expert, ["edp"]), of("cp")
    pp = of("pp")
    copies = 1 if x.zero == Zero.no_shard else x.dp_replicate
    inner = cp_levels(x)[0]
    same_kv = max(1, x.tp // num_kv_heads)
    etp_ep = maker.make(groups(expert, ["etp", "ep"]))
    ep_axis, etp_axis = expert.axis("ep"), expert.axis("etp")
    places = tuple(
        (r // ep_axis.stride % ep_axis.size, r // etp_axis.stride % etp_axis.size)
        for r in etp_ep.ranks
    )
    whole = x.zero == Zero.no_shard
    return Groups(
        rank=rank,
        world=maker.make([range(x.world_size)]),
        tp=maker.make(of("tp")),
        cp=maker.make(cp),
        dp=maker.make(of("dp")),
        pp=maker.make(pp),
        up=maker.make(pp, "up"),
        down=maker.make(pp, "down"),
        dp_cp=maker.make(dp_cp),
        tp_cp=maker.make(of("tp", "cp")),
        etp_ep=etp_ep,
        edp=maker.make(edp),
        shard=maker.make(_singles(dp_cp) if whole else _blocks(dp_cp, copies)),
        replicate=maker.make(dp_cp if whole else _strided(dp_cp, copies)),
        expert_shard=maker.make(_singles(edp) if whole else _blocks(edp, copies)),
        expert_replicate=maker.make(edp if whole else _strided(edp, copies)),
        cp_inner=maker.make([g[i : i + inner] for g in cp for i in range(0, len(g), inner)]),
        cp_outer=maker.make([g[i::inner] for g in cp for i in range(inner)]),
        kv=maker.make([g[i : i + same_kv] for g in of("tp") for i in range(0, x.tp, same_kv)]),
        tied=maker.make(_tied(pp, tied_stages)),
        ep_index=places[etp_ep.index][0],
        etp_index=places[etp_ep.index][1],
        etp_ep_places=places,
    )


def _tied(pp: list[list[int]], tied_stages: list[int]) -> list[list[int]]:
    together = [[g[i] for i in tied_stages] for g in pp]
    alone = [[g[i]] for g in pp for i in range(len(g)) if i not in tied_stages]
    return [*together, *alone]


def _singles(lists: list[list[int]]) -> list[list[int]]:
    return [[rank] for ranks in lists for rank in ranks]


def _blocks(lists: list[list[int]], copies: int) -> list[list[int]]:
    return [g[i : i + len(g) // copies] for g in lists for i in range(0, len(g), len(g) // copies)]


def _strided(lists: list[list[int]], copies: int) -> list[list[int]]:
    return [g[i :: len(g) // copies] for g in lists for i in range(len(g) // copies)]


def cp_levels(x: Layout[int]) -> tuple[int, int]:
    """Return the ranks of the inner all-to-all group and of the outer ring: A * R = CP.

    ``a2a`` is all inside, ``p2p`` and ``all_gather`` all outside; ``a2a+p2p`` takes
    ``hierarchical_cp``, or the most square split.

    Raises ``LayoutError`` when there are not two levels whose product is CP.
    """
    if x.cp_comm == CpComm.a2a:
        return x.cp, 1
    if x.cp_comm != CpComm.a2a_p2p:
        return 1, x.cp
    levels = x.hierarchical_cp
    if levels is None:
        inner = most_square_level(x.cp)
        return inner, x.cp // inner
    if len(levels) != 2 or math.prod(levels) != x.cp:
        raise LayoutError(
            "layout.hierarchical_cp",
            "x".join(map(str, levels)),
            f"The runtime splits cp = {x.cp} into two levels: all-to-all inside, ring outside.",
            f"Write two numbers whose product is {x.cp}.",
        )
    return levels[0], levels[1]
