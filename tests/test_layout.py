"""Layouts: their text, their tables and the worlds they need."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.errors import LayoutError
from meshwright.parallel.layout import (
    COLUMNS,
    CpComm,
    Layout,
    Pipeline,
    Recompute,
    Zero,
    check_world_size,
    concatenate,
    from_text,
    layout,
    minimum_world_size,
    num_rows,
    recompute_from_text,
    recompute_to_text,
    row,
    table,
    take,
    to_dict,
    to_text,
    with_columns,
)

small = st.sampled_from([1, 2, 3, 4, 8])
modules = st.sets(st.sampled_from([m for m in Recompute if 0 < m < Recompute.full]))


@st.composite
def recomputes(draw: st.DrawFn) -> tuple[Recompute, int]:
    kind = draw(st.sampled_from(["modules", "full", "uniform", "block"]))
    if kind == "modules":
        return Recompute(sum(draw(modules))), 0
    if kind == "full":
        return Recompute.full, 0
    if kind == "uniform":
        return Recompute.full, draw(st.integers(2, 9))
    return Recompute.full | Recompute.block, draw(st.integers(1, 9))


@st.composite
def layouts(draw: st.DrawFn, shared: bool = False) -> Layout[int]:
    degrees = {name: draw(small) for name in ("tp", "cp", "pp", "vpp", "ep", "etp", "mbs")}
    unit = minimum_world_size(*(degrees[k] for k in ("tp", "cp", "pp", "ep", "etp")))
    recompute, num_layers = draw(recomputes())
    text_only: dict[str, Any] = {}
    if not shared:
        text_only["pipeline_layout"] = draw(st.sampled_from([None, "Et*3|(tt|)*4,m|L"]))
        text_only["hierarchical_cp"] = draw(st.sampled_from([None, (2, 2)]))
        text_only["order"] = draw(st.sampled_from(["tp-cp-ep-dp-pp", "tp-cp-ep-pp-dp"]))
    return layout(
        **degrees,
        gpus=unit * draw(small),
        sp=draw(st.booleans()),
        zero=draw(st.sampled_from(list(Zero))),
        recompute=recompute,
        recompute_num_layers=num_layers,
        schedule=draw(st.sampled_from(list(Pipeline))),
        cp_comm=draw(st.sampled_from(list(CpComm))),
        first=draw(st.integers(0, 3)),
        last=draw(st.integers(0, 3)),
        account_for_embedding=draw(st.booleans()),
        account_for_loss=draw(st.booleans()),
        microbatch_group_size=draw(st.integers(0, 3)),
        **text_only,
    )


def same(a: Layout[int], b: Layout[int]) -> bool:
    names = (*COLUMNS, "order", "pipeline_layout", "hierarchical_cp")
    return all(getattr(a, name) == getattr(b, name) for name in names)


@given(layouts())
def test_a_layout_survives_its_own_text(x: Layout[int]) -> None:
    """Provenance: law (the contract between commands)."""
    assert same(from_text(to_text(x)), x)
    assert same(from_text(to_text(x).replace(" ", ", ")), x)


@given(layouts())
def test_both_meshes_hold_the_same_number_of_ranks(x: Layout[int]) -> None:
    """Provenance: law (arXiv:2504.14960)."""
    assert x.tp * x.cp * x.dp == x.etp * x.ep * x.edp
    assert x.world_size == x.tp * x.cp * x.dp * x.pp


@given(st.lists(layouts(shared=True), min_size=1, max_size=5), st.data())
def test_a_table_holds_its_rows(rows: list[Layout[int]], data: st.DataObject) -> None:
    """Provenance: ours."""
    x = table(rows)
    assert num_rows(x) == len(rows)
    assert all(same(row(x, i), rows[i]) for i in range(len(rows)))
    assert x.world_size.tolist() == [r.world_size for r in rows]
    assert x.edp.tolist() == [r.edp for r in rows]
    index = data.draw(st.lists(st.integers(0, len(rows) - 1)))
    picked = take(x, np.array(index, dtype=np.int64))
    assert picked.tp.tolist() == [rows[i].tp for i in index]
    assert num_rows(concatenate([x, x])) == 2 * len(rows)
    assert with_columns(x, mbs=7).mbs.tolist() == [7] * len(rows)


def test_columns_are_read_only() -> None:
    """Provenance: ours."""
    with pytest.raises(ValueError, match="read-only"):
        table([layout(tp=2)]).tp[0] = 3


def test_rows_of_one_table_share_what_has_no_column() -> None:
    """Provenance: ours."""
    with pytest.raises(LayoutError, match="share order"):
        table([layout(), layout(order="tp-dp-pp")])


@given(small, small, small, small, small, st.integers(1, 600))
def test_accepted_worlds_are_multiples_of_the_least_common_one(
    tp: int, cp: int, pp: int, ep: int, etp: int, gpus: int
) -> None:
    """Provenance: spec (Megatron-LM: PP * lcm(TP*CP, EP*ETP))."""
    unit = minimum_world_size(tp, cp, pp, ep, etp)
    assert unit == pp * math.lcm(tp * cp, ep * etp)
    try:
        check_world_size(gpus, tp=tp, cp=cp, pp=pp, ep=ep, etp=etp)
    except LayoutError as error:
        assert gpus % unit
        assert f"{(gpus // unit + 1) * unit}" in error.remedy
    else:
        assert gpus % unit == 0


def test_the_least_common_multiple_not_the_maximum_is_needed() -> None:
    """Provenance: law. TP*CP = 6 and EP = 4 need 12 ranks."""
    assert minimum_world_size(6, 1, 1, 4, 1) == 12
    assert (layout(tp=6, ep=4).dp, layout(tp=6, ep=4).edp) == (2, 3)


def test_deepseek_v3_needs_1024_gpus_at_ep_64() -> None:
    """Provenance: paper (arXiv:2504.14960, and the contradiction of three guides)."""
    x = layout(tp=2, pp=16, ep=64)
    assert (x.world_size, x.dp, x.edp) == (1024, 32, 1)
    with pytest.raises(LayoutError, match="1024 GPUs"):
        layout(tp=2, pp=16, ep=64, gpus=256)


@pytest.mark.parametrize("text", ["", "  ", ",", "tp=1"])
def test_an_empty_text_is_the_smallest_layout(text: str) -> None:
    """Provenance: ours."""
    assert same(from_text(text), layout())


def test_chunks_left_out_are_those_that_the_rest_spells_out() -> None:
    """Provenance: spec (Megatron-LM derives them from the layout; ZB-V has two)."""
    x = from_text("pp=2 pipeline_layout=Ett|tt|t,m|L")
    assert (x.vpp, x.schedule) == (2, Pipeline.interleaved)
    assert from_text("pp=2 pipeline_layout=Ett|ttL").vpp == 1
    assert from_text("pp=4 pipeline_layout=Ett|ttL").vpp == 1
    assert from_text("pp=4 schedule=zb_v").vpp == 2
    assert from_text("pp=2 vpp=1 pipeline_layout=Ett|tt|t|L").vpp == 1
    with pytest.raises(LayoutError, match="no meaning"):
        from_text("pp=2 pipeline_layout=Ett|xxL")


def test_defaults_follow_the_degrees() -> None:
    """Provenance: spec (the contract)."""
    assert layout(tp=2).sp == 1
    assert layout(tp=1).sp == 0
    assert layout(pp=2, vpp=2).schedule == Pipeline.interleaved
    assert layout(pp=2).schedule == Pipeline.one_f_one_b
    assert layout(tp=2, gpus=8).dp == 4
    assert layout(cp=4, dp=2, dp_replicate=2).dp_shard == 4
    assert to_dict(layout(tp=2))["sp"] is True


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("tp", "layout"),
        ("tpp=2", "layout.tpp"),
        ("tp=two", "layout.tp"),
        ("tp=0", "layout.tp"),
        ("tp=-1", "layout.tp"),
        ("tp=99999999999999999999", "layout.tp"),
        ("tp=2 tp=4", "layout.tp"),
        ("sp=yes", "layout.sp"),
        ("zero=3", "layout.zero"),
        ("schedule=dualpipe", "layout.schedule"),
        ("recompute=core", "layout.recompute"),
        ("recompute=full:uniform", "layout.recompute"),
        ("recompute=full:block:0", "layout.recompute"),
        ("hierarchical_cp=2xtwo", "layout.hierarchical_cp"),
        ("tp=4 dp=2 ep=3", "layout.ep"),
        ("tp=2 dp=2 edp=3", "layout.edp"),
        ("dp=2 dp_replicate=3", "layout.dp_replicate"),
        ("first=-1", "layout.first"),
    ],
)
def test_text_that_cannot_be_names_field_rule_and_remedy(text: str, field: str) -> None:
    """Provenance: ours."""
    with pytest.raises(LayoutError) as error:
        from_text(text)
    assert error.value.field == field
    assert error.value.rule
    assert error.value.remedy


def test_degrees_that_are_not_whole_numbers_are_refused() -> None:
    """Provenance: ours."""
    for wrong in ("2", 2.0, None, True):
        with pytest.raises(LayoutError):
            layout(tp=wrong)  # type: ignore[arg-type]  # the wrong type is the point
    assert layout(tp=np.int64(2)).tp == 2  # type: ignore[arg-type]  # numpy integers are let in


def test_stated_gpus_must_agree_with_the_degrees() -> None:
    """Provenance: ours."""
    with pytest.raises(LayoutError, match="is not the 16 GPUs"):
        layout(tp=2, dp=2, gpus=16)
    with pytest.raises(LayoutError):
        layout(tp=32, gpus=16)


def test_full_recomputation_of_every_layer_has_one_form() -> None:
    """Provenance: law. Two spellings of one choice are one layout, however it was made."""
    spelled = from_text("recompute=full:uniform:1")
    assert to_dict(spelled) == to_dict(from_text("recompute=full"))
    assert to_dict(spelled) == to_dict(layout(recompute=Recompute.full, recompute_num_layers=1))
    assert spelled.recompute_num_layers == 0
    assert recompute_to_text(Recompute.full, 1) == "full"


@given(recomputes())
def test_recomputation_survives_its_own_text(recompute: tuple[Recompute, int]) -> None:
    """Provenance: law."""
    assert recompute_from_text(recompute_to_text(*recompute)) == recompute
