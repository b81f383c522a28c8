"""Placement of layers on pipeline stages."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import meshwright
from meshwright.errors import LayoutError
from meshwright.parallel.layout import Pipeline
from meshwright.parallel.placement import (
    Placement,
    balanced_layout,
    place,
    place_layers,
    read_pipeline_layout,
    stage_ranks,
)
from oracles import rows

ORACLE = rows("placement.jsonl.gz")
KEYS = ("layers", "mtp_layers", "embedding", "loss")


def arguments(oracle: dict[str, Any]) -> dict[str, Any]:
    ours = {"account_embedding": "account_for_embedding", "account_loss": "account_for_loss"}
    return {ours.get(key, key): value for key, value in oracle["config"].items()}


@pytest.mark.parametrize("oracle", ORACLE, ids=lambda r: r["id"])
def test_layers_sit_where_megatron_puts_them(oracle: dict[str, Any]) -> None:
    """Provenance: spec (Megatron-LM)."""
    if not oracle["accepted"]:
        with pytest.raises(LayoutError):
            place_layers(**arguments(oracle))
        return
    expected = [[{k: chunk[k] for k in KEYS} for chunk in rank] for rank in oracle["stages"]]
    assert place_layers(**arguments(oracle)) == expected


def holds_everything_once(placed: Placement, num_layers: int) -> bool:
    return [layer for stage in placed.layers for layer in stage] == list(range(num_layers))


@given(
    st.integers(1, 40),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(0, 9),
    st.integers(0, 9),
    st.booleans(),
    st.booleans(),
    st.sampled_from([Pipeline.one_f_one_b, Pipeline.zb_v]),
)
def test_whatever_is_accepted_holds_every_layer_once_in_order(
    num_layers: int,
    pp: int,
    vpp: int,
    first: int,
    last: int,
    embedding: bool,
    loss: bool,
    schedule: Pipeline,
) -> None:
    """Provenance: law."""
    try:
        placed = place(
            num_layers,
            pp,
            vpp,
            first=first,
            last=last,
            account_for_embedding=embedding,
            account_for_loss=loss,
            mtp=1,
            schedule=schedule,
        )
    except LayoutError as error:
        assert error.rule
        assert error.remedy
        return
    assert holds_everything_once(placed, num_layers)
    assert len(placed.layers) == len(placed.rank_of_stage) == pp * vpp
    assert sum(placed.mtp_layers) == placed.mtp_layers[-1] == 1
    on_rank = [
        sum(len(placed.layers[s]) for s, r in enumerate(placed.rank_of_stage) if r == rank)
        for rank in range(pp)
    ]
    if first:
        assert on_rank[0] == first
    if last:
        assert on_rank[-1] == last


@given(st.integers(1, 200), st.integers(2, 24), st.integers(0, 2))
def test_a_balanced_layout_places_every_layer_within_one(
    num_layers: int, pp: int, mtp: int
) -> None:
    """Provenance: law."""
    if num_layers < pp:
        with pytest.raises(LayoutError):
            balanced_layout(num_layers, pp)
        return
    text = balanced_layout(num_layers, pp, mtp)
    placed = place(num_layers, pp, 1, pipeline_layout=text, mtp=mtp)
    counts = [len(stage) for stage in placed.layers]
    assert holds_everything_once(placed, num_layers)
    assert max(counts) - min(counts) <= 1
    assert placed.mtp_layers[-1] == mtp


@pytest.mark.parametrize(("num_layers", "pp", "vpp"), [(61, 16, 1), (80, 7, 1), (80, 4, 3)])
def test_the_remedy_for_layers_that_do_not_divide_works(num_layers: int, pp: int, vpp: int) -> None:
    """Provenance: ours."""
    with pytest.raises(LayoutError) as error:
        place(num_layers, pp, vpp)
    text = error.value.remedy.partition("pipeline_layout=")[2]
    placed = place(num_layers, pp, vpp, pipeline_layout=text)
    assert holds_everything_once(placed, num_layers)


def test_the_remedy_for_an_uneven_first_stage_works() -> None:
    """Provenance: ours."""
    with pytest.raises(LayoutError, match="Use first=2"):
        place(14, 4, 1, first=1)
    assert [len(stage) for stage in place(14, 4, 1, first=2).layers] == [2, 4, 4, 4]


def test_the_v_shape_puts_the_first_and_the_last_stage_on_rank_0() -> None:
    """Provenance: spec (PyTorch: rank r owns stages r and 2*pp - 1 - r)."""
    placed = place(16, 4, 2, schedule=Pipeline.zb_v)
    assert placed.rank_of_stage == (0, 1, 2, 3, 3, 2, 1, 0)
    assert placed.chunk_of_stage == (0, 0, 0, 0, 1, 1, 1, 1)
    for rank in range(4):
        stages = [s for s, r in enumerate(placed.rank_of_stage) if r == rank]
        assert stages == [rank, 7 - rank]
    assert (placed.embedding_stage, placed.loss_stage) == (0, 7)


def test_chunks_go_round_the_ranks() -> None:
    """Provenance: spec (Megatron-LM)."""
    assert stage_ranks(3, 2) == (0, 1, 2, 0, 1, 2)
    assert place(12, 3, 2).chunk_of_stage == (0, 0, 0, 1, 1, 1)


def test_a_pipeline_layout_repeats_letters_and_stages() -> None:
    """Provenance: spec (Megatron-LM)."""
    assert read_pipeline_layout("Et*3|(tt|)*2,m|L") == ("Ettt", "tt", "tt", "m", "L")


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("tt|ttL", "starts with E"),
        ("Ett|tt", "ends with L"),
        ("EtEt|ttL", "one embedding"),
        ("EttL|ttL", "one loss"),
        ("Ett|tL", "has 3 layers"),
        ("Etttt|L|", "stages"),
        ("Ettx|ttL", "'x' has no meaning"),
        ("Ett|(tt)L", "no meaning"),
        ("((Ett|)*2)*2", "no meaning"),
        ("Et*999999|L", "Written out"),
        ("(t*999|)*999", "Written out"),
        ("Et*00000000000000000000000002|ttL", "no meaning"),
        ("Ett|ttmL", "MTP"),
        ("", "stages"),
    ],
)
def test_a_pipeline_layout_that_cannot_be_names_its_rule(text: str, rule: str) -> None:
    """Provenance: spec (Megatron-LM, PipelineParallelLayerLayout)."""
    vpp = 1 if text.count("|") < 2 else 2
    with pytest.raises(LayoutError) as error:
        place(4, 2, vpp, pipeline_layout=text)
    assert rule in error.value.rule
    assert error.value.remedy


@pytest.mark.parametrize(
    ("text", "vpp", "mtp", "rule"),
    [
        ("Ettm|ttL", 1, 1, "MTP layers follow"),
        ("Ett|tt|m|mL", 2, 2, "one stage"),
        ("Ett|ttm||L", 2, 1, "last chunk"),
        ("Ett|ttL", 2, 0, "2 stages, and pp*vpp"),
        ("Ett|t|tL", 1, 0, "3 stages"),
    ],
)
def test_multi_token_prediction_sits_together_at_the_end(
    text: str, vpp: int, mtp: int, rule: str
) -> None:
    """Provenance: spec (Megatron-LM, PipelineParallelLayerLayout)."""
    with pytest.raises(LayoutError) as error:
        place(4, 2, vpp, pipeline_layout=text, mtp=mtp)
    assert rule in error.value.rule


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"num_layers": 0, "pp": 1}, "num_layers"),
        ({"num_layers": 10**9, "pp": 1}, "num_layers"),
        ({"num_layers": "8", "pp": 1}, "num_layers"),
        ({"num_layers": 8, "pp": 0}, "layout.pp"),
        ({"num_layers": 8, "pp": 2**31 - 1}, "layout.pp"),
        ({"num_layers": 8, "pp": 2, "vpp": -1}, "layout.vpp"),
        ({"num_layers": 8, "pp": 1, "vpp": 2}, "layout.vpp"),
        ({"num_layers": 8, "pp": 4, "first": 0}, "layout.first"),
        ({"num_layers": 8, "pp": 4, "first": 9}, "layout.first"),
        ({"num_layers": 16, "pp": 4, "first": 8, "last": 8}, "layout.first"),
        ({"num_layers": 8, "pp": 1, "first": 3, "last": 5}, "layout.first"),
        ({"num_layers": 8, "pp": 2, "last": 2.5}, "layout.last"),
        ({"num_layers": 8, "pp": 2, "first": 3, "account_for_loss": True}, "layout.first"),
        ({"num_layers": 15, "pp": 4, "first": 3, "vpp": 2}, "layout.first"),
        ({"num_layers": 15, "pp": 4, "last": 3, "vpp": 2}, "layout.last"),
        ({"num_layers": 13, "pp": 4, "first": 4, "vpp": 2}, "layout.vpp"),
        ({"num_layers": 8, "pp": 2, "layers_per_vpp": 0}, "layers_per_vpp"),
        ({"num_layers": 8, "pp": 2, "layers_per_vpp": 3}, "layers_per_vpp"),
        ({"num_layers": 8, "pp": 2, "layers_per_vpp": 2, "vpp": 2}, "layers_per_vpp"),
        ({"num_layers": 9, "pp": 2, "layers_per_vpp": 2}, "layout.pp"),
        ({"num_layers": 8, "pp": 2, "layout": 5}, "layout.pipeline_layout"),
        ({"num_layers": 4, "pp": 2, "layout": "Ett|ttL", "first": 2}, "layout.pipeline_layout"),
        ({"num_layers": 8, "pp": 2, "mtp": -1}, "mtp"),
    ],
)
def test_a_placement_that_cannot_be_names_field_rule_and_remedy(
    wrong: dict[str, Any], field: str
) -> None:
    """Provenance: ours."""
    with pytest.raises(meshwright.MeshwrightError) as error:
        meshwright.place_layers(**wrong)
    assert error.value.field == field
    assert error.value.rule
    assert error.value.remedy


def test_the_v_shape_has_two_chunks_and_no_uneven_ends() -> None:
    """Provenance: ours."""
    with pytest.raises(LayoutError, match="two chunks"):
        place(8, 2, 1, schedule=Pipeline.zb_v)
    with pytest.raises(LayoutError, match="pipeline_layout"):
        place(8, 2, 2, first=2, schedule=Pipeline.zb_v)
    assert place(4, 1, 2, schedule=Pipeline.zb_v).rank_of_stage == (0, 0)
