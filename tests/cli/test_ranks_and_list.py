"""``ranks`` and ``list``: process groups, and what is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from command_line import (
    NUMBER,
    TEXT,
    WHOLE,
    Run,
    holds,
)


def test_ranks_prints_groups_of_every_rank(run: Run) -> None:
    answer = run("ranks", "--gpus", "16", "--layout", "tp=2 pp=2 ep=4", "--json")
    assert answer.status == 0
    groups = answer.json()["groups"]
    for name in ("tp", "cp", "dp", "pp", "ep", "edp", "dp_cp", "embedding"):
        assert name in groups
    for name in ("tp", "cp", "dp", "pp", "ep", "edp"):
        assert sorted(rank for group in groups[name] for rank in group) == list(range(16))
    assert {len(g) for g in groups["tp"]} == {2}
    assert {len(g) for g in groups["ep"]} == {4}


@pytest.mark.parametrize(
    ("what", "fields"),
    [
        ("gpus", {"name": TEXT, "hbm_bytes": NUMBER}),
        ("models", {"name": TEXT, "num_params": WHOLE, "num_active_params": WHOLE}),
        ("checks", {"id": TEXT, "severity": TEXT, "rule": TEXT, "remedy": TEXT}),
        ("schedules", {"name": TEXT, "what": TEXT}),
        ("frameworks", {"name": TEXT}),
        ("terms", {"name": TEXT, "what": TEXT, "source": TEXT}),
    ],
)
def test_list_prints_what_is_known(run: Run, what: str, fields: dict[str, Any]) -> None:
    answer = run("list", what, "--json")
    assert answer.status == 0
    rows = answer.json()
    assert rows
    for one in rows:
        holds(fields, one)
    shown = run("list", what)
    assert shown.status == 0
    assert len(shown.out.splitlines()) > len(rows)


def test_groups_and_schedules_are_shown_as_before(
    run: Run, golden: Callable[[str, str], None]
) -> None:
    golden("cli/ranks.txt", run("ranks", "--gpus", "16", "--layout", "tp=2 pp=2 cp=2").out)
    golden("cli/schedules.txt", run("list", "schedules").out)


@pytest.mark.parametrize("what", ["gpus", "models", "checks", "schedules", "frameworks", "terms"])
def test_a_list_shows_every_name_whole_on_a_narrow_terminal(
    run: Run, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr("meshwright.cli.show.terminal.PIPED_WIDTH", 80)
    words = run("list", what).out.split()
    records = run("list", what, "--json").json()
    assert {record.get("id") or record["name"] for record in records} <= set(words)
