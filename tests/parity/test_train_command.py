"""``meshwright train`` as torchrun starts it: several processes that meet. Provenance: ours."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.parity

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _start(folder: Path, *of_ranks: tuple[str, ...], layout: str) -> list[subprocess.Popen[str]]:
    """Start one process per rank with its own further words."""
    config = folder / "config.json"
    config.write_text(json.dumps(CONFIG), encoding="utf-8")
    command = [sys.executable, "-m", "meshwright", "train", str(config), "--layout", layout]
    command += ["--seq-len", "32", "--timeout", "20"]
    shared = {
        "WORLD_SIZE": str(len(of_ranks)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": "1",
    }
    return [
        subprocess.Popen(
            [*command, *words],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank, words in enumerate(of_ranks)
    ]


def test_two_processes_train_and_tell_their_losses(tmp_path: Path) -> None:
    processes = _start(tmp_path, *[("--steps", "3", "--json")] * 2, layout="tp=2")
    answers = [p.communicate(timeout=120) for p in processes]
    assert [p.returncode for p in processes] == [0, 0], answers
    report = json.loads(answers[0][0])
    assert report["step"] == len(report["losses"]) == 3
    assert answers[1][0] == ""
    assert "step 3/3 | loss" in answers[0][1]


def test_rank_0_names_a_rank_that_was_killed(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics"
    processes = _start(
        tmp_path, *[("--steps", "1000000", "--metrics", str(metrics))] * 2, layout="tp=2"
    )
    deadline = time.monotonic() + 60
    while not metrics.exists() or not metrics.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGKILL)
    _, told = processes[0].communicate(timeout=60)
    processes[1].communicate()
    assert processes[0].returncode == 2
    assert "Traceback" not in told
    assert "error: rank = 1: It stopped: its process is gone" in told


def test_a_rank_with_another_config_is_named_by_all(tmp_path: Path) -> None:
    both = _start(tmp_path, ("--lr", "0.001"), ("--lr", "0.002"), layout="tp=2")
    told = [process.communicate(timeout=60)[1] for process in both]
    assert [process.returncode for process in both] == [2, 2]
    assert all("Its settings differ from those of rank 0" in text for text in told)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--steps", "0"), "train.steps = 0"),
        (("--layout", "tp=2"), "layout.world_size = 1"),
        (("--data", "/nowhere/corpus"), "There is no such file"),
        (("--decay", "exponential"), "train.decay"),
        (("--global-batch-size", "-3"), "job.gbs"),
    ],
)
def test_bad_input_is_told_without_a_traceback(
    words: tuple[str, ...], told: str, tmp_path: Path
) -> None:
    (process,) = _start(tmp_path, words, layout="tp=1")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "Traceback" not in error
    assert "error:" in error
    assert told in error
