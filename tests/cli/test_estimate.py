"""``estimate``: the promised JSON, every precision and task, what is assumed."""

from __future__ import annotations

import pytest

from command_line import (
    BATCH,
    Run,
    holds_plan,
)
from meshwright.cost.detail import TIME_TERMS
from meshwright.cost.step import MEMORY_TERMS


def test_estimate_prints_the_promised_json(run: Run, model: str) -> None:
    answer = run("estimate", model, "16xH100", "--layout", "tp=2 pp=4", *BATCH, "--json")
    assert answer.status == 0
    told = answer.json()
    assert set(told) == {"layout", "estimate", "findings"}
    holds_plan(told, 16)
    assert tuple(told["estimate"]["time"]) == TIME_TERMS
    assert tuple(told["estimate"]["memory"]) == MEMORY_TERMS


def test_estimate_prices_a_layout_that_does_not_fit_and_says_so(run: Run) -> None:
    words = ("estimate", "llama3-70b", "8xH100", "--layout", "tp=1", *BATCH)
    answer = run(*words, "--json")
    assert answer.status == 0
    told = answer.json()["estimate"]
    assert (told["fits"], told["verdict"]) == (False, "does not fit")
    assert told["margin_fraction"] < 0
    assert "does not fit" in run(*words).out


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32", "fp8", "fp8-cs", "fp8-mx", "nvfp4"])
@pytest.mark.parametrize("task", ["pretrain", "sft", "lora"])
def test_every_precision_and_task_is_priced(
    run: Run, model: str, precision: str, task: str
) -> None:
    choice = ("--precision", precision, "--task", task)
    answer = run("estimate", model, "8xB200", "--layout", "tp=2", *BATCH, *choice, "--json")
    assert answer.status == 0
    holds_plan(answer.json(), 8)


def test_what_is_left_out_is_assumed_and_said(run: Run, model: str) -> None:
    told = run("estimate", model, "16xH100", "--layout", "tp=2", "--json").json()
    assumed = " ".join(told["estimate"]["assumed"])
    assert "seq_len" in assumed
    assert "gbs" in assumed
    assert "gpus_per_node" in assumed
