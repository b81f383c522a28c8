"""``plan``: the promised JSON, the limits, the tables, the document."""

from __future__ import annotations

from pathlib import Path

import pytest

from command_line import (
    BATCH,
    NUMBER,
    WHOLE,
    Run,
    holds,
    holds_plan,
    text_of,
)


@pytest.mark.parametrize("kind", ["model", "moe"])
def test_plan_prints_the_promised_json_and_estimate_prices_its_layouts_the_same(
    run: Run, kind: str, request: pytest.FixtureRequest
) -> None:
    model: str = request.getfixturevalue(kind)
    answer = run("plan", model, "16xH100", *BATCH, "--top", "3", "--json")
    assert answer.status == 0
    plans = answer.json()
    holds(dict.fromkeys(("candidates", "legal", "fit"), WHOLE), plans["searched"])
    holds({"seconds": NUMBER}, plans["searched"])
    assert len(plans["plans"]) == 3
    assert plans["searched"]["candidates"] >= plans["searched"]["legal"] >= plans["searched"]["fit"]
    times = [plan["estimate"]["step_time_s"] for plan in plans["plans"]]
    assert times == sorted(times)
    for plan in plans["plans"]:
        holds_plan(plan, 16)
        assert plan["why"] and all(isinstance(line, str) for line in plan["why"])
        if kind == "model":
            assert (plan["layout"]["ep"], plan["layout"]["etp"]) == (1, 1)
            assert plan["layout"]["edp"] == 16 // plan["layout"]["pp"]
        again = run(
            "estimate", model, "16xH100", "--layout", text_of(plan["layout"]), *BATCH, "--json"
        )
        assert again.status == 0
        assert again.json() == {k: plan[k] for k in ("layout", "estimate", "findings")}
        commas = text_of(plan["layout"]).replace(" ", ",")
        same = run("estimate", model, "16xH100", "--layout", commas, *BATCH, "--json")
        assert same.json() == again.json()


def test_plan_keeps_to_its_limits(run: Run, model: str) -> None:
    limits = ("--fix", "tp=4 pp=2", "--fix", "recompute=none", "--max-memory", "60GB")
    answer = run("plan", model, "16xH100", *BATCH, *limits, "--json").json()
    for plan in answer["plans"]:
        layout = plan["layout"]
        assert (layout["tp"], layout["pp"], layout["recompute"]) == (4, 2, "none")
        assert plan["estimate"]["peak_bytes"] <= 60e9


def test_plan_says_what_is_closest_and_which_cluster_is_large_enough(run: Run) -> None:
    words = ("plan", "llama3-70b", "8xH100", *BATCH, "--fix", "recompute=full mbs=1 vpp=1")
    answer = run(*words, "--json")
    assert answer.status == 1
    told = answer.json()
    assert (told["plans"], told["searched"]["fit"]) == ([], 0)
    holds_plan(told["closest"], 8)
    assert told["closest"]["estimate"]["verdict"] != "fits"
    gpus = told["smallest_cluster"]["gpus"]
    assert gpus > 8
    holds_plan(told["smallest_cluster"], gpus)
    assert told["smallest_cluster"]["estimate"]["fits"]
    shown = run(*words)
    assert shown.status == 1
    assert "Nothing fits" in shown.out
    assert f"{gpus} GPUs" in shown.out


def test_plan_shows_a_table_where_memory_and_time_go_and_why(run: Run, model: str) -> None:
    answer = run("plan", model, "16xH100", *BATCH)
    assert answer.status == 0
    for text in (
        "tokens/s/GPU",
        "MFU",
        "Where the memory goes",
        "Where the time goes",
        "Why it won",
    ):
        assert text in answer.out
    layout = answer.out.rstrip().splitlines()[-1].strip('"')
    assert run("estimate", model, "16xH100", "--layout", layout, *BATCH).status == 0


def test_plan_writes_a_document_that_reads_back(run: Run, model: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    answer = run("plan", model, "16xH100", *BATCH, "-o", str(path), "--json")
    assert answer.status == 0
    assert path.is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["plan.toml"]


def test_the_front_of_memory_against_time_is_shown_without_what_gains_little(
    run: Run, model: str
) -> None:
    words = ("plan", model, "16xH100", "--pareto", *BATCH)
    front = [one["step_time_s"] for one in run(*words, "--json").json()["pareto"]]
    lines = run(*words).out.partition("Memory against time")[2].partition("more that gain")[0]
    *rows, left_out = [line.split() for line in lines.splitlines()[2:] if line.strip()]
    assert int(left_out[0]) == len(front) - len(rows) > 0
    assert rows[-1][2] in f"{front[-1] * 1e3:.4g}"


@pytest.mark.parametrize("columns", ["80", "120"])
def test_no_heading_is_cut_on_a_narrow_terminal(
    run: Run, model: str, monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setattr("meshwright.cli.show.terminal.PIPED_WIDTH", int(columns))
    out = run("plan", model, "16xH100", *BATCH).out
    assert "layers" in out
    assert "..." not in out
    assert "\N{HORIZONTAL ELLIPSIS}" not in out
