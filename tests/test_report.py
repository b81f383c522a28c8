"""The page of a plan: everything inside, pictures for every kind of pipeline, bad input told."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from meshwright import api
from meshwright.describe.cluster import load_cluster
from meshwright.describe.job import Job
from meshwright.errors import MeshwrightError
from meshwright.plans import Plan
from strategies import dense_model, moe_model

pytest.importorskip("matplotlib")
CLUSTER, JOB = load_cluster("16xH100"), Job(seq_len=4096, gbs=64)


def priced(layout: str, *, experts: bool = False) -> Plan:
    model = moe_model(num_experts=8) if experts else dense_model()
    return api.estimate(model, CLUSTER, JOB, layout)


@pytest.mark.parametrize(
    ("layout", "experts"),
    [
        ("tp=2", False),
        ("pp=4", False),
        ("pp=4 vpp=2", False),
        ("pp=2 schedule=zb_h1", False),
        ("pp=4 schedule=zb_v", False),
        ("pp=2 ep=4", True),
    ],
)
def test_a_page_holds_three_pictures_and_loads_nothing(layout: str, experts: bool) -> None:
    from meshwright.report import page

    plan = priced(layout, experts=experts)
    text = page(plan)
    pictures = re.findall(r"<svg.*?</svg>", text, re.S)
    assert len(pictures) == 3
    for picture in pictures:
        ET.fromstring(picture)
    assert not re.findall(r"<(?:script|link|img)|src=", text)
    assert plan.estimate.verdict in text
    for stage in plan.estimate.stages:
        assert f"stage {stage['stage']} ({stage['layers']} layers)" in pictures[0]


def test_equal_plans_have_equal_pages() -> None:
    from meshwright.report import page

    def without_ids(text: str) -> str:
        return re.sub(r"\b[mpC]?[0-9a-f_]{6,}\b", "", text)

    assert without_ids(page(priced("pp=2"))) == without_ids(page(priced("pp=2")))


def test_names_are_text_and_never_markup() -> None:
    from dataclasses import replace

    from meshwright.report import page

    plan = priced("tp=2")
    named = replace(plan, model=replace(plan.model, name="<script>alert(1)</script>"))
    assert "<script>" not in page(named)


def test_a_plan_without_matplotlib_is_told_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = api.load_model("llama3-8b")
    plan = api.estimate(model, CLUSTER, api.job(model, 4096, 64), "tp=2")
    path = tmp_path / "plan.toml"
    api.save_plan(plan, str(path), model_text="llama3-8b", cluster_text="16xH100")
    assert "<svg" in api.report(str(path))
    for name in [n for n in sys.modules if n.startswith(("meshwright.report", "matplotlib"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MeshwrightError, match="meshwright\\[report\\]"):
        api.report(str(path))
