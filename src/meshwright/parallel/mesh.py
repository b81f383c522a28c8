"""Our order is innermost first, always: the ranks along the first axis of a mesh are neighbours.

A mesh is a list of axes, each a size and a stride over the same ranks; groups, coordinates and
"how many ranks of this group share a node" follow by arithmetic (CuTe's layout algebra). Dense and
expert parts of a model see two meshes over the same ranks (arXiv:2504.14960). The order of axes is
data, in Megatron's notation (leftmost fastest): ``tp-cp-ep-dp-pp``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, cast

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import LayoutError, did_you_mean
from meshwright.parallel.layout import (
    DEFAULT_ORDER,
    Int,
    Ints,
    Layout,
    layout,
    whole_number,
    written,
)

MOST_RANKS = 2**20
"""The largest world whose groups are written out rank by rank."""


@dataclass(frozen=True)
class Axis(Generic[Int]):
    """One axis of a mesh: ``size`` ranks, each ``stride`` ranks after the one before."""

    name: str
    size: Int
    stride: Int


@dataclass(frozen=True)
class Mesh(Generic[Int]):
    """Axes over the ranks of a world, innermost (smallest stride) first."""

    axes: tuple[Axis[Int], ...]

    def axis(self, name: str) -> Axis[Int]:
        """Return the axis called ``name``."""
        for axis in self.axes:
            if axis.name == name:
                return axis
        known = [axis.name for axis in self.axes]
        raise LayoutError("mesh.axis", name, "There is no such axis.", did_you_mean(name, known))


def dense_mesh(x: Layout[Int]) -> Mesh[Int]:
    """Return the mesh ``tp cp dp pp`` of the dense part, in the order of ``x.order``.

    stride of an axis = product of the sizes of the axes left of it in ``x.order``.

    Raises ``LayoutError`` when the order leaves out an axis larger than 1.
    """
    return _mesh(x.order, {"tp": x.tp, "cp": x.cp, "dp": x.dp, "pp": x.pp}, {})


def expert_mesh(x: Layout[Int]) -> Mesh[Int]:
    """Return the mesh ``etp ep edp pp`` of the experts: etp in the slot of tp, edp in that of dp.

    Context parallelism does not exist for experts; its ranks are part of ``edp``, ``ep``, ``etp``.

    Raises ``LayoutError`` when the order leaves out an axis larger than 1.
    """
    sizes = {"tp": x.etp, "ep": x.ep, "dp": x.edp, "pp": x.pp}
    return _mesh(x.order, sizes, {"tp": "etp", "dp": "edp"})


def _mesh(order: str, sizes: Mapping[str, Int], rename: Mapping[str, str]) -> Mesh[Int]:
    named = [name for name in _read_order(order) if name in sizes]
    absent = [name for name in sizes if name not in named]
    for name in absent:
        if np.any(np.asarray(sizes[name]) != 1):
            raise LayoutError(
                "layout.order",
                order,
                f"It leaves out {rename.get(name, name)} = {np.max(sizes[name])}; "
                "only axes of size 1 may be missing.",
                f"Write {order}-{name} or {DEFAULT_ORDER}.",
            )
    axes: list[Axis[Int]] = []
    stride = sizes["pp"] // sizes["pp"]
    for name in (*named, *absent):
        axes.append(Axis(rename.get(name, name), sizes[name], stride))
        stride = stride * sizes[name]
    return Mesh(tuple(axes))


@lru_cache
def _read_order(order: str) -> tuple[str, ...]:
    known = DEFAULT_ORDER.split("-")
    names = tuple(order.lower().split("-"))
    for name in names:
        if name not in known:
            remedy = f"Join {', '.join(known)} with '-', fastest first, as in {DEFAULT_ORDER}."
            raise LayoutError("layout.order", order, f"There is no axis {name!r}.", remedy)
    if len(set(names)) != len(names):
        raise LayoutError("layout.order", order, "An axis stands in it twice.", "Name it once.")
    return names


def pipelines_agree(x: Layout[Int]) -> Any:
    """Say whether both meshes have the pipeline groups that Megatron demands (a mask for a table).

    True when the order ends with pp, when pp = 1, or when dp = edp and pp has the same stride in
    both meshes. Ref: Megatron-LM, ``parallel_state.initialize_model_parallel``.
    """
    last = _read_order(x.order)[-1] == "pp"
    same_stride = dense_mesh(x).axis("pp").stride == expert_mesh(x).axis("pp").stride
    return last | (x.pp == 1) | ((x.dp == x.edp) & same_stride)


def world_size(mesh: Mesh[int]) -> int:
    """Return the number of ranks of a mesh."""
    return math.prod(axis.size for axis in mesh.axes)


def groups(mesh: Mesh[int], axes: Sequence[str]) -> list[list[int]]:
    """Return the groups of ranks that differ only in ``axes``.

    Ranks within a group, and groups among each other, run innermost first whatever the order in
    which ``axes`` are named, as in Megatron's ``generate_masked_orthogonal_rank_groups``.
    """
    chosen = {mesh.axis(name).name for name in axes}
    members = _offsets([axis for axis in mesh.axes if axis.name in chosen])
    first = _offsets([axis for axis in mesh.axes if axis.name not in chosen])
    return (first[:, None] + members[None, :]).tolist()


def _offsets(axes: list[Axis[int]]) -> Ints:
    offsets = np.zeros(1, dtype=np.int64)
    for axis in axes:
        steps = np.arange(axis.size, dtype=np.int64) * axis.stride
        offsets = (steps[:, None] + offsets[None, :]).ravel()
    return offsets


def coordinates(mesh: Mesh[int], rank: int) -> dict[str, int]:
    """Return where ``rank`` sits on each axis: rank // stride mod size."""
    world = world_size(mesh)
    if not 0 <= whole_number("rank", rank, low=0) < world:
        raise LayoutError("rank", rank, f"The mesh has {world} ranks.", f"Use 0 to {world - 1}.")
    return {axis.name: rank // axis.stride % axis.size for axis in mesh.axes}


def rank_of(mesh: Mesh[int], coordinates: Mapping[str, int]) -> int:
    """Return the rank at ``coordinates``: sum over axes of coordinate * stride (absent: 0)."""
    rank = 0
    for name, place in coordinates.items():
        axis = mesh.axis(name)
        if not 0 <= place < axis.size:
            rule = f"The axis has {axis.size} ranks."
            raise LayoutError(f"coordinates.{name}", place, rule, f"Use 0 to {axis.size - 1}.")
        rank += place * axis.stride
    return rank


def members_sharing(size: int, stride: int, block: int) -> int:
    """Return how many ranks of a group share a block (node, NVLink domain) in the worst place.

    The minimum, over all groups of an axis of ``size`` ranks at ``stride`` and over all blocks of
    ``block`` consecutive ranks that a group touches, of the members inside. It is counted:
    clip(block // stride, 1, size) promises too much when sizes do not divide each other.
    Exact for a world of whole blocks.
    """
    return _spread(size, stride, block)[0]


def blocks_spanned(size: int, stride: int, block: int) -> int:
    """Return how many blocks of ``block`` ranks the widest group of an axis touches."""
    return _spread(size, stride, block)[1]


@lru_cache(maxsize=1 << 16)
def _spread(size: int, stride: int, block: int) -> tuple[int, int]:
    if size == 1 or stride >= block:
        return 1, size
    # Groups start at base + k*size*stride with base < stride; only the start modulo block counts.
    period = math.gcd(size * stride, block)
    starts = np.arange(block, dtype=np.int64)
    starts = starts[starts % period < stride]
    last_block = (int(starts[-1]) + (size - 1) * stride) // block
    edges = np.arange(last_block + 2, dtype=np.int64) * block
    below = np.clip(-((starts[:, None] - edges) // stride), 0, size)
    inside = np.diff(below, axis=1)
    touched = inside > 0
    return int(inside[touched].min()), int(touched.sum(axis=1).max())


def members_sharing_columns(size: Ints, stride: Ints, block: int | Ints) -> Ints:
    """Return ``members_sharing`` row by row, counted once per distinct (size, stride, block)."""
    return _by_distinct(members_sharing, size, stride, block)


def blocks_spanned_columns(size: Ints, stride: Ints, block: int | Ints) -> Ints:
    """Return ``blocks_spanned`` row by row, counted once per distinct (size, stride, block)."""
    return _by_distinct(blocks_spanned, size, stride, block)


def _by_distinct(
    count: Callable[[int, int, int], int], size: Ints, stride: Ints, block: int | Ints
) -> Ints:
    # Three degrees packed into one key; a single block size takes no room in it.
    low = 0 if isinstance(block, int) else int(block.max(initial=0))
    strides, blocks = int(stride.max(initial=0)) + 1, low + 1
    key = size * strides + stride
    if low:
        key = key * blocks + block
    distinct, at = _distinct(key)
    counted = np.empty(len(distinct), dtype=np.int64)
    for row, packed in enumerate(distinct):
        pair, varying = divmod(packed, blocks)
        s, t = divmod(pair, strides)
        counted[row] = count(s, t, block if isinstance(block, int) else varying)
    return counted.take(at)


def _distinct(keys: Ints) -> tuple[list[int], NDArray[np.int64]]:
    """Return the distinct keys and where each row's stands among them.

    A table indexed by key is many times faster than the sort of ``np.unique``, while it is small.
    """
    top = int(keys.max(initial=0)) + 1
    if top > 1 << 22:
        values, at = np.unique(keys, return_inverse=True)
        return values.tolist(), at
    place = np.zeros(top, dtype=np.int64)
    place[keys] = 1
    values = np.flatnonzero(place)
    place[values] = np.arange(len(values))
    return values.tolist(), place.take(keys)


def rank_groups(
    gpus: int,
    tp: int = 1,
    cp: int = 1,
    pp: int = 1,
    ep: int = 1,
    etp: int | None = None,
    order: str = DEFAULT_ORDER,
    hierarchical_cp: Sequence[int] | None = None,
    vpp: int | None = 1,
) -> dict[str, list[list[int]]]:
    """Return every process group of a launch, by name, as Megatron-LM builds them.

    ``etp=None`` means ``tp``. ``hcp_level0``, ``hcp_level1``, ... split each cp group by
    ``hierarchical_cp``, innermost first.

    Raises ``LayoutError`` when the degrees do not fit the GPUs or each other.
    Ref: Megatron-LM, ``parallel_state.initialize_model_parallel``.
    """
    x = layout(
        tp=tp,
        cp=cp,
        pp=pp,
        vpp=1 if vpp is None else vpp,
        ep=ep,
        etp=tp if etp is None else etp,
        gpus=gpus,
        order=written("layout.order", order),
        hierarchical_cp=_levels(hierarchical_cp),
    )
    _check_groups(x)
    dense, expert = dense_mesh(x), expert_mesh(x)
    found = {name: groups(dense, axes) for name, axes in _DENSE_GROUPS.items()}
    found |= {name: groups(expert, axes) for name, axes in _EXPERT_GROUPS.items()}
    found["embedding"] = [[g[0], g[-1]] if len(g) > 1 else g for g in found["pp"]]
    found["position_embedding"] = [g[:1] for g in found["pp"]]
    return found | _hierarchical_cp_groups(found["cp"], x.hierarchical_cp or ())


def _levels(hierarchical_cp: object) -> tuple[int, ...] | None:
    if hierarchical_cp is None:
        return None
    if not isinstance(hierarchical_cp, list | tuple):
        rule = "It is a list of sizes, innermost first."
        raise LayoutError("layout.hierarchical_cp", hierarchical_cp, rule, "Write [2, 2].")
    sizes = cast("Sequence[object]", hierarchical_cp)
    return tuple(whole_number("layout.hierarchical_cp", size) for size in sizes)


_DENSE_GROUPS = {
    "tp": ("tp",),
    "cp": ("cp",),
    "dp": ("dp",),
    "pp": ("pp",),
    "dp_cp": ("dp", "cp"),
    "tp_cp": ("tp", "cp"),
    "tp_dp": ("tp", "dp"),
    "tp_dp_cp": ("tp", "dp", "cp"),
    "mp": ("tp", "pp"),
}
_EXPERT_GROUPS = {
    "ep": ("ep",),
    "etp": ("etp",),
    "etp_ep": ("etp", "ep"),
    "edp": ("edp",),
    "etp_ep_pp": ("etp", "ep", "pp"),
}


def _check_groups(x: Layout[int]) -> None:
    if x.world_size > MOST_RANKS:
        rule = f"Groups are written out for worlds up to {MOST_RANKS} ranks."
        raise LayoutError("layout.world_size", x.world_size, rule, f"Use at most {MOST_RANKS}.")
    if x.vpp > 1 and x.pp == 1:
        rule = "Interleaving needs pipeline parallelism (pp > 1)."
        raise LayoutError("layout.vpp", x.vpp, rule, "Use vpp=1, or pp=2.")
    if not pipelines_agree(x):
        raise LayoutError(
            "layout.order",
            x.order,
            "Where pp is not last, both meshes must have the same pipelines: "
            f"tp*cp = {x.tp * x.cp} must equal ep*etp = {x.ep * x.etp}, over the same ranks.",
            f"Use {DEFAULT_ORDER}.",
        )
    if x.hierarchical_cp is not None and math.prod(x.hierarchical_cp) != x.cp:
        product = "*".join(map(str, x.hierarchical_cp))
        raise LayoutError(
            "layout.hierarchical_cp",
            x.hierarchical_cp,
            f"The product of the levels, {product} = {math.prod(x.hierarchical_cp)}, is not cp.",
            f"Choose levels whose product is {x.cp}, or leave it out.",
        )


def _hierarchical_cp_groups(
    cp_groups: list[list[int]], levels: tuple[int, ...]
) -> dict[str, list[list[int]]]:
    found: dict[str, list[list[int]]] = {}
    inner = 1
    for depth, size in enumerate(levels):
        found[f"hcp_level{depth}"] = [
            group[outer + start : outer + start + size * inner : inner]
            for group in cp_groups
            for outer in range(0, len(group), size * inner)
            for start in range(inner)
        ]
        inner *= size
    return found
