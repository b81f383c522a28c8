"""What a rank holds at its peak, mechanism by mechanism, against byte counts of the frameworks."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from meshwright.cost.detail import Estimate, estimate
from meshwright.cost.factors import fitted
from meshwright.describe.cluster import load_cluster
from meshwright.describe.decoder import build_decoder
from meshwright.describe.facts import Attention, Decoder, Layer, Mamba, Mlp
from meshwright.describe.job import Execution, Job, precision
from meshwright.describe.model import Model
from meshwright.describe.models import load_model
from meshwright.fit.documents import load_models, shipped
from meshwright.fit.predict import predict
from meshwright.fit.summary import summarize
from meshwright.parallel.layout import Layout, Zero, layout

MIB = 2.0**20
GPT = Execution(
    fused_cross_entropy=False,
    fused_wgrad_accumulation=False,
    flash_attention=False,
    attention_mask=True,
    deterministic=True,
)
"""Megatron-LM with Transformer Engine as its tests run it: deterministic, nothing fused."""


def gpt(num_layers: int = 12, **changes: Any) -> Model:
    """Return Megatron-LM's test model: 512 features, 8 heads, dropout, 50,257 words."""
    layer = Layer(
        mixer=Attention(num_heads=8, num_kv_heads=8, head_dim=64, qkv_bias=True, out_bias=True),
        ffn=Mlp(ffn_hidden_size=2048, gated=False, bias=True),
    )
    facts = Decoder(
        model_type="gpt",
        hidden_size=512,
        vocab_size=50257,
        layers=(layer,) * num_layers,
        norm_weights=2,
        hidden_dropout=0.1,
        tie_word_embeddings=True,
    )
    return build_decoder(replace(facts, **changes))


def job(execution: Execution = GPT, **changes: Any) -> Job:
    return replace(Job(seq_len=1024, gbs=32, execution=execution), **changes)


def priced(
    x: Layout[int], j: Job | None = None, *, model: Model | None = None, gpu: str = "A100"
) -> Estimate:
    cluster = load_cluster(f"{max(x.world_size, 8)}x{gpu}" if x.world_size >= 8 else f"8x{gpu}")
    return estimate(model or gpt(), cluster, j or job(), x)


def allocated(found: Estimate, stage: int = -1) -> float:
    """Return live tensors of a stage in GiB, without context, communicators and fragments."""
    rank = found.stages[stage]
    return (rank["peak_bytes"] - rank["framework_bytes"]) / 2**30


# Peaks of the last rank that Megatron-LM's own functional tests keep as golden values (2026-08,
# tests/functional_tests/test_cases/gpt, DGX A100 and H100): 12 layers, mbs 4, 1,024 tokens.


@pytest.mark.parametrize(
    ("choices", "execution", "gpu", "golden_gib"),
    [
        ({"tp": 1, "pp": 2}, {}, "A100", 3.325),
        ({"tp": 2, "pp": 2, "sp": False}, {}, "A100", 1.770),
        ({"tp": 1, "pp": 4, "vpp": 3}, {}, "H100", 3.875),
        (
            {"tp": 2, "pp": 2, "sp": True, "cp": 2},
            {"flash_attention": True, "deterministic": False},
            "H100",
            0.871,
        ),
        ({"tp": 1, "pp": 2}, {"transformer_engine": False}, "H100", 3.384),
    ],
)
def test_golden_peaks_of_megatrons_own_tests(
    choices: dict[str, Any], execution: dict[str, Any], gpu: str, golden_gib: float
) -> None:
    x = layout(gpus=8, mbs=4, zero=Zero.no_shard, **choices)
    found = priced(x, job(replace(GPT, overlap_tp_comm=False, **execution)), gpu=gpu)
    assert allocated(found) == pytest.approx(golden_gib, rel=0.01)


def peak_change(less: Execution, more: Execution, **choices: Any) -> float:
    """Return how much more live memory (MiB) the last rank holds."""
    x = layout(gpus=8, mbs=4, zero=Zero.no_shard, **choices)
    return 1024 * (allocated(priced(x, job(more))) - allocated(priced(x, job(less))))


LOGIT_MIB = 4096 * 50257 / MIB
"""One byte for each logit of a micro-batch."""


def test_a_loss_in_fp32_holds_6_bytes_a_logit_and_a_compiled_one_10() -> None:
    # lts golden value with the native fused loss, 1.651 GiB at tp=2: 10.1 bytes a logit.
    compiled = replace(GPT, fused_cross_entropy=True, compiled_cross_entropy=True)
    assert peak_change(GPT, compiled) == pytest.approx(4 * LOGIT_MIB, rel=1e-6)


def test_gradients_of_the_logits_that_wait_hold_2_bytes_a_logit_and_micro_batch() -> None:
    # 2.180 - 1.770 GiB at tp=2 with a limit of 2: 4.2 bytes a logit.
    waiting = replace(GPT, deferred_head_microbatches=2)
    assert peak_change(GPT, waiting) == pytest.approx(4 * LOGIT_MIB, rel=1e-6)


