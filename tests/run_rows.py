"""A run of a file of measured runs as tests write it: cells and further settings."""

from __future__ import annotations

import json
from typing import Any

from meshwright.fit.documents import load_models, load_runs, shipped
from meshwright.fit.predict import Prediction, predict
from meshwright.fit.rows import Run, read_row

MODELS = load_models(shipped("models.json.gz"))
RUNS = load_runs(shipped("runs.csv.gz")) + load_runs(shipped("memory.csv.gz"))

ROW = {
    "id": "a",
    "model": "llama3-8b",
    "gpu": "H100-SXM-80GB",
    "n_gpus": "32",
    "precision": "bf16",
    "gbs": "64",
    "mbs": "1",
    "seq_len": "4096",
    "tp": "2",
    "pp": "1",
    "cp": "1",
    "ep": "1",
    "fsdp": "none",
    "recompute": "none",
}


def run(words: dict[str, Any] | None = None, **cells: str) -> Run:
    """Return what ``ROW`` is read as with other cells and further settings."""
    return read_row({**ROW, **cells, "other_settings": json.dumps(words or {})}, MODELS)


def one(words: dict[str, Any] | None = None, **cells: str) -> Prediction:
    """Return the prediction of ``ROW`` with other cells and further settings."""
    row = {**ROW, **cells, "other_settings": json.dumps(words or {})}
    return predict([row], MODELS)[0]
