"""What ``meshwright accuracy`` tells: where every row went, tables at 80 columns, bad files."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import run_rows
from meshwright.__main__ import main
from meshwright.cli import app
from meshwright.describe.gpu import load_gpu
from meshwright.errors import DocumentError
from meshwright.fit.documents import load_models, load_runs, shipped
from meshwright.fit.fitting import FITTED
from meshwright.fit.interval import MEASURED_GPUS
from meshwright.fit.predict import predict
from meshwright.fit.summary import TUNED, summarize

MODELS_FILE = str(shipped("models.json.gz"))
MODELS = load_models(shipped("models.json.gz"))

ROW = {
    **run_rows.ROW,
    "source": "somebody/some-very-long-repository-name:docs/performance-summary.md",
    "n_gpus": "16",
    "quality": "benchmark",
    "consistency": "ok",
    "step_time_best_s": "2.5",
    "peak_memory_bytes": "",
    "peak_memory_stat": "",
    "other_settings": "",
}


def row(**cells: str) -> dict[str, str]:
    return {**ROW, **cells}


def write(path: Path, rows: list[dict[str, str]], **form: Any) -> Path:
    with path.open("w", newline="", encoding=form.pop("encoding", "utf-8")) as file:
        writer = csv.DictWriter(file, fieldnames=list(ROW), **form)
        writer.writeheader()
        writer.writerows(rows)
    return path


def summary(rows: list[dict[str, str]]) -> dict[str, Any]:
    return summarize(rows, predict(rows, MODELS), MODELS)


def report(tmp_path: Path, rows: list[dict[str, str]], **env: str) -> list[str]:
    runs = str(write(tmp_path / "runs.csv", rows))
    done = CliRunner().invoke(app, ["accuracy", runs, "--models", MODELS_FILE], env=env)
    assert done.exit_code == 0
    return done.stdout.splitlines()


EVERY_KIND = [
    row(),
    row(id="n", step_time_best_s=""),
    row(id="z", step_time_best_s="0"),
    row(id="s", quality="sweep"),
    row(id="i", consistency="inconsistent: 2x"),
    row(id="r", n_gpus="7"),
    row(id="m", peak_memory_bytes="4e10", peak_memory_stat="allocated"),
    row(id="o", peak_memory_bytes="4e10", peak_memory_stat="oom"),
    row(
        id="p",
        peak_memory_bytes="4e10",
        peak_memory_stat="allocated",
        other_settings='{"mem_allocated_between_steps_gib": 0.1}',
    ),
]


def test_every_row_went_somewhere() -> None:
    found = summary(EVERY_KIND)
    for kind in ("step_time_rows", "peak_memory_rows"):
        assert sum(found[kind].values()) == len(EVERY_KIND)
    assert found["step_time_rows"] == {
        "scored": 4,
        "not_predicted": 1,
        "inconsistent": 1,
        "not_measured": 1,
        "unusable": 1,
        "other_quality": 1,
    }
    assert found["peak_memory_rows"]["scored"] == 1
    assert found["peak_memory_rows"]["not_comparable"] == 2


@pytest.mark.parametrize("text", ["0", "-3", "NaN", "inf", "fast", "1e999"])
def test_a_measured_value_that_cannot_be_is_told_and_in_no_error(text: str) -> None:
    found = summary([row(step_time_best_s=text), row(id="b")])
    assert found["step_time"]["all"]["rows"] == 1
    assert repr(text) in found["unusable_measurements"]["a"]


def test_measured_values_may_have_commas_and_another_column_of_step_times() -> None:
    found = predict([row(step_time_best_s="1,234.5"), row(step_time_best_s="")], MODELS)
    assert [p.measured_step_time_s for p in found] == [1234.5, None]
    alone = {k: v for k, v in ROW.items() if k != "step_time_best_s"}
    assert predict([{**alone, "step_time_s": "3"}], MODELS)[0].measured_step_time_s == 3.0


def test_rows_of_one_id_are_each_judged_by_themselves() -> None:
    cells = {"peak_memory_bytes": "4e10", "peak_memory_stat": "allocated"}
    found = summary(
        [
            row(**cells, other_settings='{"mem_allocated_between_steps_gib": 0.1}'),
            row(**cells),
            row(**cells),
        ]
    )
    assert found["peak_memory"]["all"]["rows"] == 2
    assert found["step_time"]["all"]["rows"] == 3


def test_a_file_without_qualities_is_scored() -> None:
    assert summary([row(quality="")])["step_time"]["all"]["rows"] == 1


def test_coverage_is_told_by_group() -> None:
    found = summary([row(), row(id="b", n_gpus="7"), row(id="c", gpu="A100")])
    by_gpu = found["step_time"]["by_gpu"]
    assert by_gpu["H100-SXM-80GB"]["coverage_fraction"] == 0.5
    assert by_gpu["A100"]["coverage_fraction"] == 1.0


def test_memory_of_another_model_is_printed(tmp_path: Path) -> None:
    lines = report(tmp_path, EVERY_KIND)
    at = lines.index("Memory measured on another model, in no error:")
    assert lines[at + 1].strip() == "p"
    assert "less than" in lines[at + 2]


@pytest.mark.parametrize("columns", [80, 120])
def test_a_report_is_as_wide_as_the_terminal(tmp_path: Path, columns: int) -> None:
    lines = report(tmp_path, EVERY_KIND, COLUMNS=str(columns))
    tables = [line for line in lines if line.endswith("%")]
    assert max(len(line) for line in lines) <= columns
    assert {len(line) for line in tables if " 100%" in line} == {columns}
    assert not any("\x1b" in line for line in lines)
    assert any("some" in line and ".." in line for line in lines) == (columns == 80)


def test_a_file_without_runs_says_so(tmp_path: Path) -> None:
    assert report(tmp_path, []) == ["0 runs: the file holds its first line only."]


def test_files_are_read_as_spreadsheets_leave_them(tmp_path: Path) -> None:
    plain = load_runs(write(tmp_path / "a.csv", [row(), row(id="b")]))
    marked = write(tmp_path / "b.csv", [row(), row(id="b")], encoding="utf-8-sig")
    assert load_runs(marked) == plain
    semicolons = write(tmp_path / "c.csv", [row(), row(id="b")], delimiter=";")
    assert load_runs(semicolons) == plain
    text = (tmp_path / "a.csv").read_text().replace("\r\n", "\n")
    head, _, rest = text.partition("\n")
    head = head.replace(",gpu,", ", GPU ,").replace("model", "Model")
    (tmp_path / "d.csv").write_text(f"{head}\n\n{rest}\n{',' * (len(ROW) - 1)}\n\n")
    assert load_runs(tmp_path / "d.csv") == plain


def test_an_unquoted_comma_refuses_its_row_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "runs.csv", [row(), row(id="b")])
    path.write_text(path.read_text() + ",".join(["c", *list(ROW.values())[1:], '{"a"', "1}"]))
    found = predict(load_runs(path), MODELS)
    assert [p.status for p in found] == ["ok", "ok", "refused"]
    assert "quotes" in found[2].why


def test_one_row_that_nobody_foresaw_does_not_take_the_others_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("meshwright.fit.predict.asked_bytes", fails)
    found = predict([row(), row(id="b", n_gpus="7")], MODELS)
    assert [p.status for p in found] == ["unsupported", "refused"]
    assert "ZeroDivisionError" in found[0].why


@pytest.mark.parametrize("data", [None, b"", b"\x00\x01\xff\xfe", b"\x1f\x8bnot gzip"])
def test_a_runs_file_that_cannot_be_read_ends_with_one_message(
    tmp_path: Path,
    data: bytes | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "runs.csv"
    if data is not None:
        path.write_bytes(data)
    monkeypatch.setattr("sys.argv", ["meshwright", "accuracy", str(path), "--models", MODELS_FILE])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: runs = ")
    assert told.err.count("\n") == 1


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}", "null", "\ufeff[]"])
def test_models_that_are_none_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "models.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DocumentError) as told:
        load_models(path)
    assert told.value.remedy
    with pytest.raises(DocumentError):
        load_models(tmp_path)


def test_json_holds_every_row_in_order_and_no_nan(tmp_path: Path) -> None:
    runs = str(write(tmp_path / "runs.csv", EVERY_KIND))
    done = CliRunner().invoke(app, ["accuracy", runs, "--models", MODELS_FILE, "--json"])
    answer = json.loads(done.stdout, parse_constant=pytest.fail)
    assert [r["id"] for r in answer["rows"]] == [r["id"] for r in EVERY_KIND]
    assert answer["summary"]["impossible_memory"].keys() == {"p"}


def width(**cells: str) -> float:
    found = predict([row(**cells)], MODELS)[0]
    assert found.step_time_s and found.low_s and found.high_s
    assert found.high_s / found.step_time_s == pytest.approx(found.step_time_s / found.low_s)
    return found.high_s / found.step_time_s


def test_an_interval_is_wider_where_less_is_known() -> None:
    moe = {"model": "qwen3-30b-a3b", "tp": "1", "ep": "8"}
    forced = '{"moe_router_force_load_balancing": true}'
    free = '{"moe_router_force_load_balancing": false}'
    known = width()
    assert known < width(gpu="H200") < 1.5
    assert known < width(recompute="")
    assert known < width(**moe, other_settings=forced) < width(**moe, other_settings=free)


def test_the_measured_gpus_are_those_of_the_shipped_runs() -> None:
    names = {r["gpu"] for r in load_runs(shipped("runs.csv.gz")) if r["quality"] in FITTED}
    assert {load_gpu(name, nearest=True).name for name in names} == set(MEASURED_GPUS)


def test_intervals_hold_their_share_of_the_shipped_runs() -> None:
    rows = [r for r in load_runs(shipped("runs.csv.gz")) if r["quality"] in TUNED][::8]
    held = summary(rows)["interval"]
    assert held["rows"] > 60
    assert held["held_fraction"] >= held["stated_fraction"] - 0.03
    rows = [r for r in load_runs(shipped("memory.csv.gz")) if r["peak_memory_stat"]][::5]
    held = summary(rows)["peak_interval"]
    assert held["held_fraction"] >= held["stated_fraction"] - 0.05