def test_softmax_in_fp32_that_is_not_fused_keeps_2_more_bytes_a_pair() -> None:
    apart = replace(GPT, fused_softmax=False, softmax_in_fp32=True)
    pairs = 12 * 4 * 8 * 1024 * 1024
    assert peak_change(GPT, apart) == pytest.approx(2 * pairs / MIB, rel=1e-6)


def test_attention_without_dropout_keeps_2_of_5_bytes_a_pair() -> None:
    without = replace(GPT, attention_dropout=False)
    pairs = 12 * 4 * 8 * 1024 * 1024
    assert peak_change(without, GPT) == pytest.approx(3 * pairs / MIB, rel=1e-6)


def test_hidden_dropout_keeps_a_byte_a_feature_twice_a_layer_and_at_the_embedding() -> None:
    x = layout(gpus=8, mbs=4, zero=Zero.no_shard)
    dry = priced(x, model=gpt(hidden_dropout=0.0))
    masks = (2 * 12 + 1) * 4096 * 512
    assert allocated(priced(x)) - allocated(dry) == pytest.approx(masks / 2**30, rel=1e-6)


def test_the_data_loaders_mask_holds_a_byte_a_pair_of_tokens() -> None:
    without = replace(GPT, attention_mask=False)
    assert peak_change(without, GPT) == pytest.approx(4.0, rel=1e-6)


@pytest.mark.parametrize(
    ("gpu", "execution", "mib"),
    [
        ("A100", {"deterministic": False}, 2 * 8.125 + 4),
        ("A100", {}, 2 * 32 + 4),
        ("H100", {"deterministic": False}, 3 * 32),
        ("H100", {"transformer_engine": False, "flash_attention": True}, 2 * 32),
    ],
)
def test_workspaces_are_those_of_two_threads_and_of_transformer_engine(
    gpu: str, execution: dict[str, Any], mib: float
) -> None:
    x = layout(gpus=8, mbs=4, zero=Zero.no_shard)
    rank = priced(x, job(replace(GPT, **execution)), gpu=gpu).stages[0]
    # At the end of forward nothing else is alive beside what is kept, the logits and the mask.
    logits = 2 * 4096 * 50257 + 4 * MIB
    assert (rank["buffers_bytes"] - logits) / MIB == pytest.approx(mib, rel=1e-6)


def test_layers_of_one_shape_share_a_placeholder() -> None:
    fused = replace(GPT, fused_wgrad_accumulation=True)
    few, many = (gpt(n) for n in (2, 12))
    x = layout(gpus=8, mbs=4, zero=Zero.no_shard)

    def held(model: Model) -> float:
        off = priced(x, job(replace(fused, keeps_placeholders=False)), model=model)
        return 2**30 * (allocated(priced(x, job(fused), model=model)) - allocated(off))

    shapes = 2 * (512 * 1536 + 512 * 512 + 2 * 512 * 2048)
    assert (held(few), held(many)) == pytest.approx((shapes, shapes), rel=1e-6)


def test_blocks_of_two_kinds_share_the_placeholders_of_shapes_that_they_both_have() -> None:
    wide = replace(gpt().facts.layers[0], ffn=Mlp(ffn_hidden_size=4096, gated=False))  # pyright: ignore[reportOptionalMemberAccess]
    both = gpt(layers=(*gpt(2).facts.layers, wide))  # pyright: ignore[reportOptionalMemberAccess]
    fused = replace(GPT, fused_wgrad_accumulation=True)
    x = layout(gpus=8, mbs=4, zero=Zero.no_shard)
    on, off = (
        priced(x, job(replace(fused, keeps_placeholders=keeps)), model=both)
        for keeps in (True, False)
    )
    shapes = 2 * (512 * 1536 + 512 * 512 + 2 * 512 * 2048 + 2 * 512 * 4096)
    assert 2**30 * (allocated(on) - allocated(off)) == pytest.approx(shapes, rel=1e-6)


def test_mamba_keeps_its_projection_scan_output_gate_and_norm_output() -> None:
    mamba = Mamba(num_heads=32, head_dim=64, state_size=128, num_groups=8, conv_kernel=4)
    x = layout(gpus=8, mbs=4, zero=Zero.no_shard)

    def kept(n: int) -> float:
        model = gpt(layers=(Layer(mixer=mamba),) * n, hidden_dropout=0.0)
        return priced(x, model=model).stages[0]["activations_bytes"]

    inner, states = 32 * 64, 2 * 8 * 128
    projected = 2 * inner + states + 32
    # The layer's input and its norm, what in_proj returns, scan output, gate, norm output.
    per_token = 2 * (512 + 512 + projected + 3 * inner)
    assert kept(3) - kept(2) == pytest.approx(4096 * per_token, rel=1e-9)


