"""What mixtures of experts hold: exchanged tokens, steps of an activation, tables beside FP8."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from meshwright.cost.detail import Estimate, estimate
from meshwright.describe.cluster import load_cluster
from meshwright.describe.decoder import build_decoder
from meshwright.describe.facts import Attention, Decoder, Layer, Moe
from meshwright.describe.job import Execution, Job, precision
from meshwright.describe.model import Model
from meshwright.describe.models import load_model
from meshwright.fit.documents import load_models, load_runs, shipped
from meshwright.fit.predict import predict
from meshwright.parallel.layout import Layout, Zero, layout

HIDDEN, FFN, TOKENS, EP = 4096, 512, 4096, 8
EP_ALONE = layout(gpus=8, ep=EP, mbs=1)


def mixture(topk: int = 4, ffn: int = FFN) -> Model:
    """Return one layer whose routed tokens are wider than what its experts work on."""
    moe = Moe(num_experts=8, topk=topk, ffn_hidden_size=ffn)
    layer = Layer(mixer=Attention(num_heads=8, num_kv_heads=8, head_dim=64), ffn=moe)
    facts = Decoder(model_type="moe", hidden_size=HIDDEN, vocab_size=0, layers=(layer,))
    return build_decoder(facts)


def held(model: Model, recipe: str = "bf16", x: Layout[int] = EP_ALONE, **changes: Any) -> Estimate:
    execution = Execution(**changes)
    j = Job(seq_len=TOKENS, gbs=8, precision=precision(recipe), execution=execution)
    return estimate(model, load_cluster("8xH100"), j, x)


def exchanged(dispatcher: str, recipe: str = "bf16", topk: int = 4) -> float:
    """Return what runs beside the kept tensors, in copies of the routed tokens in 16 bit."""
    found = held(mixture(topk), recipe, dispatcher=dispatcher, keeps_placeholders=False)
    workspaces = 32 * 2**20 * (2 + 1 + 4)
    return (found.memory["buffers_bytes"] - workspaces) / (TOKENS * topk * HIDDEN * 2)


def test_an_all_to_all_holds_what_it_sorts_sends_sorts_again_and_gets_back() -> None:
    assert exchanged("alltoall") == pytest.approx(4, rel=1e-9)


@pytest.mark.parametrize("topk", [1, 2, 4])
def test_deepep_receives_a_token_once_for_all_experts_of_a_rank(topk: int) -> None:
    # 8 ranks, each chosen by a token with probability 1 - (7/8)^topk.
    once = 8 * (1 - (7 / 8) ** topk) / topk
    assert exchanged("deepep", topk=topk) == pytest.approx(2 + once, rel=1e-9)


def test_hybridep_sorts_what_it_receives_and_pads_it_too() -> None:
    assert exchanged("hybridep") == pytest.approx(2, rel=1e-9)
    assert exchanged("hybridep", "fp8-blockwise") == pytest.approx(2, rel=1e-9)


def test_quantised_products_pad_the_tokens_of_each_expert_in_a_copy() -> None:
    assert exchanged("alltoall", "fp8-blockwise") == pytest.approx(5, rel=1e-9)


def test_an_activation_in_steps_keeps_its_result_and_needs_12_bytes_a_feature_backward() -> None:
    # Wide experts, so that their gradients are larger than what is exchanged.
    model = mixture(topk=2, ffn=8 * HIDDEN)
    one, steps = (
        held(model, fused_expert_activation=fused, keeps_placeholders=False).stages[0]
        for fused in (True, False)
    )
    features = TOKENS * 2 * 8 * HIDDEN
    # Gated: silu and the product with it, as large as what fc1 returns.
    assert steps["activations_bytes"] - one["activations_bytes"] == 2 * 2 * features
    products = 2 * TOKENS * 2 * (HIDDEN + 2 * 8 * HIDDEN)
    assert steps["buffers_bytes"] - one["buffers_bytes"] == pytest.approx(
        max(12 * features - products, 0), abs=1
    )


@pytest.mark.parametrize(
    ("run", "within"),
    [("mixtral-a2a", 0.03), ("mixtral-hybridep", 0.03), ("deepseek-a2a", 0.06)],
)
def test_single_layers_of_megatrons_own_benchmark_hold_what_it_measured(
    run: str, within: float
) -> None:
    # Megatron-LM, tests/functional_tests/test_cases/common/moe_perf/baseline.json.
    rows = [r for r in load_runs(shipped("memory.csv.gz")) if f"mlmmod-{run}" in r["id"]]
    (found,) = predict(rows, load_models(shipped("models.json.gz")))
    assert found.peak_bytes == pytest.approx(float(rows[0]["peak_memory_bytes"]), rel=within)


def test_a_layer_alone_has_no_optimizer() -> None:
    rows = [r for r in load_runs(shipped("memory.csv.gz")) if r["task"] == "module"]
    found = predict(rows, load_models(shipped("models.json.gz")))
    assert rows
    assert all(p.estimate and p.estimate.memory["optimizer_bytes"] == 0 for p in found)


@pytest.mark.parametrize(("recipe", "layers_bytes"), [("fp8-cs", 3), ("fp8-mx", 4), ("bf16", 2)])
def test_embedding_and_head_stay_in_16_bit_beside_quantised_layers(
    recipe: str, layers_bytes: int
) -> None:
    model = load_model("llama3-8b")
    x = layout(gpus=8, tp=8)
    job = Job(seq_len=8192, gbs=8, precision=precision(recipe))
    found = estimate(model, load_cluster("8xH100"), job, x)
    # 128,256 words in multiples of 8 * 128, and the last norm.
    tables = 2 * 129024 * 4096 / 8 + 4096
    layers = 32 * (4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336) / 8 + 32 * 2 * 4096
    assert found.memory["weights_bytes"] == pytest.approx(2 * tables + layers_bytes * layers)


def test_sharded_tables_are_divided_as_other_weights() -> None:
    model, job = load_model("llama3-8b"), Job(seq_len=8192, gbs=8, precision=precision("fp8-cs"))
    quantised = replace(job.precision, param_bytes=1.0, param_copy_bytes=0.0)
    cluster, weights = load_cluster("8xH100"), []
    for zero in (Zero.no_shard, Zero.optim_grads_params):
        x = layout(gpus=8, zero=zero)
        found = estimate(model, cluster, replace(job, precision=quantised), x)
        weights.append(found.memory["weights_bytes"])
    assert weights[0] == pytest.approx(8 * weights[1], rel=1e-9)
