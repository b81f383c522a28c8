"""The benchmark of one GPU runs on a CPU with tiny shapes, and says that it needs a GPU."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCH = Path(__file__).parent.parent / "bench" / "gpu_throughput.py"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    found = importlib.util.spec_from_file_location("gpu_throughput", BENCH)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    monkeypatch.setitem(sys.modules, "gpu_throughput", module)
    found.loader.exec_module(module)
    return module


def test_without_a_gpu_it_is_refused(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_throughput.py"])
    assert bench.main() == 2
    assert "needs a GPU" in capsys.readouterr().err


def test_tiny_shapes_of_every_case_train_beside_plain_pytorch(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.PlainLayer, "compile", lambda self, **choices: None)
    device = torch.device("cpu")
    for name, case in bench.CASES.items():
        small = bench.tiny(case)
        rows = torch.randint(0, small.shape.vocab_size, (small.gbs, small.seq_len + 1))
        losses = [make(small, rows, "")() for make in (bench.own_step, bench.plain_step)]
        assert losses == pytest.approx([5.0, 5.0], rel=0.1), name
    assert bench.peak_flops_per_s(device) == 0.0