def test_16_bit_gradients_are_copied_to_fp32_by_the_update_alone() -> None:
    x = layout(gpus=8, mbs=1, zero=Zero.no_shard)
    half = replace(precision("bf16"), grad_bytes=2.0, grad_reduce_bytes=2.0)
    (rank,) = priced(x, job(precision=half)).stages
    (whole,) = priced(x).stages

    def update(stage: dict[str, float]) -> float:
        static = sum(stage[t] for t in ("weights_bytes", "grads_bytes", "optimizer_bytes"))
        return stage["optimizer_peak_bytes"] - static

    # The copies come and go, so the allocator keeps blocks of their sizes.
    copies = rank["weights_bytes"] / 2 * 4 * (1 + fitted().fragmentation_fraction)
    assert update(rank) - update(whole) == pytest.approx(copies, rel=1e-9)


@pytest.mark.parametrize("pp", [1, 4])
def test_the_peak_of_a_rank_is_that_of_its_fullest_phase(pp: int) -> None:
    for rank in priced(layout(gpus=8, pp=pp, mbs=4)).stages:
        phases = [rank[f"{p}_peak_bytes"] for p in ("forward", "backward", "optimizer")]
        assert rank["peak_bytes"] == max(phases)
        assert rank["optimizer_peak_bytes"] < rank["backward_peak_bytes"]


def test_the_logits_are_gone_when_wide_layers_run_backward() -> None:
    wide = Layer(
        mixer=Attention(num_heads=8, num_kv_heads=8, head_dim=64),
        ffn=Mlp(ffn_hidden_size=512 * 512, gated=False),
    )
    (rank,) = priced(layout(gpus=8, mbs=4), model=gpt(layers=(wide,))).stages
    assert rank["logits_bytes"] == 0
    assert rank["backward_peak_bytes"] > rank["forward_peak_bytes"]


def test_free_routing_holds_half_as_many_routed_tokens_again_on_the_fullest_rank() -> None:
    model = load_model("mixtral-8x7b")
    x = layout(gpus=8, ep=8, mbs=1)

    def kept(**changes: Any) -> float:
        execution = replace(Execution(), **changes)
        return estimate(
            model, load_cluster("8xH100"), Job(seq_len=4096, gbs=8, execution=execution), x
        ).stages[0]["forward_peak_bytes"]

    # A capacity factor scales routed tokens and nothing else.
    routed = kept(capacity_factor=2.0) - kept()
    assert kept(forced_balance=False) - kept() == pytest.approx(routed / 2, rel=1e-9)


def run_of(model: str, **words: Any) -> dict[str, str]:
    cells = {"model": model, "gpu": "H100-SXM-80GB", "n_gpus": "8", "gbs": "8", "mbs": "1"}
    cells |= {"id": model, "seq_len": "1024", "precision": "bf16", "task": "pretrain"}
    cells |= {"peak_memory_stat": "allocated", "peak_memory_bytes": "8e9"}
    return cells | {"other_settings": json.dumps(words)}


HYBRID = "mlm-h1024-l44-a16-kv8-hybrid"


def test_a_row_that_lays_out_other_layers_than_its_model_is_refused() -> None:
    models = load_models(shipped("models.json.gz"))
    whole, cut = models[HYBRID]["hybrid_pattern"], "M-M*"
    found = predict([run_of(HYBRID, hybrid_layer_pattern=p) for p in (whole, cut)], models)
    assert [p.status for p in found] == ["ok", "refused"]
    assert "lay out 4 layers" in found[1].why and "has 44" in found[1].why


def test_memory_that_cannot_hold_the_weights_is_told_and_in_no_error_but_still_predicted() -> None:
    models = load_models(shipped("models.json.gz"))
    rows = [run_of(HYBRID, mem_allocated_between_steps_gib=gib) for gib in (0.4, 2.0)]
    rows[1]["id"] = "sound"
    found = predict(rows, models)
    told = summarize(rows, found, models)
    assert found[0].peak_bytes == found[1].peak_bytes
    assert list(told["impossible_memory"]) == [HYBRID]
    assert "0.43 GB held between steps" in told["impossible_memory"][HYBRID]
    assert told["peak_memory"]["all"]["rows"] == 1


@pytest.mark.parametrize("away", [3, 9])
def test_layers_offloaded_whole_leave_their_share_and_two_layers_that_are_back(away: int) -> None:
    x = layout(gpus=8, mbs=4, zero=Zero.no_shard)
    all_here, some_away = (
        priced(x, job(replace(GPT, activation_offload_layers=n))).stages[0] for n in (0, away)
    )
    head = 4096 * 512 * 2 * 2 + 4096 * 512
    layer = (all_here["activations_bytes"] - head) / 12
    gone = all_here["activations_bytes"] - some_away["activations_bytes"]
    back = some_away["buffers_bytes"] - all_here["buffers_bytes"]
    assert gone == pytest.approx(away * layer, rel=0.01)
    assert back == pytest.approx(2 * layer, rel=0.01)
