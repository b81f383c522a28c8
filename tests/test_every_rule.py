"""Rules that no row of the oracles names: a launch that breaks each, and one that does not.

Provenance: spec; conditions of the frameworks' sources of August 2026 (verl: January 2026). The
table is ``data/broken_rules.csv``; words ``NAME=value`` in capitals are the environment.
"""

from __future__ import annotations

import csv
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import meshwright as mw
from launches import titan, verl
from meshwright.findings import Finding
from meshwright.frameworks.megatron_bridge.launch import rules as bridge_rules
from meshwright.frameworks.megatron_lm.launch import rules as megatron_rules
from meshwright.frameworks.read import read_launch
from test_framework_rules import actor, llama, rl, rl_fsdp, sft

DATA = Path(__file__).parent / "data"
with (DATA / "broken_rules.csv").open(encoding="ascii") as table:
    ROWS = {row["rule"]: row for row in csv.DictReader(table)}

MEGATRON = (
    "--num-layers 8 --hidden-size 1024 --num-attention-heads 16 --seq-length 1024"
    " --max-position-embeddings 1024 --micro-batch-size 1 --global-batch-size 32 --bf16"
)
BRIDGE = (
    "model.num_layers=8 model.hidden_size=1024 model.num_attention_heads=16 model.seq_length=1024"
    " dataset.seq_length=1024 train.micro_batch_size=1 train.global_batch_size=32"
)
TOKENS = "--training.num_tokens_per_microbatch_per_dp_rank 8192"
EAGER = "--training.disable_cuda_graphs"


def _words(text: str) -> tuple[list[str], dict[str, str]]:
    words = shlex.split(text)
    env = dict(w.split("=", 1) for w in words if w.partition("=")[0].isupper())
    return [w for w in words if not w.partition("=")[0].isupper()], env


def megatron(text: str) -> list[Finding]:
    words, env = _words(text)
    env = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"} | env
    return mw.check_launch([*MEGATRON.split(), *words], 8, "megatron-lm", env)


def bridge(text: str) -> list[Finding]:
    words, env = _words(text)
    return mw.check_launch([*BRIDGE.split(), *words], 8, "megatron-bridge", env)


def read(launch: Callable[[str], list[str]]) -> Callable[[str], Sequence[Finding]]:
    return lambda text: read_launch(launch(text), gpus=8).findings


LAUNCHES: dict[str, Callable[[str], Sequence[Finding]]] = {
    "megatron": megatron,
    "bridge": bridge,
    "rl": read(rl),
    "rl_fsdp": read(rl_fsdp),
    "sft": read(sft),
    "verl": read(actor),
    "verl_fsdp": read(lambda text: verl("", text, strategy="fsdp")),
    "titan": read(llama),
    "titan_graphs": read(lambda t: titan("llama3_8b", f"{TOKENS} {t}")),
    "titan_qwen": read(lambda t: titan("qwen3_30b_a3b", f"{TOKENS} {EAGER} {t}")),
    "titan_flux": read(lambda text: titan("flux_dev", text)),
    "titan_moe": read(lambda t: titan("deepseek_v3_16b", f"{TOKENS} {t}")),
    "titan_eager_moe": read(lambda t: titan("deepseek_v3_16b", f"{TOKENS} {EAGER} {t}")),
}


@pytest.mark.parametrize("rule", ROWS)
def test_a_rule_is_told_of_its_breach_and_of_nothing_beside_it(rule: str) -> None:
    row = ROWS[rule]
    found = LAUNCHES[row["launch"]]
    broken = next((f for f in found(row["breach"]) if f.id == rule), None)
    assert broken is not None
    assert broken.severity == row["severity"]
    assert "{" not in broken.message
    assert rule not in {f.id for f in found(row["mended"])}


def test_a_rule_that_is_said_to_be_unjudged_is_judged_nowhere() -> None:
    with (DATA / "unjudged_rules.csv").open(encoding="ascii") as file:
        unjudged = {row["rule"] for row in csv.DictReader(file)}
    known = {rule.id for rule in (*megatron_rules(), *bridge_rules())}
    assert unjudged & (known | ROWS.keys()) == set()
