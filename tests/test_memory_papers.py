"""Published closed forms of memory and bubbles, each with its paper, against the cost model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from meshwright.cost.detail import estimate
from meshwright.cost.step import (
    Table,
    beside_pipeline_s,
    by_pipeline,
    memory_of_candidates,
    prepare,
    simulated_step_s,
)
from meshwright.describe.cluster import load_cluster
from meshwright.describe.decoder import build_decoder
from meshwright.describe.facts import Attention, Decoder, Layer, Mlp
from meshwright.describe.job import Execution, Job, Precision
from meshwright.describe.model import Model
from meshwright.describe.models import load_model
from meshwright.parallel.layout import (
    Layout,
    Pipeline,
    Recompute,
    Zero,
    layout,
    table,
)
from strategies import gpt_model

GB = 1e9

# Narayanan et al., arXiv:2104.04473, section 2.2: the bubble of 1F1B over its ideal time is
# (p - 1) / m, that of the interleaved schedule (p - 1) / (m * v).


def bare_model(num_layers: int) -> Model:
    """Return equal layers without embedding and head, so that even stages are equal."""
    layer = Layer(
        mixer=Attention(num_heads=16, num_kv_heads=16, head_dim=64), ffn=Mlp(ffn_hidden_size=4096)
    )
    return build_decoder(
        Decoder(model_type="bare", hidden_size=1024, vocab_size=0, layers=(layer,) * num_layers)
    )


def without_messages(model: Model, x: Layout[int], num_microbatches: int) -> Table:
    """Price a layout whose pipeline passes micro-batches on in no time."""
    job = Job(seq_len=2048, gbs=num_microbatches * x.dp * x.mbs)
    t = prepare(model, load_cluster(f"{x.world_size}xH100"), job, table([x]))
    return replace(t, message_s=np.zeros(1))


@pytest.mark.parametrize("pp", [2, 4, 8])
@pytest.mark.parametrize("vpp", [1, 2, 4])
@pytest.mark.parametrize("rounds", [1, 3, 8])
def test_the_bubble_is_pp_minus_1_over_m_times_vpp(pp: int, vpp: int, rounds: int) -> None:
    m = pp * rounds
    t = without_messages(bare_model(32), layout(pp=pp, vpp=vpp, gpus=8), m)
    (g,) = by_pipeline(t.job, t.x, t.priced)
    dp_s, optimizer_s = beside_pipeline_s(t, g)
    pipeline_s = simulated_step_s(t)[0] - dp_s[0] - optimizer_s[0]
    at = t.priced.inverse[0]
    ideal_s = m * (t.priced.forward + t.priced.backward)[at, 0] * 32 / pp
    assert (pipeline_s - ideal_s) / ideal_s == pytest.approx((pp - 1) / (m * vpp), rel=1e-9)


def activations(t: Table) -> list[float]:
    """Return the activation bytes of every pipeline rank that could be the fullest."""
    (g,) = by_pipeline(t.job, t.x, t.priced)
    return [float(m["activations_bytes"][0]) for m in memory_of_candidates(t, g)]


@pytest.mark.parametrize("pp", [2, 4, 8])
def test_1f1b_holds_the_layers_of_the_model_on_its_first_stage_however_deep_it_is(pp: int) -> None:
    # Narayanan et al., section 2.2.1: at most p micro-batches, each of 1/p of the layers.
    whole = activations(without_messages(bare_model(32), layout(gpus=8), 8))
    first = activations(without_messages(bare_model(32), layout(pp=pp, gpus=8), 8 * pp))
    assert max(first) == pytest.approx(max(whole), rel=1e-9)


@pytest.mark.parametrize("pp", [2, 4, 8])
def test_gpipe_holds_every_micro_batch(pp: int) -> None:
    # Huang et al., arXiv:1811.06965.
    one = activations(without_messages(bare_model(32), layout(pp=pp, gpus=8), 1))
    gpipe = layout(pp=pp, gpus=8, schedule=Pipeline.gpipe)
    assert max(activations(without_messages(bare_model(32), gpipe, 24))) == 24 * max(one)


@pytest.mark.parametrize("pp", [2, 4, 8])
@pytest.mark.parametrize("vpp", [2, 4])
def test_interleaving_holds_1_plus_pp_minus_1_over_pp_times_vpp_of_it(pp: int, vpp: int) -> None:
    # Korthikanti et al., arXiv:2205.05198, section 4.2.3: L * (1 + (p - 1) / (p * m)), m = vpp.
    whole = activations(without_messages(bare_model(32), layout(gpus=8), 8))
    first = activations(without_messages(bare_model(32), layout(pp=pp, vpp=vpp, gpus=8), 8 * pp))
    assert max(first) == pytest.approx((1 + (pp - 1) / (pp * vpp)) * max(whole), rel=1e-9)


# Korthikanti et al., arXiv:2205.05198, table 2: activation bytes of one layer of a GPT (LayerNorm,
# GELU, dropout, unfused attention, 16 bit), s tokens, b sequences, h features, a heads.

S, B, H, A, SCORES = 1024, 2, 1024, 16, 5 * 16 * 1024 / 1024
UNFUSED = Execution(flash_attention=False)


def layer_bytes(*, flash: bool = False, **choices: object) -> float:
    """Return what one GPT layer keeps of a micro-batch, in units of s*b*h."""
    job = Job(seq_len=S, gbs=64, execution=replace(UNFUSED, flash_attention=flash))
    x = table([layout(gpus=8, mbs=B, **choices)])  # pyright: ignore[reportArgumentType]
    t = prepare(gpt_model(hidden_size=H, num_heads=A), load_cluster("8xH100"), job, x)
    return float(t.priced.kept[t.priced.inverse[0], 0]) / (S * B * H)


def test_a_layer_keeps_34_plus_5as_over_h_without_parallelism() -> None:
    assert layer_bytes() == 34 + SCORES


@pytest.mark.parametrize("t", [2, 4, 8])
def test_tensor_parallelism_divides_all_but_10_of_it(t: int) -> None:
    assert layer_bytes(tp=t, sp=False) == 10 + 24 / t + SCORES / t


@pytest.mark.parametrize("t", [2, 4, 8])
def test_sequence_parallelism_divides_the_rest_too(t: int) -> None:
    assert layer_bytes(tp=t, sp=True) == (34 + SCORES) / t


@pytest.mark.parametrize("t", [1, 2, 4, 8])
def test_recomputing_core_attention_leaves_34_over_t(t: int) -> None:
    assert layer_bytes(tp=t, recompute=Recompute.core_attn) == 34 / t


def test_full_recomputation_leaves_the_input_of_a_layer() -> None:
    assert layer_bytes(recompute=Recompute.full) == 2
    # The paper counts the input whole on every rank; Megatron-LM divides it where sp does.
    assert layer_bytes(tp=4, sp=False, recompute=Recompute.full) == 2
    assert layer_bytes(tp=4, sp=True, recompute=Recompute.full) == 2 / 4


def test_flash_attention_keeps_one_fp32_sum_a_head_instead_of_scores() -> None:
    # Dao et al., arXiv:2205.14135: the log-sum-exp, s*b*a numbers.
    assert layer_bytes(flash=True) == 34 + 4 * A / H


@pytest.mark.parametrize("cp", [2, 4])
def test_context_parallelism_divides_tokens(cp: int) -> None:
    assert layer_bytes(flash=True, cp=cp) == layer_bytes(flash=True) / cp


# The guides' example of a 70B model: 140 + 140 + 280 GB without parallelism, under 16-bit weights,
# gradients and Adam without master weights; a sixteenth of it at TP4 PP4.

GUIDE = Precision(
    name="guide", matmul="bf16", grad_bytes=2.0, grad_reduce_bytes=2.0, master_bytes=0.0,
    moment_bytes=4.0,
)  # fmt: skip
LLAMA = load_model("llama3-70b")
SCALE = 70e9 / LLAMA.num_params
STATIC = ("weights_bytes", "grads_bytes", "optimizer_bytes")


def stages_of(x: Layout[int], job: Job, model: Model = LLAMA) -> list[dict[str, float]]:
    return estimate(model, load_cluster(f"{x.world_size}xH100"), job, x).stages


def guide_job(seq_len: int = 4096, gbs: int = 64) -> Job:
    return Job(seq_len=seq_len, gbs=gbs, precision=GUIDE)


def test_the_608_gb_example_under_its_own_assumptions() -> None:
    (rank,) = stages_of(layout(dp=8, zero=Zero.no_shard), guide_job())
    # The vocabulary of 128,256 needs no padding, so the parameters are the model's own.
    held = [rank[term] * SCALE / GB for term in STATIC]
    assert held == pytest.approx([140, 140, 280], rel=1e-12)


def test_the_608_gb_example_at_tp4_pp4_holds_a_sixteenth_the_norms_and_the_padding() -> None:
    ranks = stages_of(layout(tp=4, pp=4, gpus=64, zero=Zero.no_shard), guide_job())
    # Norms are whole on every tensor-parallel rank; Megatron-LM pads both tables to 128 * tp rows.
    norms, padding = (2 * 80 + 1) * 8192, 2 * (128512 - 128256) * 8192
    for term, per_param, each in zip(STATIC, (2, 2, 4), (8.75, 8.75, 17.5), strict=True):
        mean = sum(rank[term] for rank in ranks) / 4
        params = LLAMA.num_params + padding + 3 * norms
        assert mean == pytest.approx(per_param * params / 16, rel=1e-12)
        assert mean * SCALE / GB == pytest.approx(each, rel=2e-4)


def test_megatron_mixed_precision_holds_18_bytes_a_parameter_where_the_example_has_8() -> None:
    (rank,) = stages_of(layout(dp=8, zero=Zero.no_shard), Job(seq_len=4096, gbs=64))
    per_param = [rank[term] / LLAMA.num_params for term in STATIC]
    assert per_param == pytest.approx([2, 4, 12], rel=1e-12)
    ranks = stages_of(layout(tp=4, pp=4, gpus=64, zero=Zero.no_shard), Job(seq_len=4096, gbs=64))
    mean = sum(rank[term] for rank in ranks for term in STATIC) / 4
    assert mean * SCALE / GB == pytest.approx(78.75, rel=2e-4)


def test_activations_fall_by_tp_with_sequence_parallelism() -> None:
    # The guides' 48 -> 12 GB at TP4.
    def kept(tp: int) -> float:
        x = layout(tp=tp, gpus=8, zero=Zero.no_shard)
        (rank,) = stages_of(x, guide_job())
        return rank["activations_bytes"]

    assert kept(1) == pytest.approx(4 * kept(4), rel=1e-12)


def test_the_first_stage_holds_pp_micro_batches_where_the_example_counts_one() -> None:
    x = layout(tp=4, pp=4, gpus=64, zero=Zero.no_shard)
    one = stages_of(x, guide_job(gbs=4))[0]["activations_bytes"]
    assert stages_of(x, guide_job(gbs=64))[0]["activations_bytes"] == pytest.approx(4 * one)


def test_keys_and_values_of_32k_tokens_of_a_70b_are_10_7_gb() -> None:
    # The guides call it a cache; it is the K and V activations of 80 layers with 8 groups of 128.
    per_token = sum(
        comm.elements
        for kind in LLAMA.layer_pattern
        for op in LLAMA.layer_kinds[kind].ops
        for comm in op.comm
        if comm.kind == "cp_kv"
    )
    assert per_token * 32768 * 2 / GB == pytest.approx(10.737, rel=1e-4)


# Rajbhandari et al., arXiv:1910.02054, figure 1: 7.5B parameters, 64 ranks, K = 12 bytes of
# optimizer state, 16-bit gradients.


@pytest.mark.parametrize(
    ("zero", "bytes_per_rank"),
    [
        (Zero.no_shard, 120.0e9),
        (Zero.optim, 31.4e9),
        (Zero.optim_grads, 16.6e9),
        (Zero.optim_grads_params, 1.88e9),
    ],
)
def test_the_stages_of_zero_hold_what_its_figure_1_says(zero: Zero, bytes_per_rank: float) -> None:
    paper = Precision(name="zero", matmul="fp16", grad_bytes=2.0)
    model = load_model("llama3-8b")
    job = Job(seq_len=2048, gbs=64, precision=paper)
    (rank,) = stages_of(layout(dp=64, zero=zero), job, model)
    held = sum(rank[term] for term in STATIC) / model.num_params * 7.5e9
    assert held == pytest.approx(bytes_per_rank, rel=4e-3)


def test_hybrid_sharding_keeps_a_copy_in_every_group() -> None:
    # Zhao et al., arXiv:2304.11277, section 3.2.2 (hybrid sharding of FSDP).
    model = load_model("llama3-8b")
    job = Job(seq_len=2048, gbs=64)
    x = layout(dp=64, zero=Zero.optim_grads_params, dp_replicate=8)
    (rank,) = stages_of(x, job, model)
    assert sum(rank[term] for term in STATIC) == pytest.approx(18 * model.num_params / 8)


# Hu et al., arXiv:2106.09685, section 4: an adapter of rank r adds r * (d + k) parameters.


def test_an_adapter_adds_r_times_d_plus_k_parameters() -> None:
    model = bare_model(4)
    job = Job(seq_len=2048, gbs=8, task="lora", lora_rank=4)
    (rank,) = stages_of(layout(dp=8, zero=Zero.no_shard), job, model)
    h, ffn = 1024, 4096
    adapters = 4 * 4 * ((h + 3 * h) + (h + h) + (h + 2 * ffn) + (ffn + h))
    assert rank["grads_bytes"] == 4 * adapters
