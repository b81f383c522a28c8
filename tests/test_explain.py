"""Every number has its formula and its source, and two layouts differ term by term."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from meshwright import api
from meshwright.cost.detail import TIME_TERMS, estimate
from meshwright.cost.explain import TERMS, explain_term, values
from meshwright.cost.step import MEMORY_TERMS
from meshwright.describe.cluster import load_cluster
from meshwright.describe.job import Job
from meshwright.errors import MeshwrightError
from meshwright.parallel.layout import Layout, layout, to_text
from meshwright.plans import difference
from strategies import Situation, dense_model, situations_with_layout

MODEL = dense_model()
CLUSTER = load_cluster("16xH100")
JOB = Job(seq_len=4096, gbs=64)


def test_every_term_of_time_and_memory_can_be_explained() -> None:
    assert {*TIME_TERMS, *MEMORY_TERMS} <= set(TERMS)


@pytest.mark.parametrize("term", list(TERMS))
def test_a_term_has_a_sentence_a_formula_and_a_source(term: str) -> None:
    formulas = explain_term(term)
    for one in formulas:
        assert one.what.endswith(".")
        assert len(one.what) <= 110
    assert any(one.source for one in formulas)
    assert any(one.formula for one in formulas)
    assert any(one.left_out for one in formulas)


@pytest.mark.parametrize("term", list(TERMS))
def test_no_part_of_an_explanation_runs_into_another(term: str) -> None:
    for one in explain_term(term):
        for part in (one.what, one.formula, one.source, one.left_out):
            assert "Ref:" not in part
            assert "Left out:" not in part
            assert "Raises" not in part


@pytest.mark.parametrize("term", list(TERMS))
def test_every_formula_is_spelled_and_no_source_points_back_at_the_code(term: str) -> None:
    for one in explain_term(term):
        assert one.formula
        assert "docstring" not in one.source
        assert ".;" not in one.source
        assert not one.left_out.startswith("as ")


def test_communication_that_is_hidden_says_how_much() -> None:
    hidden = explain_term("tp_comm_s")[0].formula
    assert "overlap_tp_comm" in hidden
    assert "1 - hidden fraction" in hidden


def test_an_unknown_term_names_the_nearest() -> None:
    with pytest.raises(MeshwrightError, match="tp_comm_s"):
        explain_term("tp_com_s")


def test_every_value_that_is_explained_is_the_estimate_s() -> None:
    e = estimate(MODEL, CLUSTER, JOB, layout(tp=2, pp=2, gpus=16))
    found = values(e)
    assert set(found) == set(TERMS)
    assert sum(found[t] for t in TIME_TERMS) == pytest.approx(e.step_time_s)
    assert sum(found[t] for t in MEMORY_TERMS) == pytest.approx(e.peak_bytes)


def test_explain_answers_for_all_terms_or_for_one() -> None:
    every = api.explain(MODEL, CLUSTER, JOB, "tp=2 pp=2")
    assert list(every.formulas) == list(TERMS)
    one = api.explain(MODEL, CLUSTER, JOB, "tp=2 pp=2", "bubble_s")
    assert list(one.formulas) == ["bubble_s"]
    assert one.values["bubble_s"] == every.values["bubble_s"]
    assert one.to_dict()["terms"]["bubble_s"]["value"] == one.values["bubble_s"]


def test_without_a_layout_the_best_one_is_explained() -> None:
    best = api.plan(MODEL, CLUSTER, JOB, top=1).plans[0]
    told = api.explain(MODEL, CLUSTER, JOB)
    assert to_text(told.plan.layout) == to_text(best.layout)


@settings(max_examples=20)
@given(situations_with_layout(), situations_with_layout())
def test_differences_add_up_to_the_gap(
    first: tuple[Situation, Layout[int]], second: tuple[Situation, Layout[int]]
) -> None:
    a, b = (estimate(s.model, s.cluster, s.job, x) for s, x in (first, second))
    gap = difference(a, b)
    assert sum(gap["time"].values()) == pytest.approx(
        a.step_time_s - b.step_time_s, abs=1e-9 * max(a.step_time_s, b.step_time_s)
    )
    assert sum(gap["memory"].values()) == pytest.approx(
        a.peak_bytes - b.peak_bytes, abs=1e-9 * max(a.peak_bytes, b.peak_bytes)
    )
