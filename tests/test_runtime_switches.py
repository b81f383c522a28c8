"""Switches of overlap reach the runtime by the planner's names and change no number."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from meshwright import api
from meshwright.__main__ import main
from meshwright.describe.job import Execution
from meshwright.errors import JobError
from meshwright.runtime import train as train_module
from meshwright.runtime.engine import Settings
from meshwright.runtime.switches import SWITCHES, execution_from_text
from meshwright.verify import numerics

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 101,
}
OFF = "overlap_pp_comm=false"
LAYOUTS = {
    "overlap_grad_reduce": "dp=2",
    "overlap_param_gather": "dp=2 zero=optim_grads_params",
    "overlap_tp_comm": "tp=2",
    "overlap_cp_comm": "cp=2",
    "overlap_pp_comm": "pp=2 vpp=2",
}


def test_text_sets_the_switches_that_it_names() -> None:
    found = execution_from_text("overlap_tp_comm=false, overlap_cp_comm=true")
    assert found == dataclasses.replace(Execution(), overlap_tp_comm=False)
    assert execution_from_text("") == Execution()


def test_every_switch_is_a_field_of_the_planner() -> None:
    assert set(SWITCHES) <= {field.name for field in dataclasses.fields(Execution)}
    assert set(LAYOUTS) == set(SWITCHES)


@pytest.mark.parametrize("text", ["overlap_tp=false", "overlap_tp_comm", "overlap_tp_comm=1"])
def test_unknown_switches_and_values_are_refused_with_a_remedy(text: str) -> None:
    with pytest.raises(JobError) as caught:
        execution_from_text(text)
    assert "overlap_tp_comm" in f"{caught.value.field} {caught.value.remedy}"


@pytest.mark.parity
@pytest.mark.parametrize("name", SWITCHES)
def test_each_switch_turned_off_leaves_a_layout_equal_to_one_process(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    class Noted(Settings):
        def __init__(self, **given: Any) -> None:
            super().__init__(**given)
            if getattr(self.execution, name):
                raise AssertionError(f"{name} is on")

    monkeypatch.setattr(numerics, "Settings", Noted)
    report = api.verify(LAYOUTS[name], dtype="float64", timeout_s=60.0, switches=f"{name}=false")
    assert report.ok, (report.max_loss_diff, report.max_grad_diff, report.worst)


def test_train_passes_the_switches_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Execution] = []
    engine = train_module.Engine

    def noted(shape: Any, x: Any, settings: Settings, **more: Any) -> Any:
        seen.append(settings.execution)
        return engine(shape, x, settings, **more)

    monkeypatch.setattr(train_module, "Engine", noted)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    words = ["train", str(tmp_path), "--seq-len", "16", "--steps", "1"]
    monkeypatch.setattr(sys, "argv", ["meshwright", *words, "--switches", OFF])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert [execution.overlap_pp_comm for execution in seen] == [False]


def test_a_wrong_switch_on_the_command_line_ends_with_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["meshwright", "verify", "--layout", "tp=2", "--switches", "overlap_tp=false"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "overlap_tp_comm" in capsys.readouterr().err
