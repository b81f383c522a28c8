"""What ``plan --for`` writes starts by the rules of its framework, however the layers sit."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshwright import api
from meshwright.describe.cluster import load_cluster
from meshwright.describe.models import load_model
from meshwright.errors import LayoutError
from meshwright.frameworks import FRAMEWORKS
from meshwright.frameworks.check import check

MODEL, CLUSTER = load_model("llama3-8b"), load_cluster("32xH100")
JOB = api.job(MODEL, 4096, 256)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(
    "fix", ["tp=2 pp=4 vpp=1", "tp=2 pp=4 vpp=2", "tp=2 pp=2 vpp=8", "tp=4 pp=1"]
)
def test_a_planned_launch_starts(framework: str, fix: str, tmp_path: Path) -> None:
    try:
        plans = api.plan(MODEL, CLUSTER, JOB, top=1, fix=[fix], framework=framework)
    except LayoutError as refused:
        assert "The framework can run none of them" in str(refused)
        assert framework in ("skyrl", "torchtitan")
        return
    for name, text in api.launch_files(plans.plans[0], framework).items():
        (tmp_path / name).write_text(text)
    result = check(tmp_path / "run.sh")
    assert [f.message for f in result.findings if f.severity == "error"] == []
