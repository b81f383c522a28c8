"""Meshes: groups, coordinates and node sharing."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import meshwright
from meshwright.errors import LayoutError
from meshwright.parallel.layout import layout, table
from meshwright.parallel.mesh import (
    Axis,
    Mesh,
    blocks_spanned,
    blocks_spanned_columns,
    coordinates,
    dense_mesh,
    expert_mesh,
    groups,
    members_sharing,
    members_sharing_columns,
    pipelines_agree,
    rank_groups,
    rank_of,
    world_size,
)
from oracles import rows

# Options of Megatron-LM that a layout does not have: they change groups, or add refusals.
OUTSIDE = ("gtp_remat_size", "expert_gtp_remat_size", "num_distributed_optimizer_instances")
GROUPS = rows("groups.jsonl.gz")
INSIDE = [r for r in GROUPS if not any(r["layout"].get(key) for key in OUTSIDE)]

sizes = st.integers(1, 6)
orders = st.permutations(["tp", "cp", "dp", "pp"])


def arguments(oracle: dict[str, Any]) -> dict[str, Any]:
    given = {k: v for k, v in oracle["layout"].items() if k not in (*OUTSIDE, "hybrid_cp")}
    given["gpus"] = given.pop("world_size")
    return given


@st.composite
def meshes(draw: st.DrawFn) -> Mesh[int]:
    names = draw(orders)
    axes, stride = [], 1
    for name in names:
        axes.append(Axis(name, draw(sizes), stride))
        stride *= axes[-1].size
    return Mesh(tuple(axes))


@pytest.mark.parametrize("oracle", [r for r in INSIDE if r["accepted"]], ids=lambda r: r["id"])
def test_rank_groups_are_those_of_megatron(oracle: dict[str, Any]) -> None:
    """Provenance: spec (Megatron-LM)."""
    found = rank_groups(**arguments(oracle))
    known = {k for k in oracle["groups"] if k in found}
    assert known == set(found)
    for key in known:
        truth = oracle["groups"][key]
        text = json.dumps(found[key], separators=(",", ":"))
        assert hashlib.sha256(text.encode()).hexdigest() == truth["sha256"], key
        assert len(found[key]) == truth["num_groups"]
        assert sorted({len(group) for group in found[key]}) == truth["sizes"]
        if "groups" in truth:
            assert found[key] == truth["groups"]


def test_every_layout_that_megatron_refuses_is_refused() -> None:
    """Provenance: spec (Megatron-LM). Hybrid context parallelism is not part of a layout."""
    refused = [r for r in INSIDE if not r["accepted"] and "Hybrid" not in r["error"]]
    assert len(refused) > 20
    for oracle in refused:
        with pytest.raises(LayoutError):
            rank_groups(**arguments(oracle))


def test_accepted_worlds_are_those_of_megatron() -> None:
    """Provenance: spec (Megatron-LM)."""
    for row in rows("min_world.csv"):
        degrees = {k: int(row[k]) for k in ("tp", "cp", "pp", "ep", "etp")}
        accepted = set(map(int, row["accepted_world_sizes"].split()))
        for gpus in range(1, int(row["tested_world_sizes_up_to"]) + 1):
            try:
                x = layout(**degrees, gpus=gpus, order=row["order"])
                works = bool(pipelines_agree(x))
            except LayoutError:
                works = False
            assert works == (gpus in accepted), (row, gpus)


@given(meshes(), st.sets(st.sampled_from(["tp", "cp", "dp", "pp"])))
def test_groups_over_any_axes_part_the_world(mesh: Mesh[int], axes: set[str]) -> None:
    """Provenance: law."""
    found = groups(mesh, sorted(axes))
    assert sorted(rank for group in found for rank in group) == list(range(world_size(mesh)))
    size = math.prod(mesh.axis(name).size for name in axes)
    assert all(len(group) == size for group in found)
    for group in found:
        outside = [{k: v for k, v in coordinates(mesh, r).items() if k not in axes} for r in group]
        assert all(place == outside[0] for place in outside)
        assert group == sorted(group)


@given(meshes(), st.data())
def test_a_rank_and_its_coordinates_say_the_same(mesh: Mesh[int], data: st.DataObject) -> None:
    """Provenance: law."""
    rank = data.draw(st.integers(0, world_size(mesh) - 1))
    assert rank_of(mesh, coordinates(mesh, rank)) == rank


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12))
def test_node_sharing_equals_counting_every_group(size: int, stride: int, block: int) -> None:
    """Provenance: law."""
    world = math.lcm(size * stride, block)
    counts = [
        Counter((base + start + i * stride) // block for i in range(size))
        for base in range(0, world, size * stride)
        for start in range(stride)
    ]
    assert members_sharing(size, stride, block) == min(min(c.values()) for c in counts)
    assert blocks_spanned(size, stride, block) == max(len(c) for c in counts)


def test_node_sharing_of_powers_of_two_is_the_quotient() -> None:
    """Provenance: law."""
    for size in (1, 2, 4, 8, 64):
        for stride in (1, 2, 8, 32):
            expected = min(max(8 // stride, 1), size)
            assert members_sharing(size, stride, 8) == expected


def test_three_ranks_do_not_fill_nodes_of_eight() -> None:
    """Provenance: law. The quotient would promise 3: ranks 6, 7 and 8 span two nodes."""
    assert members_sharing(3, 1, 8) == 1
    assert blocks_spanned(3, 1, 8) == 2


@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 4, 8])), max_size=30
    )
)
def test_columns_of_node_sharing_equal_the_rows(cells: list[tuple[int, int, int]]) -> None:
    """Provenance: ours."""
    size, stride, block = np.array(cells, dtype=np.int64).reshape(-1, 3).T
    expected = [members_sharing(*map(int, cell)) for cell in cells]
    assert members_sharing_columns(size, stride, block).tolist() == expected
    spanned = [blocks_spanned(int(s), int(t), 8) for s, t, _ in cells]
    assert blocks_spanned_columns(size, stride, 8).tolist() == spanned


def test_columns_of_node_sharing_work_for_huge_worlds() -> None:
    """Provenance: ours. Keys too large for a table are sorted instead."""
    size, stride = np.array([2**20, 3, 3]), np.array([8, 2**20, 2**20])
    assert members_sharing_columns(size, stride, 16).tolist() == [2, 1, 1]


def test_meshes_of_a_table_are_those_of_its_rows() -> None:
    """Provenance: ours."""
    layouts = [layout(tp=t, cp=c, pp=p, ep=e, dp=4) for t, c, p, e in [(2, 2, 2, 4), (4, 1, 1, 8)]]
    for mesh in (dense_mesh, expert_mesh):
        columns = mesh(table(layouts))
        for i, x in enumerate(layouts):
            row = [(a.name, int(a.size[i]), int(a.stride[i])) for a in columns.axes]
            assert row == [(a.name, a.size, a.stride) for a in mesh(x).axes]


def test_both_meshes_cover_the_same_ranks_innermost_first() -> None:
    """Provenance: spec (arXiv:2504.14960)."""
    x = layout(tp=2, cp=2, dp=4, pp=2, ep=8, etp=1)
    assert [(a.name, a.stride) for a in dense_mesh(x).axes] == [
        ("tp", 1),
        ("cp", 2),
        ("dp", 4),
        ("pp", 16),
    ]
    assert [(a.name, a.size, a.stride) for a in expert_mesh(x).axes] == [
        ("etp", 1, 1),
        ("ep", 8, 1),
        ("edp", 2, 8),
        ("pp", 2, 16),
    ]
    assert world_size(dense_mesh(x)) == world_size(expert_mesh(x)) == 32


def test_an_order_may_leave_out_axes_of_size_one_only() -> None:
    """Provenance: spec (Megatron-LM)."""
    assert rank_groups(4, tp=2, order="tp-dp")["tp"] == [[0, 1], [2, 3]]
    with pytest.raises(LayoutError, match="leaves out cp = 2"):
        rank_groups(4, tp=2, cp=2, order="tp-dp")
    with pytest.raises(LayoutError, match="leaves out ep = 2"):
        rank_groups(4, ep=2, order="tp-dp")


def test_a_table_with_a_missing_axis_is_refused_when_any_row_needs_it() -> None:
    """Provenance: ours."""
    x = table([layout(tp=1, dp=4, order="tp-dp-pp"), layout(cp=2, dp=2, order="tp-dp-pp")])
    with pytest.raises(LayoutError, match="leaves out cp"):
        dense_mesh(x)


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"gpus": 6, "tp": 4}, "layout.tp"),
        ({"gpus": 0}, "layout.gpus"),
        ({"gpus": -8}, "layout.gpus"),
        ({"gpus": 2**40}, "layout.gpus"),
        ({"gpus": 2**30}, "layout.world_size"),
        ({"gpus": "8"}, "layout.gpus"),
        ({"gpus": 8, "tp": 2.0}, "layout.tp"),
        ({"gpus": 8, "tp": True}, "layout.tp"),
        ({"gpus": 8, "order": 3}, "layout.order"),
        ({"gpus": 8, "order": "tp-dp-xx"}, "layout.order"),
        ({"gpus": 8, "order": "tp-tp-dp"}, "layout.order"),
        ({"gpus": 8, "cp": 4, "hierarchical_cp": [2, 4]}, "layout.hierarchical_cp"),
        ({"gpus": 8, "cp": 4, "hierarchical_cp": 4}, "layout.hierarchical_cp"),
        ({"gpus": 8, "cp": 4, "hierarchical_cp": [2, None]}, "layout.hierarchical_cp"),
        ({"gpus": 8, "vpp": 2}, "layout.vpp"),
        ({"gpus": 8, "pp": 2, "ep": 4, "order": "tp-cp-ep-pp-dp"}, "layout.order"),
    ],
)
def test_a_layout_that_cannot_be_names_field_rule_and_remedy(
    wrong: dict[str, Any], field: str
) -> None:
    """Provenance: ours."""
    with pytest.raises(meshwright.MeshwrightError) as error:
        meshwright.rank_groups(**wrong)
    assert error.value.field == field
    assert error.value.rule
    assert error.value.remedy


@given(meshes())
def test_a_rank_or_a_place_outside_the_mesh_is_refused(mesh: Mesh[int]) -> None:
    """Provenance: ours."""
    assume(world_size(mesh) > 1)
    with pytest.raises(LayoutError):
        coordinates(mesh, world_size(mesh))
    with pytest.raises(LayoutError):
        rank_of(mesh, {"tp": mesh.axis("tp").size})
    with pytest.raises(LayoutError, match="Did you mean"):
        groups(mesh, ["tpp"])
