"""``meshwright train`` as torchrun starts it: several processes that meet. Provenance: ours."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from meshwright.__main__ import main

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
    _until(lambda: metrics.exists() and metrics.read_text() != "")
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


def refuse(words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run ``train`` with words that it has to refuse, with exit status 2."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["meshwright", "train", str(config), *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2


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
    words: tuple[str, ...],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    refuse(words, tmp_path, monkeypatch)
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert "error:" in error
    assert told in error


@pytest.mark.parametrize(
    ("world", "rank", "told"),
    [
        ("two", "0", "WORLD_SIZE = 'two'"),
        ("2", "2", "RANK = 2: Of 2 ranks the last is 1"),
        ("3", "0", "layout.tp = 2: Groups of tp have equal size"),
    ],
)
def test_a_world_that_cannot_be_is_told_at_once(
    world: str,
    rank: str,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setenv("RANK", rank)
    refuse(("--layout", "tp=2"), tmp_path, monkeypatch)
    assert told in capsys.readouterr().err


def _ranks_of(folder: Path) -> list[int]:
    """Return the processes, zombies aside, whose command line names a folder."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if str(folder / "config.json").encode() in words:
                found.append(int(entry.name))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells ranks of a dead launcher")
def test_ranks_of_a_killed_torchrun_save_and_end(tmp_path: Path) -> None:
    config, metrics = tmp_path / "config.json", tmp_path / "metrics"
    config.write_text(json.dumps(CONFIG), encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words = ["train", str(config), "--layout", "tp=2", "--seq-len", "32", "--steps", "1000000"]
    words += ["--metrics", str(metrics), "--checkpoints", str(tmp_path / "saved")]
    launcher = subprocess.Popen(
        [*torchrun, "--nproc-per-node", "2", "-m", "meshwright", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    _until(lambda: metrics.exists() and metrics.read_text() != "")
    assert len(_ranks_of(tmp_path)) == 3
    launcher.kill()
    launcher.wait()
    _until(lambda: not _ranks_of(tmp_path))
    (saved,) = (tmp_path / "saved").iterdir()
    assert saved.name == f"step-{len(metrics.read_text().splitlines()):08d}"


def test_ctrl_c_before_a_terminal_saves_and_ends(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG), encoding="utf-8")
    ours, theirs = os.openpty()
    words = ["train", str(config), "--seq-len", "32", "--steps", "1000000", "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "meshwright", *words, "--checkpoints", str(tmp_path / "saved")],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "200"},
    )
    os.close(theirs)
    shown = b""
    deadline = time.monotonic() + 60
    while b"loss" not in shown and time.monotonic() < deadline:
        shown += os.read(ours, 4096)
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(OSError):
        while more := os.read(ours, 4096):
            shown += more
    answer, _ = process.communicate(timeout=30)
    os.close(ours)
    report = json.loads(answer)
    assert process.returncode == 0
    assert report["stopped"]
    assert Path(report["checkpoint"]).name == f"step-{report['step']:08d}"
    assert b"stopping after this step" in shown
    assert b"\x1b[" in shown


def _until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.1)
