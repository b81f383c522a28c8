"""What tests of the command line share: an answer, the JSON that is promised, bad input."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest

CONFIG = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}
MOE_CONFIG = {
    "model_type": "mixtral",
    "hidden_size": 1024,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
}
BATCH = ("--seq-len", "4096", "--global-batch-size", "64")


@dataclass(frozen=True)
class Answer:
    """What a command printed, and how it ended."""

    status: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Answer]


NUMBER = (int, float)
TEXT = (str,)
WHOLE = (int,)
FLAG = (bool,)
FINDING = {
    "id": TEXT,
    "severity": TEXT,
    "field": TEXT,
    "value": (object,),
    "rule": TEXT,
    "remedy": TEXT,
    "message": TEXT,
}
LAYOUT = {
    **dict.fromkeys(("tp", "pp", "vpp", "cp", "dp", "ep", "etp", "edp", "mbs"), WHOLE),
    "sp": FLAG,
    "zero": TEXT,
    "recompute": TEXT,
    "schedule": TEXT,
}
TIME = ("compute_s", "tp_comm_s", "cp_comm_s", "ep_comm_s", "dp_comm_s", "pp_comm_s")
MEMORY = ("weights_bytes", "grads_bytes", "optimizer_bytes", "activations_bytes", "logits_bytes")
ESTIMATE = {
    "step_time_s": NUMBER,
    "tokens_per_s_per_gpu": NUMBER,
    "model_flops_per_s_per_gpu": NUMBER,
    "mfu_fraction": NUMBER,
    "time": dict.fromkeys((*TIME, "bubble_s", "optimizer_s"), NUMBER),
    "peak_bytes": NUMBER,
    "capacity_bytes": NUMBER,
    "margin_fraction": NUMBER,
    "fits": FLAG,
    "verdict": TEXT,
    "memory": dict.fromkeys((*MEMORY, "buffers_bytes", "framework_bytes"), NUMBER),
    "stages": (list,),
    "assumed": (list,),
}


def holds(shape: Mapping[str, Any], answer: Mapping[str, Any], where: str = "") -> None:
    """Assert that an answer has the fields of ``shape``, each of its type."""
    for name, kind in shape.items():
        assert name in answer, f"{where}{name} is missing"
        value = answer[name]
        if isinstance(kind, dict):
            holds(kind, value, f"{where}{name}.")
            continue
        assert isinstance(value, kind), f"{where}{name} = {value!r}"
        if kind in (NUMBER, WHOLE):
            assert not isinstance(value, bool), f"{where}{name} = {value!r}"


def holds_estimate(e: dict[str, Any], pp: int) -> None:
    holds(ESTIMATE, e)
    assert all(
        isinstance(v, float) and v >= 0 for v in (*e["time"].values(), *e["memory"].values())
    )
    assert sum(e["time"].values()) == pytest.approx(e["step_time_s"], rel=1e-9)
    assert sum(e["memory"].values()) == pytest.approx(e["peak_bytes"], rel=1e-9)
    margin = (e["capacity_bytes"] - e["peak_bytes"]) / e["capacity_bytes"]
    assert e["margin_fraction"] == pytest.approx(margin)
    assert e["fits"] == (margin >= 0)
    assert e["verdict"] in ("fits", "borderline", "does not fit")
    assert [s["stage"] for s in e["stages"]] == list(range(pp))
    for stage in e["stages"]:
        holds({"stage": WHOLE, "layers": WHOLE, "peak_bytes": NUMBER}, stage)
    assert all(isinstance(line, str) for line in e["assumed"])


def holds_plan(plan: dict[str, Any], gpus: int) -> None:
    layout = plan["layout"]
    holds(LAYOUT, layout)
    degrees = [layout[k] for k in ("tp", "pp", "vpp", "cp", "dp", "ep", "etp", "edp", "mbs")]
    assert min(degrees) >= 1
    assert layout["tp"] * layout["pp"] * layout["cp"] * layout["dp"] == gpus
    assert layout["ep"] * layout["etp"] * layout["edp"] * layout["pp"] == gpus
    holds_estimate(plan["estimate"], layout["pp"])
    for finding in plan["findings"]:
        holds(FINDING, finding)
        assert finding["severity"] in ("error", "warning", "note")


def text_of(layout: Mapping[str, Any]) -> str:
    """Return a layout object as key=value text, as a user would print it."""
    shown = {k: str(v).lower() if isinstance(v, bool) else v for k, v in layout.items()}
    return " ".join(f"{k}={v}" for k, v in shown.items())


def told_in_one_message(answer: Answer, field: str) -> None:
    assert answer.status == 2
    assert answer.out == ""
    assert answer.err.startswith("error: ")
    assert field in answer.err
    assert " = " in answer.err
    assert "Traceback" not in answer.err
    assert len(answer.err) < 2000
