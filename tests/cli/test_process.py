"""The command line as a process: help, usage, streams and exit statuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import (
    BATCH,
    TEXT,
    Run,
    holds,
)
from meshwright import __version__


def test_the_version_and_help_are_printed(run: Run) -> None:
    assert run("--version").out.strip() == __version__
    for word in ("plan", "estimate", "explain", "ranks", "list"):
        shown = run(word, "--help")
        assert shown.status == 0
        assert "--json" in shown.out
    assert run("--help").status == 0


@pytest.mark.parametrize(
    "words",
    [
        ("plan", "MODEL", "16xH100", "--top", "0"),
        ("plan", "MODEL", "16xH100", "--top", "many"),
        ("plan", "MODEL", "16xH100", "--seq-len", "long"),
        ("plan", "MODEL"),
        ("estimate", "MODEL", "16xH100"),
        ("ranks",),
        ("list",),
        ("dance",),
        ("plan", "MODEL", "16xH100", "--loud"),
    ],
)
def test_wrong_usage_exits_with_2_and_points_at_help(
    run: Run, model: str, words: tuple[str, ...]
) -> None:
    answer = run(*(model if w == "MODEL" else w for w in words))
    assert answer.status == 2
    assert "Traceback" not in answer.err
    assert "--help" in answer.err or "-h" in answer.err


def test_with_json_an_error_is_json_too(run: Run, model: str) -> None:
    answer = run("estimate", model, "16xH100", "--layout", "tp=3", *BATCH, "--json")
    assert answer.status == 2
    holds(dict.fromkeys(("field", "rule", "remedy"), TEXT), answer.json()["error"])
    assert answer.err.startswith("error: layout.tp = 3")


def as_process(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "meshwright", *words]
    plain = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, cwd=cwd, env=plain, check=False
    )


def test_a_process_ends_with_the_same_status_and_streams(model: str, tmp_path: Path) -> None:
    words = ("estimate", model, "16xH100", *BATCH, "--json", "--layout")
    good = as_process(*words, "tp=2", cwd=tmp_path)
    assert (good.returncode, good.stderr) == (0, "")
    assert json.loads(good.stdout)["layout"]["tp"] == 2
    bad = as_process(*words, "tp=3", cwd=tmp_path)
    assert bad.returncode == 2
    assert "Traceback" not in bad.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_leaves_early_is_no_error(model: str) -> None:
    command = f"{sys.executable} -m meshwright list models | head -n 1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""
