"""``explain``: every term or one, and why not another layout."""

from __future__ import annotations

import pytest

from command_line import (
    BATCH,
    TEXT,
    Run,
    holds,
)
from meshwright.cost.detail import TIME_TERMS
from meshwright.cost.step import MEMORY_TERMS


def test_explain_shows_every_term_or_one(run: Run, model: str) -> None:
    words = ("explain", model, "16xH100", "--layout", "tp=2 pp=2", *BATCH)
    told = run(*words, "--json").json()
    assert {*TIME_TERMS, *MEMORY_TERMS} <= set(told["terms"])
    for term in told["terms"].values():
        assert isinstance(term["value"], float)
        for formula in term["formulas"]:
            holds({"what": TEXT, "formula": TEXT, "source": TEXT, "left_out": TEXT}, formula)
    one = run(*words[:3], "tp_comm_s", *words[3:], "--json").json()
    assert list(one["terms"]) == ["tp_comm_s"]
    assert run(*words).status == 0
    shown = run(*words[:3], "tp_comm_s", *words[3:])
    assert "source" in shown.out


def test_explain_why_not_adds_up_to_the_gap(run: Run, model: str) -> None:
    words = ("explain", model, "16xH100", "--layout", "tp=2 pp=2", "--why-not", "tp=4", *BATCH)
    told = run(*words, "--json").json()
    by_term = told["difference"]
    assert sum(by_term["time"].values()) == pytest.approx(told["step_time_difference_s"], abs=1e-9)
    assert sum(by_term["memory"].values()) == pytest.approx(told["peak_difference_bytes"], abs=1.0)
    assert "change" in run(*words).out
    refused = run(*words[:6], "tp=3", *BATCH, "--json").json()
    assert refused["refused"]["field"].startswith("layout.")
