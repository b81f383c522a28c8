"""Published architectures: their counts against those computed by the tables' authors (oracle)."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from meshwright import MeshwrightError
from meshwright.describe.model import Model, Op, OpKind
from meshwright.describe.published import build_published

with gzip.open(Path(__file__).parent / "data" / "models.json.gz", "rt") as _file:
    ENTRIES: dict[str, dict[str, Any]] = json.load(_file)

COUNTED = [name for name, entry in ENTRIES.items() if "computed_total_params_b" in entry]
OWN_COUNT = {"gemma-4-26b-a4b-vl": (25.247, 3.836), "glm-5.2": (743.179, 41.053)}
"""The tables give every layer of Gemma 4 the heads of its windowed layers: we do not."""


def matrix_params(op: Op) -> int:
    """Return what the tables count: matrices and convolutions, no norms, biases or positions."""
    match op.kind:
        case OpKind.matmul | OpKind.grouped_matmul if op.params:
            return op.in_features * op.out_features * op.copies
        case OpKind.embedding if op.name == "word_embedding":
            return op.params
        case OpKind.elementwise if op.name == "conv":
            return round(op.moved_per_token) // 2 * 4
        case _:
            return 0


def billions(model: Model, entry: dict[str, Any]) -> tuple[float, float]:
    """Return (total, active) matrix parameters; the indexer of GLM is left out there."""
    blocks = (model.embedding, *(model.layer_kinds[k] for k in model.layer_pattern), model.head)
    ops = [op for block in blocks for op in block.ops]
    if "kv_lora_rank" in entry:
        ops = [op for op in ops if not op.name.startswith("indexer")]
    total = sum(map(matrix_params, ops))
    experts = sum(matrix_params(op) for op in ops if op.kind is OpKind.grouped_matmul)
    idle = experts * (model.num_experts - model.topk) // max(model.num_experts, 1)
    return total / 1e9, (total - idle) / 1e9


@pytest.mark.parametrize("name", COUNTED)
def test_an_entry_has_the_parameters_that_its_table_computed(name: str) -> None:
    entry = ENTRIES[name]
    stated = (entry["computed_total_params_b"], entry["computed_active_params_b"])
    model = build_published(name, entry)
    assert billions(model, entry) == pytest.approx(OWN_COUNT.get(name, stated), abs=6e-4)
    assert model.num_params / 1e9 == pytest.approx(stated[0], rel=0.015)


def test_an_entry_without_attention_is_one_layer_of_experts() -> None:
    model = build_published("layer", ENTRIES["moe-layer-deepseek-proxy"])
    assert [op.name for op in model.layer_kinds[0].ops][:2] == ["mlp_norm", "router"]
    assert model.embedding.ops == model.head.ops == ()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"hidden_size": -1}, "models.x.hidden_size"),
        ({"hidden_size": None}, "models.x.hidden_size"),
        ({"num_attention_heads": "many"}, "models.x.num_attention_heads"),
        ({"hybrid_pattern": "MX"}, "models.x.hybrid_pattern"),
        ({"compress_ratios": [4]}, "models.x.compress_ratios"),
        ({"compress_ratios": [3] * 80}, "models.x.compress_ratios"),
        ({"attention_layer_types": 3}, "models.x.attention_layer_types"),
    ],
)
def test_an_entry_that_cannot_be_names_the_key(change: dict[str, Any], field: str) -> None:
    with pytest.raises(MeshwrightError) as caught:
        build_published("x", ENTRIES["llama3-70b"] | change)
    assert caught.value.field == field
