"""Predictions for measured runs: what is read, what is never read, how errors are summed up."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from meshwright.__main__ import main
from meshwright.cli import app
from meshwright.errors import DocumentError
from meshwright.fit.documents import load_models, load_runs, shipped
from meshwright.fit.predict import Prediction, predict
from meshwright.fit.rows import read_row
from meshwright.fit.settings import read_settings
from meshwright.fit.summary import layout_key, ranking, summarize
from meshwright.parallel.layout import Recompute, Zero

MODELS = load_models(shipped("models.json.gz"))
RUNS = load_runs(shipped("runs.csv.gz"))
MEMORY = load_runs(shipped("memory.csv.gz"))

ROW = {
    "id": "a",
    "model": "llama3-8b",
    "gpu": "H100-SXM-80GB",
    "system": "DGX-H100",
    "n_gpus": "16",
    "gpus_per_node": "8",
    "nvlink_domain": "8",
    "precision": "bf16",
    "task": "pretrain",
    "gbs": "64",
    "mbs": "1",
    "seq_len": "4096",
    "tp": "2",
    "pp": "2",
    "vpp": "2",
    "cp": "1",
    "ep": "1",
    "fsdp": "none",
    "recompute": "none",
}

NEVER_READ = (
    *("id", "source", "release", "notes", "quality", "consistency", "recipe_join"),
    *("tokens_per_s_per_gpu", "model_tflops_per_gpu", "step_time_s", "step_time_best_s"),
    *("step_time_basis", "peak_memory_gb", "peak_memory_bytes"),
)


def row(**cells: str) -> dict[str, str]:
    return {**ROW, **cells}


def settings(**words: Any) -> str:
    return json.dumps(words)


def one(**cells: str) -> Prediction:
    return predict([row(**cells)], MODELS)[0]


def test_nearly_every_shipped_run_can_be_expressed() -> None:
    for rows in (RUNS, MEMORY):
        readable = 0
        for cells in rows:
            try:
                read_row(cells, MODELS)
            except ValueError:
                continue
            readable += 1
        assert readable >= 0.98 * len(rows)


def test_what_may_not_be_read_changes_no_prediction() -> None:
    titan = [cells for cells in RUNS if "torchtitan" in cells["other_settings"]]
    for cells in (*RUNS[::97], *titan[::3], *MEMORY[::7]):
        blank = dict.fromkeys(NEVER_READ, "")
        others = ({**blank, **dict.fromkeys(NEVER_READ[:7], text)} for text in ("", "1.5", "2031"))
        found = predict([cells, *({**cells, **other} for other in others)], MODELS)
        assert len({(p.step_time_s, p.peak_bytes) for p in found}) == 1, cells["id"]


def test_a_group_of_more_micro_batches_than_there_are_is_all_of_them() -> None:
    def of(size: float) -> float | None:
        words = settings(microbatch_group_size_per_virtual_pipeline_stage=size)
        return one(other_settings=words).step_time_s

    assert of(1e300) == of(10**30) == of(16) is not None


def test_measured_values_inside_other_settings_are_dropped() -> None:
    s = read_settings(
        row(
            other_settings=settings(
                mfu_pct=40, peak_reserved_gib=60, case="x", vboost=True, simumax_predicted_ms=1
            )
        )
    )
    assert set(s.words) == {"vboost"}


def test_command_line_overrides_win() -> None:
    s = read_settings(
        row(
            other_settings=settings(
                model={"cp_comm_type": "p2p"}, cli_overrides={"model": {"cp_comm_type": "a2a"}}
            )
        )
    )
    assert s.text("cp_comm_type") == "a2a"


def test_flat_and_nested_settings_are_one() -> None:
    nested = read_settings(row(other_settings=settings(ddp={"overlap_grad_reduce": False})))
    flat = read_settings(row(other_settings='{"ddp.overlap_grad_reduce": false}'))
    assert nested.words == flat.words
    assert not nested.flag("overlap_grad_reduce", default=True)


def test_an_unknown_word_is_priced_as_the_nearest_and_listed() -> None:
    found = one(precision="fp8-mx2", other_settings=settings(moe_token_dispatcher_type="pigeon"))
    assert found.status == "ok"
    assert any("fp8-mx2" in text for text in found.assumed)
    assert any("pigeon" in text for text in found.assumed)


@pytest.mark.parametrize(
    "cells",
    [
        {"model": "no-such-model"},
        {"n_gpus": "7"},
        {"tp": "0"},
        {"gpu": "TPU-v9"},
        {"other_settings": "{"},
        {"other_settings": "[1]"},
        {"gbs": "-8"},
        {"seq_len": "0"},
        {"n_gpus": "99999999999999"},
        {"pp": "3000000"},
        {"pp": "99999999999999", "n_gpus": ""},
        {"vpp": "99999999999999"},
    ],
)
def test_a_row_that_cannot_mean_anything_is_refused_with_the_reason(cells: dict[str, str]) -> None:
    found = one(**cells)
    assert found.status == "refused"
    assert found.why
    assert found.step_time_s is None


@pytest.mark.parametrize("value", [7, -1, "abc", "nan", 1e400, None, True])
def test_senseless_numbers_in_settings_leave_the_prediction_finite(value: object) -> None:
    words = settings(optimizer_offload_fraction=value, moe_expert_capacity_factor=value)
    found = one(other_settings=words)
    assert found.status == "ok"
    assert 0 < (found.step_time_s or 0) < 1e6
    assert 0 < (found.peak_bytes or 0) < 1e15


def test_what_a_row_leaves_out_is_supplied_and_listed() -> None:
    found = one(mbs="", vpp="", recompute="", n_gpus="")
    assert found.status == "ok"
    for name in ("mbs", "vpp", "recompute", "n_gpus"):
        assert any(text.startswith(f"{name} = ") for text in found.assumed)


def test_sharding_and_recomputation_are_read() -> None:
    run = read_row(row(tp="1", pp="1", vpp="1", fsdp="hsdp:8", recompute="full"), MODELS)
    assert (run.layout.zero, run.layout.dp_replicate) == (Zero.optim_grads_params, 2)
    assert run.layout.recompute == Recompute.full
    run = read_row(row(recompute="selective:moe_act+layernorm"), MODELS)
    assert run.layout.recompute == Recompute.moe_act | Recompute.layernorm


def test_a_bound_on_the_tokens_of_experts_balances_them() -> None:
    dropped = read_row(row(other_settings=settings(moe_token_drop=True)), MODELS).job.execution
    assert (dropped.capacity_factor, dropped.forced_balance) == (1.0, True)
    assert dropped.cuda_graphs == "full"
    graphed = read_row(row(other_settings=settings(cuda_graphs=True)), MODELS).job.execution
    assert graphed.forced_balance
    assert not read_row(row(), MODELS).job.execution.forced_balance


def test_experts_are_split_like_the_rest_where_nemo_is_told_nothing() -> None:
    cells = row(model="mixtral-8x7b", ep="4", other_settings=settings(framework="NeMo"))
    assert read_row(cells, MODELS).layout.etp == 2
    assert read_row({**cells, "etp": "1"}, MODELS).layout.etp == 1


def test_a_rack_sends_tokens_as_its_recipes_do_where_a_row_is_silent() -> None:
    rack = row(model="mixtral-8x7b", gpu="GB200", gpus_per_node="4", nvlink_domain="72", ep="4")
    run = read_row(rack, MODELS)
    assert (run.job.execution.dispatcher, run.job.execution.cuda_graphs) == ("hybridep", "partial")
    assert any("dispatcher" in text for text in run.assumed)
    told = {**rack, "other_settings": settings(moe_token_dispatcher_type="alltoall")}
    assert read_row(told, MODELS).job.execution.dispatcher == "alltoall"
    node = {**rack, "gpu": "B200", "gpus_per_node": "8", "nvlink_domain": "8"}
    assert read_row(node, MODELS).job.execution.dispatcher == "alltoall"


def test_adapters_do_without_the_fused_overlap_of_tensor_parallelism() -> None:
    cells = row(other_settings=settings(framework="NeMo"))
    assert read_row(cells, MODELS).job.execution.overlap_tp_comm
    adapted = read_row({**cells, "task": "lora"}, MODELS).job.execution
    assert not adapted.overlap_tp_comm


def test_a_pipeline_split_written_as_a_repeat_of_stages_is_read() -> None:
    text = "Et*4|(t*4)x6|t*4L"
    cells = row(pp="8", vpp="1", n_gpus="16", tp="1")
    cells["other_settings"] = settings(model={"pipeline_model_parallel_layout": text})
    run = read_row(cells, MODELS)
    assert run.layout.pipeline_layout == "Et*4|(t*4|)*6t*4L"
    assert not any("split" in text for text in run.assumed)


def test_memory_is_answered_as_asked() -> None:
    asked = {
        "allocated": ("allocated", "allocated GiB (max over ranks)"),
        "reserved": ("reserved", "reserved GiB"),
        "smi": ("nvidia-smi", "device memory in use, GB (nvidia-smi)"),
    }
    peaks = {
        name: one(peak_memory_stat=stat, peak_memory_kind=kind).peak_bytes or 0.0
        for name, (stat, kind) in asked.items()
    }
    assert peaks["allocated"] < peaks["reserved"] < peaks["smi"]
    first = one(peak_memory_stat="allocated", peak_memory_kind="allocated GiB rank 0").peak_bytes
    last = one(
        peak_memory_stat="allocated",
        peak_memory_kind="allocated GiB on the last rank (last pipeline stage)",
    ).peak_bytes
    assert max(first or 0, last or 0) <= peaks["allocated"]
    assert first != last


def test_predictions_are_near_the_measured_step_times() -> None:
    tuned = [r for r in RUNS if r["quality"] == "benchmark" and r["step_time_best_s"]][::6]
    summary = summarize(tuned, predict(tuned, MODELS), MODELS)
    errors = summary["step_time"]["all"]
    assert errors["rows"] > 80
    assert errors["median"] <= 0.06
    assert errors["p90"] <= 0.25


def test_allocated_memory_of_single_node_runs_is_near_the_measured() -> None:
    rows = [r for r in MEMORY if r["model"].startswith("simu-") and r["gpu"] == "B200"]
    errors = summarize(rows, predict(rows, MODELS), MODELS)["peak_memory"]["all"]
    assert errors["rows"] >= 20
    assert errors["mean"] <= 0.01


def test_refused_and_inconsistent_rows_are_counted_and_in_no_error() -> None:
    rows = [
        row(step_time_best_s="1", quality="benchmark"),
        row(step_time_best_s="1", quality="benchmark", consistency="inconsistent (2x)"),
        row(step_time_best_s="1", quality="benchmark", n_gpus="7"),
    ]
    summary = summarize(rows, predict(rows, MODELS), MODELS)
    assert (summary["ok"], summary["refused"], summary["inconsistent"]) == (2, 1, 1)
    assert summary["step_time"]["all"]["rows"] == 1
    assert len(summary["reasons"]) == 1


def test_layouts_are_ranked_within_a_group_only() -> None:
    def pair(tp: str, gpu: str, measured: float, predicted: float) -> Any:
        cells = row(tp=tp, gpu=gpu)
        return cells, Prediction(
            id="x", status="ok", step_time_s=predicted, measured_step_time_s=measured
        )

    right = [pair("2", "A", 1.0, 2.0), pair("4", "A", 1.5, 2.1), pair("8", "B", 9.0, 0.1)]
    assert ranking(right)["pairs"] == 1
    assert ranking(right)["right_fraction"] == 1.0
    wrong = [pair("2", "A", 1.0, 2.2), pair("4", "A", 1.5, 2.1)]
    assert ranking(wrong)["right_fraction"] == 0.0
    assert ranking(wrong)["best_near_fraction"] == 0.0
    near = [pair("2", "A", 1.00, 2.0), pair("4", "A", 1.01, 1.9)]
    assert ranking(near)["pairs"] == 0
    assert layout_key(right[0][0]) != layout_key(right[1][0])


def write_csv(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_the_command_answers_in_json(tmp_path: Path) -> None:
    rows = [row(step_time_best_s="2.5", peak_memory_bytes="4e10"), row(id="b", n_gpus="7")]
    for r in rows:
        r.setdefault("step_time_best_s", "")
        r.setdefault("peak_memory_bytes", "")
    runs = write_csv(tmp_path / "runs.csv", rows)
    models = str(shipped("models.json.gz"))
    done = CliRunner().invoke(app, ["accuracy", str(runs), "--models", models, "--json"])
    assert done.exit_code == 0
    answer = json.loads(done.stdout)
    first, second = answer["rows"]
    assert first["status"] == "ok"
    assert first["measured_step_time_s"] == 2.5
    assert first["measured_peak_bytes"] == 4e10
    assert first["predicted_step_time_low_s"] < first["predicted_step_time_s"]
    assert first["predicted_step_time_s"] < first["predicted_step_time_high_s"]
    assert first["predicted_peak_bytes"] > 0
    assert isinstance(first["assumed"], list)
    assert second["status"] == "refused"
    assert second["why"]
    assert answer["summary"]["rows"] == 2


def test_the_command_prints_tables(tmp_path: Path) -> None:
    cells = row(step_time_best_s="2.5", quality="benchmark")
    runs = write_csv(tmp_path / "runs.csv", [cells])
    models = str(shipped("models.json.gz"))
    done = CliRunner().invoke(app, ["accuracy", str(runs), "--models", models])
    assert done.exit_code == 0
    assert "by gpu\n  H100-SXM-80GB" in done.stdout


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n"])
def test_a_file_that_is_none_of_runs_is_refused(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "runs.csv"
    path.write_text(text)
    with pytest.raises(DocumentError):
        load_runs(path)
    models = str(shipped("models.json.gz"))
    monkeypatch.setattr("sys.argv", ["meshwright", "accuracy", str(path), "--models", models])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: runs = ")


def test_models_that_are_no_object_of_objects_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "models.json"
    for text in ("[]", "{", '{"a": 1}'):
        path.write_text(text)
        with pytest.raises(DocumentError):
            load_models(path)
