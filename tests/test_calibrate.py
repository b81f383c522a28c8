"""A cluster's own factors: recovered from its runs, kept where runs show none, told with source."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from meshwright.cli import app
from meshwright.describe.cluster import load_cluster
from meshwright.errors import DocumentError
from meshwright.fit.calibrate import Calibration, calibrate
from meshwright.fit.documents import load_models, shipped
from meshwright.fit.predict import predict

MODELS = load_models(shipped("models.json.gz"))
CLUSTER = load_cluster("64xH100")


def rows(number: int = 6) -> list[dict[str, str]]:
    """Return runs whose measured times are the predicted ones."""
    made = [
        {
            "id": f"r{i}",
            "model": model,
            "gpu": "H100-SXM-80GB",
            "n_gpus": gpus,
            "precision": "bf16",
            "gbs": "64",
            "mbs": "1",
            "seq_len": "4096",
            "tp": tp,
            "pp": "1",
            "cp": "1",
            "ep": "1",
            "fsdp": "full",
            "recompute": "none",
        }
        for i, (model, gpus, tp) in enumerate(
            (m, n, t) for t in ("1", "4") for m in ("llama3-8b", "qwen3-8b") for n in ("8", "64")
        )
    ][:number]
    found = predict(made, MODELS)
    return [
        {**r, "step_time_best_s": repr(p.step_time_s)} for r, p in zip(made, found, strict=True)
    ]


def slower(by: float, number: int = 6) -> list[dict[str, str]]:
    return [
        {**r, "step_time_best_s": repr(by * float(r["step_time_best_s"]))} for r in rows(number)
    ]


def calibrated(measurements: list[dict[str, str]]) -> Calibration:
    return calibrate(CLUSTER, measurements, MODELS, source="a test")


def test_runs_as_predicted_move_nothing() -> None:
    found = calibrated(rows())
    assert not found.changes
    assert found.cluster.fitted == CLUSTER.fitted
    assert np.abs(found.before).max() < 1e-6


def test_slow_runs_make_a_slow_cluster_whose_predictions_are_nearer() -> None:
    found = calibrated(slower(1.08))
    assert np.abs(found.after).max() < 0.5 * np.abs(found.before).max()
    assert found.changes
    shares = {name: pair for name, pair in found.changes.items() if name.endswith("fraction")}
    assert all(after < before for before, after in shares.values())
    for name in found.changes:
        assert found.cluster.sources[f"fitted.{name}"] == "6 runs: a test"


def test_one_wild_run_moves_little() -> None:
    found = calibrated([*rows(), *slower(4.0, 1)])
    for before, after in found.changes.values():
        assert 0.7 < after / before < 1.4
    assert np.abs(found.after[:-1]).max() < 0.1


def test_rows_that_are_no_runs_of_the_cluster_are_left_out_and_told() -> None:
    good = rows(2)
    bad = [
        {**good[0], "gpu": "A100"},
        {**good[0], "step_time_best_s": ""},
        {**good[0], "step_time_best_s": "-1"},
        {**good[0], "model": "nobody-knows"},
        {**good[0], "consistency": "inconsistent: 2x"},
        {**good[0], "step_time_best_s": repr(1e3 * float(good[0]["step_time_best_s"]))},
    ]
    found = calibrated([*bad, *good])
    assert sorted(found.left_out) == [1, 2, 3, 4, 5, 6]
    assert len(found.before) == 2
    assert "A100" in found.left_out[1]
    assert "in seconds" in found.left_out[6]
    with pytest.raises(DocumentError, match="At least one row"):
        calibrated(bad)
    with pytest.raises(DocumentError, match="no rows"):
        calibrated([])


def write(path: Path, measurements: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(measurements[0]))
        writer.writeheader()
        writer.writerows(measurements)
    return path


def test_the_command_writes_a_cluster_that_is_priced_as_measured(tmp_path: Path) -> None:
    runs = write(tmp_path / "runs.csv", slower(1.08))
    path = tmp_path / "my.toml"
    done = CliRunner().invoke(app, ["calibrate", "64xH100", str(runs), "-o", str(path), "--json"])
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert answer["used"] == 6
    assert answer["median_error_after"] < answer["median_error_before"]
    again = load_cluster(str(path))
    assert again.fitted.keys() == answer["fitted"].keys()
    assert all("runs.csv" in again.sources[f"fitted.{name}"] for name in again.fitted)


def test_the_command_tells_what_it_did(tmp_path: Path) -> None:
    runs = write(tmp_path / "runs.csv", [*rows(2), {**rows(1)[0], "gpu": "A100"}])
    path = tmp_path / "my.toml"
    done = CliRunner().invoke(app, ["calibrate", "64xH100", str(runs), "-o", str(path)])
    assert done.exit_code == 0, done.output
    assert "2 of 3 rows used" in done.stdout
    assert "left out: row 3 r0: gpu = 'A100-SXM-80GB'" in done.stdout
    assert "no factor moved" in done.stdout
    to_nowhere = ["calibrate", "64xH100", str(runs), "-o", str(tmp_path / "no" / "my.toml")]
    assert isinstance(CliRunner().invoke(app, to_nowhere).exception, DocumentError)
